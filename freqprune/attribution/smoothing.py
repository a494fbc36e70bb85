"""Effects with the noise taken out that neighbours tell: parts beside each other do alike."""

from __future__ import annotations

import torch
from torch import Tensor

# Distances over which parts do alike, in parts; 0 for none.
LENGTHS = (0.0, 0.7, 1.0, 1.5, 2.0, 3.0)
# Of the variance of the effects, what a part has of its own.
OWN = 0.1
# Variance that the effects explain over the variance that they do not: the range that is searched.
RATIOS = torch.logspace(-3, 8, 45, dtype=torch.float64)


def smoothed(design: Tensor, scores: Tensor, where: Tensor) -> Tensor:
    """Effects as they most likely are if parts that lie close together do alike.

    Regression on the gates with a Gaussian process over the parts as prior: effects have the covariance ``s^2 (0.9
    exp(-d^2 / 2 l^2) + 0.1 [d = 0])`` at distance ``d``, scores a rest of their own of variance ``v``. ``l`` and ``s^2
    / v`` are those of the largest marginal likelihood, ``v`` follows (Rasmussen & Williams 2006, Gaussian Processes for
    Machine Learning, eq. 2.11 and 5.8). Where the scores leave no rest these are the effects of least squares; the more
    they leave, the more a part borrows from its neighbours and the smaller it gets.

    Args:
        design: how far open each part was, ``(n_frames, n_parts)``.
        scores: ``(n_frames,)``.
        where: see `freqprune.attribution.parts.places`, of the same parts.

    Returns:
        ``(n_parts,)``, float64.
    """
    gates, about = (values.double() - values.double().mean(0) for values in (design, scores))
    n_frames, n_parts = gates.shape
    square, product, total = gates.T @ gates, gates.T @ about, about.square().sum()
    if not total > 0:
        return torch.zeros(n_parts, dtype=torch.float64)
    apart = torch.cdist(where, where).square()
    alone = torch.eye(n_parts, dtype=torch.float64)
    found: list[tuple[float, Tensor]] = []
    for length in LENGTHS:
        alike = torch.exp(-apart / (2 * length**2)) if length else alone
        root = torch.linalg.cholesky((1 - OWN) * alike + OWN * alone)
        values, vectors = torch.linalg.eigh(root.T @ square @ root)
        values = values.clamp(min=0)
        along = vectors.T @ (root.T @ product)
        ratios = (RATIOS / values.mean())[:, None]
        weights = ratios / (1 + ratios * values)
        # Rounding keeps a rest that is none above zero.
        rest = (total - (along.square() * weights).sum(1)).clamp(min=1e-14 * float(total))
        likelihood = -0.5 * (n_frames * rest.log() + torch.log1p(ratios * values).sum(1))
        best = int(likelihood.argmax())
        found.append((float(likelihood[best]), (root @ vectors) @ (along * weights[best])))
    return max(found, key=lambda one: one[0])[1]
