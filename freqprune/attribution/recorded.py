"""What was found of an image, and the key by which it is found again."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from freqprune.attribution.effects import OfParts


class Cache(Protocol):
    """A mapping, such as a dict or one of the standard library's ``shelve``, from keys of images to what was found of
    the parts and the frames that it took."""

    def get(self, key: str, /) -> tuple[OfParts, int] | None: ...

    def __setitem__(self, key: str, found: tuple[OfParts, int], /) -> None: ...


def key_of(*what: object) -> str:
    """One key for the same tensors and settings, in any process.

    >>> key_of(torch.zeros(2), 1) == key_of(torch.zeros(2), 1) != key_of(torch.zeros(2), 2)
    True
    """
    found = hashlib.sha256()
    for one in what:
        tensor = one.detach().cpu().contiguous() if isinstance(one, Tensor) else None
        found.update(repr(one if tensor is None else (tensor.shape, tensor.dtype)).encode())
        found.update(b"" if tensor is None else tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
