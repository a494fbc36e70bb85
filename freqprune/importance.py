"""Response → one score a filter; the criteria to compare with; the adapter for torch-pruning's own pruners.

A criterion is a function of `Evidence` and a layer name that returns one score a filter, higher for filters to keep. Add one by decorating it
with `criterion`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.errors import InputError, closest
from freqprune.response import TagResponse
from freqprune.spectrum import benjamini_hochberg


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at.

    Attributes:
        model: the network to be pruned.
        response: its response to the tags; None for criteria that do not need one.
        components: response components that the tag criteria read, see `freqprune.components.find_components`.
        seed: for criteria that draw.
    """

    model: nn.Module
    response: TagResponse | None = None
    components: Sequence[str] | str = "fundamentals"
    seed: int = 0

    def weight(self, layer: str) -> Tensor:
        """Weight of a layer as ``(n_filters, n_weights)``."""
        weight = self.model.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        return weight.detach().flatten(1).double().cpu()

    def tags(self) -> TagResponse:
        assert self.response is not None, "criteria that need tags are checked before they run"
        return self.response


Criterion = Callable[[Evidence, str], Tensor]


@dataclass(frozen=True)
class _Entry:
    score: Criterion
    needs_tags: bool
    needs_noise: bool


_CRITERIA: dict[str, _Entry] = {}


def criterion(name: str, needs_tags: bool = False, needs_noise: bool = False) -> Callable[[Criterion], Criterion]:
    """Register a function ``(evidence, layer) -> (n_filters,)`` as ``importance.criterion=<name>``."""

    def register(score: Criterion) -> Criterion:
        _CRITERIA[name] = _Entry(score, needs_tags, needs_noise)
        return score

    return register


def criterion_names() -> list[str]:
    """Names of all registered criteria."""
    return list(_CRITERIA)


def needs_tags(name: str) -> bool:
    """Whether a criterion reads the response to the tags.

    Raises:
        InputError: for an unknown name.
    """
    if name not in _CRITERIA:
        raise InputError(f"importance.criterion must be one of {', '.join(_CRITERIA)}, got {name!r}{closest(name, _CRITERIA)}")
    return _CRITERIA[name].needs_tags


def needs_noise(name: str) -> bool:
    """Whether a criterion compares with noise, so that tags shown without noise leave it undefined."""
    return needs_tags(name) and _CRITERIA[name].needs_noise


def scores(name: str, evidence: Evidence, layers: Sequence[str]) -> dict[str, Tensor]:
    """Score of every filter of `layers` by a named criterion, float64 ``(n_filters,)`` a layer.

    Raises:
        InputError: for an unknown criterion, a tag criterion without a response or on layers that were not recorded, or scores that are
            undefined (an SNR measured without noise).
    """
    if needs_tags(name):
        if evidence.response is None:
            raise InputError(f"criterion {name!r} reads the response to the tags: pass Evidence(response=tag(...))")
        unread = [layer for layer in layers if layer not in evidence.response.layers]
        if unread:
            raise InputError(f"criterion {name!r} needs the response of {', '.join(unread)}, which tagging.layers leaves out")
    found = {layer: _CRITERIA[name].score(evidence, layer).double() for layer in layers}
    for layer, score in found.items():
        if not torch.isfinite(score).all():
            raise InputError(f"criterion {name!r} is undefined for {int((~torch.isfinite(score)).sum())} of {len(score)} filters of {layer!r}")
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


@criterion("snr", needs_tags=True, needs_noise=True)
def snr_score(evidence: Evidence, layer: str) -> Tensor:
    """Mean SNR over the components (Böge et al. 2024); 0 for a dead filter."""
    return _defined_snr(evidence, layer).mean(-1)


@criterion("snr_db", needs_tags=True, needs_noise=True)
def snr_db_score(evidence: Evidence, layer: str) -> Tensor:
    """Mean over the components of 20 log10 SNR in decibels; a dead filter counts as -120 dB."""
    return (20 * _defined_snr(evidence, layer).clamp(min=1e-6).log10()).mean(-1)


@criterion("amplitude", needs_tags=True)
def amplitude_score(evidence: Evidence, layer: str) -> Tensor:
    """Sum over the components of the clean amplitude of the mean response."""
    return evidence.tags().amplitude(layer, evidence.components).sum(-1)


@criterion("z", needs_tags=True, needs_noise=True)
def z_criterion(evidence: Evidence, layer: str) -> Tensor:
    """Mean over the components of the amplitude in standard deviations of ten noise bins a side; 0 for a dead filter."""
    return evidence.tags().z_score(layer, evidence.components).nan_to_num(nan=0.0).mean(-1)


@criterion("corrected_amplitude", needs_tags=True, needs_noise=True)
def corrected_amplitude_score(evidence: Evidence, layer: str) -> Tensor:
    """Baseline-corrected amplitude summed over all harmonics (Retter, Rossion & Schiltz 2021)."""
    return evidence.tags().corrected_amplitude(layer, "harmonics")


@criterion("integration", needs_tags=True)
def integration_score(evidence: Evidence, layer: str) -> Tensor:
    """Intermodulation over fundamentals: how much a filter combines the parts, whatever its gain; 0 for a dead filter."""
    return evidence.tags().integration(layer).nan_to_num(nan=0.0)


@criterion("intermodulation", needs_tags=True)
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


@dataclass(frozen=True)
class Verdict:
    """Which filters count as important.

    Attributes:
        important: a boolean ``(n_filters,)`` a layer.
        p_values: adjusted p-values, the smallest over the components, ``(n_filters,)`` a layer; None for a plain threshold.
    """

    important: dict[str, Tensor]
    p_values: dict[str, Tensor] | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Important filters a layer."""
        return {layer: int(flags.sum()) for layer, flags in self.important.items()}


def judge(
    response: TagResponse, components: Sequence[str] | str = "fundamentals", by: str = "significance", alpha: float = 0.001, threshold: float | None = None
) -> Verdict:
    """Decide which filters are important.

    Args:
        response: measured with noise.
        components: components to look at.
        by: ``"significance"``: at least one component is significant at the false discovery rate `alpha`, Benjamini-Hochberg over all filters,
            layers and components; ``"threshold"``: the mean SNR over the components is above `threshold`.
        alpha: false discovery rate in (0, 1).
        threshold: SNR, needed for ``by="threshold"``.

    Raises:
        InputError: for an argument out of range, or a response without noise.
    """
    check_judgement(by, alpha, threshold)
    if response.noise_std == 0:
        raise InputError("noise_std = 0: whether a filter is important is a question of signal against noise; tag with noise_std above 0")
    if by == "threshold":
        assert threshold is not None
        evidence = Evidence(nn.Module(), response, components)
        return Verdict({layer: snr_score(evidence, layer) > threshold for layer in response.layers})
    raw = {layer: response.p_values(layer, components) for layer in response.layers}
    adjusted = benjamini_hochberg(torch.cat([p.flatten() for p in raw.values()])).split([p.numel() for p in raw.values()])
    smallest = {layer: a.view(p.shape).amin(-1) for (layer, p), a in zip(raw.items(), adjusted, strict=True)}
    return Verdict({layer: p <= alpha for layer, p in smallest.items()}, smallest)


def check_judgement(by: str, alpha: float, threshold: float | None) -> None:
    """Raise InputError unless the arguments of `judge` are in range."""
    if by not in ("significance", "threshold"):
        raise InputError(f"importance.important_by must be significance or threshold, got {by!r}")
    if not 0 < alpha < 1:
        raise InputError(f"importance.alpha must lie between 0 and 1, got {alpha}")
    if by == "threshold" and not (threshold is not None and threshold > 0):
        raise InputError(f"importance.threshold must be a positive SNR when important_by=threshold, got {threshold}")


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
        import torch_pruning as tp

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
