"""What ``freqprune sweep`` is asked for, read before figures and tables are imported, which takes seconds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def sweep_arguments(words: Sequence[str] | None, program: str) -> argparse.Namespace:
    """Folders of sweeps (``folders``) and where to write (``out``); words that are none of these end the program.

    Args:
        words: of the command line; those of this process if left out.
        program: how it is called.
    """
    parser = argparse.ArgumentParser(
        prog=program, description="Gather the jobs of sweeps into one table, figure and report."
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of a sweep, such as multirun/prune/<time>")
    parser.add_argument("--out", metavar="FOLDER", help="where to write; the first folder if left out")
    return parser.parse_args(words)
