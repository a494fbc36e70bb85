"""How much of what a score varies by hangs on each part alone: first-order Sobol indices from the recordings."""

from __future__ import annotations

import torch
from torch import Tensor

from freqprune.attribution.gates import halves

# As many harmonics as the extended FAST takes.
DEGREE = 4


def first_order(design: Tensor, scores: Tensor, n_frames: int) -> Tensor:
    """Share of the variance of scores that each part explains alone, however it does, ``(n_parts,)``.

    ``Var(E[score | gate]) / Var(score)``, with the expectation as a polynomial of the gate, of degree 4. For sine gates
    ``(1 + sin x) / 2`` the Chebyshev polynomials of a gate are the harmonics of its tag, so that this is the Fourier
    amplitude sensitivity test (Cukier et al. 1973; Saltelli, Tarantola & Chan 1999). What a polynomial explains by
    chance is taken off, as Tissot & Prieur (2012) do for random balance designs, but in odd and in even bins each by
    what is left there: gates lie in odd bins alone, and what one part does in its own direction is no noise in that of
    another. A part that does nothing is therefore 0 in the mean and may be a little below. Squares of sine gates lie on
    single lines and not all over the even bins: with one recording, of these above all, what parts do in curves counts
    too little, and parts that do nothing beside them are below 0 in the mean.

    Args:
        design: how far open each part was, ``(n_recordings * n_frames, n_parts)``, of `freqprune.attribution.gates`.
        scores: ``(n_recordings * n_frames,)``.
        n_frames: of one recording.
    """
    about = scores.double() - scores.double().mean()
    if (scores == scores[0]).all():
        return torch.zeros(design.shape[1], dtype=torch.float64)
    odd, even = halves(about, n_frames)
    gates = halves(design.double() - design.double().mean(0), n_frames)[0]
    angle = torch.arccos((2 * design.double() - 1).clamp(-1, 1))
    powers = [halves(torch.cos(angle * degree), n_frames)[1 - degree % 2] for degree in range(2, DEGREE + 1)]

    span = torch.linalg.qr(gates).Q
    rest = odd - span @ (span.T @ odd)
    noise = rest.square().sum() / max(1, len(odd) - gates.shape[1])
    inverse = torch.linalg.inv(gates.T @ gates)
    effects = inverse @ (gates.T @ odd)
    alone = (effects.square() - noise * inverse.diagonal()) * gates.square().sum(0)
    # What is odd in a gate and no multiple of it; none where another gate, or itself, lies all over it.
    cubic = powers[1]
    beside = cubic - span @ (span.T @ cubic)
    size = beside.square().sum(0)
    there = size > 1e-9 * cubic.square().sum(0)
    alone[there] += (beside[:, there].T @ rest).square() / size[there] - noise

    basis, sizes = torch.linalg.qr(torch.stack([one - one.mean(0) for one in (powers[0], powers[2])], -1).movedim(1, 0))
    # Of gates that are open or closed even powers are constant.
    there = sizes.diagonal(dim1=-2, dim2=-1).abs() > 1e-9 * len(even) ** 0.5
    explained = ((basis.mT @ even).square() * there).sum(1)
    n_even = there.sum(1)
    chance = (even.square().sum() - explained) / (len(even) - 1 - n_even).clamp(min=1)
    return (alone + explained - n_even * chance) / (odd.square().sum() + even.square().sum())
