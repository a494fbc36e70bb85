"""Which parts of an image an answer hangs on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.attribution.baselines import find_baseline
from freqprune.attribution.effects import Attribution, estimate
from freqprune.attribution.gates import batches, check_frames, frames_for, opened, shared, waves
from freqprune.attribution.pairs import find_interactions
from freqprune.attribution.parts import find_parts, places
from freqprune.attribution.scores import Score, read, targets
from freqprune.attribution.sensitivity import first_order
from freqprune.attribution.smoothing import smoothed
from freqprune.errors import InputError, at_least, one_of
from freqprune.networks import check_answers, device_of, evaluating, first
from freqprune.processes import added_up, rank_and_size
from freqprune.tagging import HALF, Progress

# Of what is fitted to an image, see `_fitted`, over how many parts at once each holds for.
OF_AN_IMAGE = (1, 1, 1, 1, 2, 2, 1)


def attribute(
    model: nn.Module,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    parts: str = "grid",
    grid: int | tuple[int, int] = 8,
    segments: Tensor | None = None,
    n_segments: int = 64,
    forwards: int = 512,
    until: float | None = None,
    score: str | Score = "logit",
    baseline: str | Tensor = "mean",
    steepness: float = 4.0,
    overlap: float = 0.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    half: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Attribution:
    """Tag the parts of images, each at a frequency of its own, and read at a score what the answer hangs on.

    Inside `freqprune.processes.shared_work` the processes share the images, and all of them get the whole of it.

    Args:
        model: network, or what computes it without parameters, such as `freqprune.networks.OnnxModule`; runs in eval
            mode, which is restored.
        images: pixels in [0, 1], ``(n_images, n_channels, height, width)``, not normalised.
        target: class to read, for all images or one each; the network's own answer if left out.
        parts: ``"grid"``, tiles; ``"patches"``, those of a network of tokens; ``"channels"``, the colours; ``"slic"``,
            superpixels (needs scikit-image).
        grid: tiles along each side, or along height and width.
        segments: instead, an integer mask of parts, numbered from 0, pixels with -1 in none, ``(height, width)`` or one
            for each image.
        n_segments: superpixels of an image, about.
        forwards: frames that an image takes at most: recordings of ``4 * n_parts`` frames each, with phases and
            frequencies drawn anew.
        until: stop as soon as no standard error of the image is above this, in units of the score.
        score: ``"logit"``, ``"probability"`` or ``"log_odds"`` of the target, or a function of the network's output
            that gives one number an image.
        baseline: what a part fades to: its image's channel ``"mean"``, ``"grey"``, a ``"blur"`` of the image, or pixels
            of the shape of the images.
        steepness: 1 for sines, larger for gates that are more often open or closed, see `freqprune.attribution.gates`.
        overlap: in parts, how far a part gives of its wave to others, so that neighbours open and close together more
            often, see `freqprune.attribution.gates.shared`; 0 for gates that do not hang together. `first_order` then
            counts to a part what its neighbours do along with it.
        mean: channel means that the network's inputs are normalised with; none if left out.
        std: channel standard deviations, likewise.
        half: ``"float16"`` or ``"bfloat16"``: run the network in half precision by autocast.
        seed: of frequencies and phases.
        progress: wraps the iteration over recordings, image after image, for a progress bar.

    Raises:
        InputError: for more parts than odd bins, masks of another size, a class that is not there, a network that
            answers differently from call to call, scores that are not finite, or any other argument out of range.
    """
    if images.dim() != 4 or not len(images):
        raise InputError(f"images must be (n_images, n_channels, height, width), got {tuple(images.shape)}")
    at_least(1, steepness=steepness)
    at_least(0, overlap=overlap)
    if until is not None and not until > 0:
        raise InputError(f"until must be a standard error above 0, got {until}")
    reader = _Reader(model, *_normalisation(model, images, mean, std), score, _dtype(half))
    whole = reader.inputs(images)
    check_answers(model, whole[:1])
    faded = reader.inputs(find_baseline(images.float(), baseline))
    numbers, names = find_parts(model, images, parts, grid, segments, n_segments)
    check_frames(len(names), forwards)
    n_frames = frames_for(len(names))
    generator = torch.Generator().manual_seed(seed)
    tags = [waves(len(names), n_frames, generator) for _ in range(forwards // n_frames)]
    rank, n_processes = rank_and_size()
    own = range(rank, len(images), n_processes)
    recordings = [(number, recording) for number in own for recording in range(len(tags))]
    found: dict[int, tuple[Tensor, ...]] = {}
    designs: list[Tensor] = []
    scores: list[Tensor] = []
    taken = torch.zeros(len(images), dtype=torch.long)
    with evaluating(model), torch.inference_mode():
        wanted = reader.targets(whole, target)
        ends = [reader.read_each(inputs, wanted) for inputs in (whole, faded)]
        for number, recording in progress(recordings) if progress is not None else recordings:
            if number in found:
                continue  # sure enough before its last recording
            where = places(numbers[number], len(names))
            designs.append(opened(shared(tags[recording], where, overlap), steepness))
            frames = _frames(whole[number], faded[number], numbers[number], designs[-1])
            scores += [reader.read(some, None if wanted is None else wanted[number]) for some in frames]
            last = recording + 1 == len(tags)
            if not last and until is None:
                continue
            there = _present(numbers[number], len(names))
            fitted = _fitted(torch.cat(designs), torch.cat(scores), n_frames, there, where[there])
            if last or (until is not None and float(fitted[2].max()) <= until):
                found[number] = fitted
                taken[number], scores, designs = n_frames * (recording + 1), [], []
    effects, smooth, errors, p_values, pairs, of_pairs, shares = _of_all(found, len(images), len(names))
    return Attribution(
        effects, smooth, errors, p_values, pairs, of_pairs, shares, wanted, ends[0], ends[1], numbers, names,
        int(added_up(taken).max()),
    )  # fmt: skip


@dataclass(frozen=True)
class _Reader:
    """A network, what its inputs are normalised with, and what is read of its answer."""

    model: nn.Module
    mean: Tensor
    std: Tensor
    score: str | Score
    half: torch.dtype | None

    def inputs(self, pixels: Tensor) -> Tensor:
        """Pixels as the network takes them, on its device."""
        return (pixels.to(self.mean) - self.mean) / self.std

    def answer(self, inputs: Tensor) -> Any:
        with torch.autocast(inputs.device.type, dtype=self.half, enabled=self.half is not None):
            return self.model(inputs)

    def targets(self, inputs: Tensor, given: int | Tensor | None) -> Tensor | None:
        """Class to read of each image; None for a score of one's own."""
        if callable(self.score):
            return None
        return targets(torch.cat([first(self.answer(one[None])).float() for one in inputs]), given)

    def read(self, inputs: Tensor, target: Tensor | None) -> Tensor:
        """Scores of frames of one image, float64 ``(n_frames,)``."""
        output = self.answer(inputs)
        wanted = None if target is None else target.expand(len(inputs))
        return read(output, self.score, wanted).double().cpu()

    def read_each(self, inputs: Tensor, wanted: Tensor | None) -> Tensor:
        """Score of each image, ``(n_images,)``."""
        each: Any = [None] * len(inputs) if wanted is None else wanted
        return torch.cat([self.read(one[None], at) for one, at in zip(inputs, each, strict=True)]).float()


def _frames(whole: Tensor, faded: Tensor, numbers: Tensor, design: Tensor) -> Iterator[Tensor]:
    """Batches of frames of one image, ``(n_frames, n_channels, height, width)``: each part as far from its baseline as
    its gate says; what is in no part stays. Fading and normalising are both linear, so that the frames of normalised
    images are the normalised frames."""
    still = torch.ones(len(design), 1, dtype=torch.float64)
    apart, at = whole - faded, numbers.to(whole.device)
    for some in batches(torch.cat([design, still], 1).to(whole), whole):
        opened = some[:, at]
        yield torch.addcmul(faded, opened if at.dim() == 3 else opened[:, None], apart)


def _present(numbers: Tensor, n_parts: int) -> Tensor:
    """Which parts an image has, ``(n_parts,)``."""
    return torch.bincount(numbers[numbers >= 0], minlength=n_parts) > 0


def _fitted(design: Tensor, scores: Tensor, n_frames: int, there: Tensor, where: Tensor) -> tuple[Tensor, ...]:
    """Effects, smoothed ones, standard errors, p-values, interactions with theirs, and first-order shares, of the parts
    that an image has; the others do nothing to it."""
    design = design[:, there]
    effects, *sureness = estimate(design, scores[:, None], n_frames)
    smooth = smoothed(design, scores, where)
    of_pairs = find_interactions(design, scores, n_frames)
    found = (effects, smooth[None], *sureness, *(one[None] for one in of_pairs), first_order(design, scores)[None])
    if there.all():
        return found
    pairs = there[:, None] & there
    # What is not there: no effect, standard error or share, and p = 1.
    empty = (0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0)
    return tuple(
        torch.full((1, *where.shape), value, dtype=torch.float64).masked_scatter(where, one)
        for one, value in zip(found, empty, strict=True)
        for where in [pairs if one.dim() == 3 else there]
    )


def _of_all(found: dict[int, tuple[Tensor, ...]], n_images: int, n_parts: int) -> list[Tensor]:
    """What was fitted to the images of all processes, in the order of the images."""
    shapes = [(n_images, *[n_parts] * n_dims) for n_dims in OF_AN_IMAGE]
    every = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    for number, fitted in found.items():
        for values, one in zip(every, fitted, strict=True):
            values[number] = one[0]
    return [added_up(values) for values in every]


def _dtype(half: str | None) -> torch.dtype | None:
    if half is None:
        return None
    one_of(HALF, half=half)
    return HALF[half]


def _normalisation(
    model: nn.Module, images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    if (mean is None) != (std is None):
        raise InputError("mean and std come together: give both or neither")
    device, n_channels = device_of(model), images.shape[1]
    found = []
    for name, values, plain in (("mean", mean, 0.0), ("std", std, 1.0)):
        values = [plain] * n_channels if values is None else list(values)
        if len(values) != n_channels:
            raise InputError(f"{name} must hold {n_channels} values, one a channel, got {values}")
        found.append(torch.tensor(values, device=device).view(-1, 1, 1))
    return found[0], found[1]
