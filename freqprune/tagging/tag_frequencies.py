"""Tag frequencies that can be told apart in a recording: each on a bin of its own, with bins around its responses that
hold nothing but noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from freqprune.errors import InputError
from freqprune.tagging.components import NEIGHBOURS, collision

# To look for frequencies in; with many parts each takes long.
MOST_TRIES = 300
# For one tag alone, and lengths.
MOST_BINS = 30


def cycles_of(tag_freqs: Sequence[float], frame_rate: float, n_frames: int) -> tuple[int, ...]:
    """Cycles of each tag in the recording, which is also its bin in the spectrum."""
    return tuple(round(f * n_frames / frame_rate) for f in tag_freqs)


def _is_whole(cycles: float) -> bool:
    return abs(cycles - round(cycles)) <= 1e-9 * max(1.0, cycles)


def check_tag_freqs(tag_freqs: Sequence[float], frame_rate: float, n_frames: int, max_order: int) -> None:
    """Raise InputError for tags that cannot be told apart, with the nearest that can.

    Args:
        tag_freqs: in Hz.
        frame_rate: frames per second.
        n_frames: of the recording.
        max_order: highest order of the response components.
    """
    resolution = frame_rate / n_frames
    nyquist = frame_rate / 2
    for i, freq in enumerate(tag_freqs):
        if not (math.isfinite(freq) and freq > 0):
            raise InputError(f"tag_freqs[{i}] must be a positive frequency in Hz, got {freq}")
        if freq >= nyquist:
            highest = (n_frames - 1) // 2 * resolution
            raise InputError(
                f"tag_freqs[{i}] = {freq:g} Hz is not below the Nyquist frequency frame_rate / 2 = {nyquist:g} Hz; "
                f"use at most {highest:.12g}, or a frame_rate above {2 * freq:g}"
            )
    for i, freq in enumerate(tag_freqs):
        if not _is_whole(freq / resolution):
            ways = _on_bins(tag_freqs, i, frame_rate, n_frames, max_order)
            use = f"; use {', or '.join(ways)}" if ways else "; use others, another n_frames or a smaller max_order"
            raise InputError(f"tag_freqs[{i}] = {freq:g} Hz is not on a bin (1 / duration = {resolution:g} Hz){use}")
    for i, freq in enumerate(tag_freqs):
        if freq in tag_freqs[:i]:
            cycles_of_all = cycles_of(tag_freqs, frame_rate, n_frames)
            free = [n for n in range(1, math.ceil(n_frames / 2)) if n not in cycles_of_all]
            # Three bins up if that is free: a bin of noise on each side lies between.
            near_first = sorted(free, key=lambda n: abs(n - round(freq / resolution) - 3))
            clear = (
                n
                for n in near_first[:50]
                if not collision((*cycles_of_all[:i], n, *cycles_of_all[i + 1 :]), n_frames, max_order)
            )
            other = next(clear, near_first[0] if near_first else None)
            such = "" if other is None else f", such as {other * resolution:.12g} Hz"
            raise InputError(
                f"tag_freqs[{i}] = {freq:g} Hz is also the frequency of part {tag_freqs.index(freq) + 1}; a "
                f"shared tag cannot be told apart: use another{such}"
            )
    clash = collision(cycles_of(tag_freqs, frame_rate, n_frames), n_frames, max_order)
    if clash:
        legal = _nearest_clear(cycles_of(tag_freqs, frame_rate, n_frames), n_frames, resolution, max_order)
        hint = f"; nearest legal: tag_freqs = {list(legal)}" if legal else ""
        raise InputError(
            f"tag_freqs = {list(tag_freqs)} Hz: {clash} (bins {resolution:g} Hz apart, "
            f"{max(NEIGHBOURS)} on each side are noise, max_order = {max_order}){hint}; or a longer recording "
            "(n_frames), or a smaller max_order"
        )


def _on_bins(tag_freqs: Sequence[float], number: int, frame_rate: float, n_frames: int, max_order: int) -> list[str]:
    """What would do in the place of a tag between two bins, in words: other frequencies, or a longer recording."""
    resolution = frame_rate / n_frames
    cycles = [freq / resolution for freq in tag_freqs]
    nearest = tuple(max(1, round(one)) for one in cycles)
    ways = []
    if all(_is_whole(one) for i, one in enumerate(cycles) if i != number):
        bins = sorted(range(1, math.ceil(n_frames / 2)), key=lambda bin: abs(bin - cycles[number]))
        moved = ((*nearest[:number], bin, *nearest[number + 1 :]) for bin in bins[:MOST_BINS])
        legal = (one for one in moved if len({*one}) == len(one) and not collision(one, n_frames, max_order))
        found = sorted(one[number] * resolution for one in itertools.islice(legal, 2))
        ways += [" or ".join(f"{freq:.12g}" for freq in found)] if found else []
    if not ways and (others := _nearest_clear(nearest, n_frames, resolution, max_order)):
        ways.append(f"tag_freqs = {[float(f'{freq:.12g}') for freq in others]}")
    longer = (
        n for n in range(n_frames + 1, 20 * n_frames + 1) if all(_is_whole(freq * n / frame_rate) for freq in tag_freqs)
    )
    clear = (
        n
        for n in itertools.islice(longer, MOST_BINS)
        if not collision(cycles_of(tag_freqs, frame_rate, n), n, max_order)
    )
    return [*ways, *(f"n_frames = {n}" for n in itertools.islice(clear, 1))]


def _nearest_clear(
    cycles: tuple[int, ...], n_frames: int, resolution: float, max_order: int
) -> tuple[float, ...] | None:
    """Closest tag frequencies with clear noise bins, moving any two of the tags by up to 8 bins."""
    for moved in itertools.islice(_moves(cycles), MOST_TRIES):
        legal = min(moved) > 0 and 2 * max(moved) < n_frames and len(set(moved)) == len(moved)
        if legal and not collision(moved, n_frames, max_order):
            return tuple(c * resolution for c in moved)
    return None


def _moves(cycles: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The tags with any two of them moved, the nearest first, as they are asked for: of many tags there are many."""
    n_moved = min(len(cycles), 2)
    which = [*itertools.combinations(range(len(cycles)), n_moved)]
    seen = {cycles}

    def distance(moves: tuple[int, ...]) -> int:
        return sum(map(abs, moves))

    nearest = sorted(itertools.product(range(-8, 9), repeat=n_moved), key=distance)
    for _, as_far in itertools.groupby(nearest, distance):
        for tags, moves in itertools.product(which, as_far):
            by_tag = dict(zip(tags, moves, strict=True))
            moved = tuple(c + by_tag.get(i, 0) for i, c in enumerate(cycles))
            # One that is moved alone comes with each of the others.
            if moved not in seen:
                seen.add(moved)
                yield moved
