"""Response → one score a filter; the criteria to compare with; the adapter for torch-pruning's own pruners.

A criterion is a function of `Evidence` and a layer name that returns one score a filter, higher for filters to keep. Add one by decorating it
with `criterion`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from freqprune.damage import corrected, logit_errors
from freqprune.errors import InputError, closest
from freqprune.graph import ChannelGraph
from freqprune.moments import columns_of, elimination_errors
from freqprune.recording import Recorder, map_mean
from freqprune.response import TagResponse
from freqprune.sites import find_sites


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at.

    Attributes:
        model: the network to be pruned.
        response: its response to the tags; None for criteria that do not need one.
        components: response components that the tag criteria read, see `freqprune.components.find_components`.
        seed: for criteria that draw.
        graph: what depends on which filters, for criteria that look at more than a layer's own weights.
        moments: second moments of the inputs of the layers that read the filters, see `freqprune.moments.input_moments`.
        gradients_at: second moments of the gradients at the outputs of those layers, see `freqprune.moments.output_gradients`.
        labelled: batches of network inputs and class labels, for criteria that need gradients or activations.
        frames: batches of network inputs, e.g. tagged frames, for criteria that measure what becomes of the network's answer.
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

    def weight(self, layer: str) -> Tensor:
        """Weight of a layer as ``(n_filters, n_weights)``."""
        weight = self.model.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        return weight.detach().flatten(1).double().cpu()

    def tags(self) -> TagResponse:
        assert self.response is not None, "criteria that need tags are checked before they run"
        return self.response

    def members(self, layer: str) -> tuple[str, ...]:
        """Layers whose filters go together with those of `layer`; the layer alone without a graph."""
        units = {} if self.graph is None else self.graph.units
        return units[layer].members if layer in units else (layer,)

    @cached_property
    def gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of every parameter, over the labelled images: gradient of the mean loss, and mean squared gradient of the single losses."""
        first: dict[str, Tensor] = {}
        second: dict[str, Tensor] = {}
        twin = copy.deepcopy(self.model).eval().requires_grad_(True)
        n_images = sum(len(labels) for _, labels in self.labelled)
        for images, labels in self.labelled:
            for image, label in zip(images, labels, strict=True):
                twin.zero_grad()
                nn.functional.cross_entropy(twin(image[None]), label[None]).backward()
                for name, parameter in twin.named_parameters():
                    if parameter.grad is not None:
                        gradient = parameter.grad / n_images
                        first[name] = first[name] + gradient if name in first else gradient.clone()
                        square = gradient.square() * n_images
                        second[name] = second[name] + square if name in second else square
        return {name: (first[name], second[name]) for name in first}


Criterion = Callable[[Evidence, str], Tensor]

NEEDS = ("tags", "noise", "graph", "moments", "gradients", "labels", "frames")


@dataclass(frozen=True)
class _Entry:
    score: Criterion
    needs: frozenset[str]


_CRITERIA: dict[str, _Entry] = {}


def criterion(name: str, *needs: str) -> Callable[[Criterion], Criterion]:
    """Register a function ``(evidence, layer) -> (n_filters,)`` as ``importance.criterion=<name>``.

    Args:
        name: the name.
        needs: what it reads of the `Evidence` beside the network: ``"tags"`` (the response), ``"noise"`` (a response measured with noise),
            ``"graph"``, ``"moments"``, ``"gradients"`` (of the logits), ``"labels"``, ``"frames"``.
    """
    unknown = sorted(set(needs) - set(NEEDS))
    if unknown:
        raise InputError(f"criterion {name!r} needs {unknown[0]!r}, expected some of {', '.join(NEEDS)}")

    def register(score: Criterion) -> Criterion:
        implied = {"tags"} if "noise" in needs else set()
        implied |= {"graph"} if {"moments", "gradients"} & set(needs) else set()
        _CRITERIA[name] = _Entry(score, frozenset(needs) | implied)
        return score

    return register


def criterion_names() -> list[str]:
    """Names of all registered criteria."""
    return list(_CRITERIA)


def needs(name: str) -> frozenset[str]:
    """What a criterion reads, some of `NEEDS`.

    Raises:
        InputError: for an unknown name.
    """
    if name not in _CRITERIA:
        raise InputError(f"importance.criterion must be one of {', '.join(_CRITERIA)}, got {name!r}{closest(name, _CRITERIA)}")
    return _CRITERIA[name].needs


def scores(name: str, evidence: Evidence, layers: Sequence[str]) -> dict[str, Tensor]:
    """Score of every filter of `layers` by a named criterion, float64 ``(n_filters,)`` a layer.

    Where the filters of several layers go together (a residual stream), a filter scores the largest of theirs.

    Raises:
        InputError: for an unknown criterion, evidence that it lacks, layers that were not recorded, or scores that are undefined (an SNR measured
            without noise).
    """
    wanted = needs(name)
    for what, there, way in (
        ("tags", evidence.response is not None, "reads the response to the tags: pass Evidence(response=tag(...))"),
        ("graph", evidence.graph is not None, "looks at all weights that go with a filter: pass Evidence(graph=ChannelGraph(model, example))"),
        ("moments", evidence.moments is not None, "reads what the next layers read: pass Evidence(moments=input_moments(...))"),
        ("gradients", evidence.gradients_at is not None, "weighs them with gradients: pass Evidence(gradients_at=output_gradients(...))"),
        ("frames", bool(evidence.frames), "measures the change of the logits on them: pass Evidence(frames=[batch, ...])"),
        ("labels", bool(evidence.labelled), "reads labelled images: pass Evidence(labelled=[(images, labels), ...])"),
    ):
        if what in wanted and not there:
            raise InputError(f"criterion {name!r} {way}")
    if evidence.response is not None and "tags" in wanted:
        unread = [member for layer in layers for member in evidence.members(layer) if member not in evidence.response.layers]
        if unread:
            raise InputError(f"criterion {name!r} needs the response of {', '.join(unread)}, which tagging.layers leaves out")
    score = _CRITERIA[name].score
    found = {}
    for layer in layers:
        members = [layer] if wanted & {"graph", "moments"} else list(evidence.members(layer))
        found[layer] = torch.stack([score(evidence, member).double() for member in members]).amax(0)
    for layer, values in found.items():
        if not torch.isfinite(values).all():
            raise InputError(f"criterion {name!r} is undefined for {int((~torch.isfinite(values)).sum())} of {len(values)} filters of {layer!r}")
    return found


def _defined_snr(evidence: Evidence, layer: str) -> Tensor:
    """SNR with dead filters at 0."""
    response = evidence.tags()
    why = response.why_no_snr(layer, evidence.components)
    if response.noise_std == 0 or why.count("noise-free") > len(why) / 2:
        raise InputError(
            f"the SNR of {why.count('noise-free')} filters of {layer!r} is undefined: their noise bins hold rounding error only (noise_std = "
            f"{response.noise_std:g}); tag with more noise (the default is 0.02) or use importance=amplitude"
        )
    return response.snr(layer, evidence.components).nan_to_num(nan=0.0)


@criterion("snr", "noise")
def snr_score(evidence: Evidence, layer: str) -> Tensor:
    """Mean SNR over the components (Böge et al. 2024); 0 for a dead filter."""
    return _defined_snr(evidence, layer).mean(-1)


@criterion("snr_db", "noise")
def snr_db_score(evidence: Evidence, layer: str) -> Tensor:
    """Mean over the components of 20 log10 SNR in decibels; a dead filter counts as -120 dB."""
    return (20 * _defined_snr(evidence, layer).clamp(min=1e-6).log10()).mean(-1)


@criterion("amplitude", "tags")
def amplitude_score(evidence: Evidence, layer: str) -> Tensor:
    """Sum over the components of the clean amplitude of the mean response."""
    return evidence.tags().amplitude(layer, evidence.components).sum(-1)


@criterion("z", "noise")
def z_criterion(evidence: Evidence, layer: str) -> Tensor:
    """Mean over the components of the amplitude in standard deviations of ten noise bins a side; 0 for a dead filter."""
    return evidence.tags().z_score(layer, evidence.components).nan_to_num(nan=0.0).mean(-1)


@criterion("corrected_amplitude", "noise")
def corrected_amplitude_score(evidence: Evidence, layer: str) -> Tensor:
    """Baseline-corrected amplitude summed over all harmonics (Retter, Rossion & Schiltz 2021)."""
    return evidence.tags().corrected_amplitude(layer, "harmonics")


@criterion("integration", "tags")
def integration_score(evidence: Evidence, layer: str) -> Tensor:
    """Intermodulation over fundamentals: how much a filter combines the parts, whatever its gain; 0 for a dead filter."""
    return evidence.tags().integration(layer).nan_to_num(nan=0.0)


@criterion("intermodulation", "tags")
def intermodulation_score(evidence: Evidence, layer: str) -> Tensor:
    """Sum of the clean amplitudes at all intermodulation components, whatever components are chosen: how much a filter integrates."""
    return evidence.tags().amplitude(layer, "intermodulation").sum(-1)


@criterion("l1")
def l1_score(evidence: Evidence, layer: str) -> Tensor:
    """L1 norm of the filter's weights (Li et al. 2017, arXiv 1608.08710)."""
    return evidence.weight(layer).abs().sum(1)


@criterion("l2")
def l2_score(evidence: Evidence, layer: str) -> Tensor:
    """L2 norm of the filter's weights."""
    return evidence.weight(layer).norm(dim=1)


@criterion("random")
def random_score(evidence: Evidence, layer: str) -> Tensor:
    """Uniform noise: the control that any criterion has to beat."""
    names = [name for name, _ in evidence.model.named_modules()]
    generator = torch.Generator().manual_seed(evidence.seed * 1_000_003 + names.index(layer))
    return torch.rand(len(evidence.weight(layer)), generator=generator, dtype=torch.float64)


@criterion("activation", "labels")
def activation_score(evidence: Evidence, layer: str) -> Tensor:
    """Mean absolute activation over images and positions, after the activation function."""
    images = torch.cat([images for images, _ in evidence.labelled])
    total: Tensor | float = 0.0
    with Recorder(evidence.model, find_sites(evidence.model, images[:1], [layer]), lambda output, dim: map_mean(output.abs(), dim)) as recorder:
        for batch in images.split(64):
            total = total + recorder(batch)[layer].double().sum(0).cpu()
    assert isinstance(total, Tensor)
    return total / len(images)


@criterion("redundancy", "moments")
def redundancy_score(evidence: Evidence, layer: str) -> Tensor:
    """What the other filters cannot make up for in the layers that read this one, see `freqprune.moments.elimination_errors`."""
    return _elimination_errors(evidence, layer, None)


@criterion("logit_error", "moments", "gradients", "frames")
def logit_error_score(evidence: Evidence, layer: str) -> Tensor:
    """`logit_redundancy`, scaled at every eighth of a layer to how far the logits really move over the frames given, see `freqprune.damage`."""
    estimates = logit_redundancy_score(evidence, layer)
    order, n_filters = estimates.argsort(stable=True), len(estimates)
    counts = sorted({-(-n_filters * eighth // 8) for eighth in range(1, 9)})
    return corrected(estimates, order, counts, logit_errors(evidence.model, _readers(evidence, layer), order, counts, evidence.frames))


@criterion("logit_redundancy", "moments", "gradients")
def logit_redundancy_score(evidence: Evidence, layer: str) -> Tensor:
    """How far the logits move without the filter although the others make up for it, squared; compares across layers as it is.

    The structured optimal brain surgeon (Hassibi & Stork 1993) with a Kronecker-factored Gauss-Newton matrix (Martens & Grosse 2015).
    """
    return _elimination_errors(evidence, layer, evidence.gradients_at)


def _elimination_errors(evidence: Evidence, layer: str, gradients: Mapping[str, Tensor] | None) -> Tensor:
    readers = _readers(evidence, layer)
    missing = [] if gradients is None else [reader for reader in readers if reader not in gradients]
    if missing:
        raise InputError(f"no gradients at {missing[0]!r}, which reads the filters of {layer!r}; take them with output_gradients")
    return elimination_errors(readers, gradients)


def _readers(evidence: Evidence, layer: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Weight, moments and columns of the layers that read the filters of `layer`."""
    assert evidence.graph is not None
    assert evidence.moments is not None
    modules = dict(evidence.model.named_modules())
    n_filters = evidence.graph.units[layer].n_filters
    readers = {}
    for reader in evidence.graph.units[layer].readers:
        if reader not in evidence.moments:
            raise InputError(f"no moments of {reader!r}, which reads the filters of {layer!r}; take them with input_moments")
        channels = torch.tensor(evidence.graph.read_channels(layer, range(n_filters))[reader]).view(n_filters, -1)
        columns = torch.stack([columns_of(modules[reader], row.tolist()) for row in channels])
        readers[reader] = (evidence.model.get_parameter(f"{reader}.weight").detach().flatten(1).cpu(), evidence.moments[reader], columns)
    return readers


def _by_torch_pruning(evidence: Evidence, layer: str, importance: Callable[[Any], Any], order: int | None = None) -> Tensor:
    """Score by one of torch-pruning's importances over everything that goes with a filter; `order` 0 or 1 of the gradients it needs."""
    assert evidence.graph is not None
    parameters = dict(evidence.graph.twin.named_parameters())
    for name, parameter in parameters.items():
        parameter.grad = None if order is None or name not in evidence.gradients else evidence.gradients[name][order].to(parameter)
    found = importance(evidence.graph.group(layer))
    for parameter in parameters.values():
        parameter.grad = None
    if not isinstance(found, Tensor):
        raise InputError(f"this criterion finds nothing to score in {layer!r}; use another, e.g. importance=l2")
    return found.detach().cpu()


@criterion("group_l2", "graph")
def group_l2_score(evidence: Evidence, layer: str) -> Tensor:
    """Mean L2 norm of all weights that go with the filter (DepGraph, Fang et al. 2023), by torch-pruning."""
    return _by_torch_pruning(evidence, layer, tp.importance.GroupMagnitudeImportance(p=2, normalizer=None))


@criterion("bn_scale", "graph")
def bn_scale_score(evidence: Evidence, layer: str) -> Tensor:
    """Absolute scale of the batch norms that the filter passes (Network Slimming, Liu et al. 2017), by torch-pruning."""
    return _by_torch_pruning(evidence, layer, tp.importance.BNScaleImportance(normalizer=None))


@criterion("lamp", "graph")
def lamp_score(evidence: Evidence, layer: str) -> Tensor:
    """Layer-adaptive magnitude (LAMP, Lee et al. 2021), by torch-pruning; compares across layers as it is."""
    return _by_torch_pruning(evidence, layer, tp.importance.LAMPImportance())


@criterion("fpgm", "graph")
def fpgm_score(evidence: Evidence, layer: str) -> Tensor:
    """Distance from the geometric median of the layer's filters (FPGM, He et al. 2019), by torch-pruning."""
    return _by_torch_pruning(evidence, layer, tp.importance.FPGMImportance(normalizer=None))


@criterion("taylor", "graph", "labels")
def taylor_score(evidence: Evidence, layer: str) -> Tensor:
    """Absolute weight times gradient of the loss (Molchanov et al. 2019), by torch-pruning."""
    return _by_torch_pruning(evidence, layer, tp.importance.GroupTaylorImportance(normalizer=None), 0)


@criterion("hessian", "graph", "labels")
def hessian_score(evidence: Evidence, layer: str) -> Tensor:
    """Squared weight times squared gradient of single losses, the diagonal of the Fisher matrix (Optimal Brain Damage), by torch-pruning."""
    # torch-pruning's own accumulation keeps the last image's gradients only: hand it the mean.
    return _by_torch_pruning(evidence, layer, tp.importance.GroupHessianImportance(normalizer=None), 1)


class TagImportance:
    """Importance object for torch-pruning's own pruners, from scores computed beforehand.

    Only the convolutions' output filters of a group are scored; filters coupled by a residual are reduced to one score.

    Args:
        model: the network the scores belong to. Networks of this package need ``customized_pruners=freqprune.surgery.CUSTOM_PRUNERS`` in the
            pruner, which else takes channel i of one stage for channel i of the next.
        table: scores by layer name, ``(n_filters,)`` each, of the unpruned network.
        reduce: ``"max"`` or ``"mean"`` over the layers of a coupled group.

    Raises:
        InputError: for scores of unknown layers or of the wrong length, or that are not finite.
    """

    def __init__(self, model: nn.Module, table: Mapping[str, Tensor], reduce: str = "max") -> None:
        if reduce not in ("max", "mean"):
            raise InputError(f"reduce must be max or mean, got {reduce!r}")
        self.reduce = reduce
        modules = dict(model.named_modules())
        self._table: dict[nn.Module, Tensor] = {}
        for layer, score in table.items():
            if layer not in modules:
                raise InputError(f"scores name a layer the network does not have: {layer!r}{closest(layer, modules)}")
            n_filters = getattr(modules[layer], "out_channels", getattr(modules[layer], "out_features", None))
            if score.dim() != 1 or len(score) != n_filters:
                raise InputError(f"scores of {layer!r} must have the shape ({n_filters},), got {tuple(score.shape)}")
            if not torch.isfinite(score).all():
                raise InputError(f"scores of {layer!r} hold NaN or infinite values; give such filters a finite score, e.g. 0")
            self._table[modules[layer]] = score.double().cpu()

    def __call__(self, group: Any, **_: Any) -> Tensor | None:
        """Scores of the group's prunable channels, as long as ``group[0].idxs``; None if no layer of the group has scores."""
        size = len(group[0].idxs)
        position = {channel: at for at, channel in enumerate(group[0].idxs)}
        rows = []
        for i in range(len(group)):
            dependency, idxs = group[i].dep, group[i].idxs
            score = self._table.get(dependency.target.module)
            if score is None or dependency.handler not in (tp.prune_conv_out_channels, tp.prune_linear_out_channels):
                continue
            if len(score) != dependency.target.module.weight.shape[0]:
                raise InputError("the scores are of the unpruned network, but this layer has been pruned since; tag again, or prune in one step")
            # root_idxs are channels of the root layer; a partial group starts anywhere.
            roots = [position[channel] for channel in group[i].root_idxs] if group[i].root_idxs else range(size)
            row = torch.full((size,), torch.nan, dtype=torch.float64)
            row[torch.tensor(list(roots))] = score[torch.tensor(list(idxs))]
            rows.append(row)
        if not rows:
            return None
        stacked = torch.stack(rows)
        if self.reduce == "mean":
            return stacked.nanmean(0).nan_to_num(nan=0.0)
        return stacked.nan_to_num(nan=-torch.inf).amax(0).nan_to_num(neginf=0.0)
