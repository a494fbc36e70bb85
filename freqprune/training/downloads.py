"""Downloads into a folder that several processes may want at once: the first fetches, the others find it done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from freqprune.processes import locked


@contextmanager
def alone(root: str | Path) -> Iterator[None]:
    """Inside the block no other process is in one like it for the same folder; where nothing can be written into the
    folder, nothing is downloaded either, and nobody waits."""
    with ExitStack() as stack:
        with suppress(OSError):
            Path(root).mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(Path(root) / ".download.lock", f"downloads into {root}"))
        yield
