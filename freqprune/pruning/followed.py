"""Inner units that torch-pruning does not know or cannot follow: found in the network's operations, where every channel
can be followed to who reads it. Hidden linear layers, such as those of a transformer's perceptrons, and convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.fx import Node
from torch_pruning.dependency.dependency import Dependency
from torch_pruning.dependency.group import Group

from freqprune.errors import InputError
from freqprune.networks import BATCH_NORM, CONVOLUTIONS, IDENTITIES, LINEAR, Trace, groups_of

_ATEN = torch.ops.aten
# What acts on every channel by itself, with further arguments that are no tensors.
_ELEMENTWISE = (
    *IDENTITIES,
    *(
        getattr(_ATEN, name).default
        for name in ("relu", "gelu", "silu", "hardswish", "hardtanh", "relu6", "sigmoid", "hardsigmoid", "tanh", "mish",
                     "leaky_relu", "elu", "celu", "selu", "softplus", "square", "alias", "detach")
    ),
    _ATEN.pow.Tensor_Scalar, _ATEN.to.dtype, _ATEN._to_copy.default,
)  # fmt: skip
# The same for the channels of maps, which come second.
_OF_MAPS = (_ATEN.max_pool2d.default, _ATEN.avg_pool2d.default, _ATEN.adaptive_avg_pool2d.default)
_SCALAR_OR_GATE = (_ATEN.mul.Tensor, _ATEN.add.Tensor, _ATEN.div.Tensor, _ATEN.sub.Tensor)


@dataclass
class Followed:
    """Layers whose outputs go together, channel by channel.

    Attributes:
        members: convolutions or linear layers that write the channels.
        between: batch norms and depthwise convolutions on the way.
        readers: convolutions or linear layers that read them.
    """

    members: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)


def follow(model: nn.Module, example: Tensor, convolutions: bool = False) -> dict[str, Followed]:
    """Inner units of a network by the name of their first layer, in the order in which they run; none for a network
    whose operations cannot be followed.

    Args:
        model: the network.
        example: an input batch.
        convolutions: look for those of convolutions too, and not only of linear layers.
    """
    if not convolutions and not _worth_a_look(model):
        return {}
    try:
        trace = Trace(model, example)
    except InputError:
        return {}
    found: dict[str, Followed] = {}
    taken: set[str] = set()
    for node, name in trace.layers.items():
        if name in taken or not (node.target is LINEAR or (convolutions and groups_of(node) == 1)):
            continue
        unit = _follow(node, trace)
        if unit is not None and not taken & {*unit.members}:
            found[name] = unit
            taken |= {*unit.members}
    return found


def followed_group(modules: Mapping[str, nn.Module], unit: Followed, idxs: Sequence[int]) -> Any:
    """The removal of some channels of a unit as a group of torch-pruning's, for its surgery and importances."""
    steps = []
    for names, acts in ((unit.members, _WRITE), (unit.between, _PASS), (unit.readers, _READ)):
        for name in names:
            act = next(act for kind, act in acts.items() if isinstance(modules[name], kind))
            steps.append((name, act, list(idxs), list(idxs)))
    return joined(modules, steps)


def joined(modules: Mapping[str, nn.Module], steps: Sequence[tuple[str, Any, list[int], list[int]]]) -> Any:
    """A group of torch-pruning's that loses what it is told to.

    Args:
        modules: by name.
        steps: name of a module, what is done to it, the numbers of the channels it is done to, and for each of these
            the channel of the first module that it goes with.
    """
    group = Group()
    group._DG = _Bookkeeper(modules)
    nodes = [tp.dependency.Node(module=modules[name], grad_fn=None, name=name) for name, *_ in steps]
    for node, (_, act, idxs, roots) in zip(nodes, steps, strict=True):
        group.add_dep(Dependency(act, act, source=nodes[0], target=node), idxs)
        group[len(group) - 1].root_idxs = roots
    return group


_WRITE = {nn.Linear: tp.prune_linear_out_channels, nn.Conv2d: tp.prune_conv_out_channels}
_PASS = {
    nn.modules.batchnorm._BatchNorm: tp.prune_batchnorm_out_channels,
    nn.Conv2d: tp.prune_depthwise_conv_out_channels,
}
_READ = {nn.Linear: tp.prune_linear_in_channels, nn.Conv2d: tp.prune_conv_in_channels}


class _Bookkeeper:
    """What torch-pruning's groups report to."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._module2name = {module: name for name, module in modules.items()}
        self._pruning_history: list[Any] = []

    def is_out_channel_pruning_fn(self, act: Any) -> bool:
        return act in (*_WRITE.values(), *_PASS.values())


def _worth_a_look(model: nn.Module) -> bool:
    """Whether some linear layer is as wide as another one takes."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return bool({layer.out_features for layer in layers} & {layer.in_features for layer in layers})


def _depthwise(node: Node) -> bool:
    """Whether an operation is a convolution with a filter of its own for every channel."""
    source: Any = node.args[0]
    return (
        node.target in CONVOLUTIONS and groups_of(node) == source.meta["val"].shape[1] == node.meta["val"].shape[1] > 1
    )


def _follow(start: Node, trace: Trace) -> Followed | None:
    """From a layer to the layers that read it; None if its channels go anywhere else."""
    layers, maps = trace.layers, start.target is not LINEAR
    width, found = start.meta["val"].shape[1 if maps else -1], Followed()
    ahead, carried = [start], set()
    while ahead:
        node = ahead.pop(0)
        if node in carried:
            continue
        carried.add(node)
        if node is start or (node.target in (LINEAR, *CONVOLUTIONS) and not _depthwise(node)):
            if node not in layers or layers[node] in found.members:
                return None
            found.members.append(layers[node])
        if not node.users:
            return None
        for user in node.users:
            # Maps that are averaged away are features.
            reads = CONVOLUTIONS if maps and node.meta["val"].dim() == 4 else (LINEAR,)
            if user.target in reads and user.args[0] is node and user in layers:
                if not _depthwise(user):
                    if maps and reads is CONVOLUTIONS and groups_of(user) != 1:
                        return None
                    found.readers.append(layers[user])
                    continue
                found.between.append(layers[user])
                ahead.append(user)
            elif user.target in (*_ELEMENTWISE, *(_OF_MAPS if maps else ())) and user.args[0] is node:
                ahead.append(user)
            elif maps and user.target is BATCH_NORM and user.args[0] is node:
                norm = (trace.source(user.args[3]) or "").removesuffix(".running_mean")
                if not norm or len(user.args[3].users) != 1:  # type: ignore[union-attr]
                    return None
                found.between.append(norm)
                ahead.append(user)
            elif maps and user.target is _ATEN.mean.dim and [d % 4 for d in user.args[1]] == [2, 3]:  # type: ignore[union-attr, operator]
                ahead.append(user)
            elif user.target in _SCALAR_OR_GATE:
                others = [arg for arg in user.args[:2] if isinstance(arg, Node) and arg is not node]
                gates = [_source(other, width, start) for other in others if other not in carried]
                if any(gate is None for gate in gates):
                    return None
                ahead += [user, *(gate for gate in gates if gate is not None)]
            else:
                return None
    unique = len(set(found.readers)) == len(found.readers) and not {*found.readers} & {*found.members}
    return found if found.readers and unique else None


def _source(node: Node, width: int, start: Node) -> Node | None:
    """The layer that a gate of so many channels comes from, with nothing between that moves channels."""
    kinds, dim = ((LINEAR,), -1) if start.target is LINEAR else (CONVOLUTIONS, 1)
    passing = (*_ELEMENTWISE, BATCH_NORM, *_OF_MAPS) if dim == 1 else _ELEMENTWISE
    while (node.target in passing or (dim == 1 and _depthwise(node))) and isinstance(node.args[0], Node):
        node = node.args[0]
    whole = node.target in kinds and (node.target is LINEAR or groups_of(node) == 1)
    return node if whole and node.meta["val"].shape[dim] == width else None
