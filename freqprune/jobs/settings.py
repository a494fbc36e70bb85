"""Configuration → the objects that the jobs work with. A setting is a field of a class and a line of its YAML, nothing
else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from freqprune.errors import InputError, at_least, one_of
from freqprune.jobs.config import no_such_key, plain
from freqprune.networks import Exports, Latency
from freqprune.pruning import Amount, Judgement, Recipe, Reconstruction, needs
from freqprune.tagging import Readout, Stimulus, find_components
from freqprune.training import Distillation, Optimization


@dataclass(frozen=True)
class Common:
    """What belongs to no section; see ``conf/common.yaml``."""

    seed: int
    output_dir: str
    ckpt: str | None
    ckpt_path: str | None
    resume: str | None
    pretrained: bool
    imports: Sequence[str]
    compile: bool
    matmul_precision: str

    def __post_init__(self) -> None:
        at_least(0, seed=self.seed)
        one_of(("highest", "high", "medium"), matmul_precision=self.matmul_precision)


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
        one_of(("auto", "before", "after"), bn_when=self.bn_when)


@dataclass(frozen=True)
class Epochs:
    """How long a cut network is fine-tuned."""

    epochs: int

    def __post_init__(self) -> None:
        at_least(0, epochs=self.epochs)


# The classes whose fields are the keys of a section.
SECTIONS: dict[str, tuple[type[Any], ...]] = {
    "tagging": (Stimulus, Readout, Showing),
    "importance": (Judgement, Scoring),
    "pruning": (Amount, Recipe, Reconstruction, Course),
    "optimizer": (Optimization,),
    "finetune": (Optimization, Distillation, Epochs),
    "latency": (Latency,),
    "export": (Exports,),
}
# Sections whose keys are the arguments of whatever their _target_ (of model: its name) stands for.
FREE = ("data", "model", "trainer", "logger", "callbacks")
# Fields of a recipe that come from other sections.
ELSEWHERE = {
    Recipe: ("amount", "criterion", "components", "tagging", "reconstruction", "seed"),
    Reconstruction: ("seed",),
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
    finetune: Optimization
    distillation: Distillation
    finetune_epochs: int
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
    find_components(judgement.components, stimulus.components)
    course = _build(Course, "pruning", values)
    recipe = None
    if course.enabled:
        amount = dict(values["pruning"])
        if all(amount[name] is None for name in ("ratio", "threshold", "macs_cut")):
            amount["macs_cut"] = course.default_macs_cut
        recipe = _build(
            Recipe, "pruning", values,
            amount=_build(Amount, "pruning", {"pruning": amount}), criterion=scoring.criterion,
            components=judgement.components, tagging=dict(vars(readout)),
            reconstruction=_build(Reconstruction, "pruning", values), seed=values["seed"],
        )  # fmt: skip
    return Settings(
        common=_build(Common, "", {"": values}),
        stimulus=stimulus,
        readout=readout,
        showing=_build(Showing, "tagging", values),
        judgement=judgement,
        scoring=scoring,
        course=course,
        recipe=recipe,
        optimizer=_build(Optimization, "optimizer", values),
        finetune=_build(Optimization, "finetune", values),
        distillation=_build(Distillation, "finetune", values),
        finetune_epochs=_build(Epochs, "finetune", values).epochs,
        latency=_build(Latency, "latency", values),
        exports=_build(Exports, "export", values),
        **{name: values[name] for name in FREE},
    )


T = TypeVar("T")


def _build(cls: type[T], section: str, values: Mapping[str, Any], **more: Any) -> T:
    """An object of a settings class from what a section says of its fields; errors name the keys as users write
    them."""
    hints = get_type_hints(cls)
    prefix = f"{section}." if section else ""
    given = {
        name: _typed(hints[name], values[section][name], prefix + name)
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


def _typed(hint: Any, value: Any, key: str) -> Any:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError:
        raise InputError(f"{key} must be {_in_words(hint)}, got {value!r}") from None


WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a word", type(None): "null"}


def _in_words(hint: Any) -> str:
    """A type as users know it.

    >>> _in_words(float | None), _in_words(Sequence[float] | str)
    ('a number or null', 'a list ([...]) or a word')
    """
    parts = [part for part in get_args(hint) or (hint,) if part is not Tensor]
    if get_origin(hint) is Sequence:
        parts = [hint]
    return " or ".join(WORDS.get(part, "a list ([...])") for part in parts)


def _check_keys(cfg: DictConfig) -> None:
    known = {*SECTIONS, *FREE, *_names(Common)}
    for key in map(str, cfg):
        if key not in known:
            raise InputError(no_such_key(key, cfg))
    for section, classes in SECTIONS.items():
        allowed = {name for cls in classes for name in _names(cls)}
        for key in map(str, cfg[section]):
            if key not in allowed:
                raise InputError(no_such_key(f"{section}.{key}", cfg))
