"""Lightning data modules over uint8 images, in memory or stored elsewhere."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from freqprune.errors import InputError
from freqprune.training.augment import random_crop_flip
from freqprune.training.loading import make_loader
from freqprune.training.pixels import sent
from freqprune.training.resizing import ProgressiveResizing
from freqprune.training.sources import (
    Images,
    Source,
    as_floats,
    channel_statistics,
    stratified_split,
)
from freqprune.training.transforms import Transforms

_IN_CACHE = 2**19  # numbers


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class ImageData(pl.LightningDataModule, ABC):
    """Images split into train, validation and test; batches come out normalised, training batches augmented.

    Args:
        batch_size: images a batch.
        val_fraction: share of the training images held out for validation, stratified by class; with 0 all are trained
            on, and what would be done with validation images but measure the training is done with them.
        split_seed: seed of that split. It does not follow the run's seed, so a network never validates on what it
            trained on.
        mean: channel means for normalisation; measured on the training split if left out.
        std: channel standard deviations, likewise.
        crop_padding: pixels of zero padding for random crops of training images, 0 for none.
        flip: random left-right flips of training images.
        transforms: further ones of training images, see `Transforms`: those of single images come before the crop and
            flip, those of whole batches at the end.
        eval_size: validation, test and tags see the middle so many pixels of an image, where `transforms` cut training
            images out of the whole; all of it if left out.
        progressive_resizing: fields of `ProgressiveResizing`: training images are small at first; as they are from the
            start if left out. See `whole` and `smallest`.
        num_workers: processes that read batches; if left out, one a core where images have to be decoded or
            `transforms` are to be done, none elsewhere.
        limit_train: use the first so many images of the training split only, e.g. for a quick trial.
        limit_val: likewise, of those that are held out.
        limit_test: use so many test images only, drawn at random by `split_seed`: they are often sorted by class.
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
        transforms: Sequence[Any] | None = None,
        eval_size: int | None = None,
        progressive_resizing: Mapping[str, Any] | None = None,
        num_workers: int | None = None,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("batch_size", batch_size, 1),
            ("crop_padding", crop_padding, 0),
            ("eval_size", eval_size, 1),
            ("num_workers", num_workers, 0),
            ("limit_train", limit_train, 1),
            ("limit_val", limit_val, 1),
            ("limit_test", limit_test, 1),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise InputError(f"data.{name} must be a whole number of at least {low}, got {value!r}")
        if not 0 <= val_fraction < 1:
            raise InputError(f"data.val_fraction must lie between 0 (no validation) and 1, got {val_fraction}")
        if (mean is None) != (std is None):
            raise InputError("data.mean and data.std come together: set both or neither")
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.mean, self.std = as_floats(mean), as_floats(std)
        self.crop_padding = crop_padding
        self.flip = flip
        self.limit_train, self.limit_val, self.limit_test = limit_train, limit_val, limit_test
        self.transforms, self.eval_size, self.num_workers = Transforms(transforms), eval_size, num_workers
        self.progressive_resizing = ProgressiveResizing.of(progressive_resizing)
        self.train: Images | None = None
        self.val: Images | None = None
        self.test: Images | None = None
        self._whole: Images | None = None
        self.classes: tuple[str, ...] = ()
        self._generator: tuple[tuple[int, int], torch.Generator] | None = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside the block training images are as they are, whatever `progressive_resizing` says: for fine-tuning."""
        kept, self.progressive_resizing = self.progressive_resizing, None
        try:
            yield
        finally:
            self.progressive_resizing = kept

    def sides(self, epoch: int, epochs: int) -> tuple[int, int]:
        """Height and width of the images that are trained on in an epoch, counted from 0, of so many."""
        whole = self.training_size()
        return whole if self.progressive_resizing is None else self.progressive_resizing.sides(epoch, epochs, *whole)

    def training_size(self) -> tuple[int, int]:
        """Height and width of the images that are trained on, as the transforms leave them."""
        self.setup()
        assert self._whole is not None
        image = self._whole.pixels[0]
        height, width = (self.transforms.one(image.clone(), seed=0) if self.transforms.single else image).shape[-2:]
        return height, width

    @property
    def validates(self) -> bool:
        """Whether images are held out for validation."""
        return self.val_fraction > 0

    @abstractmethod
    def load(self) -> Source:
        """Read the data set; subclasses say how."""

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        train, val, test, self.classes = self.parts()
        for part in (train, test):
            if isinstance(part.pixels, Tensor) and part.pixels.dtype != torch.uint8:
                raise InputError(
                    f"the pixels of {type(self).__name__}.load() must be uint8, got "
                    f"{str(part.pixels.dtype).removeprefix('torch.')}; multiply pixels in [0, 1] by 255 and round them"
                )
        if self.mean is None:
            self.mean, self.std = channel_statistics(train.pixels)
        self.transforms.bind(len(self.classes), train.pixels[0].clone() if self.transforms.single else None)
        n_channels = train.pixels.shape[1]
        for name, statistic in (("mean", self.mean), ("std", self.std)):
            if len(statistic or ()) != n_channels:
                raise InputError(f"data.{name} must hold {n_channels} values, one a channel, got {statistic}")
        if not all(0 < std < math.inf for std in self.std or ()):
            raise InputError(f"data.std must be positive, got {self.std}")
        if not all(abs(mean) <= 1 for mean in self.mean or ()):
            raise InputError(f"data.mean = {self.mean}: pixels are scaled to [0, 1]; divide mean and std by 255")
        # Last: what was refused is refused again.
        self._whole = train
        self.train, self.test = self._seen(train), self._seen(test)
        self.val = self.train if val is None else self._seen(val)

    def parts(self) -> tuple[Images, Images | None, Images, tuple[str, ...]]:
        """Images to train on, those held out for validation, those to test on; names of the classes."""
        source = self.load()
        return (*self.divided(source.train, source.test, source.classes), source.classes)

    def divided(self, train: Images, test: Images, classes: Sequence[str]) -> tuple[Images, Images | None, Images]:
        """Some of the training images held out for validation, and of the rest and the test images what the limits
        leave."""
        val = None
        if self.validates:
            train, val = stratified_split(train, self.val_fraction, self.split_seed, classes)
            val = val if self.limit_val is None else val[torch.arange(min(self.limit_val, len(val)))]
        else:
            train = train[torch.randperm(len(train), generator=_seeded(self.split_seed))]
        if self.limit_train is not None:
            train = train[torch.arange(min(self.limit_train, len(train)))]
        if self.limit_test is not None:
            # A seeded draw: test images are often sorted by class.
            test = test[torch.randperm(len(test), generator=_seeded(self.split_seed))[: self.limit_test]]
        return train, val, test

    def _seen(self, images: Images) -> Images:
        """What validation, test and tags see of them."""
        if self.eval_size is None:
            return images
        if self.eval_size > min(images.pixels.shape[-2:]):
            raise InputError(
                f"data.eval_size = {self.eval_size} is more than the images have: "
                f"{' x '.join(map(str, images.pixels.shape[-2:]))} pixels; raise data.image_size, or leave it out"
            )
        return images.middle(self.eval_size)

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
        bytes_, (n, n_channels, height, width) = pixels.dtype == torch.uint8, pixels.shape
        found = torch.empty(
            (n, height, width, n_channels), dtype=torch.float32 if bytes_ else pixels.dtype, device=pixels.device
        )
        # An accelerator does not wait for them.
        mean, std = (sent(torch.tensor(v).repeat(width), pixels.device) for v in (self.mean, self.std))
        # A CPU does all of it to a few images while they are in its cache.
        some = max(1, _IN_CACHE // (n_channels * height * width)) if pixels.device.type == "cpu" else max(1, n)
        for start in range(0, n, some):
            part = found[start : start + some].copy_(pixels[start : start + some].permute(0, 2, 3, 1))
            # Whole rows at a time: three channels alone would be a loop of three.
            rows = part.view(-1, height, width * n_channels)
            if bytes_:
                rows.div_(255)
            rows.sub_(mean).div_(std)
        return found.permute(0, 3, 1, 2)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, InputError):
            raise batch
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        pixels, labels = batch
        if self.trainer is None or not self.trainer.training:
            return self._as_weights((self.normalize(pixels), labels))
        generator, share = self._epoch_generator(self.trainer), (self.trainer.global_rank, self.trainer.world_size)
        pixels = self.normalize(random_crop_flip(pixels, self.crop_padding, self.flip, generator, share))
        if self.transforms.mixing:
            pixels, labels = self.transforms.mix(pixels, labels, generator, share)
        if self.progressive_resizing is not None:
            pixels = self.progressive_resizing(pixels, self.trainer.current_epoch, epochs_of(self.trainer))
        return self._as_weights((pixels, labels))

    def _as_weights(self, batch: tuple[Tensor, Tensor]) -> Any:
        """A batch in the type that the trainer gives the network; it converts batches before they are normalised."""
        return batch if self.trainer is None else self.trainer.precision_plugin.convert_input(batch)

    def _epoch_generator(self, trainer: pl.Trainer) -> torch.Generator:
        """Randomness of the running epoch: it depends on the seed and the epoch only, so that a resumed run goes on as
        the unbroken one, and several processes as one."""
        key = (torch.initial_seed(), trainer.current_epoch)
        if self._generator is None or self._generator[0] != key:
            seed, epoch = key
            self._generator = key, torch.Generator().manual_seed((seed * 1_000_003 + epoch * 1_009) % 2**63)
        return self._generator[1]

    def _loader(self, split: str, shuffle: bool) -> DataLoader[Any]:
        images = self.split(split)
        if not shuffle:
            return make_loader(images, self.batch_size, self.trainer, num_workers=self.num_workers)
        assert self._whole is not None
        single = self.transforms if self.transforms.single else None
        return make_loader(self._whole, self.batch_size, self.trainer, True, single, self.num_workers)

    def train_dataloader(self) -> DataLoader[Any]:
        # Another training may begin with the epoch that the one before it ended with.
        self._generator = None
        if self.progressive_resizing is not None and self.trainer is not None and self.trainer.state.fn == "fit":
            # Before the first batch is read.
            epochs_of(self.trainer)
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", shuffle=False)


def epochs_of(trainer: pl.Trainer) -> int:
    """Epochs that training images grow over."""
    if trainer.max_epochs is None or trainer.max_epochs < 0 or trainer.max_steps >= 0:
        raise InputError(
            "data.progressive_resizing grows images over the epochs of the training: say how many, trainer.max_epochs, "
            f"and leave trainer.max_steps alone; got max_epochs = {trainer.max_epochs}, max_steps = {trainer.max_steps}"
        )
    return trainer.max_epochs
