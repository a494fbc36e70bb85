"""Data modules over images that are listed and read one by one; of a folder tree."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from freqprune.errors import InputError, one_of
from freqprune.training.caching import CACHES, hold
from freqprune.training.datamodule import ImageData
from freqprune.training.listing import Chosen, Fitting, FolderListing, Listing, Reader
from freqprune.training.sources import Images, Source, as_folder

log = logging.getLogger(__name__)


class ListedData(ImageData):
    """Images that are read one by one, brought to one size, and held in memory, on disk or not at all.

    Args:
        image_size: height and width to resize to; needed only where the images differ in size.
        resize: instead, resize the shorter side to this and cut the middle of `image_size` out.
        interpolation: ``"bilinear"`` (None) or ``"bicubic"``.
        cache: ``"memory"``, ``"disk"``, ``"none"`` or ``"auto"``, see `freqprune.training.caching.hold`.
        cache_dir: folder for the files of ``"disk"`` and ``"none"``; beside the data if left out.
        settings: of `ImageData`.

    Raises:
        InputError: for an argument out of range.
    """

    def __init__(
        self,
        image_size: int | None = None,
        resize: int | None = None,
        interpolation: str | None = None,
        cache: str = "auto",
        cache_dir: str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.fitting = Fitting(image_size, resize, interpolation or "bilinear")
        one_of(CACHES, **{"data.cache": cache})
        self.cache, self.cache_dir = cache, cache_dir

    @abstractmethod
    def listings(self) -> tuple[Listing, Listing, tuple[str, ...]]:
        """Training images, test images, names of the classes."""

    @abstractmethod
    def beside(self) -> Path:
        """Where the data lie."""

    def load(self) -> Source:
        train, test, classes = self.listings()
        held = self._held({"train": train, "test": test})
        return Source(held[0], held[1], classes)

    def parts(self) -> tuple[Images, Images | None, Images, tuple[str, ...]]:
        if (self.limit_train, self.limit_val, self.limit_test) == (None, None, None):
            return super().parts()
        train, test, classes = self.listings()
        numbered = [Images(torch.arange(len(one)), one.labels) for one in (train, test)]
        some, val, tested = self.divided(numbered[0], numbered[1], classes)
        # Test images, and all training images together, lie where they lie without limits, unless one is theirs. In
        # memory nothing lies yet: there each part is read by itself, and no other image.
        apart = self.limit_train is not None or self.cache == "memory"
        listings = {"train": train, "test": test}
        if apart:
            listings["train"] = Chosen(train, some.pixels[:])
            listings |= {} if val is None else {"val": Chosen(train, val.pixels[:])}
        if self.limit_test is not None:
            listings["test"] = Chosen(test, tested.pixels[:])
        held = dict(zip(listings, self._held(listings), strict=True))
        if not apart:
            whole = held["train"]
            held["train"] = whole[some.pixels[:]]
            held |= {} if val is None else {"val": whole[val.pixels[:]]}
        return held["train"], held.get("val"), held["test"], classes

    def _held(self, listings: Mapping[str, Listing]) -> list[Images]:
        """Images by their split, held where `cache` says."""
        readers = {split: Reader(listing, self.fitting) for split, listing in listings.items()}
        shapes = {split: reader.shape[:2] for split, reader in readers.items()}
        for split, shape in shapes.items():
            if shape != shapes["train"]:
                raise InputError(
                    f"train images are {shapes['train']} pixels, {split} images {shape}; set data.image_size"
                )
        pixels = hold(readers, self.cache, self.cache_dir, self.beside())
        return [Images(some, listing.labels) for some, listing in zip(pixels, listings.values(), strict=True)]


class ImageFolderData(ListedData):
    """Any folder tree ``root/{train,test}/<class>/*``, in RGB; mean and std measured on its training images by default.

    Args:
        root: the folder.
        n_classes: folders are named by the number of their class, ``0`` to ``n_classes - 1``, and need not be there for
            all; if left out, classes are numbered by the order of their names.
        settings: of `ListedData`.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int | None = None,
        resize: int | None = None,
        interpolation: str | None = None,
        n_classes: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(image_size, resize, interpolation, **settings)
        self.root, self.n_classes = as_folder(root), n_classes

    def beside(self) -> Path:
        return self.root

    def listings(self) -> tuple[Listing, Listing, tuple[str, ...]]:
        root = self.root
        if not root.is_dir():
            raise InputError(
                f"data.root = {root} is not a folder; it must hold train/<class>/*.png and test/<class>/*.png"
            )
        # Before one of them is walked through, which may take minutes.
        for split in ("train", "test"):
            if not (root / split).is_dir():
                val = "; rename val to it, or link it" if split == "test" and (root / "val").is_dir() else ""
                raise InputError(
                    f"{root / split} is missing{val}; data.root must hold train/<class>/*.png and test/<class>/*.png"
                )
        folders = [root / name for name in ("val", "valid", "validation") if (root / name).is_dir()]
        # It may be the test images under another name.
        if beside := [folder for folder in folders if not folder.samefile(root / "test")]:
            rank_zero_only(log.warning)(
                "%s is not read: for validation data.val_fraction of the training images is held out; to train on "
                "those images too, move them into train", beside[0]
            )  # fmt: skip
        train, test = (FolderListing(root / split) for split in ("train", "test"))
        if self.n_classes is not None:
            for listing in (train, test):
                listing.labels = _numbers(listing.folder, listing.classes, self.n_classes)[listing.labels]
            return train, test, tuple(map(str, range(self.n_classes)))
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise InputError(
                f"train and test of {root} must hold the same classes; only one of them has {', '.join(odd)}"
            )
        return train, test, train.classes


def _numbers(folder: Path, names: Sequence[str], n_classes: int) -> Tensor:
    """Class numbers that folders are named by."""
    odd = [name for name in names if not (name.isdecimal() and int(name) < n_classes)]
    if odd:
        raise InputError(
            f"data.n_classes = {n_classes} says that the folders in {folder} are named by the number of their class, 0 "
            f"to {n_classes - 1}; {odd[0]!r} is not: rename it, or leave data.n_classes out"
        )
    return torch.tensor([int(name) for name in names])
