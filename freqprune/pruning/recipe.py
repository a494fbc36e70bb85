"""How to cut, and what a cut looks at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from freqprune.errors import InputError, at_least, check_fields, one_of
from freqprune.networks import Latency
from freqprune.pruning.amount import Amount
from freqprune.pruning.compensation import AT_ONCE, METHODS
from freqprune.pruning.criteria import needs
from freqprune.tagging import Readout

# Criteria whose scores are squared changes of the logits.
BLOCK_CRITERIA = ("logit_error", "logit_redundancy")
CALIBRATIONS = ("frames", "images", "both")
RESOLVE = ("shifted", "lost")


@dataclass(frozen=True)
class Material:
    """What a cut looks at; pixels are in [0, 1], not normalised.

    Attributes:
        images: pixels to tag, ``(n_images, n_channels, height, width)``.
        normalize: pixels to network inputs.
        mean: channel means of that normalisation, for the tagged frames.
        std: channel standard deviations, likewise.
        calibration: pixels for second moments.
        labelled: pixels and class labels, for criteria that need gradients or activations.
    """

    images: Tensor
    normalize: Callable[[Tensor], Tensor]
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    calibration: Tensor | None = None
    labelled: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Reconstruction:
    """How a cut is made up for in sequence.

    Args:
        positions: random positions of each map that enter the equations, drawn anew for every batch.
        ridge: pulls the weights towards those that the cut left, or, after a round, towards those that they were solved
            to before, in units of the inputs' mean variance; None: for each layer the one of
            `freqprune.pruning.equations.RIDGES` that does best on every fourth batch from the others,
            1e-2 where there are fewer than four.
        resolve: ``"shifted"``: every layer whose inputs have changed is solved again; ``"lost"``: only those that lost
            inputs.
        rounds: after a layer is solved, so many times the layer that feeds it takes a Gauss-Newton step towards the
            same target, and it is solved again.
        memory_gb: gigabytes that the activations of all calibration images may take; fewer images are used where more
            would be needed.
        seed: of the positions; 0 in a `Recipe`: its own.

    Raises:
        InputError: for an argument out of range.
    """

    positions: int = 256
    ridge: float | None = 1e-2
    resolve: str = "shifted"
    rounds: int = 3
    memory_gb: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, positions=self.positions)
        at_least(0, rounds=self.rounds)
        one_of(RESOLVE, resolve=self.resolve)
        if not self.memory_gb > 0:
            raise InputError(f"memory_gb must be above 0, got {self.memory_gb}")
        if self.ridge is not None and not (self.ridge > 0 and math.isfinite(self.ridge)):
            raise InputError(f"ridge must be a finite number above 0, got {self.ridge}")


@dataclass(frozen=True)
class Recipe:
    """How to cut.

    Args:
        amount: how much.
        criterion: name of the importance criterion.
        components: response components that tag criteria read.
        layers: patterns of the layers to prune; all inner layers (and streams) if left out.
        exclude: patterns of layers to spare.
        streams: let the filters of residual streams go as well.
        blocks: let whole residual blocks go as well; None: where the amount is one of time.
        compensation: ``"none"``, ``"mean"`` or ``"least_squares"``, see `freqprune.pruning.compensation`, or
            ``"sequential"``, see `freqprune.pruning.reconstruction`.
        reconstruction: settings of ``"sequential"``.
        calibrate_on: what second moments and the compensation see: tagged ``"frames"``, plain ``"images"``, or
            ``"both"``.
        frames_an_image: tagged frames of each calibration image.
        measured_images: calibration images for criteria that measure what a cut does to the logits; None: as many as
            have as many pixels as 256 of 32 x 32, but 16 at least.
        tagging: further arguments of `freqprune.tag`: those of `freqprune.tagging.readout.Readout`, ``frames_a_batch``.
        seed: of noise, positions and random scores.
        latency: for what a cut by time counts.

    Raises:
        InputError: for an unknown criterion, compensation, calibration or tag setting, or blocks with scores that are
            not on their scale.
    """

    amount: Amount
    criterion: str = "snr"
    components: Sequence[str] | str = "fundamentals"
    layers: Sequence[str] | str | None = None
    exclude: Sequence[str] | str | None = None
    streams: bool = False
    blocks: bool | None = None
    compensation: str = "none"
    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    calibrate_on: str = "frames"
    frames_an_image: int = 1
    measured_images: int | None = None
    tagging: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    latency: Latency = field(default_factory=Latency)

    def __post_init__(self) -> None:
        needs(self.criterion)
        one_of(METHODS, compensation=self.compensation)
        one_of(CALIBRATIONS, calibrate_on=self.calibrate_on)
        at_least(1, frames_an_image=self.frames_an_image)
        readout = {name: value for name, value in self.tagging.items() if name != "frames_a_batch"}
        check_fields(Readout, readout)
        Readout(**readout)
        if self.measured_images is not None:
            at_least(1, measured_images=self.measured_images)
        if self.with_blocks and self.criterion not in BLOCK_CRITERIA:
            raise InputError(
                f"blocks are ranked by the change of the logits, which importance.criterion = {self.criterion} does "
                f"not compare with; use {' or '.join(BLOCK_CRITERIA)}, or pruning.blocks=false"
            )
        if self.with_blocks:
            self.amount.check_blocks()
        if self.with_blocks and self.amount.normalize:
            raise InputError(
                "pruning.normalize = true divides the scores of each layer by their mean, which leaves nothing to "
                "compare blocks by; use pruning.normalize=false, or pruning.blocks=false"
            )

    @property
    def with_blocks(self) -> bool:
        return self.amount.by_time if self.blocks is None else self.blocks

    @property
    def inputs_an_image(self) -> int:
        """Network inputs that a calibration image makes."""
        return (self.calibrate_on != "frames") + (self.calibrate_on != "images") * self.frames_an_image

    @property
    def needs_moments(self) -> bool:
        return self.compensation in AT_ONCE or "moments" in needs(self.criterion)

    @property
    def needs_float64(self) -> bool:
        """Whether a cut solves equations, in numbers that Apple's accelerator (MPS) does not have."""
        return self.needs_moments or self.compensation == "sequential" or self.with_blocks
