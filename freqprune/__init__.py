"""freqprune: frequency tagging of neural networks, and pruning by what it shows."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from freqprune.callbacks import FrequencyTagging
    from freqprune.checkpoint import load_network, load_pruned, save_pruned
    from freqprune.compensation import compensate
    from freqprune.errors import InputError
    from freqprune.graph import ChannelGraph
    from freqprune.importance import Evidence, TagImportance, criterion, scores
    from freqprune.models import build_model, register_model
    from freqprune.moments import input_moments
    from freqprune.pretrained import resnet32
    from freqprune.pruning import Material, Recipe, cut
    from freqprune.pruning_callback import TagPruning
    from freqprune.response import TagResponse
    from freqprune.selection import Amount, select
    from freqprune.stimulus import Stimulus
    from freqprune.surgery import Plan
    from freqprune.tagging import tag
    from freqprune.verdict import judge

# Imported on first use: the command line answers --help and typos without waiting for torch.
_HOME = {
    "FrequencyTagging": "callbacks",
    "load_network": "checkpoint",
    "load_pruned": "checkpoint",
    "save_pruned": "checkpoint",
    "compensate": "compensation",
    "InputError": "errors",
    "ChannelGraph": "graph",
    "Evidence": "importance",
    "TagImportance": "importance",
    "criterion": "importance",
    "judge": "verdict",
    "scores": "importance",
    "build_model": "models",
    "register_model": "models",
    "input_moments": "moments",
    "resnet32": "pretrained",
    "Material": "pruning",
    "Recipe": "pruning",
    "cut": "pruning",
    "TagPruning": "pruning_callback",
    "TagResponse": "response",
    "Amount": "selection",
    "select": "selection",
    "Stimulus": "stimulus",
    "Plan": "surgery",
    "tag": "tagging",
}

__all__ = [
    "Amount",
    "ChannelGraph",
    "Evidence",
    "FrequencyTagging",
    "InputError",
    "Material",
    "Plan",
    "Recipe",
    "Stimulus",
    "TagImportance",
    "TagPruning",
    "TagResponse",
    "build_model",
    "compensate",
    "criterion",
    "cut",
    "input_moments",
    "judge",
    "load_network",
    "load_pruned",
    "register_model",
    "resnet32",
    "save_pruned",
    "scores",
    "select",
    "tag",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"freqprune.{_HOME[name]}"), name)
    raise AttributeError(f"module 'freqprune' has no attribute {name!r}")
