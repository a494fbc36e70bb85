"""Controls of a measurement, and a reference that cannot confuse components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import copied, device_of, dtype_of
from freqprune.tagging.layers import pick_layers
from freqprune.tagging.recording import Recorder, map_mean
from freqprune.tagging.sites import find_sites
from freqprune.tagging.stimulus import Stimulus


def swapped(stimulus: Stimulus) -> Stimulus:
    """The same parts with the tag frequencies in reverse order: what belongs to a part must follow it, what belongs to
    a frequency must not."""
    return replace(stimulus, tag_freqs=tuple(stimulus.tag_freqs)[::-1])


def shuffled(stimulus: Stimulus) -> Stimulus:
    """The same frames in one random order: responses at the tag frequencies fall to the level of all others. p-values
    do not hold."""
    return replace(stimulus, control="shuffled")


def static(stimulus: Stimulus) -> Stimulus:
    """One unchanging frame: there is no response but to noise."""
    return replace(stimulus, control="static")


def untrained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Copy of a network with freshly drawn weights, in the same mode.

    Raises:
        InputError: if a module has parameters of its own and no ``reset_parameters``, or one that leaves them.
    """
    fresh = copied(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, module in fresh.named_modules():
            # Norms without weights have statistics of what they have seen; frozen ones cannot reset them.
            kept = any(own.startswith("running_") for own, _ in module.named_buffers(recurse=False))
            if next(module.parameters(recurse=False), None) is None and not kept:
                continue
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if reset is None:
                raise InputError(
                    f"{name or type(module).__name__} ({type(module).__name__}) has weights but no reset_parameters(); "
                    "build an untrained network anew"
                )
            own_values = dict(module.named_parameters(recurse=False))
            trains = any(values.requires_grad for values in own_values.values())
            # What does not train beside what does, such as a mask, may stay.
            drawn = {own: values for own, values in own_values.items() if values.requires_grad or not trains}
            for values in drawn.values():
                values.data.fill_(torch.nan)
            reset()
            for own, values in drawn.items():
                if values.isnan().any():
                    raise InputError(
                        f"{f'{name}.{own}'.lstrip('.')} is not drawn by reset_parameters(), as the weights that "
                        "spectral_norm and its like keep are not; build an untrained network anew"
                    )
    return fresh


def torus(
    model: nn.Module,
    images: Tensor,
    stimulus: Stimulus,
    n_phases: int = 32,
    layers: Sequence[str] | str | None = None,
    where: str = "activation",
) -> dict[str, dict[tuple[int, int], Tensor]]:
    """Responses to two tags whose phases run through a grid instead of time, by a two-dimensional Fourier transform.

    Every combination n·f1 + m·f2 has a bin of its own, so that none can be taken for another; combinations fold only at
    ``n_phases / 2`` of either tag. The reference for tests; ``n_phases ** 2`` frames an image.

    Args:
        model: network, run in eval mode and restored.
        images: pixels in [0, 1], normalisation left to the network.
        stimulus: two parts.
        n_phases: phases of each tag.
        layers: layers to read, see `freqprune.tagging.layers.pick_layers`.
        where: see `freqprune.tag`.

    Returns:
        For each layer the amplitude averaged over images, ``(n_filters,)``, of every (n, m) up to `Stimulus.max_order`,
        with n > 0, or n = 0 and m > 0.

    Raises:
        InputError: unless the stimulus has two parts, or if `n_phases` is too small for its order.
    """
    if len(stimulus.tag_freqs) != 2:
        raise InputError(f"torus takes two parts, got {len(stimulus.tag_freqs)}")
    if n_phases <= 2 * stimulus.max_order:
        raise InputError(f"n_phases must be above 2 * max_order = {2 * stimulus.max_order}, got {n_phases}")
    images = images.to(device_of(model), dtype_of(model))
    phase = torch.arange(n_phases, dtype=torch.float64) * 2 * torch.pi / n_phases
    grid = torch.stack(torch.meshgrid(phase, phase, indexing="ij")).flatten(1)
    scale = 1 - stimulus.depth + stimulus.depth * (1 + torch.sin(grid)) / 2
    order = stimulus.max_order
    pairs = [
        (n, m)
        for n in range(order + 1)
        for m in range(-order, order + 1)
        if 0 < n + abs(m) <= order and (n > 0 or m > 0)
    ]
    total: dict[str, dict[tuple[int, int], Tensor]] = {}
    with Recorder(model, find_sites(model, images[:1], pick_layers(model, layers), where), map_mean) as recorder:
        for image in images:
            courses: dict[str, list[Tensor]] = {}
            for some in scale.split(256, dim=1):
                for layer, response in recorder(stimulus.render(image[None], some)[0]).items():
                    courses.setdefault(layer, []).append(response.double())
            for layer, parts in courses.items():
                spectrum = torch.fft.fft2(torch.cat(parts).T.unflatten(1, (n_phases, n_phases))).abs() * 2 / n_phases**2
                sums = total.setdefault(layer, {})
                for n, m in pairs:
                    sums[n, m] = sums.get((n, m), torch.zeros(())) + spectrum[:, n, m].cpu() / len(images)
    return total
