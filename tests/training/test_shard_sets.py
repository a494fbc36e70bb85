"""Tar files in the form of WebDataset, written here with Python's own tarfile."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from freqprune.errors import InputError
from freqprune.training.shard_sets import WebDatasetData


def add(file: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    file.addfile(header, io.BytesIO(content))


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    found = io.BytesIO()
    Image.fromarray(pixels).save(found, "png")
    return found.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, np.ndarray[Any, Any]]:
    """Two shards to train on and one to test on, ten images each; image i of each shard is of class i modulo 3."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 9, 3), dtype=np.uint8)
    for number, name in enumerate(("train-0", "train-1", "test-0")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as file:
            for i in range(10):
                # As macOS packs a file that has attributes.
                add(file, f"some/._{name}_{i}.png", b"attributes")
                add(file, f"some/._{name}_{i}.cls", b"attributes")
                add(file, f"some/{name}_{i}.json", b"{}")
                add(file, f"some/{name}_{i}.cls", str(i % 3).encode())
                add(file, f"some/{name}_{i}.png", png(pixels[10 * number + i]))
    return tmp_path, pixels


def data(folder: Path, **settings: Any) -> WebDatasetData:
    how: dict[str, Any] = {"val_fraction": 0.4, **settings}
    return WebDatasetData(str(folder / "train-*.tar"), str(folder / "test-*.tar"), **how)


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_pixels_and_labels(cache: str, shards: tuple[Path, Any]) -> None:
    folder, pixels = shards
    found = data(folder, cache=cache)
    assert np.array_equal(found.split("test").pixels[:].permute(0, 2, 3, 1).numpy(), pixels[20:])
    assert found.split("test").labels.tolist() == [i % 3 for i in range(10)]
    whole = torch.cat([found.split(name).pixels[:] for name in ("train", "val")]).flatten(1)
    expected = torch.from_numpy(pixels[:20]).permute(0, 3, 1, 2).flatten(1)
    assert torch.equal(whole.unique(dim=0), expected.unique(dim=0))
    assert found.classes == ("0", "1", "2")


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_some_of_the_samples(cache: str, shards: tuple[Path, Any]) -> None:
    whole, some = data(shards[0], cache=cache), data(shards[0], cache=cache, limit_train=3, limit_val=1, limit_test=2)
    assert torch.equal(some.split("train").pixels[:], whole.split("train").pixels[:3])
    assert torch.equal(some.split("val").pixels[:], whole.split("val").pixels[:1])
    assert torch.equal(some.split("train").labels, whole.split("train").labels[:3])
    assert len(some.split("test")) == 2


def test_bytes_lie_beside_the_first_shard_that_a_pattern_matches(shards: tuple[Path, Any]) -> None:
    folder, _ = shards
    (folder / "a1").mkdir()
    for shard in folder.glob("*.tar"):
        shard.rename(folder / "a1" / shard.name)
    WebDatasetData(
        str(folder / "a*" / "train-*.tar"), str(folder / "a*" / "test-*.tar"), cache="disk", val_fraction=0.4
    ).setup()
    assert {path.name for path in folder.iterdir()} == {"a1"}
    assert (folder / "a1" / ".freqprune").is_dir()


@pytest.mark.parametrize(("name", "first"), [("train-1", 10), ("test-0", 20)])
def test_a_shard_that_has_changed_is_read_again(name: str, first: int, shards: tuple[Path, Any]) -> None:
    folder, pixels = shards
    data(folder, cache="disk").setup()
    pixels[first : first + 10] = 255 - pixels[first : first + 10]
    with tarfile.open(folder / f"{name}.tar", "w") as file:
        for i in range(10):
            add(file, f"some/{name}_{i}.json", b"{}")
            add(file, f"some/{name}_{i}.cls", str(i % 3).encode())
            add(file, f"some/{name}_{i}.png", png(pixels[first + i]))
    os.utime(folder / f"{name}.tar", ns=(0, 1))
    found = data(folder, cache="disk")
    assert np.array_equal(found.split("test").pixels[:].permute(0, 2, 3, 1).numpy(), pixels[20:])
    whole = torch.cat([found.split(split).pixels[:] for split in ("train", "val")]).permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(whole.unique(dim=0), torch.from_numpy(pixels[:20]).flatten(1).unique(dim=0))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("odd.png", png(np.zeros((8, 9, 3), np.uint8)), r"odd in \S+test-0.tar has an image and no .cls; 1 samples"),
        ("odd.cls", b"1", r"odd in \S+ has a label and no .jpg"),
        ("some/test-0_1.jpg", b"", r"some/test-0_1 in \S+ has more than one image, such as test-0_1.jpg; say which"),
        ("v1.3.png", b"", r"v1.3.png in \S+ is no image of a sample: the name of a sample ends at its first dot"),
        ("odd.cls", b"cat", r"odd.cls in \S+ must hold the number of a class, got b'cat'"),
    ],
)
def test_samples_that_are_refused(name: str, content: bytes, message: str, shards: tuple[Path, Any]) -> None:
    with tarfile.open(shards[0] / "test-0.tar", "a") as file:
        add(file, name, content)
    with pytest.raises(InputError, match=message):
        data(shards[0]).setup()


def test_what_was_appended_again_counts(shards: tuple[Path, Any], caplog: pytest.LogCaptureFixture) -> None:
    before = data(shards[0]).split("test").labels.tolist()
    with tarfile.open(shards[0] / "test-0.tar", "a") as file:
        add(file, "some/test-0_1.cls", b"2")
    assert "twice" not in caplog.text
    assert data(shards[0]).split("test").labels.tolist() == [before[0], 2, *before[2:]] != before
    assert "test-0.tar holds 1 samples twice, such as some/test-0_1: the later of them count" in caplog.text


def test_shards_that_are_refused(shards: tuple[Path, Any]) -> None:
    folder, _ = shards
    with pytest.raises(InputError, match=r"data.train_shards = \S+ matches no file"):
        data(folder / "none").setup()
    with pytest.raises(InputError, match=r"data.n_classes = 2, but there are labels up to 2"):
        data(folder, n_classes=2).setup()
    with tarfile.open(folder / "train-0.tar", "a") as file:
        for name in ("new_0", "new_1"):
            add(file, f"{name}.png", png(np.zeros((8, 9, 3), np.uint8)))
            add(file, f"{name}.cls", b"4")
    with pytest.raises(InputError, match=r"test-0.tar\) must be of .* classes; only one part has 4: add shards"):
        data(folder).setup()
    assert data(folder, n_classes=6).split("test").labels.max() == 2
    with tarfile.open(folder / "test-0.tar", "a") as file:
        add(file, "bad.png", b"no image")
        add(file, "bad.cls", b"0")
    with pytest.raises(InputError, match=r"bad in \S+test-0.tar is not a readable image"):
        data(folder, n_classes=5).setup()
    (folder / "test-0.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(InputError, match=r"test-0.tar is no readable tar file"):
        data(folder).setup()


def test_further_images_of_a_sample_have_keys_of_their_own(shards: tuple[Path, Any]) -> None:
    with tarfile.open(shards[0] / "test-0.tar", "a") as file:
        add(file, "some/test-0_1.seg.png", png(np.zeros((8, 9, 3), np.uint8)))
    assert len(data(shards[0]).split("test")) == 10
