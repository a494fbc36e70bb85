"""What a run tells as tables: its stages, and CSV files of every filter and layer."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from freqprune.pruning import Verdict
from freqprune.tagging import TagResponse

STAGES = ("dense", "pruned", "recalibrated", "finetuned", "from_scratch", "folded", "onnx", "int8")


def percentages(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Test accuracy of every stage that ran, and ``cut``, ``params_cut`` and ``time_cut``, the shares of MACs,
    parameters and time removed (at the batch size, and with the target, that a cut by time was asked for, else eager at
    the largest timed); all in per cent.

    Args:
        metrics: as in ``metrics.json``; see the README.

    >>> dense, pruned = {"test_accuracy": 0.5, "macs": 4, "params": 10}, {"test_accuracy": 0.25, "macs": 1, "params": 5}
    >>> percentages({"dense": dense, "pruned": pruned})
    {'dense': 50.0, 'pruned': 25.0, 'cut': 75.0, 'params_cut': 50.0}
    >>> dense, pruned = {**dense, "latency_ms": {"1": 2, "64": 8}}, {**pruned, "latency_ms": {"1": 1, "64": 2}}
    >>> timed = {"dense": dense, "pruned": pruned}
    >>> percentages(timed)["time_cut"], percentages({**timed, "latency": {"batch_size": 1}})["time_cut"]
    (75.0, 50.0)
    """
    found = {stage: 100 * metrics[stage]["test_accuracy"] for stage in STAGES if stage in metrics}
    if "pruned" in metrics:
        for name, key in (("cut", "macs"), ("params_cut", "params")):
            found[name] = 100 * (1 - metrics["pruned"][key] / metrics["dense"][key])
        before, after = (metrics[stage].get("latency_ms") for stage in ("dense", "pruned"))
        if before and after:
            size = str(metrics.get("latency", {}).get("batch_size", max(before, key=int)))
            found["time_cut"] = 100 * (1 - after[size] / before[size])
        promise = metrics.get("latency", {})
        if promise.get("target", "eager") != "eager" and "got" in promise:
            # The table is of eager forwards.
            found["time_cut"] = 100 * promise["got"]
    return found


def timed_on(metrics: Mapping[str, Any]) -> str:
    """Where the times in the table of stages were measured, in words."""
    # Runs of earlier versions did not keep where.
    device: str = metrics.get("timed_on", "the machine of their run")
    deployed = [stage for stage in ("onnx", "int8") if stage in metrics]
    elsewhere = deployed and not device.startswith("cpu")
    return f"{device} ({' and '.join(deployed)} on cpu, with the way there)" if elsewhere else device


def stage_rows(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and a row for each stage that ran: accuracy, MACs, parameters, file size, peak memory and latency.

    Args:
        metrics: as in ``metrics.json``; see the README.
    """
    columns: list[tuple[str, str, str, float, int]] = [
        ("MACs, M", "macs", "", 1e6, 2), ("parameters, k", "params", "", 1e3, 1), ("file, kB", "file_bytes", "", 1e3, 0)
    ]  # fmt: skip
    dense = metrics["dense"]
    columns += [(f"memory, MB (batch {size})", "memory_bytes", size, 1e6, 1) for size in dense.get("memory_bytes", {})]
    columns += [(f"ms (batch {size})", "latency_ms", size, 1, 2) for size in dense.get("latency_ms", {})]
    rows = []
    for stage in STAGES:
        if stage not in metrics:
            continue
        row = metrics[stage]
        cells = [stage, f"{100 * row['test_accuracy']:.2f}"]
        for _, key, size, unit, digits in columns:
            value, before = (values.get(key, {}).get(size) if size else values.get(key) for values in (row, dense))
            change = "" if stage == "dense" or value is None else f"\n{100 * (value / before - 1):+.1f} %"
            cells.append("" if value is None else f"{value / unit:.{digits}f}{change}")
        rows.append(cells)
    return ["stage", "test accuracy, %", *(column[0] for column in columns)], rows


def write_filters(path: Path, response: TagResponse, verdict: Verdict | None) -> None:
    """CSV of every filter and component.

    Columns: layer_index, layer, recorded_at (module and stage), filter, component, frequency (Hz), amplitude, snr,
        p_value (not adjusted),
    important (of the filter), noise_std (pixel units), undefined (why an SNR is missing).
    """
    components = response.components("all")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "layer_index",
                "layer",
                "recorded_at",
                "filter",
                "component",
                "frequency",
                "amplitude",
                "snr",
                "p_value",
                "important",
                "noise_std",
                "undefined",
            ]
        )
        for index, (layer, recorded) in enumerate(response.layers.items()):
            amplitude, snr, why = (
                response.amplitude(layer, "all"),
                response.snr(layer, "all"),
                response.why_no_snr(layer, "all"),
            )
            p_values = response.p_values(layer, "all") if response.noise_std else None
            where = f"{recorded.site.module} ({recorded.site.stage})"
            for number in range(len(amplitude)):
                flag = "" if verdict is None else int(verdict.important[layer][number])
                for i, component in enumerate(components):
                    writer.writerow(
                        [
                            index,
                            layer,
                            where,
                            number,
                            component.name,
                            component.freq,
                            f"{amplitude[number, i]:.6g}",
                            f"{snr[number, i]:.6g}",
                            "" if p_values is None else f"{p_values[number, i]:.3g}",
                            flag,
                            response.noise_std,
                            "" if snr[number, i].isfinite() else why[number],
                        ]
                    )


def training_history(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Values by epoch of every column of Lightning's ``metrics.csv`` that is logged once an epoch."""
    found: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name in ("train/loss", "val/loss", "train/accuracy", "val/accuracy"):
                if row.get(name):
                    found.setdefault(name, []).append((int(row["epoch"]), float(row[name])))
    # A validation after the training is of its last epoch, whatever Lightning counts.
    last = max(
        (epoch for name, values in found.items() if name.startswith("train/") for epoch, _ in values), default=None
    )
    return {
        name: [(epoch if last is None else min(epoch, last), value) for epoch, value in values]
        for name, values in found.items()
    }


def write_layers(path: Path, responses: Mapping[str, TagResponse]) -> None:
    """CSV of what drives each filter and how much it combines the parts, by group of images.

    Columns: group (``all`` or a class), layer_index, layer, filter, part_preference ((A1 - A2) / (A1 + A2) at the first
        two fundamentals),
    integration (intermodulation over fundamentals); empty where a filter does not answer.
    """
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "layer_index", "layer", "filter", "part_preference", "integration"])
        for group, response in responses.items():
            for index, layer in enumerate(response.layers):
                values = zip(
                    response.part_preference(layer).tolist(), response.integration(layer).tolist(), strict=True
                )
                for number, pair in enumerate(values):
                    writer.writerow([group, index, layer, number, *("" if v != v else f"{v:.6g}" for v in pair)])


def layer_medians(path: Path) -> dict[str, dict[str, float]]:
    """Medians over the filters of each layer of the figures in a ``layers.csv``, over all images: by figure, then
    layer; NaN where no filter answers."""
    values: dict[str, dict[str, list[float]]] = {"part_preference": {}, "integration": {}}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["group"] == "all":
                for name, by_layer in values.items():
                    found = by_layer.setdefault(row["layer"], [])
                    if row[name]:
                        found.append(float(row[name]))
    return {
        name: {layer: median(found) if found else math.nan for layer, found in by_layer.items()}
        for name, by_layer in values.items()
    }
