"""What the benchmarks print and write: their figures and the machine."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch


def publish(figures: dict[str, Any], path: str | None) -> None:
    """Print the figures with the machine they were measured on; write them to `path` as JSON if it is given."""
    processor = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    )
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": processor}
    text = json.dumps({**figures, **machine}, indent=2)
    print(text)
    if path:
        Path(path).write_text(text + "\n")
