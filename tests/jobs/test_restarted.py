"""Jobs that are started again in their folders, and what SLURM, torchrun and full disks do to them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from lightning_fabric.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig

from freqprune.errors import InputError
from freqprune.jobs import cli, stages, trainers
from freqprune.jobs import train as training
from freqprune.jobs.restarted import LOCK, alone, go_on
from freqprune.jobs.settings import read
from freqprune.reports import record
from freqprune.training import Classifier
from tests.jobs.small import config


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")


def two_epochs(out: Path, *more: str) -> DictConfig:
    return config("train", out, "trainer.max_epochs=2", "tagging.every_n_epochs=0", *more)


def killed_in_its_second_epoch(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Classifier.training_step

    def dies(self: Classifier, *args: Any) -> Any:
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", dies)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            cli._do(two_epochs(out), lambda _: True)
    assert (out / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.usefixtures("requeued")
def test_a_training_that_was_killed_and_is_started_again_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    killed_in_its_second_epoch(out, monkeypatch)
    shutil.copytree(out, tmp_path / "by_hand")
    cli._do(two_epochs(out), lambda _: True)
    told = json.loads((out / "training.json").read_text())
    assert (told["epochs"], told["epochs_here"]) == (2, 1)
    assert not (out / LOCK).exists()
    # With other settings it is another job, and without anybody who starts jobs again it is begun anew.
    for folder, more, count in ((out, ("optimizer.lr=0.05",), "1"), (tmp_path / "by_hand", (), "0")):
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        cfg = two_epochs(folder, *more)
        go_on(cfg, trains=True)
        assert cfg.ckpt_path is None


@pytest.mark.parametrize("in_sweep", [True, False])
def test_a_job_of_a_sweep_that_was_killed_goes_on_and_one_by_hand_begins_anew(
    in_sweep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr(record, "in_sweep", lambda: in_sweep)
    cfg, last = two_epochs(tmp_path), tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.write_bytes(b"some epoch")
    record.write_json(tmp_path / record.RUN, {"settings": record.settings_of(cfg)})
    assert go_on(cfg, trains=True)
    assert cfg.ckpt_path == (str(last) if in_sweep else None)


def test_torchrun_in_an_allocation_of_slurm_numbers_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    assert [one.auto_requeue for one in trainers._under_slurm()] == [False]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    assert trainers._under_slurm() == []


@pytest.mark.usefixtures("requeued")
def test_a_cut_that_was_killed_and_is_started_again_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli._do(config("train", tmp_path / "dense", "tagging.every_n_epochs=0"), lambda _: True)
    dense = f"ckpt={tmp_path / 'dense' / 'checkpoints' / 'last.ckpt'}"

    def cfg() -> DictConfig:
        return config("prune", tmp_path / "run", dense, "importance=l2", "pruning.compensation=none")

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "write_page", full)
        with pytest.raises(OSError, match="No space"):
            cli._do(cfg(), lambda _: False)
    # Without its report it is not finished, and says why.
    assert not record.is_finished(tmp_path / "run")
    assert "No space left" in (tmp_path / "run" / "failed.txt").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(stages, "begin_anew", lambda _: pytest.fail("begun anew"))
        cli._do(cfg(), lambda _: False)
    assert record.is_finished(tmp_path / "run")
    assert not (tmp_path / "run" / "failed.txt").exists()


def broken_off(out: Path, monkeypatch: pytest.MonkeyPatch, *words: str, name: str = "train") -> None:
    """A job that is killed in its fine-tuning, whose folder is begun anew at most once."""

    def dies(self: Classifier, *args: Any) -> Any:
        if self.teacher is not None or (out / "pruned.ckpt").is_file():
            raise KeyboardInterrupt
        return step(self, *args)

    step = Classifier.training_step
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", dies)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            cli._do(config(name, out, *words), lambda common: name == "train")
    assert record.holds_cut(out)


@pytest.mark.usefixtures("requeued")
def test_a_job_that_trains_and_cuts_and_is_killed_twice_goes_on_with_its_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("pruning=filters", "importance=l2", "pruning.compensation=none", "tagging.every_n_epochs=0")
    broken_off(tmp_path, monkeypatch, *words)
    dense = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    monkeypatch.setattr(stages, "begin_anew", lambda _: pytest.fail("begun anew"))
    broken_off(tmp_path, monkeypatch, *words)
    cli._do(config("train", tmp_path, *words), lambda _: True)
    assert record.is_finished(tmp_path)
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == dense
    # What is finished is not done again.
    monkeypatch.setattr(Classifier, "training_step", lambda *_: pytest.fail("trained again"))
    cli._do(config("train", tmp_path, *words), lambda _: True)


@pytest.mark.usefixtures("requeued")
def test_a_cut_of_what_was_trained_in_its_folder_goes_on_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli._do(config("train", tmp_path, "tagging.every_n_epochs=0"), lambda _: True)
    words = (f"ckpt={tmp_path / 'checkpoints' / 'last.ckpt'}", "importance=l2", "pruning.compensation=none")
    broken_off(tmp_path, monkeypatch, *words, name="prune")
    monkeypatch.setattr(stages, "begin_anew", lambda _: pytest.fail("begun anew"))
    for _ in range(2):
        broken_off(tmp_path, monkeypatch, *words, name="prune")
    cli._do(config("prune", tmp_path, *words), lambda _: False)
    assert record.is_finished(tmp_path)


@pytest.mark.usefixtures("requeued")
def test_a_training_that_began_from_another_goes_on_from_its_own_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, out = tmp_path / "first", tmp_path / "longer"
    cli._do(config("train", first, "tagging.every_n_epochs=0"), lambda _: True)
    words = (f"ckpt_path={first / 'checkpoints' / 'last.ckpt'}", "trainer.max_epochs=4", "tagging.every_n_epochs=0")
    step = Classifier.training_step
    for epoch in (2, 3):

        def dies(self: Classifier, *args: Any, epoch: int = epoch) -> Any:
            if self.current_epoch == epoch:
                raise KeyboardInterrupt
            return step(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Classifier, "training_step", dies)
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                cli._do(config("train", out, *words), lambda _: True)
    cli._do(config("train", out, *words), lambda _: True)
    told = json.loads((out / "training.json").read_text())
    assert (told["epochs"], told["epochs_here"]) == (4, 1)
    # The record says what it began from, so that the same command knows it for done.
    assert json.loads((out / "run.json").read_text())["settings"]["ckpt_path"] == words[0].partition("=")[2]
    assert record.done_before(config("train", out, *words), again=True)


@pytest.mark.usefixtures("requeued")
def test_what_an_earlier_run_of_the_same_settings_has_left_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("pruning=filters", "importance=l2", "pruning.compensation=none", "tagging.every_n_epochs=0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    cli._do(config("train", tmp_path, *words), lambda _: True)
    assert record.is_finished(tmp_path)
    monkeypatch.setattr(Classifier, "training_step", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        cli._do(config("train", tmp_path, *words), lambda _: True)
    assert not record.is_finished(tmp_path)
    assert not record.holds_cut(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        # Trains, and does not say that all is done.
        cli._do(config("train", tmp_path, *words), lambda _: True)


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_complete_run_that_goes_on_elsewhere_is_finished_with_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli._do(config("train", tmp_path / "dense", "tagging.every_n_epochs=0"), lambda _: True)
    dense = f"ckpt={tmp_path / 'dense' / 'checkpoints' / 'last.ckpt'}"
    words = (dense, "importance=l2", "pruning.compensation=none")
    cli._do(config("prune", tmp_path / "a", *words), lambda _: False)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    more = (*words, f"resume={tmp_path / 'a'}", "export.fold=true")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "write_page", full)
        with pytest.raises(OSError, match="No space"):
            cli._do(config("prune", tmp_path / "b", *more), lambda _: False)
    assert not record.is_finished(tmp_path / "b")
    assert (tmp_path / "b" / "failed.txt").is_file()


def test_a_training_whose_report_could_not_be_written_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    cfg = config("train", tmp_path, "tagging.every_n_epochs=0")
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_page", full)
        with pytest.raises(OSError, match="No space"):
            cli._do(cfg, lambda _: True)
    assert not record.is_finished(tmp_path)
    assert "No space left" in (tmp_path / "failed.txt").read_text()


def test_two_jobs_do_not_work_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileLock(tmp_path / LOCK):
        with pytest.raises(InputError, match=r"a job is running in .*: wait for it or cancel it.*remove .*\.running"):
            cli._do(two_epochs(tmp_path), lambda _: True)
        # What is there is the other's.
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
        for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "OMPI_COMM_WORLD_RANK"):
            with monkeypatch.context() as patch:
                patch.setenv(name, "1")
                # One of the processes of the job that runs there.
                with alone(tmp_path):
                    pass
    with alone(tmp_path / "new"):
        assert (tmp_path / "new" / LOCK).is_file()
    assert not (tmp_path / "new" / LOCK).exists()


def test_lightning_does_not_requeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(two_epochs(tmp_path))
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    for trainer in (trainers.make_trainer(settings, tmp_path, [], logged=False), trainers.evaluator(settings)):
        environment = trainer._accelerator_connector.cluster_environment
        assert isinstance(environment, SLURMEnvironment)
        assert not environment.auto_requeue
        assert trainer.default_root_dir == str(tmp_path)


# Older versions of filelock raise the second where newer ones raise the first.
@pytest.mark.parametrize("error", [OSError(38, "Function not implemented"), NotImplementedError("no flock")])
def test_a_folder_that_cannot_be_locked_is_told(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", unsupported)
    with alone(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked" in caplog.text
