"""What a criterion may look at, and the table of criteria by name.

A criterion is a function of `Evidence` and a layer name that returns one score a filter, higher for filters to keep.
Add one by decorating it with `criterion`; those of the package are in `freqprune.pruning.criteria`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.errors import InputError, closest
from freqprune.networks import Trace, copied, equal_batches, first
from freqprune.pruning.blocks import answers_without
from freqprune.pruning.graph import ChannelGraph, Unit
from freqprune.tagging import Stimulus, TagResponse

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at.

    Attributes:
        model: the network to be pruned.
        response: its response to the tags; None for criteria that do not need one.
        components: response components that the tag criteria read, see `freqprune.tagging.components.find_components`.
        seed: for criteria that draw.
        graph: what depends on which filters, for criteria that look at more than a layer's own weights.
        moments: second moments of the inputs of the layers that read the filters, see
            `freqprune.pruning.moments.input_moments`.
        gradients_at: second moments of the gradients at the outputs of those layers, see
            `freqprune.pruning.moments.output_gradients`.
        labelled: batches of network inputs and class labels, for criteria that need gradients or activations.
        frames: batches of network inputs, e.g. tagged frames, for criteria that measure what becomes of the network's
            answer.
        short: of layers whose moments come from fewer samples than the layer has unknowns, how many are missing.
    """

    model: nn.Module
    response: TagResponse | None = None
    components: Sequence[str] | str = "fundamentals"
    seed: int = 0
    graph: ChannelGraph | None = None
    moments: Mapping[str, Tensor] | None = None
    gradients_at: Mapping[str, Tensor] | None = None
    labelled: Sequence[tuple[Tensor, Tensor]] = ()
    frames: Sequence[Tensor] = ()
    short: Mapping[str, int] = field(default_factory=dict)

    def weight(self, layer: str) -> Tensor:
        """Weight of a layer as ``(n_filters, n_weights)``."""
        module = self.model.get_submodule(layer)
        weight = module.weight
        assert isinstance(weight, Tensor)
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            # Inputs first, and of the outputs those of one group.
            weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight.detach().flatten(1).cpu().double()

    def tags(self) -> TagResponse:
        assert self.response is not None, "criteria that need tags are checked before they run"
        return self.response

    def _unit(self, layer: str) -> Unit | None:
        return None if self.graph is None else self.graph.units.get(layer)

    def members(self, layer: str) -> tuple[str, ...]:
        """Layers whose filters go together with those of `layer`; the layer alone without a graph."""
        unit = self._unit(layer)
        return (layer,) if unit is None else unit.members

    def lengths(self, layer: str) -> set[int]:
        """How many scores there may be of a layer: one a filter, or one a channel; any number of what is neither a
        convolution nor linear."""
        unit = self._unit(layer)
        if unit is not None:
            return {unit.n_filters, unit.n_filters * unit.width}
        module = dict(self.model.named_modules()).get(layer)
        return {len(self.weight(layer))} if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) else set()

    def by_filter(self, layer: str, values: Tensor) -> Tensor:
        """Values of the channels of a unit, last dimension, as those of its filters: the mean over the channels that
        are one filter. Criteria that look at whole units give values of filters already."""
        unit = self._unit(layer)
        if unit is None or unit.width == 1 or values.shape[-1] == unit.n_filters:
            return values
        return unit.by_filter(values)

    @cached_property
    def trace(self) -> Trace | None:
        """The network's operations for batches of the frames; None for a network that cannot be traced, or whose
        operations do not come to its answer, as where it writes into a slice."""
        batch = equal_batches(self.frames)[0]
        try:
            trace = Trace(self.model, batch)
            with torch.no_grad():
                answer = answers_without(trace, trace.inputs(self.model), batch, ())
            trace.check(self.model, batch, answer, "it is run as a whole")
        except InputError:
            return None
        return trace

    @cached_property
    def gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of every parameter, over the labelled images: gradient of the mean loss, and mean squared gradient of the
        single losses."""
        means: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        twin = copied(self.model).eval().requires_grad_(True)
        n_images = sum(len(labels) for _, labels in self.labelled)
        for images, labels in self.labelled:
            for image, label in zip(images, labels, strict=True):
                # In eval mode modules may keep what they made of their parameters, and let go of it when it is set.
                twin.eval().zero_grad()
                nn.functional.cross_entropy(first(twin(image[None])), label[None]).backward()
                for name, parameter in twin.named_parameters():
                    if parameter.grad is not None:
                        # Squares of what half precision still holds are zeros there.
                        wide = torch.promote_types(parameter.dtype, torch.float32)
                        gradient = parameter.grad.to(wide) / n_images
                        means[name] = means[name] + gradient if name in means else gradient.clone()
                        square = gradient.square() * n_images
                        squares[name] = squares[name] + square if name in squares else square
        return {name: (means[name], squares[name]) for name in means}


Criterion = Callable[[Evidence, str], Tensor]

# Of these a response to the tags has all.
OF_TAGS = frozenset({"tags", "noise", "intermodulation"})
NEEDS = ("tags", "noise", "intermodulation", "graph", "moments", "logits", "gradients", "labels", "loss", "frames")


@dataclass(frozen=True)
class _Entry:
    score: Criterion
    needs: frozenset[str]


_CRITERIA: dict[str, _Entry] = {}


def _table() -> dict[str, _Entry]:
    """The table, filled: a function of this module may come to a fresh process by itself, as pickle brings it."""
    import_module("freqprune.pruning.criteria")
    return _CRITERIA


def criterion(name: str, *needs: str) -> Callable[[Criterion], Criterion]:
    """Register a function ``(evidence, layer) -> (n_filters,)`` as ``importance.criterion=<name>``.

    Args:
        name: the name.
        needs: what it reads of the `Evidence` beside the network: ``"tags"`` (the response), ``"noise"`` (a response
            measured with noise), ``"intermodulation"`` (one to parts that combine), ``"graph"``, ``"moments"``,
            ``"logits"`` (a classifier's answer), ``"gradients"`` (of the logits), ``"labels"`` (labelled images),
            ``"loss"`` (gradients of the cross-entropy of these), ``"frames"``.
    """
    unknown = sorted(set(needs) - set(NEEDS))
    if unknown:
        raise InputError(f"criterion {name!r} needs {unknown[0]!r}, expected some of {', '.join(NEEDS)}")

    def register(score: Criterion) -> Criterion:
        implied = {"tags"} if {"noise", "intermodulation"} & set(needs) else set()
        implied |= {"graph"} if {"moments", "gradients"} & set(needs) else set()
        implied |= {"logits"} if {"gradients", "loss"} & set(needs) else set()
        implied |= {"labels"} if "loss" in needs else set()
        _CRITERIA[name] = _Entry(score, frozenset(needs) | implied)
        return score

    return register


def criterion_names() -> list[str]:
    """Names of all registered criteria."""
    return list(_table())


def needs(name: str) -> frozenset[str]:
    """What a criterion reads, some of `NEEDS`.

    Raises:
        InputError: for an unknown name.
    """
    if name not in _table():
        raise InputError(
            f"importance.criterion must be one of {', '.join(_CRITERIA)}, got {name!r}{closest(name, _CRITERIA)}"
        )
    return _CRITERIA[name].needs


def check_components(name: str, stimulus: Stimulus) -> None:
    """Raise InputError where a criterion reads how parts combine and a stimulus has nothing of it."""
    mixed = any(component.kind == "intermodulation" for component in stimulus.components)
    if "intermodulation" in needs(name) and not mixed:
        raise InputError(
            f"importance.criterion = {name} reads intermodulation components, and the stimulus has none; give it two "
            "parts or more and max_order of at least 2, or use another criterion"
        )


def _check_noise(name: str, evidence: Evidence) -> None:
    """Raise InputError for a response without noise; warn of one with so little that most scores are lower bounds."""
    response = evidence.tags()
    if response.noise_std == 0:
        raise InputError(
            f"criterion {name!r} compares with noise, and the noise bins hold rounding error only (noise_std = 0); tag "
            "with noise (the default is 0.02) or use importance=amplitude"
        )
    words = [word for layer in response.layers for word in response.why_no_snr(layer, evidence.components)]
    answering = len(words) - words.count("dead")
    # Single filters that hardly leave their mean are such in any network.
    if words.count("noise-free") > answering / 2:
        log.warning(
            "the noise bins of %d of %d filters that answer the tags hold rounding error only (noise_std = %g): their "
            "ratios to noise count by what they are at least; tag with more noise (tagging.noise_std), or use "
            "importance=amplitude",
            words.count("noise-free"), answering, response.noise_std,
        )  # fmt: skip


def _shaped(name: str, evidence: Evidence, layer: str, values: Tensor) -> Tensor:
    """The scores of a layer, of which there are as many as it has filters."""
    lengths = evidence.lengths(layer)
    if values.dim() != 1 or (lengths and len(values) not in lengths):
        raise InputError(
            f"criterion {name!r} gives {layer!r} scores of shape {tuple(values.shape)}, expected one for each of its "
            f"{min(lengths, default='')} filters; what it reads has to be of this network as it is now"
        )
    return values.double()


def scores(
    name: str,
    evidence: Evidence,
    layers: Sequence[str],
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> dict[str, Tensor]:
    """Score of every filter of `layers` by a named criterion, float64 ``(n_filters,)`` a layer.

    Where the filters of several layers go together (a residual stream), a filter scores the largest of theirs.

    Raises:
        InputError: for an unknown criterion, evidence that it lacks, layers that were not recorded, or scores that are
            not one a filter, or undefined (an SNR measured without noise).
    """
    wanted = needs(name)
    for what, there, way in (
        ("tags", evidence.response is not None, "reads the response to the tags: pass Evidence(response=tag(...))"),
        (
            "graph",
            evidence.graph is not None,
            "looks at all weights that go with a filter: pass Evidence(graph=freqprune.ChannelGraph(model, example))",
        ),
        (
            "moments",
            evidence.moments is not None,
            "reads what the next layers read: pass Evidence(moments=input_moments(...))",
        ),
        (
            "gradients",
            evidence.gradients_at is not None,
            "weighs them with gradients: pass Evidence(gradients_at=output_gradients(...))",
        ),
        (
            "frames",
            bool(evidence.frames),
            "measures the change of the logits on them: pass Evidence(frames=[batch, ...])",
        ),
        ("labels", bool(evidence.labelled), "reads labelled images: pass Evidence(labelled=[(images, labels), ...])"),
    ):
        if what in wanted and not there:
            raise InputError(f"criterion {name!r} {way}")
    if evidence.response is not None and "tags" in wanted:
        check_components(name, evidence.response.stimulus)
        unread = [
            member for layer in layers for member in evidence.members(layer) if member not in evidence.response.layers
        ]
        if unread:
            raise InputError(
                f"criterion {name!r} needs the response of {', '.join(unread)}, which tagging.layers leaves out"
            )
        if "noise" in wanted:
            _check_noise(name, evidence)
    score = _CRITERIA[name].score
    found = {}
    said = [f"ranking the filters of {layer}" for layer in layers]
    for layer, _ in zip(layers, progress(said) if progress is not None else said, strict=True):
        members = [layer] if wanted & {"graph", "moments"} else list(evidence.members(layer))
        of_members = torch.stack([_shaped(name, evidence, layer, score(evidence, member)) for member in members])
        found[layer] = evidence.by_filter(layer, of_members).amax(0)
    for layer, values in found.items():
        if not torch.isfinite(values).all():
            raise InputError(
                f"criterion {name!r} is undefined for {int((~torch.isfinite(values)).sum())} of {len(values)} filters "
                f"of {layer!r}"
            )
    return found
