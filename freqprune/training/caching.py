"""Where images are held: in memory, in a mapped file of bytes, or nowhere, decoded as they are asked for."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freqprune.memory import free_memory
from freqprune.processes import on_this_machine
from freqprune.training.ledger import NoRoomError, checked, open_ledger, read_all, room
from freqprune.training.listing import Reader
from freqprune.training.pixels import DecodedPixels, MappedPixels, StoredPixels

log = logging.getLogger(__name__)

CACHES = ("auto", "memory", "disk", "none")
# Bytes that are taken to be free where the system says nothing.
_FREE_ANYWHERE = 4 * 10**9


def hold(
    readers: Mapping[str, Reader], cache: str, folder: str | Path | None, beside: Path
) -> list[Tensor | StoredPixels]:
    """Pixels of every split, held where `cache` says.

    Args:
        readers: what reads an image, by the name of the split.
        cache: ``"memory"``; ``"disk"``: a memory-mapped file of uint8, written once; ``"none"``: decoded at every use,
            after all images were read once to see that they can be; ``"auto"``: in memory if there is room for it twice
            (while it is split), else on disk if there is room, else nowhere.
        folder: where the files go.
        beside: where they go if `folder` is None, as ``beside/.freqprune``.

    Raises:
        InputError: names images that cannot be read; says how much room ``"disk"`` needs where there is too little.
    """
    place = Path(str(folder)).expanduser() if folder is not None else beside / ".freqprune"
    stems = {split: _stem(place, split, reader, folder is None) for split, reader in readers.items()}
    asked = cache
    if cache == "auto":
        cache = _choose([(reader, stems[split]) for split, reader in readers.items()])
    if cache == "memory":
        return [_in_memory(reader) for reader in readers.values()]
    held: list[Tensor | StoredPixels] = []
    for split, reader in readers.items():
        if cache == "disk":
            try:
                held.append(_mapped(reader, stems[split]))
                continue
            except NoRoomError as error:
                # A quota is no matter of what the disk has left.
                if asked != "auto":
                    raise
                log.warning("%s; till then images are decoded as they are asked for", error)
            except OSError as error:
                log.warning(
                    "%s cannot be written to (%s): images are decoded as they are asked for, as with data.cache=none; "
                    "name a folder for them with data.cache_dir", place, error.strerror
                )  # fmt: skip
                cache = "none"
        held.append(_decoded(reader, stems[split]))
    return held


def _choose(planned: list[tuple[Reader, Path]]) -> str:
    needed, free = sum(reader.n_bytes for reader, _ in planned), free_memory()
    if 2 * needed * on_this_machine() <= (_FREE_ANYWHERE if free is None else free):
        chosen = "memory"
    elif room(planned):
        chosen = "disk"
    else:
        chosen = "none"
    said = "unknown" if free is None else f"{free / 1e9:.3g} GB"
    log.log(
        logging.INFO if chosen == "memory" else logging.WARNING,
        "data.cache=auto: the images take %.3g GB, free memory is %s: data.cache=%s%s", needed / 1e9, said, chosen,
        "" if chosen == "memory" else "; what is not there yet is read once: for a trial or a look data.limit_train "
        "and data.limit_test take fewer"
    )  # fmt: skip
    return chosen


def _in_memory(reader: Reader) -> Tensor:
    pixels = np.empty((len(reader), *reader.shape), np.uint8)

    def keep(number: int, image: NDArray[np.uint8]) -> None:
        pixels[number] = image

    read_all(reader, np.arange(len(reader)), keep)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _stem(place: Path, split: str, reader: Reader, beside: bool) -> Path:
    """Path of a split's files without their ending; others for other sizes, and for other data in the same folder."""
    owner = reader.listing.beside if beside else str(Path(reader.listing.place).absolute())
    version = [reader.listing.version] if reader.listing.version else []
    said = json.dumps([owner, vars(reader.fitting), *version])
    return place / f"{split}-{hashlib.sha256(said.encode()).hexdigest()[:10]}"


def _mapped(reader: Reader, stem: Path) -> MappedPixels:
    ledger = open_ledger(reader, stem, with_pixels=True)
    return MappedPixels(stem.with_suffix(".pixels"), reader.shape, ledger)


def _decoded(reader: Reader, stem: Path) -> DecodedPixels:
    stem = stem.with_name(f"{stem.name}-checked")
    home = Path.home() / ".cache" / "freqprune" / "images"
    for place in (stem, home / _stem(home, stem.name, reader, beside=False).name):
        try:
            return DecodedPixels(reader, open_ledger(reader, place, with_pixels=False))
        except OSError as error:
            reason = error.strerror
    log.warning(
        "neither %s nor %s can be written to (%s): all images are read at every start to see that they can be",
        stem.parent, home, reason
    )  # fmt: skip
    return DecodedPixels(reader, checked(reader))
