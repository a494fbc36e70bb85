"""Trainings that go on after an interruption, under the same circumstances or others."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from freqprune.errors import InputError
from freqprune.training.classifier import Classifier
from freqprune.training.optimization import Optimization, take_settings
from freqprune.training.whole_sets import DigitsData
from tests.training.small import trainer


class Seen(pl.Callback):
    """Learning rates and labels of every epoch; ends after `stop` of them and leaves a checkpoint."""

    def __init__(self, folder: Path, stop: int | None = None) -> None:
        self.file, self.stop = folder / "last.ckpt", stop
        self.rates: dict[int, list[float]] = {}
        self.labels: dict[int, list[Tensor]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rates.setdefault(trainer.current_epoch, []).append(trainer.optimizers[0].param_groups[0]["lr"])
        self.labels.setdefault(trainer.current_epoch, []).append(batch[1].clone())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.stop == trainer.current_epoch + 1:
            trainer.save_checkpoint(self.file)
            trainer.should_stop = True


def trained(
    seen: pl.Callback,
    folder: Path,
    batch_size: int = 16,
    ckpt: Path | None = None,
    runs: dict[str, Any] | None = None,
    **data: Any,
) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    module = Classifier({"name": "resnet8", "stage_widths": [4, 4, 8]}, lr=0.1)
    digits = DigitsData(limit_train=128, limit_test=50, flip=False, batch_size=batch_size, **data)
    run = trainer(folder, seen, **{"max_epochs": 4, **(runs or {})})
    run.fit(module, datamodule=digits, ckpt_path=ckpt, weights_only=True)
    return run


@pytest.mark.parametrize("val_fraction", [0.1, 0])
@pytest.mark.parametrize("max_epochs", [-1, 4])
def test_a_training_by_steps_goes_on_with_the_epoch_after(max_epochs: int, val_fraction: float, tmp_path: Path) -> None:
    whole, first, resumed = Seen(tmp_path), Seen(tmp_path, stop=1), Seen(tmp_path)
    by_steps = {"max_epochs": max_epochs, "max_steps": 32 if max_epochs < 0 else 1000}
    ended = trained(whole, tmp_path, runs=by_steps, val_fraction=val_fraction)
    trained(first, tmp_path, runs=by_steps, val_fraction=val_fraction)
    again = trained(resumed, tmp_path, ckpt=first.file, runs=by_steps, val_fraction=val_fraction)
    assert (again.global_step, again.current_epoch) == (ended.global_step, ended.current_epoch)
    assert resumed.labels.keys() == whole.labels.keys() - {0}
    for epoch, labels in resumed.labels.items():
        assert torch.equal(torch.cat(labels), torch.cat(whole.labels[epoch])), epoch


class Validated(Seen):
    """Leaves a checkpoint at the end of the validation of the second epoch."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1 and not trainer.sanity_checking:
            trainer.save_checkpoint(self.file)


def test_a_checkpoint_of_a_validation_goes_on_with_epochs_of_as_many_steps(tmp_path: Path) -> None:
    whole, resumed = Validated(tmp_path), Seen(tmp_path)
    trained(whole, tmp_path)
    trained(resumed, tmp_path, ckpt=whole.file)
    for epoch in (2, 3):
        assert resumed.rates[epoch] == pytest.approx(whole.rates[epoch])
    with pytest.raises(InputError, match=r"an epoch has 2 steps here and had 8: go on .*last\.ckpt"):
        trained(Seen(tmp_path), tmp_path, 48, whole.file)


def test_a_longer_training_begins_with_the_rate_of_its_own_schedule(tmp_path: Path) -> None:
    short, long, whole = Seen(tmp_path, stop=2), Seen(tmp_path), Seen(tmp_path)
    trained(short, tmp_path, runs={"max_epochs": 2})
    trained(long, tmp_path, ckpt=short.file)
    trained(whole, tmp_path)
    assert long.rates[2] == pytest.approx(whole.rates[2])


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_an_average_of_weights_in_other_numbers_is_refused(precision: str, tmp_path: Path) -> None:
    module = Classifier({"name": "resnet8", "stage_widths": [4, 4, 8]}, ema=0.9)
    digits = DigitsData(limit_train=32, limit_test=50, batch_size=16)
    with pytest.raises(InputError, match=f"averages weights in float32, and the precision {precision}"):
        trainer(tmp_path, max_epochs=1, precision=precision).fit(module, datamodule=digits)
    # Nothing is averaged there.
    assert trainer(tmp_path, precision=precision).test(module, datamodule=digits, verbose=False)


@pytest.mark.parametrize(("batch_size", "stop"), [(32, 2), (32, 1), (8, 2)])
def test_the_learning_rate_is_that_of_the_epoch_with_batches_of_another_size(
    batch_size: int, stop: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, resumed, whole = Seen(tmp_path, stop=stop), Seen(tmp_path, stop=3), Seen(tmp_path)
    trained(first, tmp_path)
    assert "goes on where it is" not in caplog.text
    trained(resumed, tmp_path, batch_size, first.file)
    assert f"an epoch has {128 // batch_size} steps here and had 8 before" in caplog.text
    caplog.clear()
    again = Seen(tmp_path)
    trained(again, tmp_path, batch_size, resumed.file)
    # Once told, it is so.
    assert "goes on where it is" not in caplog.text
    trained(whole, tmp_path, batch_size)
    for epoch, rates in {**resumed.rates, **again.rates}.items():
        assert rates == pytest.approx(whole.rates[epoch])


class Within(Seen):
    """Leaves a checkpoint within the second epoch, or another, and goes on."""

    at = 6

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.file)


def test_a_training_that_ended_within_an_epoch_goes_on_with_the_rate_of_its_step(tmp_path: Path) -> None:
    whole, resumed = Within(tmp_path), Seen(tmp_path)
    trained(whole, tmp_path, 32)
    with pytest.warns(UserWarning, match="a checkpoint that ended before the epoch ended"):
        trained(resumed, tmp_path, 32, whole.file)
    assert resumed.rates.keys() == {1, 2, 3}
    # Epochs are of four steps.
    assert resumed.rates[1] == pytest.approx(whole.rates[1][2:])
    for epoch in (2, 3):
        assert resumed.rates[epoch] == pytest.approx(whole.rates[epoch])


def test_the_rate_that_is_asked_for_holds_within_the_first_epoch_too(tmp_path: Path) -> None:
    first, rates = Within(tmp_path), Seen(tmp_path)
    first.at = 2
    trained(first, tmp_path, 32)
    pl.seed_everything(0, verbose=False)
    module = Classifier({"name": "resnet8", "stage_widths": [4, 4, 8]}, lr=0.001)
    digits = DigitsData(limit_train=128, limit_test=50, flip=False, batch_size=32)
    with pytest.warns(UserWarning, match="a checkpoint that ended before the epoch ended"):
        trainer(tmp_path, rates, max_epochs=4).fit(module, datamodule=digits, ckpt_path=first.file, weights_only=True)
    assert rates.rates[0] == pytest.approx([rate / 100 for rate in first.rates[0][2:]])


def test_workers_read_the_images_of_the_epoch_that_a_training_goes_on_with(tmp_path: Path) -> None:
    jitter = {"num_workers": 1, "transforms": [{"name": "ColorJitter", "brightness": 0.5}]}
    whole, first, resumed = Seen(tmp_path), Seen(tmp_path, stop=1), Seen(tmp_path)
    trained(whole, tmp_path, **jitter)
    trained(first, tmp_path, **jitter)
    trained(resumed, tmp_path, ckpt=first.file, **jitter)
    assert resumed.labels.keys() == {1, 2, 3}
    for epoch, labels in resumed.labels.items():
        assert torch.equal(torch.cat(labels), torch.cat(whole.labels[epoch])), epoch
    assert not torch.equal(torch.cat(whole.labels[0]), torch.cat(whole.labels[1]))


class Rates(pl.Callback):
    """What the optimizer of every epoch is set to."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, ...]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        group = trainer.optimizers[0].param_groups[0]
        self.seen.append(tuple(round(group.get(key, 0.0), 6) for key in ("lr", "weight_decay", "momentum")))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last = trainer.optimizers[0].param_groups[0]


def go_on(
    tmp_path: Path,
    ckpt: Path | None = None,
    rates: Rates | None = None,
    kind: type[Classifier] = Classifier,
    **settings: Any,
) -> list[tuple[float, ...]]:
    pl.seed_everything(0, verbose=False)
    module = kind({"name": "resnet8", "stage_widths": [4, 4, 8]}, **settings)
    digits, rates = DigitsData(limit_train=64, limit_test=50, batch_size=16), rates or Rates()
    run = trainer(tmp_path, rates, max_epochs=1 if ckpt is None else 2)
    run.fit(module, datamodule=digits, ckpt_path=ckpt, weights_only=True)
    if ckpt is None:
        run.save_checkpoint(tmp_path / "last.ckpt")
    return rates.seen


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_training_goes_on_with_the_rate_that_is_asked_for(schedule: str, tmp_path: Path) -> None:
    go_on(tmp_path, lr=0.1, schedule=schedule)
    asked, rates = {"lr": 0.001, "weight_decay": 0.0, "momentum": 0.5}, Rates()
    [(lr, weight_decay, momentum)] = go_on(tmp_path, tmp_path / "last.ckpt", rates, schedule=schedule, **asked)
    # Half of the cosine is over.
    assert lr == pytest.approx(0.001 if schedule == "constant" else 0.0005)
    assert (weight_decay, momentum) == (0.0, 0.5)
    assert rates.last["lr"] == pytest.approx(0.001 if schedule == "constant" else 0.0)


def test_every_group_of_parameters_goes_on_with_what_is_asked_for() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = Optimization(lr=0.1, decay_norms=False).optimizer(net)
    schedule = LambdaLR(optimizer, lambda step: 0.5)
    take_settings(schedule, Optimization(lr=0.01, weight_decay=0.2, decay_norms=False), net)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005, 0.005])
    assert schedule.base_lrs == [0.01, 0.01]


def test_arguments_that_are_no_longer_given_do_not_stay(tmp_path: Path) -> None:
    rates = Rates()
    go_on(tmp_path, name="AdamW", lr=0.001, arguments={"betas": [0.5, 0.9]})
    go_on(tmp_path, tmp_path / "last.ckpt", rates, name="AdamW", lr=0.001)
    assert rates.last["betas"] == (0.9, 0.999)


class Own(Classifier):
    """With an optimizer of its own, in two groups."""

    def configure_optimizers(self) -> Any:
        first, *others = self.net.parameters()
        return torch.optim.AdamW([{"params": [first]}, {"params": others}], lr=1e-3, weight_decay=0.01)


def test_an_optimizer_of_ones_own_goes_on_as_it_was(tmp_path: Path) -> None:
    go_on(tmp_path, kind=Own)
    assert go_on(tmp_path, tmp_path / "last.ckpt", kind=Own, name="Adam") == [(0.001, 0.01, 0.0)]


class Counting(torch.optim.SGD):
    """Keeps state where settings are, as Prodigy does."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, lr, weight_decay=weight_decay)
        for group in self.param_groups:
            group["k"] = 0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] += 1
        return super().step(closure)


def test_state_among_the_settings_of_an_optimizer_stays(tmp_path: Path) -> None:
    name, rates = f"{__name__}.Counting", Rates()
    go_on(tmp_path, name=name)
    go_on(tmp_path, tmp_path / "last.ckpt", rates, name=name)
    assert rates.last["k"] == 8


def test_the_same_optimizer_by_another_name_goes_on(tmp_path: Path) -> None:
    go_on(tmp_path)
    assert len(go_on(tmp_path, tmp_path / "last.ckpt", name="torch.optim.SGD")) == 1


@pytest.mark.parametrize("other", [{"name": "AdamW", "lr": 0.001}, {"decay_norms": False}])
def test_the_state_of_another_optimizer_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    go_on(tmp_path)
    with pytest.raises(InputError, match=f"{next(iter(other))} = .*cannot go on with that state"):
        go_on(tmp_path, tmp_path / "last.ckpt", **other)


def test_a_state_that_the_optimizer_has_not_kept_is_asked_for_by_name(tmp_path: Path) -> None:
    adam = {"name": "AdamW", "lr": 0.001}
    go_on(tmp_path, **adam)
    with pytest.raises(InputError, match=r"trained without arguments\.amsgrad .*leave it out"):
        go_on(tmp_path, tmp_path / "last.ckpt", **adam, arguments={"amsgrad": True})
    go_on(tmp_path, momentum=0.9)
    go_on(tmp_path, tmp_path / "last.ckpt", arguments={"momentum": 0.95})


def test_without_an_average_a_training_goes_on_with_the_weights_themselves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Begins(Rates):
        weights: dict[str, Tensor]

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}

    class Saves(Rates):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            # At the end of the training the average is all that is left.
            trainer.save_checkpoint(tmp_path / "middle.ckpt")

    go_on(tmp_path, None, Saves(), ema=0.9)
    stored = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    begins = Begins()
    with pytest.warns(UserWarning, match="EMAWeightAveraging"):
        go_on(tmp_path, tmp_path / "middle.ckpt", begins)
    assert "goes on with the weights themselves, not with their average" in caplog.text
    for name, value in stored["current_model_state"].items():
        assert torch.equal(begins.weights[name], value), name
    assert any(not torch.equal(value, stored["state_dict"][name]) for name, value in begins.weights.items())


def test_an_average_of_ones_own_goes_on(tmp_path: Path) -> None:
    class Own(pl.callbacks.EMAWeightAveraging):
        began: dict[str, Tensor]

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            trainer.save_checkpoint(tmp_path / "middle.ckpt")

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_train_start(trainer, pl_module)
            assert self._average_model is not None
            self.began = {name: one.clone() for name, one in self._average_model.module.state_dict().items()}

    def fit(callback: pl.Callback, epochs: int, ckpt: Path | None = None) -> None:
        pl.seed_everything(0, verbose=False)
        digits = DigitsData(limit_train=64, limit_test=50, batch_size=16)
        module = Classifier({"name": "resnet8", "stage_widths": [4, 4, 8]})
        trainer(tmp_path, callback, max_epochs=epochs).fit(module, datamodule=digits, ckpt_path=ckpt, weights_only=True)

    fit(Own(decay=0.9), 1)
    (tmp_path / "middle.ckpt").rename(tmp_path / "first.ckpt")
    stored, again = torch.load(tmp_path / "first.ckpt", weights_only=True), Own(decay=0.9)
    fit(again, 2, tmp_path / "first.ckpt")
    for name, value in again.began.items():
        assert torch.equal(value, stored["state_dict"][name]), name


def test_a_checkpoint_is_tested_whatever_the_optimizer(tmp_path: Path) -> None:
    go_on(tmp_path)
    module = Classifier({"name": "resnet8", "stage_widths": [4, 4, 8]}, name="AdamW", lr=0.001)
    run = trainer(tmp_path, max_epochs=1)
    (found,) = run.test(module, DigitsData(limit_test=50), tmp_path / "last.ckpt", verbose=False, weights_only=True)
    assert 0 <= found["test/accuracy"] <= 1
