"""Networks that are built from a plain config, so that a checkpoint can name its architecture without pickled code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from freqprune.errors import InputError, closest
from freqprune.models.resnet import BasicBlock, CifarResNet, IndexShortcut

Builder = Callable[..., nn.Module]

_BUILDERS: dict[str, Builder] = {f"resnet{depth}": partial(CifarResNet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)}


def register_model(name: str, builder: Builder) -> None:
    """Make `builder` available as ``model.name=<name>`` and to checkpoints that name it.

    Args:
        name: the name written into configs and checkpoints.
        builder: called with the rest of the config as keyword arguments; returns the network.

    Raises:
        InputError: if the name is taken by another builder.
    """
    if _BUILDERS.get(name, builder) is not builder:
        raise InputError(f"model name {name!r} is taken; register {builder!r} under another name")
    _BUILDERS[name] = builder


def model_names() -> list[str]:
    """Names that `build_model` accepts."""
    return list(_BUILDERS)


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """Build a network from ``{"name": ..., **arguments}``; arguments that are None count as left out.

    >>> sum(p.numel() for p in build_model({"name": "resnet32"}).parameters())
    464154

    Raises:
        InputError: for an unknown name or argument.
    """
    arguments = {key: value for key, value in config.items() if value is not None}
    name = arguments.pop("name", None)
    if name not in _BUILDERS:
        raise InputError(f"model.name must be one of {', '.join(_BUILDERS)}, got {name!r}{closest(str(name), _BUILDERS)}")
    builder = _BUILDERS[name]
    try:
        inspect.signature(builder).bind(**arguments)
    except TypeError as error:
        raise InputError(f"model {name!r} does not take these arguments: {error}") from None
    return builder(**arguments)


__all__ = ["BasicBlock", "CifarResNet", "IndexShortcut", "build_model", "model_names", "register_model"]
