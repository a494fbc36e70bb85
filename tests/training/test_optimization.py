"""Optimizers, schedules, averages and weights of classes, against torch, scikit-learn and plain loops."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sklearn.metrics import top_k_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.lr_scheduler import OneCycleLR

from freqprune.errors import InputError
from freqprune.training.classifier import Classifier
from freqprune.training.optimization import Optimization
from freqprune.training.whole_sets import DigitsData

SMALL = {"name": "resnet8", "stage_widths": [4, 4, 8]}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Watch(pl.Callback):
    """Weights, and statistics of a norm, after every step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.statistics: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.weights.append(pl_module.net.conv1.weight.detach().clone())
        self.statistics.append(pl_module.net.bn1.running_mean.clone())

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.validated.append(pl_module.net.conv1.weight.detach().clone())


class Save(pl.Callback):
    """A checkpoint after every epoch, while the fit is on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt")


def digits() -> DigitsData:
    return DigitsData(limit_train=64, limit_test=100, batch_size=16)


def test_an_optimizer_of_torch_by_its_name() -> None:
    for name in ("AdamW", "torch.optim.AdamW"):
        net = nn.Linear(2, 2)
        made = Optimization(name=name, lr=0.01, weight_decay=0.1, arguments={"betas": (0.8, 0.9)}).optimizer(net)
        assert type(made) is torch.optim.AdamW
        (group,) = made.param_groups
        assert (group["lr"], group["weight_decay"], group["betas"]) == (0.01, 0.1, (0.8, 0.9))
    assert type(Optimization(name="Rprop", weight_decay=0).optimizer(nn.Linear(1, 1))) is torch.optim.Rprop


def test_decay_spares_norms_and_biases() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    decayed, spared = Optimization(decay_norms=False, weight_decay=0.1).optimizer(net).param_groups
    assert [id(p) for p in decayed["params"]] == [id(net[0].weight), id(net[3].weight)]
    assert [id(p) for p in spared["params"]] == [id(net[0].bias), *map(id, net[1].parameters()), id(net[3].bias)]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    vit = nn.Sequential(nn.MultiheadAttention(8, 2), weight_norm(nn.Conv2d(3, 8, 2)))
    vit.token, vit.scale = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.ones(8, 1, 1))
    decayed, _ = Optimization(decay_norms=False, weight_decay=0.1).optimizer(vit).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(24, 8), (8, 8), (8, 1, 1, 1), (8, 3, 2, 2)]


@pytest.mark.parametrize(("warmup", "rise"), [(0, 0.3), (10, 0.2)])
def test_one_cycle_is_that_of_torch(warmup: int, rise: float) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = OneCycleLR(optimizer, max_lr=1.0, total_steps=50, pct_start=rise, cycle_momentum=False)
    rate = Optimization(schedule="one_cycle").rate(50, warmup)
    for step in range(50):
        assert rate(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        if step < 49:
            theirs.step()


def test_the_cosine_begins_at_the_peak_after_the_warmup() -> None:
    rate, quarter = Optimization().rate(12, 4), math.sqrt(2) / 4
    # Quarters of a half wave are two steps each.
    expected = {0: 0.25, 3: 1, 4: 1, 6: 0.5 + quarter, 8: 0.5, 10: 0.5 - quarter, 12: 0}
    assert [rate(step) for step in expected] == pytest.approx(list(expected.values()), abs=1e-12)


def test_steps_and_warmup() -> None:
    rate = Optimization(schedule="step", milestones=[0.5, 0.8], gamma=0.1).rate(10, 2)
    assert [rate(step) for step in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])
    rate = Optimization(schedule="constant").rate(10, 0)
    assert {rate(step) for step in range(10)} == {1.0}


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_warmup_as_long_as_the_training_is_said(warmup: int, caplog: pytest.LogCaptureFixture) -> None:
    module = Classifier(SMALL, warmup_epochs=warmup)
    pl.Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(module, datamodule=digits())
    assert ("the rate never reaches lr, nor falls" in caplog.text) == bool(warmup)


def test_the_average_of_the_weights_is_what_is_validated_and_left(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    watch, module = Watch(), Classifier(SMALL, ema=0.8)
    run = pl.Trainer(max_epochs=2, callbacks=[watch], **QUIET)
    run.fit(module, datamodule=digits())
    for seen, left in (
        (watch.weights, module.net.conv1.weight.detach()),
        (watch.statistics, module.net.bn1.running_mean),
    ):
        average = seen[0]
        for value in seen[1:]:
            average = 0.8 * average + 0.2 * value
        torch.testing.assert_close(left, average)
        assert not torch.equal(left, seen[-1])
    # After each epoch of as many steps; the second is what is left.
    first, second = watch.validated[0], watch.validated[-1]
    average = watch.weights[0]
    for value in watch.weights[1 : len(watch.weights) // 2]:
        average = 0.8 * average + 0.2 * value
    torch.testing.assert_close(first, average)
    assert torch.equal(second, module.net.conv1.weight)
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["net.conv1.weight"]
    assert torch.equal(saved, module.net.conv1.weight)


def test_an_average_leaves_indices_as_they_are(tmp_path: Path) -> None:
    module = Classifier(SMALL, ema=0.9)
    before = {name: buffer.clone() for name, buffer in module.net.named_buffers() if not buffer.is_floating_point()}
    assert any(name.endswith("shortcut.index") for name in before)
    pl.Trainer(default_root_dir=tmp_path, max_epochs=1, **QUIET).fit(module, datamodule=digits())
    for name, buffer in module.net.named_buffers():
        if name.endswith("index"):
            assert torch.equal(buffer, before[name]), name
        elif name.endswith("num_batches_tracked"):
            assert buffer == module.trainer.global_step


def test_an_average_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The schedule is that of two epochs, also where the first run stops before.
    monkeypatch.setattr(pl.Trainer, "estimated_stepping_batches", 8)
    final = []
    for stops in ([2], [1, 2]):
        ckpt = None
        for epochs in stops:
            pl.seed_everything(0, verbose=False)
            module, run = (
                Classifier(SMALL, ema=0.8),
                pl.Trainer(max_epochs=epochs, **{**QUIET, "callbacks": [Save(tmp_path)]}),
            )
            run.fit(module, datamodule=digits(), ckpt_path=ckpt, weights_only=True)
            ckpt = tmp_path / "last.ckpt"
        final.append(module.net.state_dict())
    assert all(torch.equal(value, final[1][key]) for key, value in final[0].items())


def test_accumulated_and_clipped_by_lightning() -> None:
    """As a step on the whole batch does, where nothing is normalised by the batch."""
    found = []
    for batch, accumulate, clip in ((32, 1, 0.01), (16, 2, 0.01), (32, 1, None)):
        torch.manual_seed(0)
        module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), num_classes=10, lr=0.5)
        data = DigitsData(limit_train=64, batch_size=batch, crop_padding=0, flip=False)
        pl.Trainer(max_epochs=1, accumulate_grad_batches=accumulate, gradient_clip_val=clip, **QUIET).fit(module, data)
        found.append(module.net[1].weight.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert (found[2] - found[0]).abs().max() > 1e-3


def test_early_stopping_by_lightning() -> None:
    stop = pl.callbacks.EarlyStopping("val/accuracy", mode="max", patience=1, min_delta=1.0)
    run = pl.Trainer(max_epochs=9, callbacks=[stop], **QUIET)
    run.fit(Classifier(SMALL), datamodule=digits())
    assert run.current_epoch == 2


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = torch.tensor([0] * 5 + [1] * 3 + [2])
    found = Optimization(class_weights="balanced").weights_of(labels, 4)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    assert found.tolist() == pytest.approx([*expected, 0])
    data = digits()
    module = Classifier(SMALL, class_weights="balanced")
    pl.Trainer(max_epochs=1, **QUIET).fit(module, datamodule=data)
    expected = compute_class_weight("balanced", classes=np.arange(10), y=data.split("train").labels.numpy())
    assert module.class_weights.tolist() == pytest.approx(list(expected))
    assert "class_weights" not in module.state_dict()


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 2.0]])
def test_smoothed_labels_by_hand(weights: list[float] | None) -> None:
    module = Classifier(nn.Linear(2, 3), num_classes=3, label_smoothing=0.3, class_weights=weights).double()
    weight = torch.tensor(weights or [1.0] * 3, dtype=torch.float64)
    if weights:
        module.class_weights.copy_(weight)
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 2])
    # A third of 0.3 goes to every class.
    shares = 0.7 * nn.functional.one_hot(labels, 3) + 0.1
    expected = -(shares * weight * logits.log_softmax(1)).sum() / weight[labels].sum()
    torch.testing.assert_close(module._loss(logits, labels), expected)


def test_weights_of_classes_weigh_the_loss() -> None:
    module = Classifier(SMALL, class_weights=[1.0, 3.0, *[0.0] * 8])
    module.class_weights.copy_(module.optimization.weights_of(None, 10))
    logits, labels = torch.randn(4, 10), torch.tensor([0, 1, 1, 5])
    each = -logits.log_softmax(1)[range(4), labels]
    torch.testing.assert_close(module._loss(logits, labels), (each[0] + 3 * each[1] + 3 * each[2]) / 7)


def test_weights_of_classes_are_relative_also_of_mixed_images() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 10), torch.randint(10, (6,))
    mixed = 0.3 * nn.functional.one_hot(labels, 10).float() + 0.7 * nn.functional.one_hot(labels.flip(0), 10).float()
    plain, alike = Classifier(SMALL), Classifier(SMALL, class_weights=[5.0] * 10)
    alike.class_weights = torch.full((10,), 5.0)
    for wanted in (labels, mixed):
        torch.testing.assert_close(alike._loss(logits, wanted), plain._loss(logits, wanted))
    only = Classifier(SMALL, class_weights=[0.0] * 9 + [1.0])
    only.class_weights = torch.tensor([0.0] * 9 + [1.0])
    assert only._loss(logits, torch.zeros(6, dtype=torch.long)) == 0


def test_top_five_where_there_are_many_classes() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(60, 12), torch.arange(60) % 12
    module = Classifier({**SMALL, "num_classes": 12})
    module.top5["test"].update(logits, labels)
    expected = top_k_accuracy_score(labels, logits, k=5)
    assert module.top5["test"].compute().item() == pytest.approx(expected)
    assert not Classifier(SMALL).top5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamw"}, "name must be one of torch.optim's .* got 'adamw'; did you mean AdamW"),
        ({"name": "nowhere.Lion"}, "name = nowhere.Lion cannot be imported"),
        ({"name": "torch.nn.Linear"}, "is no torch.optim.Optimizer"),
        ({"name": "AdamW", "arguments": {"beta": 1}}, r"arguments {'beta': 1} do not go with AdamW"),
        ({"name": "Rprop"}, "weight_decay = 0.0005 is nothing that Rprop knows; set it to 0"),
        ({"schedule": "cosin"}, "schedule must be one of .* got 'cosin'; did you mean cosine"),
        ({"milestones": [30, 60]}, r"milestones must be shares of the training, in \(0, 1\), got \[30, 60\]"),
        ({"gamma": 0}, r"gamma must lie in \(0, 1\], got 0"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\), got 1.0"),
        ({"class_weights": "equal"}, "class_weights must be balanced, null or a list"),
        ({"class_weights": [1.0, -1.0]}, "class_weights must be balanced, null or a list"),
        ({"class_weights": [1.0, 1.0]}, "class_weights must hold 10 numbers, one a class, got 2"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Classifier(SMALL, **settings)


def test_balanced_without_labels() -> None:
    with pytest.raises(InputError, match="balanced needs a data module"):
        Optimization(class_weights="balanced").weights_of(None, 2)
