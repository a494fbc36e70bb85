"""What torch-pruning is taught: index shortcuts, and convolutions in groups that lose whole groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from freqprune.networks import IndexShortcut


class _IndexShortcutPruner(tp.BasePruningFunc):
    """Teach torch-pruning the index shortcut: its two sides lose channels independently of each other.

    A source channel that goes leaves a zero channel behind, which is what the masked network computes.
    """

    def prune_out_channels(self, layer: IndexShortcut, idxs: Sequence[int]) -> nn.Module:
        keep = torch.ones(layer.n_out, dtype=torch.bool)
        keep[list(idxs)] = False
        layer.set_index(layer.index.cpu()[keep])
        return layer

    def prune_in_channels(self, layer: IndexShortcut, idxs: Sequence[int]) -> nn.Module:
        gone = torch.zeros(layer.n_in, dtype=torch.bool)
        gone[list(idxs)] = True
        # Position -1 of the table is the last entry, so channels that are zero already stay at -1.
        table = torch.cat([torch.where(gone, -1, (~gone).cumsum(0) - 1), torch.tensor([-1])])
        layer.n_in -= len(set(idxs))
        layer.set_index(table[layer.index.cpu()])
        return layer

    def get_out_channels(self, layer: IndexShortcut) -> int:
        return layer.n_out

    def get_in_channels(self, layer: IndexShortcut) -> int:
        return layer.n_in


class _GroupedPruner(tp.BasePruningFunc):
    """Teach torch-pruning convolutions in groups: the input and output channels of a group go together, as those of a
    depthwise convolution do one by one."""

    def prune_out_channels(self, layer: nn.Conv2d, idxs: Sequence[int]) -> nn.Module:
        gone = set(idxs)
        keep = [i for i in range(layer.out_channels) if i not in gone]
        n_groups = len(gone) // group_width(layer)
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 0)
        if layer.bias is not None:
            layer.bias = self._prune_parameter_and_grad(layer.bias, keep, 0)
        layer.groups -= n_groups
        layer.out_channels = layer.in_channels = len(keep)
        return layer

    # One function for both sides is what ties them.
    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Conv2d) -> int:
        return layer.out_channels

    def get_in_channels(self, layer: nn.Conv2d) -> int:
        return layer.in_channels


CUSTOM_PRUNERS: dict[Any, Any] = {IndexShortcut: _IndexShortcutPruner()}
"""Pruners of this package's own layers, for the ``customized_pruners`` argument of torch-pruning."""


def in_groups(module: nn.Module) -> bool:
    """Whether a module is a convolution that can lose whole groups: with as many outputs as inputs in each."""
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and not module.transposed
        and 1 < module.groups < module.in_channels == module.out_channels
    )


def group_width(layer: nn.Module) -> int:
    """Channels of each group of a convolution."""
    assert isinstance(layer, nn.modules.conv._ConvNd)
    return layer.out_channels // layer.groups


def teach(model: nn.Module) -> dict[Any, Any]:
    """The pruners for a model. Its convolutions in groups become of classes of their own, since torch-pruning knows
    layers by their class; `restore` makes them what they were."""
    pruners, pruner = dict(CUSTOM_PRUNERS), _GroupedPruner()
    classes: dict[type, type] = {}
    for module in filter(in_groups, model.modules()):
        plain = type(module)
        classes.setdefault(plain, type(f"Grouped{plain.__name__}", (plain,), {"plain": plain}))
        module.__class__ = classes[plain]
    return pruners | dict.fromkeys(classes.values(), pruner)


def restore(model: nn.Module) -> None:
    """Give the convolutions of a model that `teach` changed their classes back."""
    for module in model.modules():
        plain = getattr(type(module), "plain", None)
        if taught(module) and plain is not None:
            module.__class__ = plain


def taught(module: nn.Module) -> bool:
    """Whether a module is a convolution whose class `teach` changed."""
    return isinstance(module, nn.modules.conv._ConvNd) and "plain" in type(module).__dict__
