"""Two CPU processes share the images and get what one process gets."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from freqprune.errors import InputError
from freqprune.models import build_model
from freqprune.tagging import tag


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
        torch.save({"n": response.n_images, "snr": response.snr("conv1", "all"), "amplitude": deep}, f"{folder}/{average}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(one_process, (str(tmp_path),), nprocs=2)
    for average in AVERAGES:
        alone = tag(network(), images(), average=average)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{average}{rank}.pt", weights_only=True)
            assert found["n"] == 5
            torch.testing.assert_close(found["snr"], alone.snr("conv1", "all"), rtol=1e-6, atol=0, equal_nan=True)
            torch.testing.assert_close(found["amplitude"], alone.layers["layer3.0.conv2"].amplitude, rtol=1e-6, atol=1e-9)


def test_sharing_without_a_group_is_an_error() -> None:
    with pytest.raises(InputError, match="none is initialised"):
        tag(network(), images()[:1], share=True)
    with pytest.raises(InputError, match="numbers must give one number an image"):
        tag(network(), images(), numbers=[0])
