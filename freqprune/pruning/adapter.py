"""Scores → importance object for torch-pruning's own pruners."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from freqprune.errors import InputError, closest


class TagImportance:
    """Importance object for torch-pruning's own pruners, from scores computed beforehand.

    Only the convolutions' output filters of a group are scored; filters coupled by a residual are reduced to one score.

    Args:
        model: the network the scores belong to. Networks of this package need
            ``customized_pruners=freqprune.pruning.CUSTOM_PRUNERS`` in the pruner, which else takes channel i of one
            stage for channel i of the next.
        table: scores by layer name, ``(n_filters,)`` each, of the unpruned network.
        reduce: ``"max"`` or ``"mean"`` over the layers of a coupled group.

    Raises:
        InputError: for scores of unknown layers or of the wrong length, or that are not finite.
    """

    def __init__(self, model: nn.Module, table: Mapping[str, Tensor], reduce: str = "max") -> None:
        if reduce not in ("max", "mean"):
            raise InputError(f"reduce must be max or mean, got {reduce!r}")
        self.reduce = reduce
        modules = dict(model.named_modules())
        self._table: dict[nn.Module, Tensor] = {}
        for layer, score in table.items():
            if layer not in modules:
                raise InputError(f"scores name a layer the network does not have: {layer!r}{closest(layer, modules)}")
            n_filters = getattr(modules[layer], "out_channels", getattr(modules[layer], "out_features", None))
            if score.dim() != 1 or len(score) != n_filters:
                raise InputError(f"scores of {layer!r} must have the shape ({n_filters},), got {tuple(score.shape)}")
            if not torch.isfinite(score).all():
                raise InputError(
                    f"scores of {layer!r} hold NaN or infinite values; give such filters a finite score, e.g. 0"
                )
            self._table[modules[layer]] = score.double().cpu()

    def __call__(self, group: Any, **_: Any) -> Tensor | None:
        """Scores of the group's prunable channels, as long as ``group[0].idxs``; None if no layer of the group has
        scores."""
        size = len(group[0].idxs)
        position = {channel: at for at, channel in enumerate(group[0].idxs)}
        rows = []
        for i in range(len(group)):
            dependency, idxs = group[i].dep, group[i].idxs
            score = self._table.get(dependency.target.module)
            if score is None or dependency.handler not in (tp.prune_conv_out_channels, tp.prune_linear_out_channels):
                continue
            module = dependency.target.module
            if len(score) != getattr(module, "out_channels", getattr(module, "out_features", None)):
                raise InputError(
                    "the scores are of the unpruned network, but this layer has been pruned since; tag again, or prune "
                    "in one step"
                )
            # root_idxs are channels of the root layer; a partial group starts anywhere.
            roots = [position[channel] for channel in group[i].root_idxs] if group[i].root_idxs else range(size)
            row = torch.full((size,), torch.nan, dtype=torch.float64)
            row[torch.tensor(list(roots))] = score[torch.tensor(list(idxs))]
            rows.append(row)
        if not rows:
            return None
        stacked = torch.stack(rows)
        if self.reduce == "mean":
            return stacked.nanmean(0).nan_to_num(nan=0.0)
        return stacked.nan_to_num(nan=-torch.inf).amax(0).nan_to_num(neginf=0.0)
