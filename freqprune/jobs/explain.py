"""The job behind ``freqprune explain``."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from freqprune.attribution import Attribution, attribute_fine, check_dims, compares_classes
from freqprune.errors import InputError
from freqprune.jobs import assembly
from freqprune.jobs.advice import advise_explaining
from freqprune.jobs.announce import announce_explaining
from freqprune.jobs.explain_settings import PIXEL_BASELINES, Explaining, Photographs, check_explaining, find_images
from freqprune.jobs.launch import in_all_processes
from freqprune.jobs.launched import launched
from freqprune.jobs.photographs import read_classes, read_images, read_segments
from freqprune.jobs.so_far import FOLDER, kept
from freqprune.networks import (
    CIFAR10,
    CIFAR10_CLASSES,
    Preprocessing,
    Stored,
    check_answers,
    class_names,
    device_of,
    dtype_of,
    first,
    preprocessing,
)
from freqprune.processes import rank_and_size
from freqprune.reports import ExplainPage, record, save, show, show_folder, write_explain_page
from freqprune.tagging import normalizer

log = logging.getLogger(__name__)

OF_PARTS = (
    "effects", "smoothed", "standard_error", "p_values", "adjusted", "interactions", "interaction_p_values",
    "first_order",
)  # fmt: skip


def explain(cfg: DictConfig) -> tuple[Attribution, dict[str, Any]]:
    """Say for each image which of its parts a trained network's answer hangs on.

    Args:
        cfg: composed from ``conf/explain.yaml``.

    Returns:
        The attribution, which is also written to ``attribution.npz``, and the objects: ``pixels`` ``(n_images,
        n_channels, height, width)`` in [0, 1], ``names`` of the images, ``net``.

    Raises:
        InputError: for a bad setting, before any work is done or lost.
    """
    asked = check_explaining(cfg)
    whose = asked.whose
    device = _device(whose.device)
    assembly.quiet()
    out = assembly.prepare_output(Path(whose.output_dir))
    # Of one process Lightning need not know the device.
    alone = whose.processes == 1 and launched() is None
    like = {"_target_": "pytorch_lightning.Trainer", "accelerator": device.type, "devices": whose.processes}
    with nullcontext(True) if alone else in_all_processes(like, "processes={processes}") as is_first:
        rank, n_processes = rank_and_size()
        own = torch.device(device.type, rank) if n_processes > 1 and device.type != "cpu" else device
        return _explained(cfg, asked, out, own, is_first)


def _explained(
    cfg: DictConfig, asked: Explaining, out: Path, device: torch.device, is_first: bool
) -> tuple[Attribution, dict[str, Any]]:
    """The job in each of its processes; the first one writes and speaks."""
    whose, tags = asked.whose, asked.tags
    stored = assembly.stored_network(asked.model, whose.ckpt, whose.pretrained)
    net = stored.net.to(device).eval()
    takes = _preprocessing(asked, stored)
    paths = find_images(asked.photographs)
    pixels = _read(paths, takes)
    if is_first and asked.photographs.image_size is None and (other := stored.other_size(*pixels.shape[-2:])):
        log.warning("%s: unless that is meant, set image_size, resize and interpolation as in its training", other)
    prepare = normalizer(pixels[:1], takes.mean, takes.std, device, dtype_of(net))
    check_answers(net, prepare(pixels[:1]).contiguous())
    classes = _classes(asked, net, pixels[:1], stored)
    if is_first:
        announce_explaining(out, net, pixels, tags)
    with kept(out, asked, net, is_first) as cache:
        found = attribute_fine(
            net,
            pixels,
            tags.target,
            parts=tags.parts,
            grid=tags.grid if isinstance(tags.grid, int) else (tags.grid[0], tags.grid[1]),
            segments=None if tags.segments is None else read_segments(tags.segments),
            n_segments=tags.n_segments,
            refine=tags.refine,
            forwards=tags.forwards,
            until=tags.until,
            score=tags.score,
            baseline=_baseline(tags.baseline, pixels, takes),
            steepness=tags.steepness,
            overlap=tags.overlap,
            mean=takes.mean,
            std=takes.std,
            half=tags.half,
            seed=whose.seed,
            progress=assembly.bars(),
            cache=cache,
        )
    names = _names(paths)
    objects = {"pixels": pixels, "names": names, "net": net}
    if not is_first:
        return found, objects
    _forget(out)
    record.write(out, cfg)
    _write(out, asked, found, pixels, names, classes)
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    sure = sum(int(found.significant(number, asked.telling.alpha).sum()) for number in range(len(names)))
    images = f"{len(names)} image{'' if len(names) == 1 else 's'}"
    most = "at most " if tags.until is not None else ""
    show(
        f"{images}, {most}{found.forwards} forwards each: {sure} of {int(found.present.sum())} parts significant at a "
        f"false discovery rate of {asked.telling.alpha:g}; open explain.html"
    )
    show_folder(out)
    with torch.inference_mode():
        advise_explaining(out, compares_classes(first(net(prepare(pixels[:1]).contiguous()))))
    return found, objects


def _device(name: str) -> torch.device:
    """Where the network runs."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device = {name} cannot be used ({reason}); use auto, cpu or cuda") from None


def _preprocessing(asked: Explaining, stored: Stored) -> Preprocessing:
    """What the network was trained with, as far as that is known and nothing else is asked for; a size of 0 leaves the
    images as they are."""
    given = asked.photographs
    known = CIFAR10 if asked.whose.pretrained else preprocessing(asked.model)
    mean, std = (_normalisation(given, name, stored) for name in ("mean", "std"))
    size, resize = given.image_size, given.resize
    if size is None and known is not None:
        size, resize = known.image_size, known.resize
    how = given.interpolation or (known.interpolation if known is not None else "bilinear")
    return Preprocessing(size or 0, resize or 0, mean, std, how if how in ("bilinear", "bicubic") else "bicubic")


def _normalisation(given: Photographs, name: str, stored: Stored) -> tuple[float, ...]:
    asked: Sequence[float] | None = getattr(given, name)
    known = stored.normalization.get(name)
    found = known if asked is None else asked
    if found is None:
        raise InputError(
            f"{name} is not set, and the checkpoint does not say what its inputs are normalised with: give "
            "mean=[...] and std=[...], [0,0,0] and [1,1,1] for pixels as they are"
        )
    if asked is not None and known is not None and max(abs(a - b) for a, b in zip(asked, known, strict=False)) > 1e-3:
        raise InputError(
            f"the network was trained with {name} {known}, but {name} = {list(asked)}; leave mean and std out"
        )
    return tuple(found)


def _read(paths: list[Path], takes: Preprocessing, key: str = "images") -> Tensor:
    """Images in as many channels as the network has means."""
    if len(takes.mean) not in (1, 3):
        raise InputError(f"mean must hold 3 values, or 1 for a network of grey images, got {list(takes.mean)}")
    size, resize = takes.image_size or None, takes.resize or None
    return read_images(paths, size, resize, takes.interpolation, len(takes.mean), key)


def _baseline(given: str, pixels: Tensor, takes: Preprocessing) -> str | Tensor:
    if given in PIXEL_BASELINES:
        return given
    found = _read([Path(given)], takes, "baseline")
    if found.shape[1:] != pixels.shape[1:]:
        raise InputError(
            f"baseline = {given} has {found.shape[2]} x {found.shape[3]} pixels, the images have {pixels.shape[2]} x "
            f"{pixels.shape[3]}; set image_size=PIXELS"
        )
    return found[0]


def _names(paths: list[Path]) -> list[str]:
    """Names of the images, in order and each once, short enough for the files that are called so."""
    width = len(str(len(paths)))
    return [f"{number:0{width}d}_{_short(path.stem)}" for number, path in enumerate(paths, 1)]


def _short(stem: str, most: int = 200) -> str:
    while len(os.fsencode(stem)) > most:
        stem = stem[:-1]
    return stem


def _classes(asked: Explaining, net: nn.Module, image: Tensor, stored: Stored) -> list[str] | None:
    """Names of the network's classes, where they are known."""
    if asked.telling.classes is not None:
        with torch.inference_mode():
            n_classes = check_dims(first(net(image.to(device_of(net), dtype_of(net))))).shape[1]
        return read_classes(asked.telling.classes, n_classes)
    if asked.whose.pretrained:
        return list(CIFAR10_CLASSES)
    return stored.classes or class_names(asked.model)


def _forget(out: Path) -> None:
    """Remove what an earlier explanation has written into a folder."""
    before = out / "attribution.npz"
    drawn: list[str] = []
    # One that was killed as it wrote has left half a file.
    with (
        suppress(OSError, ValueError, EOFError, KeyError, BadZipFile),
        before.open("rb") as file,
        np.load(file) as found,
    ):
        drawn = found["names"].tolist()
    record.clear([out / record.EXPLAINED, before, *(out / "maps" / f"{name}.png" for name in drawn)])


def _write(
    out: Path, asked: Explaining, found: Attribution, pixels: Tensor, names: list[str], classes: list[str] | None
) -> None:
    telling = asked.telling
    arrays: dict[str, Any] = {name: getattr(found, name).numpy() for name in (*OF_PARTS, "maps", "parts", "whole")}
    arrays |= {
        "baseline": found.baseline.numpy(),
        "names": np.array(names),
        "part_names": np.array(found.part_names),
        "forwards": found.forwards,
    }
    if found.target is not None:
        arrays["target"] = found.target.numpy()
    np.savez_compressed(out / "attribution.npz", **arrays)
    bar = assembly.bars() or iter
    for number, name in bar(list(enumerate(names))):
        figure = found.plot(number, pixels[number], telling.pairs, telling.rows, telling.alpha)
        save(figure, out / "maps" / f"{name}.png", dpi=120)
    page = ExplainPage(names, classes, asked.tags.score, telling.alpha, telling.rows, telling.pairs, asked.tags.overlap)
    write_explain_page(out, found, page)
