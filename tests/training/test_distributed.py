"""Two CPU processes share the images and get what one process gets."""

import csv
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from freqprune import Amount, FrequencyTagging, Recipe, TagPruning
from freqprune.errors import InputError
from freqprune.networks.registry import build_model
from freqprune.tagging.measurement import tag
from freqprune.training.classifier import Classifier
from freqprune.training.whole_sets import DigitsData
from tests.forked import in_two_processes


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model({"name": "resnet8"})


def images() -> torch.Tensor:
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(2))


AVERAGES = ("amplitude", "complex", "snr")


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    numbers = list(range(rank, 5, 2))
    for average in AVERAGES:
        response = tag(network(), images()[numbers], numbers=numbers, share=True, average=average)
        deep = response.layers["layer3.0.conv2"].amplitude
        torch.save(
            {"n": response.n_images, "snr": response.snr("conv1", "all"), "amplitude": deep},
            f"{folder}/{average}{rank}.pt",
        )
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    in_two_processes(one_process, str(tmp_path))
    for average in AVERAGES:
        alone = tag(network(), images(), average=average)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{average}{rank}.pt", weights_only=True)
            assert found["n"] == 5
            torch.testing.assert_close(found["snr"], alone.snr("conv1", "all"), rtol=1e-6, atol=0, equal_nan=True)
            torch.testing.assert_close(
                found["amplitude"], alone.layers["layer3.0.conv2"].amplitude, rtol=1e-6, atol=1e-9
            )


class Shown(pl.LightningModule):
    """Trains nothing; there to be tagged."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return 0 * self(batch[0]).sum()

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_train_start(self) -> None:
        # Batch statistics would differ between the processes; this test is about the tags.
        self.net.eval()


def trainer(devices: int, **more: Any) -> pl.Trainer:
    """One that says and keeps nothing, with processes of its own if several are asked for."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0}
    strategy = "ddp_spawn" if devices > 1 else "auto"
    return pl.Trainer(**{"accelerator": "cpu", "devices": devices, "strategy": strategy, **quiet, **more})


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True], ids=["validation images", "images of one's own"])
def test_callback_under_ddp_equals_one_process(own: bool, tmp_path: Path) -> None:
    found = []
    # An odd number, dealt out to two.
    given = {"images": images(), "n_images": 5} if own else {"n_images": 4}
    for devices in (1, 2):
        loader = DataLoader(TensorDataset(images()), batch_size=2)
        torch.set_num_threads(1)
        run = trainer(
            devices,
            max_epochs=1,
            use_distributed_sampler=True,
            limit_train_batches=1,
            limit_val_batches=0 if own else None,
            callbacks=[FrequencyTagging(network="net", folder=tmp_path / str(devices), **given)],
        )
        run.fit(Shown(), loader, DataLoader(TensorDataset(images()), batch_size=2))
        with (tmp_path / str(devices) / "importance.csv").open() as file:
            found.append(list(csv.DictReader(file)))
    assert len(found[0]) == len(found[1]) > 200
    for one, other in zip(*found, strict=True):
        assert (one["layer"], one["filter"], one["important"]) == (other["layer"], other["filter"], other["important"])
        assert float(one["snr_f1"]) == pytest.approx(float(other["snr_f1"]), rel=1e-5, nan_ok=True)


class Report(pl.Callback):
    """What a process ends with, in a file of its own."""

    def __init__(self, pruning: TagPruning, folder: Path) -> None:
        self.pruning, self.folder = pruning, folder

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights = [p.detach().clone() for p in pl_module.parameters()]
        torch.save({"kept": self.pruning.kept, "weights": weights}, self.folder / f"{trainer.global_rank}.pt")


class Trained(Shown):
    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def pruned_in_training(rank: int, folder: str, devices: int, port: int) -> None:
    """A process of a fit, as a launcher starts it."""
    if devices > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    pruning = TagPruning(Recipe(Amount(ratio=0.3), "amplitude"), [0], network="net", n_images=5)
    watching = [pruning, Report(pruning, Path(folder))]
    run = trainer(devices, strategy="ddp" if devices > 1 else "auto", max_epochs=2, callbacks=watching)
    run.fit(Trained(), DataLoader(TensorDataset(x), batch_size=2), DataLoader(TensorDataset(x), batch_size=2))


def test_processes_prune_while_they_train(tmp_path: Path) -> None:
    """Both end with the same network, and cut what one process cuts of the same network."""
    for devices in (1, 2):
        (tmp_path / str(devices)).mkdir()
    pruned_in_training(0, str(tmp_path / "1"), 1, 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    in_two_processes(pruned_in_training, str(tmp_path / "2"), 2, port)
    alone = torch.load(tmp_path / "1" / "0.pt")
    one, other = (torch.load(tmp_path / "2" / f"{rank}.pt") for rank in (0, 1))
    assert alone["kept"] == one["kept"] == other["kept"]
    assert sum(p.numel() for p in one["weights"]) < 0.9 * sum(p.numel() for p in network().parameters())
    for a, b, c in zip(one["weights"], other["weights"], alone["weights"], strict=True):
        assert torch.equal(a, b)
        assert a.shape == c.shape


def trained_together(rank: int, folder: str, port: int, ema: float) -> None:
    """A process of a training whose batch norms see other images than those of the other one."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(2)
    x, y = torch.rand(12, 3, 16, 16, generator=generator), torch.arange(12) % 10
    torch.manual_seed(0)
    classifier = Classifier({"name": "resnet8", "stage_widths": [4, 4, 8]}, lr=0.05, ema=ema)
    seen: list[torch.Tensor] = []

    class Validated(pl.Callback):
        def on_validation_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            seen.append(torch.cat([buffer.double().flatten() for buffer in module.net.buffers()]))

    run = trainer(2, strategy="ddp", max_epochs=2, use_distributed_sampler=True, callbacks=[Validated()])
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    run.fit(classifier, loader, loader)
    torch.save({"net": classifier.net.state_dict(), "seen": torch.stack(seen)}, Path(folder) / f"{rank}.pt")


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_processes_end_with_one_network(ema: float, tmp_path: Path) -> None:
    """Its batch norms too, and at every validation: the accuracy is that of the network which is saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    in_two_processes(trained_together, str(tmp_path), port, ema)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one["seen"], other["seen"])
    assert len(one["seen"]) > 2
    assert not torch.equal(one["seen"][0], one["seen"][-1])
    for key, value in one["net"].items():
        assert torch.equal(value, other["net"][key]), key


def test_a_strategy_that_splits_the_network_is_refused() -> None:
    pruning = TagPruning(Recipe(Amount(ratio=0.3), "l2"), [0], network="net")
    fake = SimpleNamespace(world_size=2, strategy=FSDPStrategy())
    with pytest.raises(InputError, match=r"FSDPStrategy keeps a part in each of 2 processes; use strategy=ddp"):
        pruning.setup(fake, Shown(), "fit")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"strategy=ddp_spawn hands weights back to a process with the old"):
        pruning.setup(trainer(2), Shown(), "fit")
    with pytest.raises(InputError, match=r"WeightAveraging .* would go on averaging the old one: use one of them"):
        pruning.setup(pl.Trainer(callbacks=[EMAWeightAveraging()], logger=False), Shown(), "fit")


def test_sharing_without_a_group_is_an_error() -> None:
    with pytest.raises(InputError, match="none is initialised"):
        tag(network(), images()[:1], share=True)
    with pytest.raises(InputError, match="numbers must give one number an image"):
        tag(network(), images(), numbers=[0])


def without_batch_statistics() -> nn.Module:
    """Batch norms see the images of one process only; group norms do not care."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 49, 10),
    )


@pytest.mark.slow
@pytest.mark.parametrize("class_weights", [None, [10.0] + [1.0] * 9])
def test_training_on_two_processes_is_that_of_one_with_the_same_global_batch(
    class_weights: list[float] | None, tmp_path: Path
) -> None:
    curves, weights = [], []
    for devices in (1, 2):
        pl.seed_everything(0, verbose=False)
        torch.set_num_threads(1)
        logger = pl.loggers.CSVLogger(tmp_path / str(devices), name="", version="")
        run = trainer(devices, max_epochs=3, logger=logger)
        data = DigitsData(batch_size=32 // devices, crop_padding=3, flip=True, limit_train=256)
        module = Classifier(without_batch_statistics(), lr=0.01, num_classes=10, class_weights=class_weights)
        run.fit(module, datamodule=data)
        with (tmp_path / str(devices) / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        curves.append([float(row["train/loss"]) for row in rows if row["train/loss"]])
        weights.append(module.net.state_dict())
    assert len(curves[0]) == 3
    assert curves[0][2] < curves[0][0]
    # Sums in another order: rounding, which later steps magnify.
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


def test_a_share_that_is_less_than_a_batch_is_trained_on() -> None:
    """Two processes and 48 images: each has 24, which is no batch of 32, and not none."""
    data = DigitsData(batch_size=32, limit_train=48)
    fake = SimpleNamespace(world_size=2, global_rank=0, num_devices=2, current_epoch=0, ckpt_path=None)
    fake.state = SimpleNamespace(fn="fit")
    fake.strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = fake  # type: ignore[assignment]
    assert [len(labels) for _, labels in data.train_dataloader()] == [24]
