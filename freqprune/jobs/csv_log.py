"""A logger of tables that a resumed training goes on with."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only

METRICS = "metrics.csv"


class ResumedCSVLogger(CSVLogger):
    """Lightning's ``CSVLogger``, but that a training resumed in its own folder keeps the rows of the epochs before.

    Rows of the epoch of the first new entry and of later ones, left by an interrupted run, go; so a new training, which
    begins with epoch 0, begins with an empty table. Arguments are those of ``CSVLogger``.
    """

    _earlier: list[dict[str, str]] | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Lightning's writer, which would remove an earlier table as it begins."""
        if self._experiment is None:
            path = Path(self.log_dir) / METRICS
            rows = _rows(path)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*Experiment logs directory .* exists and is not empty.*")
                writer = super().experiment
            if rows:
                writer.metrics_keys = sorted(rows[0])
                _write(path, rows)
                self._earlier = rows
        return self._experiment

    def forget(self) -> None:
        """Begin with an empty table: what was there is of another training."""
        self._earlier = None
        if self._experiment is not None:
            self._experiment.metrics_keys = []
        (Path(self.log_dir) / METRICS).unlink(missing_ok=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add an entry to the table.

        Args:
            metrics: numbers or tensors of one, by name.
            step: optimizer steps so far.
        """
        writer = self.experiment
        if self._earlier is not None and "epoch" in metrics:
            kept = list(compress(self._earlier, before(self._earlier, float(metrics["epoch"]))))
            path = Path(self.log_dir) / METRICS
            if kept:
                _write(path, kept)
            else:
                path.unlink(missing_ok=True)
                writer.metrics_keys = []
            self._earlier = None
        super().log_metrics(dict(metrics), step)

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged, once it is known which earlier rows stay."""
        if self._earlier is None:
            super().save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the rest; where no epoch had an entry, after all the earlier rows."""
        if self._experiment is not None and self._experiment.metrics:
            self._earlier = None
        super().finalize(status)


def before(entries: Sequence[Mapping[str, Any]], epoch: float) -> list[bool]:
    """Whether each entry is of an epoch before one; without an epoch, as learning rates are, by its steps."""
    known = [[None if one.get(key) in (None, "") else float(one[key]) for key in ("epoch", "step")] for one in entries]
    until = max((step for at, step in known if at is not None and at < epoch and step is not None), default=-1.0)
    return [step is not None and step <= until if at is None else at < epoch for at, step in known]


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=sorted(rows[0]))
        table.writeheader()
        table.writerows(rows)
    partial.replace(path)
