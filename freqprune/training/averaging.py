"""The weights of a training → their moving average, which is validated and kept."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from freqprune.errors import InputError


def check_average(ema: float, precision: str) -> None:
    """Raise InputError for an average of weights that are not in float32."""
    if ema and precision.endswith("-true") and not precision.startswith("32"):
        raise InputError(
            f"ema = {ema:g} averages weights in float32, and the precision {precision} has none: train in "
            f"{'32-true' if precision.startswith('64') else precision.replace('true', 'mixed')}, or with ema = 0"
        )


class MovingAverage(WeightAveraging):
    """Exponential moving average of weights and of the statistics of norms; other buffers, such as indices, are as the
    network has them.

    Args:
        decay: share of the average that a step leaves.
        device: where it lies; that of the network, whose processor would have to wait for every step otherwise.
    """

    def __init__(self, decay: float, device: torch.device) -> None:
        towards = get_ema_multi_avg_fn(decay)

        def average(averaged: Any, current: Any, n_averaged: Tensor) -> None:
            if averaged[0].is_floating_point():
                towards(averaged, current, n_averaged)
            else:
                torch._foreach_copy_(averaged, current)

        super().__init__(device=device, use_buffers=True, multi_avg_fn=average)

    @property
    def state_key(self) -> str:
        # Of Lightning's callback, which earlier checkpoints were written with.
        return "EMAWeightAveraging"
