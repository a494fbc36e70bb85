"""Small images at first: how large training images are in each epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from freqprune.errors import InputError, check_fields


@dataclass(frozen=True)
class ProgressiveResizing:
    """Progressive resizing (Howard 2018, fast.ai), with the settings of MosaicML's Composer: training images are small
    at first and grow. A convolution of images half as high and wide costs a quarter.

    For trainings from weights drawn at random; fine-tuning sees images as they are.

    Args:
        initial_scale: side of the first images over their own.
        delay_fraction: share of the epochs that it stays so; then sides grow linearly.
        finetune_fraction: share of the epochs, the last, with images as they are; the very last one is so in any case.
        size_increment: sides are multiples of so many pixels, or their own.

    Raises:
        InputError: for an argument out of range.
    """

    initial_scale: float = 0.5
    delay_fraction: float = 0.5
    finetune_fraction: float = 0.2
    size_increment: int = 4

    def __post_init__(self) -> None:
        for name in ("initial_scale", "delay_fraction", "finetune_fraction"):
            low, value = name == "initial_scale", getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value <= 1 or (low and not value):
                raise InputError(
                    f"{name} of data.progressive_resizing must be a number in {'(' if low else '['}0, 1], got {value!r}"
                )
        if self.delay_fraction + self.finetune_fraction > 1:
            raise InputError(
                "delay_fraction and finetune_fraction of data.progressive_resizing are shares of the same epochs, "
                f"together at most 1, got {self.delay_fraction} and {self.finetune_fraction}"
            )
        if type(self.size_increment) is not int or self.size_increment < 1:
            raise InputError(
                "size_increment of data.progressive_resizing must be a whole number of pixels, at least 1, got "
                f"{self.size_increment!r}"
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> ProgressiveResizing | None:
        """From configuration; None for none."""
        if settings is None:
            return None
        if not isinstance(settings, Mapping):
            raise InputError(
                f"data.progressive_resizing must be null or a mapping such as {{initial_scale: 0.5}}, got {settings!r}"
            )
        check_fields(cls, settings)
        return cls(**settings)

    def scale(self, epoch: int, epochs: int) -> float:
        """Side of images over their own in an epoch, counted from 0, of so many.

        >>> [round(ProgressiveResizing().scale(epoch, 10), 2) for epoch in range(10)]
        [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.67, 0.83, 1.0, 1.0]
        """
        # Whole epochs stay whole: 0.7 * 10 is a little less than 7.
        start, end = (round(share * epochs, 6) for share in (self.delay_fraction, 1 - self.finetune_fraction))
        if epoch >= min(end, epochs - 1):
            return 1.0
        if epoch <= start:
            return self.initial_scale
        return self.initial_scale + (1 - self.initial_scale) * (epoch - start) / (end - start)

    def sides(self, epoch: int, epochs: int, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels of images in an epoch, those of whole images being given."""
        scale = self.scale(epoch, epochs)

        def side(whole: int) -> int:
            return min(whole, self.size_increment * max(1, round(whole * scale / self.size_increment)))

        return (height, width) if scale == 1 else (side(height), side(width))

    def cost(self, epochs: int, height: int, width: int, first: int = 0) -> float:
        """Pixels of the epochs from `first` on over those of as many with images as they are.

        >>> ProgressiveResizing().cost(10, 32, 32)
        0.465625
        """
        sides = [self.sides(epoch, epochs, height, width) for epoch in range(first, epochs)]
        return sum(h * w for h, w in sides) / max(1, len(sides) * height * width)

    def __call__(self, images: Tensor, epoch: int, epochs: int) -> Tensor:
        """Resize a batch ``(n_images, n_channels, height, width)`` of floats: bilinear, antialiased."""
        height, width = images.shape[-2:]
        sides = self.sides(epoch, epochs, height, width)
        if sides == (height, width):
            return images
        return F.interpolate(images, size=sides, mode="bilinear", antialias=True)
