"""The two jobs from a composed configuration, small: what they write, what they refuse, and that every experiment still
composes and runs."""

import base64
import csv
import json
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import nn

from freqprune import load_pruned
from freqprune.errors import InputError
from freqprune.jobs.assembly import model_config
from freqprune.jobs.config import check_pruning
from freqprune.jobs.prune import _network_to_prune, prune
from freqprune.jobs.settings import read
from freqprune.jobs.train import train
from freqprune.networks.blocks import Shortcut
from freqprune.networks.checkpoint import load_network
from freqprune.networks.profiling import count_macs, count_parameters
from freqprune.networks.registry import build_model, register_model
from freqprune.pruning import importance, tempo
from freqprune.reports import tables
from tests.conftest import ROOT
from tests.pruning.test_tempo import ByMacs

# Those that bring settings of their own data are in test_experiments.py.
OWN_DATA = ("cifar100_resnet56", "imagenet_resnet50")
EXPERIMENTS = sorted({path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")} - {*OWN_DATA})
SMALL = (
    "data=digits",
    "data.limit_train=96",
    "data.limit_test=40",
    "data.batch_size=32",
    "model=resnet8",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "+trainer.enable_progress_bar=false",
    "callbacks.progress=null",
    "tagging.n_images=2",
    "tagging.epoch_images=4",
    "finetune.epochs=1",
    "pruning.bn_images=64",
    "latency.n_runs=2",
    "latency.batch_sizes=[1,4]",
    "pruning.calibration_images=8",
    "pruning.rounds=1",
    "importance.labelled_images=8",
)


def config(name: str, out: Path, *overrides: str, base: Sequence[str] = SMALL) -> DictConfig:
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return compose(name, [*base, f"output_dir={out}", *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("train")
    metrics, _ = train(config("train", out))
    return out, metrics


def check_page(out: Path) -> None:
    """The report shows every figure, the settings and the versions."""
    text = (out / "report.html").read_text()
    assert text.count("<img ") == len(list((out / "figures").glob("*.png")))
    assert f"torch {version('torch')}" in text
    assert "tag_freqs:" in text
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["tagging"]["tag_freqs"] == [6.0, 7.5]
    assert str(out) not in json.dumps(settings["callbacks"])
    explored = json.loads(re.search(r'id="data">(.*?)</script>', (out / "explore.html").read_text())[1])  # type: ignore[index]
    # The filters of the network as it was trained, and what the record says of the cut.
    n_filters = sum(layer["n"] for layer in explored["layers"])
    assert {len(base64.b64decode(one["columns"]["snr"])) for one in explored["times"]} == {4 * n_filters}
    metrics = json.loads((out / "metrics.json").read_text()) if (out / "metrics.json").is_file() else {}
    if metrics:
        assert sum(explored["trial"]["macs"]) == metrics["dense"]["macs"]
    else:
        # After a training cuts are tried by what the last epoch's tags say.
        assert list(explored["trial"]["scores"]) == ["snr"]
        assert [unit["name"] for unit in explored["trial"]["units"]] == [f"layer{i}.0.conv1" for i in (1, 2, 3)]
    if "kept" in metrics:
        kept = np.frombuffer(base64.b64decode(explored["times"][-1]["columns"]["kept"]), "<f4")
        assert np.nansum(kept) == sum(metrics["kept"].values())


def test_train_writes_what_it_says(trained: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = trained
    assert json.loads((out / "training.json").read_text()) == metrics
    assert set(metrics) == {"val_accuracy", "test_accuracy", "epochs", "seconds"}
    assert metrics["epochs"] == 1
    expected = json.loads((out / "forecast.json").read_text())
    assert {"training", "tags", "total"} <= expected.keys()
    assert {"best.ckpt", "last.ckpt"} <= {path.name for path in (out / "checkpoints").iterdir()}
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = {key for row in rows for key, value in row.items() if value}
    assert {"train/loss", "val/accuracy", "important/layer1.0.conv1", "tagging/share"} <= logged
    with (out / "importance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(
        m.out_channels for m in build_model({"name": "resnet8"}).modules() if isinstance(m, torch.nn.Conv2d)
    )
    assert {path.name for path in (out / "figures").iterdir()} == {
        "important_last_epoch.png",
        "important_over_epochs.png",
        "training_curves.png",
    }
    check_page(out)


@pytest.mark.slow
def test_resume_continues_to_the_last_epoch(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    last = trained[0] / "checkpoints" / "last.ckpt"
    metrics, _ = train(config("train", tmp_path, f"ckpt_path={last}", "trainer.max_epochs=2", "logger=jsonl"))
    assert metrics["epochs"] == 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (found,) = (line["val/accuracy"] for line in lines if "val/accuracy" in line)
    assert found == pytest.approx(metrics["val_accuracy"])
    assert {line["epoch"] for line in lines} >= {1}
    # The report draws from the table.
    assert (tmp_path / "figures" / "training_curves.png").is_file()


@pytest.fixture(scope="module")
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


def test_prune_writes_what_it_says(pruned: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    out, metrics, objects = pruned
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert set(metrics) == {
        "network",
        "dense",
        "pruned",
        "recalibrated",
        "finetuned",
        "kept",
        "widths",
        "remarks",
        "finished",
    }
    assert (
        set(metrics["dense"])
        == set(metrics["pruned"])
        == {"test_accuracy", "macs", "params", "file_bytes", "memory_bytes", "latency_ms"}
    )
    assert set(metrics["recalibrated"]) == set(metrics["finetuned"]) == {"test_accuracy"}
    x = torch.rand(2, 3, 32, 32)
    assert metrics["dense"]["macs"] == count_macs(build_model({"name": "resnet8"}), x)
    assert metrics["pruned"]["macs"] <= 0.6 * metrics["dense"]["macs"]
    net = load_pruned(out / "pruned.ckpt")
    assert count_macs(net, x) == metrics["pruned"]["macs"]
    assert count_parameters(net) == metrics["pruned"]["params"]
    assert {layer: net.get_submodule(layer).out_channels for layer in metrics["kept"]} == metrics["kept"]
    dense = build_model({"name": "resnet8"})
    assert {layer: dense.get_submodule(layer).out_channels for layer in metrics["widths"]} == metrics["widths"]
    assert list(metrics["widths"]) == list(metrics["kept"])
    # The file holds the fine-tuned weights.
    torch.testing.assert_close(net(x), objects["net"](x))
    names = {path.name for path in (out / "figures").iterdir()}
    assert names == {
        "stimulus.png",
        "snr_bins.png",
        "spectra_layer1.png",
        f"spectra_layer{min(10, len(objects['response'].layers))}.png",
        "important_filters.png",
        "part_preference.png",
        "integration.png",
        "kept_per_layer.png",
        "accuracy_over_cut.png",
        "accuracy_over_time.png",
    }
    check_page(out)


def test_filters_csv_holds_every_filter_and_component(pruned: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    out, _, objects = pruned
    with (out / "filters.csv").open() as file:
        rows = list(csv.DictReader(file))
    response = objects["response"]
    n_filters = sum(len(r.amplitude) for r in response.layers.values())
    assert len(rows) == n_filters * len(response.components("all"))
    row = next(r for r in rows if (r["layer"], r["filter"], r["component"]) == ("layer1.0.conv1", "3", "f1"))
    assert float(row["snr"]) == pytest.approx(response.snr("layer1.0.conv1", ["f1"])[3, 0].item(), rel=1e-4)
    assert row["recorded_at"] == "layer1.0.relu1 (activation)"
    assert row["noise_std"] == "0.02"


@pytest.mark.slow
def test_removes_the_filters_with_the_lowest_snr(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    cfg = config(
        "prune",
        tmp_path,
        "model=auto",
        f"ckpt={ckpt}",
        "pruning.ratio=0.5",
        "importance=snr",
        "finetune.epochs=0",
        "pruning.bn_images=0",
    )
    metrics, objects = prune(cfg)
    assert set(metrics) == {"network", "dense", "pruned", "kept", "widths", "remarks", "finished"}
    for layer, kept in objects["kept"].items():
        snr = objects["response"].snr(layer).nan_to_num(0).mean(-1)
        assert kept.tolist() == sorted(snr.argsort(descending=True)[: len(snr) // 2].tolist())


@pytest.mark.slow
def test_threshold_keeps_what_is_above_it(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    common = (
        "model=auto",
        "importance=snr",
        f"ckpt={trained[0] / 'checkpoints' / 'last.ckpt'}",
        "finetune.epochs=0",
        "pruning.bn_images=0",
    )
    _, objects = prune(config("prune", tmp_path, *common, "pruning=none"))
    layers = [f"layer{s}.0.conv1" for s in (1, 2, 3)]
    snr = {layer: objects["response"].snr(layer).nan_to_num(0).mean(-1) for layer in layers}
    threshold = torch.cat(list(snr.values())).median().item()
    metrics, _ = prune(config("prune", tmp_path, *common, f"pruning.threshold={threshold}"))
    assert metrics["kept"] == {layer: max(1, int((values > threshold).sum())) for layer, values in snr.items()}


def test_pruning_none_only_tags_and_tests(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    cfg = config(
        "prune",
        tmp_path,
        "model=auto",
        f"ckpt={trained[0] / 'checkpoints' / 'last.ckpt'}",
        "pruning=none",
        "tagging.per_class=true",
    )
    metrics, objects = prune(cfg)
    with (tmp_path / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["group"] for row in rows} == {"all", *map(str, range(10))}
    first = next(row for row in rows if (row["group"], row["layer"], row["filter"]) == ("all", "conv1", "2"))
    assert float(first["part_preference"]) == pytest.approx(
        objects["response"].part_preference("conv1")[2].item(), rel=1e-4
    )
    assert set(metrics) == {"network", "dense", "finished"}
    check_page(tmp_path)
    assert metrics["dense"]["test_accuracy"] == pytest.approx(trained[1]["test_accuracy"])
    assert not (tmp_path / "pruned.ckpt").exists()
    assert (tmp_path / "filters.csv").exists()


@pytest.mark.slow
def test_a_pruned_network_can_be_pruned_again(
    pruned: tuple[Path, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    cfg = config(
        "prune", tmp_path, "model=auto", f"ckpt={pruned[0] / 'pruned.ckpt'}", "pruning.ratio=0.2", "finetune.epochs=0"
    )
    metrics, _ = prune(cfg)
    assert metrics["dense"]["macs"] == pruned[1]["pruned"]["macs"]
    # The file still counts in filters of the dense network.
    first, second = (load_network(folder / "pruned.ckpt").kept for folder in (pruned[0], tmp_path))
    assert all(set(second[layer]) <= set(first[layer]) for layer in first)
    assert second != first
    assert metrics["pruned"]["macs"] < metrics["dense"]["macs"]


def test_a_pruned_network_resumes_training_its_widths(pruned: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    content = torch.load(pruned[0] / "finetune" / "checkpoints" / "last.ckpt", weights_only=True)
    widths = content["hyper_parameters"]["model"]["widths"]
    assert widths == {
        layer: n
        for layer, n in pruned[1]["kept"].items()
        if n != content["hyper_parameters"]["model"]["stage_widths"][int(layer[5]) - 1]
    }


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
    from freqprune.jobs.config import plain

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


def test_a_network_that_has_learned_nothing_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config("train", tmp_path, "tagging.every_n_epochs=0", "optimizer.lr=1e-9"))
    assert "hardly better than chance (10.0 % of 10 classes)" in caplog.text
    caplog.clear()
    monkeypatch.setattr("freqprune.jobs.trainers.tested", lambda *args: {"test_accuracy": 0.9})
    train(config("train", tmp_path / "other", "tagging.every_n_epochs=0"))
    assert "chance" not in caplog.text


TERMS = ["integration", *(pytest.param(term, marks=pytest.mark.slow) for term in ("balance", "silence"))]


@pytest.mark.parametrize("term", TERMS)
def test_trains_with_a_loss_from_the_tags(
    term: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    more = [f"tag_loss={term}", "tag_loss.every_n_steps=1", "trainer.max_epochs=2"]
    metrics, made = train(config("train", tmp_path, *more))
    assert metrics["epochs"] == 2
    assert f"{term} from the tags in the loss" in " ".join(capsys.readouterr().out.split())
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = [float(row[f"tag_loss/{term}"]) for row in rows if row.get(f"tag_loss/{term}")]
    assert len(values) == 2
    assert all(0 < value < 1 for value in values)
    assert made["classifier"].tag_loss.mean == list(made["data"].mean)
    assert (
        "the tags of the loss add 49 images to every step of 32 on the average: tag_loss.every_n_steps=8" in caplog.text
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tagging.tag_freqs=[6.0,7.3]"], "7.3 Hz is not on a bin"),
        (["tagging.tag_freqs=[6.0,61.0]"], "Nyquist"),
        (["tagging.tag_freqs=[6.0,6.0]"], "also the frequency of part 1"),
        (["tagging.tag_freqs=fast"], "tagging.tag_freqs must be a list"),
        (["tagging.n_images=2.5"], "tagging.n_images must be a whole number, got 2.5"),
        (["pruning=filters", "pruning.ratio=half"], "pruning.ratio must be a number or null, got 'half'"),
        (["compile=maybe"], "compile must be true or false or reduce-overhead or max-autotune, got 'maybe'"),
        (["+tagging.n_image=3"], "tagging.n_image is not a setting; did you mean"),
        (["+finetune.lrs=3"], "finetune.lrs is not a setting; did you mean finetune.lr"),
        (["resume=5"], "resume = 5 goes on with pruning"),
        (["imports=foo"], r"imports must be a list"),
        (["~tagging.n_images"], "tagging.n_images is not set; give tagging.n_images=VALUE"),
        (["~optimizer.lr"], "optimizer.lr is not set"),
        (["~logger"], "logger is not set"),
        (["importance.components=abc"], "importance.components: "),
        (["pruning=filters", "pruning.compensation=sequential", "pruning.bn_when=before"], "does not go with"),
        (["tagging.where=relu"], "tagging.where must be one of"),
        (["tagging.average=max"], "tagging.average must be one of"),
        (["tagging.n_images=0"], "tagging.n_images must be at least 1"),
        (["tagging.noise_std=2"], "tagging.noise_std must lie"),
        (["importance.criterion=loudness"], "importance.criterion must be one of"),
        (["importance.components=f7"], "got 'f7'"),
        (["importance.alpha=0"], "importance.alpha"),
        (
            ["importance.important_by=threshold", "importance.threshold=0"],
            "importance.threshold must be a positive SNR",
        ),
        (["+trainers.max_epochs=3"], "trainers is not a setting; did you mean trainer"),
        (["pruning=filters", "pruning.ratio=1.0"], "pruning.ratio must lie between"),
        (["pruning=filters", "pruning.ratio=0.5", "pruning.threshold=3"], "set exactly one"),
        (["finetune.epochs=-1"], "finetune.epochs must be at least 0"),
        (["finetune.lr=0"], "finetune.lr must be above 0"),
        (["optimizer.lr=0"], "optimizer.lr must be above 0"),
        (["optimizer.name=AdamV"], r"optimizer.name must be one of torch.optim's .*; did you mean Adam"),
        (["optimizer.arguments=5"], r"optimizer.arguments must be a mapping \({...}\), got 5"),
        (["optimizer.class_weights=[1,2]"], "class_weights must hold 10 numbers"),
        (["tag_loss.silence=much"], r"tag_loss.silence must be a number or a mapping \({...}\), got 'much'"),
        (["tag_loss.every_n_steps=0"], "tag_loss.every_n_steps must be at least 1"),
        (["tag_loss.balance={layer9.*: 1}"], "layer pattern 'layer9.*' matches none of"),
        (["+tag_loss.loudness=1"], "tag_loss.loudness is not a setting"),
        (["data.transforms=[TrivialAugment]"], "no transform 'TrivialAugment'; did you mean TrivialAugmentWide"),
        (["data.transforms=[{name:RandomErasing,q:1}]"], "RandomErasing does not take"),
        (["matmul_precision=low"], "matmul_precision must be"),
        (["seed=-1"], "seed must be at least 0"),
        (["model.name=resnet33"], "model.name must be one of"),
        (["model.num_classes=7"], "the data have 10 classes"),
        (["data.val_fraction=2"], "val_fraction must lie"),
        (["ckpt_path=none.ckpt"], "none.ckpt does not exist"),
        (["ckpt=x.ckpt"], "to resume training use ckpt_path=x.ckpt"),
        (["pruning=filters", "pruning.layers='layer9*'"], "matches none of"),
        (["tagging.gap=40"], "leaves the part 'left'"),
        (["tagging.layers='block*'"], "matches none of"),
        (["data=image_folder", "data.root=nowhere"], "nowhere is not a folder"),
        (["model=auto", "model.name=torchvision/alexnet"], "AlexNet does not run on images of 3 x 32 x 32"),
    ],
)
def test_train_refuses_before_any_work(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(config("train", tmp_path, *overrides))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pruning.layers='layer9*'"], "matches none of"),
        (["pruning.layers='*.conv2'"], "share their channels"),
        (["pruning.ratio=0.001"], "removes nothing"),
        (["pruning.threshold=1e9"], "would remove every filter"),
        (["pruning.threshold=1e-9"], "would remove nothing"),
        (["pruning.macs_cut=0.99"], "cannot be reached"),
        (["tagging.layers=conv1"], "which tagging.layers leaves out"),
        (["tagging.noise_std=0"], "compares with noise, but tagging.noise_std = 0"),
        (["data.mean=[0,0,0]", "data.std=[1,1,1]"], r"trained with mean .* use data.mean=\["),
        (["model=resnet14"], "holds a resnet8, but model.name = resnet14"),
        (["ckpt=nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["ckpt_path=x"], "has no part in pruning"),
        (["finetune.momentum=2"], "finetune.momentum must lie"),
        (["model=resnet8", "model.shortcut=B"], "with shortcut = A, but model.shortcut = B"),
        (["tagging.gap=40"], "leaves the part 'left'"),
    ],
)
def test_prune_refuses(
    overrides: list[str], message: str, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    with pytest.raises(InputError, match=message):
        prune(config("prune", tmp_path, "model=auto", "importance=snr", f"ckpt={ckpt}", *overrides))
    assert not (tmp_path / "pruned.ckpt").exists()


def test_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        train(config("train", tmp_path / "file" / "out"))


def test_training_checkpoint_of_another_network_does_not_resume(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    last = trained[0] / "checkpoints" / "last.ckpt"
    with pytest.raises(InputError, match=r"with name = resnet8, but model.name = resnet14"):
        train(config("train", tmp_path, "model=resnet14", f"ckpt_path={last}"))


def test_training_checkpoint_of_something_else_does_not_resume(tmp_path: Path) -> None:
    torch.save(build_model({"name": "resnet8"}).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="is no training checkpoint"):
        train(config("train", tmp_path, f"ckpt_path={tmp_path / 'w.pt'}"))


def test_public_weights_reach_their_published_accuracy(public_weights: Path, cifar10: Path, tmp_path: Path) -> None:
    base = [
        "data=image_folder",
        f"data.root={cifar10}",
        "data.mean=[0.485,0.456,0.406]",
        "data.std=[0.229,0.224,0.225]",
        "data.batch_size=500",
        "data.limit_test=1000",
        "model=resnet32",
        f"ckpt={public_weights}",
        "pruning=none",
        "tagging.n_images=4",
        "trainer=cpu",
        "latency.n_runs=2",
    ]
    metrics, objects = prune(config("prune", tmp_path, base=base))
    # 92.63 % on all 10,000 images; of 1,000 drawn ones the standard error is 0.8 %.
    assert metrics["dense"]["test_accuracy"] == pytest.approx(0.9263, abs=0.025)
    assert (metrics["dense"]["macs"], metrics["dense"]["params"]) == (68_862_592, 464_154)
    response = objects["response"]
    # Deep layers combine the halves.
    assert response.snr("layer3.4.conv2", ["f1+f2"]).nanmedian() > 1.5


@pytest.mark.slow
def test_intermodulation_appears_with_the_first_nonlinearity(public_weights: Path, cifar10: Path) -> None:
    from freqprune.tagging.measurement import tag
    from freqprune.training.listed import ImageFolderData

    net = load_network(public_weights, {"name": "resnet32"}).net
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = ImageFolderData(cifar10, mean=mean, std=std).pixels("val", 20)
    before = tag(net, images, layers="conv1", where="convolution", mean=mean, std=std)
    after = tag(net, images, layers="conv1", where="activation", mean=mean, std=std)
    # Noise alone: 20 images leave the SNR a standard deviation of 0.58 / sqrt(20) = 0.13; 16 filters x 13 components.
    assert before.snr("conv1", "intermodulation").mean().item() == pytest.approx(1.0, abs=0.05)
    assert before.snr("conv1", "intermodulation").max() < 1.7
    assert before.snr("conv1", "fundamentals").min() > 10
    assert after.snr("conv1", ["f1+f2"]).nanmedian() > 1.7


@pytest.mark.slow
def test_everything_at_once(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Residual streams, two steps with fine-tuning between, least squares, multiples, distillation, exports."""
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    metrics, objects = prune(
        config(
            "prune",
            tmp_path,
            f"ckpt={ckpt}",
            "importance=redundancy",
            "pruning.macs_cut=0.5",
            "pruning.streams=true",
            "pruning.steps=2",
            "pruning.step_epochs=1",
            "pruning.compensation=least_squares",
            "pruning.scope=global",
            "finetune.distill=0.5",
            "export.torch_export=true",
            "export.fold=true",
            "export.onnx=true",
            "export.int8=true",
        )
    )
    assert metrics["onnx"]["test_accuracy"] == pytest.approx(metrics["folded"]["test_accuracy"], abs=0.011)
    assert metrics["int8"]["file_bytes"] < metrics["onnx"]["file_bytes"]
    assert set(metrics["int8"]["latency_ms"]) == {"1", "4"}
    assert metrics["exports"]["model.int8.onnx"] > 0.5
    assert metrics["folded"]["test_accuracy"] == pytest.approx(metrics["finetuned"]["test_accuracy"], abs=0.011)
    assert metrics["folded"]["params"] < metrics["pruned"]["params"]
    assert set(metrics["folded"]["latency_ms"]) == set(metrics["dense"]["latency_ms"]) == {"1", "4"}
    assert 0.5 <= 1 - metrics["pruned"]["macs"] / metrics["dense"]["macs"] < 0.55
    assert metrics["exports"]["model.pt2"] < 1e-5
    assert metrics["pruned"]["file_bytes"] < metrics["dense"]["file_bytes"]
    assert set(metrics["pruned"]["latency_ms"]) == {"1", "4"}
    assert (tmp_path / "step1" / "metrics.csv").exists()
    net = load_pruned(tmp_path / "pruned.ckpt")
    assert {unit: net.get_submodule(unit).out_channels for unit in metrics["kept"]} == metrics["kept"]
    stored = load_network(tmp_path / "pruned.ckpt")
    assert {unit: len(indices) for unit, indices in stored.kept.items()} == metrics["kept"]
    assert all(len(set(indices)) == len(indices) for indices in stored.kept.values())
    torch.testing.assert_close(net.state_dict(), objects["net"].state_dict())


@pytest.mark.parametrize("blocks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_same_widths_are_trained_from_scratch(
    blocks: bool, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    # A rate at which no weight moves: what was drawn is what is left.
    still = ("finetune.from_scratch=true", "finetune.epochs=1", "finetune.lr=1e-20", "finetune.momentum=0.9")
    more = ("importance=logit_error", "pruning.blocks=true", "pruning.macs_cut=0.6", "pruning.measured_images=16")
    cut = more if blocks else ("importance=l2", "pruning.ratio=0.5")
    metrics, objects = prune(config("prune", tmp_path, f"ckpt={ckpt}", *cut, *still))
    assert "from_scratch" in metrics
    assert "finetuned" not in metrics
    assert ("dropped_blocks" in metrics) is blocks
    assert "trained from scratch for 1 epoch" in (tmp_path / "report.html").read_text()
    dense, net = load_network(ckpt).net.state_dict(), objects["net"]
    kept = objects["kept"]["layer3.0.conv1"] if "layer3.0.conv1" in objects["kept"] else slice(None)
    drawn, cut_out = net.get_submodule("layer3.0.conv1").weight, dense["layer3.0.conv1.weight"][kept]
    assert drawn.shape == cut_out.shape
    assert torch.corrcoef(torch.stack([drawn.flatten(), cut_out.flatten()]))[0, 1].abs() < 0.1
    assert torch.equal(net.bn1.weight, torch.ones(16))
    # As a training of this network would begin: drawn by the seed, in the network's own way.
    assert drawn.std().item() == pytest.approx((2 / (9 * drawn.shape[1])) ** 0.5, rel=0.05)
    # The same training is not repeated, and another one needs a run of its own.
    common = ("prune", tmp_path / "again", f"ckpt={ckpt}", *cut, *still, f"resume={tmp_path}")
    assert prune(config(*common))[0]["from_scratch"] == metrics["from_scratch"]
    with pytest.raises(InputError, match=r"is a run with finetune\.from_scratch=true; go on with that"):
        prune(config(*common, "finetune.from_scratch=false"))
    torch.testing.assert_close(load_pruned(tmp_path / "pruned.ckpt").state_dict(), net.state_dict())


class Own(nn.Module):
    """A network with a parameter that nobody can draw anew, for images of one size."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.net = build_model({"name": "resnet8", "num_classes": num_classes})

    def forward(self, images: torch.Tensor) -> Any:
        assert images.shape[-1] == 32, "another size"
        return self.net(images) * self.scale


@pytest.mark.parametrize(
    ("job", "settings", "said"),
    [
        ("train", ["pruning=filters", "finetune.from_scratch=true"], "has weights but no reset_parameters"),
        (
            "train",
            ["data.progressive_resizing={}"],
            r"(?s)begins with images of 16 x 16: Own does not run .*initial_scale",
        ),
        ("prune", ["pretrained=true", "finetune.from_scratch=true", "finetune.epochs=0"], r"finetune\.epochs, got 0"),
        ("prune", ["pretrained=true", "finetune.from_scratch=true", "pruning=none"], "pruning=none cuts nothing"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_training(
    job: str, settings: list[str], said: str, tmp_path: Path
) -> None:
    register_model("own32", Own)
    with pytest.raises(InputError, match=said):
        {"train": train, "prune": prune}[job](config(job, tmp_path, "model=auto", "model.name=own32", *settings))
    assert not (tmp_path / "checkpoints").exists()


def test_weights_that_cannot_be_drawn_anew_are_refused_at_the_start(tmp_path: Path) -> None:
    cfg = config("prune", tmp_path, "importance=l2", "finetune.from_scratch=true", "model=auto")
    with pytest.raises(
        InputError, match=r"finetune\.from_scratch cannot .* \(Own\) has weights but no reset_parameters"
    ):
        prune(cfg, Own())
    assert not (tmp_path / "pruned.ckpt").exists()


@pytest.mark.slow
def test_blocks_go_and_the_rest_is_fine_tuned(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    more = ("importance=logit_error", "pruning.blocks=true", "pruning.macs_cut=0.6", "pruning.rounds=0",
            "pruning.calibration_images=32", "pruning.measured_images=16", "finetune.epochs=1")  # fmt: skip
    metrics, objects = prune(config("prune", tmp_path / "a", f"ckpt={ckpt}", *more))
    assert 0.6 <= 1 - metrics["pruned"]["macs"] / metrics["dense"]["macs"] < 0.9
    gone = metrics["dropped_blocks"]
    assert gone
    assert not any(name.startswith(f"{block}.") for name in metrics["kept"] for block in gone)
    net = load_pruned(tmp_path / "a" / "pruned.ckpt")
    assert all(isinstance(net.get_submodule(block), Shortcut) for block in gone)
    torch.testing.assert_close(net.state_dict(), objects["net"].state_dict())
    # What is left can be pruned on.
    again, _ = prune(
        config("prune", tmp_path / "b", f"ckpt={tmp_path / 'a' / 'pruned.ckpt'}", "importance=l2", "pruning.ratio=0.2")
    )
    assert again["dense"]["macs"] == metrics["pruned"]["macs"]
    assert isinstance(load_pruned(tmp_path / "b" / "pruned.ckpt").get_submodule(gone[0]), Shortcut)


@pytest.mark.slow
def test_a_cut_by_time_says_what_was_measured(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempo, "Times", ByMacs)
    monkeypatch.setattr(tempo, "NOISY", 10.0)
    monkeypatch.setattr(tempo, "LEAST_S", 0.0)
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    more = ("importance=logit_error", "pruning.latency_cut=0.1", "latency.batch_size=3", "pruning.compensation=none",
            "pruning.calibration_images=32", "pruning.measured_images=16", "finetune.epochs=0",
            "logger=jsonl")  # fmt: skip
    metrics, _ = prune(config("prune", tmp_path, f"ckpt={ckpt}", *more))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [next(name for name in line if name != "step").split("/")[0] for line in lines] == [
        "dense", "pruned", "recalibrated",
    ]  # fmt: skip
    assert lines[1]["pruned/test_accuracy"] == metrics["pruned"]["test_accuracy"]
    assert lines[1]["pruned/macs"] == metrics["pruned"]["macs"]
    for stage in ("dense", "pruned"):
        assert list(metrics[stage]["latency_ms"]) == ["1", "3", "4"]
    found = json.loads((tmp_path / "metrics.json").read_text())["latency"]
    assert found["asked"] == 0.1
    assert (found["target"], found["batch_size"]) == ("eager", 3)
    before, after = (metrics[stage]["latency_ms"]["3"] for stage in ("dense", "pruned"))
    assert tables.percentages(metrics)["time_cut"] == pytest.approx(100 * (1 - after / before))


class Bomb(pl.Callback):
    """Ends a fine-tuning as a killed process would, after its first epoch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*received KeyboardInterrupt.*")
def test_interrupted_fine_tuning_goes_on_to_the_same_result(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    common = (
        f"ckpt={trained[0] / 'checkpoints' / 'last.ckpt'}",
        "pruning.ratio=0.5",
        "finetune.epochs=3",
        "finetune.distill=0.3",
    )
    metrics, whole = prune(config("prune", tmp_path / "whole", *common))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        prune(config("prune", tmp_path / "cut", *common, "+callbacks.bomb={_target_: tests.jobs.test_jobs.Bomb}"))
    again, resumed = prune(config("prune", tmp_path / "again", *common, f"resume={tmp_path / 'cut'}"))
    for name, value in whole["net"].state_dict().items():
        assert torch.equal(resumed["net"].state_dict()[name], value), name
    assert again["finetuned"] == metrics["finetuned"]
    assert (
        load_network(tmp_path / "again" / "pruned.ckpt").kept == load_network(tmp_path / "whole" / "pruned.ckpt").kept
    )
    complete, _ = prune(config("prune", tmp_path / "more", *common, f"resume={tmp_path / 'whole'}"))
    assert complete == metrics
    with pytest.raises(InputError, match=r"holds no pruned.ckpt and metrics.json"):
        prune(config("prune", tmp_path / "none", *common, f"resume={tmp_path}"))


@pytest.mark.slow
def test_every_live_parameter_is_fine_tuned(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    seen: list[set[int]] = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(
                {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
                ^ {id(p) for p in pl_module.net.parameters()}
            )

    Watch.__module__, Watch.__qualname__ = __name__, "Watch"
    globals()["Watch"] = Watch
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    prune(
        config(
            "prune",
            tmp_path,
            f"ckpt={ckpt}",
            "pruning.ratio=0.5",
            "+callbacks.watch={_target_: tests.jobs.test_jobs.Watch}",
        )
    )
    assert seen == [set()]


def test_the_network_trained_by_default_is_no_setting_of_a_network(tmp_path: Path) -> None:
    cfg = config("train", tmp_path, "model=auto", "model.name=torchvision/resnet18")
    assert model_config(read(cfg).model)["name"] == "torchvision/resnet18"
    assert "fallback" not in model_config(read(cfg).model)
    torch.save(build_model({"name": "torchvision/resnet18", "num_classes": 10}).state_dict(), tmp_path / "w.pt")
    cfg = config(
        "prune",
        tmp_path,
        "model=auto",
        "model.name=torchvision/resnet18",
        "+model.num_classes=10",
        f"ckpt={tmp_path / 'w.pt'}",
    )
    assert "fallback" not in _network_to_prune(read(cfg)).net.config


def test_training_refuses_what_only_pruning_reads(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pretrained=true names a network that is trained already"):
        train(config("train", tmp_path, "pretrained=true"))
    with pytest.raises(InputError, match=r"needs the dense network: use prune.py with ckpt=x/checkpoints/last\.ckpt"):
        train(config("train", tmp_path, "resume=x"))


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
