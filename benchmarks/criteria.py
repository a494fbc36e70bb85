"""What is left of the differences between criteria when every cut is made up for in sequence: accuracy on validation
images before any fine-tuning, of `resnet32_cifar10_45k`.

    python benchmarks/criteria.py CIFAR10_FOLDER --json criteria.json
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from result import publish
from rich.progress import track
from torch import nn

from freqprune import Material, cut, pretrained, tag
from freqprune.jobs.cli import keep_freed_memory
from freqprune.jobs.settings import read
from freqprune.networks import HELD_OUT
from freqprune.pruning import needs
from freqprune.training import ImageData, ImageFolderData

CONF = Path(__file__).parents[1] / "conf"


def accuracy(net: nn.Module, data: ImageData) -> float:
    """Share of the validation images, in %."""
    images = data.split("val")
    with torch.no_grad():
        right = [
            net(data.normalize(pixels)).argmax(1) == labels
            for pixels, labels in zip(images.pixels.split(500), images.labels.split(500), strict=True)
        ]
    return 100 * float(torch.cat(right).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", help="folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--criteria", nargs="*", default=sorted(p.stem for p in (CONF / "importance").glob("*.yaml")))
    parser.add_argument("--cuts", nargs="*", type=float, default=[0.5, 0.65])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=400, help="calibration images (400)")
    parser.add_argument("--rounds", type=int, default=1, help="Gauss-Newton steps of each layer (1)")
    given = parser.parse_args()
    keep_freed_memory()
    data = ImageFolderData(given.root, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
    data.setup()
    net = pretrained(HELD_OUT)
    train, found = data.split("train"), {}
    found["dense"] = round(accuracy(net, data), 2)
    names = [name for name in given.criteria if name != "common"]
    runs = [(seed, name) for seed in given.seeds for name in names]
    responses: dict[tuple[int, str], object] = {}
    all_of: dict[str, list[float]] = {}
    for seed, name in track(runs, description="criteria"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("prune", [f"importance={name}", f"seed={seed}", f"pretrained={HELD_OUT}", "output_dir=."])
        settings = read(cfg)
        assert settings.recipe is not None
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        shown = data.pixels("val", settings.showing.n_images)
        labelled = train[order[: settings.scoring.labelled_images]]
        material = Material(
            images=shown, normalize=data.normalize, mean=data.mean, std=data.std,
            calibration=train.pixels[order[: given.images]].float() / 255,
            labelled=(labelled.pixels.float() / 255, labelled.labels),
        )  # fmt: skip
        # Criteria that read every position are measured on their own.
        key = seed, str(settings.recipe.tagging)
        if key not in responses and "tags" in needs(settings.recipe.criterion):
            responses[key] = tag(
                net, shown, settings.stimulus, mean=data.mean, std=data.std, seed=seed, **settings.recipe.tagging
            )
        how = replace(settings.recipe.reconstruction, rounds=given.rounds)
        for share in given.cuts:
            recipe = replace(
                settings.recipe,
                amount=replace(settings.recipe.amount, macs_cut=share),
                compensation="sequential", reconstruction=how, calibrate_on="images",
            )  # fmt: skip
            small = cut(net, material, recipe, settings.stimulus, responses.get(key)).net  # type: ignore[arg-type]
            all_of.setdefault(f"{name} {share:g}", []).append(accuracy(small, data))
            print(seed, name, share, round(all_of[f"{name} {share:g}"][-1], 2), flush=True)
        publish(found | averages(all_of), given.json)


def averages(all_of: dict[str, list[float]]) -> dict[str, list[float]]:
    """Mean and standard deviation over the seeds so far."""
    return {
        key: [round(statistics.mean(values), 2), round(statistics.stdev(values), 2) if values[1:] else 0.0]
        for key, values in all_of.items()
    }


if __name__ == "__main__":
    main()
