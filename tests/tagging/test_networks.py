"""Tagging other people's networks: every layer is found, read, and its filters counted."""

import importlib.util

import pytest
import torch
import torchvision
from torch import nn

from freqprune.errors import InputError
from freqprune.tagging.layers import default_layers, pick_layers
from freqprune.tagging.measurement import tag
from freqprune.tagging.sites import find_sites
from freqprune.tagging.stimulus import Stimulus


@pytest.mark.parametrize(
    ("name", "n_layers"), [("resnet18", 20), ("vgg16_bn", 13), ("mobilenet_v2", 52), ("densenet121", 120)]
)
def test_torchvision_convolutions(name: str, n_layers: int) -> None:
    net = torchvision.models.get_model(name, num_classes=10)
    sites = find_sites(net, torch.rand(1, 3, 32, 32))
    assert len(sites) == n_layers
    modules = dict(net.named_modules())
    assert all(site.n_filters == modules[site.layer].out_channels for site in sites)
    last = sites[-1].layer
    response = tag(net, torch.rand(1, 3, 32, 32), layers=[sites[0].layer, last], noise_std=0.0)
    assert response.amplitude(sites[0].layer).shape == (modules[sites[0].layer].out_channels, 2)
    assert response.amplitude(sites[0].layer).max() > 0
    assert default_layers(net)[0] == sites[0].layer


def test_vision_transformer_linear_and_attention() -> None:
    net = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5
    )
    # The head is initialised to zero, and a network that answers nothing shows nothing.
    nn.init.normal_(net.heads.head.weight)
    layers = ["conv_proj", "*.mlp.0", "*.self_attention", "heads.head"]
    response = tag(net, torch.rand(2, 3, 32, 32), layers=layers)
    widths = {layer: len(r.amplitude) for layer, r in response.layers.items()}
    blocks = [f"encoder.layers.encoder_layer_{i}" for i in (0, 1)]
    assert widths == {"conv_proj": 16, "heads.head": 5} | {f"{b}.mlp.0": 24 for b in blocks} | {
        f"{b}.self_attention": 16 for b in blocks
    }
    sites = {layer: r.site for layer, r in response.layers.items()}
    assert sites[f"{blocks[0]}.mlp.0"].stage == "activation"
    assert "no activation of its own" in sites[f"{blocks[0]}.self_attention"].note
    # The patch projection is affine: intermodulation appears behind it only.
    assert response.integration("conv_proj").max() < 1e-4
    assert response.integration(f"{blocks[1]}.mlp.0").median() > 1e-3


def test_the_class_token_apart() -> None:
    """Against the transform, by hand, of the first token's values."""
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5
    )
    layers = [f"encoder.layers.encoder_layer_{i}.mlp.0" for i in (0, 1)]
    x = torch.rand(2, 3, 32, 32)
    apart = tag(net, x, layers=layers, spatial="class_token", noise_std=0.0)
    over_all = tag(net, x, layers=layers, noise_std=0.0)
    for layer in layers:
        assert apart.amplitude(layer).shape == over_all.amplitude(layer).shape == (24, 2)
        assert not torch.allclose(apart.amplitude(layer), over_all.amplitude(layer), rtol=0.05)
    stimulus = Stimulus()
    read = []
    handle = net.get_submodule(layers[0]).register_forward_hook(
        lambda module, args, out: read.append(nn.functional.gelu(out[:, 0]))
    )
    with torch.no_grad():
        net.eval()(stimulus.frames(x[:1])[0])
    handle.remove()
    one = tag(net, x[:1], layers=layers[:1], spatial="class_token", noise_std=0.0)
    spectrum = 2 * torch.fft.rfft(read[0].double(), dim=0).abs() / len(read[0])
    torch.testing.assert_close(one.amplitude(layers[0], ["f1"])[:, 0], spectrum[12], rtol=1e-4, atol=1e-7)
    with pytest.raises(InputError, match="class_token reads the first of the tokens"):
        tag(net, x, layers=["conv_proj"], spatial="class_token")


def test_attention_without_a_convolution_is_read_by_what_runs() -> None:
    net = nn.Sequential(
        nn.Flatten(2), nn.TransformerEncoderLayer(16, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(48, 4)
    )
    x = torch.rand(2, 3, 4, 4)
    assert list(tag(net, x, noise_std=0.0).layers) == ["1.linear1", "1.linear2", "3"]
    assert pick_layers(net, "*attn*") == ["1.self_attn"]


def test_vit_b_16_has_sites() -> None:
    net = torchvision.models.vit_b_16()
    names = pick_layers(net, ["encoder.layers.*", "heads.*"])
    assert "encoder.layers.encoder_layer_0.self_attention" in names
    sites = find_sites(net, torch.rand(1, 3, 224, 224), names)
    assert len(sites) == 12 * 3 + 1
    assert {site.n_filters for site in sites} == {768, 3072, 1000}


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timm() -> None:
    import timm

    net = timm.create_model("resnet10t", num_classes=3)
    response = tag(net, torch.rand(1, 3, 64, 64), noise_std=0.0)
    assert len(response.layers) == len(default_layers(net))
