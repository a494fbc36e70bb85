"""Fine-tuning of a cut network, or training of the same widths from weights drawn anew."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from torch import nn

from freqprune.errors import InputError
from freqprune.jobs import assembly, trainers
from freqprune.jobs.settings import Settings
from freqprune.networks import dropped_blocks
from freqprune.tagging import untrained
from freqprune.training import Classifier, ImageData

# Folder of the fine-tuning that a run ends with; an interrupted one goes on from there.
LAST = "finetune"


def check_anew(net: nn.Module) -> None:
    """Find out whether the weights of a network can be drawn anew, before anything is done.

    Raises:
        InputError: if a module does not say how.
    """
    if not hasattr(type(net), "config"):
        try:
            untrained(net)
        except InputError as error:
            raise InputError(f"finetune.from_scratch cannot draw the weights of this network anew: {error}") from None


def finetune(
    settings: Settings,
    data: ImageData,
    small: nn.Module,
    teacher: nn.Module,
    epochs: int,
    name: str,
    ckpt_path: Path | None = None,
    anew: bool = False,
) -> nn.Module:
    """Train a cut network.

    Args:
        settings: of the run.
        data: its images.
        small: the cut network.
        teacher: the dense one, to learn from if the settings say so.
        epochs: how many.
        name: folder in that of the run.
        ckpt_path: checkpoint of this training to go on from.
        anew: from weights drawn by the seed, as the network itself draws them, not from those of the cut.

    Returns:
        The trained network, in eval mode.
    """
    # The same order of images whether or not something was drawn before, as after a resume.
    assembly.seed(settings.common)
    # A network without some blocks is no longer what its config builds.
    own = hasattr(type(small), "config") and not dropped_blocks(small)
    config = getattr(small, "config", None) if own else None
    if anew and not config:
        small = untrained(small, settings.common.seed)
    classifier = Classifier(
        dict(config) if config else small,
        num_classes=len(data.classes),
        normalization=assembly.normalization_of(data),
        classes=data.classes,
        teacher=teacher,
        **asdict(settings.finetune),
        **asdict(settings.distillation),
    )
    if not anew:
        classifier.net.load_state_dict(small.state_dict())
    trainer = trainers.make_trainer(settings, settings.out / name, [], epochs)
    stored = settings.common.ckpt is not None or settings.common.pretrained
    dense = "" if stored else f" ckpt={settings.out / 'checkpoints' / 'last.ckpt'}"
    resumable = f"; to go on: prune.py with the same settings and resume={settings.out}{dense}" if name == LAST else ""
    start = None if ckpt_path is None else str(ckpt_path)
    trainers.fit(trainer, classifier, data, start, f"interrupted while fine-tuning{resumable}")
    return classifier.net.eval()
