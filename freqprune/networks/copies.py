"""Copies of networks, whatever they hold of their last run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
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
    seen: set[int] = set()
    made = (value for module in net.modules() for value in _of_a_graph(vars(module), seen))
    return copy.deepcopy(net, {id(value): value.detach().clone() for value in made})


def _of_a_graph(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, dict | list | tuple) and id(value) not in seen:
        seen.add(id(value))
        for one in value.values() if isinstance(value, dict) else value:
            yield from _of_a_graph(one, seen)
