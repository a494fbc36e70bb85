"""A small training and a small pruning that many tests look at."""

from pathlib import Path
from typing import Any

import pytest

from freqprune.jobs.prune import prune
from freqprune.jobs.train import train
from tests.jobs.small import config


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("train")
    metrics, _ = train(config("train", out))
    return out, metrics


@pytest.fixture(scope="session")
def pruned(
    trained: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    out = tmp_path_factory.mktemp("prune")
    cfg = config(
        "prune",
        out,
        "model=auto",
        f"ckpt={trained[0] / 'checkpoints' / 'last.ckpt'}",
        "pruning.macs_cut=0.4",
        "importance=snr",
    )
    return (out, *prune(cfg))
