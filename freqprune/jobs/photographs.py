"""Image files → pixels as a network takes them; masks of parts and names of classes from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from freqprune.errors import InputError
from freqprune.reports import is_quiet
from freqprune.training import UNREADABLE, Fitting, in_bytes, upright

# What a grey .png says of pixels in no part: it has no negative numbers.
NONE = 255


def read_images(
    paths: Sequence[Path],
    image_size: int | None,
    resize: int | None,
    interpolation: str,
    n_channels: int = 3,
    key: str = "images",
) -> Tensor:
    """Pixels in [0, 1], ``(n_images, n_channels, height, width)``.

    Args:
        paths: the files.
        image_size: height and width; the images as they are if left out.
        resize: the shorter side is resized to this and the middle cut out; resized to `image_size` if left out.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        n_channels: 3 for colours, 1 for grey.
        key: the setting that names the files, for messages.

    Raises:
        InputError: for files that are no images, or images that differ in size.
    """
    found: list[Tensor] = []
    fitted = Fitting(image_size, resize, interpolation)
    for path in track(paths, description="reading images", transient=True, disable=len(paths) < 100 or is_quiet()):
        try:
            with Image.open(path) as file:
                image = fitted(in_bytes(upright(file), "L" if n_channels == 1 else "RGB"))
        except UNREADABLE as error:
            raise InputError(f"{key}: {path} is not a readable image ({error}); repair it or leave it out") from None
        pixels = torch.from_numpy(image).view(*image.shape[:2], n_channels).permute(2, 0, 1) / 255
        if found and pixels.shape != found[0].shape:
            here, there = ("{1} x {2}".format(*one.shape) for one in (pixels, found[0]))
            raise InputError(f"{key}: {path} has {here} pixels, {paths[0]} has {there}; set image_size=PIXELS")
        found.append(pixels)
    return torch.stack(found)


def read_segments(path: str) -> Tensor:
    """Number of each pixel's part, -1 for none, from a ``.npy`` or a grey image in which 255 is none.

    Raises:
        InputError: for a file that holds no integers.
    """
    try:
        if path.endswith(".npy"):
            found = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as file:
                found = np.array(file)
    except UNREADABLE as error:
        raise InputError(f"segments = {path} is neither a readable .npy nor an image ({error})") from None
    if found.dtype.kind not in "iu":
        raise InputError(
            f"segments = {path} holds {found.dtype}, not whole numbers; save the mask as integers, with -1 for no part"
        )
    found = found.astype(np.int64)
    return torch.from_numpy(found if path.endswith(".npy") else np.where(found == NONE, -1, found))


def read_classes(path: str, n_classes: int) -> list[str]:
    """Names of classes, one a line.

    Raises:
        InputError: for another number of names than classes.
    """
    try:
        # Some editors put a mark before the first word.
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"classes = {path} is not in UTF-8 ({error.reason}); save it so") from None
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(names) != n_classes:
        raise InputError(
            f"classes = {path} names {len(names)} classes, the network tells {n_classes} apart; give one name a line"
        )
    return names
