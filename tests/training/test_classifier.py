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
from tests.networks.test_trace import Answers
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


def vectors(n_vectors: int, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(n_vectors, 4), torch.arange(n_vectors) % 3), batch_size)


def test_an_epoch_of_warmup_counts_steps_where_gradients_are_accumulated(tmp_path: Path) -> None:
    module = Classifier(nn.Linear(4, 3), num_classes=3, lr=0.1, schedule="constant", warmup_epochs=1)
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"] / 0.1)

    run = trainer(tmp_path, Rates(), max_epochs=2, accumulate_grad_batches=2)
    run.fit(module, vectors(14, 2), vectors(2, 2))
    # Seven batches are four steps, the last of one batch.
    assert rates == pytest.approx([0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, *[1.0] * 7])


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_every_image_counts_the_same_in_a_measured_loss(stage: str, tmp_path: Path) -> None:
    module, batches = Classifier(nn.Linear(4, 3), num_classes=3), vectors(5, 4)
    (found,) = getattr(trainer(tmp_path), stage)(module, batches, verbose=False)
    expected = nn.functional.cross_entropy(module(batches.dataset.tensors[0]), batches.dataset.tensors[1])
    assert found[f"{stage.removesuffix('idate')}/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_teacher_in_train_mode_stays_as_it_is_and_is_asked_in_eval_mode(tmp_path: Path) -> None:
    teacher = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    modes: list[bool] = []
    teacher.register_forward_hook(lambda *_: modes.append(teacher[0].training))
    module = Classifier(nn.Linear(4, 3), num_classes=3, teacher=teacher, distill=0.5)
    trainer(tmp_path, max_epochs=2).fit(module, vectors(8, 4), vectors(4, 4))
    assert modes == [False] * 4
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


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


def test_networks_may_wrap_their_answer() -> None:
    assert Classifier(Answers(), num_classes=3)(torch.rand(2, 3, 8, 8)).shape == (2, 3)


def test_the_term_of_the_tags_is_added_to_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seven(Counted):
        def __call__(self, net: nn.Module, images: Tensor, step: int) -> Tensor:
            return images.new_tensor(7.0)

    module = Classifier(nn.Linear(4, 3), num_classes=3)
    module.tag_loss = Seven()  # type: ignore[assignment]
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    x, y = torch.rand(5, 4), torch.arange(5) % 3
    torch.testing.assert_close(module.training_step((x, y), 0), nn.functional.cross_entropy(module(x), y) + 7)
