"""Configuration → the objects that the jobs work with. A setting is a field of a class and a line of its YAML, nothing
else."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.accelerators import MPSAccelerator

from freqprune.errors import InputError, at_least, one_of
from freqprune.jobs.config import Common, of_the_top
from freqprune.jobs.values import FREE, no_such_key, plain, typed, with_booleans
from freqprune.networks import Exports, Latency
from freqprune.pruning import AMOUNTS, Amount, Judgement, Recipe, Reconstruction, needs
from freqprune.tagging import Readout, Stimulus, TagLoss, find_components
from freqprune.training import Distillation, Optimization


@dataclass(frozen=True)
class Showing:
    """To how many images the tags are shown, and when."""

    n_images: int
    per_class: bool
    epoch_images: int
    every_n_epochs: int

    def __post_init__(self) -> None:
        at_least(1, n_images=self.n_images, epoch_images=self.epoch_images)
        at_least(0, every_n_epochs=self.every_n_epochs)


@dataclass(frozen=True)
class Scoring:
    """By what filters are ranked, and what suits that criterion."""

    criterion: str
    labelled_images: int
    scope: str
    compensation: str

    def __post_init__(self) -> None:
        at_least(1, labelled_images=self.labelled_images)
        needs(self.criterion)


@dataclass(frozen=True)
class Course:
    """In what steps a network is cut, and with how many images."""

    enabled: bool
    default_macs_cut: float | None
    steps: int
    step_epochs: int
    calibration_images: int
    bn_images: int
    bn_when: str

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, calibration_images=self.calibration_images)
        at_least(0, step_epochs=self.step_epochs, bn_images=self.bn_images)
        if self.bn_images == 1:
            raise InputError("bn_images must be 0, to leave batch norms as they are, or at least 2, got 1")
        one_of(("auto", "after"), bn_when=self.bn_when)


@dataclass(frozen=True)
class Epochs:
    """How long a cut network is fine-tuned, and from which weights: its own, or such as are drawn anew."""

    epochs: int
    from_scratch: bool = False

    def __post_init__(self) -> None:
        at_least(0, epochs=self.epochs)
        if self.from_scratch and not self.epochs:
            raise InputError("from_scratch trains for finetune.epochs, got 0: say how many")


log = logging.getLogger(__name__)

# The classes whose fields are the keys of a section.
SECTIONS: dict[str, tuple[type[Any], ...]] = {
    "tagging": (Stimulus, Readout, Showing),
    "importance": (Judgement, Scoring),
    "pruning": (Amount, Recipe, Reconstruction, Course),
    "optimizer": (Optimization,),
    "tag_loss": (TagLoss,),
    "finetune": (Optimization, Distillation, Epochs),
    "latency": (Latency,),
    "export": (Exports,),
}
# Fields of a recipe that come from other sections.
ELSEWHERE = {
    Recipe: ("amount", "criterion", "components", "tagging", "reconstruction", "seed", "latency"),
    Reconstruction: ("seed",),
    TagLoss: ("stimulus", "where", "mean", "std"),
}


@dataclass(frozen=True)
class Settings:
    """A configuration as objects; `recipe` is None for ``pruning=none``, sections of `FREE` are plain dicts."""

    common: Common
    stimulus: Stimulus
    readout: Readout
    showing: Showing
    judgement: Judgement
    scoring: Scoring
    course: Course
    recipe: Recipe | None
    optimizer: Optimization
    tag_loss: TagLoss
    finetune: Optimization
    distillation: Distillation
    finetune_epochs: int
    from_scratch: bool
    latency: Latency
    exports: Exports
    data: dict[str, Any]
    model: dict[str, Any]
    trainer: dict[str, Any]
    logger: dict[str, Any]
    callbacks: dict[str, Any]

    @property
    def out(self) -> Path:
        """The run folder."""
        return Path(self.common.output_dir)


def read(cfg: DictConfig) -> Settings:
    """Check a configuration, as far as that goes without data and network, and make the objects of it.

    Raises:
        InputError: names the key, what is allowed and what came.
    """
    _check_keys(cfg)
    values = plain(cfg)
    stimulus, readout = _build(Stimulus, "tagging", values), _build(Readout, "tagging", values)
    judgement, scoring = _build(Judgement, "importance", values), _build(Scoring, "importance", values)
    try:
        find_components(judgement.components, stimulus.components)
    except InputError as error:
        raise InputError(f"importance.components: {error}") from None
    course = _build(Course, "pruning", values)
    recipe = None
    if course.enabled:
        amount = dict(values["pruning"])
        if all(amount.get(name) is None for name in AMOUNTS):
            amount["macs_cut"] = course.default_macs_cut
        by_time = amount.get("latency_cut") is not None or amount.get("latency_ms") is not None
        if amount.get("scope") is None:
            amount["scope"] = "per_ms" if by_time and scoring.scope == "per_mac" else scoring.scope
        if by_time and course.steps > 1:
            raise InputError("pruning.latency_cut and pruning.latency_ms are met in one step; use pruning.steps=1")
        recipe = _build(
            Recipe, "pruning", values,
            amount=_build(Amount, "pruning", {"pruning": amount}), criterion=scoring.criterion,
            components=judgement.components, tagging=dict(vars(readout)),
            reconstruction=_build(Reconstruction, "pruning", values), seed=values["seed"],
            latency=_build(Latency, "latency", values),
        )  # fmt: skip
    for name in () if course.enabled else AMOUNTS:
        if values["pruning"].get(name) is not None:
            log.warning(
                "pruning.%s = %s has no effect, as pruning=none cuts nothing: say pruning=filters to cut", name,
                values["pruning"][name],
            )  # fmt: skip
    tuned = _build(Epochs, "finetune", values)
    names = [values[section]["name"] for section in ("optimizer", "finetune")]
    follows = OmegaConf.is_interpolation(cfg.finetune, "weight_decay") and values["finetune"]["weight_decay"]
    if follows and recipe is not None and tuned.epochs and len({str(name).rpartition(".")[2] for name in names}) > 1:
        log.warning(
            "finetune.weight_decay = %g is that of the training by %s, and %s means another thing by it: say "
            "finetune.weight_decay=%g, or another number", follows, *names, Optimization.weight_decay,
        )  # fmt: skip
    if tuned.from_scratch and recipe is None:
        raise InputError(
            "finetune.from_scratch trains the widths of a cut, and pruning=none cuts nothing; cut, or train"
        )
    exports = _build(Exports, "export", values)
    asked = [name for name, wanted in vars(exports).items() if wanted]
    if asked and recipe is None:
        raise InputError(
            f"export.{asked[0]} writes the network that a cut leaves, and pruning=none cuts nothing; cut, or leave it "
            "out (in code, freqprune.networks.export writes any network)"
        )
    return Settings(
        common=of_the_top(Common, cfg),
        stimulus=stimulus,
        readout=readout,
        showing=_build(Showing, "tagging", values),
        judgement=judgement,
        scoring=scoring,
        course=course,
        recipe=recipe,
        optimizer=_build(Optimization, "optimizer", values),
        tag_loss=_build(TagLoss, "tag_loss", values, stimulus=stimulus, where=readout.where),
        finetune=_build(Optimization, "finetune", values),
        distillation=_build(Distillation, "finetune", values),
        finetune_epochs=tuned.epochs,
        from_scratch=tuned.from_scratch,
        latency=_build(Latency, "latency", values),
        exports=exports,
        **_free(values, recipe),
    )


def _free(values: Mapping[str, Any], recipe: Recipe | None) -> dict[str, Any]:
    """The sections that hold arguments of whatever they stand for."""
    found = {name: with_booleans(values[name]) for name in FREE}
    left_open = found["trainer"].get("accelerator") == "auto"
    if left_open and recipe is not None and recipe.needs_float64 and MPSAccelerator.is_available():
        log.warning(
            "Apple's accelerator has no float64, in which this cut solves its equations: the job runs on the CPU"
        )
        found["trainer"] = {**found["trainer"], "accelerator": "cpu"}
    return found


T = TypeVar("T")


def _build(cls: type[T], section: str, values: Mapping[str, Any], **more: Any) -> T:
    """An object of a settings class from what a section says of its fields; errors name the keys as users write
    them."""
    hints = get_type_hints(cls)
    prefix = f"{section}."
    given = {
        name: typed(hints[name], values[section][name], prefix + name)
        for name in _names(cls)
        if name in values[section]
    }
    try:
        return cls(**given, **more)
    except InputError as error:
        named = re.match(r"\w+", str(error))
        if named and named.group() in _names(cls):
            raise InputError(f"{prefix}{error}") from None
        raise


def _names(cls: type[Any]) -> list[str]:
    return [field.name for field in fields(cls) if field.init and field.name not in ELSEWHERE.get(cls, ())]


def _check_keys(cfg: DictConfig) -> None:
    """Every key is a setting, and every setting is there: a default that no YAML says would be none that users see."""
    wanted = {"": [*SECTIONS, *FREE, *_names(Common)]}
    wanted |= {section: [name for cls in classes for name in _names(cls)] for section, classes in SECTIONS.items()}
    for section, names in wanted.items():
        prefix, found = (f"{section}.", cfg[section]) if section else ("", cfg)
        if not isinstance(found, DictConfig):
            raise InputError(
                f"{section} must hold settings, got {found!r}; leave it out of the command, or name one of its choices"
            )
        for key in map(str, found):
            if key not in names:
                raise InputError(no_such_key(prefix + key, cfg))
        for name in names:
            if name not in found:
                raise InputError(f"{prefix}{name} is not set; give {prefix}{name}=VALUE")
