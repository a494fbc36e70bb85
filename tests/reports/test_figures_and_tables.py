"""Figures hold what they should: drawn values, labels that do not overlap, marks told apart without colour."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch import nn

from freqprune.errors import InputError
from freqprune.networks.registry import build_model
from freqprune.pruning.criteria import scores
from freqprune.pruning.importance import Evidence
from freqprune.pruning.verdict import judge
from freqprune.reports import (
    filters_over_epochs,
    importance_table,
    record,
    response_figures,
    run_figures,
    stage_table,
    tables,
)
from freqprune.reports.drawing import save
from freqprune.tagging.measurement import tag
from freqprune.tagging.response import TagResponse
from freqprune.tagging.stimulus import Stimulus


@pytest.fixture(scope="module")
def response() -> TagResponse:
    torch.manual_seed(0)
    return tag(build_model({"name": "resnet8"}), torch.rand(4, 3, 16, 16))


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of visible texts whose boxes overlap."""
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # Axes that are switched off draw their title and nothing else.
    off = [axis for axis in figure.findobj(Axes) if not (axis.axison and axis.get_visible())]
    hidden = {
        id(text) for axis in off for text in axis.findobj(Text) if text is not axis.title or not axis.get_visible()
    }
    boxes = [
        (text.get_text(), text.get_window_extent(canvas.get_renderer()).shrunk(0.9, 0.8))
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden
    ]
    # Rotated tick labels lie side by side by construction; every other pair must be apart.
    return [
        (a, b)
        for i, (a, x) in enumerate(boxes)
        for b, y in boxes[i + 1 :]
        if x.overlaps(y) and not (a.startswith("layer") and b.startswith("layer"))
    ]


@pytest.mark.slow
def test_no_figure_has_overlapping_text(response: TagResponse, tmp_path: Path) -> None:
    important = judge(response).important
    shares = {epoch: dict.fromkeys(important, 0.5) for epoch in range(30)}
    drawn = {
        "stimulus": response_figures.stimulus_figure(Stimulus(), torch.rand(3, 16, 16)),
        "stimulus4": response_figures.stimulus_figure(
            Stimulus(parts="quadrants", tag_freqs=(8.5, 15.5, 19.0, 20.5), max_order=2), torch.rand(1, 16, 16)
        ),
        "bins": response_figures.snr_bins(response, "conv1", 0),
        "spectra": response_figures.snr_spectra(response, "conv1"),
        "spectra3": response_figures.snr_spectra(response, "conv1", filters=[1, 5, 7]),
        "important": response_figures.important_per_layer(important, "a title"),
        "epochs": run_figures.important_over_epochs(shares, "a title"),
        "kept": run_figures.kept_over_depth({f"way {i}": dict.fromkeys(important, i / 9) for i in range(9)}),
        "one kept": run_figures.kept_over_depth({"all jobs": dict.fromkeys(important, 0.5)}),
        "medians": run_figures.medians_over_depth(
            {f"way {i}": dict.fromkeys(important, i / 9) for i in range(9)}, "intermodulation / fundamentals"
        ),
        "preference": response_figures.part_preference_over_depth(response),
        "integration": response_figures.integration_over_depth(response, {"cat": response, "dog": response}),
    }
    for name, figure in drawn.items():
        assert overlaps(figure) == [], name
        assert save(figure, tmp_path / f"{name}.png").stat().st_size > 3000


def test_spectra_draw_the_snr_and_cut_it(response: TagResponse) -> None:
    figure = response_figures.snr_spectra(response, "conv1", filters=[3], ceiling=5.0)
    (axis,) = [a for a in figure.axes if a.get_visible()]
    drawn = {
        float(freq): float(value)
        for line in axis.lines
        if line.get_marker() != "None"
        for freq, value in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    snr = response.snr("conv1", "all")[3]
    for component, value in zip(response.components("all"), snr.tolist(), strict=True):
        # The lowest component lacks two noise bins on its left and is drawn from the spectrum.
        if component.bin >= 3:
            assert drawn[component.freq] == pytest.approx(min(value, 5.0))


def test_kinds_differ_in_marker_and_colour() -> None:
    handles = response_figures._legend(Stimulus())
    assert len({h.get_marker() for h in handles}) == len({h.get_color() for h in handles}) == 3


def test_dead_filters_are_said_to_be(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(-1)
    dead = tag(net, torch.rand(2, 3, 16, 16))
    figure = response_figures.snr_spectra(dead, "0")
    assert [t.get_text() for a in figure.axes for t in a.texts] == ["no response"] * 2
    assert overlaps(response_figures.part_preference_over_depth(dead)) == []
    save(response_figures.integration_over_depth(dead), tmp_path / "i.png")


def test_table_tells_the_changes() -> None:
    metrics = {
        "dense": {"test_accuracy": 0.9, "macs": 2_000_000, "params": 1000, "latency_ms": {"1": 2.0}},
        "pruned": {"test_accuracy": 0.1, "macs": 1_000_000, "params": 500, "latency_ms": {"1": 1.5}},
        "finetuned": {"test_accuracy": 0.85},
    }
    table = stage_table(metrics)
    rows = list(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert rows[1] == ("pruned", "10.00", "1.00\n-50.0 %", "0.5\n-50.0 %", "", "1.50\n-25.0 %")
    assert [row[0] for row in rows] == ["dense", "pruned", "finetuned"]


def test_units_of_the_table_are_those_of_its_header() -> None:
    counts = {"macs": 3_000_000, "params": 4_000, "file_bytes": 5_000}
    dense = {"test_accuracy": 0.5, **counts, "memory_bytes": {"64": 6_000_000}, "latency_ms": {"64": 7.0}}
    header, (row,) = tables.stage_rows({"dense": dense})
    assert dict(zip(header, row, strict=True)) == {
        "stage": "dense", "test accuracy, %": "50.00", "MACs, M": "3.00", "parameters, k": "4.0", "file, kB": "5",
        "memory, MB (batch 64)": "6.0", "ms (batch 64)": "7.00",
    }  # fmt: skip


def test_filters_are_told_with_the_frequencies_of_their_components_in_hertz(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    response = tag(net, torch.rand(1, 3, 8, 8), Stimulus(tag_freqs=(6.0, 7.5), max_order=2))
    tables.write_filters(tmp_path / "filters.csv", response, None)
    with (tmp_path / "filters.csv").open(newline="") as file:
        found = {row["component"]: float(row["frequency"]) for row in csv.DictReader(file)}
    assert found == {"f1": 6, "2f1": 12, "f2": 7.5, "2f2": 15, "f1+f2": 13.5, "f2-f1": 1.5}
    verdict = judge(response)
    tables.write_filters(tmp_path / "filters.csv", response, verdict)
    with (tmp_path / "filters.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6
    for row in rows:
        number, which = int(row["filter"]), [row["component"]]
        for column, values in (
            ("amplitude", response.amplitude),
            ("p_value", response.p_values),
            ("snr", response.snr),
        ):
            assert float(row[column]) == pytest.approx(float(values("0", which)[number, 0]), rel=6e-3), column
        assert row["important"] == str(int(verdict.important["0"][number]))


def test_a_file_in_the_place_of_another_appears_once_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str, **_: object) -> None:
        path.write_bytes(text[:2].encode())
        raise OSError("full")

    # Names of files that are not UTF-8, as Python reads them.
    assert record.write_text(tmp_path / "page.html", "caf\udce9.jpg").read_text() == "caf\\udce9.jpg"
    path = record.write_text(tmp_path / "metrics.json", "before")
    # Who reads on while it is replaced reads the one before to its end.
    with path.open() as reader:
        record.write_text(path, "after")
        assert reader.read() == "before"
    assert path.read_text() == "after"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="full"):
            record.write_text(path, "half")
    assert path.read_text() == "after"


def test_metrics_appear_complete_or_not_at_all(tmp_path: Path) -> None:
    record.write_json(tmp_path / "metrics.json", {"a": 1})
    with pytest.raises(TypeError):
        record.write_json(tmp_path / "metrics.json", {"a": object()})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1}


def test_rank_agreement_with_the_last_epoch(tmp_path: Path) -> None:
    rows = ["epoch,layer,filter,score,amplitude_f1"]
    for epoch, a, b in ((0, [3, 2, 1], [1, 1, 1]), (4, [1, 3, 2], [1, 2, "nan"]), (9, [1, 2, 3], [1, 2, 0])):
        rows += [
            f"{epoch},{layer},{i},{value},0" for layer, values in (("a", a), ("b", b)) for i, value in enumerate(values)
        ]
    (tmp_path / "importance.csv").write_text("\n".join(rows) + "\n")
    found = importance_table.rank_agreement(tmp_path / "importance.csv")
    assert found[0]["a"] == pytest.approx(-1)
    assert found[4] == pytest.approx({"a": 0.5, "b": 1.0})
    assert found[9] == pytest.approx({"a": 1.0, "b": 1.0})
    assert found[0]["b"] != found[0]["b"]  # all equal: no ranking
    of_amplitudes = importance_table.rank_agreement(tmp_path / "importance.csv", "amplitude_f1")
    assert all(value != value for value in of_amplitudes[9].values())


def test_figures_of_runs_and_sweeps_draw_what_they_are_given() -> None:
    point = {"cut": (50.0, 0.1), "dense": (92.0, 0.0), "pruned": (20.0, 1.0), "finetuned": (90.0, 0.5)}
    lines = {"snr": [point, {**point, "cut": (30.0, float("nan")), "finetuned": (91.0, float("nan"))}], "l2": [point]}
    figure = run_figures.accuracy_over_cut(lines)
    drawn = [[container.lines[0].get_xydata().tolist() for container in axis.containers] for axis in figure.axes]
    assert drawn[0] == [[[30.0, 20.0], [50.0, 20.0]], [[50.0, 20.0]]]
    assert drawn[1] == [[[30.0, 91.0], [50.0, 90.0]], [[50.0, 90.0]]]
    (axis,) = run_figures.accuracy_over_cut(
        {"a": [{"cut": (50.0, 0.1), "recalibrated": (30.0, 1.0), "pruned": (20.0, 1.0)}]}
    ).axes
    assert axis.containers[0].lines[0].get_xydata().tolist() == [[50.0, 30.0]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["snr", "l2"]
    assert not overlaps(figure)
    bars = run_figures.kept_per_layer({"a": 3, "b": 4}, {"a": 6, "b": 8, "gone": 9}).axes[0].containers
    assert [[bar.get_height() for bar in group] for group in bars] == [[6, 8, 9], [3, 4, 0]]
    curves = run_figures.training_curves({"train/loss": [(0, 2.0), (1, 1.0)], "val/accuracy": [(0, 0.25)]})
    assert curves.axes[0].lines[0].get_xydata().tolist() == [[1, 2.0], [2, 1.0]]
    assert curves.axes[1].lines[0].get_xydata().tolist() == [[1, 25.0]]
    # Smoothed labels and the like are in the one and not in the other.
    history = {"train/loss": [(0, 2.0)], "val/loss": [(0, 1.0)], "val/accuracy": [(0, 0.25)]}
    both = run_figures.training_curves(history).axes[0]
    assert both.get_ylabel() == "loss"
    legend = [text.get_text() for text in both.get_legend().get_texts()]
    assert legend == ["training, augmented: what is minimised", "validation: cross-entropy"]


def test_filters_are_drawn_beside_all_of_their_layer() -> None:
    important = {"a": torch.tensor([True, False, False]), "b": torch.tensor([True, True])}
    for figure in (
        response_figures.important_per_layer(important),
        run_figures.kept_per_layer({"a": 1, "b": 2}, {"a": 3, "b": 2}),
    ):
        assert [bar.get_height() for bar in figure.axes[0].patches] == [3, 2, 1, 2]


def test_epochs_with_other_filters_are_kept_and_not_compared(tmp_path: Path) -> None:
    """As where layers were pruned on the way, or a training goes on with others being read."""
    images, path = torch.rand(2, 3, 16, 16), tmp_path / "importance.csv"
    for epoch, (width, layers) in enumerate(((8, ["conv1", "layer1.0.conv1"]), (8, ["conv1"]), (4, ["conv1"]))):
        net = build_model({"name": "resnet8", "stage_widths": [width, 8, 8]})
        response = tag(net, images, layers=layers)
        importance_table.write_importance(
            path, epoch, response, scores("amplitude", Evidence(net, response), layers), judge(response)
        )
        shares = importance_table.important_shares(path)
        assert list(shares) == list(range(epoch + 1))
        assert shares[epoch] == {
            layer: float(flags.double().mean()) for layer, flags in judge(response).important.items()
        }
        found = importance_table.rank_agreement(path)
        assert found[epoch]["conv1"] == pytest.approx(1.0)
        assert [label.label for label in filters_over_epochs(path, Stimulus(tag_freqs=(6.0, 7.5)), "amplitude")] == [
            f"epoch {epoch + 1}"
        ]
        run_figures.important_over_epochs(importance_table.important_shares(path))
    assert math.isnan(found[1]["conv1"])


def test_epochs_are_appended_and_a_row_that_was_cut_off_is_none(tmp_path: Path) -> None:
    net, path = build_model({"name": "resnet8", "stage_widths": [8, 8, 8]}), tmp_path / "importance.csv"
    response = tag(net, torch.rand(2, 3, 16, 16), layers=["conv1"])
    table, verdict = scores("amplitude", Evidence(net, response), ["conv1"]), judge(response)

    def write(epoch: int, since: int | None = None) -> int:
        importance_table.write_importance(path, epoch, response, table, verdict, since)
        return path.stat().st_ino

    first = write(0, since=0)
    assert write(1) == write(2) == first
    assert [row["epoch"] for row in importance_table.whole_rows(path)] == [str(e) for e in (0, 1, 2) for _ in range(8)]
    whole = path.read_bytes()
    for cut_off in (3, 9):
        path.write_bytes(whole[:-cut_off])
        assert len(list(importance_table.whole_rows(path))) == 23
        assert importance_table.rank_agreement(path).keys() == {0, 1, 2}
        assert importance_table.important_shares(path).keys() == {0, 1, 2}
    # One that goes on writes the epoch that was cut off anew.
    write(2, since=2)
    assert path.read_bytes() == whole
    # As does one of an earlier epoch.
    write(1)
    assert path.read_bytes() == whole.split(b"\r\n2,")[0] + b"\r\n"


def test_results_of_other_settings_do_not_stay(tmp_path: Path) -> None:
    settings = {"seed": 0, "output_dir": str(tmp_path), "resume": None, "ckpt_path": None}

    def left(**changed: object) -> bool:
        (tmp_path / record.METRICS).write_text('{"finished": true}')
        record.write(tmp_path, OmegaConf.create({**settings, **changed}), [record.METRICS])
        return (tmp_path / record.METRICS).exists()

    assert left()  # nobody knows of what
    assert left()
    assert not left(seed=1)
    assert left(seed=2, resume=str(tmp_path))
    assert left(seed=3, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert not left(seed=4, resume=str(tmp_path / "other"))


def test_pages_of_other_settings_do_not_stay_either(tmp_path: Path) -> None:
    settings = {"output_dir": str(tmp_path), "resume": None, "ckpt_path": None, "ckpt": None}
    figure, of_a_cut = (tmp_path / "figures" / f"{name}.png" for name in ("training_curves", "kept_per_layer"))
    page = tmp_path / "report.html"
    figure.parent.mkdir()

    def left(*results: str, **changed: object) -> bool:
        for path in (page, figure, of_a_cut, tmp_path / record.METRICS):
            path.write_text("{}")
        record.write(tmp_path, OmegaConf.create({**settings, **changed}), results)
        assert page.exists() == figure.exists()
        return page.exists()

    assert left(seed=1)
    # An explanation has no such results.
    assert left(seed=0)
    assert left(record.METRICS, *record.PAGES, seed=0)
    assert of_a_cut.exists()
    assert not left(record.METRICS, *record.PAGES, seed=1)
    # Of the training whose network is pruned.
    assert left(record.METRICS, *record.PAGES, seed=2, ckpt=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert not (tmp_path / record.METRICS).exists()
    # They show a cut that this is not.
    assert not of_a_cut.exists()


def test_long_labels_are_told_apart_in_figures() -> None:
    ends = "layers [layer1.0.conv1,layer2.0.conv1,{},layer3.4.conv1,layer3.4.conv2]"
    names = [ends.format(one) for one in ("layer2.1.conv1", "layer2.2.conv1")]
    figure = run_figures.medians_over_depth({name: {"a": 1.0, "b": 2.0} for name in names}, "SNR")
    _, labels = figure.axes[0].get_legend_handles_labels()
    assert len(set(labels)) == 2


def test_a_file_lies_in_a_folder_by_its_name_or_where_links_lead(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    assert record.lies_in(tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "run")
    assert record.lies_in(tmp_path / "run" / ".." / "scratch" / "last.ckpt", tmp_path / "scratch")
    assert not record.lies_in(tmp_path / "scratch" / "last.ckpt", tmp_path / "run")


def test_lines_of_classes_are_medians_like_the_others(tmp_path: Path) -> None:
    net, images = build_model({"name": "resnet8"}), torch.rand(2, 3, 16, 16)
    response = tag(net, images, layers=["conv1", "layer1.0.conv1"])
    figure = response_figures.part_preference_over_depth(response, {"_a$b": response})
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert list(lines["\u200b_a\\$b"]) == list(lines["median of the layer"])
    save(figure, tmp_path / "a.png")
    figure = response_figures.integration_over_depth(response, {"cat": response})
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert list(lines["cat"]) == list(lines["median of the layer"])
    for layer, drawn in zip(response.layers, lines["median of the layer"], strict=True):
        values = response.integration(layer)
        assert drawn == pytest.approx(float(np.median(values[values.isfinite()])))


def test_the_bins_of_an_snr_are_those_that_it_is_made_of() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    # Beside the second tag lies the bin of Nyquist, which is no noise bin.
    response = tag(net, torch.rand(1, 3, 16, 16), Stimulus(tag_freqs=(16.5, 59.0), max_order=2))
    figure = response_figures.snr_bins(response, "0", 0, "f2")
    noisy = response.layers["0"].noisy_amplitude
    assert noisy is not None
    (level,) = {float(y) for y in figure.axes[0].lines[0].get_ydata()}
    assert level == pytest.approx(float(noisy[0, [116, 117, 119]].mean()))
    assert float(noisy[0, 118]) / level == pytest.approx(float(response.snr("0", ["f2"])[0, 0]))


def test_time_cut_is_that_of_the_target_that_was_asked_for() -> None:
    dense = {"test_accuracy": 0.5, "macs": 4, "params": 10, "latency_ms": {"1": 10.0}}
    pruned = {**dense, "latency_ms": {"1": 8.0}}
    metrics = {"dense": dense, "pruned": pruned, "latency": {"got": 0.41, "target": "onnx", "batch_size": 1}}
    assert tables.percentages(metrics)["time_cut"] == pytest.approx(41)
    metrics["latency"]["target"] = "eager"
    assert tables.percentages(metrics)["time_cut"] == pytest.approx(20)


def test_time_cut_is_that_of_the_largest_batch_if_none_was_asked_for() -> None:
    dense = {"test_accuracy": 0.5, "macs": 4, "params": 10, "latency_ms": {"8": 10.0, "16": 20.0, "128": 100.0}}
    pruned = {**dense, "latency_ms": {"8": 9.0, "16": 16.0, "128": 70.0}}
    assert tables.percentages({"dense": dense, "pruned": pruned})["time_cut"] == pytest.approx(30)


def test_rank_correlations_below_zero_have_colours_of_their_own() -> None:
    figure = run_figures.agreement_over_epochs({0: {"a": -0.8, "b": 0.0}, 1: {"a": 1.0, "b": 1.0}}, "")
    drawn = figure.axes[0].images[0]
    low, zero = (drawn.cmap(drawn.norm(value)) for value in (-0.8, 0.0))
    assert low != zero
    assert drawn.norm.vmin == pytest.approx(-0.8)


def test_a_training_is_finished_where_no_cut_follows_however_that_is_said(tmp_path: Path) -> None:
    (tmp_path / record.TRAINING).write_text("{}")
    for enabled, ended in ((False, True), ("off", True), ("no", True), (True, False), ("on", False), ("Yes", False)):
        record.write_json(tmp_path / record.RUN, {"settings": {"pruning": {"enabled": enabled}}})
        assert record.is_finished(tmp_path) is ended


def test_the_run_folder_goes_by_its_name_in_paths_alone(tmp_path: Path) -> None:
    settings = {
        "output_dir": "model",
        "model": {"name": "models", "file": "model/best.ckpt"},
        "seen": ["model", "a/model/b", {"model": "the model/x"}],
    }
    record.write(tmp_path, OmegaConf.create(settings))
    assert record.read_json(tmp_path / record.RUN)["settings"] == {
        "model": {"name": "models", "file": "${output_dir}/best.ckpt"},
        "seen": ["${output_dir}", "a/model/b", {"model": "the model/x"}],
    }


def test_figures_leave_the_backend_of_a_notebook_alone() -> None:
    code = (
        "import matplotlib; matplotlib.use('svg'); import matplotlib.pyplot; "
        "from freqprune.reports import gather, response_figures, run_figures, save; response_figures.Figure; "
        "assert matplotlib.get_backend().lower() == 'svg', matplotlib.get_backend()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_part_has_no_preference() -> None:
    stimulus = Stimulus(tag_freqs=(6.0,), parts=torch.ones(1, 8, 8, dtype=torch.bool), max_order=1)
    response = tag(build_model({"name": "resnet8"}), torch.rand(2, 3, 8, 8), stimulus)
    with pytest.raises(InputError, match="needs two parts"):
        response_figures.part_preference_over_depth(response)
