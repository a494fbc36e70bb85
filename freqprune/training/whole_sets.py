"""Data sets that are read as a whole: CIFAR-10 and scikit-learn's bundled digits."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freqprune.errors import InputError
from freqprune.networks import CIFAR10
from freqprune.training.datamodule import ImageData
from freqprune.training.downloads import alone
from freqprune.training.sources import Images, Source, as_folder, stratified_split


class CIFAR10Data(ImageData):
    """CIFAR-10, downloaded by torchvision into `root` on first use; normalised with the data set's own statistics by
    default."""

    def __init__(self, root: str | Path = "data", download: bool = True, **settings: Any) -> None:
        if settings.get("mean") is None and settings.get("std") is None:
            settings |= {"mean": CIFAR10.mean, "std": CIFAR10.std}
        super().__init__(**settings)
        self.root, self.download = as_folder(root), download

    def load(self) -> Source:
        return cifar10(self.root, self.download)


class DigitsData(ImageData):
    """scikit-learn's bundled digits as 3 x 32 x 32; no download."""

    def load(self) -> Source:
        return digits()


def cifar10(root: str | Path, download: bool = True) -> Source:
    """CIFAR-10 (Krizhevsky 2009) by torchvision, which downloads, checks (MD5) and caches it in `root`.

    Raises:
        InputError: if it is not in `root` and cannot be downloaded.
    """
    from torchvision import datasets

    try:
        with alone(root) if download else nullcontext():
            parts = [datasets.CIFAR10(str(root), train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"CIFAR-10 is not in data.root = {root} and could not be downloaded ({error}). On a machine with a network "
            "run this once and copy "
            "the folder; or point data.root at a folder that holds cifar-10-batches-py; or unpack the images as "
            "train/<class>/*.png and "
            "test/<class>/*.png and use data=image_folder data.root=<folder>"
        ) from error
    # Sorted by class as a folder tree is, so that both give the same validation split.
    orders = [np.argsort(p.targets, kind="stable") for p in parts]
    train, test = (
        Images(torch.from_numpy(p.data[order]).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)[order])
        for p, order in zip(parts, orders, strict=True)
    )
    return Source(train, test, tuple(parts[0].classes))


def digits() -> Source:
    """scikit-learn's bundled handwritten digits (1,797 of 8 x 8), enlarged to 3 x 32 x 32; every fifth of a class is a
    test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    images = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    everything = Images(
        (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(bunch.target).long()
    )
    train, test = stratified_split(everything, 0.2, seed=0)
    return Source(train, test, tuple(str(name) for name in bunch.target_names))
