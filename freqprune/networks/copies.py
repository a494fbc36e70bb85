"""Copies of networks, whatever they hold of their last run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def copied(net: nn.Module) -> nn.Module:
    """A deep copy, also of a network that keeps activations of a run with gradients, which have none in the copy.

    >>> import torch
    >>> net = nn.Linear(2, 1)
    >>> net.seen = [net(torch.ones(1, 2))]
    >>> copied(net).seen[0].requires_grad
    False
    """
    made = (value for module in net.modules() for value in _of_a_graph(vars(module)))
    return copy.deepcopy(net, {id(value): value.detach().clone() for value in made})


def _of_a_graph(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _of_a_graph(one)
