"""What parts fade to."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from freqprune.errors import InputError, one_of

BASELINES = ("mean", "grey", "blur")


def find_baseline(pixels: Tensor, baseline: str | Tensor) -> Tensor:
    """What the parts of images fade to, of the shape of the images.

    Args:
        pixels: ``(n_images, n_channels, height, width)``.
        baseline: the channel ``"mean"`` of each image; ``"grey"``, 0.5; ``"blur"``, the image itself behind a Gaussian
            whose standard deviation is a sixteenth of its shorter side; or pixels of the shape of the images or of one.

    Raises:
        InputError: for another name or shape.
    """
    if isinstance(baseline, Tensor):
        if baseline.shape not in (pixels.shape, pixels.shape[1:]):
            raise InputError(
                f"baseline must have the shape of the images, {tuple(pixels.shape)}, or of one of them, got "
                f"{tuple(baseline.shape)}"
            )
        if not baseline.is_floating_point():
            raise InputError(f"baseline must be floats as the images are, got {baseline.dtype}; divide uint8 by 255")
        return baseline.to(pixels).expand(pixels.shape)
    one_of(BASELINES, baseline=baseline)
    if baseline == "grey":
        return torch.full_like(pixels, 0.5)
    if baseline == "mean":
        return pixels.mean((2, 3), keepdim=True).expand(pixels.shape)
    sigma = min(pixels.shape[-2:]) / 16
    blurred: Tensor = gaussian_blur(pixels, 2 * math.ceil(2 * sigma) + 1, sigma)
    # Its weights add up to one but for rounding: white stays white.
    return blurred.clamp(pixels.amin(), pixels.amax())
