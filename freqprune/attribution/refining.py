"""Fine maps at few forwards: coarse parts first, then those that matter split into four."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.attribution.effects import Attribution
from freqprune.attribution.gates import frames_for
from freqprune.attribution.images import attribute
from freqprune.attribution.parts import find_parts
from freqprune.errors import InputError, at_least

# Parts that are split each time.
SHARE = 4


def attribute_fine(
    model: nn.Module,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    refine: int = 1,
    parts: str = "grid",
    grid: int | tuple[int, int] = 4,
    segments: Tensor | None = None,
    n_segments: int = 64,
    forwards: int = 512,
    until: float | None = None,
    **settings: Any,
) -> Attribution:
    """`freqprune.attribute` from coarse to fine: the quarter of an image's parts that have the largest effects is split
    into four each and tagged anew with the rest, as often as asked for.

    Args:
        model: as of `freqprune.attribute`.
        images: as there.
        target: as there.
        refine: how often parts are split; 0 for never.
        parts: the first parts, as there, but not ``"channels"``.
        grid: as there.
        segments: as there.
        n_segments: as there.
        forwards: frames that an image takes at most, all together: one recording each time before the last.
        until: of the last time.
        settings: further arguments of `freqprune.attribute`.

    Returns:
        The attribution of the last parts, which have other sizes and places from image to image.

    Raises:
        InputError: as `freqprune.attribute`; for fewer forwards than the last parts need.
    """
    at_least(0, refine=refine)
    if not refine:
        return attribute(
            model, images, target, parts=parts, grid=grid, segments=segments, n_segments=n_segments, forwards=forwards,
            until=until, **settings,
        )  # fmt: skip
    if parts == "channels":
        raise InputError("refine splits parts of the image, which channels are not; use refine=0 or parts=grid")
    if until is not None and not until > 0:
        raise InputError(f"until must be a standard error above 0, got {until}")
    numbers, names = find_parts(model, images, parts, grid, segments, n_segments)
    # Tiles alike split into four each time; of other parts it is known only that they do not become fewer.
    tiles = segments is None and parts in ("grid", "patches")
    _check_forwards(len(names), refine, forwards, 3 if tiles and _least_side(numbers[0]) >= 2**refine else 0)
    taken = 0
    for step in range(refine + 1):
        n_frames = frames_for(len(names))
        _check_enough(refine, len(names), taken, forwards)
        if step == refine:
            break
        found = attribute(model, images, target, segments=numbers, forwards=n_frames, **settings)
        target = target if found.target is None else found.target
        numbers = torch.stack([split(one, found.ranked(image), len(names)) for image, one in enumerate(numbers)])
        names = [f"part {number}" for number in range(int(numbers.max()) + 1)]
        taken += n_frames
    found = attribute(model, images, target, segments=numbers, forwards=forwards - taken, until=until, **settings)
    return replace(found, part_names=names, forwards=taken + found.forwards)


def _least_side(parts: Tensor) -> int:
    """Pixels of the shortest side of rectangular parts ``(height, width)``."""
    masks = (parts == number for number in parts[parts >= 0].unique())
    return min(int(mask.any(along).sum()) for mask in masks for along in (0, 1))


def _check_forwards(n_parts: int, refine: int, forwards: int, more: int) -> None:
    """Refuse, before anything is recorded, fewer forwards than are needed if each part that is split gives so many
    `more`."""
    taken = 0
    for _ in range(refine):
        taken += frames_for(n_parts)
        n_parts += more * max(1, n_parts // SHARE)
    _check_enough(refine, n_parts, taken, forwards)


def _check_enough(refine: int, n_parts: int, taken: int, forwards: int) -> None:
    n_frames = frames_for(n_parts)
    if taken + n_frames > forwards:
        raise InputError(
            f"refine = {refine}: {n_parts} parts need {n_frames} frames, after {taken} for coarser ones; "
            f"forwards must be at least {taken + n_frames}, got {forwards}"
        )


def split(parts: Tensor, ranked: list[int], n_parts: int) -> Tensor:
    """The first quarter of the parts split into four each, through the middle of their rows and columns; parts of one
    pixel stay.

    Args:
        parts: number of each pixel's part, -1 for none, ``(height, width)``.
        ranked: numbers of the parts that the image has, the first to split first.
        n_parts: new numbers begin with this.

    Returns:
        New numbers, ``(height, width)``.
    """
    found = parts.clone()
    for part in ranked[: max(1, len(ranked) // SHARE)]:
        rows, columns = (parts == part).nonzero(as_tuple=True)
        lower, right = rows > rows.float().mean(), columns > columns.float().mean()
        quarter = 2 * lower.long() + right.long()
        present = quarter.unique()
        for piece in present[1:]:
            found[rows[quarter == piece], columns[quarter == piece]] = n_parts
            n_parts += 1
    return found
