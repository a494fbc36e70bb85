"""Of which tags, readings and criterion an `importance.csv` is: the file beside it that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from freqprune.reports.record import read_json, write_json
from freqprune.tagging import Stimulus, TagResponse


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


def shown_of(response: TagResponse) -> dict[str, Any]:
    """What numbers have to have in common to be compared with those of a response: the ``tags``, how they were
    ``read``, and the ``stages`` of the layers at which."""
    read = {"noise_std": response.noise_std, "average": response.average, "spatial": response.spatial}
    stages = {layer: one.site.stage for layer, one in response.layers.items()}
    return {"tags": described(response.stimulus), "read": read, "stages": stages}


def alike(known: Mapping[str, Any], shown: Mapping[str, Any]) -> bool:
    """Whether two have that in common; what one does not say is not held against it, nor a layer that it lacks."""
    both = known.keys() & shown.keys() - {"stages"}
    before, now = known.get("stages", {}), shown.get("stages", {})
    return all(known[one] == shown[one] for one in both) and all(
        before[layer] == now[layer] for layer in before.keys() & now.keys()
    )


def what_was_shown(path: Path) -> dict[str, Any]:
    """`shown_of` an ``importance.csv``, and the ``criterion``; empty where none is known, as of earlier versions."""
    return read_json(path.with_suffix(".json"))


def write_shown(path: Path, shown: Mapping[str, Any]) -> None:
    """Say so, beside the file."""
    write_json(path.with_suffix(".json"), shown)
