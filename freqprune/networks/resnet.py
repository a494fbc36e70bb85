"""The CIFAR ResNets of He et al. 2016, section 4.2 (arXiv 1512.03385), built from a plain config that can carry pruned
widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.errors import InputError, at_least
from freqprune.networks.blocks import Shortcut

STAGE_WIDTHS = (16, 32, 64)


class IndexShortcut(nn.Module):
    """Parameter-free shortcut of option A: subsample by ``stride`` and pick channels by index.

    ``out[:, j] = x[:, index[j], ::stride, ::stride]``, and zero where ``index[j]`` is -1. The dense shortcut from
    ``n_in`` to ``n_out`` channels puts channel i at position ``i + (n_out - n_in) // 2``, which is what padding with
    zeros on both sides does; writing it as an index lets either side lose channels and stay exact.

    Args:
        index: source channel of every output channel, -1 for a zero channel; length ``n_out``.
        n_in: channels of the input.
        stride: spatial subsampling.
    """

    index: Tensor

    def __init__(self, index: Sequence[int], n_in: int, stride: int) -> None:
        super().__init__()
        self.n_in = n_in
        self.stride = stride
        # Not persistent: published weights of option A have no such key. The widths config carries the index instead.
        self.register_buffer("index", torch.empty(0, dtype=torch.long), persistent=False)
        self.set_index(torch.as_tensor(list(index), dtype=torch.long))

    def set_index(self, index: Tensor) -> None:
        """Replace the channel index, ``(n_out,)`` of integers from -1 to ``n_in - 1``."""
        if index.numel() and (int(index.min()) < -1 or int(index.max()) >= self.n_in):
            raise InputError(f"shortcut index must lie in [-1, {self.n_in - 1}], got {index.tolist()}")
        self.index = index.to(self.index.device)

    @property
    def n_out(self) -> int:
        return self.index.numel()

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        picked = x.index_select(1, self.index.clamp(min=0))
        return picked * (self.index >= 0).to(x.dtype).view(1, -1, 1, 1)

    def extra_repr(self) -> str:
        return f"{self.n_in}, {self.n_out}, stride={self.stride}"


def padded_index(n_in: int, n_out: int) -> list[int]:
    """Channel index of He's option A: the input in the middle, zeros on both sides.

    >>> padded_index(2, 4)
    [-1, 0, 1, -1]
    """
    before = (n_out - n_in) // 2
    return [j - before if 0 <= j - before < n_in else -1 for j in range(n_out)]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a shortcut around them."""

    def __init__(self, n_in: int, n_inner: int, n_out: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_inner, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_inner)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(n_inner, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = shortcut
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32 x 32 images; input ``(n_images, in_channels, height, width)``, output logits
    ``(n_images, num_classes)``.

    Args:
        depth: number of weighted layers, 6n + 2.
        num_classes: outputs of the linear layer.
        shortcut: ``"A"`` (parameter-free, zero channels) or ``"B"`` (1 x 1 projection) where the width changes.
        in_channels: channels of the input images.
        stage_widths: filters of the three stages.
        widths: filters of pruned convolutions by name, e.g. ``{"layer1.0.conv1": 9}``; those not named are dense.
        shortcut_index: channel index of pruned option A shortcuts by name, see `IndexShortcut`.

    Raises:
        InputError: for a depth that is not 6n + 2, an unknown shortcut or layer name, or widths that do not fit
            together.
    """

    def __init__(
        self,
        depth: int = 32,
        num_classes: int = 10,
        shortcut: str = "A",
        in_channels: int = 3,
        stage_widths: Sequence[int] = STAGE_WIDTHS,
        widths: Mapping[str, int] | None = None,
        shortcut_index: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InputError(f"depth must be 6n + 2 with n >= 1 (8, 14, 20, 32, 44, 56, 110, ...), got {depth}")
        if shortcut not in ("A", "B"):
            raise InputError(f'shortcut must be "A" (index) or "B" (projection), got {shortcut!r}')
        if len(stage_widths) != 3 or min(stage_widths) < 1 or list(stage_widths) != sorted(stage_widths):
            raise InputError(f"stage_widths must be three positive widths that do not shrink, got {list(stage_widths)}")
        at_least(1, num_classes=num_classes, in_channels=in_channels)
        self._config: dict[str, Any] = {
            "depth": depth,
            "num_classes": num_classes,
            "shortcut": shortcut,
            "in_channels": in_channels,
            "stage_widths": [int(w) for w in stage_widths],
        }
        widths = dict(widths or {})
        indices = dict(shortcut_index or {})
        n_blocks = (depth - 2) // 6

        stream = widths.pop("conv1", stage_widths[0])
        self.conv1 = nn.Conv2d(in_channels, stream, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stream)
        self.relu1 = nn.ReLU(inplace=True)
        dense_stream = stage_widths[0]
        stages = []
        for stage, dense in enumerate(stage_widths, start=1):
            blocks = []
            for block in range(n_blocks):
                name = f"layer{stage}.{block}"
                inner = widths.pop(f"{name}.conv1", dense)
                out = widths.pop(f"{name}.conv2", dense)
                stride = 2 if stage > 1 and block == 0 else 1
                index = indices.pop(f"{name}.shortcut", None)
                if index is None and stride == 1 and dense_stream == dense:
                    if out != stream:
                        raise InputError(
                            f"widths[{name}.conv2] is {out}, but the identity shortcut around it carries {stream} "
                            "channels"
                        )
                    way: nn.Module = nn.Identity()
                elif shortcut == "B":
                    way = nn.Sequential(nn.Conv2d(stream, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
                else:
                    way = IndexShortcut(padded_index(stream, out) if index is None else index, stream, stride)
                    if way.n_out != out:
                        raise InputError(
                            f"shortcut_index[{name}.shortcut] has {way.n_out} channels, but {name}.conv2 has {out} "
                            "filters"
                        )
                blocks.append(BasicBlock(stream, inner, out, stride, way))
                stream, dense_stream = out, dense
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(stream, num_classes)
        unknown = sorted([*widths, *indices])
        if unknown:
            raise InputError(f"widths name layers that a ResNet-{depth} does not have: {', '.join(unknown)}")
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def features(self, x: Tensor) -> Tensor:
        """Feature map before the pooling, ``(n_images, width, height / 4, width / 4)``."""
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).mean(dim=(2, 3)))

    @property
    def config(self) -> dict[str, Any]:
        """Plain dict for `freqprune.build_model`: this architecture with the widths it has now."""
        first, second, third = self._config["stage_widths"]
        dense = {"conv1": first, "layer1": first, "layer2": second, "layer3": third}
        widths: dict[str, int] = {}
        indices: dict[str, list[int]] = {}
        for name, module in self.named_modules():
            if (
                isinstance(module, nn.Conv2d)
                and ".shortcut" not in name
                and module.out_channels != dense[name.split(".")[0]]
            ):
                widths[name] = module.out_channels
            elif isinstance(module, IndexShortcut) and module.index.tolist() != padded_index(module.n_in, module.n_out):
                indices[name] = module.index.tolist()
        # A block that is gone is built first, as wide as its shortcut.
        stream = self.conv1.out_channels
        for name, module in self.named_modules():
            if isinstance(module, BasicBlock):
                stream = module.conv2.out_channels
            elif isinstance(module, Shortcut):
                shortcut = getattr(module, "shortcut", None)
                if isinstance(shortcut, IndexShortcut):
                    stream = shortcut.n_out
                elif isinstance(shortcut, nn.Sequential):
                    stream = len(shortcut.state_dict()["0.weight"])
                if stream != dense[name.split(".")[0]]:
                    widths[f"{name}.conv2"] = stream
        config = {key: value for key, value in self._config.items() if key != "depth"}
        return {"name": f"resnet{self._config['depth']}", **config, "widths": widths, "shortcut_index": indices}
