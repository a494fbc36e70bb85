"""Checkpoints of a run folder that was moved."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from freqprune.jobs import trainers
from freqprune.jobs.checkpoints import ModelCheckpoint
from freqprune.jobs.settings import read
from tests.jobs.small import config


def written(folder: Path) -> dict[str, Any]:
    """What a training in `folder` has kept of its best epoch."""
    best = str(folder / "best.ckpt")
    return {
        "dirpath": str(folder),
        "best_model_path": best,
        "best_model_score": torch.tensor(0.9),
        "best_k_models": {best: torch.tensor(0.9)},
        "kth_best_model_path": best,
        "kth_value": torch.tensor(0.9),
        "last_model_path": "",
    }


def test_the_best_epoch_stays_the_best_in_a_folder_that_was_moved(tmp_path: Path) -> None:
    new = tmp_path / "new"
    made = ModelCheckpoint(dirpath=new, filename="best", monitor="val/accuracy", mode="max")
    # Nothing of it is there: a training that goes on in another folder.
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        made.load_state_dict(written(tmp_path / "old"))
    assert made.best_k_models == {}
    new.mkdir()
    (new / "best.ckpt").write_text("")
    made.load_state_dict(written(tmp_path / "old"))
    assert made.best_k_models == {str(new / "best.ckpt"): torch.tensor(0.9)}
    assert (made.best_model_path, made.kth_best_model_path) == (str(new / "best.ckpt"),) * 2
    assert float(made.best_model_score or 0) == float(made.kth_value) == torch.tensor(0.9)


def test_checkpoints_of_a_run_are_known_by_the_name_of_lightning(tmp_path: Path) -> None:
    settings = read(config("train", tmp_path))
    made = trainers.make_trainer(settings, tmp_path, []).checkpoint_callbacks
    assert [type(one) for one in made] == [ModelCheckpoint] * 2
    theirs = pl.callbacks.ModelCheckpoint(monitor="val/accuracy", mode="max", filename="best")
    assert theirs.state_key in {one.state_key for one in made}
