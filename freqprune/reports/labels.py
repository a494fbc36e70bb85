"""What tells groups of jobs apart, in words short enough for a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

DEFAULT = "default"


def in_words(settings: Mapping[str, str], without: Sequence[str] = ()) -> str:
    """Settings in words, but for some, and those that have their default.

    >>> in_words({"importance": "snr", "pruning.scope": "layer", "pruning.macs_cut": "0.5"}, ["pruning.macs_cut"])
    'snr, scope layer'
    """
    short = [_last(key) for key in settings]
    rest = {key: value for key, value in settings.items() if key not in without and value != DEFAULT}
    return ", ".join(
        value if key == "importance" else f"{_last(key) if short.count(_last(key)) == 1 else key} {value}"
        for key, value in rest.items()
    )


def without_shared_folders(values: Sequence[str]) -> list[str]:
    """Paths by what differs in them; other values as they are.

    >>> without_shared_folders(["runs/0/checkpoints/last.ckpt", "runs/1/checkpoints/last.ckpt"])
    ['0', '1']
    >>> without_shared_folders(["runs/0.ckpt", "resnet32_cifar10"])
    ['runs/0.ckpt', 'resnet32_cifar10']
    """
    given = [value.split("/") for value in values if value != DEFAULT]
    if len(given) < 2 or any(len(parts) < 2 for parts in given):
        return list(values)
    start = _shared(given)
    end = _shared([parts[start:][::-1] for parts in given])
    found = [
        value if value == DEFAULT else "/".join(value.split("/")[start : len(value.split("/")) - end])
        for value in values
    ]
    return found if all(found) and len(set(found)) == len(set(values)) else list(values)


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """Parts that all paths begin with."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]
