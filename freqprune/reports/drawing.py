"""How every figure looks, what several of them draw, and saving. Figures are made without pyplot, which a notebook
may draw by: its screen, or that there is none, does not matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

# Okabe & Ito's palette: told apart with every common form of colour blindness; kinds differ in marker as well.
RED, GREEN, BLUE, GREY, ORANGE, PURPLE = "#D55E00", "#009E73", "#0072B2", "#777777", "#E69F00", "#CC79A7"
PALE, BLACK = "#e4e4e4", "#000000"
# That palette, then three of Paul Tol's muted one that it lacks.
LINES = (BLUE, RED, GREEN, ORANGE, PURPLE, "#56B4E9", BLACK, GREY, "#882255", "#999933", "#332288")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def line_styles(n_lines: int) -> list[tuple[str, str]]:
    """A colour and a marker for each of several lines; no colour twice, however many there are.

    >>> len({colour for colour, _ in line_styles(40)})
    40
    """
    colours = list(LINES[:n_lines])
    if n_lines > len(LINES):
        colours = [to_hex(matplotlib.colormaps["turbo"](place)) for place in np.linspace(0, 1, n_lines)]
    return [(colour, MARKERS[number % len(MARKERS)]) for number, colour in enumerate(colours)]


def save(figure: Figure, path: str | Path, dpi: int = 130) -> Path:
    """Write a figure to `path`, format by its ending."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return path


def in_words(text: str, width: int = 48) -> str:
    """A text from outside as a label: no markup of formulas, the middle left out where it is too long.

    >>> in_words("layers [layer1.0.conv1,layer2.0.conv1]", 24)
    'layers [lay…r2.0.conv1]'
    """
    if len(text) > width:
        half = (width - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return text.replace("$", r"\$")


def all_in_words(texts: Iterable[str], width: int = 48) -> dict[str, str]:
    """Each text as a label, see `in_words`, as much wider as it takes to tell them apart.

    >>> list(all_in_words(["layers [a.conv1,b.conv1]", "layers [a.conv2,b.conv1]"], 16).values())
    ['layers [a.conv1,b.conv1]', 'layers [a.conv2,b.conv1]']
    """
    texts = list(dict.fromkeys(texts))
    while len({in_words(text, width) for text in texts}) < len(texts):
        width += 8
    return {text: in_words(text, width) for text in texts}


def tidy(axis: Axes) -> None:
    """No frame above and to the right, small numbers."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def layer_ticks(axis: Axes, layers: Sequence[str]) -> None:
    """Names of layers below an axis whose places are 0, 1, 2, ..."""
    axis.set_xticks(np.arange(len(layers)), [name.removeprefix("net.") for name in layers], rotation=90, fontsize=7)
    axis.set_xlim(-0.7, len(layers) - 0.3)


def counts_per_layer(counts: Mapping[str, tuple[int, int]], labels: tuple[str, str], title: str) -> Figure:
    """Two numbers of filters a layer, the second a part of the first."""
    figure = Figure(figsize=(max(5.0, 0.27 * len(counts) + 1.5), 3.6), layout="constrained")
    axis = figure.subplots()
    whole, part = zip(*counts.values(), strict=True)
    axis.bar(range(len(counts)), whole, color=PALE, label=labels[0])
    axis.bar(range(len(counts)), part, color=BLUE, width=0.5, label=labels[1])
    tidy(axis)
    layer_ticks(axis, list(counts))
    axis.set_ylabel("filters", fontsize=9)
    axis.set_title(title, fontsize=9, loc="left")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure
