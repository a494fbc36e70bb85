"""One cut: plan, evidence, scores, selection, surgery, compensation. What `prune.py` and the pruning callback share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import device_of, equal_batches
from freqprune.processes import from_first
from freqprune.pruning.amount import Amount
from freqprune.pruning.compensation import compensate
from freqprune.pruning.criteria import needs, scores, shortcuts_read
from freqprune.pruning.depth import ONE_PASS, block_scores
from freqprune.pruning.evidence import calibration, check_material, gather, n_measured
from freqprune.pruning.importance import Evidence
from freqprune.pruning.planning import kept_whole, plan_cut
from freqprune.pruning.recipe import Material, Recipe
from freqprune.pruning.reconstruction import reconstruct
from freqprune.pruning.selection import Kept, remarks, select
from freqprune.pruning.surgery import Plan
from freqprune.pruning.tempo import Clock, Promise, check_folder, to_time
from freqprune.tagging import Progress, Stimulus, TagResponse


@dataclass
class Cut:
    """What came of a cut.

    Attributes:
        net: the smaller network.
        kept: filters kept of each unit, of the network that was given; see `with_earlier` for that before earlier cuts.
        scores: by which they were chosen.
        response: the response to the tags; None if the criterion reads none and none was given.
        remarks: what a user should know.
        dropped: residual blocks that went altogether; their layers are not in `kept`.
        promise: what a cut by time was asked for and what was measured; None for others.
        members: layers that lost filters together, by the unit's name.
    """

    net: nn.Module
    kept: Kept
    scores: dict[str, Tensor]
    response: TagResponse | None
    remarks: list[str]
    dropped: list[str] = field(default_factory=list)
    promise: Promise | None = None
    members: dict[str, tuple[str, ...]] = field(default_factory=dict)


def cut(
    net: nn.Module,
    material: Material,
    recipe: Recipe,
    stimulus: Stimulus,
    response: TagResponse | None = None,
    progress: Progress | None = None,
) -> Cut:
    """Remove the filters that score lowest. The network itself is left as it is.

    Args:
        net: the network.
        material: images.
        recipe: how to cut.
        stimulus: the tags.
        response: of this network, if it is at hand; measured otherwise, if the criterion reads it.
        progress: see `freqprune.tag`.

    Raises:
        InputError: whatever is wrong with the recipe for this network, before anything is removed.
    """
    check_folder(recipe)
    check_material(material, recipe)
    example = material.normalize(material.images[:1].to(device_of(net)))
    plan, chosen = plan_cut(net, example, recipe, None if material.labelled is None else material.labelled[1])
    clock: list[Clock] = []
    if recipe.amount.by_time:
        # What is timed in one process is timed while the others wait.
        from_first(lambda: clock.append(Clock(plan, material, recipe, progress)))
    evidence = gather(plan, chosen, material, recipe, stimulus, response, progress)
    misread = [name for name in plan.choose(recipe.layers, recipe.exclude, recipe.streams) if name not in chosen]
    chosen, notes = _seen_enough(plan, chosen, evidence.short, recipe)
    notes += kept_whole(misread) + _not_followed(plan, chosen, recipe)
    found = scores(recipe.criterion, evidence, chosen, progress)
    if plan.blocks:
        # Only in sequence a cut makes up for whole blocks.
        one_pass = replace(ONE_PASS, memory_gb=recipe.reconstruction.memory_gb)
        how = one_pass if recipe.compensation == "sequential" else None
        n_images = n_measured(recipe, material.images.shape)
        batches = evidence.frames or list(calibration(net, material, recipe, stimulus, n_images))
        found |= block_scores(net, batches, how, progress, among=list(plan.blocks))
    amount, promise = recipe.amount, None
    try:
        if amount.by_time:
            kept, amount, more, promise = from_first(lambda: to_time(plan, found, clock[0], recipe, progress))
            notes += more
        else:
            kept = select(found, amount, plan.macs, plan.blocks)
    except InputError as error:
        # Layers that were left out may be why an amount cannot be reached.
        raise type(error)("; ".join([str(error), *notes])) from None
    # One decides: rounding may differ between processes.
    kept = from_first(plan.sensible, kept)
    small = plan.apply(kept)
    inner = {name: indices for name, indices in kept.items() if name not in plan.blocks}
    notes += remarks(inner, {name: plan.unit(name).n_filters for name in inner}, amount) if inner else []
    if dropped := plan.dropped(kept):
        notes.append(f"{len(dropped)} of {len(plan.blocks)} residual blocks went altogether: {', '.join(dropped)}")
    small, more = _made_up_for(plan, small, kept, evidence, material, recipe, stimulus, progress)
    notes += more + _overshoot(plan, kept, amount)
    members = {name: plan.unit(name).members for name in inner}
    return Cut(small, inner, found, evidence.response, notes, plan.dropped(kept), promise, members)


def _not_followed(plan: Plan, chosen: Sequence[str], recipe: Recipe) -> list[str]:
    """Remarks on what nobody chose to keep, layers whose channels cannot be followed and blocks that a trial found to
    be more than they seem; and on what a criterion does not see."""
    found = []
    unseen = [name for name in chosen if shortcuts_read(plan.graph, name)]
    if unseen and recipe.criterion in ("redundancy", "logit_redundancy"):
        found.append(
            f"importance={recipe.criterion} does not see what the filters of {', '.join(unseen)} do through shortcuts "
            "without weights (option A), for which nothing makes up; importance=logit_error does"
        )
    if recipe.layers is None and plan.graph.unfollowed:
        found.append(
            f"{len(plan.graph.unfollowed)} layers keep their filters, as their channels cannot be followed: "
            f"{', '.join(plan.graph.unfollowed)}"
        )
    if plan.stuck:
        found.append(
            f"{len(plan.stuck)} residual blocks stay, as the network does not run without them as it should: "
            f"{', '.join(plan.stuck)}"
        )
    return found


def _seen_enough(
    plan: Plan, chosen: list[str], short: Mapping[str, int], recipe: Recipe
) -> tuple[list[str], list[str]]:
    """The units whose readers were seen in as many samples as they have unknowns, and a remark on the others.

    From fewer samples any filter is a combination of others, and would be called redundant for that alone.
    """
    lacking = {name: [reader for reader in plan.unit(name).readers if reader in short] for name in chosen}
    lacking = {name: readers for name, readers in lacking.items() if readers}
    if not lacking or "moments" not in needs(recipe.criterion):
        return chosen, []
    worst = max((reader for readers in lacking.values() for reader in readers), key=short.__getitem__)
    found = (
        f"{len(lacking)} of {len(chosen)} layers are read by a layer that the calibration images give fewer samples "
        f"than it has inputs, worst {worst}, which lacks {short[worst]}"
    )
    advice = (
        "give more calibration images (pruning.calibration_images) or larger ones, or, if there are none, rank by the "
        "weights (importance=l2)"
    )
    if len(lacking) == len(chosen):
        raise InputError(f"{found}: nothing can be said of their filters; {advice}")
    return [name for name in chosen if name not in lacking], [
        f"{found}: {', '.join(lacking)} keep their filters, which would look redundant for that alone; {advice}"
    ]


def _made_up_for(
    plan: Plan,
    small: nn.Module,
    kept: Kept,
    evidence: Evidence,
    material: Material,
    recipe: Recipe,
    stimulus: Stimulus,
    progress: Progress | None,
) -> tuple[nn.Module, list[str]]:
    """The smaller network after the compensation that the recipe asks for, and remarks."""
    if recipe.compensation == "sequential":
        batches = equal_batches(calibration(plan.model, material, recipe, stimulus))
        how = replace(recipe.reconstruction, seed=recipe.reconstruction.seed or recipe.seed)
        without = plan.dropped(kept)
        twin, notes = reconstruct(plan.model, plan.silenced(kept), batches, how, progress, without)
        return plan.apply(kept, weights=twin), notes
    lost = plan.silenced(kept)
    short = {name: lacks for name, lacks in evidence.short.items() if name in lost}
    notes = compensate(plan, small, kept, evidence.moments or {}, recipe.compensation, by_mean=short)
    if short and recipe.compensation == "least_squares":
        worst = max(short, key=short.__getitem__)
        notes.append(
            f"{len(short)} layers have fewer samples than inputs, worst {worst}, which lacks {short[worst]}: what they "
            "lost is made up for by its mean only; more calibration images (pruning.calibration_images) would help"
        )
    return small, notes


def _overshoot(plan: Plan, kept: Kept, amount: Amount) -> list[str]:
    if amount.macs_cut is None:
        return []
    got = 1 - plan.macs({name: len(indices) for name, indices in kept.items()}) / plan.macs({})
    if abs(got - amount.macs_cut) <= 0.01:
        return []
    less = "residual streams whose first layer goes with its block keep their filters"
    why = less if got < amount.macs_cut else "filters that go together allow no closer cut"
    return [f"{100 * got:.1f} % of the MACs cut instead of {100 * amount.macs_cut:.1f} %: {why}"]
