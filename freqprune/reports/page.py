"""`report.html`: what a run or a sweep did and found, on one page that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from freqprune.reports.record import METRICS, RUN, TRAINING, read_json, write_text
from freqprune.reports.tables import percentages, stage_rows, timed_on

# Figures in the order of the page: file name without its ending, caption.
CAPTIONS = {
    "accuracy_over_cut": "Test accuracy over the share of MACs removed.",
    "accuracy_over_time": "Test accuracy over the share of the time of a forward removed, at the batch that the "
    "cut was asked for, or else the largest timed.",
    "training_curves": "Loss and accuracy over training.",
    "kept_per_layer": "Filters kept in each layer that could lose some.",
    "important_filters": "Important filters, layer by layer.",
    "important_last_epoch": "Important filters after the last tagged epoch.",
    "important_over_epochs": "Share of important filters over training.",
    "ranking_over_epochs": "How early the final ranking of the filters is known.",
    "part_preference": "Which part drives each filter.",
    "integration": "How much each filter combines the parts.",
    "spectra_": "SNR spectra of a layer's filters: harmonics of each part, and intermodulation. Values above the axis "
    "are drawn on it.",
    "snr_bins": "One SNR in its bins: the response and the noise bins around it.",
    "stimulus": "The stimulus: tagged frames, the scale of each part over time, and its spectrum.",
}


# What the page of a sweep shows: figures of its own, and of its first job.
OF_A_SWEEP = {
    "accuracy_over_cut": "Test accuracy over the share of MACs removed: mean over seeds, bars of one standard "
    "deviation.",
    "accuracy_over_time": "Test accuracy over the share of the time of a forward removed, at the batch that the "
    "cut was asked for, or else the largest timed.",
    "kept_over_depth": "Filters kept in each layer, mean over seeds.",
    "part_preference": "Which part drives the filters: median of each layer before pruning, in the first job of each "
    "kind.",
    "integration": "How much the filters combine the parts: median of each layer before pruning, in the first job of "
    "each kind.",
}
OF_THE_FIRST = ("spectra_", "snr_bins", "stimulus")


@dataclass(frozen=True)
class SweepPage:
    """What the page of a sweep tells.

    Attributes:
        folders: names of the folders of the sweeps.
        n_jobs: number of jobs, finished or not.
        header: of the table.
        rows: of the table.
        missing: name, state, overrides and error of jobs that are not in the table.
        commands: that started the sweeps.
        finished: the settings in which the jobs differ, and the folder, of every finished job.
    """

    folders: Sequence[str]
    n_jobs: int
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    missing: Sequence[Sequence[str]]
    commands: Sequence[str]
    finished: Sequence[tuple[str, Path]]


def write_page(folder: Path, sweep: SweepPage | None = None) -> Path:
    """Write ``report.html`` from what else lies in a folder.

    Args:
        folder: of a run that has finished, or where a sweep was gathered.
        sweep: for the page of a sweep.

    Returns:
        The file.
    """
    if sweep is None:
        content, shown = _of_a_run(folder), _figures(folder, CAPTIONS)
    else:
        content, shown = _of_a_sweep(sweep), _figures(folder, OF_A_SWEEP)
        for label, first in sweep.finished[:1]:
            note = f" (Job {first.name}: {label}.)" if label else ""
            shown += [
                {**one, "caption": one["caption"] + note}
                for one in _figures(first, {name: CAPTIONS[name] for name in OF_THE_FIRST})
            ]
    content = {**content, "figures": shown, "explorer": (folder / "explore.html").is_file()}
    return write_text(folder / "report.html", rendered("report.html.j2", content))


def rendered(template: str, content: Mapping[str, Any]) -> str:
    """A template of the package with its places filled."""
    environment = Environment(
        loader=PackageLoader("freqprune.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(content)


def embedded(path: Path) -> str:
    """A file as text that a page can hold."""
    return base64.b64encode(path.read_bytes()).decode()


def _of_a_sweep(sweep: SweepPage) -> dict[str, Any]:
    recorded = [folder for _, folder in sweep.finished if (folder / RUN).is_file()]
    runs, metrics = (
        [read_json(folder / RUN) for folder in recorded],
        [read_json(folder / METRICS) for folder in recorded],
    )
    tables = [
        {
            "caption": "Mean ± standard deviation over seeds; accuracies on the test images where nothing else is "
            "said.",
            "header": sweep.header,
            "rows": sweep.rows,
        }
    ]
    notes = []
    if sweep.missing:
        notes.append(
            f"{len(sweep.missing)} of {sweep.n_jobs} jobs are missing from the table; they are listed below it."
        )
        tables.append(
            {"caption": "Missing jobs", "header": ["job", "state", "overrides", "error"], "rows": sweep.missing}
        )
    done = [f"{sweep.n_jobs - len(sweep.missing)} of {sweep.n_jobs} jobs are in the table."]
    networks = dict.fromkeys(one["network"] for one in metrics if "network" in one)
    if networks:
        done.append(f"{'Network' if len(networks) == 1 else 'Networks'}: {' and '.join(networks)}.")
    told = [_what_was_done(run.get("settings", {}), one) for run, one in zip(runs, metrics, strict=True)]
    # What some jobs did differently is in the table.
    done += [sentence for sentence in (told[0] if told else []) if all(sentence in others for others in told)]
    seeds = sorted({run["settings"]["seed"] for run in runs if "seed" in run.get("settings", {})})
    versions = _one_of_each([run.get("versions", {}) for run in runs])
    return {
        "title": "Sweep: " + ", ".join(sweep.folders),
        "done": " ".join(done),
        "notes": notes,
        "tables": tables if sweep.rows else tables[1:],
        "kind": "sweep",
        "commands": sweep.commands,
        "versions": versions,
        "machine": {"system": "unknown system", "cores": "unknown"}
        | _one_of_each([run.get("machine", {}) for run in runs]),
        "seeds": _listed(seeds),
        "settings": as_text(runs[0].get("settings", {})) if runs else "",
        "settings_of": f"All settings of job {recorded[0].name}" if runs else "",
    }


def _of_a_run(folder: Path) -> dict[str, Any]:
    run = read_json(folder / RUN)
    metrics, training = read_json(folder / METRICS), read_json(folder / TRAINING)
    settings = run["settings"]
    done, tables = [], []
    model = metrics.get("network") or settings["model"].get("name") or "The network"
    title = [model]
    if training:
        here = training.get("epochs_here", training["epochs"])
        last = "" if here == training["epochs"] else f", the last {here} of them" if here else ", none of them now"
        done.append(
            f"{model} was trained for {_count(training['epochs'], 'epoch')}{last} in {training['seconds']:.0f} s."
        )
        told = {"validation": "val_accuracy", "test": "test_accuracy", "test, among five": "test_top5"}
        rows = [[name, f"{100 * training[key]:.2f}"] for name, key in told.items() if key in training]
        tables.append(
            {"caption": "After the last epoch of training", "header": ["images", "accuracy, %"], "rows": rows}
        )
    if metrics:
        header, rows = stage_rows(metrics)
        timed = f" Times are of forwards on {timed_on(metrics)}." if "timed_on" in metrics else ""
        tables.append({"caption": "Stages; changes are from the dense network. MACs are those of convolutions and "
                                  f"linear layers for one image.{timed}",
                       "header": header, "rows": rows})  # fmt: skip
    if "pruned" in metrics:
        title += [
            f"filters kept by {settings['importance']['criterion']}",
            f"{percentages(metrics)['cut']:.1f} % of the MACs cut",
        ]
    return {
        "title": ", ".join([*title, f"seed {settings['seed']}"]),
        "done": " ".join([*done, *_what_was_done(settings, metrics)]),
        "notes": metrics.get("remarks", []),
        "tables": tables,
        "kind": "run",
        "commands": [run["command"]] if run["command"] else [],
        "versions": run["versions"],
        "machine": run["machine"],
        "seeds": str(settings["seed"]),
        "settings": as_text(settings),
        "settings_of": "All settings",
    }


def _what_was_done(settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    """In sentences, from the settings and `metrics.json` of a run; none for a training run."""
    if not metrics or "tagging" not in settings:
        return []
    tags = settings["tagging"]
    freqs = " and ".join(f"{freq:g}" for freq in tags["tag_freqs"])
    frames = f"{tags['n_frames']} frames at {tags['frame_rate']:g} frames/s, pixel noise sd {tags['noise_std']:g}"
    done = [
        f"It was tagged at {freqs} Hz ({tags['parts']}), {frames}, "
        f"{_count(metrics.get('tagged_images', tags['n_images']), 'image')}."
    ]
    if "pruned" in metrics:
        done += [
            f"{percentages(metrics)['cut']:.1f} % of the MACs were cut.",
            f"Filters were kept by {settings['importance']['criterion']}.",
        ]
    for stage, what in (
        ("finetuned", "The smaller network was fine-tuned"),
        ("from_scratch", "One of the same widths was trained from scratch"),
    ):
        if stage in metrics:
            # Runs of earlier versions did not count them.
            epochs = metrics[stage].get("epochs", settings["finetune"]["epochs"])
            done.append(f"{what} for {_count(epochs, 'epoch')}.")
    return done


def as_text(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)


def _one_of_each(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Values by name, those that the records do not share side by side."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: " / ".join(dict.fromkeys(str(record.get(name, "unknown")) for record in records)) for name in names}


def _listed(values: Sequence[Any]) -> str:
    words = [str(value) for value in values]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def drawn(folder: Path, captions: Mapping[str, str] = CAPTIONS) -> dict[Path, str]:
    """The figures of a job by file, in the order of its page, with their captions.

    Args:
        folder: of the job.
        captions: by the name of the file, or its beginning up to a ``_``.
    """
    return {
        path: caption
        for start, caption in captions.items()
        for path in sorted((folder / "figures").glob(f"{start}*.png" if start.endswith("_") else f"{start}.png"))
    }


def _figures(folder: Path, captions: Mapping[str, str]) -> list[dict[str, str]]:
    return [
        {"name": path.stem, "caption": caption, "data": embedded(path)}
        for path, caption in drawn(folder, captions).items()
    ]
