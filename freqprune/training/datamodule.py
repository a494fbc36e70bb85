"""Lightning data modules over images that are held as uint8 in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from freqprune.errors import InputError
from freqprune.training.augment import random_crop_flip
from freqprune.training.sources import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    Images,
    Source,
    as_floats,
    channel_statistics,
    cifar10,
    digits,
    image_folder,
    stratified_split,
)


class _Batches(Dataset[Any]):
    """Map-style data set that hands out whole batches: the sampler's indices pick from the tensors in one go."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images.pixels[index], self.images.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        picked = self.images[torch.tensor(indices).to(self.images.pixels.device, non_blocking=True)]
        return picked.pixels, picked.labels


def _as_is(batch: Any) -> Any:
    return batch


class ImageData(pl.LightningDataModule, ABC):
    """Images in memory, split into train, validation and test; batches come out normalised, training batches augmented.

    Args:
        batch_size: images a batch.
        val_fraction: share of the training images held out for validation, stratified by class.
        split_seed: seed of that split. It does not follow the run's seed, so a network never validates on what it
            trained on.
        mean: channel means for normalisation; measured on the training split if left out.
        std: channel standard deviations, likewise.
        crop_padding: pixels of zero padding for random crops of training images, 0 for none.
        flip: random left-right flips of training images.
        limit_train: use the first so many images of the training split only, e.g. for a quick trial.
        limit_test: use the first so many test images only.
    """

    def __init__(
        self,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop_padding: int = 4,
        flip: bool = True,
        limit_train: int | None = None,
        limit_test: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("batch_size", batch_size, 1),
            ("crop_padding", crop_padding, 0),
            ("limit_train", limit_train, 1),
            ("limit_test", limit_test, 1),
        ):
            if value is not None and value < low:
                raise InputError(f"data.{name} must be at least {low}, got {value}")
        if not 0 < val_fraction < 1:
            raise InputError(f"data.val_fraction must lie between 0 and 1, got {val_fraction}")
        if (mean is None) != (std is None):
            raise InputError("data.mean and data.std come together: set both or neither")
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.mean, self.std = as_floats(mean), as_floats(std)
        self.crop_padding = crop_padding
        self.flip = flip
        self.limit_train, self.limit_test = limit_train, limit_test
        self.train: Images | None = None
        self.val: Images | None = None
        self.test: Images | None = None
        self.classes: tuple[str, ...] = ()
        self._generator: tuple[tuple[int, int, int], torch.Generator] | None = None

    @abstractmethod
    def load(self) -> Source:
        """Read the data set; subclasses say how."""

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        source = self.load()
        train, self.val = stratified_split(source.train, self.val_fraction, self.split_seed)
        if self.limit_train is not None:
            train = train[torch.arange(min(self.limit_train, len(train)))]
        test = source.test
        if self.limit_test is not None:
            # A seeded draw: test images are often sorted by class.
            test = test[
                torch.randperm(len(test), generator=torch.Generator().manual_seed(self.split_seed))[: self.limit_test]
            ]
        if self.mean is None:
            self.mean, self.std = channel_statistics(train.pixels)
        self.train, self.test, self.classes = train, test, source.classes
        n_channels = train.pixels.shape[1]
        for name, statistic in (("mean", self.mean), ("std", self.std)):
            if len(statistic or ()) != n_channels:
                raise InputError(f"data.{name} must hold {n_channels} values, one a channel, got {statistic}")
        if min(self.std or [1.0]) <= 0:
            raise InputError(f"data.std must be positive, got {self.std}")

    def split(self, name: str) -> Images:
        """Images of ``"train"``, ``"val"`` or ``"test"``, set up first if need be."""
        self.setup()
        images = getattr(self, name)
        assert isinstance(images, Images)
        return images

    def pixels(self, split: str, n_images: int) -> Tensor:
        """First pixels of a split in [0, 1], float ``(n_images, n_channels, height, width)``, not normalised; splits
        are in random order.

        Raises:
            InputError: if the split holds fewer images.
        """
        images = self.split(split)
        if not 1 <= n_images <= len(images):
            raise InputError(f"n_images must lie in [1, {len(images)}], the size of the {split} split, got {n_images}")
        return images.pixels[:n_images].float() / 255

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 or [0, 1] pixels to the network's input."""
        mean, std = (torch.tensor(v, device=pixels.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        pixels, labels = batch
        if self.trainer is not None and self.trainer.training:
            pixels = random_crop_flip(pixels, self.crop_padding, self.flip, self._epoch_generator(self.trainer))
        return self.normalize(pixels), labels

    def _epoch_generator(self, trainer: pl.Trainer) -> torch.Generator:
        """Randomness of the running epoch: it depends on the seed, the epoch and the process only, so that a resumed
        run goes on as the unbroken one."""
        key = (torch.initial_seed(), trainer.current_epoch, trainer.global_rank)
        if self._generator is None or self._generator[0] != key:
            seed, epoch, rank = key
            self._generator = key, torch.Generator().manual_seed((seed * 1_000_003 + epoch * 1_009 + rank) % 2**63)
        return self._generator[1]

    def _loader(self, split: str, shuffle: bool) -> DataLoader[Any]:
        images = self.split(split)
        if self.trainer is not None and self.trainer.strategy.root_device.type != "cpu":
            # The whole set as bytes on the accelerator: a batch is one gather there.
            images = images.to(self.trainer.strategy.root_device)
        data = _Batches(images)
        sampler: DistributedSampler[Any] | None = None
        if shuffle:
            # An order by seed and epoch (Lightning tells it the epoch), dealt out to the processes of a distributed run
            # in turn.
            ranks = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
            sampler = DistributedSampler(data, *ranks, shuffle=True, seed=torch.initial_seed() % 2**31)
        # Workers would cost more than they bring: a batch is one indexing operation.
        return DataLoader(
            data,
            self.batch_size,
            sampler=sampler,
            num_workers=0,
            collate_fn=_as_is,
            drop_last=shuffle and len(images) > self.batch_size,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", shuffle=False)


class CIFAR10Data(ImageData):
    """CIFAR-10, downloaded by torchvision into `root` on first use; normalised with the data set's own statistics by
    default."""

    def __init__(self, root: str | Path = "data", download: bool = True, **settings: Any) -> None:
        if settings.get("mean") is None and settings.get("std") is None:
            settings |= {"mean": CIFAR10_MEAN, "std": CIFAR10_STD}
        super().__init__(**settings)
        self.root, self.download = root, download

    def load(self) -> Source:
        return cifar10(self.root, self.download)


class ImageFolderData(ImageData):
    """Any folder tree ``root/{train,test}/<class>/*``; mean and std measured on its training images by default."""

    def __init__(
        self,
        root: str | Path,
        image_size: int | None = None,
        resize: int | None = None,
        interpolation: str | None = None,
        n_classes: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.root, self.image_size, self.resize, self.interpolation = root, image_size, resize, interpolation
        self.n_classes = n_classes

    def load(self) -> Source:
        how = self.image_size, self.resize, self.interpolation or "bilinear", self.n_classes
        return image_folder(self.root, *how)


class DigitsData(ImageData):
    """scikit-learn's bundled digits as 3 x 32 x 32; no download."""

    def load(self) -> Source:
        return digits()
