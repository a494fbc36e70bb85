"""The dense network and its twin side by side: what each operation gives in the one and in the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from freqprune.networks import LINEAR, Trace, run
from freqprune.processes import added_up, own_share
from freqprune.pruning.blocks import shortcuts_of, without_channels
from freqprune.pruning.surroundings import bias_of, constant_in, goes_into, own_bias, scale_of


class SideBySide:
    """Results of the operations of a network and of its twin, for all batches of this process.

    Args:
        dense: the network.
        twin: of the same operations, with other weights.
        trace: the operations.
        silenced: input channels that the twin reads as zero, by layer or parameter-free shortcut.
        batches: network inputs, of all processes.
    """

    def __init__(
        self,
        dense: nn.Module,
        twin: nn.Module,
        trace: Trace,
        silenced: Mapping[str, Sequence[int]],
        batches: Sequence[Tensor],
    ) -> None:
        self.twin_net, self.trace, self.silenced = twin, trace, silenced
        own = own_share(batches)
        self.n_all = len(batches)
        # Of all batches, the numbers of those that are this process's.
        self.numbers, self.batches = [number for number, _ in own], [batch for _, batch in own]
        self.n_batches, self.batch_pixels = len(own), batches[0][:, :1].numel()
        self.fixed = trace.inputs(dense), trace.inputs(twin)
        self.dense: dict[Node, list[Any]] = {trace.entrance: list(self.batches)}
        # Results of the twin where they are not the dense network's.
        self.twin: dict[Node, list[Any]] = {}
        changed = [f"{name}.weight" for name in silenced]
        self.touched = {node for node in self.fixed[0] if trace.source(node) in changed}
        # Shortcuts without weights, which cannot be zero on silenced channels.
        self.shortcuts = shortcuts_of(trace, silenced)

    def error(self) -> float:
        """Mean squared difference of the twin's answers from the dense network's."""
        pairs = zip(
            self.twin.get(self.trace.exit, self.dense[self.trace.exit]), self.dense[self.trace.exit], strict=True
        )
        return self._mean(float((a - b).double().square().mean()) for a, b in pairs)

    def _mean(self, values: Iterable[float]) -> float:
        """Mean over the batches of all processes."""
        return float(added_up(torch.tensor(sum(values), dtype=torch.float64))) / self.n_all

    def _run_twin(self, node: Node) -> None:
        readers = (self._reader(self.twin, self.fixed[1], i) for i in range(self.n_batches))
        gone = self.shortcuts.get(node, ())
        self.twin[node] = [without_channels(node, gone, read) if gone else run(node, read) for read in readers]

    def _reader(self, values: Mapping[Node, list[Any]], fixed: Mapping[Node, Tensor], batch: int) -> Any:
        return lambda node: (
            fixed[node] if node in fixed else values[node][batch] if node in values else self.dense[node][batch]
        )

    def _touch(self, name: str) -> None:
        self.touched.add(self.trace.placeholder(name))

    def _times_weight(self, node: Node, weight: Tensor, batch: int, x: Tensor | None = None) -> Tensor:
        """What a layer multiplies with its weight, without its bias; of an input that is given, or of the twin's."""
        read = self._reader(self.twin, self.fixed[1], batch)
        rest = node.args[3:]
        given = read(node.args[0]) if x is None else x
        product: Tensor = node.target(given, weight, None, *rest)  # type: ignore[operator]
        return product

    def _energy(self, node: Node, weight: Tensor, some: Sequence[int]) -> Tensor:
        """Mean square of what each input channel brings to a layer, in a shape that spreads over its weight."""
        read: Any = node.args[0]
        # A layer may read a buffer, as a table of positions.
        everything = {i: self._reader(self.twin, self.fixed[1], i)(read) for i in {0, *some}}
        n_dims, channel = everything[0].dim(), 1 if node.target is not LINEAR else -1
        over = [side for side in range(n_dims) if side != channel % n_dims]
        total = everything[0].new_zeros(everything[0].shape[channel], dtype=torch.float64)
        for i in some:
            total = total + everything[i].square().mean(over)
        energy = (added_up(total) / int(added_up(torch.tensor(len(some))))).to(weight)
        if len(energy) != weight.shape[1]:
            energy = energy.mean().expand(weight.shape[1])
        return energy.view(1, -1, *[1] * (weight.dim() - 2))

    def _channelwise(self, values: Tensor, node: Node) -> Tensor:
        """Values of a layer's channels in a shape that spreads over its output."""
        return values if node.target is LINEAR else values.view(-1, 1, 1)

    def _target_of(self, node: Node) -> tuple[Node | None, list[Node]]:
        """The batch norm after a layer, and the other terms of the sums its output goes into, where they have
        shifted."""
        norm, others = goes_into(node)
        if norm is not None and not scale_of(norm, self.fixed[0]).isfinite().all():
            # Nothing shows behind a norm whose scales are all zero: the layer answers for itself alone.
            return None, []
        # A branch that has yet to run will make up for this one.
        shape = self.dense[node][0].shape
        return norm, [other for other in others if other in self.twin and self.twin[other][0].shape == shape]

    def _constant_of(self, node: Node, norm: Node | None) -> Tensor | None:
        """What is added to the products of a layer in the twin: its bias, and what went into the norm's mean."""
        bias, where = self._bias(node), constant_in(self.trace, node, norm)
        if where is None or where[1] > 0:
            return bias
        dense, twin = (fixed[self.trace.placeholder(where[0])] for fixed in self.fixed)
        moved: Tensor = where[1] * (twin - dense)
        return moved if bias is None else bias + moved

    def _bias(self, node: Node, batch: int = 0) -> Tensor | None:
        """What a layer's operation adds to its products in the twin: its own parameter, or what the forward makes of
        others."""
        bias = bias_of(node)
        if not isinstance(bias, Node):
            return None
        found: Tensor = self._reader(self.twin, self.fixed[1], batch)(bias)
        return found.detach().clone()

    def _foreign_bias(self, node: Node, batch: int) -> Tensor | None:
        """`_bias` of a layer, if it is not its own parameter."""
        return None if own_bias(self.trace, node) else self._bias(node, batch)
