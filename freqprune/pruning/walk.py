"""The dense network and its twin, taken through their operations together: each layer of the twin is solved for on the
inputs that it really gets."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from freqprune.errors import InputError
from freqprune.networks import LINEAR, Trace, run
from freqprune.processes import from_first
from freqprune.pruning.blocks import Block, answers_without
from freqprune.pruning.equations import Sums, solve
from freqprune.pruning.moments import MAX_VALUES
from freqprune.pruning.patches import Geometry, pick
from freqprune.pruning.recipe import Reconstruction
from freqprune.pruning.refinement import Segment, gauss_newton
from freqprune.pruning.side_by_side import SideBySide
from freqprune.pruning.surroundings import constant_in, goes_into, path_to, scale_of

log = logging.getLogger(__name__)

HELD_OUT = 4
# Pixels of the images of one Gauss-Newton step, 1,200 of 32 x 32: larger images have more positions to learn from.
STEP_PIXELS = 1200 * 32**2


def seen_in_a_step(count: int, n_pixels: int) -> int:
    """How many of so many images, or batches, of so many pixels a Gauss-Newton step sees: one at least."""
    return max(1, min(count, STEP_PIXELS // n_pixels))


class Walk(SideBySide):
    """Takes the dense network and its twin through their operations together, all batches at each."""

    def __init__(
        self,
        dense: nn.Module,
        twin: nn.Module,
        trace: Trace,
        silenced: Mapping[str, Sequence[int]],
        batches: Sequence[Tensor],
        how: Reconstruction,
        without: Sequence[Block] = (),
    ) -> None:
        super().__init__(dense, twin, trace, silenced, batches)
        self.how, self.without, self.n_draws = how, without, 0
        self.ends = {node for block in without for node in block.ends}
        self.skipped = {node for block in without for node in block.branch} - self.ends
        # To each layer, from the layer that feeds it and no other: the operations on the way, that layer first.
        refined = [node for node in trace.layers if node not in self.skipped | self.ends] if how.rounds else []
        self.paths = {node: path for node in refined if (path := path_to(trace, self.fixed[0], node))}
        self.freed: set[Node] = set()
        self.remarks: list[str] = []
        # Samples that layers lack for as many equations as unknowns.
        self.short: dict[str, int] = {}

    def error_of(self, net: nn.Module) -> float:
        """Mean squared difference of another network's answers from the dense network's, with the same blocks and
        shortcuts silenced."""
        pairs, fixed = zip(self.batches, self.dense[self.trace.exit], strict=True), self.trace.inputs(net)
        layers = {*self.trace.layers.values()}
        muted = {name: channels for name, channels in self.silenced.items() if name not in layers}
        answers = ((answers_without(self.trace, fixed, x, self.without, muted), y) for x, y in pairs)
        return self._mean(float((answer - y).double().square().mean()) for answer, y in answers)

    def remark_on_samples(self) -> None:
        """Say, and warn, where there were fewer samples than unknowns."""
        if self.short:
            worst = max(self.short, key=self.short.__getitem__)
            self.remarks.append(
                f"{len(self.short)} layers have fewer samples than unknowns, worst {worst}, which lacks "
                f"{self.short[worst]}: more calibration images (pruning.calibration_images) or positions "
                "(pruning.positions) would help"
            )
            log.warning(self.remarks[-1])

    def step(self, node: Node) -> None:
        """Take all batches through one operation, in the dense network and in its twin."""
        self.dense[node] = [run(node, self._reader(self.dense, self.fixed[0], i)) for i in range(self.n_batches)]
        layer = self.trace.layers.get(node)
        if node in self.ends:
            self.twin[node] = [torch.zeros_like(value) for value in self.dense[node]]
        elif node not in self.skipped:
            self._take(node, layer)
        self.paths.pop(node, None)
        self.freed |= set(self.trace.done_with(node))
        # A layer that the next one's target refines again needs its input until then.
        held = {source for path in self.paths.values() for source in path[0].all_input_nodes}
        for done in self.freed - held:
            self.dense.pop(done, None)
            self.twin.pop(done, None)
        self.freed &= held

    def _take(self, node: Node, layer: str | None) -> None:
        """Take the twin through an operation, after solving for its weights where it has any."""
        if layer is not None:
            norm, others = self._target_of(node)
            shifted = bool(others) or node.args[0] in self.twin
            if layer in self.silenced or (shifted and self.how.resolve == "shifted"):
                solved = self._solve(node, layer, norm, others)
                for number in range(self.how.rounds if solved else 0):
                    if self._refine(node, norm, others, self._some(number)):
                        self._solve(node, layer, norm, others)
                # Steps have run these once more; nobody but the next on the way reads them.
                for one in self.paths.get(node, [])[:-1]:
                    self.twin.pop(one, None)
        shifted = any(source in self.twin or source in self.touched for source in node.all_input_nodes)
        if shifted or node in self.shortcuts:
            self._run_twin(node)

    def _solve(self, node: Node, layer: str, norm: Node | None, others: Sequence[Node]) -> bool:
        """Solve for the weights of a layer; False, with a remark, if they stay."""
        weight = self.twin_net.get_parameter(f"{layer}.weight")
        geometry = self._geometry(node, weight)
        n_values = weight[0].numel()
        if n_values > MAX_VALUES:
            self.remarks.append(
                f"{layer} reads {n_values} values, more than the {MAX_VALUES} that are solved for at once: what it "
                "lost is "
                "not made up for"
            )
            return False
        read: Any = node.args[0]
        parts: list[Sums] = []
        stays = self._stays(layer, weight, node).flatten()
        # What is gone takes no part in the products.
        columns = None if stays.all() else stays.nonzero().flatten()
        self.n_draws += 1
        for i, number in enumerate(self.numbers):
            x = self._reader(self.twin, self.fixed[1], i)(read)
            # Of each batch its own, whichever process has it.
            seed = (self.how.seed * 1_000_003 + self.n_draws) * 10_007 + number
            generator = torch.Generator().manual_seed(seed % 2**63)
            chosen = pick(geometry.n_positions(x.shape), self.how.positions, generator)
            target = geometry.outputs(self.dense[node][i], chosen)
            if (added := self._foreign_bias(node, i)) is not None:
                target = target - added
            for other in others:
                shift = geometry.outputs(self.dense[other][i] - self.twin[other][i], chosen)
                target = target + (shift if norm is None else shift / scale_of(norm, self.fixed[0]))
            rows = geometry.patches(x, chosen)
            rows = rows if columns is None else rows[:, columns]
            if not parts:
                means = from_first(lambda *means: means, rows.mean(0), target.mean(0))
                # As the first process sends them, they lie on its device.
                origin = means[0].to(rows.device), means[1].to(rows.device)
                parts = [Sums(geometry.groups, origin) for _ in range(2)]
            parts[number % HELD_OUT == HELD_OUT - 1].add(rows, target)
        for part in parts:
            part.add_shares()
        if not all(part.finite for part in parts):
            raise InputError(f"what {layer!r} reads, or what it is to answer, holds NaN or infinite values")
        # Of one group: the weights that are left of a filter, and a constant.
        n_samples, n_unknowns = sum(part.n_samples for part in parts), int(stays.sum()) + 1
        if n_samples < n_unknowns:
            self.short[layer] = n_unknowns - n_samples
        goes_to = constant_in(self.trace, node, norm)
        left = weight.detach().flatten(1)[:, stays]
        solved = solve(parts, left, stays[stays], self.how.ridge, goes_to is not None)
        if solved is None:
            self.remarks.append(f"the inputs of {layer} leave its weights undetermined: they stay as the cut left them")
            return False
        whole = torch.zeros_like(weight).flatten(1)
        whole[:, stays] = solved[0].to(whole)
        weight.data.copy_(whole.view_as(weight))
        self._touch(f"{layer}.weight")
        if goes_to is not None:
            name, sign = goes_to
            dense, twin = (fixed[self.trace.placeholder(name)] for fixed in self.fixed)
            twin.copy_((dense if sign < 0 else torch.zeros_like(dense)) + sign * solved[1].to(dense))
            self._touch(name)
        return True

    def _stays(self, layer: str, weight: Tensor, node: Node) -> Tensor:
        """Weights of a filter that read a channel that is left, in its shape."""
        stays = torch.ones(weight.shape[1:], dtype=torch.bool, device=weight.device)
        if self._geometry(node, weight).groups == 1:
            stays[list(self.silenced.get(layer, ()))] = False
        return stays

    def _some(self, number: int) -> list[int]:
        """Batches of this process for one step, `STEP_PIXELS` at most in all and others each time."""
        count = seen_in_a_step(self.n_all, self.batch_pixels)
        chosen = {(number * count + i) % self.n_all for i in range(count)}
        return [i for i, own in enumerate(self.numbers) if own in chosen]

    def _refine(self, node: Node, norm: Node | None, others: Sequence[Node], some: Sequence[int]) -> bool:
        """A Gauss-Newton step of the layer that feeds `node` towards the target of `node`; whether that came closer."""
        path = self.paths.get(node)
        if not path:
            return False
        source, feeding = path[0], self.trace.layers[path[0]]
        goes_to = constant_in(self.trace, source, goes_into(source)[0])
        scale: Tensor | float = 1.0 if norm is None else self._channelwise(scale_of(norm, self.fixed[0]), node)
        own_constant = self._constant_of(node, norm)
        weight = self.twin_net.get_parameter(f"{feeding}.weight").detach()
        own = self._bias(source)
        constant = weight.new_zeros(len(weight)) if own is None else own
        reader = self.twin_net.get_parameter(f"{self.trace.layers[node]}.weight").detach()
        # A step must not bring back what the cut has taken from the layer.
        stays = self._stays(feeding, weight, source).to(weight)

        def target(i: int) -> Tensor:
            found: Tensor = self.dense[node][i]
            for other in others:
                lost = self.dense[other][i] - self.twin[other][i]
                found = found + (lost if norm is None else lost / scale)
            return (found if own_constant is None else found - self._channelwise(own_constant, node)) * scale

        def between(z: Tensor, i: int) -> Tensor:
            values: dict[Node, Any] = {source: z}
            read = self._reader(self.twin, self.fixed[1], i)
            for one in path[1:]:
                values[one] = run(one, lambda of: values[of] if of in values else read(of))
            result: Tensor = values[path[-1]]
            return result

        segment = Segment(
            lambda w, c, i: self._times_weight(source, w * stays, some[i]) + self._channelwise(c, source),
            lambda z, i: between(z, some[i]),
            lambda h, i: self._times_weight(node, reader, some[i], h) * scale,
            [target(i) for i in some],
            self._energy(source, weight, some),
            -1 if source.target is LINEAR else 1,
            [self.numbers[i] for i in some],
        )
        step = gauss_newton(segment, weight, constant, goes_to is not None, self.how.seed)
        if step is None:
            return False
        if goes_to is not None:
            name, sign = goes_to
            self.fixed[1][self.trace.placeholder(name)].add_(sign * (step[1] - constant))
            self._touch(name)
        weight.copy_(step[0])
        self._touch(f"{feeding}.weight")
        for one in path:
            self._run_twin(one)
        return True

    def _geometry(self, node: Node, weight: Tensor) -> Geometry:
        return Geometry() if node.target is LINEAR else Geometry.of_call(weight, node.args[2:])
