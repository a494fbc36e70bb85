"""Units of filters: what writes them and what reads them, by name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2

from freqprune.networks.registry import build_model
from freqprune.pruning import dependencies
from freqprune.pruning.graph import ChannelGraph
from freqprune.pruning.surgery import Plan
from freqprune.pruning.trials import misread_units


def test_readers_are_the_layers_that_multiply_a_units_filters_and_no_others() -> None:
    """Neither the layer itself, nor the norms and activations that its filters pass on their way."""
    graph = ChannelGraph(build_model({"name": "resnet8", "shortcut": "B"}), torch.zeros(1, 3, 32, 32))
    assert {name: unit.readers for name, unit in graph.inner.items()} == {
        f"layer{stage}.0.conv1": (f"layer{stage}.0.conv2",) for stage in (1, 2, 3)
    }
    readers = {name: set(unit.readers) for name, unit in graph.streams.items()}
    assert readers["conv1"] == {"layer1.0.conv1", "layer2.0.conv1", "layer2.0.shortcut.0"}
    assert readers["layer3.0.conv2"] == {"linear"}


def test_a_depthwise_layer_hands_filters_on_and_reads_none() -> None:
    graph = ChannelGraph(mobilenet_v2(num_classes=4).eval(), torch.zeros(1, 3, 64, 64))
    assert graph.inner["features.2.conv.0.0"].readers == ("features.2.conv.2",)


def test_a_linear_layer_after_pooling_reads_the_last_filters() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)
    )
    unit = ChannelGraph(net, torch.zeros(1, 3, 8, 8)).inner["0"]
    assert (unit.members, unit.n_filters, unit.readers) == (("0",), 4, ("5",))


@pytest.mark.parametrize("function", [lambda x: x / 2, lambda x: F.relu6(x + 3) / 6, lambda x: x - 1])
def test_arithmetic_with_numbers_couples_nothing(function: Callable[[Tensor], Tensor]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(function(self.a(x)))).mean((2, 3))  # type: ignore[no-any-return]

    net, x = Scaled().eval(), torch.rand(2, 3, 16, 16)
    plan = Plan(net, x)
    assert plan.layers == ["a"]
    assert misread_units(plan, plan.layers) == []
    kept = torch.tensor([0, 3, 5])
    assert plan.apply({"a": kept}).get_parameter("a.weight").shape[0] == 3


def test_groups_without_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    net, example = build_model({"name": "resnet8"}), torch.zeros(1, 3, 32, 32)
    assert not ChannelGraph(net, example).unfollowed
    monkeypatch.setattr(dependencies, "_MOST_OPERATIONS", 3)
    assert "conv1" in ChannelGraph(net, example).unfollowed
