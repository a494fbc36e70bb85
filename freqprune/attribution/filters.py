"""Which filters of a layer an answer hangs on: the same tags, one a filter, where the filters are read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from freqprune.attribution.effects import estimate, strongest
from freqprune.attribution.gates import batches, check_frames, frames_for, gates
from freqprune.attribution.pairs import find_interactions
from freqprune.errors import InputError, at_least, closest
from freqprune.networks import check_answers, device_of, dtype_of, evaluating, first, hooked
from freqprune.tagging import Progress, Site, check_pixels, find_sites, normalizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FilterEffects:
    """What the filters of a layer do to every class.

    Attributes:
        layer: its name.
        effects: how much a filter raises each logit, ``(n_images, n_filters, n_classes)``.
        standard_error: of the effects, likewise.
        p_values: of the hypothesis that a filter does nothing, likewise; what another one does in a curve falls on the
            bins of a few, which more recordings average away.
        interactions: how much more two filters raise the logit of the network's own answer together than one by one,
            ``(n_images, n_filters, n_filters)``.
        interaction_p_values: of the hypothesis that two filters do not interact, not adjusted, likewise; beside a
            filter whose curve is nearly all that there is, those of some pairs are too small, with one recording or two
            above all.
    """

    layer: str
    effects: Tensor
    standard_error: Tensor
    p_values: Tensor
    interactions: Tensor
    interaction_p_values: Tensor

    def strongest_pairs(self, image: int, n_pairs: int = 5, alpha: float | None = None) -> list[tuple[int, int, float]]:
        """Pairs of filters that work together most, by size; with `alpha` only those at this false discovery rate."""
        return strongest(self.interactions[image], self.interaction_p_values[image], n_pairs, alpha)

    @property
    def movement(self) -> Tensor:
        """How far a filter moves the logits: its squared effects, summed over classes, mean over images,
        ``(n_filters,)``."""
        return self.effects.square().sum(-1).mean(0)

    def plot(self, classes: Sequence[str] | None = None) -> Figure:
        """A figure of the mean effect of every filter on every class.

        Args:
            classes: names of the classes; their numbers if left out.

        Raises:
            InputError: for another number of names than classes.
        """
        from freqprune.attribution.pictures import filters_by_classes

        n_classes = self.effects.shape[2]
        names = [str(number) for number in range(n_classes)] if classes is None else list(classes)
        if len(names) != n_classes:
            raise InputError(f"classes must name {n_classes} classes, got {len(names)}")
        return filters_by_classes(self.effects.mean(0), names, self.layer)


def _scales(site: Site, like: Tensor) -> bool:
    """Whether the function that a layer is read after hands on a factor of at least 0, so that it does not matter on
    which side of it gates are."""
    then, n = site.then, site.n_filters
    assert then is not None
    shape = (-1, n, 1, 1) if site.channel_dim == 1 else (-1, 1, n)
    values = torch.linspace(-10, 10, 41).to(like)[:, None].expand(-1, n).reshape(shape)
    return all(torch.allclose(then(share * values), share * then(values), atol=1e-6) for share in (0.0, 0.5))


def filter_effects(
    model: nn.Module,
    images: Tensor,
    layer: str,
    forwards: int | None = None,
    steepness: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> FilterEffects:
    """Gate every filter of a layer at a frequency of its own and read the logits: the effect of each on every class.

    Filters are gated where `freqprune.tag` reads them, after their own norm and activation; a closed one is what a cut
    leaves of it.

    Args:
        model: a classifier; runs in eval mode, which is restored.
        images: network inputs (normalised), ``(n_images, n_channels, height, width)``; pixels where `mean` and `std`
            are given.
        layer: name of a convolution or linear layer.
        forwards: frames that an image takes at most; one recording of ``4 * n_filters`` if left out.
        steepness: of the gates, see `freqprune.attribution.gates`.
        seed: of frequencies and phases.
        progress: wraps the iteration over images, for a progress bar.
        mean: channel means that the images are to be normalised with, as in `freqprune.attribute`.
        std: channel standard deviations, likewise.

    Raises:
        InputError: for an unknown layer, too few forwards, or a network that returns no logits.
    """
    # Closed at once, also after an error: what it has done to the network is undone then.
    with closing(_recordings(model, images, layer, forwards, steepness, seed, progress, mean, std)) as recordings:
        found = [
            (
                *(one.T for one in estimate(design, answers, n_frames)),
                *find_interactions(design, answers[:, top], n_frames),
            )
            for design, answers, n_frames, top in recordings
        ]
    return FilterEffects(layer, *(torch.stack(column) for column in zip(*found, strict=True)))


def filter_movement(model: nn.Module, images: Tensor, layer: str, seed: int = 0) -> Tensor:
    """`FilterEffects.movement` of network inputs alone, image by image, without what the effects of all images would
    take of memory; arguments as for `filter_effects`."""
    with closing(_recordings(model, images, layer, seed=seed)) as recordings:
        moved = [estimate(design, answers, n_frames)[0].square().sum(0) for design, answers, n_frames, _ in recordings]
    return torch.stack(moved).mean(0)


def _recordings(
    model: nn.Module,
    images: Tensor,
    layer: str,
    forwards: int | None = None,
    steepness: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Generator[tuple[Tensor, Tensor, int, int], None, None]:
    """Of each image the gates ``(n_frames, n_filters)``, the logits ``(n_frames, n_classes)``, the frames of one
    recording and the network's own answer; arguments as for `filter_effects`."""
    modules = dict(model.named_modules())
    module = modules.get(layer)
    if not isinstance(module, nn.Conv2d | nn.Linear):
        kinds = [name for name, one in modules.items() if isinstance(one, nn.Conv2d | nn.Linear)]
        raise InputError(f"the network has no convolution or linear layer {layer!r}{closest(layer, kinds)}")
    at_least(1, steepness=steepness)
    n_filters = len(module.weight)
    forwards = frames_for(n_filters) if forwards is None else forwards
    check_frames(n_filters, forwards, "filters")
    if mean is not None or not images.is_floating_point():
        check_pixels(images)
    images = images.to(dtype_of(model))
    images = normalizer(images, mean, std, device_of(model), images.dtype)(images).contiguous()
    check_answers(model, images[:1])
    with evaluating(model), torch.no_grad():
        shape = first(model(images[:1])).shape
    if len(shape) != 2:
        raise InputError(f"the network must return logits, (n_images, n_classes), got {tuple(shape)}")
    site = find_sites(model, images[:1], [layer])[0]
    if site.runs > 1:
        log.warning(
            "%s runs %d times in a forward: gates act on its first call, where a cut takes a filter out of all",
            layer, site.runs,
        )  # fmt: skip
    if site.stage == "convolution" and site.note:
        log.warning(
            "%s: gates act on the layer itself (%s); where a norm follows, it turns a closed filter into a constant, "
            "and a cut takes both away", layer, site.note
        )  # fmt: skip
    if site.then is not None and not _scales(site, images):
        log.warning(
            "the activation after %s is a function that the network calls itself: gates act before it, and a closed "
            "filter answers with its value at 0; use a module of torch.nn for it to be gated after it", layer
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    n_frames = frames_for(n_filters)
    design = torch.cat([gates(n_filters, n_frames, generator, steepness) for _ in range(forwards // n_frames)])
    opened: list[Tensor] = []
    calls = [0]

    def gate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] - 1 != site.call:
            return output
        if len(output) != len(opened[0]) > 1:
            raise InputError(
                f"layer {layer!r} answers {len(opened[0])} frames with {len(output)} rows: its first dimension does "
                "not count frames, so that its filters cannot be gated"
            )
        shape = [1] * output.dim()
        shape[0], shape[site.channel_dim] = -1, n_filters
        return output * opened[0].to(output).view(shape)

    def answer(share: Tensor, image: Tensor) -> Tensor:
        opened[:], calls[:] = [share], [0]
        return first(model(image.expand(len(share), *image.shape))).cpu().double()

    hook: Callable[..., Tensor] = gate
    with evaluating(model), torch.inference_mode(), hooked([(modules[site.module], None, hook)]):
        for image in progress(list(images)) if progress is not None else images:
            answers = torch.cat([answer(some, image) for some in batches(design, image)])
            yield design, answers, n_frames, int(answer(torch.ones(1, n_filters), image).argmax())
