"""Spectra of many images → their averages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from freqprune.tagging.spectrum import baseline, snr


class Average:
    """Running sums over images of one layer's spectra; nothing is kept per image."""

    def __init__(self, bins: Sequence[int], average: str, precision: torch.dtype, with_power: bool) -> None:
        self.with_power = with_power
        self.bins, self.average, self.precision = list(bins), average, precision
        self.n_images = 0
        self.sums: dict[str, Tensor] = {}

    def update(self, spectra: Tensor) -> None:
        """Add complex spectra ``(n_images, n_filters, n_freqs)``, or ``(n_images, n_filters, n_positions,
        n_freqs)``."""
        amplitude = spectra.abs()
        new = {"amplitude": amplitude}
        if self.with_power:
            new["power"] = amplitude.square()
            new["squared_floor"] = baseline(self._over_positions("power", new["power"]), self.bins).square()
        if self.average == "complex":
            new["complex"] = spectra
        if self.average == "snr":
            new["snr"] = snr(amplitude, self.bins, precision=self.precision)
        for name, value in new.items():
            # An image that leaves a filter silent has no SNR; the others have.
            over = value if name == "squared_floor" else self._over_positions(name, value)
            total = over.nansum(0) if name == "snr" else over.sum(0)
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        if "snr" in new:
            defined = self._over_positions("snr", new["snr"]).isfinite().sum(0).double()
            self.sums["snr_defined"] = self.sums["snr_defined"] + defined if "snr_defined" in self.sums else defined
        self.n_images += len(spectra)

    def part(self, filters: slice) -> Average:
        """The averages of some of the filters."""
        found = Average(self.bins, self.average, self.precision, self.with_power)
        found.n_images = self.n_images
        found.sums = {name: total[filters] for name, total in self.sums.items()}
        return found

    @staticmethod
    def _over_positions(name: str, value: Tensor) -> Tensor:
        if value.dim() == 3:
            return value
        return value.nanmean(2) if name == "snr" else value.mean(2)

    def mean(self, name: str) -> Tensor:
        # 0 / 0 is NaN: no image defines this SNR.
        return (self.sums[name] / (self.sums["snr_defined"] if name == "snr" else self.n_images)).cpu()

    def amplitude(self) -> Tensor:
        if self.average == "power":
            return self.mean("power").sqrt()
        if self.average == "complex":
            return self.mean("complex").abs()
        return self.mean("amplitude")
