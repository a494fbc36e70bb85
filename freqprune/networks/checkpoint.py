"""Networks on disk: matched to their architecture, written so that a fresh process rebuilds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks.blocks import drop_blocks, dropped_blocks
from freqprune.networks.extras import built_otherwise, extras, set_extras, take_types
from freqprune.networks.files import read, write_atomically
from freqprune.networks.kept import left_by
from freqprune.networks.libraries import SET_BY_WEIGHTS, TIMM, TORCHVISION, WEIGHTS, rebuilt_from
from freqprune.networks.registry import build_model, config_of, is_known, model_names, resize
from freqprune.networks.state_dicts import load_into, of_the_network, uncompiled, without_prefix

PRUNED_FORMAT = "freqprune.pruned/1"


@dataclass
class Stored:
    """A network read from disk.

    Attributes:
        net: the network, in eval mode.
        config: the config it was built from.
        normalization: ``{"mean": [...], "std": [...]}`` of its inputs, empty if the file does not say.
        kept: filters kept of the dense network, by layer; empty for a dense one.
        classes: names of its outputs in order, empty if the file does not say.
        image_size: height and width of the images that it was validated on, empty if the file does not say.
    """

    net: nn.Module
    config: dict[str, Any]
    normalization: dict[str, list[float]] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    image_size: list[int] = field(default_factory=list)

    def other_size(self, height: int, width: int) -> str:
        """What to say of images of another size than it was trained for; nothing where they are of that size, or none
        is known."""
        if self.image_size in ([], [height, width]):
            return ""
        there = " x ".join(map(str, self.image_size))
        return f"the network was trained on images of {there} pixels, these have {height} x {width}"


def load_network(path: str | Path, model: Mapping[str, Any] | None = None) -> Stored:
    """Read a network from one of our checkpoints, a pruned.ckpt, or a plain state dict.

    Args:
        path: the file.
        model: config of the network, needed for a plain state dict. Our own files name their network; a `model` that
            differs is an error.

    Raises:
        InputError: for a file that cannot be read (see `read`) or holds another architecture.
    """
    content = read(path)
    for key in ("model", "state_dict", "kept", "blocks", "normalization", "hyper_parameters", "callbacks"):
        if not isinstance(content.get(key, {}), Mapping):
            raise InputError(
                f"ckpt = {path}: {key} is a {type(content[key]).__name__}, expected a dict; the file was not written "
                "by this package"
            )
    if content.get("format") == PRUNED_FORMAT:
        gone = [key for key in ("model", "state_dict", "kept", "normalization") if key not in content]
        if gone:
            raise InputError(
                f"ckpt = {path} is incomplete: it has no {', '.join(gone)}; write it again with save_pruned"
            )
        config, state = dict(content["model"]), content["state_dict"]
        extra: dict[str, Any] = {"kept": dict(content["kept"])}
        said = content
    elif "state_dict" in content and {"hyper_parameters", "pytorch-lightning_version"} & content.keys():
        # Lightning leaves hyper-parameters out where a module keeps none.
        said = _of_ours(content.get("hyper_parameters", {}))
        named = said.get("model", {})
        if model is not None and not is_known(named):
            named = {}
        if "name" not in named and model is None:
            raise InputError(
                f"ckpt = {path} does not name its network; say which with model=..., one of {', '.join(model_names())}"
            )
        config = dict(named if "name" in named else model or {})
        state = of_the_network(content["state_dict"])
        cuts = _cut_while_trained(content)
        extra = {"kept": left_by(cuts)} if cuts else {}
        # Of a module that does not keep them among its own settings.
        said |= {"blocks": said.get("blocks") or (cuts.get("dropped") or [{}])[-1]}
    else:
        if model is None:
            raise InputError(
                f"ckpt = {path} is a plain state dict, which does not name its network; say which with model=resnet32 "
                "(or another)"
            )
        config, extra, said = dict(model), {}, {}
        state = uncompiled(content.get("state_dict", content))
    if model is not None and model.get("name") != config.get("name"):
        raise InputError(
            f"ckpt = {path} holds a {config.get('name')}, but model.name = {model.get('name')}; use "
            f"model={config.get('name')} or leave it out"
        )
    for key, value in (model or {}).items():
        if value is not None and key in config and config[key] != value:
            raise InputError(
                f"ckpt = {path} holds a {config.get('name')} with {key} = {config[key]}, but model.{key} = {value}; "
                "leave model out"
            )
    net = build_model(config)
    drop_blocks(net, said.get("blocks") or {})
    state = without_prefix(state, net)
    if content.get("format") == PRUNED_FORMAT:
        resize(net, state)
        set_extras(net, content)
        take_types(net, state)
    elif _cut_while_trained(content):
        resize(net, state)
        set_extras(net, _cut_while_trained(content))
    load_into(net, state, path, config)
    extra |= {"normalization": dict(said.get("normalization") or {})}
    extra |= {key: list(said.get(key) or ()) for key in ("classes", "image_size")}
    return Stored(net.eval(), config, **extra)


def check_resumable(path: str | Path, model: Mapping[str, Any]) -> int:
    """Epochs that a training checkpoint has behind it; InputError unless `path` is one of the network that `model`
    describes."""
    content = read(path)
    if "state_dict" not in content or "optimizer_states" not in content:
        raise InputError(
            f"ckpt_path = {path} is no training checkpoint; resume from checkpoints/last.ckpt of a run folder"
        )
    stored = dict(_of_ours(content.get("hyper_parameters", {})).get("model") or {})
    # What weights bring unasked was not always kept.
    unasked = {*SET_BY_WEIGHTS} - {*stored}
    for key in sorted({*stored, *model} - {*WEIGHTS} - unasked):
        if stored.get(key) != model.get(key):
            raise InputError(
                f"ckpt_path = {path} trains a network with {key} = {stored.get(key)}, but model.{key} = "
                f"{model.get(key)}; resume with the same model"
            )
    return _epochs_done(content)


def epochs_done(path: str | Path) -> int:
    """Epochs that a training checkpoint has behind it."""
    return _epochs_done(read(path))


def _epochs_done(content: Mapping[str, Any]) -> int:
    return int(content.get("epoch", -1)) + 1


def _of_ours(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Of the hyper-parameters of a module those that mean what ours mean: others call by these names what they like."""
    fits = {
        "model": lambda value: isinstance(value, Mapping),
        "blocks": lambda value: _holds(value, str),
        "normalization": lambda value: _holds(value, int | float) and value.keys() <= {"mean", "std"},
        "classes": lambda value: isinstance(value, list),
        "image_size": lambda value: _holds({"": value}, int) and len(value) == 2,
    }
    found = {key: hyper[key] for key, fit in fits.items() if key in hyper and fit(hyper[key])}
    if "blocks" in found and not is_known(found.get("model")):
        del found["blocks"]
    return found


def _holds(value: Any, kind: Any) -> bool:
    """Whether something is a mapping of lists of one kind."""
    lists = value.values() if isinstance(value, Mapping) else [None]
    return all(isinstance(one, list | tuple) and all(isinstance(part, kind) for part in one) for one in lists)


def _cut_while_trained(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint says of cuts by `TagPruning`; empty if there were none."""
    said = (content.get("callbacks") or {}).get("TagPruning") or {}
    return said if said.get("kept") else {}


def save_pruned(
    path: str | Path,
    net: nn.Module,
    kept: Mapping[str, Tensor | Sequence[int]],
    normalization: Mapping[str, Sequence[float]] | None = None,
    model: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
    image_size: Sequence[int] = (),
) -> None:
    """Write a pruned network as plain tensors, lists and numbers; the file appears complete or not at all.

    Args:
        path: the file.
        net: the pruned network.
        kept: filters kept of the dense network, by layer.
        normalization: channel mean and std of its inputs.
        model: config for `freqprune.build_model` that builds the dense network, e.g. ``{"name": "torchvision/resnet18",
            "num_classes": 10}``; the network's own `config`, which everything from `build_model` has, if left out.
        classes: names of its outputs, in order.
        image_size: height and width of its images.

    Raises:
        InputError: if there is no config, or it does not rebuild this network.
    """
    net = getattr(net, "_orig_mod", net)
    config = model if model is not None else config_of(net)
    if not config:
        raise InputError(
            f"{type(net).__name__} has no config to rebuild it from: pass save_pruned(model={{'name': ...}}), a "
            "torchvision/<name> or a name given "
            "to register_model"
        )
    twin = build_model(config)
    # The file holds the weights; those that a config asks of a library would be read with it each time.
    if str(config.get("name")).startswith((TORCHVISION, TIMM)):
        config = rebuilt_from(config, twin)
    drop_blocks(twin, dropped_blocks(net))
    resize(twin, net.state_dict())
    more = extras(net, twin)
    load_into(twin, net.state_dict(), path, config)
    if odd := built_otherwise(net, twin):
        raise InputError(
            f"{type(net).__name__} is not what its config {dict(config)} builds: {', '.join(odd[:5])} are other "
            "modules, or have other settings, which no tensor says; register a function that builds it so "
            "(register_model), and pass save_pruned(model={'name': ...})"
        )
    content = {
        "format": PRUNED_FORMAT,
        "model": dict(config),
        "state_dict": {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()},
        "kept": {layer: [int(i) for i in indices] for layer, indices in kept.items()},
        "blocks": dropped_blocks(net),
        **more,
        "normalization": {key: [float(v) for v in value] for key, value in (normalization or {}).items()},
        "classes": [str(name) for name in classes],
        "image_size": [int(side) for side in image_size],
    }
    write_atomically(path, content)


def save_weights(path: str | Path, checkpoint: str | Path) -> None:
    """Write the network of a training checkpoint without its optimizer and callbacks; `load_network` reads it like the
    checkpoint.

    Args:
        path: the new file.
        checkpoint: a training checkpoint of this package.
    """
    content = read(checkpoint)
    load_network(checkpoint)
    hyper = content["hyper_parameters"]
    state = {key: value.contiguous() for key, value in content["state_dict"].items() if key.startswith("net.")}
    kept = ("model", "normalization", "classes", "image_size", "blocks")
    about = {key: hyper[key] for key in kept if key in hyper}
    cuts = {"callbacks": {"TagPruning": _cut_while_trained(content)}} if _cut_while_trained(content) else {}
    write_atomically(path, {"hyper_parameters": about, "state_dict": state, **cuts})


def load_pruned(path: str | Path) -> nn.Module:
    """Rebuild a pruned network from a ``pruned.ckpt``, in eval mode, without running pickled code.

    Raises:
        InputError: for a file that is missing, damaged, or was not written by `save_pruned`.
    """
    content = read(path)
    if content.get("format") != PRUNED_FORMAT:
        raise InputError(
            f"{path} is not a pruned.ckpt (format {content.get('format')!r}, expected {PRUNED_FORMAT!r}); load_network "
            "reads the others"
        )
    return load_network(path).net
