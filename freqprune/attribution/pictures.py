"""Maps as pictures: effects over the image, what is significant outlined, parts that work together joined by lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

# What raises the score is red, what lowers it blue, in maps and of pairs; white in between.
COLOURS, RAISES, LOWERS = "RdBu_r", "#B2182B", "#2166AC"
BACK = "#FFFFFFB0"


def picture(
    values: Tensor,
    parts: Tensor,
    sure: Tensor,
    pixels: Tensor | None = None,
    pairs: Sequence[tuple[int, int, float]] = (),
    marked: Sequence[int] = (),
    title: str = "",
) -> Figure:
    """A figure of one map, beside its image if that is given.

    Args:
        values: effect at each pixel, ``(height, width)``.
        parts: number of each pixel's part, -1 for none, likewise.
        sure: whether a part is significant, ``(n_parts,)``; outlined.
        pixels: of the image, in [0, 1], ``(n_channels, height, width)``.
        pairs: numbers of two parts and how they interact, joined by lines, wider for larger ones.
        marked: parts that are numbered 1, 2, ... in the figure.
        title: line above the map.
    """
    height, width = values.shape
    figure, axis = _panels(pixels, width / height)
    if pixels is not None:
        axis.imshow(pixels.clamp(0, 1).mean(0).cpu().numpy(), cmap="gray", vmin=-0.4, vmax=1)
    limit = float(values.abs().max()) or 1.0
    drawn: Any = axis.imshow(
        values.cpu().numpy(), cmap=COLOURS, vmin=-limit, vmax=limit, alpha=1 if pixels is None else 0.6
    )
    numbers = parts.cpu().numpy()
    outlined = np.where((numbers >= 0) & sure.cpu().numpy()[numbers.clip(min=0)], numbers, -1)
    axis.add_collection(LineCollection(list(borders(outlined)), colors="black", linewidths=0.9))
    _join(axis, centres(numbers, len(sure)), pairs, marked)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=9, loc="left")
    bar = figure.colorbar(drawn, ax=axis, shrink=0.85)
    bar.set_label("effect on the score, smoothed", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def bars(
    effects: Tensor, errors: Tensor, names: Sequence[str], sure: Tensor, pixels: Tensor | None = None, title: str = ""
) -> Figure:
    """A figure of a few effects with their standard errors, significant ones in full colour.

    Args:
        effects: ``(n_parts,)``.
        errors: standard errors, likewise.
        names: of the parts.
        sure: which of them are significant, ``(n_parts,)``.
        pixels: of the image, in [0, 1], ``(n_channels, height, width)``, drawn beside them.
        title: line above the bars.
    """
    figure, axis = _panels(pixels, 1.0)
    colours = [RAISES if value > 0 else LOWERS for value in effects.tolist()]
    drawn = axis.bar(range(len(names)), effects.tolist(), yerr=errors.tolist(), color=colours, capsize=3)
    for bar, certain in zip(drawn, sure.tolist(), strict=True):
        bar.set_alpha(1.0 if certain else 0.35)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_ylabel("effect on the score", fontsize=9)
    axis.set_title(title, fontsize=9, loc="left")
    return figure


def filters_by_classes(effects: Tensor, names: Sequence[str], title: str = "") -> Figure:
    """A figure of what filters do to classes, those together that raise the same class most. Of many not all are named.

    Args:
        effects: of every filter on every class, ``(n_filters, n_classes)``.
        names: of the classes.
        title: line above.
    """
    best = effects.argmax(1)
    order = sorted(range(len(effects)), key=lambda row: (int(best[row]), -float(effects[row].amax())))
    size = min(24.0, max(3.6, 0.34 * len(names) + 2.0)), min(40.0, max(2.4, 0.16 * len(order) + 1.2))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    limit = float(effects.abs().max()) or 1.0
    drawn = axis.imshow(
        effects[order].cpu().numpy(), cmap=COLOURS, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
    )
    across, down = range(0, len(names), -(-len(names) // 70)), range(0, len(order), -(-len(order) // 250))
    named = [names[at] for at in across]
    axis.set_xticks(across, named, rotation=90 if max(map(len, named)) > 3 else 0, fontsize=8)
    axis.set_yticks(down, [str(order[at]) for at in down], fontsize=6)
    axis.set_ylabel("filter", fontsize=9)
    axis.set_title(title, fontsize=9, loc="left")
    bar = figure.colorbar(drawn, ax=axis)
    bar.set_label("mean effect on the logit", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def _panels(pixels: Tensor | None, shape: float) -> tuple[Figure, Axes]:
    """A figure and the place in it for what is found, so many times as wide as high, beside the image if that is
    given."""
    n_panels, size = 1 if pixels is None else 2, 3.2
    figure = Figure(figsize=(size * n_panels * shape + 1.0, size + 0.3), layout="constrained")
    *beside, axis = figure.subplots(1, n_panels, squeeze=False)[0]
    if pixels is not None:
        shown = pixels.permute(1, 2, 0).clamp(0, 1).cpu().numpy()
        beside[0].imshow(shown if shown.shape[2] == 3 else shown.mean(2), cmap="gray", vmin=0, vmax=1)
        beside[0].set_xticks([])
        beside[0].set_yticks([])
    return figure, axis


def _join(
    axis: Axes, middles: npt.NDArray[np.float64], pairs: Sequence[tuple[int, int, float]], marked: Sequence[int]
) -> None:
    largest = max((abs(value) for *_, value in pairs), default=0.0)
    for one, other, value in pairs:
        if not value:
            continue
        ends = middles[[one, other]].T
        width = 0.8 + 2.2 * abs(value) / largest
        axis.plot(*ends, color="white", linewidth=width + 1.2, solid_capstyle="round")
        axis.plot(*ends, color=RAISES if value > 0 else LOWERS, linewidth=width, marker="o", markersize=3)
    for place, part in enumerate(marked, 1):
        axis.text(
            middles[part, 0], middles[part, 1], str(place), fontsize=7, ha="center", va="center", color="black",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": BACK, "edgecolor": "none"},
        )  # fmt: skip


def borders(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Lines between pixels of different labels, ``(n_lines, 2, 2)``, of two ends x and y in pixels; the image's own
    border counts as label -1.

    >>> len(borders(np.array([[0, -1], [-1, -1]])))
    4
    """
    padded = np.pad(labels, 1, constant_values=-1)
    y, x = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    across = np.stack([x - 0.5, y - 0.5, x + 0.5, y - 0.5], 1)
    y, x = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    down = np.stack([x - 0.5, y - 0.5, x - 0.5, y + 0.5], 1)
    return np.concatenate([across, down]).reshape(-1, 2, 2)


def centres(parts: npt.NDArray[np.int64], n_parts: int) -> npt.NDArray[np.float64]:
    """Mean x and y of the pixels of each part, ``(n_parts, 2)``; NaN for one without pixels."""
    y, x = np.nonzero(parts >= 0)
    numbers = parts[y, x]
    counts = np.bincount(numbers, minlength=n_parts)
    with np.errstate(invalid="ignore"):
        return np.stack([np.bincount(numbers, axis, n_parts) / counts for axis in (x, y)], 1)
