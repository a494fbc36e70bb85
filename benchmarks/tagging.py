"""Speed and memory of tagging: python benchmarks/tagging.py [--json FILE]

Measures in one run, on a ResNet-32 with fresh weights (timing does not depend on them) and random 3 x 32 x 32 images:

- over_bare: clean pass of `tag` with all 31 convolutions recorded, over a bare forward of the same distinct frames;
- over_frame_by_frame: how many times faster it is than one frame a call over all 240 frames with every map kept;
- memory_growth: peak resident memory at 1,000 images over that at 100, each in a process of its own.

Times are medians of repeats taken in turn.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from result import publish
from torch import Tensor

from freqprune import Stimulus, build_model, tag
from freqprune.jobs.cli import keep_freed_memory
from freqprune.tagging.measurement import frames_that_fit
from freqprune.tagging.readout import HALF
from freqprune.tagging.recording import Recorder
from freqprune.tagging.sites import find_sites


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model({"name": "resnet32"}).eval().to(memory_format=torch.channels_last)


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def autocast(half: str | None) -> torch.autocast:
    return torch.autocast("cpu", dtype=getattr(torch, half or "bfloat16"), enabled=half is not None)


def bare(net: torch.nn.Module, images: list[Tensor], half: str | None) -> None:
    """The distinct frames, rendered beforehand, through the network and nothing else."""
    with torch.inference_mode(), autocast(half):
        for batch in images:
            net(batch)


def frame_by_frame(net: torch.nn.Module, image: Tensor, stimulus: Stimulus) -> None:
    """All frames one by one, whole maps kept, then one Fourier transform a filter: what a first script does."""
    sites = find_sites(net, image[None])
    kept: dict[str, list[Tensor]] = {}
    with Recorder(net, sites, lambda maps, channel_dim: maps.clone()) as recorder:
        for frame in stimulus.frames(image[None])[0]:
            for layer, maps in recorder(frame[None]).items():
                kept.setdefault(layer, []).append(maps)
    for maps in kept.values():
        torch.fft.rfft(torch.cat(maps).mean((2, 3)), dim=0).abs()


def peak_memory(n_images: int) -> float:
    """Peak resident memory in MB of a fresh process that tags `n_images`."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", str(n_images)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--images", type=int, default=100, help="images a repeat; 100 are the default of tagging")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--half", choices=HALF, help="run tag and the bare forward in half precision; one frame a call stays in float32"
    )
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_freed_memory()  # as train.py and prune.py do
    net, stimulus = network(), Stimulus()
    if options.peak:
        # Images as uint8, as the data modules hold them; noise off, so that the clean pass is measured.
        images = torch.randint(0, 256, (options.peak, 3, 32, 32), dtype=torch.uint8)
        tag(net, images.float() / 255, stimulus, noise_std=0.0)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    images = torch.rand(options.images, 3, 32, 32)
    first, _ = stimulus.distinct_frames
    step = max(1, frames_that_fit(images[0, 0].numel(), images.device) // len(first))
    rendered = [
        stimulus.frames(chunk, first).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        for chunk in images.split(step)
    ]
    jobs: dict[str, Callable[[], object]] = {
        "tag": lambda: tag(net, images, stimulus, noise_std=0.0, half=options.half),
        "bare": lambda: bare(net, rendered, options.half),
        "frame_by_frame": lambda: frame_by_frame(net, images[0], stimulus),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(options.repeats + 1):
        for name, job in jobs.items():
            spent = seconds(job)
            if repeat:
                times[name].append(spent)
    median = {name: statistics.median(values) for name, values in times.items()}
    slow = median.pop("frame_by_frame")
    memory = {n: peak_memory(n) for n in (100, 1000)}
    figures = {
        "over_bare": round(median["tag"] / median["bare"], 3),
        "over_frame_by_frame": round(slow / (median["tag"] / len(images)), 1),
        "memory_growth": round(memory[1000] / memory[100], 3),
        "seconds_per_image": {name: round(value / len(images), 5) for name, value in median.items()}
        | {"frame_by_frame": round(slow, 4)},
        "peak_mb": {str(n): round(value) for n, value in memory.items()},
        "distinct_frames": len(first),
        "images": len(images),
        "repeats": options.repeats,
        "half": options.half,
    }
    publish(figures, options.json)


if __name__ == "__main__":
    main()
