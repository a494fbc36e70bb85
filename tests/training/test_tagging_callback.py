"""The callback that tags a network while it trains."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from freqprune import FrequencyTagging, Stimulus, scores, tag
from freqprune.errors import InputError
from freqprune.networks.registry import build_model
from freqprune.pruning.importance import Evidence
from freqprune.pruning.verdict import judge
from freqprune.training.classifier import Classifier
from freqprune.training.whole_sets import DigitsData
from tests.training.small import digits, trainer


class Weights(pl.Callback):
    """Those that training goes on with."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.latest = pl_module.net.conv1.weight.detach().clone()


def test_the_average_is_tagged_where_nothing_is_validated(images: Tensor, tmp_path: Path) -> None:
    module, weights = Classifier({"name": "resnet8"}, ema=0.9), Weights()
    tagging = FrequencyTagging(n_images=2, images=images, network="net")
    data = digits()
    trainer(tmp_path, tagging, weights, max_epochs=1, limit_val_batches=0).fit(module, datamodule=data)
    assert not torch.equal(weights.latest, module.net.conv1.weight)
    expected = tag(module.net, images[:2], mean=data.mean, std=data.std).snr("conv1", "all")
    torch.testing.assert_close(tagging.latest["snr"]["conv1"], expected, rtol=1e-3, atol=1e-3)


def test_checkpoint_is_plain_and_resumes(tmp_path: Path) -> None:
    saver = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    data = digits()
    module = Classifier({"name": "resnet8"}, normalization={"mean": [0.5] * 3, "std": [0.5] * 3})
    trainer(tmp_path, saver, FrequencyTagging(n_images=2, network="net"), max_epochs=1, enable_checkpointing=True).fit(
        module, datamodule=data
    )
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["model"] == {"name": "resnet8"}
    state = content["callbacks"]["FrequencyTagging"]
    assert state["epoch"] == 0
    assert state["snr"]["conv1"].shape == (16, 20)
    tagging = FrequencyTagging(n_images=2, network="net", every_n_epochs=0)
    again = trainer(
        tmp_path,
        pl.callbacks.ModelCheckpoint(tmp_path / "again", save_last=True),
        tagging,
        max_epochs=2,
        enable_checkpointing=True,
    )
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        again.fit(Classifier({"name": "resnet8"}), datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.current_epoch == 2
    assert torch.equal(tagging.latest["snr"]["conv1"], state["snr"]["conv1"])


class Foreign(pl.LightningModule):
    """Somebody else's module: another name for everything, normalised inputs, dict batches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("seen", float(len(batch["label"])))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loader(images: Tensor) -> DataLoader[Any]:
    rows = [{"image": image, "label": 0} for image in images]
    return DataLoader(rows, batch_size=3)  # type: ignore[arg-type]


def test_works_in_any_lightning_module(images: Tensor, tmp_path: Path) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    shift, scale = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    module = Foreign()
    tagging = FrequencyTagging(Stimulus(), n_images=4, mean=mean, std=std, every_n_epochs=2, folder=tmp_path / "out")
    run = trainer(tmp_path, tagging, max_epochs=4)
    run.fit(module, loader((images - shift) / scale), loader((images - shift) / scale))
    assert tagging.latest["epoch"] == 3
    assert tagging.latest["layers"] == ["body.0"]
    # The same images through the function give the same answer: nothing of the loader's normalisation is left in.
    expected = tag(module, images, mean=mean, std=std).snr("body.0", "all")
    torch.testing.assert_close(tagging.latest["snr"]["body.0"], expected, rtol=1e-3, atol=1e-3)
    assert run.callback_metrics["important/body.0"] == run.callback_metrics["important/total"]
    assert 0 < run.callback_metrics["tagging/share"] <= 1
    with (tmp_path / "out" / "importance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["epoch"], r["layer"], r["filter"]) for r in rows] == [
        (e, "body.0", str(f)) for e in ("1", "3") for f in range(5)
    ]
    assert float(rows[-5]["snr_f1"]) == pytest.approx(expected[0, 3].item(), rel=1e-2)
    assert list(rows[0])[:4] == ["epoch", "layer_index", "layer", "filter"]
    assert list(rows[0])[-2:] == ["score", "important"]


def test_the_score_is_of_the_components_that_are_asked_for(images: Tensor, tmp_path: Path) -> None:
    tagging = FrequencyTagging(n_images=2, components=["f2"])
    trainer(tmp_path, tagging, max_epochs=1).fit(Foreign(), loader(images), loader(images))
    with (tmp_path / "importance.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    # Of one component alone it is the ratio of that component.
    assert [row["score"] for row in rows] == [row["snr_f2"] for row in rows] != [row["snr_f1"] for row in rows]


def test_tagging_does_not_change_training(tmp_path: Path) -> None:
    final = []
    for every in (0, 1):
        pl.seed_everything(3, verbose=False)
        module = Classifier({"name": "resnet8", "stage_widths": [4, 4, 8]})
        trainer(tmp_path, FrequencyTagging(n_images=1, network="net", every_n_epochs=every)).fit(
            module, datamodule=digits()
        )
        final.append({key: value.clone() for key, value in module.net.state_dict().items()})
    assert all(torch.equal(value, final[1][key]) for key, value in final[0].items())


def test_rows_of_an_interrupted_run_are_replaced(images: Tensor, tmp_path: Path) -> None:
    for epochs in (3, 2):
        trainer(tmp_path, FrequencyTagging(n_images=2), max_epochs=epochs).fit(
            Foreign(), loader(images), loader(images)
        )
    with (tmp_path / "importance.csv").open() as file:
        assert [r["epoch"] for r in csv.DictReader(file)] == ["0"] * 5 + ["1"] * 5


def test_no_validation_images_is_an_error(images: Tensor, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="needs a validation loader"),
        pytest.warns(UserWarning, match="no `val_dataloader`"),
    ):
        trainer(tmp_path, FrequencyTagging(n_images=2)).fit(Foreign(), loader(images))


def test_given_images_are_tagged_where_nothing_is_validated(images: Tensor, tmp_path: Path) -> None:
    module, tagging = Foreign(), FrequencyTagging(n_images=3, images=images, every_n_epochs=2)
    run = trainer(tmp_path, tagging, max_epochs=3, limit_val_batches=0)
    with pytest.warns(UserWarning, match="no `val_dataloader`"):
        run.fit(module, loader(images))
    assert tagging.latest["epoch"] == 1
    assert module.training
    expected = tag(module, images[:3]).snr("body.0", "all")
    torch.testing.assert_close(tagging.latest["snr"]["body.0"], expected, rtol=1e-3, atol=1e-3)
    assert run.callback_metrics["important/total"] == tagging.latest["important"]["body.0"].sum()
    validated = FrequencyTagging(n_images=3, images=images)
    trainer(tmp_path, validated, max_epochs=1).fit(module, loader(images), loader(1 - images))
    torch.testing.assert_close(validated.latest["snr"]["body.0"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, r"images must be floats of shape .*, got torch.float32 \(3, 8, 8\)"),
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, "images must be floats of shape .* got torch.uint8"),
        ({"images": torch.full((1, 3, 8, 8), 200.0)}, r"images must hold pixels in \[0, 1\], got values from 200"),
        ({"images": np.zeros((1, 3, 8, 8))}, r"images must be a tensor of pixels in \[0, 1\], got ndarray"),
        ({"n_images": 0}, "n_images must be at least 1"),
        ({"every_n_epochs": -1}, "every_n_epochs must be 0"),
        ({"noise_std": 0.0}, "noise_std must be above 0"),
        ({"alpha": 2.0}, "alpha must lie between"),
        ({"important_by": "luck"}, "important_by must be one of significance, threshold"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FrequencyTagging(**settings)


def test_wrong_normalisation_and_network_are_named(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="after undoing the normalisation"):
        trainer(tmp_path, FrequencyTagging(n_images=2)).fit(Foreign(), loader(images * 4 - 2), loader(images * 4 - 2))
    with pytest.raises(InputError, match=r"network = 'net' is no module of Foreign; it has body"):
        trainer(tmp_path, FrequencyTagging(n_images=2, network="net")).fit(Foreign(), loader(images), loader(images))
    data = DataLoader(TensorDataset(torch.rand(4, 7), torch.zeros(4)), batch_size=2)
    with pytest.raises(InputError, match="expects validation batches"):
        FrequencyTagging(n_images=2)._validation_images(_Fake(data), pl.LightningModule())  # type: ignore[arg-type]


class _Fake:
    def __init__(self, loader: Any) -> None:
        self.val_dataloaders = loader
        self.strategy = self
        self.global_rank, self.world_size = 0, 1

    def batch_to_device(self, batch: Any) -> Any:
        return batch


def test_networks_are_accepted_as_they_are() -> None:
    net = build_model({"name": "resnet8"})
    assert Classifier(net).net is net
    assert Classifier(net).hparams["model"] is None


@pytest.mark.parametrize("first", [True, False])
def test_the_average_is_tagged_in_either_order(first: bool, tmp_path: Path) -> None:
    module, tagging = Classifier({"name": "resnet8"}), FrequencyTagging(n_images=2, network="net")
    average = pl.callbacks.EMAWeightAveraging(decay=0.9)
    data, callbacks = digits(), [tagging, average] if first else [average, tagging]
    trainer(tmp_path, *callbacks, max_epochs=1).fit(module, datamodule=data)
    # The end of the training leaves the average in the module.
    expected = tag(module.net, data.pixels("val", 2), mean=data.mean, std=data.std).snr("conv1", "all")
    torch.testing.assert_close(tagging.latest["snr"]["conv1"], expected, rtol=1e-3, atol=1e-3)


def test_tags_are_there_at_every_validation_of_an_epoch(tmp_path: Path) -> None:
    tagging, stopping = FrequencyTagging(n_images=2, network="net"), pl.callbacks.EarlyStopping("important/total")
    run = trainer(tmp_path, tagging, stopping, max_steps=5, limit_train_batches=8, val_check_interval=0.25)
    run.fit(Classifier({"name": "resnet8"}), datamodule=DigitsData(limit_train=160, limit_test=50, batch_size=16))
    assert tagging.latest["epoch"] == 0
    with (tmp_path / "importance.csv").open(newline="") as file:
        rows = [(row["epoch"], row["layer"], row["filter"], row.get("component")) for row in csv.DictReader(file)]
    assert len(rows) == len(set(rows)) > 0


def test_mean_and_std_go_together() -> None:
    with pytest.raises(InputError, match="mean and std go together"):
        FrequencyTagging(std=[0.5])


def test_a_second_training_in_a_folder_begins_its_table(tmp_path: Path) -> None:
    def epochs(every: int) -> set[str]:
        tagging = FrequencyTagging(n_images=2, network="net", every_n_epochs=every, folder=tmp_path)
        data = DigitsData(limit_train=32, limit_test=50, batch_size=16)
        trainer(tmp_path, tagging, max_epochs=2).fit(Classifier({"name": "resnet8"}), datamodule=data)
        with (tmp_path / "importance.csv").open(newline="") as file:
            return {row["epoch"] for row in csv.DictReader(file)}

    assert epochs(1) == {"0", "1"}
    assert epochs(2) == {"1"}


class Halved(Foreign):
    """Normalises its batches before they are transferred."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "image": (batch["image"] - 0.5) / 0.25}


def test_images_are_those_that_the_hooks_of_a_module_make(images: Tensor, tmp_path: Path) -> None:
    module, normalised = Halved(), {"mean": [0.5] * 3, "std": [0.25] * 3}
    tagging = FrequencyTagging(n_images=2, **normalised)
    trainer(tmp_path, tagging, max_epochs=1).fit(module, loader(images), loader(images))
    expected = tag(module, images[:2], **normalised).snr("body.0", "all")
    torch.testing.assert_close(tagging.latest["snr"]["body.0"], expected, rtol=1e-3, atol=1e-3)


def test_images_that_could_not_be_tagged_are_refused_before_the_training(images: Tensor, tmp_path: Path) -> None:
    steps: list[int] = []

    class Steps(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            steps.append(1)

    bad = images * 4 - 2
    tagging = FrequencyTagging(n_images=2, every_n_epochs=2)
    with pytest.raises(InputError, match="after undoing the normalisation"):
        trainer(tmp_path, tagging, Steps(), max_epochs=2).fit(Foreign(), loader(bad), loader(bad))
    assert not steps
    # One that never comes is not looked at.
    trainer(tmp_path, FrequencyTagging(n_images=2, every_n_epochs=9), Steps(), max_epochs=1).fit(
        Foreign(), loader(bad), loader(bad)
    )
    assert steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spatial": "class_token"}, "class_token reads the first of the tokens"),
        ({"stimulus": Stimulus(mode="contrast", pivot=(0.5, 0.4))}, "pivot"),
        (
            {"stimulus": Stimulus(parts=torch.ones(2, 5, 5, dtype=torch.bool) * torch.eye(2, 5).bool()[:, None])},
            r"masks of \(5, 5\) pixels, the images have \(16, 16\)",
        ),
    ],
)
def test_what_tags_could_not_read_is_refused_before_the_training(
    settings: dict[str, Any], message: str, images: Tensor, tmp_path: Path
) -> None:
    module = Teacher()
    tagging = FrequencyTagging(n_images=2, every_n_epochs=2, network="body", **settings)
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, tagging, max_epochs=2).fit(module, loader(images), loader(images))
    assert module.n_steps == 0


def test_a_network_in_half_precision_is_tagged(tmp_path: Path) -> None:
    """(0 - 0.485) / 0.229 in bfloat16 is that of a pixel of -0.0016."""
    data = DigitsData(mean=[0.485] * 3, std=[0.229] * 3, limit_train=32, batch_size=16, num_workers=0)
    module, tagging = (
        Classifier({"name": "resnet8", "stage_widths": [4, 4, 8]}),
        FrequencyTagging(n_images=2, network="net"),
    )
    trainer(tmp_path, tagging, max_epochs=1, precision="bf16-true").fit(module, datamodule=data)
    assert tagging.latest["n_images"] == 2


def test_images_of_a_loader_that_nobody_deals_out(images: Tensor) -> None:
    """Each process sees all of them, and takes its share."""
    tagging = FrequencyTagging(n_images=3)
    for rank, share in ((0, [0, 2]), (1, [1])):
        rows = [{"image": image, "label": number} for number, image in enumerate(images)]
        fake = _Fake(DataLoader(rows, batch_size=2))  # type: ignore[arg-type]
        fake.global_rank, fake.world_size = rank, 2
        found, labels = tagging._validation_images(fake, pl.LightningModule())  # type: ignore[arg-type]
        assert torch.equal(found, images[share])
        assert labels is not None
        assert labels.tolist() == share


class Teacher(Foreign):
    """Has a part that the forward does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.n_steps = nn.Conv2d(3, 4, 3), 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.n_steps += 1
        return super().training_step(batch, batch_idx)


class NoForward(Teacher):
    """Calls its network by name in every step."""

    forward = pl.LightningModule.forward  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.n_steps += 1
        return nn.functional.cross_entropy(self.body(batch["image"]), batch["label"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Teacher, "the forward never runs teacher"), (NoForward, "has no forward.* one of body, teacher")],
)
def test_networks_that_could_not_be_tagged_are_refused_before_the_training(
    kind: type[Teacher], message: str, images: Tensor, tmp_path: Path
) -> None:
    module = kind()
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, FrequencyTagging(n_images=2, every_n_epochs=2), max_epochs=2).fit(
            module, loader(images), loader(images)
        )
    assert module.n_steps == 0
    named = FrequencyTagging(n_images=2, every_n_epochs=2, network="body")
    trainer(tmp_path, named, max_epochs=2).fit(module, loader(images), loader(images))
    assert named.latest["layers"] == ["0"]


def test_validation_loaders_come_in_any_collection(images: Tensor, tmp_path: Path) -> None:
    class Several(Foreign):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

    module, tagging = Several(), FrequencyTagging(n_images=2)
    trainer(tmp_path, tagging, max_epochs=1).fit(
        module, loader(images), {"clean": loader(images), "noisy": loader(1 - images)}
    )
    expected = tag(module, images[:2]).snr("body.0", "all")
    torch.testing.assert_close(tagging.latest["snr"]["body.0"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Total length of .list. across ranks is zero")
def test_no_validation_loader_among_those_given(images: Tensor, tmp_path: Path) -> None:
    class Empty(Foreign):
        def val_dataloader(self) -> Any:
            return []

    with pytest.raises(InputError, match="val_dataloaders is empty"):
        trainer(tmp_path, FrequencyTagging(n_images=2), max_epochs=1).fit(Empty(), loader(images))
    tagging = FrequencyTagging(n_images=2, images=images)
    trainer(tmp_path, tagging, max_epochs=1).fit(Empty(), loader(images))
    assert tagging.latest["n_images"] == 2


@pytest.mark.filterwarnings("ignore:Total length of .DataLoader. across ranks is zero")
def test_a_validation_loader_that_drops_its_only_batch(images: Tensor, tmp_path: Path) -> None:
    none = DataLoader(TensorDataset(images), batch_size=len(images) + 1, drop_last=True)
    with pytest.raises(InputError, match=r"the validation loader gives no batch of them: .*drop_last=False"):
        trainer(tmp_path, FrequencyTagging(n_images=2), max_epochs=1).fit(Foreign(), loader(images), none)


def test_given_images_are_tagged_at_validations_from_the_first_epoch_on(images: Tensor, tmp_path: Path) -> None:
    tagging = FrequencyTagging(n_images=2, images=images)
    run = trainer(tmp_path, tagging, max_epochs=4, check_val_every_n_epoch=2, num_sanity_val_steps=0)
    run.fit(Foreign(), loader(images), loader(images))
    with (tmp_path / "importance.csv").open(newline="") as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"1", "3"}


def test_filters_are_scored_and_judged_as_is_asked_for(images: Tensor, tmp_path: Path) -> None:
    module = Foreign()
    response = tag(module, images[:2])
    snr = response.snr("body.0", ["f1"])[:, 0]
    level = float(snr.median())
    tagging = FrequencyTagging(
        n_images=2, images=images, criterion="amplitude", components=["f1"], important_by="threshold", threshold=level
    )
    trainer(tmp_path, tagging, max_epochs=1).fit(module, loader(images), loader(images))
    flags = tagging.latest["important"]["body.0"]
    assert torch.equal(flags, snr > level)
    assert 0 < flags.sum() < len(flags)
    expected = scores("amplitude", Evidence(module, response, ["f1"]), ["body.0"])["body.0"]
    torch.testing.assert_close(tagging.latest["score"]["body.0"], expected, rtol=1e-3, atol=1e-6)


def test_significance_is_at_the_rate_that_is_asked_for(images: Tensor, tmp_path: Path) -> None:
    found = []
    for alpha in (0.5, 1e-3):
        module = Foreign()
        tagging = FrequencyTagging(n_images=2, images=images, noise_std=1.0, alpha=alpha)
        trainer(tmp_path, tagging, max_epochs=1).fit(module, loader(images), loader(images))
        expected = judge(tag(module, images[:2], noise_std=1.0), alpha=alpha).important["body.0"]
        assert torch.equal(tagging.latest["important"]["body.0"], expected)
        found.append(int(expected.sum()))
    assert found[0] > found[1]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resume_from_a_validation_keeps_the_rows_of_its_epoch(images: Tensor, tmp_path: Path) -> None:
    """Lightning saves after the tags, and does not validate that epoch again."""
    how = {"max_epochs": 4, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    saver = pl.callbacks.ModelCheckpoint(
        tmp_path, filename="{epoch}", save_on_train_epoch_end=False, save_top_k=-1, every_n_epochs=1
    )
    trainer(tmp_path, FrequencyTagging(n_images=2), saver, **{**how, "max_epochs": 2}).fit(
        Foreign(), loader(images), loader(images)
    )
    again = trainer(tmp_path, FrequencyTagging(n_images=2), **how)
    again.fit(Foreign(), loader(images), loader(images), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    with (tmp_path / "importance.csv").open(newline="") as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"1", "3"}
