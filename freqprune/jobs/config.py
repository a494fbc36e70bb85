"""What can be said of a configuration before anything heavy is imported. Values live in conf/; types in the classes
they are for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from freqprune.errors import InputError, check_file, closest


def plain(section: Any) -> Any:
    """A config section as plain dicts and lists, interpolations resolved."""
    return OmegaConf.to_container(section, resolve=True, throw_on_missing=True)


def no_such_key(given: str, cfg: DictConfig) -> str:
    """Message for a key that does not exist, with those that look like it."""
    keys = _keys(cfg)
    last = given.rsplit(".", 1)[-1]
    # The same last word elsewhere in the tree beats a similar spelling.
    same = [key for key in keys if key != given and key.rsplit(".", 1)[-1] == last]
    same += [key for key in keys if key.rsplit(".", 1)[-1].endswith(f"_{last}")]
    others = [key for key in keys if key != given]
    hint = f"; did you mean {' or '.join(same[:3])}?" if same else closest(given, others)
    return f"{given} is not a setting{hint or '; --cfg job lists all of them'}"


def _keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for key in map(str, cfg):
        found.append(f"{prefix}{key}")
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            found += _keys(node, f"{prefix}{key}.")
    return found


def check_training(cfg: DictConfig) -> None:
    """What `train` can refuse at once.

    Raises:
        InputError: for settings that only pruning has a use for, values that are missing, files and modules that are
            not there.
    """
    if cfg.ckpt is not None:
        raise InputError(
            f"ckpt = {cfg.ckpt} is the network that prune.py prunes; to resume training use ckpt_path={cfg.ckpt}"
        )
    if cfg.pretrained:
        raise InputError("pretrained=true names a network that is trained already, for prune.py; leave it out to train")
    if cfg.resume is not None:
        trained = Path(cfg.resume) / "checkpoints" / "last.ckpt"
        raise InputError(
            f"resume = {cfg.resume} goes on with pruning and needs the dense network: "
            f"use prune.py with ckpt={trained} as well"
        )
    _check(cfg)


def check_pruning(cfg: DictConfig, at_hand: bool = False) -> None:
    """What `prune` can refuse at once.

    Args:
        cfg: composed from ``conf/train.yaml`` or ``conf/prune.yaml``.
        at_hand: the network to prune is given, not read from a file.

    Raises:
        InputError: for a network that is given twice or not at all, values that are missing, files and modules that are
            not there.
    """
    if cfg.pretrained and cfg.ckpt is not None:
        raise InputError(
            f"pretrained=true names the package's own network and ckpt = {cfg.ckpt} another; leave one of them out"
        )
    if not at_hand and not cfg.pretrained and cfg.ckpt is None:
        raise InputError(
            "ckpt is not set: give the network to prune, ckpt=FILE, or pretrained=true for the package's ResNet-32"
        )
    if not at_hand and cfg.ckpt_path is not None:
        raise InputError(
            "ckpt_path resumes training and has no part in pruning a checkpoint; "
            "leave it out, or leave ckpt out to train first"
        )
    _check(cfg)


def _check(cfg: DictConfig) -> None:
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise InputError(f"{missing[0]} is not set; give {missing[0]}=VALUE")
    for key in ("ckpt", "ckpt_path"):
        if cfg[key] is not None:
            check_file(key, cfg[key])
    if cfg.resume is not None and not Path(cfg.resume).is_dir():
        raise InputError(f"resume = {cfg.resume} is not a folder; give the folder of the run that is to go on")
    root = cfg.data.get("root")
    if str(cfg.data.get("_target_")).endswith("ImageFolderData") and not Path(root).is_dir():
        raise InputError(f"data.root = {root} is not a folder; it must hold train/<class>/*.png and test/<class>/*.png")
    import_modules(cfg.imports)


def import_modules(names: Sequence[str]) -> None:
    """Import the user's modules, also from the folder where the command was started.

    Raises:
        InputError: for a module that is not there.
    """
    here = str(Path.cwd())
    if names and here not in sys.path:
        sys.path.append(here)
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise InputError(
                f"imports: there is no module {name!r} beside the job's script, in {here} or among the installed "
                "packages"
            ) from None
