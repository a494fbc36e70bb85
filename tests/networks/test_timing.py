"""Measured times: of operations, kept in a file, and of whole networks in turn."""

import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import runtimes, timing
from freqprune.networks.registry import build_model
from freqprune.networks.runtimes import compare, runner
from freqprune.networks.timing import Operation, Times, cache_file
from freqprune.networks.trace import CONVOLUTIONS, Trace

CPU = torch.device("cpu")
X = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def few_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST_S", 1e-4)


def test_an_operation_between_measured_widths() -> None:
    one = Operation(None, "a", (8.0, 6.0, 6.0, 2.0), (8.0, 8.0, 4.0, 2.0))  # type: ignore[arg-type]
    assert one.ms(1, 1) == 8
    # Steps of the hardware stay steps.
    assert one.ms(0.75, 1) == one.ms(0.5, 1) == 6
    assert one.ms(1, 0.875) == 8
    assert one.ms(0.5, 0.5) == 6 * 4 / 8
    assert one.ms(0.01, 1) == 2


@pytest.mark.usefixtures("few_measurements")
def test_operations_add_up_to_what_a_forward_takes() -> None:
    net = build_model({"name": "resnet8"}).eval()
    trace = Trace(net, X)
    times = Times(net, trace, X, dense_ms=1000.0)
    assert times.ms({}) == pytest.approx(1000)
    convolution = next(one for one in times.operations if one.node.target in CONVOLUTIONS)
    assert times.ms({}, [convolution.node]) == pytest.approx(1000 - convolution.writes[0])
    assert convolution.layer == "conv1"
    # What follows a layer has its channels.
    layers = [one.layer for one in times.operations if one.node.target is torch.ops.aten.batch_norm.default]
    assert layers == [name for name in trace.layers.values() if name != "linear"]
    assert Times(net, trace, X, dense_ms=1e-3).ms({}) == pytest.approx(1e-3)


def test_convolutions_in_groups_lose_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    # Time is what is written.
    monkeypatch.setattr(Times, "_time", lambda _self, _what, _shapes, work: float(work().numel()))
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)).eval()
    times = Times(net, Trace(net, X), X, dense_ms=1.0)
    # 32 x 32 and 30 x 30 pixels of eight channels each.
    assert times.ms({"1": (0.25, 0.25)}) == pytest.approx(1 - 0.75 * 900 / (1024 + 900))


def test_inputs_and_outputs_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine whose time is what it writes: fewer inputs save nothing.
    monkeypatch.setattr(Times, "_time", lambda _self, _what, _shapes, work: float(work().numel()))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).eval()
    times = Times(net, Trace(net, X), X, dense_ms=1.0)
    # 30 x 30 and 28 x 28 pixels of eight channels each.
    both, second = 30**2 + 28**2, 28**2
    assert times.ms({"1": (0.25, 1.0)}) == pytest.approx(1)
    assert times.ms({"1": (1.0, 0.25)}) == pytest.approx(1 - 0.75 * second / both)


@pytest.mark.usefixtures("few_measurements")
def test_times_are_kept_and_not_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = build_model({"name": "resnet8"}).eval()
    trace, path = Trace(net, X), cache_file(tmp_path, CPU)
    first = Times(net, trace, X, 10.0, path)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(timing, "Timer", refuse)
    again = Times(net, trace, X, 10.0, path)
    assert [one.writes for one in again.operations] == [one.writes for one in first.operations]
    with pytest.raises(AssertionError, match="measured again"):
        Times(net, Trace(net, X[:2]), X[:2], 10.0, path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "about": {**content["about"], "torch": "1.0"}}))
    with pytest.raises(InputError, match=r"is stale: it holds for .*'torch': '1\.0'.* remove it"):
        Times(net, trace, X, 10.0, path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"cannot be read .* remove it"):
        Times(net, trace, X, 10.0, path)
    for what, value in (("__version__", "9.9"), ("get_num_threads", lambda: 7)):
        with monkeypatch.context() as other:
            other.setattr(torch, what, value)
            assert cache_file(tmp_path, CPU) != path
    assert cache_file(tmp_path, torch.device("mps")) != path
    assert cache_file(tmp_path, CPU) == path


def test_networks_are_timed_in_turn() -> None:
    calls = []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    speed = compare(lambda: work("dense", 0.02), lambda: work("small", 0.012), n_pairs=5, n_warmup=1)
    assert calls == ["dense", "small"] * 6
    assert speed.saved == pytest.approx(0.4, abs=0.1)
    assert speed.dense_ms >= 20
    assert 12 <= speed.small_ms < speed.dense_ms


def test_a_slow_moment_does_not_change_what_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "in_turn", lambda *rest: [[10.0] * 9, [6.0] * 6 + [20.0] * 3])
    assert compare(lambda: None, lambda: None, 9).saved == pytest.approx(0.4)


def test_the_spread_knows_of_slow_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    def spread(slow: float, alike: float) -> float:
        dense = 10 + rng.normal(0, alike, 90)
        # For a third of the time the smaller network is slower.
        small = 6 + rng.normal(0, alike, 90) + slow * (np.arange(90) >= 60)
        monkeypatch.setattr(runtimes, "in_turn", lambda *rest: [dense.tolist(), small.tolist()])
        return compare(lambda: None, lambda: None, 90).spread

    assert spread(0.0, 0.1) < 0.003
    # Ten medians, of which a third lie 0.2 higher: their standard deviation is 0.097, over the root of ten.
    assert spread(2.0, 0.1) == pytest.approx(0.031, abs=0.003)


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_onnx_runtime_answers_as_the_network_does() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    answer = runner(net, X, "onnx")()
    assert isinstance(answer, Tensor)
    with torch.no_grad():
        torch.testing.assert_close(answer, net(X), rtol=1e-4, atol=1e-5)
    eager = runner(net, X)()
    assert isinstance(eager, Tensor)
    with torch.no_grad():
        torch.testing.assert_close(eager, net(X))
