"""Attention with heads that can go: equal to PyTorch's, loaded from its state dicts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from freqprune.errors import InputError
from freqprune.networks.checkpoint import load_network
from freqprune.networks.heads import HeadAttention, Heads, find_heads, keep_heads, open_heads
from freqprune.networks.profiling import count_macs, macs_by_layer
from freqprune.networks.registry import build_model, register_model

X, Y = (torch.rand(3, 7, 12, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


def both(**settings: Any) -> tuple[nn.MultiheadAttention, HeadAttention]:
    torch.manual_seed(0)
    old = nn.MultiheadAttention(12, 3, **settings).eval()
    nn.init.normal_(old.out_proj.weight)
    if old.in_proj_bias is not None:
        nn.init.normal_(old.in_proj_bias)
    return old, HeadAttention(old)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "by head"])
def test_it_computes_what_pytorchs_does(batch_first: bool, bias: bool, mask: str) -> None:
    old, new = both(batch_first=batch_first, bias=bias)
    n_tokens, n_images = (7, 3) if batch_first else (3, 7)
    masks: dict[str, Tensor | None] = {
        "none": None,
        "bool": torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1),
        "float": torch.randn(n_tokens, n_tokens),
        "by head": torch.randn(n_images * 3, n_tokens, n_tokens),
    }
    for key, value in ((X, X), (Y, Y), (Y, X)):
        found, weights = new(X, key, value, attn_mask=masks[mask])
        assert weights is None
        torch.testing.assert_close(found, old(X, key, value, attn_mask=masks[mask], need_weights=False)[0])


@pytest.mark.parametrize("mask", [None, torch.ones(7, 7, dtype=torch.bool).triu(1)])
def test_padding_is_not_looked_at(mask: Tensor | None) -> None:
    old, new = both(batch_first=True)
    padding = torch.arange(7) >= torch.tensor([[7], [5], [3]])
    expected = old(X, Y, Y, key_padding_mask=padding, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(new(X, Y, Y, key_padding_mask=padding, attn_mask=mask)[0], expected)
    assert not torch.allclose(new(X, Y, Y, attn_mask=mask)[0], expected)


def test_attention_drops_out_in_training_only() -> None:
    old, new = both(batch_first=True, dropout=1.0)
    # Without anything that it looks at, the last layer answers its bias.
    nothing = old.out_proj.bias.expand(3, 7, 12)
    torch.testing.assert_close(new.train()(X, X, X)[0], nothing)
    torch.testing.assert_close(new.eval()(X, X, X)[0], old(X, X, X, need_weights=False)[0])
    assert not torch.allclose(new(X, X, X)[0], nothing)


def test_weights_of_the_attention_are_refused() -> None:
    with pytest.raises(InputError, match=r"need_weights = True .* leave torch\.nn\.MultiheadAttention as it is"):
        both(batch_first=True)[1](X, X, X, need_weights=True)


def test_one_sequence_without_a_batch_is_refused() -> None:
    with pytest.raises(InputError, match="give one sequence as a batch of one"):
        both(batch_first=True)[1](X[0], X[0], X[0])


def test_what_it_cannot_stand_for_stays() -> None:
    layers = nn.ModuleList(
        [nn.MultiheadAttention(12, 3, kdim=5), nn.MultiheadAttention(12, 3, add_bias_kv=True),
         nn.MultiheadAttention(12, 3, add_zero_attn=True)]
    )  # fmt: skip
    assert all(type(layer) is nn.MultiheadAttention for layer in open_heads(layers))  # type: ignore[attr-defined]


def test_in_pytorchs_encoder() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    with torch.no_grad():
        expected = net(X)
        assert isinstance(open_heads(net).layers[0].self_attn, HeadAttention)  # type: ignore[union-attr, index]
        torch.testing.assert_close(net(X), expected)
    assert find_heads(net) == {
        f"layers.{i}.self_attn.qkv": Heads(
            f"layers.{i}.self_attn", f"layers.{i}.self_attn.qkv", f"layers.{i}.self_attn.proj", 3, 4
        )
        for i in range(2)
    }


def small_vit(**settings: Any) -> nn.Module:
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=4, **settings
    )


def test_a_checkpoint_of_pytorchs_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, x = small_vit().eval(), torch.rand(2, 3, 32, 32)
    nn.init.normal_(plain.heads.head.weight)  # type: ignore[union-attr, arg-type]
    torch.save(plain.state_dict(), tmp_path / "vit.pt")
    register_model("opened_vit", lambda **settings: open_heads(small_vit(**settings)))
    with torch.no_grad():
        expected = plain(x)
        torch.testing.assert_close(load_network(tmp_path / "vit.pt", {"name": "opened_vit"}).net(x), expected)
        fresh = open_heads(small_vit()).eval()
        fresh.load_state_dict(plain.state_dict())
        torch.testing.assert_close(fresh(x), expected)


def test_a_vision_transformer_of_torchvisions_by_name() -> None:
    with torch.device("meta"):
        net = build_model({"name": "torchvision/vit_b_16"})
        macs = count_macs(net, torch.zeros(1, 3, 224, 224))
    assert not any(isinstance(module, nn.MultiheadAttention) for module in net.modules())
    # 17.564e9 multiplications in torchvision's table, those of queries, keys and values with each other among them.
    assert (macs + 2 * 12 * 197**2 * 768) / 1e9 == pytest.approx(17.564, abs=0.01)


class Biased(nn.Module):
    """A number a head, and a width that must not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.attn_dim, self.dim = 3, 12, 12
        self.table, self.scale = nn.Parameter(torch.rand(5, 3)), nn.Parameter(torch.rand(3, 1, 1))
        self.register_buffer("slopes", torch.rand(3))
        self.square = nn.Parameter(torch.rand(3, 3))
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)


def test_what_goes_with_heads() -> None:
    module = Biased()
    (heads,) = find_heads(module).values()
    assert heads == Heads("", "qkv", "proj", 3, 4)
    assert heads.rows([0, 2]) == [*range(4), *range(8, 16), *range(20, 28), *range(32, 36)]
    assert heads.columns([0, 2]) == [0, 1, 2, 3, 8, 9, 10, 11]
    table, slopes = module.table.detach().clone(), module.slopes.clone()
    keep_heads(module, heads, [0, 2])
    assert (module.num_heads, module.attn_dim, module.dim) == (2, 8, 12)
    assert torch.equal(module.table, table[:, [0, 2]])
    assert torch.equal(module.slopes, slopes[[0, 2]])
    assert module.scale.shape == (2, 1, 1)
    # Which side counts heads cannot be told.
    assert module.square.shape == (3, 3)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
def test_pytorchs_encoder_with_a_mask_and_nested_tensors() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), 2).eval()
    tokens, mask = torch.rand(2, 5, 12), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        before = encoder(tokens, src_key_padding_mask=mask)
        after = open_heads(encoder)(tokens, src_key_padding_mask=mask)
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=1e-4, atol=1e-5)


def test_layers_of_pytorchs_encoder_count_and_are_units() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 4, 4)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(self.patches(x).flatten(2).mT).mean(1))  # type: ignore[no-any-return]

    counted = macs_by_layer(Net().eval(), torch.rand(1, 3, 16, 16))
    assert counted["encoder.layers.0.linear1"] == counted["encoder.layers.0.linear2"] == 16 * 16 * 32
    assert torch.backends.mha.get_fastpath_enabled()
