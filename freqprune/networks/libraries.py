"""Classifiers of torchvision and timm by name: built, with trained weights if asked for, and the pixels they take."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.errors import InputError, closest
from freqprune.networks.heads import open_heads

log = logging.getLogger(__name__)

TORCHVISION, TIMM = "torchvision/", "timm/"
# Arguments that say where weights come from; what a network is rebuilt from does without them.
WEIGHTS = ("weights", "pretrained")
_WITH_HELPERS = ("googlenet", "inception_v3")
# Arguments that torchvision sets for trained weights, unasked.
SET_BY_WEIGHTS = {"transform_input": bool, "aux_logits": bool, "image_size": int}


@dataclass(frozen=True)
class Preprocessing:
    """What pixels a trained network takes.

    Attributes:
        image_size: height and width of its input.
        resize: the shorter side is resized to this before the middle is cut out; None: the whole image is squashed.
        mean: channel means, of pixels in [0, 1].
        std: channel standard deviations, likewise.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
    """

    image_size: int
    resize: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def library_builder(name: str) -> Callable[..., nn.Module] | None:
    """What builds the network ``torchvision/<name>`` or ``timm/<name>``; None for other names.

    Raises:
        InputError: for a name that the library does not have, or a library that is not installed.
    """
    if name.startswith(TORCHVISION):
        kind = name.removeprefix(TORCHVISION)
        known = _torchvision().list_models(module=_torchvision())
        if kind not in known:
            raise InputError(f"model.name = {name!r}: torchvision has no classifier {kind!r}{closest(kind, known)}")
        return lambda **arguments: open_heads(_from_torchvision(kind, **arguments))
    if name.startswith(TIMM):
        kind = name.removeprefix(TIMM)
        timm = _timm()
        if not timm.is_model(kind):
            raise InputError(f"model.name = {name!r}: timm has no model {kind!r}{closest(kind, timm.list_models())}")
        _timm_cfg(kind)
        return lambda **arguments: _from_timm(kind, **arguments)
    return None


def trained(config: Mapping[str, Any]) -> bool:
    """Whether a config asks for trained weights of a library."""
    return any(config.get(key) for key in WEIGHTS)


def rebuilt_from(config: Mapping[str, Any], net: nn.Module) -> dict[str, Any]:
    """Config that builds a network of the same shape without trained weights."""
    if not trained(config):
        return dict(config)
    # A network may have something else that it calls its config.
    own: Any = getattr(net, "built_from", None) or net.config
    return {key: value for key, value in own.items() if key not in WEIGHTS}


def preprocessing(config: Mapping[str, Any]) -> Preprocessing | None:
    """What pixels the trained network of a config takes; None for a network without trained weights of a library.

    Args:
        config: as for `freqprune.build_model`, with ``weights`` (torchvision) or ``pretrained`` (timm).
    """
    name = str(config.get("name") or "")
    if name.startswith(TORCHVISION) and config.get("weights") is not None:
        found = _weights(name.removeprefix(TORCHVISION), config["weights"]).transforms()
        return Preprocessing(
            found.crop_size[0],
            found.resize_size[0],
            tuple(found.mean),
            tuple(found.std),
            found.interpolation.value,
        )
    if name.startswith(TIMM) and config.get("pretrained"):
        timm = _timm()
        found = timm.data.resolve_data_config(
            pretrained_cfg=_timm_cfg(name.removeprefix(TIMM)).to_dict(), use_test_size=False
        )
        size = found["input_size"][-1]
        squashed = found["crop_mode"] == "squash" and found["crop_pct"] == 1
        resize = None if squashed else int(size / found["crop_pct"])
        if found["crop_mode"] == "squash" and not squashed:
            log.warning(
                "the weights of %s take whole images squashed to %d x %d pixels, of which the middle %d x %d is cut "
                "out; here images keep their proportions", name, resize, resize, size, size,
            )  # fmt: skip
        return Preprocessing(size, resize, tuple(found["mean"]), tuple(found["std"]), found["interpolation"])
    return None


def class_names(config: Mapping[str, Any]) -> list[str] | None:
    """What the classes of a config's trained network are called; None where its library does not say.

    Args:
        config: as for `preprocessing`.
    """
    name, names = str(config.get("name") or ""), None
    if name.startswith(TORCHVISION) and config.get("weights") is not None:
        names = list(_weights(name.removeprefix(TORCHVISION), config["weights"]).meta["categories"])
    if name.startswith(TIMM) and config.get("pretrained"):
        timm = _timm()
        cfg = _timm_cfg(name.removeprefix(TIMM)).to_dict()
        subset = timm.data.infer_imagenet_subset(cfg)
        names = None if subset is None else timm.data.ImageNetInfo(subset).label_descriptions()
    return names if config.get("num_classes") in (None, len(names or ())) else None


def _torchvision() -> Any:
    from torchvision import models

    return models


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise InputError("networks of timm need timm: pip install 'freqprune[timm]'") from None
    return timm


def _timm_cfg(kind: str) -> Any:
    """What timm knows of a network and its weights, by an earlier name of it too; empty where it knows nothing, as of a
    network that somebody has registered with it.

    Raises:
        InputError: for weights that it does not have.
    """
    timm = _timm()
    now = timm.models.get_deprecated_models().get(kind) or kind
    try:
        found = timm.get_pretrained_cfg(now)
    except RuntimeError as error:
        known = timm.list_models(f"{kind.split('.')[0]}.*", pretrained=True) or timm.list_models(pretrained=True)
        raise InputError(
            f"model.name = {TIMM}{kind!r}: timm has no such weights ({_line(error)}){closest(kind, known)}"
        ) from None
    return timm.models.PretrainedCfg() if found is None else found


def _weights(kind: str, name: Any) -> Any:
    known = {weights.name: weights for weights in _torchvision().get_model_weights(kind)}
    if name == "DEFAULT":
        return _torchvision().get_model_weights(kind).DEFAULT
    if name not in known:
        raise InputError(
            f"model.weights of torchvision/{kind} must be one of DEFAULT, {', '.join(known)}, got "
            f"{name!r}{closest(str(name), known)}"
        )
    return known[name]


def _from_torchvision(
    kind: str, weights: str | None = None, num_classes: int | None = None, **arguments: Any
) -> nn.Module:
    models = _torchvision()
    if weights is None:
        if kind in _WITH_HELPERS:
            # Classifiers that help in training only: nothing of them runs where a cut is planned and proved.
            arguments.setdefault("aux_logits", False)
        classes = {} if num_classes is None else {"num_classes": num_classes}
        return models.get_model(kind, weights=None, **classes, **arguments)
    chosen = _weights(kind, weights)
    # Trained weights come with them.
    helped = kind in _WITH_HELPERS and bool(arguments.pop("aux_logits", False))
    try:
        net: nn.Module = models.get_model(kind, weights=chosen, **arguments, **({"aux_logits": True} if helped else {}))
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / Path(chosen.url).name
        raise InputError(
            f"the weights {chosen.name} of torchvision/{kind} could not be read ({_line(error)}); on a machine with a "
            f"network download {chosen.url} and put the file at {place}"
        ) from error
    if kind in _WITH_HELPERS and not helped:
        net.aux_logits = False  # type: ignore[assignment]
        for name in {"aux1", "aux2", "AuxLogits"} & net._modules.keys():
            setattr(net, name, None)
    trained_for = len(chosen.meta["categories"])
    if num_classes is not None and num_classes != trained_for:
        _replace_head(net, trained_for, num_classes)
        log.warning("the last layer of torchvision/%s is new: %d classes instead of %d", kind, num_classes, trained_for)
    given = {"name": f"{TORCHVISION}{kind}", "num_classes": num_classes or trained_for, **arguments}
    given |= {key: kind(getattr(net, key)) for key, kind in SET_BY_WEIGHTS.items() if hasattr(net, key)}
    if hasattr(net, "transform_input"):
        # These two would draw slowly what is loaded anyway.
        given["init_weights"] = False
    net.config = given  # type: ignore[assignment]
    return net


def _from_timm(kind: str, pretrained: bool = False, num_classes: int | None = None, **arguments: Any) -> nn.Module:
    timm = _timm()
    classes = {} if num_classes is None else {"num_classes": num_classes}
    given = any(key.startswith("pretrained_cfg") for key in arguments)
    known = _timm_cfg(kind)
    # Of a network that somebody has registered with it, timm need not know where its weights are.
    if pretrained and not given and known.architecture is not None and not known.has_weights:
        raise InputError(f"model.pretrained = true, and timm has no weights of {kind}; leave model.pretrained out")
    try:
        net: nn.Module = timm.create_model(kind, pretrained=pretrained, **classes, **arguments)
    except Exception as error:
        # Downloads and files fail in the types of several libraries.
        if not pretrained:
            raise
        # What is wrong with the arguments is told by the same without weights.
        timm.create_model(kind, **classes, **arguments)
        where = f"the repository {known.hf_hub_id} of the Hugging Face hub" if known.hf_hub_id else known.url
        raise InputError(
            f"the weights of timm/{kind} could not be read ({_line(error)}); on a machine with a network run this once "
            f"and copy {_hub_folder()}, or fetch {where} and give the file as "
            "+model.pretrained_cfg_overlay.file=FILE"
        ) from error
    trained_for = known.num_classes
    if pretrained and num_classes is not None and num_classes != trained_for:
        log.warning("the last layer of timm/%s is new: %d classes instead of %d", kind, num_classes, trained_for)
    arguments = {key: value for key, value in arguments.items() if not key.startswith("pretrained_cfg")}
    n_classes = getattr(net, "num_classes", num_classes)
    net.config = {"name": f"{TIMM}{kind}", "num_classes": n_classes, **arguments}  # type: ignore[assignment]
    return net


def _hub_folder() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return str(HF_HUB_CACHE)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _replace_head(net: nn.Module, old: int, new: int) -> None:
    """Fresh layers in the place of those that answer for `old` classes, in place."""
    for name, module in list(net.named_modules()):
        fresh: nn.Linear | nn.Conv2d
        if isinstance(module, nn.Linear) and module.out_features == old:
            fresh = nn.Linear(module.in_features, new, module.bias is not None)
        elif isinstance(module, nn.Conv2d) and module.out_channels == old:
            if module.kernel_size != (1, 1) or name.startswith("features"):
                continue
            fresh = nn.Conv2d(module.in_channels, new, 1, bias=module.bias is not None)
        else:
            continue
        nn.init.normal_(fresh.weight, 0, 0.01)
        if isinstance(fresh.bias, Tensor):
            nn.init.zeros_(fresh.bias)
        net.set_submodule(name, fresh)
