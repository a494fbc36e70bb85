"""The command line: ``freqprune train | prune | explain | sweep``, `train.py`, `prune.py`; errors one can act on."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from freqprune.errors import InputError
from freqprune.jobs.config import Common, check_pruning, check_training, conf_dir, names_trained, of_the_top
from freqprune.jobs.explain_settings import check_explaining
from freqprune.jobs.failed import let_go
from freqprune.jobs.launched import run_id
from freqprune.jobs.refusals import fail, message_of, reasons_of
from freqprune.jobs.values import typed

log = logging.getLogger(__name__)

USAGE = """\
usage: freqprune {train,prune,explain,sweep} ...

  freqprune train [key=value ...]   train a classifier, tagged at the end of every epoch
  freqprune prune [key=value ...]   tag a trained network, remove filters, make up for them, fine-tune
  freqprune explain images=FILES    which parts of images the answers of a trained network depend on
  freqprune sweep FOLDER ...        gather the jobs of sweeps (-m) into one table, figure and report

freqprune prune --help lists the settings, --cfg job all values; -m runs a sweep; --config-dir FOLDER adds your own
configs; --quiet prints the folder of the job and nothing else. Start with: freqprune train experiment=quickstart"""


def main() -> None:
    """The console command ``freqprune``."""
    heed_quiet()
    words = sys.argv[1:]
    if words[:1] in (["train"], ["prune"], ["explain"]):
        job = words.pop(0)
        os.environ.setdefault("FREQPRUNE_COMMAND", f"freqprune {job}")
        # Hydra reads sys.argv, and Lightning starts the further processes of a distributed run by it.
        sys.argv = [str(Path(__file__).with_name(f"as_{job}.py")), *words]
        {"train": train, "prune": prune, "explain": explain}[job]()
    elif words[:1] == ["sweep"]:
        from freqprune.reports import sweep_arguments

        given = sweep_arguments(words[1:], "freqprune sweep")
        # Figures and tables take seconds to import.
        from freqprune.reports import gather

        try:
            gather(given.folders, given.out)
        except (InputError, OSError) as error:
            message = message_of(error)
            if message is None:
                raise
            fail(message)
    elif words in (["--help"], ["-h"]):
        print(USAGE)
    else:
        came = f"there is no command {words[0]!r}" if words else "which command?"
        print(f"error: {came}\n{USAGE}", file=sys.stderr)
        sys.exit(2)


def train() -> None:
    """`train.py` and ``freqprune train``."""
    _run(_train, "train")


def prune() -> None:
    """`prune.py` and ``freqprune prune``."""
    _run(_prune, "prune")


def explain() -> None:
    """``freqprune explain``."""
    os.environ.setdefault("FREQPRUNE_COMMAND", "freqprune explain")
    _run(_explain, "explain")


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")
def _train(cfg: DictConfig) -> None:
    _job(cfg, lambda _: True)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="prune")
def _prune(cfg: DictConfig) -> None:
    _job(cfg, lambda common: common.ckpt is None and not common.pretrained and names_trained(cfg) is None)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="explain")
def _explain(cfg: DictConfig) -> None:
    from freqprune.jobs.restarted import alone
    from freqprune.reports import record

    _warn_on_stderr()

    out, kept = Path(str(cfg.output_dir)), (record.is_explained, record.is_finished)
    with _refusing(), alone(out), record.failures_kept(out, lambda folder: any(one(folder) for one in kept)):
        check_explaining(cfg)
        if record.done_before(cfg, record.is_explained):
            return
        from freqprune.jobs.explain import explain

        explain(cfg)


def _job(cfg: DictConfig, trains: Callable[[Common], bool]) -> None:
    """Train, prune or both, as the configuration says."""
    _warn_on_stderr()
    with _refusing():
        _do(cfg, trains)


def _do(cfg: DictConfig, trains: Callable[[Common], bool]) -> None:
    """The job itself, in a call of its own: what that holds can go when it has failed."""
    # Light on purpose: what can be refused at once is refused before torch and Lightning are imported, which takes
    # seconds.
    from freqprune.jobs.restarted import alone, go_on, is_requeued
    from freqprune.reports import record

    out = Path(str(cfg.output_dir))
    with alone(out), record.failures_kept(out):
        common = of_the_top(Common, cfg)
        training, pruning = trains(common), cfg.get("pruning") or {}
        prunes = typed(bool, pruning.get("enabled", False), "pruning.enabled")
        check_training(cfg) if training else check_pruning(cfg)
        if record.done_before(cfg, again=is_requeued()):
            return
        training = go_on(cfg, training)
        from freqprune.jobs.prune import prune
        from freqprune.jobs.train import train

        if not training:
            prune(cfg)
            return
        _, objects = train(cfg)
        if prunes:
            prune(cfg, dense=objects["classifier"].net, data=objects["data"])


@contextmanager
def _refusing() -> Iterator[None]:
    """Bad input inside a job ends it with its message."""
    try:
        yield
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            let_go(error)
            raise
        # Past Hydra, which would print a line of its own above; in a sweep that line says which job it was.
        if not isinstance(error, InputError | OSError | HydraException) or message_of(error) is None:
            raise
        fail(message_of(error) or "")


@contextmanager
def _help_made_later() -> Iterator[None]:
    """Python 3.14 looks at the help of every option as it is added; Hydra 1.3 has one that is no text before it is
    shown (facebookresearch/hydra#3121)."""
    check = getattr(argparse.ArgumentParser, "_check_help", None)
    if check is None:
        yield
        return

    def of_texts(self: argparse.ArgumentParser, action: argparse.Action) -> None:
        if isinstance(action.help, str):
            check(self, action)

    setattr(argparse.ArgumentParser, "_check_help", of_texts)  # noqa: B010 - mypy knows no such attribute
    try:
        yield
    finally:
        setattr(argparse.ArgumentParser, "_check_help", check)  # noqa: B010


def _run(task: Callable[[], Any], name: str) -> None:
    """Call a Hydra main function; bad input ends with one clear message and exit status 2 instead of a traceback."""
    heed_quiet()
    # One name for the run folder, also for the further processes of a distributed run.
    os.environ.setdefault("FREQPRUNE_RUN_ID", run_id())
    os.environ.setdefault("FREQPRUNE_COMMAND", f"python {name}.py")
    # Hydra would print its own shortened traceback; with this set, exceptions come through to here.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    keep_freed_memory()
    try:
        try:
            with _help_made_later():
                task()
        finally:
            gather_sweep()
    except (HydraException, OmegaConfBaseException) as error:
        fail(reasons_of(error, name))
    except (InputError, OSError) as error:
        message = message_of(error)
        if message is None:
            raise
        fail(message)
    except KeyboardInterrupt:
        # How to go on has been said by then.
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def heed_quiet() -> None:
    """Take ``--quiet`` out of the command line, where Hydra would not know it; in the environment it also reaches the
    further processes of a distributed run and the jobs of a sweep."""
    if "--quiet" in sys.argv[1:]:
        sys.argv = [word for word in sys.argv if word != "--quiet"]
        os.environ["FREQPRUNE_QUIET"] = "1"


def _warn_on_stderr() -> None:
    """With ``--quiet`` nothing but the folders is for standard output, where Hydra's log goes."""
    if os.environ.get("FREQPRUNE_QUIET"):
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.setStream(sys.stderr)


class Gather(Callback):
    """Hydra callback: keeps the folder of a sweep for `gather_sweep`, and refuses one with the results of another."""

    folder: str | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        from freqprune.reports import asked, check_goes_on

        folder = str(config.hydra.sweep.dir)
        settings = cast(dict[str, Any], OmegaConf.to_container(config.hydra, resolve=False))
        if settings["sweep"]["subdir"] == "${hydra.job.num}":
            try:
                check_goes_on(Path(folder), asked(settings))
            except InputError as error:
                # Hydra only warns of exceptions in callbacks.
                fail(str(error))
        Gather.folder = folder


def gather_sweep() -> None:
    """Gather the sweep of this process, if there is one, as far as it came; never in the way of the error that ended
    it."""
    folder, Gather.folder = Gather.folder, None
    if folder is None or not Path(folder).is_dir():
        return
    from freqprune.reports import gather

    try:
        gather([folder])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        log.warning("%s could not be gathered (%s); try again with freqprune sweep %s", folder, reason, folder)


def keep_freed_memory() -> None:
    """Keep large blocks that glibc would hand back to the system and fault in anew: about 10 % of a training step on a
    CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
