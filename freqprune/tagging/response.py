"""What a network answers to the tags, and how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freqprune.errors import InputError
from freqprune.tagging.components import NEIGHBOURS, Component, find_components
from freqprune.tagging.sites import Site
from freqprune.tagging.spectrum import (
    baseline,
    corrected_amplitude,
    effective_images,
    frequencies,
    is_noise_free,
    power_ratio,
    significance,
    snr,
    z_score,
)
from freqprune.tagging.stimulus import Stimulus


@dataclass
class LayerResponse:
    """What the filters of one layer answer, averaged over images.

    Attributes:
        site: where the layer was read.
        amplitude: clean pass, mean over images of the single-sided amplitude, ``(n_filters, n_freqs)``; the 0 Hz bin
            holds the size of the mean response, without its sign.
        noisy_amplitude: noisy pass, averaged over images as `TagResponse.average` says; None without noise.
        noisy_power: noisy pass, mean over images of the squared amplitude; None without noise.
        squared_floor: noisy pass, mean over images of the squared mean power of the noise bins, ``(n_filters,
            n_components)``; None without noise.
        noisy_snr: mean over images of each image's SNR, ``(n_filters, n_components)``; only with ``average="snr"``.
    """

    site: Site
    amplitude: Tensor
    noisy_amplitude: Tensor | None = None
    noisy_power: Tensor | None = None
    noisy_snr: Tensor | None = None
    squared_floor: Tensor | None = None


@dataclass
class TagResponse:
    """Response of every recorded layer to the tags.

    Attributes:
        stimulus: what was shown.
        noise_std: standard deviation of the pixel noise, in units of the pixel range [0, 1]. SNR depends on it: report
            it with every SNR.
        n_images: images averaged.
        average: what was averaged over images.
        spatial: ``"mean"``, ``"map"`` or ``"class_token"``, see `freqprune.tag`.
        precision: dtype in which the network ran.
        layers: one `LayerResponse` a layer, in the order in which the network runs them.
    """

    stimulus: Stimulus
    noise_std: float
    n_images: int
    average: str
    spatial: str
    precision: torch.dtype
    layers: dict[str, LayerResponse]

    @property
    def freqs(self) -> Tensor:
        """Frequencies of the bins in Hz, ``(n_freqs,)``."""
        return frequencies(self.stimulus.n_frames, self.stimulus.frame_rate)

    def components(self, which: Sequence[str] | str = "all") -> list[Component]:
        """Components by name or set, see `freqprune.tagging.components.find_components`."""
        return find_components(which, self.stimulus.components)

    def amplitude(self, layer: str, which: Sequence[str] | str = "fundamentals") -> Tensor:
        """Clean amplitude at components, ``(n_filters, n_components)``, in units of the activation; in the order of
        `components`: sets by frequency, whichever part has it."""
        return self.layers[layer].amplitude[:, [c.bin for c in self.components(which)]]

    def snr(self, layer: str, which: Sequence[str] | str = "fundamentals") -> Tensor:
        """SNR at components, ``(n_filters, n_components)``; NaN for dead filters, and everywhere without noise (see
        `why_no_snr`)."""
        response, picked = self.layers[layer], self.components(which)
        if response.noisy_snr is not None:
            every = self.stimulus.components
            return response.noisy_snr[:, [every.index(c) for c in picked]]
        if response.noisy_amplitude is None:
            # The bins beside a component hold responses of higher orders there, or rounding.
            return response.amplitude.new_full((len(response.amplitude), len(picked)), torch.nan)
        return snr(response.noisy_amplitude, [c.bin for c in picked], precision=self.precision)

    def snr_spectrum(self, layer: str) -> Tensor:
        """SNR at every bin with two noise bins on each side, ``(n_filters, n_freqs)``; NaN at the edges, and everywhere
        without noise. At components it is that of `snr`, averaged as the response was."""
        response = self.layers[layer]
        full = torch.full_like(response.amplitude, torch.nan)
        if response.noisy_amplitude is None:
            return full
        bins = list(range(max(NEIGHBOURS) + 1, full.shape[-1] - 1 - max(NEIGHBOURS)))
        if bins:
            full[:, bins] = snr(response.noisy_amplitude, bins, precision=self.precision)
        full[:, self._bins("all")] = self.snr(layer, "all").to(full)
        return full

    def power_ratio(
        self, layer: str, which: Sequence[str] | str = "fundamentals", n_neighbours: int = 2, skip: int = 0
    ) -> Tensor:
        """Power SNR against `n_neighbours` bins on each side after `skip`, predicted responses left out; NaN where
        `snr` is, see `why_no_snr`; see `freqprune.tagging.spectrum.power_ratio`."""
        ratio = power_ratio(self._noisy_power(layer), self._bins(which), n_neighbours, skip, self._predicted)
        return torch.where(self._noise_free(layer, which), torch.nan, ratio)

    def z_score(self, layer: str, which: Sequence[str] | str = "fundamentals", n_neighbours: int = 10) -> Tensor:
        """Standard deviations above `n_neighbours` noise bins on each side, predicted responses left out, ``(n_filters,
        n_components)``; NaN where `snr` is, see `why_no_snr`."""
        noisy = self._noisy_amplitude(layer)
        z = z_score(noisy, self._bins(which), range(1, n_neighbours + 1), self._predicted)
        return torch.where(self._noise_free(layer, which), torch.nan, z)

    def corrected_amplitude(self, layer: str, which: Sequence[str] | str = "harmonics") -> Tensor:
        """Amplitude less that of the noise bins, summed over components, ``(n_filters,)`` (Retter, Rossion & Schiltz
        2021)."""
        return corrected_amplitude(self._noisy_amplitude(layer), self._bins(which), avoid=self._predicted).sum(-1)

    def part_preference(self, layer: str, first: int = 0, second: int = 1) -> Tensor:
        """Which of two parts drives a filter: (A1 - A2) / (A1 + A2) of the clean amplitudes at their fundamentals.

        1: the first part only, -1: the second only, 0: both alike; NaN for a filter that answers neither.

        Args:
            layer: name of the layer.
            first: index of the first part.
            second: index of the second part.

        Returns:
            ``(n_filters,)``.
        """
        a, b = self.amplitude(layer, [f"f{first + 1}", f"f{second + 1}"]).unbind(-1)
        return torch.where(a + b > self.rounding(layer), (a - b) / (a + b), torch.nan)

    def integration(self, layer: str) -> Tensor:
        """How much a filter combines the parts: clean amplitude summed over intermodulation components, over that at
        the fundamentals.

        0 for an affine function of the image (a filter inherits what layers before it combined); NaN for a filter that
        does not answer the fundamentals, and for all where the stimulus has no intermodulation components, as with one
        part or ``max_order=1``. ``(n_filters,)``.
        """
        fundamentals = self.amplitude(layer, "fundamentals").sum(-1)
        bins = [c.bin for c in self.stimulus.components if c.kind == "intermodulation"]
        if not bins:
            return torch.full_like(fundamentals, torch.nan)
        mixed = self.layers[layer].amplitude[:, bins].sum(-1)
        return torch.where(fundamentals > self.rounding(layer), mixed / fundamentals, torch.nan)

    def _bins(self, which: Sequence[str] | str) -> list[int]:
        return [c.bin for c in self.components(which)]

    @property
    def _predicted(self) -> set[int]:
        return {c.bin for c in self.stimulus.components}

    def rounding(self, layer: str) -> Tensor:
        """What rounding alone can leave in an amplitude of each filter, ``(n_filters,)``."""
        relative = 1e-12 if self.precision == torch.float64 else 1e-6
        return relative * self.layers[layer].amplitude.amax(-1)

    def _noisy_amplitude(self, layer: str) -> Tensor:
        noisy = self.layers[layer].noisy_amplitude
        if noisy is None:
            raise InputError("noise_std = 0: this measure compares with noise; tag with noise_std above 0")
        return noisy

    def _noisy_power(self, layer: str) -> Tensor:
        power = self.layers[layer].noisy_power
        if power is None:
            raise InputError("noise_std = 0: a noise-free response has no significance; tag with noise_std above 0")
        return power

    def p_values(self, layer: str, which: Sequence[str] | str = "fundamentals") -> Tensor:
        """p-values of the power at components against the noise bins, ``(n_filters, n_components)``, not adjusted; 1
        where those hold rounding error only.

        Of images that are not equally noisy in a filter fewer count, see
        `freqprune.tagging.spectrum.effective_images`.

        Raises:
            InputError: for a response that was recorded without noise.
        """
        power, bins, squares = self._noisy_power(layer), self._bins(which), self.layers[layer].squared_floor
        n_images: int | Tensor = self.n_images
        if squares is not None:
            every = self.stimulus.components
            picked = squares[:, [every.index(component) for component in self.components(which)]]
            n_images = effective_images(power, picked, bins, self.n_images)
        p_values = significance(power, bins, n_images)
        return torch.where(self._noise_free(layer, which), 1.0, p_values)

    def _noise_free(self, layer: str, which: Sequence[str] | str) -> Tensor:
        """Where the noise bins hold rounding error only, ``(n_filters, n_components)``."""
        spectrum = self._noisy_amplitude(layer)
        return is_noise_free(spectrum, baseline(spectrum, self._bins(which)), self.precision)

    def why_no_snr(self, layer: str, which: Sequence[str] | str = "fundamentals") -> list[str]:
        """One word a filter: ``""`` where the SNR is defined, ``"dead"`` (it answers nothing) or ``"noise-free"``."""
        response = self.layers[layer]
        undefined = torch.ones(len(response.amplitude), dtype=torch.bool)
        if response.noisy_amplitude is not None:
            undefined = self._noise_free(layer, which).any(-1)
        # What the tags themselves move by no more than rounding answers nothing, whatever its mean.
        dead = response.amplitude[:, 1:].amax(-1) <= self.rounding(layer)
        return [
            "" if not u else "dead" if d else "noise-free"
            for u, d in zip(undefined.tolist(), dead.tolist(), strict=True)
        ]
