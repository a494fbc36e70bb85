"""The pruned network equals the dense one with the same channels silenced after their activation: on every model and
policy."""

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks.checkpoint import load_pruned, save_pruned
from freqprune.networks.profiling import count_macs, count_parameters, latency_ms, macs_by_layer
from freqprune.networks.registry import build_model
from freqprune.networks.resnet import IndexShortcut
from freqprune.pruning.amount import Amount
from freqprune.pruning.compensation import recalibrate_batch_norm
from freqprune.pruning.criteria import scores
from freqprune.pruning.importance import Evidence
from freqprune.pruning.proof import masked_forward
from freqprune.pruning.pruners import _IndexShortcutPruner
from freqprune.pruning.selection import select
from freqprune.pruning.surgery import Plan

X = torch.rand(2, 3, 32, 32)
# Which indices go is all that amounts differ in here; `test_any_table_ends_in_a_correct_network_or_a_clear_error` has
# hundreds of them.
AMOUNTS = [Amount(macs_cut=0.4), Amount(ratio=0.6, normalize=True)]


def shaken(net: nn.Module) -> nn.Module:
    """Eval mode with batch norms that are not the identity, so that a wrong channel shows."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def masked(net: nn.Module, kept: dict[str, Tensor], read: dict[str, str]) -> nn.Module:
    """The dense network with removed channels set to zero after their activation."""
    net = copy.deepcopy(net)
    for layer, indices in kept.items():
        flags = torch.zeros(net.get_submodule(layer).out_channels)
        flags[indices] = 1
        net.get_submodule(read[layer]).register_forward_hook(
            lambda m, a, out, flags=flags: out * flags.view(1, -1, 1, 1)
        )
    return net


@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
@pytest.mark.parametrize(("name", "shortcut"), [("resnet8", "A"), ("resnet20", "A"), ("resnet14", "B")])
def test_masked_equivalence(name: str, shortcut: str, amount: Amount) -> None:
    net = shaken(build_model({"name": name, "shortcut": shortcut}))
    plan = Plan(net, X)
    kept = select(scores("random", Evidence(net), plan.layers), amount, plan.macs)
    small = plan.apply(kept)
    reference = masked(net, kept, {layer: layer.replace("conv1", "relu1") for layer in kept})
    with torch.no_grad():
        torch.testing.assert_close(small(X), reference(X), rtol=1e-5, atol=1e-5)
    assert {layer: small.get_submodule(layer).out_channels for layer in kept} == {
        layer: len(i) for layer, i in kept.items()
    }


@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
@pytest.mark.parametrize(("name", "shortcut"), [("resnet8", "A"), ("resnet20", "A"), ("resnet14", "B")])
def test_masked_equivalence_with_the_residual_stream(name: str, shortcut: str, amount: Amount, tmp_path: Path) -> None:
    net = shaken(build_model({"name": name, "shortcut": shortcut}))
    plan = Plan(net, X)
    units = plan.choose(streams=True)
    assert len(units) == len(plan.layers) + 3
    kept = select(scores("random", Evidence(net, graph=plan.graph), units), amount, plan.macs)
    small = plan.apply(kept)
    # Silence a stream after every activation it passes, whoever writes to it.
    blocks = (int(name.removeprefix("resnet")) - 2) // 6
    copied = {"conv1": "relu1", **{layer: layer.replace("conv1", "relu1") for layer in plan.layers}}
    every = {**kept}
    for stage, unit in ((1, "conv1"), (2, "layer2.0.conv2"), (3, "layer3.0.conv2")):
        for block in range(blocks):
            every[f"layer{stage}.{block}.conv2"] = kept[unit]
            copied[f"layer{stage}.{block}.conv2"] = f"layer{stage}.{block}.relu2"
    with torch.no_grad():
        expected = masked(net, every, copied)(X)
        torch.testing.assert_close(small(X), expected, rtol=1e-5, atol=1e-5)
        save_pruned(tmp_path / "pruned.ckpt", small, kept)
        torch.testing.assert_close(load_pruned(tmp_path / "pruned.ckpt")(X), expected, rtol=1e-5, atol=1e-5)
    assert count_macs(small, X) == pytest.approx(plan.macs({unit: len(i) for unit, i in kept.items()}), rel=1e-9)


@pytest.mark.parametrize("streams", [False, True], ids=["inner", "streams"])
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenet_v2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet50", "vgg11_bn", "densenet121")),
    ],
)
def test_torchvision_networks(name: str, streams: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = shaken(build_model({"name": f"torchvision/{name}", "num_classes": 10}))
    plan = Plan(net, X)
    kept = select(
        scores("l2", Evidence(net, graph=plan.graph), plan.choose(streams=streams)),
        Amount(macs_cut=0.5, scope="layer"),
        plan.macs,
    )
    small = plan.apply(kept)
    assert count_macs(small, X) == pytest.approx(plan.macs({unit: len(i) for unit, i in kept.items()}), rel=1e-9)
    expected = masked_forward(net, plan.silenced(kept), X)
    save_pruned(tmp_path / "pruned.ckpt", small, kept)
    again = load_pruned(tmp_path / "pruned.ckpt")
    with torch.no_grad():
        scale = float(expected.abs().max())
        torch.testing.assert_close(small(X) / scale, expected / scale, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(X) / scale, expected / scale, rtol=1e-5, atol=1e-5)


class Padded(nn.Module):
    """A raw shortcut of option A: torch-pruning takes channel i before it for channel i after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1, self.conv2 = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.Conv2d(6, 16, 3, padding=1),
        )
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv0(x))
        y = self.conv2(torch.relu(self.conv1(x)))
        return self.linear(torch.relu(y + nn.functional.pad(x, (0, 0, 0, 0, 4, 4))).mean((2, 3)))


def test_a_padded_shortcut_is_refused_with_the_stream() -> None:
    torch.manual_seed(0)
    net = Padded().eval()
    plan = Plan(net, X)
    small = plan.apply({"conv1": torch.tensor([0, 3])})
    with torch.no_grad():
        torch.testing.assert_close(small(X), masked(net, {"conv1": torch.tensor([0, 3])}, {"conv1": "conv1"})(X))
    for unit in plan.streams or {"conv0": ()}:
        with pytest.raises(InputError, match=r"IndexShortcut|shares its channels|no prunable layer"):
            plan.apply({unit: torch.arange(1, plan.model.get_submodule(unit).out_channels)})


def test_a_stream_is_chosen_by_any_of_its_layers() -> None:
    plan = Plan(build_model({"name": "resnet14"}), X)
    assert plan.choose("layer2.1.conv2", streams=True) == ["layer2.0.conv2"]
    assert plan.choose(exclude="layer1.1.conv2", streams=True) == [*plan.layers, "layer2.0.conv2", "layer3.0.conv2"]
    with pytest.raises(InputError, match=r"pruning.streams=true"):
        plan.choose("layer2.1.conv2")
    with pytest.raises(InputError, match=r"prune the stream by its first layer, 'layer2.0.conv2'"):
        plan.apply({"layer2.1.conv2": torch.tensor([0])})


def test_surgery_of_resnet32_is_quick() -> None:
    plan = Plan(build_model({"name": "resnet32"}), X)
    start = time.perf_counter()
    plan.apply({name: torch.arange(4) for name in plan.choose(streams=True)})
    # 0.2 s alone on two cores; the rest is for a busy machine.
    assert time.perf_counter() - start < 5


FLOATS = st.floats(-10, 10, allow_nan=False) | st.sampled_from([0.0, 1.0, float("nan"), float("inf"), -1e30])


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A network, a score table that may be wrong, and an amount that may be impossible."""
    config = {
        "name": draw(st.sampled_from(["resnet8", "resnet14"])), "shortcut": draw(st.sampled_from("AB")),
        "stage_widths": sorted(draw(st.lists(st.integers(1, 9), min_size=3, max_size=3))),
    }  # fmt: skip
    kind = draw(st.sampled_from(["ratio", "threshold", "macs_cut"]))
    amount = {
        kind: draw(st.floats(-0.1, 1.1) if kind != "threshold" else st.floats(-11, 11)),
        "scope": draw(st.sampled_from(["layer", "global"])),
        "normalize": draw(st.booleans()),
        "min_filters": draw(st.integers(0, 4)),
        "multiple_of": draw(st.sampled_from([1, 1, 1, 2, 4, 8])),
    }
    tricks = st.sampled_from(["none", "none", "none", "short", "ties", "other layer", "wild"])
    return {
        "config": config,
        "amount": amount,
        "streams": draw(st.booleans()),
        "trick": draw(tricks),
        "values": draw(st.lists(FLOATS, min_size=1, max_size=9)),
        "frozen": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
        "include": draw(st.sampled_from([None, None, "layer2*conv1", "*.conv2", "nope*"])),
    }


SMALL = torch.rand(1, 3, 8, 8)


@pytest.mark.slow
@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_any_table_ends_in_a_correct_network_or_a_clear_error(case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    net = shaken(build_model(case["config"])).requires_grad_(not case["frozen"])
    try:
        plan = Plan(net, SMALL)
        units = plan.choose(case["include"], streams=case["streams"])
        table = {unit: torch.rand(plan.unit(unit).n_filters) for unit in units}
        first = units[0]
        match case["trick"]:
            case "short":
                table[first] = table[first][:-1]
            case "ties":
                table = {unit: torch.ones_like(score) for unit, score in table.items()}
            case "other layer":
                table["layer9.conv1"] = torch.rand(4)
            case "wild":
                table[first] = torch.tensor(case["values"])
        amount = Amount(**case["amount"])
        kept = select(table, amount, plan.macs)
        small = plan.apply(kept)
    except InputError as error:
        event(f"refused: {' '.join(str(error).split()[:4])}")
        return
    event("pruned")
    for unit, indices in kept.items():
        width = plan.unit(unit).n_filters
        assert small.get_submodule(unit).out_channels == len(indices)
        # Of a table that is too short, the filters that it knows of.
        assert len(indices) >= min(amount.min_filters, len(table[unit]))
        assert len(indices) == width or len(indices) % amount.multiple_of == 0
    gone = sum(len(score) - len(kept[unit]) for unit, score in table.items())
    assert gone > 0
    if amount.ratio is not None and amount.multiple_of == 1:
        assert gone == round(amount.ratio * sum(map(len, table.values())))
    if amount.threshold is not None and amount.min_filters <= 1 and amount.multiple_of == 1:
        assert all(
            set(kept[unit].tolist()) >= set((score > amount.threshold).nonzero().flatten().tolist())
            for unit, score in table.items()
        )
    if amount.macs_cut is not None:
        assert 1 - count_macs(small, SMALL) / count_macs(net, SMALL) >= amount.macs_cut - 1e-9
    expected = masked_forward(net, plan.silenced(kept), SMALL)
    with torch.no_grad():
        torch.testing.assert_close(small(SMALL), expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max())))
        again = build_model(small.config)
        again.load_state_dict(small.state_dict())
        torch.testing.assert_close(again.eval()(SMALL), small(SMALL))
    assert all(parameter.requires_grad != case["frozen"] for parameter in small.parameters())


def test_layers_that_are_not_there_are_refused_by_name() -> None:
    plan = Plan(build_model({"name": "resnet8"}), X)
    for ask in (plan.unit, lambda name: plan.macs({name: 1})):
        with pytest.raises(InputError, match=r"no prunable layer 'layer1\.0\.conv9'; did you mean layer1\.0\.conv1"):
            ask("layer1.0.conv9")
    with pytest.raises(InputError, match=r"no prunable layer 'layer9\.conv1'"):
        select({"layer9.conv1": torch.rand(4)}, Amount(macs_cut=0.5), plan.macs)


def test_inner_layers_are_found() -> None:
    plan = Plan(build_model({"name": "resnet20"}), X)
    assert plan.layers == [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(3)]
    # One block a stage: no other convolution shares the stream, the shortcut does.
    small = Plan(build_model({"name": "resnet8"}), X)
    assert small.layers == [f"layer{s}.0.conv1" for s in (1, 2, 3)]
    assert "layer3.0.shortcut" in small.coupled["layer2.0.conv2"]
    assert "layer1.1.conv2" in plan.coupled["conv1"]


def test_choose() -> None:
    plan = Plan(build_model({"name": "resnet20"}), X)
    assert plan.choose("layer3.*.conv1") == [f"layer3.{b}.conv1" for b in range(3)]
    assert plan.choose(exclude="layer[12].*") == [f"layer3.{b}.conv1" for b in range(3)]
    for patterns, message in (
        (("layer9*", None), "matches none of"),
        (("*.conv2", None), r"share their channels with .*pruning.layers='\*.conv1'"),
        ((None, "*.conv1"), "leave no layer to prune"),
        ((None, "nope"), "matches none of"),
    ):
        with pytest.raises(InputError, match=message):
            plan.choose(*patterns)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_planned_macs_are_the_counted_ones(shortcut: str) -> None:
    net = build_model({"name": "resnet14", "shortcut": shortcut})
    plan = Plan(net, X)
    widths = {layer: 3 + i for i, layer in enumerate(plan.layers)}
    assert plan.macs({}) == count_macs(net, X)
    assert plan.macs(widths) == pytest.approx(
        count_macs(plan.apply({layer: torch.arange(w) for layer, w in widths.items()}), X), rel=1e-9
    )


def test_the_network_itself_is_left_alone() -> None:
    net = build_model({"name": "resnet8"}).train()
    net.conv1.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    small = Plan(net, X).apply({"layer1.0.conv1": torch.tensor([1, 2])})
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.training
    assert small.training
    assert not small.conv1.weight.requires_grad
    assert small.layer1[0].conv1.weight.requires_grad
    assert small.config["widths"] == {"layer1.0.conv1": 2}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"layer1.0.conv1": torch.tensor([], dtype=torch.long)}, "would keep no filter"),
        ({"layer1.0.conv1": torch.tensor([1, 1])}, "must be distinct indices"),
        ({"layer1.0.conv1": torch.tensor([16])}, r"in \[0, 15\]"),
        ({"layer1.0.conv2": torch.tensor([1])}, "shares its channels"),
        ({"layer1.0.conv3": torch.tensor([1])}, "no prunable layer"),
    ],
)
def test_wrong_cuts_are_refused(kept: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Plan(build_model({"name": "resnet8"}), X).apply(kept)


def test_index_shortcut_loses_channels_on_either_side() -> None:
    shortcut = IndexShortcut([-1, 0, 1, 2, -1], 3, 1)
    x = torch.randn(1, 3, 2, 2)
    whole = shortcut(x)
    pruner = _IndexShortcutPruner()
    narrow = pruner.prune_out_channels(copy.deepcopy(shortcut), [0, 2])
    assert torch.equal(narrow(x), whole[:, [1, 3, 4]])
    fewer = pruner.prune_in_channels(copy.deepcopy(shortcut), [1])
    silent = x.clone()
    silent[:, 1] = 0
    assert torch.equal(fewer(x[:, [0, 2]]), shortcut(silent))


def test_index_shortcut_decouples_the_stages() -> None:
    net = build_model({"name": "resnet14"})
    graph = tp.DependencyGraph().build_dependency(net, X, customized_pruners={IndexShortcut: _IndexShortcutPruner()})
    group = graph.get_pruning_group(net.layer2[0].conv2, tp.prune_conv_out_channels, idxs=[3])
    touched = {module for dependency, _ in group for module in [dependency.target.module]}
    assert net.layer1[0].conv2 not in touched
    assert net.layer3[0].conv2 not in touched
    assert net.layer2[1].conv2 in touched


def test_recalibration_is_the_plain_average() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    batches = [torch.randn(8, 3, 6, 6) for _ in range(3)]
    recalibrate_batch_norm(net, batches)
    with torch.no_grad():
        means = torch.stack([net[0](batch).mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(net[1].running_mean, means)
    assert not net.training
    assert net[1].momentum == 0.1


def test_profile_of_a_layer_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 6 * 6, 5)
    )
    x = torch.zeros(4, 3, 8, 8)
    assert macs_by_layer(net, x) == {"0": 8 * 3 * 9 * 64, "2": 8 * 9 * 36, "4": 8 * 36 * 5}
    assert count_parameters(net) == 8 * 27 + 8 + 8 * 9 + 8 + 8 * 36 * 5 + 5


def test_latency_measures_every_network() -> None:
    calls: list[str] = []

    class Counted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            calls.append(self.name)
            return x

    found = latency_ms({"a": Counted("a"), "b": Counted("b")}, X, n_runs=3, n_warmup=1)
    assert set(found) == {"a", "b"}
    assert min(found.values()) > 0
    assert calls == ["a", "b"] * 4


class Odd(nn.Module):
    """Three convolutions; `how` says what becomes of the second's output."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 5, 3, padding=1),
        )
        self.norm = nn.GroupNorm(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        match self.how:
            case "difference":
                y = x - y
            case "group norm":
                y = self.norm(y)
            case "product":
                y = x * y
        return self.c(torch.relu(y)).mean((2, 3))


@pytest.mark.parametrize(
    ("how", "inner"), [("plain", ["a", "b"]), ("difference", []), ("product", ["a"]), ("group norm", ["a"])]
)
def test_only_filters_that_are_alone_are_inner(how: str, inner: list[str]) -> None:
    net = Odd(how).eval()
    plan = Plan(net, X)
    assert plan.layers == inner
    # The classes of a network without a linear layer are its last convolution's filters.
    assert "the output of the network" in plan.coupled["c"]
    for layer in inner:
        kept = {layer: torch.tensor([1, 2, 5])}
        with torch.no_grad():
            torch.testing.assert_close(plan.apply(kept)(X), masked(net, kept, {layer: layer})(X), rtol=1e-5, atol=1e-5)


def test_networks_that_cannot_be_traced_are_named() -> None:
    with pytest.raises(InputError, match=r"Conv2d does not run on images of 3 x .*set data.image_size"):
        Plan(nn.Conv2d(7, 2, 3), X)


class Counting(nn.Module):
    """Takes another way at every second call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.calls = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.a(x)
        return self.b(x if self.calls % 2 else -x)  # type: ignore[no-any-return]


def test_control_flow_that_changes_between_calls_is_refused() -> None:
    with pytest.raises(InputError, match=r"Counting answers the same images differently .* counts its calls"):
        Plan(Counting(), X)
