"""What a plan promises and a network does not keep, found by removing it for a trial before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from freqprune.errors import InputError
from freqprune.pruning.surgery import Plan


def misread_units(plan: Plan, names: Sequence[str]) -> list[str]:
    """Those of some units that torch-pruning cannot remove filters of so that the proof holds: about half of every unit
    is removed, first of all together, then of each alone. Filters here and there: the first would pass where a forward
    slices channels by their numbers. An odd number stays: an even one would pass where groups halve evenly."""
    generator = torch.Generator().manual_seed(0)
    halves = {
        name: _half(plan.unit(name).n_filters, generator)
        for name in names
        if name not in plan.blocks and plan.unit(name).n_filters > 1
    }

    def fails(names: Sequence[str]) -> bool:
        try:
            plan.apply({name: halves[name] for name in names})
        except InputError:
            return True
        return False

    return [name for name in halves if fails([name])] if fails(list(halves)) else []


def stuck_blocks(plan: Plan) -> list[str]:
    """Blocks without which the network does not run as the proof asks for: all are removed together, then each alone.
    One that hands on more than a map, such as a pair, shows only there."""

    def fails(names: Sequence[str]) -> bool:
        try:
            plan.apply(dict.fromkeys(names, torch.tensor([], dtype=torch.long)))
        except Exception:
            # Whatever a forward trips over that gets something else than it expects.
            return True
        return False

    return [name for name in plan.blocks if fails([name])] if plan.blocks and fails(list(plan.blocks)) else []


def _half(n_filters: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(n_filters, generator=generator)[: n_filters // 2 | 1].sort().values
