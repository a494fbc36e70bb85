"""What images there are, and how one of them is read: nothing of the pixels is held."""

from __future__ import annotations

import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from torch import Tensor

from freqprune.errors import InputError, one_of
from freqprune.reports import is_quiet
from freqprune.training.image_files import ENDINGS, UNREADABLE, in_bytes, upright

# Files that are asked about in a row, rows at once where one takes longer than so many seconds, and rows from which on
# there is a bar.
_ASKED, _AT_ONCE, _SLOW, _FEW = 512, 32, 1e-4, 100
_INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Fitting:
    """How images are brought to one size.

    Args:
        image_size: height and width to resize to; needed only where the images differ in size.
        resize: instead, resize the shorter side to this and cut the middle of `image_size` out.
        interpolation: ``"bilinear"`` or ``"bicubic"``.

    Raises:
        InputError: for an argument out of range.
    """

    image_size: int | None = None
    resize: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        one_of(tuple(_INTERPOLATIONS), **{"data.interpolation": self.interpolation})
        for name, value in (("image_size", self.image_size), ("resize", self.resize)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(
                    f"data.{name} must be one whole number of pixels, at least 1, as images become square, got "
                    f"{value!r}"
                )
        if self.resize is not None and (self.image_size is None or self.resize < self.image_size):
            raise InputError(
                f"data.resize = {self.resize} is the shorter side out of which data.image_size = {self.image_size} is "
                "cut: set both, resize the larger"
            )

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """An RGB image as ``(height, width, 3)``, a grey one as ``(height, width)``."""
        size, how = self.image_size, _INTERPOLATIONS[self.interpolation]
        if self.resize is not None and size is not None:
            # As torchvision rounds the longer side.
            shorter = min(image.size)
            width, height = (int(self.resize * side / shorter) for side in image.size)
            image = image.resize((width, height), how)
            left, top = (round((side - size) / 2) for side in image.size)
            image = image.crop((left, top, left + size, top + size))
        elif size is not None and image.size != (size, size):
            image = image.resize((size, size), how)
        return np.array(image)


class Listing(ABC):
    """Labelled images that lie somewhere, in a fixed order.

    Attributes:
        place: where they lie, for messages.
        beside: what tells them from other data whose files of bytes lie in the same folder; nothing if there are none.
        version: what tells them from other data of the same place; nothing if there are none.
        labels: int64 ``(n_images,)``.
    """

    place: str
    beside: str = ""
    version: str = ""
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, number: int) -> str:
        """What a person finds an image by."""

    @abstractmethod
    def open(self, number: int) -> Image.Image:
        """An image, not yet decoded if that can be put off."""

    @abstractmethod
    def stamps(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Two numbers for each of some images, ``(n_images, 2)``, that are others once it has changed."""

    @abstractmethod
    def digest(self) -> str:
        """A word that is another once there are other images, or in another order."""


class FolderListing(Listing):
    """Images of a folder tree ``folder/<class>/*`` whose names end in one of `ENDINGS`.

    Attributes:
        classes: names of the class folders, sorted.

    Raises:
        InputError: if the folder holds one class, or a class folder is empty.
    """

    def __init__(self, folder: Path) -> None:
        from torchvision.datasets import ImageFolder

        def hidden(path: str) -> bool:
            """Such as a notebook's or a Mac's copies."""
            return f"{os.sep}." in path[len(str(folder)) :]

        class Seen(ImageFolder):
            def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
                names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
                if not names:
                    raise FileNotFoundError(f"no class folder in {directory}")
                return names, {name: number for number, name in enumerate(names)}

        try:
            tree = Seen(str(folder), is_valid_file=lambda path: path.lower().endswith(ENDINGS) and not hidden(path))
        except FileNotFoundError as error:
            raise InputError(f"{folder} holds no images, or a class folder in it is empty: {error}") from None
        if len(tree.classes) < 2:
            raise InputError(
                f"{folder} holds one class ({tree.classes[0]}); a classifier needs at least two class folders"
            )
        self.folder, self.place, self.classes = folder, str(folder), tuple(tree.classes)
        self.labels = torch.tensor(tree.targets)
        # Bytes in one block: a million Python strings would be copied page by page into every worker.
        self._names = np.array([os.fsencode(path[len(str(folder)) + 1 :]) for path, _ in tree.samples])

    def name(self, number: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self._names[number]))

    def open(self, number: int) -> Image.Image:
        return Image.open(self.name(number))

    def stamps(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        blocks = [numbers[i : i + _ASKED] for i in range(0, len(numbers), _ASKED)]
        began = time.perf_counter()
        found = [self._stamps(block) for block in blocks[:1]]
        # A network disk answers many at once in the time of one; threads would make a fast one slower.
        threads = _AT_ONCE if time.perf_counter() - began > _SLOW * _ASKED else 1
        with ThreadPoolExecutor(threads) as pool:
            asked = pool.map(self._stamps, blocks[1:])
            what, total = f"looking for changes in {self.place}", len(blocks) - 1
            quiet = is_quiet() or total < _FEW
            found += track(asked, description=what, total=total, transient=True, disable=quiet)
        return np.concatenate(found) if found else np.empty((0, 2), np.int64)

    def _stamps(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.empty((len(numbers), 2), np.int64)
        for place, number in enumerate(numbers.tolist()):
            try:
                there = os.stat(self.name(number))
            except OSError as error:
                raise InputError(
                    f"{self.name(number)} cannot be read ({error.strerror}); repair or remove it"
                ) from None
            found[place] = there.st_size, there.st_mtime_ns
        return found

    def digest(self) -> str:
        return hashlib.sha256(b"\n".join([str(len(self)).encode(), self._names.tobytes()])).hexdigest()


class Chosen(Listing):
    """Some images of a listing.

    Args:
        listing: all of them.
        numbers: which, ``(n_images,)``.
    """

    def __init__(self, listing: Listing, numbers: Tensor) -> None:
        self.listing, self.numbers = listing, numbers.numpy()
        self.place, self.beside, self.labels = listing.place, listing.beside, listing.labels[numbers]
        # Files of their own: other limits leave other images.
        self.version = f"{listing.version} {hashlib.sha256(self.numbers.tobytes()).hexdigest()}"

    def name(self, number: int) -> str:
        return self.listing.name(int(self.numbers[number]))

    def open(self, number: int) -> Image.Image:
        return self.listing.open(int(self.numbers[number]))

    def stamps(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.listing.stamps(self.numbers[numbers])

    def digest(self) -> str:
        return self.listing.digest()


def check_classes(train: Listing, test: Listing, classes: Sequence[str], way_out: str) -> None:
    """Refuse classes that only one of two parts shows: an accuracy over other classes than were trained is none.

    Args:
        train: the part to train on.
        test: the part to test on.
        classes: names of the classes.
        way_out: what to do about it.

    Raises:
        InputError: names the classes.
    """
    odd = sorted(set(train.labels.tolist()) ^ set(test.labels.tolist()))
    if odd:
        names = ", ".join(classes[number] for number in odd[:5]) + (f" and {len(odd) - 5} more" if odd[5:] else "")
        raise InputError(
            f"train images ({train.place}) and test images ({test.place}) must be of the same classes; only one part "
            f"has {names}: {way_out}"
        )


class Reader:
    """Reads single images of a listing, all in one shape.

    Args:
        listing: what images there are.
        fitting: how they are brought to one size.

    Attributes:
        shape: of an image, ``(height, width, n_channels)``: that of the first.
    """

    def __init__(self, listing: Listing, fitting: Fitting) -> None:
        self.listing, self.fitting = listing, fitting
        self.shape: tuple[int, ...] = self._read(0).shape

    def __len__(self) -> int:
        return len(self.listing)

    @property
    def n_bytes(self) -> int:
        """Size of all images."""
        return len(self) * int(np.prod(self.shape))

    def __call__(self, number: int) -> NDArray[np.uint8]:
        """An image as ``(height, width, n_channels)``.

        Raises:
            InputError: names an image that cannot be read or has another size than the first.
        """
        array = self._read(number)
        if array.shape != self.shape:
            raise InputError(
                f"{self.listing.name(number)} has {array.shape[:2]} pixels, {self.listing.name(0)} has "
                f"{self.shape[:2]}; set data.image_size to resize all of them"
            )
        return array

    def _read(self, number: int) -> NDArray[np.uint8]:
        try:
            with self.listing.open(number) as image:
                return self.fitting(in_bytes(upright(image), "RGB"))
        except UNREADABLE as error:
            raise InputError(
                f"{self.listing.name(number)} is not a readable image ({error}); repair or remove it"
            ) from None

    def describe(self) -> dict[str, Any]:
        """What a cache of these images has to agree with."""
        return {"images": self.listing.digest(), "shape": list(self.shape), "fitting": vars(self.fitting)}
