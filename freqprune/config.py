"""Types of the configuration and the checks that need the whole of it. Values live in conf/; imports nothing heavy."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from freqprune.errors import InputError, closest


@dataclass
class OptimizerSchema:
    lr: float = MISSING
    momentum: float = MISSING
    nesterov: bool = MISSING
    weight_decay: float = MISSING
    warmup_epochs: float = MISSING
    label_smoothing: float = MISSING


@dataclass
class FinetuneSchema(OptimizerSchema):
    epochs: int = MISSING
    distill: float = MISSING
    temperature: float = MISSING


@dataclass
class ExportSchema:
    onnx: bool = MISSING
    torch_export: bool = MISSING


@dataclass
class TaggingSchema:
    parts: str = MISSING
    tag_freqs: list[float] = MISSING
    frame_rate: float = MISSING
    n_frames: int = MISSING
    mode: str = MISSING
    pivot: Any = MISSING
    depth: float = MISSING
    phases: list[float] | None = None
    gap: int = MISSING
    max_order: int = MISSING
    layers: Any = None
    where: str = MISSING
    noise_std: float = MISSING
    average: str = MISSING
    spatial: str = MISSING
    control: str = MISSING
    half: str | None = None
    per_class: bool = MISSING
    n_images: int = MISSING
    epoch_images: int = MISSING
    every_n_epochs: int = MISSING


@dataclass
class ImportanceSchema:
    criterion: str = MISSING
    components: Any = MISSING
    important_by: str = MISSING
    alpha: float = MISSING
    threshold: float | None = None
    labelled_images: int = MISSING
    scope: str = MISSING
    compensation: str = MISSING


@dataclass
class PruningSchema:
    enabled: bool = MISSING
    ratio: float | None = None
    threshold: float | None = None
    macs_cut: float | None = None
    default_macs_cut: float | None = None
    scope: str = MISSING
    normalize: bool = MISSING
    min_filters: int = MISSING
    multiple_of: int = MISSING
    layers: Any = None
    exclude: Any = None
    streams: bool = MISSING
    steps: int = MISSING
    step_epochs: int = MISSING
    compensation: str = MISSING
    calibrate_on: str = MISSING
    calibration_images: int = MISSING
    frames_an_image: int = MISSING
    measured_images: int = MISSING
    bn_images: int = MISSING
    bn_when: str = MISSING


@dataclass
class LatencySchema:
    batch_sizes: list[int] = MISSING
    n_runs: int = MISSING


@dataclass
class Schema:
    """Every key of the configuration; groups whose keys depend on the choice are free dicts."""

    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    tagging: TaggingSchema = field(default_factory=TaggingSchema)
    importance: ImportanceSchema = field(default_factory=ImportanceSchema)
    pruning: PruningSchema = field(default_factory=PruningSchema)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    optimizer: OptimizerSchema = field(default_factory=OptimizerSchema)
    finetune: FinetuneSchema = field(default_factory=FinetuneSchema)
    latency: LatencySchema = field(default_factory=LatencySchema)
    export: ExportSchema = field(default_factory=ExportSchema)
    seed: int = MISSING
    output_dir: str = MISSING
    ckpt: str | None = None
    ckpt_path: str | None = None
    resume: str | None = None
    pretrained: bool = MISSING
    imports: list[str] = MISSING
    compile: bool = MISSING
    matmul_precision: str = MISSING


def register() -> None:
    """Put the schema where Hydra finds it as ``schema``."""
    ConfigStore.instance().store(name="schema", node=Schema)


def plain(section: Any) -> Any:
    """A config section as plain dicts and lists, interpolations resolved."""
    return OmegaConf.to_container(section, resolve=True, throw_on_missing=True)


def stimulus_arguments(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of `freqprune.stimulus.Stimulus` from the tagging section."""
    names = ("tag_freqs", "parts", "frame_rate", "n_frames", "mode", "pivot", "depth", "phases", "gap", "max_order", "control")
    return {name: plain(cfg.tagging)[name] for name in names}


def amount_arguments(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of `freqprune.selection.Amount` from the pruning section; `default_macs_cut` counts if no other amount is given."""
    section = plain(cfg.pruning)
    arguments = {name: section[name] for name in ("ratio", "threshold", "macs_cut", "scope", "normalize", "min_filters", "multiple_of")}
    if all(arguments[name] is None for name in ("ratio", "threshold", "macs_cut")):
        arguments["macs_cut"] = section["default_macs_cut"]
    return arguments


def recipe_arguments(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of `freqprune.pruning.Recipe` from the pruning, importance and tagging sections."""
    from freqprune.selection import Amount

    section, tagging = plain(cfg.pruning), plain(cfg.tagging)
    names = ("layers", "exclude", "streams", "compensation", "calibrate_on", "frames_an_image", "measured_images")
    return {
        "amount": Amount(**amount_arguments(cfg)),
        "criterion": cfg.importance.criterion,
        "components": plain(cfg.importance)["components"],
        "tagging": {name: tagging[name] for name in ("layers", "where", "noise_std", "average", "spatial", "half")},
        "seed": cfg.seed,
        **{name: section[name] for name in names},
    }


def no_such_key(given: str, cfg: DictConfig) -> str:
    """Message for a key that does not exist, with those that look like it."""
    keys = _keys(cfg)
    last = given.rsplit(".", 1)[-1]
    # The same last word elsewhere in the tree beats a similar spelling.
    same = [key for key in keys if key != given and key.rsplit(".", 1)[-1] == last]
    same += [key for key in keys if key.rsplit(".", 1)[-1].endswith(f"_{last}")]
    hint = f"; did you mean {' or '.join(same[:3])}?" if same else closest(given, keys)
    return f"{given} is not a setting{hint or '; --cfg job lists all of them'}"


def _keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for key in map(str, cfg):
        found.append(f"{prefix}{key}")
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            found += _keys(node, f"{prefix}{key}.")
    return found


def _check_keys(cfg: DictConfig) -> None:
    known = {entry.name for entry in fields(Schema)}
    for key in map(str, cfg):
        if key not in known:
            raise InputError(no_such_key(key, cfg))
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise InputError(f"{missing[0]} is not set; give {missing[0]}=VALUE")


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
            raise InputError(f"imports: there is no module {name!r} beside the job's script, in {here} or among the installed packages") from None


def validate(cfg: DictConfig) -> None:
    """Import the user's modules and check every range that can be checked before data are read or a network is built.

    Raises:
        InputError: names the key, what is allowed and what came.
    """
    _check_keys(cfg)
    import_modules(cfg.imports)
    from freqprune.components import find_components
    from freqprune.importance import needs
    from freqprune.pruning import Recipe
    from freqprune.sites import WHERE
    from freqprune.stimulus import Stimulus
    from freqprune.tagging import AVERAGES, HALF, SPATIAL
    from freqprune.verdict import check_judgement

    stimulus = Stimulus(**stimulus_arguments(cfg))
    find_components(plain(cfg.importance)["components"], stimulus.components)
    choices = {"where": WHERE, "average": AVERAGES, "spatial": tuple(SPATIAL)}
    for key, allowed in choices.items():
        value = cfg.tagging[key]
        if value not in allowed:
            raise InputError(f"tagging.{key} must be one of {', '.join(allowed)}, got {value!r}")
    for name, value, low in (
        ("tagging.n_images", cfg.tagging.n_images, 1),
        ("tagging.epoch_images", cfg.tagging.epoch_images, 1),
        ("tagging.every_n_epochs", cfg.tagging.every_n_epochs, 0),
        ("finetune.epochs", cfg.finetune.epochs, 0),
        ("pruning.bn_images", cfg.pruning.bn_images, 0),
        ("pruning.steps", cfg.pruning.steps, 1),
        ("pruning.step_epochs", cfg.pruning.step_epochs, 0),
        ("pruning.calibration_images", cfg.pruning.calibration_images, 1),
        ("importance.labelled_images", cfg.importance.labelled_images, 1),
        ("latency.batch_sizes", min(cfg.latency.batch_sizes, default=0), 1),
        ("latency.n_runs", cfg.latency.n_runs, 1),
        ("seed", cfg.seed, 0),
    ):
        if value < low:
            raise InputError(f"{name} must be at least {low}, got {value}")
    if cfg.tagging.half not in (None, *HALF):
        raise InputError(f"tagging.half must be null or one of {', '.join(HALF)}, got {cfg.tagging.half!r}")
    if not 0 <= cfg.tagging.noise_std <= 1:
        raise InputError(f"tagging.noise_std must lie in [0, 1] (pixel units), got {cfg.tagging.noise_std}")
    for section in ("optimizer", "finetune"):
        if cfg[section].lr <= 0:
            raise InputError(f"{section}.lr must be above 0, got {cfg[section].lr}")
    if cfg.pruning.bn_when not in ("before", "after"):
        raise InputError(f"pruning.bn_when must be before or after (the compensation), got {cfg.pruning.bn_when!r}")
    if cfg.matmul_precision not in ("highest", "high", "medium"):
        raise InputError(f"matmul_precision must be highest, high or medium, got {cfg.matmul_precision!r}")
    needs(cfg.importance.criterion)
    check_judgement(cfg.importance.important_by, cfg.importance.alpha, cfg.importance.threshold)
    if cfg.pruning.enabled:
        Recipe(**recipe_arguments(cfg))
