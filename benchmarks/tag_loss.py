"""Training with a loss from the tags: what it costs, and what the network is then good for.

    python benchmarks/tag_loss.py CIFAR10_FOLDER --seeds 0 1 2 --json tag_loss.json
    python benchmarks/tag_loss.py CIFAR10_FOLDER --further --images 5000 --epochs 2 --test-images 2000 --json f.json

A ResNet-8 from random weights, or with `--further` `resnet32_cifar10_45k` trained on at a tenth of the rate; the same
images in the same order, with each loss added to the cross-entropy:
none; `silence` and the weight-based group lasso on the first convolution of every block (a group is a filter, its batch
norm and what reads it); `integration`, the same with the other sign (`separation`), `balance`. Of each the accuracy on
test images, also with half of the filters' MACs cut by the default criterion (made up for in sequence, and not made up
for, no fine-tuning), with pixel noise, blurred, and without its left or right half; and the terms on validation images.

    python benchmarks/tag_loss.py CIFAR10_FOLDER --over-step --json over_step.json

`over_step`: processor seconds of training steps of a ResNet-32 with the loss over those without it, four steps of each
in turn (tags are shown in every fourth): median and range.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from result import publish
from rich.progress import track
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from freqprune import Amount, Material, Recipe, Stimulus, TagLoss, cut, pretrained, resnet32
from freqprune.jobs.assembly import quiet
from freqprune.jobs.cli import keep_freed_memory
from freqprune.networks import HELD_OUT
from freqprune.pruning import Reconstruction
from freqprune.training import Classifier, ImageData, ImageFolderData

FIRST = "layer*.conv1"
TERMS = ("integration", "balance", "silence")
# Losses by name: weights of the terms, and of the lasso.
LOSSES: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, 0.0),
    "lasso": ({}, 2e-2),
    "lasso_strong": ({}, 1e-1),
    "silence": ({"silence": {FIRST: 0.1}}, 0.0),
    "silence_strong": ({"silence": {FIRST: 0.5}}, 0.0),
    "integration": ({"integration": 0.2}, 0.0),
    "separation": ({"integration": -0.2}, 0.0),
    "balance": ({"balance": 0.3}, 0.0),
}
CUT = 0.5
SHOWN = 64


class Regularised(Classifier):
    """Cross-entropy, terms of the tags, and a group lasso over the filters of the first convolutions."""

    lasso = 0.0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + self.lasso * sum(norms.sum() for norms in groups(self.net)) if self.lasso else loss


def groups(net: nn.Module) -> Iterator[Tensor]:
    """Norms of the filters of each block's first convolution, with its batch norm and the weights that read it."""
    for block in net.modules():
        if hasattr(block, "conv1") and hasattr(block, "conv2"):
            kept = [block.conv1.weight.flatten(1), block.conv2.weight.transpose(0, 1).flatten(1)]
            yield torch.cat([*kept, block.bn1.weight[:, None], block.bn1.bias[:, None]], 1).norm(dim=1)


def accuracy(net: nn.Module, data: ImageData, split: str, change: Callable[[Tensor], Tensor] | None = None) -> float:
    """Share of the images, changed in pixels, in %."""
    images = data.split(split)
    right = 0
    with torch.inference_mode():
        for pixels, labels in zip(images.pixels.split(500), images.labels.split(500), strict=True):
            shown = pixels.float() / 255
            shown = shown if change is None else change(shown).clamp(0, 1)
            right += int((net(data.normalize(shown)).argmax(1) == labels).sum())
    return 100 * right / len(images)


def noisy(pixels: Tensor) -> Tensor:
    return pixels + 0.08 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))


def blurred(pixels: Tensor) -> Tensor:
    return functional.gaussian_blur(pixels, [5, 5], [1.0, 1.0])


def without_a_half(pixels: Tensor) -> Tensor:
    """The left half of every second image in its mean colour, the right of the others."""
    found, half = pixels.clone(), pixels.shape[-1] // 2
    colour = pixels.mean((2, 3), keepdim=True)
    found[::2, :, :, :half], found[1::2, :, :, half:] = colour[::2], colour[1::2]
    return found


def trained(data: ImageData, further: bool, loss: str, seed: int, epochs: int) -> nn.Module:
    terms, lasso = LOSSES[loss]
    pl.seed_everything(seed, verbose=False)
    tags = TagLoss(**terms, mean=data.mean, std=data.std) if terms else None
    if further:
        module = Regularised(pretrained(HELD_OUT).train(), tag_loss=tags, lr=0.01)
    else:
        module = Regularised({"name": "resnet8"}, tag_loss=tags, lr=0.1, warmup_epochs=1)
    module.lasso = lasso
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, limit_val_batches=0, num_sanity_val_steps=0, **quiet
    )
    trainer.fit(module, datamodule=data)
    return module.net.eval()


def smaller(net: nn.Module, data: ImageData, seed: int, compensation: str) -> nn.Module:
    train = data.split("train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:200]
    shown = data.pixels("val", SHOWN)
    labelled = train[order[:100]]
    material = Material(
        images=shown, normalize=data.normalize, mean=data.mean, std=data.std,
        calibration=train.pixels[order].float() / 255, labelled=(labelled.pixels.float() / 255, labelled.labels),
    )  # fmt: skip
    recipe = Recipe(
        Amount(macs_cut=CUT, scope="per_mac"), criterion="logit_error", compensation=compensation,
        reconstruction=Reconstruction(rounds=1), calibrate_on="images", seed=seed,
    )  # fmt: skip
    return cut(net, material, recipe, Stimulus()).net.eval()


def figures(net: nn.Module, data: ImageData, seed: int, split: str) -> dict[str, float]:
    read = TagLoss(integration=1.0, balance=1.0, silence={FIRST: 1.0}, n_images=SHOWN, mean=data.mean, std=data.std)
    read.check(net, data.normalize(data.pixels("val", SHOWN)))
    return {
        "accuracy": accuracy(net, data, split),
        "cut": accuracy(smaller(net, data, seed, "sequential"), data, split),
        "cut_as_it_is": accuracy(smaller(net, data, seed, "none"), data, split),
        "noise": accuracy(net, data, split, noisy),
        "blur": accuracy(net, data, split, blurred),
        "half": accuracy(net, data, split, without_a_half),
        **{f"term_{term}": float(read.latest[term]) for term in TERMS},
    }


def over_step(repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    net = resnet32(pretrained=True).train().to(memory_format=torch.channels_last)
    images, labels = torch.rand(128, 3, 32, 32), torch.randint(0, 10, (128,))
    images = images.to(memory_format=torch.channels_last)
    tags = TagLoss(integration=0.1, balance=0.1, silence=0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)

    def steps(with_tags: bool) -> float:
        start = time.process_time()
        for step in range(tags.every_n_steps):
            loss = nn.functional.cross_entropy(net(images), labels)
            if with_tags:
                loss = loss + tags(net, images, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return time.process_time() - start

    seconds = [(steps(False), steps(True)) for _ in track(range(repeats + 1), description="time")][1:]
    shares = [tagged / bare for bare, tagged in seconds]
    return {
        "over_step": round(statistics.median(shares), 3),
        "range": [round(min(shares), 3), round(max(shares), 3)],
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, after every network those so far")
    parser.add_argument("--losses", nargs="*", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--split", default="test", choices=["val", "test"], help="choose on val, report on test")
    parser.add_argument("--further", action="store_true", help="train resnet32_cifar10_45k further")
    parser.add_argument("--test-images", type=int, help="to measure on (all)")
    parser.add_argument("--images", type=int, default=10_000, help="to train on (10,000)")
    parser.add_argument("--epochs", type=int, default=10, help="of training (10)")
    parser.add_argument("--over-step", action="store_true", help="measure the time only")
    parser.add_argument("--repeats", type=int, default=10, help="of the time (10)")
    given = parser.parse_args()
    quiet()
    if given.over_step:
        publish(over_step(given.repeats), given.json)
        return
    keep_freed_memory()
    data = ImageFolderData(
        given.root,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        limit_train=given.images,
        limit_test=given.test_images,
    )
    data.setup()
    every: dict[str, list[dict[str, float]]] = {}
    runs = [(seed, loss) for seed in given.seeds for loss in given.losses]
    for seed, loss in track(runs, description="networks"):
        start = time.perf_counter()
        found = figures(trained(data, given.further, loss, seed, given.epochs), data, seed, given.split)
        every.setdefault(loss, []).append(found)
        print(seed, loss, {key: round(value, 3) for key, value in found.items()}, flush=True)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
        publish(
            {
                "split": given.split, "further": given.further, "images": given.images, "epochs": given.epochs,
                **{
                    name: {
                        key: [
                            round(statistics.mean(one[key] for one in ones), 3),
                            round(statistics.stdev(one[key] for one in ones), 3) if ones[1:] else 0.0,
                        ]
                        for key in ones[0]
                    }
                    for name, ones in every.items()
                },
                "seeds": {name: len(ones) for name, ones in every.items()},
            },
            given.json,
        )  # fmt: skip


if __name__ == "__main__":
    main()
