"""Model + images → response to the tags: stimulus, recording and spectrum in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.components import Component, find_components
from freqprune.errors import InputError, closest
from freqprune.recording import Recorder, map_mean
from freqprune.sites import Site, find_sites, pick_layers
from freqprune.spectrum import baseline, frame_transform, frequencies, is_noise_free, significance, snr
from freqprune.stimulus import Stimulus, check_pixels

FRAMES_A_BATCH = 512

AVERAGES = ("amplitude", "power", "complex", "snr")


@dataclass
class LayerResponse:
    """What the filters of one layer answer, averaged over images.

    Attributes:
        site: where the layer was read.
        amplitude: clean pass, mean over images of the single-sided amplitude, ``(n_filters, n_freqs)``; the 0 Hz bin holds the mean response.
        noisy_amplitude: noisy pass, averaged over images as `TagResponse.average` says; None without noise.
        noisy_power: noisy pass, mean over images of the squared amplitude; None without noise.
        noisy_snr: mean over images of each image's SNR, ``(n_filters, n_components)``; only with ``average="snr"``.
    """

    site: Site
    amplitude: Tensor
    noisy_amplitude: Tensor | None = None
    noisy_power: Tensor | None = None
    noisy_snr: Tensor | None = None


@dataclass
class TagResponse:
    """Response of every recorded layer to the tags.

    Attributes:
        stimulus: what was shown.
        noise_std: standard deviation of the pixel noise, in units of the pixel range [0, 1]. SNR depends on it: report it with every SNR.
        n_images: images averaged.
        average: what was averaged over images.
        precision: dtype in which the network ran.
        layers: one `LayerResponse` a layer, in the order in which the network runs them.
    """

    stimulus: Stimulus
    noise_std: float
    n_images: int
    average: str
    precision: torch.dtype
    layers: dict[str, LayerResponse]

    @property
    def freqs(self) -> Tensor:
        """Frequencies of the bins in Hz, ``(n_freqs,)``."""
        return frequencies(self.stimulus.n_frames, self.stimulus.frame_rate)

    def components(self, which: Sequence[str] | str = "all") -> list[Component]:
        """Components by name or set, see `freqprune.components.find_components`."""
        return find_components(which, self.stimulus.components)

    def amplitude(self, layer: str, which: Sequence[str] | str = "fundamentals") -> Tensor:
        """Clean amplitude at components, ``(n_filters, n_components)``, in units of the activation."""
        return self.layers[layer].amplitude[:, [c.bin for c in self.components(which)]]

    def snr(self, layer: str, which: Sequence[str] | str = "fundamentals") -> Tensor:
        """SNR at components, ``(n_filters, n_components)``; NaN for dead filters, and everywhere without noise (see `why_no_snr`)."""
        response, picked = self.layers[layer], self.components(which)
        if response.noisy_snr is not None:
            every = self.stimulus.components
            return response.noisy_snr[:, [every.index(c) for c in picked]]
        spectrum = response.amplitude if response.noisy_amplitude is None else response.noisy_amplitude
        return snr(spectrum, [c.bin for c in picked], precision=self.precision)

    def snr_spectrum(self, layer: str) -> Tensor:
        """SNR at every bin from the first with two neighbours on each side, ``(n_filters, n_freqs)``; NaN at the edges."""
        response = self.layers[layer]
        spectrum = response.amplitude if response.noisy_amplitude is None else response.noisy_amplitude
        bins = range(3, spectrum.shape[-1] - 2)
        full = torch.full_like(spectrum, torch.nan)
        full[:, list(bins)] = snr(spectrum, list(bins), precision=self.precision)
        return full

    def p_values(self, layer: str, which: Sequence[str] | str = "fundamentals") -> Tensor:
        """p-values of the power at components against the noise bins, ``(n_filters, n_components)``, not adjusted.

        Raises:
            InputError: for a response that was recorded without noise.
        """
        power = self.layers[layer].noisy_power
        if power is None:
            raise InputError("noise_std = 0: a noise-free response has no significance; tag with noise_std above 0")
        return significance(power, [c.bin for c in self.components(which)], self.n_images)

    def why_no_snr(self, layer: str, which: Sequence[str] | str = "fundamentals") -> list[str]:
        """One word a filter: ``""`` where the SNR is defined, ``"dead"`` (it answers nothing) or ``"noise-free"``."""
        response = self.layers[layer]
        spectrum = response.amplitude if response.noisy_amplitude is None else response.noisy_amplitude
        floor = baseline(spectrum, [c.bin for c in self.components(which)])
        undefined = is_noise_free(spectrum, floor, self.precision).any(-1)
        dead = spectrum[:, 1:].amax(-1) <= 1e-12 * spectrum.amax().clamp(min=1e-30)
        return ["" if not u else "dead" if d else "noise-free" for u, d in zip(undefined.tolist(), dead.tolist(), strict=True)]


class _Average:
    """Running sums over images of one layer's spectra."""

    def __init__(self, bins: Sequence[int], average: str, precision: torch.dtype) -> None:
        self.bins, self.average, self.precision = list(bins), average, precision
        self.n_images = 0
        self.sums: dict[str, Tensor] = {}

    def update(self, spectra: Tensor) -> None:
        """Add complex spectra ``(n_images, n_filters, n_freqs)``."""
        amplitude = spectra.abs()
        new = {"amplitude": amplitude.sum(0), "power": amplitude.square().sum(0)}
        if self.average == "complex":
            new["complex"] = spectra.sum(0)
        if self.average == "snr":
            new["snr"] = snr(amplitude, self.bins, precision=self.precision).sum(0)
        for name, value in new.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.n_images += len(spectra)

    def mean(self, name: str) -> Tensor:
        return (self.sums[name] / self.n_images).cpu()

    def averaged_amplitude(self) -> Tensor:
        if self.average == "power":
            return self.mean("power").sqrt()
        if self.average == "complex":
            return self.mean("complex").abs()
        return self.mean("amplitude")


def tag(
    model: nn.Module,
    images: Tensor,
    stimulus: Stimulus | None = None,
    *,
    layers: Sequence[str] | str | None = None,
    where: str = "activation",
    noise_std: float = 0.02,
    average: str = "amplitude",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    frames_a_batch: int = FRAMES_A_BATCH,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> TagResponse:
    """Show tagged images to a network and read every filter's response at the tag frequencies.

    Two passes: distinct frames without noise give the amplitudes; all frames with fresh Gaussian pixel noise give SNR and p-values, since
    a network in eval mode has no noise of its own.

    Args:
        model: network; runs in eval mode, which is restored, as is everything else about it.
        images: pixels in [0, 1], ``(n_images, n_channels, height, width)``, not normalised.
        stimulus: the tags; left and right half at 6 and 7.5 Hz if left out.
        layers: names or shell-style patterns of layers; all convolutions if left out.
        where: read at the ``"convolution"``, after its ``"norm"`` or after its ``"activation"``.
        noise_std: standard deviation of the noise in pixel units; 0 for no noisy pass.
        average: over images, average ``"amplitude"``, ``"power"``, ``"complex"`` amplitudes or ``"snr"``.
        mean: channel means that the network's inputs are normalised with, applied to every frame; none if left out.
        std: channel standard deviations, likewise.
        seed: seed of the noise. The noise of image i depends on the seed and on i only, not on the batches.
        frames_a_batch: frames in one forward.
        progress: wraps the iteration over batches of images, for a progress bar.

    Returns:
        The response, on the CPU, in float64.

    Raises:
        InputError: for images that are not pixels, unknown layers, an argument out of range, or responses that are not finite.

    >>> net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    >>> response = tag(net, torch.rand(2, 3, 8, 8))
    >>> response.snr("0").shape
    torch.Size([2, 2])
    """
    stimulus = stimulus or Stimulus()
    check_pixels(images)
    if not (math.isfinite(noise_std) and 0 <= noise_std <= 1):
        raise InputError(f"noise_std must lie in [0, 1] (pixel units), got {noise_std}")
    if average not in AVERAGES:
        raise InputError(f"average must be one of {', '.join(AVERAGES)}, got {average!r}{closest(average, AVERAGES)}")
    if frames_a_batch < 1:
        raise InputError(f"frames_a_batch must be at least 1, got {frames_a_batch}")
    stimulus.masks(*images.shape[-2:])
    parameter = next(model.parameters(), None)
    device = images.device if parameter is None else parameter.device
    precision = torch.float32 if parameter is None else parameter.dtype
    prepare = _normalizer(images, mean, std, device, precision)
    sites = find_sites(model, prepare(images[:1]), pick_layers(model, layers), where)

    bins = [c.bin for c in stimulus.components]
    clean = {site.layer: _Average(bins, "amplitude", precision) for site in sites}
    noisy = {site.layer: _Average(bins, average, precision) for site in sites}
    first, inverse = stimulus.distinct_frames
    everything = torch.arange(stimulus.n_frames)
    passes: list[tuple[dict[str, _Average], Tensor, Tensor, bool]] = [(clean, first, frame_transform(inverse, len(first)), False)]
    if noise_std > 0:
        passes.append((noisy, everything, frame_transform(everything, stimulus.n_frames), True))
    batches = list(range(0, len(images), max(1, frames_a_batch // len(first))))
    step = max(1, frames_a_batch // len(first))
    with Recorder(model, sites, map_mean) as recorder:
        for start in progress(batches) if progress is not None else batches:
            for averages, which, transform, with_noise in passes:
                size = max(1, frames_a_batch // len(which)) if with_noise else step
                for at in range(start, min(start + step, len(images)), size):
                    chunk = images[at : min(at + size, start + step)]
                    courses = _time_courses(recorder, chunk, stimulus, which, prepare, frames_a_batch, noise_std if with_noise else 0.0, seed, at)
                    for layer, course in courses.items():
                        # (n_images, n_frames, n_filters) to (n_images, n_filters, n_freqs)
                        if not torch.isfinite(course).all():
                            raise InputError(f"layer {layer!r} answers with NaN or infinite values; check the weights and the normalisation")
                        averages[layer].update(_spectra(course, transform))
    found = {}
    for site in sites:
        layer = site.layer
        response = LayerResponse(site, clean[layer].mean("amplitude"))
        if noise_std > 0:
            response.noisy_amplitude = noisy[layer].averaged_amplitude()
            response.noisy_power = noisy[layer].mean("power")
            response.noisy_snr = noisy[layer].mean("snr") if average == "snr" else None
        found[layer] = response
    return TagResponse(stimulus, noise_std, len(images), average, precision, found)


def _spectra(course: Tensor, transform: Tensor) -> Tensor:
    # Two real products: complex128 times real would first copy the time courses into complex numbers.
    real = course.double().transpose(1, 2)
    parts = torch.view_as_real(transform.to(real.device)).flatten(1)
    return torch.view_as_complex((real @ parts).unflatten(-1, (-1, 2)))


def _time_courses(
    recorder: Recorder,
    images: Tensor,
    stimulus: Stimulus,
    which: Tensor,
    prepare: Callable[[Tensor], Tensor],
    limit: int,
    noise_std: float,
    seed: int,
    start: int,
) -> dict[str, Tensor]:
    """Responses of each layer to the frames `which` of `images`, ``(n_images, n_frames, n_filters)``."""
    pieces: dict[str, list[Tensor]] = {}
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(images))] if noise_std else []
    for some in which.split(max(1, limit // len(images))):
        frames = stimulus.frames(images, some)
        if noise_std:
            noise = torch.stack([torch.randn(frames.shape[1:], generator=g) for g in generators])
            frames = frames + noise_std * noise.to(frames)
        for layer, response in recorder(prepare(frames.flatten(0, 1))).items():
            pieces.setdefault(layer, []).append(response.unflatten(0, (len(images), len(some))))
    return {layer: torch.cat(parts, dim=1) for layer, parts in pieces.items()}


def _normalizer(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Function that takes pixels to what the network expects: its device, dtype, normalisation, channels last."""
    n_channels = images.shape[1]
    shift = torch.tensor([float(v) for v in mean] if mean is not None else [0.0] * n_channels, device=device, dtype=dtype)
    scale = torch.tensor([float(v) for v in std] if std is not None else [1.0] * n_channels, device=device, dtype=dtype)
    for name, value in (("mean", shift), ("std", scale)):
        if len(value) != n_channels:
            raise InputError(f"{name} must hold one value a channel: {n_channels} channels, {len(value)} values")
    if not (scale > 0).all():
        raise InputError(f"std must be positive, got {scale.tolist()}")
    shift, scale = shift.view(1, -1, 1, 1), scale.view(1, -1, 1, 1)

    def prepare(pixels: Tensor) -> Tensor:
        pixels = pixels.to(device=device, dtype=dtype, memory_format=torch.channels_last)
        return (pixels - shift) / scale

    return prepare


def rounds(total: Iterable[Any]) -> Iterator[Any]:
    """Iterate with a progress bar on the terminal, for the `progress` argument of `tag`."""
    from rich.progress import track

    yield from track(list(total), description="tagging")
