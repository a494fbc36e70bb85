"""What filters do to classes, against networks that are linear behind them and against leaving filters out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from freqprune import Amount, Material, Recipe, Stimulus, cut
from freqprune.attribution import filters
from freqprune.attribution.effects import estimate
from freqprune.attribution.filters import FilterEffects, filter_effects
from freqprune.attribution.pictures import filters_by_classes
from freqprune.errors import InputError
from freqprune.networks.registry import build_model
from freqprune.pruning.criteria import scores
from freqprune.pruning.importance import Evidence
from freqprune.pruning.proof import masked_forward
from tests.attribution.test_attribution import IMAGES


class Twice(nn.Module):
    """One activation module used twice; linear behind the second convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.norm, self.relu, self.head = nn.BatchNorm2d(6), nn.ReLU(), nn.Linear(6, 4)
        nn.init.uniform_(self.norm.bias, 0.5, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.relu(self.norm(self.second(self.relu(self.first(x))))).mean((2, 3)))
        return found


@pytest.fixture
def net() -> nn.Module:
    return Twice().eval()


def test_the_effect_is_what_leaving_a_filter_out_takes_away(net: nn.Module) -> None:
    found = filter_effects(net, IMAGES, "second")
    with torch.no_grad():
        whole = net(IMAGES)
    for number in range(6):
        lost = whole - masked_forward(net, {"head": [number]}, IMAGES)
        torch.testing.assert_close(found.effects[:, number], lost.double(), rtol=1e-3, atol=1e-5)
    assert found.interactions.shape == (3, 6, 6)
    assert found.interactions.abs().max() < 1e-4


def test_effects_are_as_sure_as_half_of_the_frames_say() -> None:
    """An even number of filters together lie in bins of their own, which errors do not count."""

    class Curved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(3 * self.head(torch.relu(self.conv(x)).mean((2, 3))))

    model = Curved().eval()
    found = filter_effects(model, IMAGES[:1], "conv", forwards=96)
    design, answers, n_frames, _ = next(filters._recordings(model, IMAGES[:1], "conv", 96))
    expected = estimate(design, answers, n_frames)
    for one, other in zip((found.effects, found.standard_error, found.p_values), expected, strict=True):
        torch.testing.assert_close(one[0], other.T)
    assert found.standard_error.min() > 0
    assert not torch.allclose(found.standard_error[0], estimate(design, answers)[1].T, rtol=0.01)


def test_two_filters_that_work_together(net: nn.Module) -> None:
    """The product of filters 1 and 4 is added to all logits alike, at the largest of which pairs are read."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            one = self.conv(x).mean((2, 3))
            return (one[:, 1] * one[:, 4])[:, None] * torch.tensor([0.5, 1.0])

    torch.manual_seed(1)
    product = Product().eval()
    with torch.no_grad():
        nn.init.constant_(product.conv.bias, 1.0)
        expected = product(IMAGES).abs().amax(1)
    found = filter_effects(product, IMAGES, "conv", forwards=96)
    for image in range(len(IMAGES)):
        [(one, other, value)] = found.strongest_pairs(image, alpha=0.01)
        assert (one, other) == (1, 4)
        assert abs(value) == pytest.approx(float(expected[image]), rel=0.1)
    assert filter_effects(net, IMAGES, "second").strongest_pairs(0, alpha=1e-6) == []


def test_a_network_in_training_or_with_chance_in_it(net: nn.Module) -> None:
    found = filter_effects(net, IMAGES, "second")
    assert torch.equal(filter_effects(net.train(), IMAGES, "second").effects, found.effects)
    assert net.training

    class Draws(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(())

    with pytest.raises(InputError, match="differently from call to call"):
        filter_effects(Draws().eval(), IMAGES, "second")


def test_pixels_are_normalised_where_mean_and_std_are_given(net: nn.Module) -> None:
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    inputs = (IMAGES - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    found = filter_effects(net, IMAGES, "second", mean=mean, std=std)
    torch.testing.assert_close(found.effects, filter_effects(net, inputs, "second").effects, rtol=1e-5, atol=1e-7)
    with pytest.raises(InputError, match="mean and std come together"):
        filter_effects(net, IMAGES, "second", mean=mean)


def test_filters_of_the_first_of_two_layers(net: nn.Module) -> None:
    """Its activation module is used twice and only its first call is gated: a filter that nothing reads does
    nothing."""
    with torch.no_grad():
        net.second.weight[:, 2] = 0
    found = filter_effects(net, IMAGES, "first", forwards=64)
    assert found.effects[:, 2].abs().max() < 1e-6
    assert (found.effects[:, [0, 1, 3]].abs().amax(2) > 1e-4).all()


def test_the_criterion_is_how_far_the_logits_move(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled = [(IMAGES[:2], torch.zeros(2, dtype=torch.long)), (IMAGES[2:], torch.zeros(1, dtype=torch.long))]
    # Pairs are of no use to it, and of thousands of filters they take gigabytes.
    monkeypatch.setattr(filters, "find_interactions", lambda *_: pytest.fail("no pairs"))
    found = scores("effect", Evidence(net, labelled=labelled), ["second"])["second"]
    with torch.no_grad():
        whole = net(IMAGES)
    expected = torch.stack([
        (whole - masked_forward(net, {"head": [number]}, IMAGES)).square().sum(1).mean() for number in range(6)
    ])  # fmt: skip
    torch.testing.assert_close(found, expected.double(), rtol=1e-3, atol=1e-6)


def test_a_cut_keeps_what_moves_the_logits() -> None:
    dense = build_model({"name": "resnet8"}).eval()
    labels = torch.zeros(len(IMAGES), dtype=torch.long)
    material = Material(IMAGES, lambda pixels: pixels, [0.0] * 3, [1.0] * 3, labelled=(IMAGES, labels))
    done = cut(dense, material, Recipe(Amount(ratio=0.5, scope="layer"), criterion="effect"), Stimulus())
    layer = "layer3.0.conv1"
    moved = filter_effects(dense, IMAGES, layer).movement
    assert done.kept[layer].tolist() == sorted(moved.argsort(descending=True)[:32].tolist())


def test_agrees_with_leaving_out_one_by_one() -> None:
    torch.manual_seed(0)
    dense = build_model({"name": "resnet8"}).eval()
    found = filter_effects(dense, IMAGES, "layer2.0.conv1").movement
    with torch.no_grad():
        whole = dense(IMAGES)
        left_out = torch.stack([
            (whole - masked_forward(dense, {"layer2.0.conv2": [number]}, IMAGES)).square().sum(1).mean()
            for number in range(32)
        ])  # fmt: skip
    ranks = torch.stack([values.double().argsort().argsort().double() for values in (found, left_out)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9


def test_a_figure_of_filters_by_classes() -> None:
    effects = torch.tensor([[[0.0, 2.0], [3.0, 0.0], [0.0, 5.0]]])
    found = FilterEffects("conv", effects, effects, effects, torch.zeros(1, 3, 3), torch.ones(1, 3, 3))
    figure = found.plot(["cat", "dog"])
    axis, bar = figure.axes
    # Those of a class together, the largest first.
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1", "2", "0"]
    assert axis.get_images()[0].get_array().tolist() == [[3, 0], [0, 5], [0, 2]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["cat", "dog"]
    assert axis.get_title("left") == "conv"
    assert bar.get_ylabel() == "mean effect on the logit"
    assert found.movement.tolist() == [4, 9, 25]
    with pytest.raises(InputError, match="classes must name 2 classes, got 1"):
        found.plot(["cat"])


def test_a_figure_of_many_filters_and_classes_has_an_end() -> None:
    effects = torch.arange(3072.0)[:, None] - torch.arange(1000)
    figure = filters_by_classes(effects, [f"class {number}" for number in range(1000)])
    axis = figure.axes[0]
    assert figure.get_size_inches().max() <= 40
    # Filter 3071 has the largest effect on class 0, as all have on it.
    named = [label.get_text() for label in axis.get_yticklabels()]
    assert (named[0], len(named)) == ("3071", 237)
    assert [label.get_text() for label in axis.get_xticklabels()][:2] == ["class 0", "class 15"]


def test_filters_refuse(net: nn.Module) -> None:
    with pytest.raises(InputError, match="no convolution or linear layer 'third'"):
        filter_effects(net, IMAGES, "third")
    with pytest.raises(InputError, match="6 filters need an odd bin each: forwards must be at least 24, got 20"):
        filter_effects(net, IMAGES, "second", forwards=20)
    maps, seen = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), []
    maps.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with pytest.raises(InputError, match=r"the network must return logits, .*, got \(1, 4, 14, 14\)"):
        filter_effects(maps, IMAGES, "0")
    assert max(seen) == 1


def _prelu(x: Tensor) -> Tensor:
    return F.prelu(x, torch.tensor([0.1, 0.2, 0.3, 0.4]))


class Functional(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x)).mean((2, 3))


def test_gates_are_as_steep_as_asked_for() -> None:
    """Of gates that are open or closed and nothing between, the effect of a filter on its own cube is all of it."""
    net = Functional(lambda x: x**3).double().eval()
    with torch.no_grad():
        whole = net(IMAGES.double())
    found = filter_effects(net, IMAGES, "conv", steepness=1e9)
    torch.testing.assert_close(found.effects, torch.diag_embed(whole), rtol=1e-6, atol=1e-9)
    # Of ((1 + s) / 2)^3 with a sine s, (3 s + s^3) / 8 is odd, of which s itself has 15 / 16 of s / 2.
    sines = filter_effects(net, IMAGES, "conv").effects.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(sines, 15 / 16 * whole)


def test_frequencies_and_phases_follow_from_the_seed() -> None:
    net = Functional(lambda x: x**3).double().eval()
    one, same, other = (filter_effects(net, IMAGES, "conv", seed=seed).effects for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert (one - other).abs().max() > 1e-3 * one.abs().max()


@pytest.mark.parametrize(
    ("function", "said"),
    [(F.relu, False), (F.leaky_relu, False), (F.gelu, True), (torch.sigmoid, True), (F.relu6, True), (_prelu, False)],
)
def test_gates_before_a_function_of_the_network_are_told(
    function: Callable[[Tensor], Tensor], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    filter_effects(Functional(function).eval(), IMAGES[:1], "conv")
    assert ("gates act before it" in caplog.text) is said


def test_layers_that_run_more_than_once_are_told(caplog: pytest.LogCaptureFixture) -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    filter_effects(net, IMAGES[:1], "0")
    assert "0 runs 2 times in a forward: gates act on its first call" in caplog.text


def test_filters_that_are_gated_before_a_norm_are_told(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()  # fmt: skip
    filter_effects(net, torch.rand(1, 3, 16, 16), "0")
    assert "0: gates act on the layer itself (no activation of its own" in caplog.text
    assert "where a norm follows" in caplog.text


def test_pixels_are_checked_where_they_are_to_be_normalised() -> None:
    net = build_model({"name": "resnet8"}).eval()
    some = {"mean": [0.5] * 3, "std": [0.2] * 3}
    with pytest.raises(InputError, match="divide uint8 pixels by 255"):
        filter_effects(net, (255 * torch.rand(1, 3, 16, 16)).byte(), "conv1", **some)
    with pytest.raises(InputError, match=r"must hold pixels in \[0, 1\]"):
        filter_effects(net, torch.randn(1, 3, 16, 16), "conv1", **some)


def test_layers_whose_first_dimension_is_not_the_frames_are_refused() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.conv(x).flatten(2).permute(2, 0, 1)
            return self.fc2(torch.relu(self.fc1(tokens))).mean(0)  # type: ignore[no-any-return]

    with pytest.raises(InputError, match="the first dimension of what it answers does not count images"):
        filter_effects(Windows(), torch.rand(1, 3, 16, 16), "fc1")
    with pytest.raises(InputError, match="steepness must be at least 1"):
        filter_effects(Windows(), torch.rand(1, 3, 16, 16), "fc1", steepness=0)


def test_an_error_leaves_nothing_on_the_network(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while somebody holds the error, as a notebook does."""

    def broken(*_: object) -> None:
        raise InputError("scores are not finite")

    monkeypatch.setattr(filters, "estimate", broken)
    net.train()
    for run in (lambda: filter_effects(net, IMAGES, "second"), lambda: filters.filter_movement(net, IMAGES, "second")):
        with pytest.raises(InputError) as held:
            run()
        assert held.value is not None
        assert net.training
        assert not torch.is_inference_mode_enabled()
        assert not any(module._forward_hooks for module in net.modules())
