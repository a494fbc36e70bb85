"""Where and how the filters are read: the settings of a measurement that are not the stimulus."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from freqprune.errors import InputError, one_of
from freqprune.tagging.recording import Reduction, class_token, every_position, map_mean
from freqprune.tagging.sites import WHERE

AVERAGES = ("amplitude", "power", "complex", "snr")
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SPATIAL: dict[str, Reduction] = {"mean": map_mean, "map": every_position, "class_token": class_token}


@dataclass(frozen=True)
class Readout:
    """What is read of a network that is shown tags; see `freqprune.tag`, which takes the same arguments.

    Args:
        layers: names or shell-style patterns of layers; all convolutions if left out.
        where: read at the ``"convolution"``, after its ``"norm"`` or after its ``"activation"``.
        spatial: ``"mean"`` over a map or over tokens, ``"map"`` or ``"class_token"``.
        noise_std: standard deviation of the noise in pixel units; 0 for no noisy pass.
        average: over images: ``"amplitude"``, ``"power"``, ``"complex"`` or ``"snr"``.
        half: ``"float16"`` or ``"bfloat16"`` for half precision.

    Raises:
        InputError: for an argument out of range.
    """

    layers: Sequence[str] | str | None = None
    where: str = "activation"
    spatial: str = "mean"
    noise_std: float = 0.02
    average: str = "amplitude"
    half: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_std) and 0 <= self.noise_std <= 1):
            raise InputError(f"noise_std must lie in [0, 1] (pixel units), got {self.noise_std}")
        one_of(WHERE, where=self.where)
        one_of(AVERAGES, average=self.average)
        one_of(SPATIAL, spatial=self.spatial)
        if self.half is not None:
            one_of(HALF, half=self.half)
