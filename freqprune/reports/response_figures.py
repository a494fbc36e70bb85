"""Figures of a stimulus and of the response to it. Every function draws on a figure of its own and returns it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from freqprune.errors import InputError
from freqprune.reports.drawing import (
    BLACK,
    BLUE,
    GREY,
    LINES,
    PALE,
    counts_per_layer,
    layer_ticks,
    line_styles,
    tidy,
)
from freqprune.tagging import Component, Stimulus, TagResponse, amplitude_spectrum, frequencies, noise_bins

PART_COLOURS = tuple(colour for colour in LINES if colour not in (BLUE, BLACK, GREY))
PART_MARKERS = ("o", "s", "D", "P")
IM_MARKER = "^"


def _colour(part: int) -> str:
    return PART_COLOURS[part % len(PART_COLOURS)]


def _style(component: Component) -> tuple[str, str]:
    if component.part is None:
        return BLUE, IM_MARKER
    return _colour(component.part), PART_MARKERS[component.part % len(PART_MARKERS)]


def _legend(stimulus: Stimulus) -> list[Line2D]:
    rows = [
        (f"harmonics of {name} ({freq:g} Hz)", _colour(i), PART_MARKERS[i % len(PART_MARKERS)])
        for i, (name, freq) in enumerate(zip(stimulus.part_names, stimulus.tag_freqs, strict=True))
    ]
    rows.append(("intermodulation", BLUE, IM_MARKER))
    return [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=5, label=label)
        for label, colour, marker in rows
    ]


def stimulus_figure(stimulus: Stimulus, image: Tensor, n_shown: int = 6) -> Figure:
    """Tagged frames, the scale of each part over time, and the spectrum of each part's light (figure 1 of Böge et al.
    2024).

    Args:
        stimulus: the tags.
        image: pixels in [0, 1], ``(n_channels, height, width)``.
        n_shown: frames to show, spread over one cycle of the slowest tag.
    """
    cycle = stimulus.frame_rate / min(stimulus.tag_freqs)
    which = [round(i * cycle / n_shown) for i in range(n_shown)]
    frames = stimulus.frames(image[None], torch.tensor(which))[0]
    figure = Figure(figsize=(8.5, 5.4), layout="constrained")
    grid = figure.add_gridspec(3, 1, height_ratios=(1.1, 1, 1))
    top, middle, bottom = (figure.add_subfigure(grid[row]) for row in range(3))
    for axis, number, frame in zip(top.subplots(1, n_shown), which, frames, strict=True):
        shown = frame.permute(1, 2, 0).cpu().numpy()
        axis.imshow(
            shown if shown.shape[-1] == 3 else shown[..., 0], vmin=0, vmax=1, cmap="gray", interpolation="nearest"
        )
        axis.set_title(f"{1000 * number / stimulus.frame_rate:.0f} ms", fontsize=8)
        axis.set_axis_off()
    seconds = np.arange(stimulus.n_frames) / stimulus.frame_rate
    time, spectrum = middle.subplots(), bottom.subplots()
    for i, (name, freq) in enumerate(zip(stimulus.part_names, stimulus.tag_freqs, strict=True)):
        time.plot(seconds, stimulus.scale[i], color=_colour(i), linewidth=1.2, label=f"{name}, {freq:g} Hz")
        amplitude = amplitude_spectrum(stimulus.scale[i])
        freqs = frequencies(stimulus.n_frames, stimulus.frame_rate)
        spectrum.stem(freqs[1:], amplitude[1:], linefmt=_colour(i), markerfmt=" ", basefmt=" ", label=name)
    time.set_xlabel("time (s)", fontsize=9)
    time.set_ylabel("scale of the part", fontsize=9)
    time.set_xlim(0, min(1.0, seconds[-1]))
    time.legend(fontsize=8, frameon=False, loc="upper right", ncols=len(stimulus.part_names), bbox_to_anchor=(1, 1.22))
    spectrum.set_xlabel("frequency (Hz)", fontsize=9)
    spectrum.set_ylabel("amplitude", fontsize=9)
    spectrum.set_xlim(0, 3 * max(stimulus.tag_freqs))
    spectrum.set_ylim(bottom=0)
    tidy(time)
    tidy(spectrum)
    return figure


def snr_bins(response: TagResponse, layer: str, number: int, component: str = "f1", around: int = 5) -> Figure:
    """The bins of one SNR: the response, its four noise bins, and the others (figure 3 of Böge et al. 2024).

    Args:
        response: measured with noise.
        layer: name of the layer.
        number: the filter.
        component: name of the component.
        around: bins drawn on each side.
    """
    (picked,) = response.components([component])
    recorded = response.layers[layer]
    amplitude = recorded.amplitude if recorded.noisy_amplitude is None else recorded.noisy_amplitude
    bins = np.arange(max(1, picked.bin - around), min(amplitude.shape[-1], picked.bin + around + 1))
    values = amplitude[number, bins].numpy()
    is_noise = np.isin(bins, noise_bins([picked.bin], amplitude.shape[-1])[0])
    other = {c.bin: c for c in response.components("all") if c.bin != picked.bin}
    colours = [
        _style(picked)[0] if b == picked.bin else "#444444" if noise else _style(other[b])[0] if b in other else PALE
        for b, noise in zip(bins.tolist(), is_noise, strict=True)
    ]
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.bar(response.freqs[bins], values, width=0.7 * float(response.freqs[1]), color=colours)
    level = values[is_noise].mean()
    axis.axhline(level, color="#444444", linewidth=0.8, linestyle="--")
    axis.set_xlabel("frequency (Hz)", fontsize=9)
    axis.set_ylabel("amplitude", fontsize=9)
    axis.set_title(
        f"{layer}, filter {number}: SNR at {picked.name} = {float(response.snr(layer, [picked.name])[number, 0]):.1f}",
        fontsize=9,
        loc="left",
    )
    handles = [
        Line2D([], [], color=_style(picked)[0], linewidth=6, label=f"{picked.name} ({picked.freq:g} Hz)"),
        Line2D([], [], color="#444444", linewidth=6, label="noise bins, dashed: their mean"),
    ]
    near = [c for b, c in other.items() if b in bins]
    handles += [Line2D([], [], color=_style(c)[0], linewidth=6, label=f"{c.name} ({c.freq:g} Hz)") for c in near]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=8, frameon=False)
    tidy(axis)
    return figure


def snr_spectra(
    response: TagResponse,
    layer: str,
    filters: Sequence[int] | None = None,
    ceiling: float = 10.0,
    max_freq: float | None = None,
) -> Figure:
    """SNR spectrum of each filter of a layer (figure 4 of Böge et al. 2024).

    Harmonics of each part and intermodulation components are marked; values above `ceiling` are drawn on it, those of
    the fundamentals with their value above.

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
    figure = Figure(figsize=(2.7 * n_columns + 0.4, 1.6 * n_rows + 1.2), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    limit = max_freq or max(c.freq for c in response.components("all")) + 1.5
    for axis, number in zip(axes.flat, shown, strict=False):
        values = spectrum[number]
        axis.plot(freqs, np.minimum(values, ceiling), color=GREY, linewidth=0.8)
        axis.axhline(1, color=GREY, linewidth=0.5, linestyle=":")
        marked: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for component in response.components("all"):
            value = values[component.bin]
            if not math.isfinite(value) or component.freq > limit:
                continue
            colour = _style(component)[0]
            marked.setdefault(_style(component), []).append((component.freq, min(value, ceiling)))
            # Fundamentals only: the numbers of all clipped components would overlap.
            if value > ceiling and component.order == 1:
                side, offset = ("right", -3) if component.part == 0 else ("left", 3)
                axis.annotate(
                    f"{value:.0f}",
                    (component.freq, ceiling),
                    (offset, 4),
                    textcoords="offset points",
                    fontsize=7,
                    color=colour,
                    ha=side,
                )
        # One line of markers a style: one a component would take three times as long to draw.
        for (colour, marker), places in marked.items():
            axis.plot(
                *zip(*places, strict=True),
                marker,
                color=colour,
                markersize=4,
                linestyle="none",
                clip_on=False,
                zorder=3,
            )
        if not np.isfinite(values).any():
            axis.text(0.5, 0.5, "no response", transform=axis.transAxes, ha="center", color=GREY, fontsize=8)
        axis.set_title(f"filter {number}", fontsize=8, loc="right", pad=6)
        axis.set_xlim(0, limit)
        axis.set_ylim(0, ceiling)
        tidy(axis)
    for i, axis in enumerate(axes.flat):
        axis.set_visible(i < len(shown))
        if i % n_columns == 0:
            axis.set_ylabel("SNR", fontsize=8)
        if i + n_columns >= len(shown):
            axis.set_xlabel("frequency (Hz)", fontsize=8)
            axis.tick_params(labelbottom=True)
    site = response.layers[layer].site
    figure.suptitle(
        f"{layer}, {site.stage} output: {response.n_images} images, pixel noise sd {response.noise_std:g}", fontsize=10
    )
    figure.legend(handles=_legend(response.stimulus), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def important_per_layer(important: Mapping[str, Tensor], title: str = "") -> Figure:
    """Important filters of each layer beside all its filters (figure 5 of Böge et al. 2024); `important` is boolean
    ``(n_filters,)`` a layer."""
    counts = {layer: (len(flags), int(flags.sum())) for layer, flags in important.items()}
    return counts_per_layer(counts, ("all filters", "important"), title)


def _over_depth(
    values: Mapping[str, Tensor], label: str, title: str, groups: Mapping[str, Mapping[str, Tensor]] | None
) -> tuple[Figure, Axes]:
    """Every filter as a dot and the median of each layer; further medians, one line a group."""
    styles = line_styles(len(groups or {}))
    size = max(5.0, 0.27 * len(values) + 1.5), max(4.0, 0.16 * len(styles) + 1)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    layers = list(values)
    rng = np.random.default_rng(0)
    for i, layer in enumerate(layers):
        dots = values[layer][values[layer].isfinite()].numpy()
        axis.plot(i + rng.uniform(-0.25, 0.25, len(dots)), dots, ".", color=GREY, markersize=2.5, alpha=0.6)
    axis.plot(
        range(len(layers)), _medians(values), "o-", color=BLUE, markersize=4, linewidth=1.2, label="median of the layer"
    )
    for (group, members), (colour, _) in zip((groups or {}).items(), styles, strict=True):
        # Matplotlib leaves out a name with a line in front, sets one with dollars, and fails at one that is no text.
        name = ("\u200b" if group[:1] == "_" else "") + group.replace("$", r"\$")
        name = name.encode("utf-8", "backslashreplace").decode()
        axis.plot(range(len(layers)), _medians(members), ".-", color=colour, ms=3, lw=0.9, alpha=0.8, label=name)
    tidy(axis)
    layer_ticks(axis, layers)
    axis.set_ylabel(label, fontsize=9)
    axis.set_title(title, fontsize=9, loc="left")
    if groups:
        figure.legend(loc="outside right center", fontsize=7, frameon=False)
    else:
        axis.legend(fontsize=8, frameon=False, loc="upper left")
    return figure, axis


def part_preference_over_depth(response: TagResponse, classes: Mapping[str, TagResponse] | None = None) -> Figure:
    """Which of the first two parts drives each filter, layer by layer; 1: the first only, -1: the second only.

    Args:
        response: the response to all images.
        classes: responses by class of the images, each drawn as a line of medians.

    Raises:
        InputError: for tags on one part only.
    """
    if len(response.stimulus.part_names) < 2:
        raise InputError("which part drives a filter needs two parts, the stimulus has one")
    first, second = response.stimulus.part_names[:2]
    values = {layer: response.part_preference(layer) for layer in response.layers}
    groups = {name: {layer: r.part_preference(layer) for layer in r.layers} for name, r in (classes or {}).items()}
    title = f"Driving part of every filter, {response.n_images} images"
    figure, axis = _over_depth(values, f"(A {first} - A {second}) / (A {first} + A {second})", title, groups)
    axis.axhline(0, color=GREY, linewidth=0.6)
    axis.set_ylim(-1.05, 1.05)
    return figure


def integration_over_depth(response: TagResponse, classes: Mapping[str, TagResponse] | None = None) -> Figure:
    """How much each filter combines the parts, layer by layer: intermodulation amplitude over that at the fundamentals.

    Args:
        response: the response to all images.
        classes: responses by class of the images, each drawn as a line of medians.
    """
    values = {layer: response.integration(layer) for layer in response.layers}
    groups = {name: {layer: r.integration(layer) for layer in r.layers} for name, r in (classes or {}).items()}
    figure, axis = _over_depth(
        values, "intermodulation / fundamentals", f"Integration by every filter, {response.n_images} images", groups
    )
    finite = np.concatenate([v[v.isfinite()].numpy() for v in values.values()])
    # A few filters that hardly answer the fundamentals would squeeze all others.
    axis.set_ylim(0, max(0.1, 1.1 * float(np.quantile(finite, 0.98))) if len(finite) else 1)
    return figure


def _medians(values: Mapping[str, Tensor]) -> list[float]:
    """Of the finite values of each layer, NaN where there are none."""
    return [float(np.median(v[v.isfinite()].numpy())) if v.isfinite().any() else np.nan for v in values.values()]
