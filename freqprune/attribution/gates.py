"""One tag a part: gates that open and close at frequencies of their own, for as many parts as there are odd bins.

Odd bins only: sums and differences of two odd numbers are even, so that no interaction of two parts falls on the bin of
one (the odd random-phase multisine of Pintelon & Schoukens 2012, System Identification). Read at a model's answer this
is the Fourier amplitude sensitivity test (Cukier et al. 1973; Saltelli, Tarantola & Chan 1999).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from freqprune.errors import InputError

# Pixels of the frames of one forward: 256 of 64 x 64.
PIXELS = 2**20
# Of the middles of two parts, in units of the overlap: the waves of closer ones are one and the same.
LEAST_APART = 1e-3


def frames_for(n_parts: int) -> int:
    """Frames of a recording that gives every part an odd bin of its own below half of the frame rate.

    >>> frames_for(64)
    256
    """
    return 4 * n_parts


def check_frames(n_parts: int, n_frames: int, what: str = "parts") -> None:
    """Raise InputError unless so many frames have an odd bin for every part, or of `what` else there are so many."""
    if n_frames < frames_for(n_parts):
        fewer = ", or fewer parts (a coarser grid)" if what == "parts" else ""
        raise InputError(
            f"{n_parts} {what} need an odd bin each: forwards must be at least {frames_for(n_parts)}, got {n_frames}; "
            f"give more forwards{fewer}"
        )


def waves(n_parts: int, n_frames: int, generator: torch.Generator) -> Tensor:
    """A sine of an odd bin and a phase of its own for each part, drawn from the generator, ``(n_frames, n_parts)``;
    `n_frames` at least `frames_for`."""
    check_frames(n_parts, n_frames)
    n_bins = (n_frames // 2 + 1) // 2
    bins = 2 * torch.randperm(n_bins, generator=generator)[:n_parts].double() + 1
    phases = 2 * math.pi * torch.rand(n_parts, generator=generator, dtype=torch.float64)
    time = torch.arange(n_frames, dtype=torch.float64)[:, None] / n_frames
    return torch.sin(2 * math.pi * bins * time + phases)


def check_apart(where: Tensor, overlap: float) -> None:
    """Raise InputError for two parts in one place, whose waves would be the same; arguments as for `overlapped`."""
    if not overlap:
        return
    apart = torch.cdist(where, where).nan_to_num(torch.inf).fill_diagonal_(torch.inf)
    if apart.min() < LEAST_APART * overlap:
        one, other = divmod(int(apart.argmin()), len(apart))
        raise InputError(
            f"overlap = {overlap:g}: parts {one} and {other} lie around the same point, as an object in the middle of "
            "its background does, so that their waves could not be told apart; use overlap=0"
        )


def overlapped(tags: Tensor, where: Tensor, overlap: float) -> Tensor:
    """Waves of which each part gives some to its neighbours: a sum with weights ``exp(-d^2 / 2 overlap^2)`` at distance
    ``d``, of the power that it had. All of it stays in odd bins.

    Args:
        tags: see `waves`.
        where: see `freqprune.attribution.parts.places`, ``(n_parts, 2)``; NaN for a part that is not there.
        overlap: in parts; 0 leaves the waves as they are.

    """
    if not overlap:
        return tags
    distances = torch.cdist(where, where)
    weights = torch.exp(-distances.square() / (2 * overlap**2)).nan_to_num(0.0)
    weights.fill_diagonal_(1.0)
    return tags @ (weights / weights.square().sum(1, keepdim=True).sqrt()).T


def opened(tags: Tensor, steepness: float = 1.0) -> Tensor:
    """How far open each part is in each frame of a recording, ``(n_frames, n_parts)`` in [0, 1].

    Args:
        tags: see `waves`.
        steepness: 1 leaves sines; more clips them, ``clip(1/2 + steepness * sin / 2, 0, 1)``, towards square waves.
    """
    return (0.5 + steepness / 2 * tags).clamp(0, 1)


def gates(n_parts: int, n_frames: int, generator: torch.Generator, steepness: float = 1.0) -> Tensor:
    """Gates of one recording, each part by its own wave alone, see `waves` and `opened`."""
    return opened(waves(n_parts, n_frames, generator), steepness)


def halves(values: Tensor, n_frames: int) -> tuple[Tensor, Tensor]:
    """What recordings hold in their odd and in their even bins, on the first half of each: a wave of an odd bin changes
    its sign half a recording later, one of an even bin comes again. Of gates, all but their mean is odd; of what two of
    them do together, everything is even.

    Args:
        values: ``(n_recordings * n_frames, ...)``.
        n_frames: of one recording.

    Returns:
        Two of ``(n_recordings * n_frames / 2, ...)``.
    """
    first, second = values.unflatten(0, (-1, 2, n_frames // 2)).unbind(1)
    return ((first - second) / 2).flatten(0, 1), ((first + second) / 2).flatten(0, 1)


def batches(design: Tensor, image: Tensor) -> list[Tensor]:
    """The frames of a recording, ``(n_frames, n_parts)``, in batches of as many as one forward takes of an image."""
    return list(design.split(max(1, PIXELS // image[0].numel())))
