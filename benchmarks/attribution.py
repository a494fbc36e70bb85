"""Maps by tags against maps by random masks, occlusion and RISE: insertion and deletion, tile by tile, on test images
of CIFAR-10, of the package's ResNet-32.

    python benchmarks/attribution.py CIFAR10_FOLDER --images 200 --json attribution.json

Of each map the tiles are taken away from the image (deletion, lower is better) or put into its mean colour (insertion,
higher is better), the most important first; the figure is the mean probability of the class that the network answered
with. `difference` is insertion minus deletion. After Petsiuk, Das & Saenko 2018 (RISE, arXiv 1806.07421).

    python benchmarks/attribution.py CIFAR10_FOLDER --over-bare --json over_bare.json
    python benchmarks/attribution.py CIFAR10_FOLDER --nothing --split val --images 30 --json nothing.json

`nothing`: a quarter of an image's tiles is given the colour that it fades to, so that these tiles do nothing; the share
of them that is significant all the same, at several levels.

`over_bare`: processor seconds of `freqprune.attribute` over those of as many forwards of the bare network, in batches
of the same size, in turn: median and range over the repeats, and the fastest of each. Processor time, which other work
on the machine disturbs less than the clock; on one thread of an idle one they are the same.
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
from torch import Tensor, nn
from torchvision import models

from freqprune import attribute, resnet32
from freqprune.attribution.effects import estimate
from freqprune.attribution.gates import PIXELS, frames_for
from freqprune.training import ImageFolderData

GRID = 8
FRAMES = frames_for(GRID * GRID)


class Judge:
    """One image and its network: fades tiles to the mean colour, reads logits."""

    def __init__(self, net: nn.Module, data: ImageFolderData, image: Tensor) -> None:
        self.net, self.data, self.image = net, data, image
        self.faded = image.mean((1, 2), keepdim=True).expand_as(image)
        size = image.shape[-1] // GRID
        self.spread: Callable[[Tensor], Tensor] = lambda gates: (
            gates.view(-1, 1, GRID, GRID).repeat_interleave(size, 2).repeat_interleave(size, 3)
        )
        self.target = int(self.logits(torch.ones(1, GRID * GRID)).argmax())

    def logits(self, gates: Tensor) -> Tensor:
        """Of frames with the tiles so far open, ``(n_frames, n_tiles)`` to ``(n_frames, n_classes)``."""
        with torch.inference_mode():
            return torch.cat(
                [
                    self.net(self.data.normalize(self.faded + self.spread(some) * (self.image - self.faded)))
                    for some in gates.float().split(256)
                ]
            )

    def score(self, gates: Tensor) -> Tensor:
        """Logit of the target."""
        return self.logits(gates)[:, self.target]

    def curves(self, effects: Tensor) -> tuple[float, float]:
        """Insertion and deletion of a map."""
        order = effects.argsort(descending=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        put_in = (rank[None] < torch.arange(len(order) + 1)[:, None]).float()
        found = [self.logits(gates).softmax(1)[:, self.target].mean() for gates in (put_in, 1 - put_in)]
        return float(found[0]), float(found[1])


def random_order(judge: Judge, forwards: int, seed: int) -> Tensor:
    return torch.rand(GRID * GRID, generator=torch.Generator().manual_seed(seed))


def occlusion(judge: Judge, forwards: int, seed: int) -> Tensor:
    """What each tile takes away with it."""
    whole = judge.score(torch.ones(1, GRID * GRID))
    return whole - judge.score(1 - torch.eye(GRID * GRID))


def tags(steepness: float, score: str = "logit") -> Callable[[Judge, int, int], Tensor]:
    """By `freqprune.attribute`."""

    def of(judge: Judge, forwards: int, seed: int) -> Tensor:
        return attribute(
            judge.net, judge.image[None], judge.target, grid=GRID, forwards=forwards, steepness=steepness, score=score,
            mean=judge.data.mean, std=judge.data.std, seed=seed,
        ).effects[0]  # fmt: skip

    return of


def rise(judge: Judge, forwards: int, seed: int) -> Tensor:
    """Mean score of the masks that show a tile: random masks of the grid, half open, each tile on its own."""
    masks = torch.rand(forwards, GRID * GRID, generator=torch.Generator().manual_seed(seed)) < 0.5
    scores = judge.logits(masks).softmax(1)[:, judge.target]
    return (masks.float().T @ scores) / masks.sum(0)


def least_squares(judge: Judge, forwards: int, seed: int) -> Tensor:
    """Of the logit on random masks."""
    masks = torch.rand(forwards, GRID * GRID, generator=torch.Generator().manual_seed(seed)) < 0.5
    return estimate(masks.double(), judge.score(masks)[:, None])[0][0]


METHODS: dict[str, tuple[Callable[[Judge, int, int], Tensor], tuple[int, ...]]] = {
    "random": (random_order, (0,)),
    "occlusion": (occlusion, (65,)),
    "tags": (tags(1.0), (256, 512, 1024)),
    "tags_steep": (tags(4.0), (256, 512, 1024)),
    "rise": (rise, (256, 512, 1024, 4096)),
    "least_squares": (least_squares, (256, 512, 1024)),
}


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
    parser.add_argument("root", help="folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--images", type=int, default=200, help="test images (200)")
    parser.add_argument("--split", default="test", choices=["val", "test"], help="choose on val, report on test")
    parser.add_argument("--over-bare", action="store_true", help="measure the time only")
    parser.add_argument("--nothing", action="store_true", help="measure tiles that do nothing only")
    parser.add_argument("--repeats", type=int, default=10, help="of the time (10)")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    given = parser.parse_args()
    data = ImageFolderData(given.root, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
    net = resnet32(pretrained=True).eval()
    if given.over_bare:
        large = models.resnet18().eval()
        times = {
            "resnet32, 32 px": over_bare(net, torch.rand(3, 32, 32), 512, given.repeats),
            "torchvision/resnet18, 112 px": over_bare(large, torch.rand(3, 112, 112), 256, given.repeats),
        }
        publish(times, given.json)
        return
    images = data.split(given.split)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: given.images]
    if given.nothing:
        publish(of_nothing(net, data, images.pixels[order].float() / 255), given.json)
        return
    rows: dict[str, list[tuple[float, float]]] = {}
    for number in track(order.tolist(), description="images"):
        judge = Judge(net, data, images.pixels[number].float() / 255)
        for name in given.methods:
            method, budgets = METHODS[name]
            for forwards in budgets:
                found = judge.curves(method(judge, forwards, number))
                rows.setdefault(f"cifar.{name}.{forwards}", []).append(found)
    found: dict[str, Any] = {"images": given.images, "split": given.split}
    for key, values in rows.items():
        insertion, deletion = (list(column) for column in zip(*values, strict=True))
        difference = [a - b for a, b in values]
        found[key] = {
            "insertion": round(statistics.mean(insertion), 4), "deletion": round(statistics.mean(deletion), 4),
            "difference": round(statistics.mean(difference), 4),
            "se": round(statistics.stdev(difference) / len(difference) ** 0.5, 4),
        }  # fmt: skip
        print(key, found[key], flush=True)
    for one, other in (
        ("tags_steep.512", "rise.4096"),
        ("tags_steep.512", "least_squares.512"),
        ("tags.512", "rise.4096"),
    ):
        pair = [rows.get(f"cifar.{name}") for name in (one, other)]
        if pair[0] and pair[1]:
            apart = [(a - b) - (c - d) for (a, b), (c, d) in zip(*pair, strict=True)]
            found[f"{one} over {other}"] = [
                round(statistics.mean(apart), 4), round(statistics.stdev(apart) / len(apart) ** 0.5, 4)
            ]  # fmt: skip
    publish(found, given.json)


if __name__ == "__main__":
    main()
