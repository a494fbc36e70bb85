"""What a run tells on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
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


def show(*items: Any) -> None:
    """Print to the terminal; wide enough for the tables when piped."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for item in items:
        console.print(item, highlight=False, markup=False, soft_wrap=True) if isinstance(item, str) else console.print(
            item
        )
