"""In which steps a layer's time falls with its width: hardware works in blocks, and a filter that fills one up costs
nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

MULTIPLES = (1, 2, 4, 8, 16, 32)
# Widths of a layer that are timed: from its half on, as many as twice the largest multiple.
N_WIDTHS = 2 * MULTIPLES[-1]
# Share of the time that more filters may cost and still count as free.
FREE = 0.01


def widths_to_time(n_filters: int) -> list[int]:
    """Widths of a layer that show its steps: from half of its filters on, rounded to where every multiple meets."""
    last = MULTIPLES[-1]
    first = max(1, n_filters // 2) if n_filters < 2 * last else n_filters // 2 // last * last + 1
    return list(range(first, min(n_filters, first + N_WIDTHS - 1) + 1))


def best_multiple(curves: Sequence[Mapping[int, float]], most: int = MULTIPLES[-1]) -> int:
    """The multiple that widths are best rounded up to: the largest of those that take the least time, to `FREE`, so
    that filters stay which cost nothing.

    Args:
        curves: milliseconds of layers by width.
        most: the largest multiple to look at.

    Returns:
        One of `MULTIPLES`.

    >>> in_blocks = {width: float(-(-width // 8)) for width in range(1, 65)}
    >>> best_multiple([in_blocks])
    8
    >>> best_multiple([{width: float(width) for width in range(1, 65)}])
    1
    """
    cost = {}
    for multiple in MULTIPLES:
        shares = []
        for times in curves:
            up = {width: -(-width // multiple) * multiple for width in times}
            timed = [width for width in times if up[width] in times]
            if timed:
                shares.append(fmean(times[up[width]] for width in timed) / fmean(times[width] for width in timed))
        if multiple <= most and len(shares) == len(curves):
            cost[multiple] = fmean(shares)
    return max(multiple for multiple, value in cost.items() if value <= (1 + FREE) * min(cost.values()))
