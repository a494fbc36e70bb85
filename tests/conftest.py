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
LONGEST = ("test_guide.py", "test_prune.py", "test_surgery.py", "test_reach.py", "test_tutorials.py", "test_cli.py",
           "test_train.py", "test_wheel.py", "test_faults.py")  # fmt: skip


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
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 300 images of each class of CIFAR-10, or as many as there are, as an image folder."""
    given = os.environ.get("FREQPRUNE_CIFAR10")
    if not given:
        pytest.skip("set FREQPRUNE_CIFAR10 to an image folder of CIFAR-10 (train/<class>/*.png, test/<class>/*.png)")
    few = tmp_path_factory.mktemp("cifar10")
    for folder in Path(given).resolve().glob("t*/*/"):
        into = few / folder.parent.name / folder.name
        into.mkdir(parents=True)
        for path in sorted(folder.iterdir())[:300]:
            (into / path.name).symlink_to(path)
    return few


@pytest.fixture(scope="session")
def public_weights() -> Path:
    """A trained ResNet-32 with option A shortcuts: a plain state dict, keys prefixed ``module.``."""
    path = os.environ.get("FREQPRUNE_RESNET32")
    if not path:
        pytest.skip("set FREQPRUNE_RESNET32 to a state dict of a CIFAR-10 ResNet-32 (option A, ImageNet mean and std)")
    return Path(path)
