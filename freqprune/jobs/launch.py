"""One job in several processes: started as `trainer.devices` says, or there already under torchrun or SLURM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning_fabric import Fabric

from freqprune.errors import InputError
from freqprune.jobs.launched import launched
from freqprune.processes import expect, rank_and_size, shared_work

OF_TRAINERS = "trainer=ddp trainer.devices={devices} trainer.num_nodes={nodes}"
_WHERE = ("accelerator", "devices", "num_nodes")


@contextmanager
def in_all_processes(trainer: Mapping[str, Any], ask: str = OF_TRAINERS) -> Iterator[bool]:
    """Run the block in as many processes as a Lightning trainer with these settings would, which share the work in it;
    whether this one is the first, which alone writes and speaks.

    The further processes run the command from its start. Where one of them ends with an error, Lightning ends the
    others.

    Args:
        trainer: settings of the trainer, with its ``_target_``.
        ask: how another number of processes is asked for, with ``{processes}``, ``{devices}`` and ``{nodes}``.

    Raises:
        InputError: if torchrun or srun have started another number of processes.
    """
    if world_size(trainer, ask) == 1:
        yield True
        return
    Fabric(**{key: trainer[key] for key in _WHERE if key in trainer}, strategy="ddp").launch()
    with shared_work():
        yield rank_and_size()[0] == 0


def place(trainer: Mapping[str, Any]) -> pl.Trainer:
    """A Lightning trainer with these settings that runs nothing: where it would run, and in how many processes."""
    where = {key: trainer[key] for key in (*_WHERE, "strategy") if key in trainer}
    quietly = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    made = instantiate({"_target_": trainer["_target_"], **where}, **quietly, enable_model_summary=False)
    assert isinstance(made, pl.Trainer)
    return made


def world_size(trainer: Mapping[str, Any], ask: str = OF_TRAINERS) -> int:
    """How many processes a Lightning trainer with these settings runs in; `freqprune.processes` is told those of this
    machine.

    Raises:
        InputError: if torchrun or srun have started another number of them; for batch norms over several of them on a
            CPU.
    """
    made = place(trainer)
    asked, there = made.num_devices * made.num_nodes, launched()
    if there is not None and there.processes != asked:
        raise InputError(
            f"{there.by} has started {there.processes} processes, this job asks for {asked}: say "
            + ask.format(processes=there.processes, devices=there.processes // there.machines, nodes=there.machines)
            + ", or start one process without it"
            + (
                "; each process has to see all GPUs of its machine (--gpus-per-node, not --gpus-per-task)"
                if there.by == "srun"
                else ""
            )
        )
    named = HydraConfig.initialized() and any(
        one.startswith(("hydra.run.dir=", "hydra.sweep.dir=")) for one in HydraConfig.get().overrides.hydra
    )
    if there is not None and there.machines > 1 and there.key is None and not named:
        raise InputError(
            "torchrun on several machines gives the processes no name in common, by which they would find one folder: "
            "start it with --rdzv-id=NAME, or name the folder (hydra.run.dir=FOLDER), one that all machines see"
        )
    expect(made.num_devices)
    size: int = made.world_size
    if size > 1 and trainer.get("sync_batchnorm") and made.strategy.root_device.type == "cpu":
        raise InputError(
            "trainer.sync_batchnorm=true needs an accelerator: torch has no batch norm over several processes on CPUs; "
            "leave it out, or use one process (trainer=cpu) with the whole batch"
        )
    return size
