"""Where networks are after a trainer had them, and how they run while it does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from freqprune.jobs import trainers
from freqprune.jobs.prune import prune
from freqprune.jobs.train import train
from freqprune.networks import device_of
from freqprune.training import Classifier
from tests.jobs.test_jobs import config


class Pretended:
    """A trainer that leaves the network on the CPU, as Lightning does after an accelerator."""

    def __init__(self) -> None:
        self.compiled: list[bool] = []
        self.fails = False

    def test(self, classifier: Classifier, **_: Any) -> list[dict[str, float]]:
        classifier.net.to_empty(device="cpu")
        return [{"test/accuracy": 0.5}]

    def fit(self, classifier: Classifier, **_: Any) -> None:
        assert classifier.teacher is not None
        self.compiled += [net._compiled_call_impl is not None for net in (classifier.net, classifier.teacher)]
        if self.fails:
            raise RuntimeError("out of memory")


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Modes that networks were compiled with, which here leaves them as they are."""
    found: list[Any] = []

    def compiled(call: Callable[..., Any], mode: Any = None, **_: Any) -> Callable[..., Any]:
        found.append(mode)
        return call

    monkeypatch.setattr(torch, "compile", compiled)
    return found


def test_a_network_stays_on_its_device() -> None:
    net = nn.Linear(4, 10, device="meta")
    trainer: Any = Pretended()
    data: Any = None
    assert trainers.tested(trainer, Classifier(net, num_classes=10), data) == {"test_accuracy": 0.5}
    assert device_of(net).type == "meta"


def test_networks_are_compiled_while_they_train_only(modes: list[Any]) -> None:
    net, teacher = nn.Linear(4, 10), nn.Linear(4, 10)
    classifier = Classifier(net, num_classes=10, teacher=teacher, distill=0.5)
    pretended = Pretended()
    trainer: Any = pretended
    data: Any = None
    for how, expected in ((True, [None, None]), ("reduce-overhead", ["reduce-overhead"] * 2), (False, [])):
        modes.clear()
        trainers.fit(trainer, classifier, data, None, "", how)
        assert modes == expected
        assert pretended.compiled[-2:] == [bool(how)] * 2
        assert net._compiled_call_impl is None
        assert teacher._compiled_call_impl is None
    pretended.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        trainers.fit(trainer, classifier, data, None, "", True)
    assert net._compiled_call_impl is None


def test_training_and_fine_tuning_are_compiled(modes: list[Any], tmp_path: Path) -> None:
    train(config("train", tmp_path / "run", "compile=true", "tagging.every_n_epochs=0"))
    assert modes == [None]
    modes.clear()
    ckpt = tmp_path / "run" / "checkpoints" / "last.ckpt"
    _, made = prune(
        config("prune", tmp_path / "cut", f"ckpt={ckpt}", "compile=reduce-overhead", "importance=l2",
               "pruning.macs_cut=0.3", "finetune.distill=0.5")
    )  # fmt: skip
    # The smaller network and the one it learns from.
    assert modes == ["reduce-overhead", "reduce-overhead"]
    assert made["net"]._compiled_call_impl is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("more", [(), ("compile=reduce-overhead", "trainer=gpu", "finetune.distill=0.5")])
def test_everything_on_an_accelerator(more: tuple[str, ...], tmp_path: Path) -> None:
    there = ("trainer=auto", *more)
    train(config("train", tmp_path / "run", *there))
    ckpt = tmp_path / "run" / "checkpoints" / "last.ckpt"
    metrics, made = prune(config("prune", tmp_path / "cut", f"ckpt={ckpt}", "pruning.macs_cut=0.3", *there))
    assert metrics["finished"]
    assert device_of(made["net"]).type == "cuda"
