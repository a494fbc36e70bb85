"""Time of a cut that two processes share over that of one: python benchmarks/sharing.py [--json FILE]

The default cut of half of the MACs of our ResNet-32, processes of one thread each, plain images. A quarter of the
calibration images goes first, to warm up.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from result import publish
from torch.multiprocessing.spawn import spawn

from freqprune import Amount, Material, Recipe, Stimulus, cut, pretrained
from freqprune.jobs.cli import keep_freed_memory
from freqprune.networks import HELD_OUT
from freqprune.processes import shared_work


def one_process(rank: int, n_processes: int, n_images: int, folder: str) -> None:
    """A process of the cut; the first writes down how long it took."""
    keep_freed_memory()
    torch.set_num_threads(1)
    if n_processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n_processes)
    pixels = torch.rand(n_images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(
        Amount(macs_cut=0.5, scope="per_mac"), "logit_error", compensation="sequential", calibrate_on="images"
    )
    net = pretrained(HELD_OUT)
    with shared_work() if n_processes > 1 else nullcontext():
        for count in (n_images // 4, n_images):
            material = Material(pixels[:10], lambda p: (p - 0.5) / 0.25, calibration=pixels[:count])
            start = time.perf_counter()
            cut(net, material, recipe, Stimulus())
    if rank == 0:
        Path(folder, "seconds").write_text(str(time.perf_counter() - start))


def seconds(n_processes: int, n_images: int) -> float:
    """Seconds of a cut by so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(one_process, (n_processes, n_images, folder), nprocs=n_processes)
        return float(Path(folder, "seconds").read_text())


def two_over_one(n_images: int) -> float:
    """Time by two processes over that by one."""
    return seconds(2, n_images) / seconds(1, n_images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--images", type=int, default=400, help="calibration images (400)")
    options = parser.parse_args()
    publish({"two_over_one": round(two_over_one(options.images), 3), "images": options.images}, options.json)


if __name__ == "__main__":
    main()
