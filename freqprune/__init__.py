"""freqprune: frequency tagging of neural networks, and pruning by what it shows."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from freqprune.callbacks import FrequencyTagging
    from freqprune.checkpoint import load_network, load_pruned, save_pruned
    from freqprune.errors import InputError
    from freqprune.importance import Evidence, TagImportance, criterion, judge, scores
    from freqprune.models import build_model, register_model
    from freqprune.response import TagResponse
    from freqprune.selection import Amount, select
    from freqprune.stimulus import Stimulus
    from freqprune.surgery import Plan
    from freqprune.tagging import tag

# Imported on first use: the command line answers --help and typos without waiting for torch.
_HOME = {
    "Amount": "selection", "Evidence": "importance", "FrequencyTagging": "callbacks", "InputError": "errors", "Plan": "surgery",
    "Stimulus": "stimulus", "TagImportance": "importance", "TagResponse": "response", "build_model": "models", "criterion": "importance",
    "judge": "importance", "load_network": "checkpoint", "load_pruned": "checkpoint", "register_model": "models", "save_pruned": "checkpoint",
    "scores": "importance", "select": "selection", "tag": "tagging",
}  # fmt: skip

__all__ = [
    "Amount", "Evidence", "FrequencyTagging", "InputError", "Plan", "Stimulus", "TagImportance", "TagResponse", "build_model", "criterion", "judge",
    "load_network", "load_pruned", "register_model", "save_pruned", "scores", "select", "tag",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"freqprune.{_HOME[name]}"), name)
    raise AttributeError(f"module 'freqprune' has no attribute {name!r}")
