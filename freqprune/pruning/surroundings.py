"""What stands around a layer in a trace: the layer that feeds it alone, the batch norm after it, what its output is
added to, and where a constant of its output goes."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from freqprune.networks import BATCH_NORM, IDENTITIES, LINEAR, SUMS, Trace


def path_to(trace: Trace, fixed: Container[Node], node: Node) -> list[Node]:
    """Operations from the layer before a layer to it, where that feeds no other; empty if there is no such layer.

    Args:
        trace: of the network.
        fixed: parameters and buffers, which no operation makes.
        node: the layer.
    """
    path: list[Node] = []
    at: Any = node.args[0]
    while isinstance(at, Node) and at not in fixed and len(at.users) == 1:
        path.insert(0, at)
        if at in trace.layers:
            return path
        before = [source for source in at.all_input_nodes if source not in fixed]
        if len(before) != 1:
            break
        at = before[0]
    return []


def goes_into(node: Node) -> tuple[Node | None, list[Node]]:
    """The batch norm after a layer, and the other terms of the sums that its output goes into.

    A norm by the statistics of its batch, which is no fixed scale and shift, ends the way.
    """
    norm, end, others = None, node, []
    while len(end.users) == 1:
        user = next(iter(end.users))
        if user.target is BATCH_NORM and end is node and user.args[0] is node:
            # Of a linear layer over tokens the norm has a mean of each token.
            over_tokens = node.target is LINEAR and node.meta["val"].dim() != 2
            if user.args[3] is None or user.args[4] is None or over_tokens:
                break
            norm = user
        elif user.target in SUMS and not user.kwargs:
            first, second = user.args[:2]
            other = second if first is end else first
            if other is end or not isinstance(other, Node):
                break
            others.append(other)
        elif user.target not in IDENTITIES:
            break
        end = user
    return norm, others


def scale_of(norm: Node, fixed: Mapping[Node, Tensor]) -> Tensor:
    """Factor of a batch norm for each channel, kept from zero; infinite if it is zero for all: nothing that such a
    branch does shows behind it.

    Args:
        norm: its call.
        fixed: parameters and buffers of the network.
    """
    values: list[Any] = [fixed.get(at) if isinstance(at, Node) else at for at in norm.args]
    weight, variance, eps = values[1], values[4], values[7]
    scale: Tensor = (variance + eps).rsqrt() * (1.0 if weight is None else weight)
    if not scale.any():
        return torch.full_like(scale, torch.inf)
    least = 1e-3 * scale.abs().max().clamp(min=torch.finfo(scale.dtype).tiny)
    return torch.where(scale.abs() < least, torch.where(scale < 0, -least, least), scale)


def bias_of(node: Node) -> Any:
    """What a layer's operation adds to its products, as an argument of it; None if it adds nothing."""
    return node.args[2] if len(node.args) > 2 else None


def own_bias(trace: Trace, node: Node) -> str | None:
    """Name of the bias that a layer's operation adds, if it is a parameter of the layer alone: a forward may compute
    one of parameters elsewhere."""
    bias, name = bias_of(node), f"{trace.layers[node]}.bias"
    # One that other layers add as well cannot move for one of them.
    return name if trace.source(bias) == name and len(bias.users) == 1 else None


def constant_in(trace: Trace, node: Node, norm: Node | None) -> tuple[str, int] | None:
    """Where a constant added to a layer's output goes: its own bias, or, with the other sign, the norm's mean."""
    if own := own_bias(trace, node):
        return own, 1
    mean: Any = None if norm is None else norm.args[3]
    name = trace.source(mean)
    return None if name is None or len(mean.users) != 1 else (name, -1)
