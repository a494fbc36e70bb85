"""Which parts of an image an answer hangs on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from freqprune.attribution.effects import Attribution, estimate
from freqprune.attribution.gates import batches, check_frames, frames_for, gates
from freqprune.attribution.scores import Score, read, targets
from freqprune.errors import InputError, at_least, one_of
from freqprune.networks import check_answers, evaluating, first
from freqprune.tagging import HALF, Progress

BASELINES = ("mean", "grey", "blur")


def attribute(
    model: nn.Module,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    grid: int | tuple[int, int] = 8,
    segments: Tensor | None = None,
    forwards: int = 512,
    until: float | None = None,
    score: str | Score = "logit",
    baseline: str | Tensor = "mean",
    steepness: float = 4.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    half: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Attribution:
    """Tag the parts of images, each at a frequency of its own, and read at a score what the answer hangs on.

    Args:
        model: network; runs in eval mode, which is restored.
        images: pixels in [0, 1], ``(n_images, n_channels, height, width)``, not normalised.
        target: class to read, for all images or one each; the network's own answer if left out.
        grid: tiles along each side, or along height and width.
        segments: instead, an integer mask of parts, numbered from 0, pixels with -1 in none, ``(height, width)`` or one
            for each image.
        forwards: frames that an image takes at most: recordings of ``4 * n_parts`` frames each, with phases and
            frequencies drawn anew.
        until: stop as soon as no standard error of the image is above this, in units of the score.
        score: ``"logit"``, ``"probability"`` or ``"log_odds"`` of the target, or a function of the network's output
            that gives one number an image.
        baseline: what a part fades to: its image's channel ``"mean"``, ``"grey"``, a ``"blur"`` of the image, or pixels
            of the shape of the images.
        steepness: 1 for sines, larger for gates that are more often open or closed, see `freqprune.attribution.gates`.
        mean: channel means that the network's inputs are normalised with; none if left out.
        std: channel standard deviations, likewise.
        half: ``"float16"`` or ``"bfloat16"``: run the network in half precision by autocast.
        seed: of frequencies and phases.
        progress: wraps the iteration over recordings, image after image, for a progress bar.

    Raises:
        InputError: for more parts than odd bins, masks of another size, a class that is not there, a network that
            answers differently from call to call, scores that are not finite, or any other argument out of range.
    """
    device = next(model.parameters()).device
    if images.dim() != 4 or not len(images):
        raise InputError(f"images must be (n_images, n_channels, height, width), got {tuple(images.shape)}")
    parts, names = _parts(images, grid, segments)
    n_parts = len(names)
    check_frames(n_parts, forwards)
    at_least(1, steepness=steepness)
    if half is not None:
        one_of(HALF, half=half)
    if until is not None and not until > 0:
        raise InputError(f"until must be a standard error above 0, got {until}")
    shift, scale = _normalisation(mean, std, images.shape[1], device)
    n_frames, n_recordings = frames_for(n_parts), forwards // frames_for(n_parts)
    pixels, faded = images.float(), _baseline(images.float(), baseline)
    generator = torch.Generator().manual_seed(seed)
    designs = [gates(n_parts, n_frames, generator, steepness) for _ in range(n_recordings)]

    dtype = HALF[half] if half is not None else None

    def answer(frames: Tensor) -> Any:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            return model((frames.to(device) - shift) / scale)

    check_answers(model, (pixels[:1].to(device) - shift) / scale)
    found: list[tuple[Tensor, ...]] = []
    taken = 0
    with evaluating(model), torch.inference_mode():
        whole = [answer(image[None]) for image in pixels]
        wanted = None if callable(score) else targets(torch.cat([first(one).float() for one in whole]), target)
        at = [None] * len(pixels) if wanted is None else list(wanted[:, None])
        ends = [
            torch.stack(
                [read(output, score, one).squeeze(0).float().cpu() for output, one in zip(outputs, at, strict=True)]
            )
            for outputs in (whole, [answer(image[None]) for image in faded])
        ]
        values: list[Tensor] = []
        recordings = [(number, recording) for number in range(len(pixels)) for recording in range(n_recordings)]
        for number, recording in progress(recordings) if progress is not None else recordings:
            if len(found) > number:
                continue  # sure enough before its last recording
            frames = _frames(pixels[number], faded[number], parts[number], designs[recording])
            values.append(torch.cat([_scores(answer(some), score, at[number]) for some in frames]))
            last = recording + 1 == n_recordings
            if not last and until is None:
                continue
            fitted = estimate(torch.cat(designs[: recording + 1]), torch.cat(values)[:, None])
            if last or (until is not None and float(fitted[1].max()) <= until):
                found.append(fitted)
                taken, values = max(taken, sum(map(len, values))), []
    effects, errors, p_values, together = (torch.cat(column) for column in zip(*found, strict=True))
    return Attribution(effects, errors, p_values, together, wanted, ends[0], ends[1], parts, names, taken)


def _scores(output: Any, score: str | Score, target: Tensor | None) -> Tensor:
    n_frames = len(first(output))
    return read(output, score, None if target is None else target.expand(n_frames)).double().cpu()


def _frames(image: Tensor, faded: Tensor, parts: Tensor, design: Tensor) -> Iterator[Tensor]:
    """Batches of frames of one image, ``(n_frames, n_channels, height, width)``: each part as far from its baseline as
    its gate says; what is in no part stays."""
    still = torch.ones(len(design), 1, dtype=torch.float64)
    opened = batches(torch.cat([design, still], 1).to(image.dtype), image)
    return (faded + some[:, parts][:, None] * (image - faded) for some in opened)


def _parts(images: Tensor, grid: int | tuple[int, int], segments: Tensor | None) -> tuple[Tensor, list[str]]:
    """Number of each pixel's part, ``(n_images, height, width)``, and what the parts are called."""
    height, width = images.shape[-2:]
    if segments is not None:
        found = torch.as_tensor(segments)
        if found.is_floating_point() or found.shape not in ((height, width), (len(images), height, width)):
            raise InputError(
                f"segments must be integers of shape ({height}, {width}) or ({len(images)}, {height}, {width}), got "
                f"{found.dtype} {tuple(found.shape)}"
            )
        if int(found.max()) < 0:
            raise InputError("segments hold no part: every pixel is -1")
        names = [f"segment {number}" for number in range(int(found.max()) + 1)]
        return found.long().expand(len(images), height, width), names
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    at_least(1, grid=min(rows, columns))
    if rows > height or columns > width:
        raise InputError(f"grid = {rows} x {columns} tiles do not fit into images of {height} x {width} pixels")
    row, column = (torch.arange(size) * count // size for size, count in ((height, rows), (width, columns)))
    names = [f"row {one + 1}, column {other + 1}" for one in range(rows) for other in range(columns)]
    return (row[:, None] * columns + column).expand(len(images), height, width), names


def _baseline(pixels: Tensor, baseline: str | Tensor) -> Tensor:
    """What parts fade to, of the shape of the images."""
    if isinstance(baseline, Tensor):
        if baseline.shape not in (pixels.shape, pixels.shape[1:]):
            raise InputError(
                f"baseline must have the shape of the images, {tuple(pixels.shape)}, or of one of them, got "
                f"{tuple(baseline.shape)}"
            )
        return baseline.float().expand(pixels.shape)
    one_of(BASELINES, baseline=baseline)
    if baseline == "grey":
        return torch.full_like(pixels, 0.5)
    if baseline == "mean":
        return pixels.mean((2, 3), keepdim=True).expand(pixels.shape)
    sigma = min(pixels.shape[-2:]) / 16
    return gaussian_blur(pixels, 2 * math.ceil(2 * sigma) + 1, sigma)


def _normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, n_channels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    if (mean is None) != (std is None):
        raise InputError("mean and std come together: give both or neither")
    found = []
    for name, values, plain in (("mean", mean, 0.0), ("std", std, 1.0)):
        values = [plain] * n_channels if values is None else list(values)
        if len(values) != n_channels:
            raise InputError(f"{name} must hold {n_channels} values, one a channel, got {values}")
        found.append(torch.tensor(values, device=device).view(-1, 1, 1))
    return found[0], found[1]
