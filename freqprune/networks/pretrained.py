"""Networks whose weights come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from freqprune.errors import InputError
from freqprune.networks.checkpoint import load_network
from freqprune.networks.libraries import Preprocessing
from freqprune.networks.registry import build_model

# What `resnet32(pretrained=True)` takes and tells apart.
CIFAR10 = Preprocessing(32, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "bilinear")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def pretrained_path(name: str) -> Path:
    """File with the weights that come with the package; `freqprune.load_network` reads it. See the model card beside
    it.

    Raises:
        InputError: if there are none for this network.
    """
    path = Path(__file__).parent / "weights" / f"{name}_cifar10.pt"
    if not path.is_file():
        there = ", ".join(sorted(p.stem.removesuffix("_cifar10") for p in path.parent.glob("*_cifar10.pt"))) or "none"
        raise InputError(f"no weights of {name!r} come with the package, only of: {there}")
    return path


def resnet32(pretrained: bool = False, **config: Any) -> nn.Module:
    """ResNet-32 for 32 x 32 images.

    Args:
        pretrained: with the weights for CIFAR-10 that come with the package, in eval mode; inputs are to be normalised
            with mean (0.4914, 0.4822, 0.4465) and standard deviation (0.2470, 0.2435, 0.2616).
        config: arguments of `CifarResNet`, for a network with random weights.

    >>> sum(p.numel() for p in resnet32(pretrained=True).parameters())
    464154
    """
    if not pretrained:
        return build_model({"name": "resnet32", **config})
    if config:
        raise InputError(f"pretrained=True is one network; {', '.join(config)} cannot change it")
    return load_network(pretrained_path("resnet32")).net
