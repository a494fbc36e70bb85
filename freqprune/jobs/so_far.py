"""What an explanation has found so far: kept in its folder until all of it is written, so that one that was interrupted
goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from freqprune.attribution import OfParts, key_of
from freqprune.jobs.advice import same_folder
from freqprune.jobs.explain_settings import Explaining
from freqprune.reports import show

FOLDER = "so_far"


class FolderCache:
    """A cache of `freqprune.attribute` with a file for each image.

    Args:
        folder: made with the first of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.npz")))

    def get(self, key: str, /) -> tuple[OfParts, int] | None:
        # One that was killed as it wrote has left none, a full disk half a file.
        with (
            suppress(OSError, ValueError, EOFError, KeyError, BadZipFile),
            self._file(key).open("rb") as file,
            np.load(file) as arrays,
        ):
            found = {field.name: torch.from_numpy(arrays[field.name]) for field in fields(OfParts)}
            return OfParts(**found), int(arrays["forwards"])
        return None

    def __setitem__(self, key: str, found: tuple[OfParts, int], /) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self._file(key).with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **{name: value.numpy() for name, value in vars(found[0]).items()}, forwards=found[1])
        os.replace(partial, self._file(key))

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.npz"


@contextmanager
def kept(out: Path, asked: Explaining, net: nn.Module, is_first: bool) -> Iterator[FolderCache]:
    """The cache of a network and a score in the folder of a job; if this breaks off, the first of its processes says
    how to go on."""
    weights = (one for pair in net.state_dict().items() for one in pair)
    kind = key_of(version("freqprune"), asked.model, asked.tags.score, *weights)
    cache = FolderCache(out / FOLDER / kind[:16])
    if is_first and len(cache):
        show("going on with what an interrupted explanation has left in this folder")
    try:
        yield cache
    except BaseException:
        if is_first and len(cache):
            show(f"what was found so far is kept; to go on: the same command with {same_folder(out)}")
        raise
