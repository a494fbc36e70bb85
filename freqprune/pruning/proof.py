"""The proof of a cut: the smaller network computes what the network computes with what was removed silenced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.errors import InputError, first_line
from freqprune.networks import Trace, copied, evaluating, hooked, same_answer
from freqprune.pruning.blocks import Block, answers_without

_WAY_OUT = (
    "Write the shortcut as freqprune.networks.IndexShortcut, or leave the residual stream out (pruning.streams=false) "
    "and the layers around it (pruning.exclude)"
)


def prove(
    model: nn.Module,
    small: nn.Module,
    silenced: Mapping[str, Sequence[int]],
    example: Tensor,
    blocks: Sequence[Block] = (),
    trace: Trace | None = None,
) -> None:
    """Raise InputError unless a smaller network computes what it has to.

    Args:
        model: the network that it was made of.
        small: the smaller one.
        silenced: input channels (of a linear layer: features) that are gone, by layer.
        example: input batch.
        blocks: residual blocks that are gone.
        trace: the network's operations, if there are any.
    """
    kind = type(model).__name__
    if (example == example.flatten()[0]).all():
        # One value throughout, which is enough to give a shape, hides what happens to it.
        example = torch.rand(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
    try:
        with evaluating(small), torch.no_grad():
            found = small(example)
    except Exception as error:
        raise InputError(
            f"the smaller network does not run ({type(error).__name__}: {error}): torch-pruning misreads how channels "
            f"pass through {kind}, for example a shortcut padded with zero channels. {_WAY_OUT}"
        ) from error
    if trace is None:
        expected = masked_forward(model, silenced, example)
    else:
        fixed = trace.inputs(model)
        with torch.no_grad():
            trace.check(model, example, answers_without(trace, fixed, example, ()), "use pruning.blocks=false")
            expected = answers_without(trace, fixed, example, blocks, silenced)
    for big, little in zip(_tensors(expected), _tensors(found), strict=trace is None):
        if not same_answer(big, little):
            raise InputError(
                "the smaller network computes something else than the network with the removed filters silenced: "
                f"torch-pruning misreads how channels pass through {kind}, for example a shortcut padded with zero "
                f"channels. {_WAY_OUT}"
            )


def prove_in_training(model: nn.Module, small: nn.Module, example: Tensor, unreached: Sequence[str]) -> None:
    """Raise InputError if a network runs in training mode and the smaller one does not: what runs only there is not
    followed.

    Args:
        model: the network that it was made of.
        small: the smaller one.
        example: input batch.
        unreached: layers that the forward in eval mode does not reach, for the message.
    """
    pair = torch.cat([example[:1], example[:1]])
    runs = []
    with torch.random.fork_rng(), torch.no_grad():
        for net in (model, small):
            try:
                copied(net).train()(pair)
                runs.append("")
            except Exception as error:  # Whatever a forward trips over.
                runs.append(f"{type(error).__name__}: {first_line(error)}")
    if runs[1] and not runs[0]:
        raise InputError(
            f"the smaller network does not train ({runs[1]}): {', '.join(unreached[:3])} run in training mode only, "
            "where channels are not followed; build the network without them (such as aux_logits=False), or leave out "
            "the layers that they read (pruning.exclude)"
        )


def masked_forward(model: nn.Module, silenced: Mapping[str, Sequence[int]], inputs: Tensor) -> Any:
    """Output of a network in eval mode with some channels silenced where they are read: what a pruned network has to
    compute.

    Args:
        model: the network, left as it is.
        silenced: input channels (of a linear layer: features) set to zero, by layer.
        inputs: input batch.
    """

    modules = dict(model.named_modules())
    with (
        evaluating(model),
        torch.no_grad(),
        hooked([(modules[name], silence(channels), None) for name, channels in silenced.items()]),
    ):
        return model(inputs)


def silence(channels: Sequence[int]) -> Callable[..., Any]:
    """A forward pre-hook that sets some channels (of a linear layer: features) of the input to zero."""

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        x[(..., list(channels)) if isinstance(module, nn.Linear) else (slice(None), list(channels))] = 0
        return (x, *args[1:])

    return before


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, str) or not isinstance(values, Iterable):
        return []
    return [tensor for value in values for tensor in _tensors(value)]
