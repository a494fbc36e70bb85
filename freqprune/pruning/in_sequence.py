"""How a cut is made up for in sequence: the settings."""

from __future__ import annotations

import math
from dataclasses import dataclass

from freqprune.errors import InputError, at_least, one_of

RESOLVE = ("shifted", "lost")


@dataclass(frozen=True)
class Reconstruction:
    """How a cut is made up for in sequence.

    Args:
        positions: random positions of each map that enter the equations, drawn anew for every batch.
        ridge: pulls the weights towards those that the cut left, or, after a round, towards those that they were solved
            to before, in units of the inputs' mean variance; None: for each layer the one of
            `freqprune.pruning.equations.RIDGES` that does best on every fourth batch from the others,
            1e-2 where there are fewer than four.
        resolve: ``"shifted"``: every layer whose inputs have changed is solved again; ``"lost"``: only those that lost
            inputs.
        rounds: after a layer is solved, so many times the layer that feeds it takes a Gauss-Newton step towards the
            same target, and it is solved again.
        memory_gb: gigabytes that the activations of all calibration images may take; fewer images are used where more
            would be needed.
        seed: of the positions; 0 in a `Recipe`: its own.

    Raises:
        InputError: for an argument out of range.
    """

    positions: int = 256
    ridge: float | None = 1e-2
    resolve: str = "shifted"
    rounds: int = 3
    memory_gb: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, positions=self.positions)
        at_least(0, rounds=self.rounds)
        one_of(RESOLVE, resolve=self.resolve)
        if not self.memory_gb > 0:
            raise InputError(f"memory_gb must be above 0, got {self.memory_gb}")
        if self.ridge is not None and not (self.ridge > 0 and math.isfinite(self.ridge)):
            raise InputError(f"ridge must be a finite number above 0, got {self.ridge}")
