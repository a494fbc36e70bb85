"""Transforms of training images: which of them there are, what they draw, and that the same is drawn again."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torchvision.transforms import v2

from freqprune.errors import InputError
from freqprune.training.classifier import Classifier
from freqprune.training.listed import ImageFolderData
from freqprune.training.transforms import Transforms
from freqprune.training.whole_sets import DigitsData
from tests.training.test_data import write_tree

ERASE = {"name": "RandomErasing", "p": 1.0, "value": 255}
PLAIN: dict[str, Any] = {"limit_train": 64, "batch_size": 16, "crop_padding": 0, "flip": False, "num_workers": 0}


def epoch(data: DigitsData, number: int = 0, seed: int = 0) -> list[torch.Tensor]:
    """Training batches of an epoch as the loader gives them."""
    torch.manual_seed(seed)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return [pixels for pixels, _ in loader]


def test_every_image_is_drawn_for_in_every_epoch_and_again_the_same() -> None:
    data, plain = DigitsData(transforms=[ERASE], **PLAIN), DigitsData(**PLAIN)
    batches = epoch(data)
    white = [
        (pixels == 255).all(1) & (whole != 255).any(1) for pixels, whole in zip(batches, epoch(plain), strict=True)
    ]
    flat = torch.cat(white).flatten(1)
    # A rectangle in every image, and not the same one.
    assert flat.any(1).all()
    assert len(flat.unique(dim=0)) > 50
    assert all(torch.equal(a, b) for a, b in zip(batches, epoch(data), strict=True))
    # Another rectangle in the next epoch, and with another seed, image by image.
    drawn: list[dict[bytes, Tensor]] = []
    for number, seed in ((0, 0), (1, 0), (0, 1)):
        whole, erased = torch.cat(epoch(plain, number, seed)), torch.cat(epoch(data, number, seed))
        drawn.append({bytes(one.numpy().tobytes()): other for one, other in zip(whole, erased, strict=True)})
    assert len(drawn[0]) > 50
    for others in drawn[1:]:
        alike = sum(torch.equal(image, others[key]) for key, image in drawn[0].items())
        assert alike < 0.1 * len(drawn[0])


def test_workers_and_the_random_numbers_of_others_make_no_difference() -> None:
    alone = epoch(DigitsData(transforms=["TrivialAugmentWide"], **PLAIN))
    helped = epoch(DigitsData(transforms=["TrivialAugmentWide"], **{**PLAIN, "num_workers": 2}))
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    images = torch.rand(4, 3, 8, 8)
    torch.set_rng_state(before)
    Transforms([ERASE]).one((images[0] * 255).to(torch.uint8), seed=3)
    Transforms([{"name": "MixUp", "num_classes": 2}]).mix(images, torch.tensor([0, 1, 0, 1]), torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
def test_mixed_images_have_the_shares_that_their_labels_say(name: str) -> None:
    transforms = Transforms([{"name": name, "alpha": 1.0}])
    transforms.bind(3, None)
    images, labels = torch.zeros(4, 1, 32, 32), torch.tensor([0, 1, 0, 1])
    images[1::2] = 1
    mixed, shares = transforms.mix(images, labels, torch.Generator().manual_seed(2))
    assert shares.shape == (4, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    assert 0.05 < shares[0, 1] < 0.95
    # Images of class 1 are ones, those of class 0 zeros.
    torch.testing.assert_close(mixed.mean((1, 2, 3)), shares[:, 1])
    again, _ = transforms.mix(images, labels, torch.Generator().manual_seed(2))
    assert torch.equal(mixed, again)


def test_one_of_several_mixing_transforms_is_drawn() -> None:
    transforms = Transforms(["MixUp", "CutMix"])
    transforms.bind(2, None)
    images, labels, generator = torch.zeros(2, 1, 16, 16), torch.tensor([0, 1]), torch.Generator().manual_seed(0)
    images[1] = 1
    values = [set(transforms.mix(images, labels, generator)[0].unique().tolist()) for _ in range(20)]
    cut = sum(value <= {0.0, 1.0} for value in values)
    assert 0 < cut < 20


def test_training_crops_what_evaluation_sees_the_middle_of(tmp_path: Path) -> None:
    write_tree(tmp_path, size=16)
    crop = {"name": "RandomResizedCrop", "size": 8, "antialias": True}
    for cache in ("memory", "disk"):
        data = ImageFolderData(tmp_path, cache=cache, transforms=[crop], eval_size=10, num_workers=0, batch_size=4)
        whole = ImageFolderData(tmp_path)
        for split in ("val", "test"):
            assert torch.equal(data.split(split).pixels[:], whole.split(split).pixels[:, :, 3:13, 3:13])
        assert torch.equal(data.pixels("train", 2), whole.pixels("train", 2)[:, :, 3:13, 3:13])
        assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 8, 8)
        assert next(iter(data.val_dataloader()))[0].shape == (4, 3, 10, 10)


def fit(epochs: int, saved: Path, ckpt: Path | None = None) -> dict[str, torch.Tensor]:
    pl.seed_everything(0, verbose=False)
    data = DigitsData(transforms=["TrivialAugmentWide", ERASE, "CutMix", "MixUp"], **PLAIN)
    module = Classifier({"name": "resnet8", "stage_widths": [4, 4, 8]})
    run = pl.Trainer(max_epochs=epochs, limit_train_batches=3, accelerator="cpu", logger=False, num_sanity_val_steps=0,
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    run.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    run.save_checkpoint(saved)
    return module.net.state_dict()


def test_resumed_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The schedule is that of two epochs, also where the first run stops before.
    monkeypatch.setattr(pl.Trainer, "estimated_stepping_batches", 6)
    whole = fit(2, tmp_path / "whole.ckpt")
    fit(1, tmp_path / "part.ckpt")
    resumed = fit(2, tmp_path / "resumed.ckpt", tmp_path / "part.ckpt")
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_a_transform_that_is_made_already() -> None:
    assert isinstance(Transforms([v2.RandomVerticalFlip(p=1)]).single[0], v2.RandomVerticalFlip)


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (["TrivialAugment"], r"no transform 'TrivialAugment'; did you mean TrivialAugmentWide\?"),
        (["cutmix"], r"no transform 'cutmix'; did you mean CutMix\?"),
        ([{"name": "RandomErasing", "prob": 1}], r"RandomErasing does not take {'prob': 1}"),
        ([{"p": 1}], "has no transform 'None'"),
        ("CutMix", r"must be a list such as \[TrivialAugmentWide, CutMix\], got 'CutMix'"),
        ([{"name": "ToDtype", "dtype": torch.float32}], "must leave uint8 images of 3 channels, they leave float32"),
        ([{"name": "Normalize", "mean": [0.5], "std": [0.5]}], r"\(Normalize\) do not run on images of 3 x 32 x 32"),
    ],
)
def test_what_is_refused(transforms: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DigitsData(transforms=transforms, **PLAIN).setup()


def test_an_evaluation_size_that_is_too_large() -> None:
    with pytest.raises(InputError, match=r"data.eval_size = 40 is more than the images have: 32 x 32 pixels"):
        DigitsData(eval_size=40, **PLAIN).setup()


def test_transforms_of_others_and_within_others() -> None:
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    grey = {"name": "Grayscale", "num_output_channels": 3}
    own = Transforms([torch.nn.Identity(), {"name": "RandomApply", "transforms": [grey], "p": 0.5}])
    own.bind(10, image)
    drawn = [own.one(image, seed) for seed in range(8)]
    assert {bool((one[0] == one[1]).all()) for one in drawn} == {True, False}
    # What is done to few images is tried as well.
    seldom = Transforms([{"name": "RandomErasing", "p": 0.1, "value": [1, 2]}])
    with pytest.raises(InputError, match=r"RandomErasing.* do not run on images"):
        seldom.bind(10, image)


class Inverts:
    """As transforms of libraries that draw from numpy's generator, or from Python's."""

    def __call__(self, image: Tensor) -> Tensor:
        return 255 - image if np.random.rand() < 0.5 else image if random.random() < 0.5 else image.flip(2)


class OfItsOwn:
    """As MONAI's, which keep a generator, and can be told where it begins."""

    drawing = np.random.RandomState()

    def set_random_state(self, seed: int) -> None:
        self.drawing = np.random.RandomState(seed)

    def __call__(self, image: Tensor) -> Tensor:
        return 255 - image if self.drawing.rand() < 0.5 else image


@pytest.mark.parametrize("kind", [Inverts, OfItsOwn])
def test_other_generators_follow_seed_epoch_and_image_too(kind: type[Any]) -> None:
    def batches(num_workers: int) -> list[Tensor]:
        data = DigitsData(
            limit_train=40, batch_size=8, crop_padding=0, flip=False, transforms=[kind()], num_workers=num_workers
        )
        return epoch(data, number=1)

    # Each of several has a place of its own to begin at.
    two = [
        Transforms([OfItsOwn(), OfItsOwn()]).one(torch.zeros(3, 2, 2, dtype=torch.uint8), seed) for seed in range(20)
    ]
    assert 0 < sum(bool(image.any()) for image in two) < 20
    before = random.getstate(), np.random.get_state()[1].tolist()
    alone, shared = batches(0), batches(2)
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one, other)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
