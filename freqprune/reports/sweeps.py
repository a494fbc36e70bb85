"""What the jobs of a sweep found, in one table and one figure: python -m freqprune.reports.sweeps FOLDER [FOLDER
...]"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np

from freqprune.errors import InputError
from freqprune.reports.drawing import save
from freqprune.reports.labels import DEFAULT, in_words, without_shared_folders
from freqprune.reports.page import OF_A_SWEEP, SweepPage, write_page
from freqprune.reports.record import METRICS, RUN, read_json, write_text
from freqprune.reports.run_figures import accuracy_over_cut, kept_over_depth, medians_over_depth
from freqprune.reports.sweep_command import sweep_arguments
from freqprune.reports.sweep_jobs import REPEATED, Job, commands_of, counted_once, read_sweep, told_apart
from freqprune.reports.tables import STAGES, layer_medians
from freqprune.reports.terminal import is_quiet, show, show_folder


@dataclass(frozen=True)
class Group:
    """Jobs that differ in nothing but their seed.

    Attributes:
        settings: the overrides in which the groups differ.
        jobs: the jobs.
        mean: mean of each figure.
        sd: sample standard deviation of each; NaN for a single job.
    """

    settings: dict[str, str]
    jobs: tuple[Job, ...]
    mean: dict[str, float]
    sd: dict[str, float]

    @property
    def seeds(self) -> int:
        """Number of jobs."""
        return len(self.jobs)

    def label(self, alone: str, without: Sequence[str] = ()) -> str:
        """The settings in words for a figure, but for some; `alone` where nothing else tells groups apart."""
        return in_words(self.settings, without) or (DEFAULT if set(self.settings) - set(without) else alone)


def _differing(jobs: Sequence[Job]) -> list[str]:
    known = [job.overrides for job in jobs if job.overrides or job.state != "damaged"]
    keys = dict.fromkeys(key for overrides in known for key in overrides)
    return [key for key in keys if len({overrides.get(key) for overrides in known}) > 1]


def grouped(jobs: Sequence[Job]) -> list[Group]:
    """Finished jobs, put together over seeds, in the order of the sweep."""
    done = [job for job in jobs if job.state == "finished"]
    differing = [key for key in _differing(jobs) if key != REPEATED]
    sorted_in: dict[tuple[str, ...], list[Job]] = {}
    for job in done:
        sorted_in.setdefault(tuple(job.overrides.get(key, DEFAULT) for key in differing), []).append(job)
    found = []
    for values, members in sorted_in.items():
        by_name: dict[str, list[float]] = {}
        for job in members:
            for name, number in job.metrics.items():
                by_name.setdefault(name, []).append(number)
        mean = {name: float(np.mean(numbers)) for name, numbers in by_name.items()}
        sd = {
            name: float(np.std(numbers, ddof=1)) if len(numbers) > 1 else math.nan for name, numbers in by_name.items()
        }
        found.append(Group(dict(zip(differing, values, strict=True)), tuple(members), mean, sd))
    return found


COLUMNS = {
    "cut": "MACs cut, %",
    "params_cut": "parameters cut, %",
    "time_cut": "time cut, %",
    **{stage: f"{stage}, %" for stage in STAGES},
    "validation": "validation, %",
    "test": "test, %",
}


def _columns(groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """Settings in which the groups differ, and the figures that any of them has."""
    return list(groups[0].settings) if groups else [], [
        name for name in COLUMNS if any(name in group.mean for group in groups)
    ]


def table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: settings, number of seeds, and mean ± standard deviation of every figure."""
    settings, names = _columns(groups)
    rows = []
    for group in groups:
        cells = [group.settings[key] for key in settings] + [str(group.seeds)]
        for name in names:
            mean, sd = group.mean.get(name), group.sd.get(name, math.nan)
            measured = sum(name in job.metrics for job in group.jobs)
            note = f" ({measured} of {group.seeds})" if 0 < measured < group.seeds else ""
            cells.append("" if mean is None else f"{mean:.2f}" + ("" if math.isnan(sd) else f" ± {sd:.2f}") + note)
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
    return "\n".join(
        "|" + "|".join(cell if cell == "---" else f" {cell} ".replace("|", "\\|") for cell in line) + "|"
        for line in lines
    )


def _write_csv(path: Path, groups: Sequence[Group]) -> None:
    settings, names = _columns(groups)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*settings, "seeds", *(f"{name}_{what}" for name in names for what in ("mean", "sd"))])
        for group in groups:
            numbers = [
                value for name in names for value in (group.mean.get(name, math.nan), group.sd.get(name, math.nan))
            ]
            writer.writerow(
                [*group.settings.values(), group.seeds, *("" if math.isnan(v) else f"{v:.4f}" for v in numbers)]
            )


AMOUNTS = (
    "pruning.ratio", "pruning.macs_cut", "pruning.threshold", "pruning.default_macs_cut", "pruning.latency_cut",
    "pruning.latency_ms",
)  # fmt: skip


def _lines(groups: Sequence[Group]) -> dict[str, list[Mapping[str, tuple[float, float]]]]:
    """Groups that differ in the amount removed only, as one line of the figure each."""
    found: dict[str, list[Mapping[str, tuple[float, float]]]] = {}
    for group in groups:
        found.setdefault(group.label("pruned", AMOUNTS), []).append(
            {name: (group.mean[name], group.sd[name]) for name in group.mean}
        )
    return found


def _draw(groups: Sequence[Group], folder: Path) -> None:
    """Figures of what was compared, as far as the jobs left what they show; those of an earlier gathering go."""
    for name in OF_A_SWEEP:
        (folder / f"{name}.png").unlink(missing_ok=True)
    for key in list(groups[0].settings) if groups else ():
        short = without_shared_folders([group.settings[key] for group in groups])
        groups = [
            replace(group, settings={**group.settings, key: value}) for group, value in zip(groups, short, strict=True)
        ]
    drawn = [group for group in groups if "cut" in group.mean]
    if drawn:
        save(accuracy_over_cut(_lines(drawn)), folder / "accuracy_over_cut.png")
    timed = [group for group in drawn if "time_cut" in group.mean]
    if timed:
        save(accuracy_over_cut(_lines(timed), "time_cut"), folder / "accuracy_over_time.png")
    kept = {group.label("all jobs"): shares for group in drawn if (shares := _shares_kept(group))}
    if kept:
        save(kept_over_depth(kept), folder / "kept_over_depth.png")
    labels = {"part_preference": "(A first - A second part) / sum", "integration": "intermodulation / fundamentals"}
    for name, label in labels.items():
        lines: dict[str, Mapping[str, float]] = {}
        for group in groups:
            if found := _medians(group):
                lines.setdefault(group.label("all jobs", AMOUNTS), found[name])
        if lines:
            save(medians_over_depth(_merged(lines), label), folder / f"{name}.png")


def _shares_kept(group: Group) -> dict[str, float]:
    """Share of the filters kept in each layer, mean over the jobs."""
    shares: dict[str, list[float]] = {}
    for job in group.jobs:
        metrics = read_json(job.folder / METRICS) if job.folder else {}
        widths = metrics.get("widths", {})
        # A layer that went altogether keeps none.
        for layer, width in widths.items():
            shares.setdefault(layer, []).append(metrics.get("kept", {}).get(layer, 0) / width)
    return {layer: fmean(values) for layer, values in shares.items()}


def _medians(group: Group) -> dict[str, dict[str, float]]:
    folder = group.jobs[0].folder
    return layer_medians(folder / "layers.csv") if folder and (folder / "layers.csv").is_file() else {}


def _merged(lines: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Lines that are the same, as those of one network tagged alike are, become one."""
    same: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, by_layer in lines.items():
        same.setdefault(tuple((layer, f"{value:.6g}") for layer, value in by_layer.items()), []).append(name)
    return {
        names[0] + (f" and {len(names) - 1} more" if len(names) > 1 and len(same) > 1 else ""): lines[names[0]]
        for names in same.values()
    }


def _names(paths: Sequence[Path]) -> list[str]:
    """What tells folders apart; by their own names if that does."""
    names = [path.resolve().name for path in paths]
    return (
        names
        if len(set(names)) == len(names)
        else without_shared_folders([path.resolve().as_posix() for path in paths])
    )


def _in_folder(job: Job, folder: str) -> Job:
    return replace(job, name=folder if job.name == "." else f"{folder}/{job.name}")


def gather(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write ``sweep.csv``, ``sweep.md``, ``report.html`` and the figures of one or several sweeps.

    Args:
        folders: of the sweeps; their jobs go into one table.
        out: where to write; the first folder if left out.

    Returns:
        The folder written to.

    Raises:
        InputError: if a folder holds no jobs, or if the report of a single run would be overwritten.
    """
    paths = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    out = Path(out or paths[0])
    if (out / RUN).is_file():
        raise InputError(
            f"{out} is the folder of a single run, whose report would be overwritten; give another with --out"
        )
    names = _names(paths)
    read = [
        _in_folder(job, name) if len(paths) > 1 else job
        for path, name in zip(paths, names, strict=True)
        for job in read_sweep(path)
    ]
    jobs = counted_once(told_apart(read))
    groups = grouped(jobs)
    lost = [job for job in jobs if job.state != "finished"]
    out.mkdir(parents=True, exist_ok=True)
    header, rows = table(groups)
    text = markdown(header, rows) + "\n" if groups else "No job has finished.\n"
    differing = _differing(jobs)
    missing = [
        [
            job.name,
            job.state,
            ", ".join(f"{k}={job.overrides.get(k, DEFAULT)}" for k in differing),
            job.error.split("\n")[0],
        ]
        for job in lost
    ]
    if lost:
        text += (
            f"\n{len(lost)} of {len(jobs)} jobs are missing:\n\n"
            + markdown(["job", "state", "overrides", "error"], missing)
            + "\n"
        )
    write_text(out / "sweep.md", text)
    _write_csv(out / "sweep.csv", groups)
    _draw(groups, out / "figures")
    commands = [command for path in paths for command in commands_of(path)]
    runs = [
        (", ".join(f"{k}={job.overrides.get(k, DEFAULT)}" for k in differing), job.folder)
        for job in jobs
        if job.state == "finished" and job.folder
    ]
    write_page(out, SweepPage(names, len(jobs), header, rows, missing, commands, runs))
    show(text.rstrip("\n"), f"written to {out}: sweep.csv, sweep.md, report.html")
    if is_quiet():
        show_folder(out)
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m freqprune.reports.sweeps``: gather the sweeps in the folders given."""
    given = sweep_arguments(arguments, "python -m freqprune.reports.sweeps")
    try:
        gather(given.folders, given.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
