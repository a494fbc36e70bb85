"""How much of what a score varies by hangs on each part alone: first-order Sobol indices from the recordings."""

from __future__ import annotations

import torch
from torch import Tensor

# As many harmonics as the extended FAST takes.
DEGREE = 4


def first_order(design: Tensor, scores: Tensor, degree: int = DEGREE) -> Tensor:
    """Share of the variance of scores that each part explains alone, however it does, ``(n_parts,)``.

    ``Var(E[score | gate]) / Var(score)``, with the expectation as a polynomial of the gate. For sine gates
    ``(1 + sin x) / 2`` the Chebyshev polynomials of a gate are the harmonics of its tag, so that this is the Fourier
    amplitude sensitivity test (Cukier et al. 1973; Saltelli, Tarantola & Chan 1999). What a polynomial explains by
    chance is taken off as in an adjusted coefficient of determination, as Tissot & Prieur (2012) do for random balance
    designs; a part that does nothing is therefore 0 in the mean and may be a little below.

    Args:
        design: how far open each part was, ``(n_frames, n_parts)``.
        scores: ``(n_frames,)``.
        degree: of the polynomial.
    """
    about = scores.double() - scores.double().mean()
    n_frames, total = len(about), about.square().sum()
    if not total > 0:
        return torch.zeros(design.shape[1], dtype=torch.float64)
    degree = min(degree, n_frames - 2)
    angle = torch.arccos((2 * design.double().T - 1).clamp(-1, 1))
    powers = torch.cos(angle[..., None] * torch.arange(1, degree + 1, dtype=torch.float64))
    basis = torch.linalg.qr(powers - powers.mean(1, keepdim=True)).Q
    explained = (basis.mT @ about).square().sum(1) / total
    return 1 - (1 - explained) * (n_frames - 1) / (n_frames - degree - 1)
