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
_SETTINGS = (
    "kernel_size", "stride", "padding", "dilation", "padding_mode", "ceil_mode", "count_include_pad", "output_size",
    "scale_factor", "upscale_factor", "mode", "eps", "num_groups", "normalized_shape", "negative_slope", "alpha",
    "approximate", "start_dim", "end_dim", "transform_input", "align_corners", "size",
    "output_padding", "num_heads", "n_heads",
    "min_val", "max_val", "beta", "threshold",
)  # fmt: skip


def built_otherwise(net: nn.Module, twin: nn.Module) -> list[str]:
    """Modules by name that are others than in a network of the same config: of other settings, or, without tensors, of
    another class; a dropout more or less changes no answer."""
    same = dict(twin.named_modules())
    pairs = ((name, module, same[name]) for name, module in net.named_modules() if name in same)
    return [name or "the network" for name, module, other in pairs if _differs(module, other)]


def _differs(one: nn.Module, other: nn.Module) -> bool:
    if any(_setting(one, name) != _setting(other, name) for name in _SETTINGS):
        return True
    tensors = [*one.parameters(), *one.buffers(), *other.parameters(), *other.buffers()]
    return not tensors and type(one) is not type(other) and not (_is_silent(one) and _is_silent(other))


def _setting(module: nn.Module, name: str) -> Any:
    """A setting as plain numbers and words; a network may call something else so."""
    value = getattr(module, name, None)
    return value if isinstance(value, bool | int | float | str | tuple | list) else None


def _is_silent(module: nn.Module) -> bool:
    """Whether a module hands on what it gets, in eval mode."""
    name = type(module).__name__
    return isinstance(module, nn.Identity) or "drop" in name.lower() or name == "StochasticDepth"


def take_types(net: nn.Module, state: Mapping[str, Any]) -> None:
    """Give parameters and buffers the types in which they were stored, but none narrower than their own: in half
    precision a file is small, and float images do not fit."""
    for name, values in [*net.named_parameters(), *net.named_buffers()]:
        stored = state.get(name)
        if isinstance(stored, Tensor) and stored.is_floating_point() and values.is_floating_point():
            values.data = values.data.to(torch.promote_types(stored.dtype, values.dtype))
