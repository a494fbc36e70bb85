"""What callbacks that show tags in any LightningModule's training share: the network, and pixels of its batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.tagging import pixels_of


class TagsInTraining(pl.Callback):
    """What callbacks that show tags during training share: the network, and pixels of validation images.

    Args:
        n_images: validation images, the first of the validation loader.
        network: attribute of the LightningModule that holds the network.
        mean: channel means that validation batches are normalised with; the data module's ``mean`` if left out, none if
            it has none.
        std: channel standard deviations, likewise.
    """

    def __init__(
        self, n_images: int, network: str | None, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> None:
        super().__init__()
        if n_images < 1:
            raise InputError(f"n_images must be at least 1, got {n_images}")
        if (mean is None) != (std is None):
            raise InputError(f"mean and std go together, got mean = {mean} and std = {std}")
        self.n_images, self.network, self.mean, self.std = n_images, network, mean, std

    def _network(self, pl_module: pl.LightningModule) -> nn.Module:
        if self.network is None:
            return pl_module
        network = getattr(pl_module, self.network, None)
        if not isinstance(network, nn.Module):
            children = ", ".join(name for name, _ in pl_module.named_children())
            raise InputError(
                f"network = {self.network!r} is no module of {type(pl_module).__name__}; it has {children}"
            )
        return network

    def _normalization(self, trainer: pl.Trainer) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        if self.mean is not None:
            return self.mean, self.std
        data = getattr(trainer, "datamodule", None)
        return getattr(data, "mean", None), getattr(data, "std", None)

    def _check_share(self, count: int, trainer: pl.Trainer) -> None:
        """InputError for fewer images than processes."""
        if count < trainer.world_size:
            raise InputError(
                f"{count} images are too few for {trainer.world_size} processes, which take one each at least; give a "
                "larger n_images= (and, where they are given, more images=)"
            )

    def _validation_images(self, trainer: pl.Trainer) -> tuple[Tensor, Tensor | None]:
        """Images as the loader gives them, and their labels where it gives any."""
        loaders = trainer.val_dataloaders
        loader: Iterable[Any] = loaders[0] if isinstance(loaders, list | tuple) else loaders  # type: ignore[assignment]
        wanted = len(range(trainer.global_rank, self.n_images, trainer.world_size))
        found: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in loader:
            moved = trainer.strategy.batch_to_device(batch)
            found.append(self._images_of(moved))
            label = (
                moved.get("label", moved.get("labels"))
                if isinstance(moved, Mapping)
                else moved[1]
                if _is_pair(moved)
                else None
            )
            if isinstance(label, Tensor) and label.dim() == 1:
                labels.append(label)
            if sum(map(len, found)) >= wanted:
                break
        return torch.cat(found)[:wanted], torch.cat(labels)[:wanted] if len(labels) == len(found) else None

    def _images_of(self, batch: Any) -> Tensor:
        images = (
            batch.get("image", batch.get("images"))
            if isinstance(batch, Mapping)
            else batch[0]
            if isinstance(batch, list | tuple)
            else batch
        )
        if not isinstance(images, Tensor) or images.dim() != 4:
            raise InputError(
                f"{type(self).__name__} expects validation batches (images, ...), {{'image': images, ...}} or images "
                "of shape (n_images, n_channels, height, width)"
            )
        return images.float()

    def _pixels(self, images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
        """Undo the normalisation; rounding that leaves [0, 1] by less than 1e-3 is clipped, more means that mean and
        std are wrong."""
        images = pixels_of(images, mean, std)
        low, high = images.amin().item(), images.amax().item()
        if low < -1e-3 or high > 1 + 1e-3:
            raise InputError(
                f"validation images hold values from {low:.3g} to {high:.3g} after undoing the normalisation (mean "
                f"{mean}, std {std}), expected pixels in [0, 1]; give {type(self).__name__} the mean and std that the "
                "batches are normalised with"
            )
        return images.clamp(0, 1)


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, list | tuple) and len(batch) > 1
