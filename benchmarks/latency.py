"""What a cut by time keeps of its promise, and what it costs in accuracy against a cut by MACs of the same time.

python benchmarks/latency.py --json latency.json                        # asked and got
python benchmarks/latency.py CIFAR10_FOLDER --share 0.25 --json latency.json  # and accuracies, hours on two cores
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from result import publish
from rich.progress import track
from torch import nn

from freqprune import Amount, Material, Recipe, Stimulus, build_model, cut, pretrained
from freqprune.jobs.cli import keep_freed_memory
from freqprune.networks import HELD_OUT, Latency, compare, runner

# The second is asked for the time that the first was measured to save.
WAYS = {"by_time": [], "by_macs": ["pruning.blocks=false", "pruning.scope=per_mac"]}
# That the measurement after the cut takes.
SECONDS = 5
PRUNE = Path(__file__).parents[1] / "prune.py"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def network(name: str) -> tuple[nn.Module, int]:
    """A network and the height and width of its images; those of torchvision with random weights."""
    if name == "resnet32":
        return pretrained(HELD_OUT).eval(), 32
    torch.manual_seed(0)
    return build_model({"name": f"torchvision/{name}"}).eval(), 224


def promise(name: str, asked: float, batch_size: int, target: str) -> dict[str, float]:
    """A cut by time, timed once more afterwards."""
    net, size = network(name)
    images = torch.rand(64 if size == 32 else 16, 3, size, size, generator=torch.Generator().manual_seed(0))
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    material = Material(images, lambda pixels: (pixels - shift) / scale, MEAN, STD, calibration=images)
    recipe = Recipe(
        Amount(latency_cut=asked, scope="per_ms"), "logit_redundancy", calibrate_on="images",
        latency=Latency(batch_size=batch_size, target=target),
    )  # fmt: skip
    done = cut(net, material, recipe, Stimulus())
    batch = material.normalize(images[torch.arange(batch_size) % len(images)])
    forwards = [runner(one.eval().to(memory_format=torch.channels_last), batch, target) for one in (net, done.net)]
    few = compare(*forwards)
    speed = compare(*forwards, n_pairs=max(40, round(1000 * SECONDS / (few.dense_ms + few.small_ms))))
    return {
        "asked": asked, "got": round(speed.saved, 4), "spread": round(speed.spread, 4),
        "dense_ms": round(speed.dense_ms, 3), "small_ms": round(speed.small_ms, 3), "blocks_gone": len(done.dropped),
    }  # fmt: skip


def accuracies(root: str, share: float, batch_size: int, how: list[str], seed: int, epochs: int) -> dict[str, float]:
    """Test accuracy before and after fine-tuning of one `prune.py` run, and the time it saved; nothing if it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(PRUNE), f"pretrained={HELD_OUT}", "model=resnet32", "data=image_folder",
            f"data.root={root}", f"pruning.latency_cut={share}", f"latency.batch_size={batch_size}",
            f"finetune.epochs={epochs}", f"seed={seed}", f"hydra.run.dir={folder}", "trainer=cpu",
            "tagging.n_images=10", *how,
        ]  # fmt: skip
        ran = subprocess.run(command, check=False, capture_output=True, text=True)
        if ran.returncode:
            said = " ".join(ran.stderr.split())
            print(said[-400:], flush=True)
            if "cannot be reached" not in said and "too noisy" not in said:
                sys.exit(f"{' '.join(command)} ended with {ran.returncode}")
            return {}
        found = json.loads((Path(folder) / "metrics.json").read_text())
    before, after = (found[stage]["latency_ms"][str(batch_size)] for stage in ("dense", "pruned"))
    return {
        "saved": 1 - after / before,
        "before": 100 * found["pruned"]["test_accuracy"],
        "finetuned": 100 * found["finetuned"]["test_accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", help="CIFAR-10 as train/<class>/* and test/<class>/*")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--asked", type=float, default=0.4, help="share of the time to remove (0.4)")
    parser.add_argument("--networks", nargs="*", default=["resnet32", "resnet18", "mobilenet_v2"])
    parser.add_argument("--targets", nargs="*", default=["eager", "onnx"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 64])
    parser.add_argument("--share", type=float, default=0.25, help="of the accuracies: share of the time (0.25)")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning (2)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of prune.py")
    given = parser.parse_args()
    if given.root and not Path(given.root).is_dir():
        parser.error(f"{given.root} is not a folder")
    keep_freed_memory()
    found: dict[str, Any] = {}
    runs = [(name, target, size) for name in given.networks for target in given.targets for size in given.batches]
    for name, target, size in track(runs, description="asked and got"):
        key = f"{name}_{target}_batch{size}"
        found[key] = promise(name, given.asked, size, target)
        print(key, found[key], flush=True)
        publish(found, given.json)
    jobs = [(size, seed) for size in given.batches for seed in given.seeds] if given.root else []
    rows: dict[str, list[dict[str, float]]] = {}
    for size, seed in track(jobs, description="accuracies"):
        share = given.share
        for way, how in WAYS.items():
            row = accuracies(given.root, share, size, [*how, *given.set], seed, given.epochs)
            print(f"resnet32_{way}_batch{size}", seed, f"{share:.3f} asked", row or "cannot", flush=True)
            if not row:
                break
            rows.setdefault(f"resnet32_{way}_batch{size}", []).append(row)
            share = row["saved"]
        publish({**found, **{key: averages(values) for key, values in rows.items()}}, given.json)
    publish({**found, **{key: averages(values) for key, values in rows.items()}}, given.json)


def averages(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and standard deviation of each figure over the seeds that came to one, and how many did."""
    found: dict[str, Any] = {
        name: [
            round(statistics.mean(row[name] for row in rows), 4),
            round(statistics.stdev(row[name] for row in rows), 4) if rows[1:] else 0.0,
        ]
        for name in rows[0]
    }
    return {**found, "seeds": len(rows)}


if __name__ == "__main__":
    main()
