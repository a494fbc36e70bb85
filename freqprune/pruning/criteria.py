"""The criteria: response, weights, gradients, moments → one score a filter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor

from freqprune.attribution import filter_movement
from freqprune.errors import InputError
from freqprune.networks import IndexShortcut
from freqprune.pruning.damage import corrected, logit_errors
from freqprune.pruning.elimination import elimination_errors
from freqprune.pruning.graph import ChannelGraph
from freqprune.pruning.importance import OF_TAGS, Evidence, check_components, criterion, criterion_names, needs, scores
from freqprune.pruning.moments import columns_of
from freqprune.tagging import Recorder, find_sites, map_mean

# Who asks for a criterion by name asks here, where those of the package are known.
__all__ = ["OF_TAGS", "check_components", "criterion", "criterion_names", "needs", "scores"]


def _at_least(evidence: Evidence, layer: str, ratio: Tensor) -> Tensor:
    """A ratio to noise; where that is rounding alone, as in a filter that hardly leaves its mean, what the ratio is at
    least: the amplitude over what rounding can leave, and 1 as of noise; 0 for a filter that answers nothing."""
    response = evidence.tags()
    amplitude, rounding = response.amplitude(layer, evidence.components), response.rounding(layer)[:, None]
    answers = (amplitude > rounding).any(-1, keepdim=True)
    return torch.where(ratio.isnan(), torch.where(answers, (amplitude / rounding).clamp(min=1), 0.0), ratio)


@criterion("snr", "noise")
def snr_score(evidence: Evidence, layer: str) -> Tensor:
    """Mean SNR over the components (Böge et al. 2024); 0 for a dead filter."""
    return _at_least(evidence, layer, evidence.tags().snr(layer, evidence.components)).mean(-1)


@criterion("snr_db", "noise")
def snr_db_score(evidence: Evidence, layer: str) -> Tensor:
    """Mean over the components of 20 log10 SNR in decibels; a dead filter counts as -120 dB."""
    ratio = _at_least(evidence, layer, evidence.tags().snr(layer, evidence.components))
    return (20 * ratio.clamp(min=1e-6).log10()).mean(-1)


@criterion("amplitude", "tags")
def amplitude_score(evidence: Evidence, layer: str) -> Tensor:
    """Sum over the components of the clean amplitude of the mean response."""
    return evidence.tags().amplitude(layer, evidence.components).sum(-1)


@criterion("z", "noise")
def z_criterion(evidence: Evidence, layer: str) -> Tensor:
    """Mean over the components of the amplitude in standard deviations of ten noise bins a side; 0 for a dead
    filter."""
    return _at_least(evidence, layer, evidence.tags().z_score(layer, evidence.components)).mean(-1)


@criterion("corrected_amplitude", "noise")
def corrected_amplitude_score(evidence: Evidence, layer: str) -> Tensor:
    """Baseline-corrected amplitude summed over all harmonics (Retter, Rossion & Schiltz 2021)."""
    return evidence.tags().corrected_amplitude(layer, "harmonics")


@criterion("integration", "intermodulation")
def integration_score(evidence: Evidence, layer: str) -> Tensor:
    """Intermodulation over fundamentals: how much a filter combines the parts, whatever its gain; 0 for a dead
    filter."""
    return evidence.tags().integration(layer).nan_to_num(nan=0.0)


@criterion("intermodulation", "intermodulation")
def intermodulation_score(evidence: Evidence, layer: str) -> Tensor:
    """Sum of the clean amplitudes at all intermodulation components, whatever components are chosen: how much a filter
    integrates."""
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
    """Uniform noise: the control that any criterion has to beat. Of layers whose filters go together one number each:
    the largest of several, or the mean over a head's channels, would be uniform no more."""
    units = () if evidence.graph is None else evidence.graph.units.values()
    unit = next((one for one in units if layer in one.members), None)
    name, n_filters = (layer, len(evidence.weight(layer))) if unit is None else (unit.name, unit.n_filters)
    names = [name for name, _ in evidence.model.named_modules()]
    generator = torch.Generator().manual_seed(evidence.seed * 1_000_003 + names.index(name))
    return torch.rand(n_filters, generator=generator, dtype=torch.float64)


@criterion("activation", "labels")
def activation_score(evidence: Evidence, layer: str) -> Tensor:
    """Mean absolute activation over images and positions, after the activation function."""
    images = torch.cat([images for images, _ in evidence.labelled])
    total: Tensor | float = 0.0
    with Recorder(
        evidence.model, find_sites(evidence.model, images[:1], [layer]), lambda output, dim: map_mean(output.abs(), dim)
    ) as recorder:
        for batch in images.split(64):
            total = total + recorder(batch)[layer].cpu().double().sum(0)
    assert isinstance(total, Tensor)
    return total / len(images)


@criterion("effect", "labels", "logits")
def effect_score(evidence: Evidence, layer: str) -> Tensor:
    """How far the logits move when the filter opens, squared, with the layer's other filters half open: read off tags
    on all of them at once, see `freqprune.filter_effects`; without a gradient. Nothing makes up for the filter."""
    images = torch.cat([images for images, _ in evidence.labelled])
    return filter_movement(evidence.model, images, layer, seed=evidence.seed)


@criterion("redundancy", "moments")
def redundancy_score(evidence: Evidence, layer: str) -> Tensor:
    """What the other filters cannot make up for in the layers that read this one, see
    `freqprune.pruning.elimination.elimination_errors`."""
    return _elimination_errors(evidence, layer, None)


@criterion("logit_error", "moments", "gradients", "frames")
def logit_error_score(evidence: Evidence, layer: str) -> Tensor:
    """`logit_redundancy`, scaled at every eighth of a layer to how far the logits really move over the frames given,
    see `freqprune.pruning.damage`."""
    estimates = logit_redundancy_score(evidence, layer)
    order, n_filters = estimates.argsort(stable=True), len(estimates)
    counts = sorted({-(-n_filters * eighth // 8) for eighth in range(1, 9)})
    readers, frames = _readers(evidence, layer), evidence.frames
    measured = logit_errors(
        evidence.model, readers, order, counts, frames, evidence.trace, shortcuts_read(evidence.graph, layer)
    )
    return corrected(estimates, order, counts, measured)


@criterion("logit_redundancy", "moments", "gradients")
def logit_redundancy_score(evidence: Evidence, layer: str) -> Tensor:
    """How far the logits move without the filter although the others make up for it, squared; compares across layers as
    it is.

    The structured optimal brain surgeon (Hassibi & Stork 1993) with a Kronecker-factored Gauss-Newton matrix (Martens &
    Grosse 2015).
    """
    return _elimination_errors(evidence, layer, evidence.gradients_at)


def _elimination_errors(evidence: Evidence, layer: str, gradients: Mapping[str, Tensor] | None) -> Tensor:
    readers = _readers(evidence, layer)
    missing = [] if gradients is None else [reader for reader in readers if reader not in gradients]
    if missing:
        raise InputError(
            f"no gradients at {missing[0]!r}, which reads the filters of {layer!r}; take them with output_gradients"
        )
    return elimination_errors(readers, gradients)


def _readers(evidence: Evidence, layer: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Weight, moments and columns of the layers that read the filters of `layer`."""
    assert evidence.graph is not None
    assert evidence.moments is not None
    modules = dict(evidence.model.named_modules())
    n_filters = evidence.graph.units[layer].n_filters
    channels = _channels(evidence.graph, layer, n_filters)
    readers = {}
    for reader in evidence.graph.units[layer].readers:
        if reader not in evidence.moments:
            raise InputError(
                f"no moments of {reader!r}, which reads the filters of {layer!r}; take them with input_moments"
            )
        columns = torch.stack([columns_of(modules[reader], one) for one in channels[reader]])
        readers[reader] = (
            evidence.model.get_parameter(f"{reader}.weight").detach().flatten(1).cpu(),
            evidence.moments[reader],
            columns,
        )
    return readers


def shortcuts_read(graph: ChannelGraph | None, layer: str) -> dict[str, list[list[int]]]:
    """Input channels, filter by filter, of shortcuts without weights that hand on the filters of `layer`."""
    assert graph is not None
    modules = dict(graph.model.named_modules())
    found = _channels(graph, layer, graph.units[layer].n_filters)
    return {name: channels for name, channels in found.items() if isinstance(modules[name], IndexShortcut)}


def _channels(graph: ChannelGraph, layer: str, n_filters: int) -> dict[str, list[list[int]]]:
    """Input channels, filter by filter, of each layer that reads the filters of `layer`."""
    together, of_first = graph.read_channels(layer, range(n_filters)), graph.read_channels(layer, [0])
    if all(channels[: len(of_first[reader])] == of_first[reader] for reader, channels in together.items()):
        each = {reader: len(channels) // n_filters for reader, channels in together.items()}
        return {
            reader: [channels[start : start + each[reader]] for start in range(0, len(channels), each[reader])]
            for reader, channels in together.items()
        }
    # One that reads them in several places is told of all filters once, and then of all of them again.
    alone = [graph.read_channels(layer, [number]) for number in range(n_filters)]
    return {reader: [one[reader] for one in alone] for reader in together}


def _by_torch_pruning(
    evidence: Evidence, layer: str, importance: Callable[[Any], Any], order: int | None = None
) -> Tensor:
    """Score by one of torch-pruning's importances over everything that goes with a filter; `order` 0 or 1 of the
    gradients it needs."""
    assert evidence.graph is not None
    parameters = dict(evidence.graph.twin.named_parameters())
    given = {} if order is None else {name: pair[order] for name, pair in evidence.gradients.items()}
    half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in parameters.values())
    # In half precision squares of gradients would be zeros: one factor for all leaves their order.
    scale = max((float(one.abs().max()) for one in given.values()), default=0.0) if half else 1.0
    for name, parameter in parameters.items():
        gradient = given.get(name)
        # torch-pruning takes it for granted that all have one, though a second answer may be all that reads a layer.
        missing = torch.zeros_like(parameter) if order == 0 else None
        parameter.grad = missing if gradient is None else (gradient / (scale or 1.0)).to(parameter)
    found = importance(evidence.graph.group(layer))
    for parameter in parameters.values():
        parameter.grad = None
    if not isinstance(found, Tensor):
        raise InputError(f"this criterion finds nothing to score in {layer!r}; use another, e.g. importance=l2")
    return found.detach().cpu()


@criterion("group_l2", "graph")
def group_l2_score(evidence: Evidence, layer: str) -> Tensor:
    """Squared L2 norm of the weights that go with the filter, mean over the layers that hold some (DepGraph, Fang et
    al. 2023), by torch-pruning."""
    return _by_torch_pruning(evidence, layer, tp.importance.GroupMagnitudeImportance(p=2, normalizer=None))


@criterion("bn_scale", "graph")
def bn_scale_score(evidence: Evidence, layer: str) -> Tensor:
    """Absolute scale of the batch norms that the filter passes (Network Slimming, Liu et al. 2017), by
    torch-pruning."""
    return _by_torch_pruning(evidence, layer, tp.importance.BNScaleImportance(normalizer=None))


@criterion("lamp", "graph")
def lamp_score(evidence: Evidence, layer: str) -> Tensor:
    """Layer-adaptive magnitude (LAMP, Lee et al. 2021), by torch-pruning; compares across layers as it is."""
    return _by_torch_pruning(evidence, layer, tp.importance.LAMPImportance())


@criterion("fpgm", "graph")
def fpgm_score(evidence: Evidence, layer: str) -> Tensor:
    """Sum of the distances to the other filters, after FPGM (He et al. 2019), by torch-pruning, whose distances are
    between squared weights, of the layers that read the filters too: not those of the paper."""
    return _by_torch_pruning(evidence, layer, tp.importance.FPGMImportance(normalizer=None))


@criterion("taylor", "graph", "loss")
def taylor_score(evidence: Evidence, layer: str) -> Tensor:
    """Absolute weight times gradient of the loss (Molchanov et al. 2019), by torch-pruning."""
    return _by_torch_pruning(evidence, layer, tp.importance.GroupTaylorImportance(normalizer=None), 0)


@criterion("hessian", "graph", "loss")
def hessian_score(evidence: Evidence, layer: str) -> Tensor:
    """Squared weight times squared gradient of single losses, the diagonal of the Fisher matrix (Optimal Brain Damage),
    by torch-pruning."""
    # torch-pruning's own accumulation keeps the last image's gradients only: hand it the mean.
    return _by_torch_pruning(evidence, layer, tp.importance.GroupHessianImportance(normalizer=None), 1)
