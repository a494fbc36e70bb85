import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from freqprune.errors import InputError
from freqprune.tagging import tag_frequencies
from freqprune.tagging.parts import LAYOUTS, part_masks
from freqprune.tagging.stimulus import Stimulus

CONF = Path(__file__).parents[2] / "conf"


def test_scale_is_the_published_sine() -> None:
    t = np.arange(240) / 120
    expected = np.stack([0.5 + 0.5 * (1 + np.sin(2 * np.pi * f * t)) / 2 for f in (6, 7.5)])
    np.testing.assert_allclose(Stimulus().scale, expected, atol=1e-13)


def test_phase_and_depth() -> None:
    t = np.arange(240) / 120
    stimulus = Stimulus(depth=0.8, phases=(0.3, 2.0))
    expected = np.stack([0.2 + 0.8 * (1 + np.sin(2 * np.pi * f * t + p)) / 2 for f, p in ((6, 0.3), (7.5, 2.0))])
    np.testing.assert_allclose(stimulus.scale, expected, atol=1e-13)


def test_arrays_are_taken_or_told_from_names() -> None:
    means = Stimulus(mode="contrast", pivot=torch.tensor([0.5, 0.25, 0.75]))  # type: ignore[arg-type]
    assert means.pivot == (0.5, 0.25, 0.75)
    for parts in (np.ones((2, 4, 4), bool), [torch.ones(4, 4, dtype=torch.bool)] * 2):
        with pytest.raises(
            InputError, match=r"or a boolean mask tensor \(n_parts, height, width\), got (ndarray|list)"
        ):
            Stimulus(parts=parts)


def rectified(stimulus: Stimulus, blind: int, threshold: float) -> tuple[float, float]:
    """Amplitudes of a rectified sum of all parts but one at that one's tag, and at the weakest of the others."""
    t = np.arange(stimulus.n_frames)
    seen = [np.sin(2 * np.pi * c * t / stimulus.n_frames) for n, c in enumerate(stimulus.cycles) if n != blind]
    amplitude = np.abs(np.fft.rfft(np.maximum(sum(seen) + threshold, 0)))
    return amplitude[stimulus.cycles[blind]], min(amplitude[c] for n, c in enumerate(stimulus.cycles) if n != blind)


@pytest.mark.parametrize("threshold", [-1.0, -0.5, 0.0, 0.5])
def test_little_of_what_three_quadrants_make_is_read_at_the_fourth(threshold: float) -> None:
    """Orders above the second are not kept from the tags by `max_order`."""
    settings = OmegaConf.load(CONF / "tagging" / "quadrants.yaml")
    stimulus = Stimulus(tuple(settings.tag_freqs), parts="quadrants", max_order=settings.max_order)
    for blind in range(4):
        here, there = rectified(stimulus, blind, threshold)
        assert here < 0.04 * there
    before = Stimulus((8.5, 15.5, 19.0, 20.5), parts="quadrants", max_order=2)
    assert max(here / there for here, there in (rectified(before, blind, 0.0) for blind in range(4))) > 0.1


def test_luminance_scales_each_half(images: Tensor) -> None:
    stimulus = Stimulus()
    frames = stimulus.frames(images)
    assert frames.shape == (4, 240, 3, 16, 16)
    for frame in (0, 7, 100):
        left, right = stimulus.scale[:, frame].float()
        torch.testing.assert_close(frames[:, frame, :, :, :8], images[..., :8] * left)
        torch.testing.assert_close(frames[:, frame, :, :, 8:], images[..., 8:] * right)


@pytest.mark.parametrize(("pivot", "value"), [("gray", 0.5), ((0.1, 0.2, 0.3), None), ("image", None)])
def test_contrast_keeps_the_pivot(images: Tensor, pivot: object, value: float | None) -> None:
    stimulus = Stimulus(mode="contrast", pivot=pivot)  # type: ignore[arg-type]
    level = (
        images.mean((2, 3), keepdim=True)
        if pivot == "image"
        else torch.tensor(pivot).view(1, 3, 1, 1)
        if value is None
        else torch.tensor(value)
    )
    frame = stimulus.frames(images, torch.tensor([7]))[:, 0]
    left, right = stimulus.scale[:, 7].float()
    torch.testing.assert_close(frame[..., :8], (level + left * (images - level))[..., :8])
    torch.testing.assert_close(frame[..., 8:], (level + right * (images - level))[..., 8:])


@pytest.mark.parametrize(
    ("settings", "count"), [({}, 49), ({"phases": (0.3, 0.0)}, 80), ({"tag_freqs": (6.0, 10.5)}, 77)]
)
def test_distinct_frames_are_bit_equal_to_the_frames_they_stand_for(
    images: Tensor, settings: dict[str, object], count: int
) -> None:
    stimulus = Stimulus(**settings)  # type: ignore[arg-type]
    first, inverse = stimulus.distinct_frames
    assert len(first) <= 80
    if "phases" not in settings:
        assert len(first) == count
    assert torch.equal(stimulus.frames(images), stimulus.frames(images, first)[:, inverse])
    distinct = stimulus.frames(images[:1], first)[0].flatten(1)
    assert len(torch.unique(distinct, dim=0)) == len(first)


def test_layouts_are_disjoint_and_cover_without_gap() -> None:
    for layout, n_parts in (("halves", 2), ("top_bottom", 2), ("quadrants", 4), ("centre_surround", 2)):
        masks = part_masks(layout, 32, 32)
        assert masks.shape == (n_parts, 32, 32)
        assert (masks.sum(0) == 1).all(), layout
        with_gap = part_masks(layout, 32, 32, gap=4)
        assert (with_gap.sum(0) <= 1).all()
        assert with_gap.sum() < masks.sum()


def test_gap_is_counted_in_pixels_and_left_alone(images: Tensor) -> None:
    stimulus = Stimulus(gap=4)
    masks = stimulus.masks(16, 16)
    assert masks.any(0)[0].tolist() == [True] * 6 + [False] * 4 + [True] * 6
    assert torch.equal(stimulus.frames(images)[..., 6:10], images[:, None, :, :, 6:10].expand(-1, 240, -1, -1, -1))


def test_gap_is_in_pixels_on_oblong_images() -> None:
    assert part_masks("halves", 32, 64, gap=4).any(0)[0].sum() == 60
    assert part_masks("top_bottom", 32, 64, gap=4).any(0)[:, 0].sum() == 28
    quadrants = part_masks("quadrants", 32, 64, gap=4).any(0)
    assert (quadrants.any(1).sum(), quadrants.any(0).sum()) == (28, 60)
    # From the middle to each side.
    for height, width in ((32, 32), (32, 64), (96, 32)):
        tagged = part_masks("centre_surround", height, width, gap=4).any(0)
        assert (~tagged[height // 2]).sum() == (~tagged[:, width // 2]).sum() == 8


def test_centre_is_half_of_the_image() -> None:
    assert part_masks("centre_surround", 64, 64)[0].float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_half_of_the_gap_around_the_centre_lies_on_either_side_of_its_border() -> None:
    # The border is sqrt(2 / pi) * 32.5 = 25.93 pixels from the middle one: 23 are the last of the centre, 28 the first
    # of the surround.
    centre, surround = part_masks("centre_surround", 65, 65, gap=4)[:, 32]
    away = (torch.arange(65) - 32).abs()
    assert torch.equal(centre, away <= 23)
    assert torch.equal(surround, away >= 28)


@pytest.mark.parametrize("layout", ["halves", "top_bottom", "quadrants"])
def test_parts_come_in_the_order_of_their_names(layout: str) -> None:
    corners = {"top left": (0, 0), "top right": (0, -1), "bottom left": (-1, 0), "bottom right": (-1, -1)}
    for name, mask in zip(LAYOUTS[layout][0], part_masks(layout, 4, 6), strict=True):
        assert [corner for corner, at in corners.items() if mask[at]] == [c for c in corners if name in c]


def test_own_masks(images: Tensor) -> None:
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, 0, 0] = masks[1, 5, 5] = True
    frames = Stimulus(parts=masks).frames(images)
    moving = frames.std(1) > 1e-6
    assert moving.any(1).any(0).nonzero().tolist() == [[0, 0], [5, 5]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tag_freqs": (6.0, 7.3)},
            r"tag_freqs\[1\] = 7.3 Hz is not on a bin \(1 / duration = 0.5 Hz\); use 7.5 or 8, or n_frames = 1200",
        ),
        ({"tag_freqs": (6.0, 60.0)}, r"tag_freqs\[1\] = 60 Hz is not below the Nyquist.*use at most 59.5"),
        ({"tag_freqs": (6.0, 6.0)}, r"tag_freqs\[1\] = 6 Hz is also the frequency of part 1"),
        ({"tag_freqs": (6.0, 6.5)}, r"noise bins of .* hold the response .*nearest legal: tag_freqs = \[6.0, 7.5\]"),
        ({"tag_freqs": (6.0, 12.0)}, r"f2-f1 falls on f1 itself .*nearest legal"),
        ({"tag_freqs": (6.0, -7.5)}, "must be a positive frequency"),
        ({"tag_freqs": (6.0, math.nan)}, "must be a positive frequency"),
        ({"tag_freqs": (7.3, math.nan)}, "must be a positive frequency"),
        ({"tag_freqs": (7.3, math.inf)}, "must be a positive frequency"),
        ({"tag_freqs": (7.3, 100.0)}, "is not below the Nyquist"),
        ({"tag_freqs": (6.0,)}, "2 parts .left, right., 1 frequencies"),
        ({"parts": "halfs"}, "did you mean halves"),
        ({"parts": torch.ones(2, 4, 4)}, "boolean tensor"),
        ({"parts": torch.ones(2, 4, 4, dtype=torch.bool)}, "overlap"),
        ({"parts": torch.stack([torch.ones(4, 4), torch.zeros(4, 4)]).bool()}, r"parts\[1\] is empty"),
        ({"mode": "brightness"}, "mode must be one of luminance, contrast"),
        ({"pivot": "black", "mode": "contrast"}, "pivot must be one of image, gray"),
        ({"depth": 0.0}, "depth must be above 0"),
        ({"depth": 1.5}, r"depth must lie in \(0, 1\]"),
        ({"n_frames": 4}, "n_frames must be a whole number of at least 8"),
        ({"frame_rate": 0.0}, "frame_rate must be above 0"),
        ({"phases": (0.0,)}, "one phase a part"),
        ({"gap": -1}, "gap must be 0 or more"),
        ({"max_order": 0}, "max_order must be at least 1"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Stimulus(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.rand(3, 16, 16), r"floats of shape \(n_images"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "divide uint8 pixels by 255"),
        (torch.rand(1, 3, 16, 16) * 255, "undo the normalisation"),
        (torch.rand(1, 3, 16, 16) * 2 - 1, "undo the normalisation"),
        (torch.full((1, 3, 16, 16), torch.nan), r"pixels in \[0, 1\]"),
    ],
)
def test_bad_images(pixels: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Stimulus().frames(pixels)


def test_gap_and_mask_sizes_are_checked(images: Tensor) -> None:
    with pytest.raises(InputError, match="leaves the part 'left' of a 16 x 16 image empty"):
        Stimulus(gap=20).frames(images)
    with pytest.raises(InputError, match="the images have"):
        Stimulus(parts=part_masks("halves", 8, 8)).frames(images)
    with pytest.raises(InputError, match="3 channel means"):
        Stimulus(mode="contrast", pivot=(0.5,)).frames(images)


def test_a_whole_number_of_frames_may_be_a_float() -> None:
    assert Stimulus(tag_freqs=(6.0, 7.5), n_frames=240.0) == Stimulus(tag_freqs=(6.0, 7.5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "gap", "left_out"), [(32, 0, 0), (32, 1, 2), (32, 2, 2), (224, 1, 2), (33, 1, 1), (33, 2, 3)]
)
def test_halves_are_equal_whatever_the_gap(size: int, gap: int, left_out: int) -> None:
    one, other = part_masks("halves", 4, size, gap)
    assert one.sum() == other.sum()
    assert torch.equal(one, other.flip(1))
    assert int((~(one | other))[0].sum()) == left_out


@pytest.mark.parametrize(
    "given",
    [
        {"tag_freqs": (6.0, 7.3)}, {"tag_freqs": (6.0, 8.2)}, {"tag_freqs": (6.2, 7.3)}, {"tag_freqs": (6.0, 20 / 3)},
        {"tag_freqs": (60 / 7, 60 / 8), "frame_rate": 60.0}, {"tag_freqs": (60 / 7, 7.3), "frame_rate": 60.0},
        {"tag_freqs": (6.0, 7.3, 9.0), "parts": torch.eye(3, dtype=torch.bool)[:, None], "max_order": 2},
    ],
)  # fmt: skip
def test_what_would_do_in_the_place_of_tags_between_bins_is_accepted(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="is not on a bin") as refused:
        Stimulus(**given)
    said, freqs = str(refused.value), list(given["tag_freqs"])
    number = int(said.split("[")[1].split("]")[0])
    advised = [{"n_frames": int(n)} for n in re.findall(r"n_frames = (\d+)", said)]
    alone = re.search(r"use ([\d.]+) or ([\d.]+)", said)
    advised += [
        {"tag_freqs": (*freqs[:number], float(freq), *freqs[number + 1 :])}
        for freq in (alone.groups() if alone else ())
    ]
    together = re.search(r"tag_freqs = \[(.*)\]", said)
    advised += [{"tag_freqs": tuple(map(float, together[1].split(",")))}] if together else []
    assert advised
    for one in advised:
        Stimulus(**{**given, **one})


@pytest.mark.parametrize("frame_rate", [100.0, 25.0, 119.88])
def test_frequencies_that_a_message_names_are_taken(frame_rate: float) -> None:
    def named(tag_freqs: tuple[float, float]) -> list[float]:
        with pytest.raises(InputError, match="not on a bin") as refused:
            Stimulus(tag_freqs, frame_rate=frame_rate)
        return [float(word) for word in re.findall(r"[\d.]+", str(refused.value).split("use ")[1].split(", or")[0])]

    low = named((frame_rate / 20.3, frame_rate / 16))[0]
    high = named((low, frame_rate / 15.7))[-1]
    Stimulus((low, high), frame_rate=frame_rate, max_order=1)


@pytest.mark.parametrize(
    ("tag_freqs", "parts"), [((59.0, 59.0), "halves"), ((14.0, 14.0), "halves"), ((6.0, 6.0, 7.5, 9.0), "quadrants")]
)
def test_the_tag_that_is_named_instead_of_a_shared_one_is_free(tag_freqs: tuple[float, ...], parts: str) -> None:
    with pytest.raises(InputError, match="also the frequency") as refused:
        Stimulus(tag_freqs, parts=parts)
    other = float(re.findall(r"such as ([\d.]+) Hz", str(refused.value))[0])
    assert other < 60
    assert other not in tag_freqs
    if tag_freqs[0] == 14:
        # Three bins up there would be a clash.
        Stimulus((tag_freqs[0], other), parts=parts)


def test_frequencies_that_a_message_names_are_accepted() -> None:
    with pytest.raises(InputError, match="use at most") as refused:
        Stimulus((60.0, 7.5), frame_rate=120, n_frames=208)
    assert float(re.findall(r"use at most ([\d.]+)", str(refused.value))[0]) < 60
    with pytest.raises(InputError, match="n_frames = 400"):
        Stimulus((6.0, 5.1), frame_rate=60, n_frames=240)
    Stimulus((6.0, 5.1), frame_rate=60, n_frames=400)
    with pytest.raises(InputError, match="nearest legal") as refused:
        Stimulus((8.5, 15.5, 19.0, 19.5), parts="quadrants", max_order=2)
    named = re.findall(r"nearest legal: tag_freqs = \[([^\]]*)\]", str(refused.value))[0]
    Stimulus(tuple(float(one) for one in named.split(",")), parts="quadrants", max_order=2)


def test_moves_of_tags_come_nearest_first_and_as_they_are_asked_for() -> None:
    moves = [*tag_frequencies._moves((20, 30))]
    far = [abs(a - 20) + abs(b - 30) for a, b in moves]
    assert (len({*moves}), far) == (17 * 17 - 1, sorted(far))
    few = [*itertools.islice(tag_frequencies._moves((40,) * 64), 300)]
    assert len({*few}) == 300
    assert max(sum(abs(c - 40) for c in one) for one in few) == 2


@pytest.mark.parametrize(
    ("tag_freqs", "frame_rate", "n_frames", "cycles"),
    [((5.994, 7.4925), 59.94, 240, (24, 30)), ((1.15, 7.0), 60.0, 6000, (115, 700))],
)
def test_cycles_are_whole_whatever_rounding_says(
    tag_freqs: tuple[float, float], frame_rate: float, n_frames: int, cycles: tuple[int, int]
) -> None:
    assert Stimulus(tag_freqs, frame_rate=frame_rate, n_frames=n_frames, max_order=2).cycles == cycles


def test_phases() -> None:
    with pytest.raises(InputError, match="phases must be finite"):
        Stimulus(phases=(float("nan"), 0.0))
    assert torch.equal(Stimulus(phases=np.array([0.1, 0.2])).scale, Stimulus(phases=(0.1, 0.2)).scale)  # type: ignore[arg-type]
