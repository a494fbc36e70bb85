"""The weights that come with the package."""

from pathlib import Path

import pytest
import torch

from freqprune.errors import InputError
from freqprune.networks import pretrained
from freqprune.networks.checkpoint import load_network, save_weights
from freqprune.networks.pretrained import pretrained_path, resnet32
from freqprune.networks.registry import build_model
from freqprune.training.classifier import Classifier
from freqprune.training.listed import ImageFolderData


def test_weights_are_plain_tensors_of_the_network_they_name() -> None:
    path = pretrained_path("resnet32")
    content = torch.load(path, weights_only=True)
    assert content["hyper_parameters"]["model"] == {
        "name": "resnet32",
        "shortcut": "A",
        "stage_widths": [16, 32, 64],
        "num_classes": 10,
    }
    assert path.stat().st_size < 2.5e6
    net = resnet32(pretrained=True)
    assert not net.training
    assert sum(p.numel() for p in net.parameters()) == 464_154


@pytest.mark.slow
def test_pretrained_network_recognises_cifar10(cifar10: Path) -> None:
    stored = load_network(pretrained_path("resnet32"))
    assert stored.normalization is not None
    data = ImageFolderData(root=str(cifar10), **stored.normalization)
    data.setup()
    images = data.split("test")
    with torch.inference_mode():
        right = sum(
            int((stored.net.eval()(data.normalize(pixels.float() / 255)).argmax(1) == labels).sum())
            for pixels, labels in zip(images.pixels.split(500), images.labels.split(500), strict=True)
        )
    # The card says 91.5 % or more on all 10,000; a sample of 3,000 has a standard error of half a per cent.
    assert right / len(images.labels) > 0.90


def test_what_there_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no weights of 'resnet20' come with the package, only of: resnet32"):
        pretrained_path("resnet20")
    with pytest.raises(InputError, match="num_classes cannot change it"):
        resnet32(pretrained=True, num_classes=5)
    monkeypatch.setattr(pretrained, "__file__", str(tmp_path / "pretrained.py"))
    with pytest.raises(InputError, match="only of: none"):
        pretrained_path("resnet32")


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
