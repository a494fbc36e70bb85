"""One cut: tag, score, select, remove, make up for it. What `prune.py` and the pruning callback share, free of configuration files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.compensation import METHODS, compensate, readers_of
from freqprune.errors import InputError, closest
from freqprune.importance import Evidence, needs, scores
from freqprune.moments import input_moments, output_gradients
from freqprune.response import TagResponse
from freqprune.selection import Amount, Kept, remarks, select
from freqprune.sites import pick_layers
from freqprune.stimulus import Stimulus
from freqprune.surgery import Plan, recalibrate_batch_norm
from freqprune.tagging import tag

CALIBRATIONS = ("frames", "images")


@dataclass(frozen=True)
class Material:
    """What a cut looks at; pixels are in [0, 1], not normalised.

    Attributes:
        images: pixels to tag, ``(n_images, n_channels, height, width)``.
        normalize: pixels to network inputs.
        mean: channel means of that normalisation, for the tagged frames.
        std: channel standard deviations, likewise.
        calibration: pixels for second moments.
        bn_images: pixels for re-estimating batch-norm statistics before the compensation; None for not.
        labelled: pixels and class labels, for criteria that need gradients or activations.
    """

    images: Tensor
    normalize: Callable[[Tensor], Tensor]
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    calibration: Tensor | None = None
    bn_images: Tensor | None = None
    labelled: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Recipe:
    """How to cut.

    Args:
        amount: how much.
        criterion: name of the importance criterion.
        components: response components that tag criteria read.
        layers: patterns of the layers to prune; all inner layers (and streams) if left out.
        exclude: patterns of layers to spare.
        streams: let the filters of residual streams go as well.
        compensation: ``"none"``, ``"mean"`` or ``"least_squares"``, see `freqprune.compensation`.
        calibrate_on: take second moments over tagged ``"frames"`` or over plain ``"images"``.
        frames_an_image: tagged frames of each calibration image.
        measured_images: calibration images for criteria that measure what a cut does to the logits.
        tagging: further arguments of `freqprune.tagging.tag`.
        seed: of noise, positions and random scores.

    Raises:
        InputError: for an unknown criterion, compensation or calibration.
    """

    amount: Amount
    criterion: str = "snr"
    components: Sequence[str] | str = "fundamentals"
    layers: Sequence[str] | str | None = None
    exclude: Sequence[str] | str | None = None
    streams: bool = False
    compensation: str = "none"
    calibrate_on: str = "frames"
    frames_an_image: int = 2
    measured_images: int = 256
    tagging: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        needs(self.criterion)
        for name, value, allowed in (("compensation", self.compensation, METHODS), ("calibrate_on", self.calibrate_on, CALIBRATIONS)):
            if value not in allowed:
                raise InputError(f"pruning.{name} must be one of {', '.join(allowed)}, got {value!r}{closest(value, allowed)}")
        for count, number in (("frames_an_image", self.frames_an_image), ("measured_images", self.measured_images)):
            if number < 1:
                raise InputError(f"pruning.{count} must be at least 1, got {number}")

    @property
    def needs_moments(self) -> bool:
        return self.compensation != "none" or "moments" in needs(self.criterion)


@dataclass
class Cut:
    """What came of a cut.

    Attributes:
        net: the smaller network.
        kept: filters kept of each unit.
        scores: by which they were chosen.
        response: the response to the tags; None if the criterion reads none and none was given.
        remarks: what a user should know.
    """

    net: nn.Module
    kept: Kept
    scores: dict[str, Tensor]
    response: TagResponse | None
    remarks: list[str]


def plan_cut(net: nn.Module, example: Tensor, recipe: Recipe) -> tuple[Plan, list[str]]:
    """What may be removed, and which of it the recipe picks, after checking that the tags will tell what the criterion asks for.

    Raises:
        InputError: for patterns that match nothing or pick what cannot go, or tag settings that leave the criterion without its readings.
    """
    plan = Plan(net, example)
    chosen = plan.choose(recipe.layers, recipe.exclude, recipe.streams)
    if "tags" in needs(recipe.criterion):
        recorded = pick_layers(net, recipe.tagging.get("layers"))
        unread = [member for name in chosen for member in plan.unit(name).members if member not in recorded]
        if unread:
            raise InputError(f"importance.criterion = {recipe.criterion} needs the response of {', '.join(unread)}, which tagging.layers leaves out")
        if recipe.tagging.get("noise_std", 0.02) == 0 and "noise" in needs(recipe.criterion):
            raise InputError(
                f"importance.criterion = {recipe.criterion} compares with noise, but tagging.noise_std = 0; use the default 0.02, or importance=amplitude"
            )
    return plan, chosen


def cut(
    net: nn.Module,
    material: Material,
    recipe: Recipe,
    stimulus: Stimulus,
    response: TagResponse | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Cut:
    """Remove the filters that score lowest. The network itself is left as it is.

    Args:
        net: the network.
        material: images.
        recipe: how to cut.
        stimulus: the tags.
        response: of this network, if it is at hand; measured otherwise, if the criterion reads it.
        progress: see `freqprune.tagging.tag`.

    Raises:
        InputError: whatever is wrong with the recipe for this network, before anything is removed.
    """
    device = next(net.parameters()).device
    example = material.normalize(material.images[:1].to(device))
    plan, chosen = plan_cut(net, example, recipe)
    wanted = needs(recipe.criterion)
    if response is None and "tags" in wanted:
        images = material.images.to(device)
        response = tag(net, images, stimulus, mean=material.mean, std=material.std, seed=recipe.seed, progress=progress, **recipe.tagging)
    readers = readers_of(plan.graph, chosen)
    moments = gradients = None
    if recipe.needs_moments:
        moments = input_moments(net, readers, _calibration(net, material, recipe, stimulus), seed=recipe.seed)
    if "gradients" in wanted:
        gradients = output_gradients(net, readers, _calibration(net, material, recipe, stimulus), seed=recipe.seed)
    frames = list(_calibration(net, material, recipe, stimulus, recipe.measured_images)) if "frames" in wanted else []
    labelled = []
    if material.labelled is not None and "labels" in wanted:
        pixels, labels = material.labelled
        labelled = [(material.normalize(pixels.to(device)), labels.to(device))]
    evidence = Evidence(net, response, recipe.components, recipe.seed, plan.graph, moments, gradients, labelled, frames)
    found = scores(recipe.criterion, evidence, chosen)
    kept = select(found, recipe.amount, plan.macs)
    small = plan.apply(kept)
    notes = remarks(kept, {name: plan.unit(name).n_filters for name in kept}, recipe.amount)
    if material.bn_images is not None:
        recalibrate_batch_norm(small, [material.normalize(batch.to(device)) for batch in material.bn_images.split(128) if len(batch) > 1])
    notes += compensate(plan, small, kept, moments or {}, recipe.compensation, reestimated=material.bn_images is not None)
    if recipe.amount.macs_cut is not None:
        got = 1 - plan.macs({name: len(indices) for name, indices in kept.items()}) / plan.macs({})
        if got - recipe.amount.macs_cut > 0.01:
            notes.append(f"{100 * got:.1f} % of the MACs cut instead of {100 * recipe.amount.macs_cut:.1f} %: whole blocks of filters allow no closer cut")
    return Cut(small, kept, found, response, notes)


def _calibration(net: nn.Module, material: Material, recipe: Recipe, stimulus: Stimulus, n_images: int | None = None) -> Iterator[Tensor]:
    """Batches of network inputs: tagged frames, or the images as they are; of the first `n_images` images or of all."""
    if material.calibration is None:
        raise InputError("second moments need calibration images: pass Material(calibration=...)")
    device = next(net.parameters()).device
    generator = torch.Generator().manual_seed(recipe.seed)
    distinct, _ = stimulus.distinct_frames
    for images in material.calibration[:n_images].split(32):
        if recipe.calibrate_on == "frames":
            # Other frames for every few images, so that all phases of the tags are seen.
            which = distinct[torch.randperm(len(distinct), generator=generator)[: recipe.frames_an_image]].sort().values
            images = stimulus.frames(images, which).flatten(0, 1)
        yield material.normalize(images.to(device))


def step_amount(amount: Amount, step: int, n_steps: int, left: float) -> Amount:
    """Amount of one of several steps that together remove `amount`, in equal shares of the dense network.

    Args:
        amount: of all steps together. A threshold is the same in every step.
        step: 0, 1, ..., ``n_steps - 1``.
        n_steps: number of steps.
        left: share of the dense network's filters (for a ratio) or MACs (for a MACs cut) that is left before this step.

    >>> from freqprune.selection import Amount
    >>> round(step_amount(Amount(ratio=0.5), 1, 2, 0.75).ratio, 3)
    0.333
    """
    goal = amount.ratio if amount.ratio is not None else amount.macs_cut
    if goal is None:
        return amount
    now = 1 - (1 - goal * (step + 1) / n_steps) / left
    return replace(amount, ratio=now) if amount.ratio is not None else replace(amount, macs_cut=now)
