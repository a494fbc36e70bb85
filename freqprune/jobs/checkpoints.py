"""How checkpoints of a run are written, and how those of a folder that was moved are gone on with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.io import TorchCheckpointIO

from freqprune.networks import write_atomically


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear complete or not at all, on any file system: a killed run never leaves half of one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, checkpoint)


class ModelCheckpoint(pl.callbacks.ModelCheckpoint):
    """Lightning's, under its name in checkpoints, but that the best epoch stays the best in a run folder that was
    moved: Lightning forgets it where paths differ, and the next epoch, however bad, would be saved over it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        old, new = state_dict.get("dirpath"), self.dirpath
        best = state_dict.get("best_model_path")
        if old and new and best and old != new and (Path(new) / Path(best).name).is_file():
            state_dict = {name: _moved(value, str(old), str(new)) for name, value in state_dict.items()} | {
                "dirpath": new
            }
        super().load_state_dict(state_dict)


def _moved(value: Any, old: str, new: str) -> Any:
    """Paths that begin with a folder as they begin with another."""
    if isinstance(value, dict):
        return {_moved(key, old, new): one for key, one in value.items()}
    return new + value[len(old) :] if isinstance(value, str) and value.startswith((f"{old}/", old + os.sep)) else value
