"""Where networks are timed: compiled, in ONNX Runtime, and what is told where that cannot be."""

from functools import partial

import pytest
import torch
from torch import nn

from freqprune.errors import InputError
from freqprune.networks import profiling, runtimes
from freqprune.networks.profiling import Latency
from freqprune.networks.registry import build_model
from freqprune.networks.runtimes import runner

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_many_networks_of_one_class_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    # With the whole graph asked for, PyTorch raises where it would run eagerly.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    for width in range(2, 14):
        net = build_model({"name": "resnet8", "stage_widths": [width] * 3}).eval()
        with torch.no_grad():
            expected = net(X)
        torch.testing.assert_close(runner(net, X, "compiled")(), expected)


class Moody(nn.Module):
    """Cannot be exported or compiled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not today\nnor tomorrow")


@pytest.mark.parametrize(
    ("target", "message"), [("compiled", r"torch.compile cannot .*not today"), ("onnx", "ONNX cannot take")]
)
def test_a_network_that_a_target_cannot_take(target: str, message: str) -> None:
    if target == "onnx":
        pytest.importorskip("onnxscript")
    with pytest.raises(InputError, match=message):
        runner(Moody(), X, target)


def test_missing_packages_are_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(InputError, match=r"latency.target=onnx needs onnxscript; pip install 'freqprune\[onnx\]'"):
        Latency(target="onnx")
    assert Latency(target="compiled").target in runtimes.TARGETS


def test_the_size_that_a_cut_counts_for_is_shown() -> None:
    assert Latency(batch_sizes=(64, 1), batch_size=8).sizes(by_time=True) == [1, 8, 64]
    assert Latency(batch_sizes=(64, 1), batch_size=8).sizes(by_time=False) == [1, 64]
