"""What the terms of a loss from the tags measure of one layer. Each lies in [0, 1] and does not change with the scale
of the layer's answers, so that no later layer can make up for smaller ones.

Amplitudes are at 0 Hz and at the components of the stimulus, ``(n_filters, 1 + n_components)``.
"""

from __future__ import annotations

from torch import Tensor

from freqprune.tagging.stimulus import Stimulus

# Share of a layer's mean answer that its tags have to reach: below it, as in black images, the terms would be those of
# rounding noise, with a gradient as large as that is small.
FAINT = 1e-3


def separation(amplitude: Tensor, stimulus: Stimulus) -> Tensor:
    """1 less the share of the intermodulation in a layer's response: of the amplitudes at the fundamentals and at
    intermodulation components, summed over filters, the share at the fundamentals. 1 for affine functions of the image.

    Of the sums, not filter by filter: a filter that is about to fall silent has a large share of next to nothing.
    """
    alone = amplitude[:, fundamentals(stimulus)].sum()
    return _share(alone, alone + amplitude[:, intermodulation(stimulus)].sum(), FAINT * amplitude[:, 0].sum())


def imbalance(amplitude: Tensor, stimulus: Stimulus) -> Tensor:
    """How unequally the parts drive a layer's filters: with ``a`` the amplitudes of a filter at the fundamentals of
    ``n`` parts, ``(n sum(a^2) - sum(a)^2) / (n - 1)`` over ``sum(a)^2``, both summed over filters. For one filter and
    two parts the square of `TagResponse.part_preference`."""
    alone = amplitude[:, fundamentals(stimulus)]
    n_parts, total = alone.shape[1], alone.sum(1).square().sum()
    least = amplitude[:, 0].sum().square() / len(amplitude) * FAINT**2
    return _share((n_parts * alone.square().sum() - total) / max(1, n_parts - 1), total, least)


def spread(amplitude: Tensor, stimulus: Stimulus) -> Tensor:
    """Over how many of its filters a layer's response is spread: with ``a`` a filter's amplitude, the root of its power
    over all components, ``sum(a)^2 / (n sum(a^2))``: 1 if all answer alike, ``1 / n`` if one does. The Hoyer-square
    measure (Yang, Wen & Li 2020, DeepHoyer, arXiv 1908.09979) of responses instead of weights."""
    power = amplitude[:, 1:].square().sum(1)
    total = power[power.detach() > 0].sqrt().sum().square()
    return _share(total, len(power) * power.sum(), amplitude[:, 0].sum().square() * FAINT**2)


MEASURES = {"integration": separation, "balance": imbalance, "silence": spread}


def fundamentals(stimulus: Stimulus) -> list[int]:
    """Columns of the amplitudes that are at the fundamentals."""
    return [1 + number for number, one in enumerate(stimulus.components) if one.order == 1]


def intermodulation(stimulus: Stimulus) -> list[int]:
    """Columns of the amplitudes that are at intermodulation components."""
    return [1 + number for number, one in enumerate(stimulus.components) if one.kind == "intermodulation"]


def _share(part: Tensor, whole: Tensor, least: Tensor) -> Tensor:
    """A part of a whole; 0 where the whole is no more than the least that counts."""
    return part * 0 if whole.detach() <= least.detach() else part / whole
