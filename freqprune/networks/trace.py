"""A network as the list of its operations in the order in which they run, so that many batches can take each step
together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from freqprune.errors import InputError, first_line
from freqprune.networks.answers import first
from freqprune.networks.hooks import evaluating, followable

_ATEN = torch.ops.aten
CONVOLUTIONS = (_ATEN.conv2d.default, _ATEN.conv2d.padding)
LINEAR = _ATEN.linear.default
BATCH_NORM = _ATEN.batch_norm.default
SUMS = (_ATEN.add.Tensor,)
# In eval mode these hand on what they get.
IDENTITIES = (_ATEN.dropout.default, _ATEN.clone.default, _ATEN.contiguous.default)
# What `Trace.walk` is told for an operation that runs as it is.
PLAIN = object()
# Of a batch, at most: 64 images of 64 x 64.
BATCH_PIXELS = 64**3


class Trace:
    """The operations of a network in eval mode, for batches of one size, by `torch.export`.

    Nothing is changed in place: an operation that writes into its input is replaced by one that does not.

    Args:
        model: the network; left as it is.
        batch: an input batch of the size that all batches will have.

    Attributes:
        nodes: the operations, in order, without inputs and output.
        layers: of each operation that multiplies with the weight of a convolution or linear layer, the layer's name.
        weights_made: names of convolutions and linear layers whose forward multiplies with something else than their
            weight, or more than once.

    Raises:
        InputError: if the network cannot be traced, or the traced operations compute something else.
    """

    def __init__(self, model: nn.Module, batch: Tensor, instead: str = "pruning.compensation=least_squares") -> None:
        with followable(model), torch.no_grad():
            try:
                program = torch.export.export(model, (batch,))
            except Exception as error:
                reason = first_line(error)
                raise InputError(
                    f"torch.export cannot follow {type(model).__name__} ({reason}): its operations depend on the "
                    f"values of its input; use {instead}"
                ) from error
        self._graph = program.graph_module.graph
        _without_writing(self._graph)
        self._constants = program.constants
        placeholders = {node.name: node for node in self._graph.nodes if node.op == "placeholder"}
        self._sources: dict[Node, tuple[InputKind, str]] = {}
        for spec in program.graph_signature.input_specs:
            self._sources[placeholders[spec.arg.name]] = (spec.kind, spec.target or "")
        self.nodes = [node for node in self._graph.nodes if node.op not in ("placeholder", "output")]
        odd = next((node for node in self.nodes if node.op != "call_function"), None)
        if odd is not None:
            raise InputError(f"{type(model).__name__} runs {odd.op} {odd.target}, which cannot be taken step by step")
        self._output = next(node for node in self._graph.nodes if node.op == "output")
        self.layers, self.weights_made = self._find_layers(model)
        order = {node: number for number, node in enumerate(self._graph.nodes)}
        self._last_used: dict[Node, list[Node]] = {}
        for node in [self.entrance, *self.nodes]:
            last = max(node.users, key=order.__getitem__, default=node)
            self._last_used.setdefault(last, []).append(node)

    def _find_layers(self, model: nn.Module) -> tuple[dict[Node, str], list[str]]:
        kinds = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
        layers = {}
        for node in self.nodes:
            if node.target not in (*CONVOLUTIONS, LINEAR):
                continue
            _, target = self._sources.get(node.args[1], (None, ""))
            name = target.removesuffix(".weight")
            if target.endswith(".weight") and name in kinds and len(node.args[1].users) == 1:
                layers[node] = name
        return layers, [name for name in kinds if name not in layers.values()]

    def entering(self, modules: Collection[str]) -> dict[Node, str]:
        """Operations that read what comes into some modules, by the name of the module."""
        inside = {
            node: {path for path, _ in node.meta.get("nn_module_stack", {}).values()} & {*modules}
            for node in self.nodes
        }
        return {
            node: name
            for node, names in inside.items()
            for name in names
            if any(
                name not in inside.get(source, ()) and self.source(source) in (None, "")
                for source in node.all_input_nodes
            )
        }

    def inputs(self, model: nn.Module) -> dict[Node, Tensor]:
        """Parameters, buffers and constants of a network with these operations, by the node that stands for each."""
        found: dict[Node, Tensor] = {}
        for node, (kind, target) in self._sources.items():
            if kind == InputKind.PARAMETER:
                found[node] = model.get_parameter(target).detach()
            elif kind == InputKind.BUFFER:
                found[node] = model.get_buffer(target).detach()
            elif kind != InputKind.USER_INPUT:
                found[node] = self._constants[target]
        return found

    def source(self, node: Any) -> str | None:
        """Name of the parameter or buffer that a node stands for; None for any other."""
        return self._sources[node][1] if node in self._sources else None

    def placeholder(self, name: str) -> Node:
        """The node that stands for a parameter or buffer."""
        return next(node for node in self._sources if self.source(node) == name)

    @property
    def entrance(self) -> Node:
        """The network's input."""
        return next(node for node, (kind, _) in self._sources.items() if kind == InputKind.USER_INPUT)

    @property
    def exit(self) -> Node:
        """The network's (first) output."""
        outputs: Any = self._output.args[0]
        # A part that is nothing, such as a loss that was not asked for, is none.
        return next(one for one in outputs if isinstance(one, Node))

    def walk(
        self,
        values: dict[Node, Any],
        fixed: Mapping[Node, Tensor],
        instead: Callable[[Node, Callable[[Node], Any]], Any] | None = None,
        nodes: Sequence[Node] | None = None,
    ) -> Iterator[Node]:
        """Run operations one by one; each is handed out once its result is in `values`, and what nobody needs any more
        is dropped afterwards.

        Args:
            values: results so far, of `entrance` at least; changed in place.
            fixed: parameters and buffers, from `inputs`.
            instead: the result of an operation, of it and of what reads values for it; `PLAIN` for its own.
            nodes: the operations; all if left out.
        """
        read = reader(fixed, values)
        for node in self.nodes if nodes is None else nodes:
            result = PLAIN if instead is None else instead(node, read)
            values[node] = run(node, read) if result is PLAIN else result
            yield node
            for done in self.done_with(node):
                values.pop(done, None)

    def check(self, model: nn.Module, batch: Tensor, answer: Tensor, way_out: str) -> None:
        """Raise InputError, with a way out, unless the network gives the answer that its operations gave."""
        with evaluating(model), torch.no_grad():
            expected = first(model(batch))
        if not same_answer(expected, answer):
            raise InputError(
                f"the operations that torch.export finds in {type(model).__name__} compute something else than it "
                f"does; {way_out}"
            )

    def done_with(self, node: Node) -> Sequence[Node]:
        """Operations whose results nobody needs after `node` has run."""
        return self._last_used.get(node, ())


def reader(fixed: Mapping[Node, Tensor], values: Mapping[Node, Any]) -> Callable[[Node], Any]:
    """What reads a node: a parameter or buffer, from `Trace.inputs`, or a result so far."""
    return lambda of: fixed[of] if of in fixed else values[of]


def groups_of(node: Node) -> int:
    """Groups of a layer's operation."""
    return int(node.args[6]) if node.target in CONVOLUTIONS and len(node.args) > 6 else 1  # type: ignore[arg-type]


def run(node: Node, values: Any) -> Any:
    """The result of an operation; `values` gives that of each node it reads."""
    arguments = map_arg(node.args, values)
    named = map_arg(node.kwargs, values)
    return node.target(*arguments, **named)  # type: ignore[operator]


def _without_writing(graph: Graph) -> None:
    """Replace operations that write into their first argument; who reads that argument later reads the result."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        packet, overload = node.target._schema.name.split("::")[1], node.target._overloadname
        if not node.target._schema.is_mutable or not packet.endswith("_"):
            continue
        plain = getattr(getattr(_ATEN, packet.removesuffix("_"), None), overload, None)
        if plain is None:
            continue
        written = node.args[0]
        node.target = plain
        if isinstance(written, Node):
            later = [user for user in written.users if user is not node and order[user] > order[node]]
            for user in later:
                user.replace_input_with(written, node)


def images_at_once(images: Tensor) -> int:
    """How many images of a size to take at once: 64, or fewer of more than 64 x 64 pixels."""
    return max(1, min(64, BATCH_PIXELS // max(1, images[0, 0].numel())))


def equal_batches(images: Iterable[Tensor], size: int | None = None) -> list[Tensor]:
    """Batches of one size, of at most `size` images (`images_at_once` if left out) and of at least half as many; the
    size is the one that leaves out fewest images at the end."""
    everything = torch.cat(list(images))
    most = min(size or images_at_once(everything), len(everything))
    each = min(range(most, most // 2, -1), key=lambda one: len(everything) % one)
    return list(everything[: len(everything) // each * each].split(each))


def same_answer(expected: Tensor, found: Tensor) -> bool:
    """Whether two ways through a network came to the same, within a thousandth of the largest value, or, in half
    precision, four of its last digits."""
    share = max(1e-3, 4 * torch.finfo(expected.dtype).eps) if expected.is_floating_point() else 1e-3
    largest = float(expected.abs().max().clamp(min=1e-6))
    return expected.shape == found.shape and torch.allclose(expected, found, rtol=share, atol=share * largest)
