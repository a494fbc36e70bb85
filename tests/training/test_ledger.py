"""What is kept of images on disk: read once, named where it is damaged, finished by whoever comes next."""

import errno
import mmap
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image

from freqprune.errors import InputError
from freqprune.training import caching, ledger, pixels
from freqprune.training.downloads import alone
from freqprune.training.listed import ImageFolderData
from freqprune.training.listing import Fitting
from freqprune.training.pixels import MappedPixels
from tests.training.test_caching import STORED, same


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that are decoded, as they are."""
    found: list[str] = []
    whole = Fitting.__call__

    def noted(self: Fitting, image: Image.Image) -> Any:
        found.append("")
        return whole(self, image)

    monkeypatch.setattr(Fitting, "__call__", noted)
    return found


def repaint(path: Path, grey: int) -> None:
    Image.new("RGB", (16, 16), (grey,) * 3).save(path)
    # Some file systems count time in steps that a test is shorter than.
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 1_000_000_000))


@pytest.mark.parametrize("cache", STORED)
def test_read_once_and_again_only_what_has_changed(
    cache: str, folder: Path, read: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = ImageFolderData(folder, cache=cache)
    first.setup()
    # The first image of each split is also read for its size.
    assert len(read) == 96 + 2
    del read[:]
    ImageFolderData(folder, cache=cache).setup()
    assert len(read) == 2
    repaint(folder / "test" / "class1" / "03.png", 77)
    del read[:]
    second = ImageFolderData(folder, cache=cache)
    second.setup()
    assert len(read) == 2 + 1
    assert "1 images" in caplog.text
    assert "have changed" in caplog.text
    assert (second.split("test").pixels[27] == 77).all()
    shutil.copy(folder / "train" / "class0" / "00.png", folder / "train" / "class0" / "000.png")
    same(ImageFolderData(folder, cache=cache), ImageFolderData(folder, cache="memory"))
    assert "is of other images than are there now" in caplog.text


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_corrupt_images_are_named_before_training(cache: str, folder: Path, read: list[str]) -> None:
    bad = [folder / "train" / "class1" / f"{number}.png" for number in (11, 20)]
    whole = [path.read_bytes() for path in bad]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"11.png is not a readable image(.|\n)*20.png is not a readable image"):
        ImageFolderData(folder, cache=cache).setup()
    for path, content in zip(bad, whole, strict=True):
        path.write_bytes(content)
    del read[:]
    same(ImageFolderData(folder, cache=cache), ImageFolderData(folder, cache="memory"))
    if cache == "disk":
        # Two sizes; what was corrupt; and the test images, which had not been reached; then all of them in memory.
        assert len(read) == 2 + 2 + 48 + 98


@pytest.mark.parametrize("damage", ["short", "other bytes", "header", "rows"])
def test_a_damaged_file_is_written_anew(damage: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    ImageFolderData(folder, cache="disk").setup()
    (pixels,) = (folder / ".freqprune").glob("train-*.pixels")
    match damage:
        case "short":
            os.truncate(pixels, 100)
        case "other bytes":
            pixels.write_bytes(bytes(pixels.stat().st_size))
        case "header":
            pixels.with_suffix(".json").write_text("{")
        case "rows":
            pixels.with_suffix(".rows").unlink()
    same(ImageFolderData(folder, cache="disk"), ImageFolderData(folder, cache="memory"))
    assert "or damaged: they are read anew" in caplog.text


def build(folder: Path, stop_after: int | None, log: Path) -> None:
    """In a process of its own: note every image that is read, and be killed after so many."""
    torch.set_num_threads(1)
    whole, count = Fitting.__call__, iter(range(10**6))
    ledger._BLOCK = 8

    def noted(self: Fitting, image: Image.Image) -> Any:
        if next(count) == stop_after:
            os.kill(os.getpid(), signal.SIGKILL)
        with log.open("a") as file:
            file.write(".")
        return whole(self, image)

    Fitting.__call__ = noted  # type: ignore[method-assign]
    ImageFolderData(folder, cache="disk").setup()


def test_a_build_that_was_killed_goes_on(folder: Path, tmp_path: Path, read: list[str]) -> None:
    context = multiprocessing.get_context("fork")
    killed = context.Process(target=build, args=(folder, 40, tmp_path / "log"))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    data = ImageFolderData(folder, cache="disk")
    data.setup()
    # Of 96 images at most 40 were read, some blocks of 8 of them to the end.
    assert 96 + 2 - 40 <= len(read) <= 96 + 2 - 16
    same(data, ImageFolderData(folder, cache="memory"))


def test_two_processes_build_one_cache(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=build, args=(folder, None, tmp_path / "log")) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len((tmp_path / "log").read_text()) == 96 + 2 * 2
    same(ImageFolderData(folder, cache="disk"), ImageFolderData(folder, cache="memory"))


def test_folders_that_cannot_be_written_to(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data = ImageFolderData(folder, cache="disk", cache_dir=tmp_path / "file" / "cache")
    same(data, ImageFolderData(folder, cache="memory"))
    assert "cannot be written to" in caplog.text
    assert "data.cache_dir" in caplog.text
    # What was checked is remembered at home.
    del read[:]
    ImageFolderData(folder, cache="none", cache_dir=tmp_path / "file" / "cache").setup()
    assert len(read) == 2
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    ImageFolderData(folder, cache="none", cache_dir=tmp_path / "file" / "cache").setup()
    assert "all images are read at every start" in caplog.text
    assert len(read) == 2 + 98


@pytest.mark.parametrize("error", [OSError(errno.ENOSYS, "Function not implemented"), NotImplementedError("no flock")])
def test_a_disk_without_locks(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", unsupported)
    assert isinstance(ImageFolderData(folder, cache="disk").split("train").pixels, MappedPixels)
    assert "cannot be locked" in caplog.text
    caplog.clear()
    with alone(folder):
        assert f"another process that downloads into {folder} would not be noticed" in caplog.text


def test_a_system_that_writes_at_no_place_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives no mapped pages back: Windows."""
    expected = ImageFolderData(folder, cache="memory").split("test").pixels[:]
    monkeypatch.delattr(os, "pwrite")
    monkeypatch.delattr(mmap, "MADV_DONTNEED")
    monkeypatch.setattr(pixels, "_HAND_BACK", 0)
    assert torch.equal(ImageFolderData(folder, cache="disk").split("test").pixels[:], expected)


def test_a_disk_that_is_too_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3000))
        with pytest.raises(InputError, match=r"needs 3.69e-05 GB .* for 48 images .*, 3e-06 GB are free; make room"):
            ImageFolderData(folder, cache="disk").setup()
        # Left to decide, it does without; both parts have to fit, not each by itself.
        patch.setattr(caching, "free_memory", lambda: 10)
        assert not isinstance(ImageFolderData(folder).split("val").pixels, MappedPixels)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=60_000))
        assert not isinstance(ImageFolderData(folder).split("val").pixels, MappedPixels)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # Where one of two fits, it stays.
    taken = [0]

    def once(*_: int) -> None:
        taken[0] += 1
        if taken[0] > 1:
            full()

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", once)
        patch.setattr(caching, "free_memory", lambda: 10)
        data = ImageFolderData(folder, cache_dir=folder.parent / "one")
        data.setup()
        assert len([*(folder.parent / "one").glob("*.pixels")]) == 1
        assert isinstance(data.split("train").pixels, MappedPixels) or isinstance(
            data.split("test").pixels, MappedPixels
        )
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"GB are free \(No space left on device\); make room"):
        ImageFolderData(folder, cache="disk").setup()
    assert not [*folder.rglob("*.pixels")]
    # A quota is told only as it is met: left to decide, it does without.
    monkeypatch.setattr(caching, "free_memory", lambda: 10)
    assert not isinstance(ImageFolderData(folder).split("val").pixels, MappedPixels)
    assert not [*folder.rglob("*.pixels")]
