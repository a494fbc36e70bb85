"""Where a network answers, and what: its first tensor; whether it answers at all, and the same twice."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks.hooks import evaluating

log = logging.getLogger(__name__)

# What PyTorch says of a ``view`` over a map whose channels lie last.
OF_VIEW = "view size is not compatible"


def first(output: Any) -> Tensor:
    """The first tensor of a network's output, whatever it is wrapped in: a loss that was not asked for is None."""
    while not isinstance(output, Tensor):
        parts = output.values() if isinstance(output, Mapping) else output
        output = next(one for one in parts if one is not None)
    return output


def device_of(model: nn.Module) -> torch.device:
    """Where a network's parameters lie; the CPU for one that has none, such as `OnnxModule`."""
    return next((values.device for values in model.parameters()), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """Type of a network's parameters; float32 for one that has none."""
    return next((values.dtype for values in model.parameters()), torch.float32)


def warn_of_batches(model: nn.Module) -> None:
    """A warning if batch norms have no running statistics: an image's answer depends on the others of its batch."""
    alone = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    ]
    if alone:
        _tell_of_batches(type(model).__name__, ", ".join(alone[:3]))


@cache
def _tell_of_batches(network: str, norms: str) -> None:
    # Once: a job asks for the answers of a network many times.
    log.warning(
        "%s: %s normalises by its batch in eval mode too (track_running_stats=False): what an image or frame answers "
        "depends on which others it is run with", network, norms
    )  # fmt: skip


def check_answers(model: nn.Module, batch: Tensor) -> None:
    """Run a network twice, in eval mode, which is restored.

    Args:
        model: the network.
        batch: network inputs, ``(n_images, n_channels, height, width)``.

    Raises:
        InputError: if it does not run, answers with NaN or infinite values, changes its input in place, or the second
            time answers otherwise: then nothing that is measured of it, and no proof, holds for the next call.
    """
    warn_of_batches(model)
    name, size = type(model).__name__, " x ".join(map(str, batch.shape[1:]))
    with evaluating(model), torch.no_grad():
        try:
            given = batch.clone(), batch.clone()
            answers = [first(model(one)) for one in given]
        except Exception as error:
            raise InputError(
                f"{name} does not run on images of {size} ({type(error).__name__}: {error}); {_way_out(str(error))}"
            ) from error
    if not all(answer.isfinite().all() for answer in answers):
        raise InputError(f"{name} answers images with NaN or infinite values")
    if not torch.equal(given[0], batch):
        raise InputError(
            f"{name} changes the images that it is given, so that what runs on them after it sees others; write "
            "x = x - mean in the place of x -= mean"
        )
    if not torch.equal(*answers):
        raise InputError(
            f"{name} answers the same images differently from call to call, also in eval mode: its forward draws at "
            "random or counts its calls, so that nothing measured of it holds; switch that off"
        )


def _way_out(said: str) -> str:
    if OF_VIEW in said:
        return "maps lie with their channels last here: write torch.flatten(x, 1) or x.reshape in the place of x.view"
    if "dtype" in said or "same type" in said or "scalar type" in said:
        return "give it images of the type of its weights"
    return (
        "where it was made for images of another size, set data.image_size (of freqprune explain: image_size; "
        "data=cifar10 and digits have one size, data=torchvision data.name=CIFAR10 any)"
    )
