"""Tag frequencies → the frequencies at which responses can appear. Integer arithmetic only.

A component is n·f1 + m·f2 + ...: a harmonic of one tag or an intermodulation of several. Bins count cycles a recording.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from freqprune.errors import InputError, closest

NEIGHBOURS = (1, 2)
"""Distances, in bins, of the noise bins on either side of a response (Böge et al. 2024: ±1 and ±2)."""


@dataclass(frozen=True)
class Component:
    """One frequency at which tags can show up in a response.

    Attributes:
        name: minimal-order name, such as ``"f1"``, ``"2f2"``, ``"f2-f1"``.
        coefficients: the integers n, m, ... in n·f1 + m·f2 + ..., of minimal order.
        freq: frequency in Hz after folding at Nyquist.
        bin: its bin in the spectrum.
        kind: ``"harmonic"`` (one tag) or ``"intermodulation"`` (several).
        aliases: names of the higher-order combinations that fall on the same bin.
    """

    name: str
    coefficients: tuple[int, ...]
    freq: float
    bin: int
    kind: str
    aliases: tuple[str, ...] = ()

    @property
    def order(self) -> int:
        """Sum of the absolute coefficients."""
        return sum(map(abs, self.coefficients))

    @property
    def part(self) -> int | None:
        """Index of the tag a harmonic belongs to, None for an intermodulation."""
        return next(i for i, n in enumerate(self.coefficients) if n) if self.kind == "harmonic" else None


def component_name(coefficients: Sequence[int]) -> str:
    """Name of n·f1 + m·f2 + ..., positive terms first.

    >>> component_name((-1, 1)), component_name((2, 1)), component_name((0, 3))
    ('f2-f1', '2f1+f2', '3f2')
    """
    terms = sorted(((n, i) for i, n in enumerate(coefficients) if n), key=lambda term: (term[0] < 0, term[1]))
    name = "".join(f"{'-' if n < 0 else '+'}{abs(n) if abs(n) > 1 else ''}f{i + 1}" for n, i in terms)
    return name.removeprefix("+")


def _folded(coefficients: Sequence[int], cycles: Sequence[int], n_times: int) -> int:
    """Bin of a combination after folding at 0 and at Nyquist."""
    position = sum(n * c for n, c in zip(coefficients, cycles, strict=True)) % n_times
    return min(position, n_times - position)


def components(cycles: Sequence[int], n_times: int, sfreq: float, max_order: int) -> list[Component]:
    """Every harmonic and intermodulation component up to an order, one a bin.

    Combinations that fall on the same bin (after folding at Nyquist) are one component: the one of lowest order names
    it, a harmonic before an intermodulation, a lower coefficient of the later tags before a higher one; the others are
    its aliases. Combinations that fall on 0 Hz or on the Nyquist frequency, where a spectrum is real and its noise
    another, are left out.

    Args:
        cycles: cycles of each tag in the recording.
        n_times: frames of the recording.
        sfreq: frames per second, in Hz.
        max_order: highest sum of absolute coefficients.

    Returns:
        Components by ascending frequency.

    >>> [(c.name, c.freq, c.aliases) for c in components((12, 15), 240, 120.0, 2)]
    [('f2-f1', 1.5, ()), ('f1', 6.0, ()), ('f2', 7.5, ()), ('2f1', 12.0, ()), ('f1+f2', 13.5, ()), ('2f2', 15.0, ())]
    """
    by_bin: dict[int, list[tuple[int, ...]]] = {}
    for combination in _combinations(len(cycles), max_order):
        # n·f and -n·f are the same bin: keep the sign under which the frequency, or else the first coefficient, is
        # positive.
        frequency = sum(n * c for n, c in zip(combination, cycles, strict=True))
        sign = frequency or next((n for n in combination if n), 0)
        if sign < 0:
            continue
        where = _folded(combination, cycles, n_times)
        if where and 2 * where != n_times:
            by_bin.setdefault(where, []).append(combination)
    found = []
    for where, combinations in sorted(by_bin.items()):
        combinations.sort(key=lambda c: (sum(map(abs, c)), sum(1 for n in c if n), tuple(map(abs, c[::-1]))))
        first = combinations[0]
        kind = "harmonic" if sum(1 for n in first if n) == 1 else "intermodulation"
        aliases = tuple(component_name(c) for c in combinations[1:])
        found.append(Component(component_name(first), first, where * sfreq / n_times, where, kind, aliases))
    return found


def _combinations(n_tags: int, max_order: int) -> Iterator[tuple[int, ...]]:
    """Coefficients of all combinations whose absolute values add up to no more than an order."""
    if n_tags == 0:
        yield ()
        return
    for first in range(-max_order, max_order + 1):
        for others in _combinations(n_tags - 1, max_order - abs(first)):
            yield (first, *others)


def collision(cycles: Sequence[int], n_times: int, max_order: int) -> str | None:
    """What makes a set of tags unreadable, in words; None if they can be told apart.

    Either another combination up to `max_order` falls on a tag itself, or on the noise bins of a response.
    """
    every = components(cycles, n_times, 1.0, max_order)
    for component in every:
        if component.order == 1 and component.aliases:
            return f"{component.aliases[0]} falls on {component.name} itself"
    found = {c.bin: c.name for c in every}
    for where, name in found.items():
        for distance in NEIGHBOURS:
            for other in (where - distance, where + distance):
                if other in found:
                    return f"the noise bins of {name} hold the response {found[other]}"
    return None


def find_components(names: Sequence[str] | str, available: Sequence[Component]) -> list[Component]:
    """Pick components by name, in the order given, or by one of the sets ``"fundamentals"``, ``"harmonics"``,
    ``"intermodulation"``, ``"all"``, in the order of frequencies: ask for ``["f1", "f2"]`` where they are to be parts.

    Raises:
        InputError: for a name that is neither a set, a component nor an alias of one.
    """
    sets = {
        "fundamentals": [c for c in available if c.order == 1],
        "harmonics": [c for c in available if c.kind == "harmonic"],
        "intermodulation": [c for c in available if c.kind == "intermodulation"],
        "all": list(available),
    }
    by_name = {name: c for c in available for name in (c.name, *c.aliases)}
    picked: list[Component] = []
    for name in [names] if isinstance(names, str) else names:
        if name not in sets and name not in by_name:
            choices = [*sets, *by_name]
            raise InputError(
                f"components must name {', '.join(sets)} or any of {', '.join(c.name for c in available)}, got "
                f"{name!r}{closest(name, choices)}"
            )
        picked += [c for c in sets.get(name, [by_name.get(name)]) if c is not None and c not in picked]
    if not picked:
        raise InputError(f"components = {names!r} picks none; raise max_order or name others")
    return picked


def noise_bins(
    bins: Sequence[int], n_freqs: int, neighbours: Sequence[int] = NEIGHBOURS, avoid: Collection[int] = ()
) -> list[list[int]]:
    """Noise bins of each bin: those at the given distances on either side that exist, are not 0 Hz and are not to be
    avoided. Nor is the last, that of Nyquist: what is there is real, so that noise has another distribution in it.

    Args:
        bins: the bins to be measured.
        n_freqs: bins of the spectrum.
        neighbours: distances in bins.
        avoid: bins that hold predicted responses.

    Raises:
        InputError: if a bin is left without noise bins.

    >>> noise_bins([12, 120], 121)
    [[10, 11, 13, 14], [118, 119]]
    >>> noise_bins([12], 121, neighbours=(1, 2, 3), avoid={12, 15})
    [[9, 10, 11, 13, 14]]
    """
    found = [
        [
            b
            for b in sorted(where + sign * d for d in neighbours for sign in (-1, 1))
            if 0 < b < n_freqs - 1 and b not in avoid
        ]
        for where in bins
    ]
    for where, around in zip(bins, found, strict=True):
        if not around:
            raise InputError(
                f"bin {where} has no noise bins at the distances {list(neighbours)}; use others, or a longer recording "
                "(n_frames)"
            )
    return found
