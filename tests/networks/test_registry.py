from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from freqprune.errors import InputError
from freqprune.jobs.outputs import name_of
from freqprune.networks import registry
from freqprune.networks.checkpoint import load_pruned, save_pruned
from freqprune.networks.profiling import count_macs, count_parameters
from freqprune.networks.registry import build_model, config_of, register_model
from freqprune.networks.resnet import CifarResNet, IndexShortcut, padded_index


# Parameters and MACs of the public implementation of He's CIFAR nets; MACs of convolutions and the linear layer.
@pytest.mark.parametrize(
    ("name", "shortcut", "params", "macs"),
    [
        ("resnet20", "A", 269_722, 40_551_040),
        ("resnet32", "A", 464_154, 68_862_592),
        ("resnet32", "B", 466_906, 69_124_736),
    ],
)
def test_sizes(name: str, shortcut: str, params: int, macs: int) -> None:
    net = build_model({"name": name, "shortcut": shortcut})
    assert count_parameters(net) == params
    assert count_macs(net, torch.zeros(1, 3, 32, 32)) == macs


@pytest.mark.parametrize("name", ["resnet44", "resnet56", "resnet110"])
def test_depth_is_the_number_of_weighted_layers(name: str) -> None:
    net = build_model({"name": name})
    assert sum(1 for p in net.parameters() if p.dim() > 1) == int(name.removeprefix("resnet"))


def test_option_a_is_the_padded_shortcut() -> None:
    x = torch.randn(2, 16, 8, 8)
    expected = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
    assert torch.equal(IndexShortcut(padded_index(16, 32), 16, 2)(x), expected)


def test_config_rebuilds_pruned_widths() -> None:
    net = build_model({"name": "resnet8", "widths": {"layer1.0.conv1": 5, "layer3.0.conv1": 7}, "num_classes": 3})
    assert net.config["widths"] == {"layer1.0.conv1": 5, "layer3.0.conv1": 7}
    again = build_model(net.config)
    again.load_state_dict(net.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.eval()(x), net.eval()(x))


def test_pruned_stream_needs_its_index() -> None:
    widths = {"conv1": 12, "layer1.0.conv2": 12}
    index = [-1] * 8 + list(range(12)) + [-1] * 12
    net = build_model({"name": "resnet8", "widths": widths, "shortcut_index": {"layer2.0.shortcut": index}})
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert build_model(net.config).config == net.config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "resnet23"}, "did you mean resnet2?"),
        ({}, "model.name must be one of"),
        ({"name": "resnet20", "dept": 3}, "does not take these arguments"),
        ({"name": "resnet20", "shortcut": "C"}, 'shortcut must be "A"'),
        ({"name": "resnet20", "num_classes": 0}, "num_classes must be at least 1"),
        ({"name": "resnet20", "stage_widths": [16, 8, 64]}, "do not shrink"),
        ({"name": "resnet20", "widths": {"layer9.0.conv1": 3}}, "does not have: layer9.0.conv1"),
        ({"name": "resnet20", "widths": {"layer1.0.conv2": 3}}, "identity shortcut around it carries 16"),
        ({"name": "resnet8", "shortcut_index": {"layer2.0.shortcut": [0, 99]}}, r"must lie in \[-1, 15\]"),
        (
            {"name": "resnet8", "shortcut_index": {"layer2.0.shortcut": [0, 1]}},
            "has 2 channels, but layer2.0.conv2 has 32",
        ),
    ],
)
def test_bad_configs(config: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model(config)


def test_bad_depth() -> None:
    with pytest.raises(InputError, match="6n"):
        CifarResNet(depth=33)


def test_register_model() -> None:
    register_model("tiny", torch.nn.Identity)
    assert isinstance(build_model({"name": "tiny"}), torch.nn.Identity)
    with pytest.raises(InputError, match="is taken"):
        register_model("tiny", torch.nn.ReLU)


@pytest.mark.parametrize("config", [SimpleNamespace(depth=4), {"depth": 4}, {"name": "nobody knows"}])
def test_a_network_may_have_a_config_of_its_own(
    config: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    class Own(nn.Module):
        def __init__(self, num_classes: int = 10) -> None:
            super().__init__()
            self.config, self.net = config, build_model({"name": "resnet8", "num_classes": num_classes})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.config is config
            return self.net(x)  # type: ignore[no-any-return]

    register_model("configured", Own)
    net = build_model({"name": "configured", "num_classes": 3})
    assert config_of(net) == {"name": "configured", "num_classes": 3}
    save_pruned(tmp_path / "pruned.ckpt", net, {})
    assert config_of(load_pruned(tmp_path / "pruned.ckpt")) == {"name": "configured", "num_classes": 3}
    assert name_of(net) == "configured"
    assert config_of(nn.Linear(1, 1)) == {}
