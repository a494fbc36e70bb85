"""How much more two parts do together than one by one, from the same recordings: the even bins."""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

# Of the frames, for how many a pair may enter the common fit.
FRAMES_A_PAIR = 8


def find_interactions(design: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Interactions of all pairs of parts, and their p-values, ``(n_parts, n_parts)`` each.

    Every pair is first looked at alone, as the projection of what the effects leave on the product of the two centred
    gates. There are many more pairs than frames, so that one strong pair shows a little in many others. The pairs that
    show most are therefore fitted together, one for every eight frames; the others get the projection of what these
    leave. A pair is as sure as the less sure of its two tests, t tests alone and in the common fit, and p is 1 for
    those that did not enter it.

    Args:
        design: how far open each part was, ``(n_frames, n_parts)``.
        scores: ``(n_frames,)``.
    """
    centred = design.double() - design.double().mean(0)
    about = scores.double() - scores.double().mean()
    n_frames, n_parts = design.shape
    one, other = torch.ones(n_parts, n_parts).triu(1).nonzero(as_tuple=True)
    rest = about - centred @ (torch.linalg.pinv(centred) @ about)
    alone, error = _projected(centred, rest, n_frames - n_parts - 1)
    p_alone = _p_values(alone[one, other], error[one, other], n_frames - n_parts - 1, about)
    chosen = p_alone.argsort()[: n_frames // FRAMES_A_PAIR]
    products = centred[:, one[chosen]] * centred[:, other[chosen]]
    columns = torch.cat([centred, products - products.mean(0)], 1)
    freedom = n_frames - columns.shape[1] - 1
    inverse = torch.linalg.pinv(columns.T @ columns, hermitian=True)
    fitted = inverse @ columns.T @ about
    rest = about - columns @ fitted
    errors = (inverse.diagonal().clamp(min=0) * rest.square().sum() / max(1, freedom)).sqrt()
    together, p_values = _projected(centred, rest, freedom)[0], torch.ones(n_parts, n_parts, dtype=torch.float64)
    p_joint = _p_values(fitted[n_parts:], errors[n_parts:], freedom, about)
    for first, second in ((one[chosen], other[chosen]), (other[chosen], one[chosen])):
        together[first, second] = fitted[n_parts:]
        p_values[first, second] = torch.maximum(p_joint, p_alone[chosen])
    return together.fill_diagonal_(0), p_values


def _projected(centred: Tensor, rest: Tensor, freedom: int) -> tuple[Tensor, Tensor]:
    """Projections of a residual on the products of any two gates, and their standard errors."""
    size = (centred.square().T @ centred.square()).clamp(min=torch.finfo(torch.float64).tiny)
    found = (centred * rest[:, None]).T @ centred / size
    return (found + found.T) / 2, (rest.square().sum() / max(1, freedom) / size).sqrt()


def _p_values(found: Tensor, errors: Tensor, freedom: int, about: Tensor) -> Tensor:
    # Rounding alone is no interaction.
    tiny = 1e-12 * about.abs().amax().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.from_numpy(2 * stats.t.sf((found / errors.clamp(min=tiny)).abs().numpy(), max(1, freedom)))
