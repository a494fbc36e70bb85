"""Which parts of an image an answer hangs on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.attribution.baselines import find_baseline
from freqprune.attribution.effects import Attribution, OfParts, estimate
from freqprune.attribution.gates import batches, check_apart, check_frames, frames_for, opened, overlapped, waves
from freqprune.attribution.pairs import find_interactions
from freqprune.attribution.parts import find_parts, places
from freqprune.attribution.recorded import Cache, key_of
from freqprune.attribution.scores import Score, check_dims, check_logits, one_by_one, read, targets
from freqprune.attribution.sensitivity import first_order
from freqprune.attribution.smoothing import smoothed
from freqprune.errors import InputError, at_least, one_of
from freqprune.networks import check_answers, device_of, dtype_of, evaluating, first
from freqprune.processes import merged, rank_and_size
from freqprune.tagging import HALF, Progress, check_pixels, normalizer

log = logging.getLogger(__name__)

# In parts; with more, waves of neighbours are too much alike for effects of one each.
MOST_OVERLAP = 2.0
# How far from [0, 1] a blur or an interpolation of one's own leaves a baseline.
ROUNDING = 1e-3


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
    cache: Cache | None = None,
) -> Attribution:
    """Tag the parts of images, each at a frequency of its own, and read at a score what the answer hangs on.

    Inside `freqprune.processes.shared_work` the processes share the images, and all of them get the whole of it.

    Args:
        model: network, or what computes it without parameters, such as `freqprune.networks.OnnxModule`; runs in eval
            mode, which is restored.
        images: pixels in [0, 1], ``(n_images, n_channels, height, width)``, not normalised.
        target: class to read, for all images or one each; the network's own answer if left out. A score of one's own
            says itself what it reads.
        parts: ``"grid"``, tiles; ``"patches"``, those of a network of tokens; ``"channels"``, the colours; ``"slic"``,
            superpixels (needs scikit-image).
        grid: tiles along each side, or along height and width.
        segments: instead, an integer mask, ``(height, width)`` or one for each image: pixels of one number are a part,
            parts in the order of their numbers, pixels with -1 in none.
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
            often, see `freqprune.attribution.gates.overlapped`; 0 for none, 2 at most, beyond which neighbours can no
            longer be told apart. With it effects are exact for scores that are linear in the parts only, and
            `first_order` counts to a part what its neighbours do along with it.
        mean: channel means that the network's inputs are normalised with; none if left out.
        std: channel standard deviations, likewise.
        half: ``"float16"`` or ``"bfloat16"``: run the network in half precision by autocast.
        seed: of frequencies and phases.
        progress: wraps the iteration over recordings, image after image, for a progress bar.
        cache: holds what was found of images, and gets what is found as soon as it is, so that a call that was
            interrupted can go on. Its keys hang on everything but the network and the score: one for each of these.

    Raises:
        InputError: for more parts than odd bins, masks of another size, a class that is not there, a network that
            answers differently from call to call, scores that are not finite, or any other argument out of range.
    """
    if images.dim() != 4 or not len(images):
        raise InputError(f"images must be (n_images, n_channels, height, width), got {tuple(images.shape)}")
    if mean is not None or not images.is_floating_point():
        check_pixels(images)
    at_least(1, steepness=steepness)
    if not 0 <= overlap <= MOST_OVERLAP:
        raise InputError(f"overlap must lie in [0, {MOST_OVERLAP:g}], got {overlap}")
    if until is not None and not until > 0:
        raise InputError(f"until must be a standard error above 0, got {until}")
    if half is not None:
        one_of(HALF, half=half)
    reader = _Reader(model, score, None if half is None else HALF[half])
    prepare = normalizer(images, mean, std, device_of(model), dtype_of(model))
    check_answers(model, prepare(images[:1]).contiguous())
    fades_to = find_baseline(images.float(), baseline)
    if mean is not None and not (fades_to.min() >= -ROUNDING and fades_to.max() <= 1 + ROUNDING):
        raise InputError(
            f"baseline must hold pixels in [0, 1], as the images do, got values from {fades_to.min():.3g} to "
            f"{fades_to.max():.3g}; it is normalised like them"
        )

    def ends_of(number: int) -> tuple[Tensor, Tensor]:
        """An image and what it fades to, as the network takes them; not those of all images, which may be more than an
        accelerator holds."""
        whole, faded = (prepare(one[number : number + 1]).contiguous()[0] for one in (images, fades_to))
        return whole, faded

    numbers, names = find_parts(model, images, parts, grid, segments, n_segments)
    check_frames(len(names), forwards)
    n_frames = frames_for(len(names))
    generator = torch.Generator().manual_seed(seed)
    tags = [waves(len(names), n_frames, generator) for _ in range(forwards // n_frames)]
    rank, n_processes = rank_and_size()
    own = range(rank, len(images), n_processes)
    where = {number: places(numbers[number], len(names)) for number in own}
    for at in where.values():
        check_apart(at, overlap)
    found: dict[int, tuple[OfParts, int]] = {}
    designs: list[Tensor] = []
    scores: list[Tensor] = []
    with evaluating(model), torch.inference_mode():
        wanted = reader.targets((ends_of(number)[0] for number in range(len(images))), target)
        ends = torch.stack(
            [
                torch.cat([reader.read(one[None], None if wanted is None else wanted[number]).float() for one in pair])
                for number in range(len(images))
                for pair in [_whole_and_closed(*ends_of(number), numbers[number])]
            ]
        )
        _check_ends(ends, half)
        asked = (len(names), forwards, until, steepness, overlap, half, seed)
        keys: dict[int, str] = {}
        if cache is not None:
            for number in own:
                wants = None if wanted is None else wanted[number]
                keys[number] = key_of(*ends_of(number), numbers[number], wants, *asked)
                if (before := cache.get(keys[number])) is not None:
                    found[number] = before
        recordings = [(number, recording) for number in own if number not in found for recording in range(len(tags))]
        at_hand: tuple[int, tuple[Tensor, Tensor]] | None = None
        for number, recording in progress(recordings) if progress is not None else recordings:
            if number in found:
                continue  # sure enough before its last recording
            designs.append(opened(overlapped(tags[recording], where[number], overlap), steepness))
            if at_hand is None or at_hand[0] != number:
                at_hand = number, ends_of(number)
            frames = _frames(*at_hand[1], numbers[number], designs[-1])
            scores += [reader.read(some, None if wanted is None else wanted[number]) for some in frames]
            last = recording + 1 == len(tags)
            if not last and until is None:
                continue
            try:
                fitted = _fitted(torch.cat(designs), torch.cat(scores), n_frames, where[number], overlap > 0)
            except InputError as error:
                raise InputError(f"image {number} (the first is 0): {error}{_advice(half)}") from None
            if last or (until is not None and float(fitted.standard_error.max()) <= until):
                found[number] = fitted, n_frames * len(designs)
                designs, scores = [], []
                if cache is not None:
                    cache[keys[number]] = found[number]
    everyone = merged(found)
    fits = [everyone[number][0] for number in range(len(images))]
    each = {field.name: torch.stack([getattr(fit, field.name) for fit in fits]) for field in fields(OfParts)}
    taken = max(n_frames for _, n_frames in everyone.values())
    # Made in inference mode, they could be used in no graph of gradients.
    target, ends = None if wanted is None else wanted.clone(), ends.clone()
    return Attribution(
        **each, target=target, whole=ends[:, 0], baseline=ends[:, 1], parts=numbers, part_names=names, forwards=taken
    )


@dataclass(frozen=True)
class _Reader:
    """A network, and what is read of its answer."""

    model: nn.Module
    score: str | Score
    half: torch.dtype | None

    def answer(self, inputs: Tensor) -> Any:
        with torch.autocast(inputs.device.type, dtype=self.half, enabled=self.half is not None):
            return self.model(inputs)

    def targets(self, inputs: Iterable[Tensor], given: int | Tensor | None) -> Tensor | None:
        """Class to read of each image; None for a score of one's own."""
        if callable(self.score):
            return None
        answers = torch.cat([check_dims(first(self.answer(one[None]))).float() for one in inputs])
        found = targets(answers, given)
        check_logits(answers, self.score)
        if self.score != "logit" and one_by_one(answers):
            log.warning(
                "all answers of the network lie in [0, 1], as probabilities of classes one by one do, and score = %s "
                "takes them for logits; score=logit reads them as they are", self.score
            )  # fmt: skip
        return found

    def read(self, inputs: Tensor, target: Tensor | None) -> Tensor:
        """Scores of frames of one image, float64 ``(n_frames,)``."""
        output = self.answer(inputs)
        wanted = None if target is None else target.expand(len(inputs))
        found = read(output, self.score, wanted).cpu().double()
        if len(found) != len(inputs):
            raise InputError(f"score must return one number an image, ({len(inputs)},), got {tuple(found.shape)}")
        return found


def _whole_and_closed(whole: Tensor, faded: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """An image as it is, and with every part at its baseline; what is in no part stays, as in the frames."""
    if numbers.dim() == 3:
        return whole, faded
    return whole, torch.where((numbers < 0).to(whole.device), whole, faded)


def _advice(half: str | None) -> str:
    return "" if half is None else f"; half={half} may overflow: use bfloat16, or leave half out"


def _check_ends(ends: Tensor, half: str | None) -> None:
    """Raise InputError for images whose scores ``(n_images, 2)``, as they are and at the baseline, are not finite."""
    advice = _advice(half)
    whole, closed = ends.isfinite().logical_not().unbind(1)
    if whole.any():
        raise InputError(
            f"the network or the score function answers image {int(whole.nonzero()[0])} (the first is 0) with "
            f"{float(ends[whole][0, 0])}{advice}"
        )
    if closed.any():
        log.warning(
            "%d of %d images answer with NaN or infinite values where every part is at its baseline; choose another "
            "baseline%s", int(closed.sum()), len(ends), advice
        )  # fmt: skip


def _frames(whole: Tensor, faded: Tensor, numbers: Tensor, design: Tensor) -> Iterator[Tensor]:
    """Batches of frames of one image, ``(n_frames, n_channels, height, width)``: each part as far from its baseline as
    its gate says; what is in no part stays. Fading and normalising are both linear, so that the frames of normalised
    images are the normalised frames."""
    still = torch.ones(len(design), 1, dtype=torch.float64)
    apart, at = whole - faded, numbers.to(whole.device)
    for some in batches(torch.cat([design, still], 1).to(whole), whole):
        opened = some[:, at]
        yield torch.addcmul(faded, opened if at.dim() == 3 else opened[:, None], apart)


def _fitted(design: Tensor, scores: Tensor, n_frames: int, where: Tensor, mixed: bool) -> OfParts:
    """Of the parts that an image has, those with a place; the others do nothing to it."""
    there = where.isfinite().all(1)
    design = design[:, there]
    pairs = there[:, None] & there

    def of_all(found: Tensor, absent: float = 0.0) -> Tensor:
        mask = pairs if found.dim() == 2 else there
        return torch.full(mask.shape, absent, dtype=torch.float64).masked_scatter(mask, found)

    effects, errors, p_values = (found[0] for found in estimate(design, scores[:, None], n_frames))
    interactions, p_of_pairs = find_interactions(design, scores, n_frames, mixed)
    return OfParts(
        of_all(effects),
        of_all(smoothed(design, scores, where[there])),
        of_all(errors),
        of_all(p_values, 1.0),
        of_all(interactions),
        of_all(p_of_pairs, 1.0),
        of_all(first_order(design, scores, n_frames)),
    )
