"""Speed and memory of the data: python benchmarks/data.py [--json FILE]

Measures in one run, on photographs of 500 x 375 pixels that are drawn here (JPEG, quality 90), brought to 224 x 224:

- over_decode: images/s of decoded training batches (data.cache=none: resized, cut, shifted, flipped, normalised) over a
  bare DataLoader with as many workers that decodes, resizes and cuts the same files; and the same of processor time
  (over_decode_by_processor_time), since beside other work a third process is given a third share of the machine;
- disk_over_memory: images/s of training batches out of the mapped file (data.cache=disk) over those out of memory;
- memory_growth: peak memory of a process and its workers that takes the images in and reads an epoch of them, at four
  times the images over once: the larger of cache=disk and cache=none;
- two_over_one: time of a cut of ResNet-32 by two processes over that by one, see benchmarks/sharing.py.

Epochs are taken in turn; figures are medians. The first epoch of each is warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from result import publish
from sharing import two_over_one
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from freqprune.jobs.cli import keep_freed_memory
from freqprune.training import ImageFolderData
from freqprune.training.pixels import cores

SIZE, RESIZE = 224, 256


def draw(folder: Path, count: int, n_drawn: int = 64) -> Path:
    """Photographs in two classes: smooth shapes and some noise, `n_drawn` different ones."""
    drawn, made = np.random.default_rng(0), []
    for split, number in (("train", count), ("test", 4)):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for i in range(number // 2):
                path = folder / split / label / f"{i:06d}.jpg"
                if len(made) == n_drawn:
                    path.hardlink_to(made[i % n_drawn])
                    continue
                coarse = Image.fromarray(drawn.integers(0, 256, (12, 16, 3), dtype=np.uint8))
                smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
                noisy = np.clip(smooth + drawn.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(path, quality=90)
                made.append(path)
    return folder


def module(folder: Path, cache: str, options: argparse.Namespace) -> ImageFolderData:
    data = ImageFolderData(
        folder,
        image_size=SIZE,
        resize=RESIZE,
        cache=cache,
        batch_size=options.batch_size,
        num_workers=options.workers if cache == "none" else None,
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
        val_fraction=0,
    )
    data.setup()
    # What the batches ask a trainer for.
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        training=True, current_epoch=0, world_size=1, global_rank=0, num_devices=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")), state=SimpleNamespace(fn="test"),
        precision_plugin=SimpleNamespace(convert_input=lambda batch: batch),
    )  # fmt: skip
    return data


def ours(data: ImageFolderData) -> Callable[[], float]:
    """Images/s of an epoch of training batches, ready for the network."""
    loader = data.train_dataloader()

    def epoch() -> float:
        start, seen = time.perf_counter(), 0
        for batch in loader:
            images, _ = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
            seen += len(images)
        return seen / (time.perf_counter() - start)

    return epoch


def bare(folder: Path, options: argparse.Namespace) -> Callable[[], float]:
    """Images/s of a DataLoader that decodes, resizes and cuts."""
    how = transforms.Compose(
        [transforms.Resize(RESIZE), transforms.CenterCrop(SIZE), transforms.PILToTensor()],
    )
    loader: DataLoader[Any] = DataLoader(
        datasets.ImageFolder(str(folder / "train"), how),
        options.batch_size,
        shuffle=True,
        num_workers=options.workers,
        drop_last=True,
        persistent_workers=True,
    )

    def epoch() -> float:
        start, seen = time.perf_counter(), 0
        for images, _ in loader:
            seen += len(images)
        return seen / (time.perf_counter() - start)

    return epoch


def processor_seconds() -> float:
    """Processor time so far of this process and its workers; NaN where there is no /proc."""
    total, own = 0, os.getpid()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if own in (int(path.parent.name), int(fields[1])):
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK") if total else float("nan")


def in_turn(
    epochs: dict[str, Callable[[], float]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Images/s of every epoch, and its processor time in seconds."""
    rates: dict[str, list[float]] = {name: [] for name in epochs}
    times: dict[str, list[float]] = {name: [] for name in epochs}
    for repeat in range(repeats + 1):
        for name, epoch in epochs.items():
            start = processor_seconds()
            rate = epoch()
            if repeat:
                rates[name].append(rate)
                times[name].append(processor_seconds() - start)
    return rates, times


def peak(folder: Path, cache: str, options: argparse.Namespace) -> float:
    """Peak memory in MB of a process of its own and of the largest of its workers."""
    words = [sys.executable, __file__, "--peak-of", str(folder), "--cache", cache]
    words += ["--batch-size", str(options.batch_size), "--workers", str(options.workers)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure_peak(options: argparse.Namespace) -> None:
    epoch = ours(module(Path(options.peak_of), options.cache, options))
    epoch()
    del epoch
    held = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps(sum(held) / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calibration-images", type=int, default=400, help="of the cut (400)")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_freed_memory()
    # Beside workers, and other processes, threads that wait for each other cost more than they bring.
    torch.set_num_threads(1)
    if options.peak_of:
        measure_peak(options)
        return
    with tempfile.TemporaryDirectory() as place:
        once = draw(Path(place) / "once", options.images)
        four = draw(Path(place) / "four", 4 * options.images)
        decoding, times = in_turn(
            {"pipeline": ours(module(once, "none", options)), "bare": bare(once, options)}, options.repeats
        )
        held, _ = in_turn({cache: ours(module(once, cache, options)) for cache in ("memory", "disk")}, options.repeats)
        peaks = {cache: [peak(folder, cache, options) for folder in (once, four)] for cache in ("disk", "none")}
    rates = {name: round(statistics.median(values), 1) for name, values in {**decoding, **held}.items()}
    spent = {name: statistics.median(values) for name, values in times.items()}
    figures = {
        "over_decode": round(rates["pipeline"] / rates["bare"], 3),
        "over_decode_by_processor_time": round(spent["bare"] / spent["pipeline"], 3),
        "disk_over_memory": round(rates["disk"] / rates["memory"], 3),
        "memory_growth": round(max(four / once for once, four in peaks.values()), 3),
        "two_over_one": round(two_over_one(options.calibration_images), 3),
        "images_per_second": rates,
        "peak_mb": {cache: [round(value) for value in values] for cache, values in peaks.items()},
        "images": options.images,
        "batch_size": options.batch_size,
        "workers": options.workers,
        "repeats": options.repeats,
        "load": round(os.getloadavg()[0], 2),
    }
    publish(figures, options.json)


if __name__ == "__main__":
    main()
