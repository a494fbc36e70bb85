"""A training that goes on with a checkpoint: in which epoch, and with which rate."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
from pytorch_lightning.loops.fit_loop import _FitLoop
from pytorch_lightning.loops.loop import _Loop
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from freqprune.errors import InputError
from freqprune.training.optimization import Optimization, go_on_by_epochs, take_settings


def go_on_after_an_epoch(loop: _FitLoop) -> None:
    """Let a training by steps go on after an epoch as one by epochs does: Lightning takes the epoch for one that has
    not ended, ends it again, and gives later ones the numbers, and so the images, of those after them."""
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        # Not that of the loop itself, by which a training by steps is always one that was interrupted.
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
        loop.reset_restart_stage()
        loop.epoch_loop.update_restart_stage()


def go_on(
    trainer: pl.Trainer, schedule: LambdaLR, asked: Optimization, net: nn.Module, steps_an_epoch: Callable[[], int]
) -> None:
    """Let a restored schedule be that of the settings, where it is after as many epochs.

    Args:
        trainer: which has restored it.
        schedule: of the rate.
        asked: the settings.
        net: the network that is trained.
        steps_an_epoch: how many there are here.

    Raises:
        InputError: for a checkpoint of a validation, where an epoch has another number of steps here.
    """
    take_settings(schedule, asked, net)
    # What is constant from the first step on goes on as it is.
    constant = asked.schedule == "constant" and not asked.warmup_epochs
    if constant or trainer.max_steps >= 0:
        return
    # Steps of an epoch are others with batches of another size, or in another number of processes.
    done, loop, steps = trainer.current_epoch, trainer.fit_loop, steps_an_epoch()
    if not loop.restarted_mid_epoch:
        if done:
            go_on_by_epochs(schedule, done, steps)
    elif loop.epoch_loop.batch_progress.is_last_batch:
        # Lightning has counted the epoch already where its validation was not begun.
        epochs = done + (not loop.epoch_loop.restarted_on_train_batch_end)
        if schedule.last_epoch != steps * epochs:
            raise InputError(
                f"the checkpoint was written in the validation at the end of an epoch, and an epoch has {steps} steps "
                f"here and had {schedule.last_epoch / epochs:g}: go on from one that was written after an epoch "
                "(last.ckpt), or with batches of the same size in as many processes"
            )
