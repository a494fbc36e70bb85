"""The state of an optimizer → that of the smaller network's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from freqprune.networks import copied
from freqprune.pruning import Plan


def carry_over(
    optimizer: Optimizer, dense: nn.Module, small: nn.Module, kept: Mapping[str, Tensor], example: Tensor
) -> None:
    """Let an optimizer go on with the parameters of the pruned network, in place; kept filters keep their state, e.g.
    momentum, and parameters of blocks that went are let go. State of other shapes than the weights' begins anew.

    Args:
        optimizer: holds parameters of `dense`, and maybe others, which stay.
        dense: network before the cut.
        small: network after it.
        kept: filters kept of each unit.
        example: network input.
    """
    names = {parameter: name for name, parameter in dense.named_parameters()}
    new = dict(small.named_parameters())
    plan = Plan(dense, example)
    # What factorises its state, as Adafactor does, begins anew, and so does what had no gradient yet.
    states = {p: optimizer.state.pop(p, {}) for p in names}
    whole = {
        names[p]: one
        for p, one in states.items()
        if one and all(value.shape == p.shape for value in one.values() if isinstance(value, Tensor) and value.dim())
    }
    state: dict[Tensor, dict[str, Any]] = {new[name]: {} for name in whole if name in new}
    keys = {k for one in whole.values() for k, value in one.items() if isinstance(value, Tensor) and value.dim()}
    for key in sorted(keys):
        # The state goes through the same surgery, in the place of the weights it belongs to.
        carrier = copied(dense)
        with torch.no_grad():
            for name, target in carrier.named_parameters():
                value = whole.get(name, {}).get(key)
                target.zero_() if value is None else target.copy_(value)
        for name, value in plan.apply(kept, check=False, weights=carrier).named_parameters():
            if name in new and key in whole.get(name, {}):
                state[new[name]][key] = value.detach().clone()
    for name, one in whole.items():
        for key, value in one.items():
            if name in new and not (isinstance(value, Tensor) and value.dim()):
                state[new[name]][key] = value
    optimizer.state.update(state)
    for group in optimizer.param_groups:
        group["params"] = [
            new[names[p]] if p in names else p for p in group["params"] if p not in names or names[p] in new
        ]
