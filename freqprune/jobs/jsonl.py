"""A logger for scripts: every entry as a line of JSON, written as it is made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_only

from freqprune.jobs.csv_log import ResumedCSVLogger

METRICS_LINES = "metrics.jsonl"


class JSONLinesLogger(ResumedCSVLogger):
    """Write ``metrics.csv``, from which the report draws, and beside it ``metrics.jsonl``.

    A line holds ``step``, null for a stage of a pruning, ``epoch`` where it is known and whatever was logged; what is
    not finite is null. A script can follow the file while the job runs. Arguments are those of Lightning's
    ``CSVLogger``.
    """

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write an entry to both files.

        Args:
            metrics: numbers or tensors of one, by name.
            step: optimizer steps so far.
        """
        super().log_metrics(dict(metrics), step)
        self.write_line(metrics, step)

    def write_line(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write an entry as a line of JSON only; arguments as of `log_metrics`."""
        values = {name: float(value) for name, value in metrics.items()}
        line: dict[str, Any] = {"step": step}
        if "epoch" in values:
            line["epoch"] = int(values.pop("epoch"))
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        path = Path(self.log_dir) / METRICS_LINES
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
