"""The methods that are compared, each a map of one image from so many forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from subjects import BATCH, GRID, N_TILES, Judge
from torch import Tensor, nn

from freqprune import filter_effects
from freqprune.attribution.effects import estimate
from freqprune.attribution.gates import frames_for
from freqprune.tagging import find_sites

Method = Callable[[Judge, int, int], Tensor]


def random_order(judge: Judge, forwards: int, seed: int) -> Tensor:
    return torch.rand(N_TILES, generator=torch.Generator().manual_seed(2 * judge.number + seed))


def occlusion(judge: Judge, forwards: int, seed: int) -> Tensor:
    """Captum's, a window of one tile that steps by one tile."""
    from captum.attr import Occlusion

    size = judge.image.shape[-1] // GRID
    window = (len(judge.image), size, size)
    with torch.inference_mode():
        found = Occlusion(judge.subject.fast).attribute(
            judge.whole[None], window, strides=window, baselines=judge.faded[None], target=judge.target,
            perturbations_per_eval=BATCH,
        )  # fmt: skip
    return judge.of_tiles(found[0].mean(0))


def kernel_shap(judge: Judge, forwards: int, seed: int) -> Tensor:
    """Captum's, the tiles as features, of the logit."""
    from captum.attr import KernelShap

    torch.manual_seed(2 * judge.number + seed)
    size = judge.image.shape[-1] // GRID
    tiles = torch.arange(N_TILES).view(1, 1, GRID, GRID).repeat_interleave(size, 2).repeat_interleave(size, 3)
    with torch.no_grad():
        found = KernelShap(judge.subject.fast).attribute(
            judge.whole[None], baselines=judge.faded[None], target=judge.target, feature_mask=tiles,
            n_samples=forwards, perturbations_per_eval=BATCH,
        )  # fmt: skip
    return judge.of_tiles(found[0].mean(0))


def integrated_gradients(judge: Judge, forwards: int, seed: int) -> Tensor:
    """Captum's, of the logit, from the mean colour, summed over a tile."""
    from captum.attr import IntegratedGradients

    found = IntegratedGradients(judge.subject.net).attribute(
        judge.whole[None], judge.faded[None], judge.target, n_steps=forwards, internal_batch_size=16
    )
    return judge.of_tiles(found[0].detach().sum(0))


def grad_cam(judge: Judge, forwards: int, seed: int) -> Tensor:
    """pytorch-grad-cam's, of the maps that are pooled (of Lite0 before their activation)."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layer = judge.subject.net.get_submodule(judge.subject.maps)
    with GradCAM(judge.subject.net, [layer]) as cam:
        found = cam(judge.whole[None], [ClassifierOutputTarget(judge.target)])
    return judge.of_tiles(torch.from_numpy(found[0]))


def tag_cam(judge: Judge, forwards: int, seed: int) -> Tensor:
    """A class activation map from the filters that the tags pick: their maps, weighted with what each does to the logit
    by `freqprune.filter_effects` where that is sure (p < 0.05); one recording at least, of four frames a filter."""
    net, inputs = judge.subject.net, judge.whole[None]
    n_filters = len(net.get_submodule(judge.subject.last).weight)
    effects = filter_effects(net, inputs, judge.subject.last, max(forwards, frames_for(n_filters)), seed=seed)
    # Maps where the filters are gated: after their norm and activation.
    site = find_sites(net, inputs, [judge.subject.last])[0]
    held: list[Tensor] = []
    hook = net.get_submodule(site.module).register_forward_hook(lambda *args: held.append(args[-1].detach()))
    with torch.inference_mode():
        net(inputs)
    hook.remove()
    sure = effects.p_values[0, :, judge.target] < 0.05
    weights = torch.where(sure, effects.effects[0, :, judge.target], 0)
    cam = (weights[:, None, None] * held[site.call][0]).sum(0).clamp(min=0)
    return judge.of_tiles(nn.functional.interpolate(cam[None, None], judge.image.shape[1:], mode="bilinear")[0, 0])


def tags(smooth: bool = True, **settings: Any) -> Method:
    """By `freqprune.attribute`; with fewer forwards than a recording of all tiles takes, of a coarser grid."""

    def of(judge: Judge, forwards: int, seed: int) -> Tensor:
        found = judge.attributed(forwards, seed, settings)
        effects = found.smoothed if smooth else found.effects
        grid = int(effects.shape[1] ** 0.5)
        return effects.view(grid, grid).repeat_interleave(GRID // grid, 0).repeat_interleave(GRID // grid, 1).flatten()

    return of


def rise(judge: Judge, forwards: int, seed: int) -> Tensor:
    """Mean probability of the masks that show a tile: random masks of the grid, half open, each tile on its own."""
    masks, logits = judge.masked(forwards, seed * forwards)
    return (masks.T @ logits.softmax(1)[:, judge.target]) / masks.sum(0)


def least_squares(judge: Judge, forwards: int, seed: int) -> Tensor:
    """Of the logit on random masks, those of RISE."""
    masks, logits = judge.masked(forwards, seed * forwards)
    return estimate(masks.double(), logits[:, [judge.target]])[0][0]


def sobol(judge: Judge, forwards: int, seed: int) -> Tensor:
    """Total-order indices of the probability (Fel et al. 2021, arXiv 2111.04138): Jansen's estimator on scrambled Sobol
    points, each tile in turn taken from the second of two designs. An index has no sign."""
    n_points = forwards // (N_TILES + 2)
    points = torch.quasirandom.SobolEngine(2 * N_TILES, scramble=True, seed=2 * judge.number + seed).draw(n_points)
    first, second = points[:, :N_TILES], points[:, N_TILES:]
    swapped = first.repeat(N_TILES, 1, 1)
    tile = torch.arange(N_TILES)
    swapped[tile, :, tile] = second.T
    answers = judge.probability(torch.cat([first, second, swapped.flatten(0, 1)]))
    own, rest = answers[:n_points], answers[2 * n_points :].view(N_TILES, n_points)
    return (own - rest).square().mean(1) / (2 * answers[: 2 * n_points].var().clamp(min=1e-12))


METHODS: dict[str, tuple[Method, tuple[int, ...]]] = {
    "random": (random_order, (0,)),
    "occlusion": (occlusion, (65,)),
    "integrated_gradients": (integrated_gradients, (64,)),
    "grad_cam": (grad_cam, (1,)),
    "tag_cam": (tag_cam, (256,)),
    "kernel_shap": (kernel_shap, (512,)),
    "sobol": (sobol, (528,)),
    "tags": (tags(), (64, 256, 512)),
    "tags_plain": (tags(smooth=False), (512,)),
    "tags_overlap": (tags(score="probability", overlap=0.7), (256, 512, 1024, 4096)),
    "rise": (rise, (64, 256, 512, 1024, 4096)),
    "least_squares": (least_squares, (256, 512, 1024, 4096)),
}
