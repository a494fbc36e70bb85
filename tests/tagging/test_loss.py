"""Terms of a loss from the tags: known values, gradients by finite differences, equal to what `tag` measures."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from freqprune import InputError, Stimulus, TagLoss, build_model, resnet32, tag
from freqprune.tagging.loss_terms import imbalance, separation, spread
from tests.tagging.test_measurement import WHITE, Affine
from tests.training.small import trainer

# 16 frames that differ are enough for two parts, and quick enough for finite differences.
SHORT = Stimulus((6.0, 9.0), frame_rate=39.0, n_frames=39, max_order=2)
ONE_PART = Stimulus((6.0,), parts=torch.ones(1, 8, 8, dtype=torch.bool))


class Squares(nn.Module):
    """Filters that answer with the light of one half and the product of both."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = nn.Conv2d(1, 2, (4, 4), bias=False)
        self.halves.weight.data.zero_()
        self.halves.weight.data[0, 0, :, :2] = 1 / 8
        self.halves.weight.data[1, 0, :, 2:] = 1 / 8
        self.out = nn.Conv2d(2, 2, 1, bias=False)
        self.out.weight.data = torch.eye(2)[:, :, None, None]

    def forward(self, images: Tensor) -> Tensor:
        left, right = self.halves(images).unbind(1)
        return self.out(torch.stack([left, right], 1) + 0.5 * (left * right)[:, None])


def amplitudes(net: nn.Module, images: Tensor, stimulus: Stimulus) -> dict[str, Tensor]:
    response = tag(net, images, stimulus, noise_std=0)
    bins = [0, *(c.bin for c in stimulus.components)]
    return {layer: one.amplitude[:, bins] for layer, one in response.layers.items()}


def test_terms_have_the_values_that_were_worked_out_by_hand() -> None:
    names = [c.name for c in SHORT.components]
    assert names == ["f2-f1", "f1", "f2", "2f1", "f1+f2", "2f2"]
    # Mean, then components: a filter of the left half, one of both alike, one of their product too, a dead one.
    amplitude = torch.tensor(
        [[5, 0, 4, 0, 0, 0, 0], [1, 0, 2, 2, 0, 0, 0], [0, 1, 3, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]],
        dtype=torch.float64,
    )
    assert float(separation(amplitude, SHORT)) == pytest.approx(12 / (12 + 2))
    assert float(imbalance(amplitude, SHORT)) == pytest.approx((4**2 + 0 + 2**2) / (3 * 4**2))
    a = torch.tensor([16.0, 8.0, 12.0]).sqrt()
    assert float(spread(amplitude, SHORT)) == pytest.approx(float(a.sum() ** 2 / (4 * 36)))
    for measure in (separation, imbalance, spread):
        assert float(measure(3 * amplitude, SHORT)) == pytest.approx(float(measure(amplitude, SHORT)))


def test_three_parts_are_balanced_if_each_has_a_third() -> None:
    stimulus = Stimulus((6.0, 7.5, 11.0, 13.5), parts="quadrants", n_frames=960, max_order=1)
    one, all_alike = torch.eye(5, dtype=torch.float64)[[1]], torch.tensor([[9.0, 1, 1, 1, 1]], dtype=torch.float64)
    assert float(imbalance(one, stimulus)) == pytest.approx(1)
    assert float(imbalance(all_alike, stimulus)) == pytest.approx(0)


def test_amplitudes_are_those_of_tag(images: Tensor) -> None:
    torch.manual_seed(3)
    net = build_model({"name": "resnet8"})
    with torch.no_grad():
        net(torch.rand(64, 3, 16, 16))
    measured = amplitudes(net, images[:2], Stimulus())
    loss = TagLoss(integration=0.5, balance=2.0, silence={"layer1.*": 1.0}, n_images=2, every_n_steps=1)
    expected = {
        "integration": torch.stack([separation(a, Stimulus()) for a in measured.values()]).mean(),
        "balance": torch.stack([imbalance(a, Stimulus()) for a in measured.values()]).mean(),
        "silence": torch.stack(
            [spread(a, Stimulus()) for layer, a in measured.items() if layer.startswith("layer1.")]
        ).mean(),
    }
    total = loss(net.train(), images)
    torch.testing.assert_close(loss.latest, expected, rtol=1e-4, atol=1e-6)
    whole = 0.5 * expected["integration"] + 2 * expected["balance"] + expected["silence"]
    assert float(total.detach()) == pytest.approx(float(whole), rel=1e-4)


@pytest.mark.parametrize("term", ["integration", "balance", "silence"])
def test_gradients_are_finite_differences(term: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Softplus()).double()
    net(torch.rand(16, 1, 6, 6, dtype=torch.float64))
    net.eval()  # norms in training mode: tests/networks/test_norm_gradients.py
    images = torch.rand(2, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.6 + 0.2
    images = images.float().double()
    loss = TagLoss(**{term: 1.0}, stimulus=SHORT, n_images=2, every_n_steps=1)
    names, values = zip(*net.named_parameters(prefix="net"), strict=True)

    def of(*weights: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(Lossy(net, loss), dict(zip(names, weights, strict=True)), (images,))
        return found

    at = tuple(value.detach().clone().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(of, at, eps=1e-6, atol=1e-6, rtol=1e-4)


class Lossy(nn.Module):
    """A network and its loss as one module, so that its weights can be handed in."""

    def __init__(self, net: nn.Module, loss: TagLoss) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, images: Tensor) -> Tensor:
        return self.loss(self.net, images)


def test_gradient_steps_do_what_the_terms_say() -> None:
    """What only silence, only balance, only integration is asked for changes that way."""
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    for term, sign in (("silence", 1), ("balance", 1), ("integration", 1), ("integration", -1)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        net(torch.rand(64, 1, 8, 8))
        loss = TagLoss(**{term: float(sign)}, stimulus=SHORT, n_images=4, every_n_steps=1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        values = []
        for _ in range(100):
            total = loss(net, images)
            values.append(float(loss.latest[term]))
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        assert sign * values[-1] < sign * values[0] - 0.02, (term, sign, values[0], values[-1])


def test_tags_leave_the_network_as_it_is_and_come_every_n_steps(images: Tensor) -> None:
    net = build_model({"name": "resnet8"}).train()
    before = copy.deepcopy(net.state_dict())
    loss = TagLoss(silence=1.0, every_n_steps=3)
    once, never = loss(net, images, 0), loss(net, images, 1)
    assert float(never) == 0
    assert not never.requires_grad
    assert float(once.detach()) == pytest.approx(3 * float(loss.latest["silence"]))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())
    state = torch.get_rng_state()
    loss(net, images, 3)
    assert torch.equal(state, torch.get_rng_state())


def test_normalised_batches_are_taken_back_to_pixels(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    batch = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    loss = TagLoss(balance=1.0, every_n_steps=1, mean=mean, std=std)
    loss(net, batch)
    response = tag(net, images[:1], mean=mean, std=std, noise_std=0)
    bins = [0, *(c.bin for c in Stimulus().components)]
    assert float(loss.latest["balance"]) == pytest.approx(
        float(imbalance(response.layers["0"].amplitude[:, bins], Stimulus())), rel=1e-4
    )


def test_what_was_found_of_a_network_does_not_travel(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    loss = TagLoss(balance=1.0, every_n_steps=1)
    first = loss(net, images)
    other = pickle.loads(pickle.dumps(loss))
    assert torch.equal(other(net, images), first)
    assert torch.equal(copy.deepcopy(loss)(net, images), first)


def test_half_precision_around_it_changes_nothing(images: Tensor) -> None:
    net = build_model({"name": "resnet8"})
    loss = TagLoss(silence=1.0, every_n_steps=1)
    full = loss(net, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(net, images), full)
        # A loader may hand out images in half precision, which have lost some of their digits.
        half = loss(net, images.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.02, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_step_reads_the_same(images: Tensor) -> None:
    net, loss = build_model({"name": "resnet8"}), TagLoss(silence=1.0, every_n_steps=1)

    def step(x: Tensor) -> Tensor:
        return net(x).sum() * 0 + loss(net, x)

    torch.testing.assert_close(torch.compile(step, backend="eager")(images), loss(net, images))


def test_every_second_batch_is_shown_whatever_the_number_of_optimizers(images: Tensor, tmp_path: Path) -> None:
    class Two(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = build_model({"name": "resnet8"}), False
            self.loss, self.shown = TagLoss(silence=1.0, every_n_steps=2), []

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.step()
            self.shown.append(self.loss.due(self.trainer.fit_loop.total_batch_idx))

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net.parameters(), lr=0.0) for _ in range(2)]

    module = Two()
    trainer(tmp_path, max_epochs=2).fit(module, DataLoader(images[:3], 1))  # type: ignore[arg-type]
    assert module.shown == [True, False, True, False, True, False]


def test_what_augmentation_draws_outside_is_clipped(images: Tensor) -> None:
    loud = images.clone()
    loud[:, :, :2, :2] = 1.3
    net, loss = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), TagLoss(silence=1.0, every_n_steps=1)
    assert torch.equal(loss(net, loud), loss(net, loud.clamp(0, 1)))


def test_recurrent_layers_run_without_cudnn_which_has_no_gradient_of_them_in_eval_mode(images: Tensor) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head, self.on = nn.LSTM(images.shape[-1], 4, batch_first=True), nn.Linear(4, 3), list[bool]()

        def forward(self, x: Tensor) -> Tensor:
            self.on.append(torch.backends.cudnn.enabled)
            return self.head(self.rnn(x.mean(1))[0][:, -1])  # type: ignore[no-any-return]

    net = Rows()
    before = torch.backends.cudnn.enabled
    TagLoss(silence=0.1)(net, images[:1]).backward()
    assert net.on[-1] is False
    assert torch.backends.cudnn.enabled is before
    assert net.rnn.weight_ih_l0.grad is not None
    assert net.rnn.weight_ih_l0.grad.any()


def test_a_dead_layer_is_no_error_and_has_no_gradient() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    net[0].bias.data.fill_(-100)
    loss = TagLoss(integration=1.0, balance=1.0, silence=1.0, every_n_steps=1)
    loss(net, torch.rand(1, 1, 8, 8)).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("term", ["integration", "balance", "silence"])
def test_a_black_image_pulls_at_nothing(term: str) -> None:
    net, shown = resnet32(pretrained=True).train(), torch.zeros(1, 3, 32, 32)
    mean, std = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]
    batch = (shown - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    loss = TagLoss(**{term: 0.1}, mean=mean, std=std)
    loss(net, batch).backward()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("term", ["integration", "balance", "silence"])
def test_what_training_normalises_away_is_not_pulled_at(term: str) -> None:
    """Scale and bias of a filter before a batch norm: with a gradient they would move until the running statistics, by
    which the network answers, are wrong."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    net(torch.rand(64, 1, 8, 8))
    loss = TagLoss(**{term: 1.0}, stimulus=SHORT, every_n_steps=1)
    loss(net, torch.rand(1, 1, 8, 8)).backward()
    for conv in (net[0], net[3]):
        assert conv.weight.grad.abs().max() > 1e-3
        along = (conv.weight.grad * conv.weight).sum((1, 2, 3))
        # But for the small number that is added to the variance.
        assert along.abs().max() < 1e-2 * conv.weight.grad.abs().max()
        assert conv.bias.grad.abs().max() < 1e-3 * conv.weight.grad.abs().max()


def test_weights_and_layers_may_change_on_the_way(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    loss = TagLoss(silence={"0": 0.1}, every_n_steps=1)
    first = loss(net, images).detach()
    loss.silence["0"] = 0.2
    torch.testing.assert_close(loss(net, images).detach(), 2 * first)
    loss.balance = 1.0
    loss(net, images)
    assert set(loss.latest) == {"silence", "balance"}
    net[2] = nn.Conv2d(4, 7, 3)
    torch.testing.assert_close(
        loss(net, images), TagLoss(loss.integration, 1.0, {"0": 0.2}, every_n_steps=1)(net, images)
    )
    del net[2:]
    assert float(loss(net, images).detach()) != 0


def test_layers_of_weight_0_are_left_out_of_the_average(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()).double()
    images = images.double()
    loss = TagLoss(silence={"*": 0.1, "0": 0}, every_n_steps=1)
    total, last = loss(net, images).detach(), spread(amplitudes(net, images[:1], Stimulus())["2"], Stimulus())
    # The pixels are float32 on the way.
    assert float(loss.latest["silence"]) == pytest.approx(float(last), rel=1e-5)
    assert float(total) == pytest.approx(0.1 * float(last), rel=1e-5)


def test_frames_a_step_are_those_that_go_through_the_network(images: Tensor) -> None:
    net, seen = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()), list[int]()
    loss = TagLoss(silence=1.0, n_images=3, every_n_steps=2)
    loss(net, images)  # looks at the network first
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for step in range(4):
        loss(net, images, step)
    assert loss.frames_a_step == sum(seen) / 4 == 3 * 49 / 2
    assert TagLoss(n_images=3).frames_a_step == 0


def test_answers_that_are_not_finite_are_told_before_training(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    net[0].weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match=r"values that are not finite \(silence = nan\)"):
        TagLoss(silence=1.0).check(net, images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"silence": None}, "silence must be a finite weight, or a mapping of layers to weights, got None"),
        ({"silence": {"conv1": "0.1"}}, "silence must be a finite weight"),
        ({"balance": True}, "balance must be a finite weight"),
        ({"n_images": 1.5}, "n_images must be a whole number of at least 1, got 1.5"),
        ({"mean": 0.5, "std": 0.5}, "mean must hold one number a channel, got 0.5"),
        ({"stimulus": "halves"}, "stimulus must be a freqprune.Stimulus, got 'halves'"),
        ({"integration": 1.0, "stimulus": Stimulus(max_order=1)}, "integration needs intermodulation"),
        ({"balance": 1.0, "stimulus": ONE_PART}, "balance needs two parts or more, got 1"),
        ({"silence": 1.0, "stimulus": Stimulus(control="static")}, "control = static has no tags to learn from"),
        ({"n_images": 0}, "n_images must be at least 1"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
        ({"silence": float("nan")}, "silence must be a finite weight"),
        ({"balance": {"conv1": float("inf")}}, "balance must be a finite weight"),
        ({"where": "here"}, "where must be one of"),
        ({"mean": [0.5]}, "mean and std come together"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TagLoss(**arguments)  # type: ignore[arg-type]


def test_bad_input_is_named(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3))
    with pytest.raises(InputError, match="layer pattern 'layer9' matches none"):
        TagLoss(silence={"layer9": 1.0})(net, images)
    with pytest.raises(InputError, match="images must be"):
        TagLoss(silence=1.0)(net, images[0])
    with pytest.raises(InputError, match=r"of the images lie outside \[0, 1\] .* give the loss the mean and std"):
        TagLoss(silence=1.0)(net, 4 * images - 2)
    with pytest.raises(InputError, match="mean must hold 3 values, one a channel"):
        TagLoss(silence=1.0, mean=[0.5], std=[0.5])(net, images)


def test_black_images_in_half_precision_are_pixels(images: Tensor) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    loss, net = TagLoss(silence=1.0, mean=mean, std=std), nn.Sequential(nn.Conv2d(3, 2, 3)).bfloat16()
    black = ((torch.zeros_like(images) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).bfloat16()
    # Of red, a third of the values.
    assert ((black.float() * 0.229 + 0.485)[:, 0] < -1e-3).all()
    assert loss(net, black).isfinite()


def test_a_product_of_the_halves_answers_at_their_sum_and_difference() -> None:
    """By hand: with a and b the light of the halves, filters answer a + ab/2 and b + ab/2."""
    depth, mean_light = 0.5, 0.75
    loss = TagLoss(integration={"out": 1.0}, balance={"out": 1.0}, every_n_steps=1, stimulus=SHORT)
    loss(Squares(), torch.ones(1, 1, 4, 4))
    wave = depth / 2
    own, other, mixed = wave * (1 + mean_light / 2), wave * mean_light / 2, 2 * (wave * wave / 2) / 2
    assert float(loss.latest["integration"]) == pytest.approx(1 - mixed / (mixed + own + other), rel=1e-4)
    assert float(loss.latest["balance"]) == pytest.approx(((own - other) / (own + other)) ** 2, rel=1e-4)


@pytest.mark.parametrize("where", ["convolution", "norm"])
def test_an_affine_layer_is_read_before_its_rectifier(where: str) -> None:
    net = nn.Sequential(Affine().conv, nn.BatchNorm2d(4, dtype=torch.float64), nn.ReLU())
    before, after = (float(TagLoss(integration=1.0, where=one)(net, WHITE).detach()) for one in (where, "activation"))
    # Every fourth step, with four times the weight; the filter of both halves is rectified.
    assert before == pytest.approx(4, rel=1e-12)
    assert after < 3.9


def test_harmonics_of_one_half_are_no_intermodulation() -> None:
    net = Affine(nn.ReLU())
    # Each half rectified at its mean light; neither the filter of both nor that of nothing answers.
    net.conv.bias.data = torch.tensor([-0.75, -0.75, -2.0, 0.0], dtype=torch.float64)
    second = tag(net, WHITE, noise_std=0.0).amplitude("conv", ["2f1"])[0].item()
    # Of the rectified sine; of 20 frames a cycle the 18th order and some above fold onto the second.
    assert second == pytest.approx(0.25 * 2 / (3 * math.pi), abs=2e-3)
    loss = TagLoss(integration=1.0, every_n_steps=1)
    assert float(loss(net, WHITE).detach()) == pytest.approx(1, rel=1e-12)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.leaky_relu(self.a(x), 0.1, inplace=True)).mean((2, 3))  # type: ignore[no-any-return]


def test_functions_that_work_in_place_have_gradients() -> None:
    net = InPlace()
    TagLoss(silence=1.0, every_n_steps=1)(net, torch.rand(2, 3, 16, 16)).backward()
    assert net.a.weight.grad is not None
    assert net.a.weight.grad.abs().sum() > 0


def test_slices_of_a_batch_are_not_laid_channels_last() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), View())
    loss = TagLoss(silence=1.0, every_n_steps=1)
    crop = torch.rand(2, 3, 20, 20)[:, :, 2:18, 2:18]
    torch.testing.assert_close(loss(net, crop), loss(net, crop.contiguous()))


class View(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)
