"""The Lightning trainers of a job: made, fitted, and asked how good a network is."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import nn

from freqprune.errors import InputError
from freqprune.jobs.checkpoints import AtomicCheckpoints
from freqprune.jobs.compiled import compiled
from freqprune.jobs.launch import place
from freqprune.jobs.loggers import make_logger
from freqprune.jobs.settings import Settings
from freqprune.networks import device_of
from freqprune.reports import is_quiet, show
from freqprune.training import Classifier, ImageData

log = logging.getLogger(__name__)

# Callbacks of conf/common.yaml whose checkpoints are looked for in the run folder.
_OURS = ("checkpoint", "last")


def _of_stage(dirpath: str, out: Path, folder: Path) -> str:
    """Where a stage of a run writes what the run writes to `dirpath`: each has checkpoints of its own."""
    given, run, stage = (Path(os.path.abspath(path)) for path in (dirpath, out, folder))
    if stage == run or not stage.is_relative_to(run):
        return dirpath
    if given.is_relative_to(run):
        return str(stage / given.relative_to(run))
    return os.path.join(dirpath, stage.relative_to(run))


def _under_slurm() -> list[SLURMEnvironment]:
    """Lightning on SLURM without checkpoints of its own at SIGUSR1, which every trainer of the job would load, also one
    that tests what has been trained since."""
    slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if slurm else []


def make_trainer(
    settings: Settings, folder: Path, callbacks: list[pl.Callback], max_epochs: int | None = None, logged: bool = True
) -> pl.Trainer:
    """The trainer of a job, or of a part of it.

    Args:
        settings: of the job.
        folder: where it writes.
        callbacks: further ones.
        max_epochs: instead of those of the settings.
        logged: give it the logger; False for one that is made to see that it can be.
    """
    arguments = settings.trainer if max_epochs is None else {**settings.trainer, "max_epochs": max_epochs}
    configured = {name: dict(spec) for name, spec in settings.callbacks.items() if spec}
    if settings.data.get("val_fraction") == 0:
        arguments = {**arguments, "limit_val_batches": 0}
        # What follows a validation metric would wait for it for ever.
        waiting = [name for name, spec in configured.items() if "val/" in str(spec.get("monitor"))]
        configured = {name: spec for name, spec in configured.items() if name not in waiting}
        if logged and (others := [name for name in waiting if name not in _OURS]):
            log.warning(
                "data.val_fraction=0 leaves nothing to validate on: callbacks.%s, which follows a validation metric, "
                "is left out", ", callbacks.".join(others)
            )  # fmt: skip
    if is_quiet():
        configured.pop("progress", None)
        arguments = {**arguments, "enable_progress_bar": False}
    own = str(settings.out / "checkpoints")
    for name, spec in configured.items():
        given = spec.get("dirpath") or (own if name in _OURS else None)
        if name in _OURS and os.path.abspath(str(given)) != os.path.abspath(own):
            raise InputError(
                f"callbacks.{name}.dirpath = {spec['dirpath']}: a run is gone on with from the checkpoints in its own "
                "folder; choose that with hydra.run.dir, or add a callback of another name"
            )
        if given is not None:
            spec["dirpath"] = _of_stage(str(given), settings.out, folder)
    everything = [*callbacks, *(instantiate(spec) for spec in configured.values())]
    if not any(isinstance(one, pl.callbacks.ProgressBar) for one in everything):
        # Lightning would make a bar of its own.
        arguments = {"enable_progress_bar": False, **arguments}
    trainer = instantiate(
        arguments,
        callbacks=everything,
        logger=(make_logger(settings, folder) if logged else None) or False,
        default_root_dir=str(folder),
        plugins=[AtomicCheckpoints(), *_under_slurm()],
    )
    assert isinstance(trainer, pl.Trainer)
    return trainer


def fit(
    trainer: pl.Trainer,
    classifier: Classifier,
    data: ImageData,
    ckpt_path: str | None,
    if_interrupted: str,
    compile: bool | str = False,
) -> None:
    """Fit, with networks `compiled` if asked for; after Ctrl-C or SIGTERM say `if_interrupted` and exit with the usual
    status."""
    # A network that was cut comes in eval mode, and Lightning leaves it there.
    classifier.train()
    try:
        with ended_by_sigterm(trainer), compiled(classifier, trainer, compile, if_interrupted):
            trainer.fit(classifier, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
            if ckpt_path is not None and classifier.optimization.ema:
                _average_of(classifier, ckpt_path, trainer.global_step)
    except (KeyboardInterrupt, SystemExit):
        _say(if_interrupted)
        raise


@contextmanager
def ended_by_sigterm(trainer: pl.Trainer) -> Iterator[None]:
    """Exit with the usual status if SIGTERM comes inside the block, also with its last batch: Lightning would exit with
    that of success, or go on."""
    try:
        yield
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
    if trainer.received_sigterm:
        raise SystemExit(128 + signal.SIGTERM)


def _average_of(classifier: Classifier, ckpt_path: str, steps: int) -> None:
    """Take the averaged weights of a checkpoint, if no step was left to train: Lightning does so after a step only."""
    content = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    if content["global_step"] == steps:
        classifier.load_state_dict(content["state_dict"])


def _say(reason: str) -> None:
    """Tell why a job ends early, also where the terminal is to be quiet."""
    print(reason, file=sys.stderr) if is_quiet() else show(reason)


def evaluator(settings: Settings) -> pl.Trainer:
    """A trainer that measures on all test images, in each process on its own device."""
    index = chosen_device(settings).index
    arguments = {
        key: value for key, value in settings.trainer.items() if key in ("_target_", "accelerator", "precision")
    }
    bar = None if is_quiet() else settings.callbacks.get("progress")
    trainer = instantiate(
        arguments,
        devices=1 if index is None else [index],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=bar is not None,
        enable_model_summary=False,
        callbacks=[instantiate(bar)] if bar else [],
        default_root_dir=str(settings.out),
        plugins=_under_slurm(),
    )
    assert isinstance(trainer, pl.Trainer)
    return trainer


def tested(trainer: pl.Trainer, classifier: Classifier, data: ImageData) -> dict[str, float]:
    """``test_accuracy``, and with many classes ``test_top5``."""
    device = device_of(classifier.net)
    with ended_by_sigterm(trainer):
        (found,) = trainer.test(classifier, datamodule=data, verbose=False)
    # Lightning leaves it on the CPU.
    classifier.net.to(device)
    return {f"test_{name}": float(found[f"test/{name}"]) for name in ("accuracy", "top5") if f"test/{name}" in found}


def accuracy_of(settings: Settings, net: nn.Module, data: ImageData) -> float:
    return tested(evaluator(settings), Classifier(net, num_classes=len(data.classes)), data)["test_accuracy"]


def chosen_device(settings: Settings) -> torch.device:
    """The device that the trainer gives this process."""
    return place(settings.trainer).strategy.root_device


def said_of(device: torch.device) -> str:
    """A device as tables and forecasts name it, with the threads of a processor."""
    threads = torch.get_num_threads()
    return f"cpu, {threads} {'thread' if threads == 1 else 'threads'}" if device.type == "cpu" else device.type
