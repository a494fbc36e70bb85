"""Pixels that lie elsewhere than in memory and are read as they are asked for."""

from __future__ import annotations

import math
import mmap
import os
import warnings
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from freqprune.training.ledger import Ledger
from freqprune.training.listing import Reader

# Pages of a mapped file count as memory of the process until they are handed back: after so many bytes. Around what is
# read the system maps what it has at hand, of small images much more than they are.
_HAND_BACK, _AROUND = 64 * 2**20, 64 * 2**10


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, which does not wait for it where that is safe: on a Mac's GPU a copy that nobody
    waits for may read what has been let go of (pytorch/pytorch#189690)."""
    return tensor.to(device, non_blocking=device.type == "cuda")


class StoredPixels(ABC):
    """Indexed like a uint8 tensor ``(n_images, n_channels, height, width)``; an index along the images reads these. In
    memory channels come last, as they are decoded.

    Args:
        shape: of one image, ``(height, width, n_channels)``.
        ledger: what is known of every image.
    """

    def __init__(self, shape: tuple[int, ...], ledger: Ledger) -> None:
        height, width, n_channels = shape
        self._image = (n_channels, height, width)
        self._size: int | None = None
        self._ledger: Ledger | None = ledger
        self._rows = torch.arange(len(ledger))

    @property
    def shape(self) -> torch.Size:
        sides = self._image[1:] if self._size is None else (self._size, self._size)
        return torch.Size((len(self._rows), self._image[0], *sides))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """Read images: uint8, of an integer one without the first axis."""
        rows = self._rows[index]
        pixels = self._read(rows if rows.dim() else rows[None])
        if self._size is not None:
            top, left = ((side - self._size) // 2 for side in self._image[1:])
            pixels = pixels[..., top : top + self._size, left : left + self._size]
        return pixels if rows.dim() else pixels[0]

    def subset(self, index: Tensor) -> StoredPixels:
        """Some of the images, none of them read."""
        return self._part(_rows=self._rows[index])

    def middle(self, size: int) -> StoredPixels:
        """The middle ``size x size`` pixels of each, none of them read."""
        return self._part(_size=size)

    def _part(self, **changed: Any) -> StoredPixels:
        # Not copied: all parts share one ledger and one mapped file.
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__, **changed)
        return part

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, pixels scaled to [0, 1], from sums kept in the ledger."""
        assert self._ledger is not None
        n_pixels = len(self) * self._image[1] * self._image[2]
        sums, squares = self._ledger.totals(self._rows.numpy())
        means = sums / n_pixels / 255
        stds = np.sqrt(np.maximum(squares / n_pixels / 255**2 - means**2, 0))
        return [round(float(m), 6) for m in means], [round(max(float(s), 1e-3), 6) for s in stds]

    @abstractmethod
    def _read(self, rows: Tensor) -> Tensor: ...

    def __getstate__(self) -> dict[str, Any]:
        # Workers have no use for the ledger, and a copy of it in each would not be small.
        return {**self.__dict__, "_ledger": None}


class DecodedPixels(StoredPixels):
    """Decoded every time they are asked for: by the workers of a loader, or by threads."""

    def __init__(self, reader: Reader, ledger: Ledger) -> None:
        super().__init__(reader.shape, ledger)
        self._reader = reader

    def _read(self, rows: Tensor) -> Tensor:
        shape = (len(rows), *self._reader.shape)
        working = get_worker_info() is not None
        # What a worker hands over lies in shared memory: decoded there, it need not be copied there.
        found = _shared(shape) if working else torch.empty(shape, dtype=torch.uint8)
        pixels = found.numpy()

        def read(place: int) -> None:
            pixels[place] = self._reader(int(rows[place]))

        if working or len(rows) < 8:
            for place in range(len(rows)):
                read(place)
        else:
            with ThreadPoolExecutor() as pool:
                list(pool.map(read, range(len(rows))))
        return found.permute(0, 3, 1, 2)


def _shared(shape: tuple[int, ...]) -> Tensor:
    """Bytes in shared memory, as torch's own ``default_collate`` takes them in a worker."""
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class MappedPixels(StoredPixels):
    """Rows of a memory-mapped file of uint8."""

    def __init__(self, path: Path, shape: tuple[int, ...], ledger: Ledger) -> None:
        super().__init__(shape, ledger)
        self._path, self._n_all = path, len(ledger)
        self._open()

    def _open(self) -> None:
        self._handed_out = 0
        with open(self._path, "rb") as file:
            # Read-only: of what may be written to, the system maps no more than it has memory for.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            # Nothing is ever written.
            warnings.filterwarnings("ignore", ".*buffer is not writable.*")
            found = torch.frombuffer(self._map, dtype=torch.uint8)
        self._all = found.view(self._n_all, *self._image[1:], self._image[0])

    def _read(self, rows: Tensor) -> Tensor:
        pixels = self._all.index_select(0, rows).permute(0, 3, 1, 2)
        self._handed_out += max(pixels.numel(), _AROUND * len(rows))
        if self._handed_out > _HAND_BACK:
            if hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)
            self._handed_out = 0
        return pixels

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {key: value for key, value in state.items() if key not in ("_map", "_all")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def cores(processes: int = 1) -> int:
    """Processor cores that this process may use, if so many on its machine share them; srun may give each its own."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    of_srun = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    own = of_srun and found <= int(os.environ.get("SLURM_CPUS_PER_TASK", 0))
    return found if own else max(1, found // processes)
