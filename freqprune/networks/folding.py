"""Batch norms folded into the convolutions before them, for deployment: the same answers from fewer operations."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from freqprune.errors import InputError
from freqprune.networks.answers import first
from freqprune.networks.hooks import evaluating
from freqprune.networks.trace import BATCH_NORM, CONVOLUTIONS, Trace


def fold_norms(net: nn.Module, example: Tensor) -> tuple[nn.Module, list[str]]:
    """A copy of a network in which every batch norm that follows a convolution and nothing else is part of it.

    The norm's scale and shift go into the convolution's weight and bias; an identity takes its place. What is read off
    the network's operations, not off the names of its modules, is which norm follows which convolution.

    Args:
        net: the network; left as it is.
        example: network inputs.

    Returns:
        The copy, in eval mode, and the names of the norms that are gone.

    Raises:
        InputError: for a network that cannot be followed, or if the copy answered otherwise.
    """
    trace, twin = Trace(net, example), copy.deepcopy(net).eval()
    modules = dict(twin.named_modules())
    gone: list[str] = []
    for node, layer in trace.layers.items():
        follower = next(iter(node.users), None)
        if node.target not in CONVOLUTIONS or len(node.users) != 1 or follower is None:
            continue
        if follower.target is not BATCH_NORM or follower.args[0] is not node:
            continue
        name = (trace.source(follower.args[3]) or "").removesuffix(".running_mean")
        norm, convolution = modules.get(name), modules[layer]
        if not isinstance(norm, nn.BatchNorm2d) or len(follower.args[3].users) != 1:  # type: ignore[union-attr]
            continue
        fused = fuse_conv_bn_eval(convolution, norm)
        convolution.weight, convolution.bias = fused.weight, fused.bias
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, nn.Identity())
        gone.append(name)
    with evaluating(net), torch.no_grad():
        before, after = first(net(example)), first(twin(example))
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max())):
        raise InputError(f"{type(net).__name__} answers otherwise with its batch norms folded; use export.fold=false")
    return twin, gone
