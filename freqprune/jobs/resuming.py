"""A pruning that was interrupted while it trained goes on: what its folder must hold, what the new one takes over, and
what one that begins anew must not find there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from freqprune.errors import InputError
from freqprune.jobs.config import FINETUNED, FOLDERS, FROM_SCRATCH, STEP
from freqprune.jobs.csv_log import METRICS
from freqprune.jobs.jsonl import METRICS_LINES
from freqprune.networks import Exports, epochs_done
from freqprune.pruning import AMOUNTS
from freqprune.reports import record

# Settings that say what was cut and in which order images come.
_AMOUNTS = [f"pruning.{name}" for name in AMOUNTS]
_SAME = (
    "seed", "importance.criterion", "importance.scope", *_AMOUNTS,
    *(f"pruning.{name}" for name in (
        "scope", "compensation", "normalize", "min_filters", "multiple_of", "layers", "exclude", "blocks", "streams",
        "steps", "step_epochs",
    )),
)  # fmt: skip
# Metrics that come after the training of the cut network.
_AFTER_TRAINING = ("folded", "onnx", "int8", "exports", "finished")
# What a training has logged.
_LOGGED = (METRICS, METRICS_LINES, "hparams.yaml")


@dataclass(frozen=True)
class Interrupted:
    """A run that had pruned.

    Attributes:
        folder: of the run.
        metrics: of its stages so far.
        last: checkpoint of its training after the last complete epoch; None if there was none.
    """

    folder: Path
    metrics: dict[str, Any]
    last: Path | None

    @property
    def pruned(self) -> Path:
        """The file with its pruned network."""
        return self.folder / "pruned.ckpt"

    def hand_over(self, out: Path, stage: str) -> None:
        """Put what a training goes on from into the folder of another run, which can be interrupted as well."""
        old, new = self.folder / FOLDERS[stage], out / FOLDERS[stage]
        if self.last is None or old.resolve() == new.resolve():
            return
        for name in (METRICS, METRICS_LINES, "checkpoints/last.ckpt"):
            if (old / name).is_file():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                partial = (new / name).with_name(f"{Path(name).name}.partial")
                shutil.copyfile(old / name, partial)
                os.replace(partial, new / name)


def interrupted(folder: Path, stage: str, epochs: int) -> Interrupted:
    """Read what a run has left.

    Args:
        folder: of the run.
        stage: that its training is to end with.
        epochs: of this training.

    Raises:
        InputError: if it had not pruned, trains the other stage or has more epochs behind it.
    """
    metrics = record.read_json(folder / record.METRICS)
    found = Interrupted(folder, metrics, folder / FOLDERS[stage] / "checkpoints" / "last.ckpt")
    if found.pruned.is_file() and metrics and "pruned" not in metrics:
        raise InputError(
            f"resume = {folder} holds the metrics of a later look (pruning=none) in the place of those of its cut: cut "
            "anew"
        )
    if not found.pruned.is_file() or "pruned" not in metrics:
        raise InputError(
            f"resume = {folder} holds no pruned.ckpt and metrics.json: that run was interrupted before it had "
            "pruned; start it again"
        )
    other = FINETUNED if stage == FROM_SCRATCH else FROM_SCRATCH
    if other in metrics or (folder / FOLDERS[other] / "checkpoints" / "last.ckpt").is_file():
        # Its pruned.ckpt holds the weights of that training by now.
        raise InputError(
            f"resume = {folder} is a run with finetune.from_scratch={str(other == FROM_SCRATCH).lower()}; "
            "go on with that, or compare in a run of its own"
        )
    # Not by its last checkpoint: callbacks may have ended it earlier.
    had = record.read_json(folder / record.RUN).get("settings", {}).get("finetune", {}).get("epochs", epochs)
    wants_more = (stage in metrics or bool(metrics.get("finished"))) and had < epochs
    if wants_more:
        # What was measured of the shorter training, or of none, will be measured again.
        metrics = {name: value for name, value in metrics.items() if name not in (stage, *_AFTER_TRAINING)}
    if found.last is None or not found.last.is_file():
        if wants_more and had:
            raise InputError(
                f"resume = {folder} is complete after {had} epochs, finetune.epochs = {epochs} asks for more, and its "
                f"{FOLDERS[stage]}/checkpoints/last.ckpt, to go on from, is gone; give the number of that run, or cut "
                "anew"
            )
        return Interrupted(folder, metrics, None)
    if (done := epochs_done(found.last)) > epochs:
        raise InputError(
            f"resume = {folder} has {done} epochs of its training behind it, finetune.epochs = {epochs} asks for fewer "
            "in all; give the number of that run"
        )
    return Interrupted(folder, metrics, found.last)


def forget_files(metrics: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The metrics without what they say of files that are not in this folder."""
    metrics = dict(metrics)
    for stage, file in (("onnx", "model.onnx"), ("int8", "model.int8.onnx")):
        if not (out / file).is_file():
            metrics.pop(stage, None)
    there = {file: value for file, value in metrics.pop("exports", {}).items() if (out / file).is_file()}
    return metrics | ({"exports": there} if there else {})


def undeployed(metrics: Mapping[str, Any], asked: Exports) -> bool:
    """Whether something is asked for that an earlier run has not left."""
    files = {"model.onnx": asked.onnx, "model.int8.onnx": asked.int8, "model.pt2": asked.torch_export}
    missing = [name for name, wanted in files.items() if wanted and name not in metrics.get("exports", {})]
    return bool(missing) or (asked.fold and "folded" not in metrics)


def check_same_cut(cfg: DictConfig, folder: Path) -> None:
    """Refuse to go on with a run under settings that it was not cut with.

    Raises:
        InputError: names the first that differs.
    """
    settings = record.read_json(folder / record.RUN).get("settings", {})
    before = OmegaConf.create(settings)
    by_default = all(OmegaConf.select(one, name) is None for name in _AMOUNTS for one in (cfg, before))
    # An older record may lack some.
    known = {*settings, *(f"{group}.{key}" for group in ("importance", "pruning") for key in settings.get(group, {}))}
    for name in (*_SAME, *(["pruning.default_macs_cut"] if by_default else [])):
        given, had = OmegaConf.select(cfg, name), OmegaConf.select(before, name)
        if name in known and given != had:
            raise InputError(
                f"resume = {folder} was cut with {name} = {had}, and this command says {given}: give the settings of "
                "that run, which its run.json holds"
            )


def begin_anew(out: Path) -> None:
    """Leave nothing of an earlier run in a folder that could be gone on with as if it were of the new one."""
    steps = [folder for folder in out.glob("step*") if re.fullmatch(STEP, folder.name)]
    for folder in (*(out / name for name in FOLDERS.values()), *steps):
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        with suppress(OSError):
            for name in _LOGGED:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
    record.clear([out / name for name in ("pruned.ckpt", record.METRICS, *record.EXPORTED)])
