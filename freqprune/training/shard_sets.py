"""Images in tar files, in the form of WebDataset: of every sample an image and its label, by one name."""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from freqprune.errors import InputError
from freqprune.reports import is_quiet
from freqprune.training.listed import ListedData
from freqprune.training.listing import Listing, check_classes

log = logging.getLogger(__name__)


class WebDatasetData(ListedData):
    """Shards in the form of WebDataset on a disk of this machine: ``0001.jpg`` and ``0001.cls`` in tar files. They are
    indexed at every start and read image by image in any order, so that they shuffle as well as a folder does.

    Args:
        train_shards: tar files to train on, a pattern such as ``shards/train-*.tar``.
        test_shards: tar files to test on.
        image_key: ending of the images; jpg, jpeg, png or webp if left out.
        label_key: ending of the labels, files that hold the number of a class.
        n_classes: classes, which need not all be in both parts; if left out, one more than the largest label, and all
            that one part shows have to be in the other.
        settings: of `ListedData`.

    Raises:
        InputError: for a pattern that no file matches, shards that cannot be read, samples without image or label, a
            class that is missing in one part.
    """

    def __init__(
        self,
        train_shards: str,
        test_shards: str,
        image_key: str | None = None,
        label_key: str = "cls",
        n_classes: int | None = None,
        **settings: object,
    ) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self.shards = {"train_shards": train_shards, "test_shards": test_shards}
        self.keys = (image_key.lower(),) if image_key else ("jpg", "jpeg", "png", "webp")
        self.label_key, self.n_classes = label_key, n_classes

    def beside(self) -> Path:
        return Path(_found("train_shards", self.shards["train_shards"])[0]).parent

    def listings(self) -> tuple[Listing, Listing, tuple[str, ...]]:
        train, test = (ShardListing(_found(key, of), self.keys, self.label_key) for key, of in self.shards.items())
        largest = int(max(train.labels.max(), test.labels.max()))
        if self.n_classes is not None and largest >= self.n_classes:
            raise InputError(f"data.n_classes = {self.n_classes}, but there are labels up to {largest}; leave it out")
        classes = tuple(map(str, range(self.n_classes or largest + 1)))
        if self.n_classes is None:
            check_classes(train, test, classes, "add shards that hold them, or set data.n_classes if that is meant")
        return train, test, classes


def _found(key: str, pattern: str) -> list[str]:
    found = sorted(glob.glob(os.path.expanduser(pattern)))
    if not found:
        raise InputError(
            f"data.{key} = {pattern} matches no file; give a pattern of tar files on this machine, train-*.tar"
        )
    return found


class ShardListing(Listing):
    """Samples of tar files: where in which file their images begin.

    Args:
        shards: paths of the files.
        image_keys: endings of images.
        label_key: ending of labels.
    """

    def __init__(self, shards: Sequence[str], image_keys: Sequence[str], label_key: str) -> None:
        self.shards = list(shards)
        self.beside = " ".join(os.path.basename(shard) for shard in shards)
        self.place = self.shards[0] if len(shards) == 1 else f"{self.shards[0]} and {len(shards) - 1} more"
        places: list[tuple[int, int, int]] = []
        names: list[bytes] = []
        labels: list[int] = []
        for number in track(
            range(len(shards)), "indexing shards", transient=True, disable=len(shards) < 8 or is_quiet()
        ):
            for name, (offset, size, label) in _samples(self.shards[number], image_keys, label_key).items():
                places.append((number, offset, size))
                names.append(os.fsencode(name))
                labels.append(label)
        if not labels:
            raise InputError(f"{self.place} holds no samples")
        # One block each: a million Python objects would be copied page by page into every worker.
        self._places, self._names = np.array(places, np.int64), np.array(names)
        self.labels = torch.tensor(labels)

    def name(self, number: int) -> str:
        return f"{os.fsdecode(self._names[number])} in {self.shards[self._places[number, 0]]}"

    def open(self, number: int) -> Image.Image:
        shard, offset, size = self._places[number].tolist()
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            return Image.open(io.BytesIO(file.read(size)))

    def stamps(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        there = [os.stat(shard) for shard in self.shards]
        stamps = np.array([(one.st_size, one.st_mtime_ns) for one in there], np.int64)
        return stamps[self._places[numbers, 0]]

    def digest(self) -> str:
        parts = [self._names.tobytes(), self._places.tobytes(), self.labels.numpy().tobytes()]
        return hashlib.sha256(b"\n".join(parts)).hexdigest()


def _samples(shard: str, image_keys: Sequence[str], label_key: str) -> Mapping[str, tuple[int, int, int]]:
    """Of every sample of a tar file, in its order: where its image begins, its size, its label."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    keys: dict[str, str] = {}
    # Images of further keys, such as seg.png, or of names with dots in them.
    dotted: dict[str, str] = {}
    again: set[str] = set()
    try:
        with tarfile.open(shard, "r:") as file:
            for member in file:
                # The name of a sample ends at the first dot of the last part.
                folder, _, last = member.name.rpartition("/")
                name, _, key = last.partition(".")
                sample = f"{folder}/{name}" if folder else name
                is_image = key.lower() in image_keys
                # Names that begin with a dot are what macOS writes beside a file.
                if not member.isfile() or not name:
                    continue
                # One that was appended again counts, as in the file system.
                if is_image and keys.setdefault(sample, key) != key:
                    raise InputError(
                        f"{sample} in {shard} has more than one image, such as {last}; say which one with "
                        "data.image_key"
                    )
                if key.lower().rpartition(".")[-1] in image_keys and not is_image:
                    dotted[sample] = last
                if is_image:
                    again |= images.keys() & {sample}
                    images[sample] = member.offset_data, member.size
                elif key == label_key:
                    again |= labels.keys() & {sample}
                    content = file.extractfile(member)
                    assert content is not None
                    labels[sample] = _label(content.read(), f"{member.name} in {shard}")
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{shard} is no readable tar file ({error}); repair or remove it") from None
    if again:
        log.warning(
            "%s holds %d samples twice, such as %s: the later of them count; samples that are to count both need names "
            "of their own", shard, len(again), min(again),
        )  # fmt: skip
    lost = sorted(dotted.keys() - images.keys())
    if lost:
        raise InputError(
            f"{dotted[lost[0]]} in {shard} is no image of a sample: the name of a sample ends at its first dot; "
            "name the samples without dots"
        )
    odd = sorted(images.keys() ^ labels.keys())
    if odd:
        there, lacking = ("an image", f".{label_key}") if odd[0] in images else ("a label", f".{image_keys[0]}")
        raise InputError(f"{odd[0]} in {shard} has {there} and no {lacking}; {len(odd)} samples are like that")
    return {sample: (*place, labels[sample]) for sample, place in images.items()}


def _label(content: bytes, name: str) -> int:
    if not content.strip().isdigit():
        raise InputError(f"{name} must hold the number of a class, got {content[:20]!r}")
    return int(content)
