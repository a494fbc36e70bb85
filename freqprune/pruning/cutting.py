"""One cut: plan, evidence, scores, selection, surgery, compensation. What `prune.py` and the pruning callback share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import IndexShortcut, Trace, device_of, equal_batches
from freqprune.processes import from_first
from freqprune.pruning.amount import Amount
from freqprune.pruning.blocks import answers_without
from freqprune.pruning.compensation import compensate, readers_of
from freqprune.pruning.criteria import needs, scores, shortcuts_read
from freqprune.pruning.depth import ONE_PASS, block_scores
from freqprune.pruning.evidence import calibration, gather, n_measured
from freqprune.pruning.importance import Evidence
from freqprune.pruning.moments import no_moments_of
from freqprune.pruning.recipe import Material, Recipe
from freqprune.pruning.reconstruction import reconstruct
from freqprune.pruning.selection import Kept, remarks, select
from freqprune.pruning.surgery import Plan
from freqprune.pruning.tempo import Clock, Promise, check_folder, to_time
from freqprune.pruning.trials import misread_units, stuck_blocks
from freqprune.tagging import Progress, Stimulus, TagResponse, pick_layers


@dataclass
class Cut:
    """What came of a cut.

    Attributes:
        net: the smaller network.
        kept: filters kept of each unit.
        scores: by which they were chosen.
        response: the response to the tags; None if the criterion reads none and none was given.
        remarks: what a user should know.
        dropped: residual blocks that went altogether; their layers are not in `kept`.
        promise: what a cut by time was asked for and what was measured; None for others.
    """

    net: nn.Module
    kept: Kept
    scores: dict[str, Tensor]
    response: TagResponse | None
    remarks: list[str]
    dropped: list[str] = field(default_factory=list)
    promise: Promise | None = None


def plan_cut(net: nn.Module, example: Tensor, recipe: Recipe) -> tuple[Plan, list[str]]:
    """What may be removed, and which of it the recipe picks, without what torch-pruning misreads, after checking that
    the tags will tell what the criterion asks for.

    Raises:
        InputError: for patterns that match nothing or pick what cannot go, or tag settings that leave the criterion
            without its readings.
    """
    if recipe.amount.by_time:
        check_folder(recipe.latency.folder)
    plan = Plan(net, example, blocks=recipe.with_blocks)
    # Where some have gone in an earlier step, there may be no other.
    needed = recipe.blocks and not plan.gone
    if needed and not plan.blocks:
        raise InputError(f"{type(net).__name__} has no residual block that may go as a whole; use pruning.blocks=false")
    plan.spare_blocks(recipe.layers, recipe.exclude)
    if needed and not plan.blocks:
        raise InputError("pruning.layers and pruning.exclude spare every residual block; use pruning.blocks=false")
    plan.leave_blocks(stuck_blocks(plan))
    if needed and not plan.blocks:
        raise InputError(
            f"{type(net).__name__} does not run as it should without any of its residual blocks "
            f"({', '.join(plan.stuck)}): they give or take something else than one map; use pruning.blocks=false"
        )
    picked = plan.choose(recipe.layers, recipe.exclude, recipe.streams)
    misread = misread_units(plan, picked)
    chosen = [name for name in picked if name not in misread]
    if not chosen:
        raise InputError(
            f"torch-pruning misreads how the channels of {', '.join(misread)} pass through {type(net).__name__}, and "
            "pruning.layers leaves nothing else to prune"
        )
    if (recipe.amount.macs_cut is not None or recipe.amount.ratio is not None) and not plan.blocks:
        # Whatever the scores, an amount beyond every layer's floor is refused here already.
        try:
            select({name: torch.ones(plan.unit(name).n_filters) for name in chosen}, recipe.amount, plan.macs)
        except InputError as error:
            raise type(error)("; ".join([str(error), *_kept_whole(misread)])) from None
    if recipe.compensation == "sequential":
        trace = plan.trace if plan.blocks else Trace(net, plan.example, "pruning.compensation=least_squares")
        with torch.no_grad():
            answer = answers_without(trace, trace.inputs(net), plan.example, ())
        trace.check(net, plan.example, answer, "use pruning.compensation=least_squares")
    if recipe.needs_moments:
        _check_readers(plan, chosen)
    if "moments" in needs(recipe.criterion):
        modules = dict(net.named_modules())
        kinds = (nn.Conv2d, nn.Linear, IndexShortcut)
        odd = [name for name in chosen if any(not isinstance(modules[r], kinds) for r in plan.unit(name).readers)]
        if odd:
            raise InputError(
                f"importance.criterion = {recipe.criterion} looks at what reads a filter, in 2-D convolutions and "
                f"linear layers only, and {', '.join(odd)} are read by others; leave them out with "
                f"pruning.exclude=[{','.join(odd)}], or use importance=amplitude"
            )
    if "tags" in needs(recipe.criterion):
        given = recipe.tagging.get("layers")
        # Left to itself, a cut records what it needs.
        recorded = None if given is None else pick_layers(net, given)
        members = [member for name in chosen for member in plan.unit(name).members]
        unread = [] if recorded is None else [member for member in members if member not in recorded]
        if unread:
            raise InputError(
                f"importance.criterion = {recipe.criterion} needs the response of {', '.join(unread)}, which "
                "tagging.layers leaves out"
            )
        if recipe.tagging.get("noise_std", 0.02) == 0 and "noise" in needs(recipe.criterion):
            raise InputError(
                f"importance.criterion = {recipe.criterion} compares with noise, but tagging.noise_std = 0; use the "
                "default 0.02, or importance=amplitude"
            )
    return plan, chosen


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
    example = material.normalize(material.images[:1].to(device_of(net)))
    plan, chosen = plan_cut(net, example, recipe)
    clock: list[Clock] = []
    if recipe.amount.by_time:
        # What is timed in one process is timed while the others wait.
        from_first(lambda: clock.append(Clock(plan, material, recipe, progress)))
    evidence = gather(plan, chosen, material, recipe, stimulus, response, progress)
    misread = [name for name in plan.choose(recipe.layers, recipe.exclude, recipe.streams) if name not in chosen]
    chosen, notes = _seen_enough(plan, chosen, evidence.short, recipe)
    notes += _kept_whole(misread) + _not_followed(plan, chosen, recipe)
    found = scores(recipe.criterion, evidence, chosen, progress)
    if plan.blocks:
        # Only in sequence a cut makes up for whole blocks.
        how = ONE_PASS if recipe.compensation == "sequential" else None
        batches = evidence.frames or _some(plan, material, recipe, stimulus)
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
    return Cut(small, inner, found, evidence.response, notes, plan.dropped(kept), promise)


def _check_readers(plan: Plan, chosen: Sequence[str]) -> None:
    """Raise InputError for units that are read by layers whose inputs are not taken moments of."""
    modules = dict(plan.model.named_modules())
    for name in chosen:
        for reader in readers_of(plan.graph, [name]):
            if why := no_moments_of(modules[reader]):
                raise InputError(
                    f"{reader!r} {why}; leave what it reads out (pruning.exclude={name}), or do without moments "
                    "(importance=amplitude pruning.compensation=none)"
                )


def _kept_whole(misread: Sequence[str]) -> list[str]:
    """A remark on the layers that torch-pruning misreads, if there are any."""
    if not misread:
        return []
    return [
        f"{len(misread)} layers keep their filters, as torch-pruning misreads how their channels pass through the "
        f"network: {', '.join(misread)}"
    ]


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


def _some(plan: Plan, material: Material, recipe: Recipe, stimulus: Stimulus) -> list[Tensor]:
    """Inputs to measure the worth of blocks on, where the criterion measures nothing."""
    return list(calibration(plan.model, material, recipe, stimulus, n_measured(recipe, material.images.shape)))


def _overshoot(plan: Plan, kept: Kept, amount: Amount) -> list[str]:
    if amount.macs_cut is None:
        return []
    got = 1 - plan.macs({name: len(indices) for name, indices in kept.items()}) / plan.macs({})
    if abs(got - amount.macs_cut) <= 0.01:
        return []
    less = "residual streams whose first layer goes with its block keep their filters"
    why = less if got < amount.macs_cut else "filters that go together allow no closer cut"
    return [f"{100 * got:.1f} % of the MACs cut instead of {100 * amount.macs_cut:.1f} %: {why}"]
