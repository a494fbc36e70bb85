"""The package as pip installs it, without a clone: the console command, its configs, those of a user beside them."""

import json
import os
import site
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.conftest import ROOT
from tests.jobs.small import SMALL

LESS = [item for item in SMALL if not item.startswith(("data", "model", "trainer", "finetune"))]


def run(command: list[str], cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=dict(env), capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    done = run([*command, str(ROOT)], out, os.environ)
    assert done.returncode == 0, done.stderr
    return next(out.glob("freqprune-*.whl"))


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command in an environment of its own, which finds the dependencies, nothing else, in that of the tests."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    # A plain path: the .pth file in there that puts this checkout on the path is not read.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "bin" / "python"),
        "install",
        "--quiet",
        "--no-deps",
    ]
    done = run([*install, "--no-index", "--force-reinstall", str(wheel)], folder, os.environ)
    assert done.returncode == 0, done.stderr
    where = run([str(folder / "bin" / "python"), "-c", "import freqprune; print(freqprune.__file__)"], folder, {})
    assert where.stdout.strip() == str(packages / "freqprune" / "__init__.py"), where.stderr
    return folder / "bin" / "freqprune"


def test_the_wheel_holds_all_configs_weights_and_templates(wheel: Path) -> None:
    with ZipFile(wheel) as file:
        names = set(file.namelist())
    configs = {f"freqprune/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "freqprune").rglob("*") if path.is_file()}
    assert configs <= names
    assert {name for name in package if "__pycache__" not in name} <= names
    assert not {name for name in names if name.split("/")[0] in ("tests", "conf", "docs")}


@pytest.mark.slow
def test_train_and_prune_in_an_empty_folder(command: Path, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    train = [
        "train",
        "experiment=quickstart",
        "trainer.max_epochs=2",
        "pruning=none",
        "data.limit_train=192",
        "trainer=cpu",
    ]
    done = run([str(command), *train, *LESS, "hydra.run.dir=dense"], tmp_path, env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "dense" / "run.json").read_text())["command"].startswith(
        "freqprune train experiment="
    )
    prune = ["prune", "data=digits", "ckpt=dense/checkpoints/last.ckpt", "data.limit_train=192", "trainer=cpu"]
    done = run([str(command), *prune, *LESS, "finetune.epochs=1", "hydra.run.dir=pruned"], tmp_path, env)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "pruned" / "metrics.json").read_text())
    assert metrics["finished"]
    assert metrics["pruned"]["macs"] <= 0.5 * metrics["dense"]["macs"]
    assert (tmp_path / "pruned" / "report.html").is_file()
    sweep = ["prune", "-m", *prune[1:], *LESS, "finetune.epochs=0", "importance=l2,random", "pruning.compensation=none"]
    done = run([str(command), *sweep, "hydra.sweep.dir=sweep"], tmp_path, env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "freqprune prune -m data=digits" in (tmp_path / "sweep" / "report.html").read_text()
    (tmp_path / "sweep" / "sweep.md").unlink()
    done = run([str(command), "sweep", "sweep"], tmp_path, env)
    assert done.returncode == 0, done.stderr
    assert "| l2 | 1 |" in (tmp_path / "sweep" / "sweep.md").read_text()


@pytest.mark.slow
def test_the_command_starts_its_further_processes(command: Path, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    one = [item for item in SMALL if not item.startswith("trainer=")]
    more = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "tagging.every_n_epochs=0"]
    done = run([str(command), "train", *one, *more, "hydra.run.dir=two"], tmp_path, env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "training.json").read_text())["epochs"] == 1


def test_configs_of_a_user_extend_ours(command: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - quickstart\n  - override /model: resnet14\nfinetune: {epochs: 77}\n"
    )
    shown = run(
        [str(command), "prune", "--config-dir", "mine", "experiment=mine", "--cfg", "job"], tmp_path, os.environ
    )
    assert shown.returncode == 0, shown.stderr
    assert "name: resnet14" in shown.stdout
    assert "epochs: 77" in shown.stdout


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "usage: freqprune {train,prune,explain,sweep}"),
        ([], 2, "error: which command?"),
        (["purne"], 2, "error: there is no command 'purne'"),
        (
            ["train", "--help"],
            0,
            "experiment: cifar100_resnet56, cifar10_resnet32, cifar10_resnet32_cpu, imagenet_resnet50, quickstart",
        ),
        (["explain", "--help"], 0, "baseline: mean"),
        (["sweep"], 2, "the following arguments are required: FOLDER"),
    ],
)
def test_the_command_says_what_it_takes(
    command: Path, words: list[str], status: int, said: str, tmp_path: Path
) -> None:
    done = run([str(command), *words], tmp_path, os.environ)
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
