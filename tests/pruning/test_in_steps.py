"""A cut in several steps: each counts what those before it have left."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from freqprune.networks.profiling import count_macs
from freqprune.networks.registry import build_model
from freqprune.pruning.amount import Amount, step_amount
from freqprune.pruning.cutting import Cut, Material, Recipe, cut, plan_cut
from freqprune.pruning.in_steps import InSteps, cut_in_steps, with_earlier
from freqprune.pruning.selection import NothingToRemoveError
from freqprune.pruning.surgery import Plan
from freqprune.tagging.stimulus import Stimulus
from tests.pruning.test_blocks import Plain

PIXELS = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MATERIAL = Material(PIXELS, lambda pixels: pixels * 2 - 1, [0.5] * 3, [0.5] * 3, calibration=PIXELS)


def in_steps(net: nn.Module, recipe: Recipe, n_steps: int) -> tuple[InSteps, list[Amount], list[nn.Module]]:
    """The result, the amount of each step, and the networks between them."""
    asked: list[Amount] = []
    between: list[nn.Module] = []

    def one(now: nn.Module, how: Recipe, step: int) -> Cut:
        asked.append(how.amount)
        return cut(now, MATERIAL, how, Stimulus())

    def after(now: nn.Module, step: int) -> nn.Module:
        between.append(now)
        return now

    plan, chosen = plan_cut(net, PIXELS[:1], recipe)
    return cut_in_steps(plan, chosen, recipe, n_steps, one, after), asked, between


@pytest.mark.parametrize("kind", ["ratio", "macs_cut"])
def test_steps_add_up(kind: str) -> None:
    left = 1.0
    for step in range(3):
        now = step_amount(Amount(**{kind: 0.6}), step, 3, left)
        assert now is not None
        left *= 1 - getattr(now, kind)
        assert left == pytest.approx(1 - 0.2 * (step + 1))
    # What is asked for is gone already, to the last filter or by more.
    assert step_amount(Amount(**{kind: 0.6}), 1, 3, 0.6) is None
    assert step_amount(Amount(**{kind: 0.6}), 1, 3, 0.55) is None
    assert step_amount(Amount(threshold=2.0), 1, 3, 0.5) == Amount(threshold=2.0)


class Once(nn.Module):
    """One block, which does next to nothing, and more to cut behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.tail = nn.Conv2d(3, 6, 3, padding=1), Plain(6), nn.Conv2d(6, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, 4)
        nn.init.normal_(self.block.b.weight, std=1e-5)
        nn.init.zeros_(self.block.b.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.tail(self.block(self.stem(x))).relu()).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("layers", [None, ["tail", "block.a"]])
def test_later_steps_go_on_where_the_blocks_have_gone(layers: list[str] | None) -> None:
    """A step that finds no block left, or a pattern of a layer that went with one, is not refused for that."""
    torch.manual_seed(0)
    recipe = Recipe(
        Amount(macs_cut=0.6, scope="per_mac"), "logit_error", blocks=True, calibrate_on="images", layers=layers
    )
    net = Once().eval()
    found, _, _ = in_steps(net, recipe, 2)
    assert found.dropped == ["block"]
    assert count_macs(found.net, PIXELS[:1]) <= 0.4 * count_macs(net, PIXELS[:1])


@pytest.fixture
def net() -> nn.Module:
    return build_model({"name": "resnet8"}).eval()


def test_filters_are_counted_in_the_network_before_the_first_step(net: nn.Module) -> None:
    recipe = Recipe(Amount(ratio=0.5, scope="layer"), criterion="l2")
    found, asked, between = in_steps(net, recipe, 2)
    assert [amount.ratio for amount in asked] == pytest.approx([0.25, 1 / 3])
    assert len(between) == 1
    norms = {unit: net.get_submodule(unit).weight.flatten(1).norm(dim=1) for unit in found.kept}
    for unit, indices in found.kept.items():
        assert indices.tolist() == sorted(norms[unit].argsort(descending=True)[: len(norms[unit]) // 2].tolist())
        assert torch.equal(found.net.get_submodule(unit).weight, net.get_submodule(unit).weight[indices])
    # Scores are those of the first step, of every filter.
    assert {unit: len(score) for unit, score in found.scores.items()} == {u: len(n) for u, n in norms.items()}


def test_a_step_that_went_far_enough_leaves_nothing_to_the_next(net: nn.Module) -> None:
    found, asked, _ = in_steps(net, Recipe(Amount(macs_cut=0.15, multiple_of=8), "l2", layers="layer1.0.conv1"), 2)
    assert len(asked) == 1
    assert {name: len(indices) for name, indices in found.kept.items()} == {"layer1.0.conv1": 8}
    assert found.remarks == [
        "step 1 of 2: every layer is at its floor of 8 filters: layer1.0.conv1",
        "step 1 of 2: 19.3 % of the MACs cut instead of 7.5 %: filters that go together allow no closer cut",
        "step 2 of 2 cut nothing: those before it had cut as much already",
    ]


def test_a_threshold_may_leave_nothing_to_later_steps(net: nn.Module) -> None:
    norms = net.get_submodule("layer1.0.conv1").weight.detach().flatten(1).norm(dim=1)
    amount = Amount(threshold=float(norms.sort().values[7:9].mean()))
    recipe = Recipe(amount, criterion="l2", layers="layer1.0.conv1")
    found, asked, _ = in_steps(net, recipe, 2)
    assert asked == [amount, amount]
    assert len(found.kept["layer1.0.conv1"]) == 8
    assert found.remarks[-1] == "step 2 of 2 cut nothing: those before it had cut as much already"
    with pytest.raises(NothingToRemoveError):
        in_steps(net, replace(recipe, amount=Amount(threshold=1e-9)), 2)


def test_the_macs_of_steps_are_shares_of_the_first_network(net: nn.Module) -> None:
    found, asked, between = in_steps(net, Recipe(Amount(macs_cut=0.6, scope="per_mac"), "l2"), 3)
    whole = count_macs(net, PIXELS[:1])
    left = [count_macs(one, PIXELS[:1]) / whole for one in [*between, found.net]]
    assert left == pytest.approx([0.8, 0.6, 0.4], abs=0.02)
    assert 1 - asked[1].macs_cut == pytest.approx(0.6 / left[0])


def test_shares_of_less_than_a_bundle_wait_for_the_next_step(net: nn.Module) -> None:
    recipe = Recipe(Amount(ratio=0.5, scope="layer", multiple_of=8), "l2", layers="layer1.0.conv1")
    found, asked, between = in_steps(net, recipe, 4)
    assert len(asked) == 4
    # Between steps there is nothing to recover from yet, nor is the network that was given touched.
    assert not between
    assert {name: len(indices) for name, indices in found.kept.items()} == {"layer1.0.conv1": 8}
    assert found.remarks[0] == "step 1 of 4 cut nothing: its share is less than what goes at once"
    with pytest.raises(NothingToRemoveError, match=r"pruning\.ratio"):
        in_steps(net, replace(recipe, amount=Amount(ratio=0.1, multiple_of=8)), 2)


def test_layers_that_become_units_once_a_block_has_gone_are_counted() -> None:
    net = build_model({"name": "resnet14", "shortcut": "B"}).eval()
    plan = Plan(net, PIXELS[:1], blocks=True)
    lead = next(name for name, members in plan.streams.items() if "layer2.1.conv2" in members)
    found = InSteps(net, {lead: torch.arange(0, 32, 2)}, {lead: 32})
    small = plan.apply({"layer2.0": torch.tensor([], dtype=torch.long)})
    found.add(Cut(small, {"layer2.1.conv2": torch.tensor([0, 3]), "conv1": torch.tensor([5])}, {}, None, []), plan)
    # Of what the stream had left; of a layer that had lost nothing, as it says.
    assert {name: indices.tolist() for name, indices in found.kept.items()} == {"layer2.1.conv2": [0, 6], "conv1": [5]}
    assert found.widths["layer2.1.conv2"] == 32
    # Also where it is cut only in a later step than the one in which the block went.
    later = InSteps(net, {lead: torch.arange(0, 32, 2)}, {lead: 32})
    later.add(Cut(small, {}, {}, None, []), plan)
    # Until then it is called by the first of its layers that is there, as a plan of that network calls it.
    assert {name: indices.tolist() for name, indices in later.kept.items()} == {
        "layer2.0.shortcut.0": [*range(0, 32, 2)]
    }
    assert "layer2.0.shortcut.0" in Plan(small, PIXELS[:1], blocks=True).streams
    later.add(Cut(small, {"layer2.1.conv2": torch.tensor([0, 3])}, {}, None, []), plan)
    assert later.kept["layer2.1.conv2"].tolist() == [0, 6]
    assert found.widths["conv1"] == 16


def test_blocks_of_all_steps_are_named(net: nn.Module) -> None:
    found, plan = InSteps(net, {}, {}), Plan(net, PIXELS[:1])
    for gone in (["layer1.0"], [], ["layer3.0"]):
        found.add(Cut(net, {}, {}, None, [], dropped=gone), plan)
    assert found.dropped == ["layer1.0", "layer3.0"]


def test_a_second_cut_counts_in_the_first_network() -> None:
    """Also a stream whose block went with the second, and without the layers of that block."""
    first, names = build_model({"name": "resnet14", "shortcut": "B"}).eval(), ["layer2.0.conv2", "layer2.1.conv2"]
    plan = Plan(first, PIXELS[:1], blocks=True)
    left = {names[0]: torch.tensor([0, 2, 4, 6]), "layer2.0.conv1": torch.tensor([1, 2])}
    once = plan.apply(left)
    now = Plan(once, PIXELS[:1], blocks=True)
    twice = now.apply({"layer2.0": torch.tensor([], dtype=torch.long), "layer3.0.conv1": torch.tensor([3])})
    earlier = {name: indices.tolist() for name, indices in left.items()}
    kept = with_earlier(now, twice, {names[1]: torch.tensor([0, 3]), "layer3.0.conv1": torch.tensor([3])}, earlier)
    assert kept == {names[1]: [0, 6], "layer3.0.conv1": [3]}
