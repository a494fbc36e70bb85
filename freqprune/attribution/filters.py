"""Which filters of a layer an answer hangs on: the same tags, one a filter, on the layer's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.attribution.effects import estimate
from freqprune.attribution.gates import batches, check_frames, frames_for, gates
from freqprune.errors import InputError, closest
from freqprune.networks import check_answers, evaluating, first, hooked
from freqprune.tagging import Progress


@dataclass(frozen=True)
class FilterEffects:
    """What the filters of a layer do to every class.

    Attributes:
        layer: its name.
        effects: how much a filter raises each logit, ``(n_images, n_filters, n_classes)``.
        standard_error: of the effects, likewise.
        p_values: of the hypothesis that a filter does nothing, likewise.
        interactions: of pairs of filters at the target's logit, ``(n_images, n_filters, n_filters)``.
    """

    layer: str
    effects: Tensor
    standard_error: Tensor
    p_values: Tensor
    interactions: Tensor


def filter_effects(
    model: nn.Module,
    images: Tensor,
    layer: str,
    forwards: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> FilterEffects:
    """Gate every filter of a layer at a frequency of its own and read the logits: the effect of each on every class.

    Args:
        model: a classifier; runs in eval mode, which is restored.
        images: network inputs (normalised), ``(n_images, n_channels, height, width)``.
        layer: name of a convolution or linear layer.
        forwards: frames that an image takes at most; one recording of ``4 * n_filters`` if left out.
        seed: of frequencies and phases.
        progress: wraps the iteration over images, for a progress bar.

    Raises:
        InputError: for an unknown layer, too few forwards, or a network that returns no logits.
    """
    modules = dict(model.named_modules())
    module = modules.get(layer)
    if not isinstance(module, nn.Conv2d | nn.Linear):
        kinds = [name for name, one in modules.items() if isinstance(one, nn.Conv2d | nn.Linear)]
        raise InputError(f"the network has no convolution or linear layer {layer!r}{closest(layer, kinds)}")
    n_filters = len(module.weight)
    forwards = frames_for(n_filters) if forwards is None else forwards
    check_frames(n_filters, forwards)
    check_answers(model, images[:1])
    generator = torch.Generator().manual_seed(seed)
    n_frames = frames_for(n_filters)
    design = torch.cat([gates(n_filters, n_frames, generator) for _ in range(forwards // n_frames)])
    opened: list[Tensor] = []

    def gate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        shape = (-1, n_filters, *[1] * (output.dim() - 2)) if isinstance(module, nn.Conv2d) else None
        share = opened[0].to(output)
        return output * (share.view(shape) if shape else share.view(-1, *[1] * (output.dim() - 2), n_filters))

    found = []
    hook: Callable[..., Tensor] = gate
    with evaluating(model), torch.inference_mode(), hooked([(module, None, hook)]):
        for number in progress(range(len(images))) if progress is not None else range(len(images)):
            logits = []
            for some in batches(design, images[number]):
                opened[:] = [some]
                logits.append(first(model(images[number : number + 1].expand(len(some), -1, -1, -1))).double().cpu())
            answers = torch.cat(logits)
            if answers.dim() != 2:
                raise InputError(f"the network must return logits, (n_images, n_classes), got {tuple(answers.shape)}")
            effects, errors, p_values, together = estimate(design, answers)
            opened[:] = [torch.ones(1, n_filters)]
            top = int(first(model(images[number : number + 1])).argmax())
            found.append((effects.T, errors.T, p_values.T, together[top]))
    return FilterEffects(layer, *(torch.stack(column) for column in zip(*found, strict=True)))
