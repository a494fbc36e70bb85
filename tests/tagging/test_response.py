"""Measures of a response, against loops and known answers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks.registry import build_model
from freqprune.pruning.criteria import scores
from freqprune.pruning.importance import Evidence
from freqprune.tagging.controls import static
from freqprune.tagging.measurement import tag
from freqprune.tagging.response import LayerResponse, TagResponse
from freqprune.tagging.sites import find_sites
from freqprune.tagging.spectrum import corrected_amplitude, power_ratio, z_score
from freqprune.tagging.stimulus import Stimulus
from tests.tagging.test_measurement import WHITE, Affine

SPECTRUM = torch.from_numpy(np.random.default_rng(0).uniform(1, 2, (3, 121)))


def test_power_ratio_is_that_of_mne() -> None:
    # mne.org, "Frequency-tagging: Basic analysis of an SSVEP": n neighbours a side after skipping some, mean power as
    # noise.
    kernel = np.concatenate([np.ones(3), np.zeros(2 * 1 + 1), np.ones(3)]) / 6
    expected = [[row[b] / np.convolve(row, kernel, mode="same")[b] for b in (12, 40)] for row in SPECTRUM.numpy()]
    np.testing.assert_allclose(power_ratio(SPECTRUM, [12, 40], n_neighbours=3, skip=1), expected, rtol=1e-12)
    assert power_ratio(torch.zeros(1, 121), [12]).isnan().all()


def test_predicted_responses_are_no_noise() -> None:
    clean = power_ratio(SPECTRUM, [12], n_neighbours=3, avoid={15})
    loud = SPECTRUM.clone()
    loud[:, 15] = 1e6
    torch.testing.assert_close(power_ratio(loud, [12], n_neighbours=3, avoid={15}), clean)


def test_z_and_corrected_amplitude_by_a_loop() -> None:
    for i, b in enumerate((12, 40)):
        noise = SPECTRUM[:, [b - 2, b - 1, b + 1, b + 2]].numpy()
        np.testing.assert_allclose(
            z_score(SPECTRUM, [12, 40])[:, i],
            (SPECTRUM[:, b].numpy() - noise.mean(1)) / noise.std(1, ddof=1),
            rtol=1e-12,
        )
        np.testing.assert_allclose(
            corrected_amplitude(SPECTRUM, [12, 40])[:, i], SPECTRUM[:, b].numpy() - noise.mean(1), rtol=1e-12
        )


@pytest.mark.parametrize("settings", [{"n_neighbours": 0}, {"skip": -1}])
def test_power_ratio_refuses(settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match="n_neighbours must be at least 1"):
        power_ratio(SPECTRUM, [12], **settings)
    with pytest.raises(InputError, match="bin 12 has no noise bins"):
        power_ratio(SPECTRUM, [12], 1, avoid={11, 13})


def test_part_preference_and_integration_of_known_filters() -> None:
    response = tag(Affine(nn.ReLU()), WHITE, noise_std=0.0)
    assert response.part_preference("conv")[:3].tolist() == pytest.approx([1, -1, 0], abs=1e-3)
    assert response.part_preference("conv")[3].isnan()
    integration = response.integration("conv")
    assert integration[:2].tolist() == pytest.approx([0, 0], abs=1e-12)
    # relu(s1 + s2): f1 = f2 = 1/2, f1 ± f2 = 8 / (3 pi^2) and the higher orders beside them.
    assert integration[2] > 2 * 8 / (3 * math.pi**2)
    assert integration[3].isnan()
    # Over the sum at both fundamentals.
    amplitude = response.layers["conv"].amplitude[2]
    mixed = amplitude[[c.bin for c in response.components("intermodulation")]].sum()
    assert integration[2] == pytest.approx(float(mixed / (amplitude[12] + amplitude[15])))


def test_filters_that_answer_noise_alone_have_z_scores(images: Tensor) -> None:
    """As under a control without tags, which is to show nothing rather than NaN."""
    response = tag(build_model({"name": "resnet8"}), images[:2], static(Stimulus()))
    undefined = response.snr("layer2.0.conv1").isnan()
    assert not undefined.all()
    assert torch.equal(response.z_score("layer2.0.conv1").isnan(), undefined)
    assert torch.equal(response.power_ratio("layer2.0.conv1").isnan(), undefined)


def test_any_two_parts_can_be_compared() -> None:
    four = Stimulus((8.5, 15.5, 19.0, 20.5), parts="quadrants", max_order=2)
    amplitude = torch.zeros(1, 121, dtype=torch.float64)
    amplitude[0, [17, 31, 38, 41]] = torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64)
    site = find_sites(Affine(), WHITE)[0]
    response = TagResponse(four, 0.0, 1, "amplitude", "mean", torch.float64, {"conv": LayerResponse(site, amplitude)})
    assert response.part_preference("conv", 2, 3).tolist() == [0.5]
    assert response.part_preference("conv", 3, 2).tolist() == [-0.5]


def test_harmonics_of_one_part_are_no_integration() -> None:
    net = Affine(nn.ReLU())
    with torch.no_grad():
        net.conv.bias.fill_(-0.75)
    response = tag(net, WHITE, noise_std=0.0)
    # Halves of sines of 0.25: their second harmonic has 2 / (3 pi) of that.
    for part, harmonic in enumerate(("2f1", "2f2")):
        amplitude = response.amplitude("conv", [harmonic])[part].item()
        assert amplitude == pytest.approx(0.25 * 2 / (3 * math.pi), rel=0.05)
    assert response.integration("conv")[:2].tolist() == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize(("precision", "rounding"), [(torch.float64, 1e-16), (torch.float32, 1e-8)])
def test_rounding_alone_prefers_no_part(precision: torch.dtype, rounding: float) -> None:
    amplitude = torch.zeros(2, 121, dtype=torch.float64)
    amplitude[:, 0] = 1.0
    amplitude[:, 12] = torch.tensor([3 * rounding, 0.03])
    amplitude[:, 15] = torch.tensor([rounding, 0.01])
    site = find_sites(Affine(), WHITE, ["conv"], "convolution")[0]
    layers = {"conv": LayerResponse(site, amplitude)}
    preference = TagResponse(Stimulus(), 0.0, 1, "amplitude", "mean", precision, layers).part_preference("conv")
    assert preference.tolist() == pytest.approx([math.nan, 0.5], nan_ok=True)


def test_measures_of_a_response_leave_predicted_bins_out() -> None:
    response = tag(Affine(), WHITE.expand(20, -1, -1, -1))
    power = response.layers["conv"].noisy_power
    assert power is not None
    predicted = {c.bin for c in response.components("all")}

    def around(first: int, last: int) -> list[int]:
        return [b for b in range(121) if first <= abs(b - 12) <= last and b not in predicted]

    for skip in (0, 3):
        expected = power[0, 12] / power[0, around(skip + 1, skip + 5)].mean()
        torch.testing.assert_close(response.power_ratio("conv", ["f1"], n_neighbours=5, skip=skip)[0, 0], expected)
    noisy = response.layers["conv"].noisy_amplitude
    assert noisy is not None
    for settings, last in (({}, 10), ({"n_neighbours": 1}, 1)):
        noise = noisy[0, around(1, last)].numpy()
        z = (noisy[0, 12].item() - noise.mean()) / noise.std(ddof=1)
        assert response.z_score("conv", ["f1"], **settings)[0, 0].item() == pytest.approx(z, rel=1e-9)
        assert z > 50
    assert response.corrected_amplitude("conv")[0].item() == pytest.approx(0.25, rel=0.02)
    quiet = tag(Affine(), WHITE, noise_std=0.0)
    for measure in (quiet.z_score, quiet.corrected_amplitude, quiet.power_ratio):
        with pytest.raises(InputError, match="noise_std above 0"):
            measure("conv")


def test_without_noise_there_is_no_snr_also_beside_responses_of_higher_orders() -> None:
    four = Stimulus(tag_freqs=(8.5, 15.5, 19.0, 20.5), parts="quadrants", max_order=2)
    quiet = tag(Affine(nn.ReLU()), WHITE, four, noise_std=0.0)
    # 2 f3 - f1 - f4, of the fourth order, lies in a noise bin of f1.
    assert quiet.layers["conv"].amplitude[2, 18] > 1e-4
    assert quiet.snr("conv").isnan().all()
    assert quiet.snr_spectrum("conv").isnan().all()
    assert "" not in quiet.why_no_snr("conv")


def test_a_spectrum_too_short_for_bins_between_its_edges_has_the_snr_of_its_components() -> None:
    short = Stimulus(tag_freqs=(1, 4), frame_rate=10, n_frames=10, max_order=1)
    response = tag(Affine(), WHITE, short, noise_std=0.01)
    spectrum = response.snr_spectrum("conv")
    bins = [component.bin for component in response.components("all")]
    torch.testing.assert_close(spectrum[:, bins], response.snr("conv", "all").to(spectrum), equal_nan=True)
    assert spectrum[0].isfinite().nonzero().flatten().tolist() == sorted(bins)


def test_there_is_no_integration_where_no_intermodulation_is_read() -> None:
    response = tag(Affine(nn.ReLU()), WHITE, Stimulus(max_order=1))
    assert response.integration("conv").isnan().all()
    with pytest.raises(InputError, match="reads intermodulation components, and the stimulus has none"):
        scores("integration", Evidence(Affine(), response), ["conv"])


def test_map_amplitude_does_not_cancel() -> None:
    # Two positions in antiphase: their mean does not answer, each of them does.
    net = nn.Conv2d(1, 1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(net.weight)

    class Antiphase(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x[..., :1, :1]
            return self.conv(torch.cat([x, 1.5 - x], dim=-1))

    images = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    mean = tag(Antiphase(), images, noise_std=0.0, where="convolution").amplitude("conv", ["f1"])
    each = tag(Antiphase(), images, noise_std=0.0, where="convolution", spatial="map").amplitude("conv", ["f1"])
    assert mean.item() < 1e-14
    assert each.item() == pytest.approx(0.25, abs=1e-14)


def test_a_filter_that_answers_at_the_first_bin_only_is_not_dead() -> None:
    stimulus, amplitude = Stimulus(), torch.zeros(2, 121, dtype=torch.float64)
    amplitude[:, 0] = 1.0
    amplitude[1, 1] = 0.5
    site = find_sites(Affine(nn.ReLU()), WHITE, ["conv"])[0]
    response = TagResponse(
        stimulus, 0.0, 1, "amplitude", "mean", torch.float64, {"conv": LayerResponse(site, amplitude)}
    )
    assert response.why_no_snr("conv") == ["dead", "noise-free"]


def test_images_that_leave_a_filter_silent_are_not_counted() -> None:
    """Whether one of many black images more or less is shown says nothing of a filter."""
    net = Affine(nn.ReLU())
    black = torch.zeros(7, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        net.conv.bias.sub_(0.1)
    alone = tag(net, WHITE, seed=3).p_values("conv", "all")
    many = tag(net, torch.cat([WHITE, black]), seed=3).p_values("conv", "all")
    torch.testing.assert_close(many[:2], alone[:2], rtol=1e-3, atol=1e-6)


def test_rounding_alone_is_not_significant() -> None:
    net = Affine()
    with torch.no_grad():
        net.conv.weight[3] = 0
        net.conv.bias[3] = 0.7
    response = tag(net, WHITE.expand(4, -1, -1, -1))
    assert (response.p_values("conv", "all")[3] == 1).all()
    assert (response.p_values("conv")[2] < 1e-6).all()
    assert response.z_score("conv", "all")[3].isnan().all()
    assert response.power_ratio("conv", "all")[3].isnan().all()
    assert not response.z_score("conv", "fundamentals")[2].isnan().any()


@pytest.mark.parametrize("criterion", ["snr", "snr_db", "z"])
def test_one_filter_that_answers_without_noise_is_not_the_least(criterion: str) -> None:
    response = tag(Affine(), WHITE.expand(4, -1, -1, -1))
    evidence = Evidence(Affine(), response, "fundamentals")
    assert scores(criterion, evidence, ["conv"])["conv"][0] > 0
    noisy = response.layers["conv"].noisy_amplitude
    assert noisy is not None
    others = [b for b in range(1, noisy.shape[-1]) if b not in {c.bin for c in response.components("all")}]
    noisy[0, others] = 0
    assert scores(criterion, evidence, ["conv"])["conv"].argmax() == 0


def test_a_filter_that_hardly_leaves_its_mean_has_a_score(caplog: pytest.LogCaptureFixture) -> None:
    """Its noise is less than rounding may leave beside its mean; the tags themselves are above that."""

    class Still(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 1)
            with torch.no_grad():
                self.conv.weight[0] = 2e-5
                assert self.conv.bias is not None
                self.conv.bias[0] = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    response = tag(Still().eval(), WHITE.expand(4, -1, -1, -1))
    assert response.why_no_snr("conv") == ["noise-free", "", "", ""]
    # Nor are the other ratios to that noise any.
    for ratios in (response.z_score("conv"), response.power_ratio("conv")):
        assert ratios[0].isnan().all()
        assert ratios[1:].isfinite().all()
    evidence = Evidence(Still(), response, "fundamentals")
    found = scores("snr", evidence, ["conv"])["conv"]
    least = response.amplitude("conv")[0] / response.rounding("conv")[0]
    assert found[0] == pytest.approx(float(least.mean()))
    assert 1 < found[0] < found[1:].min()
    # One of four is no reason to warn.
    assert "rounding error only" not in caplog.text
