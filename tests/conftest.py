"""Shared fixtures. Tests run on one thread: beside other processes torch's spinning threads cost more than they
bring."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
LONGEST = ("test_guide.py", "test_prune.py", "test_finetuning.py", "test_tutorials.py", "test_cli.py", "test_faults.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first: one that starts last keeps a single process busy while the others wait."""
    order = {name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where time is short, slow tests begin only until a time, in seconds since 1970."""
    until = os.environ.get("FREQPRUNE_SLOW_UNTIL")
    if until and item.get_closest_marker("slow") and time.time() > float(until):
        pytest.skip("left out, for the time for slow tests is over: FREQPRUNE_SLOW_UNTIL")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _short_forecasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs time a network no longer than a test can wait."""
    monkeypatch.setattr("freqprune.jobs.pace.BUDGET_S", 0.02)


@pytest.fixture
def images() -> torch.Tensor:
    """Four smooth random images, pixels in [0.2, 0.9]."""
    coarse = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear") * 0.7 + 0.2


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """CIFAR-10, or as many images of each class, as an image folder."""
    folder = os.environ.get("FREQPRUNE_CIFAR10")
    if not folder:
        pytest.skip("set FREQPRUNE_CIFAR10 to an image folder of CIFAR-10 (train/<class>/*.png, test/<class>/*.png)")
    return Path(folder)


@pytest.fixture(scope="session")
def public_weights() -> Path:
    """A trained ResNet-32 with option A shortcuts: a plain state dict, keys prefixed ``module.``."""
    path = os.environ.get("FREQPRUNE_RESNET32")
    if not path:
        pytest.skip("set FREQPRUNE_RESNET32 to a state dict of a CIFAR-10 ResNet-32 (option A, ImageNet mean and std)")
    return Path(path)
