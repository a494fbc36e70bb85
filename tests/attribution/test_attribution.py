"""Attribution by tags against answers that are known."""

import copy
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freqprune.attribution.effects import OfParts, estimate
from freqprune.attribution.gates import check_apart, gates, halves, opened, overlapped, waves
from freqprune.attribution.images import attribute
from freqprune.attribution.scores import compares_classes, read
from freqprune.errors import InputError
from freqprune.networks.exports import export
from freqprune.networks.registry import build_model
from freqprune.networks.runtimes import OnnxModule

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class OfTiles(nn.Module):
    """Logits as a function of the means of 4 x 4 tiles of 4 x 4 pixels."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        tiles = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4).flatten(1)
        value = self.function(tiles) * self.scale
        return torch.stack([value, -value, torch.zeros_like(value)], 1)


def tiles_of(images: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4).flatten(1)


@pytest.mark.parametrize("steepness", [1.0, 4.0])
def test_a_linear_model_gives_its_coefficients(steepness: float) -> None:
    weights = torch.randn(16, generator=torch.Generator().manual_seed(1))
    net = OfTiles(lambda tiles: tiles @ weights)
    found = attribute(net, IMAGES, 0, grid=4, forwards=128, baseline="grey", steepness=steepness)
    expected = weights * (tiles_of(IMAGES) - 0.5)
    torch.testing.assert_close(found.effects, expected.double(), rtol=1e-3, atol=1e-5)
    assert found.standard_error.max() < 1e-5
    assert found.interactions.abs().max() < 1e-3
    torch.testing.assert_close(found.whole - found.baseline, expected.sum(1), rtol=1e-3, atol=1e-5)
    assert found.forwards == 128
    # Tiles row by row.
    assert found.maps.shape == (3, 16, 16)
    assert found.maps[1, 5, 14] == found.smoothed[1, 7]
    torch.testing.assert_close(found.smoothed, found.effects, rtol=1e-3, atol=1e-5)
    # The other class sees the opposite, and the network's own answer is one of the two.
    other = attribute(net, IMAGES, torch.tensor([1, 1, 1]), grid=4, forwards=64, baseline="grey")
    torch.testing.assert_close(other.effects, -found.effects, rtol=1e-3, atol=1e-5)
    mixed = attribute(net, IMAGES, torch.tensor([0, 1, 2]), grid=4, forwards=64, baseline="grey")
    signs = torch.tensor([[1.0], [-1.0], [0.0]])
    torch.testing.assert_close(mixed.effects, (signs * expected).double(), rtol=1e-3, atol=1e-5)
    own = attribute(net, IMAGES, grid=4, forwards=64).target
    assert own is not None
    assert own.tolist() == net(IMAGES).argmax(1).tolist()


def test_a_product_of_two_parts_shows_in_their_interaction() -> None:
    net = OfTiles(lambda tiles: (tiles[:, 2] - 0.5) * (tiles[:, 9] - 0.5))
    images = torch.ones(1, 3, 16, 16)
    black = torch.zeros(3, 16, 16)
    found = attribute(net, images, 0, grid=4, forwards=1024, baseline=black)
    together = found.interactions[0]
    # (g - 1/2)(h - 1/2): nothing alone, all of it together.
    assert float(together[2, 9]) == pytest.approx(1.0, rel=0.1)
    assert found.effects.abs().max() < 0.05
    others = together.clone()
    others[2, 9] = others[9, 2] = 0
    assert others.abs().max() < 0.25
    assert found.strongest_pairs(0, 1)[0][:2] == (2, 9)
    assert torch.equal(together, together.T)
    assert together.diagonal().abs().max() == 0


@pytest.mark.parametrize("overlap", [0.0, 0.7])
def test_a_part_that_does_nothing_is_significant_at_the_rate_alpha(overlap: float) -> None:
    net = OfTiles(
        lambda tiles: torch.tanh(6 * tiles[:, :8].mean(1) - 3) + (tiles[:, 1] * tiles[:, 3] - tiles[:, 5]).sin()
    )
    p_values = torch.cat(
        [
            attribute(net, IMAGES, 0, grid=4, forwards=128, seed=seed, overlap=overlap).p_values[:, 8:].flatten()
            for seed in range(20)
        ]
    )
    assert len(p_values) == 20 * 3 * 8
    for alpha in (0.05, 0.2):
        assert float((p_values < alpha).double().mean()) < alpha + 3 * (alpha * (1 - alpha) / len(p_values)) ** 0.5
    used = attribute(net, IMAGES, 0, grid=4, forwards=256)
    assert float((used.adjusted[:, :8] < 0.05).double().mean()) > 0.8


@pytest.mark.parametrize("steepness", [1.0, 4.0])
def test_that_rate_holds_beside_a_few_parts_that_only_work_together(steepness: float) -> None:
    """Six of 64 parts through a hidden layer; residuals of all bins instead of the odd ones give 10 to 13 %."""
    found = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        design = torch.cat([gates(64, 256, generator, steepness) for _ in range(2)])
        inward = 2 * torch.randn(6, 8, generator=generator, dtype=torch.float64)
        scores = torch.tanh((design[:, :6] - 0.5) @ inward + 0.5).sum(1)
        found.append(estimate(design, scores[:, None], 256)[2][0, 6:])
    assert float((torch.cat(found) < 0.05).double().mean()) == pytest.approx(0.05, abs=0.015)


def test_odd_and_even_bins() -> None:
    time = torch.arange(16, dtype=torch.float64) / 16
    odd, even = torch.sin(2 * torch.pi * 3 * time + 1), torch.cos(2 * torch.pi * 4 * time) + 0.3
    both = torch.cat([odd + even, odd - even])[:, None]
    of_odd, of_even = halves(both, 16)
    torch.testing.assert_close(of_odd[:, 0], torch.cat([odd[:8], odd[:8]]))
    torch.testing.assert_close(of_even[:, 0], torch.cat([even[:8], -even[:8]]))


def test_recordings_follow_from_the_error_asked_for() -> None:
    net = build_model({"name": "resnet8"}).eval()
    rough = attribute(net, IMAGES[:1], grid=4, forwards=1024, until=1e9)
    assert rough.forwards == 64
    some = attribute(net, IMAGES[:1], grid=4, forwards=1024, until=float(rough.standard_error.max()) / 2)
    assert 64 < some.forwards <= 1024
    assert some.standard_error.max() < rough.standard_error.max()
    # One part that is not sure enough is reason to go on.
    barely = 0.999 * float(rough.standard_error.max())
    more = attribute(net, IMAGES[:1], grid=4, forwards=1024, until=barely)
    assert more.forwards > 64
    assert more.standard_error.max() <= barely
    again = attribute(net, IMAGES[:1], grid=4, forwards=1024, until=1e9)
    assert torch.equal(again.effects, rough.effects)


@pytest.mark.parametrize("until", [None, 1e9])
def test_what_is_in_a_cache_is_not_recorded_again(until: float | None) -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.n_frames, self.left = build_model({"name": "resnet8"}).eval(), 0, 10**9

        def forward(self, x: Tensor) -> Tensor:
            self.n_frames += len(x)
            self.left -= len(x) > 4
            if not self.left:
                raise KeyboardInterrupt
            return self.net(x)

    net, cache = Counted(), dict[str, tuple[OfParts, int]]()
    asked: dict[str, Any] = {"grid": 4, "forwards": 128, "until": until}
    expected = attribute(net, IMAGES, **asked)
    whole, net.n_frames = net.n_frames, 0
    # Broken off in the recordings of the second image.
    net.left = 3 if until is None else 2
    with pytest.raises(KeyboardInterrupt):
        attribute(net, IMAGES, **asked, cache=cache)
    assert len(cache) == 1
    net.n_frames, net.left = 0, 10**9
    found = attribute(net, IMAGES, **asked, cache=cache)
    assert (whole - net.n_frames, found.forwards) == ((128, 128) if until is None else (64, 64))
    for name in (*(field.name for field in fields(OfParts)), "target", "whole", "baseline", "parts"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    # All that they hang on is in the keys, and nothing else: the images may be others, or in another order.
    net.n_frames = 0
    again = attribute(net, IMAGES[[2, 0]], **asked, cache=cache)
    assert torch.equal(again.effects, expected.effects[[2, 0]])
    assert net.n_frames < 16
    attribute(net, IMAGES[:1], 0, **asked, cache=cache)
    for other in (
        {"seed": 1}, {"steepness": 2.0}, {"overlap": 0.5}, {"forwards": 64}, {"until": 0.5}, {"grid": 3}, {"target": 1},
        {"baseline": "grey"}, {"half": "bfloat16"}, {"mean": [0.5] * 3, "std": [0.25] * 3},
    ):  # fmt: skip
        attribute(net, IMAGES[:1], **{"target": 0, **asked, **other}, cache=(own := dict(cache)))
        assert len(own) == len(cache) + 1, other


def test_segments_and_what_is_in_none() -> None:
    net = OfTiles(lambda tiles: tiles[:, 0] + 2 * tiles[:, 5] + 3 * tiles[:, 15])
    segments = torch.full((16, 16), -1)
    segments[:4, :4], segments[4:8, 4:8] = 0, 1
    found = attribute(net, IMAGES, 0, segments=segments, forwards=64, baseline="grey")
    expected = torch.tensor([1.0, 2.0]) * (tiles_of(IMAGES)[:, [0, 5]] - 0.5)
    torch.testing.assert_close(found.effects, expected.double(), rtol=1e-3, atol=1e-5)
    assert found.maps[0, 15, 15] == 0
    # What is in no part stays as it is where all parts are at their baselines: of a linear model nothing is left over.
    torch.testing.assert_close(found.whole - found.baseline, expected.sum(1))
    each = segments.expand(3, -1, -1).clone()
    assert torch.equal(attribute(net, IMAGES, 0, segments=each, forwards=64, baseline="grey").effects, found.effects)


@pytest.mark.parametrize("score", ["logit", "probability", "log_odds", lambda output: output[:, 0] * 2])
def test_scores(score: Any) -> None:
    net = build_model({"name": "resnet8"}).eval()
    found = attribute(net, IMAGES, 3, grid=2, forwards=32, score=score, mean=[0.5] * 3, std=[0.25] * 3)
    with torch.no_grad():
        logits = net((IMAGES - 0.5) / 0.25)
    expected = {
        "logit": logits[:, 3],
        "probability": logits.softmax(1)[:, 3],
        "log_odds": torch.logit(logits.double().softmax(1)[:, 3]).float(),
    }.get(score, 2 * logits[:, 0])  # type: ignore[call-overload]
    torch.testing.assert_close(found.whole, expected, rtol=1e-3, atol=1e-4)
    assert found.effects.shape == found.standard_error.shape == found.p_values.shape == (3, 4)


@pytest.mark.parametrize("score", ["logit", "probability", "log_odds"])
def test_scores_of_answers_in_half_precision_are_not_rounded_to_it(score: str) -> None:
    answer = (5 * torch.randn(64, 5)).bfloat16()
    share = answer.double().softmax(1)[:, 2]
    expected = {"logit": answer[:, 2].double(), "probability": share, "log_odds": torch.logit(share)}[score]
    found = read(answer, score, torch.full((64,), 2))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_gates_lie_on_odd_bins_of_their_own() -> None:
    design = gates(16, 64, torch.Generator().manual_seed(0))
    power = torch.fft.rfft(design - 0.5, dim=0).abs()
    assert sorted(power.argmax(0).tolist()) == list(range(1, 32, 2))
    assert (design.min(), design.max()) >= (0, 0)
    assert design.max() <= 1
    with pytest.raises(InputError, match="at least 64, got 60"):
        gates(16, 60, torch.Generator())


def test_the_answer_draws_itself() -> None:
    net = OfTiles(lambda tiles: tiles[:, 2])
    found = attribute(net, IMAGES, 0, grid=4, forwards=64)
    assert found.plot(0).axes
    assert found.plot(1, IMAGES[1]).axes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": 8, "forwards": 128}, "64 parts need an odd bin each: forwards must be at least 256, got 128"),
        ({"grid": 20}, "do not fit into images of 16 x 16"),
        ({"grid": 0}, "grid must be at least 1"),
        ({"segments": torch.zeros(4, 4, dtype=torch.long)}, r"segments must be integers of shape \(16, 16\)"),
        ({"segments": torch.zeros(16, 16)}, "segments must be integers"),
        ({"target": 7}, r"target must lie in \[0, 2\], got \[7\]"),
        ({"target": torch.tensor([0, 1])}, "one for each of 3 images, got 2"),
        ({"baseline": "black"}, "baseline must be one of"),
        ({"baseline": torch.zeros(3, 8, 8)}, "baseline must have the shape"),
        ({"score": "margin"}, "score must be one of"),
        ({"score": lambda output: output}, "one number an image"),
        ({"score": lambda output: output[:, 0] / 0}, r"answers image 0 \(the first is 0\) with"),
        ({"mean": [0.5] * 3}, "mean and std come together"),
        ({"mean": [0.5], "std": [1.0]}, "mean must hold 3 values"),
        ({"until": 0}, "until must be a standard error above 0"),
        ({"steepness": 0.5}, "steepness must be at least 1"),
        ({"overlap": -0.1}, r"overlap must lie in \[0, 2\], got -0.1"),
        ({"overlap": 2.5}, r"overlap must lie in \[0, 2\], got 2.5"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    net = OfTiles(lambda tiles: tiles[:, 0])
    with pytest.raises(InputError, match=message):
        attribute(net, IMAGES, **{"grid": 4, "forwards": 64, **arguments})


def test_networks_that_cannot_be_read() -> None:
    class Draws(OfTiles):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(())

    with pytest.raises(InputError, match="differently from call to call"):
        attribute(Draws(lambda tiles: tiles[:, 0]), IMAGES, grid=4, forwards=64)
    net = build_model({"name": "resnet8"}).train()
    found = attribute(net, IMAGES[:1], grid=2, forwards=16)
    assert net.training
    assert torch.equal(found.effects, attribute(net.eval(), IMAGES[:1], grid=2, forwards=16).effects)
    with pytest.raises(InputError, match="are not finite"):
        estimate(torch.rand(8, 2), torch.full((8, 1), torch.nan))


def test_neighbours_that_share_their_waves_open_together() -> None:
    weights = torch.randn(16, generator=torch.Generator().manual_seed(1))
    net = OfTiles(lambda tiles: tiles @ weights)
    for overlap in (2.0, 0.7):
        found = attribute(net, IMAGES, 0, grid=4, forwards=128, baseline="grey", overlap=overlap)
        exact = (weights * (tiles_of(IMAGES) - 0.5)).double()
        torch.testing.assert_close(found.effects, exact, rtol=1e-3, atol=1e-4 if overlap > 1 else 1e-5)
    torch.testing.assert_close(found.effects, (weights * (tiles_of(IMAGES) - 0.5)).double(), rtol=1e-3, atol=1e-5)
    where = torch.stack([torch.arange(16) // 4, torch.arange(16) % 4], 1).double()
    tags = waves(16, 64, torch.Generator().manual_seed(0))
    together = overlapped(tags, where, 0.7)
    # Power is kept, all of it in odd bins, and neighbours go along with each other.
    torch.testing.assert_close(together.square().mean(0), torch.full((16,), 0.5).double())
    assert halves(opened(together, 4.0) - 0.5, 64)[1].abs().max() < 1e-9
    alike = torch.corrcoef(together.T)
    assert alike[5, 6] > 0.5 > 0.1 > alike[0, 15].abs()
    assert overlapped(tags, where, 0.0) is tags
    where[3] = torch.nan
    torch.testing.assert_close(overlapped(tags, where, 0.7)[:, 3], tags[:, 3])
    with pytest.raises(InputError, match=r"overlap must lie in \[0, 2\], got -1"):
        attribute(net, IMAGES, 0, grid=4, forwards=64, overlap=-1)


def test_the_overlap_is_a_standard_deviation_in_parts() -> None:
    where = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    # Neighbours are two standard deviations of 0.5 apart; of one wave each a part keeps its power.
    share = math.exp(-(2**2) / 2)
    expected = torch.tensor([[1, share], [share, 1]], dtype=torch.float64) / math.hypot(1, share)
    torch.testing.assert_close(overlapped(torch.eye(2, dtype=torch.float64), where, 0.5), expected)


def test_a_network_sees_neighbours_open_together_where_they_overlap() -> None:
    seen: list[Tensor] = []

    def total(tiles: Tensor) -> Tensor:
        seen.append(tiles)
        return tiles.sum(1)

    alike = []
    for overlap in (0.0, 0.7):
        seen.clear()
        attribute(
            OfTiles(total), torch.ones(1, 3, 16, 16), 0, grid=4, forwards=64, baseline=torch.zeros(3, 16, 16),
            steepness=1.0, overlap=overlap,
        )  # fmt: skip
        # From black to white the mean of a tile is its gate; whole images come one by one.
        alike.append(torch.corrcoef(torch.cat([tiles for tiles in seen if len(tiles) > 1]).T))
    torch.testing.assert_close(alike[0], torch.eye(16), rtol=0, atol=1e-5)
    assert alike[1][5, 6] > 0.5 > 0.1 > alike[1][0, 15].abs()


def test_a_network_in_onnx_runtime_is_explained_like_itself(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    net = build_model({"name": "resnet8"}).eval()
    export(net, IMAGES[:1], tmp_path, onnx=True)
    found, same = (attribute(one, IMAGES, grid=2, forwards=32) for one in (net, OnnxModule(tmp_path / "model.onnx")))
    torch.testing.assert_close(same.effects, found.effects, rtol=1e-3, atol=1e-4)


def test_images_that_are_no_pixels_are_refused() -> None:
    net = build_model({"name": "resnet8"}).eval()
    with pytest.raises(InputError, match="divide uint8 pixels by 255"):
        attribute(net, (255 * IMAGES).byte(), grid=2, forwards=32)
    with pytest.raises(InputError, match=r"must hold pixels in \[0, 1\], got values from"):
        attribute(net, (IMAGES - 0.5) / 0.2, grid=2, forwards=32, mean=[0.5] * 3, std=[0.2] * 3)


def test_networks_of_other_types_get_images_of_theirs() -> None:
    net = build_model({"name": "resnet8"}).eval()
    single, double = (attribute(one, IMAGES, grid=2, forwards=32).effects for one in (net, copy.deepcopy(net).double()))
    torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("score", ["probability", "log_odds"])
def test_scores_of_logits_are_refused_for_what_are_none(score: str) -> None:
    one = nn.Sequential(nn.Conv2d(3, 1, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match=f"score = {score} compares classes, and the network has one output"):
        attribute(one, torch.rand(1, 3, 8, 8), grid=2, forwards=64, score=score)
    net = nn.Sequential(nn.Conv2d(3, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1))
    with pytest.raises(InputError, match="answers with probabilities already; use score=logit"):
        attribute(net, torch.rand(1, 3, 8, 8), grid=2, forwards=64, score=score)


@pytest.mark.parametrize("half", [None, "float16"])
def test_frames_that_have_no_answer_are_told_of_which_image(half: str | None) -> None:
    def between(tiles: Tensor) -> Tensor:
        return torch.where(((tiles > 0.4) & (tiles < 0.6)).any(1), torch.nan, tiles.sum(1))

    images = torch.cat([torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)])
    advice = "" if half is None else ".*use bfloat16"
    with pytest.raises(InputError, match=rf"image 1 \(the first is 0\): .* scores are not finite{advice}"):
        attribute(OfTiles(between), images, 0, grid=4, forwards=64, baseline=torch.zeros(3, 16, 16), half=half)


@pytest.mark.parametrize("images", [torch.rand(1, 3, 8, 8), torch.rand(3, 3, 8, 8)])
def test_answers_without_a_dimension_of_classes_are_told(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 1, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(0))
    with pytest.raises(InputError, match=r"must return logits, \(n_images, n_classes\), got \(1,\); give a score"):
        attribute(net, images, grid=2, forwards=64)


def test_probabilities_of_classes_one_by_one_are_no_logits(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sigmoid())
    attribute(net, torch.rand(1, 3, 8, 8), grid=2, forwards=64)
    assert "lie in [0, 1]" not in caplog.text
    attribute(net, torch.rand(1, 3, 8, 8), grid=2, forwards=64, score="probability")
    assert caplog.text.count("all answers of the network lie in [0, 1]") == 1
    assert not compares_classes(torch.rand(2, 4))
    assert compares_classes(torch.randn(2, 4))
    assert not compares_classes(torch.randn(2, 1))
    assert caplog.text.count("all answers of the network lie in [0, 1]") == 1


def test_parts_in_one_place_cannot_share_waves() -> None:
    segments = torch.zeros(16, 16, dtype=torch.long)
    segments[4:12, 4:12] = 1
    segments[6:10, 6:10] = 2
    net = nn.Sequential(nn.Conv2d(3, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.rand(1, 3, 16, 16)
    attribute(net, images, segments=segments, forwards=64)
    with pytest.raises(InputError, match=r"overlap = 0.7: parts 0 and \d lie around the same point"):
        attribute(net, images, segments=segments, forwards=64, overlap=0.7)


def test_a_baseline_is_of_pixels_as_the_images_are() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images, norm = torch.rand(1, 3, 8, 8), {"mean": [0.5] * 3, "std": [0.2] * 3}
    with pytest.raises(InputError, match=r"baseline must be floats .*; divide uint8 by 255"):
        attribute(net, images, grid=2, forwards=64, baseline=torch.full((3, 8, 8), 255, dtype=torch.uint8), **norm)
    with pytest.raises(InputError, match="baseline must hold pixels in"):
        attribute(net, images, grid=2, forwards=64, baseline=(images - 0.5) / 0.2, **norm)


def test_rounding_of_a_baseline_of_ones_own_is_none_of_its_faults() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images, norm = torch.rand(1, 3, 8, 8), {"mean": [0.5] * 3, "std": [0.2] * 3}
    for more in (1e-6, -1e-6):
        found = attribute(net, images, grid=2, forwards=64, baseline=images.round() + more, **norm)
        assert found.effects.isfinite().all()


def test_work_on_a_map_leaves_the_attribution_alone() -> None:
    found = attribute(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), torch.rand(1, 3, 8, 8), grid=2, forwards=64)
    before = found.maps.clone()
    found.maps[0].sub_(1)
    assert torch.equal(found.maps, before)


def test_parts_that_lie_close_are_tagged_and_said_to_be_unsure() -> None:
    where = torch.tensor([[0.0, 0.0], [0.0, 0.05], [3.0, 0.0]], dtype=torch.float64)
    check_apart(where, 0.5)
    check_apart(torch.zeros(3, 2), 0.0)
    with pytest.raises(InputError, match="parts 0 and 1 lie around the same point"):
        check_apart(where * 1e-3, 0.5)


@pytest.mark.parametrize("baseline", ["mean", "blur"])
def test_white_stays_white_in_a_baseline(baseline: str) -> None:
    """The weights of a blur add up to one but for rounding."""
    net = nn.Sequential(nn.Conv2d(3, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images, norm = torch.ones(1, 3, 100, 100), {"mean": [0.5] * 3, "std": [0.2] * 3}
    assert attribute(net, images, grid=2, forwards=64, baseline=baseline, **norm).effects.abs().max() < 1e-5


def test_a_curved_answer_to_one_part_is_no_interaction_where_waves_are_mixed() -> None:
    """The right half is never read; the square of the left one's wave lies all over the product of the two."""
    net = OfTiles(lambda tiles: tiles.unflatten(1, (4, 4))[..., :2].mean((1, 2)) ** 2)
    for steepness in (1.0, 4.0):
        found = attribute(
            net, torch.ones(1, 3, 16, 16), 0, grid=(1, 2), forwards=512, baseline=torch.zeros(3, 16, 16),
            steepness=steepness, overlap=0.7,
        )  # fmt: skip
        assert found.strongest_pairs(0, 5, alpha=0.01) == []
    # What two halves do together is found all the same.
    net = OfTiles(lambda tiles: tiles.unflatten(1, (4, 4))[..., :2].mean((1, 2)) * tiles[:, 3])
    images = torch.ones(1, 3, 16, 16)
    found = attribute(net, images, 0, grid=(1, 2), forwards=512, baseline=0 * images[0], steepness=1.0, overlap=0.7)
    ((one, other, value),) = found.strongest_pairs(0, 5, alpha=0.01)
    assert (one, other) == (0, 1)
    assert value == pytest.approx(1.0, rel=0.05)


def test_images_that_answer_nothing_finite_are_named_before_any_frame(caplog: pytest.LogCaptureFixture) -> None:
    net, seen = OfTiles(lambda tiles: tiles[:, 0]), []
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    images = IMAGES.clone()
    images[2, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"answers image 2 \(the first is 0\) with nan"):
        attribute(net, images, 0, grid=4, forwards=128)
    assert max(seen) == 1
    # Of an image without contrast a network that standardises says nothing.
    shown = attribute(
        OfTiles(lambda tiles: tiles[:, 0] / (tiles.std(1) > 1e-3).float()), IMAGES, 0, grid=4, forwards=64
    )
    assert not shown.baseline.isfinite().any()
    assert "3 of 3 images answer with NaN or infinite values where every part is at its baseline" in caplog.text


def test_images_lie_on_the_device_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from freqprune.attribution import images as module

    given, sizes = module.normalizer, []

    def watched(*args: Any) -> Any:
        prepare = given(*args)
        return lambda pixels: (sizes.append(len(pixels)), prepare(pixels))[1]

    expected = attribute(OfTiles(lambda tiles: tiles[:, 0]), IMAGES, 0, grid=4, forwards=64)
    monkeypatch.setattr(module, "normalizer", watched)
    found = attribute(OfTiles(lambda tiles: tiles[:, 0]), IMAGES, 0, grid=4, forwards=64)
    assert set(sizes) == {1}
    assert torch.equal(found.effects, expected.effects)


def test_what_is_found_can_be_used_in_a_graph_of_gradients() -> None:
    net = OfTiles(lambda tiles: tiles[:, 0])
    found = attribute(net, IMAGES, grid=4, forwards=64)
    assert found.target is not None
    nn.functional.cross_entropy(net(IMAGES), found.target).backward()
    assert net.scale.grad is not None
    found.whole.sub_(found.baseline)


def test_a_figure_draws_its_own_map_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found = attribute(OfTiles(lambda tiles: tiles[:, 0]), IMAGES, 0, grid=4, forwards=64)
    monkeypatch.setattr(type(found), "maps", property(lambda self: pytest.fail("of all images")))
    assert found.plot(1).axes
