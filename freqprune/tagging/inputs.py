"""Pixels ↔ what a network takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import OF_VIEW, evaluating


def layout_of(model: nn.Module, images: Tensor) -> torch.memory_format:
    """Channels last, in which convolutions are faster, where a network runs so; one that takes ``view`` of a map of
    more than one pixel wants images as they are.

    Args:
        model: the network, run in eval mode and restored.
        images: network inputs, one is enough.
    """
    with evaluating(model), torch.no_grad():
        try:
            model(images.to(memory_format=torch.channels_last))
        except RuntimeError as error:
            if OF_VIEW in str(error):
                return torch.contiguous_format
            raise
    return torch.channels_last


def normalizer(
    images: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    device: torch.device,
    dtype: torch.dtype,
    layout: torch.memory_format = torch.channels_last,
) -> Callable[[Tensor], Tensor]:
    """Function that takes pixels to what the network expects: its device, dtype, normalisation, layout.

    Raises:
        InputError: for a mean without a standard deviation or the other way round, another number of values than
            channels, or a standard deviation that is not positive.
    """
    if (mean is None) != (std is None):
        raise InputError("mean and std come together: give both or neither")
    n_channels = images.shape[1]
    shift = torch.tensor(
        [float(v) for v in mean] if mean is not None else [0.0] * n_channels, device=device, dtype=dtype
    )
    scale = torch.tensor([float(v) for v in std] if std is not None else [1.0] * n_channels, device=device, dtype=dtype)
    for name, value in (("mean", shift), ("std", scale)):
        if len(value) != n_channels:
            raise InputError(f"{name} must hold {n_channels} values, one a channel, got {value.tolist()}")
    if not (scale > 0).all():
        raise InputError(f"std must be positive, got {scale.tolist()}")
    shift, scale = shift.view(1, -1, 1, 1), scale.view(1, -1, 1, 1)

    def prepare(pixels: Tensor) -> Tensor:
        pixels = pixels.to(device=device, dtype=dtype, memory_format=layout)
        return (pixels - shift) / scale

    return prepare


def pixels_of(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Images before they were normalised with these, ``(n_images, n_channels, height, width)``; as they are without."""
    if mean is None or std is None:
        return images
    shift, scale = (images.new_tensor([float(v) for v in values]).view(1, -1, 1, 1) for values in (mean, std))
    return images * scale + shift


def rounding(images: Tensor) -> float:
    """By how much pixels of normalised images may lie outside [0, 1]: in half precision they are rounded coarsely."""
    return max(1e-3, torch.finfo(images.dtype).eps) if images.is_floating_point() else 1e-3


def normalizer_for(
    model: nn.Module,
    images: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Callable[[Tensor], Tensor], torch.memory_format]:
    """`normalizer` in the layout in which a network runs, and that layout; errors as there."""
    prepare = normalizer(images, mean, std, device, dtype)
    layout = layout_of(model, prepare(images[:1]))
    if layout != torch.channels_last:
        prepare = normalizer(images, mean, std, device, dtype, layout)
    return prepare, layout
