"""Batch norms that answer by their running statistics, with the gradients of training."""

import pytest
import torch
from torch import Tensor, nn

from freqprune.networks.hooks import evaluating
from freqprune.networks.norm_gradients import norms_as_in_training


class Following(nn.BatchNorm2d):
    """What the gradients are those of, written out: running statistics that change as those of the input do, from
    where they are at the first call."""

    first: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + self.eps).sqrt()
        if self.first is None:
            self.first = mean.detach(), std.detach()
        grown = std / self.first[1]
        mean = mean + (self.running_mean - self.first[0]) * grown
        std = (self.running_var + self.eps).sqrt() * grown
        normed = (x - mean[:, None, None]) / std[:, None, None]
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


def network(norm: type[nn.BatchNorm2d]) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), norm(3), nn.Tanh(), nn.Conv2d(3, 4, 3), norm(4), nn.Softplus()).double()
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                values.data = torch.rand(len(values), dtype=torch.float64) + 0.5
    return net


@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_layout_and_precision_change_nothing(n_dims: int) -> None:
    """The formula of the docstring in float64, against float32 maps of one to three dimensions, channels last."""
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[n_dims - 1](5)
    norm.running_mean += 0.3
    norm.running_var *= 2
    given = torch.randn(7, 5, *[6] * n_dims) + torch.arange(5.0).view(-1, *[1] * n_dims)
    given = given.movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    pull = torch.randn_like(given)
    with norms_as_in_training(norm), evaluating(norm):
        (found,) = torch.autograd.grad((norm(given) * pull).sum(), given)
    dims = [0, *range(2, 2 + n_dims)]
    x, g = given.detach().double(), pull.double()
    g = g / (norm.running_var.double() + norm.eps).sqrt().view(-1, *[1] * n_dims)
    z = (x - x.mean(dims, keepdim=True)) / (x.var(dims, correction=0, keepdim=True) + norm.eps).sqrt()
    expected = g - g.mean(dims, keepdim=True) - z * (g * z).mean(dims, keepdim=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_answers_are_those_of_eval_mode_and_gradients_those_of_statistics_that_follow() -> None:
    net, reference, x = network(nn.BatchNorm2d), network(Following), torch.randn(5, 2, 7, 7, dtype=torch.float64)
    names, values = zip(*reference.named_parameters(), strict=True)

    def written_out(*weights: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(reference, dict(zip(names, weights, strict=True)), (x,))
        return found.square().mean()

    at = tuple(value.detach().clone().requires_grad_() for value in values)
    written_out(*at)  # from here the statistics follow
    assert torch.autograd.gradcheck(written_out, at, eps=1e-6, atol=1e-7)
    expected = torch.autograd.grad(written_out(*at), at)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with norms_as_in_training(net), evaluating(net):
        answer = net(x)
    answer.square().mean().backward()
    torch.testing.assert_close(answer, net.eval()(x))
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    for (name, parameter), wanted in zip(net.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, msg=lambda text, name=name: f"{name}: {text}")
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_scale_and_bias_of_a_filter_get_no_gradient() -> None:
    net, x = network(nn.BatchNorm2d), torch.randn(5, 2, 7, 7, dtype=torch.float64)
    with norms_as_in_training(net), evaluating(net):
        net(x).square().sum().backward()
    for conv in (net[0], net[3]):
        assert conv.weight.grad.abs().max() > 1e-3
        along = (conv.weight.grad * conv.weight).sum((1, 2, 3))
        # But for the small number that is added to the variance.
        assert along.abs().max() < 1e-3 * conv.weight.grad.abs().max()
        torch.testing.assert_close(conv.bias.grad, torch.zeros_like(along), rtol=0, atol=1e-8)


def test_norms_that_are_frozen_stay_so() -> None:
    nets = [network(nn.BatchNorm2d).eval() for _ in range(2)]
    x = torch.randn(5, 2, 7, 7, dtype=torch.float64)
    with norms_as_in_training(nets[0]):
        nets[0](x).sum().backward()
    nets[1](x).sum().backward()
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_what_else_reads_the_input_keeps_its_gradient() -> None:
    norm = nn.BatchNorm2d(2).train()
    x = torch.randn(4, 2, 3, 3, requires_grad=True)
    with norms_as_in_training(norm), evaluating(norm):
        norm(x)
        (3 * x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_constant_map_has_a_finite_gradient_in_half_precision_too(dtype: torch.dtype) -> None:
    norm = nn.BatchNorm2d(2).to(dtype).train()
    x = torch.full((4, 2, 3, 3), 0.5, dtype=dtype, requires_grad=True)
    with norms_as_in_training(norm), evaluating(norm):
        norm(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()
