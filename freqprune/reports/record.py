"""The record of a run: what was asked for, with which versions, and how it ended. Files of a run folder by name."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter

from freqprune.errors import InputError

# What a run is shown by.
PAGES = ("report.html", "explore.html", "filters.csv", "layers.csv", "figures/*.png")
RUN, METRICS, TRAINING, FAILED = "run.json", "metrics.json", "training.json", "failed.txt"
# What is deployed of a cut.
EXPORTED = ("model.onnx", "model.onnx.data", "model.int8.onnx", "model.int8.onnx.data", "model.pt2")
# Of a training whose network is cut in its folder there is more to see: pages that are written anew, and these.
OF_TRAINED = (
    *PAGES[:-1],
    *(f"figures/{name}.png" for name in ("training_curves", "important_last_epoch", "important_over_epochs",
                                         "ranking_over_epochs")),
)  # fmt: skip
# What a training leaves besides its checkpoints.
OF_A_TRAINING = (TRAINING, "importance.csv", "importance.json", "metrics.csv", "metrics.jsonl")
EXPLAINED = "explain.html"
# Settings by which a job may go on in its folder, which its record then does not hold.
GOES_ON = ("resume", "ckpt_path", "ckpt")
# Seconds that a job expected to take, by stage.
FORECAST = "forecast.json"
PACKAGES = ("freqprune", "torch", "torchvision", "pytorch-lightning", "torch-pruning", "hydra-core", "numpy", "scipy")


def write_text(path: Path, text: str) -> Path:
    """Write a file, complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    # Names of files need not be text.
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a JSON file, complete or not at all."""
    return write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; empty if there is none."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """The settings of a job as its record has them."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    settings = {str(key): value for key, value in plain.items() if key != "output_dir"}
    # A job that is finished in its own folder is the same job.
    settings |= dict.fromkeys(gone_on_with(settings, Path(cfg.output_dir)))
    # As a file holds them, to compare with one.
    found: dict[str, Any] = json.loads(json.dumps(_without_folder(settings, str(cfg.output_dir))))
    return found


def _without_folder(value: Any, folder: str) -> Any:
    """Settings with the run folder by its name: paths in it differ from job to job and say nothing."""
    if isinstance(value, Mapping):
        return {key: _without_folder(one, folder) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folder(one, folder) for one in value]
    if isinstance(value, str) and (value == folder or value.startswith((f"{folder}/", folder + os.sep))):
        return "${output_dir}" + value[len(folder) :]
    return value


def lies_in(path: str | Path, folder: Path) -> bool:
    """Whether a file is in a folder, by its own name or by where links lead."""
    # Hydra takes a name of digits for a number.
    path = str(path)
    return any(Path(where(folder)) in Path(where(path)).parents for where in (os.path.abspath, os.path.realpath))


def gone_on_with(settings: Mapping[str, Any], folder: Path) -> list[str]:
    """Those of the settings by which a job goes on in its own `folder`."""
    found = [key for key in GOES_ON[1:] if settings.get(key) is not None and lies_in(settings[key], folder)]
    resume = settings.get("resume")
    if resume is None or Path(str(resume)).resolve() != folder.resolve():
        # A network that was trained there and is cut there is another's job.
        return [key for key in found if key == "ckpt_path"]
    return ["resume", *found]


def write(out: Path, cfg: DictConfig, results: Sequence[str] = ()) -> None:
    """Write ``run.json``: command, settings, versions, machine.

    Args:
        out: the folder.
        cfg: the settings.
        results: files, or patterns of them, that would be taken for this run's own if one with other settings has left
            them, and this one does not go on from there: they go, so that the time for this is when all that could be
            refused has been looked at.
    """
    settings = settings_of(cfg)
    dense = cfg.get("ckpt")
    gone_on, before = gone_on_with(cfg, out), read_json(out / RUN).get("settings", {})
    # What a job began from is said also when it has gone on.
    settings |= {key: before[key] for key in gone_on if before.get(key) is not None}
    if before and before != settings and not gone_on:
        here = dense is not None and lies_in(dense, out)
        spared = {path for name in (*OF_TRAINED, *OF_A_TRAINING) for path in out.glob(name)} if here else set()
        clear([path for name in results for path in out.glob(name) if path not in spared])
    command = None
    if HydraConfig.initialized():
        job = HydraConfig.get()
        program = os.environ.get("FREQPRUNE_COMMAND", f"freqprune {job.job.name}")
        # As typed: what follows other settings, such as ckpt=runs/${seed}/last.ckpt, would be another in each.
        typed = cast(list[str], OmegaConf.to_container(job.overrides.task, resolve=False))
        command = f"{program} {shlex.join([*config_words(), *typed])}".strip()
    machine = {"system": platform.platform(terse=True), "processor": platform.machine(), "cores": os.cpu_count()}
    content: dict[str, Any] = {"command": command, "settings": settings, "versions": _versions(), "machine": machine}
    if follows := _following_seed(OmegaConf.to_container(cfg, resolve=False)):
        content["follows_seed"] = follows
    write_json(out / RUN, content)


def _following_seed(settings: Any, before: str = "") -> dict[str, str]:
    """Settings that hang on the seed, such as a checkpoint of each, as they are written: the values tell no jobs apart.

    >>> _following_seed({"ckpt": "runs/${seed}/last.ckpt", "logger": {"name": "r${seed}", "id": "a"}})
    {'ckpt': 'runs/${seed}/last.ckpt', 'logger.name': 'r${seed}'}
    """
    if isinstance(settings, dict):
        parts = (_following_seed(one, f"{before}.{name}") for name, one in settings.items())
        return {key: value for part in parts for key, value in part.items()}
    return {before[1:]: settings} if isinstance(settings, str) and "${seed}" in settings else {}


def with_values(settings: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    """Settings with other values at some dotted keys.

    >>> with_values({"ckpt": "a", "logger": {"name": "r0", "id": "a"}}, {"ckpt": "b", "logger.name": "r"})
    {'ckpt': 'b', 'logger': {'name': 'r', 'id': 'a'}}
    """
    found = dict(settings)
    for key, value in values.items():
        first, _, rest = key.partition(".")
        found[first] = with_values(found.get(first) or {}, {rest: value}) if rest else value
    return found


def config_words(named: bool = True) -> list[str]:
    """``--config-dir`` and its folder, and ``--config-name``, as words, if they were typed: settings may hang on what
    lies there; the name, where it is `named`."""
    if not HydraConfig.initialized():
        return []
    hydra = HydraConfig.get()
    sources = [one for one in hydra.runtime.config_sources if one.provider == "command-line"]
    name = hydra.job.config_name
    own = ["--config-name", name] if named and name not in ("train", "prune", "explain", None) else []
    return [*(word for one in sources for word in ("--config-dir", one.path)), *own]


def options(words: Sequence[str]) -> list[str]:
    """``--config-dir`` and ``--config-name`` at the beginning of a command's words, each with its value."""
    n_options = 0
    while words[2 * n_options : 2 * n_options + 1] and words[2 * n_options].startswith("--"):
        n_options += 1
    return list(words[: 2 * n_options])


def clear(paths: Sequence[Path]) -> None:
    """Remove files that are there."""
    for path in paths:
        path.unlink(missing_ok=True)


def is_finished(folder: Path) -> bool:
    """Whether a run of `prune.py` or `train.py` came to its end in this folder."""
    if (folder / METRICS).is_file():
        return bool(read_json(folder / METRICS).get("finished"))
    # It says so while its report is written.
    if not (folder / TRAINING).is_file() or not read_json(folder / TRAINING).get("finished", True):
        return False
    run = read_json(folder / RUN)
    # With pruning to follow, training is only the first half.
    # On the command line off and no are words.
    return not TypeAdapter(bool).validate_python(run.get("settings", {}).get("pruning", {}).get("enabled", False))


def unfinish(folder: Path) -> None:
    """Of a run that is begun anew in its folder what it had found says no more that it is complete."""
    metrics = read_json(folder / METRICS)
    if metrics.pop("finished", False):
        write_json(folder / METRICS, metrics)


def holds_cut(folder: Path) -> bool:
    """Whether a folder holds a cut that can be gone on with."""
    return (folder / "pruned.ckpt").is_file() and "pruned" in read_json(folder / METRICS)


def is_explained(folder: Path) -> bool:
    """Whether an explanation came to its end in this folder."""
    return (folder / EXPLAINED).is_file()


def in_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def done_before(cfg: DictConfig, finished: Callable[[Path], bool] = is_finished, again: bool = False) -> bool:
    """Whether this job of a sweep has been done: the sweep was killed and is started again in the same folder.

    Args:
        cfg: its settings.
        finished: whether a folder holds a job of its kind that came to its end.
        again: whether jobs are started again without a sweep.

    Raises:
        InputError: if another job was done there.
    """
    if not (in_sweep() or again):
        return False
    out = Path(cfg.output_dir)
    if not finished(out):
        return False
    same = bool(read_json(out / RUN).get("settings") == settings_of(cfg))
    if in_sweep() and not same:
        raise InputError(
            f"{out} holds a finished job with other settings; a sweep goes on with its own command only: choose "
            "another hydra.sweep.dir"
        )
    return same


@contextmanager
def failures_kept(out: Path, finished: Callable[[Path], bool] = is_finished) -> Iterator[None]:
    """Leave ``failed.txt`` with the reason if what follows fails, unless a folder has `finished`, see `done_before`."""
    with suppress(OSError):
        (out / FAILED).unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        # What went wrong must not be hidden by a full disk, nor results by what was refused in their folder.
        with suppress(OSError, ValueError):
            if not finished(out):
                (out / FAILED).write_text(
                    f"{error}\n" if isinstance(error, InputError) else f"{type(error).__name__}: {error}\n",
                    encoding="utf-8",
                    errors="backslashreplace",
                )
        raise
