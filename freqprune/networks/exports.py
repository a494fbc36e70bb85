"""Networks for other runtimes: ONNX and torch.export, checked before they count."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.errors import InputError, first_line
from freqprune.networks.answers import device_of, first
from freqprune.networks.hooks import evaluating
from freqprune.networks.runtimes import OnnxModule

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exports:
    """Formats to write the final network in, see `export`.

    Args:
        onnx: ``model.onnx``.
        torch_export: ``model.pt2``.
        fold: fold batch norms into the convolutions before them first, see `freqprune.networks.folding`.
        int8: ``model.int8.onnx``, by ONNX Runtime's own quantiser from ``model.onnx``.

    Raises:
        InputError: if a package that one of them needs is missing.
    """

    onnx: bool = False
    torch_export: bool = False
    fold: bool = False
    int8: bool = False

    def __post_init__(self) -> None:
        if self.int8 and not self.onnx:
            raise InputError("export.int8=true is made from model.onnx: set export.onnx=true too")
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
    net: nn.Module,
    example: Tensor,
    folder: Path,
    onnx: bool = False,
    torch_export: bool = False,
    calibration: Sequence[Tensor] = (),
) -> dict[str, Any]:
    """Write ``model.onnx`` (run by onnxruntime) and ``model.pt2`` (run by ``torch.export.load``), any batch size, and
    compare their outputs.

    Args:
        net: the network; exported in eval mode, on the CPU.
        example: input batch.
        folder: where the files go.
        onnx: write ``model.onnx``.
        torch_export: write ``model.pt2``.
        calibration: batches of network inputs; given any, ``model.int8.onnx`` is written too, whose activations are
            rounded over the ranges that they have there.

    Returns:
        For each file the largest difference of its outputs from the network's, relative to the largest output; of
        ``model.int8.onnx``, which is to differ, the share of the calibration images that it answers alike.

    Raises:
        InputError: if a package is missing, or a file computes something else.
    """
    Exports(onnx, torch_export, int8=bool(calibration))
    if not (onnx or torch_export):
        return {}
    device = device_of(net)
    net.cpu()
    try:
        # Complete and checked, or not at all; what was killed on the way has left this.
        for old in folder.glob(".export*"):
            shutil.rmtree(old, ignore_errors=True)
        with TemporaryDirectory(dir=folder, prefix=".export") as place, evaluating(net), torch.no_grad():
            found = _written(net, example.detach().cpu().contiguous(), Path(place), onnx, torch_export)
            if calibration:
                batches = [batch.detach().cpu().contiguous() for batch in calibration]
                with _told("int8"):
                    found["model.int8.onnx"] = _quantised(net, Path(place), batches)
            for name in found:
                _data_of(folder / name).unlink(missing_ok=True)
            for file in Path(place).iterdir():
                os.replace(file, folder / file.name)
            return found
    finally:
        net.to(device)


def _data_of(path: Path) -> Path:
    """Where the tensors of an ONNX file lie that is larger than 1.5 GiB, by torch's exporter."""
    return path.with_name(f"{path.name}.data")


def bytes_of(path: Path) -> int:
    """Size of an exported file, with that of its tensors."""
    return sum(one.stat().st_size for one in (path, _data_of(path)) if one.is_file())


def _written(net: nn.Module, example: Tensor, folder: Path, onnx: bool, torch_export: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    # Neither the size of the example nor 1, so that a batch size that was frozen in shows.
    inputs = torch.randn(3, *example.shape[1:], generator=generator).to(example.dtype)
    expected = first(net(inputs))
    pair = torch.cat([example[:1], example[:1]])
    dynamic = ({0: torch.export.Dim("batch")},)
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        # The exporters' remarks about their own internals.
        warnings.simplefilter("ignore")
        if torch_export:
            with _told("torch_export"):
                torch.export.save(torch.export.export(net, (pair,), dynamic_shapes=dynamic), folder / "model.pt2")
                again = first(torch.export.load(folder / "model.pt2").module()(inputs))
            found["model.pt2"] = _difference("model.pt2", again, expected)
        if onnx:
            path = folder / "model.onnx"
            with _told("onnx"):
                torch.onnx.export(
                    net, (pair,), str(path), dynamo=True, dynamic_shapes=dynamic, external_data=False, verbose=False
                )
                again = OnnxModule(path)(inputs)
            found["model.onnx"] = _difference("model.onnx", again, expected)
    return found


@contextmanager
def _told(setting: str) -> Iterator[None]:
    """What an exporter cannot take, in words."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:  # Exporters have many, of no common kind.
        raise InputError(
            f"export.{setting} = true cannot take this network ({first_line(error)}); leave it out, or write its "
            "forward without what depends on values"
        ) from error


def check_export(net: nn.Module, example: Tensor, asked: Exports) -> None:
    """Export a network for a trial, before it is cut and trained.

    Raises:
        InputError: as `export`.
    """
    with TemporaryDirectory() as folder:
        export(net, example, Path(folder), asked.onnx, asked.torch_export, [example] if asked.int8 else ())


def _quantised(net: nn.Module, folder: Path, batches: Sequence[Tensor]) -> float:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    dense = OnnxModule(folder / "model.onnx")

    class Reader(CalibrationDataReader):
        left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {dense.entrance: batch.numpy()}

    types = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
    root, level = logging.getLogger(), logging.getLogger().level
    try:
        # It logs advice to whoever calls it.
        root.setLevel(logging.ERROR)
        large = _data_of(folder / "model.onnx").is_file()
        quantize_static(
            folder / "model.onnx", folder / "model.int8.onnx", Reader(), per_channel=True,
            use_external_data_format=large, **types,
        )  # fmt: skip
    finally:
        root.setLevel(level)
    small = OnnxModule(folder / "model.int8.onnx")
    same = [small(batch).argmax(1) == first(net(batch)).argmax(1) for batch in batches]
    return float(torch.cat(same).double().mean())


def _difference(name: str, found: Tensor, expected: Tensor) -> float:
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference <= TOLERANCE:
        raise InputError(
            f"{name} differs from the network by {difference:.2g} of its largest output, more than {TOLERANCE:g}; do "
            "not use it"
        )
    return difference
