"""The one exception that stands for bad input, and the checks that raise it in the same words everywhere."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Bad input: the message names the argument, what is allowed, what came and what to do.

    The command line prints its message without a traceback; every other exception is a defect and keeps its traceback.
    """


def closest(name: str, choices: Iterable[str]) -> str:
    """Hint with the most similar of `choices`, or an empty string.

    >>> closest("resnet23", ["resnet32", "vgg16"])
    '; did you mean resnet32?'
    """
    spelled = {choice.casefold(): choice for choice in choices}
    matches = difflib.get_close_matches(name.casefold(), list(spelled), n=1)
    return f"; did you mean {spelled[matches[0]]}?" if matches else ""


def at_least(low: float, **values: float) -> None:
    """Raise InputError for the first value below `low`.

    >>> at_least(1, n_images=0)
    Traceback (most recent call last):
    freqprune.errors.InputError: n_images must be at least 1, got 0
    """
    for name, value in values.items():
        if value < low:
            raise InputError(f"{name} must be at least {low}, got {value}")


def one_of(allowed: Iterable[str], **values: str | None) -> None:
    """Raise InputError for the first value that is not allowed.

    >>> one_of(("mean", "map"), spatial="maps")
    Traceback (most recent call last):
    freqprune.errors.InputError: spatial must be one of mean, map, got 'maps'; did you mean map?
    """
    allowed = list(allowed)
    for name, value in values.items():
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{closest(str(value), allowed)}")


def check_fields(settings: type[Any], given: Iterable[str]) -> None:
    """Raise InputError for the first name that is no field of a settings class."""
    allowed = [field.name for field in fields(settings)]
    for name in given:
        if name not in allowed:
            raise InputError(f"{name} is no setting; there are {', '.join(allowed)}{closest(name, allowed)}")


def check_file(key: str, path: str | Path) -> None:
    """Raise InputError, with the checkpoints that lie in the same folder, unless there is such a file."""
    path = Path(path)
    if not path.is_file():
        nearby = sorted(str(p) for p in path.parent.glob("*") if p.suffix in (".ckpt", ".pt", ".pth", ".th"))[:3]
        there = f"; in that folder: {', '.join(nearby)}" if nearby else ""
        raise InputError(f"{key} = {path} does not exist{there}")


def first_line(error: Exception) -> str:
    """What an error says in its first line; its name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
