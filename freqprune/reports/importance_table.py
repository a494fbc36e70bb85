"""What every filter answered at every tagged epoch: ``importance.csv``, written as a training goes on."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from freqprune.pruning import Verdict
from freqprune.reports.shown import alike, shown_of, what_was_shown, write_shown
from freqprune.tagging import TagResponse

# More bytes than a row has.
_LONGEST = 2**20


def write_importance(
    path: Path,
    epoch: int,
    response: TagResponse,
    score: Mapping[str, Tensor],
    verdict: Verdict,
    since: int | None = None,
    criterion: str | None = None,
    judged: Mapping[str, Any] | None = None,
) -> None:
    """Append an epoch's rows to ``importance.csv``; rows of this and later epochs, left by an interrupted run, are
    replaced, and those from epoch `since` on, at which this training began: they are another's.

    Columns: epoch, layer_index, layer, filter, ``snr_<component>`` and ``amplitude_<component>`` for every component,
        score, important. ``importance.json`` beside it says of which tags, read in which way, of which `criterion` and
        components, and how they were `judged`; rows of others go.
    """
    shown = shown_of(response) | {"criterion": criterion} | (dict(judged) if judged else {})
    known = what_was_shown(path)
    components = response.components("all")
    readings = [f"{kind}_{c.name}" for kind in ("snr", "amplitude") for c in components]
    header = ["epoch", "layer_index", "layer", "filter", *readings, "score", "important"]
    first = epoch if since is None else min(since, epoch)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    goes_on = since is None and alike(known, shown) and _ends_before(path, header, epoch)
    found = StringIO()
    with partial.open("w", newline="", encoding="utf-8") if not goes_on else nullcontext(found) as file:
        writer = csv.writer(file)
        if not goes_on:
            writer.writerow(header)
        if not goes_on and path.exists() and alike(known, shown):
            # Row by row: those of all epochs may be more than memory holds.
            with path.open(newline="", encoding="utf-8") as before:
                rows = csv.reader(before)
                if next(rows, None) == header:
                    writer.writerows(row for row in rows if len(row) == len(header) and int(row[0]) < first)
        for index, layer in enumerate(response.layers):
            values = torch.cat([response.snr(layer, "all"), response.amplitude(layer, "all")], dim=1).tolist()
            for number, (row, s, flag) in enumerate(
                zip(values, score[layer].tolist(), verdict.important[layer].tolist(), strict=True)
            ):
                writer.writerow([epoch, index, layer, number, *(f"{v:.6g}" for v in row), f"{s:.6g}", int(flag)])
    if goes_on:
        with path.open("a", newline="", encoding="utf-8") as file:
            file.write(found.getvalue())
    else:
        partial.replace(path)
    write_shown(path, shown)


def _ends_before(path: Path, header: Sequence[str], epoch: int) -> bool:
    """Whether a table has these columns and ends with a whole row of an earlier epoch, so that rows can be appended.
    Else all of it would be copied at every epoch."""
    try:
        with path.open("rb") as file:
            columns = file.readline()
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST))
            end = file.read()
    except OSError:
        return False
    last = end.rstrip(b"\r\n").rpartition(b"\n")[2]
    first, row = (next(csv.reader([line.decode("utf-8", "replace")]), []) for line in (columns, last))
    whole = end.endswith(b"\n") and first == [*header] and len(row) == len(header)
    return whole and row[0].isdecimal() and int(row[0]) < epoch


def whole_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows by column; without one that a training was killed over."""
    with path.open(newline="", encoding="utf-8") as file:
        yield from (row for row in csv.DictReader(file) if not {None, ""} & {*row.values()})


def important_shares(path: Path) -> dict[int, dict[str, float]]:
    """Share of important filters of each layer at each epoch, from an ``importance.csv``."""
    flags: dict[int, dict[str, list[int]]] = {}
    for row in whole_rows(path):
        flags.setdefault(int(row["epoch"]), {}).setdefault(row["layer"], []).append(int(row["important"]))
    return {
        epoch: {layer: sum(values) / len(values) for layer, values in layers.items()} for epoch, layers in flags.items()
    }


def rank_agreement(path: Path, column: str = "score") -> dict[int, dict[str, float]]:
    """Spearman correlation of each layer's scores at each epoch with those at the last, from an ``importance.csv``.

    Args:
        path: the file.
        column: ``"score"``, or the SNR or amplitude at a component, such as ``"amplitude_f1"``.

    Returns:
        By epoch and layer of the last epoch; NaN where all filters of a layer score the same, or it had others then or
        none: pruned on the way, or not read. A filter without an SNR counts as 0.
    """
    values: dict[int, dict[str, list[float]]] = {}
    for row in whole_rows(path):
        value = float(row[column])
        layers = values.setdefault(int(row["epoch"]), {})
        layers.setdefault(row["layer"], []).append(0.0 if math.isnan(value) else value)
    last = values[max(values)]

    def correlation(now: list[float], final: list[float]) -> float:
        told = len(now) == len(final) and min(len(set(now)), len(set(final))) > 1
        return float(spearmanr(now, final).statistic) if told else float("nan")

    return {
        epoch: {layer: correlation(layers.get(layer, []), last[layer]) for layer in last}
        for epoch, layers in sorted(values.items())
    }
