"""What a convolution or linear layer really multiplies with its weight: rows of inputs, one for each position of its
output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input; of a linear layer a kernel of size 0 that stays where it is.

    Attributes:
        kernel: height and width, None for a linear layer.
        stride: down and across.
        padding: pixels above, below, left, right (as for `torch.nn.functional.pad`, last dimension first).
        dilation: down and across.
        groups: number of groups.
    """

    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @staticmethod
    def of_call(weight: Tensor, arguments: Sequence[Any]) -> Geometry:
        """From the arguments of `torch.nn.functional.conv2d` after the weight: bias, stride, padding, dilation,
        groups."""
        given = [*arguments, *(None, 1, 0, 1, 1)[len(arguments) :]]
        stride, dilation = _pair(given[1]), _pair(given[3])
        kernel = (int(weight.shape[2]), int(weight.shape[3]))
        if isinstance(given[2], str):
            totals = [d * (k - 1) if given[2] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
        else:
            (top, left) = (bottom, right) = _pair(given[2])
        return Geometry(kernel, stride, (left, right, top, bottom), dilation, int(given[4]))

    def grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output for an input of this shape; of a linear layer positions and 1."""
        if self.kernel is None:
            return int(torch.Size(shape[1:-1]).numel()), 1
        left, right, top, bottom = self.padding
        sizes = (shape[-2] + top + bottom, shape[-1] + left + right)
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        height, width = ((size - span - 1) // s + 1 for size, span, s in zip(sizes, spans, self.stride, strict=True))
        return height, width

    def n_positions(self, shape: Sequence[int]) -> int:
        """Positions of the output for an input of this shape."""
        height, width = self.grid(shape)
        return height * width

    def patches(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Inputs at some positions of the output, ``(n_images * n_positions, n_values)``; the values of a group of
        channels lie together."""
        if self.kernel is None:
            return x.reshape(len(x), -1, x.shape[-1])[:, chosen].flatten(0, 1)
        _, width = self.grid(x.shape)
        x = F.pad(x, self.padding) if any(self.padding) else x
        rows = (chosen // width * self.stride[0])[:, None] + torch.arange(self.kernel[0]) * self.dilation[0]
        columns = (chosen % width * self.stride[1])[:, None] + torch.arange(self.kernel[1]) * self.dilation[1]
        picked = x[:, :, rows[:, :, None].to(x.device), columns[:, None, :].to(x.device)]
        # (n_images, n_channels, n_positions, kernel, kernel) to one row a sample.
        return picked.permute(0, 2, 1, 3, 4).flatten(2).flatten(0, 1)

    def outputs(self, y: Tensor, chosen: Tensor) -> Tensor:
        """Outputs at the same positions, ``(n_images * n_positions, n_outputs)``."""
        if self.kernel is None:
            return y.reshape(len(y), -1, y.shape[-1])[:, chosen].flatten(0, 1)
        return y.flatten(2)[:, :, chosen].transpose(1, 2).flatten(0, 1)


def _pair(value: Any) -> tuple[int, int]:
    found = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return found[0], found[-1]


def pick(n_positions: int, wanted: int | None, generator: torch.Generator) -> Tensor:
    """Random positions, all of them if no more are there than wanted."""
    if wanted is None or wanted >= n_positions:
        return torch.arange(n_positions)
    return torch.randperm(n_positions, generator=generator)[:wanted]


class _Multiplications(TorchFunctionMode):
    """Calls `seen(layer, input, geometry)` whenever a layer's own weight is multiplied with something."""

    def __init__(self, weights: Mapping[int, str], seen: Callable[[str, Tensor, Geometry], None]) -> None:
        super().__init__()
        self.weights, self.seen = weights, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in (torch.conv2d, F.linear):
            order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            given = dict(zip(order, args, strict=False)) | named
            layer = self.weights.get(id(given["weight"]))
            if layer is not None:
                defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
                rest = [given.get(name, default) for name, default in defaults.items()]
                geometry = Geometry.of_call(given["weight"], rest) if func is torch.conv2d else Geometry()
                self.seen(layer, given["input"].detach(), geometry)
        return func(*args, **named)


@contextmanager
def multiplications(
    model: nn.Module, layers: Sequence[str], seen: Callable[[str, Tensor, Geometry], None]
) -> Iterator[None]:
    """While this is open, `seen` is called with what each layer really multiplies with its weight, as its forward pads
    or shapes it."""
    weights = {id(model.get_parameter(f"{name}.weight")): name for name in layers}
    with _Multiplications(weights, seen):
        yield
