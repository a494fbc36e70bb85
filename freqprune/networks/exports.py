"""Networks for other runtimes: ONNX and torch.export, checked before they count."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks.hooks import evaluating

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exports:
    """Formats to write the final network in, see `export`.

    Args:
        onnx: ``model.onnx``.
        torch_export: ``model.pt2``.
        fold: fold batch norms into the convolutions before them first, see `freqprune.networks.folding`.

    Raises:
        InputError: if a package that one of them needs is missing.
    """

    onnx: bool = False
    torch_export: bool = False
    fold: bool = False

    def __post_init__(self) -> None:
        missing = [
            name
            for name in ("onnx", "onnxscript", "onnxruntime")
            if self.onnx and importlib.util.find_spec(name) is None
        ]
        if missing:
            raise InputError(
                f"export.onnx=true needs {', '.join(missing)}; pip install 'freqprune[onnx]', or export.onnx=false"
            )


def export(
    net: nn.Module, example: Tensor, folder: Path, onnx: bool = False, torch_export: bool = False
) -> dict[str, Any]:
    """Write ``model.onnx`` (run by onnxruntime) and ``model.pt2`` (run by ``torch.export.load``), any batch size, and
    compare their outputs.

    Args:
        net: the network; exported in eval mode, on the CPU.
        example: input batch.
        folder: where the files go.
        onnx: write ``model.onnx``.
        torch_export: write ``model.pt2``.

    Returns:
        For each file the largest difference of its outputs from the network's, relative to the largest output.

    Raises:
        InputError: if a package is missing, or a file computes something else.
    """
    Exports(onnx, torch_export)
    if not (onnx or torch_export):
        return {}
    device = example.device
    net.cpu()
    try:
        with evaluating(net), torch.no_grad():
            return _written(net, example.detach().cpu().contiguous(), folder, onnx, torch_export)
    finally:
        net.to(device)


def _written(net: nn.Module, example: Tensor, folder: Path, onnx: bool, torch_export: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    # Neither the size of the example nor 1, so that a batch size that was frozen in shows.
    inputs = torch.randn(3, *example.shape[1:], generator=generator)
    expected = net(inputs)
    pair = torch.cat([example[:1], example[:1]])
    dynamic = ({0: torch.export.Dim("batch")},)
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        # The exporters' remarks about their own internals.
        warnings.simplefilter("ignore")
        if torch_export:
            torch.export.save(torch.export.export(net, (pair,), dynamic_shapes=dynamic), folder / "model.pt2")
            again = torch.export.load(folder / "model.pt2").module()(inputs)
            found["model.pt2"] = _difference("model.pt2", again, expected)
        if onnx:
            import onnxruntime

            path = folder / "model.onnx"
            torch.onnx.export(
                net, (pair,), str(path), dynamo=True, dynamic_shapes=dynamic, external_data=False, verbose=False
            )
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            again = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])
            found["model.onnx"] = _difference("model.onnx", again, expected)
    return found


def _difference(name: str, found: Tensor, expected: Tensor) -> float:
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference <= TOLERANCE:
        raise InputError(
            f"{name} differs from the network by {difference:.2g} of its largest output, more than {TOLERANCE:g}; do "
            "not use it"
        )
    return difference
