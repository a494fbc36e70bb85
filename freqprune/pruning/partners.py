"""What else a filter takes along, as torch-pruning's groups tell it: other layers, sums, norms over channels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch_pruning as tp
from torch import nn

from freqprune.networks import IndexShortcut

OUT = (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
IN = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
_ARITHMETIC = {"AddBackward": "sum", "SubBackward": "difference", "MulBackward": "product", "DivBackward": "quotient"}


def partners_of(group: Any, module: nn.Module, names: Mapping[nn.Module, str]) -> list[str]:
    """What else a filter of `module` would take along: other layers, sums, norms over channels, the output; empty for
    an inner filter."""
    found: list[str] = []
    operations: list[str] = []
    for dependency, _ in group:
        target = dependency.target.module
        # With a number it couples nothing.
        of_two = len(dependency.target.inputs) > 1
        arithmetic = next((word for word in _ARITHMETIC if of_two and word in dependency.target.name), None)
        if target is not module and (
            dependency.handler in OUT or isinstance(target, IndexShortcut | nn.GroupNorm | nn.LayerNorm)
        ):
            found.append(names.get(target, type(target).__name__))
        elif isinstance(target, nn.Parameter):
            # Nothing says which shape it has in a network that is built anew.
            found.append("a parameter that is of no layer")
        elif arithmetic:
            operations.append(f"a {_ARITHMETIC[arithmetic]}")
    found += operations
    if not any(dependency.handler in IN for dependency, _ in group):
        found.append("the output of the network")
    return list(dict.fromkeys(found))


# What couples layers by value: their filters are one residual stream. Products do not: each side scales the other.
SUM = re.compile(r"^a (sum|difference|quotient)$|^the output of the network$")


_PLAIN = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.PReLU, IndexShortcut)


def members_of(group: Any, names: Mapping[nn.Module, str]) -> list[str]:
    """Layers that write a residual stream together; empty if its channels cannot be removed as one."""
    found: list[str] = []
    for dependency, idxs in group:
        module, name = dependency.target.module, names.get(dependency.target.module)
        if dependency.handler in OUT:
            # The same channel number in every layer, or the layers' scores and widths would not speak of the same
            # filters.
            if list(idxs) != [0] or name is None:
                return []
            found.append(name)
        elif (
            (name is not None and not isinstance(module, _PLAIN))
            or isinstance(module, nn.Parameter)
            or ("Div" in dependency.target.name and len(dependency.target.inputs) > 1)
        ):
            return []
    widths = {dependency.target.module.weight.shape[0] for dependency, _ in group if dependency.handler in OUT}
    reads = any(dependency.handler in IN for dependency, _ in group)
    return found if len(widths) == 1 and reads else []
