"""Which channels go together: torch-pruning's dependency graph, read as units of filters that can be removed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import Heads, IndexShortcut, check_answers, macs_by_layer
from freqprune.pruning.dependencies import channel_group, dependency_graph, shared_parameters
from freqprune.pruning.followed import Followed, follow, followed_group
from freqprune.pruning.heads import head_group, movable_heads
from freqprune.pruning.partners import IN, SUM, members_of, partners_of
from freqprune.pruning.pruners import group_width, taught


@dataclass(frozen=True)
class Unit:
    """Filters that are removed together, counted by the filters of one layer.

    Attributes:
        name: the first convolution of the unit.
        members: all layers whose outputs these are: one for an inner layer, all that write to it for a residual stream.
        n_filters: number of filters.
        readers: layers that read these channels, in no particular order.
        width: channels that are one filter: 1, where a convolution in groups is on the way those of one group, of
            attention heads those of a head's queries, keys and values.
        n_parts: equal parts of the layer that a filter's channels are spread over: 3 for queries, keys and values.
    """

    name: str
    members: tuple[str, ...]
    n_filters: int
    readers: tuple[str, ...]
    width: int = 1
    n_parts: int = 1

    def channels(self, filters: Sequence[int]) -> list[int]:
        """Channels of the layer that the unit is named after, part by part and filter by filter."""
        each = self.width // self.n_parts
        starts = [(part * self.n_filters + int(one)) * each for part in range(self.n_parts) for one in filters]
        return [start + i for start in starts for i in range(each)]

    def by_filter(self, values: Tensor) -> Tensor:
        """Values of the layer's channels, last dimension, as those of the filters: the mean over a filter's."""
        return values.unflatten(-1, (self.n_parts, self.n_filters, -1)).mean((-3, -1))


# Beginnings of what is said of layers that cannot be cut for the way in which the network is written.
_UNFOLLOWED = ("channels that torch-pruning cannot follow", "a number of heads", "a parameter that is of")


class ChannelGraph:
    """Units of filters that can be removed from a network. The network itself is left as it is.

    Args:
        model: the network; parameters may be frozen, it may be in training mode.
        example: an input batch, ``(n_images, n_channels, height, width)``.
        like: the graph of a network of the same shape, whose units these are.

    Attributes:
        inner: units whose filters can go without touching any other layer's outputs (in a residual network the first
            convolution of each block, in a transformer the hidden layer of each perceptron), or only those of layers
            whose outputs theirs are multiplied with (squeeze-and-excite), by name, in the order of the network.
        streams: units of several layers that write to one residual stream, by the name of the first.
        coupled: every convolution that is no inner unit of its own, with what shares its channels.
    """

    inner: dict[str, Unit]
    streams: dict[str, Unit]
    coupled: dict[str, list[str]]
    _macs: Mapping[str, float]
    _losses: dict[str, list[tuple[str, str, float]]]
    _followed: dict[str, Followed | Heads]

    def __init__(self, model: nn.Module, example: Tensor, like: ChannelGraph | None = None) -> None:
        self.model, self.example = model, example[:1]
        if like is None:
            check_answers(model, self.example)
        self._graph: Any
        self.twin, self._graph = dependency_graph(model, example)
        names = {module: name for name, module in self.twin.named_modules()}
        self._names, self._modules = names, dict(self.twin.named_modules())
        if like is not None:
            self._macs, self._losses, self._followed = like._macs, like._losses, like._followed
            self.inner, self.streams, self.coupled = like.inner, like.streams, like.coupled
            return
        self._macs = macs_by_layer(model, self.example)
        self._losses = {name: [] for name in self._macs}
        self._followed, self.inner, self.streams = {}, {}, {}
        heads, tied = movable_heads(model, self.example)
        found: dict[str, Followed | Heads] = {**follow(model, self.example), **heads}
        self.coupled = {layer: ["a number of heads that its module cannot do without"] for layer in tied}
        lost = []
        for module, layer in names.items():
            if layer not in self._macs:
                continue
            if layer in found:
                self._take(layer, found[layer])
            elif isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1:
                try:
                    self._add(module, layer)
                except InputError:
                    lost.append(layer)
        if lost:
            self._find(lost)
        self._spare_shared()

    def _spare_shared(self) -> None:
        """Leave units whose layers, or readers, share a parameter with another layer: it cannot be cut for one only."""
        shared = shared_parameters(self.model)
        for among in (self.inner, self.streams):
            for name, unit in list(among.items()):
                tied = next((one for one in (*unit.members, *unit.readers) if one in shared), None)
                if tied is not None:
                    del among[name]
                    self.coupled[name] = [f"a parameter that is of {' and '.join(shared[tied])}"]

    def _take(self, layer: str, found: Followed | Heads) -> None:
        """The unit of a layer that was followed without torch-pruning."""
        self._followed[layer] = found
        if isinstance(found, Heads):
            unit = Unit(layer, (layer,), found.n_heads, (found.proj,), 3 * found.size, 3)
        else:
            n_filters = len(self._modules[layer].weight)
            unit = Unit(layer, tuple(found.members), n_filters, tuple(found.readers))
        self._register(unit, self.inner)

    def _find(self, lost: Sequence[str]) -> None:
        """The units of convolutions that torch-pruning has lost."""
        found = follow(self.model, self.example, convolutions=True)
        taken = {member for unit in self.units.values() for member in unit.members}
        for layer in lost:
            if layer in found and not taken & {*found[layer].members}:
                self._take(layer, found[layer])
                taken |= {*found[layer].members}
        for layer in lost:
            if layer not in taken:
                self.coupled[layer] = ["channels that torch-pruning cannot follow"]
        if not self.units and isinstance(self._graph, Exception):
            what = f"{type(self.model).__name__} ({type(self._graph).__name__}: {self._graph})"
            raise InputError(f"torch-pruning {version('torch-pruning')} cannot trace {what}") from self._graph
        order = {name: number for number, name in enumerate(self._macs)}
        self.inner = dict(sorted(self.inner.items(), key=lambda unit: order[unit[0]]))

    def _add(self, module: Any, layer: str) -> None:
        """The unit that a layer leads, if it leads one."""
        names = self._names
        group = channel_group(self._graph, module, [0], layer)
        turned = [names.get(d.target.module, "") for d, _ in group if getattr(d.target.module, "transposed", False)]
        if turned:
            # Their weights have inputs first: neither scores nor what a cut makes up for are written for that.
            self.coupled[layer] = turned
            return
        partners = partners_of(group, module, names)
        members = [layer]
        if partners:
            self.coupled[layer] = partners
            if any(layer in unit.members for unit in self.units.values()):
                return
            members = sorted(members_of(group, names), key=list(names.values()).index)
            if not members or members[0] != layer:
                return
        width = math.lcm(*(group_width(d.target.module) for d, _ in group if taught(d.target.module)))
        n_channels = len(module.weight)
        if n_channels % width:
            return
        readers = [names[d.target.module] for d, _ in group if d.handler in IN and d.target.module in names]
        unit = Unit(layer, tuple(members), n_channels // width, tuple(dict.fromkeys(readers)), width)
        alone = not partners or not any(SUM.search(partner) for partner in partners)
        if alone:
            self.coupled.pop(layer, None)
        self._register(unit, self.inner if alone else self.streams)

    def _register(self, unit: Unit, among: dict[str, Unit]) -> None:
        """Take a unit in, with the share of every layer's sides that one of its filters is."""
        layer = unit.name
        among[layer] = unit
        names, seen = self._names, set()
        for dependency, idxs in self.group(layer, [0]):
            target = dependency.target.module
            name, inwards = names.get(target), dependency.handler in IN
            # A convolution in groups comes once for each side of it.
            if name is None or name not in self._macs or (name, inwards) in seen:
                continue
            seen.add((name, inwards))
            share = len(idxs) / target.weight.shape[1 if inwards else 0]
            self._losses[name].append((layer, "in" if inwards else "out", share))

    @property
    def unfollowed(self) -> list[str]:
        """Layers that keep their filters because of how they are written, not of what they are added to."""
        return [layer for layer, others in self.coupled.items() if others[:1] and others[0].startswith(_UNFOLLOWED)]

    @property
    def units(self) -> dict[str, Unit]:
        """All units, inner layers first."""
        return {**self.inner, **self.streams}

    def group(self, name: str, filters: Sequence[int] | None = None) -> Any:
        """torch-pruning's group of some (or all) filters of a unit, over the modules of `twin`."""
        unit = self.units[name]
        filters = range(unit.n_filters) if filters is None else filters
        found = self._followed.get(name)
        if isinstance(found, Heads):
            return head_group(self._modules, found, list(filters))
        if found is not None:
            return followed_group(self._modules, found, list(filters))
        return channel_group(self._graph, self._modules[name], unit.channels(filters), name)

    def possible(self, group: Any) -> bool:
        """Whether removing a group leaves every layer of it at least one channel."""
        if not isinstance(group._DG, tp.DependencyGraph):
            return all(len(idxs) < dependency.target.module.weight.shape[1] for dependency, idxs in group[-1:])
        return bool(self._graph.check_pruning_group(group))

    def read_channels(self, name: str, filters: Sequence[int]) -> dict[str, list[int]]:
        """Input channels (of a linear layer: features) that a unit's filters are to each layer that reads them."""
        found: dict[str, list[int]] = {}
        for dependency, idxs in self.group(name, filters):
            module = dependency.target.module
            reader, act = self._names.get(module), getattr(dependency.handler, "__name__", "")
            enters = dependency.handler in IN or (isinstance(module, IndexShortcut) and act == "prune_in_channels")
            if reader is not None and enters:
                found.setdefault(reader, []).extend(int(i) for i in idxs)
        return found

    def macs(self, widths: Mapping[str, int], without: Collection[str] = ()) -> float:
        """MACs of the network for one image with `widths` filters left in the named units, the others at full width,
        and without some layers."""
        left = self.left(widths)
        return sum(macs * left[layer][0] * left[layer][1] for layer, macs in self._macs.items() if layer not in without)

    def left(self, widths: Mapping[str, int]) -> dict[str, tuple[float, float]]:
        """Shares of the inputs and of the outputs of each convolution and linear layer that are left, with `widths`
        filters left in the named units."""
        units = self.units
        gone = {name: units[name].n_filters - width for name, width in widths.items()}
        found = {}
        for layer in self._macs:
            left = {"in": 1.0, "out": 1.0}
            for name, side, share in self._losses[layer]:
                left[side] -= gone.get(name, 0) * share
            found[layer] = left["in"], left["out"]
        return found
