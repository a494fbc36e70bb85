"""Batch norms in eval mode whose gradients are those of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.networks.hooks import hooked


@contextmanager
def norms_as_in_training(model: nn.Module) -> Iterator[None]:
    """Inside the block gradients go back through the batch norms that are in training mode now as training has them,
    also where the network is put into eval mode and they answer by their running statistics.

    Training divides by the standard deviation of the batch: the scale of a filter and its bias change nothing, and get
    no gradient. With running statistics held fixed they would get one, and move until these statistics are wrong (they
    follow the batch only slowly). So the answer is that of the running statistics, the gradient that of a mean and a
    standard deviation that follow the input (Ioffe & Szegedy 2015, arXiv 1502.03167):
    ``g - mean(g) - z mean(g z)``, with ``g`` the gradient of the output before the affine part, in units of the input,
    and ``z`` the input, standardised by its own batch.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.running_mean is not None
    ]
    with hooked([(norm, _before, None) for norm in norms]):
        yield


def _before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    given = args[0]
    if not (torch.is_grad_enabled() and given.requires_grad):
        return None
    # What else reads this tensor keeps its own gradient.
    alias = given.view_as(given)
    alias.register_hook(partial(_through_statistics, given.detach(), float(module.eps)))  # type: ignore[arg-type]
    return alias, *args[1:]


def _through_statistics(given: Tensor, eps: float, gradient: Tensor) -> Tensor:
    full = given.to(torch.promote_types(given.dtype, torch.float32))
    # The kernel of the norm itself: `torch.var_mean` takes six times as long on channels-last maps.
    _, mean, inverse = torch.native_batch_norm(full, None, None, None, None, True, 0.0, eps)
    # The kernel divides by the standard deviation, as the weight multiplies by it.
    found = torch.ops.aten.native_batch_norm_backward(
        gradient, given, inverse.reciprocal(), None, None, mean, inverse, True, eps, [True, False, False]
    )[0]
    assert isinstance(found, Tensor)
    return found
