"""Which dimension of an output counts filters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from freqprune.tagging.calls import Call

# Of maps, whose channels come first.
IN_MAPS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


def _width(module: Any) -> int | None:
    """Filters of a layer; None of others. A layer norm of several dimensions does not say which of them they are."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.RNNBase):
        return (module.proj_size or module.hidden_size) * (1 + module.bidirectional)
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return module.normalized_shape[0]
    return None


def channel_dim_of(layer: nn.Module, output: Tensor, before: Sequence[Call]) -> int:
    """The dimension of a module's output that counts filters: the first after the images of maps, the last of tokens.

    Four dimensions that layers of maps have made are maps, whatever became of their channels. Else it is the dimension
    that is as wide as the last layer in the module, or before it if there is none in it; where both are or neither is,
    the kind of that layer says it.
    """
    inside = [module for module in layer.modules() if _width(module) is not None]
    ran = [call.what for call in before if call.kind == "module" and _width(call.what) is not None]
    last = ([*ran, *inside] or [None])[-1]
    in_maps = isinstance(last, IN_MAPS)
    if output.dim() < 3:
        return output.dim() - 1
    if output.dim() == 4 and (last is None or in_maps):
        return 1
    first, final = (output.shape[dim] == _width(last) for dim in (1, -1))
    if first == final:
        # Of layers that say how many dimensions their maps have.
        said = 2 + len(last.kernel_size) if isinstance(last, nn.modules.conv._ConvNd) else None
        said = 4 if isinstance(last, nn.BatchNorm2d) else said
        first = (in_maps and said in (None, output.dim())) or (not inside and output.dim() == 4)
    return 1 if first else output.dim() - 1
