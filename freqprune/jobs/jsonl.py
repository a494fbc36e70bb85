"""A logger for scripts: every entry as a line of JSON, written as it is made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_only

from freqprune.jobs.csv_log import ResumedCSVLogger, before
from freqprune.reports import record

METRICS_LINES = "metrics.jsonl"


class JSONLinesLogger(ResumedCSVLogger):
    """Write ``metrics.csv``, from which the report draws, and beside it ``metrics.jsonl``.

    A line holds ``step``, null for a stage of a pruning, ``epoch`` where it is known and whatever was logged; what is
    not finite is null. A script can follow the file while the job runs. Lines of the epoch or stage of the first new
    entry and of later ones, left by an earlier run, go. Arguments are those of Lightning's ``CSVLogger``.
    """

    # Lines that an earlier run has left, until it is known which of them this one follows.
    _n_earlier: int | None = None
    _sorted_out = False

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
        if not self._sorted_out:
            self._sort_out(path, line)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _sort_out(self, path: Path, line: Mapping[str, Any]) -> None:
        """Leave of an earlier run what goes before the first entry that says where it belongs."""
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text and not text.endswith("\n"):
            # A run that was killed as it wrote has left part of a line.
            text = text[: text.rfind("\n") + 1]
            record.write_text(path, text)
        texts = text.splitlines()
        self._n_earlier = len(texts) if self._n_earlier is None else self._n_earlier
        if "epoch" not in line and not _stages(line):
            return
        self._sorted_out = True
        if self._n_earlier:
            kept = [*_lines_before(texts[: self._n_earlier], line), *texts[self._n_earlier :]]
            record.write_text(path, "".join(f"{one}\n" for one in kept))


def _lines_before(texts: Sequence[str], line: Mapping[str, Any]) -> list[str]:
    """Lines that a new one follows: of a training those of the epochs before; of a stage those of trainings, and those
    of stages up to its own."""
    found = [json.loads(text) for text in texts]
    if "epoch" in line:
        return list(compress(texts, before(found, line["epoch"])))
    own = _stages(line)
    first = next((i for i, one in enumerate(found) if _stages(one) & own), len(found))
    return [text for i, (text, one) in enumerate(zip(texts, found, strict=True)) if "epoch" in one or i < first]


def _stages(line: Mapping[str, Any]) -> set[str]:
    """Stages of a pruning that a line is of; none of a training."""
    trains = "epoch" in line or line["step"] is not None
    return set() if trains else {name.split("/")[0] for name in line if "/" in name}
