"""Scores → filters kept. Pure functions; nothing here touches a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from freqprune.errors import InputError

Kept = dict[str, Tensor]
"""Filters kept a layer: sorted int64 indices into the dense layer."""

SCOPES = ("global", "layer")


@dataclass(frozen=True)
class Amount:
    """How much to remove; exactly one of the first three is set.

    Args:
        ratio: share of the filters to remove, in (0, 1).
        threshold: keep the filters that score above this.
        macs_cut: share of the network's MACs to remove, in (0, 1), met from above as closely as single filters allow.
        scope: ``"global"``: rank the filters of all layers together; ``"layer"``: each layer gives the same share (for `macs_cut` too).
        normalize: divide each layer's scores by their mean before ranking them together.
        min_filters: filters that every layer keeps at least.

    Raises:
        InputError: for none or several amounts, or values out of range.
    """

    ratio: float | None = None
    threshold: float | None = None
    macs_cut: float | None = None
    scope: str = "global"
    normalize: bool = False
    min_filters: int = 1

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("ratio", "threshold", "macs_cut") if getattr(self, name) is not None}
        if len(given) != 1:
            came = ", ".join(f"{name} = {value}" for name, value in given.items()) or "none"
            raise InputError(f"set exactly one of pruning.ratio, pruning.threshold, pruning.macs_cut, got {came}")
        for name in ("ratio", "macs_cut"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise InputError(f"pruning.{name} must lie between 0 (removes nothing) and 1 (removes everything), both excluded, got {value}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise InputError(f"pruning.threshold must be a finite score, got {self.threshold}")
        if self.scope not in SCOPES:
            raise InputError(f"pruning.scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")
        if self.min_filters < 1:
            raise InputError(f"pruning.min_filters must be at least 1, got {self.min_filters}: a layer without filters cuts the network in two")
        if self.threshold is not None and self.normalize:
            raise InputError("pruning.threshold is an absolute score; it cannot be combined with pruning.normalize=true")


def select(scores: Mapping[str, Tensor], amount: Amount, macs: Callable[[Mapping[str, int]], float] | None = None) -> Kept:
    """Choose the filters to keep.

    Filters go in order of their score, lowest first; equal scores in order of layer and filter. A filter whose layer is at its floor stays, and
    the next one goes instead.

    Args:
        scores: one finite score a filter, ``(n_filters,)`` a layer, of all layers that may lose filters.
        amount: how much to remove.
        macs: MACs of the network for given numbers of kept filters; needed for `Amount.macs_cut`.

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
    if amount.threshold is not None:
        return _above(scores, amount.threshold, amount.min_filters)
    order = _ranking(scores, amount)
    total = sum(map(len, scores.values()))
    if amount.ratio is not None:
        n_removed = round(amount.ratio * total)
        if n_removed == 0:
            raise InputError(f"pruning.ratio = {amount.ratio} of {total} filters removes nothing; use at least {1 / total:.2g}")
        if n_removed > len(order):
            raise InputError(
                f"pruning.ratio = {amount.ratio} asks for {n_removed} of {total} filters, but with pruning.min_filters = {amount.min_filters} only "
                f"{len(order)} can go; use at most {len(order) / total:.3f}"
            )
        return _without(scores, order[:n_removed])
    assert amount.macs_cut is not None
    if macs is None:
        raise InputError("macs_cut needs the function macs, which counts the MACs for given widths (freqprune.surgery.Plan.macs)")
    return _to_macs(scores, order, amount.macs_cut, macs)


def _above(scores: Mapping[str, Tensor], threshold: float, min_filters: int) -> Kept:
    kept = {}
    for layer, score in scores.items():
        best = score.argsort(descending=True, stable=True)
        count = max(int((score > threshold).sum()), min(min_filters, len(score)))
        kept[layer] = best[:count].sort().values
    low, high = min(float(s.min()) for s in scores.values()), max(float(s.max()) for s in scores.values())
    if threshold >= high:
        raise InputError(f"pruning.threshold = {threshold:g} would remove every filter: the scores lie between {low:.4g} and {high:.4g}; use a lower one")
    if all(len(kept[layer]) == len(score) for layer, score in scores.items()):
        raise InputError(f"pruning.threshold = {threshold:g} would remove nothing: the scores lie between {low:.4g} and {high:.4g}; use a higher one")
    return kept


def _ranking(scores: Mapping[str, Tensor], amount: Amount) -> list[tuple[str, int]]:
    """Filters in the order in which they go, floors respected."""
    rows: list[tuple[float, int, str, int]] = []
    for position, (layer, score) in enumerate(scores.items()):
        n_filters = len(score)
        values = score.double()
        if amount.normalize:
            mean = values.abs().mean()
            values = values / mean if mean > 0 else values
        ascending = values.argsort(stable=True).tolist()
        for rank, index in enumerate(ascending[: max(0, n_filters - amount.min_filters)]):
            key = float(values[index]) if amount.scope == "global" else (rank + 1) / n_filters
            rows.append((key, position, layer, index))
    rows.sort(key=lambda row: (row[0], row[1]))
    return [(layer, index) for _, _, layer, index in rows]


def _without(scores: Mapping[str, Tensor], removed: list[tuple[str, int]]) -> Kept:
    keep = {layer: torch.ones(len(score), dtype=torch.bool) for layer, score in scores.items()}
    for layer, index in removed:
        keep[layer][index] = False
    return {layer: flags.nonzero().flatten() for layer, flags in keep.items()}


def _to_macs(scores: Mapping[str, Tensor], order: list[tuple[str, int]], cut: float, macs: Callable[[Mapping[str, int]], float]) -> Kept:
    dense = {layer: len(score) for layer, score in scores.items()}
    whole = macs(dense)

    def cut_after(n_removed: int) -> float:
        widths = dict(dense)
        for layer, _ in order[:n_removed]:
            widths[layer] -= 1
        return 1 - macs(widths) / whole

    if cut_after(len(order)) < cut:
        raise InputError(
            f"pruning.macs_cut = {cut} cannot be reached: with every layer at pruning.min_filters the cut is {cut_after(len(order)):.3f}; "
            "let more layers lose filters (pruning.layers) or cut less"
        )
    low, high = 0, len(order)
    while low < high:  # fewest filters that reach the cut; the cut only grows with every filter
        middle = (low + high) // 2
        low, high = (low, middle) if cut_after(middle) >= cut else (middle + 1, high)
    return _without(scores, order[:low])
