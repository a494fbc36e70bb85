from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from freqprune import TagLoss
from freqprune.errors import InputError
from freqprune.training.classifier import Classifier
from tests.training.small import digits, trainer


def test_learns_and_schedules(tmp_path: Path) -> None:
    module = Classifier({"name": "resnet8"}, lr=0.05, warmup_epochs=1)
    run = trainer(tmp_path, max_epochs=4)
    run.fit(module, datamodule=digits())
    assert run.callback_metrics["train/loss"] < 2.0
    (group,) = run.optimizers[0].param_groups
    assert group["lr"] == pytest.approx(0.0, abs=1e-9)
    assert group["nesterov"]
    assert {id(p) for p in group["params"]} == {id(p) for p in module.net.parameters()}


@pytest.mark.parametrize("max_epochs", [-1, 100])
def test_epochs_of_warmup_are_epochs_where_steps_end_the_training(max_epochs: int, tmp_path: Path) -> None:
    module = Classifier({"name": "resnet8"}, lr=0.05, warmup_epochs=2)
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"] / 0.05)

    trainer(tmp_path, Rates(), max_epochs=max_epochs, max_steps=20).fit(module, datamodule=digits())
    n_batches = module.trainer.num_training_batches
    assert 2 * n_batches < 20
    assert rates[2 * n_batches - 1] == max(rates) == pytest.approx(1)
    assert rates[n_batches - 1] == pytest.approx(0.5)
    assert rates[-1] < 0.2


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= 2


def test_a_training_without_an_end_needs_a_constant_rate(tmp_path: Path) -> None:
    run = trainer(tmp_path, Stop(), max_epochs=-1)
    run.fit(Classifier({"name": "resnet8"}, lr=0.05, schedule="constant"), datamodule=digits())
    assert run.optimizers[0].param_groups[0]["lr"] == 0.05
    for settings in ({"schedule": "cosine"}, {"schedule": "constant", "warmup_epochs": 1.0}):
        module = Classifier({"name": "resnet8"}, **settings)
        with pytest.raises(InputError, match=r"max_epochs = -1 leaves open; set it or trainer\.max_steps"):
            trainer(tmp_path, max_epochs=-1).fit(module, datamodule=digits())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_loss_from_the_tags_in_any_lightning_module(precision: str, tmp_path: Path) -> None:
    """The same training with and without the term: with it the response is spread over fewer filters."""
    spread = []
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        module = Plain(TagLoss(silence=weight, every_n_steps=2, n_images=2))
        trainer(tmp_path, max_epochs=3, precision=precision, accumulate_grad_batches=2).fit(module, digits_loader())
        module.tag_loss = TagLoss(silence=1.0, n_images=8)
        module.tag_loss(module.net, digits_pixels(8))
        spread.append(float(module.tag_loss.latest["silence"]))
    assert spread[1] < spread[0] - 0.05


class Plain(pl.LightningModule):
    """Someone's module: one line of it adds the loss from the tags."""

    def __init__(self, tag_loss: TagLoss) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        )  # fmt: skip
        self.tag_loss = tag_loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels) + self.tag_loss(self.net, images, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def digits_loader() -> DataLoader[tuple[Tensor, ...]]:
    data = digits()
    data.setup()
    images = data.split("train")
    return DataLoader(TensorDataset(images.pixels.float() / 255, images.labels), batch_size=16, shuffle=True)


def digits_pixels(n_images: int) -> Tensor:
    data = digits()
    data.setup()
    return data.pixels("val", n_images)


def test_nan_loss_stops_with_advice(tmp_path: Path) -> None:
    module = Classifier({"name": "resnet8"}, lr=1e30)
    with pytest.raises(
        InputError, match=r"training loss became (nan|inf) in epoch 0, step \d+: lower the learning rate \(now 1e\+30\)"
    ):
        trainer(tmp_path).fit(module, datamodule=digits())


class Counted:
    """In the place of a loss from the tags: which steps it is asked for."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def due(self, step: int) -> bool:
        return False

    def __call__(self, net: nn.Module, images: Tensor, step: int) -> Tensor:
        self.steps.append(step)
        return images.new_zeros(())


def test_steps_of_the_loss_are_those_of_the_whole_training(tmp_path: Path) -> None:
    module, counted = Classifier({"name": "resnet8"}), Counted()
    module.tag_loss = counted  # type: ignore[assignment]
    run = trainer(tmp_path, max_epochs=3, limit_train_batches=2, limit_val_batches=0)
    run.fit(module, datamodule=digits())
    assert counted.steps == list(range(6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"momentum": 1.0}, r"in \[0, 1\)"),
        ({"label_smoothing": 1.0}, "smoothing"),
    ],
)
def test_bad_optimizer(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Classifier({"name": "resnet8"}, **settings)  # type: ignore[arg-type]
