"""Progressive resizing: how large images are in which epoch, and that a training sees them so."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.jobs.assembly import check_sizes
from freqprune.training.classifier import Classifier
from freqprune.training.resizing import ProgressiveResizing
from freqprune.training.whole_sets import DigitsData

DATA: dict[str, Any] = {"limit_train": 32, "batch_size": 16, "num_workers": 0}


class Sizes(pl.Callback):
    """Sides of the images of each epoch: trained on, then validated on."""

    def __init__(self) -> None:
        self.trained: dict[int, set[tuple[int, ...]]] = {}
        self.validated: set[tuple[int, ...]] = set()

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: tuple[Tensor, Tensor], number: int) -> None:
        assert batch[0].is_contiguous(memory_format=torch.channels_last)
        self.trained.setdefault(trainer.current_epoch, set()).add(tuple(batch[0].shape[-2:]))

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: tuple[Tensor, Tensor], *_: int) -> None:
        self.validated.add(tuple(batch[0].shape[-2:]))


def fit(data: DigitsData, **settings: Any) -> Sizes:
    seen = Sizes()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen],
        **settings,
    )
    trainer.fit(Classifier({"name": "resnet8", "stage_widths": [4, 4, 8]}, lr=0.01), data)
    return seen


def test_a_training_sees_small_images_first_and_whole_ones_at_last() -> None:
    settings = {"initial_scale": 0.5, "delay_fraction": 0.4, "finetune_fraction": 0.2}
    # Tried without and with a transform of whole batches, which comes before.
    for transforms in (None, ["CutMix"]):
        seen = fit(DigitsData(progressive_resizing=settings, transforms=transforms, **DATA), max_epochs=5)
        # Two epochs of 16 pixels, the start of the growth, half of it, the last.
        assert seen.trained == {0: {(16, 16)}, 1: {(16, 16)}, 2: {(16, 16)}, 3: {(24, 24)}, 4: {(32, 32)}}
        assert seen.validated == {(32, 32)}


def test_the_last_epoch_is_whole_whatever_was_asked_for() -> None:
    for settings in ({"finetune_fraction": 0.0}, {"delay_fraction": 1.0, "finetune_fraction": 0.0}, {}):
        for epochs in (1, 2, 7):
            assert ProgressiveResizing(**settings).sides(epochs - 1, epochs, 30, 41) == (30, 41)


def test_sides_are_multiples_grow_and_never_exceed_the_image() -> None:
    resizing = ProgressiveResizing(0.3, 0.2, 0.3, 8)
    sides = [resizing.sides(epoch, 40, 30, 41) for epoch in range(40)]
    assert sides == sorted(sides)
    assert sides[:9] == [(8, 16)] * 9
    assert sides[28:] == [(30, 41)] * 12
    assert all(h <= 30 and w <= 41 and (h % 8 == 0 or h == 30) and (w % 8 == 0 or w == 41) for h, w in sides)
    # One multiple at least.
    assert ProgressiveResizing(0.01).sides(0, 10, 32, 32) == (4, 4)


def test_small_images_are_means_of_the_whole_ones() -> None:
    rows = torch.arange(8.0)
    ramp = rows.view(1, 1, 8, 1).expand(1, 1, 8, 8).contiguous()
    found = ProgressiveResizing(0.5)(ramp, 0, 10)
    # A triangle over four rows, one eighth, three eighths, three eighths, one eighth; cut off at the edge.
    assert found.shape == (1, 1, 4, 4)
    torch.testing.assert_close(found[0, 0, 1:3, 0], torch.tensor([2.5, 4.5]))
    assert ProgressiveResizing(0.5)(ramp, 9, 10) is ramp


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"initial_scale": 0}, r"initial_scale of data.progressive_resizing must be a number in \(0, 1\], got 0"),
        ({"initial_scale": "half"}, "must be a number in .* got 'half'"),
        ({"initial_scale": True}, "must be a number in .* got True"),
        ({"delay_fraction": -0.1}, r"delay_fraction of .* must be a number in \[0, 1\], got -0.1"),
        ({"delay_fraction": None}, "must be a number in .* got None"),
        ({"finetune_fraction": float("nan")}, "must be a number in .* got nan"),
        ({"size_increment": 2.5}, "a whole number of pixels, at least 1, got 2.5"),
        ({"delay_fraction": 0.6, "finetune_fraction": 0.6}, "together at most 1, got 0.6 and 0.6"),
        ({"size_increment": 0}, "a whole number of pixels, at least 1, got 0"),
        ({"delay": 0.5}, "delay is no setting; there are initial_scale, delay_fraction"),
        (0.5, "null or a mapping such as"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        DigitsData(progressive_resizing=settings, **DATA)


@pytest.mark.parametrize("settings", [{"max_epochs": -1, "max_steps": 4}, {"max_epochs": 9, "max_steps": 4}])
def test_epochs_to_grow_over_are_needed(settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"say how many, trainer\.max_epochs, and leave trainer\.max_steps alone"):
        fit(DigitsData(progressive_resizing={}, **DATA), **settings)


def test_fine_tuning_sees_whole_images() -> None:
    data = DigitsData(progressive_resizing={}, **DATA)
    with data.whole():
        assert fit(data, max_epochs=2).trained == {0: {(32, 32)}, 1: {(32, 32)}}
    assert [data.sides(epoch, 10) for epoch in (0, 9)] == [(16, 16), (32, 32)]
    assert DigitsData(**DATA).sides(0, 10) == (32, 32)


def test_a_network_is_tried_on_every_size_that_is_trained_on() -> None:
    class Eights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 10, 3)

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-1] % 8 == 0, "sides must be multiples of 8"
            return self.conv(x).mean((2, 3))  # type: ignore[no-any-return]

    data = DigitsData(progressive_resizing={}, **DATA)
    example = data.normalize(data.pixels("val", 1))
    # From 16 to 32 in ten epochs by way of 20.
    with pytest.raises(InputError, match=r"(?s)images of 20 x 20 on the way: .*multiples of 8.*raise size_increment"):
        check_sizes(Eights(), data, example, 10)
    eights = DigitsData(progressive_resizing={"size_increment": 8}, **DATA)
    check_sizes(Eights(), eights, example, 10)
    # What transforms leave is what is trained on.
    cropped = DigitsData(transforms=[{"name": "RandomResizedCrop", "size": 24}], **DATA)
    assert cropped.training_size() == (24, 24)
