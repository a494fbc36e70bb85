"""Downloads into a folder that several processes may want at once: the first fetches, the others find it done."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


@contextmanager
def alone(root: str | Path) -> Iterator[None]:
    """Inside the block no other process is in one like it for the same folder; where nothing can be written into the
    folder, nothing is downloaded either, and nobody waits."""
    lock = FileLock(Path(root) / ".download.lock")
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.5)
    except Timeout:
        log.warning("waiting for another process that downloads into %s", root)
        lock.acquire()
    except OSError:
        pass
    try:
        yield
    finally:
        lock.release()
