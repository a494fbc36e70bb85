"""Hooks, modes and stand-ins that never outlive their block. The only place in the package that registers hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, compiled networks run uncompiled so that hooks see them; all is restored after it,
    also after an error."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        # What modules keep of their runs in eval mode, as LeViT does its biases, they let go of when it is set.
        model.eval()
        for module, mode in training.items():
            module.training = mode


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
