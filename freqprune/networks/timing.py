"""How long each operation of a network takes at the widths that a cut may leave it: measured on this device, and kept.

A cut by time needs the cost of every layer at every width (HALP, Shen et al. 2022, arXiv 2110.10811). A convolution is
timed at `SHARES` of its inputs and of its outputs, so that steps of the hardware's blocks show; what only follows, such
as norms, activations and sums, at half of its channels.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils.benchmark import Timer

from freqprune.errors import InputError
from freqprune.networks.hooks import evaluating
from freqprune.networks.steps import best_multiple, widths_to_time
from freqprune.networks.trace import CONVOLUTIONS, Trace, groups_of, reader, run

SHARES = (1.0, 0.75, 0.5, 0.25)
# Seconds that each measurement takes at least.
LEAST_S = 0.03
# Layers whose steps count for all.
N_HEAVY = 3


@dataclass(frozen=True)
class Operation:
    """One operation and its time.

    Attributes:
        node: the operation.
        layer: the convolution or linear layer that it is, or whose channels it works on; None before the first.
        reads: milliseconds with `SHARES` of the channels that it reads, all that it writes.
        writes: milliseconds with `SHARES` of those that it writes.
    """

    node: Node
    layer: str | None
    reads: tuple[float, ...]
    writes: tuple[float, ...]

    def ms(self, read: float, written: float) -> float:
        """Milliseconds with these shares of its channels left: the product of both sides."""
        if self.writes[0] <= 0:
            return 0.0
        return _at(read, self.reads) * _at(written, self.writes) / self.writes[0]


def _at(share: float, times: Sequence[float]) -> float:
    # Below the last point, where little is left to win, the time of the last point.
    return float(np.interp(share, SHARES[::-1], times[::-1]))


class Times:
    """Times of the operations of a network on its device.

    Args:
        model: the network.
        trace: its operations for batches of the size of interest.
        batch: network inputs of that size.
        dense_ms: what a forward takes; what the operations do not take together is the same for each, as the calls are
            that Python makes.
        cache: file of measured times, read first and written afterwards; None for none.
        progress: wraps the iteration over the operations, for a progress bar.

    Attributes:
        operations: in the order in which they run.

    Raises:
        InputError: for a file that is damaged or was measured elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        batch: Tensor,
        dense_ms: float,
        cache: Path | None = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    ) -> None:
        self._cache, self._device = cache, batch.device
        self._known = {} if cache is None else _read(cache, batch.device)
        measured = []
        fixed = trace.inputs(model)
        values: dict[Node, Any] = {trace.entrance: batch}
        said = [f"timing {trace.layers.get(node, node.name)}" for node in trace.nodes]
        with evaluating(model), torch.no_grad():
            steps = trace.walk(values, fixed)
            for node, _ in zip(steps, progress(said) if progress is not None else said, strict=True):
                measured.append(self._measure(node, trace, values, fixed))
        total = sum(operation.writes[0] for operation in measured)
        # Calls from Python take time of their own; a fused forward takes less than its operations.
        rest, scale = max(0.0, dense_ms - total) / len(measured), min(1.0, dense_ms / max(total, 1e-9))
        self.operations = [
            Operation(
                one.node,
                one.layer,
                tuple(t * scale + rest for t in one.reads),
                tuple(t * scale + rest for t in one.writes),
            )
            for one in measured
        ]
        self._keep()

    def _keep(self) -> None:
        if self._cache is not None:
            _write(self._cache, self._device, self._known)

    def ms(self, left: Mapping[str, tuple[float, float]], gone: Iterable[Node] = ()) -> float:
        """Milliseconds of a forward, with shares of the inputs and outputs of each layer left, without some
        operations."""
        without = set(gone)
        return sum(one.ms(*left.get(one.layer or "", (1.0, 1.0))) for one in self.operations if one.node not in without)

    def multiple(self, model: nn.Module, trace: Trace, batch: Tensor, most: int) -> int:
        """The multiple that widths are best rounded up to, `most` at most, by the steps in the times of the `N_HEAVY`
        layers that take longest."""
        ranked = sorted(self.operations, key=lambda one: -one.writes[0])
        heavy = [one.node for one in ranked if one.node in trace.layers and groups_of(one.node) == 1][:N_HEAVY]
        fixed = trace.inputs(model)
        values: dict[Node, Any] = {trace.entrance: batch}
        read = reader(fixed, values)
        curves = []
        with evaluating(model), torch.no_grad():
            for node in trace.walk(values, fixed):
                if node in heavy:
                    n_filters = len(read(node.args[1]))  # type: ignore[arg-type]
                    widths = widths_to_time(n_filters)
                    curves.append({width: self._narrow(node, read, 1.0, width / n_filters) for width in widths})
        self._keep()
        return best_multiple(curves, most)

    def _measure(self, node: Node, trace: Trace, values: Mapping[Node, Any], fixed: Mapping[Node, Tensor]) -> Operation:
        read = reader(fixed, values)
        if node in trace.layers:
            return self._layer(node, trace.layers[node], read)
        layer, before = None, [node]
        while layer is None and before:
            before = [source for source in before[0].all_input_nodes if source not in fixed]
            layer = trace.layers.get(before[0]) if before else None
        if not isinstance(values[node], Tensor) or values[node].dim() < 2:
            return Operation(node, layer, (0.0,) * len(SHARES), (0.0,) * len(SHARES))
        full = self._time(str(node.target), _shapes(node, read), lambda: run(node, read))
        half = self._time(
            str(node.target) + " at half",
            _shapes(node, read),
            _at_half(node, read, values[node]) or (lambda: run(node, read)),
        )
        times = tuple(half + (full - half) * (share - 0.5) / 0.5 for share in SHARES)
        times = tuple(max(time, 0.25 * full) for time in times)
        return Operation(node, layer, (full,) * len(SHARES), times)

    def _layer(self, node: Node, layer: str, read: Callable[[Node], Any]) -> Operation:
        writes = tuple(self._narrow(node, read, 1.0, share) for share in SHARES)
        if groups_of(node) > 1:
            return Operation(node, layer, (writes[0],) * len(SHARES), writes)
        return Operation(node, layer, tuple(self._narrow(node, read, share, 1.0) for share in SHARES), writes)

    def _narrow(self, node: Node, read: Callable[[Node], Any], inputs: float, outputs: float) -> float:
        """Milliseconds of a layer with shares of its inputs and of its outputs; of one in groups with whole groups."""
        x, weight = (read(arg) for arg in node.args[:2])  # type: ignore[arg-type]
        rest = list(node.args[3:])
        own_bias = node.args[2] if len(node.args) > 2 else None
        bias = read(own_bias) if isinstance(own_bias, Node) else None
        dim, groups = 1 if node.target in CONVOLUTIONS else -1, groups_of(node)
        n_in, n_out = (max(1, round(n * share)) for n, share in ((weight.shape[1], inputs), (len(weight), outputs)))
        if groups > 1:
            # Whole groups go, on both sides.
            n_groups = max(1, round(groups * outputs))
            n_in, n_out = weight.shape[1], len(weight) // groups * n_groups
            rest[3] = n_groups
            few = x.narrow(dim, 0, n_groups * n_in)
        else:
            few = x.narrow(dim, 0, n_in)
        few = few.contiguous(memory_format=_format(x))
        some = weight[:n_out, :n_in].contiguous(memory_format=_format(weight))
        b = None if bias is None else bias[:n_out].contiguous()
        name = f"{node.target} {tuple(few.shape)} {tuple(some.shape)} {b is not None} {rest} {_format(x)} {x.dtype}"
        return self._time(name, "", lambda: node.target(few, some, b, *rest))  # type: ignore[operator]

    def _time(self, what: str, shapes: str, work: Callable[[], Any]) -> float:
        """Milliseconds of a call, measured unless known."""
        key = f"{what} {shapes}"
        if key not in self._known:
            timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
            # A timer waits for the accelerator that is the current one.
            with nullcontext() if self._device.type == "cpu" else torch.accelerator.device_index(self._device.index):
                self._known[key] = 1000 * timer.blocked_autorange(min_run_time=LEAST_S).median
        return self._known[key]


def _format(tensor: Tensor) -> torch.memory_format:
    plain = tensor.dim() != 4 or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if plain else torch.channels_last


def _shapes(node: Node, read: Callable[[Node], Any]) -> str:
    found = [read(source) for source in node.all_input_nodes]
    # Kernel, stride and dimensions too; operands, also in lists, are told by their shapes.
    rest = map_arg((node.args, node.kwargs), lambda _: None)
    return f"{[(tuple(v.shape), v.dtype, str(_format(v))) for v in found if isinstance(v, Tensor)]} {rest}"


def _at_half(node: Node, read: Callable[[Node], Any], result: Tensor) -> Callable[[], Any] | None:
    """The operation on half of its channels; None if it does not work on channels."""
    dim = 1 if result.dim() == 4 else -1
    n_channels = result.shape[dim]

    def less(of: Node) -> Any:
        value = read(of)
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 1 and len(value) == n_channels:
            return value[: n_channels // 2].contiguous()
        if value.dim() == result.dim() and value.shape[dim] == n_channels:
            return value.narrow(dim, 0, n_channels // 2).contiguous(memory_format=_format(value))
        return value

    taken = {source: less(source) for source in node.all_input_nodes}
    try:
        run(node, taken.__getitem__)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return lambda: run(node, taken.__getitem__)


def _about(device: torch.device) -> dict[str, Any]:
    """What times hold for."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    if device.type not in ("cpu", "cuda"):
        kind = f"{device.type} of {kind}"
    precision = torch.get_float32_matmul_precision()
    return {"device": kind, "threads": torch.get_num_threads(), "torch": torch.__version__, "precision": precision}


def _processor() -> str:
    """Name of the processor and what it can do: machines of one name may differ."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    lines = [line for line in text.splitlines() if line.startswith(("model name", "flags"))][:2]
    kind = hashlib.sha1("".join(lines).encode()).hexdigest()[:6]
    return f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()} {kind}"


def cache_file(folder: Path, device: torch.device) -> Path:
    """The file of times measured on a device, by what they hold for."""
    name = hashlib.sha1(json.dumps(_about(device), sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"times-{name}.json"


def _read(path: Path, device: torch.device) -> dict[str, float]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        times = {str(key): float(value) for key, value in content["times"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the file of measured times {path} cannot be read ({type(error).__name__}: {error}); remove it"
        ) from None
    here = _about(device)
    if content.get("about") != here:
        raise InputError(
            f"the file of measured times {path} is stale: it holds for {content.get('about')}, this is {here}; remove "
            "it"
        )
    return times


def _write(path: Path, device: torch.device, times: Mapping[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"about": _about(device), "times": times}, indent=0))
    os.replace(partial, path)
