"""Controls, and the torus reference against the time course."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from freqprune.errors import InputError
from freqprune.networks.registry import build_model
from freqprune.tagging.controls import shuffled, static, swapped, torus, untrained
from freqprune.tagging.measurement import tag
from freqprune.tagging.stimulus import Stimulus
from tests.tagging.test_measurement import WHITE, Affine


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**2 + 0.3 * x**3


@pytest.mark.parametrize(("activation", "tolerance"), [(Square(), 1e-14), (nn.ReLU(), 4e-3), (nn.Softplus(), 1e-7)])
def test_time_course_agrees_with_the_torus(activation: nn.Module, tolerance: float) -> None:
    # A polynomial has no high orders, so the two agree to rounding; a rectifier has them, and they fold onto the bins
    # of the recording.
    net, stimulus = nn.Sequential(Affine(), activation), Stimulus()
    response = tag(net, WHITE, stimulus, layers="1", noise_std=0.0)
    reference = torus(net, WHITE, stimulus, n_phases=128, layers="1")["1"]
    for component in response.components("all"):
        n, m = component.coefficients
        pair = (n, m) if n > 0 or (n == 0 and m > 0) else (-n, -m)
        torch.testing.assert_close(
            response.amplitude("1", [component.name])[:, 0], reference[pair], rtol=0, atol=tolerance
        )


def test_the_torus_of_an_affine_layer_is_the_mean_of_its_images() -> None:
    images = torch.cat([WHITE, WHITE * 0.5])
    found = torus(Affine(nn.ReLU()), images, Stimulus(), n_phases=10, where="convolution")["conv"]
    # A lit half has the amplitude depth / 2 = 0.25, the mean light is 0.75; filter 2 averages both halves.
    expected = {pair: torch.zeros(4, dtype=torch.float64) for pair in found}
    expected[1, 0] = 0.75 * torch.tensor([0.25, 0, 0.125, 0], dtype=torch.float64)
    expected[0, 1] = 0.75 * torch.tensor([0, 0.25, 0.125, 0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_swapped_tags_follow_their_part() -> None:
    stimulus = swapped(Stimulus())
    assert stimulus.tag_freqs == (7.5, 6.0)
    assert next(one.freq for one in stimulus.components if one.name == "f1") == 7.5
    found = tag(Affine(), WHITE, stimulus, noise_std=0.0).layers["conv"].amplitude[0]
    assert found[15].item() == pytest.approx(0.25)
    assert found[12].item() < 1e-14


def test_shuffled_frames_leave_no_tag() -> None:
    stimulus = shuffled(Stimulus())
    torch.testing.assert_close(stimulus.scale.sort().values, Stimulus().scale.sort().values)
    images = WHITE.expand(40, -1, -1, -1) * torch.linspace(0.5, 1, 40).view(-1, 1, 1, 1)
    found = tag(Affine(), images, stimulus, noise_std=0.0).layers["conv"].amplitude
    plain = tag(Affine(), images, Stimulus(), noise_std=0.0).layers["conv"].amplitude
    assert found[0, 12] < 0.2 * plain[0, 12]
    torch.testing.assert_close(found[:, 0], plain[:, 0])


def test_shuffled_frames_are_those_of_the_stimulus() -> None:
    plain, mixed = Stimulus(), shuffled(Stimulus())
    assert not torch.equal(mixed.scale, plain.scale)
    assert sorted(mixed.scale.T.tolist()) == sorted(plain.scale.T.tolist())


def test_a_static_image_answers_to_nothing() -> None:
    stimulus = static(Stimulus())
    assert len(stimulus.distinct_frames[0]) == 1
    response = tag(Affine(), WHITE.expand(30, -1, -1, -1), stimulus)
    assert response.amplitude("conv", "all").max() < 1e-14
    # The mean of a scale between 0.5 and 1.
    assert stimulus.scale.eq(0.75).all()
    assert response.layers["conv"].amplitude[0, 0].item() == pytest.approx(0.75, rel=1e-12)
    assert response.p_values("conv", "all").min() > 1e-4
    assert response.snr("conv")[:3].max() < 1.5


def test_untrained_networks_are_fresh_and_leave_the_trained_one_alone() -> None:
    net = build_model({"name": "resnet8"}).eval()
    before = net.conv1.weight.clone()
    state = torch.get_rng_state()
    fresh = untrained(net, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net.conv1.weight, before)
    assert not torch.equal(fresh.conv1.weight, before)
    assert torch.equal(untrained(net, seed=3).conv1.weight, fresh.conv1.weight)
    assert not fresh.training


def test_norms_without_weights_forget_what_they_have_seen() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU())
    net(torch.rand(4, 3, 8, 8))
    fresh = untrained(net)
    assert torch.equal(fresh.get_buffer("1.running_mean"), torch.zeros(8))
    assert not torch.equal(net.get_buffer("1.running_mean"), torch.zeros(8))


def test_refusals() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    with pytest.raises(InputError, match="no reset_parameters"):
        untrained(nn.Sequential(Own()))
    with pytest.raises(InputError, match=r"0 \(FrozenBatchNorm2d\) has weights but no reset_parameters"):
        untrained(nn.Sequential(FrozenBatchNorm2d(3)))
    with pytest.raises(InputError, match="torus takes two parts"):
        torus(Affine(), WHITE, Stimulus(tag_freqs=(8.5, 15.5, 19.0, 20.5), parts="quadrants", max_order=1))
    with pytest.raises(InputError, match="n_phases must be above"):
        torus(Affine(), WHITE, Stimulus(), n_phases=8)
    with pytest.raises(InputError, match="control must be one of"):
        Stimulus(control="swap")


def test_weights_that_are_not_drawn_anew_are_refused() -> None:
    net = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)))
    for trains in (True, False):
        with pytest.raises(InputError, match="weight_orig is not drawn"):
            untrained(net.requires_grad_(trains))


def test_masks_that_do_not_train_stay() -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.mask = nn.Parameter(torch.tensor([1.0, 0.0]), requires_grad=False)

    net = Masked()
    fresh = untrained(net, seed=1)
    assert torch.equal(fresh.mask, net.mask)
    assert not torch.equal(fresh.weight, net.weight)
