"""Kills, full disks and folders that cannot be written to."""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from freqprune.jobs.trainers import AtomicCheckpoints
from freqprune.networks.checkpoint import save_pruned
from freqprune.networks.registry import build_model
from tests.conftest import ROOT
from tests.forked import call
from tests.jobs.small import SMALL, config

RUN = (
    *SMALL,
    "model.stage_widths=[4,4,8]",
    "trainer.max_epochs=8",
    "tagging.every_n_epochs=4",
    "data.val_fraction=0.02",
)


def train(folder: str, ckpt_path: str | None) -> None:
    """One attempt, in a process of its own."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    from freqprune.jobs.train import train

    train(config("train", Path(folder), *([] if ckpt_path is None else [f"ckpt_path={ckpt_path}"]), base=RUN))


@pytest.mark.slow
def test_killed_at_ten_points_and_resumed_to_the_same_weights(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["freqprune.jobs.train", "torchvision", "sklearn.datasets", "torch._dynamo", "tests.jobs.test_faults"]
    )

    def attempt(folder: Path, kill_after: float | None) -> bool:
        """Whether the run came to its end; it goes on from its last checkpoint."""
        last = folder / "checkpoints" / "last.ckpt"
        process = context.Process(target=train, args=(str(folder), str(last) if last.exists() else None))
        process.start()
        process.join(kill_after)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            return False
        assert process.exitcode == 0
        return True

    # The first attempt waits for the imports of the server.
    assert attempt(tmp_path / "warm-up", None)
    start = time.monotonic()
    assert attempt(tmp_path / "whole", None)
    whole = time.monotonic() - start
    rng = random.Random(0)
    kills = early = 0
    while kills < 10:
        # Once a run is through, a new one: the kills have to fall while one is at work.
        folder = tmp_path / f"killed{early}"
        if attempt(folder, rng.uniform(0.05, 0.7) * whole):
            early += 1
        else:
            kills += 1
    folder = tmp_path / f"killed{early}"
    while not attempt(folder, None):
        pass
    expected = torch.load(tmp_path / "whole" / "checkpoints" / "last.ckpt", weights_only=True)
    for number in range(early + 1):
        found = torch.load(tmp_path / f"killed{number}" / "checkpoints" / "last.ckpt", weights_only=True)
        assert found["epoch"] == expected["epoch"]
        for name, value in expected["state_dict"].items():
            assert torch.equal(found["state_dict"][name], value), (number, name)


LIMITED = """
import resource, signal, sys, runpy
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = [{script!r}, *{arguments!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "prune.py"])
def test_a_disk_that_takes_no_more_is_a_clear_error(script: str, tmp_path: Path) -> None:
    """No file may grow beyond 20 kB, which is what a full disk looks like from inside."""
    weights = tmp_path / "w.pt"
    torch.save(build_model({"name": "resnet8"}).state_dict(), weights)
    arguments = [
        *SMALL,
        f"hydra.run.dir={tmp_path / 'run'}",
        "finetune.epochs=0",
        "tagging.layers='layer1*'",
        "importance=l2",
    ]
    arguments += [f"ckpt={weights}"] if script == "prune.py" else ["tagging.every_n_epochs=0"]
    code = LIMITED.format(limit=20_000, script=str(ROOT / script), arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert "error: File too large" in done.stderr
    assert "check the free space and the permissions of the output folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("pruned.ckpt"))


def test_a_folder_that_cannot_be_written_to_is_told_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = call(
        ROOT / "train.py",
        *SMALL,
        f"output_dir={tmp_path / 'file' / 'run'}",
        f"hydra.run.dir={tmp_path / 'hydra'}",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "cannot be written to" in done.stderr
    assert "Traceback" not in done.stderr


def of_a_training(path: Path, net: nn.Module) -> None:
    AtomicCheckpoints().save_checkpoint({"state_dict": net.state_dict()}, path)


def of_a_cut(path: Path, net: nn.Module) -> None:
    save_pruned(path, net, {})


@pytest.mark.parametrize("write", [of_a_cut, of_a_training])
def test_no_half_written_network_is_left(write: Callable[[Path, nn.Module], None], tmp_path: Path) -> None:
    net = build_model({"name": "resnet8"})
    write(tmp_path / "pruned.ckpt", net)
    before = (tmp_path / "pruned.ckpt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "pruned.ckpt", net)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / "pruned.ckpt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["pruned.ckpt"]
