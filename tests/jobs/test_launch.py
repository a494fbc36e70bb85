"""Processes that something else than the job has started."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.accelerators import MPSAccelerator

from freqprune.errors import InputError
from freqprune.jobs.launch import world_size
from freqprune.jobs.launched import launched, named_by_launcher, run_id
from freqprune.jobs.settings import read
from freqprune.jobs.trainers import chosen_device, evaluator
from freqprune.networks import build_model
from freqprune.pruning import Amount, Recipe, plan_cut, planning
from freqprune.training.pixels import cores
from tests.jobs.small import config

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}
ONE: dict[str, Any] = {"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "devices": 1}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    def tell(**variables: str) -> None:
        for name in list(os.environ):
            if name.startswith(("SLURM", "TORCHELASTIC")) or name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return tell


def test_a_run_folder_has_one_name_in_all_processes(told: Any, tmp_path: Path) -> None:
    told()
    assert launched() is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{3}", run_id())
    told(**SRUN)
    assert run_id() == "17.3"
    # Of its own folder of processes torchrun tells each the file for its errors.
    (tmp_path / "attempt_0" / "1").mkdir(parents=True)
    os.utime(tmp_path / "attempt_0", (1e9 + 0.25, 1e9 + 0.25))
    told(**TORCHRUN, TORCHELASTIC_ERROR_FILE=str(tmp_path / "attempt_0" / "1" / "error.json"))
    assert run_id() == time.strftime("%Y-%m-%d_%H-%M-%S-250", time.localtime(1e9))
    told(**{**TORCHRUN, "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "cut"})
    assert run_id() == "cut"


def test_a_second_start_under_the_same_name_is_refused(told: Any, tmp_path: Path) -> None:
    """On several machines processes meet by a name, and so is their folder called."""
    told(**{**TORCHRUN, "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "cut"})
    assert named_by_launcher(tmp_path / "cut")
    assert not named_by_launcher(tmp_path / "typed")
    told()
    assert not named_by_launcher(tmp_path / "cut")


def test_each_process_has_a_device_of_its_own(told: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told()
    monkeypatch.setattr("lightning_fabric.accelerators.cuda.num_cuda_devices", lambda: 2)
    monkeypatch.setattr("pytorch_lightning.accelerators.cuda.num_cuda_devices", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *args: (8, 0))
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        settings = read(config("prune", tmp_path, "trainer=ddp", "trainer.accelerator=gpu", "trainer.devices=2"))
        assert str(chosen_device(settings)) == f"cuda:{rank}"
        assert str(evaluator(settings).strategy.root_device) == f"cuda:{rank}"


@pytest.mark.parametrize(
    ("given", "type_"),
    [
        ([], "cpu"),
        (["importance=l2", "pruning.compensation=least_squares"], "cpu"),
        (["importance=l2"], "mps"),
        (["pruning=none"], "mps"),
        (["trainer.accelerator=mps"], "mps"),
    ],
)
def test_a_cut_runs_where_there_is_float64(
    given: list[str], type_: str, told: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told()
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr("lightning_fabric.accelerators.mps.MPSAccelerator.is_available", staticmethod(lambda: True))
    settings = read(config("prune", tmp_path, "trainer=auto", *given))
    assert chosen_device(settings).type == type_


def test_a_cut_on_a_device_without_float64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "device_of", lambda net: torch.device("mps"))
    net, x = build_model({"name": "resnet8"}), torch.rand(1, 3, 32, 32)
    with pytest.raises(InputError, match="Apple's accelerator does not have: move the network to the CPU"):
        plan_cut(net, x, Recipe(Amount(macs_cut=0.3), criterion="logit_error"))
    assert plan_cut(net, x, Recipe(Amount(macs_cut=0.3), criterion="l2"))[1]


def test_other_processes_than_were_asked_for_are_refused(told: Any) -> None:
    told(**TORCHRUN)
    with pytest.raises(
        InputError, match=r"torchrun has started 2 processes, .* for 1: say .*devices=2 trainer.num_nod"
    ):
        world_size(ONE)
    with pytest.raises(InputError, match=r"for 1: say processes=2, or start one process"):
        world_size(ONE, "processes={processes}")
    told(**SRUN)
    with pytest.raises(
        InputError, match=r"srun has started 8 .* say trainer=ddp trainer.devices=4 trainer.num_nodes=2"
    ):
        world_size(ONE)
    # A shell, in which Lightning starts the processes.
    told(**SRUN, SLURM_JOB_NAME="interactive")
    assert world_size(ONE) == 1


def test_processes_on_several_machines_have_a_name_in_common(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    four = {**ONE, "devices": 2, "num_nodes": 2, "strategy": "ddp"}
    told(**{**TORCHRUN, "WORLD_SIZE": "4"}, GROUP_RANK="0", RANK="0", LOCAL_RANK="0")
    with pytest.raises(InputError, match=r"start it with --rdzv-id=NAME, or name the folder"):
        world_size(four)
    told(**{**TORCHRUN, "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "cut"})
    assert world_size(four) == 4


def test_processes_that_srun_bound_to_cores_have_these_for_themselves(
    told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    told()
    assert (cores(), cores(4), cores(32)) == (16, 4, 1)
    told(**SRUN, SLURM_CPUS_PER_TASK="16")
    assert cores(4) == 16
    # Not bound, they share those of the job.
    told(**SRUN, SLURM_CPUS_PER_TASK="4")
    assert cores(4) == 4


def test_batch_norms_over_processes_of_a_cpu_are_refused(told: Any) -> None:
    told()
    two = {**ONE, "devices": 2, "strategy": "ddp"}
    assert world_size(two) == 2
    assert world_size({**ONE, "sync_batchnorm": True}) == 1
    with pytest.raises(InputError, match=r"trainer.sync_batchnorm=true needs an accelerator"):
        world_size({**two, "sync_batchnorm": True})
