"""The whole measurement, against nets whose answer is known on paper and against the plain way of running it."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks.answers import check_answers
from freqprune.networks.registry import build_model
from freqprune.tagging import measurement, recording
from freqprune.tagging.loss import TagLoss
from freqprune.tagging.measurement import tag
from freqprune.tagging.passes import Pass, drawn
from freqprune.tagging.recording import Recorder, map_mean
from freqprune.tagging.response import TagResponse
from freqprune.tagging.sites import find_sites
from freqprune.tagging.spectrum import amplitude_spectrum
from freqprune.tagging.stimulus import Stimulus


class Affine(nn.Module):
    """Filter 0 sums the left half, filter 1 the right half, filter 2 both, filter 3 nothing."""

    def __init__(self, activation: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 16, dtype=dtype)
        self.act = activation or nn.Identity()
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.bias.copy_(torch.tensor([0.0, 0.0, -0.75, 0.0]))
            self.conv.weight[0, 0, :, :8] = 1 / 128
            self.conv.weight[1, 0, :, 8:] = 1 / 128
            self.conv.weight[2, 0] = 1 / 256

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


WHITE = torch.ones(1, 1, 16, 16, dtype=torch.float64)


def test_an_affine_unit_answers_with_the_fundamentals_of_its_parts_only() -> None:
    response = tag(Affine(), WHITE, noise_std=0.0)
    amplitude = response.layers["conv"].amplitude
    expected = torch.zeros(4, 121, dtype=torch.float64)
    # Scale has mean 0.75 and amplitude depth / 2 = 0.25.
    expected[0, [0, 12]] = torch.tensor([0.75, 0.25], dtype=torch.float64)
    expected[1, [0, 15]] = torch.tensor([0.75, 0.25], dtype=torch.float64)
    expected[2, [12, 15]] = 0.125
    torch.testing.assert_close(amplitude, expected, rtol=0, atol=1e-14)


def test_a_rectifier_brings_intermodulation() -> None:
    response = tag(Affine(nn.ReLU()), WHITE, noise_std=0.0)
    # Filter 2 is relu(0.125 (s1 + s2)): f1 = f2 = 1/2, f1 ± f2 = 8 / (3 pi^2) of the amplitude.
    names = [c.name for c in response.components("all")]
    amplitude = dict(zip(names, response.amplitude("conv", "all")[2].tolist(), strict=True))
    assert amplitude["f1"] == pytest.approx(0.0625, abs=1e-4)
    assert amplitude["f1+f2"] == pytest.approx(0.125 * 8 / (3 * math.pi**2), abs=1e-3)
    assert response.amplitude("conv", "intermodulation")[0].max() < 1e-14


@pytest.mark.parametrize(("where", "gain"), [("convolution", 1.0), ("norm", 2 / math.sqrt(1 + 1e-5))])
def test_an_affine_layer_read_before_its_rectifier_has_the_fundamentals_only(where: str, gain: float) -> None:
    net = nn.Sequential(Affine().conv, nn.BatchNorm2d(4, dtype=torch.float64), nn.ReLU())
    nn.init.constant_(net[1].weight, 2.0)
    response = tag(net, WHITE, where=where, noise_std=0.0)
    expected = torch.tensor([0.125 * gain] * 2, dtype=torch.float64)
    torch.testing.assert_close(response.amplitude("0")[2], expected, rtol=0, atol=1e-14)
    assert response.amplitude("0", "intermodulation").max() < 1e-14


def test_equals_the_plain_way(images: Tensor) -> None:
    """All 240 frames one by one, whole maps kept, one image at a time."""
    net = build_model({"name": "resnet8"}).eval()
    stimulus = Stimulus()
    response = tag(net, images, noise_std=0.0, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    sites = find_sites(net, images[:1])
    shift, scale = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    total = {site.layer: 0.0 for site in sites}
    with Recorder(net, sites, lambda maps, dim: maps) as recorder:
        for image in images:
            frames = stimulus.frames(image[None])[0]
            maps = [recorder((frame[None] - shift) / scale) for frame in frames]
            for site in sites:
                course = torch.cat([map_mean(m[site.layer], 1) for m in maps]).double()
                total[site.layer] = total[site.layer] + amplitude_spectrum(course.T) / len(images)
    for layer, expected in total.items():
        # float32 activations: rounding of 1e-7 of their size.
        torch.testing.assert_close(response.layers[layer].amplitude, expected, rtol=1e-4, atol=2e-6)


def test_noise_gives_the_snr_of_paper() -> None:
    # Filter 0 averages 128 pixels: noise sd is 0.02 / sqrt(128); a tone of 0.25.
    response = tag(Affine(), WHITE.expand(200, -1, -1, -1), noise_std=0.02)
    floor = 0.02 / math.sqrt(128) * math.sqrt(math.pi / 240)
    # Averaged amplitudes: the baseline is the mean floor; five standard errors of 200 images.
    assert response.snr("conv", ["f1"])[0].item() == pytest.approx(0.25 / floor, rel=0.1)
    assert response.snr("conv", ["f2"])[0].item() == pytest.approx(1.0, abs=0.25)
    assert response.p_values("conv", ["f1"])[0].item() < 1e-10
    assert response.p_values("conv", ["f2"])[0].item() > 1e-4


def test_noise_free_and_dead_are_named() -> None:
    quiet = tag(Affine(), WHITE, noise_std=0.0)
    assert quiet.snr("conv").isnan().all()
    assert quiet.why_no_snr("conv") == ["noise-free", "noise-free", "noise-free", "dead"]
    with pytest.raises(InputError, match="no significance"):
        quiet.p_values("conv")
    noisy = tag(Affine(), WHITE, noise_std=0.02)
    assert noisy.why_no_snr("conv") == ["", "", "", "dead"]
    assert noisy.snr("conv")[3].isnan().all()
    assert noisy.p_values("conv")[3].eq(1).all()


@pytest.mark.parametrize("average", ["amplitude", "power", "complex", "snr"])
def test_results_do_not_depend_on_the_batches(average: str, images: Tensor) -> None:
    net, images = build_model({"name": "resnet8", "stage_widths": [4, 8, 8]}).double(), images[:2]
    one = tag(net, images.double(), average=average, frames_a_batch=37)
    other = tag(net, images.double(), average=average, frames_a_batch=2000)
    for layer in one.layers:
        torch.testing.assert_close(one.layers[layer].amplitude, other.layers[layer].amplitude, rtol=0, atol=1e-12)
        torch.testing.assert_close(one.snr(layer, "all"), other.snr(layer, "all"), rtol=1e-7, atol=0, equal_nan=True)


def test_every_image_counts_once_where_batches_end_between_those_of_the_other_pass() -> None:
    # 480 frames: nine images of 49 frames that differ, two of all 240.
    images = WHITE * torch.linspace(0.1, 1, 10, dtype=torch.float64).view(-1, 1, 1, 1)
    response = tag(Affine(), images, noise_std=1e-6, frames_a_batch=480)
    noisy = response.layers["conv"].noisy_amplitude
    assert noisy is not None
    assert noisy[0, 12].item() == pytest.approx(0.25 * 0.55, rel=1e-4)


def test_averages_differ_as_they_should() -> None:
    images = torch.cat([WHITE, WHITE * 0.5])
    found = {
        a: tag(Affine(), images, average=a, noise_std=1e-3).layers["conv"].noisy_amplitude[0, 12].item()
        for a in ("amplitude", "power", "complex")
    }
    assert found["amplitude"] == pytest.approx((0.25 + 0.125) / 2, rel=1e-2)
    assert found["power"] == pytest.approx(math.sqrt((0.25**2 + 0.125**2) / 2), rel=1e-2)
    assert found["complex"] == pytest.approx((0.25 + 0.125) / 2, rel=1e-2)


def test_complex_amplitudes_of_opposite_phase_cancel() -> None:
    gray, pair = Stimulus(mode="contrast", pivot="gray"), torch.cat([WHITE, WHITE * 0])
    amplitude, complex_ = (
        tag(Affine(), pair, gray, average=a, noise_std=1e-3).layers["conv"].noisy_amplitude[0, 12].item()
        for a in ("amplitude", "complex")
    )
    assert amplitude == pytest.approx(0.125, rel=1e-2)
    assert complex_ < 1e-3


def test_the_average_of_snr_is_that_of_the_images() -> None:
    three = WHITE * torch.tensor([1.0, 0.7, 0.4]).view(-1, 1, 1, 1)
    each = [tag(Affine(), three[n : n + 1], numbers=[n]).snr("conv", ["f1", "f2"])[:3] for n in range(3)]
    together = tag(Affine(), three, average="snr").snr("conv", ["f1", "f2"])[:3]
    torch.testing.assert_close(together, torch.stack(each).mean(0))


def test_noise_is_in_units_of_pixels(images: Tensor) -> None:
    """A network that normalises by its first layer hears the same noise."""
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    folded = copy.deepcopy(net)
    with torch.no_grad():
        folded[0].bias -= (net[0].weight * (mean / std).view(1, 3, 1, 1)).sum((1, 2, 3))
        folded[0].weight /= std.view(1, 3, 1, 1)
    given = tag(net, images[:2], mean=mean.tolist(), std=std.tolist()).snr("0")
    torch.testing.assert_close(given, tag(folded, images[:2]).snr("0"), rtol=1e-4, atol=0)


def test_the_same_seed_gives_the_same_bits(images: Tensor) -> None:
    net = build_model({"name": "resnet8"})
    a, b, c = (tag(net, images[:2], seed=s).snr("conv1") for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_modes_and_layers(images: Tensor) -> None:
    net = build_model({"name": "resnet8"}).train()
    response = tag(net, images[:1], layers="layer2*", noise_std=0.0)
    assert list(response.layers) == ["layer2.0.conv1", "layer2.0.conv2"]
    assert all(m.training for m in net.modules())
    assert response.snr_spectrum("layer2.0.conv1").shape == (32, 121)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_std": -0.1}, r"noise_std must lie in \[0, 1\]"),
        ({"noise_std": math.nan}, "noise_std must lie"),
        ({"noise_std": 5.0}, "noise_std must lie"),
        ({"average": "mean"}, "average must be one of"),
        ({"layers": "block*"}, "matches none of"),
        ({"where": "after"}, "where must be one of"),
        ({"mean": (0.5,), "std": (0.2,)}, "mean must hold 3 values, one a channel"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.2,)}, "std must hold 3 values, one a channel"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean and std come together"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.0, 1.0, 1.0)}, "std must be positive"),
        ({"frames_a_batch": 0}, "frames_a_batch must be at least 1"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str, images: Tensor) -> None:
    with pytest.raises(InputError, match=message):
        tag(build_model({"name": "resnet8"}), images, **settings)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_named(images: Tensor) -> None:
    net = build_model({"name": "resnet8"})
    with torch.no_grad():
        net.layer2[0].conv1.weight[0] = torch.nan
    with pytest.raises(InputError, match=r"layer 'layer2.0.conv1' answers with NaN"):
        tag(net, images)


def test_no_image_has_the_noise_of_another_one_under_another_seed() -> None:
    seen = {
        tag(Affine(), WHITE, Stimulus(max_order=1), seed=seed, numbers=[number]).snr("conv")[0, 0].item()
        for seed in range(3)
        for number in range(3)
    }
    assert len(seen) == 9


@pytest.mark.parametrize("size", [9, 30])
def test_noise_does_not_depend_on_the_batches_for_any_image_size(size: int) -> None:
    net = nn.Conv2d(3, 2, 3, dtype=torch.float64)
    net = nn.Sequential(net)
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    one, other = tag(net, images, frames_a_batch=17), tag(net, images, frames_a_batch=240)
    torch.testing.assert_close(one.snr("0"), other.snr("0"), rtol=1e-9, atol=0)


def test_an_image_that_leaves_a_filter_silent_leaves_the_average_to_the_others() -> None:
    lit = WHITE.expand(3, -1, -1, -1)
    relu = Affine(nn.ReLU())
    with torch.no_grad():
        relu.conv.bias.fill_(-0.1)
    images = torch.cat([lit, torch.zeros_like(WHITE)])
    mixed, alone = tag(relu, images, average="snr"), tag(relu, lit, average="snr")
    torch.testing.assert_close(mixed.snr("conv")[:2, 0], alone.snr("conv")[:2, 0])
    assert mixed.snr("conv")[3].isnan().all()


def test_a_silent_position_changes_neither_snr_nor_significance() -> None:
    """The mean over two positions of which one is silent is half of the other: the same ratios as position by
    position."""
    net = nn.Sequential(nn.Conv2d(1, 1, 16, stride=16, dtype=torch.float64), nn.ReLU())
    nn.init.constant_(net[0].weight, 1 / 256)
    nn.init.constant_(net[0].bias, -0.1)
    images = torch.cat([WHITE, torch.zeros_like(WHITE)], dim=3).expand(6, -1, -1, -1)
    each, mean = (tag(net, images, average="snr", spatial=spatial) for spatial in ("map", "mean"))
    assert mean.snr("0", "all").isfinite().all()
    torch.testing.assert_close(each.snr("0", "all"), mean.snr("0", "all"), rtol=1e-9, atol=0)
    torch.testing.assert_close(each.p_values("0", "all"), mean.p_values("0", "all"), rtol=1e-9, atol=1e-300)


def test_a_filter_that_is_all_but_dead_is_called_so() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with torch.no_grad():
        net[1].weight[2] = 1e-9
        net[1].bias.fill_(1.0)
    response = tag(net, torch.rand(3, 3, 16, 16))
    assert response.why_no_snr("0") == ["", "", "dead", ""]


@pytest.mark.parametrize(("half", "agreement"), [("float16", 0.995), ("bfloat16", 0.97)])
def test_half_precision_keeps_the_ranks(half: str, agreement: float) -> None:
    torch.manual_seed(0)
    net, images = build_model({"name": "resnet8"}), torch.rand(2, 3, 32, 32)
    full, seen = tag(net, images), set()
    handle = net.conv1.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
    fast = tag(net, images, half=half)
    handle.remove()
    assert getattr(torch, half) in seen
    assert net.conv1.weight.dtype == torch.float32
    for layer in full.layers:
        for value in (TagResponse.amplitude, TagResponse.snr):
            ranks = spearmanr(value(full, layer).sum(-1).nan_to_num(0), value(fast, layer).sum(-1).nan_to_num(0))
            assert ranks.statistic > agreement, (layer, value)


class Viewed(nn.Module):
    """Takes a view of maps of more than one pixel, as many networks of two decades do."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear, self.flat = nn.Conv2d(3, 4, 3), nn.Linear(4 * 14 * 14, 5), flat

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.linear(torch.flatten(x, 1) if self.flat else x.view(len(x), -1))  # type: ignore[no-any-return]


def test_networks_that_take_views_are_tagged(images: Tensor) -> None:
    found, expected = (tag(Viewed(flat), images, layers=["conv", "linear"]) for flat in (False, True))
    for layer in ("conv", "linear"):
        torch.testing.assert_close(found.layers[layer].amplitude, expected.layers[layer].amplitude)
    loss = TagLoss(silence=1.0, n_images=2, every_n_steps=1)
    assert loss(Viewed(), images).isfinite()
    with pytest.raises(InputError, match=r"write torch\.flatten\(x, 1\) or x\.reshape in the place of x\.view"):
        check_answers(Viewed(), images.to(memory_format=torch.channels_last))


class Drawing(nn.Module):
    """Draws in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(self.conv(x), 0.5)


class InPlace(nn.Module):
    """Normalises its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return self.conv(x).mean((2, 3))  # type: ignore[no-any-return]


def test_chance_in_a_forward_is_told(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    tag(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)), images, layers=["1"])
    tag(InPlace(), images)
    assert not caplog.text
    tag(nn.Sequential(Drawing(), nn.ReLU()), images, layers=["0"])
    assert caplog.text.count("1 layers (0 first) answer the same image differently from call to call") == 1
    tag(nn.Sequential(Drawing(), nn.ReLU()), images, layers=["0"])
    assert caplog.text.count("answer the same image differently") == 1


def test_trying_twice_leaves_the_random_numbers(images: Tensor) -> None:
    net, x = Drawing(), images[:1]
    recorder = Recorder(net, find_sites(net, x, ["conv"], "convolution"))
    with recorder:
        state = torch.get_rng_state()
        recorder.warn(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_norms_of_the_batch_are_told(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    tag(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), images)
    assert "1 normalises by its batch in eval mode too (track_running_stats=False)" in caplog.text


def test_a_forward_that_changes_its_input_is_refused_where_others_run_on_it(images: Tensor) -> None:
    before = images.clone()
    with pytest.raises(InputError, match=r"InPlace changes the images that it is given.* x = x - mean"):
        check_answers(InPlace(), images)
    assert torch.equal(images, before)


def test_half_precision_of_doubles_is_told(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3)).double()
    found, expected = (tag(net, images, half=half).layers["0"].amplitude for half in ("bfloat16", None))
    assert "half = bfloat16 has no effect on a network of float64" in caplog.text
    assert torch.equal(found, expected)


def test_positions_of_all_layers_are_read_in_groups_that_fit(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    net = build_model({"name": "resnet8"}).eval()
    expected = tag(net, images, spatial="map", layers="layer*.conv1")
    held: list[int] = []
    given = Pass._spectra

    def watched(self: Any, course: Tensor) -> Tensor:
        held.append(course.nbytes)
        return given(self, course)

    called = Recorder.__call__

    def read(self: Recorder, frames: Tensor) -> dict[str, Tensor]:
        found = called(self, frames)
        held.append(sum(one.nbytes for one in found.values()) * 240 // len(frames))
        return found

    monkeypatch.setattr(Pass, "_spectra", watched)
    monkeypatch.setattr(Recorder, "__call__", read)
    # Of 16 x 16 pixels: 16 * 256, 32 * 64 and 64 * 16 numbers a frame, 4 bytes each, of 240 frames.
    monkeypatch.setattr(measurement, "KEPT", 4 * 240 * 16 * 256)
    monkeypatch.setattr(measurement, "free_memory", lambda: None)
    found = tag(net, images, spatial="map", layers="layer*.conv1")
    # The first three calls look at all layers of one frame.
    assert sorted(held)[-4] <= measurement.KEPT
    for layer in expected.layers:
        torch.testing.assert_close(found.amplitude(layer), expected.amplitude(layer), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found.snr(layer), expected.snr(layer), rtol=1e-6, atol=1e-9, equal_nan=True)


def test_convolutions_are_folded_once(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    folded: list[int] = []
    given = recording.fused
    monkeypatch.setattr(recording, "fused", lambda *args: folded.append(1) or given(*args))
    for n_images in (1, 4):
        folded.clear()
        tag(build_model({"name": "resnet8"}), images[:n_images], noise_std=0, frames_a_batch=49)
        # To look what is there, and to measure.
        assert len(folded) == 2


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.relu(self.conv(x), inplace=True).mean((2, 3))


def test_a_response_holds_nothing_of_the_network_that_it_was_read_of(images: Tensor) -> None:
    response = tag(Functional(), images)
    assert response.layers["conv"].site.then is not None
    again = pickle.loads(pickle.dumps(response))
    assert torch.equal(again.amplitude("conv"), response.amplitude("conv"))
    assert not any(isinstance(one, Tensor) for one in response.layers["conv"].site.then.args[1])  # type: ignore[attr-defined]


def test_layers_that_run_twice_are_told_once(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    conv = nn.Conv2d(3, 3, 3)
    for _ in range(2):
        tag(nn.Sequential(conv, nn.ReLU(), conv, nn.ReLU()), images)
    assert caplog.text.count("0: run more than once in a forward") == 1


def test_noise_is_drawn_image_by_image_whatever_the_threads() -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(5)]

    shape = (3, 17, 18)
    expected = torch.stack([torch.stack([torch.randn(shape, generator=g) for _ in range(4)]) for g in generators()])
    before = torch.get_num_threads()
    for threads in (1, 4):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(drawn(generators(), (4, *shape)), expected)
            with torch.inference_mode():
                assert torch.equal(drawn(generators(), (4, *shape)), expected)
        finally:
            torch.set_num_threads(before)
