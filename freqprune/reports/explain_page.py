"""`explain.html`: for each image its map, what is significant, and which parts work together, on one page that needs no
network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from freqprune.attribution import Attribution
from freqprune.reports.page import as_text, embedded, rendered
from freqprune.reports.record import RUN, read_json, write_text

SCORES = {"logit": "logit", "probability": "probability", "log_odds": "log-odds"}


@dataclass(frozen=True)
class ExplainPage:
    """What the page tells beside the attribution.

    Attributes:
        names: of the images; ``maps/<name>.png`` lies in the folder.
        classes: names of the network's classes, if they are known.
        score: what was read.
        alpha: false discovery rate.
        n_rows: parts with the largest effects, at the top of each table.
        n_pairs: strongest interactions, of those that are significant.
        overlap: how far parts opened together; if they did, what each does alone is not told apart.
    """

    names: Sequence[str]
    classes: Sequence[str] | None
    score: str
    alpha: float
    n_rows: int
    n_pairs: int
    overlap: float = 0.0


def write_explain_page(folder: Path, found: Attribution, page: ExplainPage) -> Path:
    """Write ``explain.html`` from an attribution and what else lies in a folder.

    Args:
        folder: of the job, with ``run.json`` and ``maps``.
        found: effects of the parts.
        page: what to tell of them.

    Returns:
        The file.
    """
    run, adjusted = read_json(folder / RUN), found.adjusted
    content = {
        "title": f"What {len(page.names)} answers hang on" if len(page.names) > 1 else "What an answer hangs on",
        "score": SCORES[page.score],
        "alpha": f"{100 * page.alpha:g} %",
        "n_parts": found.effects.shape[1],
        "n_rows": page.n_rows,
        "n_pairs": page.n_pairs,
        "mapped": found.parts.dim() == 3,
        "forwards": found.forwards,
        "until": run["settings"].get("until") is not None,
        "refined": run["settings"].get("refine", 0) > 0,
        "images": [_of_an_image(folder, found, adjusted[number], page, number) for number in range(len(page.names))],
        "run": run,
        "settings": as_text(run["settings"]),
    }
    return write_text(folder / "explain.html", rendered("explain.html.j2", content))


def _of_an_image(folder: Path, found: Attribution, adjusted: Tensor, page: ExplainPage, number: int) -> dict[str, Any]:
    names, sure, alone = found.part_names, adjusted < page.alpha, found.first_order[number]
    of_class = None if found.target is None else int(found.target[number])
    rows = [
        {
            "sure": bool(sure[part]),
            "cells": [
                str(place) if place <= page.n_rows else "",
                names[part],
                f"{found.effects[number, part]:+.3g}",
                f"{found.standard_error[number, part]:.2g}",
                _p_value(float(adjusted[part])),
            ],
        }
        for place, part in enumerate(found.ranked(number), 1)
    ]
    return {
        "name": page.names[number],
        "map": embedded(folder / "maps" / f"{page.names[number]}.png"),
        "of": of_class if page.classes is None or of_class is None else f"{of_class}, {page.classes[of_class]}",
        "whole": f"{found.whole[number]:.3g}",
        "baseline": f"{found.baseline[number]:.3g}",
        "n_parts": int(found.present[number].sum()),
        "n_sure": int(sure.sum()),
        # Nothing of a score that does not vary.
        "alone": f"{100 * float(alone.sum().clamp(0, 1)):.0f} %" if alone.any() and not page.overlap else "",
        "rows": rows,
        "pairs": [
            [names[one], names[other], f"{value:+.3g}"]
            for one, other, value in found.strongest_pairs(number, page.n_pairs, page.alpha)
        ],
    }


def _p_value(value: float) -> str:
    """A p-value in as many digits as it deserves.

    >>> _p_value(0.0312), _p_value(3e-9)
    ('0.031', '< 0.0001')
    """
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"
