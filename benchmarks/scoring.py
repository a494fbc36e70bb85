"""Maps scored by insertion, deletion and fidelity, over images and over runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from maps import Method
from scipy import stats
from subjects import Judge, Subject

# Whose map is drawn again with another seed.
AGAIN = ("tags.512", "tags_overlap.512", "rise.512", "least_squares.512")

# What masks cost is shared among methods and budgets.
SHARED = ("rise", "least_squares", "tags_plain")

PAIRS = (
    ("tags_overlap.512", "rise.4096"),
    ("tags_overlap.512", "least_squares.512"),
    ("tags_overlap.512", "rise.512"),
    ("tags_overlap.512", "kernel_shap.512"),
    ("tags_overlap.512", "tags.512"),
    ("tags_overlap.1024", "rise.4096"),
    ("tags_overlap.1024", "rise.1024"),
    ("tags_overlap.4096", "rise.4096"),
    ("tags_overlap.256", "rise.256"),
    ("tags.512", "tags_plain.512"),
    ("tags.512", "least_squares.512"),
    ("tags.512", "rise.512"),
    ("tags.512", "rise.4096"),
)


@dataclass
class Rows:
    """What was found, one entry an image."""

    curves: dict[str, list[tuple[float, float]]]
    fidelity: dict[str, list[float]]
    again: dict[str, list[float]]
    seconds: dict[str, list[float]]


def measure(subject: Subject, chosen: dict[str, tuple[Method, int]]) -> Iterator[Rows]:
    """All methods on one image after the other; what was found so far after each."""
    rows = Rows({}, {}, {}, {})
    for number in range(len(subject.images)):
        judge = Judge(subject, number)
        gone, lost = judge.losses()
        for key, (method, forwards) in chosen.items():
            start = time.perf_counter()
            found = method(judge, forwards, 0).double()
            rows.seconds.setdefault(key, []).append(time.perf_counter() - start)
            rows.curves.setdefault(key, []).append(judge.curves(found))
            if found.std() > 0 and lost.std() > 0:
                together = torch.stack([gone.double() @ found, lost.double()])
                rows.fidelity.setdefault(key, []).append(float(torch.corrcoef(together)[0, 1]))
            if key in AGAIN:
                alike = stats.spearmanr(found, method(judge, forwards, 1)).statistic
                rows.again.setdefault(key, []).append(float(alike))
        yield rows


def error(values: list[float]) -> float:
    """Standard error of a mean."""
    return round(statistics.stdev(values) / len(values) ** 0.5, 4) if values[1:] else 0.0


def figures(rows: Rows, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, values in rows.curves.items():
        insertion, deletion = (list(column) for column in zip(*values, strict=True))
        difference = [a - b for a, b in values]
        found[f"{name}.{key}"] = {
            "insertion": round(statistics.mean(insertion), 4), "deletion": round(statistics.mean(deletion), 4),
            "difference": round(statistics.mean(difference), 4), "se": error(difference),
            "fidelity": [round(statistics.mean(rows.fidelity[key]), 4), error(rows.fidelity[key])]
            if key in rows.fidelity else None,
            **({} if key.startswith(SHARED) else {"seconds": round(statistics.median(rows.seconds[key]), 3)}),
            **({"again": round(statistics.mean(rows.again[key]), 3)} if key in rows.again else {}),
        }  # fmt: skip
    for one, other in PAIRS:
        if one in rows.curves and other in rows.curves:
            pairs = zip(rows.curves[one], rows.curves[other], strict=True)
            apart = [(a - b) - (c - d) for (a, b), (c, d) in pairs]
            found[f"{name}: {one} over {other}"] = [round(statistics.mean(apart), 4), error(apart)]
    return found


def pooled(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of all images together, of those of runs over different images; each key of the runs that have it."""
    keys = list(dict.fromkeys(key for run in runs for key in run if ":" in key or "." in key))
    found: dict[str, Any] = {"images": {}}
    for key in keys:
        having = [run for run in runs if key in run]
        counts = [run["images"] for run in having]
        subject = key.replace(":", ".").split(".")[0]
        found["images"][subject] = max(sum(counts), found["images"].get(subject, 0))
        found[key] = _together([run[key] for run in having], counts)
    return found


def _together(parts: list[Any], counts: list[int]) -> Any:
    if any(part is None for part in parts):
        return None
    if isinstance(parts[0], list):
        return _with_error(*(list(column) for column in zip(*parts, strict=True)), counts=counts)
    if not isinstance(parts[0], dict):
        return round(_mean(parts, counts), 4)
    shared = [name for name in parts[0] if name != "se" and all(name in part for part in parts)]
    found = {name: _together([part[name] for part in parts], counts) for name in shared}
    apart = _with_error([part["difference"] for part in parts], [part["se"] for part in parts], counts=counts)
    return {**found, "difference": apart[0], "se": apart[1]}


def _mean(values: list[float], counts: list[int]) -> float:
    return sum(n * value for n, value in zip(counts, values, strict=True)) / sum(counts)


def _with_error(means: list[float], errors: list[float], counts: list[int]) -> list[float]:
    """Mean and standard error of all, of those of parts."""
    middle, total = _mean(means, counts), sum(counts)
    within = sum((n - 1) * n * error**2 for n, error in zip(counts, errors, strict=True))
    between = sum(n * (value - middle) ** 2 for n, value in zip(counts, means, strict=True))
    return [round(middle, 4), round(((within + between) / (total - 1) / total) ** 0.5, 4)]
