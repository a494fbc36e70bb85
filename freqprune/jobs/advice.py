"""What a person would type next, at the end of a job."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from freqprune.jobs.values import override
from freqprune.reports import record, show

# What training and pruning have to agree on; the checkpoint says which network it is.
SHARED = ("experiment", "data", "tagging", "imports", "trainer")
# Where and in how many processes; how long a training is has no meaning for what follows it.
WHERE = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes")
# Of the tags, what only training has a use for.
IN_TRAINING = ("tagging.epoch_images", "tagging.every_n_epochs")
AMOUNT = ("pruning", "pruning.enabled", "pruning.ratio", "pruning.threshold", "pruning.macs_cut", "pruning.latency_cut",
          "pruning.latency_ms")  # fmt: skip
# What only an amount of time goes with.
OF_TIME = ("pruning.scope=per_ms", "pruning.multiple_of=auto")
# A network that comes trained, and may be trained further.
OF_A_LIBRARY = frozenset({"model.weights", "model.pretrained"})
SHARES = "pruning.macs_cut=0.3,0.5,0.7"


def advise(job: str, out: Path, of_weights: Mapping[str, Any]) -> None:
    """Print three commands that would follow a job: ``"train"``, ``"look"`` (tagged and not pruned) or ``"prune"``.

    Nothing in a sweep, whose table follows, and nothing for a job that was called from Python.

    Args:
        job: which.
        out: its folder.
        of_weights: settings of the data that the weights of a library brought.
    """
    program = os.environ.get("FREQPRUNE_COMMAND", "python prune.py")
    # What a config of its own trains is no config to prune by.
    prune = _with_configs(f"{program.split()[0]} {'prune.py' if program.endswith('.py') else 'prune'}", job != "train")
    _show(lambda overrides: commands(job, out, prune, overrides, of_weights))


def advise_explaining(out: Path, of_classes: bool = True) -> None:
    """Print three commands that would follow an explanation; nothing in a sweep or for a job called from Python.

    Args:
        out: its folder.
        of_classes: whether the network answers with logits of several classes.
    """
    _show(lambda overrides: after_explaining(out, overrides, _with_configs("freqprune explain"), of_classes))


def _with_configs(program: str, named: bool = True) -> str:
    return " ".join([program, *([shlex.join(given)] if (given := record.config_words(named)) else [])])


def _show(following: Callable[[Sequence[str]], list[str]]) -> None:
    """Print the commands that follow a job, by the ``key=value`` that it got."""
    if not HydraConfig.initialized() or HydraConfig.get().mode == RunMode.MULTIRUN:
        return
    show("next, for example:")
    for command in following(HydraConfig.get().overrides.task):
        show(f"  {command}")


def same_folder(out: Path) -> str:
    """What sends the same command into the same folder, where a job, or its sweep, goes on."""
    if record.in_sweep():
        return shlex.quote(override("hydra.sweep.dir", HydraConfig.get().sweep.dir))
    return shlex.quote(override("hydra.run.dir", out))


def typed_out(of_weights: Mapping[str, Any]) -> list[str]:
    """Settings of the data as they are typed."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in of_weights.items()}
    return [f"data.{key}={str(value).replace(' ', '')}" for key, value in plain.items() if value is not None]


def after_explaining(
    out: Path, overrides: Sequence[str], explain: str = "freqprune explain", of_classes: bool = True
) -> list[str]:
    """Three commands that would follow an explanation: look at it, more exact maps, finer ones, or, of parts that are
    not tiles, those from another baseline.

    Args:
        out: its folder.
        overrides: ``key=value`` as the job got them.
        explain: how the program that explains is called.
        of_classes: whether the network answers with logits of several classes.
    """
    given = {one.lstrip("+~").split("=")[0]: one for one in overrides}

    def call(without: Sequence[str] = (), **more: str) -> str:
        kept = [one for key, one in given.items() if key not in more and key not in without]
        return f"{explain} {shlex.join([*kept, *(f'{key}={value}' for key, value in more.items())])}"

    tiles = not given.keys() & {"parts", "segments"}
    used = given.get("forwards", "").rpartition("=")[2]
    forwards = str(max(1024, 2 * int(used) if used.isdigit() else 0))
    exact = {"score": "probability"} if of_classes else {}
    # Parts of one's own may lie within one another.
    exact |= {} if "segments" in given else {"overlap": "0.7"}
    return [
        f"python -m webbrowser {(out / 'explain.html').resolve().as_uri()}",
        # A standard error in other units would end it anywhere.
        call(without=("until",), forwards=forwards, **exact),
        call(forwards=forwards, grid="4", refine="2") if tiles else call(forwards=forwards, baseline="blur"),
    ]


def commands(
    job: str, out: Path, prune: str, overrides: Sequence[str], of_weights: Mapping[str, Any] | None = None
) -> list[str]:
    """Three commands that would follow a job.

    Args:
        job: ``"train"``, ``"look"`` or ``"prune"``.
        out: its folder.
        prune: how the program that prunes is called.
        overrides: ``key=value`` as the job got them.
        of_weights: settings of the data that the weights of a library brought.
    """
    # Without tags there is nothing to explore.
    page = "explore.html" if job != "prune" and (out / "explore.html").is_file() else "report.html"
    look = f"python -m webbrowser {(out / page).resolve().as_uri()}"
    given = {one.lstrip("+~").split("=")[0]: one for one in overrides}
    if job == "train":
        again = [
            one
            for key, one in given.items()
            if key in (*SHARED, *WHERE) or (key.startswith(("data.", "tagging.")) and key not in IN_TRAINING)
        ]
    else:
        again = [one for key, one in given.items() if key not in (*AMOUNT, "resume")]
        again = [one for one in again if one not in OF_TIME]
    brought, last = given.keys() & {"ckpt", "pretrained", *OF_A_LIBRARY}, out / "checkpoints" / "last.ckpt"
    # With no epoch left there is none but that which the training began from.
    began_from = None if last.is_file() else given.get("ckpt_path")
    trained_here = job == "train" or not brought or (brought <= OF_A_LIBRARY and bool(last.is_file() or began_from))
    if trained_here:
        own = ("model=", "model.", "optimizer", "trainer.", "ckpt_path", "tag_loss")
        again = [one for one in again if one.startswith(WHERE) or not one.startswith(own)]
        if "experiment" in given and any(key == "model" or key.startswith("model.") for key in given):
            # The checkpoint names its network; the experiment has another.
            again.append("model=auto")
        again += [one for one in typed_out(of_weights or {}) if one.split("=")[0] not in given]
        again.append(override("ckpt", last) if began_from is None else f"ckpt={began_from.partition('=')[2]}")

    def call(*more: str, sweep: bool = False) -> str:
        return f"{prune} {'-m ' if sweep else ''}{shlex.join([*again, *more])}"

    # A training of no epoch, or one that keeps no checkpoint: nothing goes on from it.
    lacks = trained_here and began_from is None and not last.is_file()
    if lacks and job != "prune":
        return [look]
    if job == "train":
        return [look, call("pruning=none"), call("pruning.macs_cut=0.5")]
    if job == "look":
        return [look, call("pruning.macs_cut=0.5"), call(SHARES, sweep=True)]
    code = f"from freqprune import load_pruned; print(load_pruned({json.dumps(str(out / 'pruned.ckpt'))}))"
    further = [] if lacks else [call(SHARES, sweep=True)]
    return [look, f"python -c {shlex.quote(code)}", *further]
