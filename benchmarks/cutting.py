"""How long a cut takes: the default of `prune.py` on torchvision's ResNets at 224 px, and the elimination in it over
one inversion of the same matrices.

    python benchmarks/cutting.py --json cutting.json
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence

import torch
from result import publish
from torchvision.models import resnet18, resnet50

from freqprune import Amount, Material, Recipe, Stimulus, cut
from freqprune.jobs.cli import keep_freed_memory
from freqprune.pruning.elimination import elimination_errors


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def of_a_cut(build: Callable[[], torch.nn.Module], n_images: int, size: int) -> float:
    """Seconds of the default cut of half of the MACs."""
    torch.manual_seed(0)
    images = torch.rand(n_images, 3, size, size)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    shift, scale = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    material = Material(images[:8], lambda pixels: (pixels - shift) / scale, mean, std, calibration=images)
    recipe = Recipe(Amount(macs_cut=0.5, scope="per_mac"), criterion="logit_error", compensation="sequential")
    net = build().eval()
    return seconds(lambda: cut(net, material, recipe, Stimulus()))


def over_inversion(sizes: Sequence[tuple[int, int]] = ((512, 9), (2048, 1))) -> float:
    """Time of an elimination of filters of so many columns over that of an inversion of its moments, the worst size."""
    ratios = []
    for n_filters, n_columns in sizes:
        n_values = n_filters * n_columns
        x = torch.randn(2 * n_values, n_values + 1).relu_()
        x[:, -1] = 1
        moments = (x.T @ x).double() / len(x)
        columns = torch.arange(n_values).view(n_filters, n_columns)
        reader = {"layer": (torch.randn(512, n_values), moments, columns)}
        inversion = min(seconds(lambda m=moments: torch.linalg.inv(m)) for _ in range(2))  # type: ignore[misc]
        elimination = seconds(lambda r=reader: elimination_errors(r))  # type: ignore[misc]
        print(
            f"{n_filters} filters of {n_columns} columns: elimination {elimination:.1f} s, inversion {inversion:.1f} s"
        )
        ratios.append(elimination / inversion)
    return max(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--images", type=int, default=64, help="calibration images (64)")
    parser.add_argument("--size", type=int, default=224, help="their height and width (224)")
    parser.add_argument("--without", nargs="*", default=[], choices=["resnet18_s", "resnet50_s", "over_inversion"])
    given = parser.parse_args()
    keep_freed_memory()
    parts: dict[str, Callable[[], float]] = {
        "over_inversion": over_inversion,
        "resnet18_s": lambda: of_a_cut(resnet18, given.images, given.size),
        "resnet50_s": lambda: of_a_cut(resnet50, given.images, given.size),
    }
    found = {name: round(part(), 2) for name, part in parts.items() if name not in given.without}
    # Kilobytes on Linux.
    found["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    publish(found, given.json)


if __name__ == "__main__":
    main()
