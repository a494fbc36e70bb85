"""The weights that come with the package."""

from pathlib import Path

import pytest
import torch

from freqprune.errors import InputError
from freqprune.networks.checkpoint import load_network, save_weights
from freqprune.networks.model_cards import cards, pretrained_path
from freqprune.networks.profiling import count_macs
from freqprune.networks.registry import build_model
from freqprune.networks.shipped import CIFAR10, CIFAR10_CLASSES, pretrained, resnet32
from freqprune.training.classifier import Classifier
from freqprune.training.listed import ImageFolderData


@pytest.mark.parametrize("name", cards())
def test_networks_by_name_are_what_their_cards_say(name: str) -> None:
    card, path = cards()[name], pretrained_path(name)
    torch.load(path, weights_only=True)
    assert path.stat().st_size < 2e6
    net = pretrained(name)
    assert not net.training
    assert sum(p.numel() for p in net.parameters()) == card.n_parameters
    assert count_macs(net, torch.zeros(1, 3, 32, 32)) == card.macs
    dense = cards()[f"{'_'.join(name.split('_')[:2])}"]
    assert card.macs_cut == pytest.approx(1 - card.macs / dense.macs, abs=5e-4)
    stored = load_network(path)
    assert stored.normalization == {"mean": pytest.approx(CIFAR10.mean), "std": pytest.approx(CIFAR10.std)}
    assert tuple(stored.classes or CIFAR10_CLASSES) == CIFAR10_CLASSES
    said = (path.parent / "README.md").read_text()
    assert f"`{name}`" in said
    assert f"{100 * card.test_accuracy:.2f} %" in said
    assert all(command in said for command in card.commands)


def test_the_files_are_those_of_the_cards() -> None:
    assert {path.stem for path in pretrained_path().parent.glob("*.pt")} == set(cards())


@pytest.fixture(scope="module")
def data(cifar10: Path) -> ImageFolderData:
    return ImageFolderData(
        root=str(cifar10), limit_train=10, limit_test=2000, val_fraction=0, mean=CIFAR10.mean, std=CIFAR10.std
    )


@pytest.mark.parametrize("name", cards())
def test_accuracy_is_what_the_card_says(name: str, data: ImageFolderData) -> None:
    stored = load_network(pretrained_path(name))
    images = data.split("test")
    with torch.inference_mode():
        right = sum(
            int((stored.net(data.normalize(pixels)).argmax(1) == labels).sum())
            for pixels, labels in zip(images.pixels.split(250), images.labels.split(250), strict=True)
        )
    expected = cards()[name].test_accuracy
    # Three standard errors of so many images.
    off = 3 * (expected * (1 - expected) / len(images.labels)) ** 0.5
    assert right / len(images.labels) == pytest.approx(expected, abs=off)


def test_what_there_is_not() -> None:
    with pytest.raises(InputError, match="no weights of 'resnet20' come with the package, only of: resnet32_cifar10"):
        pretrained("resnet20")
    with pytest.raises(InputError, match="num_classes cannot change it"):
        resnet32(pretrained=True, num_classes=5)
    assert torch.equal(resnet32(pretrained=True).linear.weight, pretrained().linear.weight)


def test_without_weights_it_is_a_network_to_train() -> None:
    assert resnet32(num_classes=5)(torch.rand(2, 3, 32, 32)).shape == (2, 5)


def test_saved_weights_hold_nothing_of_the_training(tmp_path: Path) -> None:
    import pytorch_lightning as pl

    classifier = Classifier(
        {"name": "resnet8", "num_classes": 4}, num_classes=4, normalization={"mean": [0.5] * 3, "std": [0.2] * 3},
        classes=["a", "b", "c", "d"],
    )  # fmt: skip
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(classifier)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    save_weights(tmp_path / "w.pt", tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "w.pt", weights_only=True)
    assert set(content) == {"hyper_parameters", "state_dict"}
    stored = load_network(tmp_path / "w.pt")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(stored.net.eval()(x), classifier.net.eval()(x))
    assert stored.normalization == {"mean": [0.5] * 3, "std": [0.2] * 3}
    assert stored.classes == ["a", "b", "c", "d"]
    assert build_model(dict(content["hyper_parameters"]["model"]))(x).shape == (2, 4)
