"""A ResNet-32 that others have trained, on CIFAR-10: its accuracy, and what tags show of it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from freqprune.networks.checkpoint import load_network
from freqprune.networks.profiling import count_macs, count_parameters
from freqprune.tagging.measurement import tag
from freqprune.training.listed import ImageFolderData

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def data(cifar10: Path) -> ImageFolderData:
    return ImageFolderData(cifar10, limit_test=1000, mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def net(public_weights: Path) -> nn.Module:
    return load_network(public_weights, {"name": "resnet32"}).net.eval()


def test_public_weights_reach_their_published_accuracy(net: nn.Module, data: ImageFolderData) -> None:
    images = data.split("test")
    with torch.inference_mode():
        answers = torch.cat([net(data.normalize(pixels)).argmax(1) for pixels in images.pixels.split(250)])
    # 92.63 % on all 10,000 images; of 1,000 drawn ones the standard error is 0.8 %.
    assert (answers == images.labels).double().mean().item() == pytest.approx(0.9263, abs=0.025)
    assert (count_macs(net, torch.zeros(1, 3, 32, 32)), count_parameters(net)) == (68_862_592, 464_154)


def test_deep_layers_combine_the_halves(net: nn.Module, data: ImageFolderData) -> None:
    response = tag(net, data.pixels("val", 4), layers="layer3.4.conv2", mean=MEAN, std=STD)
    assert response.snr("layer3.4.conv2", ["f1+f2"]).nanmedian() > 1.5


@pytest.mark.slow
def test_intermodulation_appears_with_the_first_nonlinearity(net: nn.Module, data: ImageFolderData) -> None:
    images = data.pixels("val", 20)
    before = tag(net, images, layers="conv1", where="convolution", mean=MEAN, std=STD)
    after = tag(net, images, layers="conv1", where="activation", mean=MEAN, std=STD)
    # Noise alone: 20 images leave the SNR a standard deviation of 0.58 / sqrt(20) = 0.13; 16 filters x 13 components.
    assert before.snr("conv1", "intermodulation").mean().item() == pytest.approx(1.0, abs=0.05)
    assert before.snr("conv1", "intermodulation").max() < 1.7
    assert before.snr("conv1", "fundamentals").min() > 10
    assert after.snr("conv1", ["f1+f2"]).nanmedian() > 1.7
