"""What can be said of a configuration before anything heavy is imported. Values live in conf/; types in the classes
they are for."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf

from freqprune.errors import InputError, at_least, check_file, closest, one_of
from freqprune.jobs.values import plain_value, typed, with_booleans
from freqprune.networks import cards

T = TypeVar("T")

FINETUNED, FROM_SCRATCH = "finetuned", "from_scratch"
# Where the trainings of a cut network lie in the folder of a run, by the stage that they end with; those between steps.
FOLDERS = {FINETUNED: "finetune", FROM_SCRATCH: "from_scratch"}
STEP = r"step\d+"


def conf_dir() -> Path:
    """Where the configs are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


@dataclass(frozen=True)
class Common:
    """What belongs to no section; see ``conf/common.yaml``."""

    seed: int
    output_dir: str
    ckpt: str | None
    ckpt_path: str | None
    resume: str | None
    pretrained: bool | str
    imports: Sequence[str]
    compile: bool | Literal["reduce-overhead", "max-autotune"]
    matmul_precision: str

    def __post_init__(self) -> None:
        at_least(0, seed=self.seed)
        # NumPy takes no others.
        if self.seed >= 2**32:
            raise InputError(f"seed must be below 2**32 = {2**32}, got {self.seed}")
        one_of(("highest", "high", "medium"), matmul_precision=self.matmul_precision)


def of_the_top(cls: type[T], cfg: DictConfig) -> T:
    """An object of a settings class whose fields are keys of no section."""
    hints = get_type_hints(cls)
    for name in hints:
        if name not in cfg:
            raise InputError(f"{name} is not set; give {name}=VALUE")
    return cls(**{name: typed(hint, plain_value(cfg, name), name) for name, hint in hints.items()})


# Precisions in which Lightning converts the weights.
WHOLE = ("64-true", "64", "16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")


def names_trained(cfg: DictConfig) -> str | None:
    """The setting that names trained weights of torchvision or timm, if there is one."""
    model = cfg.get("model")
    keys = ("weights", "pretrained") if isinstance(model, DictConfig) else ()
    given = [key for key in keys if with_booleans(model.get(key))]
    return f"model.{given[0]}" if given else None


def _check_compiled(cfg: DictConfig, common: Common) -> None:
    """CUDA graphs keep the gradients of one step only."""
    trainer = cfg.get("trainer")
    gathered = trainer.get("accumulate_grad_batches", 1) if isinstance(trainer, DictConfig) else 1
    if isinstance(common.compile, str) and gathered != 1:
        raise InputError(
            f"compile = {common.compile} keeps the gradients of one batch only and does not go with "
            f"trainer.accumulate_grad_batches = {gathered}; use compile=true, or batches as large (data.batch_size)"
        )


def check_training(cfg: DictConfig) -> None:
    """What `train` can refuse at once.

    Raises:
        InputError: for settings that only pruning has a use for, values that are missing, files and modules that are
            not there.
    """
    common = of_the_top(Common, cfg)
    if common.ckpt is not None:
        raise InputError(
            f"ckpt = {common.ckpt} is the network that prune.py prunes; to resume training use ckpt_path={common.ckpt}"
        )
    if common.pretrained:
        named = f"pretrained={str(common.pretrained).lower()}"
        raise InputError(f"{named} names a network that is trained already, for prune.py; leave it out to train")
    if common.resume is not None:
        trained = Path(common.resume) / "checkpoints" / "last.ckpt"
        raise InputError(
            f"resume = {common.resume} goes on with pruning and needs the dense network: "
            f"use prune.py with ckpt={trained} as well"
        )
    if typed(bool, cfg.pruning.get("enabled", False), "pruning.enabled"):
        _check_precision(cfg)
    _check(cfg, common)


def check_pruning(cfg: DictConfig, at_hand: bool = False) -> None:
    """What `prune` can refuse at once.

    Args:
        cfg: composed from ``conf/train.yaml`` or ``conf/prune.yaml``.
        at_hand: the network to prune is given, not read from a file.

    Raises:
        InputError: for a network that is given twice or not at all, values that are missing, files and modules that are
            not there.
    """
    common = of_the_top(Common, cfg)
    check_one_network(cfg, common.ckpt, common.pretrained, "to prune", at_hand)
    if not at_hand and common.ckpt_path is not None:
        raise InputError(
            "ckpt_path resumes training and has no part in pruning a checkpoint; "
            "leave it out, or leave ckpt out to train first"
        )
    terms = [f"tag_loss.{name}" for name in ("integration", "balance", "silence") if _weighs(cfg.tag_loss[name])]
    # What goes on is called with the settings of a job that may have trained the network first.
    if terms and not at_hand and common.resume is None:
        raise InputError(
            f"{terms[0]} is a part of the training loss, and the network to prune is trained already; say "
            "tag_loss=none here, and give the loss to train.py"
        )
    _check_precision(cfg)
    cuts = typed(bool, cfg.pruning.get("enabled", False), "pruning.enabled")
    if common.ckpt is not None and cuts:
        _check_kept(Path(common.ckpt).resolve(), Path(common.output_dir).resolve())
    _check(cfg, common)


def _check_kept(ckpt: Path, out: Path) -> None:
    """Raise InputError for a network to prune that the run would write over."""
    inside = ckpt.relative_to(out).parts[0] if out in ckpt.parents else ""
    if ckpt == out / "pruned.ckpt" or inside in FOLDERS.values() or re.fullmatch(STEP, inside):
        raise InputError(
            f"ckpt = {ckpt} lies where this run writes its own network; choose another folder (hydra.run.dir)"
        )


def check_one_network(
    cfg: DictConfig, ckpt: str | None, pretrained: bool | str, what_for: str, at_hand: bool = False
) -> None:
    """Raise InputError unless one setting, and only one, says where the trained network comes from."""
    if isinstance(pretrained, str) and pretrained not in cards():
        raise InputError(
            f"pretrained = {pretrained} does not come with the package{closest(pretrained, cards())}; it is true, "
            f"false or one of {', '.join(cards())}"
        )
    named = f"pretrained={str(pretrained).lower()}"
    if pretrained and ckpt is not None:
        raise InputError(f"{named} names a network of the package and ckpt = {ckpt} another; leave one of them out")
    library = names_trained(cfg)
    if library is not None and (pretrained or ckpt is not None):
        raise InputError(
            f"{library} names a trained network and {named if pretrained else 'ckpt'} another; leave one of them out"
        )
    if not at_hand and not pretrained and ckpt is None and library is None:
        raise InputError(
            f"ckpt is not set: give the network {what_for}, ckpt=FILE, pretrained=true for the package's ResNet-32, or "
            "model.name=torchvision/<name> model.weights=DEFAULT"
        )


def _check_precision(cfg: DictConfig) -> None:
    precision = str(cfg.trainer.get("precision", "32-true"))
    if precision in WHOLE:
        raise InputError(
            f"trainer.precision = {precision} turns the network itself into that type, which a cut does not go with; "
            "use bf16-mixed or 16-mixed, which leave its weights as they are, or 32-true"
        )


def _weighs(given: Any) -> bool:
    """Whether a weight, or one of several by layer, is not 0."""
    return any(given.values()) if isinstance(given, Mapping) or OmegaConf.is_dict(given) else bool(given)


def _check(cfg: DictConfig, common: Common) -> None:
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise InputError(f"{missing[0]} is not set; give {missing[0]}=VALUE")
    for key, path in (("ckpt", common.ckpt), ("ckpt_path", common.ckpt_path)):
        if path is not None:
            check_file(key, path)
    if common.resume is not None and not Path(common.resume).is_dir():
        raise InputError(f"resume = {common.resume} is not a folder; give the folder of the run that is to go on")
    data = cfg.get("data")
    if not isinstance(data, DictConfig):
        raise InputError("data is not set; name one of its choices, e.g. data=cifar10")
    root = data.get("root")
    if str(data.get("_target_")).endswith("ImageFolderData") and not Path(str(root)).expanduser().is_dir():
        raise InputError(f"data.root = {root} is not a folder; it must hold train/<class>/*.png and test/<class>/*.png")
    _check_compiled(cfg, common)
    import_modules(common.imports)


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
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise InputError(
                f"imports: there is no module {name!r} beside the job's script, in {here} or among the installed "
                "packages"
            ) from None
