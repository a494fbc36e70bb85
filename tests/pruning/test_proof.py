"""The pruned network equals the dense one with the same channels silenced after their activation: on every model and
policy."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks.checkpoint import load_pruned, save_pruned
from freqprune.networks.profiling import count_macs
from freqprune.networks.registry import build_model
from freqprune.pruning.amount import Amount
from freqprune.pruning.criteria import scores
from freqprune.pruning.importance import Evidence
from freqprune.pruning.proof import masked_forward, prove
from freqprune.pruning.selection import select
from freqprune.pruning.surgery import Plan
from tests.shaken import shaken

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

# Which indices go is all that amounts differ in here; `test_any_table_ends_in_a_correct_network_or_a_clear_error` has
# hundreds of them.
AMOUNTS = [Amount(macs_cut=0.4), Amount(ratio=0.6, normalize=True)]


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


class Several(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Any:
        same, other = self.a(x), self.b(x)
        return {"list": [same, other], "tuple": (same, other), "dict": {"a": same, "b": other},
                "nested": [same, {"b": (other,)}], "values": {"a": same, "b": other}.values()}[self.kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "nested", "values"])
def test_every_answer_of_a_network_is_compared(kind: str) -> None:
    net = Several(kind).eval()
    wrong = copy.deepcopy(net)
    prove(net, wrong, {}, X)
    nn.init.zeros_(wrong.b.weight)
    with pytest.raises(InputError, match="computes something else"):
        prove(net, wrong, {}, X)


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


SMALL = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


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
