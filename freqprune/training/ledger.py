"""What is known of every image of a listing, kept on disk beside its pixels: read once, checked at every start."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from freqprune.errors import InputError
from freqprune.processes import locked
from freqprune.reports import is_quiet
from freqprune.training.listing import Reader

log = logging.getLogger(__name__)

ROW = np.dtype(
    [("stamp", "<i8", 2), ("sums", "<i8", 3), ("squares", "<i8", 3), ("checksum", "<u4"), ("done", "u1")], align=True
)
# Raised when the pixels of the same file become others.
VERSION = 4
# Images between two moments at which what was read is safe on the disk.
_BLOCK = 512
_CHECKED_ROWS = 32
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Ledger:
    """Of every image: whether it was read, when it last changed, sums for the channel statistics, and a checksum.

    Args:
        rows: ``(n_images,)`` of `ROW`.
    """

    def __init__(self, rows: NDArray[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def stale(self, stamps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of images that have not been read, or have changed since."""
        return np.flatnonzero((self.rows["done"] == 0) | (self.rows["stamp"] != stamps).any(1))

    def enter(self, number: int, image: NDArray[np.uint8]) -> None:
        """What is kept of an image ``(height, width, n_channels)``; it is not yet marked as done."""
        row = self.rows[number]
        row["sums"] = image.sum((0, 1), dtype=np.int64)
        row["squares"] = np.square(image, dtype=np.uint32).sum((0, 1), dtype=np.int64)
        row["checksum"] = zlib.crc32(image.tobytes())

    def totals(self, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sums and sums of squares of each channel over some images."""
        sums, squares = self.rows["sums"][chosen].sum(0), self.rows["squares"][chosen].sum(0)
        return sums.astype(np.int64), squares.astype(np.int64)


def read_all(
    reader: Reader,
    numbers: Sequence[int] | NDArray[np.int64],
    keep: Callable[[int, NDArray[np.uint8]], None],
    after_block: Callable[[NDArray[np.int64]], None] | None = None,
) -> None:
    """Read images in threads, in blocks, so that no more than a few are in memory.

    Args:
        reader: reads one.
        numbers: which.
        keep: takes number and image; called in threads.
        after_block: takes the numbers of a block once all of it was kept.

    Raises:
        InputError: names images that cannot be read, up to ten, after everything before them was kept.
    """
    bad: dict[int, str] = {}

    def read(number: int) -> bool:
        try:
            keep(number, reader(number))
        except InputError as error:
            bad[number] = str(error)
            return False
        return True

    blocks = [np.asarray(numbers[i : i + _BLOCK], np.int64) for i in range(0, len(numbers), _BLOCK)]
    what = f"reading {reader.listing.place}"
    # Decoding releases the interpreter lock, so threads help.
    with ThreadPoolExecutor() as pool:
        for block in track(blocks, description=what, transient=True, disable=len(blocks) < 2 or is_quiet()):
            good = list(pool.map(read, block.tolist()))
            if after_block is not None:
                after_block(block[good])
            if len(bad) >= 10:
                break
    if bad:
        raise InputError("\n".join(bad[number] for number in sorted(bad)[:10]))


def open_ledger(reader: Reader, stem: Path, with_pixels: bool) -> Ledger:
    """The ledger of a listing, and a file of its pixels; read from the images as far as it is not there or the images
    have changed. A build that was killed goes on where it was; of several processes one builds and the others wait.

    Args:
        reader: reads one image.
        stem: path of the files, without what distinguishes them: ``.json``, ``.rows``, ``.pixels``, ``.lock``.
        with_pixels: write the pixels too, ``(n_images, height, width, n_channels)``.

    Raises:
        InputError: names images that cannot be read; says how much room is needed where it is too little.
        OSError: if the folder cannot be written to and the files there are not complete.
    """
    stamps = reader.listing.stamps(np.arange(len(reader)))
    found = _existing(reader, stem, with_pixels, "r")
    if found is not None and not len(found.stale(stamps)):
        return found
    stem.parent.mkdir(parents=True, exist_ok=True)
    with locked(stem.with_suffix(".lock"), f"reads {reader.listing.place}"):
        try:
            ledger = _existing(reader, stem, with_pixels, "r+") or _create(reader, stem, with_pixels)
            _read_stale(reader, ledger, stamps, stem.with_suffix(".pixels") if with_pixels else None)
        except OSError as error:
            if error.errno in _FULL:
                raise _no_room(reader, stem.parent, error.strerror) from error
            raise
    return ledger


def checked(reader: Reader) -> Ledger:
    """A ledger in memory: every image read once, none of it kept on disk."""
    ledger = Ledger(np.zeros(len(reader), ROW))
    read_all(reader, np.arange(len(reader)), ledger.enter)
    return ledger


def room(planned: Sequence[tuple[Reader, Path]]) -> bool:
    """Whether files of the pixels fit into the folder where they are to be, all together, but for those that are
    there already; not into one that cannot be read."""
    needed, folder = 0, planned[0][1].parent
    try:
        for reader, stem in planned:
            there = stem.with_suffix(".pixels")
            if not (there.is_file() and there.stat().st_size == reader.n_bytes):
                needed += reader.n_bytes + len(reader) * ROW.itemsize
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return shutil.disk_usage(folder).free >= needed
    except OSError:
        return False


class NoRoomError(InputError):
    """There is too little room on a disk."""


def _no_room(reader: Reader, folder: Path, reason: str | None = None) -> NoRoomError:
    free = shutil.disk_usage(folder).free
    said = "" if reason is None else f" ({reason})"
    return NoRoomError(
        f"data.cache = disk needs {reader.n_bytes / 1e9:.3g} GB in {folder} for {len(reader)} images of "
        f"{reader.listing.place}, {free / 1e9:.3g} GB are free{said}; make room, name another folder with "
        "data.cache_dir, or use data.cache=none"
    )


def _existing(reader: Reader, stem: Path, with_pixels: bool, mode: str) -> Ledger | None:
    """Files that are there, whole, of these images; None if there are none."""
    header, pixels = stem.with_suffix(".json"), stem.with_suffix(".pixels")
    if not header.is_file():
        return None
    try:
        there = json.loads(header.read_text())
        ledger = Ledger(np.memmap(stem.with_suffix(".rows"), ROW, mode, shape=(len(reader),)))  # type: ignore[call-overload]
        sound = there == _header(reader) and (not with_pixels or _sound(reader, ledger, pixels))
    except (OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise
        sound = False
    if sound:
        return ledger
    if mode == "r+":
        why = "of other images than are there now, of an earlier version of freqprune, or damaged"
        log.warning("%s, which is of images in %s, is %s: they are read anew", header, reader.listing.place, why)
    return None


def _header(reader: Reader) -> dict[str, Any]:
    return {"version": VERSION, "n_images": len(reader), **reader.describe()}


def _sound(reader: Reader, ledger: Ledger, pixels: Path) -> bool:
    """Whether a file of pixels has its length, and some of its images their checksums."""
    if pixels.stat().st_size != reader.n_bytes:
        return False
    done = np.flatnonzero(ledger.rows["done"])
    size = reader.n_bytes // len(reader)
    with open(pixels, "rb") as file:
        for number in done[:: max(1, len(done) // _CHECKED_ROWS)].tolist():
            file.seek(number * size)
            if zlib.crc32(file.read(size)) != ledger.rows["checksum"][number]:
                return False
    return True


def _create(reader: Reader, stem: Path, with_pixels: bool) -> Ledger:
    """New files, empty, in the place of old ones; a process that still reads those goes on with them."""
    header, pixels = stem.with_suffix(".json"), stem.with_suffix(".pixels")
    for path in (header, stem.with_suffix(".rows"), pixels):
        path.unlink(missing_ok=True)
    if with_pixels:
        if not room([(reader, stem)]):
            raise _no_room(reader, stem.parent)
        with open(pixels, "wb") as file:
            # Taken at once where the system can: a disk that runs full is told before the work, not in it.
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, reader.n_bytes)
                else:
                    file.truncate(reader.n_bytes)
            except OSError:
                # Up to a quota some of it may have been taken.
                pixels.unlink()
                raise
    rows = np.memmap(stem.with_suffix(".rows"), ROW, "w+", shape=(len(reader),))
    rows.flush()
    part = stem.with_suffix(".part")
    part.write_text(json.dumps(_header(reader)))
    part.replace(header)
    return Ledger(rows)


def _read_stale(reader: Reader, ledger: Ledger, stamps: NDArray[np.int64], pixels: Path | None) -> None:
    numbers = ledger.stale(stamps)
    n_changed = int(ledger.rows["done"][numbers].sum())
    if n_changed:
        log.warning("%d images of %s have changed: they are read again", n_changed, reader.listing.place)
    file = None if pixels is None else os.open(pixels, os.O_WRONLY | getattr(os, "O_BINARY", 0))
    one_by_one = Lock()
    size = reader.n_bytes // len(reader)
    ledger.rows["done"][numbers] = 0

    def keep(number: int, image: NDArray[np.uint8]) -> None:
        ledger.enter(number, image)
        if file is not None:
            # Written, not mapped: mapped pages would count as memory of this process.
            if hasattr(os, "pwrite"):
                os.pwrite(file, image.tobytes(), number * size)
                return
            with one_by_one:
                os.lseek(file, number * size, os.SEEK_SET)
                os.write(file, image.tobytes())

    def after_block(block: NDArray[np.int64]) -> None:
        # Marked only when the pixels are on the disk, so that a machine that stops leaves no mark without them.
        if file is not None:
            os.fsync(file)
        ledger.rows["stamp"][block], ledger.rows["done"][block] = stamps[block], 1
        ledger.rows.flush()  # type: ignore[attr-defined]

    try:
        read_all(reader, numbers, keep, after_block)
    finally:
        if file is not None:
            os.close(file)
