"""Cost of a network: MACs, parameters, latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from freqprune.hooks import evaluating


def macs_by_layer(model: nn.Module, example: Tensor) -> dict[str, int]:
    """MACs of each convolution and linear layer for one image (multiplications of other operations are not counted).

    Args:
        model: the network.
        example: one image, ``(1, n_channels, height, width)``.
    """
    counter = FlopCounterMode(display=False)
    with evaluating(model), torch.no_grad(), counter:
        model(example[:1])
    prefix = type(model).__name__ + "."
    counts = counter.get_flop_counts()
    leaves = {name for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)}
    # A fused multiply-add is two operations.
    return {name.removeprefix(prefix): sum(operations.values()) // 2 for name, operations in counts.items() if name.removeprefix(prefix) in leaves}


def count_macs(model: nn.Module, example: Tensor) -> int:
    """MACs of the convolutions and linear layers for one image.

    >>> from freqprune.models import build_model
    >>> count_macs(build_model({"name": "resnet32"}), torch.zeros(1, 3, 32, 32))
    68862592
    """
    return sum(macs_by_layer(model, example).values())


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; buffers do not count."""
    return sum(p.numel() for p in model.parameters())


def latency_ms(models: Mapping[str, nn.Module], example: Tensor, n_runs: int = 20, n_warmup: int = 5) -> dict[str, float]:
    """Median time of one forward in milliseconds, the networks taken in turn so that a drift of the machine meets all of them.

    Args:
        models: networks by name.
        example: input batch.
        n_runs: timed forwards of each.
        n_warmup: forwards before those.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.eval()
    with torch.inference_mode():
        for run in range(n_warmup + n_runs):
            for name, model in models.items():
                _wait(example.device)
                start = time.perf_counter()
                model(example)
                _wait(example.device)
                if run >= n_warmup:
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
