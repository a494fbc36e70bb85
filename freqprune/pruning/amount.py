"""How much a cut removes, and by what filters of different layers compare."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from freqprune.errors import InputError

SCOPES = ("global", "per_mac", "per_ms", "layer")
AUTO = "auto"
AMOUNTS = ("ratio", "threshold", "macs_cut", "latency_cut", "latency_ms")
# A share that only rounding makes.
_NOTHING = 1e-9


@dataclass(frozen=True)
class Amount:
    """How much to remove; exactly one of the first five is set.

    Args:
        ratio: share of the filters to remove, in (0, 1).
        threshold: keep the filters that score above this.
        macs_cut: share of the network's MACs to remove, in (0, 1), met from above as closely as single filters allow.
        latency_cut: share of the time of a forward to remove, in (0, 1), see `freqprune.networks.Latency`.
        latency_ms: milliseconds that a forward may take.
        scope: ``"global"``: rank the filters of all layers together; ``"per_mac"``: rank them by score over the MACs
            that go with a filter of the layer; ``"per_ms"``: over the time; ``"layer"``: each layer gives the same
            share (for `macs_cut` too).
        normalize: divide each layer's scores by their mean before ranking them together.
        min_filters: filters that every layer keeps at least.
        multiple_of: keep a multiple of so many filters in every layer that loses any, such as 8 for hardware that works
            in blocks. Ratio and threshold then remove no more than asked for; a MACs cut removes whole blocks.
            ``"auto"``, for an amount of time: by the steps that are measured in the time of the layers.

    Raises:
        InputError: for none or several amounts, or values out of range.
    """

    ratio: float | None = None
    threshold: float | None = None
    macs_cut: float | None = None
    latency_cut: float | None = None
    latency_ms: float | None = None
    scope: str = "global"
    normalize: bool = False
    min_filters: int = 1
    multiple_of: int | Literal["auto"] = 1

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in AMOUNTS if getattr(self, name) is not None}
        if len(given) != 1:
            came = ", ".join(f"{name} = {value}" for name, value in given.items()) or "none"
            raise InputError(f"set exactly one of {', '.join(f'pruning.{name}' for name in AMOUNTS)}, got {came}")
        if self.latency_ms is not None and not (self.latency_ms > 0 and math.isfinite(self.latency_ms)):
            raise InputError(f"pruning.latency_ms must be a number of milliseconds above 0, got {self.latency_ms}")
        if self.scope == "per_ms" and not self.by_time:
            raise InputError("pruning.scope = per_ms needs pruning.latency_cut or pruning.latency_ms")
        for name in ("ratio", "macs_cut", "latency_cut"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise InputError(
                    f"pruning.{name} must lie between 0 (removes nothing) and 1 (removes everything), both excluded, "
                    f"got {value}"
                )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise InputError(f"pruning.threshold must be a finite score, got {self.threshold}")
        if self.scope not in SCOPES:
            raise InputError(f"pruning.scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")
        if self.min_filters < 1:
            raise InputError(
                f"pruning.min_filters must be at least 1, got {self.min_filters}: a layer without filters cuts the "
                "network in two"
            )
        if self.multiple_of == AUTO and not self.by_time:
            raise InputError(
                "pruning.multiple_of = auto is read off measured times, which only a cut by time takes: set "
                "pruning.latency_cut or pruning.latency_ms, or a number such as 8"
            )
        if self.multiple_of != AUTO and not (isinstance(self.multiple_of, int) and self.multiple_of >= 1):
            raise InputError(
                f"pruning.multiple_of must be a whole number of at least 1 or auto, got {self.multiple_of!r}"
            )
        if self.threshold is not None and self.normalize:
            raise InputError(
                "pruning.threshold is an absolute score; it cannot be combined with pruning.normalize=true"
            )

    def check_blocks(self) -> None:
        """Raise InputError for an amount that counts filters, of which a residual block is none."""
        counts = {
            "ratio": self.ratio,
            "threshold": self.threshold,
            "scope": self.scope if self.scope == "layer" else None,
        }
        for name, value in counts.items():
            if value is not None:
                raise InputError(
                    f"pruning.{name} = {value} counts filters, of which a residual block is none: with blocks give "
                    "pruning.macs_cut, latency_cut or latency_ms and another scope than layer, or pruning.blocks=false"
                )

    @property
    def by_time(self) -> bool:
        return self.latency_cut is not None or self.latency_ms is not None

    @property
    def step(self) -> int:
        """`multiple_of` as a number."""
        if not isinstance(self.multiple_of, int):
            raise InputError("pruning.multiple_of = auto is found by cut, which measures; give a number here")
        return self.multiple_of


def step_amount(amount: Amount, step: int, n_steps: int, left: float) -> Amount | None:
    """Amount of one of several steps that together remove `amount`, in equal shares of the dense network; None where
    the steps before it have removed as much already.

    Args:
        amount: of all steps together. A threshold is the same in every step.
        step: 0, 1, ..., ``n_steps - 1``.
        n_steps: number of steps.
        left: share of the dense network's filters (for a ratio) or MACs (for a MACs cut) that is left before this step.

    >>> round(step_amount(Amount(ratio=0.5), 1, 2, 0.75).ratio, 3)
    0.333
    """
    goal = amount.ratio if amount.ratio is not None else amount.macs_cut
    if goal is None:
        return amount
    now = 1 - (1 - goal * (step + 1) / n_steps) / left
    if now < _NOTHING:
        return None
    return replace(amount, ratio=now) if amount.ratio is not None else replace(amount, macs_cut=now)
