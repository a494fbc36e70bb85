"""Networks that run compiled while they train, and as they were before that afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch

from freqprune.errors import InputError, first_line
from freqprune.training import Classifier


class ReleaseGradients(pl.Callback):
    """Gradients lie in the memory of a CUDA graph, which the graphs of a validation take over: none are kept there."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            pl_module.zero_grad(set_to_none=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.zero_grad(set_to_none=True)


@contextmanager
def compiled(classifier: Classifier, trainer: pl.Trainer, mode: bool | str, advice: str) -> Iterator[None]:
    """Inside the block the network, and the one that it learns from, run compiled.

    What is done once afterwards, as a test, would wait longer for the compiler than it gains. What ``torch.compile``
    keeps of this process is cleared at the end: of one class it compiles eight networks, and runs the ninth as it is.

    Args:
        classifier: whose networks.
        trainer: that is to train it.
        mode: of ``torch.compile``; True for its default, False to leave the networks as they are.
        advice: how to go on after an error.

    Raises:
        InputError: if a network cannot be compiled here.
    """
    if not mode:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    if isinstance(mode, str):
        trainer.callbacks.append(ReleaseGradients())  # type: ignore[attr-defined]
    nets = [net for net in (classifier.net, classifier.teacher) if net is not None]
    # PyTorch has no word for taking it back; copies of a module leave this out, too.
    before = [net._compiled_call_impl for net in nets]
    try:
        for net in nets:
            net.compile(mode=None if mode is True else mode)
        yield
    except TorchDynamoException as error:
        raise InputError(
            f"torch.compile cannot take this network here ({first_line(error)}): use compile=false; {advice}"
        ) from error
    finally:
        for net, call in zip(nets, before, strict=True):
            net._compiled_call_impl = call
        torch.compiler.reset()
