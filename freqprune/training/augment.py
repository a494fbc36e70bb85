"""Augmentation of whole batches: one gather instead of a loop over images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def random_crop_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator | None = None) -> Tensor:
    """Shift every image by its own random offset and flip every second one, as in He et al. 2016.

    Args:
        images: ``(n_images, n_channels, height, width)``.
        padding: zero pixels around the image before a crop of the old size; 0 for no crop.
        flip: flip each image left-right with probability 1/2.
        generator: source of randomness, on the CPU; torch's global one if left out.

    Returns:
        Images of the same shape and dtype.
    """
    n, _, height, width = images.shape
    device = images.device
    columns = torch.arange(width, device=device).expand(n, width)
    rows = torch.arange(height, device=device).expand(n, height)
    if flip:
        flipped = torch.randint(0, 2, (n, 1), generator=generator).bool().to(device)
        columns = torch.where(flipped, columns.flip(1), columns)
    if padding:
        offsets = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator).to(device)
        rows, columns = rows + offsets[0], columns + offsets[1]
        images = F.pad(images, (padding,) * 4)
    # Channels last while gathering: each pixel is one contiguous read.
    picked = images.permute(0, 2, 3, 1)[
        torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]
    ]
    return picked.permute(0, 3, 1, 2)
