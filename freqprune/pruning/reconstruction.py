"""Make up for a cut in sequence: layer by layer, each on the inputs that the network made up so far really gives it.

`freqprune.pruning.compensation` solves every layer against the dense network's own inputs, so that the errors of the
layers before it are in none of its equations. Here the layers are taken in the order in which the network runs, and a
layer that writes to a sum, such as a residual stream, also gets what the sum has lost before it in its target.
After He, Zhang & Sun 2017 (arXiv 1707.06168), who reconstruct layer by layer on the pruned network's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from freqprune.errors import InputError
from freqprune.networks import Trace, check_answers, copied
from freqprune.processes import rank_and_size
from freqprune.pruning.blocks import find_blocks
from freqprune.pruning.recipe import Reconstruction
from freqprune.pruning.walk import Walk


def reconstruct(
    model: nn.Module,
    silenced: Mapping[str, Sequence[int]],
    batches: Sequence[Tensor],
    how: Reconstruction | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    without: Sequence[str] = (),
) -> tuple[nn.Module, list[str]]:
    """A copy of a network that does without some channels and comes close to what the network computes.

    Args:
        model: the dense network; left as it is.
        silenced: input channels (of a linear layer: features) that are read as zero, by layer, see `Plan.silenced`.
        batches: network inputs, all of one size, e.g. tagged frames or images; no labels are needed.
        how: settings.
        progress: wraps the iteration over the operations, for a progress bar.
        without: residual blocks whose branches add nothing, see `freqprune.pruning.blocks`; their layers are left as
            they are.

    Returns:
        The network, of the dense network's shape, with zero weights on the silenced channels, and remarks on layers
        that could not be solved for.

    Raises:
        InputError: without batches, for a network that cannot be traced or whose answers change from call to call, or
            activations that are not finite.
    """
    walk, muted = _walked(model, silenced, batches, how or Reconstruction(), progress, without)
    twin = walk.twin_net
    walk.remark_on_samples()
    with torch.no_grad():
        if not walk.error() <= walk.error_of(muted):
            walk.remarks.append(
                "making up for the cut in sequence brought the answers no closer to the dense network's on the "
                "calibration images: the weights are left as the cut left them"
            )
            twin = muted
    twin.train(model.training)
    if _is_half(model):
        narrow = copied(model)
        narrow.load_state_dict(twin.state_dict())
        twin = narrow
    return twin, walk.remarks


def error_without(
    model: nn.Module,
    without: Sequence[str],
    batches: Sequence[Tensor],
    how: Reconstruction | None = None,
    trace: Trace | None = None,
) -> float:
    """Squared change of a network's answers, summed over the answers of an image, mean over images, without some
    residual blocks and after making up for them; arguments as for `reconstruct`, and the network's `trace` for such
    batches, if it is at hand."""
    with torch.no_grad():
        walk, _ = _walked(model, {}, batches, how or Reconstruction(), None, without, trace)
        return walk.error() * walk.dense[walk.trace.exit][0][0].numel()


def _walked(
    model: nn.Module,
    silenced: Mapping[str, Sequence[int]],
    batches: Sequence[Tensor],
    how: Reconstruction,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None,
    without: Sequence[str],
    trace: Trace | None = None,
) -> tuple[Walk, nn.Module]:
    """The walk, done, and the network that nothing was made up for in."""
    if not batches:
        raise InputError("making up for a cut needs calibration images: pass Material(calibration=...)")
    check_answers(model, batches[0])
    if _is_half(model):
        # Sums of squares of what half precision holds overflow in it.
        model, batches, trace = copied(model).float(), [batch.float() for batch in batches], None
    twin, muted = (copied(model).eval() for _ in range(2))
    mute(muted, silenced)
    with torch.no_grad():
        trace = trace or Trace(model, batches[0])
        blocks = find_blocks(model, trace) if without else {}
        n_processes = rank_and_size()[1]
        n_fit = max(1, int(min(how.memory_gb * 1e9 / _bytes_of(trace, model, batches[0]), len(batches))))
        n_images, batches = sum(map(len, batches)), batches[: n_fit * n_processes]
        walk = Walk(model, twin, trace, silenced, batches, how, [blocks[name] for name in without])
        left = [
            name
            for name in silenced
            if name not in trace.layers.values() and hasattr(model.get_submodule(name), "weight")
        ]
        walk.remarks += [
            f"{name} runs more than once, or is no 2-D convolution or linear layer that multiplies with its weight: "
            "what it lost is not made up for"
            for name in left
        ]
        if sum(map(len, batches)) < n_images:
            walk.remarks.append(
                f"made up for on {sum(map(len, batches))} of {n_images} calibration images, whose activations fit into "
                f"pruning.memory_gb = {how.memory_gb:g}"
            )
        mute(twin, silenced)
        steps = [f"making up for the cut in {walk.trace.layers.get(node, node.name)}" for node in walk.trace.nodes]
        for node, _ in zip(walk.trace.nodes, progress(steps) if progress is not None else steps, strict=True):
            walk.step(node)
        trace.check(model, walk.batches[0], walk.dense[trace.exit][0], "use pruning.compensation=least_squares")
    return walk, muted


def _is_half(model: nn.Module) -> bool:
    return any(one.dtype in (torch.float16, torch.bfloat16) for one in model.parameters())


def mute(model: nn.Module, silenced: Mapping[str, Sequence[int]]) -> None:
    """Zero the weights that read silenced channels, in place."""
    for name, channels in silenced.items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d | nn.Linear) and getattr(layer, "groups", 1) == 1:
            with torch.no_grad():
                layer.weight[:, list(channels)] = 0


def _bytes_of(trace: Trace, model: nn.Module, batch: Tensor) -> int:
    """What is held of one batch at the worst moment: results of the dense network and of its twin, and a step's own."""
    fixed = trace.inputs(model)
    values: dict[Node, Any] = {trace.entrance: batch}
    most = 0
    for _ in trace.walk(values, fixed):
        most = max(
            most, sum(tensor.nbytes for tensor in tree_leaves(list(values.values())) if isinstance(tensor, Tensor))
        )
    return 3 * most
