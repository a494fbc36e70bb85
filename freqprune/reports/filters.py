"""What every filter of a network answered, as columns of numbers and spectra: what `explore.html` shows."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from freqprune.pruning import Kept, Plan, Verdict
from freqprune.reports.importance_table import whole_rows
from freqprune.reports.shown import alike, described, shown_of, what_was_shown
from freqprune.tagging import Stimulus, TagResponse

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Filters:
    """What every filter of a network answered at one time.

    Attributes:
        label: the time, such as ``"epoch 3"``.
        widths: number of filters, a layer, in the order of the network.
        columns: by name one value a filter, ``(n_filters,)`` over all layers; NaN where undefined. ``"snr"``: mean
            over the fundamentals; ``"amplitude"``: sum over them; ``"preference"``: of two parts, 1 for the first only
            and -1 for the second only; ``"part"``: of more, the number of the one with the largest amplitude;
            ``"integration"``: intermodulation over fundamentals; ``"important"``, ``"kept"``: 1 or 0;
            ``"score_<criterion>"``.
        freqs: of the spectra, in Hz, ``(n_freqs,)``.
        spectra: SNR (amplitude, where nothing was measured with noise), ``(n_filters, n_freqs)``.
        places: module and stage where each layer was read.
    """

    label: str
    widths: Mapping[str, int]
    columns: Mapping[str, FloatArray]
    freqs: FloatArray
    spectra: FloatArray
    places: Mapping[str, str] = field(default_factory=dict)

    def packed(self) -> dict[str, Any]:
        """For the page: columns as float32, spectra as the upper halves of float32, which is as exact as 0.4 %."""
        upper = torch.from_numpy(self.spectra).to(torch.bfloat16).view(torch.int16).numpy()
        return {
            "label": self.label,
            "columns": {name: packed(values, "<f4") for name, values in self.columns.items()},
            "freqs": [float(freq) for freq in self.freqs],
            "spectra": packed(upper, "<i2"),
        }


def packed(values: npt.ArrayLike, kind: str) -> str:
    """Numbers as base64 of their bytes, in a NumPy dtype that says its order of bytes."""
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()


def filters_of(response: TagResponse, verdict: Verdict | None = None, label: str = "") -> Filters:
    """The filters of a response, with their spectra up to one bin in ten above the last component.

    Args:
        response: to the tags.
        verdict: which filters answer at all.
        label: the time.
    """
    n_shown = min(len(response.freqs), int(1.1 * max(c.bin for c in response.components("all"))) + 1)
    layers = list(response.layers)
    noisy = response.noise_std > 0
    tags = _by_part(response.stimulus)
    amplitude = torch.cat([response.amplitude(layer, tags) for layer in layers]).double().numpy()
    columns: dict[str, FloatArray] = {}
    if noisy:
        columns["snr"] = _joined([response.snr(layer).mean(-1) for layer in layers])
    columns["amplitude"] = amplitude.sum(-1)
    if len(response.stimulus.tag_freqs) == 2:
        columns["preference"] = _joined([response.part_preference(layer) for layer in layers])
    else:
        rounding = _joined([response.rounding(layer) for layer in layers])
        columns["part"] = np.where(amplitude.sum(-1) > rounding, amplitude.argmax(-1), np.nan)
    columns["integration"] = _joined([response.integration(layer) for layer in layers])
    if verdict is not None:
        columns["important"] = _joined([verdict.important[layer] for layer in layers])
    read = [response.snr_spectrum(layer) if noisy else response.layers[layer].amplitude for layer in layers]
    return Filters(
        label,
        {layer: len(one) for layer, one in zip(layers, read, strict=True)},
        columns,
        response.freqs[:n_shown].numpy(),
        torch.cat(read)[:, :n_shown].double().numpy(),
        {layer: f"{one.site.module} ({one.site.stage})" for layer, one in response.layers.items()},
    )


def _joined(tensors: Sequence[Tensor]) -> FloatArray:
    found: FloatArray = torch.cat(list(tensors)).double().numpy()
    return found


def _by_part(stimulus: Stimulus) -> list[str]:
    """Names of the fundamentals in the order of the parts, whatever that of their frequencies is."""
    return [f"f{number + 1}" for number in range(len(stimulus.tag_freqs))]


def filters_over_epochs(
    path: Path, stimulus: Stimulus, criterion: str, most: int = 24, beside: TagResponse | None = None
) -> list[Filters]:
    """The filters at the tagged epochs of a training run; none if it was tagged otherwise.

    Args:
        path: of an ``importance.csv``. What it holds of the spectra is the SNR at the components.
        stimulus: the tags.
        criterion: name of the scores in it, where it does not say itself.
        most: epochs read, spread evenly with the first and the last among them; a file of hundreds would make a page
            that no browser likes.
        beside: a response that they are shown beside, and have to be read like.
    """
    known = what_was_shown(path)
    if not alike(known, {"tags": described(stimulus)} if beside is None else shown_of(beside)):
        return []
    criterion = known.get("criterion") or criterion
    # One page shows the same filters at all times: those of the last, where others were read or pruned before.
    names = {epoch: hash(tuple((row["layer"], row["filter"]) for row in rows)) for epoch, rows in _by_epoch(path)}
    epochs = [epoch for epoch in names if names[epoch] == names[max(names)]]
    chosen = {epochs[place] for place in np.linspace(0, len(epochs) - 1, min(most, len(epochs))).round().astype(int)}
    wanted = {f"snr_{component.name}" for component in stimulus.components}
    return [
        _of_an_epoch(rows, f"epoch {epoch + 1}", stimulus, criterion)
        for epoch, rows in _by_epoch(path)
        if epoch in chosen and wanted <= {*rows[0]}
    ]


def _by_epoch(path: Path) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """Rows of an ``importance.csv`` an epoch at a time: those of all may be more than memory holds."""
    for epoch, rows in groupby(whole_rows(path), key=lambda row: int(row["epoch"])):
        yield epoch, list(rows)


def _of_an_epoch(rows: Sequence[Mapping[str, str]], label: str, stimulus: Stimulus, criterion: str) -> Filters:
    def read(kind: str, names: Sequence[str]) -> FloatArray:
        return np.array([[float(row[f"{kind}_{name}"]) for name in names] for row in rows])

    every = [component.name for component in stimulus.components]
    mixed = [component.name for component in stimulus.components if component.kind == "intermodulation"]

    widths: dict[str, int] = {}
    for row in rows:
        widths[row["layer"]] = widths.get(row["layer"], 0) + 1
    tags = _by_part(stimulus)
    snr, amplitude = read("snr", tags).mean(-1), read("amplitude", tags)
    total = amplitude.sum(-1)
    answers = np.isfinite(snr) & (total > 0)
    over = np.where(answers, total, np.nan)
    columns = {"snr": snr, "amplitude": total}
    if len(stimulus.tag_freqs) == 2:
        columns["preference"] = (amplitude[:, 0] - amplitude[:, 1]) / over
    else:
        columns["part"] = np.where(answers, amplitude.argmax(-1), np.nan)
    columns["integration"] = read("amplitude", mixed).sum(-1) / over if mixed else np.full(len(rows), np.nan)
    columns["important"] = np.array([float(row["important"]) for row in rows])
    columns[f"score_{criterion}"] = np.array([float(row["score"]) for row in rows])
    freqs = np.array([c.freq for c in stimulus.components])
    return Filters(label, widths, columns, freqs, read("snr", every))


def with_cut(
    filters: Filters,
    plan: Plan,
    criterion: str,
    scores: Mapping[str, Tensor],
    kept: Kept,
    dropped: Collection[str] = (),
) -> Filters:
    """The filters with the scores by which a cut chose, and whether it kept them; NaN in layers that were not asked.

    Args:
        filters: of the dense network.
        plan: of the dense network.
        criterion: name of the scores.
        scores: one a filter, by unit.
        kept: indices of the filters kept, by unit.
        dropped: residual blocks that went altogether, with all filters of their layers.
    """
    flags = {
        name: torch.isin(torch.arange(plan.unit(name).n_filters), indices.cpu()).double()
        for name, indices in kept.items()
    }
    inner = {name: values for name, values in scores.items() if name not in plan.blocks}
    found, start = _by_channel(filters, plan, flags), 0
    gone = {layer for name in dropped if name in plan.blocks for layer in plan.blocks[name].layers}
    for layer, width in filters.widths.items():
        if layer in gone:
            found[start : start + width] = 0
        start += width
    more = {f"score_{criterion}": _by_channel(filters, plan, inner), "kept": found}
    return replace(filters, columns={**filters.columns, **more})


def _by_channel(filters: Filters, plan: Plan, values: Mapping[str, Tensor]) -> FloatArray:
    """Values of the filters of units as those of the channels of all their layers."""
    found = {layer: np.full(width, np.nan) for layer, width in filters.widths.items()}
    for name, of_unit in values.items():
        unit = plan.unit(name)
        each = of_unit.double().cpu().repeat_interleave(unit.width // unit.n_parts)
        channels = each.repeat(unit.n_parts).numpy()
        for layer in unit.members:
            if filters.widths.get(layer) == len(channels):
                found[layer] = channels
    return np.concatenate(list(found.values()))
