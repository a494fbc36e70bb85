"""What a cut of a network needs to be tried out without the network: scores, and the table behind its MACs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from freqprune.errors import InputError
from freqprune.networks import macs_by_layer
from freqprune.pruning import AUTO, Amount, Evidence, Plan, Unit, scores
from freqprune.reports.filters import packed
from freqprune.tagging import TagResponse

BY_TAGS = ("snr", "amplitude", "integration", "intermodulation")


@dataclass(frozen=True)
class TriedUnit(Unit):
    """Filters that go together, and what goes with one of them.

    Attributes:
        shares: by layer, the shares of its inputs and outputs that one filter is.
    """

    shares: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """What the page needs to try cuts.

    Attributes:
        macs: of every convolution and linear layer for one image.
        units: what may lose filters.
        scores: by criterion and unit, one a filter.
        amount: whose scope, floors and multiples hold.
        criterion: shown first.
    """

    macs: Mapping[str, int]
    units: list[TriedUnit]
    scores: Mapping[str, Mapping[str, Tensor]]
    amount: Amount = field(default_factory=lambda: Amount(macs_cut=0.5, scope="per_mac"))
    criterion: str = "snr"

    def macs_left(self, widths: Mapping[str, int]) -> float:
        """MACs with `widths` filters left in the named units: the sum over layers of MACs times the share of the inputs
        times the share of the outputs that is left."""
        left = {layer: np.ones(2) for layer in self.macs}
        for unit in self.units:
            for layer, share in unit.shares.items():
                left[layer] -= (unit.n_filters - widths.get(unit.name, unit.n_filters)) * np.array(share)
        return float(sum(macs * left[layer].prod() for layer, macs in self.macs.items()))

    def packed(self) -> dict[str, Any]:
        """For the page."""
        numbers = {layer: number for number, layer in enumerate(self.macs)}
        amount = self.amount
        # A trial counts MACs, whatever the run's own cut counted, and measures no times.
        scope = "per_mac" if amount.scope == "per_ms" else amount.scope
        return {
            "macs": list(self.macs.values()),
            "layers": list(self.macs),
            "units": [
                {
                    "name": unit.name,
                    "members": list(unit.members),
                    "n": unit.n_filters,
                    "width": unit.width,
                    "parts": unit.n_parts,
                    "shares": [[numbers[layer], *share] for layer, share in unit.shares.items()],
                }
                for unit in self.units
            ],
            "scores": {
                name: [packed(found[u.name].cpu(), "<f8") if u.name in found else None for u in self.units]
                for name, found in self.scores.items()
            },
            "criterion": self.criterion,
            "amount": {
                "scope": scope,
                "normalize": amount.normalize,
                "min_filters": amount.min_filters,
                "multiple_of": 1 if amount.multiple_of == AUTO else amount.multiple_of,
                "macs_cut": amount.macs_cut,
                "threshold": amount.threshold,
            },
        }


def trial_of(
    plan: Plan,
    response: TagResponse | None,
    criterion: str | None = None,
    found: Mapping[str, Tensor] | None = None,
    amount: Amount | None = None,
    components: Sequence[str] | str = "fundamentals",
) -> Trial:
    """What can be tried of a network.

    Args:
        plan: of the network.
        response: for the criteria that read tags.
        criterion: name of a run's own scores.
        found: those scores, by unit; what may lose filters, and all inner layers if left out.
        amount: of the run's cut.
        components: of the response, that criteria read.

    Raises:
        InputError: if no layer may lose filters, or there is nothing to rank them by.
    """
    names = [name for name in found if name not in plan.blocks] if found is not None else list(plan.layers)
    if not names:
        raise InputError("no layer of the network may lose filters")
    by: dict[str, Mapping[str, Tensor]] = {}
    if found is not None and criterion is not None:
        by[criterion] = {name: found[name] for name in names}
    if response is not None:
        evidence = Evidence(plan.model, response, components, graph=plan.graph)
        readable = [name for name in names if {*plan.unit(name).members} <= {*response.layers}]
        for name in BY_TAGS:
            if name in by or not readable or (name == "snr" and not response.noise_std):
                continue
            try:
                by[name] = scores(name, evidence, readable)
            except InputError:  # undefined for some filter: nothing to rank by
                continue
    if not by:
        raise InputError("no score of its filters is known: tag the layers that may lose filters")
    macs = macs_by_layer(plan.model, plan.example)
    trial = Trial(macs, [_unit(plan, name) for name in names], by, criterion=next(iter(by)))
    if amount is None and any((score < 0).any() for score in by[trial.criterion].values()):
        # Divided by MACs, scores below zero would be in the wrong order.
        amount = replace(trial.amount, scope="layer")
    return trial if amount is None else replace(trial, amount=amount)


def _unit(plan: Plan, name: str) -> TriedUnit:
    unit = plan.unit(name)
    left = plan.graph.left({name: unit.n_filters - 1})
    shares = {layer: (1 - inputs, 1 - outputs) for layer, (inputs, outputs) in left.items()}
    touched = {layer: share for layer, share in shares.items() if max(share) > 1e-12}
    return TriedUnit(**vars(unit), shares=touched)
