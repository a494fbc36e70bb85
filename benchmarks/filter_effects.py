"""What filters do to the logits, by tags on all filters of a layer at once against leaving them out one by one, in
every layer of `resnet32_cifar10_45k`, on validation images of CIFAR-10.

    python benchmarks/filter_effects.py CIFAR10_FOLDER --json filter_effects.json

A filter's score is its squared effect on the logits, summed over classes, mean over images. The figure is the rank
correlation of the scores of a layer's filters with those from leaving out one by one on other images (`reference`) and
on the same ones (`same_images`): mean over the layers, standard deviation over the seeds, which choose the images.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from result import publish
from rich.progress import track
from scipy.stats import spearmanr
from torch import Tensor, nn

from freqprune import filter_effects, pretrained
from freqprune.networks import HELD_OUT, evaluating, hooked
from freqprune.tagging import find_sites
from freqprune.training import ImageFolderData


def one_by_one(net: nn.Module, images: Tensor, layer: str) -> Tensor:
    """How far the logits move when each filter of a layer is left out."""
    site = find_sites(net, images[:1], [layer])[0]
    keep = 1 - torch.eye(site.n_filters + 1)[: site.n_filters].T

    def silence(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * keep.view(*keep.shape, *[1] * (output.dim() - 2))

    total = torch.zeros(site.n_filters, dtype=torch.float64)
    with evaluating(net), torch.inference_mode(), hooked([(net.get_submodule(site.module), None, silence)]):
        for image in images:
            answers = net(image.expand(len(keep), -1, -1, -1)).double()
            total += (answers[-1] - answers[:-1]).square().sum(1) / len(images)
    return total


def by_tags(net: nn.Module, images: Tensor, layer: str) -> Tensor:
    return filter_effects(net, images, layer).movement


# How many forwards an image takes for each filter, about.
METHODS: dict[str, tuple[Callable[[nn.Module, Tensor, str], Tensor], int]] = {
    "one_by_one": (one_by_one, 1),
    "tags": (by_tags, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--reference", type=int, default=16, help="images of the reference (16)")
    parser.add_argument("--images", nargs="*", type=int, default=[1, 4], help="images of the others (1 4)")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    data = ImageFolderData(given.root, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
    data.setup()
    net, val = pretrained(HELD_OUT).eval(), data.split("val")
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    found: dict[str, Any] = {"reference": given.reference, "seeds": len(given.seeds)}
    means: dict[str, list[float]] = {}
    at_same: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in given.seeds:
        order = torch.randperm(len(val), generator=torch.Generator().manual_seed(seed))
        inputs = data.normalize(val.pixels[order[: given.reference + max(given.images)]])
        by_layer: dict[str, list[float]] = {}
        same: dict[str, list[float]] = {}
        for layer in track(layers, description=f"layers, seed {seed}"):
            reference = one_by_one(net, inputs[: given.reference], layer)
            for count in given.images:
                left_out = torch.empty(0)
                for name, (method, cost) in METHODS.items():
                    start = time.perf_counter()
                    scores = method(net, inputs[given.reference : given.reference + count], layer)
                    key = f"{name}.{count}"
                    seconds.setdefault(key, []).append(time.perf_counter() - start)
                    by_layer.setdefault(key, []).append(float(spearmanr(scores, reference).statistic))
                    found[key] = {"forwards_a_filter": cost * count}
                    left_out = scores if name == "one_by_one" else left_out
                    same.setdefault(key, []).append(float(spearmanr(scores, left_out).statistic))
        for key, values in by_layer.items():
            means.setdefault(key, []).append(statistics.mean(values))
            at_same.setdefault(key, []).append(statistics.mean(same[key]))
    for key, values in means.items():
        found[key] |= {
            "rank_correlation": round(statistics.mean(values), 3),
            "same_images": round(statistics.mean(at_same[key]), 3),
            "sd": round(statistics.stdev(values), 3) if len(values) > 1 else None,
            "seconds": round(sum(seconds[key]) / len(given.seeds), 1),
        }
    publish(found, given.json)


if __name__ == "__main__":
    main()
