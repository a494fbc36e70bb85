"""Networks whose weights come with the package."""

from __future__ import annotations

from typing import Any

from torch import nn

from freqprune.errors import InputError
from freqprune.networks.checkpoint import load_network
from freqprune.networks.libraries import Preprocessing
from freqprune.networks.model_cards import DEFAULT, pretrained_path
from freqprune.networks.registry import build_model

# What they take and tell apart.
CIFAR10 = Preprocessing(32, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "bilinear")
CIFAR10_TRAIN = 50_000  # images
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def pretrained(name: str = DEFAULT) -> nn.Module:
    """A network that comes with the package, trained for CIFAR-10, in eval mode.

    Inputs are RGB images of 32 x 32 pixels in [0, 1], normalised with mean (0.4914, 0.4822, 0.4465) and standard
    deviation (0.2470, 0.2435, 0.2616); outputs are 10 logits, in the order of the classes of CIFAR-10.

    Args:
        name: one of `freqprune.networks.cards`, which say how good it is and how it was trained.

    Raises:
        InputError: if there is none of this name.

    >>> sum(p.numel() for p in pretrained("resnet32_cifar10").parameters())
    464154
    """
    return load_network(pretrained_path(name)).net


def resnet32(pretrained: bool = False, **config: Any) -> nn.Module:
    """ResNet-32 for 32 x 32 images.

    Args:
        pretrained: with the weights for CIFAR-10 that come with the package, see `freqprune.pretrained`.
        config: arguments of `CifarResNet`, for a network with random weights.

    >>> sum(p.numel() for p in resnet32(pretrained=True).parameters())
    464154
    """
    if not pretrained:
        return build_model({"name": "resnet32", **config})
    if config:
        raise InputError(f"pretrained=True is one network; {', '.join(config)} cannot change it")
    return load_network(pretrained_path()).net
