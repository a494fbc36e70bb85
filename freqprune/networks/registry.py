"""Networks that are built from a plain config, so that a checkpoint can name its architecture without pickled code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.errors import InputError, closest
from freqprune.networks.heads import find_heads, keep_heads
from freqprune.networks.libraries import TIMM, TORCHVISION, library_builder
from freqprune.networks.resnet import CifarResNet

Builder = Callable[..., nn.Module]

_BUILDERS: dict[str, Builder] = {
    f"resnet{depth}": partial(CifarResNet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)
}
_OURS = frozenset(_BUILDERS)


def register_model(name: str, builder: Builder) -> None:
    """Make `builder` available as ``model.name=<name>`` and to checkpoints that name it.

    Args:
        name: the name written into configs and checkpoints.
        builder: called with the rest of the config as keyword arguments; returns the network.

    Raises:
        InputError: if the name is taken by another builder.
    """
    if _BUILDERS.get(name, builder) is not builder:
        raise InputError(f"model name {name!r} is taken; register {builder!r} under another name")
    _BUILDERS[name] = builder


def model_names() -> list[str]:
    """Names that `build_model` accepts."""
    return list(_BUILDERS)


def _builder(name: Any) -> Builder:
    if isinstance(name, str) and (builder := library_builder(name)) is not None:
        return builder
    if name not in _BUILDERS:
        raise InputError(
            f"model.name must be one of {', '.join(_BUILDERS)} or {TORCHVISION}<name> or {TIMM}<name>, "
            f"got {name!r}{closest(str(name), _BUILDERS)}"
        )
    return _BUILDERS[name]


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """Build a network from ``{"name": ..., **arguments}``; arguments that are None count as left out.

    The name is one of `model_names`, ``torchvision/<name>`` or ``timm/<name>`` for the classifiers of these libraries,
    with random weights unless ``weights`` (torchvision: ``"DEFAULT"`` or a name of its weights) or ``pretrained=True``
    (timm) says otherwise; these are downloaded and cached by the library. Another ``num_classes`` than the weights were
    trained for replaces the last layer. Unless a network has a `config` by which it can be built, it gets this one as
    an attribute (`built_from`, where it has another `config`), by which `freqprune.save_pruned` names it.

    >>> sum(p.numel() for p in build_model({"name": "resnet32"}).parameters())
    464154

    Raises:
        InputError: for an unknown name or argument.
    """
    arguments = {key: value for key, value in config.items() if value is not None}
    name = arguments.pop("name", None)
    builder = _builder(name)
    try:
        inspect.signature(builder).bind(**arguments)
        # Libraries take any argument, and say which ones they do not know. What a network of one's own trips over is
        # its own business.
        net = None if name in _BUILDERS and name not in _OURS else builder(**arguments)
    except TypeError as error:
        raise InputError(f"model {name!r} does not take these arguments: {error}") from None
    net = builder(**arguments) if net is None else net
    if not config_of(net):
        given: Any = {"name": name, **arguments}
        # A network may have something else of that name.
        setattr(net, "built_from" if hasattr(net, "config") else "config", given)
    return net


def config_of(net: nn.Module) -> dict[str, Any]:
    """What `build_model` builds a network from; empty if nobody knows."""
    for attribute in ("built_from", "config"):
        found = getattr(net, attribute, None)
        if is_known(found):
            return dict(found)  # type: ignore[arg-type]
    return {}


def is_known(config: Any) -> bool:
    """Whether something is a config of a network that `build_model` has heard of."""
    name = config.get("name") if isinstance(config, Mapping) else None
    return isinstance(name, str) and (name in _BUILDERS or name.startswith((TORCHVISION, TIMM)))


def resize(net: nn.Module, state: Mapping[str, Any]) -> None:
    """Give convolutions, linear layers and norms the widths that a state dict of the pruned network has, in place.

    Only shapes are set; load the state dict afterwards. Layers that fit already, and kinds of layers that pruning does
    not change, are left.
    """
    attentions = find_heads(net)
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            _resize_norm(module, [state.get(f"{name}.{one}") for one in ("weight", "running_mean")])
            continue
        weight = state.get(f"{name}.weight")
        old = getattr(module, "weight", None)
        if (
            not isinstance(weight, Tensor)
            or not isinstance(old, Tensor)
            or weight.shape == old.shape
            or weight.dim() != old.dim()
        ):
            continue
        if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
            if weight.shape[2:] != old.shape[2:]:
                # No cut changes a kernel, and its padding would not follow.
                continue
            if module.groups > 1 and module.in_channels == module.out_channels:
                module.groups = len(weight) * module.groups // module.out_channels
            module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.PReLU):
            module.num_parameters = len(weight)
        else:
            continue
        module.weight = nn.Parameter(torch.empty(weight.shape, dtype=old.dtype))
        if isinstance(getattr(module, "bias", None), Tensor):
            module.bias = nn.Parameter(torch.empty(len(weight), dtype=old.dtype))
    for heads in attentions.values():
        left = net.get_submodule(heads.proj).in_features // heads.size  # type: ignore[operator]
        if left != heads.n_heads:
            keep_heads(net.get_submodule(heads.module), heads, range(left))


def _resize_norm(module: nn.modules.batchnorm._NormBase, given: list[Any]) -> None:
    """Give a batch or instance norm as many channels as a tensor of its own has that a state dict holds."""
    width = next((len(tensor) for tensor in given if isinstance(tensor, Tensor)), module.num_features)
    if width == module.num_features:
        return
    module.num_features = width
    for name, old in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(torch.empty(width, dtype=old.dtype)))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.dim() == 1:
            setattr(module, name, torch.zeros(width, dtype=buffer.dtype))
