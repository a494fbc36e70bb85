"""Image parts: masks that say which pixels share a tag."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from freqprune.errors import InputError, closest


def _halves(y: Tensor, x: Tensor, gap: tuple[float, float]) -> list[Tensor]:
    return [(x < -gap[1]) & (y < 2), (x > gap[1]) & (y < 2)]


def _top_bottom(y: Tensor, x: Tensor, gap: tuple[float, float]) -> list[Tensor]:
    return [(y < -gap[0]) & (x < 2), (y > gap[0]) & (x < 2)]


def _quadrants(y: Tensor, x: Tensor, gap: tuple[float, float]) -> list[Tensor]:
    return [vertical & horizontal for vertical in (y < -gap[0], y > gap[0]) for horizontal in (x < -gap[1], x > gap[1])]


def _centre_surround(y: Tensor, x: Tensor, gap: tuple[float, float]) -> list[Tensor]:
    # A disc of half the image's area against the rest.
    radius = torch.sqrt(y**2 + x**2)
    boundary = math.sqrt(2 / math.pi)
    # Half of the gap along the ray through each pixel, in the units of its radius.
    half = radius / torch.hypot(y / gap[0], x / gap[1]).clamp(min=1e-12)
    return [radius < boundary - half, radius > boundary + half]


LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[[Tensor, Tensor, tuple[float, float]], list[Tensor]]]] = {
    "halves": (("left", "right"), _halves),
    "top_bottom": (("top", "bottom"), _top_bottom),
    "quadrants": (("top left", "top right", "bottom left", "bottom right"), _quadrants),
    "centre_surround": (("centre", "surround"), _centre_surround),
}


def part_masks(layout: str, height: int, width: int, gap: int = 0) -> Tensor:
    """Masks of a named layout.

    Args:
        layout: ``"halves"``, ``"top_bottom"``, ``"quadrants"`` or ``"centre_surround"``.
        height: image height in pixels.
        width: image width in pixels.
        gap: pixels left untagged between parts; one more where the middle of an even number of pixels is to have an odd
            gap, or the other way round.

    Returns:
        Boolean ``(n_parts, height, width)``; no pixel lies in two parts.

    >>> part_masks("halves", 2, 4).int().tolist()
    [[[1, 1, 0, 0], [1, 1, 0, 0]], [[0, 0, 1, 1], [0, 0, 1, 1]]]

    Raises:
        InputError: for an unknown layout, or a gap that leaves a part empty.
    """
    if not isinstance(layout, str):
        raise InputError(
            f"parts must be one of {', '.join(LAYOUTS)} or a boolean mask tensor (n_parts, height, width), got "
            f"{type(layout).__name__}"
        )
    if layout not in LAYOUTS:
        raise InputError(
            f"parts must be one of {', '.join(LAYOUTS)} or a mask tensor, got {layout!r}{closest(layout, LAYOUTS)}"
        )
    # Pixel centres in [-1, 1]; the gap is a distance in pixels, half of it on either side of the border. Centres that
    # lie on its edge, where one of gap and size is odd, belong to the gap on both sides, whatever rounding says.
    y, x = torch.meshgrid(
        (torch.arange(height, dtype=torch.float64) + 0.5) * 2 / height - 1,
        (torch.arange(width, dtype=torch.float64) + 0.5) * 2 / width - 1,
        indexing="ij",
    )
    masks = torch.stack(LAYOUTS[layout][1](y, x, ((gap + 1e-6) / height, (gap + 1e-6) / width)))
    for name, mask in zip(LAYOUTS[layout][0], masks, strict=True):
        if not mask.any():
            raise InputError(
                f"gap = {gap} pixels leaves the part {name!r} of a {height} x {width} image empty; use a smaller gap"
            )
    return masks
