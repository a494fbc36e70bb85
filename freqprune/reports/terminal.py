"""What a run tells on the terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from freqprune.reports.tables import stage_rows


def stage_table(metrics: Mapping[str, Any], title: str = "") -> Table:
    """`stage_rows` for the terminal, below a title."""
    header, rows = stage_rows(metrics)
    table = Table(title=title, title_justify="left")
    for heading in header:
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def is_quiet() -> bool:
    """Whether ``--quiet`` was said, here or by the process that started this one: no tables and no bars."""
    return os.environ.get("FREQPRUNE_QUIET", "") not in ("", "0")


def show_folder(out: Path) -> None:
    """Print where everything is; the folder alone, for scripts, with ``--quiet``."""
    print(out) if is_quiet() else show(f"everything in {out}")


def show(*items: Any) -> None:
    """Print to the terminal, unless that is to be quiet; wide enough for the tables when piped."""
    if is_quiet():
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for item in items:
        console.print(item, highlight=False, markup=False, soft_wrap=True) if isinstance(item, str) else console.print(
            item
        )
