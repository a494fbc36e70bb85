"""Interactions against sums of products whose coefficients are known, and what is found where there is nothing."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from freqprune.attribution.effects import estimate, strongest
from freqprune.attribution.effects import p_values as p_values_of
from freqprune.attribution.gates import gates, halves, opened, overlapped, waves
from freqprune.attribution.images import attribute
from freqprune.attribution.pairs import _projected, find_interactions
from freqprune.tagging.spectrum import benjamini_hochberg
from tests.attribution.test_attribution import IMAGES, OfTiles


def designs(n_parts: int, n_recordings: int, seed: int, steepness: float = 4.0) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([gates(n_parts, 4 * n_parts, generator, steepness) for _ in range(n_recordings)]), generator


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


@pytest.mark.parametrize(("n_parts", "n_recordings"), [(64, 3), (36, 8)])
def test_a_part_that_acts_in_a_curve_makes_no_pairs_of_others_significant(n_parts: int, n_recordings: int) -> None:
    """Squares of sine gates lie on single lines, on which half of what some products are lies too."""
    for seed in range(10):
        design, _ = designs(n_parts, n_recordings, seed, 1.0)
        assert not pairs_found(find_interactions(design, design[:, 0].square(), 4 * n_parts)[1])
        both = design[:, 0].square() + (design[:, 1] - 0.5) * (design[:, 2] - 0.5)
        assert pairs_found(find_interactions(design, both, 4 * n_parts)[1]) == {(1, 2)}


def test_a_pair_is_as_sure_as_the_less_sure_of_two_regressions() -> None:
    """Four parts in 96 frames: all six pairs enter the common fit, 48 of even bins for six slopes, four squares and a
    mean."""
    design, generator = designs(4, 6, 0)
    scores = torch.randn(96, generator=generator, dtype=torch.float64) + 4 * design[:, 0] * design[:, 1]
    gates = (design.numpy() - 0.5).reshape(6, 2, 8, 4)[:, 0].reshape(48, 4)
    even = scores.numpy().reshape(6, 2, 8).mean(1).ravel()
    one, other = np.triu_indices(4, 1)
    own = np.column_stack([gates**2, np.ones(48)])
    products = np.column_stack([gates[:, one] * gates[:, other], own])
    slopes, (left,), *_ = np.linalg.lstsq(products, even)
    errors = np.sqrt(np.diag(np.linalg.inv(products.T @ products)) * left / (48 - 11))
    together = 2 * stats.t.sf(np.abs(slopes / errors)[:6], 48 - 11)
    # Alone, beside the squares.
    beside, about = (values - own @ np.linalg.lstsq(own, values)[0] for values in (products[:, :6], even))
    sizes = (beside**2).sum(0)
    alone = 2 * stats.t.sf(np.abs(beside.T @ about) / np.sqrt(about @ about / 43 * sizes), 43)
    assert (together > alone).any()
    found, p_values = find_interactions(design, scores, 16)
    np.testing.assert_allclose(found[one, other], slopes[:6], rtol=1e-9)
    np.testing.assert_allclose(p_values[one, other], np.maximum(together, alone), rtol=1e-9)


def test_the_strongest_pairs_come_by_size_whatever_their_sign() -> None:
    interactions = torch.tensor([[0.0, 1.0, -3.0], [1.0, 0.0, 2.0], [-3.0, 2.0, 0.0]])
    assert strongest(interactions, torch.zeros(3, 3), 2) == [(0, 2, -3.0), (1, 2, 2.0)]


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


def test_pairs_of_mixed_waves_in_a_grid_against_least_squares() -> None:
    """Of 3 x 3 parts whose waves overlap: squares of theirs alone show no pair, and two pairs that work together do."""
    where = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)).double()
    found, alone = 0, 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        design = torch.cat([opened(overlapped(waves(9, 36, generator), where, 0.7), 4.0) for _ in range(16)])
        centred = design - 0.5
        curved = centred.square() @ torch.linspace(1, 2, 9).double()
        alone += len(pairs_found(find_interactions(design, curved, 36, mixed=True)[1]))
        together, p_values = find_interactions(design, curved + 2 * centred[:, 0] * centred[:, 1], 36, mixed=True)
        found += (0, 1) in pairs_found(p_values)
        assert float(together[0, 1]) == pytest.approx(2, rel=0.1)
    assert found == 10
    assert alone <= 1


def test_an_effect_is_as_sure_as_least_squares_over_odd_bins() -> None:
    design, generator = designs(4, 6, 0)
    scores = design @ torch.randn(4, generator=generator).double() + torch.randn(96, generator=generator).double()

    def odd(values: np.ndarray) -> np.ndarray:
        by_half = values.reshape(6, 2, 8, -1)
        return (by_half[:, 0] - by_half[:, 1]).reshape(48, -1) / 2

    gates_, y = odd(design.numpy() - 0.5), odd(scores.numpy()[:, None])[:, 0]
    effects, (rest,), *_ = np.linalg.lstsq(gates_, y)
    errors = np.sqrt(np.diag(np.linalg.inv(gates_.T @ gates_)) * rest / 44)
    expected = effects, errors, 2 * stats.t.sf(np.abs(effects / errors), 44)
    for one, other in zip(estimate(design, scores[:, None], 16), expected, strict=True):
        np.testing.assert_allclose(one[0], other, rtol=1e-9)
