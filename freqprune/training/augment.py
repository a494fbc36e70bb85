"""Augmentation of whole batches: one gather instead of a loop over images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from freqprune.training.pixels import sent

_LARGE = 64  # pixels of a row


def random_crop_flip(
    images: Tensor, padding: int, flip: bool, generator: torch.Generator | None = None, share: tuple[int, int] = (0, 1)
) -> Tensor:
    """Shift every image by its own random offset and flip every second one, as in He et al. 2016.

    Args:
        images: ``(n_images, n_channels, height, width)``.
        padding: zero pixels around the image before a crop of the old size; 0 for no crop.
        flip: flip each image left-right with probability 1/2.
        generator: source of randomness, on the CPU; torch's global one if left out.
        share: number of this process and how many there are, for a batch that was dealt out to them in turn: with
            generators in the same state each image is drawn what one process draws it.

    Returns:
        Images of the same shape and dtype.
    """
    (rank, size), n = share, len(images)
    flipped, offsets = torch.zeros(n, 1, dtype=torch.bool), None
    if flip:
        flipped = torch.randint(0, 2, (n * size, 1), generator=generator)[rank::size].bool()
    if padding:
        offsets = torch.randint(0, 2 * padding + 1, (2, n * size, 1), generator=generator)[:, rank::size]
    # Of large images whole rows are copied; of small ones, and on an accelerator, one gather is faster than a loop.
    if images.device.type == "cpu" and images.shape[-1] > _LARGE:
        shifts = offsets - padding if offsets is not None else torch.zeros(2, n, 1, dtype=torch.int64)
        return _image_by_image(images, flipped.flatten().tolist(), shifts.flatten(1).tolist())
    return _gathered(images, padding, flipped, offsets)


def _gathered(images: Tensor, padding: int, flipped: Tensor, offsets: Tensor | None) -> Tensor:
    n, _, height, width = images.shape
    device = images.device
    columns = torch.arange(width, device=device).expand(n, width)
    rows = torch.arange(height, device=device).expand(n, height)
    if flipped.any():
        columns = torch.where(sent(flipped, device), columns.flip(1), columns)
    if offsets is not None:
        offsets = sent(offsets, device)
        rows, columns = rows + offsets[0], columns + offsets[1]
        images = F.pad(images, (padding,) * 4)
    # Channels last while gathering: each pixel is one contiguous read.
    picked = images.permute(0, 2, 3, 1)[
        torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]
    ]
    return picked.permute(0, 3, 1, 2)


def _image_by_image(images: Tensor, flipped: list[bool], shifts: list[list[int]]) -> Tensor:
    height, width = images.shape[-2:]
    found = torch.zeros_like(images)
    for image, target, flip, down, right in zip(images, found, flipped, *shifts, strict=True):
        # Nothing is left of one that is moved by more than its size.
        top, left = min(height, max(0, down)), min(width, max(0, right))
        bottom, end = max(top, min(height, height + down)), max(left, min(width, width + right))
        if top == bottom or left == end:
            continue
        part = image[:, top:bottom, left:end]
        if flip:
            part, left, end = part.flip(2), width - end + 2 * right, width - left + 2 * right
        target[:, top - down : bottom - down, left - right : end - right] = part
    return found
