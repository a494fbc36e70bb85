"""Modules by the names they had before the package had wings: what people have imported so far goes on working."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any

# Old name: the modules that hold what it held.
MOVED = {
    "assembly": ["jobs.assembly", "jobs.trainers"],
    "callbacks": ["training.tagging_callback"],
    "checkpoint": ["networks.checkpoint", "networks.files"],
    "cli": ["jobs.cli"],
    "compensation": ["pruning.compensation"],
    "components": ["tagging.components"],
    "config": ["jobs.config", "jobs.settings"],
    "controls": ["tagging.controls"],
    "damage": ["pruning.damage"],
    "data": ["training"],
    "data.augment": ["training.augment"],
    "data.datamodule": ["training.datamodule", "training.whole_sets", "training.listed"],
    "data.sources": ["training.sources", "training.whole_sets", "training.listed"],
    "drawing": ["reports.drawing"],
    "export": ["networks.exports"],
    "figures": ["reports.response_figures"],
    "figures_of_runs": ["reports.run_figures"],
    "graph": ["pruning.graph"],
    "hooks": ["networks.hooks"],
    "importance": ["pruning.importance", "pruning.criteria", "pruning.adapter"],
    "models": ["networks.registry", "networks.resnet"],
    "models.resnet": ["networks.resnet"],
    "module": ["training.classifier", "training.optimization"],
    "moments": ["pruning.moments", "pruning.elimination"],
    "outputs": ["jobs.outputs"],
    "page": ["reports.page"],
    "parts": ["tagging.parts"],
    "profiling": ["networks.profiling"],
    "pruning_callback": ["training.pruning_callback"],
    "recording": ["tagging.recording"],
    "report": ["reports.tables", "reports.terminal"],
    "response": ["tagging.response"],
    "runs": ["reports.record"],
    "selection": ["pruning.amount", "pruning.selection"],
    "sites": ["tagging.layers", "tagging.sites"],
    "spectrum": ["tagging.spectrum"],
    "stimulus": ["tagging.stimulus"],
    "surgery": ["pruning.surgery"],
    "sweeps": ["reports.sweeps"],
    "verdict": ["pruning.verdict"],
    "workflow": ["jobs.train", "jobs.prune"],
}


class _Moved(MetaPathFinder, InspectLoader):
    """Finds a module by its old name: an empty one that looks its attributes up where they are now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        here, _, old = fullname.partition(".")
        if here != "freqprune":
            return None
        return ModuleSpec(fullname, self, is_package=old in ("data", "models")) if old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        now = [f"freqprune.{name}" for name in MOVED[module.__name__.removeprefix("freqprune.")]]
        warnings.warn(f"{module.__name__} is now {' and '.join(now)}", DeprecationWarning, stacklevel=2)

        def look_up(name: str) -> Any:
            if not name.startswith("__"):
                for place in map(importlib.import_module, now):
                    if hasattr(place, name):
                        return getattr(place, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}; it is now {' and '.join(now)}")

        module.__getattr__ = look_up  # type: ignore[method-assign]

    def get_code(self, fullname: str) -> CodeType | None:
        """For ``python -m``: the code of the module that took its place."""
        spec = find_spec(f"freqprune.{MOVED[fullname.removeprefix('freqprune.')][0]}")
        assert spec is not None
        assert isinstance(spec.loader, InspectLoader)
        return spec.loader.get_code(spec.name)

    def get_source(self, fullname: str) -> str | None:
        return None


def install() -> None:
    """Let the old names be found."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        # Before the others: folders that were packages may still lie about, with nothing but caches in them.
        sys.meta_path.insert(0, _Moved())
