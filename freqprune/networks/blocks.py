"""Networks without some of their residual blocks: what takes the place of a block, and putting it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from freqprune.errors import InputError

ACTIVATION = "relu()"
"""In a list of what is left of a block: a ReLU that the block's forward calls as a function."""


class Shortcut(nn.Module):
    """What is left of a residual block without its branch: the modules on its shortcut, one after the other, under
    their old names; nothing for an identity.

    Args:
        block: the block.
        left: names of those of its children that stay, in the order in which they run, or `ACTIVATION`.
    """

    def __init__(self, block: nn.Module, left: Sequence[str]) -> None:
        super().__init__()
        for name in left:
            self.add_module(name, nn.ReLU(inplace=True) if name == ACTIVATION else block.get_submodule(name))

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """What else the block was called with is of its branch."""
        for module in self.children():
            x = module(x)
        return x


def drop_blocks(net: nn.Module, left: Mapping[str, Sequence[str]]) -> None:
    """Replace blocks by their shortcuts, in place.

    Args:
        net: the network.
        left: for each block, by name, which of its children stay, see `Shortcut`.

    Raises:
        InputError: for a block or child that the network does not have.
    """
    for name, children in left.items():
        parent, _, child = name.rpartition(".")
        try:
            block = net.get_submodule(name)
            shortcut = Shortcut(block, children)
        except AttributeError as error:
            raise InputError(f"the network has no block {name!r} with {', '.join(children)}: {error}") from None
        shortcut.train(block.training)
        setattr(net.get_submodule(parent), child, shortcut)


def dropped_blocks(net: nn.Module) -> dict[str, list[str]]:
    """The blocks that a network has lost, by name, and what is left of each."""
    return {
        name: [child for child, _ in module.named_children()]
        for name, module in net.named_modules()
        if isinstance(module, Shortcut)
    }


def still_there(left: Mapping[str, Sequence[str]]) -> Callable[[str], bool]:
    """Whether a layer is in a network that has lost blocks.

    >>> is_there = still_there({"layer2.0": ["downsample"]})
    >>> [is_there(name) for name in ("layer2.0.conv1", "layer2.0.downsample.0", "layer2.1.conv1")]
    [False, True, True]
    """

    def is_there(layer: str) -> bool:
        return not any(
            layer.startswith(f"{block}.") and not any(f"{layer}.".startswith(f"{block}.{child}.") for child in children)
            for block, children in left.items()
        )

    return is_there
