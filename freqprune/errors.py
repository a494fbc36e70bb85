"""The one exception that stands for bad input."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message names the argument, what is allowed, what came and what to do.

    The command line prints its message without a traceback; every other exception is a defect and keeps its traceback.
    """


def closest(name: str, choices: Iterable[str]) -> str:
    """Hint with the most similar of `choices`, or an empty string.

    >>> closest("resnet23", ["resnet32", "vgg16"])
    '; did you mean resnet32?'
    """
    matches = difflib.get_close_matches(name, list(choices), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
