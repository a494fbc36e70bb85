"""Effects that borrow from their neighbours, against the formula written out and known effects."""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

from freqprune.attribution.gates import gates
from freqprune.attribution.parts import places
from freqprune.attribution.smoothing import LENGTHS, OWN, RATIOS, smoothed

GRID = 8
ROW, COLUMN = (one.flatten().double() for one in torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij"))
WHERE = torch.stack([ROW, COLUMN], 1)


def recording(seed: int, recordings: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([gates(GRID**2, 4 * GRID**2, generator, 4.0) for _ in range(recordings)])


def test_it_is_the_posterior_mean_at_the_largest_likelihood() -> None:
    where, generator = WHERE[:6], torch.Generator().manual_seed(1)
    design = torch.rand(20, 6, generator=generator, dtype=torch.float64)
    scores = design @ torch.tensor([1.0, 2.0, 1.5, 0.0, -1.0, 0.5]).double()
    scores += 0.3 * torch.randn(20, generator=generator, dtype=torch.float64)
    centred, about = design - design.mean(0), scores - scores.mean()
    tried = []
    for length in LENGTHS:
        near = torch.exp(-torch.cdist(where, where).square() / (2 * length**2)) if length else torch.eye(6).double()
        prior = (1 - OWN) * near + OWN * torch.eye(6)
        values = torch.linalg.eigvals(centred.T @ centred @ prior).real
        for ratio in RATIOS / values.mean():
            spread = torch.eye(20).double() + ratio * centred @ prior @ centred.T
            rest = float(about @ torch.linalg.solve(spread, about)) / 20
            likelihood = stats.multivariate_normal(cov=(rest * spread).numpy()).logpdf(about.numpy())
            tried.append((likelihood, ratio * prior @ centred.T @ torch.linalg.solve(spread, about)))
    torch.testing.assert_close(smoothed(design, scores, where), max(tried, key=lambda one: one[0])[1])


def test_neighbours_take_the_noise_out_of_a_map() -> None:
    effects = torch.exp(-((ROW - 3) ** 2 + (COLUMN - 4) ** 2) / 6)
    for seed in range(3):
        design = recording(seed)
        scores = design @ effects + 2 * torch.randn(len(design), generator=torch.Generator().manual_seed(seed)).double()
        centred = design - design.mean(0)
        plain = torch.linalg.lstsq(centred, scores[:, None] - scores.mean()).solution[:, 0]
        found = smoothed(design, scores, WHERE)
        assert (found - effects).square().mean() < (plain - effects).square().mean() / 3


def test_without_noise_it_is_least_squares() -> None:
    effects = torch.randn(GRID**2, generator=torch.Generator().manual_seed(2)).double()
    design = recording(0)
    torch.testing.assert_close(smoothed(design, design @ effects, WHERE), effects, rtol=1e-4, atol=1e-5)
    assert not smoothed(design, torch.ones(len(design)), WHERE).any()


def test_places_are_the_middles_of_the_parts_in_parts() -> None:
    numbers = torch.arange(4).view(2, 2).repeat_interleave(3, 0).repeat_interleave(3, 1)
    numbers[numbers == 3] = -1
    found = places(numbers, 5)
    torch.testing.assert_close(found[1] - found[0], torch.tensor([0.0, 1.0]).double())
    torch.testing.assert_close(found[2] - found[0], torch.tensor([1.0, 0.0]).double())
    assert found[3:].isnan().all()
    channels = places(torch.arange(3)[:, None, None].expand(3, 4, 4), 3)
    assert torch.cdist(channels, channels)[0, 1] > 1e5
