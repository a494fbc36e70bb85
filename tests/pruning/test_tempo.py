"""Cuts to a time: until the measured one is reached."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import timing
from freqprune.networks.profiling import Latency, count_macs, macs_by_layer
from freqprune.networks.registry import build_model
from freqprune.networks.runtimes import Speed
from freqprune.networks.timing import Operation, Times
from freqprune.networks.trace import Trace
from freqprune.pruning import tempo
from freqprune.pruning.amount import Amount
from freqprune.pruning.cutting import Material, Recipe, cut
from freqprune.pruning.selection import select
from freqprune.pruning.surgery import Plan
from freqprune.tagging.stimulus import Stimulus

PIXELS = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class ByMacs(Times):
    """Times that are the multiplications, the same on every machine."""

    def __init__(self, model: nn.Module, trace: Trace, batch: Tensor, *rest: Any) -> None:
        macs = macs_by_layer(model, batch[:1])
        each = ((node, name, (float(macs[name]),)) for node, name in trace.layers.items())
        self.operations = [Operation(node, name, macs * 4, macs * 4) for node, name, macs in each]

    def ms(self, left: Any, gone: Any = ()) -> float:
        without = set(gone)
        shares = {name: read * written for name, (read, written) in left.items()}
        return sum(one.reads[0] * shares[one.layer or ""] for one in self.operations if one.node not in without)


@pytest.fixture
def _by_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempo, "Times", ByMacs)


def recipe(folder: Path, **amount: Any) -> Recipe:
    return Recipe(
        Amount(scope="per_ms", **amount),
        criterion="logit_error",
        compensation="sequential",
        calibrate_on="images",
        latency=Latency(batch_size=4, folder=str(folder)),
    )


def slow_as(
    share: Callable[[nn.Module], float], monkeypatch: pytest.MonkeyPatch, dense_ms: float = 10.0
) -> list[float]:
    """Let the device take the time that a function gives; what was measured, in order."""
    seen: list[float] = []

    def measured(dense: object, small: nn.Module, *rest: object) -> Speed:
        seen.append(1 - share(small))
        return Speed(dense_ms, dense_ms * share(small), 1 - share(small), 0.0)

    monkeypatch.setattr(tempo, "_measured", measured)
    return seen


@pytest.mark.slow
@pytest.mark.usefixtures("_by_macs")
def test_the_cut_goes_on_until_the_measured_time_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = build_model({"name": "resnet20"}).eval()
    whole = count_macs(net, PIXELS[:1])
    # This device saves only half of what goes.
    seen = slow_as(lambda small: 1 - 0.5 * (1 - count_macs(small, PIXELS[:1]) / whole), monkeypatch)
    material = Material(PIXELS[:4], lambda p: p, calibration=PIXELS)
    done = cut(net, material, recipe(tmp_path, latency_cut=0.3), Stimulus())
    assert len(seen) > 1
    assert seen[0] < 0.29
    assert 0.5 * (1 - count_macs(done.net, PIXELS[:1]) / whole) == pytest.approx(0.32, abs=0.035)
    assert any(
        remark.startswith(f"{100 * seen[-1]:.1f} % of the time saved, 30.0 % asked for") for remark in done.remarks
    )


@pytest.mark.slow
def test_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really timed, so that nothing can be said of how well; the times are kept."""
    monkeypatch.setattr(timing, "LEAST_S", 1e-4)
    monkeypatch.setattr(tempo, "NOISY", 10.0)
    monkeypatch.setattr(tempo, "LEAST_S", 0.0)
    net = build_model({"name": "resnet14"}).eval()
    done = cut(
        net, Material(PIXELS[:4], lambda p: p, calibration=PIXELS), recipe(tmp_path, latency_cut=0.3), Stimulus()
    )
    assert done.dropped
    (remark,) = (one for one in done.remarks if "% of the time saved, 30.0 % asked for" in one)
    assert ", channels last" in remark
    assert len(list(tmp_path.glob("times-*.json"))) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("_by_macs")
def test_a_time_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = build_model({"name": "resnet8"}).eval()
    material = Material(PIXELS[:4], lambda p: p, calibration=PIXELS)
    slow_as(lambda small: 0.9, monkeypatch)
    with pytest.raises(InputError, match=r"50\.0 % of the time cannot be reached; 10\.0 % was measured"):
        cut(net, material, recipe(tmp_path, latency_cut=0.5), Stimulus())
    with pytest.raises(InputError, match=r"= 1e-06 asks to remove 100.0 % of the .* ms .* cannot be reached"):
        cut(net, material, recipe(tmp_path, latency_ms=1e-6), Stimulus())
    with pytest.raises(InputError, match="asks for no less than the network takes already"):
        cut(net, material, recipe(tmp_path, latency_ms=1e6), Stimulus())


@pytest.mark.usefixtures("_by_macs")
def test_milliseconds_are_a_share_of_those_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = build_model({"name": "resnet8"}).eval()
    whole = count_macs(net, PIXELS[:1])
    slow_as(lambda small: count_macs(small, PIXELS[:1]) / whole, monkeypatch)
    monkeypatch.setattr(tempo, "compare", lambda *forwards, **more: Speed(10.0, 10.0, 0.0, 0.0))
    how = replace(recipe(tmp_path, latency_ms=7.0), compensation="none")
    done = cut(net, Material(PIXELS[:4], lambda p: p, calibration=PIXELS), how, Stimulus())
    assert done.promise is not None
    assert done.promise.asked == pytest.approx(0.3)
    found = done.promise.record()
    assert 0.3 <= float(found["got"]) <= 0.35
    assert float(found["pruned_ms"]) == pytest.approx(10 * count_macs(done.net, PIXELS[:1]) / whole, abs=1e-4)
    assert (found["dense_ms"], found["target"], found["batch_size"]) == (10.0, "eager", 4)


@pytest.mark.usefixtures("_by_macs")
def test_milliseconds_are_of_the_dense_network_as_it_is_measured_beside_the_smaller_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = build_model({"name": "resnet8"}).eval()
    whole = count_macs(net, PIXELS[:1])

    slow_as(lambda small: count_macs(small, PIXELS[:1]) / whole, monkeypatch, 12.0)
    # A few forwards at the start said that it is faster.
    monkeypatch.setattr(tempo, "compare", lambda *forwards, **more: Speed(10.0, 10.0, 0.0, 0.0))
    how = replace(recipe(tmp_path, latency_ms=7.0), compensation="none")
    done = cut(net, Material(PIXELS[:4], lambda p: p, calibration=PIXELS), how, Stimulus())
    assert done.promise is not None
    told = done.promise.record()
    assert 6.3 <= float(told["pruned_ms"]) <= 7.05
    assert (told["asked"], told["asked_ms"]) == (pytest.approx(5 / 12, abs=1e-4), 7.0)
    assert any("7 ms asked for: 12 ms before" in remark for remark in done.remarks)


@pytest.mark.parametrize(("target", "dense_ms"), [("eager", 10.0), ("compiled", 5.0), ("onnx", 4.0)])
@pytest.mark.usefixtures("_by_macs")
def test_milliseconds_are_those_of_where_it_counts(
    target: str, dense_ms: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"eager": 10.0, target: dense_ms}
    monkeypatch.setattr(tempo, "runner", lambda net, batch, target="eager": target)
    monkeypatch.setattr(tempo, "compare", lambda one, *rest, **more: Speed(times[one], times[one], 0.0, 0.0))
    net = nn.Sequential(nn.Conv2d(3, 20, 1), nn.ReLU(), nn.Conv2d(20, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    whole = count_macs(net, PIXELS[:1])
    slow_as(lambda small: count_macs(small, PIXELS[:1]) / whole, monkeypatch, dense_ms)
    how = recipe(tmp_path, latency_ms=0.72 * dense_ms)
    how = replace(how, latency=replace(how.latency, target=target))
    scores = {"0": torch.arange(1.0, 21.0)}
    plan = Plan(net.eval(), PIXELS[:1])
    kept, _, _, promise = tempo.to_time(plan, scores, tempo.Clock(plan, Material(PIXELS[:4], lambda p: p), how), how)
    assert promise.asked == pytest.approx(0.28)
    # All multiplications go with the filters of the first layer, of which five are 25 % and six 30 %.
    assert kept["0"].tolist() == [*range(6, 20)]


@pytest.mark.parametrize(
    ("measured", "kept_try"),
    [
        # As far below, by threes, as above: the first stays.
        ([0.28, 0.36, 0.2, 0.2, 0.2, 0.2], 0),
        # Too little is worse than too much.
        ([0.27, 0.36, 0.2, 0.2, 0.2, 0.2], 1),
        # Nothing more can go after a first try that was near.
        ([0.27, None], 0),
    ],
)
@pytest.mark.usefixtures("_by_macs")
def test_the_best_try_is_kept(
    measured: list[float | None], kept_try: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 20, 1), nn.ReLU(), nn.Conv2d(20, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plan, how = Plan(net.eval(), PIXELS[:1]), recipe(tmp_path, latency_cut=0.3)
    tries: list[dict[str, Tensor]] = []

    def one(*asked: Any) -> dict[str, Tensor]:
        if measured[len(tries)] is None:
            raise InputError("no more can go")
        tries.append({"0": torch.arange(len(tries), 20)})
        return tries[-1]

    def times(*rest: Any) -> Speed:
        saved = measured[len(tries) - 1]
        assert saved is not None
        return Speed(10.0, 10 * (1 - saved), saved, 0.0)

    monkeypatch.setattr(tempo, "select", one)
    monkeypatch.setattr(tempo, "_measured", times)
    clock = tempo.Clock(plan, Material(PIXELS[:4], lambda p: p), how)
    kept, _, _, promise = tempo.to_time(plan, {"0": torch.arange(1.0, 21.0)}, clock, how)
    assert torch.equal(kept["0"], tries[kept_try]["0"])
    assert promise.speed.saved == measured[kept_try]
    assert len(tries) == len([saved for saved in measured if saved is not None])


@pytest.mark.slow
@pytest.mark.usefixtures("_by_macs")
def test_what_is_missed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = build_model({"name": "resnet20"}).eval()
    material = Material(PIXELS[:4], lambda p: p, calibration=PIXELS)
    slow_as(lambda small: 0.9, monkeypatch)
    monkeypatch.setattr(tempo, "N_TRIES", 1)
    done = cut(net, material, recipe(tmp_path, latency_cut=0.2), Stimulus())
    assert any("the time asked for was missed by 10.0 %" in remark for remark in done.remarks)


def test_a_noisy_device_is_measured_longer_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noisy(dense: object, small: object, n_pairs: int, **rest: object) -> Speed:
        asked.append(n_pairs)
        return Speed(10.0, 8.0, 0.2, 0.05 if n_pairs < 40 else spread)

    monkeypatch.setattr(tempo, "compare", noisy)
    net = nn.Sequential(nn.Conv2d(3, 2, 1))
    spread = 0.001
    assert tempo._measured(lambda: None, net, PIXELS, "eager").saved == 0.2
    # Forwards of 10 and 8 ms: 400 pairs of them are 7 s, of which 3 are wanted.
    assert asked == [15, 40, 100, 400]
    monkeypatch.setattr(tempo, "LEAST_S", 0.1)
    asked.clear()
    assert tempo._measured(lambda: None, net, PIXELS, "eager").saved == 0.2
    assert asked == [15, 40]
    spread = 0.05
    with pytest.raises(InputError, match=r"too noisy .* 20\.0 % with a spread of 5\.0 %, above 2 %"):
        tempo._measured(lambda: None, net, PIXELS, "eager")
    # 1,000 pairs are 18 s, 4,000 would be 72.
    assert asked[2:] == [15, 40, 100, 400, 1000]
    monkeypatch.setattr(tempo, "MOST_S", 5.0)
    with pytest.raises(InputError, match="over 100 pairs"):
        tempo._measured(lambda: None, net, PIXELS, "eager")


@pytest.mark.parametrize("target", ["eager", "compiled", "onnx"])
def test_both_networks_are_timed_where_it_counts(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compared(dense: str, small: str, *rest: object, **more: object) -> Speed:
        assert (dense, small) == (target, target)
        return Speed(1e4, 1e4, 0.0, 0.0)

    monkeypatch.setattr(tempo, "runner", lambda net, batch, target="eager": target)
    monkeypatch.setattr(tempo, "compare", compared)
    net = nn.Conv2d(3, 2, 1)
    dense = tempo.runner(net, PIXELS, target)
    assert tempo._measured(dense, net, PIXELS, target).dense_ms == 1e4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latency_cut": 1.5}, "latency_cut must lie between 0"),
        ({"latency_ms": -1}, "latency_ms must be a number of milliseconds above 0"),
        ({"latency_cut": 0.5, "macs_cut": 0.5}, "set exactly one of .*latency_cut"),
        ({"macs_cut": 0.5, "scope": "per_ms"}, "per_ms needs pruning.latency_cut"),
    ],
)
def test_bad_amounts_of_time(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Amount(**settings)


def test_blocks_stay_in_a_cut_by_time_where_that_is_asked_for() -> None:
    assert Recipe(Amount(latency_cut=0.5), criterion="logit_error").with_blocks
    # Blocks do not compare with weights.
    assert not Recipe(Amount(latency_cut=0.5), criterion="l2", blocks=False).with_blocks


def test_blocks_are_not_normalized() -> None:
    Recipe(Amount(macs_cut=0.5, normalize=True), criterion="logit_error")
    with pytest.raises(InputError, match=r"normalize = true .* pruning.blocks=false"):
        Recipe(Amount(latency_cut=0.5, normalize=True), criterion="logit_error")


@pytest.mark.usefixtures("_by_macs")
def test_filters_alone_where_there_are_no_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    whole = count_macs(net, PIXELS[:1])
    slow_as(lambda small: count_macs(small, PIXELS[:1]) / whole, monkeypatch)
    done = cut(
        net, Material(PIXELS[:4], lambda p: p, calibration=PIXELS), recipe(tmp_path, latency_cut=0.3), Stimulus()
    )
    assert done.dropped == []
    assert 0.6 <= count_macs(done.net, PIXELS[:1]) / whole <= 0.7
    assert Plan(net, PIXELS[:1], blocks=True).blocks == {}


@pytest.mark.slow
@pytest.mark.usefixtures("_by_macs")
def test_multiples_by_the_steps_of_the_measured_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = build_model({"name": "resnet20"}).eval()
    most: list[int] = []

    def multiple(self: Times, model: nn.Module, trace: Trace, batch: Tensor, at_most: int) -> int:
        most.append(at_most)
        return 4

    monkeypatch.setattr(ByMacs, "multiple", multiple)
    whole = count_macs(net, PIXELS[:1])
    slow_as(lambda small: count_macs(small, PIXELS[:1]) / whole, monkeypatch)
    material = Material(PIXELS[:4], lambda p: p, calibration=PIXELS)
    done = cut(net, material, recipe(tmp_path, latency_cut=0.3, multiple_of="auto"), Stimulus())
    # Half of the 16 filters of the first stage.
    assert most == [8]
    assert {len(kept) % 4 for kept in done.kept.values()} == {0}
    assert any("widths are multiples of 4, by the steps" in remark for remark in done.remarks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"macs_cut": 0.5, "multiple_of": "auto"}, "auto is read off measured times, which only a cut by time takes"),
        ({"macs_cut": 0.5, "multiple_of": "eight"}, "must be a whole number of at least 1 or auto, got 'eight'"),
        ({"macs_cut": 0.5, "multiple_of": 0}, "must be a whole number of at least 1 or auto, got 0"),
    ],
)
def test_bad_multiples(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Amount(**settings)


def test_a_selection_alone_measures_no_multiple() -> None:
    with pytest.raises(InputError, match="auto is found by cut, which measures; give a number here"):
        select({"a": torch.arange(4.0)}, Amount(latency_cut=0.5, multiple_of="auto"), lambda widths: 1.0)


@pytest.mark.usefixtures("_by_macs")
def test_what_a_few_forwards_tell_is_asked_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempo, "compare", lambda *forwards, **more: Speed(10.0, 10.0, 0.0, 0.0))
    monkeypatch.setattr("freqprune.pruning.cutting.gather", lambda *_: pytest.fail("measured"))
    net = build_model({"name": "resnet8"}).eval()
    material = Material(PIXELS[:4], lambda p: p, calibration=PIXELS)
    with pytest.raises(InputError, match=r"latency_ms = 1000 asks for no less than the network takes already, 10 ms"):
        cut(net, material, recipe(tmp_path, latency_ms=1000.0), Stimulus())


def test_a_folder_for_times_is_tried_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freqprune.pruning.cutting.plan_cut", lambda *_: pytest.fail("planned"))
    (tmp_path / "file").write_text("")
    how = recipe(tmp_path / "file", latency_cut=0.3)
    with pytest.raises(InputError, match=r"measured times cannot be kept in .*latency\.folder"):
        cut(build_model({"name": "resnet8"}).eval(), Material(PIXELS[:4], lambda p: p), how, Stimulus())
