"""What ``freqprune explain`` is asked, and what can be refused of it before anything heavy is imported."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from freqprune.errors import InputError, at_least, check_file, one_of
from freqprune.jobs.config import check_one_network, import_modules, of_the_top
from freqprune.jobs.values import no_such_key, override, plain, with_booleans
from freqprune.reports import record
from freqprune.training import ENDINGS

PIXEL_BASELINES = ("mean", "grey", "blur")


@dataclass(frozen=True)
class Whose:
    """Whose answers are explained, and where the job works."""

    ckpt: str | None
    pretrained: bool | str
    imports: Sequence[str]
    seed: int
    device: str
    processes: int
    output_dir: str

    def __post_init__(self) -> None:
        at_least(0, seed=self.seed)
        at_least(1, processes=self.processes)


@dataclass(frozen=True)
class Photographs:
    """Which images, and how they become inputs of the network."""

    images: str | Sequence[str]
    limit: int | None
    image_size: int | None
    resize: int | None
    interpolation: str | None
    mean: Sequence[float] | None
    std: Sequence[float] | None

    def __post_init__(self) -> None:
        for name in ("limit", "image_size", "resize"):
            if (value := getattr(self, name)) is not None:
                at_least(1, **{name: value})
        if self.resize is not None and (self.image_size is None or self.resize < self.image_size):
            raise InputError(
                f"resize = {self.resize} is the shorter side out of which image_size = {self.image_size} is cut: set "
                "both, resize the larger"
            )
        if self.interpolation is not None:
            one_of(("bilinear", "bicubic"), interpolation=self.interpolation)
        if (self.mean is None) != (self.std is None):
            raise InputError("mean and std come together: set both or neither")


@dataclass(frozen=True)
class Tags:
    """How parts are tagged and what is read, see `freqprune.attribute_fine`, which checks the rest."""

    target: int | None
    parts: str
    grid: int | Sequence[int]
    segments: str | None
    n_segments: int
    refine: int
    forwards: int
    until: float | None
    score: str
    baseline: str
    steepness: float
    overlap: float
    half: str | None

    def __post_init__(self) -> None:
        if not isinstance(self.grid, int) and len(self.grid) != 2:
            raise InputError(f"grid must be one number, or two along height and width, got {list(self.grid)}")


@dataclass(frozen=True)
class Telling:
    """What the page shows."""

    alpha: float
    rows: int
    pairs: int
    classes: str | None

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise InputError(f"alpha must lie between 0 and 1, got {self.alpha}")
        at_least(0, rows=self.rows, pairs=self.pairs)


@dataclass(frozen=True)
class Explaining:
    """A configuration of ``freqprune explain`` as objects; `model` is what the network is built from."""

    whose: Whose
    photographs: Photographs
    tags: Tags
    telling: Telling
    model: dict[str, Any]


CLASSES: tuple[type[Any], ...] = (Whose, Photographs, Tags, Telling)


def read_explaining(cfg: DictConfig) -> Explaining:
    """Check a configuration, as far as that goes without images and network, and make the objects of it.

    Raises:
        InputError: names the key, what is allowed and what came.
    """
    names = [field.name for cls in CLASSES for field in fields(cls)]
    for key in map(str, cfg):
        if key not in (*names, "model"):
            raise InputError(no_such_key(key, cfg))
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise InputError(f"{missing[0]} is not set; give {missing[0]}=VALUE")
    model = {key: value for key, value in with_booleans(plain(cfg.model)).items() if key != "fallback"}
    return Explaining(
        of_the_top(Whose, cfg), of_the_top(Photographs, cfg), of_the_top(Tags, cfg), of_the_top(Telling, cfg), model
    )


def check_explaining(cfg: DictConfig) -> Explaining:
    """What `explain` can refuse at once.

    Raises:
        InputError: as `read_explaining`; for a network that is given twice or not at all, files and modules that are
            not there.
    """
    asked = read_explaining(cfg)
    whose, tags = asked.whose, asked.tags
    check_one_network(cfg, whose.ckpt, whose.pretrained, "to explain")
    if whose.ckpt is not None:
        check_file("ckpt", whose.ckpt)
    for key, path in (("segments", tags.segments), ("classes", asked.telling.classes)):
        if path is not None:
            check_file(key, path)
    if tags.baseline not in PIXEL_BASELINES and not Path(tags.baseline).is_file():
        raise InputError(
            f"baseline must be one of {', '.join(PIXEL_BASELINES)} or an image file, got {tags.baseline!r}, which does "
            "not exist"
        )
    out = Path(whose.output_dir)
    if any((out / name).is_file() for name in (record.METRICS, record.TRAINING)):
        raise InputError(
            f"output_dir = {out} holds a run of train or prune, whose record an explanation would replace; explain "
            f"into another folder, such as {shlex.quote(override('hydra.run.dir', out / 'explain'))}"
        )
    find_images(asked.photographs)
    import_modules(whose.imports)
    return asked


def _is_photograph(path: Path, folder: Path) -> bool:
    """Not what is hidden, such as a notebook's or a Mac's copies, nor the maps of an earlier run."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    drawn = path.parent.name == "maps" and (path.parent.parent / record.RUN).is_file() and folder != path.parent
    return path.suffix.lower() in ENDINGS and not hidden and not drawn and path.is_file()


def find_images(asked: Photographs) -> list[Path]:
    """The image files that are asked for, those of a folder by name."""
    given = [asked.images] if isinstance(asked.images, str) else list(asked.images)
    found: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            # As a training does, also through links.
            files = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
            inside = sorted(one for one in files if _is_photograph(one, path))
            if not inside:
                raise InputError(f"images = {path} holds no image; image files end in {', '.join(ENDINGS)}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"images = {path} does not exist; give a folder, a file, or a list [one.png,other.png]")
    if not found:
        raise InputError("images names no image; give a folder, a file, or a list [one.png,other.png]")
    return found[: asked.limit]
