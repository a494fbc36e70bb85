"""Modes that networks come back to, and copies of what they hold."""

import copy
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks.copies import copied
from freqprune.networks.hooks import evaluating
from freqprune.pruning.surgery import Plan

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class LowRank(nn.Conv2d):
    """Adds a low-rank part to its weight in eval mode and takes it out again for training, as loralib's layers do."""

    def __init__(self, n_inputs: int, n_outputs: int) -> None:
        super().__init__(n_inputs, n_outputs, 1)
        self.merged, self.register = False, torch.randn(n_outputs, n_inputs, 1, 1)

    def train(self, mode: bool = True) -> "LowRank":
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -self.register if mode else self.register
            self.merged = not mode
        return self


def test_layers_that_merge_in_eval_mode_come_apart_again() -> None:
    net = nn.Sequential(LowRank(3, 4), nn.ReLU(), LowRank(4, 2))
    net[2].eval()
    weights = [net[at].weight.detach().clone() for at in (0, 2)]
    with evaluating(net):
        assert net[0].merged
    assert (net.training, net[0].merged, net[2].merged) == (True, False, True)
    for at, weight in zip((0, 2), weights, strict=True):
        torch.testing.assert_close(net[at].weight.detach(), weight)


def test_modes_are_as_they_were_whatever_a_module_does() -> None:
    class Frozen(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> "Frozen":
            super().train(False)
            return self

    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), Frozen(4), nn.Dropout())
    net[0].eval()
    net[0][1].train()
    before = [module.training for module in net.modules()]
    with evaluating(net):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == before


class Fused(nn.Module):
    """Is one layer in eval mode and two to train."""

    def __init__(self) -> None:
        super().__init__()
        self.branch: nn.Module | None = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
        self.fused: nn.Module | None = None
        self.other = {True: self.branch, False: nn.Conv2d(3, 4, 1)}

    def train(self, mode: bool = True) -> "Fused":
        self.branch, self.fused = (self.other[True], None) if mode else (None, self.other[False])
        return super().train(mode)


def test_modules_that_put_others_in_their_place_come_back() -> None:
    net = nn.Sequential(Fused(), nn.ReLU())
    before = [name for name, _ in net.named_modules()]
    with evaluating(net):
        assert "0.fused" in dict(net.named_modules())
    assert [name for name, _ in net.named_modules()] == before
    assert all(module.training for module in net.modules())


def test_low_rank_layers_are_cut_in_eval_mode_only() -> None:
    net = nn.Sequential(LowRank(3, 4), nn.ReLU(), LowRank(4, 2))
    with pytest.raises(InputError, match=r"does not go into training mode .* call eval\(\) on the network before"):
        Plan(net, X).apply({"0": torch.arange(3)})
    assert Plan(net.eval(), X).apply({"0": torch.arange(3)})[0].out_channels == 3


def test_settings_that_are_not_set_and_lists_that_hold_themselves_are_copied() -> None:
    net, round_and_round = nn.Linear(2, 1), list[Any]()
    round_and_round.append(round_and_round)
    net.cfg, net.kept = OmegaConf.create({"width": 8, "weights": "???"}), round_and_round
    twin = copied(net)
    assert twin.cfg.width == 8
    assert OmegaConf.is_missing(twin.cfg, "weights")
    assert twin.kept[0] is twin.kept


class Remembers(nn.Module):
    """Keeps its maps, as many networks do for those who want to see them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 3)
        self.maps: dict[str, list[Tensor]] = {}
        self.last = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.maps["first"] = [torch.relu(self.conv1(x))]
        self.last = torch.relu(self.conv2(self.maps["first"][0]))
        return self.head(self.last.mean((2, 3)))


def test_networks_that_keep_their_maps_are_copied_and_cut() -> None:
    net = Remembers()
    net(X).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(net)
    twin = copied(net)
    assert torch.equal(twin.last, net.last)
    assert not twin.last.requires_grad
    assert not twin.maps["first"][0].requires_grad
    twin.last.zero_()
    assert net.last.any()
    plan = Plan(net, X)
    net(X).sum().backward()
    assert plan.apply({"conv1": torch.arange(5)}).conv1.out_channels == 5
