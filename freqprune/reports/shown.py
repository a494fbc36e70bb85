"""Of which tags and which criterion an `importance.csv` is: the file beside it that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from freqprune.reports.record import read_json, write_json
from freqprune.tagging import Stimulus


def described(stimulus: Stimulus) -> dict[str, Any]:
    """The settings of tags, as JSON has them; masks by their digest."""
    found = {one.name: getattr(stimulus, one.name) for one in fields(stimulus) if one.init}
    if isinstance(stimulus.parts, Tensor):
        found["parts"] = sha256(stimulus.parts.cpu().numpy().tobytes()).hexdigest()
    plain: dict[str, Any] = json.loads(json.dumps(found, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    """Numbers and lists of other libraries, such as NumPy's and OmegaConf's, as JSON has them."""
    if hasattr(value, "__iter__"):
        return list(value)
    return float(value)


def what_was_shown(path: Path) -> dict[str, Any]:
    """``tags`` and ``criterion`` of an ``importance.csv``; empty where none is known, as of earlier versions."""
    return read_json(path.with_suffix(".json"))


def write_shown(path: Path, shown: Mapping[str, Any]) -> None:
    """Say so, beside the file."""
    write_json(path.with_suffix(".json"), shown)
