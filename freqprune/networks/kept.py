"""Filters that several cuts have left of the dense network, each of which counts in what those before it left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from freqprune.networks.blocks import still_there


def kept_by_all(
    cuts: Sequence[Mapping[str, Sequence[int]]],
    members: Sequence[Mapping[str, Sequence[str]]],
    is_there: Callable[[str], bool],
) -> dict[str, list[int]]:
    """Filters that some cuts, one after the other, have left of the dense network.

    Args:
        cuts: filters kept of each unit, counted in the network before each cut.
        members: for each cut, the layers that lose filters together, by the unit's name: it has another one once the
            layer that named it has gone with its block. Those that are not known are none but the layer itself.
        is_there: whether a layer is still in the network.

    Returns:
        Indices by the names of the units; of a unit whose layer has gone by that of its first layer that is there.

    >>> stream = {"a": ["a", "b"]}
    >>> kept_by_all([{"a": [0, 2, 4]}, {"b": [0, 2]}], [stream, {"b": ["b"]}], lambda layer: layer != "a")
    {'b': [0, 4]}
    """
    found: dict[str, list[int]] = {}
    together: dict[str, tuple[str, ...]] = {}
    for number, kept in enumerate(cuts):
        known = members[number] if number < len(members) else {}
        together |= {name: tuple(dict.fromkeys((name, *known.get(name, ())))) for name in kept}
        for layer, indices in [(layer, indices) for name, indices in kept.items() for layer in together[name]]:
            before = found.get(layer)
            found[layer] = [int(i) if before is None else before[int(i)] for i in indices]
    names = [name for name in together if is_there(name)]
    for layers in together.values():
        left = [layer for layer in layers if is_there(layer)]
        if left and not {*left} & {*names}:
            names.append(left[0])
    return {name: found[name] for name in names}


def left_by(state: Mapping[str, Any]) -> dict[str, list[int]]:
    """Filters of the dense network that are left, see `kept_by_all`, by the state of `TagPruning`; that of earlier
    versions does not know which layers lost filters together."""
    dropped = state.get("dropped") or [{}]
    return kept_by_all(state["kept"], state.get("members", ()), still_there(dropped[-1]))
