"""Which multiples the steps of measured times speak for."""

import pytest
import torch

from freqprune.networks import timing
from freqprune.networks.registry import build_model
from freqprune.networks.steps import best_multiple, widths_to_time
from freqprune.networks.timing import Times
from freqprune.networks.trace import Trace


def in_blocks(size: int, widths: range = range(1, 65)) -> dict[int, float]:
    return {width: float(-(-width // size)) for width in widths}


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_blocks_of_the_hardware_are_found(size: int) -> None:
    assert best_multiple([in_blocks(size)]) == size
    both = best_multiple([in_blocks(size), in_blocks(size, range(33, 97))])
    # Of wide layers one filter more is hardly any time.
    assert both == size if size > 1 else both <= 2


def test_what_is_no_block() -> None:
    falling = {width: float(width) for width in range(1, 65)}
    assert best_multiple([falling]) == 1
    # Widths that are no multiple of four take half as long again.
    odd = {width: width * (1.0 if width % 4 == 0 else 1.5) for width in range(1, 65)}
    assert best_multiple([odd]) == 4
    assert best_multiple([in_blocks(16)], most=4) == 4
    # Time that does not fall at all: as many as there may be.
    assert best_multiple([dict.fromkeys(range(1, 65), 1.0)], most=8) == 8


def test_widths_that_are_timed() -> None:
    assert widths_to_time(16) == [*range(8, 17)]
    assert widths_to_time(200) == [*range(97, 161)]
    assert widths_to_time(1) == [1]


def test_the_layers_that_take_longest_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = build_model({"name": "resnet8"}).eval(), torch.rand(2, 3, 32, 32)
    asked: list[tuple[tuple[int, ...], int]] = []

    def known(self: Times, what: str, shapes: str, work: object) -> float:
        result = work()  # type: ignore[operator]
        if "conv2d" in what:
            asked.append((tuple(result.shape), result.shape[1]))
        # A machine that works in blocks of four channels.
        return float(-(-result.shape[1] // 4) * result[0, 0].numel()) if result.dim() == 4 else 1.0

    monkeypatch.setattr(timing.Times, "_time", known)
    trace = Trace(net, x)
    times = Times(net, trace, x, 100.0)
    asked.clear()
    assert times.multiple(net, trace, x, 8) == 4
    # The first stage has the largest maps.
    assert {shape[2:] for shape, _ in asked} == {(32, 32)}
    assert {width for _, width in asked} == {*range(8, 17)}


@pytest.mark.parametrize("n_filters", [22, 44, 46, 62, 78, 94])
def test_no_steps_are_seen_where_there_are_none(n_filters: int) -> None:
    curve = {width: float(width) for width in widths_to_time(n_filters)}
    # Of wide layers a multiple of 2 costs nothing worth the name.
    assert best_multiple([curve], n_filters // 2) <= 2
