"""One forward of a network, call by call: which function or module took which tensors and made which."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from freqprune.networks import evaluating, hooked


@dataclass
class Call:
    """One traced function or module call: tensors in, tensor out, with the version of each (in-place operations raise
    it)."""

    kind: str
    what: Any
    inputs: list[tuple[int, int]]
    output: tuple[int, int]
    module: str = ""
    index: int = 0
    replay: Callable[[Tensor], Tensor] | None = None


class Calls(list[Call]):
    """The calls of a forward, and what it answers, with the tensors they speak of: as long as those live, no other
    tensor gets their identity."""

    def __init__(self, calls: Sequence[Call], answers: list[tuple[int, int]], alive: list[Any]) -> None:
        super().__init__(calls)
        self.answers, self.alive = answers, alive


class _Trace(TorchFunctionMode):
    """Log every function that takes a tensor during one forward, and hold the tensors so that their identity stays
    unique."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.alive: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = _stamps((args, kwargs))
        out = func(*args, **kwargs)
        self.alive += [args, kwargs, out]
        made = first_tensor(out)
        # Also what returns several tensors, or writes and returns nothing; not sizes and other answers.
        if inputs and (made is not None or out is None):
            output = (0, 0) if made is None else _stamp(made)
            self.calls.append(Call("function", func, inputs, output, replay=_replay(func, args, kwargs)))
        return out


def _replay(func: Any, args: Any, kwargs: Any) -> Callable[[Tensor], Tensor] | None:
    """The call again on another tensor, which is left as it is."""
    if not args:
        return None
    settings = {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs
    # Without the tensor that it was called on, which whoever keeps this would keep as well.
    return functools.partial(_again, func, args[1:], settings)


def _again(func: Any, rest: Any, settings: Mapping[str, Any], x: Tensor) -> Tensor:
    # A name that ends in _ works in place.
    found: Tensor = func(x.clone() if func.__name__.endswith("_") else x, *rest, **settings)
    return found


def _stamp(tensor: Tensor) -> tuple[int, int]:
    return id(tensor), tensor._version


def _stamps(values: Any) -> list[tuple[int, int]]:
    if isinstance(values, Tensor):
        return [_stamp(values)]
    if isinstance(values, Mapping):
        values = values.values()
    if isinstance(values, list | tuple | set) or (hasattr(values, "__iter__") and not isinstance(values, str)):
        return [stamp for value in values for stamp in _stamps(value)]
    return []


def first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return next((item for item in output if isinstance(item, Tensor)), None)
    return None


def probe(model: nn.Module, example: Tensor, wanted: Sequence[str]) -> tuple[Calls, dict[str, tuple[Tensor, int]]]:
    """One forward in eval mode: every call in order, and of each wanted layer its first output and the number of the
    call that made it."""
    modules = dict(model.named_modules())
    trace = _Trace()
    counts: dict[str, int] = {}
    produced: dict[str, tuple[Tensor, int]] = {}

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            trace.alive.append(args)
            trace.calls.append(Call("enter", module, _stamps(args), (0, 0), name))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            index = counts.get(name, 0)
            counts[name] = index + 1
            tensor = first_tensor(output)
            if tensor is None:
                return
            trace.alive.append(output)
            trace.calls.append(Call("module", module, [], _stamp(tensor), name, index))
            if name in wanted and name not in produced:
                produced[name] = (tensor, len(trace.calls) - 1)

        return hook

    followed = [(n, m) for n, m in modules.items() if n and (n in wanted or not any(True for _ in m.children()))]
    # Outside inference mode, where tensors count the changes made to them in place.
    with (
        torch.inference_mode(False),
        evaluating(model),
        torch.no_grad(),
        hooked([(m, enter(n), leave(n)) for n, m in followed]),
        trace,
    ):
        answers = model(example.clone())
    return Calls(trace.calls, _stamps(answers), [*trace.alive, answers]), produced
