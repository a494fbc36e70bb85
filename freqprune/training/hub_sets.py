"""Data sets by way of Hugging Face's ``datasets``: of its hub, or files of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from freqprune.errors import InputError, closest
from freqprune.training.listed import ListedData
from freqprune.training.listing import Listing, check_classes

_TEST_SPLITS = ("test", "validation", "valid", "val")


class HuggingFaceData(ListedData):
    """A data set of images with labels that ``datasets.load_dataset`` finds.

    Args:
        path: of the hub, or a builder for files of one's own: ``imagefolder``, ``parquet``.
        name: configuration of the data set, where it has several.
        train_split: part to train on.
        test_split: part to test on; ``test`` or ``validation`` if left out.
        image_column: the one column of images if left out.
        label_column: the one column of class labels if left out, else one called ``label`` or ``labels``.
        n_classes: classes, where not all of them need be in both parts; if left out, a class of one part has to be in
            the other too.
        arguments: further ones of ``load_dataset``, such as ``data_dir`` or ``data_files``.
        settings: of `ListedData`.

    Raises:
        InputError: if ``datasets`` is not installed, the data set is not to be had, a part or column is not there, or a
            class is missing in one part.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train_split: str = "train",
        test_split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        n_classes: int | None = None,
        arguments: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.path, self.config_name, self.splits = path, name, (train_split, test_split)
        self.columns, self.arguments = (image_column, label_column), dict(arguments or {})
        self.n_classes = n_classes
        self._files = Path("data")

    def beside(self) -> Path:
        return self._files

    def listings(self) -> tuple[Listing, Listing, tuple[str, ...]]:
        parts = self._loaded()
        train_name, test_name = self.splits
        test_name = test_name or next((name for name in _TEST_SPLITS if name in parts), "test")
        for key, name in (("train_split", train_name), ("test_split", test_name)):
            if name not in parts:
                raise InputError(
                    f"data.{key} = {name} is no part of {self.path}; it has {', '.join(parts)}{closest(name, parts)}"
                )
        files = parts[train_name].cache_files
        self._files = Path(files[0]["filename"]).parent if files else self._files
        image = _column(parts[train_name], "image", self.columns[0])
        label = _column(parts[train_name], "label", self.columns[1])
        # Words are classes of the whole data set; one that a part lacks is refused, or asked for, below.
        words = _words(parts[name][label] for name in (train_name, test_name)) if self.n_classes is not None else None
        train, test = (
            HubListing(parts[name], image, label, f"{self.path} ({name})", words) for name in (train_name, test_name)
        )
        return train, test, self._classes(train, test)

    def _classes(self, train: HubListing, test: HubListing) -> tuple[str, ...]:
        n_classes, classes = self.n_classes, train.classes
        if n_classes is not None and not (train.named or test.named):
            classes = tuple(map(str, range(n_classes)))
        elif classes != test.classes:
            odd = ", ".join(sorted(set(classes) ^ set(test.classes))[:5])
            raise InputError(f"train and test of {self.path} must hold the same classes; only one of them has {odd}")
        most = max(len(classes), len(train.classes), len(test.classes))
        if n_classes is None:
            way_out = "name another part with data.test_split, or set data.n_classes if that is meant"
            check_classes(train, test, classes, way_out)
        elif n_classes != most:
            raise InputError(f"data.n_classes = {n_classes}, but {self.path} has {most} classes; leave it out")
        return classes

    def _loaded(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise InputError("data=huggingface needs datasets: pip install 'freqprune[datasets]'") from None
        try:
            found = datasets.load_dataset(self.path, self.config_name, **self.arguments)
        except Exception as error:
            # What is wrong with a file, or a full disk, is wrapped.
            why = error.__cause__ or error
            raise InputError(
                f"data.path = {self.path} could not be loaded ({type(why).__name__}: {why}); on a machine without "
                "a network it must have been loaded once, or be files: data.path=imagefolder "
                "+data.arguments.data_dir=FOLDER"
            ) from error
        if not isinstance(found, datasets.DatasetDict):
            raise InputError(
                f"data.arguments {self.arguments} load a {type(found).__name__} of {self.path}; leave out split and "
                "streaming, and name its parts with data.train_split and data.test_split"
            )
        return found


class HubListing(Listing):
    """Images of one part of a data set.

    Attributes:
        classes: names of the classes.
        named: whether the data name them; otherwise they are numbers.
    """

    def __init__(self, dataset: Any, image: str, label: str, place: str, words: Sequence[str] | None = None) -> None:
        self.dataset, self.image, self.place = dataset.select_columns([image]), image, place
        # Other files, or another part of them, under the same path are other data.
        self.beside, self.version = place, dataset._fingerprint
        self._identity = f"{dataset._fingerprint} {image} {label}"
        found, feature = dataset[label][:], dataset.features[label]
        odd = [one for one in found if type(one) not in (int, str, bool) or type(one) is not type(found[0])]
        if odd:
            raise InputError(
                f"data.label_column = {label} of {place} holds {type(odd[0]).__name__} as well, not one class an "
                "image; name a column of whole numbers or of words"
            )
        names = getattr(feature, "names", None)
        self.named = names is not None or isinstance(found[0], str)
        if not isinstance(found[0], str) and min(found) < 0:
            raise InputError(f"{place} has images without a label; leave them out, or name another part")
        if names is None:
            names = (words or sorted(set(found))) if isinstance(found[0], str) else range(max(found) + 1)
            found = [names.index(value) for value in found]
        self.labels, self.classes = torch.tensor(found), tuple(map(str, names))

    def name(self, number: int) -> str:
        return f"image {number} of {self.place}"

    def open(self, number: int) -> Image.Image:
        image = self.dataset[number][self.image]
        if not isinstance(image, Image.Image):
            raise ValueError(f"got {type(image).__name__}")
        return image

    def stamps(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        # Data with other content have another fingerprint, and with it another digest.
        return np.zeros((len(numbers), 2), np.int64)

    def digest(self) -> str:
        return hashlib.sha256(self._identity.encode()).hexdigest()


def _words(columns: Iterable[Any]) -> list[str] | None:
    """The words that columns of labels hold, in their order; None for labels that are numbers."""
    found = [label for column in columns for label in column[:]]
    return sorted(set(found)) if all(isinstance(label, str) for label in found) else None


def _column(dataset: Any, what: str, name: str | None) -> str:
    """The column of images or of labels."""
    features = dataset.features
    if name is not None:
        if name not in features:
            raise InputError(
                f"data.{what}_column = {name} is no column; there are {', '.join(features)}{closest(name, features)}"
            )
        return name
    kinds = {"image": ("Image",), "label": ("ClassLabel",)}[what]
    found = [key for key, feature in features.items() if type(feature).__name__ in kinds]
    if not found:
        found = [key for key in features if key in (what, f"{what}s")]
    if len(found) != 1:
        raise InputError(
            f"{len(found)} columns may be the {what}s, of {', '.join(features)}; say which with data.{what}_column"
        )
    return found[0]
