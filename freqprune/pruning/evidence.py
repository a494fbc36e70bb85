"""Network and material → what a criterion and the compensation read: response, moments, gradients, frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import device_of, equal_batches
from freqprune.pruning.compensation import readers_of
from freqprune.pruning.criteria import needs
from freqprune.pruning.importance import Evidence
from freqprune.pruning.moments import counted_moments, output_gradients
from freqprune.pruning.recipe import Material, Recipe
from freqprune.pruning.surgery import Plan
from freqprune.tagging import Progress, Stimulus, TagResponse, pick_layers, tag

# Calibration images that are read at once.
BATCH = 32
# 256 images of 32 x 32.
MEASURED_PIXELS = 256 * 32**2
LEAST_MEASURED = 16


def check_material(material: Material, recipe: Recipe) -> None:
    """Raise InputError where a recipe needs images that are not there."""
    wanted = needs(recipe.criterion)
    read_by = {
        f"criterion {recipe.criterion!r}": bool(wanted & {"moments", "gradients", "frames"}),
        f"compensation={recipe.compensation!r}": recipe.compensation == "sequential" or recipe.needs_moments,
    }
    reader = next((name for name, reads in read_by.items() if reads), None)
    if reader is not None and material.calibration is None:
        raise InputError(f"{reader} needs calibration images: pass Material(calibration=...)")
    if "labels" in wanted and not material.labelled:
        raise InputError(
            f"criterion {recipe.criterion!r} reads labelled images: pass Material(labelled=(images, labels))"
        )


def gather(
    plan: Plan,
    chosen: Sequence[str],
    material: Material,
    recipe: Recipe,
    stimulus: Stimulus,
    response: TagResponse | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Measure what the recipe needs of a network, and nothing else.

    Args:
        plan: of the network.
        chosen: the units that may lose filters.
        material: images.
        recipe: names the criterion and the compensation.
        stimulus: the tags.
        response: of this network, if it is at hand; measured otherwise, if the criterion reads it.
        progress: see `freqprune.tag`.

    Raises:
        InputError: if the material lacks images that are needed.
    """
    net, wanted = plan.model, needs(recipe.criterion)
    device = plan.example.device
    members = [member for name in chosen for member in plan.unit(name).members]
    if "tags" in wanted and (response is None or not {*members} <= {*response.layers}):
        images = material.images.to(device)
        tagging = dict(recipe.tagging)
        if tagging.get("layers") is None:
            tagging["layers"] = list(dict.fromkeys([*pick_layers(net, None), *members]))
        response = tag(
            net,
            images,
            stimulus,
            mean=material.mean,
            std=material.std,
            seed=recipe.seed,
            progress=progress,
            **tagging,
        )
    readers = readers_of(plan.graph, chosen)
    moments = gradients = None
    short: dict[str, int] = {}
    if recipe.needs_moments:
        inputs = calibration(net, material, recipe, stimulus)
        moments, counts = counted_moments(net, readers, inputs, seed=recipe.seed, progress=progress)
        short = {name: len(moments[name]) - count for name, count in counts.items() if count < len(moments[name])}
    if "gradients" in wanted:
        inputs = calibration(net, material, recipe, stimulus)
        gradients = output_gradients(net, readers, inputs, recipe.seed, progress)
    frames: list[Tensor] = []
    if "frames" in wanted:
        frames = list(calibration(net, material, recipe, stimulus, n_measured(recipe, material.images.shape)))
    labelled = []
    if material.labelled is not None and "labels" in wanted:
        pixels, labels = material.labelled
        labelled = [(material.normalize(pixels.to(device)), labels.to(device))]
    return Evidence(
        net, response, recipe.components, recipe.seed, plan.graph, moments, gradients, labelled, frames, short
    )


def shared_batches(recipe: Recipe, images: Tensor) -> int | None:
    """Batches of calibration images that the processes of a cut share, at the step that has fewest; None if it needs
    none."""
    kinds = (recipe.calibrate_on != "frames") + (recipe.calibrate_on != "images")
    found = [-(-len(images) // BATCH) * kinds] if recipe.needs_moments else []
    if recipe.with_blocks:
        # Of single images, if need be.
        found.append(min(len(images), n_measured(recipe, images.shape)) * recipe.inputs_an_image)
    if recipe.compensation == "sequential":
        found.append(len(equal_batches([images] * recipe.inputs_an_image)))
    return min(found, default=None)


def n_measured(recipe: Recipe, shape: torch.Size) -> int:
    """Images on which a change of the logits is measured, of ``(n_images, n_channels, height, width)``."""
    if recipe.measured_images is not None:
        return recipe.measured_images
    return max(LEAST_MEASURED, MEASURED_PIXELS // shape[-2:].numel())


def calibration(
    net: nn.Module, material: Material, recipe: Recipe, stimulus: Stimulus, n_images: int | None = None
) -> Iterator[Tensor]:
    """Batches of network inputs: tagged frames, the images as they are, or both; of the first `n_images` or of all."""
    if material.calibration is None:
        raise InputError("second moments need calibration images: pass Material(calibration=...)")
    device = device_of(net)
    generator = torch.Generator().manual_seed(recipe.seed)
    distinct, _ = stimulus.distinct_frames
    for images in material.calibration[:n_images].split(BATCH):
        if recipe.calibrate_on != "frames":
            yield material.normalize(images.to(device))
        if recipe.calibrate_on != "images":
            # Other frames for every few images, so that all phases of the tags are seen.
            which = distinct[torch.randperm(len(distinct), generator=generator)[: recipe.frames_an_image]].sort().values
            yield material.normalize(stimulus.frames(images, which).flatten(0, 1).to(device))
