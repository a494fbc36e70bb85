from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import exports
from freqprune.networks.exports import Exports, bytes_of, check_export, export
from freqprune.networks.registry import build_model
from freqprune.networks.runtimes import OnnxModule
from freqprune.pruning.surgery import Plan
from freqprune.reports.record import EXPORTED

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_pruned_networks_export(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs pip install 'freqprune[onnx]'")
    pytest.importorskip("onnxscript", reason="needs pip install 'freqprune[onnx]'")
    net = build_model({"name": "resnet8"}).eval()
    plan = Plan(net, X)
    small = plan.apply({unit: torch.arange(3) for unit in plan.choose(streams=True)})
    found = export(small, X, tmp_path, onnx=True, torch_export=True)
    assert set(found) == {"model.onnx", "model.pt2"} == {path.name for path in tmp_path.iterdir()}
    assert max(found.values()) < 1e-5
    program = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(torch.rand(7, 3, 32, 32)).shape, torch.Size([7, 10]))


def test_eight_bits(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs pip install 'freqprune[onnx]'")
    pytest.importorskip("onnxscript", reason="needs pip install 'freqprune[onnx]'")
    torch.manual_seed(0)
    net = build_model({"name": "resnet8"}).eval()
    batches = list(torch.randn(64, 3, 32, 32).split(16))
    found = export(net, X, tmp_path, onnx=True, calibration=batches)
    whole, small = (OnnxModule(tmp_path / name) for name in ("model.onnx", "model.int8.onnx"))
    sizes = [(tmp_path / name).stat().st_size for name in ("model.onnx", "model.int8.onnx")]
    assert sizes[1] < 0.5 * sizes[0]
    with torch.no_grad():
        answers, expected = torch.cat([small(batch) for batch in batches]), net(torch.cat(batches))
        torch.testing.assert_close(whole(X), net(X), rtol=1e-3, atol=1e-4)
    # Rounded to 255 steps of each layer's range, layer after layer.
    assert 0 < float((answers - expected).abs().max() / expected.abs().max()) < 0.2
    assert found["model.int8.onnx"] == pytest.approx(float((answers.argmax(1) == expected.argmax(1)).float().mean()))
    with pytest.raises(InputError, match=r"set export\.onnx=true too"):
        Exports(int8=True)


@pytest.mark.parametrize("factor", [1.001, float("nan"), float("inf")])
def test_a_file_that_computes_something_else_is_refused(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()

    class Loaded:
        def module(self) -> Callable[[Tensor], Tensor]:
            return lambda x: net(x) * factor

    monkeypatch.setattr(torch.export, "load", lambda path: Loaded())
    with pytest.raises(InputError, match="differs from the network"):
        export(net, X, tmp_path, torch_export=True)
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(exports, "OnnxModule", lambda path: lambda x: net(x) * factor)
    (tmp_path / "model.onnx").write_bytes(b"of before")
    with pytest.raises(InputError, match=r"model\.onnx differs from the network"):
        export(net, X, tmp_path, onnx=True)
    # Whoever takes what lies there gets nothing that was refused.
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"model.onnx": b"of before"}


def test_large_networks_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    from torch.onnx._internal.exporter import _onnx_program

    net = build_model({"name": "resnet8"}).eval()
    with monkeypatch.context() as patch:
        patch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 0)
        export(net, X, tmp_path, onnx=True, calibration=[X])
    assert (tmp_path / "model.onnx.data").is_file()
    n_bytes = sum(4 * p.numel() for p in net.parameters())
    assert bytes_of(tmp_path / "model.onnx") > n_bytes > (tmp_path / "model.onnx").stat().st_size
    assert {path.name for path in tmp_path.iterdir()} <= {*EXPORTED}
    assert OnnxModule(tmp_path / "model.int8.onnx")(X).shape == (2, 10)
    # What a job that was killed has left goes.
    (tmp_path / ".exportold").mkdir()
    # One that fits into a file leaves none of the larger one's tensors.
    export(net, X, tmp_path, onnx=True)
    assert not (tmp_path / "model.onnx.data").exists()
    assert not (tmp_path / ".exportold").exists()


def test_what_the_quantiser_cannot_take_is_told_before_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")

    def refuses(*_: object, **__: object) -> None:
        raise ValueError("no such operator")

    monkeypatch.setattr(quantization, "quantize_static", refuses)
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(InputError, match=r"export\.int8 = true cannot take this network \(no such operator\)"):
        check_export(net, X, Exports(onnx=True, int8=True))


def test_a_network_in_training_mode_is_exported_as_it_infers(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten()).double()
    net[1].running_mean.fill_(0.3)
    net.train()
    export(net, torch.rand(2, 3, 8, 8).double(), tmp_path, torch_export=True)
    assert all(module.training for module in net.modules())
    x, program = torch.rand(3, 3, 8, 8).double(), torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(x), net.eval()(x), rtol=1e-12, atol=1e-12)


def test_missing_packages_are_told_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs onnx, onnxscript, onnxruntime; pip install 'freqprune\[onnx\]'"):
        Exports(onnx=True, torch_export=False)
    assert Exports(onnx=False, torch_export=True).torch_export


class Answers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.conv(x).mean((2, 3))}


def test_a_network_of_doubles_that_answers_a_mapping(tmp_path: Path) -> None:
    found = export(Answers().double().eval(), torch.rand(1, 3, 8, 8).double(), tmp_path, torch_export=True)
    assert found["model.pt2"] <= 1e-12


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        return y if y.mean() > 0 else -y


@pytest.mark.parametrize("asked", [{"torch_export": True}, {"onnx": True}])
def test_what_an_exporter_cannot_take_is_said_in_words(asked: dict[str, bool], tmp_path: Path) -> None:
    net, x = Chooses().eval(), torch.rand(1, 3, 8, 8)
    with pytest.raises(InputError, match=rf"export\.{next(iter(asked))} = true cannot take this network"):
        export(net, x, tmp_path, **asked)
    with pytest.raises(InputError, match="cannot take this network"):
        check_export(net, x, Exports(**asked))


def test_eight_bits_of_a_network_that_answers_a_mapping(tmp_path: Path) -> None:
    x = torch.rand(4, 3, 8, 8)
    assert export(Answers().eval(), x, tmp_path, onnx=True, calibration=[x])["model.int8.onnx"] >= 0.5
