"""Whether a network can be replaced by a smaller one while it trains: who else holds it, or a part of it."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.optim.swa_utils import AveragedModel

from freqprune.errors import InputError
from freqprune.networks import dtype_of


def only_network(pl_module: pl.LightningModule) -> str:
    """Name of the only child with convolutions; InputError if there is none or another."""
    found = [
        name
        for name, child in pl_module.named_children()
        if any(isinstance(m, torch.nn.modules.conv._ConvNd) for m in child.modules())
    ]
    if len(found) != 1:
        raise InputError(
            f"{type(pl_module).__name__} has {len(found)} children with convolutions ({', '.join(found)}); say which "
            "with network=..."
        )
    return found[0]


def check_trainer(trainer: pl.Trainer) -> None:
    """Raise InputError for what goes on with the old network: a strategy that splits it, an average of its weights."""
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        raise InputError(
            f"TagPruning replaces the network, of which {type(trainer.strategy).__name__} keeps a part in each of "
            f"{trainer.world_size} processes; use strategy=ddp, or prune with prune.py between two runs"
        )
    if getattr(trainer.strategy, "_start_method", "popen") != "popen":
        raise InputError(
            "TagPruning replaces the network, and strategy=ddp_spawn hands weights back to a process with the "
            "old network; use strategy=ddp"
        )
    averaging = (WeightAveraging, StochasticWeightAveraging)
    if any(isinstance(one, averaging) for one in trainer.callbacks):  # type: ignore[attr-defined]
        raise InputError(
            "TagPruning replaces the network, and WeightAveraging (ema= of Classifier and optimizer.ema) or "
            "StochasticWeightAveraging would go on averaging the old one: use one of them, or prune with prune.py "
            "between two runs"
        )


def check_module(trainer: pl.Trainer, pl_module: pl.LightningModule, attribute: str) -> None:
    """Raise InputError where something holds on to layers of the network under `attribute`, or it is not in float32."""
    net = pl_module.get_submodule(attribute)
    inside = set(net.parameters())
    # Each of its names as a whole is of the smaller one as well.
    whole = tuple(f"{name}." for name, child in pl_module._modules.items() if child is net)
    beside = next(
        (
            name
            for name, parameter in pl_module.named_parameters(remove_duplicate=False)
            if parameter in inside and not name.startswith(whole)
        ),
        None,
    )
    if beside is not None:
        raise InputError(
            f"{type(pl_module).__name__} has layers of {attribute}.* as {beside} too, which would stay as they were: "
            f"let it run {attribute} only, without another name for a part of it"
        )
    _check_hooks(net, attribute)
    shapes = [parameter.shape for parameter in net.parameters()]
    for name, one in pl_module.named_modules():
        if isinstance(one, AveragedModel) and [parameter.shape for parameter in one.module.parameters()] == shapes:
            raise InputError(
                f"TagPruning replaces {attribute}, and {type(pl_module).__name__}.{name} would go on averaging the old "
                "one: use one of them, or prune with prune.py between two runs"
            )
    for one in trainer.optimizers:
        # As Lightning tells a ZeroRedundancyOptimizer.
        if (isinstance(one, torch.optim.LBFGS) or hasattr(one, "consolidate_state_dict")) and inside & _parameters(one):
            raise InputError(
                f"TagPruning replaces parameters, of which {type(one).__name__} keeps a list of its own; use another"
            )
    if dtype_of(net) != torch.float32:
        raise InputError(
            f"TagPruning cuts networks in float32, this one is in {str(dtype_of(net)).removeprefix('torch.')}; use "
            "precision=bf16-mixed or 16-mixed, which leave the weights as they are, or 32-true"
        )


def _check_hooks(net: nn.Module, attribute: str) -> None:
    """Raise InputError for hooks that are methods of a module or callback around the network, which a copy of it would
    copy too."""
    inside = set(net.modules())
    for name, module in net.named_modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            for hook in hooks.values():
                owner = getattr(getattr(hook, "func", hook), "__self__", None)
                if isinstance(owner, nn.Module | pl.Callback) and owner not in inside:
                    raise InputError(
                        f"a hook of {'.'.join(filter(None, [attribute, name]))} is a method of {type(owner).__name__}, "
                        "of which the smaller network would call a copy: register a function, or read the layer "
                        "where the network is run"
                    )


def _parameters(optimizer: torch.optim.Optimizer) -> set[torch.nn.Parameter]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}
