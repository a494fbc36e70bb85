"""Interactions against sums of products whose coefficients are known, and what is found where there is nothing."""

import pytest
import torch
from torch import Tensor

from freqprune.attribution.effects import p_values as p_values_of
from freqprune.attribution.gates import gates, halves
from freqprune.attribution.images import attribute
from freqprune.attribution.pairs import _projected, find_interactions
from freqprune.tagging.spectrum import benjamini_hochberg
from tests.attribution.test_attribution import IMAGES, OfTiles


def designs(n_parts: int, n_recordings: int, seed: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([gates(n_parts, 4 * n_parts, generator, 4.0) for _ in range(n_recordings)]), generator


def pairs_found(p_values: Tensor, alpha: float = 0.05) -> set[tuple[int, int]]:
    one, other = torch.ones(p_values.shape).triu(1).nonzero(as_tuple=True)
    sure = benjamini_hochberg(p_values[one, other]) < alpha
    return set(zip(one[sure].tolist(), other[sure].tolist(), strict=True))


def test_two_pairs_are_found_and_nothing_else() -> None:
    passed_alone = 0
    for seed in range(20):
        design, generator = designs(64, 2, seed)
        centred = design - 0.5
        scores = centred @ torch.randn(64, generator=generator, dtype=torch.float64)
        scores += 4 * centred[:, 0] * centred[:, 1] - 3 * centred[:, 2] * centred[:, 5]
        together, p_values = find_interactions(design, scores, 256)
        assert pairs_found(p_values) == {(0, 1), (2, 5)}
        assert float(together[1, 0]) == pytest.approx(4, rel=1e-3)
        assert float(together[2, 5]) == pytest.approx(-3, rel=1e-3)
        assert torch.equal(together, together.T)
        assert torch.equal(p_values, p_values.T)
        together[0, 1] = together[1, 0] = together[2, 5] = together[5, 2] = 0
        assert together.abs().max() < 1e-2
        odd, even = halves(centred, 256)[0], halves(scores - scores.mean(), 256)[1]
        alone, error = _projected(odd, even)
        passed_alone += len(pairs_found(p_values_of(alone, error, len(even) - 1, scores)) - {(0, 1), (2, 5)})
    # What the fit of the strongest together is for.
    assert passed_alone / 20 == pytest.approx(6.5)


def test_pairs_that_do_nothing_are_not_significant_more_often_than_alpha() -> None:
    found, families = [], 0
    for seed in range(40):
        design, generator = designs(16, 2, seed)
        weights = torch.randn(16, generator=generator, dtype=torch.float64)
        noise = torch.randn(len(design), generator=generator, dtype=torch.float64)
        _, p_values = find_interactions(design, design @ weights + noise, 64)
        found.append(p_values[torch.ones(16, 16).triu(1) > 0])
        families += bool(pairs_found(p_values))
    for alpha in (0.01, 0.05):
        assert float((torch.cat(found) < alpha).double().mean()) < 1.3 * alpha
    # Where there is nothing, any pair found is a false discovery: 5 % of the families, and three standard errors.
    assert families <= 40 * 0.05 + 3 * (40 * 0.05 * 0.95) ** 0.5


def test_pairs_of_tiles() -> None:
    net = OfTiles(lambda tiles: (tiles[:, 2] - 0.5) * (tiles[:, 9] - 0.5) + 0.1 * tiles.square().sum(1))
    used = attribute(net, torch.ones(1, 3, 16, 16), 0, grid=4, forwards=512, baseline=torch.zeros(3, 16, 16))
    assert [pair[:2] for pair in used.strongest_pairs(0, 5, 0.05)] == [(2, 9)]
    none = attribute(OfTiles(lambda tiles: tiles.sum(1)), IMAGES, 0, grid=4, forwards=128)
    assert none.strongest_pairs(0, 5, 0.05) == []


def test_few_parts_have_few_pairs() -> None:
    design, _ = designs(1, 2, 0)
    together, p_values = find_interactions(design, design[:, 0], 4)
    assert (together.tolist(), p_values.tolist()) == ([[0.0]], [[1.0]])
    design, _ = designs(2, 8, 0)
    together, p_values = find_interactions(design, (design[:, 0] - 0.5) * (design[:, 1] - 0.5) * 3, 8)
    assert float(together[0, 1]) == pytest.approx(3)
    assert p_values[0, 1] < 1e-4
