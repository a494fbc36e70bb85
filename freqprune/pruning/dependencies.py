"""torch-pruning asked which channels depend on which: without its remarks, without end, its errors as ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import index_mapping
from torch_pruning.dependency.group import Group

from freqprune.errors import InputError
from freqprune.networks import copied
from freqprune.pruning.pruners import teach

# Channels and operations that torch-pruning may name for a group: where it misreads a view it names more and more,
# without end. A DenseNet's largest group has 200 operations.
_MOST_CHANNELS, _MOST_OPERATIONS = 2_000_000, 2_000


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch-pruning says of parameters without a layer and of long ways: should it misread them, the proof
    of the cut says so. OverflowError for groups without end."""
    mapping, group = index_mapping._FlattenIndexMapping, Group
    call, add, named = mapping.__call__, group.add_dep, {"channels": 0, "operations": 0}

    def count(what: str, number: int, most: int) -> None:
        named[what] += number
        if named[what] > most:
            raise OverflowError(f"more than {most} {what} in one group")

    def bounded_call(self: Any, idxs: Any) -> Any:
        count("channels", len(idxs) if self.reverse else len(idxs) * int(self._stride), _MOST_CHANNELS)
        return call(self, idxs)

    def bounded_add(self: Any, *args: Any, **kwargs: Any) -> Any:
        count("operations", 1, _MOST_OPERATIONS)
        return add(self, *args, **kwargs)

    with warnings.catch_warnings():
        for known in ("Unwrapped parameters detected", "Maximum recursive depth"):
            warnings.filterwarnings("ignore", known)
        mapping.__call__, group.add_dep = bounded_call, bounded_add
        try:
            yield
        finally:
            mapping.__call__, group.add_dep = call, add


def dependency_graph(model: nn.Module, example: Tensor) -> tuple[nn.Module, tp.DependencyGraph | Exception]:
    """A private copy of the model and the dependency graph of that copy, or what torch-pruning raised instead."""
    # torch-pruning needs gradients and unfrozen parameters to trace, and leaves the model in eval mode: let it have a
    # copy.
    twin = copied(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), _quiet():
            graph = tp.DependencyGraph().build_dependency(
                twin, example_inputs=example[:1], customized_pruners=teach(twin)
            )
    except Exception as error:
        # torch-pruning raises whatever it trips over, down to ZeroDivisionError.
        return twin, error
    finally:
        # What modules keep of a run in eval mode has a graph of gradients, and could not be copied.
        twin.eval()
    return twin, graph


def channel_group(graph: tp.DependencyGraph | Exception, module: nn.Module, idxs: list[int], layer: str) -> Any:
    write = tp.prune_linear_out_channels if isinstance(module, nn.Linear) else tp.prune_conv_out_channels
    try:
        if isinstance(graph, Exception):
            raise graph
        with _quiet():
            return graph.get_pruning_group(module, write, idxs=idxs)
    except Exception as error:
        raise InputError(
            f"torch-pruning {version('torch-pruning')} cannot follow the channels of {layer!r} "
            f"({type(error).__name__}: {error})"
        ) from error


def shared_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Modules that share a parameter with others: the names of all of them, by the name of each."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name)
    return {name: names for names in owners.values() if len(names) > 1 for name in names}
