"""How far a network's answer really moves when layers lose filters, measured, one layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import PLAIN, Trace, equal_batches, evaluating, first, hooked, replaced
from freqprune.processes import added_up, own_share
from freqprune.pruning.blocks import shortcuts_of, without_channels
from freqprune.pruning.moments import least_squares
from freqprune.pruning.proof import silence
from freqprune.pruning.surroundings import bias_of, own_bias

Readers = Mapping[str, tuple[Tensor, Tensor, Tensor]]
"""Layers that read a layer's filters: weight, moments and columns, as for
`freqprune.pruning.elimination.elimination_errors`."""


def logit_errors(
    model: nn.Module,
    readers: Readers,
    order: Tensor,
    counts: Sequence[int],
    batches: Sequence[Tensor],
    trace: Trace | None = None,
    shortcuts: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> Tensor:
    """Mean squared change of the logits without the first filters of an order, the others making up for them by least
    squares.

    Args:
        model: a classifier; runs in eval mode, which is restored, as it is left unchanged.
        readers: the layers that read the filters.
        order: filters in the order in which they go, ``(n_filters,)``.
        counts: how many of them are gone, ascending, each from 1 to n_filters.
        batches: network inputs.
        trace: the network's operations for batches as `equal_batches` makes them: what comes before the layers then
            runs once for all counts.
        shortcuts: input channels, filter by filter, of modules without weights that hand the filters on
            (`freqprune.networks.IndexShortcut`), by name: nothing makes up for what these no longer hand on.

    Returns:
        Squared change, summed over the logits, mean over the inputs, ``(n_counts,)``; never below that of fewer filters
        gone.

    Raises:
        InputError: without inputs, or if the network returns no logits.
    """
    if not batches:
        raise InputError("no batch was given to measure the change of the logits on")
    with evaluating(model), torch.no_grad():
        answer = first(model(batches[0]))
    if answer.dim() != 2:
        raise InputError("the network must return logits, (n_images, n_classes), to measure their change")
    modules = dict(model.named_modules())
    solved = [
        {name: _without(modules[name], *reader, order[:count]) for name, reader in readers.items()} for count in counts
    ]
    gone = [order[:count].tolist() for count in counts]
    silenced = [
        {name: [channel for one in some for channel in each[one]] for name, each in (shortcuts or {}).items()}
        for some in gone
    ]
    found = torch.zeros(len(counts), dtype=torch.float64)
    equal = equal_batches(batches)
    own = [batch for _, batch in own_share(equal, or_none=True)]
    with torch.no_grad():
        for outputs in _answers(model, solved, silenced, own, trace):
            found += torch.tensor([float((output - outputs[0]).double().square().sum()) for output in outputs[1:]])
    return (added_up(found) / sum(map(len, equal))).cummax(0).values


def _answers(
    model: nn.Module,
    solved: Sequence[Mapping[str, nn.Module]],
    silenced: Sequence[Mapping[str, Sequence[int]]],
    batches: Sequence[Tensor],
    trace: Trace | None,
) -> Iterator[list[Tensor]]:
    """For each batch the logits of the network and then of the network with each set of layers in the place of its own,
    and some channels of its shortcuts silenced."""
    if trace is None or not all(name in trace.layers.values() for layers in solved for name in layers):
        with evaluating(model):
            for batch in batches:
                outputs = [first(model(batch))]
                for layers, channels in zip(solved, silenced, strict=True):
                    hooks = [(model.get_submodule(name), silence(some), None) for name, some in channels.items()]
                    with replaced(model, layers), hooked(hooks):
                        outputs.append(first(model(batch)))
                yield outputs
        return
    fixed = trace.inputs(model)
    muted = [shortcuts_of(trace, channels) for channels in ({}, *silenced)]
    changed = {node for node, name in trace.layers.items() if name in solved[0]} | {*muted[-1]}
    start = min(at for at, node in enumerate(trace.nodes) if node in changed)
    for batch in batches:
        values: dict[Any, Any] = {trace.entrance: batch}
        _go_on(trace, trace.nodes[:start], values, fixed, {}, {})
        # What comes before the layers is the same for all.
        yield [
            _go_on(trace, trace.nodes[start:], dict(values), fixed, layers, channels)
            for layers, channels in zip(({}, *solved), muted, strict=True)
        ]


def _go_on(
    trace: Trace,
    nodes: Sequence[Any],
    values: dict[Any, Any],
    fixed: Mapping[Any, Tensor],
    layers: Mapping[str, nn.Module],
    muted: Mapping[Any, Sequence[int]],
) -> Any:
    """Run operations, some layers replaced and some channels silenced; the network's answer, once it is there."""

    def instead(node: Any, read: Callable[[Any], Any]) -> Any:
        name = trace.layers.get(node, "")
        layer = layers.get(name)
        if layer is None:
            return without_channels(node, muted[node], read) if node in muted else PLAIN
        bias: Any = layer.bias
        if not own_bias(trace, node):
            # The forward makes it of other parameters, or adds it later: the layer's has, beside its own, the constant
            # alone.
            own = next((fixed[at] for at in fixed if trace.source(at) == f"{name}.bias"), 0.0)
            given = bias_of(node)
            bias = bias - own + (0.0 if given is None else read(given))
        return node.target(read(node.args[0]), layer.weight, bias, *node.args[3:])

    for _ in trace.walk(values, fixed, instead, nodes):
        pass
    return values.get(trace.exit)


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
