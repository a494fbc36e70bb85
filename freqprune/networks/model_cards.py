"""What is known of the networks that come with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from freqprune.errors import InputError, closest

# What `pretrained()` and `pretrained=true` load.
DEFAULT = "resnet32_cifar10"
# The one that was not trained on a tenth of the training images.
HELD_OUT = "resnet32_cifar10_45k"


@dataclass(frozen=True)
class Card:
    """A network that comes with the package. Accuracies are fractions, of the weights of the last epoch.

    Attributes:
        n_parameters: of the network.
        macs: multiply-accumulates of one image.
        macs_cut: share of the dense network's MACs that was removed, 0 for a dense one.
        test_accuracy: on all test images, in float32.
        n_train: training images.
        epochs: of training, or of fine-tuning after the cut.
        seed: of the one run.
        commands: that train it, in order; what was run in parts is told in the README of the weights.
    """

    n_parameters: int
    macs: int
    macs_cut: float
    test_accuracy: float
    n_train: int
    epochs: int
    seed: int
    commands: tuple[str, ...]


def cards() -> dict[str, Card]:
    """Cards of the networks that come with the package, by the names that `freqprune.pretrained` takes.

    >>> cards()["resnet32_cifar10"].n_parameters
    464154
    """
    found = json.loads((_folder() / "cards.json").read_text())
    return {name: Card(**{**card, "commands": tuple(card["commands"])}) for name, card in found.items()}


def pretrained_path(name: str = DEFAULT) -> Path:
    """File with the weights of a network that comes with the package; `freqprune.load_network` reads it.

    Raises:
        InputError: if there is none of this name.
    """
    if name not in cards():
        raise InputError(
            f"no weights of {name!r} come with the package, only of: {', '.join(cards())}{closest(name, cards())}"
        )
    return _folder() / f"{name}.pt"


def _folder() -> Path:
    return Path(__file__).parent / "weights"
