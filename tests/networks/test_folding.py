"""Batch norms folded for deployment."""

import pytest
import torch
from torch import Tensor, nn

from freqprune.networks.folding import fold_norms
from freqprune.networks.registry import build_model
from freqprune.tagging.sites import find_folds


def trained(net: nn.Module, x: Tensor) -> nn.Module:
    """Norms that do something."""
    torch.manual_seed(0)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    net.train()
    for _ in range(3):
        net(x)
    return net.eval()


@pytest.mark.parametrize(
    ("name", "n_norms", "n_left"),
    [("resnet8", 7, 0), ("torchvision/mobilenet_v2", 52, 0), ("torchvision/densenet121", 121, 62)],
)
def test_norms_after_convolutions_go(name: str, n_norms: int, n_left: int) -> None:
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    net = trained(build_model({"name": name}), x)
    gone = find_folds(net, x[:1], [])
    folded = fold_norms(net, gone)
    norms = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert (len(gone) + len(norms), len(norms)) == (n_norms, n_left)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), net(x), rtol=1e-3, atol=1e-4)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == n_norms


class Shared(nn.Module):
    """A norm behind two convolutions belongs to neither; a convolution that something else reads keeps its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.both, self.beside = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        return self.both(self.a(x)) + self.both(self.b(x)) + self.beside(y) + y  # type: ignore[no-any-return]


def test_norms_that_are_not_a_convolutions_own_stay() -> None:
    assert find_folds(Shared().eval(), torch.rand(2, 3, 8, 8), []) == []


class TwoNames(nn.Module):
    """Its convolution has two names, of which the forward uses the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(self.first, nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


def test_a_convolution_of_two_names_is_folded_under_both() -> None:
    x = torch.rand(4, 3, 8, 8)
    net = trained(TwoNames(), x)
    folds = find_folds(net, x[:1], [])
    assert folds
    with torch.no_grad():
        torch.testing.assert_close(fold_norms(net, folds)(x), net(x))


class ReadTwice(nn.Module):
    """What a norm reads is read by something else that returns more than one tensor, or writes into it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.bn, self.how = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "max":
            more = torch.max(y, 1, keepdim=True)[0]
        elif self.how == "chunk":
            more = y.chunk(2, 1)[0].sum(1, keepdim=True)
        elif self.how == "detach":
            more = y.detach().mean((2, 3), keepdim=True)
        elif self.how == "data":
            more = y.data.mean((2, 3), keepdim=True)
        elif self.how == "norm":
            more = self.bn.weight.abs().view(1, -1, 1, 1)
        elif self.how == "statistics":
            more = self.bn.running_mean.view(1, -1, 1, 1)  # type: ignore[union-attr]
        else:
            more = torch.zeros(y.shape)
            more[:] = y
        return torch.relu(self.bn(y)) * more


@pytest.mark.parametrize("how", ["max", "chunk", "write", "detach", "data", "norm", "statistics"])
def test_what_is_read_elsewhere_is_not_folded(how: str) -> None:
    assert find_folds(trained(ReadTwice(how), torch.rand(4, 3, 8, 8)), torch.rand(1, 3, 8, 8), []) == []


class WithItsMap(nn.Module):
    """Answers with what a norm reads beside its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.bn(y).mean((2, 3)), y


def test_what_a_network_answers_with_is_not_folded() -> None:
    assert find_folds(trained(WithItsMap(), torch.rand(4, 3, 8, 8)), torch.rand(1, 3, 8, 8), []) == []


@pytest.mark.parametrize("hooked", ["0", "1"])
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_what_has_hooks_is_not_folded(hooked: str, hook: str) -> None:
    x = torch.rand(2, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    handle = getattr(net.get_submodule(hooked), hook)(lambda _module, *values: values[-1])
    assert find_folds(net, x, []) == []
    handle.remove()
    assert find_folds(net, x, []) == [("0", "1")]
