"""Cost of a network: MACs, parameters, latency."""

from __future__ import annotations

import io
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from freqprune.errors import InputError, at_least, one_of
from freqprune.networks.hooks import evaluating, followable
from freqprune.networks.runtimes import TARGETS, in_turn, runner


def macs_by_layer(model: nn.Module, example: Tensor) -> dict[str, int]:
    """MACs of each convolution and linear layer for one image (multiplications of other operations are not counted).

    Args:
        model: the network.
        example: one image, ``(1, n_channels, height, width)``.
    """
    counter = FlopCounterMode(display=False)
    # Parameters that a forward hands on as they are trip the counter up where they ask for gradients.
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        with followable(model), torch.no_grad(), counter, _LinearCalls(model) as calls:
            model(example[:1].clone())
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
    prefix = type(model).__name__ + "."
    counts = counter.get_flop_counts()
    # A module may be there under several names, of which the counter takes any.
    names = {module: name for name, module in model.named_modules()}
    leaves = {
        name: names[module]
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
    }
    found: dict[str, int] = {}
    for name, operations in counts.items():
        leaf = leaves.get(name.removeprefix(prefix))
        if leaf is not None:
            # A fused multiply-add is two operations.
            found[leaf] = found.get(leaf, 0) + sum(operations.values()) // 2
    # A forward may multiply with a layer's weight itself, as Swin, BEiT and EVA do for queries, keys and values.
    return {name: max(found.get(name, 0), calls.macs.get(name, 0)) for name in {**found, **calls.macs}}


class _LinearCalls(TorchFunctionMode):
    """MACs of ``torch.nn.functional.linear`` with the weights of a network's linear layers, by layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        self.macs: dict[str, int] = {}
        # Weights that are computed anew at each use are other tensors each time.
        own = [(name, module._parameters.get("weight")) for name, module in layers]
        # Those that layers share count where these are called as modules, and only there.
        uses = Counter(id(weight) for _, weight in own)
        self._names = {id(weight): name for name, weight in own if weight is not None and uses[id(weight)] == 1}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            weight: Any = args[1] if len(args) > 1 else (kwargs or {})["weight"]
            name = self._names.get(id(weight))
            if name is not None:
                self.macs[name] = self.macs.get(name, 0) + out.numel() * weight.shape[1]
        return out


def count_macs(model: nn.Module, example: Tensor) -> int:
    """MACs of the convolutions and linear layers for one image; those in `torch.nn.MultiheadAttention`, which calls no
    layer for them, do not count (after `freqprune.networks.open_heads` they do).

    >>> from freqprune import build_model
    >>> count_macs(build_model({"name": "resnet32"}), torch.zeros(1, 3, 32, 32))
    68862592
    """
    return sum(macs_by_layer(model, example).values())


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; buffers do not count."""
    return sum(p.numel() for p in model.parameters())


def cost(model: nn.Module, batch: Tensor) -> dict[str, Any]:
    """MACs for one image, parameters, bytes of the saved weights, and peak memory of a forward of `batch`."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return {
        "macs": count_macs(model, batch[:1]),
        "params": count_parameters(model),
        "file_bytes": file.getbuffer().nbytes,
        "memory_bytes": {str(len(batch)): peak_memory(model, batch)},
    }


class _LiveTensors(TorchDispatchMode):
    """Count the bytes of the tensors that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def peak_memory(model: nn.Module, batch: Tensor) -> int:
    """Bytes of parameters, buffers and, at the worst moment of one inference forward, of the input and all tensors the
    network makes.

    What a library allocates inside an operation does not count.
    """
    own = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers(), batch])
    counter = _LiveTensors()
    with evaluating(model), torch.no_grad(), counter:
        for tensor in [*model.parameters(), *model.buffers(), batch]:
            counter._seen.add(tensor.untyped_storage())
        model(batch)
    return own + counter.peak


@dataclass(frozen=True)
class Latency:
    """How long a forward takes, and where that is measured.

    Args:
        batch_sizes: sizes that the table of stages shows, see `latency_ms`.
        n_runs: forwards of each.
        batch_size: images of a batch that a cut for time counts for.
        target: for which it counts: ``"eager"``, ``"compiled"`` or ``"onnx"``, see `freqprune.networks.runtimes`.
        folder: where measured times are kept; None: ``~/.cache/freqprune``.

    Raises:
        InputError: for numbers below 1, an unknown target, or one whose packages are missing.
    """

    batch_sizes: Sequence[int] = (1, 64)
    n_runs: int = 30
    batch_size: int = 64
    target: str = "eager"
    folder: str | None = None

    def __post_init__(self) -> None:
        at_least(1, batch_sizes=min(self.batch_sizes, default=0), n_runs=self.n_runs, batch_size=self.batch_size)
        one_of(TARGETS, target=self.target)
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
        if self.target == "onnx" and missing:
            raise InputError(f"latency.target=onnx needs {', '.join(missing)}; pip install 'freqprune[onnx]'")

    def sizes(self, by_time: bool) -> list[int]:
        """Sizes that the table of stages shows: with the one that a cut by time counts for, after such a cut."""
        return sorted({*self.batch_sizes, *([self.batch_size] if by_time else [])})


def latency_ms(
    models: Mapping[str, nn.Module],
    example: Tensor,
    n_runs: int = 20,
    n_warmup: int = 5,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> dict[str, float]:
    """Median time of one forward in milliseconds, the networks taken in turn so that a drift of the machine meets all
    of them.

    Args:
        models: networks by name.
        example: input batch.
        n_runs: timed forwards of each.
        n_warmup: forwards before those.
        progress: wraps the iteration over the forwards, for a progress bar.
    """
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(evaluating(model))
        times = in_turn([runner(model, example) for model in models.values()], n_runs, n_warmup, progress)
    return {name: statistics.median(found) for name, found in zip(models, times, strict=True)}
