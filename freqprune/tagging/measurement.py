"""Model + images → response to the tags: stimulus, recording and spectrum in one call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.memory import free_memory
from freqprune.networks import dtype_of, warn_of_batches
from freqprune.processes import on_this_machine, rank_and_size
from freqprune.tagging.inputs import normalizer_for
from freqprune.tagging.layers import pick_layers
from freqprune.tagging.passes import Pass
from freqprune.tagging.readout import HALF, SPATIAL, Readout
from freqprune.tagging.recording import Recorder
from freqprune.tagging.response import LayerResponse, TagResponse
from freqprune.tagging.sites import Site, find_folds, find_sites
from freqprune.tagging.spectrum import frame_transform
from freqprune.tagging.stimulus import Stimulus, check_pixels

log = logging.getLogger(__name__)

# Bytes of what is read at all positions that are held at a time, or a quarter of the memory that is free.
KEPT = 2**30

T = TypeVar("T")
Progress = Callable[[Iterable[Any]], Iterable[Any]]


def tag(
    model: nn.Module,
    images: Tensor,
    stimulus: Stimulus | None = None,
    *,
    layers: Sequence[str] | str | None = None,
    where: str = "activation",
    spatial: str = "mean",
    noise_std: float = 0.02,
    average: str = "amplitude",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    share: bool = False,
    half: str | None = None,
    frames_a_batch: int | None = None,
    progress: Progress | None = None,
) -> TagResponse:
    """Show tagged images to a network and read every filter's response at the tag frequencies.

    Two passes: distinct frames without noise give the amplitudes; all frames with fresh Gaussian pixel noise give SNR
    and p-values, since a network in eval mode has no noise of its own.

    Args:
        model: network; runs in eval mode, which is restored, as is everything else about it.
        images: pixels in [0, 1], ``(n_images, n_channels, height, width)``, not normalised.
        stimulus: the tags; left and right half at 6 and 7.5 Hz if left out.
        layers: names or shell-style patterns of layers, see `freqprune.tagging.layers.pick_layers`; all convolutions if
            left out.
        where: read at the ``"convolution"``, after its ``"norm"`` or after its ``"activation"``.
        spatial: ``"mean"``: spectrum of the mean of a filter's map (Böge et al. 2024), of a linear layer's feature over
            the tokens; ``"map"``: spectrum at every position, then the mean of the amplitudes, so that positions do not
            cancel (slower); ``"class_token"``: at the first token only.
        noise_std: standard deviation of the noise in pixel units; 0 for no noisy pass.
        average: over images (and positions), average ``"amplitude"``, ``"power"``, ``"complex"`` amplitudes or
            ``"snr"``.
        mean: channel means that the network's inputs are normalised with, applied to every frame; none if left out.
        std: channel standard deviations, likewise.
        seed: seed of the noise. The noise of an image depends on the seed and on its number only, not on the batches.
        numbers: number of each image, for the noise; 0, 1, 2, ... if left out.
        share: `images` are this process's share of the images of a ``torch.distributed`` group; the response is that of
            all of them. Give each image its own number.
        half: ``"float16"`` or ``"bfloat16"``: run the network in half precision by autocast, for devices that are
            faster at it. On a trained ResNet-32 the filters keep their ranks, correlation 0.9998 and 0.991 with float32
            in the worst layer.
        frames_a_batch: frames in one forward; sized to the memory if left out.
        progress: wraps the iteration over batches of images, for a progress bar.

    Returns:
        The response, on the CPU, in float64.

    Raises:
        InputError: for images that are not pixels, unknown layers, an argument out of range, or responses that are not
            finite.

    >>> net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    >>> response = tag(net, torch.rand(2, 3, 8, 8))
    >>> response.snr("0").shape
    torch.Size([2, 2])
    """
    stimulus = stimulus or Stimulus()
    check_pixels(images)
    Readout(layers, where, spatial, noise_std, average, half)
    if frames_a_batch is not None and frames_a_batch < 1:
        raise InputError(f"frames_a_batch must be at least 1, got {frames_a_batch}")
    if numbers is not None and len(numbers) != len(images):
        raise InputError(f"numbers must give one number an image: {len(images)} images, {len(numbers)} numbers")
    stimulus.masks(*images.shape[-2:])
    rank, size = rank_and_size()
    if 1 < size <= len(images) and not share:
        numbers = (range(len(images)) if numbers is None else numbers)[rank::size]
        images, share = images[rank::size], True
    parameter = next(model.parameters(), None)
    device = images.device if parameter is None else parameter.device
    precision = dtype_of(model)
    if half is not None and precision == torch.float64:
        log.warning("half = %s has no effect on a network of float64, which is tagged as it is", half)
        half = None
    prepare, _ = normalizer_for(model, images, mean, std, device, precision)
    sites = find_sites(model, prepare(images[:1]), pick_layers(model, layers), where)
    folds = find_folds(model, prepare(images[:1]), sites)
    warn_of_batches(model)
    limit = frames_a_batch or frames_that_fit(images[0, 0].numel(), device)

    names = [site.layer for site in sites]
    first, inverse = stimulus.distinct_frames
    everything = torch.arange(stimulus.n_frames)
    clean = Pass(names, first, frame_transform(inverse, len(first)), 0.0, stimulus, "amplitude", precision)
    noisy = Pass(
        names, everything, frame_transform(everything, stimulus.n_frames), noise_std, stimulus, average, precision
    )
    passes = [clean, noisy] if noise_std > 0 else [clean]
    numbers = list(range(len(images))) if numbers is None else [int(n) for n in numbers]

    def recording(sites: Sequence[Site]) -> Recorder:
        return Recorder(model, sites, SPATIAL[spatial], folds, HALF[half] if half is not None else None)

    with recording(sites) as recorder:
        recorder.warn(prepare(images[:1]))
        one_frame = recorder(prepare(images[:1])) if spatial == "map" else {}
    groups, at_once = [list(sites)], len(images)
    if one_frame:
        # What is read of all frames of an image is held until their spectra are taken.
        sizes = {layer: read.nbytes for layer, read in one_frame.items()}
        budget = budget_for(device, max(KEPT, (free_memory() or 0) // 4 // on_this_machine()))
        most = budget // max(len(one.which) for one in passes)
        groups = sites_that_fit(sites, sizes, most)
        at_once = max(1, most // max(sum(sizes[site.layer] for site in group) for group in groups))
    step = max(1, min(limit // len(first), at_once))
    todo = [(group, start) for group in groups for start in range(0, len(images), step)]
    current: list[Site] = []
    with ExitStack() as stack:
        for group, start in progress(todo) if progress is not None else todo:
            if group is not current:
                stack.close()
                current, recorder = group, stack.enter_context(recording(group))
            for one in passes:
                size = max(1, min(limit // len(one.which), at_once))
                for at in range(start, min(start + step, len(images)), size):
                    stop = min(at + size, start + step, len(images))
                    one.run(recorder, images[at:stop], prepare, limit, seed, numbers[at:stop])
    n_images = len(images)
    if share:
        for one in passes:
            n_images = one.add_shares(device)
    found = {}
    for site in sites:
        layer = site.layer
        response = LayerResponse(site, clean.of(layer).mean("amplitude"))
        if noise_std > 0:
            response.noisy_amplitude = noisy.of(layer).amplitude()
            response.noisy_power = noisy.of(layer).mean("power")
            response.squared_floor = noisy.of(layer).mean("squared_floor")
            response.noisy_snr = noisy.of(layer).mean("snr") if average == "snr" else None
        found[layer] = response
    return TagResponse(stimulus, noise_std, n_images, average, spatial, precision, found)


def check_readable(
    model: nn.Module, images: Tensor, stimulus: Stimulus, prepare: Callable[[Tensor], Tensor], readout: Readout
) -> None:
    """Raise InputError for what `tag` would refuse, by one frame of the first image.

    Args:
        model: the network.
        images: pixels in [0, 1].
        stimulus: the tags.
        prepare: pixels to network inputs.
        readout: what is read.
    """
    frame = prepare(stimulus.frames(images[:1], torch.zeros(1, dtype=torch.long)).flatten(0, 1))
    sites = find_sites(model, frame, pick_layers(model, readout.layers), readout.where)
    with Recorder(model, sites, SPATIAL[readout.spatial]) as recorder:
        recorder(frame)


def frames_that_fit(n_pixels: int, device: torch.device) -> int:
    """Frames a batch: a quarter of an accelerator's free memory, 64 MB on a CPU, where larger batches fall out of its
    caches.

    A frame is taken to need 64 maps of the input's resolution in float32, once.
    """
    return max(1, budget_for(device, 2**26) // (n_pixels * 64 * 4))


def budget_for(device: torch.device, of_cpu: int) -> int:
    """Bytes that one thing may take: a quarter of an accelerator's free memory."""
    return int(torch.cuda.mem_get_info(device)[0] // 4) if device.type == "cuda" else of_cpu


def sites_that_fit(sites: Sequence[Site], sizes: Mapping[str, int], most: int) -> list[list[Site]]:
    """Sites in their order, as many at a time as have at most so many bytes together, one at least; with all positions
    of all layers of a large network there would be gigabytes of each image.

    Args:
        sites: where is read.
        sizes: bytes of what is read of a frame, by layer.
        most: bytes of a frame.
    """
    groups: list[list[Site]] = [[]]
    taken = 0
    for site in sites:
        if groups[-1] and taken + sizes[site.layer] > most:
            groups.append([])
            taken = 0
        groups[-1].append(site)
        taken += sizes[site.layer]
    return groups


def in_sight(items: Sequence[T], what: str, progress: Progress | None) -> Iterator[T]:
    """Iterate with words of what is done and how much of it, for a `progress` that shows words as they come.

    >>> list(in_sight("ab", "reading", lambda said: (print(one) for one in said)))
    reading, 1 of 2
    reading, 2 of 2
    ['a', 'b']
    """
    said = [f"{what}, {number} of {len(items)}" for number in range(1, len(items) + 1)]
    for _, item in zip(progress(said) if progress is not None else said, items, strict=True):
        yield item


def rounds(total: Iterable[Any]) -> Iterator[Any]:
    """Iterate with a progress bar on the terminal, for arguments named `progress`; words are shown as they come."""
    from rich.progress import Progress as Bar

    items = list(total)
    with Bar(transient=True) as bar:
        task = bar.add_task("tagging", total=len(items))
        for item in items:
            if isinstance(item, str):
                bar.update(task, description=item)
            yield item
            bar.advance(task)
