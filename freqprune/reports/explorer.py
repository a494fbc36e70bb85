"""`explore.html`: every filter of a network as a dot, its spectrum, and what a cut would keep; one page that needs no
network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from freqprune.errors import InputError
from freqprune.reports.filters import Filters
from freqprune.reports.page import rendered
from freqprune.reports.record import write_text
from freqprune.reports.trial import Trial
from freqprune.tagging import Stimulus

# In the order in which they are read; uPlot (MIT) draws the spectra.
SCRIPTS = ("uPlot.iife.min.js", "cut.js", "data.js", "network.js", "spectrum.js", "tables.js", "explore.js")
STYLES = ("uPlot.min.css", "explore.css")


def write_explorer(
    folder: Path,
    title: str,
    filters: Sequence[Filters],
    stimulus: Stimulus,
    trial: Trial | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write ``explore.html``.

    Args:
        folder: of a run.
        title: what was tagged.
        filters: at one time or several, of the same layers.
        stimulus: the tags.
        trial: for trying cuts; none can be tried if left out.
        notes: what a reader should know, one paragraph each.

    Returns:
        The file.

    Raises:
        InputError: for no filters, or times at which the layers differ.
    """
    if not filters:
        raise InputError("there are no filters to explore; tag a network first")
    if any(dict(one.widths) != dict(filters[0].widths) for one in filters):
        raise InputError("the layers at all times have to be the same to stand on one page; write a page for each")
    parts = files("freqprune.reports") / "templates" / "explorer"
    content = {
        "title": title,
        "lead": _lead(stimulus, filters),
        "notes": notes,
        "several": len(filters) > 1,
        "n_times": len(filters),
        "last": filters[-1].label,
        "trial": trial is not None,
        "report": "report.html",
        "data": _in_a_script(_content(filters, stimulus, trial)),
        "styles": [Markup((parts / name).read_text(encoding="utf-8")) for name in STYLES],
        "scripts": [Markup((parts / name).read_text(encoding="utf-8")) for name in SCRIPTS],
    }
    return write_text(folder / "explore.html", rendered("explore.html.j2", content))


def _lead(stimulus: Stimulus, filters: Sequence[Filters]) -> str:
    tags = " and ".join(
        f"{name} at {freq:g} Hz" for name, freq in zip(stimulus.part_names, stimulus.tag_freqs, strict=True)
    )
    count, layers = sum(filters[0].widths.values()), len(filters[0].widths)
    of = f"{layers} layers" if layers > 1 else "one layer"
    return f"{count:,} filters of {of}, each a dot. Parts of the images were tagged: {tags}."


def _content(filters: Sequence[Filters], stimulus: Stimulus, trial: Trial | None) -> dict[str, Any]:
    # Where filters were read is known of those that were read here.
    last = filters[-1]
    return {
        "layers": [{"name": name, "n": n, "at": last.places.get(name, "")} for name, n in last.widths.items()],
        "parts": [
            {"name": name, "freq": freq} for name, freq in zip(stimulus.part_names, stimulus.tag_freqs, strict=True)
        ],
        "components": [
            {"name": c.name, "freq": c.freq, "part": c.part, "aliases": list(c.aliases)} for c in stimulus.components
        ],
        "reading": "SNR" if "snr" in last.columns else "amplitude",
        "times": [one.packed() for one in filters],
        "trial": None if trial is None else trial.packed(),
    }


def _in_a_script(content: dict[str, Any]) -> Markup:
    """JSON that cannot end the element it stands in, whatever a layer is called."""
    return Markup(json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"))
