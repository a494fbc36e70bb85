"""Names and patterns → the layers of a network that are meant."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from torch import nn

from freqprune.errors import InputError, closest
from freqprune.networks import dropped_blocks

LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)


def default_layers(model: nn.Module) -> list[str]:
    """Names of all convolutions; of all linear layers if there is no convolution."""
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)]
    return convolutions or [*_called(model, nn.Linear)]


def _called(model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """Modules of some kinds but the last layer of attentions, with whose weight these multiply themselves."""
    inside = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    return {name: one for name, one in model.named_modules() if isinstance(one, kinds) and id(one) not in inside}


def unread_layers(model: nn.Module) -> str | None:
    """Of a network in which most layers are linear, such as a transformer, the pattern of those that `default_layers`
    leaves out: the commonest, of these the widest. None for others, of which it leaves out the last layer and a few
    gates.

    >>> mlp = [nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(2)]
    >>> unread_layers(nn.Sequential(nn.Conv2d(3, 8, 4), *mlp, nn.Linear(8, 99)))
    '*.0'
    """
    usual = default_layers(model)
    linear = {name: one for name, one in _called(model, nn.Linear).items() if isinstance(one, nn.Linear)}
    if usual == [*linear] or len(linear) <= len(usual):
        return None
    widths: dict[str, list[int]] = {}
    for name, layer in linear.items():
        widths.setdefault(re.sub(r"\d+(?=\.)", "*", name), []).append(layer.out_features)
    # A pattern that convolutions match too would read these alone.
    patterns = [one for one in widths if not fnmatch.filter(usual, one)]
    return max(patterns, key=lambda one: (len(widths[one]), max(widths[one])), default=None)


def match_layers(available: Sequence[str], patterns: str | Sequence[str]) -> list[str]:
    """Names that match any of the shell-style patterns, in the order of `available`.

    Raises:
        InputError: for a pattern that matches nothing.

    >>> match_layers(["conv1", "layer1.0.conv1"], "layer*")
    ['layer1.0.conv1']
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in wanted:
        if not fnmatch.filter(available, pattern):
            raise InputError(
                f"layer pattern {pattern!r} matches none of {', '.join(available)}{closest(pattern, available)}"
            )
    return [name for name in available if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)]


def pick_layers(model: nn.Module, patterns: str | Sequence[str] | None) -> list[str]:
    """Layers to record by shell-style patterns: among the convolutions, or where those do not match, all convolutions,
    linear layers and attentions.

    A name without wildcards may be any module. None picks `default_layers`.

    Raises:
        InputError: for a pattern that matches nothing.
    """
    usual = default_layers(model)
    if patterns is None:
        return usual
    modules = {name: module for name, module in model.named_modules() if name}
    other = [name for name in _called(model, LAYERS) if name]
    picked: list[str] = []
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    # Once blocks have gone, a pattern may match none of what is left, unless all do.
    for pattern in of_what_is_left(model, given) or given:
        pool = next(
            (pool for pool in (usual, other) if fnmatch.filter(pool, pattern)),
            [pattern] if pattern in modules else other,
        )
        picked += [name for name in match_layers(pool, pattern) if name not in picked]
    return [name for name in modules if name in picked]


def of_what_is_left(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Patterns without those that match nothing, in a network whose blocks have gone; all of them in others."""
    if not dropped_blocks(model):
        return list(patterns)
    names = [*_called(model, LAYERS)]
    modules = {name for name, _ in model.named_modules()}
    return [one for one in patterns if one in modules or fnmatch.filter(names, one)]
