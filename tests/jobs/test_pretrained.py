"""Trained networks of torchvision through the jobs, with weights made here: their pixels, their classes, what is
refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torchvision import models

from freqprune.errors import InputError
from freqprune.jobs import assembly
from freqprune.jobs.prune import prune
from freqprune.jobs.settings import read
from freqprune.jobs.train import train
from freqprune.networks import CIFAR10_CLASSES, DEFAULT, HELD_OUT, build_model
from freqprune.networks.checkpoint import Stored, load_network, load_pruned
from freqprune.training import ImageFolderData
from freqprune.training.classifier import Classifier
from tests.jobs.small import config

NAME = "torchvision/squeezenet1_1"
MODEL = ("model=auto", f"model.name={NAME}", "model.weights=DEFAULT")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of photographs of different sizes, and SqueezeNet's weights where torch looks for them."""
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.manual_seed(0)
    net = models.squeezenet1_1()
    torch.save(net.state_dict(), cache / Path(models.SqueezeNet1_1_Weights.DEFAULT.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    drawn = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 4)):
        for number, name in enumerate(("dark", "light")):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = drawn.integers(100 * number, 100 * number + 156, (40 + i, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "images"


def small(folder: Path) -> tuple[str, ...]:
    base = ("data=image_folder", f"data.root={folder}", "data.batch_size=8", "trainer=cpu", "trainer.max_epochs=1")
    quiet = ("callbacks.progress=null", "tagging.n_images=1", "latency.n_runs=1")
    return (*base, *quiet, "latency.batch_sizes=[1]", "pruning.calibration_images=32", "pruning.rounds=0", *MODEL)


def test_the_data_take_over_what_the_weights_were_trained_with(folder: Path, tmp_path: Path) -> None:
    found = assembly.data_settings(read(config("prune", tmp_path / "run", base=small(folder))))
    assert (found["image_size"], found["resize"], found["interpolation"]) == (224, 256, "bilinear")
    assert list(found["mean"]) == [0.485, 0.456, 0.406]
    own = read(config("prune", tmp_path / "run", "data.image_size=96", "data.mean=[0.5,0.5,0.5]",
                      "data.std=[0.2,0.2,0.2]", base=small(folder)))  # fmt: skip
    found = assembly.data_settings(own)
    assert (found["image_size"], found["resize"], found["mean"]) == (96, None, [0.5, 0.5, 0.5])
    pixels = ImageFolderData(folder, image_size=30, resize=40).load().test.pixels
    assert pixels.shape[2:] == (30, 30)
    path = sorted((folder / "test" / "dark").iterdir())[0]
    with Image.open(path) as image:
        middle = np.array(image)[5:35, 15:45]
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), middle)
    with pytest.raises(InputError, match=r"data.resize = 20 is the shorter side"):
        ImageFolderData(folder, image_size=30, resize=20).load()


@pytest.mark.slow
def test_trained_further_and_pruned(folder: Path, tmp_path: Path) -> None:
    few = ("data.image_size=64", "model.num_classes=2")
    train(config("train", tmp_path / "run", "pruning=none", *few, base=small(folder)))
    stored = load_network(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert stored.config == {"name": NAME, "num_classes": 2}
    assert stored.normalization["mean"] == pytest.approx([0.485, 0.456, 0.406])
    cfg = config("prune", tmp_path / "pruned", *few, "importance=l2", "pruning.ratio=0.3", "finetune.epochs=0",
                 base=small(folder))  # fmt: skip
    metrics, objects = prune(cfg)
    assert metrics["network"] == NAME
    assert json.loads((tmp_path / "pruned" / "metrics.json").read_text())["network"] == NAME
    again = load_pruned(tmp_path / "pruned" / "pruned.ckpt")
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), objects["net"].cpu()(x), rtol=1e-4, atol=1e-5)


def test_networks_of_libraries_that_are_refused(folder: Path, tmp_path: Path) -> None:
    for job, name in ((train, "train"), (prune, "prune")):
        with pytest.raises(InputError, match=r"1000 classes.* 2"):
            job(config(name, tmp_path / "run", "data.image_size=64", base=small(folder)))
    with pytest.raises(InputError, match=r"model.weights names a trained network and pretrained=true another"):
        prune(config("prune", tmp_path / "run", "pretrained=true", base=small(folder)))
    other = ("model.num_classes=2", "data.mean=[0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2]", "data.image_size=64")
    with pytest.raises(InputError, match=r"was trained with mean \[0.485"):
        prune(config("prune", tmp_path / "run", *other, base=small(folder)))


def test_classes_of_other_names_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = ImageFolderData(folder, mean=(0.5,) * 3, std=(0.2,) * 3, image_size=32, batch_size=4)
    data.setup()
    net = build_model({"name": "resnet8", "num_classes": 2}).eval()
    with pytest.raises(
        InputError, match=r"trained with mean \[0.5\], one value a channel, and the data have 3 channels"
    ):
        assembly.check_match(net, data, Stored(net, {}, normalization={"mean": [0.5], "std": [0.5]}))
    assembly.check_match(net, data, Stored(net, {}, classes=list(data.classes), image_size=[32, 32]))
    assert not caplog.records
    assembly.check_match(net, data, Stored(net, {}, image_size=[64, 64]))
    assert (
        "trained on images of 64 x 64 pixels, these have 32 x 32: unless that is meant, prepare them as in"
        in caplog.text
    )
    assembly.check_match(net, data, Stored(net, {}, classes=[data.classes[0], "other"]))
    assert (
        f"1 of 2 classes have other names than the network was trained with, the first is 'other' there and "
        f"{data.classes[1]!r} in the data" in caplog.text
    )


def test_all_that_differs_from_the_networks_own_data_is_told_at_once(folder: Path, tmp_path: Path) -> None:
    base = tuple(word for word in small(folder) if word not in MODEL)
    told = (
        r"tells 10 classes apart, the data have 2; .* data.n_classes=10 .*; the network was trained with mean \[0.4914"
    )
    with pytest.raises(InputError, match=told):
        prune(config("prune", tmp_path / "run", "pretrained=true", "data.image_size=32", "pruning=none", base=base))


def test_networks_of_the_package_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    path = assembly.pretrained_path()

    def found(name: str = "resnet32_cifar10") -> Path:
        asked.append(name)
        return path

    monkeypatch.setattr(assembly, "pretrained_path", found)
    for given in (True, "resnet32_other"):
        assert assembly.stored_network({"name": None}, None, given).config["name"] == "resnet32"
    assert asked == ["resnet32_cifar10", "resnet32_other"]


def test_images_that_a_network_of_the_package_has_seen_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = ImageFolderData(folder, mean=(0.5,) * 3, std=(0.2,) * 3, image_size=32, val_fraction=0.1)
    data.setup()

    def told(name: bool | str, **changed: object) -> str:
        caplog.clear()
        vars(data).update({"val_fraction": 0.1, "split_seed": 0, **changed})
        assembly.warn_of_seen_images(name, data)
        return caplog.text

    assert not told(True), "other classes, other images"
    data.classes = CIFAR10_CLASSES
    for name in (False, HELD_OUT):
        assert not told(name)
    assert not told(True, val_fraction=0.0)
    for name in (True, DEFAULT):
        assert "resnet32_cifar10 was trained on images that are held out for validation here" in told(name)
        assert "take pretrained=resnet32_cifar10_45k with data=cifar10" in told(name)
    # Only this tenth of them was kept from it.
    assert not told(HELD_OUT, val_fraction=0.05)
    for other in ({"val_fraction": 0.2}, {"split_seed": 1}):
        assert "resnet32_cifar10_45k was trained on images" in told(HELD_OUT, **other)


MEAN_STD = ("data.mean=[0.4914,0.4822,0.4465]", "data.std=[0.247,0.2435,0.2616]")


class BegunError(Exception):
    """What is done before the work is done."""


@pytest.mark.parametrize(("pruning", "named"), [("filters", [DEFAULT]), ("none", [])])
def test_a_cut_tells_of_them(pruning: str, named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def begun(*_: object, **__: object) -> None:
        raise BegunError

    monkeypatch.setattr(assembly, "warn_of_seen_images", lambda name, data: asked.append(name))
    monkeypatch.setattr("freqprune.jobs.prune.announce_pruning", begun)
    with pytest.raises(BegunError):
        prune(config("prune", tmp_path, f"pruning={pruning}", f"pretrained={DEFAULT}", "model=auto", *MEAN_STD))
    assert asked == named


def test_a_training_from_weights_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint says how many classes the weights tell apart, the command does not."""
    classifier = Classifier({"name": NAME, "weights": "DEFAULT"}, num_classes=1000, normalization={}, classes=[])
    saving = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    saving.strategy.connect(classifier)
    saving.save_checkpoint(tmp_path / "last.ckpt")

    def begun(*_: object, **__: object) -> None:
        raise BegunError

    monkeypatch.setattr("freqprune.jobs.train.Classifier", begun)
    monkeypatch.setattr(assembly, "with_classes", lambda given, data: dict(given))
    more = (f"ckpt_path={tmp_path / 'last.ckpt'}", "data.image_size=32")
    with pytest.raises(BegunError):
        train(config("train", tmp_path / "run", *more, base=small(folder)))
    with pytest.raises(InputError, match=r"trains a network with dropout"):
        train(config("train", tmp_path / "run", *more, "+model.dropout=0.3", base=small(folder)))
