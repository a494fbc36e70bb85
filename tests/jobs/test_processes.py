"""Jobs in several processes: one run folder, what one process finds, and an end where one dies."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freqprune.networks.checkpoint import load_pruned
from freqprune.training.classifier import Classifier
from tests.conftest import ROOT
from tests.forked import fresh
from tests.jobs.small import SMALL

TWO = [*(argument for argument in SMALL if argument != "trainer=cpu"),
       "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]  # fmt: skip


def by_torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`train.py` in two processes that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=300)


@pytest.mark.slow
def test_two_processes_of_torchrun_train_and_prune_into_one_run_folder(tmp_path: Path) -> None:
    more = ["pruning=filters", "pruning.calibration_images=96", "tagging.n_images=3", "data.limit_test=41"]
    done = by_torchrun(*TWO, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "outputs" / "train").iterdir()
    training = json.loads((run / "training.json").read_text())
    assert training["epochs"] == 1
    with (run / "metrics.csv").open() as file:
        logged = [float(row["test/accuracy"]) for row in csv.DictReader(file) if row.get("test/accuracy")]
    assert logged == [pytest.approx(training["test_accuracy"])]
    # Of two processes neither counts an image twice.
    assert training["test_accuracy"] * 41 == pytest.approx(round(training["test_accuracy"] * 41), abs=1e-4)
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert done.stdout.count("trained resnet8") == 1
    assert done.stdout.count("filters kept by") == 1
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["finished"]
    assert {"dense", "pruned", "finetuned"} <= set(metrics)
    assert sum(p.numel() for p in load_pruned(run / "pruned.ckpt").parameters()) == metrics["pruned"]["params"]


@pytest.mark.slow
def test_two_processes_prune_to_what_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = Classifier({"name": "resnet8"}, normalization={"mean": [0.3] * 3, "std": [0.3] * 3})
    for _ in range(3):
        classifier.net(torch.rand(16, 3, 32, 32))
    state = {f"net.{key}": value for key, value in classifier.net.state_dict().items()}
    torch.save({"hyper_parameters": dict(classifier.hparams), "state_dict": state}, tmp_path / "net.ckpt")
    more = ["ckpt=net.ckpt", "data.mean=[0.3,0.3,0.3]", "data.std=[0.3,0.3,0.3]", "pruning.calibration_images=96",
            "pruning.rounds=1", "finetune.epochs=0", "importance=logit_error"]  # fmt: skip
    runs = {"two": TWO, "one": [word for word in TWO if not word.startswith("trainer")] + ["trainer=cpu"]}
    for name, words in runs.items():
        done = fresh(ROOT / "prune.py", *words, *more, f"hydra.run.dir={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one["kept"] == two["kept"]
    for stage in ("dense", "pruned"):
        for name in ("test_accuracy", "macs", "params"):
            assert two[stage][name] == pytest.approx(one[stage][name], rel=1e-6), (stage, name)
    nets = [load_pruned(tmp_path / name / "pruned.ckpt").state_dict() for name in ("one", "two")]
    for name, value in nets[0].items():
        torch.testing.assert_close(nets[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_two_processes_explain_what_one_does(tmp_path: Path) -> None:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number in range(3):
        noise = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(photographs / f"{number}.png")
    run = tmp_path / "explain.py"
    run.write_text("from freqprune.jobs.cli import explain\nexplain()\n")
    (tmp_path / "told.py").write_text(
        "import os, pathlib\npathlib.Path('ran_' + os.environ.get('LOCAL_RANK', '0')).touch()\n"
    )
    for count in (1, 2):
        words = [
            f"images={photographs}",
            "pretrained=true",
            "grid=3",
            "forwards=72",
            f"processes={count}",
            "imports=[told]",
        ]
        done = fresh(run, *words, f"hydra.run.dir=of_{count}", "device=cpu", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "ran_1").exists() == (count == 2)
    one, two = (np.load(tmp_path / f"of_{count}" / "attribution.npz") for count in (1, 2))
    assert set(one) == set(two)
    for name in one:
        assert np.array_equal(one[name], two[name]), name


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the other process in /proc")
def test_a_process_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = Classifier({"name": "resnet8"}, normalization={"mean": [0.3] * 3, "std": [0.3] * 3})
    state = {f"net.{key}": value for key, value in classifier.net.state_dict().items()}
    torch.save({"hyper_parameters": dict(classifier.hparams), "state_dict": state}, tmp_path / "net.ckpt")
    long = ["data.limit_train=1200", "pruning.calibration_images=1200", "pruning.rounds=50", "data.mean=[0.3,0.3,0.3]",
            "data.std=[0.3,0.3,0.3]", "ckpt=net.ckpt", "hydra.run.dir=run"]  # fmt: skip
    command = [sys.executable, str(ROOT / "prune.py"), *TWO, *long]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as first:
        # Tagged: what comes now takes long.
        until(lambda: (tmp_path / "run" / "filters.csv").is_file() or first.poll() is not None, 200)
        second = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text())
        os.kill(second, signal.SIGKILL)
        said, _ = first.communicate(timeout=60)
    assert first.returncode != 0
    # Whichever is first: Lightning sees that the process is gone, or the next sum waits for it in vain.
    assert f"Child process with PID {second} terminated" in said or "closed by peer" in said


def until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    assert true()
