"""Images → the parts that are tagged: tiles of a grid, a network's patches, colour channels, superpixels, any mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from freqprune.errors import InputError, at_least, one_of
from freqprune.networks import device_of, dtype_of, evaluating, hooked

LAYOUTS = ("grid", "patches", "channels", "slic")


def find_parts(
    model: nn.Module,
    images: Tensor,
    parts: str = "grid",
    grid: int | tuple[int, int] = 8,
    segments: Tensor | None = None,
    n_segments: int = 64,
) -> tuple[Tensor, list[str]]:
    """Number of each pixel's part, and what the parts are called; arguments as of `freqprune.attribute`.

    Returns:
        Numbers, -1 for none, ``(n_images, height, width)``, of channels ``(n_images, n_channels, height, width)``.

    Raises:
        InputError: for more tiles than pixels, masks of another size, or a network that has no patches.
    """
    one_of(LAYOUTS, parts=parts)
    if segments is not None:
        if parts != "grid":
            raise InputError(
                f"segments is a mask of parts of its own and parts = {parts} others; leave one of them out"
            )
        return _of_a_mask(images, torch.as_tensor(segments))
    if parts == "channels":
        numbers = torch.arange(images.shape[1])[:, None, None].expand(images.shape)
        return numbers, [f"channel {number + 1}" for number in range(images.shape[1])]
    if parts == "slic":
        return _superpixels(images, n_segments)
    if parts == "patches":
        return _tiled(images, *patches_of(model, images[:1]))
    height, width = images.shape[-2:]
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    at_least(1, grid=min(rows, columns))
    if rows > height or columns > width:
        raise InputError(f"grid = {rows} x {columns} tiles do not fit into images of {height} x {width} pixels")
    return _tiled(images, *(torch.arange(size) * count // size for size, count in ((height, rows), (width, columns))))


def _tiled(images: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, list[str]]:
    """Parts by the row and the column that each row and column of pixels is in, -1 for none."""
    n_rows, n_columns = int(row.max()) + 1, int(column.max()) + 1
    numbers = torch.where((row < 0)[:, None] | (column < 0), -1, row[:, None] * n_columns + column)
    names = [f"row {one + 1}, column {other + 1}" for one in range(n_rows) for other in range(n_columns)]
    return numbers.expand(len(images), len(row), len(column)), names


def _of_a_mask(images: Tensor, segments: Tensor) -> tuple[Tensor, list[str]]:
    height, width = images.shape[-2:]
    if (
        segments.is_floating_point()
        or segments.dtype == torch.bool
        or segments.shape not in ((height, width), (len(images), height, width))
    ):
        raise InputError(
            f"segments must be integers of shape ({height}, {width}) or ({len(images)}, {height}, {width}), got "
            f"{segments.dtype} {tuple(segments.shape)}; -1 is no part, so of a mask write mask.long() - 1"
        )
    segments = segments.long().cpu().contiguous()
    if int(segments.max()) < 0:
        raise InputError("segments hold no part: every pixel is -1")
    labels = segments[segments >= 0].unique()
    numbers = torch.where(segments < 0, -1, torch.searchsorted(labels, segments))
    return numbers.expand(len(images), height, width), [f"segment {label}" for label in labels.tolist()]


def _superpixels(images: Tensor, n_segments: int) -> tuple[Tensor, list[str]]:
    """Superpixels of each image (SLIC, Achanta et al. 2012), by scikit-image."""
    at_least(1, n_segments=n_segments)
    try:
        from skimage.segmentation import slic
    except ImportError:
        raise InputError("parts = slic needs scikit-image: pip install 'freqprune[segments]'") from None
    n_channels = images.shape[1]
    if n_channels not in (1, 3):
        raise InputError(f"parts = slic takes images of one or three channels, got {n_channels}; use grid or segments")
    # Of three channels it looks at colours as they are seen; of any other number it would hardly look at all.
    found = [
        slic(image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy(), n_segments, start_label=0, channel_axis=-1)
        for image in images.float()
    ]
    return _of_a_mask(images, torch.stack([torch.from_numpy(one) for one in found]))


def places(numbers: Tensor, n_parts: int) -> Tensor:
    """Where parts lie: the middle of each, in units of the distance between parts, ``(n_parts, 2)``; NaN for a part
    that an image does not have. Of colour channels, which lie nowhere, every distance is infinite.

    Args:
        numbers: of each pixel's part, -1 for none, ``(height, width)``, of channels ``(n_channels, height, width)``.
        n_parts: number of parts.
    """
    if numbers.dim() == 3:
        return torch.stack([torch.arange(n_parts) * 1e6, torch.zeros(n_parts)], 1).double()
    inside = numbers >= 0
    pixels = inside.nonzero().double()
    count = torch.bincount(numbers[inside], minlength=n_parts).double()
    sums = torch.zeros(n_parts, 2, dtype=torch.float64).index_add_(0, numbers[inside], pixels)
    distance = (inside.sum() / (count > 0).sum()).sqrt()
    return sums / count[:, None] / distance


def patches_of(model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """The patches into which a network of tokens cuts its images, those of the convolution that reads them in steps of
    its own size: the row of patches that each row of pixels is in, ``(height,)``, and the column of each column,
    ``(width,)``; -1 for the rest of an image that is no multiple of a patch.

    Raises:
        InputError: for a network that has none.
    """
    found: list[tuple[Tensor, Tensor]] = []

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        if args[0].shape == image.shape and module.kernel_size == module.stride and module.stride != (1, 1):
            row, column = (
                (torch.arange(size) + (module.padding[axis] if isinstance(module.padding, tuple) else 0))
                // module.kernel_size[axis]
                for axis, size in enumerate(image.shape[-2:])
            )
            found.append((row.where(row < output.shape[-2], -1), column.where(column < output.shape[-1], -1)))

    convolutions = [(module, None, look) for module in model.modules() if isinstance(module, nn.Conv2d)]
    with evaluating(model), torch.inference_mode(), hooked(convolutions):
        model(image.to(device_of(model), dtype_of(model)))
    if not found:
        raise InputError(
            f"parts = patches needs a network of tokens: no convolution of {type(model).__name__} cuts its images into "
            "patches; use parts=grid"
        )
    return found[0]
