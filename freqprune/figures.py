"""Figures of a response. Every function draws on its own figure and returns it; `save` writes and closes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor

from freqprune.components import Component
from freqprune.tagging import TagResponse

matplotlib.use("Agg")
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe & Ito's palette: told apart with every common form of colour blindness; kinds differ in marker as well.
RED, GREEN, BLUE, GREY, ORANGE, PURPLE = "#D55E00", "#009E73", "#0072B2", "#777777", "#E69F00", "#CC79A7"
PART_COLOURS = (RED, GREEN, ORANGE, PURPLE)
PART_MARKERS = ("o", "s", "D", "P")
IM_MARKER = "^"


def save(figure: Figure, path: str | Path, dpi: int = 130) -> Path:
    """Write a figure to `path`, format by its ending."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return path


def _style(component: Component) -> tuple[str, str]:
    if component.part is None:
        return BLUE, IM_MARKER
    return PART_COLOURS[component.part % len(PART_COLOURS)], PART_MARKERS[component.part % len(PART_MARKERS)]


def _legend(response: TagResponse) -> list[Line2D]:
    stimulus = response.stimulus
    rows = [
        (f"harmonics of {name} ({freq:g} Hz)", PART_COLOURS[i % len(PART_COLOURS)], PART_MARKERS[i % len(PART_MARKERS)])
        for i, (name, freq) in enumerate(zip(stimulus.part_names, stimulus.tag_freqs, strict=True))
    ]
    rows.append(("intermodulation", BLUE, IM_MARKER))
    return [Line2D([], [], color=colour, marker=marker, linestyle="", markersize=5, label=label) for label, colour, marker in rows]


def snr_spectra(response: TagResponse, layer: str, filters: Sequence[int] | None = None, ceiling: float = 10.0, max_freq: float | None = None) -> Figure:
    """SNR spectrum of each filter of a layer (figure 4 of Böge et al. 2024).

    Harmonics of each part and intermodulation components are marked; values above `ceiling` are drawn on it, with their value written beside.

    Args:
        response: measured with noise.
        layer: name of the layer.
        filters: filters to draw; the first 16 if left out.
        ceiling: highest SNR on the axis.
        max_freq: highest frequency on the axis, in Hz; just above the last component if left out.
    """
    spectrum = response.snr_spectrum(layer).numpy()
    freqs = response.freqs.numpy()
    shown = list(range(min(16, len(spectrum)))) if filters is None else list(filters)
    n_columns = min(4, len(shown))
    n_rows = math.ceil(len(shown) / n_columns)
    figure = Figure(figsize=(3.1 * n_columns + 0.4, 1.75 * n_rows + 1.3), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    limit = max_freq or max(c.freq for c in response.components("all")) + 1.5
    low = freqs >= freqs[3]
    for axis, number in zip(axes.flat, shown, strict=False):
        values = spectrum[number]
        axis.plot(freqs[low], np.minimum(values[low], ceiling), color=GREY, linewidth=0.8)
        axis.axhline(1, color=GREY, linewidth=0.5, linestyle=":")
        for component in response.components("all"):
            value = values[component.bin]
            if not math.isfinite(value) or component.freq > limit:
                continue
            colour, marker = _style(component)
            axis.plot(component.freq, min(value, ceiling), marker=marker, color=colour, markersize=4.5, clip_on=False, zorder=3)
            # Fundamentals only: the numbers of all clipped components would overlap.
            if value > ceiling and component.order == 1:
                side = "right" if component.part == 0 else "left"
                offset = -4 if side == "right" else 4
                axis.annotate(f"{value:.0f}", (component.freq, ceiling), (offset, 4), textcoords="offset points", fontsize=7, color=colour, ha=side)
        if not np.isfinite(values[low]).any():
            axis.text(0.5, 0.5, "no response", transform=axis.transAxes, ha="center", color=GREY, fontsize=8)
        axis.set_title(f"filter {number}", fontsize=8, loc="left", pad=9)
        axis.set_xlim(0, limit)
        axis.set_ylim(0, ceiling)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    figure.supxlabel("frequency (Hz)", fontsize=9)
    figure.supylabel("SNR", fontsize=9)
    site = response.layers[layer].site
    figure.suptitle(f"{layer}, {site.stage} output: {response.n_images} images, pixel noise sd {response.noise_std:g}", fontsize=10)
    figure.legend(handles=_legend(response), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def important_per_layer(important: Mapping[str, Tensor], title: str = "") -> Figure:
    """Important filters of each layer over all its filters (figure 5 of Böge et al. 2024).

    Args:
        important: boolean ``(n_filters,)`` a layer.
        title: line above the figure.
    """
    names = list(important)
    counts = [int(flags.sum()) for flags in important.values()]
    widths = [len(flags) for flags in important.values()]
    figure = Figure(figsize=(max(5.0, 0.3 * len(names) + 1.5), 3.6), layout="constrained")
    axis = figure.subplots()
    positions = np.arange(len(names))
    axis.bar(positions, widths, color="#e4e4e4", label="all filters")
    axis.bar(positions, counts, color=BLUE, width=0.6, label="important")
    axis.set_xticks(positions, [n.removeprefix("net.") for n in names], rotation=90, fontsize=7)
    axis.set_ylabel("filters")
    axis.set_xlim(-0.7, len(names) - 0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize=9, loc="left")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure
