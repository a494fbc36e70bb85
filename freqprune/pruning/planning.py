"""Before a cut: what may go and is asked for, and all that can be refused before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import IndexShortcut, Trace, check_answers, device_of, evaluating, first
from freqprune.pruning.blocks import answers_without
from freqprune.pruning.compensation import readers_of
from freqprune.pruning.criteria import needs
from freqprune.pruning.moments import no_moments_of
from freqprune.pruning.recipe import Recipe
from freqprune.pruning.selection import select
from freqprune.pruning.surgery import Plan
from freqprune.pruning.trials import misread_units, stuck_blocks
from freqprune.tagging import find_sites, pick_layers


def plan_cut(net: nn.Module, example: Tensor, recipe: Recipe, labels: Tensor | None = None) -> tuple[Plan, list[str]]:
    """What may be removed, and which of it the recipe picks, without what torch-pruning misreads, after checking that
    the tags will tell what the criterion asks for; `labels` are those of images that it may take the loss of.

    Raises:
        InputError: for patterns that match nothing or pick what cannot go, or tag settings that leave the criterion
            without its readings; for a network that answers with no logits, or labels that are no classes of it, where
            the criterion reads these; for a network on a device without float64, where the cut needs it.
    """
    if recipe.needs_float64 and device_of(net).type == "mps":
        raise InputError(
            "this cut solves equations in float64, which Apple's accelerator does not have: move the network to the "
            "CPU (trainer=cpu), or use importance=l2, which needs none"
        )
    _check_answer(net, example, recipe.criterion, labels)
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
            raise type(error)("; ".join([str(error), *kept_whole(misread)])) from None
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
        find_sites(net, example, members)
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


def _check_answer(net: nn.Module, example: Tensor, criterion: str, labels: Tensor | None) -> None:
    """Raise InputError for answers, or labels, that a criterion can make nothing of."""
    if "logits" not in needs(criterion):
        return
    check_answers(net, example)
    with evaluating(net), torch.no_grad():
        shape = tuple(first(net(example)).shape)
    others = "use another criterion, such as importance=redundancy, snr or l2"
    if len(shape) != 2:
        raise InputError(
            f"importance.criterion = {criterion} reads logits, (n_images, n_classes), and {type(net).__name__} answers "
            f"{shape}; {others}"
        )
    if "loss" not in needs(criterion):
        return
    if shape[1] < 2:
        raise InputError(
            f"importance.criterion = {criterion} reads the cross-entropy of two classes or more, and "
            f"{type(net).__name__} answers with {shape[1]} number an image; {others}"
        )
    if labels is None or not len(labels):
        return
    if labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < shape[1]:
        raise InputError(
            f"importance.criterion = {criterion} reads labels, whole numbers in [0, {shape[1] - 1}], got "
            f"{labels.dtype} in [{labels.min():g}, {labels.max():g}]; {others}"
        )


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


def kept_whole(misread: Sequence[str]) -> list[str]:
    """A remark on the layers that torch-pruning misreads, if there are any."""
    if not misread:
        return []
    return [
        f"{len(misread)} layers keep their filters, as torch-pruning misreads how their channels pass through the "
        f"network: {', '.join(misread)}"
    ]
