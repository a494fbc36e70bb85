"""The command line from outside: messages, exit status, interrupts, sweeps."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.types import RunMode

from freqprune.errors import InputError
from freqprune.jobs import cli, refusals
from freqprune.jobs.config import names_trained
from freqprune.jobs.failed import let_go
from freqprune.jobs.settings import read
from freqprune.networks.registry import build_model
from tests.conftest import ROOT
from tests.forked import call
from tests.jobs.small import SMALL, config

EXPLAIN = "freqprune/jobs/as_explain.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["epochs=3"], "epochs is not a setting; did you mean finetune.epochs"),
        (["+epochs=3"], "epochs is not a setting; did you mean finetune.epochs"),
        (["trainer.epochs=3"], "did you mean trainer.max_epochs or finetune.epochs"),
        (["optimizer.lrr=3"], "optimizer.lrr is not a setting; did you mean optimizer.lr?"),
        (["trainer.max_epoch=3"], "did you mean trainer.max_epochs?"),
        (["model=resnet32", "model.depht=5"], "model.depht is not a setting"),
        (
            ["model=auto", "model.name=mynet", "model.flavour=8"],
            "a setting; did you mean model.name?; with a plus (+model.flavour=",
        ),
        (["data=cifar"], "Could not find 'data/cifar'"),
        (["optimizer.lr=fast"], "optimizer.lr must be a number, got 'fast'"),
        (["seed"], "seed"),
        (["tagging.tag_freqs=[6,7.3]"], "tag_freqs[1] = 7.3 Hz is not on a bin (1 / duration = 0.5 Hz); use 7.5 or 8"),
        (["data=image_folder"], "data.root is not set; give data.root=VALUE"),
        (
            ["-m", "hydra/launcher=ray"],
            "hydra/launcher=ray needs a package that is not there: pip install 'freqprune[ray]'",
        ),
        (["-m", "hydra/launcher=submitit"], "submitit_local"),
    ],
)
def test_errors_are_messages(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = call(ROOT / "train.py", *arguments, f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "\nerror: " in "\n" + done.stderr
    assert "Error executing job" not in done.stderr


def test_a_launcher_is_asked_for_where_there_is_no_plugin_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_namespace(_: str) -> None:
        raise ModuleNotFoundError("No module named 'hydra_plugins'")

    monkeypatch.setattr(refusals, "find_spec", no_namespace)
    said = refusals.reasons_of(ValueError("Could not find 'hydra/launcher/joblib'"), "prune")
    assert said.endswith("pip install 'freqprune[joblib]'")


# What argparse does from Python 3.14 on.
LOOKS_AT_HELP = """
import argparse, sys
def check(self, action):
    if action.help:
        self._get_formatter()._expand_help(action) if "%" in action.help else None
def add(self, *args, _add=argparse._ActionsContainer.add_argument, **kwargs):
    action = _add(self, *args, **kwargs)
    getattr(self, "_check_help", lambda _: None)(action)
    return action
argparse.ArgumentParser._check_help, argparse._ActionsContainer.add_argument = check, add
from freqprune.jobs.cli import main
sys.argv = ["freqprune", "train", "--cfg", "job"]
main()
"""


def test_python_that_looks_at_all_helps_at_once(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOOKS_AT_HELP], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "optimizer:" in done.stdout


# Script, arguments, and what is said of them at once.
AT_ONCE = [
    ("prune.py", ["ckpt=none.pt"], "error: ckpt = none.pt does not exist; in that folder: there.pt\n"),
    ("prune.py", ["ckpt=there.pt", "pretrained=true"], "pretrained=true names a network of the package"),
    ("prune.py", ["pretrained=resnet32_cifar"], "resnet32_cifar does not come with the package; did you"),
    ("prune.py", ["pretrained=true", "tag_loss=silence"], "tag_loss.silence is a part of the training loss"),
    ("prune.py", ["pretrained=true", "resume=nowhere"], "resume = nowhere is not a folder"),
    ("prune.py", ["pretrained=true", "data=image_folder"], "data.root is not set"),
    ("prune.py", ["pretrained=true", "imports=[nothing_there]"], "there is no module 'nothing_there'"),
    ("prune.py", ["pretrained=true", "imports=[nothing.there]"], "there is no module 'nothing.there'"),
    (
        "prune.py",
        ["pretrained=true", "data=image_folder", "data.root=nowhere"],
        "data.root = nowhere is not a folder",
    ),
    ("train.py", ["ckpt_path=none.ckpt"], "ckpt_path = none.ckpt does not exist"),
    ("train.py", ["pretrained=true"], "leave it out to train"),
    ("prune.py", ["pretrained=off", "ckpt=5"], "ckpt = 5 does not exist"),
    ("prune.py", ["pretrained=maybe"], "pretrained = maybe does not come with the package; it is true, false or"),
    ("prune.py", ["output_dir=null"], "output_dir must be a word, got None"),
    (EXPLAIN, ["images=there.pt"], "ckpt is not set: give the network to explain"),
    (EXPLAIN, ["images=there.pt", "ckpt=none.pt"], "ckpt = none.pt does not exist; in that folder: there.pt"),
    (EXPLAIN, ["images=nowhere", "pretrained=true"], "images = nowhere does not exist"),
    (EXPLAIN, ["images=there.pt", "pretrained=true", "forward=3"], "did you mean forwards?"),
    ("train.py", ["--help"], "tagging: "),
]
# A process that has imported what the command line does, without torch, and forks one for each case.
FORKS = """
import freqprune.jobs.cli, json, os, runpy, sys
for number, (script, arguments) in enumerate(json.loads(sys.argv[1])):
    if os.fork() == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv, status = [script, *arguments], 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        print(json.dumps([status, "torch" in sys.modules]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, bool, str, str]]:
    """Of each of `AT_ONCE` the exit status, whether torch was imported, and what went to stdout and stderr."""
    folder = tmp_path_factory.mktemp("at_once")
    (folder / "there.pt").touch()
    asked = json.dumps([[str(ROOT / script), arguments] for script, arguments, _ in AT_ONCE])
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", FORKS, asked], cwd=folder, check=True, env=here)
    found = []
    for number in range(len(AT_ONCE)):
        out, err = ((folder / f"{number}.{name}").read_text() for name in ("out", "err"))
        *said, last = out.splitlines()
        found.append((*json.loads(last), "\n".join(said), err))
    return found


@pytest.mark.parametrize("number", range(len(AT_ONCE)), ids=[" ".join(words) for _, words, _ in AT_ONCE])
def test_what_is_not_there_is_said_before_torch_is_imported(
    number: int, at_once: list[tuple[int, bool, str, str]]
) -> None:
    status, torch_imported, out, err = at_once[number]
    _, words, message = AT_ONCE[number]
    assert not torch_imported
    if words == ["--help"]:
        assert status == 0
        assert message in out
    else:
        assert status == 2
        assert out == ""
        assert message in err
        assert err.startswith("error: ")


@pytest.mark.slow
def test_sweep_gathers_its_jobs_and_goes_on_when_killed(tmp_path: Path) -> None:
    torch.save(build_model({"name": "resnet8"}).state_dict(), tmp_path / "w.pt")
    sweep = [
        f"ckpt={tmp_path / 'w.pt'}",
        "pruning.macs_cut=0.2,0.99",
        "seed=0,1",
        "finetune.epochs=0",
        "importance=l2",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]
    done = call(ROOT / "prune.py", "-m", *SMALL, *sweep, cwd=tmp_path)
    assert done.returncode == 2
    assert "pruning.macs_cut = 0.99 cannot be reached" in done.stderr
    found = [json.loads((tmp_path / "sweep" / str(job) / "metrics.json").read_text()) for job in range(2)]
    cuts = [1 - m["pruned"]["macs"] / m["dense"]["macs"] for m in found]
    assert cuts == pytest.approx([0.2, 0.2], abs=0.02)
    assert all((tmp_path / "sweep" / str(job) / "pruned.ckpt").exists() for job in range(2))
    text = (tmp_path / "sweep" / "sweep.md").read_text()
    assert "2 of 4 jobs are missing" in text
    assert "| 2 | failed | pruning.macs_cut=0.99, seed=0 | pruning.macs_cut = 0.99 cannot be reached" in text

    # As if killed in job 1.
    interrupted = tmp_path / "sweep" / "1" / "metrics.json"
    before = (tmp_path / "sweep" / "0" / "metrics.json").stat().st_mtime_ns
    content = json.loads(interrupted.read_text())
    interrupted.write_text(json.dumps({key: value for key, value in content.items() if key != "finished"}))
    again = call(ROOT / "prune.py", "-m", *SMALL, *sweep, cwd=tmp_path)
    assert again.returncode == 2
    assert json.loads(interrupted.read_text())["pruned"]["test_accuracy"] == content["pruned"]["test_accuracy"]
    assert json.loads(interrupted.read_text())["finished"]
    assert (tmp_path / "sweep" / "0" / "metrics.json").stat().st_mtime_ns == before
    assert "2 of 4 jobs are missing" in (tmp_path / "sweep" / "sweep.md").read_text()

    # Another sweep, which would run where this one has finished jobs.
    table, set_before = (
        (tmp_path / "sweep" / "sweep.md").read_text(),
        (tmp_path / "sweep" / "0" / ".hydra" / "overrides.yaml").read_text(),
    )
    other = call(ROOT / "prune.py", "-m", *SMALL, *sweep, "pruning.macs_cut=0.3", "seed=0", cwd=tmp_path)
    assert other.returncode == 2
    assert "0 holds a finished job of another sweep" in other.stderr
    assert (tmp_path / "sweep" / "sweep.md").read_text() == table
    assert (tmp_path / "sweep" / "0" / ".hydra" / "overrides.yaml").read_text() == set_before

    # Job 0 with other defaults.
    (tmp_path / "sweep" / "0" / "run.json").write_text('{"settings": {}}')
    other = call(ROOT / "prune.py", "-m", *SMALL, *sweep, "pruning.macs_cut=0.2", "seed=0", cwd=tmp_path)
    assert "holds a finished job with other settings" in other.stderr


@pytest.mark.slow
def test_quiet_tells_the_folders_and_nothing_else(tmp_path: Path) -> None:
    torch.save(build_model({"name": "resnet8"}).state_dict(), tmp_path / "w.pt")
    out = tmp_path / "out"
    arguments = ["--quiet", "-m", *SMALL, f"ckpt={tmp_path / 'w.pt'}", "pruning=none", f"hydra.sweep.dir={out}"]
    done = call(ROOT / "prune.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "HYDRA]" not in line]  # Hydra numbers the jobs of a sweep
    assert said == [f"{out}/0", str(out)]
    refused = call(ROOT / "prune.py", "--quiet", "ckpt=none.pt", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ckpt = none.pt does not exist")


@pytest.mark.slow
def test_submitit_runs_jobs_on_this_machine(tmp_path: Path) -> None:
    torch.save(build_model({"name": "resnet8"}).state_dict(), tmp_path / "w.pt")
    sweep = [
        f"ckpt={tmp_path / 'w.pt'}",
        "pruning=none",
        "seed=3",
        "hydra/launcher=submitit_local",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]
    done = call(ROOT / "prune.py", "-m", *SMALL, *sweep, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| seeds | dense, % |\n|---|---|\n| 1 |" in (tmp_path / "sweep" / "sweep.md").read_text()
    assert (tmp_path / "sweep" / "0" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_a_checkpoint_that_resumes(how: signal.Signals, tmp_path: Path) -> None:
    arguments = [*SMALL, "tagging.every_n_epochs=0", "trainer.max_epochs=400", f"hydra.run.dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell that runs in the background hands SIGINT down ignored, and Python would then ignore it too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    os.kill(process.pid, how)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (1 if how == signal.SIGINT else 128 + signal.SIGTERM), said
    assert last.exists(), said
    assert f"ckpt_path={last}" in said
    if how == signal.SIGINT:
        return  # resuming is the same for both
    done_epochs = torch.load(last, weights_only=True)["epoch"] + 1
    again = call(
        ROOT / "train.py",
        *arguments,
        f"ckpt_path={last}",
        f"trainer.max_epochs={done_epochs + 1}",
        f"hydra.run.dir={tmp_path / 'again'}",
        cwd=tmp_path,
    )
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again" / "training.json").read_text())["epochs"] == done_epochs + 1


@pytest.mark.parametrize("word", ["off", "no", "No"])
def test_words_for_no_are_no_everywhere(word: str, tmp_path: Path) -> None:
    assert read(config("train", tmp_path, f"data.flip={word}")).data["flip"] is False
    cfg = config("prune", tmp_path, "model=auto", "model.name=timm/resnet18", f"+model.pretrained={word}")
    assert names_trained(cfg) is None
    yes = config("prune", tmp_path, "model=auto", "model.name=timm/resnet18", "+model.pretrained=on")
    assert names_trained(yes) == "model.pretrained"


def test_weight_decay_of_another_optimizer_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def told(*overrides: str) -> bool:
        caplog.clear()
        read(config("train", tmp_path, "pruning=filters", "optimizer.weight_decay=0.05", *overrides))
        return "finetune.weight_decay = 0.05 is that of the training by AdamW, and SGD means" in caplog.text

    assert told("optimizer.name=AdamW", "optimizer.lr=1e-3")
    assert not told()
    assert not told("optimizer.name=torch.optim.SGD")
    assert not told("optimizer.name=AdamW", "finetune.name=AdamW")
    assert not told("optimizer.name=AdamW", "finetune.weight_decay=0.05")
    assert not told("optimizer.name=AdamW", "pruning=none")


def test_names_may_be_words_for_no(tmp_path: Path) -> None:
    settings = read(config("train", tmp_path, "data=huggingface", "data.path=x", "data.name=no", "logger.name=on"))
    assert settings.data["name"] == "no"
    assert settings.logger["name"] == "on"
    settings = read(config("train", tmp_path, "logger=wandb", "logger.offline=off", "logger.project=no"))
    assert (settings.logger["offline"], settings.logger["project"]) == (False, "no")


def test_an_amount_that_nothing_cuts_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(config("train", tmp_path, "pruning.macs_cut=0.5"))
    assert "pruning.macs_cut = 0.5 has no effect, as pruning=none cuts nothing" in caplog.text


def test_a_failed_job_lets_go_of_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    stand_in = SimpleNamespace(run=object(), finish=lambda exit_code: ended.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)  # type: ignore[arg-type]

    class Held:
        """As large as a network."""

    alive: list[Any] = []

    def cause() -> None:
        held = Held()
        alive.append(weakref.ref(held))
        raise ValueError("no memory")

    def job() -> None:
        held = Held()
        alive.append(weakref.ref(held))
        try:
            cause()
        except ValueError as error:
            raise RuntimeError("failed") from error

    with pytest.raises(RuntimeError) as kept:
        job()
    kept.value.__cause__.__cause__ = kept.value  # type: ignore[union-attr]
    assert all(one() is not None for one in alive)
    let_go(kept.value)
    assert all(one() is None for one in alive)
    assert ended == [1]

    def down(exit_code: int) -> None:
        raise ConnectionError

    stand_in.finish = down
    let_go(kept.value)


def test_a_failed_job_holds_nothing_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trained, and failed as it was to be pruned."""

    class Net:
        """As large as a network."""

    def train(_: Any) -> Any:
        net = Net()
        alive.append(weakref.ref(net))
        return {}, {"classifier": SimpleNamespace(net=net), "data": None}

    def prune(_: Any, **__: Any) -> None:
        raise MemoryError

    alive: list[Any] = []
    monkeypatch.setattr("freqprune.jobs.train.train", train)
    monkeypatch.setattr("freqprune.jobs.prune.prune", prune)
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: SimpleNamespace(mode=RunMode.MULTIRUN))
    with pytest.raises(MemoryError) as kept:
        cli._job(config("prune", tmp_path), lambda _: True)
    assert kept.value is not None
    assert alive[0]() is None


def test_a_job_that_is_refused_for_no_section_says_so_in_its_folder(tmp_path: Path) -> None:
    """In a table of a sweep it would be one that was killed, or still runs."""
    with pytest.raises(InputError):
        cli._do(config("prune", tmp_path, "seed=-1"), lambda _: False)
    assert "seed must be at least 0, got -1" in (tmp_path / "failed.txt").read_text()


def test_a_table_that_cannot_be_written_is_said_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "sweep.md")

    monkeypatch.setattr("freqprune.reports.gather", full)
    monkeypatch.setattr(sys, "argv", ["freqprune", "sweep", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err.startswith("error: No space left on device: sweep.md; check the free space")
