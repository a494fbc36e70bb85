"""How much memory a process may still take: of the machine, and of the control groups that it is in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
# Files of version 2 and 1 of control groups: limit, use, and the line of memory.stat for the cache of files.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory() -> int | None:
    """Bytes that this process may still take; half of all memory where the system says no more than that, as macOS
    does; None where it says nothing.

    A scheduler such as SLURM sets its limit on a group further up than the process is in: all up to the root count.
    """
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (AttributeError, OSError, ValueError):
            return None
    return min([free, *_left_of_groups()])


def _left_of_groups() -> Iterator[int]:
    try:
        lines = [line.split(":", 2) for line in _OWN.read_text().splitlines()]
    except OSError:
        lines = []
    for _, kinds, path in (line for line in lines if len(line) == 3):
        if kinds and "memory" not in kinds.split(","):
            continue
        root, files = (_GROUPS, _V2) if not kinds else (_GROUPS / "memory", _V1)
        folder = root / path.lstrip("/")
        # A container may not see the part of the path above its own.
        for group in [folder, *folder.parents] if root in folder.parents or folder == root else [root]:
            yield from _left(group, *files)
            if group == root:
                break


def _left(group: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    try:
        most, taken = int((group / limit).read_text()), int((group / used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # The cache of files counts as used, and gives way.
        yield most - taken + int(stat[cache])
    except (OSError, KeyError, ValueError):
        # No limit is the word max.
        return
