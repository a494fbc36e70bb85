"""Attention heads as units: which can go, found by a trial, and their removal as a group of torch-pruning's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from freqprune.networks import Heads, evaluating, find_heads, first, hooked, keep_heads, same_answer
from freqprune.pruning.followed import joined


class _Holder:
    """The module that holds the heads, which counts them and may have parameters of theirs."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads

    def lose(self, module: nn.Module, gone: Sequence[int]) -> None:
        keep_heads(module, self.heads, [head for head in range(self.heads.n_heads) if head not in set(gone)])


def head_group(modules: Mapping[str, nn.Module], heads: Heads, gone: Sequence[int]) -> Any:
    """The removal of some heads as a group of torch-pruning's, for its surgery and importances."""
    rows, columns = heads.rows(gone), heads.columns(gone)
    return joined(
        modules,
        [
            (heads.qkv, tp.prune_linear_out_channels, rows, rows),
            (heads.module, _Holder(heads).lose, list(gone), []),
            # A head's values are the last third of its rows.
            (heads.proj, tp.prune_linear_in_channels, columns, rows[2 * len(columns) :]),
        ],
    )


def movable_heads(model: nn.Module, example: Tensor) -> tuple[dict[str, Heads], list[str]]:
    """Modules whose forward does with half of their heads what it does with the others silenced, by the name of their
    `qkv`, and those names of modules that are tied to their number of heads.

    Args:
        model: the network; left as it is.
        example: an input batch.
    """
    candidates = {name: heads for name, heads in find_heads(model).items() if heads.n_heads > 1}
    if not candidates:
        return {}, []
    calls: dict[str, tuple[Any, Any, Any]] = {}
    modules = dict(model.named_modules())

    def seen(name: str) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.setdefault(name, (args, kwargs, output))

        return after

    movable, tied = {}, []
    with evaluating(model), torch.no_grad():
        with hooked([(modules[heads.module], None, seen(name)) for name, heads in candidates.items()], kwargs=True):
            model(example.clone())
        for name, heads in candidates.items():
            if name in calls and _does_with_half(modules[heads.module], heads, *calls[name]):
                movable[name] = heads
            else:
                tied.append(name)
    return movable, tied


def _does_with_half(module: nn.Module, heads: Heads, args: Any, kwargs: Any, output: Any) -> bool:
    gone = range(heads.n_heads // 2, heads.n_heads)
    silent, small = copy.deepcopy(module), copy.deepcopy(module)
    prefix = f"{heads.module}." if heads.module else ""
    own = {f"{prefix}{name}" if name else heads.module: child for name, child in small.named_modules()}
    proj = silent.get_submodule(heads.proj.removeprefix(prefix))
    with torch.no_grad():
        proj.weight[:, heads.columns(gone)] = 0  # type: ignore[operator]
    try:
        head_group(own, heads, gone).prune()
        found, expected = first(small(*args, **kwargs)), first(silent(*args, **kwargs))
    except Exception:
        # Whatever a forward raises that counts on all of its heads.
        return False
    moved = not torch.equal(expected, first(output))
    return moved and same_answer(expected, found)
