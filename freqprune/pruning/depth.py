"""What residual blocks are worth: how far the logits move without them although the other layers make up for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from freqprune.networks import Trace, equal_batches, images_at_once
from freqprune.processes import added_up, own_share, rank_and_size
from freqprune.pruning.blocks import answers_without, find_blocks
from freqprune.pruning.recipe import Reconstruction
from freqprune.pruning.reconstruction import error_without
from freqprune.tagging import Progress, in_sight

# Making up for blocks on the way to their scores: one pass.
ONE_PASS = Reconstruction(rounds=0, positions=64)


def block_scores(
    model: nn.Module,
    images: Sequence[Tensor],
    how: Reconstruction | None = ONE_PASS,
    progress: Progress | None = None,
    among: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Squared change of the logits that each residual block adds when it goes, the least first: on the scale of
    `logit_error`.

    Blocks are taken away one by one, each time the one without which the logits move least, together with those that
    are gone already; the change is then measured after making up for them (`reconstruct`), and a block scores what it
    adds to it, or what the block before it added, if that was more.

    Args:
        model: a classifier.
        images: batches of network inputs.
        how: how blocks are made up for; None: not at all, as by a cut that does not.
        progress: wraps the iteration over the blocks, for a progress bar.
        among: names of the blocks that may go; all if left out.

    Returns:
        ``(1,)`` for each block, by name, in the order of the network.
    """
    everything = torch.cat(list(images))
    # A batch at least for each process.
    each = max(1, min(images_at_once(everything), len(everything) // rank_and_size()[1]))
    batches = equal_batches([everything], each)
    trace = Trace(model, batches[0])
    blocks, fixed = find_blocks(model, trace), trace.inputs(model)
    blocks = {name: block for name, block in blocks.items() if among is None or name in among}
    gone: list[str] = []
    found: dict[str, Tensor] = {}
    before = last = 0.0
    with torch.no_grad():
        own = [batch for _, batch in own_share(batches)]
        dense = [answers_without(trace, fixed, batch, ()) for batch in own]
        trace.check(model, own[0], dense[0], "use pruning.blocks=false")
        for _ in in_sight(list(blocks), "ranking blocks", progress):
            change = {}
            for name in blocks:
                if name not in gone:
                    without = [blocks[one] for one in (*gone, name)]
                    answers = [answers_without(trace, fixed, batch, without) for batch in own]
                    moved = sum(float((a - b).double().square().sum()) for a, b in zip(answers, dense, strict=True))
                    change[name] = float(added_up(torch.tensor(moved, dtype=torch.float64)))
            gone.append(min(change, key=change.__getitem__))
            bare = change[gone[-1]] / sum(map(len, batches))
            now = bare if how is None else error_without(model, gone, batches, how, trace)
            last = max(last, now - before)
            before = max(before, now)
            found[gone[-1]] = torch.tensor([last], dtype=torch.float64)
    return {name: found[name] for name in blocks}
