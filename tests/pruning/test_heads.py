"""Attention heads as units: found, proved, cut, saved; modules that cannot do without a head are told apart."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks.checkpoint import load_pruned, save_pruned
from freqprune.networks.heads import open_heads
from freqprune.networks.profiling import macs_by_layer
from freqprune.networks.registry import register_model
from freqprune.pruning.amount import Amount
from freqprune.pruning.criteria import criterion_names, scores
from freqprune.pruning.cutting import Material, Recipe, cut
from freqprune.pruning.importance import Evidence
from freqprune.pruning.proof import masked_forward
from freqprune.pruning.recipe import Reconstruction
from freqprune.pruning.surgery import Plan
from freqprune.tagging.measurement import tag
from freqprune.tagging.stimulus import Stimulus

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """As in timm's networks, with a bias of each head; `how` says what its forward counts on."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.how = 4, 3, how
        self.qkv, self.proj = nn.Linear(8, 36), nn.Linear(12, 8)
        self.table = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        n_images, n_tokens, _ = x.shape
        shape = (-1, 3, 3) if self.how == "head first" else (3, self.num_heads, 12 // self.num_heads)
        if self.how != "width":
            shape = (-1, 3, 3) if self.how == "head first" else (3, -1, self.head_dim)
        parts = self.qkv(x).unflatten(-1, shape)
        q, k, v = parts.unbind(3) if self.how == "head first" else parts.unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.mT + self.table[:, None, None]).softmax(-1) * (1 + self.table.sigmoid()[:, None, None])
        if self.how == "talking":
            weights = weights + weights.mean(1, keepdim=True)
        x = weights @ v
        return self.proj(x.transpose(1, 2).reshape(n_images, n_tokens, -1))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.patch, self.norm, self.attn = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8), Attention(how)
        self.mlp = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.attn(self.norm(x))
        return self.head((x + self.mlp(x)).mean(1))  # type: ignore[no-any-return]


def tokens(how: str = "") -> nn.Module:
    torch.manual_seed(0)
    return Tokens(how).eval()


def test_heads_go_one_by_one() -> None:
    net = tokens()
    plan = Plan(net, X)
    unit = plan.unit("attn.qkv")
    assert (unit.members, unit.n_filters, unit.readers) == (("attn.qkv",), 4, ("attn.proj",))
    assert plan.choose() == ["attn.qkv", "mlp.0"]
    kept = {"attn.qkv": torch.tensor([0, 3])}
    assert plan.silenced(kept) == {"attn.proj": [3, 4, 5, 6, 7, 8]}
    small = plan.apply(kept)
    rows = [0, 1, 2, 9, 10, 11]
    assert torch.equal(small.attn.qkv.weight, net.attn.qkv.weight[[r + 12 * part for part in range(3) for r in rows]])
    assert torch.equal(small.attn.proj.weight, net.attn.proj.weight[:, rows])
    assert torch.equal(small.attn.table, net.attn.table[[0, 3]])
    assert (small.attn.num_heads, net.attn.num_heads) == (2, 4)
    torch.testing.assert_close(small(X), masked_forward(net, plan.silenced(kept), X))
    assert plan.macs({"attn.qkv": 2}) == sum(macs_by_layer(small, X[:1]).values())
    # And again, of what is left.
    again = Plan(small, X)
    assert again.unit("attn.qkv").n_filters == 2
    assert again.apply({"attn.qkv": torch.tensor([1])}).attn.num_heads == 1
    with pytest.raises(InputError, match="would keep no filter"):
        plan.apply({"attn.qkv": torch.tensor([], dtype=torch.long)})
    with pytest.raises(InputError, match=r"must be distinct indices in \[0, 3\]"):
        plan.apply({"attn.qkv": torch.tensor([4])})


@pytest.mark.parametrize("how", ["width", "head first", "talking"])
def test_heads_that_their_module_cannot_do_without(how: str) -> None:
    plan = Plan(tokens(how), X)
    assert plan.choose() == ["mlp.0"]
    with pytest.raises(InputError, match=r"attn\.qkv.* a number of heads that its module cannot do without"):
        plan.unit("attn.qkv")
    with pytest.raises(InputError, match=r"picks attn\.qkv"):
        plan.choose(["attn.*"])


def test_scores_are_means_over_what_is_one_head() -> None:
    net = tokens()
    plan = Plan(net, X)
    norms = net.attn.qkv.weight.detach().double().norm(dim=1)
    expected = torch.stack([norms[[p * 12 + h * 3 + i for p in range(3) for i in range(3)]].mean() for h in range(4)])
    torch.testing.assert_close(scores("l2", Evidence(net, graph=plan.graph), ["attn.qkv"])["attn.qkv"], expected)
    response = tag(net, X, Stimulus(), layers=["attn.qkv"])
    found = scores("amplitude", Evidence(net, response, graph=plan.graph), ["attn.qkv"])["attn.qkv"]
    by_row = response.amplitude("attn.qkv", "fundamentals").sum(-1).double()
    torch.testing.assert_close(found, by_row.view(3, 4, 3).mean((0, 2)))
    # The mean over the weights that go with a head: of its rows, and, for values, the columns that read them.
    group = scores("group_l2", Evidence(net, graph=plan.graph), ["attn.qkv"])["attn.qkv"]
    assert group.shape == (4,)
    assert len(group.unique()) == 4


@pytest.mark.parametrize("name", criterion_names())
def test_every_criterion_scores_heads(name: str) -> None:
    net, pixels = tokens(), torch.rand(40, 3, 32, 32)
    material = Material(
        X.clamp(0.1, 0.9), lambda p: (p - 0.5) / 0.25, [0.5] * 3, [0.25] * 3, calibration=pixels,
        labelled=(pixels, torch.arange(40) % 4),
    )  # fmt: skip
    recipe = Recipe(Amount(ratio=0.5, scope="layer"), name, layers=["attn.qkv"], calibrate_on="images")
    if name == "bn_scale":
        with pytest.raises(InputError, match=r"finds nothing to score in 'attn.qkv'"):
            cut(net, material, recipe, Stimulus())
        return
    done = cut(net, material, recipe, Stimulus())
    assert done.scores["attn.qkv"].shape == (4,)
    assert len(done.scores["attn.qkv"].unique()) > 1
    assert done.net.attn.num_heads == 2


@pytest.mark.parametrize("compensation", ["least_squares", "sequential"])
def test_a_head_that_says_what_another_says_is_made_up_for(compensation: str) -> None:
    net = tokens()
    with torch.no_grad():
        for part in range(3):
            # Head 2 does as head 0.
            to, by = (slice(part * 12 + head * 3, part * 12 + head * 3 + 3) for head in (2, 0))
            net.attn.qkv.weight[to], net.attn.qkv.bias[to] = net.attn.qkv.weight[by], net.attn.qkv.bias[by]
        net.attn.table[2] = net.attn.table[0]
    pixels = torch.rand(64, 3, 32, 32)
    material = Material(X, lambda p: p, [0.0] * 3, [1.0] * 3, calibration=pixels)
    recipe = Recipe(
        Amount(ratio=0.25, scope="layer"), "redundancy", layers=["attn.qkv"], calibrate_on="images",
        compensation=compensation, reconstruction=Reconstruction(ridge=1e-6),
    )  # fmt: skip
    done = cut(net, material, recipe, Stimulus())
    assert {*done.kept["attn.qkv"].tolist()} in ({1, 2, 3}, {0, 1, 3})
    bare = Plan(net, X).apply(done.kept)
    with torch.no_grad():
        lost, left = ((other(X) - net(X)).abs().max() for other in (bare, done.net))
    assert left < 0.02 * lost


def test_a_pruned_one_is_rebuilt(tmp_path: Path) -> None:
    register_model("tokens_with_heads", Tokens)
    net = tokens()
    kept = {"attn.qkv": torch.tensor([1, 2, 3]), "mlp.0": torch.arange(4)}
    small = Plan(net, X).apply(kept)
    save_pruned(tmp_path / "pruned.ckpt", small, kept, model={"name": "tokens_with_heads"})
    again = load_pruned(tmp_path / "pruned.ckpt")
    torch.testing.assert_close(again(X), small(X))
    assert again.attn.num_heads == 3


class Encoded(Tokens):
    """The same around PyTorch's own layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)


def test_pytorchs_attention_once_it_is_opened() -> None:
    torch.manual_seed(0)
    net = Encoded().eval()
    # In eval mode it would run as one fused operation; heads of PyTorch's own attention cannot go.
    assert Plan(net, X).choose() == ["attn.linear1", "mlp.0"]
    plan = Plan(open_heads(net), X)
    assert plan.choose() == ["attn.self_attn.qkv", "attn.linear1", "mlp.0"]
    small = plan.apply({"attn.self_attn.qkv": torch.tensor([1])})
    assert tuple(small.attn.self_attn.proj.weight.shape) == (8, 4)
