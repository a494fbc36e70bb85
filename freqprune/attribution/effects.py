"""Gates and the answers they gave → effects of the parts, how sure they are, and how parts work together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from freqprune.errors import InputError
from freqprune.tagging import benjamini_hochberg


@dataclass(frozen=True)
class Attribution:
    """What answers hang on.

    Attributes:
        effects: how much the score rises when a part goes from its baseline to what it is, all others half open on the
            average, ``(n_images, n_parts)``, in units of the score; of a grid row by row.
        standard_error: of the effects, likewise.
        p_values: of the hypothesis that a part does nothing (t test), not adjusted, likewise.
        interactions: how much more two parts raise the score together than one by one, ``(n_images, n_parts,
            n_parts)``, zero on the diagonal.
        target: class whose score was read, ``(n_images,)``; None for a score of one's own.
        whole: score of the whole image, ``(n_images,)``.
        baseline: score with every part at its baseline, likewise.
        parts: number of each pixel's part, -1 for none, ``(n_images, height, width)``.
        forwards: frames that an image took at most.
    """

    effects: Tensor
    standard_error: Tensor
    p_values: Tensor
    interactions: Tensor
    target: Tensor | None
    whole: Tensor
    baseline: Tensor
    parts: Tensor
    forwards: int

    @property
    def adjusted(self) -> Tensor:
        """p-values of each image at the false discovery rate (Benjamini & Hochberg 1995), ``(n_images, n_parts)``."""
        return torch.stack([benjamini_hochberg(row) for row in self.p_values])

    @property
    def maps(self) -> Tensor:
        """Effect of the part that each pixel belongs to, ``(n_images, height, width)``; zero outside all parts. What
        captum and pytorch-grad-cam call an attribution."""
        found = self.effects.gather(1, self.parts.flatten(1).clamp(min=0)).view(self.parts.shape)
        return torch.where(self.parts < 0, 0, found)

    def strongest_pairs(self, image: int, n_pairs: int = 5) -> list[tuple[int, int, float]]:
        """Pairs of parts that interact most, by size."""
        upper = self.interactions[image].triu(1)
        order = upper.abs().flatten().argsort(descending=True)[:n_pairs].tolist()
        n_parts = upper.shape[0]
        return [(one // n_parts, one % n_parts, float(upper.flatten()[one])) for one in order]

    def plot(self, image: int, pixels: Tensor | None = None) -> Any:
        """A figure of one map, over the image if its pixels ``(n_channels, height, width)`` are given; what is
        significant at a false discovery rate of 5 % is outlined."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.6, 3.4), layout="constrained")
        axis = figure.subplots()
        values = self.maps[image]
        if pixels is not None:
            axis.imshow(pixels.permute(1, 2, 0).clamp(0, 1).mean(-1).cpu().numpy(), cmap="gray")
        limit = float(values.abs().max()) or 1.0
        shown = axis.imshow(
            values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.65 if pixels is not None else 1
        )
        parts = self.parts[image]
        sure = (self.adjusted[image] < 0.05)[parts.clamp(min=0)] & (parts >= 0)
        if sure.any() and not sure.all():
            axis.contour(sure.float().numpy(), levels=[0.5], colors="black", linewidths=0.8)
        axis.set_xticks([])
        axis.set_yticks([])
        figure.colorbar(shown, ax=axis, label="effect on the score", shrink=0.85)
        return figure


def estimate(design: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Effects by least squares, which for a score that is linear in the parts are exact.

    Args:
        design: how far open each part was, ``(n_frames, n_parts)``.
        scores: ``(n_frames, n_scores)``.

    Returns:
        Effects, standard errors and p-values ``(n_scores, n_parts)``, and interactions ``(n_scores, n_parts,
        n_parts)``: the projection of what the effects leave on the product of two centred gates.

    Raises:
        InputError: for scores that are not finite.
    """
    if not torch.isfinite(scores).all():
        raise InputError(
            f"{int((~torch.isfinite(scores)).sum())} of {scores.numel()} scores are not finite: the network or the "
            "score function answers tagged images with NaN or infinite values"
        )
    design, scores = design.double(), scores.double()
    centred = design - design.mean(0)
    about = scores - scores.mean(0)
    inverse = torch.linalg.inv(centred.T @ centred)
    effects = inverse @ centred.T @ about
    rest = about - centred @ effects
    freedom = max(1, len(design) - design.shape[1] - 1)
    variance = rest.square().sum(0) / freedom
    error = (inverse.diagonal()[:, None] * variance).sqrt()
    # Rounding alone is no effect.
    tiny = 1e-12 * about.abs().amax(0).clamp(min=torch.finfo(torch.float64).tiny)
    t = effects / error.clamp(min=tiny)
    p_values = torch.from_numpy(2 * stats.t.sf(t.abs().numpy(), freedom))
    size = (centred.square().T @ centred.square()).clamp(min=torch.finfo(torch.float64).tiny)
    together = torch.stack([(centred * column[:, None]).T @ centred / size for column in rest.T])
    together = (together + together.mT) / 2
    together = together - torch.diag_embed(together.diagonal(dim1=1, dim2=2))
    return effects.T, error.T, p_values.T, together
