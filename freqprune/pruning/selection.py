"""Scores → filters kept. Pure functions; nothing here touches a network."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from freqprune.errors import InputError
from freqprune.pruning.amount import Amount

# Shares that differ by less are equal: an amount that is met exactly is met.
ROUNDING = 1e-9

Kept = dict[str, Tensor]
"""Filters kept a layer: sorted int64 indices into the dense layer."""


class NothingToRemoveError(InputError):
    """All filters score above a threshold."""


def select(
    scores: Mapping[str, Tensor],
    amount: Amount,
    macs: Callable[[Mapping[str, int]], float] | None = None,
    whole: Collection[str] = (),
    ranked_by: Callable[[Mapping[str, int]], float] | None = None,
) -> Kept:
    """Choose the filters to keep.

    Filters go in order of their score, lowest first; equal scores in order of layer and filter. A filter whose layer is
    at its floor stays, and the next one goes instead.

    Args:
        scores: one finite score a filter, ``(n_filters,)`` a layer, of all layers that may lose filters.
        amount: how much to remove.
        macs: MACs of the network for given numbers of kept filters, or, for an amount of time, its milliseconds;
            needed for these amounts and ``scope="per_mac"`` or ``"per_ms"``.
        whole: names that stand for residual blocks, which may lose their only filter.
        ranked_by: what ``scope="per_mac"`` ranks by where `macs` is time.

    Returns:
        Kept filters of every layer in `scores`.

    Raises:
        InputError: if the cut would remove nothing or everything, or cannot be reached above the floors.
    """
    if not scores:
        raise InputError("no layer may lose filters; check pruning.layers")
    for layer, score in scores.items():
        if score.dim() != 1 or not len(score) or not torch.isfinite(score).all():
            raise InputError(f"scores of {layer!r} must be finite and of shape (n_filters,), got {tuple(score.shape)}")
    if whole:
        amount.check_blocks()
    low = min(float(score.min()) for score in scores.values())
    if amount.scope in ("per_mac", "per_ms") and low < 0:
        raise InputError(
            f"pruning.scope = {amount.scope} divides scores by what a filter costs, which turns the order of scores "
            f"below zero round; the lowest here is {low:.4g}: use pruning.scope=global or layer, or another criterion"
        )
    if amount.threshold is not None:
        return _above(scores, amount)
    by_cost = amount.scope in ("per_mac", "per_ms")
    if macs is None and (amount.macs_cut is not None or amount.by_time or by_cost):
        raise InputError(
            "macs_cut and scope=per_mac need the function macs, which counts the MACs for given widths "
            "(freqprune.Plan.macs); latency_cut and scope=per_ms one that gives milliseconds"
        )
    costs = None
    if by_cost and macs is not None:
        cost = ranked_by if ranked_by is not None and amount.scope == "per_mac" else macs
        costs = _cost_of_a_filter(scores, cost, whole, steps=amount.scope == "per_ms")
    blocks = _ranking(scores, amount, costs, whole)
    total = sum(map(len, scores.values()))
    if not blocks:
        raise InputError(
            f"no layer can lose filters: each is at its floor (pruning.min_filters = {amount.min_filters}, "
            f"pruning.multiple_of = {amount.multiple_of})"
        )
    if amount.ratio is not None:
        n_removed, removable = round(amount.ratio * total), sum(len(block.filters) for block in blocks)
        if n_removed > removable:
            raise InputError(
                f"pruning.ratio = {amount.ratio} asks for {n_removed} of {total} filters, but with pruning.min_filters "
                f"= {amount.min_filters} only "
                f"{removable} can go; use at most {_inside(removable / total, math.floor):g}"
            )
        removed = _that_fit(blocks, n_removed)
        if not removed:
            least = min(len(block.filters) for block in blocks)
            raise NothingToRemoveError(
                f"pruning.ratio = {amount.ratio} of {total} filters removes nothing; use at least "
                f"{_inside(least / total, math.ceil):g}"
            )
        return _without(scores, removed)
    assert macs is not None
    if amount.latency_ms is not None:
        raise InputError(
            "pruning.latency_ms counts from what the network takes: cut measures that; give latency_cut here"
        )
    name = "macs_cut" if amount.macs_cut is not None else "latency_cut"
    return _to_macs(scores, blocks, getattr(amount, name), macs, name)


def _inside(share: float, rounded: Callable[[float], int]) -> float:
    """A share in four digits that can be asked for: a largest one rounded down, a least one up."""
    return rounded(share * 1e4 + (-ROUNDING if rounded is math.ceil else ROUNDING)) / 1e4


def remarks(kept: Mapping[str, Tensor], widths: Mapping[str, int], amount: Amount) -> list[str]:
    """What a user should know about a selection: layers that lost nothing, and layers at their floor.

    >>> remarks({"a": torch.arange(4), "b": torch.arange(1)}, {"a": 4, "b": 4}, Amount(ratio=0.4))
    ['1 of 2 layers lost no filter: a', '1 of 2 layers is at its floor of 1 filter: b']
    """
    floor = -(-amount.min_filters // amount.step) * amount.step
    whole = [layer for layer, indices in kept.items() if len(indices) == widths[layer]]
    low = [layer for layer, indices in kept.items() if len(indices) <= floor and layer not in whole]
    found = []
    if whole:
        found.append(f"{len(whole)} of {len(kept)} layers lost no filter: {', '.join(whole)}")
    if low:
        filters = f"{floor} filter{'s' if floor > 1 else ''}"
        everywhere = (
            "every layer is"
            if len(low) == len(kept)
            else f"{len(low)} of {len(kept)} layers {'is' if len(low) == 1 else 'are'}"
        )
        found.append(f"{everywhere} at its floor of {filters}: {', '.join(low)}")
    return found


def _above(scores: Mapping[str, Tensor], amount: Amount) -> Kept:
    threshold, step = amount.threshold, amount.step
    assert threshold is not None
    kept = {}
    for layer, score in scores.items():
        best = score.argsort(descending=True, stable=True)
        count = max(int((score > threshold).sum()), min(amount.min_filters, len(score)))
        kept[layer] = best[: -(-count // step) * step].sort().values
    low, high = min(float(s.min()) for s in scores.values()), max(float(s.max()) for s in scores.values())
    if threshold >= high:
        raise InputError(
            f"pruning.threshold = {threshold:g} would remove every filter: the scores lie between {low:.4g} and "
            f"{high:.4g}; use a lower one"
        )
    if all(len(kept[layer]) == len(score) for layer, score in scores.items()):
        raise NothingToRemoveError(
            f"pruning.threshold = {threshold:g} would remove nothing: the scores lie between {low:.4g} and {high:.4g}; "
            "use a higher one"
        )
    return kept


@dataclass(frozen=True)
class _Bundle:
    """Filters of a layer that go together, after the `number` blocks of that layer before it."""

    key: float
    position: int
    number: int
    layer: str
    filters: list[int]


def _cost_of_a_filter(
    scores: Mapping[str, Tensor],
    macs: Callable[[Mapping[str, int]], float],
    whole: Collection[str] = (),
    steps: bool = False,
) -> dict[str, float]:
    """MACs (or time) that the dense network saves with one filter of each layer: the first or, of what falls in steps,
    one of the first half."""
    dense = {layer: len(score) for layer, score in scores.items()}
    everything = macs(dense)
    found = {}
    for layer, width in dense.items():
        fewer = 0 if layer in whole else width // 2 if steps else width - 1
        saved = everything - macs({**dense, layer: fewer}) if fewer or layer in whole else everything
        found[layer] = saved / (width - fewer)
    return found


def _ranking(
    scores: Mapping[str, Tensor],
    amount: Amount,
    macs: Mapping[str, float] | None = None,
    whole: Collection[str] = (),
) -> list[_Bundle]:
    """Blocks of filters (single ones, unless widths have to be multiples) in the order in which they go, floors
    respected."""
    blocks = []
    step = amount.step
    for position, (layer, score) in enumerate(scores.items()):
        n_filters = len(score)
        values = score.double()
        if amount.normalize:
            mean = values.abs().mean()
            values = values / mean if mean > 0 else values
        if macs is not None:
            # What saves nothing goes last.
            values = values / max(macs[layer], 1e-6 * max(macs.values()), 1e-12)
        ascending = values.argsort(stable=True)
        floor = -(-amount.min_filters // step) * step
        # Dense width first, then the multiples below it.
        widths = [1, 0] if layer in whole else [n_filters, *range((n_filters - 1) // step * step, floor - 1, -step)]
        for number, (wide, narrow) in enumerate(pairwise(widths)):
            filters = ascending[n_filters - wide : n_filters - narrow]
            key = float(values[filters].mean()) if amount.scope != "layer" else (n_filters - narrow) / n_filters
            blocks.append(_Bundle(key, position, number, layer, filters.tolist()))
    return sorted(blocks, key=lambda block: (block.key, block.position, block.number))


def _that_fit(blocks: list[_Bundle], n_filters: int) -> list[_Bundle]:
    """Blocks in order, as long as they hold no more than `n_filters` together; none before those of its layer that come
    first."""
    taken: list[_Bundle] = []
    count: dict[str, int] = {}
    for block in blocks:
        if len(block.filters) <= n_filters and count.get(block.layer, 0) == block.number:
            taken.append(block)
            n_filters -= len(block.filters)
            count[block.layer] = block.number + 1
    return taken


def _without(scores: Mapping[str, Tensor], removed: list[_Bundle]) -> Kept:
    keep = {layer: torch.ones(len(score), dtype=torch.bool) for layer, score in scores.items()}
    for block in removed:
        keep[block.layer][block.filters] = False
    return {layer: flags.nonzero().flatten() for layer, flags in keep.items()}


def _to_macs(
    scores: Mapping[str, Tensor],
    blocks: list[_Bundle],
    cut: float,
    macs: Callable[[Mapping[str, int]], float],
    name: str = "macs_cut",
) -> Kept:
    dense = {layer: len(score) for layer, score in scores.items()}
    everything = macs(dense)
    enough = cut - ROUNDING

    def left(removed: list[_Bundle]) -> dict[str, int]:
        widths = dict(dense)
        for block in removed:
            widths[block.layer] -= len(block.filters)
        return widths

    def cut_by(removed: list[_Bundle]) -> float:
        return 1 - macs(left(removed)) / everything

    if cut_by(blocks) < enough:
        raise InputError(
            f"pruning.{name} = {cut:.4g} cannot be reached: with every layer at pruning.min_filters the cut is "
            f"{cut_by(blocks):.3f}; "
            "let more layers lose filters (pruning.layers, pruning.streams, pruning.blocks) or cut less"
        )
    # Fewest blocks that reach the cut; the cut only grows with every block.
    fewest = bisect_left(range(len(blocks)), True, key=lambda number: cut_by(blocks[:number]) >= enough)
    removed = blocks[:fewest]
    # The last block may overshoot; give back what the cut can spare, best filters first.
    widths, count = left(removed), Counter(block.layer for block in removed)
    spared = set()
    for number in range(len(removed) - 2, -1, -1):
        block = removed[number]
        if block.number != count[block.layer] - 1:
            continue
        widths[block.layer] += len(block.filters)
        if 1 - macs(widths) / everything >= enough:
            spared.add(number)
            count[block.layer] -= 1
        else:
            widths[block.layer] -= len(block.filters)
    return _without(scores, [block for number, block in enumerate(removed) if number not in spared])
