"""What a plan of a network says may go, and that it takes away what it is told to."""

import copy
import time
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from freqprune.errors import InputError
from freqprune.networks import profiling
from freqprune.networks.hooks import replaced
from freqprune.networks.profiling import count_macs, count_parameters, latency_ms, macs_by_layer
from freqprune.networks.registry import build_model
from freqprune.networks.resnet import IndexShortcut
from freqprune.pruning.amount import Amount
from freqprune.pruning.compensation import recalibrate_batch_norm
from freqprune.pruning.pruners import _IndexShortcutPruner
from freqprune.pruning.selection import select
from freqprune.pruning.surgery import Plan
from freqprune.pruning.trials import misread_units
from tests.pruning.test_proof import X, masked
from tests.pruning.test_reach import Gated, InGroups


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


def test_batch_norms_stay_where_there_is_nothing_to_estimate_them_on() -> None:
    net = build_model({"name": "resnet8"})
    nn.init.constant_(net.bn1.running_mean, 3.0)
    with pytest.raises(InputError, match="needs batches of images"):
        recalibrate_batch_norm(net, [])
    assert torch.equal(net.bn1.running_mean, torch.full((16,), 3.0))


def test_networks_of_streams_alone_are_told_what_takes_them() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.a(x) + self.b(x)).mean((2, 3)))  # type: ignore[no-any-return]

    plan = Plan(Sums(), X)
    with pytest.raises(InputError, match="leave no layer to prune"):
        plan.choose(exclude=["a"], streams=True)
    for exclude in (None, ["a"]):
        with pytest.raises(InputError, match=r"no layer can be pruned alone: .*\(pruning\.streams=true\)"):
            plan.choose(exclude=exclude)
    assert plan.choose(streams=True) == ["a"]


@pytest.mark.parametrize(
    "call", [lambda self, x: F.prelu(x, self.own), lambda self, x: torch.maximum(x, self.own[:, None, None])]
)
def test_parameters_of_no_layer_are_not_cut(call: Any) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.own = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Parameter(torch.full((8,), 0.25))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(call(self, self.a(x))).mean((2, 3))  # type: ignore[no-any-return]

    plan = Plan(Own().eval(), X)
    assert not plan.layers
    assert not plan.streams


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_planned_macs_are_the_counted_ones(shortcut: str) -> None:
    net = build_model({"name": "resnet14", "shortcut": shortcut})
    plan = Plan(net, X)
    widths = {layer: 3 + i for i, layer in enumerate(plan.layers)}
    assert plan.macs({}) == count_macs(net, X)
    with pytest.raises(InputError, match=rf"'{next(iter(widths))}' has \d+ filters; the width must be in"):
        plan.macs({next(iter(widths)): 1000})
    assert plan.macs(widths) == pytest.approx(
        count_macs(plan.apply({layer: torch.arange(w) for layer, w in widths.items()}), X), rel=1e-9
    )


def test_the_network_itself_is_left_alone() -> None:
    net = build_model({"name": "resnet8"}).train()
    net.conv1.weight.requires_grad_(False)
    net.bn1.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    small = Plan(net, X).apply({"layer1.0.conv1": torch.tensor([1, 2])})
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.training
    # A norm that is frozen stays so, the others train on.
    assert {name for name, module in small.named_modules() if not module.training} == {"bn1"}
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


def test_a_layer_of_two_names_counts_and_is_replaced_in_both_places() -> None:
    class Holds(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)  # type: ignore[no-any-return]

    shared, x = nn.Conv2d(3, 3, 3, padding=1), torch.rand(1, 3, 8, 8)
    net = nn.Sequential(Holds(shared), Holds(shared))
    assert macs_by_layer(net, x) == {"0.conv": 2 * 3 * 3 * 9 * 64}
    with replaced(net, {"0.conv": nn.Identity()}):
        assert torch.equal(net(x), x)
    assert not torch.equal(net(x), x)


def test_latency_is_the_median_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "in_turn", lambda *_: [[1.0, 2.0, 9.0]])
    assert latency_ms({"a": nn.Identity()}, X, n_runs=3) == {"a": 2.0}


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


def test_latency_is_that_of_inference_and_leaves_statistics_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).train()
    modes: list[bool] = []
    net[1].register_forward_hook(lambda module, _args, _out: modes.append(module.training))
    latency_ms({"a": net}, X, n_runs=2, n_warmup=1)
    assert modes == [False] * 3
    assert net[1].num_batches_tracked == 0
    assert all(module.training for module in net.modules())


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


def test_what_shares_a_unit_is_left_out_with_it() -> None:
    assert Plan(Gated().eval(), X).choose(exclude="value") == ["mlp.0"]
    plan = Plan(InGroups(True).eval(), X)
    assert "a" in plan.choose()
    assert "a" not in plan.choose(exclude="excite")


class Sliced(nn.Module):
    """Channels told apart by their numbers, as in GhostNet: a trial that keeps the first half does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.cheap = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.d, self.e = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.u(x).relu()
        return self.e(self.d(torch.cat([h, self.cheap(h)], 1)[:, :12]).relu()).mean((2, 3))  # type: ignore[no-any-return]


def test_slices_by_number_are_found_by_the_trial() -> None:
    torch.manual_seed(0)
    assert misread_units(Plan(Sliced().eval(), X), ["u", "d"]) == ["u"]


class GroupsOfOtherWidth(nn.Module):
    """A convolution in two groups with more outputs than inputs, whose inputs torch-pruning removes one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.grouped, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1, groups=2), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grouped(self.u(x).relu()).relu().mean((2, 3)))  # type: ignore[no-any-return]


def test_inputs_of_groups_are_found_by_the_trial_though_half_of_them_could_go() -> None:
    torch.manual_seed(0)
    plan = Plan(GroupsOfOtherWidth().eval(), X)
    plan.apply({"u": torch.arange(0, 8, 2)})
    assert misread_units(plan, ["u"]) == ["u"]


class Helped(nn.Module):
    """A classifier that helps in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.z = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x).relu()
        out = self.b(x).mean((2, 3))
        return (out, self.z(x).mean((2, 3))) if self.training else out


def test_what_runs_in_training_only_is_not_cut_wrongly() -> None:
    plan = Plan(Helped().eval(), X)
    assert plan.unreached == ["z"]
    with pytest.raises(InputError, match=r"does not train .*: z run in training mode only"):
        plan.apply({"a": torch.tensor([0, 2])})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu()).mean((2, 3))  # type: ignore[no-any-return]


def test_layers_that_share_a_parameter_keep_their_filters() -> None:
    plan = Plan(Tied().eval(), X)
    assert plan.layers == []
    with pytest.raises(InputError, match="shares its channels with a parameter that is of b and c"):
        plan.apply({"a": torch.tensor([0])})


class Flipped(nn.Module):
    """Channels turned round, which torch-pruning does not see, and nothing that makes zeros differ."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().flip(1)).mean((2, 3))  # type: ignore[no-any-return]


def test_an_example_of_zeros_proves_something() -> None:
    with pytest.raises(InputError, match="computes something else"):
        Plan(Flipped().eval(), torch.zeros(1, 3, 8, 8)).apply({"a": torch.arange(3)})
