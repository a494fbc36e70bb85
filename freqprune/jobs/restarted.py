"""A job that is started again in its folder: refused while the first runs there; one that was killed, in a sweep or by
SLURM, goes on with what it has left."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from freqprune.errors import InputError
from freqprune.reports import record

log = logging.getLogger(__name__)

LOCK = ".running"
# Numbers of a process among those of one job, by what starts them.
_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Inside the block no other job works in a folder; of the processes of a job the first looks.

    Raises:
        InputError: if one does.
    """
    if any(os.environ.get(name, "0") != "0" for name in _RANKS):
        yield
        return
    lock = FileLock(out / LOCK)
    # Where nothing can be written, that is told as it is tried.
    with suppress(OSError):
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"a job is running in {out}: wait for it or cancel it, or choose another folder (hydra.run.dir=FOLDER, "
                f"of a sweep hydra.sweep.dir=FOLDER); if there is none, remove {out / LOCK}"
            ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            if lock.is_locked:
                (out / LOCK).unlink(missing_ok=True)
        lock.release()


def go_on(cfg: DictConfig, trains: bool) -> None:
    """Let a job that was killed go on with its last checkpoint, or with its cut, as ``ckpt_path=`` and ``resume=``
    would, if it is one of a sweep or one that SLURM starts again, and has the settings that it had."""
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if not in_sweep and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return
    out = Path(str(cfg.output_dir))
    if record.read_json(out / record.RUN).get("settings") != record.settings_of(cfg):
        return
    last = out / "checkpoints" / "last.ckpt"
    if trains and cfg.ckpt_path is None and last.is_file():
        cfg.ckpt_path = str(last)
        log.info("going on with %s", last)
    elif not trains and cfg.resume is None and record.holds_cut(out):
        cfg.resume = str(out)
        log.info("going on with the cut in %s", out)
