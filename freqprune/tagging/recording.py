"""Frames → activation time courses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import evaluating, fused, hooked, replaced
from freqprune.tagging.calls import first_tensor
from freqprune.tagging.sites import Site

log = logging.getLogger(__name__)


class _Enough(Exception):  # noqa: N818 - control flow, not an error
    """Raised inside a forward once the last wanted layer has been read."""


Reduction = Callable[[Tensor, int], Tensor]


def map_mean(output: Tensor, channel_dim: int) -> Tensor:
    """Mean of each filter's map, ``(n_frames, n_filters)``."""
    positions = [d for d in range(1, output.dim()) if d != channel_dim]
    output = _full(output)
    return output.mean(dim=positions) if positions else output


def every_position(output: Tensor, channel_dim: int) -> Tensor:
    """Every position of each filter's map, ``(n_frames, n_filters, n_positions)``."""
    output = _full(output)
    return output.movedim(channel_dim, 1).flatten(2) if output.dim() > 2 else output.unsqueeze(-1)


def class_token(output: Tensor, channel_dim: int) -> Tensor:
    """Every feature of the first token, ``(n_frames, n_features)``.

    Raises:
        InputError: for a layer whose outputs are no tokens.
    """
    if output.dim() != 3 or channel_dim != 2:
        raise InputError(
            "spatial = class_token reads the first of the tokens, (n_frames, n_tokens, n_features), but a layer "
            f"answers with {tuple(output.shape)}; choose layers over tokens, such as tagging.layers='*.mlp.*'"
        )
    return _full(output[:, 0])


def _full(output: Tensor) -> Tensor:
    if output.dim() == 1:
        output = output[:, None]
    # The mean of a half-precision map, rounded to half precision again, would be noise in the time course.
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


@cache
def _tell(n_layers: int, first: str) -> None:
    # Once: a network may be tagged after every epoch, or by class.
    log.warning(
        "%d layers (%s first) answer the same image differently from call to call, also in eval mode: the forward "
        "draws at random or counts its calls, and amplitudes hold that too", n_layers, first
    )  # fmt: skip


@cache
def _tell_of_runs(layers: str) -> None:
    log.warning("%s: run more than once in a forward, and are read in their first call only", layers)


class Recorder:
    """Run frames through a network and return what its sites answer.

    Use as a context manager: hooks are registered on entry and removed on exit, the network is in eval mode in between.
    Each call runs one batch of frames and stops the forward after the last site.

    Args:
        model: the network.
        sites: where to read, from `find_sites`.
        reduce: what to keep of each output: `map_mean`, `every_position`, `class_token`, or a function of one's own.
        folds: batch norms to fold into the convolutions before them while recording, from
            `freqprune.tagging.sites.find_folds`.
        half: run under autocast in this dtype, ``torch.float16`` or ``torch.bfloat16``.
        gradients: what is read keeps its gradient, as far as gradients are enabled.

    Raises:
        InputError: if a site is not reached.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        reduce: Reduction = map_mean,
        folds: Sequence[tuple[str, str]] = (),
        half: torch.dtype | None = None,
        gradients: bool = False,
    ) -> None:
        self.model = model
        self.half, self.gradients = half, gradients
        self.folds = list(folds)
        self.sites = list(sites)
        self.reduce = reduce
        self._read: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Recorder:
        by_module: dict[str, list[Site]] = {}
        for site in self.sites:
            by_module.setdefault(site.module, []).append(site)
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(replaced(self.model, fused(self.model, self.folds)))
            modules = dict(self.model.named_modules())
            stack.enter_context(
                hooked([(modules[name], None, self._hook(name, sites)) for name, sites in by_module.items()])
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        self._read, self._calls = {}, {}

    def _hook(self, name: str, sites: list[Site]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            for site in sites:
                tensor = first_tensor(output) if site.call == call else None
                if tensor is not None:
                    # A gradient needs what the network may go on to change in place.
                    given = tensor.clone() if self.gradients and site.then is not None else tensor
                    response = site.then(given) if site.then is not None else tensor
                    reading = self.reduce(response if self.gradients else response.detach(), site.channel_dim)
                    # What shares the output's memory would change with the next operation in place.
                    shared = reading.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
                    self._read[site.layer] = reading.clone() if shared else reading
            if len(self._read) == len(self.sites):
                raise _Enough

        return hook

    def warn(self, image: Tensor) -> None:
        """A warning if a site's layer runs several times a forward, and if one answers the same image otherwise from
        call to call."""
        several = [site.layer for site in self.sites if site.runs > 1]
        if several:
            _tell_of_runs(", ".join(several))
        # What draws shall draw what it would have drawn.
        with torch.random.fork_rng([image.device] if image.device.type == "cuda" else []):
            one, two = (self(image.clone()) for _ in range(2))
        drawn = [layer for layer in one if (one[layer] - two[layer]).abs().max() > 1e-3 * one[layer].abs().max()]
        if drawn:
            _tell(len(drawn), drawn[0])

    def __call__(self, frames: Tensor) -> dict[str, Tensor]:
        """Responses to a batch of frames ``(n_frames, ...)``, one tensor a layer, first dimension ``n_frames``."""
        self._read, self._calls = {}, {}
        autocast = torch.autocast(frames.device.type, dtype=self.half, enabled=self.half is not None)
        with suppress(_Enough), torch.inference_mode(not self.gradients), autocast:
            self.model(frames)
        missing = [site.layer for site in self.sites if site.layer not in self._read]
        if missing:
            raise InputError(
                f"the forward did not reach {', '.join(missing)}; does the network take another path in eval mode?"
            )
        for layer, response in self._read.items():
            if response.shape[0] != frames.shape[0]:
                raise InputError(
                    f"layer {layer!r} answers {frames.shape[0]} frames with {response.shape[0]} rows; the first "
                    "dimension must count frames"
                )
        read, self._read = self._read, {}
        return {site.layer: read[site.layer] for site in self.sites}
