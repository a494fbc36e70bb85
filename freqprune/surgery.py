"""Filters kept → smaller network, by torch-pruning's dependency graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from freqprune.errors import InputError, closest
from freqprune.hooks import evaluating
from freqprune.models import IndexShortcut
from freqprune.profiling import macs_by_layer
from freqprune.sites import match_layers

_OUT = (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
_IN = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
_ARITHMETIC = {"AddBackward": "sum", "SubBackward": "difference", "MulBackward": "product", "DivBackward": "quotient"}


class _IndexShortcutPruner(tp.BasePruningFunc):
    """Teach torch-pruning the index shortcut: its two sides lose channels independently of each other.

    A source channel that goes leaves a zero channel behind, which is what the masked network computes.
    """

    def prune_out_channels(self, layer: IndexShortcut, idxs: Sequence[int]) -> nn.Module:
        keep = torch.ones(layer.n_out, dtype=torch.bool)
        keep[list(idxs)] = False
        layer.set_index(layer.index.cpu()[keep])
        return layer

    def prune_in_channels(self, layer: IndexShortcut, idxs: Sequence[int]) -> nn.Module:
        gone = torch.zeros(layer.n_in, dtype=torch.bool)
        gone[list(idxs)] = True
        # Position -1 of the table is the last entry, so channels that are zero already stay at -1.
        table = torch.cat([torch.where(gone, -1, (~gone).cumsum(0) - 1), torch.tensor([-1])])
        layer.n_in -= len(set(idxs))
        layer.set_index(table[layer.index.cpu()])
        return layer

    def get_out_channels(self, layer: IndexShortcut) -> int:
        return layer.n_out

    def get_in_channels(self, layer: IndexShortcut) -> int:
        return layer.n_in


CUSTOM_PRUNERS: dict[Any, Any] = {IndexShortcut: _IndexShortcutPruner()}
"""Pruners of this package's own layers, for the ``customized_pruners`` argument of torch-pruning."""


def _graph(model: nn.Module, example: Tensor) -> tuple[nn.Module, tp.DependencyGraph]:
    """A private copy of the model and the dependency graph of that copy."""
    # torch-pruning needs gradients and unfrozen parameters to trace, and leaves the model in eval mode: let it have a copy.
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            graph = tp.DependencyGraph().build_dependency(twin, example_inputs=example[:1], customized_pruners=CUSTOM_PRUNERS)
    except Exception as error:
        what = f"{type(model).__name__} ({type(error).__name__}: {error})"
        raise InputError(f"torch-pruning {version('torch-pruning')} cannot trace {what}; does the network run on the example?") from error
    return twin, graph


def _group(graph: tp.DependencyGraph, module: nn.Module, idxs: list[int], layer: str) -> Any:
    try:
        return graph.get_pruning_group(module, tp.prune_conv_out_channels, idxs=idxs)
    except Exception as error:
        # torch-pruning raises whatever it trips over, down to ZeroDivisionError.
        raise InputError(f"torch-pruning {version('torch-pruning')} cannot follow the channels of {layer!r} ({type(error).__name__}: {error})") from error


def _partners(group: Any, module: nn.Module, names: Mapping[nn.Module, str]) -> list[str]:
    """What else a filter of `module` would take along: other layers, sums, norms over channels, the output; empty for an inner filter."""
    found: list[str] = []
    operations: list[str] = []
    for dependency, _ in group:
        target = dependency.target.module
        arithmetic = next((word for word in _ARITHMETIC if word in dependency.target.name), None)
        if target is not module and (dependency.handler in _OUT or isinstance(target, IndexShortcut | nn.GroupNorm | nn.LayerNorm)):
            found.append(names.get(target, type(target).__name__))
        elif arithmetic:
            operations.append(f"a {_ARITHMETIC[arithmetic]}")
    found += operations
    if not any(dependency.handler in _IN for dependency, _ in group):
        found.append("the output of the network")
    return list(dict.fromkeys(found))


class Plan:
    """What may be removed from a network, what it would save, and the removal itself. The network itself is left as it is.

    Args:
        model: the network.
        example: an input batch, ``(n_images, n_channels, height, width)``.

    Attributes:
        layers: convolutions whose filters can go without touching any other layer's outputs ("inner" ones, in a residual network the first of
            each block), in the order of the network.
        coupled: all other convolutions, with the layers that share their channels.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model = model
        self.example = example[:1]
        twin, graph = _graph(model, example)
        names = {module: name for name, module in twin.named_modules()}
        self._macs = macs_by_layer(model, self.example)
        self._widths: dict[str, int] = {}
        self._losses: dict[str, list[tuple[str, str, float]]] = {name: [] for name in self._macs}
        self.layers: list[str] = []
        self.coupled: dict[str, list[str]] = {}
        for module, layer in names.items():
            if not isinstance(module, nn.modules.conv._ConvNd) or layer not in self._macs or module.groups > 1:
                continue
            partners = _partners(_group(graph, module, [0], layer), module, names)
            if partners:
                self.coupled[layer] = partners
                continue
            self.layers.append(layer)
            self._widths[layer] = module.out_channels
            for dependency, idxs in _group(graph, module, [0], layer):
                name = names.get(dependency.target.module)
                if name not in self._macs:
                    continue
                target = dependency.target.module
                inwards = dependency.handler in _IN
                width = target.weight.shape[1 if inwards else 0]
                self._losses[name].append((layer, "in" if inwards else "out", len(idxs) / width))

    def choose(self, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None) -> list[str]:
        """Prunable layers by shell-style patterns; all of `layers` if `include` is None.

        Raises:
            InputError: for a pattern that matches nothing, or a layer that shares its channels with others.
        """
        every = [*self.layers, *self.coupled]
        chosen = self.layers if include is None else match_layers(every, include)
        if exclude is not None:
            chosen = [name for name in chosen if name not in match_layers(every, exclude)]
        shared = [name for name in chosen if name in self.coupled]
        if shared:
            raise InputError(
                f"pruning.layers picks {', '.join(shared)}, which share their channels with {', '.join(self.coupled[shared[0]][:3])}; leave them out, "
                f"for example with pruning.layers={self._pattern()}"
            )
        if not chosen:
            raise InputError("pruning.layers and pruning.exclude leave no layer to prune")
        return chosen

    def _pattern(self) -> str:
        endings = {name.rsplit(".", 1)[-1] for name in self.layers}
        return f"'*.{endings.pop()}'" if len(endings) == 1 else "null"

    def macs(self, widths: Mapping[str, int]) -> float:
        """MACs of the network for one image with `widths` filters left in the named layers, the others at full width."""
        gone = {layer: self._widths[layer] - width for layer, width in widths.items()}
        total = 0.0
        for name, dense in self._macs.items():
            left = {"in": 1.0, "out": 1.0}
            for layer, side, share in self._losses[name]:
                left[side] -= gone.get(layer, 0) * share
            total += dense * left["in"] * left["out"]
        return total

    def apply(self, kept: Mapping[str, Tensor]) -> nn.Module:
        """Smaller copy of the network with only the kept filters.

        Args:
            kept: indices of the filters kept in each layer; layers that are not named keep all.

        Returns:
            A network of the same classes, in the same mode, with the kept filters' weights.

        Raises:
            InputError: for an unknown or coupled layer, an index out of range or given twice, or a layer left without filters.
        """
        for layer, indices in kept.items():
            self._check(layer, indices)
        twin, graph = _graph(self.model, self.example)
        modules = dict(twin.named_modules())
        for layer, indices in kept.items():
            removed = sorted(set(range(self._widths[layer])) - set(indices.tolist()))
            if not removed:
                continue
            group = _group(graph, modules[layer], removed, layer)
            if not graph.check_pruning_group(group):
                raise InputError(f"keeping {len(indices)} filters of {layer!r} would empty a layer that is coupled to it")
            group.prune()
            width = modules[layer].weight.shape[0]
            assert width == len(indices), f"{layer}: {width} filters after surgery, {len(indices)} asked for"
        with evaluating(self.model), evaluating(twin), torch.no_grad():
            dense, small = self.model(self.example), twin(self.example)
        assert getattr(dense, "shape", None) == getattr(small, "shape", None), f"surgery changed the output from {dense.shape} to {small.shape}"
        for (_, old), (_, new) in zip(self.model.named_parameters(), twin.named_parameters(), strict=True):
            new.requires_grad_(old.requires_grad)
        for name, module in self.model.named_modules():
            modules[name].training = module.training
        return twin

    def _check(self, layer: str, indices: Tensor) -> None:
        if layer in self.coupled:
            raise InputError(f"{layer!r} shares its channels with {', '.join(self.coupled[layer])}; its filters cannot go alone")
        if layer not in self._widths:
            raise InputError(f"the network has no prunable layer {layer!r}{closest(layer, self.layers)}")
        width = self._widths[layer]
        found = indices.tolist()
        if not found:
            raise InputError(f"{layer!r} would keep no filter, which cuts the network in two; keep at least one")
        if len(set(found)) != len(found) or min(found) < 0 or max(found) >= width:
            raise InputError(f"kept filters of {layer!r} must be distinct indices in [0, {width - 1}], got {found}")


def recalibrate_batch_norm(model: nn.Module, batches: Sequence[Any], device: torch.device | None = None) -> None:
    """Re-estimate the running statistics of every batch norm as plain averages over batches of (normalised) inputs, in place.

    Removing filters shifts what the following layers see; this takes no gradient step. Modes are restored.
    """
    modes = {module: module.training for module in model.modules()}
    update_bn(batches, model, device=device)
    for module, mode in modes.items():
        module.training = mode
