"""Time courses → amplitude, SNR and significance. Pure functions; time or frequency is the last axis.

Amplitudes are single-sided: a sine of amplitude a on an exact bin reads a. Frequencies are in Hz, bins count cycles a
recording.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from freqprune.errors import InputError
from freqprune.tagging.components import NEIGHBOURS, noise_bins


def complex_spectrum(x: Tensor) -> Tensor:
    """Single-sided complex amplitudes of real time courses.

    ``2 X / N`` with X the discrete Fourier transform, ``X / N`` at 0 Hz and (for even N) at Nyquist.

    Args:
        x: ``(..., n_times)``.

    Returns:
        Complex ``(..., n_times // 2 + 1)``.
    """
    n_times = x.shape[-1]
    return torch.fft.rfft(x) * _sidedness(n_times).to(x)


def amplitude_spectrum(x: Tensor) -> Tensor:
    """Single-sided amplitudes, ``(..., n_times)`` to ``(..., n_times // 2 + 1)``, in the units of `x`.

    >>> t = torch.arange(240, dtype=torch.float64) / 120
    >>> round(amplitude_spectrum(3 * torch.sin(2 * torch.pi * 6 * t))[12].item(), 12)
    3.0
    """
    return complex_spectrum(x).abs()


def _sidedness(n_times: int) -> Tensor:
    weight = torch.full((n_times // 2 + 1,), 2.0 / n_times, dtype=torch.float64)
    weight[0] = 1.0 / n_times
    if n_times % 2 == 0:
        weight[-1] = 1.0 / n_times
    return weight


def frame_transform(inverse: Tensor, n_distinct: int) -> Tensor:
    """Matrix that takes the responses to distinct frames straight to single-sided complex amplitudes.

    Row d sums the Fourier factors of every time at which distinct frame d is shown, so
    ``responses_to_distinct_frames @ matrix`` equals `complex_spectrum` of the full time course.

    Args:
        inverse: ``(n_times,)``, the distinct frame shown at each time.
        n_distinct: number of distinct frames.

    Returns:
        complex128 ``(n_distinct, n_times // 2 + 1)``.
    """
    n_times = len(inverse)
    # Exact phases from integers; the product of time and bin may exceed n_times many times over.
    cycles = torch.outer(torch.arange(n_times), torch.arange(n_times // 2 + 1)) % n_times
    fourier = torch.polar(
        torch.ones((), dtype=torch.float64).expand(cycles.shape), -2 * torch.pi * cycles.double() / n_times
    )
    matrix = torch.zeros(n_distinct, fourier.shape[1], dtype=torch.complex128)
    matrix.index_add_(0, inverse, fourier)
    return matrix * _sidedness(n_times)


def frequencies(n_times: int, sfreq: float) -> Tensor:
    """Frequencies of the bins in Hz, float64 ``(n_times // 2 + 1,)``."""
    return torch.arange(n_times // 2 + 1, dtype=torch.float64) * sfreq / n_times


def baseline(
    spectrum: Tensor, bins: Sequence[int], neighbours: Sequence[int] = NEIGHBOURS, avoid: Collection[int] = ()
) -> Tensor:
    """Mean over the noise bins, ``(..., n_freqs)`` to ``(..., n_bins)``."""
    around = noise_bins(bins, spectrum.shape[-1], neighbours, avoid)
    return torch.stack([spectrum[..., b].mean(-1) for b in around], dim=-1)


def is_noise_free(spectrum: Tensor, floor: Tensor, precision: torch.dtype) -> Tensor:
    """Whether a baseline holds rounding error only, so that a ratio to it says nothing.

    True where `floor` is below 1e-6 (float32 or lower) or 1e-12 (float64) of the larger of the 0 Hz bin and the highest
    peak.

    Args:
        spectrum: amplitudes ``(..., n_freqs)``.
        floor: baselines ``(..., n_bins)``.
        precision: dtype in which the network ran.
    """
    relative = 1e-12 if precision == torch.float64 else 1e-6
    return floor <= relative * spectrum.amax(-1, keepdim=True)


def snr(spectrum: Tensor, bins: Sequence[int], precision: torch.dtype = torch.float32) -> Tensor:
    """Signal-to-noise ratio: amplitude of a bin over the mean amplitude of its noise bins.

    ``amplitude[i] / mean(amplitude[i-2], amplitude[i-1], amplitude[i+1], amplitude[i+2])`` (Böge et al. 2024, arXiv
    2411.10084). Of one spectrum of pure noise its mean is 1.078, not 1.

    Args:
        spectrum: amplitudes ``(..., n_freqs)``.
        bins: bins to read.
        precision: dtype in which the network ran; decides what counts as rounding error.

    Returns:
        ``(..., n_bins)``; NaN where the baseline is rounding error (`is_noise_free`), and for a dead unit (all zeros).
    """
    floor = baseline(spectrum, bins)
    ratio = spectrum[..., list(bins)] / floor
    return torch.where(is_noise_free(spectrum, floor, precision), torch.nan, ratio)


def power_ratio(
    power: Tensor, bins: Sequence[int], n_neighbours: int = 2, skip: int = 0, avoid: Collection[int] = ()
) -> Tensor:
    """Power of a bin over the mean power of its noise bins, the SNR of MNE-Python's frequency-tagging tutorial.

    Args:
        power: squared amplitudes ``(..., n_freqs)``.
        bins: bins to read.
        n_neighbours: noise bins on each side.
        skip: bins left out on each side before the noise bins begin.
        avoid: bins that hold predicted responses; they are left out of the noise.

    Returns:
        ``(..., n_bins)``; NaN where all noise bins are zero.

    Raises:
        InputError: for ``n_neighbours`` below 1 or ``skip`` below 0, or a bin left without noise bins.
    """
    if n_neighbours < 1 or skip < 0:
        raise InputError(f"n_neighbours must be at least 1 and skip at least 0, got {n_neighbours} and {skip}")
    floor = baseline(power, bins, range(skip + 1, skip + n_neighbours + 1), avoid)
    return torch.where(floor > 0, power[..., list(bins)] / floor, torch.nan)


def z_score(
    spectrum: Tensor, bins: Sequence[int], neighbours: Sequence[int] = NEIGHBOURS, avoid: Collection[int] = ()
) -> Tensor:
    """Amplitude of a bin in standard deviations of its noise bins, ``(a - mean) / sd`` with the unbiased sd.

    Args:
        spectrum: amplitudes ``(..., n_freqs)``.
        bins: bins to read.
        neighbours: distances of the noise bins.
        avoid: bins that hold predicted responses; they are left out of the noise.

    Returns:
        ``(..., n_bins)``; NaN where the noise bins do not vary.
    """
    around = noise_bins(bins, spectrum.shape[-1], neighbours, avoid)
    mean = baseline(spectrum, bins, neighbours, avoid)
    sd = torch.stack([spectrum[..., b].std(-1) for b in around], -1)
    return torch.where(sd > 0, (spectrum[..., list(bins)] - mean) / sd, torch.nan)


def corrected_amplitude(spectrum: Tensor, bins: Sequence[int], avoid: Collection[int] = ()) -> Tensor:
    """Baseline-corrected amplitude: amplitude of a bin less the mean of its noise bins, ``(..., n_bins)``.

    Summed over the harmonics of a tag it quantifies the whole response (Retter, Rossion & Schiltz 2021, doi
    10.1162/jocn_a_01763).
    """
    return spectrum[..., list(bins)] - baseline(spectrum, bins, avoid=avoid)


def effective_images(power: Tensor, squared_floor: Tensor, bins: Sequence[int], n_images: int) -> Tensor:
    """How many images of equal noise a mean of powers is worth, M for `significance`: fewer than there are where some
    are noisier than others, as an image that leaves a filter silent adds nothing.

    Satterthwaite's degrees of freedom (1946, Biometrics Bulletin 2, 110-114): ``sum(v) ** 2 / sum(v ** 2)`` of the
    images' noise powers v, which are estimated by the mean over K noise bins.

    Args:
        power: squared amplitudes, mean over images, ``(..., n_freqs)``.
        squared_floor: square of each image's mean power over the noise bins, mean over images, ``(..., n_bins)``.
        bins: bins to test.
        n_images: how many there are.

    Returns:
        float64 ``(..., n_bins)``, between 1 and `n_images`.
    """
    n_noise = torch.tensor([len(b) for b in noise_bins(bins, power.shape[-1])], dtype=torch.float64)
    floor = baseline(power.double().cpu(), bins)
    # The square of a mean over K exponential powers is 1 + 1 / K times the square of what they are the mean of.
    squares = squared_floor.double().cpu() * n_noise / (n_noise + 1)
    worth = n_images * floor.square() / squares.clamp(min=torch.finfo(torch.float64).tiny) - 1 / n_noise
    return worth.clamp(1, n_images)


def significance(power: Tensor, bins: Sequence[int], n_images: int | Tensor) -> Tensor:
    """p-values of the power ratio r of a bin over the mean of its K noise bins, power summed or averaged over M images.

    In Gaussian noise each bin's power is exponential, so r follows F(2 M, 2 K M); for one image ``p = (1 + r / K) **
    -K``.

    Args:
        power: squared amplitudes, averaged over images, ``(..., n_freqs)``.
        bins: bins to test.
        n_images: M, the number of independent spectra of equal noise averaged, or one for each result, see
            `effective_images`.

    Returns:
        float64 ``(..., n_bins)``; 1 where the baseline is zero (a dead unit).
    """
    power = power.double().cpu()
    floor = baseline(power, bins)
    ratio = torch.where(floor > 0, power[..., list(bins)] / floor, 0.0).numpy()
    n_noise = np.array([len(b) for b in noise_bins(bins, power.shape[-1])])
    worth = n_images.numpy() if isinstance(n_images, Tensor) else n_images
    return torch.from_numpy(np.asarray(scipy.stats.f.sf(ratio, 2 * worth, 2 * worth * n_noise)))


def benjamini_hochberg(p_values: Tensor) -> Tensor:
    """p-values adjusted for the false discovery rate over the whole tensor (Benjamini & Hochberg 1995), same shape."""
    adjusted = scipy.stats.false_discovery_control(p_values.flatten().double().numpy(), method="bh")
    return torch.from_numpy(adjusted).reshape(p_values.shape)
