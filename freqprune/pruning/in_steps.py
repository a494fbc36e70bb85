"""A cut in several steps, each of which counts what those before it have left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from freqprune.networks import count_macs, kept_by_all
from freqprune.pruning.amount import Amount, step_amount
from freqprune.pruning.cutting import Cut
from freqprune.pruning.recipe import Recipe
from freqprune.pruning.selection import Kept, NothingToRemoveError
from freqprune.pruning.surgery import Plan
from freqprune.pruning.tempo import Promise


@dataclass
class InSteps:
    """What is left after some steps.

    Attributes:
        net: the network.
        kept: filters of the network before the first step, by unit; a layer may become a unit of its own once a block
            has gone.
        widths: of these units in that network, in filters.
        scores: of the first step.
        dropped: blocks that went.
        remarks: of all steps.
        promise: what was measured, of a cut by time.
    """

    net: nn.Module
    kept: Kept
    widths: dict[str, int]
    scores: dict[str, Tensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    promise: Promise | None = None

    def add(self, done: Cut, plan: Plan, which: str = "") -> None:
        """Take in a step, named `which` in its remarks; `plan` is of the network before the first one."""
        self.net, self.promise = done.net, done.promise
        self.scores = self.scores or done.scores
        self.dropped += done.dropped
        self.remarks += [which + remark for remark in done.remarks]
        units = plan.graph.units
        found = with_earlier(plan, done.net, done.kept, {name: kept.tolist() for name, kept in self.kept.items()})
        self.kept = {name: torch.tensor(indices, dtype=torch.long) for name, indices in found.items()}
        leads = {member: name for name, unit in units.items() for member in unit.members}
        for name in self.kept.keys() - self.widths.keys():
            unit = units.get(leads.get(name, name))
            channels = len(plan.model.get_parameter(f"{name}.weight"))
            self.widths[name] = channels if unit is None else unit.n_filters


def cut_in_steps(
    plan: Plan,
    chosen: list[str],
    recipe: Recipe,
    n_steps: int,
    one: Callable[[nn.Module, Recipe, int], Cut],
    between: Callable[[nn.Module, int], nn.Module],
) -> InSteps:
    """Cut a network until all steps together have removed what is asked for.

    Args:
        plan: of the network.
        chosen: its units that may lose filters.
        recipe: of all steps together.
        n_steps: how many.
        one: cuts a network by the recipe of a step, which has the number.
        between: what is done with the network after a step, but the last, once something has gone.
    """
    widths = {name: plan.unit(name).n_filters for name in chosen}
    found = InSteps(plan.model, {name: torch.arange(width) for name, width in widths.items()}, dict(widths))
    for step in range(n_steps):
        which = f"step {step + 1} of {n_steps}"
        amount = step_amount(recipe.amount, step, n_steps, _left(found, plan, widths, recipe.amount))
        try:
            done = None if amount is None else one(found.net, replace(recipe, amount=amount), step)
        except NothingToRemoveError:
            # A share of a ratio may be less than what goes at once; the steps that follow catch up.
            lasting = recipe.amount.ratio is None or step + 1 == n_steps
            if lasting and all(len(indices) == found.widths[name] for name, indices in found.kept.items()):
                raise
            done = None
        if done is None:
            later = recipe.amount.ratio is not None and amount is not None and step + 1 < n_steps
            why = "its share is less than what goes at once" if later else "those before it had cut as much already"
            found.remarks.append(f"{which} cut nothing: {why}")
        else:
            found.add(done, plan, f"{which}: " if n_steps > 1 else "")
        # Before the first filter has gone, it is the network that was given.
        if step + 1 < n_steps and found.net is not plan.model:
            found.net = between(found.net, step)
    return found


def _left(found: InSteps, plan: Plan, widths: dict[str, int], amount: Amount) -> float:
    """Share of the filters (of a ratio) or of the MACs that the steps so far have left."""
    if amount.ratio is not None:
        return sum(len(indices) for name, indices in found.kept.items() if name in widths) / sum(widths.values())
    return count_macs(found.net, plan.example) / count_macs(plan.model, plan.example)


def with_earlier(plan: Plan, small: nn.Module, kept: Kept, earlier: dict[str, list[int]]) -> dict[str, list[int]]:
    """Filters that a cut and those before it have left of the first network, without layers that are gone.

    Args:
        plan: of the network before the cut, or before some of those before it.
        small: the network after it.
        kept: filters of the network before it.
        earlier: filters of the first network that this one has, by unit.
    """
    members = {member: unit.members for unit in plan.graph.units.values() for member in unit.members}
    cuts = [earlier, {name: indices.tolist() for name, indices in kept.items()}]
    return kept_by_all(cuts, [members, members], dict(small.named_modules()).__contains__)
