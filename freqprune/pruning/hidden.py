"""Hidden linear layers, such as those of a transformer's perceptrons: found in the network's operations, where every
feature can be followed to who reads it."""

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
from freqprune.networks import IDENTITIES, LINEAR, Trace

_ATEN = torch.ops.aten
# What acts on every feature by itself, with further arguments that are no tensors.
_ELEMENTWISE = (
    *IDENTITIES,
    *(
        getattr(_ATEN, name).default
        for name in ("relu", "gelu", "silu", "hardswish", "hardtanh", "relu6", "sigmoid", "hardsigmoid", "tanh", "mish",
                     "leaky_relu", "elu", "celu", "selu", "softplus", "square", "alias", "detach")
    ),
    _ATEN.pow.Tensor_Scalar, _ATEN.to.dtype, _ATEN._to_copy.default,
)  # fmt: skip
_SCALAR_OR_GATE = (_ATEN.mul.Tensor, _ATEN.add.Tensor, _ATEN.div.Tensor, _ATEN.sub.Tensor)


@dataclass
class Hidden:
    """Linear layers whose outputs go together, feature by feature, and the linear layers that read them."""

    members: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)


def hidden_layers(model: nn.Module, example: Tensor) -> dict[str, Hidden]:
    """Hidden linear layers of a network by the name of the first, in the order in which they run; none for a network
    whose operations cannot be followed."""
    if not _worth_a_look(model):
        return {}
    try:
        trace = Trace(model, example)
    except InputError:
        return {}
    found: dict[str, Hidden] = {}
    taken: set[str] = set()
    for node, name in trace.layers.items():
        if node.target is LINEAR and name not in taken:
            hidden = _follow(node, trace.layers)
            if hidden is not None and not taken & {*hidden.members}:
                found[name] = hidden
                taken |= {*hidden.members}
    return found


def hidden_group(modules: Mapping[str, nn.Module], hidden: Hidden, idxs: Sequence[int]) -> Any:
    """The removal of some features of hidden layers as a group of torch-pruning's, for its surgery and importances."""
    group = Group()
    group._DG = _Bookkeeper(modules)
    root: Any = None
    for names, act in ((hidden.members, tp.prune_linear_out_channels), (hidden.readers, tp.prune_linear_in_channels)):
        for name in names:
            node = tp.dependency.Node(module=modules[name], grad_fn=None, name=name)
            root = root or node
            group.add_dep(Dependency(act, act, source=root, target=node), list(idxs))
            group[len(group) - 1].root_idxs = list(idxs)
    return group


class _Bookkeeper:
    """What torch-pruning's groups report to."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._module2name = {module: name for name, module in modules.items()}
        self._pruning_history: list[Any] = []

    def is_out_channel_pruning_fn(self, act: Any) -> bool:
        return bool(act == tp.prune_linear_out_channels)


def _worth_a_look(model: nn.Module) -> bool:
    """Whether some linear layer is as wide as another one takes."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return bool({layer.out_features for layer in layers} & {layer.in_features for layer in layers})


def _follow(start: Node, layers: Mapping[Node, str]) -> Hidden | None:
    """From a linear layer to the linear layers that read it; None if its features go anywhere else."""
    width, found = start.meta["val"].shape[-1], Hidden()
    ahead, carried = [start], set()
    while ahead:
        node = ahead.pop(0)
        if node in carried:
            continue
        carried.add(node)
        if node.target is LINEAR:
            if node not in layers or layers[node] in found.members:
                return None
            found.members.append(layers[node])
        if not node.users:
            return None
        for user in node.users:
            if user.target is LINEAR and user.args[0] is node and user in layers:
                found.readers.append(layers[user])
            elif user.target in _ELEMENTWISE and user.args[0] is node:
                ahead.append(user)
            elif user.target in _SCALAR_OR_GATE:
                others = [arg for arg in user.args[:2] if isinstance(arg, Node) and arg is not node]
                gates = [_source(other, width) for other in others]
                if any(gate is None for gate in gates):
                    return None
                ahead += [user, *(gate for gate in gates if gate is not None)]
            else:
                return None
    unique = len(set(found.readers)) == len(found.readers) and not {*found.readers} & {*found.members}
    return found if found.readers and unique else None


def _source(node: Node, width: int) -> Node | None:
    """The linear layer that a gate of so many features comes from, with nothing between that moves features."""
    while node.target in _ELEMENTWISE and isinstance(node.args[0], Node):
        node = node.args[0]
    return node if node.target is LINEAR and node.meta["val"].shape[-1] == width else None
