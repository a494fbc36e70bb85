"""Without a word in the configuration, training is what it was from the start: written out here as a plain loop."""

import math
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

from freqprune.networks.registry import build_model
from freqprune.training.classifier import Classifier
from freqprune.training.whole_sets import DigitsData

EPOCHS, BATCH, SEED = 2, 16, 3


def crop_and_flip(images: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    """Image by image, with the draws of the whole batch."""
    n, _, height, width = images.shape
    flips = torch.randint(0, 2, (n, 1), generator=generator).flatten().tolist()
    rows, columns = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator).flatten(1).tolist()
    found = []
    for image, flip, row, column in zip(images, flips, rows, columns, strict=True):
        window = F.pad(image, (padding,) * 4)[:, row : row + height, column : column + width]
        found.append(window.flip(2) if flip else window)
    return torch.stack(found)


def by_hand(data: DigitsData) -> nn.Module:
    net = build_model({"name": "resnet8", "stage_widths": [4, 4, 8]}).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    images = data.split("train")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.mean, data.std))
    steps = len(images) // BATCH
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED + epoch))
        draws = torch.Generator().manual_seed(SEED * 1_000_003 + epoch * 1_009)
        for step, chosen in enumerate(order.split(BATCH)[:steps]):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * (epoch * steps + step) / (EPOCHS * steps)))
            pixels = crop_and_flip(images.pixels[chosen], data.crop_padding, draws)
            batch = ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(net(batch), images.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


def test_defaults_train_to_the_same_bits_as_a_plain_loop(tmp_path: Path) -> None:
    data = DigitsData(limit_train=100, batch_size=BATCH)
    pl.seed_everything(SEED, verbose=False)
    expected = by_hand(data)
    pl.seed_everything(SEED, verbose=False)
    module = Classifier({"name": "resnet8", "stage_widths": [4, 4, 8]})
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
                         default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(module, datamodule=data)
    found = module.net.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in expected.state_dict().items())
