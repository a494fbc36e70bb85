"""First-order indices against SALib's FAST and Sobol indices, and against what is known of the Ishigami function."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from freqprune.attribution.gates import gates
from freqprune.attribution.images import attribute
from freqprune.attribution.sensitivity import first_order
from tests.attribution.test_attribution import OfTiles

Array = npt.NDArray[np.float64]


def by_salib(function: Callable[[Array], Array], n_inputs: int) -> dict[str, Array]:
    """First-order indices of a function of uniform numbers in [0, 1], ``(n_points, n_inputs)``, by two methods."""
    pytest.importorskip("SALib")
    from SALib.analyze import fast, sobol
    from SALib.sample import fast_sampler
    from SALib.sample import sobol as sobol_sampler

    problem: dict[str, Any] = {
        "num_vars": n_inputs, "names": [f"x{i}" for i in range(n_inputs)], "bounds": [[0, 1]] * n_inputs
    }  # fmt: skip
    at = fast_sampler.sample(problem, 2048, seed=0)
    by_fast = fast.analyze(problem, function(at), num_resamples=2, seed=0)["S1"]
    at = sobol_sampler.sample(problem, 2048, calc_second_order=False, seed=0)
    found = sobol.analyze(problem, function(at), calc_second_order=False, num_resamples=2, seed=0)
    return {"fast": np.asarray(by_fast), "sobol": np.asarray(found["S1"])}


def uniform(design: Tensor) -> Array:
    """Sine gates as uniform numbers: the search curve of Saltelli, Tarantola & Chan (1999)."""
    found: Array = (0.5 + torch.arcsin(2 * design - 1) / math.pi).numpy()
    return found


# SALib's remark on intervals that are not looked at.
QUIET = pytest.mark.filterwarnings("ignore:FAST confidence intervals:UserWarning")


def mean_over_seeds(function: Callable[[Array], Array], n_inputs: int, n_frames: int, n_seeds: int = 8) -> Array:
    found = []
    for seed in range(n_seeds):
        design = gates(n_inputs, n_frames, torch.Generator().manual_seed(seed), steepness=1.0)
        found.append(first_order(design, torch.from_numpy(function(uniform(design))), n_frames))
    return np.asarray(torch.stack(found).mean(0))


@QUIET
def test_the_ishigami_function() -> None:
    def ishigami(at: Array) -> Array:
        x = math.pi * (2 * at - 1)
        value: Array = np.sin(x[:, 0]) + 7 * np.sin(x[:, 1]) ** 2 + 0.1 * x[:, 2] ** 4 * np.sin(x[:, 0])
        return value

    ours = mean_over_seeds(ishigami, 3, 2048)
    known = np.array([0.3139, 0.4424, 0.0])
    assert np.abs(ours - known).max() < 0.01
    for name, theirs in by_salib(ishigami, 3).items():
        assert np.abs(ours - theirs).max() < 0.02, name


@QUIET
def test_a_small_network() -> None:
    generator = np.random.default_rng(0)
    inward, outward = generator.normal(size=(6, 12)) * 2, generator.normal(size=12)

    def network(at: Array) -> Array:
        value: Array = np.tanh((2 * at - 1) @ inward) @ outward
        return value

    ours = mean_over_seeds(network, 6, 2048)
    assert ours.sum() < 0.9  # it does combine its inputs
    for name, theirs in by_salib(network, 6).items():
        assert np.abs(ours - theirs).max() < 0.02, name


@QUIET
@pytest.mark.parametrize("steepness", [1.0, 4.0])
def test_tiles_of_an_image(steepness: float) -> None:
    generator = torch.Generator().manual_seed(3)
    inward, outward = torch.randn(4, 8, generator=generator) * 3, torch.randn(8, generator=generator)
    image = torch.rand(1, 3, 16, 16, generator=generator)
    net = OfTiles(lambda tiles: torch.tanh((tiles[:, [0, 3, 9, 14]] - 0.4) @ inward) @ outward)
    segments = torch.full((16, 16), -1)
    for number, tile in enumerate((0, 3, 9, 14)):
        row, column = divmod(tile, 4)
        segments[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = number
    found = attribute(net, image, 0, segments=segments, forwards=4096, baseline="grey", steepness=steepness)
    means = torch.stack([image[0].mean(0)[segments == number].mean() for number in range(4)]).double()

    def scored(at: Array) -> Array:
        angle = math.pi * (torch.from_numpy(at) - 0.5)
        opened = (0.5 + steepness / 2 * torch.sin(angle)).clamp(0, 1)
        tiles = 0.5 + opened * (means - 0.5)
        value: Array = (torch.tanh((tiles - 0.4) @ inward.double()) @ outward.double()).numpy()
        return value

    assert found.first_order.shape == (1, 4)
    theirs = by_salib(scored, 4)["sobol"]
    assert np.abs(found.first_order[0].numpy() - theirs).max() < 0.03


def test_a_score_that_does_not_vary_has_no_shares() -> None:
    for n_frames in (16, 370):  # The mean of many equal numbers need not be equal to them.
        design = gates(4, n_frames, torch.Generator().manual_seed(0))
        constant = torch.full((n_frames,), 0.1, dtype=torch.float64)
        assert first_order(design, constant, n_frames).tolist() == [0, 0, 0, 0]
    # What does nothing is nothing in the mean.
    noise = torch.randn(200, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shares = torch.stack(
        [first_order(gates(16, 64, torch.Generator().manual_seed(s)), noise[s], 64) for s in range(200)]
    )
    assert abs(float(shares.mean())) < 3 * float(shares.std()) / (200 * 16) ** 0.5


@pytest.mark.parametrize("steepness", [1.0, 4.0])
@pytest.mark.parametrize(("n_parts", "n_recordings"), [(16, 1), (64, 1), (64, 2), (196, 1)])
def test_where_nothing_combines_the_shares_add_up_to_one(n_parts: int, n_recordings: int, steepness: float) -> None:
    """In recordings as short as they are by default, in which every odd bin has its part."""
    n_frames, drawn = 4 * n_parts, torch.Generator().manual_seed(0)
    sums, idle = [], []
    for _ in range(20):
        design = torch.cat([gates(n_parts, n_frames, drawn, steepness) for _ in range(n_recordings)])
        weights = torch.randn(n_parts, generator=drawn, dtype=torch.float64)
        weights[: n_parts // 2] = 0
        shares = first_order(design, design @ weights, n_frames)
        sums.append(float(shares.sum()))
        idle.append(shares[: n_parts // 2])
        # Each its own variance.
        own = (weights * design.std(0)).square()
        torch.testing.assert_close(shares, own / own.sum(), atol=0.1 if n_parts == 16 else 0.05, rtol=0)
    assert np.mean(sums) == pytest.approx(1.0, abs=0.05 if n_parts == 16 else 0.03)
    assert float(torch.cat(idle).mean()) == pytest.approx(0, abs=0.003)


def test_gates_that_are_open_or_closed_have_no_even_powers() -> None:
    """Two directions that are none would be read of two frames."""
    spread = {}
    for steepness in (1.0, 1e6):
        drawn, sums = torch.Generator().manual_seed(0), []
        for _ in range(12):
            design = torch.cat([gates(16, 64, drawn, steepness) for _ in range(4)])
            centred = design - design.mean(0)
            score = centred[:, :4].sum(1) + 3 * (centred[:, 4:8] * centred[:, 8:12]).sum(1)
            sums.append(float(first_order(design, score, 64).sum()))
        spread[steepness] = np.std(sums)
    assert spread[1e6] < 2 * spread[1.0]


def test_what_parts_do_together_is_left_out() -> None:
    drawn, sums = torch.Generator().manual_seed(0), []
    for _ in range(20):
        design = torch.cat([gates(64, 256, drawn, 4.0) for _ in range(2)])
        centred = design - design.mean(0)
        added, multiplied = centred[:, :8].sum(1), 3 * (centred[:, 8:16] * centred[:, 16:24]).sum(1)
        share = added.var() / (added + multiplied).var()
        sums.append(float(first_order(design, added + multiplied, 256).sum() - share))
    assert np.mean(sums) == pytest.approx(0, abs=0.03)
