"""Frequency tags: image parts and their flicker, turned into frames.

A stimulus is a set of image parts, each with one tag frequency. `Stimulus.frames` renders the frames of a batch of
images; everything about timing is computed from integers, so frames that are equal on paper are equal to the bit and
run only once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from freqprune.errors import InputError, at_least, one_of
from freqprune.tagging.components import Component, components
from freqprune.tagging.parts import LAYOUTS, part_masks
from freqprune.tagging.tag_frequencies import check_tag_freqs, cycles_of

MODES = ("luminance", "contrast")
PIVOTS = ("image", "gray")
CONTROLS = ("none", "shuffled", "static")


@dataclass(frozen=True)
class Stimulus:
    """Parts of an image that flicker sinusoidally, each at its own tag frequency.

    Pixel values are scaled by ``1 - depth + depth * (1 + sin(2 pi f t + phase)) / 2``. In ``"luminance"`` mode the
    pixel itself is scaled (Böge et al. 2024, arXiv 2411.10084), in ``"contrast"`` mode its distance from the pivot.
    Pixels outside every part stay as they are.

    Args:
        tag_freqs: one frequency a part, in Hz.
        parts: name of a layout (see `part_masks`) or a boolean tensor ``(n_parts, height, width)``.
        frame_rate: frames per second.
        n_frames: frames of the recording; it lasts ``n_frames / frame_rate`` seconds.
        mode: ``"luminance"`` or ``"contrast"``.
        pivot: contrast mode only: ``"image"`` (each image's channel means), ``"gray"`` (0.5) or the data set's channel
            means.
        depth: modulation depth in (0, 1].
        phases: one phase a part in radians; zero if left out.
        gap: pixels left untagged between the parts of a layout.
        max_order: highest |n| + |m| + ... of the response components.
        control: ``"none"``; ``"shuffled"``: the same frames in one random order for all images, so that no part follows
            its frequency (what little light that order leaves at a tag is the same in every image: no p-value holds);
            ``"static"``: one frame, every part at its mean scale.

    Raises:
        InputError: a tag frequency off its bin, at or above Nyquist, or given twice; noise bins that hold a predicted
            response; any other argument out of range. Each message names the nearest legal values.
    """

    tag_freqs: Sequence[float] = (6.0, 7.5)
    parts: str | Tensor = "halves"
    frame_rate: float = 120.0
    n_frames: int = 240
    mode: str = "luminance"
    pivot: str | Sequence[float] = "image"
    depth: float = 0.5
    phases: Sequence[float] | None = None
    gap: int = 0
    max_order: int = 4
    control: str = "none"
    part_names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tag_freqs", tuple(float(f) for f in self.tag_freqs))
        if self.n_frames < 8 or int(self.n_frames) != self.n_frames:
            raise InputError(f"n_frames must be a whole number of at least 8, got {self.n_frames}")
        object.__setattr__(self, "n_frames", int(self.n_frames))
        for name, low in (("frame_rate", 0.0), ("depth", 0.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > low):
                raise InputError(f"{name} must be above {low}, got {value}")
        if self.depth > 1:
            raise InputError(
                f"depth must lie in (0, 1], got {self.depth}; 1 lets the part go dark, 0.5 keeps half of its light"
            )
        one_of(MODES, mode=self.mode)
        if not isinstance(self.pivot, str):
            object.__setattr__(self, "pivot", tuple(float(mean) for mean in self.pivot))
        elif self.pivot not in PIVOTS:
            raise InputError(
                f"pivot must be one of {', '.join(PIVOTS)} or the data set's channel means in [0, 1], got "
                f"{self.pivot!r}"
            )
        one_of(CONTROLS, control=self.control)
        at_least(1, max_order=self.max_order)
        if self.gap < 0:
            raise InputError(f"gap must be 0 or more pixels, got {self.gap}")
        if self.phases is not None:
            object.__setattr__(self, "phases", tuple(float(phase) for phase in self.phases))
            if not all(math.isfinite(phase) for phase in self.phases):
                raise InputError(f"phases must be finite, in radians, got {list(self.phases)}")
        if self.phases is not None and len(self.phases) != len(self.tag_freqs):
            raise InputError(
                f"phases must give one phase a part: {len(self.tag_freqs)} tag frequencies, {len(self.phases)} phases"
            )
        object.__setattr__(self, "part_names", self._name_parts())
        check_tag_freqs(self.tag_freqs, self.frame_rate, self.n_frames, self.max_order)

    def _name_parts(self) -> tuple[str, ...]:
        if isinstance(self.parts, Tensor):
            if self.parts.dim() != 3 or self.parts.dtype != torch.bool:
                raise InputError(
                    f"parts must be a boolean tensor (n_parts, height, width), got {self.parts.dtype} "
                    f"{tuple(self.parts.shape)}"
                )
            if (self.parts.sum(0) > 1).any():
                raise InputError("parts overlap: a pixel can follow one tag frequency only; make the masks disjoint")
            if not self.parts.flatten(1).any(1).all():
                raise InputError(
                    f"parts[{int((~self.parts.flatten(1).any(1)).nonzero()[0])}] is empty; every part needs at least "
                    "one pixel"
                )
            names = tuple(f"part {i + 1}" for i in range(len(self.parts)))
        else:
            part_masks(self.parts, 64, 64)
            names = LAYOUTS[self.parts][0]
        if len(names) != len(self.tag_freqs):
            raise InputError(
                f"tag_freqs must give one frequency a part: {len(names)} parts ({', '.join(names)}), "
                f"{len(self.tag_freqs)} frequencies"
            )
        return names

    @property
    def cycles(self) -> tuple[int, ...]:
        """Cycles of each tag in the recording, which is also its bin in the spectrum."""
        return cycles_of(self.tag_freqs, self.frame_rate, self.n_frames)

    @cached_property
    def components(self) -> list[Component]:
        """Response components up to `max_order`, by ascending frequency."""
        return components(self.cycles, self.n_frames, self.frame_rate, self.max_order)

    @cached_property
    def scale(self) -> Tensor:
        """Pixel scale of every part over time, float64 ``(n_parts, n_frames)``, in [1 - depth, 1]."""
        phases = self.phases or (0.0,) * len(self.tag_freqs)
        rows = [
            _sine(cycles, self.n_frames)
            if phase == 0
            else np.sin(2 * np.pi * (cycles * np.arange(self.n_frames) % self.n_frames) / self.n_frames + phase)
            for cycles, phase in zip(self.cycles, phases, strict=True)
        ]
        sines = np.stack(rows)
        if self.control == "shuffled":
            sines = sines[:, np.random.default_rng(0).permutation(self.n_frames)]
        elif self.control == "static":
            sines = np.zeros_like(sines)
        return torch.from_numpy(1 - self.depth + self.depth * (1 + sines) / 2)

    @cached_property
    def distinct_frames(self) -> tuple[Tensor, Tensor]:
        """Frames that differ, and where each goes.

        Returns:
            ``(first, inverse)``: ``first`` ``(n_distinct,)`` holds the first frame of each distinct image; frame t of
                the recording shows
            the same image as frame ``first[inverse[t]]``. For 6 and 7.5 Hz at 120 frames/s 49 of 240 frames are
            distinct: the two tags repeat together every 80 frames, and a sine takes most of its values twice a cycle.
        """
        _, first, inverse = np.unique(self.scale.numpy(), axis=1, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return torch.from_numpy(first[order]), torch.from_numpy(rank[inverse.reshape(-1)])

    def masks(self, height: int, width: int) -> Tensor:
        """Masks of the parts for images of this size, boolean ``(n_parts, height, width)``.

        Raises:
            InputError: if the user's masks have another size.
        """
        if isinstance(self.parts, Tensor):
            if self.parts.shape[1:] != (height, width):
                raise InputError(
                    f"parts are masks of {tuple(self.parts.shape[1:])} pixels, the images have {(height, width)}; "
                    "resize one of them"
                )
            return self.parts
        return part_masks(self.parts, height, width, self.gap)

    def frames(self, images: Tensor, which: Tensor | None = None) -> Tensor:
        """Render frames.

        Args:
            images: pixels in [0, 1], float ``(n_images, n_channels, height, width)``, not normalised.
            which: frame numbers ``(n,)``; all of them if left out.

        Returns:
            ``(n_images, n, n_channels, height, width)`` in the images' dtype, on their device.

        Raises:
            InputError: for images of the wrong shape or dtype, or pixels outside [0, 1].
        """
        return self.render(images, self.scale if which is None else self.scale[:, which.cpu()])

    def render(self, images: Tensor, scale: Tensor) -> Tensor:
        """Frames with given scales of the parts, ``(n_parts, n)``; otherwise as `frames`."""
        check_pixels(images)
        masks = self.masks(*images.shape[-2:]).to(images.device)
        # Per frame and pixel: the scale of the part it lies in, 1 outside every part.
        part = torch.where(masks.any(0), masks.int().argmax(0), len(masks))
        gain = nn.functional.pad(scale.to(images), (0, 0, 0, 1), value=1.0).T[:, part]
        gain = gain[None, :, None]
        if self.mode == "luminance":
            return images[:, None] * gain
        pivot = self._pivot(images)[:, None]
        return pivot + gain * (images[:, None] - pivot)

    def _pivot(self, images: Tensor) -> Tensor:
        if self.pivot == "image":
            return images.mean(dim=(2, 3), keepdim=True)
        if self.pivot == "gray":
            return images.new_full((1, 1, 1, 1), 0.5)
        pivot = images.new_tensor([float(v) for v in self.pivot])
        if len(pivot) != images.shape[1] or pivot.min() < 0 or pivot.max() > 1:
            raise InputError(f"pivot must hold {images.shape[1]} channel means in [0, 1], got {list(self.pivot)}")
        return pivot.view(1, -1, 1, 1)


def check_pixels(images: Tensor) -> None:
    """Raise InputError unless `images` is a float batch ``(n_images, n_channels, height, width)`` of pixels in [0,
    1]."""
    if images.dim() != 4 or images.shape[0] == 0 or not images.is_floating_point():
        raise InputError(
            f"images must be floats of shape (n_images, n_channels, height, width), got {images.dtype} "
            f"{tuple(images.shape)}; divide uint8 pixels by 255"
        )
    low, high = images.amin().item(), images.amax().item()
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"images must hold pixels in [0, 1], got values from {low:.3g} to {high:.3g}; tags modulate raw pixels, so "
            "undo the "
            "normalisation and give mean and std instead: it is applied to every frame"
        )


def _sine(cycles: int, n_frames: int) -> np.ndarray:
    """sin(2 pi cycles t / n_frames) for every frame, equal on paper means equal to the bit.

    The phase is folded into the first quarter of the cycle as an integer (in units of a quarter over n_frames) before
    the sine is taken.
    """
    step = (4 * cycles * np.arange(n_frames, dtype=np.int64)) % (4 * n_frames)
    quarter = n_frames
    sign = np.where(step >= 2 * quarter, -1.0, 1.0)
    step = step % (2 * quarter)
    step = np.minimum(step, 2 * quarter - step)
    return sign * np.sin(np.pi / 2 * (step / quarter))
