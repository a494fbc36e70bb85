"""The jobs of a sweep, from the folders they leave: what was set, how each ended, what it found."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from freqprune.errors import InputError
from freqprune.report import percentages
from freqprune.runs import FAILED, METRICS, TRAINING, is_finished


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        name: its folder, as the sweep numbers it.
        state: ``"finished"``, ``"failed"``, ``"unfinished"`` (killed, or still running), ``"not started"`` or ``"repeated"`` (a job before it had the
            same settings and seed, so that it counts once).
        overrides: what was set on the command line for this job, by key.
        metrics: figures by name: accuracies in per cent, ``cut`` and ``params_cut`` in per cent of the dense network.
        error: why it failed.
        folder: where it ran.
    """

    name: str
    state: str
    overrides: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""
    folder: Path | None = None


def read_sweep(folder: str | Path) -> list[Job]:
    """All jobs of a multirun folder, also those that failed or never started.

    Raises:
        InputError: if the folder holds no jobs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder of a sweep, such as multirun/prune/<time>")
    found = [_read_job(path, folder) for path in _job_folders(folder)]
    if not found:
        raise InputError(f"{folder} holds no jobs (folders with .hydra/overrides.yaml); give the folder of a sweep, such as multirun/prune/<time>")
    for number, overrides in enumerate(_planned(folder / "multirun.yaml")):
        if not any(job.overrides == overrides for job in found):
            found.append(Job(str(number), "not started", overrides))
    return found


def _job_folders(folder: Path) -> list[Path]:
    paths = [path.parent.parent for path in folder.rglob(".hydra/overrides.yaml")]
    return sorted(paths, key=lambda path: [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.relative_to(folder).parts])


def _read_job(path: Path, sweep: Path) -> Job:
    overrides = _by_key(OmegaConf.to_object(OmegaConf.load(path / ".hydra" / "overrides.yaml")))
    name = str(path.relative_to(sweep))
    if is_finished(path):
        return Job(name, "finished", overrides, _figures(path), folder=path)
    if (path / FAILED).is_file():
        return Job(name, "failed", overrides, error=(path / FAILED).read_text().strip(), folder=path)
    return Job(name, "unfinished", overrides, folder=path)


def _by_key(overrides: Any) -> dict[str, str]:
    parsed = OverridesParser.create().parse_overrides([str(item) for item in overrides])
    return {one.get_key_element(): _as_written(one.get_value_string()) for one in parsed if not one.is_hydra_override()}


def _as_written(value: str) -> str:
    """Hydra hands true on as True."""
    return value.lower() if value.lower() in ("true", "false", "null") else value


def _planned(path: Path) -> list[dict[str, str]]:
    """Overrides of every job that a sweep set out to do, as Hydra's own sweeper numbers them."""
    if not path.is_file():
        return []
    given = OmegaConf.to_container(OmegaConf.load(path))
    parsed = OverridesParser.create().parse_overrides(given["hydra"]["overrides"]["task"])  # type: ignore[index,call-overload,arg-type]
    jobs: list[dict[str, str]] = [{}]
    for one in parsed:
        jobs = [{**job, one.get_key_element(): _as_written(value)} for job in jobs for value in _values(one)]
    return jobs


def _values(override: Override) -> list[str]:
    return list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.get_value_string()]


def counted_once(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, those marked that were done before with the same settings and seed."""
    found: list[Job] = []
    for job in jobs:
        again = job.state == "finished" and any(job.overrides == other.overrides for other in found if other.state == "finished")
        found.append(replace(job, state="repeated") if again else job)
    return found


def _figures(path: Path) -> dict[str, float]:
    if (path / METRICS).is_file():
        return percentages(json.loads((path / METRICS).read_text()))
    metrics = json.loads((path / TRAINING).read_text())
    return {"validation": 100 * metrics["val_accuracy"], "test": 100 * metrics["test_accuracy"]}


def command_of(folder: Path) -> str:
    """The command that started a sweep; empty where Hydra left no multirun.yaml."""
    if not (folder / "multirun.yaml").is_file():
        return ""
    hydra = OmegaConf.load(folder / "multirun.yaml").hydra
    given = [one for one in [*hydra.overrides.task, *hydra.overrides.get("hydra", [])] if one != "hydra.mode=MULTIRUN"]
    return shlex.join(["python", f"{hydra.get('job', {}).get('name') or 'prune'}.py", "-m", *given])
