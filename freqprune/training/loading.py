"""Batches out of images: in what order, by which processes, and what is done to single images on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from freqprune.errors import InputError
from freqprune.training.pixels import DecodedPixels, StoredPixels, cores, sent
from freqprune.training.sources import Images, picked
from freqprune.training.transforms import Transforms

# Sampled numbers are those of the images, plus so much for every epoch.
_EPOCH = 2**40


class _Epochs(DistributedSampler[Any]):
    """An order by seed and epoch (Lightning tells it the epoch), dealt out to the processes of a distributed run in
    turn; every number says the epoch too."""

    def __iter__(self) -> Iterator[int]:
        return (self.epoch * _EPOCH + number for number in super().__iter__())


class _Batches(Dataset[Any]):
    """Map-style data set that hands out whole batches: the sampler's numbers pick from the images in one go."""

    def __init__(self, images: Images, transforms: Transforms | None = None, seed: int = 0) -> None:
        self.images, self.transforms, self.seed = images, transforms, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images.pixels[index], self.images.labels[index]

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, Tensor] | InputError:
        chosen = torch.tensor(numbers) % _EPOCH
        if isinstance(self.images.pixels, Tensor):
            chosen = sent(chosen, self.images.pixels.device)
        try:
            pixels = picked(self.images.pixels, chosen)
        except InputError as error:
            # Handed over as it is: raised in a worker it would come with the worker's traceback for its message.
            return error
        if self.transforms is not None:
            # Drawn by seed, epoch and image: the same with any number of workers and processes, and after a resume.
            seeds = (hash((self.seed, number)) % 2**32 for number in numbers)
            done = [self.transforms.one(image, seed) for image, seed in zip(pixels, seeds, strict=True)]
            if len(sizes := {tuple(image.shape[1:]) for image in done}) > 1:
                return InputError(
                    f"data.transforms leave images of different sizes, such as "
                    f"{' and '.join(' x '.join(map(str, size)) for size in sorted(sizes)[:2])}, which make no batch: "
                    "leave out what changes the size at random (expand of RandomRotation), or end with {name: Resize, "
                    "size: [HEIGHT, WIDTH]}"
                )
            pixels = torch.stack(done)
        return pixels, self.images.labels[chosen]


def _fits(images: Images, device: torch.device) -> bool:
    """Whether an accelerator has room for images beside a network that trains; assumed where it does not say."""
    if device.type != "cuda" or isinstance(images.pixels, StoredPixels):
        return True
    return images.pixels.numel() <= torch.cuda.mem_get_info(device)[0] // 4


def _epochs_behind(trainer: pl.Trainer | None) -> int:
    """Epochs that a training has done; until Lightning has restored it, by the checkpoint that it holds meanwhile."""
    if trainer is None or trainer.state.fn != "fit":
        return 0
    held = getattr(getattr(trainer, "_checkpoint_connector", None), "_loaded_checkpoint", None) or {}
    try:
        return int(held["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    except KeyError:
        return int(trainer.current_epoch)


def _as_is(batch: Any) -> Any:
    return batch


def make_loader(
    images: Images,
    batch_size: int,
    trainer: pl.Trainer | None,
    shuffle: bool = False,
    transforms: Transforms | None = None,
    num_workers: int | None = None,
) -> DataLoader[Any]:
    """A loader of whole batches ``(pixels, labels)``, uint8.

    Args:
        images: what there is; as bytes on the trainer's accelerator, if there is room.
        batch_size: images a batch.
        trainer: says the device and the number of processes, if there is one.
        shuffle: another order every epoch, the same for the same seed; a last batch that is not full is left out.
        transforms: those of single images.
        num_workers: processes that read; None: one a core where images are decoded or transformed, else none.
    """
    ranks, device, here = (1, 0), torch.device("cpu"), 1
    if trainer is not None:
        ranks, device, here = (
            (trainer.world_size, trainer.global_rank),
            trainer.strategy.root_device,
            trainer.num_devices,
        )
    if device.type != "cpu" and transforms is None and _fits(images, device):
        # The whole set as bytes on the accelerator: a batch is one gather there.
        images = images.to(device)
    seed = torch.initial_seed() % 2**31
    data, n_here = _Batches(images, transforms, seed), len(images)
    sampler: _Epochs | None = None
    if shuffle:
        sampler = _Epochs(data, *ranks, shuffle=True, seed=seed)
        # Workers read the first batches before Lightning says with which epoch a resumed training goes on.
        sampler.set_epoch(_epochs_behind(trainer))
        n_here = len(sampler)
    stored, work = isinstance(images.pixels, StoredPixels), transforms is not None
    if not stored and not work:
        # Workers would cost more than they bring: a batch is one indexing operation.
        num_workers = 0
    elif num_workers is None:
        num_workers = cores(here) if work or isinstance(images.pixels, DecodedPixels) else 0
    return DataLoader(
        data,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=device.type == "cuda" and images.labels.device.type == "cpu",
        drop_last=shuffle and n_here > batch_size,
        persistent_workers=shuffle and num_workers > 0,
    )
