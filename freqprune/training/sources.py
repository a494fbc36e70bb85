"""Labelled images, and how they are split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from freqprune.errors import InputError
from freqprune.training.pixels import StoredPixels


@dataclass(frozen=True)
class Images:
    """Labelled images: ``pixels`` uint8 ``(n_images, n_channels, height, width)``, ``labels`` int64 ``(n_images,)``.

    Pixels that are stored elsewhere than in memory are read where they are indexed, ``pixels[:8]``.
    """

    pixels: Tensor | StoredPixels
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Images:
        """Some of the images; stored ones are not read."""
        pixels = self.pixels.subset(index) if isinstance(self.pixels, StoredPixels) else self.pixels[index]
        return Images(pixels, self.labels[index])

    def middle(self, size: int) -> Images:
        """The middle ``size x size`` pixels of each; none are copied or read."""
        if isinstance(self.pixels, StoredPixels):
            return Images(self.pixels.middle(size), self.labels)
        top, left = ((side - size) // 2 for side in self.pixels.shape[-2:])
        return Images(self.pixels[..., top : top + size, left : left + size], self.labels)

    def to(self, device: torch.device) -> Images:
        """The same images on a device; stored ones stay where they are."""
        if isinstance(self.pixels, StoredPixels):
            return self
        return Images(self.pixels.to(device), self.labels.to(device))


def picked(pixels: Tensor | StoredPixels, index: Tensor) -> Tensor:
    """``pixels[index]``, images copied as a whole where they lie in one piece: ten times as fast as byte by byte."""
    if isinstance(pixels, StoredPixels):
        return pixels[index]
    if pixels.is_contiguous(memory_format=torch.channels_last):
        return pixels.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return pixels.index_select(0, index)


@dataclass(frozen=True)
class Source:
    """A data set: training images, test images and the names of the classes."""

    train: Images
    test: Images
    classes: tuple[str, ...]


def stratified_split(images: Images, fraction: float, seed: int, classes: Sequence[str] = ()) -> tuple[Images, Images]:
    """Split into (rest, part) with `part` holding `fraction` of every class, the same for the same seed; both in random
    order. Where most classes have one image only, `fraction` of all. `classes` are their names, for messages.

    Raises:
        InputError: if a class has too few images for the split.
    """
    from sklearn.model_selection import train_test_split

    counts = images.labels.bincount()
    single = int((counts == 1).sum()) * 2 > int((counts > 0).sum())
    if not single and (counts == 1).any():
        lonely = int((counts == 1).nonzero()[0])
        name = classes[lonely] if lonely < len(classes) else lonely
        raise InputError(
            f"data.val_fraction = {fraction} does not split the one image of class {name}: one to train on and one to "
            "validate on are needed; add images of it, or remove the class"
        )
    try:
        rest, part = train_test_split(
            np.arange(len(images)),
            test_size=fraction,
            random_state=seed,
            stratify=None if single else images.labels.numpy(),
        )
    except ValueError as error:
        n_classes = len(images.labels.unique())
        raise InputError(
            f"data.val_fraction = {fraction} does not split {len(images)} images of {n_classes} classes ({error}); "
            f"hold out another share (data.val_fraction={math.ceil(100 * n_classes / len(images)) / 100:g}), or none "
            "(data.val_fraction=0)"
        ) from None
    return images[torch.from_numpy(rest)], images[torch.from_numpy(part)]


def channel_statistics(pixels: Tensor | StoredPixels) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, pixels scaled to [0, 1].

    >>> channel_statistics(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    ([0.5], [0.5])
    """
    if isinstance(pixels, StoredPixels):
        return pixels.statistics()
    means, stds = [], []
    for channel in range(pixels.shape[1]):
        # A histogram is exact and needs no float copy of the whole set.
        some = (torch.bincount(part[:, channel].flatten().int(), minlength=256) for part in pixels.split(1024))
        counts = torch.stack(list(some)).sum(0).double()
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = (counts * values).sum() / counts.sum()
        variance = (counts * (values - mean) ** 2).sum() / counts.sum()
        means.append(round(mean.item(), 6))
        stds.append(round(max(variance.sqrt().item(), 1e-3), 6))
    return means, stds


def as_folder(root: object) -> Path:
    """A folder by its name, which may be a number."""
    if root is None or root == "":
        raise InputError("data.root must name a folder, got none; leave it out for the default, if there is one")
    path = Path(str(root)).expanduser()
    if isinstance(root, int | float) and not path.is_dir():
        raise InputError(
            f"data.root = {root} is a number and no folder; Hydra reads names such as 2024_01_02 as numbers: quote the "
            "name, as in data.root='\"2024_01_02\"'"
        )
    return path


def as_floats(value: Sequence[float] | None) -> list[float] | None:
    """Plain list of floats, None stays None."""
    if isinstance(value, int | float):
        raise InputError(f"data.mean and data.std are lists, one number a channel, got {value}: write [{value}]")
    return None if value is None else [float(v) for v in value]
