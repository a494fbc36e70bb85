"""Data sets of torchvision by name, written here in the form in which they are published."""

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from freqprune.errors import InputError
from freqprune.training.torchvision_sets import SETS, DatasetListing, TorchvisionData
from freqprune.training.whole_sets import CIFAR10Data


def write_fashion_mnist(root: Path, name: str = "FashionMNIST") -> dict[str, tuple[Any, Any]]:
    """Bytes with a header of sizes, as LeCun's page describes them."""
    raw, drawn, found = root / name / "raw", np.random.default_rng(len(name)), {}
    raw.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 30)):
        pixels, labels = drawn.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())
        found[part] = pixels, labels
    return found


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_pixels_and_labels_of_a_set_in_arrays(cache: str, tmp_path: Path) -> None:
    pixels, labels = write_fashion_mnist(tmp_path)["t10k"]
    data = TorchvisionData("FashionMNIST", tmp_path, download=False, cache=cache, val_fraction=0.5)
    test = data.split("test")
    assert np.array_equal(test.pixels[:].numpy(), np.repeat(pixels[:, None], 3, axis=1))
    assert np.array_equal(test.labels.numpy(), labels)
    assert data.classes[:2] == ("T-shirt/top", "Trouser")


def test_a_package_that_a_set_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match="PCAM needs h5py: pip install h5py"):
        TorchvisionData("PCAM", tmp_path, download=False).setup()


def test_two_sets_of_one_size_in_one_folder(tmp_path: Path) -> None:
    written = {name: write_fashion_mnist(tmp_path, name)["t10k"][0] for name in ("FashionMNIST", "KMNIST")}
    held = {name: TorchvisionData(name, tmp_path, download=False, cache="disk", val_fraction=0.5) for name in written}
    for data in held.values():
        data.setup()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / ".freqprune").iterdir()}
    for name, pixels in written.items():
        again = TorchvisionData(name, tmp_path, download=False, cache="disk", val_fraction=0.5).split("test")
        for test in (held[name].split("test"), again):
            assert np.array_equal(test.pixels[:].numpy()[:, :1], pixels[:, None])
    # Neither took the other's for its own and wrote it anew.
    assert {path: path.stat().st_mtime_ns for path in files if path.suffix == ".pixels"} == {
        path: time for path, time in files.items() if path.suffix == ".pixels"
    }


def test_a_set_of_photographs_of_different_sizes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number, country in enumerate(("AD", "BE")):
            (tmp_path / "country211" / split / country).mkdir(parents=True)
            for i in range(4 if split == "train" else 3):
                size = (40 + 3 * i, 30)
                Image.new("RGB", size, (100 * number,) * 3).save(tmp_path / "country211" / split / country / f"{i}.jpg")
    data = TorchvisionData("Country211", tmp_path, download=False, image_size=16, resize=20, val_fraction=0.5)
    test = data.split("test")
    assert data.classes == ("AD", "BE")
    assert test.pixels.shape == (6, 3, 16, 16)
    # The labels go with the images.
    assert test.pixels[:, 0, 0, 0].tolist() == [100 * label for label in test.labels.tolist()]


def test_labels_of_a_set_that_does_not_hold_them(tmp_path: Path) -> None:
    pairs = [(Image.new("L", (4, 4)), number % 3) for number in range(7)]
    assert DatasetListing(pairs, "here", "pairs").labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_every_name_is_one_of_torchvision() -> None:
    assert set(SETS) <= set(datasets.__all__)


def test_no_set_is_tested_on_the_part_it_is_trained_on() -> None:
    assert [name for name, (train, test) in SETS.items() if train == test] == []


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.name must be one of CIFAR10, .* got 'cifar100'; did you mean CIFAR100"):
        TorchvisionData("cifar100", tmp_path)
    with pytest.raises(InputError, match=r"SVHN is not in data.root = .* and could not be downloaded"):
        TorchvisionData("SVHN", tmp_path, download=False).setup()
    raw = write_fashion_mnist(tmp_path)
    labels = raw["t10k"][1].clip(max=7).tobytes()
    (tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 30) + labels)
    with pytest.raises(InputError, match=r"only one part has Bag, Ankle boot: images are missing from data.root"):
        TorchvisionData("FashionMNIST", tmp_path, download=False).setup()


def test_a_root_in_the_home_folder_and_one_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for kind in (lambda: TorchvisionData("SVHN", "~/d", download=False), lambda: CIFAR10Data("~/d", download=False)):
        with pytest.raises(InputError, match=f"is not in data.root = {tmp_path / 'home' / 'd'}"):
            kind().setup()
    assert list(tmp_path.iterdir()) == []
