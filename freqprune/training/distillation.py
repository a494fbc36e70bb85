"""How much a network learns from another."""

from __future__ import annotations

import math
from dataclasses import dataclass

from freqprune.errors import InputError


@dataclass(frozen=True)
class Distillation:
    """A share of the loss that follows another network's outputs (Hinton, Vinyals & Dean 2015, arXiv 1503.02531).

    Args:
        distill: the teacher's share of the loss, 0 for none.
        temperature: softens both networks' outputs for that part.

    Raises:
        InputError: for an argument out of range.
    """

    distill: float = 0.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.distill <= 1:
            raise InputError(
                f"distill is the dense network's share of the loss; it must lie in [0, 1], got {self.distill}"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"temperature must be above 0, got {self.temperature}")
