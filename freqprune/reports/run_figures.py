"""Figures of runs and sweeps: training, pruning, and what a sweep compares. Every function draws on a figure of its own
and returns it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from freqprune.reports.drawing import BLUE, GREY, RED, all_in_words, counts_per_layer, layer_ticks, line_styles, tidy

FloatArray = npt.NDArray[np.float64]


def training_curves(history: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Loss and accuracy over epochs.

    Args:
        history: by name (``train/loss``, ``val/loss``, ``train/accuracy``, ``val/accuracy``) pairs of epoch (from 0)
            and value.
    """
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    for axis, kind, unit, label in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), (1, 100), ("loss", "accuracy (%)"), strict=True
    ):
        for split, colour, style in (("train", BLUE, "-"), ("val", RED, "--")):
            points = history.get(f"{split}/{kind}", ())
            # What is minimised may hold more than the cross-entropy: smoothed labels, weights of classes, tags.
            name = {"val": "validation", "train": "training, augmented"}[split]
            if kind == "loss":
                name += {"val": ": cross-entropy", "train": ": what is minimised"}[split]
            if not points:
                continue
            axis.plot(
                [epoch + 1 for epoch, _ in points],
                [unit * value for _, value in points],
                style,
                color=colour,
                linewidth=1.3,
                # One epoch is no line.
                marker="o" if len(points) == 1 else None,
                markersize=4,
                label=name,
            )
        tidy(axis)
        axis.set_xlabel("epoch", fontsize=9)
        axis.set_ylabel(label, fontsize=9)
        axis.legend(fontsize=8, frameon=False)
    return figure


def important_over_epochs(shares: Mapping[int, Mapping[str, float]], title: str = "") -> Figure:
    """Share of important filters in each layer over training.

    Args:
        shares: for each tagged epoch (from 0) the share of important filters, 0 to 1, a layer.
        title: line above the figure.
    """
    return _over_epochs(shares, "important filters (%)", title, 100, 0, 100)


def agreement_over_epochs(agreement: Mapping[int, Mapping[str, float]], title: str) -> Figure:
    """How early the filters' final ranking is known: rank correlation of each layer's scores with the last epoch's, by
    epoch.

    Args:
        agreement: for each tagged epoch (from 0) the correlation, a layer, see
            `freqprune.reports.importance_table.rank_agreement`.
        title: line above the figure.
    """
    lowest = min((value for one in agreement.values() for value in one.values() if value == value), default=0.0)
    low = min(0.0, math.floor(10 * lowest) / 10)
    return _over_epochs(agreement, "rank correlation with the last epoch", title, 1, low, 1)


def _over_epochs(
    values: Mapping[int, Mapping[str, float]], label: str, title: str, unit: float, low: float, high: float
) -> Figure:
    """Layers downwards, epochs to the right, the value as colour; nothing where an epoch lacks a layer."""
    epochs = sorted(values)
    layers = in_order([list(values[epoch]) for epoch in epochs])
    grid = np.array([[values[epoch].get(layer, np.nan) for epoch in epochs] for layer in layers])
    figure = Figure(
        figsize=(min(12.0, max(4.5, 0.3 * len(epochs) + 3)), max(3.0, 0.18 * len(layers) + 1.2)), layout="constrained"
    )
    axis = _coloured(figure, unit * grid, [name.removeprefix("net.") for name in layers], label, title, low, high)
    step = math.ceil(len(epochs) / 12)
    axis.set_xticks(range(0, len(epochs), step), [str(epochs[i] + 1) for i in range(0, len(epochs), step)], fontsize=8)
    axis.set_xlabel("epoch", fontsize=9)
    return figure


def in_order(lists: Sequence[Sequence[str]]) -> list[str]:
    """The layers of several networks, each in its place after the one that it follows in its network.

    >>> in_order([["1.0", "2.0"], ["1.0", "1.1", "2.0", "2.1"]])
    ['1.0', '1.1', '2.0', '2.1']
    """
    found: list[str] = []
    for names in lists:
        place = 0
        for name in names:
            if name in found:
                place = found.index(name) + 1
            else:
                found.insert(place, name)
                place += 1
    return found


def _coloured(
    figure: Figure, grid: FloatArray, rows: Sequence[str], label: str, title: str, low: float, high: float
) -> Axes:
    """A grid of values as colours, with named rows; white where a value is undefined."""
    axis = figure.subplots()
    drawn = axis.imshow(grid, aspect="auto", cmap="cividis", vmin=low, vmax=high, interpolation="nearest")
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    axis.set_title(title, fontsize=9, loc="left")
    bar = figure.colorbar(drawn, ax=axis)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return axis


def kept_over_depth(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """Share of the filters that each of several ways of pruning keeps, layer by layer.

    Args:
        shares: for each way the share kept, 0 to 1, a layer; layers that a way left alone are left out.
    """
    layers = in_order([list(by_layer) for by_layer in shares.values()])
    grid = np.array([[100 * by_layer.get(layer, math.nan) for layer in layers] for by_layer in shares.values()])
    figure = Figure(
        figsize=(max(5.0, 0.3 * len(layers) + 3.5), max(2.6, 0.2 * len(shares) + 1.8)), layout="constrained"
    )
    axis = _coloured(
        figure, grid, [*all_in_words(shares).values()], "filters kept (%)", "Filters kept, mean over seeds", 0, 100
    )
    layer_ticks(axis, layers)
    axis.set_xlim(-0.5, len(layers) - 0.5)
    return figure


def medians_over_depth(medians: Mapping[str, Mapping[str, float]], label: str) -> Figure:
    """A median over the filters of each layer, one line for each of several networks or stimuli.

    Args:
        medians: for each line its values, a layer; NaN where no filter answers.
        label: what it is the median of.
    """
    layers = in_order([list(by_layer) for by_layer in medians.values()])
    n_rows = math.ceil(len(medians) / 2) if len(medians) > 1 else 0
    figure = Figure(figsize=(max(5.0, 0.27 * len(layers) + 1.5), 3.8 + 0.2 * n_rows), layout="constrained")
    axis = figure.subplots()
    labels = all_in_words(medians)
    for (colour, marker), (name, by_layer) in zip(line_styles(len(medians)), medians.items(), strict=True):
        values = [by_layer.get(layer, math.nan) for layer in layers]
        axis.plot(
            range(len(layers)), values, color=colour, marker=marker, markersize=4, linewidth=1.1, label=labels[name]
        )
    tidy(axis)
    layer_ticks(axis, layers)
    axis.set_ylabel(label, fontsize=9)
    axis.set_title("Median over the filters of each layer", fontsize=9, loc="left")
    if n_rows:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def kept_per_layer(kept: Mapping[str, int], widths: Mapping[str, int], title: str = "") -> Figure:
    """Filters kept in each layer beside all that it had.

    Args:
        kept: number of filters kept, a layer; none of a layer that is not named.
        widths: number of filters before, a layer.
        title: line above the figure.
    """
    return counts_per_layer(
        {layer: (width, kept.get(layer, 0)) for layer, width in widths.items()}, ("before", "kept"), title
    )


REMOVED = {"cut": "MACs removed (%)", "time_cut": "time of a forward removed (%)"}


def accuracy_over_cut(lines: Mapping[str, Sequence[Mapping[str, tuple[float, float]]]], over: str = "cut") -> Figure:
    """Test accuracy over the share of MACs, or of the time, removed, one line a method; left before fine-tuning, right
    after it, as far as they were measured.

    Args:
        lines: for each method its points: mean and standard deviation (NaN for a single run) by name, in per cent:
            ``cut`` or ``time_cut``, ``dense``, and ``pruned``, ``recalibrated`` (which then stands for ``pruned``) or
            ``finetuned`` (or, in its place, ``from_scratch``).
        over: ``"cut"`` or ``"time_cut"``.
    """

    def before(point: Mapping[str, tuple[float, float]]) -> tuple[float, float] | None:
        return point.get("recalibrated", point.get("pruned"))

    def after(point: Mapping[str, tuple[float, float]]) -> tuple[float, float] | None:
        return point.get("finetuned", point.get("from_scratch"))

    everything = [point for points in lines.values() for point in points]
    ways = {"finetuned": "fine-tuned", "from_scratch": "from scratch"}
    trained = " or ".join(words for way, words in ways.items() if any(way in point for point in everything))
    panels = [
        (pick, title)
        for pick, title in ((before, "before fine-tuning"), (after, trained))
        if any(pick(point) for point in everything)
    ]
    n_rows = math.ceil(len(lines) / 2)
    figure = Figure(figsize=(4.4 * len(panels), 3.6 + 0.2 * n_rows), layout="constrained")
    dense = sorted({round(point["dense"][0], 2) for point in everything if "dense" in point})
    handles, labels = {}, all_in_words(lines)
    for axis, (pick, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (colour, marker), (label, points) in zip(line_styles(len(lines)), lines.items(), strict=True):
            shown = [(point[over][0], *value) for point in points if (value := pick(point)) is not None]
            if not shown:
                continue
            cuts, means, deviations = zip(*sorted(shown), strict=True)
            handles[label] = axis.errorbar(
                cuts,
                means,
                yerr=np.nan_to_num(deviations),
                color=colour,
                marker=marker,
                linewidth=1.2,
                markersize=5,
                capsize=3,
                label=labels[label],
            )
        for level in dense:
            axis.axhline(level, color=GREY, linewidth=0.8, linestyle=":")
            axis.annotate(
                f"dense {level:.2f}",
                (1, level),
                (-2, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                fontsize=8,
                color=GREY,
                ha="right",
            )
        tidy(axis)
        axis.margins(x=0.12, y=0.1)
        axis.set_title(title, fontsize=9, loc="left", pad=10)
        axis.set_xlabel(REMOVED[over], fontsize=9)
        axis.set_ylabel("test accuracy (%)", fontsize=9)
    figure.legend(
        handles=list(handles.values()),
        loc="outside lower center",
        ncols=min(2, len(handles)),
        fontsize=8,
        frameon=False,
    )
    return figure
