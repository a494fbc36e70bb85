"""Every experiment and every choice of a group, small; and training without validation images."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from torchvision.datasets import CIFAR100

from freqprune.errors import InputError
from freqprune.jobs.config import check_pruning
from freqprune.jobs.prune import prune
from freqprune.jobs.settings import read
from freqprune.jobs.train import train
from freqprune.networks.checkpoint import load_network
from freqprune.pruning import importance
from freqprune.reports.sweep_jobs import _figures
from tests.conftest import ROOT
from tests.jobs.small import SMALL, check_page, config

# Those that bring settings of their own data.
OWN_DATA = ("cifar100_resnet56", "imagenet_resnet50")
EXPERIMENTS = sorted({path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")} - {*OWN_DATA})
FEW = [item for item in SMALL if not item.startswith(("data", "model"))]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """As ImageNet lies: photographs of different sizes in folders of their classes."""
    drawn = np.random.default_rng(0)
    for split in ("train", "test"):
        for number, name in enumerate(("dark", "light")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(20):
                pixels = drawn.integers(100 * number, 100 * number + 156, (70 + i, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.jpg")
    return tmp_path / "images"


@pytest.fixture
def fake_cifar100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve classes in the place of a hundred."""

    def fake(self: CIFAR100, root: str, train: bool, download: bool) -> None:
        self.data = np.random.default_rng(train).integers(0, 256, (240, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % 12 for i in range(240)]
        self.classes = [f"class{i}" for i in range(12)]
        self.transform = self.target_transform = None

    monkeypatch.setattr(CIFAR100, "__init__", fake)


def experiment(name: str, out: Path, *overrides: str) -> DictConfig:
    limits = ("data.limit_train=16", "data.limit_test=24", "data.batch_size=8", "data.num_workers=0")
    return config("train", out, f"experiment={name}",
                  "trainer.precision=32-true", "compile=false", *limits, *overrides, base=FEW)  # fmt: skip


def run(cfg: DictConfig, out: Path) -> dict[str, Any]:
    metrics, objects = train(cfg)
    assert metrics["epochs"] == 1
    # What is saved is the average of the weights, which is also what is left.
    stored = load_network(out / "checkpoints" / "last.ckpt").net.state_dict()
    left = objects["classifier"].net.state_dict()
    assert all(torch.equal(value, stored[key]) for key, value in left.items())
    return metrics


@pytest.mark.usefixtures("fake_cifar100")
def test_cifar100(tmp_path: Path) -> None:
    cfg = experiment("cifar100_resnet56", tmp_path / "run", f"data.root={tmp_path}", "model.stage_widths=[4,4,8]")
    metrics = run(cfg, tmp_path / "run")
    assert metrics["test_accuracy"] <= metrics["test_top5"] <= 1
    assert json.loads((tmp_path / "run" / "training.json").read_text()) == metrics
    assert "test, among five" in (tmp_path / "run" / "report.html").read_text()


def test_imagenet(photographs: Path, tmp_path: Path) -> None:
    sizes = ("data.image_size=72", "data.resize=80", "data.eval_size=64", "data.val_fraction=0.1")
    cfg = experiment("imagenet_resnet50", tmp_path / "run", f"data.root={photographs}", *sizes)
    cfg.data.transforms[0].size = 48
    # Building and saving so many weights several times is what would take longest.
    assert cfg.model.name == "torchvision/resnet50"
    cfg.model.name = "torchvision/resnet18"
    assert "val_accuracy" in run(cfg, tmp_path / "run")


def test_every_experiment_is_here_or_among_the_jobs() -> None:
    assert {f"test_{name.split('_')[0]}" for name in OWN_DATA} <= set(globals())


@pytest.mark.slow
def test_all_images_are_trained_on_where_none_are_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config("prune", tmp_path, "model=resnet8", "model.stage_widths=[4,4,8]", "data.val_fraction=0",
                 "importance=snr", "pruning.ratio=0.3")  # fmt: skip
    caplog.set_level(logging.WARNING)
    metrics, objects = train(cfg)
    assert set(metrics) == {"test_accuracy", "epochs", "seconds"}
    assert objects["tagging"].latest["epoch"] == metrics["epochs"] - 1
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt"}
    assert _figures(tmp_path) == {"test": 100 * metrics["test_accuracy"]}
    pruned, _ = prune(cfg, objects["classifier"].net, objects["data"])
    assert pruned["finished"]
    check_page(tmp_path)
    assert caplog.text.count("data.val_fraction=0: all training images are trained on") == 1


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("job", ["train", "prune"])
def test_every_experiment_runs_small(experiment: str, job: str, tmp_path: Path) -> None:
    base = [item for item in SMALL if not item.startswith(("model=", "tagging"))]
    cfg = config(
        job,
        tmp_path,
        f"experiment={experiment}",
        "model=resnet8",
        "tagging.n_images=2",
        "tagging.every_n_epochs=1",
        base=base,
    )
    metrics, objects = train(cfg)
    assert metrics["epochs"] == 1
    if cfg.pruning.enabled:
        prune(cfg, objects["classifier"].net, objects["data"])
        assert (tmp_path / "pruned.ckpt").exists()


def test_the_experiment_has_the_last_word(tmp_path: Path) -> None:
    assert (
        config("train", tmp_path, "experiment=quickstart", base=[]).trainer.max_epochs
        != config("train", tmp_path, base=[]).trainer.max_epochs
    )


@pytest.mark.parametrize("group", ["data", "model", "tagging", "importance", "pruning", "trainer", "logger"])
def test_every_choice_of_every_group_is_valid(group: str, tmp_path: Path) -> None:
    from freqprune.jobs.values import plain

    for path in (ROOT / "conf" / group).glob("*.yaml"):
        if not path.stem.startswith("common"):
            named = {
                "image_folder": [f"data.root={tmp_path}"],
                "torchvision": ["data.name=CIFAR100"],
                "huggingface": ["data.path=imagefolder"],
                "webdataset": ["data.train_shards=a", "data.test_shards=b"],
            }
            cfg = config(
                "prune",
                tmp_path,
                f"{group}={path.stem}",
                *named.get(path.stem, []),
                base=[],
            )
            read(cfg)
            assert plain(cfg[group]) is not None


def test_modules_of_the_user_are_imported_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_criteria.py").write_text(
        "from freqprune import criterion\n\n\n@criterion('mine_alone')\ndef mine(evidence, layer): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("freqprune.pruning.importance._CRITERIA", dict(importance._CRITERIA))
    cfg = config("prune", tmp_path, "imports=[my_criteria]", "importance.criterion=mine_alone")
    check_pruning(cfg, at_hand=True)
    assert read(cfg).scoring.criterion == "mine_alone"
    with pytest.raises(InputError, match="there is no module 'my_networks'"):
        check_pruning(config("prune", tmp_path, "imports=[my_networks]"), at_hand=True)
