"""Fine-tuning of a cut network, or training of the same widths from weights drawn anew."""

from __future__ import annotations

import os
import shlex
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from freqprune.errors import InputError
from freqprune.jobs import assembly, trainers
from freqprune.jobs.advice import same_folder, typed_out
from freqprune.jobs.config import FOLDERS, FROM_SCRATCH
from freqprune.jobs.settings import Settings
from freqprune.jobs.values import override
from freqprune.networks import config_of, device_of, dropped_blocks, epochs_done, trained
from freqprune.reports import record
from freqprune.tagging import untrained
from freqprune.training import Classifier, ImageData, check_average, epochs_of


def check_anew(net: nn.Module) -> None:
    """Find out whether the weights of a network can be drawn anew, before anything is done.

    Raises:
        InputError: if a module does not say how.
    """
    if _own_config(net) is None:
        try:
            untrained(net)
        except InputError as error:
            raise InputError(f"finetune.from_scratch cannot draw the weights of this network anew: {error}") from None


def _own_config(net: nn.Module) -> dict[str, Any] | None:
    """The config of a network whose class derives it from what it is now, as the CIFAR ResNets do, widths and all."""
    derived = isinstance(getattr(type(net), "config", None), property)
    return (config_of(net) or None) if derived else None


def check_finetuning(settings: Settings, data: ImageData) -> None:
    """Make a trainer as the one that trains a cut network, and compare its settings with the data, before the cut.

    Raises:
        InputError: for weights of other classes, an average in other numbers, or images that are to grow over no given
            number of epochs.
    """
    if settings.finetune_epochs or settings.course.step_epochs:
        settings.finetune.check_classes(len(data.classes), "finetune.")
        trainer = trainers.make_trainer(settings, settings.out, [], max(1, settings.finetune_epochs), logged=False)
        check_average(settings.finetune.ema, str(trainer.precision))
        if settings.from_scratch and data.progressive_resizing is not None:
            epochs_of(trainer)


def finetune(
    settings: Settings,
    data: ImageData,
    small: nn.Module,
    teacher: nn.Module,
    epochs: int,
    name: str,
    ckpt_path: Path | None = None,
) -> tuple[nn.Module, int]:
    """Train a cut network.

    Args:
        settings: of the run.
        data: its images.
        small: the cut network.
        teacher: the dense one, to learn from if the settings say so.
        epochs: how many.
        name: folder in that of the run; that of `FROM_SCRATCH` begins with weights drawn by the seed instead of those
            of the cut: as networks of this package draw them, in others as PyTorch's layers do.
        ckpt_path: checkpoint of this training to go on from.

    Returns:
        The trained network, in eval mode, where the teacher is, and the epochs behind it: a callback may have ended
        the training earlier.
    """
    # The same order of images whether or not something was drawn before, as after a resume.
    assembly.seed(settings.common)
    anew = name == FOLDERS[FROM_SCRATCH]
    gone = dropped_blocks(small)
    config = _own_config(small)
    # A network without some blocks is no longer what its config builds: only weights drawn anew are built once more.
    rebuilt = config is not None and (anew or not gone)
    if anew and not rebuilt:
        small = untrained(small, settings.common.seed)
    classifier = Classifier(
        dict(config) if config is not None and rebuilt else small,
        num_classes=len(data.classes),
        normalization=assembly.normalization_of(data),
        classes=data.classes,
        image_size=data.split("val").pixels.shape[-2:],
        teacher=teacher,
        blocks=gone if rebuilt else None,
        **asdict(settings.finetune),
        **asdict(settings.distillation),
    )
    if not anew:
        classifier.net.load_state_dict(small.state_dict())
    trainer = trainers.make_trainer(settings, settings.out / name, [], epochs)
    how = f"the same command with {same_folder(settings.out)}" if record.in_sweep() else how_to_go_on(settings)
    resumable = f"; to go on: {how}" if name in FOLDERS.values() else ""
    start = None if ckpt_path is None else str(ckpt_path)
    doing = "training from scratch" if anew else "fine-tuning"
    # Only weights drawn at random may see small images first.
    with nullcontext() if anew else data.whole():
        advice = f"interrupted while {doing}{resumable}"
        trainers.fit(trainer, classifier, data, start, advice, settings.common.compile)
    # A training that ends after so many steps, and has them behind it, does not count the last epoch.
    had = max(trainer.current_epoch, 0 if ckpt_path is None else epochs_done(ckpt_path))
    return classifier.net.to(device_of(teacher)).eval(), had


def how_to_go_on(settings: Settings) -> str:
    """With an interrupted training of the cut network; where the dense one was trained in the same run, with that."""
    last, began_from = settings.out / "checkpoints" / "last.ckpt", settings.common.ckpt_path
    if began_from is not None and not last.is_file():
        # No epoch was left to train.
        last = Path(began_from)
    goes_on = shlex.quote(override("resume", settings.out))
    if settings.common.ckpt is not None or settings.common.pretrained or not last.is_file():
        return f"prune.py with the same settings and {goes_on}"
    # That of prune.py is another, where train.py cut, and so is what suits it.
    by_itself = os.environ.get("FREQPRUNE_COMMAND", "").endswith(("prune", "prune.py"))
    of_cut = ("criterion", "scope", "compensation")
    scoring = [] if by_itself else [f"importance.{name}={getattr(settings.scoring, name)}" for name in of_cut]
    further = shlex.join([override("ckpt", last), *scoring, *typed_out(assembly.settings_of_weights(settings))])
    of_training = ["ckpt_path"] if began_from is not None else []
    of_training += ["those of model.*"] if trained(assembly.model_settings(settings.model)) else []
    without = f" but {' and '.join(of_training)}" if of_training else ""
    return f"prune.py with the same settings{without} and {goes_on} {further}"
