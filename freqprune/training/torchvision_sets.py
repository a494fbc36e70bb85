"""Data sets for classification that torchvision knows by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from torch import Tensor

from freqprune.errors import InputError, one_of
from freqprune.reports import is_quiet
from freqprune.training.downloads import alone
from freqprune.training.listed import ListedData
from freqprune.training.listing import Listing, check_classes
from freqprune.training.sources import as_folder

# Sets that no program can download.
NOT_DOWNLOADED = ("ImageNet", "StanfordCars")
_FLAG = {"train": True}, {"train": False}
_TEST = {"split": "train"}, {"split": "test"}
_VAL = {"split": "train"}, {"split": "val"}
# How the part to train on and the part to test on are asked for; where the labels of the test part are not given out,
# its place is taken by the validation part.
SETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "USPS"), _FLAG),
    **dict.fromkeys(("Country211", "DTD", "Flowers102", "Food101", "GTSRB", "PCAM", "RenderedSST2"), _TEST),
    **dict.fromkeys(("StanfordCars", "STL10", "SVHN"), _TEST),
    **dict.fromkeys(("CLEVRClassification", "ImageNet", "Imagenette"), _VAL),
    **dict.fromkeys(("FGVCAircraft", "OxfordIIITPet"), ({"split": "trainval"}, {"split": "test"})),
    "EMNIST": ({"split": "balanced", "train": True}, {"split": "balanced", "train": False}),
    "INaturalist": ({"version": "2021_train"}, {"version": "2021_valid"}),
    "Places365": ({"split": "train-standard"}, {"split": "val"}),
}


class TorchvisionData(ListedData):
    """A data set for classification of torchvision, by name; mean and std measured on its training images by default.

    Args:
        name: class of ``torchvision.datasets``, one of `SETS`.
        root: folder that holds it, or that it is downloaded into.
        download: download it if it is not there, where torchvision can.
        settings: of `ListedData`.

    Raises:
        InputError: for a name that is not among them.
    """

    def __init__(self, name: str, root: str | Path = "data", download: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        one_of(sorted(SETS), **{"data.name": name})
        self.set_name, self.root, self.download = name, as_folder(root), download

    def beside(self) -> Path:
        return self.root

    def listings(self) -> tuple[Listing, Listing, tuple[str, ...]]:
        train, test = (self._part(arguments) for arguments in SETS[self.set_name])
        known = train.classes or test.classes
        n_classes = int(max(train.labels.max(), test.labels.max())) + 1
        classes = known if len(known) >= n_classes else tuple(map(str, range(n_classes)))
        check_classes(train, test, classes, "images are missing from data.root; download it anew")
        return train, test, classes

    def _part(self, arguments: Mapping[str, Any]) -> DatasetListing:
        from torchvision import datasets

        kind = getattr(datasets, self.set_name)
        # They take no such argument, or refuse it although the folder is there.
        asked = {"download": True} if self.download and self.set_name not in NOT_DOWNLOADED else {}
        try:
            if asked:
                self.root.mkdir(parents=True, exist_ok=True)
            with alone(self.root) if asked else nullcontext():
                dataset = kind(str(self.root), **arguments, **asked)
        except (OSError, RuntimeError, ValueError) as error:
            lacking = error.__context__
            if isinstance(lacking, ImportError) and lacking.name:
                raise InputError(_needs(self.set_name, lacking.name)) from None
            raise InputError(
                f"{self.set_name} is not in data.root = {self.root} and could not be downloaded ({error}); on a "
                "machine with a network run this once and copy the folder, or see torchvision's documentation of "
                f"{self.set_name} for what the folder must hold"
            ) from error
        except ImportError as error:
            raise InputError(_needs(self.set_name, str(error.name))) from None
        place = f"{self.set_name} ({', '.join(map(str, arguments.values()))}) in {self.root}"
        return DatasetListing(dataset, place, "-".join([self.set_name, *map(str, arguments.values())]))


def _needs(set_name: str, package: str) -> str:
    return f"{set_name} needs {package}: pip install {package}"


class DatasetListing(Listing):
    """Images of a map-style data set of pairs (image, label).

    Args:
        dataset: the data set, with labels of its own if it can tell them without reading the images.
        place: where it lies, for messages.
        identity: a word for the data set and its part.

    Attributes:
        classes: names of the classes, empty if it does not say.
    """

    def __init__(self, dataset: Any, place: str, identity: str) -> None:
        self.dataset, self.place, self.identity, self.beside = dataset, place, identity, identity
        self.labels = _labels(dataset, place)
        self.classes = tuple(map(_plain, getattr(dataset, "classes", ())))

    def name(self, number: int) -> str:
        return f"image {number} of {self.place}"

    def open(self, number: int) -> Image.Image:
        image = self.dataset[number][0]
        assert isinstance(image, Image.Image)
        return image

    def stamps(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        # torchvision checks what it has downloaded; single images have no date.
        return np.zeros((len(numbers), 2), np.int64)

    def digest(self) -> str:
        return hashlib.sha256(self.identity.encode() + self.labels.numpy().tobytes()).hexdigest()


def _plain(name: Any) -> str:
    """ImageNet has several words a class, the first of them the commonest."""
    return str(name[0] if isinstance(name, tuple) else name)


def _labels(dataset: Any, place: str) -> Tensor:
    """Labels of all images: as the data set holds them, else with the images, one by one."""
    for attribute in ("targets", "labels", "_labels"):
        found = getattr(dataset, attribute, None)
        if found is not None and len(found) == len(dataset):
            return torch.as_tensor(found).long()
    for attribute in ("samples", "_samples"):
        found = getattr(dataset, attribute, None)
        if found is not None and len(found) == len(dataset):
            return torch.tensor([label for _, label in found])
    numbers = track(range(len(dataset)), f"labels of {place}", transient=True, disable=len(dataset) < 500 or is_quiet())
    return torch.tensor([int(dataset[number][1]) for number in numbers])
