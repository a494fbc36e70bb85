"""Make up for removed filters in the layers that read them, before any fine-tuning."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from freqprune.errors import InputError, one_of
from freqprune.networks import Trace
from freqprune.pruning.graph import ChannelGraph
from freqprune.pruning.moments import columns_of, least_squares, mean_response
from freqprune.pruning.surgery import Plan
from freqprune.pruning.surroundings import goes_into
from freqprune.tagging import find_folds

METHODS = ("none", "mean", "least_squares", "sequential")
# Those that solve every layer from the dense network's moments alone.
AT_ONCE = ("mean", "least_squares")


def readers_of(graph: ChannelGraph, units: Sequence[str]) -> list[str]:
    """Convolutions and linear layers that read the filters of the units: those whose input moments compensation and
    redundancy need."""
    modules = dict(graph.model.named_modules())
    found = [reader for name in units for reader in graph.units[name].readers]
    return [reader for reader in dict.fromkeys(found) if isinstance(modules[reader], nn.Conv2d | nn.Linear)]


def compensate(
    plan: Plan,
    small: nn.Module,
    kept: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    method: str,
    by_mean: Collection[str] = (),
) -> list[str]:
    """Change the weights of a pruned network, in place, so that its layers come close to what they computed before.

    The constant goes into the layer's bias or into the batch norm that follows it.

    Args:
        plan: the plan of the dense network.
        small: what ``plan.apply(kept)`` returned.
        kept: filters kept of each unit.
        moments: second moments of the inputs of every layer that lost some, from
            `freqprune.pruning.moments.input_moments` on the dense network.
        method: ``"mean"``: add the mean response of what was removed; ``"least_squares"``: the weights on what is kept
            that come closest to the old output; ``"none"``.
        by_mean: layers that get the mean response only, as those that were seen in too few samples.

    Returns:
        Remarks on layers where only a part could be done.

    Raises:
        InputError: for an unknown method, or missing moments.
    """
    one_of(("none", *AT_ONCE), method=method)
    if method == "none":
        return []
    kept = plan.sensible(kept)
    dense, pruned = dict(plan.model.named_modules()), dict(small.named_modules())
    followers = _norms_after(plan)
    # A cut leaves the filters in their order, whatever that of the numbers is.
    outputs = {
        member: torch.tensor(plan.unit(name).channels(sorted(indices.tolist())))
        for name, indices in kept.items()
        if name not in plan.blocks
        for member in plan.unit(name).members
    }
    remarks = []
    for layer, channels in plan.silenced(kept).items():
        old, new = dense[layer], pruned.get(layer)
        # Layers of blocks that went are not there.
        if new is None:
            continue
        if not isinstance(old, nn.Conv2d | nn.Linear):
            if hasattr(old, "weight"):
                remarks.append(f"{layer} is a {type(old).__name__}: what it lost is not made up for")
            continue
        if layer not in moments:
            raise InputError(f"no moments of {layer!r}, which reads removed filters; take them with input_moments")
        weight = old.weight.detach().flatten(1).cpu()
        norm = pruned.get(followers.get(layer, ""))
        mean = norm.running_mean if isinstance(norm, nn.modules.batchnorm._BatchNorm) else None
        has_constant = new.bias is not None or mean is not None
        removed = columns_of(old, sorted(set(channels)))
        stays = torch.ones(weight.shape[1], dtype=torch.bool)
        stays[removed] = False
        if method == "least_squares" and layer not in by_mean:
            solved, constant = least_squares(weight, moments[layer], stays.nonzero().flatten(), has_constant)
        else:
            solved, constant = weight[:, stays], mean_response(weight, moments[layer], removed)
        rows = outputs.get(layer, torch.arange(len(weight)))
        with torch.no_grad():
            new.weight.copy_(solved[rows].view_as(new.weight))
            if new.bias is not None:
                new.bias.add_(constant[rows].to(new.bias))
            elif mean is not None:
                mean.sub_(constant[rows].to(mean))
            else:
                remarks.append(
                    f"{layer} has no bias and no batch norm of its own after it: what it lost is made up for without a "
                    "constant"
                )
    return remarks


def _norms_after(plan: Plan) -> dict[str, str]:
    """The batch norm that reads each layer's output, by name; where the network can be followed those inside other
    modules too."""
    try:
        trace = plan.trace if plan.blocks else Trace(plan.model, plan.example)
    except InputError:
        return dict(find_folds(plan.model, plan.example, []))
    found = {}
    for node, layer in trace.layers.items():
        norm = goes_into(node)[0]
        mean: Any = None if norm is None else norm.args[3]
        name = trace.source(mean)
        if name is not None and len(mean.users) == 1:
            found[layer] = name.rpartition(".")[0]
    return found


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Any], device: torch.device | None = None) -> None:
    """Re-estimate the running statistics of every batch norm as plain averages over batches of (normalised) inputs, in
    place.

    Removing filters shifts what the following layers see; this takes no gradient step. Modes are restored, after an
    error momenta and statistics too. Batches count alike, whatever their size: let them be as equal as can be.

    Raises:
        InputError: without batches.
    """
    given = iter(batches)
    if (leading := next(given, None)) is None:
        raise InputError("re-estimating batch norms needs batches of images, got none")
    modes = {module: module.training for module in model.modules()}
    norms = [module for module in modes if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm, norm.momentum, [b.clone() for b in norm.buffers(recurse=False)]) for norm in norms]
    try:
        update_bn(itertools.chain([leading], given), model, device=device)
    except BaseException:
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            for buffer, old in zip(norm.buffers(recurse=False), buffers, strict=True):
                buffer.copy_(old)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode


def in_equal_parts(images: Tensor, size: int) -> list[Tensor]:
    """As few parts of at most `size` images as can be, as equal as can be; those of one image left out."""
    parts = images.tensor_split(-(-len(images) // size)) if len(images) else ()
    return [part for part in parts if len(part) > 1]
