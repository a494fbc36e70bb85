"""Where images come from: CIFAR-10, a folder tree, or scikit-learn's bundled digits, all as uint8 tensors."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from freqprune.errors import InputError, one_of

_INTERPOLATIONS = {"bilinear": "BILINEAR", "bicubic": "BICUBIC"}
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Images:
    """Labelled images: ``pixels`` uint8 ``(n_images, n_channels, height, width)``, ``labels`` int64 ``(n_images,)``."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device) -> Images:
        """The same images on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Source:
    """A data set: training images, test images and the names of the classes."""

    train: Images
    test: Images
    classes: tuple[str, ...]


def cifar10(root: str | Path, download: bool = True) -> Source:
    """CIFAR-10 (Krizhevsky 2009) by torchvision, which downloads, checks (MD5) and caches it in `root`.

    Raises:
        InputError: if it is not in `root` and cannot be downloaded.
    """
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(str(root), train=train, download=download) for train in (True, False)]
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


def image_folder(
    root: str | Path,
    image_size: int | None = None,
    resize: int | None = None,
    interpolation: str = "bilinear",
    n_classes: int | None = None,
) -> Source:
    """Images from ``root/train/<class>/*`` and ``root/test/<class>/*``, in RGB.

    Args:
        root: the folder.
        image_size: height and width to resize to; needed only where the images differ in size.
        resize: instead, resize the shorter side to this and cut the middle of `image_size` out.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        n_classes: folders are named by the number of their class, ``0`` to ``n_classes - 1``, and need not be there for
            all; if left out, classes are numbered by the order of their names.

    Raises:
        InputError: if a folder is missing or empty, holds one class, holds a file that is no readable image, or images
            differ in size.
    """
    root = Path(root)
    one_of(tuple(_INTERPOLATIONS), **{"data.interpolation": interpolation})
    if resize is not None and (image_size is None or resize < image_size):
        raise InputError(
            f"data.resize = {resize} is the shorter side out of which data.image_size = {image_size} is cut: set both, "
            "resize the larger"
        )
    if not root.is_dir():
        raise InputError(f"data.root = {root} is not a folder; it must hold train/<class>/*.png and test/<class>/*.png")
    parts, names = [], []
    for split in ("train", "test"):
        images, classes = _read_tree(root / split, image_size, resize, interpolation)
        if n_classes is not None:
            images = Images(images.pixels, _numbers(root / split, classes, n_classes)[images.labels])
            classes = tuple(map(str, range(n_classes)))
        parts.append(images)
        names.append(classes)
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1]))
        raise InputError(f"train and test of {root} must hold the same classes; only one of them has {', '.join(odd)}")
    if parts[0].pixels.shape[1:] != parts[1].pixels.shape[1:]:
        raise InputError(
            f"train images are {tuple(parts[0].pixels.shape[2:])} pixels, test images "
            f"{tuple(parts[1].pixels.shape[2:])}; set data.image_size"
        )
    return Source(parts[0], parts[1], names[0])


def _numbers(folder: Path, names: Sequence[str], n_classes: int) -> Tensor:
    """Class numbers that folders are named by."""
    odd = [name for name in names if not (name.isdecimal() and int(name) < n_classes)]
    if odd:
        raise InputError(
            f"data.n_classes = {n_classes} says that the folders in {folder} are named by the number of their class, 0 "
            f"to {n_classes - 1}; {odd[0]!r} is not: rename it, or leave data.n_classes out"
        )
    return torch.tensor([int(name) for name in names])


def _read_tree(
    folder: Path, image_size: int | None, resize: int | None, interpolation: str
) -> tuple[Images, tuple[str, ...]]:
    from PIL import Image, UnidentifiedImageError
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise InputError(f"{folder} is missing; data.root must hold train/<class>/*.png and test/<class>/*.png")
    try:
        tree = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no images, or a class folder in it is empty: {error}") from None
    if len(tree.classes) < 2:
        raise InputError(f"{folder} holds one class ({tree.classes[0]}); a classifier needs at least two class folders")

    def read(path: str) -> Tensor:
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
                how = Image.Resampling[_INTERPOLATIONS[interpolation]]
                if resize is not None and image_size is not None:
                    share = resize / min(image.size)
                    image = image.resize((round(image.width * share), round(image.height * share)), how)
                    left, top = (round((side - image_size) / 2) for side in image.size)
                    image = image.crop((left, top, left + image_size, top + image_size))
                elif image_size is not None and image.size != (image_size, image_size):
                    image = image.resize((image_size, image_size), how)
                return torch.from_numpy(np.array(image))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise InputError(f"{path} is not a readable image ({error}); repair or remove it") from None

    paths = [path for path, _ in tree.samples]
    shape = read(paths[0]).shape
    pixels = torch.empty(len(paths), shape[2], shape[0], shape[1], dtype=torch.uint8)
    # Decoding releases the interpreter lock, so threads help.
    with ThreadPoolExecutor() as pool:
        arrays = pool.map(read, paths, chunksize=256)
        for i, array in enumerate(
            track(arrays, description=f"reading {folder}", total=len(paths), transient=True, disable=len(paths) < 5000)
        ):
            if array.shape != shape:
                raise InputError(
                    f"{paths[i]} has {tuple(array.shape[:2])} pixels, {paths[0]} has {tuple(shape[:2])}; set "
                    "data.image_size to resize all of them"
                )
            pixels[i] = array.permute(2, 0, 1)
    return Images(pixels, torch.tensor(tree.targets)), tuple(tree.classes)


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


def stratified_split(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Split into (rest, part) with `part` holding `fraction` of every class, the same for the same seed; both in random
    order. Where most classes have one image only, `fraction` of all.

    Raises:
        InputError: if a class has too few images for the split.
    """
    from sklearn.model_selection import train_test_split

    counts = images.labels.bincount()
    single = int((counts == 1).sum()) * 2 > int((counts > 0).sum())
    try:
        rest, part = train_test_split(
            np.arange(len(images)),
            test_size=fraction,
            random_state=seed,
            stratify=None if single else images.labels.numpy(),
        )
    except ValueError as error:
        raise InputError(
            f"val_fraction = {fraction} does not split {len(images)} images of {len(images.labels.unique())} classes: "
            f"{error}"
        ) from None
    return images[torch.from_numpy(rest)], images[torch.from_numpy(part)]


def channel_statistics(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, pixels scaled to [0, 1].

    >>> channel_statistics(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    ([0.5], [0.5])
    """
    means, stds = [], []
    for channel in range(pixels.shape[1]):
        # A histogram is exact and needs no float copy of the whole set.
        counts = torch.bincount(pixels[:, channel].flatten().int(), minlength=256).double()
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = (counts * values).sum() / counts.sum()
        variance = (counts * (values - mean) ** 2).sum() / counts.sum()
        means.append(round(mean.item(), 6))
        stds.append(round(max(variance.sqrt().item(), 1e-3), 6))
    return means, stds


def as_floats(value: Sequence[float] | None) -> list[float] | None:
    """Plain list of floats, None stays None."""
    return None if value is None else [float(v) for v in value]
