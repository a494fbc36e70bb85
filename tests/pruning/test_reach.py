"""Units beyond plain convolutions: groups, squeeze-and-excite, hidden linear layers and gates, each cut proved."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from freqprune.errors import InputError
from freqprune.networks.checkpoint import load_pruned, save_pruned
from freqprune.networks.profiling import macs_by_layer
from freqprune.networks.registry import build_model
from freqprune.pruning.amount import Amount
from freqprune.pruning.criteria import criterion_names, scores
from freqprune.pruning.cutting import Material, Recipe, cut
from freqprune.pruning.followed import follow
from freqprune.pruning.importance import Evidence
from freqprune.pruning.recipe import Reconstruction
from freqprune.pruning.selection import select
from freqprune.pruning.surgery import Plan
from freqprune.tagging.measurement import tag
from freqprune.tagging.stimulus import Stimulus

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class InGroups(nn.Module):
    """1 x 1, in four groups, 1 x 1, as in ResNeXt; with squeeze-and-excite, as in RegNetY."""

    def __init__(self, excite: bool) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, groups=4)
        self.squeeze, self.excite = nn.Conv2d(16, 6, 1), nn.Conv2d(6, 16, 1)
        self.c, self.d, self.use = nn.Conv2d(16, 7, 1), nn.Conv2d(7, 5, 1), excite

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.norm(self.a(x)))))
        if self.use:
            x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.d(F.relu(self.c(x))).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("excite", [False, True])
def test_convolutions_in_groups_lose_whole_groups(excite: bool) -> None:
    torch.manual_seed(0)
    net = InGroups(excite).eval()
    plan = Plan(net, X)
    unit = plan.unit("a")
    assert (unit.n_filters, unit.width) == (4, 4)
    assert unit.members == (("a", "excite") if excite else ("a",))
    assert plan.choose() == ["a", "squeeze", "c"] if excite else ["a", "c"]
    small = plan.apply({"a": torch.tensor([0, 2])})
    assert type(small.b) is nn.Conv2d
    assert (small.b.groups, small.b.in_channels, tuple(small.b.weight.shape)) == (2, 8, (8, 4, 3, 3))
    left = [0, 1, 2, 3, 8, 9, 10, 11]
    assert torch.equal(small.b.weight, net.b.weight[left])
    assert torch.equal(small.c.weight, net.c.weight[:, left])
    assert plan.macs({"a": 2}) == sum(macs_by_layer(small, X[:1]).values())
    assert type(net.b) is nn.Conv2d
    # What is one filter scores the mean of its channels.
    found = scores("l2", Evidence(net, graph=plan.graph), ["a"])["a"]
    norms = net.a.weight.detach().flatten(1).double().norm(dim=1)
    if not excite:
        torch.testing.assert_close(found, norms.view(4, 4).mean(1))
    assert found.shape == (4,)


class Gated(nn.Module):
    """A perceptron on tokens whose hidden features are gated, as in SwiGLU, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.norm, self.gate, self.value = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(8, 12)
        self.out = nn.Linear(12, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Dropout(), nn.Linear(10, 8))
        self.qkv, self.proj, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.proj(torch.softmax(q @ k.mT, -1) @ v)
        x = x + self.out(F.silu(self.gate(self.norm(x))) * self.value(self.norm(x)) * 0.5)
        x = x + self.mlp(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def test_hidden_linear_layers_and_their_gates() -> None:
    torch.manual_seed(0)
    net = Gated().eval()
    found = follow(net, X[:1])
    assert {name: (one.members, one.readers) for name, one in found.items()} == {
        "gate": (["gate", "value"], ["out"]),
        "mlp.0": (["mlp.0"], ["mlp.3"]),
    }
    plan = Plan(net, X)
    assert plan.choose() == ["gate", "mlp.0"]
    kept = {"gate": torch.tensor([1, 4, 5]), "mlp.0": torch.arange(4)}
    small = plan.apply(kept)
    assert torch.equal(small.value.weight, net.value.weight[[1, 4, 5]])
    assert torch.equal(small.out.weight, net.out.weight[:, [1, 4, 5]])
    assert plan.macs({"gate": 3, "mlp.0": 4}) == sum(macs_by_layer(small, X[:1]).values())
    for criterion in ("l2", "group_l2", "snr"):
        response = tag(net, X, Stimulus(), layers=["gate", "value", "mlp.0"])
        score = scores(criterion, Evidence(net, response, graph=plan.graph), ["gate", "mlp.0"])
        assert [len(values) for values in score.values()] == [12, 10]
    pixels = X.clamp(0.1, 0.9)
    material = Material(
        pixels, lambda p: (p - 0.5) / 0.25, [0.5] * 3, [0.25] * 3, calibration=torch.rand(40, 3, 32, 32)
    )
    for criterion in ("snr", "redundancy", "logit_error", "l2"):
        recipe = Recipe(
            Amount(ratio=0.3, scope="layer"), criterion, compensation="sequential", calibrate_on="images",
            reconstruction=Reconstruction(rounds=1),
        )  # fmt: skip
        done = cut(net, material, recipe, Stimulus())
        assert [len(one) for one in done.kept.values()] == [8, 7]
        assert done.net(X).isfinite().all()
    with pytest.raises(InputError, match="would keep no filter"):
        plan.apply({"mlp.0": torch.tensor([], dtype=torch.long)})


@pytest.mark.parametrize("name", criterion_names())
@pytest.mark.parametrize("kind", ["groups", "perceptron"])
def test_every_criterion_scores_every_kind_of_unit(kind: str, name: str) -> None:
    torch.manual_seed(0)
    net = (InGroups(excite=True) if kind == "groups" else Gated()).eval()
    plan = Plan(net, X)
    pixels = torch.rand(40, 3, 32, 32)
    material = Material(
        X.clamp(0.1, 0.9), lambda p: (p - 0.5) / 0.25, [0.5] * 3, [0.25] * 3, calibration=pixels,
        labelled=(pixels, torch.arange(40) % 4),
    )  # fmt: skip
    recipe = Recipe(Amount(ratio=0.3, scope="layer"), name, calibrate_on="images")
    if name == "bn_scale":
        # Not every unit is normalised.
        with pytest.raises(InputError, match=r"finds nothing to score in '(gate|squeeze)'"):
            cut(net, material, recipe, Stimulus())
        return
    done = cut(net, material, recipe, Stimulus())
    for unit, score in done.scores.items():
        assert score.shape == (plan.unit(unit).n_filters,)
        assert score.isfinite().all()
        assert len(score.unique()) > 1
    assert all(len(kept) < plan.unit(unit).n_filters for unit, kept in done.kept.items())


class Elsewhere(nn.Module):
    """Hidden features that something else than a linear layer looks at."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.norm, self.b = how, nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x.mean((2, 3)).repeat(1, 2)[:, :4])
        match self.how:
            case "norm":
                y = self.norm(y)
            case "softmax":
                y = y.softmax(-1)
            case "sum":
                return self.b(y) + y[:, :4]  # type: ignore[no-any-return]
            case "twice":
                return self.b(y).repeat(1, 2)[:, :6] * self.a.weight.sum()
            case "features":
                y = y.flip(-1)
        return self.b(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["norm", "softmax", "sum", "twice", "features"])
def test_features_that_go_elsewhere_are_no_unit(how: str) -> None:
    assert follow(Elsewhere(how).eval(), X[:1]) == {}


class Shuffled(nn.Module):
    """Half of the channels through a gated, separable branch, then shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.a, self.a_norm = nn.Conv2d(4, 10, 1, bias=False), nn.BatchNorm2d(10)
        self.depth, self.depth_norm = nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=False), nn.BatchNorm2d(10)
        self.gate, self.b = nn.Conv2d(4, 10, 1), nn.Conv2d(10, 4, 1)
        self.last, self.head = nn.Conv2d(8, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        one, two = x.chunk(2, 1)
        inner = self.depth_norm(self.depth(F.max_pool2d(F.relu(self.a_norm(self.a(two))), 3, 1, 1)))
        two = F.relu(self.b(inner * torch.sigmoid(self.gate(two.mean((2, 3), keepdim=True)))))
        n, _, height, width = x.shape
        x = torch.cat([one, two], 1).view(n, 2, 4, height, width).transpose(1, 2).reshape(n, 8, height, width)
        return self.head(F.relu(self.last(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_convolutions_that_torch_pruning_cannot_follow() -> None:
    torch.manual_seed(0)
    net = Shuffled()
    # Statistics that no channel shares with another.
    for _ in range(3):
        net(torch.randn(4, 3, 32, 32))
    found = follow(net.eval(), X[:1], convolutions=True)
    assert {name: (one.members, one.between, one.readers) for name, one in found.items()} == {
        "a": (["a", "gate"], ["a_norm", "depth", "depth_norm"], ["b"]),
        "last": (["last"], [], ["head"]),
    }
    plan = Plan(net, X)
    assert plan.choose() == ["a", "last"]
    small = plan.apply({"a": torch.tensor([0, 3, 9]), "last": torch.arange(5)})
    assert torch.equal(small.depth.weight, net.depth.weight[[0, 3, 9]])
    assert torch.equal(small.depth_norm.running_mean, net.depth_norm.running_mean[[0, 3, 9]])
    assert plan.macs({"a": 3, "last": 5}) == sum(macs_by_layer(small, X[:1]).values())


class Inverse(nn.Module):
    """Nothing that either can follow: how wide its first layer looks depends on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad or torch.is_grad_enabled():
            raise ZeroDivisionError("as torch-pruning has it")
        return self.b(self.a(x)).mean((2, 3)) if x.sum() > 0 else self.a(x).mean((2, 3))  # type: ignore[no-any-return]


def test_what_nobody_can_follow_is_refused() -> None:
    with pytest.raises(InputError, match=r"torch-pruning .* cannot trace Inverse .*as torch-pruning has it"):
        Plan(Inverse(), X)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("regnet_y_400mf", 0.9),
        ("mobilenet_v3_small", 0.9),
        ("shufflenet_v2_x0_5", 0.9),
        # Of small images: what is padded to windows of 7 goes through queries, keys and values, which keep their heads.
        pytest.param("swin_t", 0.3, marks=pytest.mark.slow),
    ],
)
def test_networks_of_torchvision(name: str, least: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = build_model({"name": f"torchvision/{name}"}).eval(), torch.rand(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = Plan(net, x)
    units = plan.choose(streams=True)
    if name == "shufflenet_v2_x0_5":
        with pytest.raises(
            InputError, match=r"'stage2.0.branch2.5' shares .* channels that torch-pruning cannot follow"
        ):
            plan.unit("stage2.0.branch2.5")
    assert 1 - plan.macs(dict.fromkeys(units, 1)) / plan.macs({}) > least
    kept = select(scores("l2", Evidence(net, graph=plan.graph), units), Amount(ratio=0.3, scope="layer"), plan.macs)
    small = plan.apply(kept)
    save_pruned(tmp_path / "pruned.ckpt", small, kept)
    with torch.no_grad():
        torch.testing.assert_close(load_pruned(tmp_path / "pruned.ckpt")(x), small(x))


def test_layers_around_transposed_convolutions_keep_their_filters() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3), nn.ReLU(),
        nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).eval()  # fmt: skip
    plan = Plan(net, X)
    assert "2" in plan.coupled
    chosen = plan.choose()
    assert "2" not in chosen
    assert "4" not in chosen
    assert "0" in chosen
    small = plan.apply({"0": torch.arange(3), "6": torch.arange(2)})
    assert plan.macs({"0": 3, "6": 2}) == sum(macs_by_layer(small, X[:1]).values())
