"""Speed of training: python benchmarks/training.py [--json FILE]

Measures in one run, ResNet-32 on random 32 x 32 images, the same network, batch size and optimizer everywhere:

- over_bare: images/s of this package's Lightning training over a bare PyTorch loop on the same data and augmentation;
- over_pil: images/s of it over Lightning with torchvision's image-by-image PIL pipeline in a DataLoader with workers;
- callback_share: share of an epoch of 45,000 images that the tagging callback takes at its defaults (32 images).

Epochs of the three are taken in turn; figures are medians. The first epoch of each is warm-up.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from result import publish
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from freqprune import Stimulus, build_model, tag
from freqprune.jobs.cli import keep_freed_memory
from freqprune.networks import CIFAR10
from freqprune.training.augment import random_crop_flip
from freqprune.training.classifier import Classifier
from freqprune.training.datamodule import ImageData
from freqprune.training.sources import Images, Source

EPOCH = 45_000


class RandomData(ImageData):
    """Random bytes in place of photographs: their content does not change the time."""

    def __init__(self, n_images: int, **settings: Any) -> None:
        super().__init__(mean=CIFAR10.mean, std=CIFAR10.std, **settings)
        self.n_images = n_images

    def load(self) -> Source:
        def draw(count: int) -> Images:
            return Images(torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 10)

        return Source(draw(self.n_images), draw(100), tuple("0123456789"))


class PilImages(Dataset[Any]):
    """What most scripts do: one PIL image at a time through torchvision's transforms."""

    def __init__(self, images: Images) -> None:
        self.arrays, self.labels = images.pixels.permute(0, 2, 3, 1).numpy(), images.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(CIFAR10.mean, CIFAR10.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(np.ascontiguousarray(self.arrays[index]))), self.labels[index]


class Clock(pl.Callback):
    """Seconds of each training epoch, without start-up and validation."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        wait()
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        wait()
        self.seconds.append(time.perf_counter() - self.start)


def wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def by_lightning(options: argparse.Namespace, data: RandomData, loader: DataLoader[Any] | None) -> Callable[[], float]:
    """An epoch by Lightning: over our data module, or over a loader of its own. Each call trains an epoch and returns
    its seconds."""
    classifier = Classifier({"name": "resnet32"})
    if options.compile:
        classifier.net.compile()

    def epoch() -> float:
        clock = Clock()
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="auto",
            devices=1,
            precision=options.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[clock],
        )
        if loader is None:
            trainer.fit(classifier, datamodule=data)
        else:
            trainer.fit(classifier, loader)
        return clock.seconds[0]

    return epoch


def by_hand(options: argparse.Namespace, data: RandomData) -> Callable[[], float]:
    """An epoch by a loop over the same tensors."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    net = build_model({"name": "resnet32"}).to(device).to(memory_format=torch.channels_last)
    if options.compile:
        net.compile()
    images = data.split("train").to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    half = options.precision == "bf16-mixed"

    def epoch() -> float:
        wait()
        start = time.perf_counter()
        for chosen in torch.randperm(len(images)).to(device).split(options.batch_size):
            if len(chosen) < options.batch_size:
                continue
            batch = images[chosen]
            pixels = data.normalize(random_crop_flip(batch.pixels, 4, True))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                loss = nn.functional.cross_entropy(net(pixels), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wait()
        return time.perf_counter() - start

    return epoch


def tagging_seconds(n_images: int = 32) -> float:
    """Median time of what the callback does at the end of an epoch."""
    net = build_model({"name": "resnet32"}).to(memory_format=torch.channels_last)
    if torch.accelerator.is_available():
        net = net.to(torch.accelerator.current_accelerator())
    images = torch.rand(n_images, 3, 32, 32)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        tag(net, images, Stimulus())
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--images", type=int, default=5120, help="images an epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", default="bf16-mixed" if torch.cuda.is_available() else "32-true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    # A tenth is held out for validation, which is not timed.
    data = RandomData(options.images * 10 // 9, batch_size=options.batch_size)
    data.setup()
    count = len(data.split("train")) // options.batch_size * options.batch_size
    workers = max(1, (os.cpu_count() or 2) - 1)
    pil = DataLoader(
        PilImages(data.split("train")),
        options.batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=True,
    )
    epochs = {
        "freqprune": by_lightning(options, data, None),
        "bare": by_hand(options, data),
        "pil": by_lightning(options, data, pil),
    }
    rates: dict[str, list[float]] = {name: [] for name in epochs}
    for repeat in range(options.repeats + 1):
        for name, epoch in epochs.items():
            rate = count / epoch()
            if repeat:
                rates[name].append(rate)
    rate = {name: statistics.median(values) for name, values in rates.items()}
    spent = tagging_seconds()
    figures = {
        "over_bare": round(rate["freqprune"] / rate["bare"], 3),
        "over_pil": round(rate["freqprune"] / rate["pil"], 3),
        "callback_share": round(spent / (spent + EPOCH / rate["freqprune"]), 4),
        "images_per_second": {name: round(value, 1) for name, value in rate.items()},
        "tagging_seconds": round(spent, 3),
        "images": count,
        "repeats": options.repeats,
        "batch_size": options.batch_size,
        "precision": options.precision,
        "compile": options.compile,
    }
    publish(figures, options.json)


if __name__ == "__main__":
    main()
