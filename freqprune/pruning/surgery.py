"""Filters kept → smaller network, proven equal to the network with the other filters silenced."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from freqprune.errors import InputError, closest, first_line
from freqprune.networks import Trace, drop_blocks, dropped_blocks, modes_of, set_modes
from freqprune.pruning.blocks import Block, find_blocks
from freqprune.pruning.graph import ChannelGraph, Unit
from freqprune.pruning.proof import prove, prove_in_training
from freqprune.pruning.pruners import restore
from freqprune.tagging import match_layers


class Plan:
    """What may be removed from a network, what it would save, and the removal itself. The network itself is left as it
    is.

    Args:
        model: the network.
        example: an input batch, ``(n_images, n_channels, height, width)``.
        blocks: whether whole residual blocks may go too.

    Attributes:
        graph: the units of filters that go together.
        layers: convolutions whose filters can go without touching any other layer's outputs ("inner" ones, in a
            residual network the first of each block), in the order of the network.
        streams: for the first convolution of each residual stream, all layers that write to it; their filters go
            together.
        coupled: all other convolutions, with what shares their channels.
        blocks: residual blocks that may go, see `freqprune.pruning.blocks`; their names stand for one filter each.
        gone: blocks that the network has lost already.
        stuck: blocks that `leave_blocks` has taken out.

    Raises:
        InputError: for a network that cannot be followed.
    """

    def __init__(self, model: nn.Module, example: Tensor, blocks: bool = False) -> None:
        self.model, self.example = model, example[:1]
        self.graph = ChannelGraph(model, example)
        self.layers = list(self.graph.inner)
        self.streams = {name: unit.members for name, unit in self.graph.streams.items()}
        self.coupled = self.graph.coupled
        # Layers that no forward in eval mode reaches.
        kinds = nn.modules.conv._ConvNd | nn.Linear
        layers = {name for name, module in model.named_modules() if isinstance(module, kinds)}
        self.unreached = sorted(layers - self.graph.left({}).keys())
        self.blocks: dict[str, Block] = {}
        self.gone, self.stuck = list(dropped_blocks(model)), list[str]()
        if blocks:
            self.trace = Trace(model, self.example, "pruning.blocks=false, with pruning.macs_cut for an amount of time")
            self.blocks = find_blocks(model, self.trace)
        # Patterns may name these, whatever becomes of the blocks.
        self._of_blocks = [layer for block in self.blocks.values() for layer in block.layers]

    def unit(self, name: str) -> Unit:
        """A unit by its name.

        Raises:
            InputError: for an unknown or coupled layer.
        """
        self._check_name(name)
        return self.graph.units[name]

    def choose(
        self,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        streams: bool = False,
    ) -> list[str]:
        """Names of the units to prune by shell-style patterns over convolutions; all inner layers (and all streams) if
        `include` is None.

        A unit of several layers is chosen, or left out, if a pattern matches any of them.

        Raises:
            InputError: for patterns that match nothing, or layers that cannot be pruned alone.
        """
        everything = self._convolutions()
        allowed = [*self.layers, *(self.streams if streams else [])]
        owner = {member: name for name in allowed for member in self.unit(name).members}
        wanted = allowed if include is None else [name for name in self._match(include) if name in everything]
        dropped = [] if exclude is None else self._match(exclude)
        chosen = [name for name in wanted if name not in dropped]
        shared = [name for name in chosen if name in self.coupled and name not in owner]
        if shared:
            way_out = f"leave them out, for example with pruning.layers={self._pattern()}"
            if any(shared[0] in members for members in self.streams.values()):
                way_out += ", or prune the stream as a whole with pruning.streams=true"
            raise InputError(
                f"pruning.layers picks {', '.join(shared)}, which share their channels with "
                f"{', '.join(self.coupled[shared[0]][:3])}; {way_out}"
            )
        picked = list(dict.fromkeys(owner.get(name, name) for name in chosen))
        spared = {owner.get(name, name) for name in dropped}
        picked = [name for name in picked if name not in spared]
        if not picked:
            alone = bool(allowed) and (include is not None or exclude is not None)
            if alone or not self.coupled:
                raise InputError("pruning.layers and pruning.exclude leave no layer to prune")
            first, others = next(iter(self.coupled.items()))
            way_out = "; prune them as residual streams (pruning.streams=true)" if self.streams and not streams else ""
            raise InputError(
                f"no layer can be pruned alone: {first} shares its channels with {', '.join(others[:3])}, and so "
                f"on{way_out}"
            )
        return picked

    def spare_blocks(
        self, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
    ) -> None:
        """Let no block go that holds a layer which patterns exclude, or an inner layer that they do not pick, nor one
        of which they pick none.

        Raises:
            InputError: for patterns that match nothing.
        """
        spared = set() if exclude is None else {*self._match(exclude)}
        if include is not None:
            picked = {*self._match(include)}
            spared |= {*self.layers} - picked
            spared |= {
                layer for block in self.blocks.values() if not picked & {*block.layers} for layer in block.layers
            }
        self.blocks = {name: block for name, block in self.blocks.items() if not spared & {*block.layers}}

    def leave_blocks(self, names: Sequence[str]) -> None:
        """Let none of these go, whatever patterns say: without them the network would compute something else."""
        self.stuck = list(names)
        self.blocks = {name: block for name, block in self.blocks.items() if name not in names}

    def _match(self, patterns: str | Sequence[str]) -> list[str]:
        """Layers that patterns match, those of blocks too; once blocks have gone, a pattern may match none of what is
        left, unless all do."""
        names = list(dict.fromkeys([*self._convolutions(), *self._of_blocks]))
        if self.gone:
            given = [patterns] if isinstance(patterns, str) else list(patterns)
            patterns = [one for one in given if fnmatch.filter(names, one)] or patterns
        return match_layers(names, patterns)

    def _convolutions(self) -> list[str]:
        """Layers that patterns may name: those that can lose filters alone, and those that share them."""
        members = (member for name in self.layers for member in self.unit(name).members)
        return list(dict.fromkeys([*self.layers, *self.coupled, *members]))

    def _pattern(self) -> str:
        endings = {name.rsplit(".", 1)[-1] for name in self.layers}
        return f"'*.{endings.pop()}'" if len(endings) == 1 else "null"

    def macs(self, widths: Mapping[str, int]) -> float:
        """MACs of the network for one image with `widths` filters left in the named units, the others at full width.

        Raises:
            InputError: for an unknown or coupled layer, or a width that it cannot have.
        """
        for name, width in widths.items():
            self._check_name(name)
            most = 1 if name in self.blocks else self.graph.units[name].n_filters
            if not 0 <= width <= most:
                raise InputError(f"{name!r} has {most} filters; the width must be in [0, {most}], got {width}")
        units = {name: width for name, width in widths.items() if name not in self.blocks}
        gone = [name for name, width in widths.items() if name in self.blocks and not width]
        return self.graph.macs(units, self._layers_gone(gone))

    def _layers_gone(self, blocks: Sequence[str]) -> set[str]:
        return {layer for name in blocks for layer in self.blocks[name].layers}

    def dropped(self, kept: Mapping[str, Tensor]) -> list[str]:
        """The blocks that a selection drops, in the order in which they run."""
        return [name for name in self.blocks if name in kept and not len(kept[name])]

    def blocks_of(self, trace: Trace) -> dict[str, Block]:
        """The blocks as another trace of the same network has them."""
        found = find_blocks(self.model, trace) if self.blocks else {}
        return {name: found[name] for name in self.blocks}

    def sensible(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A selection without units that go with blocks: altogether, or the layer that they are named by."""
        gone = self._layers_gone(self.dropped(kept))
        return {
            name: indices
            for name, indices in kept.items()
            if name in self.blocks or not (name in gone or {*self.unit(name).members} <= gone)
        }

    def apply(self, kept: Mapping[str, Tensor], check: bool = True, weights: nn.Module | None = None) -> nn.Module:
        """Smaller copy of the network with only the kept filters.

        Args:
            kept: indices of the filters kept in each unit; units that are not named keep all.
            check: compare the result on the example with the network whose removed channels are silenced.
            weights: network of the same shape whose weights to take, e.g. one that was made up for; this one if left
                out.

        Returns:
            A network of the same classes, in the same mode, with the kept filters' weights.

        Raises:
            InputError: for an unknown or coupled layer, an index out of range or given twice, a layer left without
                filters, or a network that torch-pruning misreads, so that the smaller network would compute something
                else.
        """
        for name, indices in kept.items():
            self._check(name, indices)
        kept = self.sensible(kept)
        # The graph speaks of one copy of the network, which the removal consumes.
        source = self.model if weights is None else weights
        graph = ChannelGraph(source, self.example, self.graph)
        twin, modules = graph.twin, dict(graph.twin.named_modules())
        for name, indices in kept.items():
            gone = [] if name in self.blocks else self._removed(name, indices)
            if not gone:
                continue
            group = graph.group(name, gone)
            if not graph.possible(group):
                raise InputError(
                    f"keeping {len(indices)} filters of {name!r} would empty a layer that is coupled to it"
                )
            try:
                group.prune()
            except Exception as error:
                raise InputError(
                    f"torch-pruning cannot remove filters of {name!r} ({type(error).__name__}: {error}); leave it out "
                    f"with pruning.exclude={name}"
                ) from error
            width, asked = modules[name].weight.shape[0], len(indices) * self.unit(name).width
            if width != asked:
                raise InputError(
                    f"torch-pruning left {width} channels of {name!r} where {asked} were asked for; leave it out with "
                    f"pruning.exclude={name}"
                )
        restore(twin)
        shrunk = self.dropped(kept)
        parameters = dict(twin.named_parameters())
        for key, old in self.model.named_parameters():
            parameters[key].requires_grad_(old.requires_grad)
        try:
            set_modes(twin, modes_of(self.model))
        except RuntimeError as error:
            raise InputError(
                f"the smaller network does not go into training mode ({first_line(error)}), as where layers merge "
                "low-rank weights in eval mode, which cannot be taken out once filters are gone: merge them for good, "
                "or call eval() on the network before"
            ) from error
        drop_blocks(twin, {name: self.blocks[name].left for name in shrunk})
        if check:
            blocks = [self.blocks[name] for name in shrunk]
            prove(source, twin, self.silenced(kept), self.example, blocks, self.trace if blocks else None)
            if self.unreached and kept:
                prove_in_training(source, twin, self.example, self.unreached)
        return twin

    def silenced(self, kept: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """Input channels, by layer that reads them, that carry removed filters."""
        found: dict[str, list[int]] = {}
        for name, indices in self.sensible(kept).items():
            gone = [] if name in self.blocks else self._removed(name, indices)
            for reader, channels in self.graph.read_channels(name, gone).items() if gone else ():
                found.setdefault(reader, []).extend(channels)
        return found

    def _removed(self, name: str, indices: Tensor) -> list[int]:
        return sorted(set(range(self.unit(name).n_filters)) - set(indices.tolist()))

    def _check_name(self, name: str) -> None:
        if name not in self.blocks and name not in self.graph.units:
            if name in self.coupled:
                whole = next((stream for stream, members in self.streams.items() if name in members), None)
                way_out = (
                    f"; prune the stream by its first layer, {whole!r}" if whole else "; its filters cannot go alone"
                )
                raise InputError(f"{name!r} shares its channels with {', '.join(self.coupled[name])}{way_out}")
            raise InputError(f"the network has no prunable layer {name!r}{closest(name, self.graph.units)}")

    def _check(self, name: str, indices: Tensor) -> None:
        self._check_name(name)
        if (
            not isinstance(indices, Tensor)
            or indices.dim() != 1
            or indices.is_floating_point()
            or indices.dtype == torch.bool
        ):
            raise InputError(f"kept filters of {name!r} must be a 1-D tensor of integer indices, got {indices!r}")
        width = 1 if name in self.blocks else self.unit(name).n_filters
        found = indices.tolist()
        if not found and name in self.blocks:
            return
        if not found:
            raise InputError(f"{name!r} would keep no filter, which cuts the network in two; keep at least one")
        if len(set(found)) != len(found) or min(found) < 0 or max(found) >= width:
            raise InputError(f"kept filters of {name!r} must be distinct indices in [0, {width - 1}], got {found}")
