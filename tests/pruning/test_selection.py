import re
from typing import Any

import pytest
import torch
from torch import Tensor

from freqprune.errors import InputError
from freqprune.pruning.amount import Amount
from freqprune.pruning.selection import remarks, select

SCORES = {"a": torch.tensor([5.0, 1.0, 3.0, 2.0]), "b": torch.tensor([0.5, 10.0, 0.1, 0.2, 4.0, 6.0])}


def kept(amount: Amount, scores: dict[str, Tensor] = SCORES, **more: object) -> dict[str, list[int]]:
    return {layer: indices.tolist() for layer, indices in select(scores, amount, **more).items()}  # type: ignore[arg-type]


def test_threshold_keeps_exactly_what_is_above() -> None:
    assert kept(Amount(threshold=2.0)) == {"a": [0, 2], "b": [1, 4, 5]}
    assert kept(Amount(threshold=1.99)) == {"a": [0, 2, 3], "b": [1, 4, 5]}


def test_threshold_respects_the_floor() -> None:
    assert kept(Amount(threshold=5.0, min_filters=2)) == {"a": [0, 2], "b": [1, 5]}
    assert kept(Amount(threshold=9.0)) == {"a": [0], "b": [1]}


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
def test_global_ratio_removes_the_lowest(ratio: float) -> None:
    n = round(10 * ratio)
    order = sorted(torch.cat(list(SCORES.values())).tolist())
    found = kept(Amount(ratio=ratio))
    left = sorted(SCORES[layer][i].item() for layer, indices in found.items() for i in indices)
    assert left == order[n:]


def test_floor_passes_the_cut_on_to_the_next_filter() -> None:
    # In order 0.1 b, 0.2 b, 0.5 b, 1 a, 2 a; then 3 a would leave one in a, so 4 b goes.
    assert kept(Amount(ratio=0.6, min_filters=2)) == {"a": [0, 2], "b": [1, 5]}
    with pytest.raises(
        InputError, match=r"asks for 5 of 10 filters, but with pruning.min_filters = 3 only 4 can go; use at most 0.4"
    ):
        kept(Amount(ratio=0.5, min_filters=3))


@pytest.mark.parametrize(
    ("widths", "how"),
    [
        # Those of a ResNet-50, of which 0.93067, 0.99567 and 0.98267 can go.
        ([64] * 7 + [128] * 8 + [256] * 12 + [512] * 6, {"ratio": 0.999, "min_filters": 16}),
        ([64] * 7 + [128] * 8 + [256] * 12 + [512] * 6, {"ratio": 0.999, "min_filters": 1}),
        ([64] * 7 + [128] * 8 + [256] * 12 + [512] * 6, {"ratio": 0.999, "min_filters": 4}),
        # 0.010417 goes at least.
        ([512] * 3, {"ratio": 0.001, "multiple_of": 16}),
        ([512] * 3, {"ratio": 0.999, "min_filters": 256}),
    ],
)
def test_a_ratio_that_a_message_names_is_accepted(widths: list[int], how: dict[str, Any]) -> None:
    table = {str(i): torch.rand(width) for i, width in enumerate(widths)}
    with pytest.raises(InputError, match="use at") as refused:
        select(table, Amount(**how))
    named = re.findall(r"use at (?:most|least) ([\d.]+)$", str(refused.value))
    found = select(table, Amount(**{**how, "ratio": float(named[0])}))
    assert sum(map(len, found.values())) < sum(widths)


def test_layer_scope_takes_the_same_share_of_each() -> None:
    found = kept(Amount(ratio=0.5, scope="layer"))
    assert found == {"a": [0, 2], "b": [1, 4, 5]}


def test_normalization_makes_layers_comparable() -> None:
    scores = {"quiet": torch.tensor([0.01, 0.02, 0.03, 0.04]), "loud": torch.tensor([10.0, 20.0, 30.0, 40.0])}
    assert kept(Amount(ratio=0.25), scores) == {"quiet": [2, 3], "loud": [0, 1, 2, 3]}
    assert kept(Amount(ratio=0.25, normalize=True), scores) == {"quiet": [1, 2, 3], "loud": [1, 2, 3]}


def test_ties_go_in_order_of_layer_and_filter() -> None:
    ties = {"a": torch.ones(3), "b": torch.ones(3)}
    assert kept(Amount(ratio=0.5), ties) == {"a": [2], "b": [1, 2]}


def macs(widths: dict[str, int]) -> float:
    return 100 + 10 * widths["a"] + 5 * widths["a"] * widths["b"]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("cut", [0.05, 0.2, 0.4, 0.5])
def test_macs_cut_is_the_smallest_that_reaches_the_target(cut: float, scope: str) -> None:
    found = select(SCORES, Amount(macs_cut=cut, scope=scope), macs)  # type: ignore[arg-type]
    widths = {layer: len(indices) for layer, indices in found.items()}
    dense = macs({"a": 4, "b": 6})
    assert 1 - macs(widths) / dense >= cut
    removed = 10 - sum(widths.values())
    if removed > 1:
        one_less = select(SCORES, Amount(ratio=(removed - 1) / 10, scope=scope))
        assert 1 - macs({layer: len(indices) for layer, indices in one_less.items()}) / dense < cut


def test_macs_cut_out_of_reach_and_without_a_cost() -> None:
    with pytest.raises(
        InputError, match=r"cannot be reached: with every layer at pruning.min_filters the cut is 0.558"
    ):
        select(SCORES, Amount(macs_cut=0.9), macs)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="need the function macs"):
        select(SCORES, Amount(macs_cut=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "set exactly one of .*, got none"),
        ({"ratio": 0.5, "macs_cut": 0.5}, "ratio = 0.5, macs_cut = 0.5"),
        ({"ratio": 0.0}, r"between 0 \(removes nothing\)"),
        ({"ratio": 1.0}, r"1 \(removes everything\)"),
        ({"macs_cut": 1.2}, "pruning.macs_cut must lie"),
        ({"ratio": 0.5, "scope": "net"}, "scope must be one of global, per_mac, per_ms, layer"),
        ({"ratio": 0.5, "min_filters": 0}, "min_filters must be at least 1"),
        ({"threshold": 1.0, "normalize": True}, "cannot be combined"),
        ({"threshold": float("nan")}, "threshold must be a finite score, got nan"),
        ({"threshold": float("inf")}, "threshold must be a finite score, got inf"),
    ],
)
def test_bad_amounts(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Amount(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scores", "amount", "message"),
    [
        (SCORES, Amount(threshold=10.0), "would remove every filter: the scores lie between 0.1 and 10"),
        (SCORES, Amount(threshold=0.05), "would remove nothing"),
        (SCORES, Amount(ratio=0.01), "removes nothing; use at least 0.1"),
        ({}, Amount(ratio=0.5), "no layer may lose filters"),
        ({"a": torch.tensor([1.0, torch.nan])}, Amount(ratio=0.5), "scores of 'a' must be finite"),
        ({"a": torch.ones(2, 2)}, Amount(ratio=0.5), "scores of 'a' must be finite"),
    ],
)
def test_cuts_that_make_no_sense(scores: dict[str, Tensor], amount: Amount, message: str) -> None:
    with pytest.raises(InputError, match=message):
        select(scores, amount)


def test_multiples_are_kept_whatever_the_amount() -> None:
    torch.manual_seed(0)
    scores = {"a": torch.rand(20), "b": torch.rand(32), "c": torch.rand(6)}
    for amount in (
        Amount(ratio=0.5, multiple_of=8),
        Amount(threshold=0.6, multiple_of=8),
        Amount(ratio=0.3, scope="layer", multiple_of=8),
    ):
        found = select(scores, amount)
        assert len(found["a"]) in (8, 16, 20)
        assert len(found["b"]) in (8, 16, 24, 32)
        assert len(found["c"]) == 6
        gone = sum(len(score) - len(found[layer]) for layer, score in scores.items())
        assert 0 < gone <= (58 * amount.ratio if amount.ratio else 58)
        if amount.ratio and amount.scope == "global":
            assert gone > 58 * amount.ratio - 8
        for layer, indices in found.items():
            # The best of each layer, whatever the block.
            best = scores[layer].argsort(descending=True)[: len(indices)].sort().values
            assert torch.equal(best, indices)


def test_blocks_overshoot_no_more_than_they_must() -> None:
    scores = {"a": torch.arange(16.0), "b": torch.arange(16.0) + 0.5}
    found = select(scores, Amount(macs_cut=0.2, multiple_of=8), lambda widths: 10.0 * widths["a"] + 1.0 * widths["b"])
    # One block of a is 45 %: the block of b, which came first, is given back.
    assert {layer: len(indices) for layer, indices in found.items()} == {"a": 8, "b": 16}


def test_remarks_tell_layers_that_did_not_change_and_floors() -> None:
    kept = {"a": torch.arange(1), "b": torch.arange(1)}
    assert remarks(kept, {"a": 4, "b": 4}, Amount(ratio=0.5)) == ["every layer is at its floor of 1 filter: a, b"]
    assert remarks({"a": torch.arange(3)}, {"a": 4}, Amount(ratio=0.5)) == []


def test_multiples_refuse() -> None:
    with pytest.raises(InputError, match=r"pruning\.multiple_of must be a whole number of at least 1 or auto, got 0"):
        Amount(ratio=0.5, multiple_of=0)
    with pytest.raises(InputError, match=r"each is at its floor \(pruning.min_filters = 1, pruning.multiple_of = 16\)"):
        select(SCORES, Amount(ratio=0.5, multiple_of=16))
    with pytest.raises(InputError, match=r"removes nothing; use at least 0\.2"):
        select(SCORES, Amount(ratio=0.1, multiple_of=2))


def test_per_mac_takes_what_is_cheap_to_lose() -> None:
    """The same scores, but a filter of `wide` saves ten times the MACs: its filters go first until they are worth ten
    times more."""
    scores = {"wide": torch.tensor([1.0, 2.0, 50.0]), "narrow": torch.tensor([1.0, 2.0, 3.0])}

    def macs(widths: dict[str, int]) -> float:
        return 10.0 * widths["wide"] + widths["narrow"]

    kept = select(scores, Amount(macs_cut=0.6, scope="per_mac"), macs)
    assert {layer: indices.tolist() for layer, indices in kept.items()} == {"wide": [2], "narrow": [0, 1, 2]}
    by_ratio = select(scores, Amount(ratio=0.5, scope="per_mac"), macs)
    assert {layer: indices.tolist() for layer, indices in by_ratio.items()} == {"wide": [2], "narrow": [1, 2]}
    with pytest.raises(InputError, match="need the function macs"):
        select(scores, Amount(ratio=0.5, scope="per_mac"))


def test_per_mac_ranks_by_macs_where_the_amount_is_one_of_time() -> None:
    scores = {"slow": torch.tensor([1.0, 2.0]), "large": torch.tensor([1.0, 2.0])}

    def ms(widths: dict[str, int]) -> float:
        return 10.0 * widths["slow"] + widths["large"]

    def macs(widths: dict[str, int]) -> float:
        return widths["slow"] + 10.0 * widths["large"]

    # 1 of 22 ms is enough; a filter of either goes first for what it saves.
    by_macs = kept(Amount(latency_cut=0.04, scope="per_mac"), scores, macs=ms, ranked_by=macs)
    assert by_macs == {"slow": [0, 1], "large": [1]}
    by_time = {"slow": [1], "large": [0, 1]}
    assert kept(Amount(latency_cut=0.04, scope="per_ms"), scores, macs=ms) == by_time
    assert kept(Amount(latency_cut=0.04, scope="per_ms"), scores, macs=ms, ranked_by=macs) == by_time


def test_what_a_cut_can_spare_is_given_back_best_first() -> None:
    scores = {"a": torch.tensor([1.0, 9.0]), "b": torch.tensor([2.0, 9.0]), "c": torch.tensor([3.0, 9.0])}
    cost = lambda widths: 1.0 * widths["a"] + 1.0 * widths["b"] + 10.0 * widths["c"]  # noqa: E731
    # Of 24, 12 go where 10.8 are asked for: one of a and b can come back, and that of b is worth more.
    assert kept(Amount(macs_cut=0.45), scores, macs=cost) == {"a": [1], "b": [0, 1], "c": [1]}


def test_scores_below_zero_are_not_divided_by_costs() -> None:
    table = {"a": torch.tensor([-20.0, 1.0]), "b": torch.tensor([2.0, 3.0])}
    with pytest.raises(InputError, match=r"turns the order of scores below zero round; the lowest here is -20"):
        select(table, Amount(macs_cut=0.3, scope="per_mac"), lambda widths: float(sum(widths.values())))
    assert kept(Amount(ratio=0.25), table) == {"a": [1], "b": [0, 1]}


def test_a_floor_is_a_multiple() -> None:
    amount = Amount(ratio=0.4, min_filters=10, multiple_of=8)
    found = remarks({"a": torch.arange(16), "b": torch.arange(24)}, {"a": 32, "b": 32}, amount)
    assert found == ["1 of 2 layers is at its floor of 16 filters: a"]


@pytest.mark.parametrize("n_filters", [10, 20, 30, 49, 70, 80, 93])
def test_an_amount_that_is_met_exactly_is_met(n_filters: int) -> None:
    """Shares of filters are not what floating point says: 2 of 20 are a tenth."""
    share = 1 - (1 - 1 / n_filters)
    scores = {"a": torch.arange(float(n_filters))}
    for removed in range(1, n_filters):
        found = select(
            scores, Amount(macs_cut=removed / n_filters), lambda widths: 1 - (n_filters - widths["a"]) * share
        )
        assert len(found["a"]) == n_filters - removed


def test_where_times_fall_in_steps_half_of_a_layer_tells_what_a_filter_costs() -> None:
    """Its first filter alone saves nothing."""
    same = torch.arange(1.0, 5.0)
    found = kept(
        Amount(latency_cut=0.15, scope="per_ms"),
        {"stepped": same, "smooth": same},
        macs=lambda widths: 8.0 * -(-widths["stepped"] // 2) + widths["smooth"],
    )
    assert found == {"stepped": [2, 3], "smooth": [0, 1, 2, 3]}
