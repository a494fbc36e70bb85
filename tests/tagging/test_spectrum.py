"""Spectra against a naive loop, SciPy, and the answers known on paper (s1 = sin 2 pi f1 t, s2 = sin 2 pi f2 t,
single-sided amplitudes)."""

import math

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
from torch import Tensor

from freqprune.tagging.averages import Average
from freqprune.tagging.components import components
from freqprune.tagging.spectrum import (
    amplitude_spectrum,
    benjamini_hochberg,
    complex_spectrum,
    effective_images,
    frame_transform,
    frequencies,
    significance,
    snr,
)
from freqprune.tagging.stimulus import Stimulus

N, RATE = 240, 120.0
BINS = {c.name: c.bin for c in components((12, 15), N, RATE, 4)}
T = torch.arange(N, dtype=torch.float64)
S1, S2 = torch.sin(2 * torch.pi * 12 * T / N), torch.sin(2 * torch.pi * 15 * T / N)


def check(x: Tensor, expected: dict[str, float], dc: float) -> None:
    """All amplitudes of x: those named, and nothing else."""
    full = torch.zeros(N // 2 + 1, dtype=torch.float64)
    full[0] = dc
    for name, value in expected.items():
        full[BINS[name]] = value
    # Float64 sums over 240 samples: rounding stays below 1e-14.
    torch.testing.assert_close(amplitude_spectrum(x), full, rtol=0, atol=1e-14)


def test_affine() -> None:
    check(0.7 + 0.3 * S1 - 0.2 * S2, {"f1": 0.3, "f2": 0.2}, 0.7)


def test_square_of_the_sum() -> None:
    a, b = 0.8, 0.5
    check(
        (a * S1 + b * S2) ** 2,
        {"2f1": a * a / 2, "2f2": b * b / 2, "f1+f2": a * b, "f2-f1": a * b},
        (a * a + b * b) / 2,
    )


def test_product() -> None:
    check(0.8 * S1 * 0.5 * S2, {"f1+f2": 0.2, "f2-f1": 0.2}, 0.0)


def test_cube() -> None:
    a, b = 0.8, 0.5
    check(
        (a * S1 + b * S2) ** 3,
        {
            "f1": 3 * a**3 / 4 + 3 * a * b * b / 2,
            "f2": 3 * b**3 / 4 + 3 * b * a * a / 2,
            "3f1": a**3 / 4,
            "3f2": b**3 / 4,
            "2f1+f2": 3 * a * a * b / 4,
            "2f1-f2": 3 * a * a * b / 4,
            "f1+2f2": 3 * a * b * b / 4,
            "2f2-f1": 3 * a * b * b / 4,
        },
        0.0,
    )


@pytest.mark.parametrize(("cycles", "second"), [(12, 0.217557), (15, 0.220671)])
def test_rectified_sine_sampled(cycles: int, second: float) -> None:
    # P frames a cycle, P a multiple of 4: even n has (1/P)[cot((n-1) pi/P) - cot((n+1) pi/P)], 0 Hz has cot(pi/P)/P,
    # odd n >= 3 nothing.
    p = N // cycles
    x = torch.relu(
        torch.tensor([math.sin(2 * math.pi * ((cycles * t) % N) / N) for t in range(N)], dtype=torch.float64)
    )
    amplitude = amplitude_spectrum(x)
    cot = lambda v: 1 / math.tan(v)  # noqa: E731
    assert amplitude[0].item() == pytest.approx(cot(math.pi / p) / p, abs=1e-14)
    assert amplitude[cycles].item() == pytest.approx(0.5, abs=1e-14)
    for n in range(2, p // 2):
        expected = (cot((n - 1) * math.pi / p) - cot((n + 1) * math.pi / p)) / p if n % 2 == 0 else 0.0
        assert amplitude[n * cycles].item() == pytest.approx(expected, abs=1e-14), n
    assert amplitude[2 * cycles].item() == pytest.approx(second, abs=1e-6)


def test_rectified_sum_of_two_sines() -> None:
    # Continuous form; a dense 2-D grid comes close, 240 samples of it less so.
    grid = torch.arange(1024, dtype=torch.float64) * 2 * torch.pi / 1024
    x = torch.relu(torch.sin(grid)[:, None] + torch.sin(grid)[None])
    amplitude = torch.fft.fft2(x).abs() * 2 / x.numel()
    for n, m, expected in (
        (1, 0, 0.5),
        (0, 1, 0.5),
        (1, 1, 8 / (3 * math.pi**2)),
        (1, -1, 8 / (3 * math.pi**2)),
        (2, 0, 8 / (9 * math.pi**2)),
        (2, 1, 0.0),
    ):
        assert amplitude[n, m].item() == pytest.approx(expected, abs=1e-5), (n, m)
    sampled = amplitude_spectrum(torch.relu(S1 + S2))
    # One recording visits 80 points of that grid only: high orders fold onto these bins.
    assert sampled[BINS["f1"]].item() == pytest.approx(0.5, abs=1e-3)
    assert sampled[BINS["f1+f2"]].item() == pytest.approx(8 / (3 * math.pi**2), abs=5e-3)


@pytest.mark.parametrize("n", [8, 9, 240])
def test_against_a_naive_loop_and_scipy(n: int) -> None:
    x = np.random.default_rng(0).normal(size=(3, n))
    naive = np.zeros((3, n // 2 + 1), complex)
    for k in range(n // 2 + 1):
        for t in range(n):
            naive[:, k] += x[:, t] * np.exp(-2j * np.pi * k * t / n)
        naive[:, k] *= (1 if k == 0 or 2 * k == n else 2) / n
    found = complex_spectrum(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, naive, atol=1e-13)
    scaled = scipy.fft.rfft(x) * 2 / n
    np.testing.assert_allclose(np.abs(found)[:, 1 : (n - 1) // 2], np.abs(scaled)[:, 1 : (n - 1) // 2], atol=1e-13)


def test_frequencies_are_those_of_numpy() -> None:
    np.testing.assert_array_equal(frequencies(N, RATE), np.fft.rfftfreq(N, 1 / RATE))


def test_frame_transform_equals_the_spectrum_of_the_full_course() -> None:
    first, inverse = Stimulus().distinct_frames
    course = torch.randn(5, len(first), dtype=torch.float64)
    found = course.to(torch.complex128) @ frame_transform(inverse, len(first))
    torch.testing.assert_close(found, complex_spectrum(course[:, inverse]), rtol=0, atol=1e-14)


def test_snr_is_the_published_ratio() -> None:
    spectrum = torch.from_numpy(np.random.default_rng(0).uniform(1, 2, (4, 121)))
    found = snr(spectrum, [12, 15, 3])
    for i in range(4):
        for j, b in enumerate((12, 15, 3)):
            a = spectrum[i]
            assert found[i, j].item() == pytest.approx(
                a[b].item() / ((a[b - 2] + a[b - 1] + a[b + 1] + a[b + 2]) / 4).item(), rel=1e-14
            )


def test_snr_does_not_depend_on_gain() -> None:
    x = S1 + 0.1 * torch.randn(7, N, dtype=torch.float64)
    torch.testing.assert_close(snr(amplitude_spectrum(x), [12]), snr(amplitude_spectrum(37.0 * x), [12]))


def test_noise_free_and_dead_have_no_snr() -> None:
    courses = torch.stack([S1 + 2, torch.zeros(N, dtype=torch.float64), torch.full((N,), 3.0, dtype=torch.float64)])
    assert snr(amplitude_spectrum(courses), [12, 15], precision=torch.float64).isnan().all()
    # Rounding to float32 leaves a floor of about 1e-8: still no noise.
    assert snr(amplitude_spectrum((S1 + 2).float().double()), [12], precision=torch.float32).isnan().all()
    noisy = S1 + 2 + 1e-3 * torch.randn(N, dtype=torch.float64)
    assert snr(amplitude_spectrum(noisy), [12]).isfinite().all()


def test_white_noise_amplitude_and_snr_of_a_tone() -> None:
    sigma, a = 0.5, 0.4
    noise = sigma * torch.randn(20_000, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    amplitude = amplitude_spectrum(noise)[:, 12]
    floor = sigma * math.sqrt(math.pi / N)
    # Rayleigh: sd of the mean of 20,000 is 0.0037 of the mean; five of them.
    assert amplitude.mean().item() == pytest.approx(floor, rel=0.02)
    ratio = snr(amplitude_spectrum(noise + a * S1), [12]).mean().item()
    assert ratio == pytest.approx(1.078 * a / floor, rel=0.03)
    assert snr(amplitude_spectrum(noise), [12]).mean().item() == pytest.approx(1.078, rel=0.02)


@pytest.mark.parametrize("n_images", [1, 5])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_false_positive_rate_on_noise(n_images: int, level: float) -> None:
    n = 20_000
    noise = torch.randn(n, n_images, N, dtype=torch.float64, generator=torch.Generator().manual_seed(n_images))
    power = amplitude_spectrum(noise).square().mean(1)
    hits = int((significance(power, [12], n_images) < level).sum())
    low, high = scipy.stats.binomtest(hits, n).proportion_ci(0.9999)
    assert low <= level <= high


def test_significance_of_one_image_is_the_closed_form() -> None:
    power = torch.rand(3, 121, dtype=torch.float64) + 0.1
    ratio = power[:, 12] / power[:, [10, 11, 13, 14]].mean(1)
    torch.testing.assert_close(significance(power, [12], 1)[:, 0], (1 + ratio / 4) ** -4)


def test_significance_of_a_dead_unit_is_one() -> None:
    assert significance(torch.zeros(2, 121), [12, 15], 10).eq(1).all()


def test_benjamini_hochberg_against_its_definition() -> None:
    p = torch.from_numpy(np.random.default_rng(0).uniform(size=(5, 4)) ** 3)
    flat = p.flatten().numpy()
    order = np.argsort(flat)
    adjusted = np.empty(20)
    running = 1.0
    for rank in range(20, 0, -1):
        running = min(running, flat[order[rank - 1]] * 20 / rank)
        adjusted[order[rank - 1]] = running
    np.testing.assert_allclose(benjamini_hochberg(p).flatten(), adjusted, rtol=1e-12)


def test_no_more_images_count_than_there_are() -> None:
    # Of five images all have the same noise power of 1, or one has all of it: 5 * 0.2 ** 2 / (0.2 * 4 / 5) - 1 / 4 = 1.
    # The first would be worth 5 * 1 / (4 / 5) - 1 / 4 = 6.
    power = torch.tensor([[1.0], [0.2]], dtype=torch.float64).expand(2, 121)
    worth = effective_images(power, power[:, :1], [12], 5)
    torch.testing.assert_close(worth, torch.tensor([[5.0], [1.0]], dtype=torch.float64))


@pytest.mark.parametrize("noisy", [1, 4, 32])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_false_positive_rate_where_images_are_not_equally_noisy(noisy: int, level: float) -> None:
    """Filters that only some of 32 images move."""
    n, n_images = 4000, 32
    scale = torch.full((n_images, 1, 1), 1e-3, dtype=torch.float64)
    scale[:noisy] = 1
    noise = scale * torch.randn(n_images, n, N, dtype=torch.float64, generator=torch.Generator().manual_seed(noisy))
    average = Average([12], "amplitude", torch.float64, with_power=True)
    average.update(complex_spectrum(noise))
    power, squares = average.mean("power"), average.mean("squared_floor")
    worth = effective_images(power, squares, [12], n_images)
    assert worth.median() == pytest.approx(noisy, rel=0.15)
    rate = float((significance(power, [12], worth) < level).double().mean())
    assert level / 2 < rate < 1.6 * level
    if noisy == 1:
        # All counted, there are many too many.
        assert (significance(power, [12], n_images) < level).double().mean() > 4 * level
