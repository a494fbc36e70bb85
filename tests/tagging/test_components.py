import itertools

import pytest

from freqprune.errors import InputError
from freqprune.tagging.components import collision, component_name, components, find_components, noise_bins


def test_order_four_of_six_and_seven_and_a_half_hertz() -> None:
    found = components((12, 15), 240, 120.0, 4)
    assert {c.name: c.freq for c in found} == {
        "f2-f1": 1.5,
        "2f2-2f1": 3.0,
        "2f1-f2": 4.5,
        "f1": 6.0,
        "f2": 7.5,
        "2f2-f1": 9.0,
        "3f1-f2": 10.5,
        "2f1": 12.0,
        "f1+f2": 13.5,
        "2f2": 15.0,
        "3f2-f1": 16.5,
        "3f1": 18.0,
        "2f1+f2": 19.5,
        "f1+2f2": 21.0,
        "3f2": 22.5,
        "4f1": 24.0,
        "3f1+f2": 25.5,
        "2f1+2f2": 27.0,
        "f1+3f2": 28.5,
        "4f2": 30.0,
    }


def test_thirty_hertz_is_the_lower_order_of_two_aliases() -> None:
    (thirty,) = [c for c in components((12, 15), 240, 120.0, 5) if c.freq == 30]
    assert thirty.name == "4f2"
    assert "5f1" in thirty.aliases
    assert thirty.order == 4
    assert thirty.part == 1


@pytest.mark.parametrize("max_order", [2, 5, 9])
def test_every_combination_is_on_exactly_one_component(max_order: int) -> None:
    cycles, n = (12, 15), 240
    found = components(cycles, n, 120.0, max_order)
    assert len({c.bin for c in found}) == len(found)
    by_bin = {c.bin: c for c in found}
    for a, b in itertools.product(range(-max_order, max_order + 1), repeat=2):
        if not 1 <= abs(a) + abs(b) <= max_order:
            continue
        position = (a * 12 + b * 15) % n
        where = min(position, n - position)
        if where in (0, 120):
            continue
        component = by_bin[where]
        assert component.order <= abs(a) + abs(b)
        if a * 12 + b * 15 > 0:
            assert component_name((a, b)) in (component.name, *component.aliases)


def test_above_nyquist_folds_back() -> None:
    # 3 x 50 Hz at 120 frames/s is 30 Hz.
    found = {c.name: c.freq for c in components((100,), 240, 120.0, 3)}
    assert found == {"f1": 50.0, "2f1": 20.0, "3f1": 30.0}


def test_three_tags() -> None:
    names = {c.name for c in components((10, 13, 17), 400, 100.0, 2)}
    assert {"f1", "f3", "f1+f3", "f3-f2", "2f2"} <= names


def test_every_combination_of_three_tags_is_on_one_component() -> None:
    cycles, n = (10, 13, 17), 400
    by_bin = {c.bin: c for c in components(cycles, n, 100.0, 3)}
    for factors in itertools.product(range(-3, 4), repeat=3):
        order, position = sum(map(abs, factors)), sum(a * b for a, b in zip(factors, cycles, strict=True))
        if 1 <= order <= 3 and position > 0:
            assert component_name(factors) in (by_bin[position].name, *by_bin[position].aliases)
            assert by_bin[position].order <= order
    assert by_bin[40].name == "f1+f2+f3"
    assert collision((30, 47, 61, 138), 2400, 3) == "f4-f2-f3 falls on f1 itself"


def test_a_harmonic_names_a_bin_before_an_intermodulation_of_its_order() -> None:
    (shared,) = [c for c in components((20, 44, 32), 240, 120.0, 2) if c.bin == 64]
    assert (shared.name, shared.aliases) == ("2f3", ("f1+f2",))
    assert (shared.kind, shared.part) == ("harmonic", 2)


def test_collision_names_both_responses() -> None:
    assert "the noise bins of f1 hold the response f2" in str(collision((12, 13), 240, 1))
    assert collision((12, 24), 240, 4) == "f2-f1 falls on f1 itself"
    assert collision((12, 15), 240, 6) is None


def test_noise_bins_stay_inside() -> None:
    assert noise_bins([1, 2], 121) == [[2, 3], [1, 3, 4]]


def test_find_components() -> None:
    available = components((12, 15), 240, 120.0, 5)
    assert [c.name for c in find_components("fundamentals", available)] == ["f1", "f2"]
    assert [c.name for c in find_components(["f1+f2", "5f1"], available)] == ["f1+f2", "4f2"]
    assert [c.name for c in find_components(["f2", "fundamentals", "4f2", "5f1"], available)] == ["f2", "f1", "4f2"]
    assert all(c.kind == "intermodulation" for c in find_components("intermodulation", available))


@pytest.mark.parametrize(
    ("names", "message"), [("fundamental", "did you mean fundamentals"), (["f9"], "got 'f9'"), ([], "picks none")]
)
def test_find_components_refuses(names: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_components(names, components((12, 15), 240, 120.0, 2))  # type: ignore[arg-type]


def test_nyquist_is_neither_read_nor_noise() -> None:
    """A spectrum is real there, and its noise has a quarter of the power of other bins."""
    every = components((12, 60), 240, 120.0, 2)
    assert 120 not in {one.bin for one in every}
    assert "2f2" not in {one.name for one in every}
    assert noise_bins([118], 121, avoid={120}) == [[116, 117, 119]]


def test_many_parts_are_enumerated_by_their_order() -> None:
    cycles = (12, 15, 31, 47, 55, 71, 79, 101)
    found = components(cycles, 2400, 120.0, 4)
    by_hand = {
        c for n in range(1, 5) for picked in itertools.combinations_with_replacement(range(8), n) for c in [picked]
    }
    # Of every choice of up to four tags, with each sign: far fewer than 9 ** 8.
    bins = set()
    for picked in by_hand:
        for signs in itertools.product((1, -1), repeat=len(picked)):
            position = sum(sign * cycles[part] for sign, part in zip(signs, picked, strict=True)) % 2400
            bins.add(min(position, 2400 - position))
    assert {component.bin for component in found} == bins - {0, 1200}
    assert {component.order for component in found} == {1, 2, 3, 4}
