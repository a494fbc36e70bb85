"""Whole residual blocks: found in any network, proved, made up for, scored, saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer

from freqprune.errors import InputError
from freqprune.networks.blocks import ACTIVATION, Shortcut, drop_blocks, dropped_blocks
from freqprune.networks.checkpoint import load_pruned, save_pruned
from freqprune.networks.profiling import count_macs, macs_by_layer
from freqprune.networks.registry import build_model
from freqprune.networks.trace import Trace
from freqprune.pruning import cutting
from freqprune.pruning.amount import Amount
from freqprune.pruning.blocks import find_blocks
from freqprune.pruning.compensation import compensate
from freqprune.pruning.cutting import Material, Recipe, cut, plan_cut
from freqprune.pruning.depth import block_scores
from freqprune.pruning.moments import input_moments
from freqprune.pruning.recipe import Reconstruction
from freqprune.pruning.reconstruction import error_without, reconstruct
from freqprune.pruning.selection import select
from freqprune.pruning.surgery import Plan
from freqprune.tagging.stimulus import Stimulus

X = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
GONE = torch.tensor([], dtype=torch.long)


class Odd(nn.Module):
    """Blocks whose activation is a function, whose input is no ReLU's, and that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.plain, self.scaled, self.through = Plain(6), Scaled(6), nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU())
        self.projected = Projected(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.projected(self.through(self.scaled(self.plain(self.stem(x)))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Plain(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(n, n, 3, padding=1), nn.BatchNorm2d(n), nn.Conv2d(n, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(F.relu(self.norm(self.a(x)))))


class Scaled(Plain):
    """The branch's end is no module's output; the shortcut is scaled by nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x)))) * 0.5 + x  # type: ignore[no-any-return]


class Projected(nn.Module):
    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Conv2d(n, m, 3, padding=1), nn.Conv2d(m, m, 3, padding=1), nn.Conv2d(n, m, 1)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.b(F.relu(self.a(x))) + self.way(x))  # type: ignore[no-any-return]


def odd() -> Odd:
    torch.manual_seed(0)
    net = Odd()
    for _ in range(3):
        net(torch.randn(8, 3, 32, 32))
    return net.eval()


def test_blocks_are_found_with_what_stays_of_them() -> None:
    net = odd()
    found = find_blocks(net, Trace(net, X[:1]))
    # The input of the first is no ReLU's, so that its activation has to stay.
    assert {name: (block.left, block.layers) for name, block in found.items()} == {
        "plain": ((ACTIVATION,), ("plain.a", "plain.b")),
        "scaled": ((), ("scaled.a", "scaled.b")),
        "projected": (("way", "act"), ("projected.a", "projected.b")),
    }


@pytest.mark.parametrize(
    ("name", "n_blocks"),
    [
        ("resnet20", 9),
        ("torchvision/resnet18", 8),
        ("torchvision/mobilenet_v2", 10),
        pytest.param("torchvision/densenet121", 0, marks=pytest.mark.slow),
    ],
)
def test_blocks_of_known_networks(name: str, n_blocks: int) -> None:
    net = build_model({"name": name}).eval()
    assert len(find_blocks(net, Trace(net, X[:1]))) == n_blocks


def test_blocks_of_a_vision_transformer() -> None:
    """Attention and perceptron of a layer go together: two branches on one shortcut."""
    net = VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5
    ).eval()
    nn.init.normal_(net.heads.head.weight)
    plan = Plan(net, X, blocks=True)
    assert [len(block.ends) for block in plan.blocks.values()] == [2, 2, 2]
    small = plan.apply({"encoder.layers.encoder_layer_1": GONE})
    expected = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5
    ).eval()
    state = {key: value for key, value in net.state_dict().items() if "encoder_layer_1" not in key}
    expected.load_state_dict({key.replace("encoder_layer_2", "encoder_layer_1"): value for key, value in state.items()})
    with torch.no_grad():
        torch.testing.assert_close(small(X), expected(X))


def test_a_network_without_some_blocks_and_filters() -> None:
    net = odd()
    plan = Plan(net, X, blocks=True)
    kept = {"plain": GONE, "projected": GONE, "scaled": torch.tensor([0]), "plain.a": torch.arange(2),
            "scaled.a": torch.tensor([1, 4])}  # fmt: skip
    small = plan.apply(kept)
    assert dropped_blocks(small) == {"plain": [ACTIVATION], "projected": ["way", "act"]}
    with torch.no_grad():
        x = F.relu(net.stem(X))
        inner = F.relu(net.scaled.norm(net.scaled.a(x)))
        inner[:, [0, 2, 3, 5]] = 0
        x = net.scaled.b(inner) * 0.5 + x
        expected = net.head(net.projected.act(net.projected.way(net.through(x))).mean((2, 3)))
        torch.testing.assert_close(small(X), expected)
    # Filters of a block that is gone are no matter; MACs are those of what is left.
    assert set(plan.sensible(kept)) == {"plain", "projected", "scaled", "scaled.a"}
    widths = {name: len(indices) for name, indices in kept.items()}
    assert plan.macs(widths) == sum(macs_by_layer(small, X[:1]).values())


def test_a_cut_is_checked_against_the_silenced_branch() -> None:
    net = odd()
    plan = Plan(net, X, blocks=True)
    block = plan.blocks["projected"]
    wrong = type(block)(block.name, block.ends, block.branch, block.gone, block.layers, ("way",))
    plan.blocks["projected"] = wrong
    with pytest.raises(InputError, match="computes something else than the network"):
        plan.apply({"projected": GONE})


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_networks_without_blocks_are_rebuilt(shortcut: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = build_model({"name": "resnet14", "shortcut": shortcut}).eval()
    plan = Plan(net, X, blocks=True)
    kept = {"layer1.1": GONE, "layer2.0": GONE, "layer3.0.conv1": torch.arange(40)}
    # Streams as well: the first of a stage is built as wide as its shortcut.
    kept |= {name: torch.arange(plan.unit(name).n_filters // 2) for name in plan.streams}
    small = plan.apply(kept)
    save_pruned(tmp_path / "pruned.ckpt", small, {})
    again = load_pruned(tmp_path / "pruned.ckpt")
    with torch.no_grad():
        assert torch.equal(again(X), small(X))
    assert isinstance(again.layer2[0], Shortcut)
    with pytest.raises(InputError, match=r"no block 'layer4.0'"):
        drop_blocks(again, {"layer4.0": []})
    with pytest.raises(InputError, match=r"no block 'layer1.0' with way"):
        drop_blocks(again, {"layer1.0": ["way"]})


def test_a_stream_of_a_block_that_goes_is_cut_all_the_same() -> None:
    torch.manual_seed(0)
    net, x = build_model({"name": "resnet14"}).eval(), torch.rand(2, 3, 16, 16)
    plan = Plan(net, x, blocks=True)
    kept = {"layer1.1": GONE, "conv1": torch.arange(8), "layer1.1.conv1": torch.arange(3)}
    # What is in the block goes with it, the stream that it adds to does not.
    assert set(plan.sensible(kept)) == {"layer1.1", "conv1"}
    small = plan.apply(kept)
    assert small.get_submodule("layer1.0.conv2").out_channels == 8
    widths = {name: len(indices) for name, indices in plan.sensible(kept).items()}
    assert count_macs(small, x) == plan.macs(widths)
    # One that is named by a layer of the block stays as it is.
    net = build_model({"name": "resnet14", "shortcut": "B"}).eval()
    plan = Plan(net, x, blocks=True)
    leaders = [name for name in plan.streams if name.startswith("layer2.0.")]
    assert leaders
    assert set(plan.sensible({"layer2.0": GONE, leaders[0]: torch.arange(8)})) == {"layer2.0"}


@pytest.mark.parametrize("method", ["mean", "least_squares"])
def test_streams_and_blocks_are_made_up_for_at_once_too(method: str) -> None:
    torch.manual_seed(0)
    net, x = build_model({"name": "resnet14", "stage_widths": [4, 8, 8]}).eval(), torch.rand(8, 3, 16, 16)
    plan = Plan(net, x, blocks=True)
    kept = {"layer1.1": GONE, "layer2.1": torch.tensor([0]), "conv1": torch.arange(3)}
    layers = [name for name in plan.silenced(kept) if not name.endswith("shortcut")]
    moments = input_moments(net, layers, [x], n_positions=None)
    small = plan.apply(kept)

    def off() -> float:
        """What the first layer that reads the stream is off by after its norm: its means, or all that it answers."""
        found: list[Tensor] = []
        for one in (small, net):
            handle = one.get_submodule("layer1.0.bn1").register_forward_hook(lambda _m, _i, y: found.append(y))
            with torch.no_grad():
                one(x)
            handle.remove()
        moved = found[0] - found[1]
        return float((moved.mean((0, 2, 3)) if method == "mean" else moved).square().sum())

    before = off()
    compensate(plan, small, kept, moments, method)
    assert off() < (0.5 if method == "mean" else 0.95) * before


@pytest.mark.parametrize("amount", [{"ratio": 0.3}, {"threshold": 0.1}, {"macs_cut": 0.3, "scope": "layer"}])
def test_amounts_that_count_filters_are_refused_where_blocks_may_go(amount: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"counts filters, of which a residual block is none"):
        Recipe(Amount(**amount), "logit_error", blocks=True)
    with pytest.raises(InputError, match=r"counts filters, of which a residual block is none"):
        select({"a": torch.ones(4), "b": torch.ones(1)}, Amount(**amount), lambda widths: 1.0, whole=["b"])


def test_the_layers_after_a_block_make_up_for_it() -> None:
    """A block whose branch is a linear map of its input: the next block's convolutions can take it over."""
    torch.manual_seed(0)
    net = odd()
    batches = list(torch.rand(32, 3, 32, 32).split(16))
    how = Reconstruction(rounds=0, positions=64)
    twin, _ = reconstruct(net, {}, batches, how, without=["scaled"])
    plan = Plan(net, X, blocks=True)

    def error(small: nn.Module) -> float:
        with torch.no_grad():
            return sum(float((small(x) - net(x)).square().sum()) for x in batches) / 32

    plain = error(plan.apply({"scaled": GONE}))
    made_up = error(plan.apply({"scaled": GONE}, weights=twin))
    assert made_up < 0.3 * plain
    assert made_up == pytest.approx(error_without(net, ["scaled"], batches, how), rel=1e-3)


def test_blocks_score_what_they_add_to_the_change_of_the_logits() -> None:
    net = odd()
    with torch.no_grad():
        # A block that hardly does anything goes first, and costs nothing.
        net.scaled.b.weight.mul_(1e-4)
        net.scaled.b.bias.zero_()
    images = torch.rand(16, 3, 32, 32)
    found = block_scores(net, [images])
    assert list(found) == ["plain", "scaled", "projected"]
    assert found["scaled"] < 1e-3 * min(found["plain"], found["projected"])
    # What all add together is what the network without any of them is off.
    order = sorted(found, key=lambda name: float(found[name]))
    total = sum(float(score) for score in found.values())
    everything = error_without(net, order, [images], Reconstruction(rounds=0, positions=64))
    assert total >= everything * 0.999
    # One after the other, each what it adds to the most that was off before.
    off = [error_without(net, order[: n + 1], [images], Reconstruction(rounds=0, positions=64)) for n in range(3)]
    most = [max(off[:n], default=0.0) for n in range(3)]
    added = [now - before for now, before in zip(off, most, strict=True)]
    by_hand = [max(added[: n + 1]) for n in range(3)]
    assert [float(found[name]) for name in order] == pytest.approx(by_hand, rel=1e-3)


def test_without_compensation_blocks_score_the_bare_change_of_an_image() -> None:
    net, images = odd(), torch.rand(8, 3, 8, 8)
    plan, names = Plan(net, X, blocks=True), ["plain", "scaled", "projected"]

    def off(*gone: str) -> float:
        with torch.no_grad():
            small = plan.apply(dict.fromkeys(gone, GONE), check=False)
            return float((small(images) - net(images)).square().sum(1).mean())

    first = min(names, key=off)
    second = min({*names} - {first}, key=lambda name: off(first, name))
    found = block_scores(net, list(images.split(4)), None)
    assert float(found[first]) == pytest.approx(off(first), rel=1e-4)
    assert float(found[second]) == pytest.approx(max(off(first), off(first, second) - off(first)), rel=1e-4)


def test_a_cut_that_makes_up_for_nothing_ranks_blocks_so() -> None:
    net, pixels = odd(), torch.rand(16, 3, 32, 32)
    recipe = Recipe(Amount(macs_cut=0.3), "logit_error", blocks=True, calibrate_on="images")
    done = cut(net, Material(X, lambda p: p, calibration=pixels), recipe, Stimulus())
    plan = Plan(net, X, blocks=True)
    with torch.no_grad():
        alone = [(plan.apply({name: GONE})(pixels) - net(pixels)).square().sum(1).mean() for name in plan.blocks]
    # The first that goes, the one that changes least, scores its own change.
    assert min(float(done.scores[name]) for name in plan.blocks) == pytest.approx(float(min(alone)), rel=1e-3)


def test_ranking_blocks_takes_the_memory_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def ranked(net: nn.Module, batches: Any, how: Reconstruction, *rest: Any, **more: Any) -> dict[str, Tensor]:
        seen.append(how)
        return block_scores(net, batches, how, *rest, **more)

    monkeypatch.setattr(cutting, "block_scores", ranked)
    recipe = Recipe(
        Amount(macs_cut=0.3, scope="per_mac"), "logit_error", blocks=True, calibrate_on="images",
        compensation="sequential", reconstruction=Reconstruction(memory_gb=0.5),
    )  # fmt: skip
    cut(odd(), Material(X, lambda p: p, calibration=torch.rand(64, 3, 32, 32)), recipe, Stimulus())
    assert [(how.memory_gb, how.rounds) for how in seen] == [(0.5, 0)]


@pytest.mark.parametrize("compensation", ["mean", "least_squares"])
def test_a_cut_with_blocks_makes_up_at_once(compensation: str) -> None:
    net, pixels = odd(), torch.rand(64, 3, 32, 32)
    recipe = Recipe(
        Amount(macs_cut=0.5, scope="per_mac"), "logit_error", blocks=True, calibrate_on="images",
        compensation=compensation,
    )  # fmt: skip
    done = cut(net, Material(X, lambda p: p, calibration=pixels), recipe, Stimulus())
    assert not {*done.kept} & {"plain", "scaled", "projected"}
    assert sum(macs_by_layer(done.net, X[:1]).values()) <= 0.5 * sum(macs_by_layer(net, X[:1]).values())


def test_blocks_of_a_network_in_half_precision_are_told_apart() -> None:
    """Squared changes of logits add up to more than float16 can hold."""
    net = odd().half()
    with torch.no_grad():
        net.head.weight.mul_(3000)
        net.scaled.b.weight.mul_(1e-3)
        net.scaled.b.bias.zero_()
    found = block_scores(net, [X.half()], None)
    assert all(score.isfinite().all() for score in found.values())
    assert min(found, key=lambda name: float(found[name])) == "scaled"


def test_the_cut_of_a_run_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of which less is left than there should be."""
    net = odd()
    plan = Plan(net, X, blocks=True)
    plan.blocks = {"projected": replace(plan.blocks["projected"], left=("way",))}
    monkeypatch.setattr(cutting, "plan_cut", lambda *_: (plan, ["plain.a"]))
    recipe = Recipe(Amount(macs_cut=0.3), "logit_error", blocks=True, calibrate_on="images")
    with pytest.raises(InputError, match="computes something else than the network"):
        cut(net, Material(X, lambda p: p, calibration=X), recipe, Stimulus())


def test_blocks_and_filters_are_ranked_together() -> None:
    scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "block": torch.tensor([2.5])}
    cost = lambda widths: 10.0 * widths.get("a", 4) + 30.0 * widths.get("block", 1)  # noqa: E731
    kept = select(scores, Amount(macs_cut=0.4, scope="per_mac"), cost, whole=["block"])
    # 2.5 over 30 is less than 1 over 10.
    assert {name: indices.tolist() for name, indices in kept.items()} == {"a": [0, 1, 2, 3], "block": []}
    kept = select(scores, Amount(macs_cut=0.5, scope="per_mac"), cost, whole=["block"])
    assert {name: indices.tolist() for name, indices in kept.items()} == {"a": [1, 2, 3], "block": []}


def test_a_cut_of_macs_with_blocks() -> None:
    net = odd()
    pixels = torch.rand(64, 3, 32, 32)
    material = Material(X, lambda p: p, calibration=pixels)
    how = {"criterion": "logit_error", "compensation": "sequential", "calibrate_on": "images"}
    recipe = Recipe(Amount(macs_cut=0.5, scope="per_mac"), blocks=True, reconstruction=Reconstruction(rounds=0), **how)  # type: ignore[arg-type]
    done = cut(net, material, recipe, Stimulus())
    before, after = (sum(macs_by_layer(one, X[:1]).values()) for one in (net, done.net))
    assert after <= 0.5 * before
    assert done.dropped
    assert all(not name.startswith(tuple(f"{block}." for block in done.dropped)) for name in done.kept)
    assert any("residual blocks went altogether" in remark for remark in done.remarks)
    with pytest.raises(InputError, match="l2 does not compare with; use logit_error or logit_redundancy"):
        Recipe(Amount(macs_cut=0.5), criterion="l2", blocks=True)
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="Sequential has no residual block that may go"):
        cut(chain, material, recipe, Stimulus())


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ({}, [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]),
        ({"exclude": "layer3.*"}, ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]),
        ({"exclude": "layer[12].0.conv2"}, ["layer1.1", "layer2.1", "layer3.0", "layer3.1"]),
        ({"layers": "layer1.*.conv1"}, ["layer1.0", "layer1.1"]),
    ],
)
def test_blocks_with_layers_that_are_spared_stay(patterns: dict[str, str], left: list[str]) -> None:
    net = build_model({"name": "resnet14"}).eval()
    recipe = Recipe(Amount(macs_cut=0.3, scope="per_mac"), "logit_error", blocks=True, **patterns)
    plan, _ = plan_cut(net, torch.rand(1, 3, 32, 32), recipe)
    assert list(plan.blocks) == left
    if patterns:
        with pytest.raises(InputError, match="spare every residual block"):
            plan_cut(net, torch.rand(1, 3, 32, 32), replace(recipe, layers="conv1", exclude=None, streams=True))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x + self.b(F.relu(self.a(x))),)


class Pairs(nn.Module):
    """Blocks that hand on more than a map: without them, the network gets one where it takes a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.plain = nn.Conv2d(3, 6, 3, padding=1), Plain(6)
        self.pairs, self.head = nn.ModuleList([Pair(), Pair()]), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.stem(x))
        for pair in self.pairs:
            x = pair(x)[0]
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_blocks_that_hand_on_more_than_a_map_stay() -> None:
    net = Pairs().eval()
    assert list(Plan(net, X, blocks=True).blocks) == ["plain", "pairs.0", "pairs.1"]
    recipe = Recipe(Amount(macs_cut=0.3, scope="per_mac"), "logit_error", blocks=True, calibrate_on="images")
    plan, _ = plan_cut(net, X, recipe)
    assert list(plan.blocks) == ["plain"]
    done = cut(net, Material(X, lambda p: p, calibration=torch.rand(64, 3, 32, 32)), recipe, Stimulus())
    assert any("2 residual blocks stay, as the network does not run without them" in one for one in done.remarks)
    net.plain = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"without any of its residual blocks \(pairs\.0, pairs\.1\)"):
        plan_cut(net, X, recipe)


class Mixer(nn.Module):
    """Blocks of depthwise convolutions, which are no units of their own (ConvMixer)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)
        self.blocks = nn.ModuleList(nn.ModuleList([Mixed(), nn.Conv2d(6, 6, 1)]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for depthwise, pointwise in self.blocks:  # type: ignore[misc]
            x = F.relu(pointwise(depthwise(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fn = nn.Conv2d(6, 6, 3, padding=1, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.fn(x))


def test_patterns_spare_blocks_without_units() -> None:
    plan = Plan(Mixer().eval(), X, blocks=True)
    assert list(plan.blocks) == ["blocks.0.0", "blocks.1.0"]
    plan.spare_blocks(exclude="blocks.0.*")
    assert list(plan.blocks) == ["blocks.1.0"]
    plan = Plan(Mixer().eval(), X, blocks=True)
    plan.spare_blocks(exclude="blocks.0.0*")
    assert list(plan.blocks) == ["blocks.1.0"]
    plan = Plan(Mixer().eval(), X, blocks=True)
    plan.spare_blocks(include="blocks.1.*")
    assert list(plan.blocks) == ["blocks.1.0"]
    how = {"criterion": "logit_error", "blocks": True, "calibrate_on": "images", "streams": True}
    for exclude in ("blocks.0.0*", "blocks.0.*"):
        recipe = Recipe(Amount(macs_cut=0.2, scope="per_mac"), exclude=exclude, **how)  # type: ignore[arg-type]
        assert list(plan_cut(Mixer().eval(), X, recipe)[0].blocks) == ["blocks.1.0"]


def test_what_is_made_up_for_is_what_is_cut() -> None:
    """A stream that is led by a block which goes keeps its filters."""
    net = build_model({"name": "resnet14", "shortcut": "B"}).eval()
    plan = Plan(net, X, blocks=True)
    stream = next(name for name in plan.streams if name.startswith("layer2.0."))
    kept = {"layer2.0": GONE, stream: torch.arange(8)}
    assert plan.silenced(kept) == plan.silenced({"layer2.0": GONE})
    small = plan.apply(kept)
    moments = input_moments(net, [name for name, one in net.named_modules() if isinstance(one, nn.Conv2d)], [X])
    assert compensate(plan, small, kept, moments, "mean") == []


def test_a_network_is_traced_once_for_all_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    traced, init = [0], Trace.__init__

    def counted(self: Trace, *given: Any, **more: Any) -> None:
        traced[0] += 1
        init(self, *given, **more)

    monkeypatch.setattr(Trace, "__init__", counted)
    net = build_model({"name": "resnet14"}).eval()
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = block_scores(net, [images])
    assert traced == [1]
    assert len(found) > 2
