"""Response → which filters are important: by significance, or by an SNR threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from freqprune.errors import InputError, one_of
from freqprune.pruning.criteria import snr_score
from freqprune.pruning.importance import Evidence
from freqprune.tagging import TagResponse, benjamini_hochberg

BY = ("significance", "threshold")


@dataclass(frozen=True)
class Judgement:
    """By what filters are called important, see `judge`.

    Args:
        components: response components to look at.
        important_by: ``"significance"`` or ``"threshold"``.
        alpha: false discovery rate in (0, 1).
        threshold: SNR, needed for ``important_by="threshold"``.

    Raises:
        InputError: for an argument out of range.
    """

    components: Sequence[str] | str = "fundamentals"
    important_by: str = "significance"
    alpha: float = 0.001
    threshold: float | None = None

    def __post_init__(self) -> None:
        one_of(BY, important_by=self.important_by)
        if not 0 < self.alpha < 1:
            raise InputError(f"alpha must lie between 0 and 1, got {self.alpha}")
        if self.important_by == "threshold" and not (self.threshold is not None and self.threshold > 0):
            raise InputError(f"threshold must be a positive SNR when important_by=threshold, got {self.threshold}")


@dataclass(frozen=True, repr=False)
class Verdict:
    """Which filters count as important.

    Attributes:
        important: a boolean ``(n_filters,)`` a layer.
        p_values: adjusted p-values, the smallest over the components, ``(n_filters,)`` a layer; None for a plain
            threshold.
    """

    important: dict[str, Tensor]
    p_values: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        total = sum(len(flags) for flags in self.important.values())
        return f"Verdict({sum(self.counts.values())} of {total} filters important, by layer: {self.counts})"

    @property
    def counts(self) -> dict[str, int]:
        """Important filters a layer."""
        return {layer: int(flags.sum()) for layer, flags in self.important.items()}


def judge(
    response: TagResponse,
    components: Sequence[str] | str = "fundamentals",
    by: str = "significance",
    alpha: float = 0.001,
    threshold: float | None = None,
) -> Verdict:
    """Decide which filters are important.

    Args:
        response: measured with noise.
        components: components to look at.
        by: ``"significance"``: at least one component is significant at the false discovery rate `alpha`,
            Benjamini-Hochberg over all filters, layers and components; ``"threshold"``: the mean SNR over the
            components is above `threshold`.
        alpha: false discovery rate in (0, 1).
        threshold: SNR, needed for ``by="threshold"``.

    Raises:
        InputError: for an argument out of range, or a response without noise.
    """
    Judgement(components, by, alpha, threshold)
    if response.noise_std == 0:
        raise InputError(
            "noise_std = 0: whether a filter is important is a question of signal against noise; tag with noise_std "
            "above 0"
        )
    if by == "threshold":
        assert threshold is not None
        evidence = Evidence(nn.Module(), response, components)
        return Verdict({layer: snr_score(evidence, layer) > threshold for layer in response.layers})
    raw = {layer: response.p_values(layer, components) for layer in response.layers}
    adjusted = benjamini_hochberg(torch.cat([p.flatten() for p in raw.values()])).split(
        [p.numel() for p in raw.values()]
    )
    smallest = {layer: a.view(p.shape).amin(-1) for (layer, p), a in zip(raw.items(), adjusted, strict=True)}
    return Verdict({layer: p <= alpha for layer, p in smallest.items()}, smallest)
