"""What loggers with pages of their own get: every figure and the tables of a job, read back from what they wrote."""

import csv
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure

from freqprune.errors import InputError
from freqprune.jobs.loggers import _typed, log_results, make_logger, results
from freqprune.jobs.settings import Settings, read
from freqprune.pruning import judge
from freqprune.reports import save, tables
from freqprune.tagging import tag
from tests.jobs.small import config

STAGE = {"macs": 2e6, "params": 1e3, "file_bytes": 1e3, "test_accuracy": 0.5}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job, with two figures and the tables of a network of five filters."""
    out = tmp_path_factory.mktemp("job")
    for name in ("stimulus", "spectra_layer1"):
        figure = Figure(figsize=(1, 1))
        figure.patch.set_facecolor("#204060")
        save(figure, out / "figures" / f"{name}.png")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.ReLU())
    response = tag(net, torch.rand(2, 3, 8, 8))
    tables.write_filters(out / "filters.csv", response, judge(response))
    metrics = {"dense": STAGE, "pruned": {**STAGE, "macs": 1e6}, "kept": {"0": 3}, "widths": {"0": 5}}
    (out / "metrics.json").write_text(json.dumps(metrics))
    return out


def settings(out: Path, *overrides: str) -> Settings:
    return read(config("prune", out, *overrides))


def test_layers_whose_names_look_like_numbers_stay_apart() -> None:
    rows = [["0.1", "5", "1"], ["0.10", "5", "2"]]
    assert _typed(["layer", "filters", "kept"], rows) == [["0.1", 5.0, 1.0], ["0.10", 5.0, 2.0]]


def test_tables_say_what_the_files_say(job: Path) -> None:
    found = results(job)
    assert found["kept"] == (["layer", "filters", "kept", "kept, %"], [["0", "5", "3", "60.0"]])
    assert [row[0] for row in found["stages"][1]] == ["dense", "pruned"]
    assert "1.00\n-50.0 %" in found["stages"][1][1]
    header, rows = found["filters"]
    with (job / "filters.csv").open() as file:
        written = {(row["filter"], row["component"]): row["snr"] for row in csv.DictReader(file)}
    assert len(rows) == 5
    assert {(row[1], name): row[header.index(f"SNR {name}")] for row in rows for _, name in written} == written


def test_filters_of_a_training_are_those_of_its_last_epoch(tmp_path: Path) -> None:
    lines = ["epoch,layer_index,layer,filter,snr_f1,amplitude_f1,score,important"]
    lines += [f"{epoch},0,conv1,{number},{epoch}.{number},7,2,1" for epoch in (9, 10) for number in (0, 1)]
    (tmp_path / "importance.csv").write_text("\n".join(lines))
    header = ["layer", "filter", "snr_f1", "score", "important"]
    rows = [["conv1", "0", "10.0", "2", "1"], ["conv1", "1", "10.1", "2", "1"]]
    assert results(tmp_path) == {"filters": (header, rows)}


def test_tensorboard_gets_figures_and_tables(job: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = make_logger(settings(tmp_path, "logger=tensorboard"), tmp_path)
    assert logger is not None
    # As after a fit.
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    log_results(logger, job)
    events = reader.EventAccumulator(str(tmp_path), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["figures/spectra_layer1", "figures/stimulus"]
    (image,) = events.Images("figures/stimulus")
    pixels = matplotlib.image.imread(io.BytesIO(image.encoded_image_string), format="png")
    assert (255 * pixels[0, 0, :3]).round().tolist() == [0x20, 0x40, 0x60]
    texts = {name: events.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in events.Tags()["tensors"]}
    assert set(texts) == {f"tables/{name}/text_summary" for name in ("stages", "kept", "filters")}
    assert "| 0 | 5 | 3 | 60.0 |" in texts["tables/kept/text_summary"]
    assert texts["tables/filters/text_summary"].count("\n") == 5 + 1


def test_wandb_gets_figures_and_tables(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = make_logger(settings(tmp_path, "logger=wandb", "logger.offline=true"), tmp_path)
    log_results(logger, job)
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media")
    assert len(list(media.glob("images/figures/*.png"))) == 2
    written = {path.name.split("_")[0]: json.loads(path.read_text()) for path in media.glob("table/tables/*.json")}
    assert set(written) == {"stages", "kept", "filters"}
    assert written["kept"] == {**written["kept"], "columns": ["layer", "filters", "kept", "kept, %"]}
    assert written["kept"]["data"] == [["0", 5.0, 3.0, 60.0]]
    assert written["stages"]["data"][1][:3] == ["pruned", 50.0, 1.0]
    assert [row[0] for row in written["filters"]["data"]] == [0.0] * 5


def test_a_logger_that_has_lightnings_two_methods_is_told(job: Path) -> None:
    """In the place of W&B, where that is not installed: Lightning's documented `log_image` and `log_table`."""

    class Logger:
        def __init__(self) -> None:
            self.seen: dict[str, Any] = {}
            self.experiment = None

        def log_image(self, key: str, images: list[Any], caption: list[str]) -> None:
            self.seen[key] = images, caption

        def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
            assert {len(row) for row in data} == {len(columns)}
            self.seen[key] = data

    logger: Any = Logger()
    log_results(logger, job)
    assert logger.seen["figures/stimulus"][0] == [str(job / "figures" / "stimulus.png")]
    assert logger.seen["figures/stimulus"][1][0].startswith("The stimulus")
    assert logger.seen["tables/kept"] == [["0", 5.0, 3.0, 60.0]]
    log_results(None, job)


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pytorch_lightning.loggers.wandb as of_wandb

    monkeypatch.setattr(of_wandb, "_WANDB_AVAILABLE", False)
    with pytest.raises(InputError, match=r"logger = WandbLogger needs a package .*pip install 'freqprune\[wandb\]'"):
        make_logger(settings(tmp_path, "logger=wandb"), tmp_path)
    assert make_logger(settings(tmp_path, "logger=none"), tmp_path) is None


def test_a_table_of_many_epochs_is_not_held_in_memory(tmp_path: Path) -> None:
    def peak(epochs: int) -> int:
        lines = ["epoch,layer_index,layer,filter,snr_f1,amplitude_f1,score,important"]
        lines += [f"{epoch},0,conv1,{number},1.5,7,2,1" for epoch in range(epochs) for number in range(200)]
        (tmp_path / "importance.csv").write_text("\n".join(lines))
        tracemalloc.start()
        results(tmp_path)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    one = peak(1)
    assert peak(50) < 4 * one
