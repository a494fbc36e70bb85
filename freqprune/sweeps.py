"""What the jobs of a sweep found, in one table and one figure: python -m freqprune.sweeps FOLDER [FOLDER ...]"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from freqprune import figures
from freqprune.errors import InputError
from freqprune.page import SweepPage, write_page
from freqprune.report import STAGES, percentages, show
from freqprune.runs import FAILED, METRICS, TRAINING, is_finished, write_text

REPEATED, DEFAULT = "seed", "default"


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        name: its folder, as the sweep numbers it.
        state: ``"finished"``, ``"failed"``, ``"unfinished"`` (killed, or still running) or ``"not started"``.
        overrides: what was set on the command line for this job, by key.
        metrics: figures by name: accuracies in per cent, ``cut`` and ``params_cut`` in per cent of the dense network.
        error: why it failed.
    """

    name: str
    state: str
    overrides: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Group:
    """Jobs that differ in nothing but their seed.

    Attributes:
        settings: the overrides in which the groups differ.
        seeds: number of jobs.
        mean: mean of each figure.
        sd: sample standard deviation of each; NaN for a single job.
    """

    settings: dict[str, str]
    seeds: int
    mean: dict[str, float]
    sd: dict[str, float]

    @property
    def label(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.settings.items()) or "all jobs"


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
        return Job(name, "finished", overrides, _figures(path))
    if (path / FAILED).is_file():
        return Job(name, "failed", overrides, error=(path / FAILED).read_text().strip())
    return Job(name, "unfinished", overrides)


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


def _figures(path: Path) -> dict[str, float]:
    if (path / METRICS).is_file():
        return percentages(json.loads((path / METRICS).read_text()))
    metrics = json.loads((path / TRAINING).read_text())
    return {"validation": 100 * metrics["val_accuracy"], "test": 100 * metrics["test_accuracy"]}


def _differing(jobs: Sequence[Job]) -> list[str]:
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    return [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]


def grouped(jobs: Sequence[Job]) -> list[Group]:
    """Finished jobs, put together over seeds, in the order of the sweep."""
    done = [job for job in jobs if job.state == "finished"]
    differing = [key for key in _differing(done) if key != REPEATED]
    sorted_in: dict[tuple[str, ...], list[Job]] = {}
    for job in done:
        sorted_in.setdefault(tuple(job.overrides.get(key, DEFAULT) for key in differing), []).append(job)
    found = []
    for values, members in sorted_in.items():
        by_name = {name: [job.metrics[name] for job in members if name in job.metrics] for name in members[0].metrics}
        mean = {name: fmean(numbers) for name, numbers in by_name.items()}
        sd = {name: stdev(numbers) if len(numbers) > 1 else math.nan for name, numbers in by_name.items()}
        found.append(Group(dict(zip(differing, values, strict=True)), len(members), mean, sd))
    return found


COLUMNS = {
    "cut": "MACs cut, %", "params_cut": "parameters cut, %", **{stage: f"{stage}, %" for stage in STAGES}, "validation": "validation, %", "test": "test, %"
}  # fmt: skip


def _columns(groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """Settings in which the groups differ, and the figures that any of them has."""
    return list(groups[0].settings) if groups else [], [name for name in COLUMNS if any(name in group.mean for group in groups)]


def table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: settings, number of seeds, and mean ± standard deviation of every figure."""
    settings, names = _columns(groups)
    rows = []
    for group in groups:
        cells = [group.settings[key] for key in settings] + [str(group.seeds)]
        for name in names:
            mean, sd = group.mean.get(name), group.sd.get(name, math.nan)
            cells.append("" if mean is None else f"{mean:.2f}" + ("" if math.isnan(sd) else f" ± {sd:.2f}"))
        rows.append(cells)
    return [*settings, "seeds", *(COLUMNS[name] for name in names)], rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(markdown(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("|" + "|".join(cell if cell == "---" else f" {cell} ".replace("|", "\\|") for cell in line) + "|" for line in lines)


def _write_csv(path: Path, groups: Sequence[Group]) -> None:
    settings, names = _columns(groups)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*settings, "seeds", *(f"{name}_{what}" for name in names for what in ("mean", "sd"))])
        for group in groups:
            numbers = [value for name in names for value in (group.mean.get(name, math.nan), group.sd.get(name, math.nan))]
            writer.writerow([*group.settings.values(), group.seeds, *("" if math.isnan(v) else f"{v:.4f}" for v in numbers)])


def _lines(groups: Sequence[Group]) -> dict[str, list[Mapping[str, tuple[float, float]]]]:
    """Groups that differ in the amount removed only, as one line of the figure each."""
    amounts = ("pruning.ratio", "pruning.macs_cut", "pruning.threshold", "pruning.default_macs_cut")
    found: dict[str, list[Mapping[str, tuple[float, float]]]] = {}
    for group in groups:
        rest = {key: value for key, value in group.settings.items() if key not in amounts and value != DEFAULT}
        label = ", ".join(value if key == "importance" else f"{key.rsplit('.', 1)[-1]} {value}" for key, value in rest.items()) or "pruned"
        found.setdefault(label, []).append({name: (group.mean[name], group.sd[name]) for name in group.mean})
    return found


def gather(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write ``sweep.csv``, ``sweep.md``, ``figures/accuracy_over_cut.png`` and ``report.html`` of one or several sweeps.

    Args:
        folders: of the sweeps; their jobs go into one table.
        out: where to write; the first folder if left out.

    Returns:
        The folder written to.
    """
    jobs = [job for folder in folders for job in read_sweep(folder)]
    groups = grouped(jobs)
    lost = [job for job in jobs if job.state != "finished"]
    out = Path(out or folders[0])
    out.mkdir(parents=True, exist_ok=True)
    header, rows = table(groups)
    text = markdown(header, rows) + "\n" if groups else "No job has finished.\n"
    differing = _differing(jobs)
    missing = [[job.name, job.state, ", ".join(f"{k}={job.overrides.get(k, DEFAULT)}" for k in differing), job.error.split("\n")[0]] for job in lost]
    if lost:
        text += f"\n{len(lost)} of {len(jobs)} jobs are missing:\n\n" + markdown(["job", "state", "overrides", "error"], missing) + "\n"
    write_text(out / "sweep.md", text)
    _write_csv(out / "sweep.csv", groups)
    drawn = [group for group in groups if "cut" in group.mean]
    if drawn:
        figures.save(figures.accuracy_over_cut(_lines(drawn)), out / "figures" / "accuracy_over_cut.png")
    write_page(out, SweepPage([str(folder) for folder in folders], len(jobs), header, rows, missing))
    show(text.rstrip("\n"), f"written to {out}: sweep.csv, sweep.md, report.html")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m freqprune.sweeps", description="Gather the jobs of sweeps into one table, figure and report.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of a sweep, such as multirun/prune/<time>")
    parser.add_argument("--out", metavar="FOLDER", help="where to write; the first folder if left out")
    arguments = parser.parse_args()
    try:
        gather(arguments.folders, arguments.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
