"""What callbacks that show tags in any LightningModule's training share: the network, and pixels of its batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from freqprune.errors import InputError, at_least
from freqprune.tagging import pixels_of, rounding


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
        at_least(1, n_images=n_images)
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

    def _at_the_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, n_images: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`_validation_images` outside the validation."""
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        stage, trainer.state.stage = trainer.state.stage, pl.trainer.states.RunningStage.VALIDATING
        try:
            # In the validation stage batches come without augmentation.
            return self._validation_images(trainer, pl_module, n_images)
        finally:
            trainer.state.stage = stage

    def _validation_images(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, n_images: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """This process's share of the first images as the loader gives them, and of their labels where it gives any."""
        # In whatever collection there are several.
        loaders = tree_leaves(trainer.val_dataloaders)
        if not loaders:
            raise InputError(
                f"{type(self).__name__} tags validation images, and val_dataloaders is empty; pass a validation loader"
            )
        loader: Iterable[Any] = loaders[0]
        n_images, rank, size = n_images or self.n_images, trainer.global_rank, trainer.world_size
        dealt = size == 1 or _is_dealt(loader)
        # Of a loader that is not dealt out, each process takes its share of the same images.
        wanted, share = (
            (len(range(rank, n_images, size)), slice(None)) if dealt else (n_images, slice(rank, None, size))
        )
        found: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in loader:
            # As Lightning's loops do; the strategy calls the other hooks.
            ready = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            moved = trainer.strategy.batch_to_device(ready)
            found.append(self._images_of(moved))
            label = (
                moved.get("label", moved.get("labels"))
                if isinstance(moved, Mapping)
                else moved[1]
                if isinstance(moved, list | tuple) and len(moved) > 1
                else None
            )
            if isinstance(label, Tensor) and label.dim() == 1:
                labels.append(label)
            if sum(map(len, found)) >= wanted:
                break
        if not found:
            raise InputError(
                f"{type(self).__name__} tags validation images, and the validation loader gives no batch of them: let "
                "it keep the last one (drop_last=False), or give it more images"
            )
        all_labels = torch.cat(labels)[:wanted][share] if len(labels) == len(found) else None
        return torch.cat(found)[:wanted][share], all_labels

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
        return images

    def _pixels(self, images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
        """Undo the normalisation; rounding that leaves [0, 1] by less than 1e-3, or that of half precision, is clipped,
        more means that mean and std are wrong."""
        slack = rounding(images)
        images = pixels_of(images.float(), mean, std)
        low, high = images.amin().item(), images.amax().item()
        if low < -slack or high > 1 + slack:
            raise InputError(
                f"validation images hold values from {low:.3g} to {high:.3g} after undoing the normalisation (mean "
                f"{mean}, std {std}), expected pixels in [0, 1]; give {type(self).__name__} the mean and std that the "
                "batches are normalised with"
            )
        return images.clamp(0, 1)


def _is_dealt(loader: Any) -> bool:
    """Whether a loader gives each process images of its own: Lightning's sampler deals them out, unless it was told not
    to; what a stream gives is its own business."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return True
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    return any(isinstance(one, DistributedSampler) for one in samplers)


def of_all(values: Tensor, trainer: pl.Trainer) -> Tensor:
    """What the processes of a run got of a loader, in the order in which its sampler dealt it out to them."""
    if trainer.world_size == 1:
        return values
    shares: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(shares, values.cpu())
    longest = max(map(len, shares))
    return torch.stack([share[i] for i in range(longest) for share in shares if i < len(share)]).to(values.device)


def begins_with(trainer: pl.Trainer) -> int:
    """The first epoch that begins in this training: one that is gone on with in its middle has begun before."""
    loop = trainer.fit_loop
    # Of a checkpoint of its last batch, all of an epoch is left.
    whole = loop.epoch_loop.restarted_on_train_batch_end and loop.epoch_loop.batch_progress.is_last_batch
    return trainer.current_epoch + (loop.restarted_on_epoch_end or (loop.restarted_mid_epoch and not whole))
