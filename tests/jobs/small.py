"""The jobs made small: a configuration of few digits and a ResNet-8, and what the pages of a run must hold."""

import base64
import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from tests.conftest import ROOT

SMALL = (
    "data=digits",
    "data.limit_train=96",
    "data.limit_test=40",
    "data.batch_size=32",
    "model=resnet8",
    "trainer=cpu",
    "trainer.max_epochs=1",
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

# How tags are read, each setting other than usual.
READOUT = {
    "layers": "layer1*",
    "where": "norm",
    "spatial": "map",
    "noise_std": 0.03,
    "average": "power",
    "half": "bfloat16",
}


def config(name: str, out: Path, *overrides: str, base: Sequence[str] = SMALL) -> DictConfig:
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return compose(name, [*base, f"output_dir={out}", *overrides])


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
