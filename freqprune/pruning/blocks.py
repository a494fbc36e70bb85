"""Residual blocks that may go as a whole, found in the network's operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from freqprune.networks import ACTIVATION, LINEAR, PLAIN, SUMS, Trace, run

_RELU = torch.ops.aten.relu.default


@dataclass(frozen=True)
class Block:
    """A residual block.

    Attributes:
        name: the module.
        ends: operations whose results its branches add to the shortcut.
        branch: operations of its branches.
        gone: operations that go with it: its branches, its sums, and an activation that changes nothing any more.
        layers: convolutions and linear layers of its branches.
        left: children that stay, see `freqprune.networks.Shortcut`.
    """

    name: str
    ends: tuple[Node, ...]
    branch: frozenset[Node]
    gone: frozenset[Node]
    layers: tuple[str, ...]
    left: tuple[str, ...]


def find_blocks(model: nn.Module, trace: Trace) -> dict[str, Block]:
    """Blocks of a network by name, in the order in which they run: modules with one input and one output that are
    joined by sums only, and by modules on the shortcut. Of blocks within blocks the innermost.

    Args:
        model: the network.
        trace: its operations.
    """
    inside: dict[str, list[Node]] = {}
    for node in trace.nodes:
        for path, _ in node.meta.get("nn_module_stack", {}).values():
            inside.setdefault(path, []).append(node)
    found: dict[str, Block] = {}
    modules = dict(model.named_modules())
    # Inner modules first.
    for path in sorted(inside, key=lambda name: -name.count(".")):
        owner = modules.get(path)
        if not path or owner is None or any(name.startswith(f"{path}.") for name in found):
            continue
        block = _block(path, inside, trace)
        if block is not None:
            found[path] = block
    order = {node: number for number, node in enumerate(trace.nodes)}
    return dict(sorted(found.items(), key=lambda item: order[item[1].ends[0]]))


def answers_without(
    trace: Trace,
    fixed: Mapping[Node, Tensor],
    batch: Tensor,
    blocks: Sequence[Block],
    silenced: Mapping[str, Sequence[int]] | None = None,
) -> Tensor:
    """A network's answer to a batch with the branches of some blocks, and some channels where they are read, silenced.

    Args:
        trace: the network's operations.
        fixed: its parameters and buffers, from `Trace.inputs`.
        batch: network inputs of the size of the trace.
        blocks: the blocks.
        silenced: input channels (of a linear layer: features) set to zero, by layer or parameter-free shortcut.
    """
    silenced = silenced or {}
    layers = {node: silenced[name] for node, name in trace.layers.items() if name in silenced}
    readers = layers | shortcuts_of(trace, silenced)
    ends = {node for block in blocks for node in block.ends}
    branch = {node for block in blocks for node in block.branch} - ends

    def instead(node: Node, read: Callable[[Node], Any]) -> Any:
        if node in ends:
            meta = node.meta["val"]
            return torch.zeros(meta.shape, dtype=meta.dtype, device=batch.device)
        return without_channels(node, readers[node], read) if node in readers else PLAIN

    values: dict[Node, Any] = {trace.entrance: batch}
    for _ in trace.walk(values, fixed, instead, [node for node in trace.nodes if node not in branch]):
        pass
    answer = values[trace.exit]
    assert isinstance(answer, Tensor)
    return answer


def shortcuts_of(trace: Trace, silenced: Mapping[str, Sequence[int]]) -> dict[Node, Sequence[int]]:
    """Operations that read silenced channels in modules without weights, such as `freqprune.networks.IndexShortcut`,
    each with the channels; arguments as of `answers_without`."""
    entered = trace.entering(set(silenced) - set(trace.layers.values()))
    return {node: silenced[name] for node, name in entered.items()}


def without_channels(node: Node, channels: Sequence[int], read: Callable[[Node], Any]) -> Any:
    """The result of an operation that reads some channels of its first input as zero."""
    x = read(node.args[0]).clone()  # type: ignore[arg-type]
    x[(..., list(channels)) if node.target is LINEAR else (slice(None), list(channels))] = 0
    return run(node, lambda of: x if of is node.args[0] else read(of))


def _block(path: str, inside: dict[str, list[Node]], trace: Trace) -> Block | None:
    nodes = set(inside[path])
    entries = {
        source for node in nodes for source in node.all_input_nodes
        if source not in nodes and trace.source(source) in (None, "")
    }  # fmt: skip
    entries |= {trace.entrance} & {source for node in nodes for source in node.all_input_nodes}
    exits = [node for node in nodes if any(user not in nodes for user in node.users)]
    if len(entries) != 1 or len(exits) != 1:
        return None
    entry, at = entries.pop(), exits[0]
    weights = {node: len(_behind([node], nodes) & trace.layers.keys()) for node in _ahead(entry, nodes)} | {entry: 0}
    spine: list[Node] = []
    ends: list[Node] = []
    sums: list[Node] = []
    while at is not entry:
        inputs = [source for source in at.all_input_nodes if source in weights]
        if at.target in SUMS and len(inputs) == 2 and not at.kwargs:
            shortcut, end = sorted(inputs, key=weights.__getitem__)
            if weights[shortcut] == weights[end] or end.meta["val"].shape != at.meta["val"].shape:
                return None
            ends.append(end)
            sums.append(at)
            at = shortcut
            continue
        if len(inputs) != 1:
            return None
        spine.insert(0, at)
        at = inputs[0]
    if not ends:
        return None
    branch = _behind(ends, nodes) - {*sums, *spine}
    # After a ReLU another one changes nothing.
    if entry.target is _RELU and all(node.target is _RELU for node in spine):
        spine = []
    left = _children(path, spine, inside)
    # What is neither on the shortcut nor only for it.
    gone = nodes - set(spine) - (_behind(spine, nodes) - branch - {*sums})
    layers = tuple(dict.fromkeys(trace.layers[node] for node in trace.nodes if node in branch and node in trace.layers))
    if left is None or not layers:
        return None
    return Block(path, tuple(ends), frozenset(branch), frozenset(gone), layers, tuple(left))


def _behind(ends: Iterable[Node], among: set[Node]) -> set[Node]:
    """Operations among some that others come from, those others too."""
    found: set[Node] = set()
    ahead = list(ends)
    while ahead:
        node = ahead.pop()
        if node in among and node not in found:
            found.add(node)
            ahead += node.all_input_nodes
    return found


def _ahead(start: Node, among: set[Node]) -> set[Node]:
    """Operations among some that come from another one."""
    found: set[Node] = set()
    ahead = [start]
    while ahead:
        new = [user for user in ahead.pop().users if user in among and user not in found]
        found.update(new)
        ahead += new
    return found


def _children(path: str, spine: list[Node], inside: dict[str, list[Node]]) -> list[str] | None:
    """Children of a module that do what the operations on its shortcut do; None if they do more, or are no modules."""
    found: list[str] = []
    for node in spine:
        owners = [owner for owner, _ in node.meta["nn_module_stack"].values() if owner.startswith(f"{path}.")]
        if not owners:
            if node.target is not _RELU:
                return None
            found.append(ACTIVATION)
            continue
        child = min(owners, key=len)
        name = child.removeprefix(f"{path}.")
        if "." in name:
            return None
        if name not in found:
            found.append(name)
        elif found[-1] != name:
            return None
    done = {node for name in found if name != ACTIVATION for node in inside[f"{path}.{name}"]}
    # What a child computes beside the way, such as masks from its buffers, comes along; weights of a branch may not.
    return found if all(_beside(node, set(spine)) for node in done) else None


def _beside(node: Node, spine: set[Node]) -> bool:
    return node in spine or all(user in spine or _beside(user, spine) for user in node.users)
