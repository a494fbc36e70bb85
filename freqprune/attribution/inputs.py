"""Pixels → what a network takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import device_of


def normalisation(
    model: nn.Module, images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that inputs are normalised with, on the network's device, ``(n_channels, 1, 1)``; 0
    and 1 if there are none.

    Raises:
        InputError: for one without the other, or another number of values than channels.
    """
    if (mean is None) != (std is None):
        raise InputError("mean and std come together: give both or neither")
    device, n_channels = device_of(model), images.shape[1]
    found = []
    for name, values, plain in (("mean", mean, 0.0), ("std", std, 1.0)):
        values = [plain] * n_channels if values is None else list(values)
        if len(values) != n_channels:
            raise InputError(f"{name} must hold {n_channels} values, one a channel, got {values}")
        found.append(torch.tensor(values, device=device).view(-1, 1, 1))
    return found[0], found[1]
