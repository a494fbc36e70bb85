"""`report.html`: what a run or a sweep did and found, on one page that needs no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from freqprune.report import percentages, stage_rows
from freqprune.runs import METRICS, RUN, TRAINING, write_text

# Figures in the order of the page: file name without its ending, caption.
CAPTIONS = {
    "accuracy_over_cut": "Test accuracy over the share of MACs removed: mean over seeds, bars of one standard deviation.",
    "training_curves": "Loss and accuracy over training.",
    "kept_per_layer": "Filters kept in each layer that could lose some.",
    "important_filters": "Filters that answer the tags, layer by layer.",
    "important_last_epoch": "Filters that answered the tags after the last tagged epoch.",
    "important_over_epochs": "Share of important filters over training.",
    "ranking_over_epochs": "How early the final ranking of the filters is known.",
    "part_preference": "Which part drives each filter.",
    "integration": "How much each filter combines the parts.",
    "spectra_": "SNR spectra of a layer's filters: harmonics of each part, and intermodulation. Values above the axis are drawn on it.",
    "snr_bins": "One SNR in its bins: the response and the noise bins around it.",
    "stimulus": "The stimulus: tagged frames, the scale of each part over time, and its spectrum.",
}


@dataclass(frozen=True)
class SweepPage:
    """What the page of a sweep tells: folders, number of jobs, the table, and the jobs that are missing (name, state, overrides, error)."""

    folders: Sequence[str]
    n_jobs: int
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    missing: Sequence[Sequence[str]]


def write_page(folder: Path, sweep: SweepPage | None = None) -> Path:
    """Write ``report.html`` from what else lies in a folder.

    Args:
        folder: of a run that has finished, or where a sweep was gathered.
        sweep: for the page of a sweep.

    Returns:
        The file.
    """
    content = _of_a_run(folder) if sweep is None else _of_a_sweep(sweep)
    content["figures"] = _figures(folder / "figures")
    environment = Environment(loader=PackageLoader("freqprune"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return write_text(folder / "report.html", environment.get_template("report.html.j2").render(content))


def _of_a_sweep(sweep: SweepPage) -> dict[str, Any]:
    tables = [{"caption": "Mean ± standard deviation over seeds; accuracies on the test images.", "header": sweep.header, "rows": sweep.rows}]
    notes = []
    if sweep.missing:
        notes.append(f"{len(sweep.missing)} of {sweep.n_jobs} jobs are missing from the table; they are listed below it.")
        tables.append({"caption": "Missing jobs", "header": ["job", "state", "overrides", "error"], "rows": sweep.missing})
    title = "Sweep: " + ", ".join(Path(folder).name for folder in sweep.folders)
    done = f"{sweep.n_jobs - len(sweep.missing)} of {sweep.n_jobs} jobs finished."
    return {"title": title, "done": done, "notes": notes, "tables": tables if sweep.rows else tables[1:], "run": None, "settings": ""}


def _of_a_run(folder: Path) -> dict[str, Any]:
    run = json.loads((folder / RUN).read_text())
    metrics = json.loads((folder / METRICS).read_text()) if (folder / METRICS).is_file() else {}
    training = json.loads((folder / TRAINING).read_text()) if (folder / TRAINING).is_file() else {}
    settings = run["settings"]
    done, tables = [], []
    model = metrics.get("network") or settings["model"].get("name") or "The network"
    title = [model]
    if training:
        done.append(f"{model} was trained for {_count(training['epochs'], 'epoch')} in {training['seconds']:.0f} s.")
        rows = [["validation", f"{100 * training['val_accuracy']:.2f}"], ["test", f"{100 * training['test_accuracy']:.2f}"]]
        tables.append({"caption": "After the last epoch of training", "header": ["images", "accuracy, %"], "rows": rows})
    if metrics:
        tags = settings["tagging"]
        freqs = " and ".join(f"{freq:g}" for freq in tags["tag_freqs"])
        frames = f"{tags['n_frames']} frames at {tags['frame_rate']:g} frames/s, pixel noise sd {tags['noise_std']:g}"
        done.append(f"It was tagged at {freqs} Hz ({tags['parts']}), {frames}, {_count(tags['n_images'], 'image')}.")
        header, rows = stage_rows(metrics)
        tables.append({"caption": "Stages; changes are from the dense network. MACs are those of convolutions and linear layers for one image.",
                       "header": header, "rows": rows})  # fmt: skip
        if "pruned" in metrics:
            criterion, share = settings["importance"]["criterion"], f"{percentages(metrics)['cut']:.1f} % of the MACs"
            done.append(f"{share} were cut; filters were kept by {criterion}.")
            title += [f"filters kept by {criterion}", f"{share} cut"]
        if "finetuned" in metrics:
            done.append(f"The smaller network was fine-tuned for {_count(settings['finetune']['epochs'], 'epoch')}.")
    return {
        "title": ", ".join([*title, f"seed {settings['seed']}"]),
        "done": " ".join(done), "notes": metrics.get("remarks", []), "tables": tables, "run": run,
        "settings": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
    }  # fmt: skip


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _figures(folder: Path) -> list[dict[str, str]]:
    found = []
    for start, caption in CAPTIONS.items():
        for path in sorted(folder.glob(f"{start}*.png" if start.endswith("_") else f"{start}.png")):
            found.append({"name": path.stem, "caption": caption, "data": base64.b64encode(path.read_bytes()).decode()})
    return found
