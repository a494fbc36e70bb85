"""The jobs of a sweep, from the folders they leave: what was set, how each ended, what it found."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from yaml import YAMLError

from freqprune.errors import InputError
from freqprune.reports.record import (
    FAILED,
    GOES_ON,
    METRICS,
    RUN,
    TRAINING,
    is_finished,
    options,
    read_json,
    with_values,
)
from freqprune.reports.tables import percentages

REPEATED = "seed"


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        name: its folder, as the sweep numbers it.
        state: ``"finished"``, ``"failed"``, ``"unfinished"`` (killed, or still running), ``"not started"``,
            ``"damaged"`` (its files cannot be read) or ``"repeated"`` (a job before it had the same settings and seed,
            so that it counts once).
        overrides: what was set on the command line for this job, by key.
        metrics: figures by name: accuracies in per cent, ``cut`` and ``params_cut`` in per cent of the dense network.
        error: why it failed, or what is damaged.
        folder: where it ran.
        settings: all settings, from ``run.json``; those that follow the seed as they are written.
    """

    name: str
    state: str
    overrides: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""
    folder: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def read_sweep(folder: str | Path) -> list[Job]:
    """All jobs of a multirun folder, or of several below one folder, also those that failed or never started.

    Raises:
        InputError: if the folder holds no jobs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder of a sweep, such as multirun/prune/<time>")
    folders, sweeps = _job_folders(folder), _sweeps(folder)
    explaining = {sweep for sweep in sweeps if (_multirun(sweep).get("job") or {}).get("name") == "explain"}
    others = [path for path in folders if not explaining & {*path.parents}]
    found = [_read_job(path, folder) for path in others if not (path / "explain.html").is_file() or is_finished(path)]
    if folders and not found:
        raise InputError(
            f"{folder} is a sweep of explain, which has no figures to gather: see explain.html of each job"
        )
    if not found:
        raise InputError(
            f"{folder} holds no jobs (folders with .hydra/overrides.yaml); give the folder of a sweep, such as "
            "multirun/prune/<time>"
        )
    for sweep in (one for one in sweeps if one not in explaining):
        known = [job.overrides for job in found if job.folder and sweep in job.folder.parents]
        damaged = [job.folder for job in found if job.state == "damaged"]
        for number, overrides in enumerate(_planned_in(sweep)):
            if overrides not in known and sweep / str(number) not in damaged:
                found.append(Job(str((sweep / str(number)).relative_to(folder)), "not started", overrides))
    return found


def _sweeps(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.rglob("multirun.yaml"))


def _job_folders(folder: Path) -> list[Path]:
    def in_order(path: Path) -> list[tuple[bool, int, str]]:
        return [
            (not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
            for part in path.relative_to(folder).parts
        ]

    return sorted((path.parent.parent for path in folder.rglob(".hydra/overrides.yaml")), key=in_order)


def _read_job(path: Path, sweep: Path) -> Job:
    job = Job(str(path.relative_to(sweep)), "unfinished", folder=path)
    try:
        record = read_json(path / RUN)
        given = by_key(_overrides(path, record))
        # A job that was interrupted and finished in its folder is the job that began there.
        told = record.get("settings", {})
        own = {key for key in GOES_ON if given.get(key) != "null" and told.get(key, "") is None}
        job = replace(job, overrides={key: value for key, value in given.items() if key not in own})
        if (path / FAILED).is_file():
            return replace(
                job, state="failed", error=(path / FAILED).read_text(encoding="utf-8", errors="replace").strip()
            )
        if not is_finished(path):
            return job
        settings = with_values(record.get("settings", {}), record.get("follows_seed", {}))
        return replace(job, state="finished", metrics=_figures(path), settings=settings)
    except (ValueError, LookupError, TypeError, AttributeError, OSError, YAMLError, HydraException) as error:
        return replace(job, state="damaged", error=f"{type(error).__name__}: {error}")


def _overrides(path: Path, record: Mapping[str, Any]) -> Any:
    """As the job that ran recorded them; Hydra's own record is also that of a later job that was refused in this
    folder."""
    if record.get("command"):
        words = shlex.split(record["command"])[2:]
        return words[len(options(words)) :]
    return OmegaConf.to_container(OmegaConf.load(path / ".hydra" / "overrides.yaml"), resolve=False)


def _figures(path: Path) -> dict[str, float]:
    if (path / METRICS).is_file():
        found = percentages(read_json(path / METRICS))
        if not found:
            raise ValueError(f"{METRICS} holds no accuracy")
        return found
    metrics = read_json(path / TRAINING)
    validated = {"validation": 100 * metrics["val_accuracy"]} if "val_accuracy" in metrics else {}
    return {**validated, "test": 100 * metrics["test_accuracy"]}


def by_key(overrides: Any) -> dict[str, str]:
    """Hydra overrides as keys and values, each spelled in one way; without those of Hydra itself."""
    parsed = OverridesParser.create().parse_overrides([str(item) for item in overrides])
    return {
        one.get_key_element().lstrip("+"): _as_written(one.get_value_element_as_str())
        for one in parsed
        if not one.is_hydra_override()
    }


def _as_written(value: str) -> str:
    """Hydra hands true on as True."""
    return value.lower() if value.lower() in ("true", "false", "null") else value


def planned(overrides: Sequence[str]) -> list[dict[str, str]]:
    """Overrides of every job that a sweep is to do, as Hydra's own sweeper numbers them.

    Raises:
        HydraException: for ``glob``, which only Hydra itself can resolve.

    >>> planned(["a=1,2", "b=x"])
    [{'a': '1', 'b': 'x'}, {'a': '2', 'b': 'x'}]
    """
    parsed = {one.get_key_element(): one for one in OverridesParser.create().parse_overrides(list(overrides))}
    given = [[f"{key}={value}" for value in _values(one)] for key, one in parsed.items()]
    return [by_key(job) for job in itertools.product(*given)]


def _values(override: Override) -> list[str]:
    return (
        list(override.sweep_string_iterator())
        if override.is_sweep_override()
        else [override.get_value_element_as_str()]
    )


def _planned_in(sweep: Path) -> list[dict[str, str]]:
    hydra = _multirun(sweep)
    try:
        return planned(asked(hydra)) if hydra else []
    except HydraException:
        # With glob() only the jobs that began are known.
        return []


def _multirun(sweep: Path) -> Mapping[str, Any]:
    """Hydra's settings of a sweep; empty if its multirun.yaml is missing or cannot be read."""
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(sweep / "multirun.yaml"), resolve=False)
        return dict(found["hydra"])
    except (ValueError, LookupError, TypeError, OSError, YAMLError):
        return {}


def asked(hydra: Mapping[str, Any]) -> list[str]:
    """Overrides that a sweep was given, from Hydra's settings: those of the configuration, then those of the command
    line."""
    return [
        *(f"{key}={value}" for key, value in (hydra.get("sweeper", {}).get("params") or {}).items()),
        *_given(hydra, "task"),
    ]


def _given(hydra: Mapping[str, Any], kind: str) -> list[str]:
    return [str(one) for one in hydra.get("overrides", {}).get(kind) or []]


def check_goes_on(folder: Path, overrides: Sequence[str]) -> None:
    """Refuse to start a sweep over the finished jobs of another.

    Args:
        folder: where the sweep is to run; its jobs in numbered folders.
        overrides: of the sweep, as given on the command line.

    Raises:
        InputError: if a job of the sweep would run where another has finished.
    """
    try:
        jobs = planned(overrides)
    except HydraException:
        return
    for number, wanted in enumerate(jobs):
        path = folder / str(number)
        if not (path / ".hydra" / "overrides.yaml").is_file():
            continue
        job = _read_job(path, folder)
        if job.state == "finished" and job.overrides != wanted:
            raise InputError(
                f"{path} holds a finished job of another sweep; a sweep goes on with its own command only: choose "
                "another hydra.sweep.dir"
            )


def told_apart(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, with settings added to their overrides where overrides alone do not tell different jobs apart.

    So it is with jobs of sweeps that ran with other defaults, or of another program: their figures must not go into one
    mean.
    """
    alike: dict[str, list[dict[str, str]]] = {}
    for job in jobs:
        if job.state == "finished":
            alike.setdefault(json.dumps({**job.overrides, REPEATED: ""}, sort_keys=True), []).append(_flat(job))
    keys = dict.fromkeys(
        key
        for group in alike.values()
        for one in group
        for key in one
        if key != REPEATED and len({other[key] for other in group if key in other}) > 1
    )
    found = []
    for job in jobs:
        values = _flat(job) if job.state == "finished" else {}
        found.append(replace(job, overrides={**job.overrides, **{key: values[key] for key in keys if key in values}}))
    return found


def _flat(job: Job) -> dict[str, str]:
    """All settings that no override set, by dotted key, and which program ran."""

    def walk(settings: Mapping[str, Any], before: str) -> Iterator[tuple[str, str]]:
        for key, value in settings.items():
            if isinstance(value, dict):
                yield from walk(value, f"{before}{key}.")
            else:
                yield f"{before}{key}", json.dumps(value)

    # What a whole overridden group holds belongs to its name only, unless it follows other settings.
    groups = tuple(f"{key}." for key, value in job.overrides.items() if "${" in value)
    program = {"program": "train.py" if "validation" in job.metrics else "prune.py"}
    return program | {
        key: value for key, value in walk(job.settings, "") if key not in job.overrides and not key.startswith(groups)
    }


def counted_once(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, those marked that were done before with the same settings and seed."""
    found: list[Job] = []
    for job in jobs:
        done = [other for other in found if other.state == "finished"]
        again = job.state == "finished" and any(_what(job) == _what(other) for other in done)
        found.append(replace(job, state="repeated") if again else job)
    return found


def _what(job: Job) -> dict[str, str]:
    return {**job.overrides, REPEATED: str(job.settings.get(REPEATED, job.overrides.get(REPEATED, "")))}


def commands_of(folder: Path) -> list[str]:
    """The commands that started the sweeps in a folder, as far as Hydra left its multirun.yaml."""
    found = []
    for sweep in _sweeps(folder):
        hydra = _multirun(sweep)
        if "job" in hydra:
            given = [one for one in [*_given(hydra, "task"), *_given(hydra, "hydra")] if one != "hydra.mode=MULTIRUN"]
            found.append(" ".join([_program(sweep, hydra["job"]["name"]), "-m", shlex.join(given)]).strip())
    return found


def _program(sweep: Path, name: str) -> str:
    """What the first job that tells of itself was started by."""
    for path in _job_folders(sweep):
        with suppress(ValueError):
            if command := read_json(path / RUN).get("command"):
                program = f"freqprune {name}" if command.startswith("freqprune ") else f"python {name}.py"
                return " ".join([program, *map(shlex.quote, options(shlex.split(command)[2:]))])
    return f"python {name}.py"
