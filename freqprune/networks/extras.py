"""What a network knows beyond its config and its state dict: what shortcuts without weights pick, buffers not kept,
types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.networks.resnet import IndexShortcut


def picks_of_shortcuts(net: nn.Module) -> dict[str, dict[str, Any]]:
    """What shortcuts without weights pick, by name, in plain lists and numbers."""
    return {
        name: {"index": module.index.tolist(), "n_in": module.n_in}
        for name, module in net.named_modules()
        if isinstance(module, IndexShortcut)
    }


def _buffers_of(net: nn.Module) -> dict[str, Tensor]:
    """Buffers that are no part of the state dict, but for those of shortcuts."""
    kept, shortcuts = net.state_dict().keys(), picks_of_shortcuts(net)
    return {
        name: buffer
        for name, buffer in net.named_buffers()
        if name not in kept and name.rpartition(".")[0] not in shortcuts
    }


def extras(net: nn.Module, twin: nn.Module) -> dict[str, dict[str, Any]]:
    """What a network has and its twin, built from the same config and as wide, has otherwise: ``"shortcuts"`` and
    ``"buffers"``, by name. A buffer that the twin does not have, such as one that a forward makes, is left out."""
    shortcuts, buffers = picks_of_shortcuts(twin), _buffers_of(twin)
    return {
        "shortcuts": {name: one for name, one in picks_of_shortcuts(net).items() if shortcuts.get(name) != one},
        "buffers": {
            name: buffer.detach().cpu().contiguous()
            for name, buffer in _buffers_of(net).items()
            if name in buffers
            and (buffer.dtype != buffers[name].dtype or not torch.equal(buffer.cpu(), buffers[name].cpu()))
        },
    }


def set_extras(net: nn.Module, given: Mapping[str, Any]) -> None:
    """Give a network what `extras` found; what `given` does not hold is left."""
    for name, one in (given.get("shortcuts") or {}).items():
        module = net.get_submodule(name)
        assert isinstance(module, IndexShortcut)
        module.n_in = int(one["n_in"])
        module.set_index(torch.tensor(one["index"], dtype=torch.long))
    for name, buffer in (given.get("buffers") or {}).items():
        owner, _, child = name.rpartition(".")
        if buffer.is_floating_point():
            # As `take_types` does with what a state dict holds.
            buffer = buffer.to(torch.promote_types(buffer.dtype, net.get_buffer(name).dtype))
        setattr(net.get_submodule(owner), child, buffer)


# Settings of modules that change what they compute and that no tensor holds.
_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "ceil_mode", "eps", "transform_input")


def built_otherwise(net: nn.Module, twin: nn.Module) -> list[str]:
    """Modules by name that are others than in a network of the same config: of other settings, or, without tensors, of
    another class; a dropout that was taken out changes no answer."""
    same = dict(twin.named_modules())

    def differs(one: nn.Module, other: nn.Module) -> bool:
        if any(getattr(one, name, None) != getattr(other, name, None) for name in _SETTINGS):
            return True
        silent = isinstance(one, nn.Identity) and "drop" in type(other).__name__.lower()
        tensors = [*one.parameters(), *one.buffers(), *other.parameters(), *other.buffers()]
        return not tensors and type(one) is not type(other) and not silent

    return [
        name or "the network" for name, module in net.named_modules() if name in same and differs(module, same[name])
    ]


def take_types(net: nn.Module, state: Mapping[str, Any]) -> None:
    """Give parameters and buffers the types in which they were stored, but none narrower than their own: in half
    precision a file is small, and float images do not fit."""
    for name, values in [*net.named_parameters(), *net.named_buffers()]:
        stored = state.get(name)
        if isinstance(stored, Tensor) and stored.is_floating_point() and values.is_floating_point():
            values.data = values.data.to(torch.promote_types(stored.dtype, values.dtype))
