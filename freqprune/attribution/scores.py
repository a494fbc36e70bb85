"""What is read of a network's answer: a class's logit, probability or log-odds, or a function of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from freqprune.errors import InputError, one_of
from freqprune.networks import first

SCORES = ("logit", "probability", "log_odds")
Score = Callable[[Any], Tensor]


def check_dims(answer: Tensor) -> Tensor:
    """Logits ``(n_images, n_classes)`` as they are; InputError for anything else."""
    if answer.dim() != 2:
        raise InputError(
            f"the network must return logits, (n_images, n_classes), got {tuple(answer.shape)}; give a score of your "
            "own, a function of its output with one number an image"
        )
    return answer


def targets(answer: Tensor, given: int | Tensor | None) -> Tensor:
    """The class to read for each image: the one that is given, or the one that the network answers with.

    Raises:
        InputError: for a class that is not there, or another number of them than of images.
    """
    n_images, n_classes = check_dims(answer).shape
    if given is None:
        return answer.argmax(1).cpu()
    found = torch.as_tensor(given).flatten().long().cpu()
    found = found.expand(n_images) if len(found) == 1 else found
    if len(found) != n_images:
        raise InputError(f"target must be one class, or one for each of {n_images} images, got {len(found)}")
    if int(found.min()) < 0 or int(found.max()) >= n_classes:
        raise InputError(f"target must lie in [0, {n_classes - 1}], got {sorted(set(found.tolist()))}")
    return found


def check_logits(logits: Tensor, score: str) -> None:
    """Raise InputError for a score that logits ``(n_images, n_classes)`` do not have."""
    one_of(SCORES, score=score)
    if score == "logit":
        return
    if logits.shape[1] == 1:
        raise InputError(f"score = {score} compares classes, and the network has one output; use score=logit")
    if logits.min() >= 0 and ((logits.sum(1) - 1).abs() < 1e-3).all():
        raise InputError(
            f"score = {score} makes probabilities of logits, and the network answers with probabilities already; use "
            "score=logit, which reads its output as it is"
        )


def one_by_one(logits: Tensor) -> bool:
    """Whether all answers lie in [0, 1], as probabilities of classes one by one do."""
    return bool(logits.min() >= 0 and logits.max() <= 1)


def compares_classes(logits: Tensor) -> bool:
    """Whether answers are logits of several classes, which probabilities can be made of."""
    try:
        check_logits(check_dims(logits), "probability")
    except InputError:
        return False
    return not one_by_one(logits)


def read(output: Any, score: str | Score, target: Tensor | None) -> Tensor:
    """The score of each input, ``(n_inputs,)``.

    Args:
        output: the network's output.
        score: one of `SCORES`, or a function of the output.
        target: class of each input.
    """
    if callable(score):
        found = score(output)
        if not isinstance(found, Tensor) or found.dim() != 1:
            came = getattr(found, "shape", type(found).__name__)
            raise InputError(f"score must return one number an image, (n_images,), got {came}")
        return found
    logits = first(output).float()
    assert target is not None
    at = target.to(logits.device)[:, None]
    if score == "logit":
        return logits.gather(1, at).squeeze(1)
    if score == "probability":
        return logits.softmax(1).gather(1, at).squeeze(1)
    others = logits.scatter(1, at, -torch.inf)
    return logits.gather(1, at).squeeze(1) - others.logsumexp(1)
