"""A job that is started again in its folder: refused while the first runs there; one that was killed, in a sweep or by
SLURM, goes on with what it has left."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import Timeout
from omegaconf import DictConfig

from freqprune.errors import InputError
from freqprune.processes import file_lock
from freqprune.reports import record

log = logging.getLogger(__name__)

LOCK = ".running"
# Numbers of a process among those of one job, by what starts them.
_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "OMPI_COMM_WORLD_RANK")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Inside the block no other job works in a folder; of the processes of a job the first looks.

    Raises:
        InputError: if one does.
    """
    if any(os.environ.get(name, "0") != "0" for name in _RANKS):
        yield
        return
    lock = file_lock(out / LOCK)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"a job is running in {out}: wait for it or cancel it, or choose another folder (hydra.run.dir=FOLDER, "
            f"of a sweep hydra.sweep.dir=FOLDER); if there is none, remove {out / LOCK}"
        ) from None
    except (OSError, NotImplementedError) as error:
        log.warning("%s cannot be locked (%s): a second job in it would not be noticed", out, error)
    try:
        yield
    finally:
        with suppress(OSError):
            if lock.is_locked:
                (out / LOCK).unlink(missing_ok=True)
        lock.release()


def go_on(cfg: DictConfig, trains: bool) -> bool:
    """Let a job that was killed go on with its last checkpoint, or with its cut, as ``ckpt_path=``, ``ckpt=`` and
    ``resume=`` would, if it is one of a sweep or one that SLURM starts again, and has the settings that it had.

    Args:
        cfg: its settings, which are changed.
        trains: whether the job begins with a training.

    Returns:
        Whether there is a training to begin with still.
    """
    out = Path(str(cfg.output_dir))
    same = record.read_json(out / record.RUN).get("settings") == record.settings_of(cfg)
    if not same or not (record.in_sweep() or is_requeued()):
        return trains
    last = out / "checkpoints" / "last.ckpt"
    if record.holds_cut(out) and (not trains or last.is_file()):
        cfg.resume = str(out)
        if trains:
            cfg.ckpt, cfg.ckpt_path = str(last), None
        log.info("going on with the cut in %s", out)
        return False
    if trains and last.is_file():
        cfg.ckpt_path = str(last)
        log.info("going on with %s", last)
    return trains


def is_requeued() -> bool:
    """Whether SLURM has started this job before."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
