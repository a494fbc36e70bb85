"""Where a network is timed: on this device eagerly, compiled, or by ONNX Runtime; dense and smaller in turn."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from freqprune.errors import InputError, first_line
from freqprune.networks.answers import device_of
from freqprune.networks.hooks import evaluating

TARGETS = ("eager", "compiled", "onnx")
# Networks of one class that are compiled in one process.
MANY = 10_000
# Of a comparison, whose medians say how sure it is.
N_STRETCHES = 10
_DTYPES = {"tensor(double)": torch.float64, "tensor(float16)": torch.float16}


@dataclass(frozen=True)
class Speed:
    """Times of a dense and of a smaller network, measured in turn.

    Attributes:
        dense_ms: median of a forward.
        small_ms: likewise.
        saved: share of the time that the smaller network saves, by the median of the ratios of neighbours.
        spread: standard error of that share, from its medians over stretches of time: pairs that follow each other
            share a slow moment of the machine, and tell less than as many far apart.
    """

    dense_ms: float
    small_ms: float
    saved: float
    spread: float


def runner(net: nn.Module, example: Tensor, target: str = "eager") -> Callable[[], object]:
    """One forward of a network, ready to be called again and again.

    Args:
        net: the network; left as it is.
        example: the batch.
        target: one of `TARGETS`.

    Raises:
        InputError: if the target's packages are missing, or it cannot take the network.
    """
    if target == "onnx":
        return _in_onnxruntime(net, example)
    forward = torch.compile(net) if target == "compiled" else net

    def call() -> object:
        with torch.inference_mode():
            answer = forward(example)
        if example.device.type != "cpu":
            torch.accelerator.synchronize(example.device)
        return answer

    if target == "compiled":
        _compile(call)
    return call


def _compile(call: Callable[[], object]) -> None:
    """Call a compiled network for the first time."""
    import torch._dynamo

    # Networks of one class share their code, of which PyTorch compiles eight versions and runs the rest eagerly.
    limits: dict[str, Any] = {"recompile_limit": MANY, "accumulated_recompile_limit": MANY}
    try:
        with torch._dynamo.config.patch(limits):
            call()
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"torch.compile cannot take this network here ({first_line(error)}); use latency.target=eager or onnx"
        ) from error


class OnnxModule(nn.Module):
    """An ONNX file or its content as a module, run by ONNX Runtime on the CPU.

    Args:
        content: the file, or what is in it.

    Attributes:
        entrance: name of its input.

    Raises:
        InputError: if ONNX Runtime is missing.
    """

    def __init__(self, content: Path | bytes) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise InputError("latency.target=onnx needs onnxruntime; pip install 'freqprune[onnx]'") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait for work by spinning take the cores from whatever is timed in turn.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        given = content if isinstance(content, bytes) else str(content)
        self._session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        entrance = self._session.get_inputs()[0]
        self.entrance, self._dtype = entrance.name, _DTYPES.get(entrance.type, torch.float32)

    def forward(self, images: Tensor) -> Tensor:
        """Network inputs to the (first) output, on the device of the inputs."""
        inputs = {self.entrance: np.ascontiguousarray(images.detach().to(self._dtype).cpu().numpy())}
        return torch.from_numpy(self._session.run(None, inputs)[0]).to(images.device)


def _in_onnxruntime(net: nn.Module, example: Tensor) -> Callable[[], object]:
    where = device_of(net)
    try:
        with warnings.catch_warnings(), evaluating(net), torch.no_grad():
            # The exporter's remarks about its own internals.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(net.cpu(), (example.cpu(),), dynamo=True, verbose=False)
            assert program is not None
            forward = OnnxModule(program.model_proto.SerializeToString())
    except InputError:
        raise
    except Exception as error:  # The exporter has many, of no common kind.
        raise InputError(
            f"ONNX cannot take this network ({first_line(error)}); use latency.target=eager or compiled"
        ) from error
    finally:
        net.to(where)
    images = example.cpu().contiguous()
    return lambda: forward(images)


def in_turn(
    forwards: Sequence[Callable[[], object]],
    n_runs: int,
    n_warmup: int,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> list[list[float]]:
    """Milliseconds of every run of some forwards, taken in turn so that a drift of the machine meets all of them."""
    times: list[list[float]] = [[] for _ in forwards]
    said = [f"timing, {number} of {n_warmup + n_runs}" for number in range(1, n_warmup + n_runs + 1)]
    for number, _ in enumerate(progress(said) if progress is not None else said):
        for forward, found in zip(forwards, times, strict=True):
            start = time.perf_counter()
            forward()
            if number >= n_warmup:
                found.append(1000 * (time.perf_counter() - start))
    return times


def compare(
    dense: Callable[[], object],
    small: Callable[[], object],
    n_pairs: int = 15,
    n_warmup: int = 3,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Speed:
    """Time a dense and a smaller network in turn.

    Args:
        dense: a forward of the dense network, from `runner`.
        small: of the smaller one.
        n_pairs: timed forwards of each, two at least.
        n_warmup: forwards of each before those.
        progress: see `freqprune.tag`.
    """
    before, after = in_turn([dense, small], n_pairs, n_warmup, progress)
    saved = [1 - b / a for a, b in zip(before, after, strict=True)]
    stretches = np.array_split(saved, max(2, min(N_STRETCHES, n_pairs // 3)))
    spread = statistics.stdev(float(np.median(some)) for some in stretches) / len(stretches) ** 0.5
    return Speed(statistics.median(before), statistics.median(after), statistics.median(saved), spread)
