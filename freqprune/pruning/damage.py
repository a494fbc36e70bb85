"""How far a network's answer really moves when layers lose filters, measured, one layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import evaluating, replaced
from freqprune.pruning.moments import least_squares

Readers = Mapping[str, tuple[Tensor, Tensor, Tensor]]
"""Layers that read a layer's filters: weight, moments and columns, as for
`freqprune.pruning.elimination.elimination_errors`."""


def logit_errors(
    model: nn.Module, readers: Readers, order: Tensor, counts: Sequence[int], batches: Sequence[Tensor]
) -> Tensor:
    """Mean squared change of the logits without the first filters of an order, the others making up for them by least
    squares.

    Args:
        model: a classifier; runs in eval mode, which is restored, as it is left unchanged.
        readers: the layers that read the filters.
        order: filters in the order in which they go, ``(n_filters,)``.
        counts: how many of them are gone, ascending, each from 1 to n_filters.
        batches: network inputs.

    Returns:
        Squared change, summed over the logits, mean over the inputs, ``(n_counts,)``; never below that of fewer filters
        gone.

    Raises:
        InputError: without inputs, or if the network returns no logits.
    """
    if not batches:
        raise InputError("no batch was given to measure the change of the logits on")
    modules = dict(model.named_modules())
    found = []
    with evaluating(model), torch.no_grad():
        answers = [model(batch) for batch in batches]
        if not isinstance(answers[0], Tensor) or answers[0].dim() != 2:
            raise InputError("the network must return logits, (n_images, n_classes), to measure their change")
        for count in counts:
            stand_ins = {name: _without(modules[name], *reader, order[:count]) for name, reader in readers.items()}
            with replaced(model, stand_ins):
                changes = [
                    (model(batch) - answer).double().square().sum()
                    for batch, answer in zip(batches, answers, strict=True)
                ]
            found.append(float(sum(changes)) / sum(map(len, batches)))
    return torch.tensor(found, dtype=torch.float64).cummax(0).values


def _without(layer: nn.Module, weight: Tensor, moments: Tensor, columns: Tensor, gone: Tensor) -> nn.Module:
    """The layer with zero weights on the removed filters and least-squares weights on the others."""
    stays = torch.ones(weight.shape[1], dtype=torch.bool)
    stays[columns[gone].flatten()] = False
    solved, constant = least_squares(weight, moments, stays.nonzero().flatten())
    twin = copy.deepcopy(layer)
    assert isinstance(twin, nn.Conv2d | nn.Linear)
    whole = weight.new_zeros(weight.shape).double()
    whole[:, stays] = solved
    constant = constant if twin.bias is None else constant + twin.bias.detach().cpu().double()
    twin.weight = nn.Parameter(whole.view_as(twin.weight).to(twin.weight))
    twin.bias = nn.Parameter(constant.to(twin.weight))
    return twin


def corrected(estimates: Tensor, order: Tensor, counts: Sequence[int], measured: Tensor) -> Tensor:
    """Estimated errors of single filters, scaled between the measured points so that their sums are what was measured.

    Args:
        estimates: error of each filter, ``(n_filters,)``.
        order: filters in the order in which they go.
        counts: ascending, how many filters were gone at each measured point, the last all of them.
        measured: error at each point, ``(n_counts,)``, not falling.

    Returns:
        Errors ``(n_filters,)``, never below that of a filter before it in the order; where that lifts one, sums are
        above what was measured.
    """
    steps = estimates[order].clone()
    start, before = 0, 0.0
    for count, value in zip(counts, measured.tolist(), strict=True):
        estimated = float(steps[start:count].sum())
        share = (
            steps[start:count] / estimated
            if estimated > 0
            else torch.full((count - start,), 1 / (count - start), dtype=steps.dtype)
        )
        steps[start:count] = share * (value - before)
        start, before = count, value
    found = torch.empty_like(steps)
    found[order] = steps.cummax(0).values
    return found
