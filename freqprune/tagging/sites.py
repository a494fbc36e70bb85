"""Where each layer is read: its output tensor is followed through one probe forward, to its norm and its activation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from freqprune.errors import InputError, closest, one_of
from freqprune.tagging.calls import Call, probe
from freqprune.tagging.channels import channel_dim_of
from freqprune.tagging.layers import default_layers

WHERE = ("convolution", "norm", "activation")

NORM_FUNCTIONS = {F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm, torch.batch_norm}
NORM_MODULES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
# Whatever the dimensions; Lightning leaves norms of none behind after trainer.sync_batchnorm.
FOLDABLE = nn.modules.batchnorm._BatchNorm
ACTIVATIONS: set[Any] = {
    F.relu,
    F.relu_,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.selu,
    F.celu,
    F.gelu,
    F.silu,
    F.mish,
    F.hardtanh,
    F.hardswish,
    F.hardsigmoid,
    F.sigmoid,
    F.tanh,
    F.softplus,
    F.softsign,
    F.logsigmoid,
    F.hardshrink,
    F.softshrink,
    F.prelu,
    F.rrelu,
    torch.prelu,
    torch.rrelu,
    torch.relu,
    torch.relu_,
    torch.sigmoid,
    torch.tanh,
    Tensor.relu,
    Tensor.relu_,
    Tensor.sigmoid,
    Tensor.tanh,
}


@dataclass(frozen=True)
class Site:
    """Where a layer's filters are read.

    Attributes:
        layer: name of the convolution (or other layer) whose filters these are.
        module: name of the module whose output is read.
        call: which of the module's calls in one forward, for modules that are used more than once.
        stage: ``"convolution"``, ``"norm"`` or ``"activation"``, what the reading really is.
        n_filters: number of filters.
        channel_dim: dimension of the output that counts filters.
        note: why a later stage could not be read, or that the layer runs more than once and is read in its first call;
            empty if the request was met.
        then: activation to apply to the output when the network applies it by a function instead of a module.
        runs: how often the layer runs in one forward.
    """

    layer: str
    module: str
    call: int
    stage: str
    n_filters: int
    channel_dim: int
    note: str = ""
    then: Callable[[Tensor], Tensor] | None = None
    runs: int = 1


def find_sites(
    model: nn.Module, example: Tensor, layers: Sequence[str] | None = None, where: str = "activation"
) -> list[Site]:
    """Find where each layer's filters are to be read, by one forward of `example`.

    The output tensor of every layer is followed through what consumes it: a norm, then an activation. The response is a
    filter's own only as long as nothing else is mixed in: where a sum (a residual) or another convolution comes before
    any activation, the last reading before it is used and the site's `note` says so.

    Args:
        model: network, run in eval mode and restored.
        example: input batch, one image is enough.
        layers: names of modules; all convolutions if left out.
        where: ``"convolution"``, ``"norm"`` or ``"activation"``.

    Returns:
        Sites in the order in which the network runs them.

    Raises:
        InputError: for an unknown layer or `where`, or a layer that the forward does not reach.
    """
    one_of(WHERE, where=where)
    modules = dict(model.named_modules())
    wanted = list(layers) if layers is not None else default_layers(model)
    for name in wanted:
        if not name:
            raise InputError(
                f"a layer needs a name, and the whole network ({type(model).__name__}) has none; put it into a "
                "torch.nn.Sequential"
            )
        if name not in modules:
            raise InputError(f"the network has no layer {name!r}{closest(name, modules)}")
    if not wanted:
        raise InputError("the network has no convolution and no linear layer; name the layers to record")

    calls, produced = probe(model, example, wanted)
    missing = [name for name in wanted if name not in produced]
    if missing:
        tops = [dict.fromkeys(name.partition(".")[0] for name in names) for names in (produced, missing)]
        ran = [f"{name}*" for name in tops[0] if name not in tops[1]]
        others = f", such as layers={ran}" if ran else ""
        raise InputError(f"the forward never runs {', '.join(missing)}; name others with layers=...{others}")
    in_rows = [name for name in wanted if produced[name][0].shape[:1] != example.shape[:1]]
    if in_rows:
        raise InputError(
            f"{', '.join(in_rows)}: the first dimension of what {'they answer' if len(in_rows) > 1 else 'it answers'} "
            "does not count images, as where layers run over windows; leave them out (tagging.layers, of a cut "
            f"pruning.exclude=[{','.join(in_rows)}])"
        )
    runs = Counter(call.module for call in calls if call.kind == "module")
    sites = [
        _follow(name, modules[name], tensor, start, calls, where)
        for name, (tensor, start) in sorted(produced.items(), key=lambda p: p[1][1])
    ]
    return [_of_several(site, runs[site.layer]) if runs[site.layer] > 1 else site for site in sites]


def _of_several(site: Site, runs: int) -> Site:
    note = f"runs {runs} times in a forward; read in its first call"
    return replace(site, runs=runs, note=f"{site.note}; {note}" if site.note else note)


def find_folds(model: nn.Module, example: Tensor, sites: Sequence[Site]) -> list[tuple[str, str]]:
    """Convolutions and the batch norms that can be folded into them without changing what is read at `sites`:
    ``(convolution, norm)`` names.

    The convolution's output goes to that norm alone, is not read itself and is no answer of the network, both run once
    a forward, and neither their weights and statistics nor their hooks serve anything else.

    Args:
        model: network, run in eval mode and restored.
        example: input batch, one image is enough.
        sites: what is going to be read.
    """
    modules = dict(model.named_modules())
    plain = [n for n, m in modules.items() if type(m) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and not _hooks(m)]
    calls, produced = probe(model, example, plain)
    read = {site.module for site in sites}
    runs = Counter(call.module for call in calls if call.kind == "module")
    uses = Counter(stamp[0] for call in calls if call.kind == "function" for stamp in set(call.inputs))
    folds = []
    for name, (_, start) in produced.items():
        stamp = calls[start].output
        consumers = _consumers(stamp, start, calls, detached=True)
        if name in read or runs[name] != 1 or len(consumers) != 1 or uses[id(modules[name].weight)] != 1:
            continue
        if stamp in calls.answers:
            continue
        at, call = consumers[0]
        owner = next((c for c in calls[at:] if c.kind == "module" and c.output == call.output), None)
        norm = modules.get("" if owner is None else owner.module)
        if owner is None or not isinstance(norm, FOLDABLE) or runs[owner.module] != 1 or _hooks(norm):
            continue
        held = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        if any(uses[id(one)] != 1 for one in held if one is not None):
            continue
        if norm.running_mean is not None and modules[name].weight.dtype in (torch.float32, torch.float64):
            folds.append((name, owner.module))
    return folds


def _hooks(module: nn.Module) -> bool:
    return any(getattr(module, kind) for kind in ("_forward_hooks", "_forward_pre_hooks")) or hasattr(
        module, "parametrizations"
    )


def _follow(name: str, layer: nn.Module, tensor: Tensor, start: int, calls: list[Call], where: str) -> Site:
    channel_dim = channel_dim_of(layer, tensor, calls[:start])
    n_filters = tensor.shape[channel_dim]
    site = Site(name, name, calls[start].index, "convolution", n_filters, channel_dim)
    if where == "convolution":
        return site
    stamp, position, passed = calls[start].output, start, ""
    while True:
        consumers = _consumers(stamp, position, calls)
        kinds = {_kind(call) for _, call in consumers}
        if kinds == {"norm"} and site.stage == "convolution" and not passed:
            stage = "norm"
        elif kinds == {"activation"} and where == "activation":
            stage = "activation"
        else:
            break
        at, call = consumers[0]
        # The module that returned this very tensor is where to hook; none when the network called a function.
        returned = (
            (n, c)
            for n, c in enumerate(calls[at:], at)
            if c.kind == "module" and c.output == call.output and _kind(c) == stage
        )
        # What its own hooks did with the tensor lies before it.
        at, owner = next(returned, (at, None))
        if owner is not None:
            site = Site(name, owner.module, owner.index, stage, n_filters, channel_dim)
        elif stage == "norm" and where == "activation":
            # No module returns what the norm leaves, as in timm's norms with an activation: that may have one.
            passed = f"{_describe(call)} and then "
        elif stage == "norm" or call.replay is None or passed:
            break
        else:
            site = Site(name, site.module, site.call, stage, n_filters, channel_dim, "", call.replay)
        if site.stage == where:
            return site
        stamp, position = call.output, at
    reason = ", ".join(sorted({_describe(call) for _, call in consumers})) or "nothing"
    note = f"no {where} of its own: its {site.stage} output goes to {passed}{reason}; read there"
    return Site(site.layer, site.module, site.call, site.stage, n_filters, channel_dim, note, site.then)


def _consumers(
    stamp: tuple[int, int], position: int, calls: list[Call], detached: bool = False
) -> list[tuple[int, Call]]:
    """What takes a tensor after a call; what only asks about it does not count, nor, unless `detached`, what hands its
    values on without their gradient."""
    return [
        (i, c)
        for i, c in enumerate(calls)
        if i > position
        and c.kind == "function"
        and stamp in c.inputs
        and (_kind(c) != "query" or (detached and c.output != (0, 0)))
    ]


def _kind(call: Call) -> str:
    if call.kind == "module":
        is_activation = type(call.what).__module__ == "torch.nn.modules.activation" and not isinstance(
            call.what, nn.MultiheadAttention
        )
        return "norm" if isinstance(call.what, NORM_MODULES) else "activation" if is_activation else "other"
    if call.what in NORM_FUNCTIONS:
        return "norm"
    if call.what in ACTIVATIONS:
        return "activation"
    name = getattr(call.what, "__name__", "")
    return "query" if name in ("__get__", "size", "dim", "detach", "is_floating_point") else "other"


def _describe(call: Call) -> str:
    return getattr(call.what, "__name__", str(call.what)).strip("_")
