"""Where each layer is read: its output tensor is followed through one probe forward, to its norm and its activation."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from freqprune.errors import InputError, closest
from freqprune.networks import evaluating, hooked

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
        note: why a later stage could not be read, empty if the request was met.
        then: activation to apply to the output when the network applies it by a function instead of a module.
    """

    layer: str
    module: str
    call: int
    stage: str
    n_filters: int
    channel_dim: int
    note: str = ""
    then: Callable[[Tensor], Tensor] | None = None


def default_layers(model: nn.Module) -> list[str]:
    """Names of all convolutions; of all linear layers if there is no convolution."""
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)]
    return convolutions or [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


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
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
    other = [name for name, module in modules.items() if isinstance(module, kinds)]
    picked: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        pool = next(
            (pool for pool in (usual, other) if fnmatch.filter(pool, pattern)),
            [pattern] if pattern in modules else other,
        )
        picked += [name for name in match_layers(pool, pattern) if name not in picked]
    return [name for name in modules if name in picked]


@dataclass
class _Call:
    """One traced function or module call: tensors in, tensor out, with the version of each (in-place operations raise
    it)."""

    kind: str
    what: Any
    inputs: list[tuple[int, int]]
    output: tuple[int, int]
    module: str = ""
    index: int = 0
    replay: Callable[[Tensor], Tensor] | None = None


class _Calls(list[_Call]):
    """The calls of a forward, with the tensors they speak of: as long as those live, no other tensor gets their
    identity."""

    def __init__(self, calls: Sequence[_Call], alive: list[Any]) -> None:
        super().__init__(calls)
        self.alive = alive


class _Trace(TorchFunctionMode):
    """Log every function that takes a tensor during one forward, and hold the tensors so that their identity stays
    unique."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.alive: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = _stamps((args, kwargs))
        out = func(*args, **kwargs)
        self.alive += [args, kwargs, out]
        if isinstance(out, Tensor) and inputs:
            self.calls.append(_Call("function", func, inputs, _stamp(out), replay=_replay(func, args, kwargs)))
        return out


def _replay(func: Any, args: Any, kwargs: Any) -> Callable[[Tensor], Tensor] | None:
    """The call again on another tensor, which is left as it is."""
    if not args:
        return None
    settings = {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs

    def again(x: Tensor) -> Tensor:
        # A name that ends in _ works in place.
        return func(x.clone() if func.__name__.endswith("_") else x, *args[1:], **settings)

    return again


def _stamp(tensor: Tensor) -> tuple[int, int]:
    return id(tensor), tensor._version


def _stamps(values: Any) -> list[tuple[int, int]]:
    if isinstance(values, Tensor):
        return [_stamp(values)]
    if isinstance(values, Mapping):
        values = values.values()
    if isinstance(values, list | tuple | set) or (hasattr(values, "__iter__") and not isinstance(values, str)):
        return [stamp for value in values for stamp in _stamps(value)]
    return []


def first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list | tuple):
        return next((item for item in output if isinstance(item, Tensor)), None)
    return None


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
    if where not in WHERE:
        raise InputError(f"where must be one of {', '.join(WHERE)}, got {where!r}{closest(where, WHERE)}")
    modules = dict(model.named_modules())
    wanted = list(layers) if layers is not None else default_layers(model)
    for name in wanted:
        if name not in modules or not name:
            raise InputError(f"the network has no layer {name!r}{closest(name, modules)}")
    if not wanted:
        raise InputError("the network has no convolution and no linear layer; name the layers to record")

    calls, produced = _probe(model, example, wanted)
    missing = [name for name in wanted if name not in produced]
    if missing:
        raise InputError(f"the forward never runs {', '.join(missing)}; leave these layers out")
    return [
        _follow(name, modules[name], tensor, start, calls, where)
        for name, (tensor, start) in sorted(produced.items(), key=lambda p: p[1][1])
    ]


def find_folds(model: nn.Module, example: Tensor, sites: Sequence[Site]) -> list[tuple[str, str]]:
    """Convolutions and the batch norms that can be folded into them without changing what is read at `sites`:
    ``(convolution, norm)`` names.

    The convolution's output goes to that norm alone and is not read itself, both run once a forward, and neither their
    weights nor their hooks serve anything else.

    Args:
        model: network, run in eval mode and restored.
        example: input batch, one image is enough.
        sites: what is going to be read.
    """
    modules = dict(model.named_modules())
    plain = [n for n, m in modules.items() if type(m) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and not _hooks(m)]
    calls, produced = _probe(model, example, plain)
    read = {site.module for site in sites}
    runs = Counter(call.module for call in calls if call.kind == "module")
    uses = Counter(stamp[0] for call in calls if call.kind == "function" for stamp in set(call.inputs))
    folds = []
    for name, (_, start) in produced.items():
        consumers = _consumers(calls[start].output, start, calls)
        if name in read or runs[name] != 1 or len(consumers) != 1 or uses[id(modules[name].weight)] != 1:
            continue
        at, call = consumers[0]
        owner = next((c for c in calls[at:] if c.kind == "module" and c.output == call.output), None)
        norm = modules.get("" if owner is None else owner.module)
        if owner is None or not isinstance(norm, FOLDABLE) or runs[owner.module] != 1 or _hooks(norm):
            continue
        if norm.running_mean is not None and modules[name].weight.dtype in (torch.float32, torch.float64):
            folds.append((name, owner.module))
    return folds


def _hooks(module: nn.Module) -> bool:
    return any(getattr(module, kind) for kind in ("_forward_hooks", "_forward_pre_hooks")) or hasattr(
        module, "parametrizations"
    )


def _probe(
    model: nn.Module, example: Tensor, wanted: Sequence[str]
) -> tuple[list[_Call], dict[str, tuple[Tensor, int]]]:
    """One forward in eval mode: every call in order, and of each wanted layer its first output and the number of the
    call that made it."""
    modules = dict(model.named_modules())
    trace = _Trace()
    counts: dict[str, int] = {}
    produced: dict[str, tuple[Tensor, int]] = {}

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            trace.alive.append(args)
            trace.calls.append(_Call("enter", module, _stamps(args), (0, 0), name))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            index = counts.get(name, 0)
            counts[name] = index + 1
            tensor = first_tensor(output)
            if tensor is None:
                return
            trace.alive.append(output)
            trace.calls.append(_Call("module", module, [], _stamp(tensor), name, index))
            if name in wanted and name not in produced:
                produced[name] = (tensor, len(trace.calls) - 1)

        return hook

    followed = [(n, m) for n, m in modules.items() if n and (n in wanted or not any(True for _ in m.children()))]
    # Outside inference mode, where tensors count the changes made to them in place.
    with (
        torch.inference_mode(False),
        evaluating(model),
        torch.no_grad(),
        hooked([(m, enter(n), leave(n)) for n, m in followed]),
        trace,
    ):
        model(example.clone())
    return _Calls(trace.calls, trace.alive), produced


def _follow(name: str, layer: nn.Module, tensor: Tensor, start: int, calls: list[_Call], where: str) -> Site:
    channel_dim = 1 if isinstance(layer, nn.modules.conv._ConvNd) else tensor.dim() - 1
    n_filters = tensor.shape[channel_dim]
    site = Site(name, name, calls[start].index, "convolution", n_filters, channel_dim)
    if where == "convolution":
        return site
    stamp, position = calls[start].output, start
    while True:
        consumers = _consumers(stamp, position, calls)
        kinds = {_kind(call) for _, call in consumers}
        if kinds == {"norm"} and site.stage == "convolution":
            stage = "norm"
        elif kinds == {"activation"} and where == "activation":
            stage = "activation"
        else:
            break
        at, call = consumers[0]
        # The module that returned this very tensor is where to hook; none when the network called a function.
        owner = next(
            (c for c in calls[at:] if c.kind == "module" and c.output == call.output and _kind(c) == stage), None
        )
        if owner is not None:
            site = Site(name, owner.module, owner.index, stage, n_filters, channel_dim)
        else:
            if call.replay is None or stage == "norm":
                break
            site = Site(name, site.module, site.call, stage, n_filters, channel_dim, "", call.replay)
        if stage == where:
            return site
        stamp, position = call.output, at
    reason = ", ".join(sorted({_describe(call) for _, call in consumers})) or "nothing"
    note = f"no {where} of its own: its {site.stage} output goes to {reason}; read there"
    return Site(site.layer, site.module, site.call, site.stage, n_filters, channel_dim, note, site.then)


def _consumers(stamp: tuple[int, int], position: int, calls: list[_Call]) -> list[tuple[int, _Call]]:
    return [
        (i, c)
        for i, c in enumerate(calls)
        if i > position and c.kind == "function" and stamp in c.inputs and _kind(c) != "query"
    ]


def _kind(call: _Call) -> str:
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


def _describe(call: _Call) -> str:
    return getattr(call.what, "__name__", str(call.what)).strip("_")
