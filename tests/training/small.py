"""Trainings of a minute."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from freqprune.training.whole_sets import DigitsData


def trainer(folder: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 1,
    }
    return pl.Trainer(
        default_root_dir=folder, callbacks=list(callbacks), **{**defaults, "enable_checkpointing": False, **settings}
    )


def digits() -> DigitsData:
    return DigitsData(limit_train=128, limit_test=50, flip=False, batch_size=16)
