"""What torchrun or srun say of the processes that they have started, in their environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True)
class Launched:
    """Processes of one job that something else than the job has started.

    Args:
        by: what did, for messages.
        processes: how many there are.
        machines: on how many.
        key: a word that all of them have, and no other job; None if there is none.
    """

    by: str
    processes: int
    machines: int
    key: str | None


def launched() -> Launched | None:
    """The processes that this one is of; None if nothing but the job itself starts any."""
    known = os.environ
    if "TORCHELASTIC_RUN_ID" in known:
        processes = int(known.get("WORLD_SIZE", 1))
        machines = max(1, processes // int(known.get("LOCAL_WORLD_SIZE", processes)))
        return Launched("torchrun", processes, machines, _of_torchrun(machines))
    # Of the step that srun runs: what an allocation has room for is no concern of a script that is run without it.
    # In a shell by srun Lightning starts the processes, as without SLURM.
    if "SLURM_STEP_NUM_TASKS" in known and known.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        machines = int(known.get("SLURM_STEP_NUM_NODES", known.get("SLURM_NNODES", 1)))
        key = f"{known.get('SLURM_JOB_ID')}.{known.get('SLURM_STEP_ID', 0)}"
        return Launched("srun", int(known["SLURM_STEP_NUM_TASKS"]), machines, key)
    return None


def run_id() -> str:
    """Name of a run folder: the time in milliseconds, which runs that are started together do not share, or where
    something else has started several processes of one run a name that is the same in all of them."""
    there = launched()
    if there is not None and there.processes > 1 and there.key is not None:
        return there.key
    return _written(datetime.now())


def named_by_launcher(folder: Path) -> bool:
    """Whether a run folder has its name from what started its processes, so that a second start would have the same."""
    there = launched()
    return there is not None and there.processes > 1 and there.key == folder.name


def _written(moment: datetime) -> str:
    return moment.isoformat("_", "milliseconds").replace(":", "-").replace(".", "-")


def _of_torchrun(machines: int) -> str | None:
    """On one machine the time at which it made the folder of its processes, on several the name they meet by."""
    errors = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if machines == 1 and errors:
        return _written(datetime.fromtimestamp(Path(errors).parents[1].stat().st_mtime))
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return None if name == "none" else name
