"""How much more two parts do together than one by one, from the even bins of the same recordings."""

from __future__ import annotations

import torch
from torch import Tensor

from freqprune.attribution.effects import p_values
from freqprune.attribution.gates import halves

# Of the frames, for how many a pair may enter the common fit.
FRAMES_A_PAIR = 8
# From how many recordings on the even bins have room for the squares of all gates beside the products.
OWN_TAKEN_OUT = 3


def find_interactions(design: Tensor, scores: Tensor, n_frames: int, mixed: bool = False) -> tuple[Tensor, Tensor]:
    """Interactions of all pairs of parts, and their p-values, ``(n_parts, n_parts)`` each.

    Every pair is first looked at alone, as the projection of the scores' even bins on the product of the two centred
    gates. There are many more pairs than frames, so that one strong pair shows a little in many others. The pairs that
    show most are therefore fitted together, one for every eight frames; the others get the projection of what these
    leave. A pair is as sure as the less sure of its two tests, t tests alone and in the common fit, and p is 1 for
    those that did not enter it.

    Even bins also hold what each part does by itself in a curve, such as the square of its gate. Of sine gates that is
    one line, on which half of what some products are lies too: a part whose curve is nearly all that the even bins hold
    makes pairs significant that do nothing. Where waves are mixed, and from three recordings on, the squares of the
    gates are therefore taken out of the scores and the products first; in fewer they would fill the even bins.

    Args:
        design: how far open each part was, ``(n_recordings * n_frames, n_parts)``.
        scores: ``(n_recordings * n_frames,)``.
        n_frames: of each recording.
        mixed: parts give some of their waves to others, see `freqprune.attribution.gates.overlapped`.
    """
    gates, _ = halves(design.double(), n_frames)
    about = halves(scores.double() - scores.double().mean(), n_frames)[1]
    n_parts = design.shape[1]
    one, other = torch.ones(n_parts, n_parts).triu(1).nonzero(as_tuple=True)
    taken_out = mixed or len(scores) >= OWN_TAKEN_OUT * n_frames
    own = torch.cat([torch.ones_like(gates[:, :1]), gates.square()], 1) if taken_out else gates[:, :0]
    span = torch.linalg.qr(own).Q
    about, n_left = _without(span, about), len(about) - max(1, span.shape[1])
    alone, error = _projected(gates, about)
    p_alone = p_values(alone[one, other], error[one, other], n_left, scores)
    chosen = p_alone.argsort()[: len(scores) // FRAMES_A_PAIR]
    products = gates[:, one[chosen]] * gates[:, other[chosen]]
    products = _without(span, products - products.mean(0))
    p_alone = p_alone[chosen]
    if taken_out:
        # What is taken out of a product counts for less than nothing in the projections above.
        size = products.square().sum(0).clamp(min=torch.finfo(torch.float64).tiny)
        error_alone = (about.square().sum() / max(1, n_left) / size).sqrt()
        p_alone = p_values(products.T @ about / size, error_alone, n_left, scores)
    inverse = torch.linalg.pinv(products.T @ products, hermitian=True)
    fitted = inverse @ products.T @ about
    rest, freedom = about - products @ fitted, n_left - len(chosen)
    errors = (inverse.diagonal().clamp(min=0) * rest.square().sum() / max(1, freedom)).sqrt()
    p_together = torch.maximum(p_values(fitted, errors, freedom, scores), p_alone)
    together, sure = _projected(gates, rest)[0], torch.ones(n_parts, n_parts, dtype=torch.float64)
    for first, second in ((one[chosen], other[chosen]), (other[chosen], one[chosen])):
        together[first, second] = fitted
        sure[first, second] = p_together
    return together.fill_diagonal_(0), sure


def _without(span: Tensor, values: Tensor) -> Tensor:
    """What is left of values ``(n_frames, ...)`` beside orthonormal columns ``(n_frames, n)``."""
    return values - span @ (span.T @ values)


def _projected(gates: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Projections of a residual on the products of any two gates, and their standard errors."""
    size = (gates.square().T @ gates.square()).clamp(min=torch.finfo(torch.float64).tiny)
    found = (gates * rest[:, None]).T @ gates / size
    return (found + found.T) / 2, (rest.square().sum() / max(1, len(rest) - 1) / size).sqrt()
