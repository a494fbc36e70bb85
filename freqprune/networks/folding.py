"""Batch norms folded into the convolutions before them: the same answers from fewer operations."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from freqprune.networks.copies import copied
from freqprune.networks.hooks import replace


def fused(net: nn.Module, folds: Iterable[tuple[str, str]]) -> dict[str, nn.Module]:
    """What stands in for each convolution, with the norm in it, and for each norm: an identity.

    Args:
        net: the network, in eval mode.
        folds: convolutions and the batch norms that follow them and nothing else, by name, as
            `freqprune.tagging.find_folds` finds them.
    """
    modules = dict(net.named_modules())
    found: dict[str, nn.Module] = {}
    for convolution, norm in folds:
        found[convolution] = fuse_conv_bn_eval(modules[convolution], modules[norm])
        found[norm] = nn.Identity()
    return found


def fold_norms(net: nn.Module, folds: Iterable[tuple[str, str]]) -> nn.Module:
    """A copy of a network, in eval mode, with its batch norms folded for deployment; arguments as for `fused`."""
    twin = copied(net).eval()
    replace(twin, fused(twin, folds))
    return twin
