"""Gates and the answers they gave → effects of the parts, how sure they are, and how parts work together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor

from freqprune.attribution.gates import halves
from freqprune.errors import InputError
from freqprune.tagging import benjamini_hochberg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class OfParts:
    """What recordings say of the parts of one image, or stacked of several; see `Attribution`."""

    effects: Tensor
    smoothed: Tensor
    standard_error: Tensor
    p_values: Tensor
    interactions: Tensor
    interaction_p_values: Tensor
    first_order: Tensor


@dataclass(frozen=True)
class Attribution(OfParts):
    """What answers hang on.

    Attributes:
        effects: how much the score rises when a part goes from its baseline to what it is, all others half open on the
            average, ``(n_images, n_parts)``, in units of the score; of a grid row by row.
        smoothed: the effects as they most likely are if parts that lie close together do alike, likewise, see
            `freqprune.attribution.smoothing.smoothed`: less noise, for maps; what is said of the parts one by one,
            standard errors and p-values, is of `effects`.
        standard_error: of the effects, likewise.
        p_values: of the hypothesis that a part does nothing (t test), not adjusted, likewise.
        interactions: how much more two parts raise the score together than one by one, ``(n_images, n_parts,
            n_parts)``, zero on the diagonal.
        interaction_p_values: of the hypothesis that two parts do not interact, not adjusted, likewise; see
            `freqprune.attribution.pairs.find_interactions`.
        first_order: share of the variance of the score over the frames that hangs on a part alone, ``(n_images,
            n_parts)``, see `freqprune.attribution.sensitivity.first_order`; what they leave of 1 is in combinations.
        target: class whose score was read, ``(n_images,)``; None for a score of one's own.
        whole: score of the whole image, ``(n_images,)``.
        baseline: score with every part at its baseline, likewise.
        parts: number of each pixel's part, -1 for none, ``(n_images, height, width)``; of colour channels
            ``(n_images, n_channels, height, width)``, as their `maps`.
        part_names: what the parts are called, ``n_parts`` of them.
        forwards: frames that an image took at most.
    """

    target: Tensor | None
    whole: Tensor
    baseline: Tensor
    parts: Tensor
    part_names: Sequence[str]
    forwards: int

    @cached_property
    def adjusted(self) -> Tensor:
        """p-values of each image at the false discovery rate (Benjamini & Hochberg 1995), ``(n_images, n_parts)``; of
        parts that it lacks, 1."""
        found = torch.ones_like(self.p_values)
        for row, given, there in zip(found, self.p_values, self.present, strict=True):
            row[there] = benjamini_hochberg(given[there])
        return found

    @cached_property
    def present(self) -> Tensor:
        """Which parts an image has, ``(n_images, n_parts)``: not all images have as many superpixels."""
        if self.parts.dim() == 4:
            return torch.ones_like(self.effects, dtype=torch.bool)
        n_parts = self.effects.shape[1]
        return torch.stack([torch.bincount(one[one >= 0], minlength=n_parts) > 0 for one in self.parts])

    @property
    def maps(self) -> Tensor:
        """Smoothed effect of the part that each pixel belongs to, ``(n_images, height, width)``; zero outside all
        parts."""
        return torch.stack([self._map(image) for image in range(len(self.parts))])

    def _map(self, image: int) -> Tensor:
        parts = self.parts[image]
        found = self.smoothed[image].gather(0, parts.flatten().clamp(min=0)).view(parts.shape)
        return torch.where(parts < 0, 0, found)

    def strongest_pairs(self, image: int, n_pairs: int = 5, alpha: float | None = None) -> list[tuple[int, int, float]]:
        """Pairs of parts that interact most, by size; with `alpha` only those at this false discovery rate."""
        there = self.present[image]
        return strongest(self.interactions[image], self.interaction_p_values[image], n_pairs, alpha, there)

    def ranked(self, image: int, n_parts: int | None = None) -> list[int]:
        """Parts that an image has, those with the largest effect, of either sign, first."""
        ranked = self.effects[image].abs().argsort(descending=True)
        found: list[int] = ranked[self.present[image][ranked]][:n_parts].tolist()
        return found

    def significant(self, image: int, alpha: float = 0.05) -> Tensor:
        """Parts whose effect is significant at a false discovery rate, ``(n_parts,)``."""
        return self.adjusted[image] < alpha

    def plot(
        self,
        image: int = 0,
        pixels: Tensor | None = None,
        n_pairs: int = 0,
        n_marked: int = 0,
        alpha: float = 0.05,
        title: str = "",
    ) -> Figure:
        """A figure of one map; of colour channels, bars.

        Args:
            image: number of the image.
            pixels: of that image, in [0, 1], ``(n_channels, height, width)``: drawn beside the map and below it.
            n_pairs: so many of the strongest interactions are drawn as lines between parts, if they are significant.
            n_marked: so many of the parts with the largest effects are numbered.
            alpha: false discovery rate at which parts are outlined and pairs joined.
            title: line above the map.

        Raises:
            InputError: for an image that is not there, or pixels of another size.
        """
        from freqprune.attribution.pictures import bars, picture

        n_images, size = len(self.effects), tuple(self.parts.shape[-2:])
        if not 0 <= image < n_images:
            raise InputError(f"image must lie in [0, {n_images - 1}], got {image}")
        if pixels is not None and (pixels.dim() != 3 or tuple(pixels.shape[-2:]) != size):
            raise InputError(
                f"pixels must be those of one image, (n_channels, {size[0]}, {size[1]}), got {tuple(pixels.shape)}"
            )
        sure = self.significant(image, alpha)
        if self.parts.dim() == 4:
            return bars(self.effects[image], self.standard_error[image], self.part_names, sure, pixels, title)
        pairs = self.strongest_pairs(image, n_pairs, alpha)
        marked = self.ranked(image, n_marked)
        return picture(self._map(image), self.parts[image], sure, pixels, pairs, marked, title)

    def for_captum(self, n_channels: int = 3) -> Tensor:
        """Maps as an attribution of captum, of the shape of the network's inputs as its perturbation methods give it,
        ``(n_images, n_channels, height, width)`` float32: for ``captum.metrics``, and one image, channels last, for
        ``captum.attr.visualization``."""
        maps = self.maps.float()
        return (maps if maps.dim() == 4 else maps[:, None].expand(-1, n_channels, -1, -1)).contiguous()

    def for_grad_cam(self) -> FloatArray:
        """Maps as class activation maps of pytorch-grad-cam, ``(n_images, height, width)`` float32 in [0, 1]: what
        raises the score over the largest such effect of the image, as its methods scale; what lowers it is 0. For
        ``show_cam_on_image`` and its metrics."""
        maps = self.maps.float()
        raising = (maps.sum(1) if maps.dim() == 4 else maps).clamp(min=0)
        largest = raising.flatten(1).amax(1)[:, None, None]
        return (raising / torch.where(largest > 0, largest, 1)).numpy()


def strongest(
    interactions: Tensor, p_values: Tensor, n_pairs: int, alpha: float | None = None, there: Tensor | None = None
) -> list[tuple[int, int, float]]:
    """Pairs that interact most, by size; with `alpha` only those at this false discovery rate.

    Args:
        interactions: of all pairs, ``(n, n)``.
        p_values: of these, likewise.
        n_pairs: so many at most.
        alpha: false discovery rate.
        there: of which there are pairs, ``(n,)``; all if left out.
    """
    pairs = torch.ones(interactions.shape) if there is None else there[:, None] & there
    one, other = pairs.triu(1).nonzero(as_tuple=True)
    values = interactions[one, other]
    if alpha is not None:
        sure = benjamini_hochberg(p_values[one, other]) < alpha
        one, other, values = one[sure], other[sure], values[sure]
    order = values.abs().argsort(descending=True)[:n_pairs]
    return [(int(one[at]), int(other[at]), float(values[at])) for at in order]


def estimate(design: Tensor, scores: Tensor, n_frames: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Effects by least squares, which for a score that is linear in the parts are exact.

    In recordings of gates on odd bins, what an even number of parts do together lies in even bins, where no effect is.
    Odd bins alone then say how sure the effects are: at least half of what they hold is not in phase with any gate.

    Args:
        design: how far open each part was, ``(n_frames, n_parts)``.
        scores: ``(n_frames, n_scores)``.
        n_frames: of each of the recordings that follow one another; frames in no order if left out.

    Returns:
        Effects, standard errors and p-values ``(n_scores, n_parts)``.

    Raises:
        InputError: for scores that are not finite.
    """
    if not torch.isfinite(scores).all():
        raise InputError(
            f"{int((~torch.isfinite(scores)).sum())} of {scores.numel()} scores are not finite: the network or the "
            "score function answers tagged images with NaN or infinite values"
        )
    centred, about = (values.double() - values.double().mean(0) for values in (design, scores))
    freedom = len(design) - design.shape[1] - 1
    if n_frames is not None:
        centred, about = (halves(values, n_frames)[0] for values in (centred, about))
        freedom = len(about) - design.shape[1]
    inverse = torch.linalg.inv(centred.T @ centred)
    effects = inverse @ centred.T @ about
    rest = about - centred @ effects
    error = (inverse.diagonal()[:, None] * rest.square().sum(0) / max(1, freedom)).sqrt()
    return effects.T, error.T, p_values(effects, error, freedom, scores).T


def p_values(found: Tensor, errors: Tensor, freedom: int, scores: Tensor) -> Tensor:
    """Of two-sided t tests; what is rounding of the scores alone is nothing."""
    tiny = 1e-12 * scores.double().abs().amax(0).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.from_numpy(2 * stats.t.sf((found / errors.clamp(min=tiny)).abs().numpy(), max(1, freedom)))
