"""Work that several processes share: who takes what, adding up, and one that decides for all.

Nothing is shared unless a job says so by `shared_work`: whoever calls `freqprune.cut` in one process of many has it
done there alone.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from freqprune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

# Of a file system that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)

T = TypeVar("T")
K = TypeVar("K")
P = ParamSpec("P")

_SHARING: ContextVar[bool] = ContextVar("sharing", default=False)
_BESIDE: ContextVar[int | None] = ContextVar("beside", default=None)


def file_lock(path: Path) -> FileLock:
    """A lock of the operating system: a file in the place of one, which newer versions of filelock make where there are
    no locks, would outlive a process that is killed."""
    options: dict[str, Any] = {"fallback_to_soft": False} if hasattr(FileLock, "fallback_to_soft") else {}
    return FileLock(path, **options)


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Inside the block no other process has the lock of a file; on a file system without locks nobody waits.

    Args:
        path: the file.
        doing: what another process does that has it, for the message.

    Raises:
        OSError: if the file cannot be written.
    """
    lock = file_lock(path)
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        log.warning("waiting for another process that %s (it holds %s)", doing, path)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        log.warning("%s cannot be locked (%s): another process that %s would not be noticed", path, error, doing)
    try:
        yield
    finally:
        lock.release()


def expect(processes: int) -> None:
    """Say how many processes of this job there will be on this machine, also before they are started."""
    _BESIDE.set(processes)


def on_this_machine() -> int:
    """How many processes of this job there are, or will be, on this machine: as a job or torchrun says, or one."""
    return _BESIDE.get() or int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def shared_work() -> Iterator[None]:
    """Inside the block the processes of the ``torch.distributed`` group, if there is one, share the work: all of them
    have to run it."""
    before = _SHARING.set(True)
    try:
        yield
    finally:
        _SHARING.reset(before)


def rank_and_size() -> tuple[int, int]:
    """Number of this process and how many share the work; 0 and 1 outside `shared_work`."""
    if not _SHARING.get():
        return 0, 1
    import torch.distributed as dist

    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)


def own_share(batches: Iterable[T], or_none: bool = False) -> list[tuple[int, T]]:
    """What of some batches of calibration images this process takes, each with its number among all.

    Args:
        batches: the same in every process.
        or_none: there may be fewer batches than processes, of which some then take none.

    Raises:
        InputError: for fewer batches than processes.
    """
    rank, size = rank_and_size()
    numbered = list(enumerate(batches))
    if 0 < len(numbered) < size and not or_none:
        raise InputError(
            f"{size} processes cannot share {len(numbered)} batches of calibration images: use fewer "
            "(trainer.devices), or more images (pruning.calibration_images and pruning.measured_images, n_images of "
            "TagPruning)"
        )
    return numbered[rank::size]


def added_up(total: Tensor) -> Tensor:
    """A tensor summed over the processes, the same in all of them."""
    if rank_and_size()[1] == 1:
        return total
    import torch
    import torch.distributed as dist

    on_device = dist.get_backend() == "nccl" and total.device.type == "cpu"
    summed = total.detach().clone().contiguous()
    summed = summed.to(torch.accelerator.current_accelerator()) if on_device else summed
    dist.all_reduce(summed)
    return summed.to(total.device)


def merged(own: Mapping[K, T]) -> dict[K, T]:
    """What every process found, by keys of which no two have the same; the same in all of them."""
    size = rank_and_size()[1]
    if size == 1:
        return dict(own)
    import torch.distributed as dist

    found: list[Any] = [None] * size
    dist.all_gather_object(found, dict(own))
    return {key: value for part in found for key, value in part.items()}


def from_first(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What the first process finds, which alone does the work; the others wait for it.

    Raises:
        Exception: in all of them, if the work fails: bad input as it is, else a RuntimeError that says what it was.
    """
    rank, size = rank_and_size()
    if size == 1:
        return work(*args, **kwargs)
    import torch.distributed as dist

    found: list[Any] = [None, None]
    failed: Exception | None = None
    if rank == 0:
        try:
            found[0] = work(*args, **kwargs)
        except Exception as error:
            failed = error
            known = isinstance(error, InputError)
            found[1] = error if known else RuntimeError(f"the first process: {type(error).__name__}: {error}")
    dist.broadcast_object_list(found, src=0)
    if failed is not None or found[1] is not None:
        raise failed or found[1]
    result: T = found[0]
    return result
