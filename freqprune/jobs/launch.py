"""One job in several processes: started as `trainer.devices` says, or there already under torchrun or SLURM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hydra.utils import instantiate
from lightning_fabric import Fabric

from freqprune.processes import rank_and_size, shared_work

_WHERE = ("accelerator", "devices", "num_nodes")


@contextmanager
def in_all_processes(trainer: Mapping[str, Any]) -> Iterator[bool]:
    """Run the block in as many processes as a Lightning trainer with these settings would, which share the work in it;
    whether this one is the first, which alone writes and speaks.

    The further processes run the command from its start. Where one of them ends with an error, Lightning ends the
    others.

    Args:
        trainer: settings of the trainer, with its ``_target_``.
    """
    where = {key: trainer[key] for key in _WHERE if key in trainer}
    strategy = {"strategy": trainer["strategy"]} if "strategy" in trainer else {}
    like = {"_target_": trainer["_target_"], **where, **strategy}
    quietly = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    if instantiate(like, **quietly, enable_model_summary=False).world_size == 1:
        yield True
        return
    Fabric(**where, strategy="ddp").launch()
    with shared_work():
        yield rank_and_size()[0] == 0
