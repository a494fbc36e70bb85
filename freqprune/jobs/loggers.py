"""Loggers with a page of their own, TensorBoard and Weights & Biases, get what a job draws and its tables as well."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from freqprune.errors import InputError
from freqprune.jobs.jsonl import JSONLinesLogger
from freqprune.jobs.settings import Settings
from freqprune.reports import drawn, markdown, record, tables

# Rows of a table that is shown as text.
MOST_ROWS = 2000
# Extras of the package by the logger that needs them.
EXTRAS = {"TensorBoardLogger": "tensorboard", "WandbLogger": "wandb"}

Table = tuple[list[str], list[list[str]]]


def make_logger(settings: Settings, folder: Path) -> Logger | None:
    """The logger that is asked for, if one is.

    Args:
        settings: of the job.
        folder: where it writes; one below the job's is that of a part, which W&B keeps apart by its name.

    Raises:
        InputError: if its package is missing.
    """
    given = dict(settings.logger)
    if not given.get("_target_"):
        return None
    name = str(given["_target_"]).rsplit(".", 1)[-1]
    if name == "WandbLogger" and folder != settings.out:
        given["prefix"] = folder.name
    try:
        found = instantiate({**given, "save_dir": str(folder)})
    except InstantiationException as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        extra = EXTRAS.get(name)
        hint = f": pip install 'freqprune[{extra}]'" if extra else ""
        raise InputError(f"logger = {name} needs a package that is not installed ({error.__cause__}){hint}") from None
    assert isinstance(found, Logger)
    return found


def log_stage(logger: Logger | None, stage: str, metrics: Mapping[str, Any]) -> None:
    """Send the numbers among the metrics of a stage of a pruning; a ``metrics.csv`` is of a training alone, and
    stays."""
    numbers = {f"{stage}/{name}": float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    if isinstance(logger, JSONLinesLogger):
        logger.write_line(numbers)
    elif logger is not None and not isinstance(logger, CSVLogger):
        logger.log_metrics(numbers)


def log_results(logger: Logger | None, out: Path, last: bool = True) -> None:
    """Send the figures and tables of a job to TensorBoard or W&B, or to any logger with Lightning's `log_image` and
    `log_table`; others have no place for them.

    Args:
        logger: where to.
        out: the folder of the job.
        last: nothing follows, and a run that has an end ends here.
    """
    board = isinstance(logger, TensorBoardLogger)
    if not board and not (hasattr(logger, "log_image") and hasattr(logger, "log_table")):
        return
    to: Any = logger
    for path, caption in drawn(out).items():
        if board:
            pixels = (255 * matplotlib.image.imread(path)[..., :3]).round().astype(np.uint8)
            to.experiment.add_image(f"figures/{path.stem}", pixels, dataformats="HWC")
        else:
            to.log_image(key=f"figures/{path.stem}", images=[str(path)], caption=[caption])
    for name, (header, rows) in results(out).items():
        if board:
            more = f"\n\n{len(rows) - MOST_ROWS} more rows are in the folder of the job." if rows[MOST_ROWS:] else ""
            text = [[cell.replace("\n", " ") for cell in row] for row in rows[:MOST_ROWS]]
            to.experiment.add_text(f"tables/{name}", markdown(header, text) + more)
        else:
            to.log_table(key=f"tables/{name}", columns=header, data=_typed(header, rows))
    if board:
        to.experiment.flush()
    elif last and hasattr(to.experiment, "finish"):
        to.experiment.finish()


def results(out: Path) -> dict[str, Table]:
    """Tables of a job by name: ``stages`` and ``kept`` of a cut, ``filters`` with what each answers to, of the last
    tagged epoch where there was no cut."""
    metrics = record.read_json(out / record.METRICS)
    found: dict[str, Table] = {}
    if metrics:
        found["stages"] = tables.stage_rows(metrics)
    if "kept" in metrics:
        found["kept"] = _kept(metrics)
    if (out / "filters.csv").is_file():
        found["filters"] = _filters(out / "filters.csv")
    elif (out / "importance.csv").is_file():
        found["filters"] = _of_the_last_epoch(out / "importance.csv")
    return found


def _kept(metrics: Mapping[str, Any]) -> Table:
    each = ((layer, width, metrics["kept"].get(layer, 0)) for layer, width in metrics["widths"].items())
    rows = [[layer, str(width), str(number), f"{100 * number / width:.1f}"] for layer, width, number in each]
    return ["layer", "filters", "kept", "kept, %"], rows


def _filters(path: Path) -> Table:
    """A row for each filter, with its SNR at every component, from a ``filters.csv``."""
    components: dict[str, None] = {}
    rows: list[list[str]] = []
    with path.open(newline="", encoding="utf-8") as file:
        for (layer, number), readings in itertools.groupby(
            csv.DictReader(file), lambda row: (row["layer"], row["filter"])
        ):
            of_one = list(readings)
            components |= dict.fromkeys(row["component"] for row in of_one)
            rows.append([layer, number, of_one[0]["important"], *(row["snr"] for row in of_one)])
    return ["layer", "filter", "important", *(f"SNR {name}" for name in components)], rows


def _of_the_last_epoch(path: Path) -> Table:
    rows: list[dict[str, str]] = []
    with path.open(newline="", encoding="utf-8") as file:
        # An epoch at a time: those of all may be more than memory holds.
        for _, of_one in itertools.groupby(csv.DictReader(file), lambda row: row["epoch"]):
            rows = list(of_one)
    header = [name for name in rows[0] if name not in ("epoch", "layer_index") and not name.startswith("amplitude_")]
    return header, [[row[name] for name in header] for row in rows]


def _typed(header: list[str], rows: list[list[str]]) -> list[list[float | str | None]]:
    """Columns of numbers as numbers, so that they sort: first lines only, None for what is missing. Names of layers are
    names, also where they look like numbers: 0.1 and 0.10."""
    columns: list[list[float | str | None]] = []
    for title, cells in zip(header, zip(*rows, strict=True), strict=True):
        first = [cell.split("\n")[0] for cell in cells]
        columns.append(list(cells))
        if title != "layer":
            with suppress(ValueError):
                columns[-1] = [float(cell) if cell else None for cell in first]
    return [list(row) for row in zip(*columns, strict=True)]
