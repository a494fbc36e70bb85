"""Hooks, modes and stand-ins that never outlive their block. The only place in the package that registers hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def modes_of(model: nn.Module) -> dict[str, bool]:
    """Whether each module is in training mode, by name."""
    return {name: module.training for name, module in model.named_modules()}


def set_modes(model: nn.Module, modes: Mapping[str, bool]) -> None:
    """Put each module in its mode by its own `train`, which may do more: LeViT lets go of what it made in eval mode,
    layers with low-rank weights merge them or take them out."""
    model.train(modes[""])
    # Some put others in the place of their modules in eval mode.
    modules = {name: module for name, module in model.named_modules() if name in modes}
    for name, module in modules.items():
        if module.training != modes[name]:
            module.train(modes[name])
    # Those that set others than they are told, such as frozen norms, and of these what they hold.
    for name, module in modules.items():
        module.training = modes[name]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, compiled networks run uncompiled so that hooks see them; all is restored after it,
    also after an error."""
    modes = modes_of(model)
    try:
        model.eval()
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        set_modes(model, modes)


@contextmanager
def followable(model: nn.Module) -> Iterator[None]:
    """As `evaluating`, and PyTorch's transformers run operation by operation: in their fast path, whole layers are one,
    in which no layer shows."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with evaluating(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def hooked(
    wanted: Sequence[tuple[nn.Module, Callable[..., Any] | None, Callable[..., Any] | None]], kwargs: bool = False
) -> Iterator[None]:
    """Forward pre-hooks and forward hooks ``(module, before, after)`` inside the block, removed after it, also after an
    error; with `kwargs` they are told the keyword arguments too."""
    handles = []
    try:
        for module, before, after in wanted:
            if before is not None:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=kwargs))
            if after is not None:
                handles.append(module.register_forward_hook(after, with_kwargs=kwargs))
        yield
    finally:
        for handle in handles:
            handle.remove()


def replace(model: nn.Module, stand_ins: Mapping[str, nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put other modules in the place of the named ones, wherever these are.

    Returns:
        Each place, ``(owner, name in it, old module)``.
    """
    new = {model.get_submodule(name): module for name, module in stand_ins.items()}
    places = [
        (owner, child, old)
        for owner in model.modules()
        for child, old in owner._modules.items()
        if old is not None and old in new
    ]
    for owner, child, old in places:
        owner._modules[child] = new[old]
    return places


@contextmanager
def replaced(model: nn.Module, stand_ins: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other modules in the place of the named ones inside the block, wherever these are, the old ones back after it,
    also after an error."""
    places = replace(model, stand_ins)
    try:
        yield
    finally:
        for owner, child, old in places:
            owner._modules[child] = old
