"""torchvision's transforms (v2) of training images from configuration: of single images where they are loaded, of whole
batches where they are trained on."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freqprune.errors import InputError, closest

# Seeds that transforms are tried with.
TRIES = 40


class Transforms:
    """Transforms by name, in their order.

    Args:
        entries: each the name of a class of ``torchvision.transforms.v2``, a mapping of ``name`` and its arguments, or
            such a transform. ``MixUp`` and ``CutMix`` work on whole batches; of several of them one is drawn a batch.

    Raises:
        InputError: for a transform that does not exist or does not take its arguments.
    """

    def __init__(self, entries: Sequence[Any] | None = None) -> None:
        if isinstance(entries, str | Mapping):
            raise InputError(f"data.transforms must be a list such as [TrivialAugmentWide, CutMix], got {entries!r}")
        made = [_made(entry) for entry in entries or ()]
        self.mixing = [transform for transform in made if _mixes(transform)]
        self.single = [transform for transform in made if not _mixes(transform)]

    def bind(self, n_classes: int, image: Tensor | None) -> None:
        """Tell the number of classes, and try transforms of single images on one.

        Args:
            n_classes: of the labels that are mixed.
            image: uint8 ``(n_channels, height, width)``; None for nothing to try.

        Raises:
            InputError: if they fail on the image, or what they leave is no uint8 image of the same channels.
        """
        for transform in self.mixing:
            transform.num_classes = n_classes
        if image is None:
            return
        names = ", ".join(type(transform).__name__ for transform in self.single)
        try:
            found = self.one(image, seed=0)
            # Some do what they do to a share of the images only.
            for seed in range(1, TRIES):
                self.one(image.clone(), seed)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"data.transforms ({names}) do not run on images of {' x '.join(map(str, image.shape))}: {error}"
            ) from error
        if found.dtype != torch.uint8 or found.shape[:1] != image.shape[:1] or found.dim() != 3:
            raise InputError(
                f"data.transforms ({names}) must leave uint8 images of {len(image)} channels, they leave "
                f"{str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}; leave out what converts or "
                "normalises: that is done afterwards"
            )

    def one(self, image: Tensor, seed: int) -> Tensor:
        """Transform an image; the same seed does the same, and nobody else's random numbers are used up."""
        state, of_python, of_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
        try:
            torch.default_generator.manual_seed(seed)
            # Other libraries draw from these, or from generators of their own, which MONAI's can be told of.
            random.seed(seed)
            np.random.seed(seed % 2**32)
            for transform in self.single:
                if hasattr(transform, "set_random_state"):
                    transform.set_random_state(int(np.random.randint(2**32, dtype=np.uint32)))
                image = transform(image)
        finally:
            torch.set_rng_state(state)
            random.setstate(of_python)
            np.random.set_state(of_numpy)
        return image

    def mix(
        self, images: Tensor, labels: Tensor, generator: torch.Generator, share: tuple[int, int] = (0, 1)
    ) -> tuple[Tensor, Tensor]:
        """Mix a batch; labels become shares of the classes ``(n_images, n_classes)``. Of several processes, `share` of
        which is this one, each mixes its images in another way."""
        rank, size = share
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(int(torch.randint(2**31, (size,), generator=generator)[rank]))
            chosen = self.mixing[int(torch.randint(len(self.mixing), ()))]
            images, labels = chosen(images, labels)
        finally:
            torch.set_rng_state(state)
        return images.contiguous(memory_format=torch.channels_last), labels


def _made(entry: Any) -> Any:
    from torchvision.transforms import v2

    # Of another library, as Hydra has made it of _target_.
    if callable(entry) and not isinstance(entry, type):
        return entry
    arguments = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
    name = str(arguments.pop("name", None))
    known = [
        key
        for key, kind in vars(v2).items()
        if isinstance(kind, type) and issubclass(kind, v2.Transform) and kind is not v2.Transform
    ]
    if name not in known:
        raise InputError(
            f"data.transforms: torchvision.transforms.v2 has no transform {name!r}{closest(name, known)}; say "
            "{name: RandomErasing, p: 0.1} or, of another library, {_target_: module.Class}"
        )
    if isinstance(arguments.get("transforms"), list | tuple):
        # RandomApply, RandomChoice and their like.
        arguments["transforms"] = [_made(one) for one in arguments["transforms"]]
    try:
        return getattr(v2, name)(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"data.transforms: {name} does not take {arguments} ({error})") from error


def _mixes(transform: Any) -> bool:
    from torchvision.transforms import v2

    return isinstance(transform, v2.MixUp | v2.CutMix)
