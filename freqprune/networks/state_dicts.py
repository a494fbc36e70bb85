"""State dicts as other programs leave them: of modules around a network, compiled ones, earlier versions of layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks.heads import by_new_names

_PREFIXES = ("module.", "net.", "model.")


def of_the_network(state: Mapping[str, Any]) -> dict[str, Any]:
    """The network's part of a module's state dict: of ours, what is under ``net``."""
    own = {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}
    return uncompiled(own or state)


def uncompiled(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without what torch.compile puts between a module and the network in it."""
    return {str(key).replace("_orig_mod.", ""): value for key, value in state.items()}


def without_prefix(state: Mapping[str, Any], net: nn.Module) -> Mapping[str, Any]:
    """Without what a wrapper has put before every name, unless the network has such names itself."""
    if {*state} & {*net.state_dict()}:
        return state
    for prefix in _PREFIXES:
        if state and all(str(key).startswith(prefix) for key in state):
            return {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_into(net: nn.Module, state: Mapping[str, Any], path: str | Path, config: Mapping[str, Any]) -> None:
    expected = net.state_dict()
    # The versions of its modules are of the state dict that was given.
    versions = getattr(state, "_metadata", None)
    state = by_new_names(net, state)
    # Counters of seen batches are absent from older checkpoints and change nothing in eval mode.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected
        if isinstance(state.get(key), Tensor) and state[key].shape != expected[key].shape
    ]
    if missing or unknown or shapes:
        parts = [
            f"{len(keys)} {what}, e.g. {keys[0]}"
            for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
            if keys
        ]
        narrower = not (missing or unknown) and all(
            len(state[key].shape) == len(value.shape)
            and all(a <= b for a, b in zip(state[key].shape, value.shape, strict=True))
            for key, value in expected.items()
            if isinstance(value, Tensor) and isinstance(state.get(key), Tensor)
        )
        cut = "; if filters were cut from it, write it with save_pruned, which keeps its widths" if narrower else ""
        raise InputError(
            f"ckpt = {path} does not fit {config.get('name')} (model.num_classes = {config.get('num_classes')}): "
            f"tensors {'; '.join(parts)}; "
            f"check model=..., model.shortcut, model.num_classes{cut}"
        )
    loaded = OrderedDict(state)
    # Versions of modules, which some networks cannot be loaded without; plain dicts have lost them.
    loaded._metadata = versions or getattr(expected, "_metadata", None)  # type: ignore[attr-defined]
    net.load_state_dict(loaded, strict=False)
