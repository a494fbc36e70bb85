"""Elimination against a plain NumPy loop that inverts the moments of what is left afresh at every step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from freqprune.errors import InputError
from freqprune.pruning import elimination
from freqprune.pruning.elimination import elimination_errors

Reader = tuple[Tensor, Tensor, Tensor]


def reader(
    n_filters: int,
    size: int,
    n_outputs: int,
    seed: int = 0,
    dead: int | None = None,
    other: int = 0,
    n_samples: int = 600,
) -> Reader:
    """A layer with correlated, rectified inputs; `other` columns are of no filter, and come first."""
    rng = np.random.default_rng(seed)
    n_values = n_filters * size + other
    x = np.maximum(rng.normal(size=(n_samples, n_values)) + rng.normal(size=(n_samples, 1)) + 0.5, 0) * rng.uniform(
        0.3, 3, n_values
    )
    columns = other + np.arange(n_filters * size).reshape(n_filters, size)
    if dead is not None:
        x[:, columns[dead]] = 0
    x = np.hstack([x, np.ones((n_samples, 1))])
    return (
        torch.from_numpy(rng.normal(size=(n_outputs, n_values))),
        torch.from_numpy(x.T @ x / n_samples),
        torch.from_numpy(columns),
    )


def gradient(n_outputs: int, seed: int = 0) -> Tensor:
    g = np.random.default_rng(seed).normal(size=(2 * n_outputs, n_outputs))
    return torch.from_numpy(g.T @ g)


def reference(
    readers: dict[str, Reader], gradients: dict[str, Tensor] | None = None, ridge: float = 1e-4
) -> tuple[np.ndarray, list[int]]:
    """By definition: weights refit to the dense output on what is left, costs from the inverse of its moments."""
    layers = []
    for name, tensors in readers.items():
        w, g, columns = (tensor.numpy() for tensor in tensors)
        mean = g[:-1, -1]
        scale = np.trace(w @ (g[:-1, :-1] - np.outer(mean, mean)) @ w.T) if gradients is None else 1.0
        s = np.eye(len(w)) if gradients is None else gradients[name].numpy()
        g = g + np.diag([*np.full(len(g) - 1, ridge * np.diag(g)[:-1].mean()), 0])
        layers.append((np.hstack([w, np.zeros((len(w), 1))]) @ g, g, columns, s / scale))
    left, order = list(range(len(layers[0][2]))), []
    found, worst = np.zeros(len(left)), 0.0
    while left:
        costs = np.zeros(len(left))
        for target, g, columns, s in layers:
            kept = np.setdiff1d(np.arange(len(g)), columns[order])
            h = np.linalg.inv(g[np.ix_(kept, kept)])
            w = target[:, kept] @ h
            for i, c in enumerate(left):
                own = np.searchsorted(kept, columns[c])
                costs[i] += np.trace(s @ w[:, own] @ np.linalg.inv(h[np.ix_(own, own)]) @ w[:, own].T)
        at = int(costs.argmin())
        worst = max(worst, costs[at])
        found[left[at]] = worst
        order.append(left.pop(at))
    return found, order


CASES = {
    "k=1": {"a": reader(40, 1, 7)},
    "k=9": {"a": reader(20, 9, 12)},
    "k=49": {"a": reader(8, 49, 5, n_samples=2000)},
    "more outputs than inputs": {"a": reader(15, 2, 200)},
    "mixed": {"a": reader(20, 9, 12), "b": reader(20, 1, 30, seed=1), "c": reader(20, 4, 5, seed=2)},
    "dead": {"a": reader(20, 3, 6, dead=4), "b": reader(20, 1, 6, seed=1, dead=4)},
    "columns of others": {"a": reader(20, 3, 6, other=10)},
    "fewer samples than inputs": {"a": reader(20, 3, 6, n_samples=25)},
    "one filter": {"a": reader(1, 3, 6)},
}


@pytest.mark.parametrize("block", [1, 21, 160])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_follows_the_fresh_inverse(case: str, weighted: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "BLOCK", block)
    monkeypatch.setattr(elimination, "CHUNK", 16)
    readers = CASES[case]
    gradients = {name: gradient(len(weight)) for name, (weight, _, _) in readers.items()} if weighted else None
    expected, order = reference(readers, gradients)
    inputs = [tensor.clone() for tensors in readers.values() for tensor in tensors]
    found = elimination_errors(readers, gradients)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8)
    assert bool((found[order].diff() >= 0).all())
    assert all(
        torch.equal(a, b) for a, b in zip(inputs, (t for tensors in readers.values() for t in tensors), strict=True)
    )
    # Of use outside of inference mode.
    found += 1


def test_order_is_that_of_the_fresh_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "BLOCK", 21)
    readers = CASES["mixed"]
    assert [at for at, _ in elimination._eliminated(readers, None, 1e-4)] == reference(readers)[1]


def test_columns_in_any_order() -> None:
    weight, moments, columns = reader(12, 3, 6)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    plain = elimination_errors({"a": (weight, moments, columns)})
    torch.testing.assert_close(
        elimination_errors({"a": (weight, moments, columns[shuffled])}), plain[shuffled], rtol=1e-9, atol=0
    )


def test_of_equals_the_first_goes_first() -> None:
    """Doubles in inputs and weights: one is free but for the ridge, and it is always the one with the lower number."""
    weight, moments, columns = reader(6, 3, 5)
    twice = torch.cat([columns, columns])
    both = torch.cat([twice.flatten(), torch.tensor([len(moments) - 1])])
    readers = {"a": (weight[:, twice.flatten()], moments[both][:, both], torch.arange(36).view(12, 3))}
    order = [at for at, _ in elimination._eliminated(readers, None, 1e-4)]
    assert all(order.index(c) < order.index(c + 6) for c in range(6))


def test_without_weights_nothing_is_lost() -> None:
    weight, moments, columns = reader(12, 3, 6)
    assert not elimination_errors({"a": (torch.zeros_like(weight), moments, columns)}).any()


def test_what_cannot_be_inverted_is_told() -> None:
    weight, moments, columns = reader(12, 3, 6, dead=2)
    with pytest.raises(InputError, match="moments of 'conv'"):
        elimination_errors({"conv": (weight, moments, columns)}, ridge=0)
    with pytest.raises(InputError, match="not finite"):
        elimination_errors({"conv": (weight * torch.nan, moments, columns)})


def test_moments_that_rounding_left_indefinite_get_a_larger_ridge() -> None:
    weight, moments, columns = reader(20, 3, 6, n_samples=25)
    lowered = moments - 5e-4 * moments.diagonal()[:-1].mean() * torch.diag((torch.arange(61) < 60).double())
    found = elimination_errors({"a": (weight, lowered, columns)})
    torch.testing.assert_close(found, elimination_errors({"a": (weight, lowered, columns)}, ridge=1e-3), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-24, 1e12])
@pytest.mark.parametrize("size", [1, 3])
def test_units_of_the_inputs_do_not_matter(size: int, scale: float) -> None:
    weight, moments, columns = reader(20, size, 6)
    units = torch.full((len(moments),), scale, dtype=torch.float64).sqrt()
    units[-1] = 1
    found = elimination_errors({"a": (weight / units[0], moments * torch.outer(units, units), columns)})
    torch.testing.assert_close(found, elimination_errors({"a": (weight, moments, columns)}), rtol=1e-8, atol=0)
