"""Images in memory, on disk and decoded as they are asked for are the same images, whatever happens on the way."""

import csv
import logging
import os
import pickle
from contextvars import Context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from PIL import Image

from freqprune import memory
from freqprune.errors import InputError
from freqprune.jobs.assembly import load_data
from freqprune.jobs.prune import prune
from freqprune.jobs.settings import read as read_settings
from freqprune.jobs.stages import Run
from freqprune.networks.registry import build_model
from freqprune.processes import expect
from freqprune.training import caching, ledger, listed
from freqprune.training.classifier import Classifier
from freqprune.training.ledger import ROW, Ledger
from freqprune.training.listed import ImageFolderData
from freqprune.training.listing import Reader
from freqprune.training.pixels import MappedPixels, StoredPixels
from freqprune.training.sources import Images
from tests.jobs.small import SMALL, config

STORED = ("disk", "none")


def same(one: ImageFolderData, other: ImageFolderData) -> None:
    for split in ("train", "val", "test"):
        a, b = one.split(split), other.split(split)
        assert a.pixels.shape == b.pixels.shape
        assert torch.equal(a.pixels[:], b.pixels[:])
        assert torch.equal(a.labels, b.labels)
    assert (one.mean, one.std) == (other.mean, other.std)


@pytest.mark.parametrize("cache", STORED)
def test_the_same_images_wherever_they_are_held(cache: str, folder: Path) -> None:
    Image.new("RGB", (30, 20), (90, 8, 200)).save(folder / "train" / "class0" / "00.png")
    how: dict[str, Any] = {"image_size": 10, "resize": 12, "interpolation": "bicubic"}
    memory, stored = (ImageFolderData(folder, cache=where, limit_train=30, **how) for where in ("memory", cache))
    same(memory, stored)
    assert isinstance(stored.split("train").pixels, StoredPixels)
    assert torch.equal(memory.pixels("val", 3), stored.pixels("val", 3))
    assert torch.equal(memory.split("test").pixels[5], stored.split("test").pixels[5])
    again = pickle.loads(pickle.dumps(stored.split("val").pixels))
    assert torch.equal(again[:], memory.split("val").pixels)


@pytest.mark.parametrize("cache", ["memory", *STORED])
@pytest.mark.parametrize("val_fraction", [0.25, 0])
def test_images_beyond_a_limit_are_not_read(
    cache: str, val_fraction: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ImageFolderData(folder, cache="memory", val_fraction=val_fraction)
    whole.setup()
    seen: set[str] = set()

    def read(self: Reader, number: int) -> Any:
        seen.add(self.listing.name(number))
        return self._read(number)

    monkeypatch.setattr(Reader, "__call__", read)
    some = ImageFolderData(folder, cache=cache, val_fraction=val_fraction, limit_train=20, limit_test=4)
    train, test = some.split("train"), some.split("test")
    assert torch.equal(train.pixels[:], whole.split("train").pixels[:20])
    assert torch.equal(train.labels, whole.split("train").labels[:20])
    assert len(test) == 4
    kept = [torch.equal(test.pixels[0], image) for image in whole.split("test").pixels]
    assert any(kept)
    n_val = len(whole.split("val")) if val_fraction else 0
    if val_fraction:
        assert torch.equal(some.split("val").pixels[:], whole.split("val").pixels)
    assert len(seen) == 20 + 4 + n_val
    # Of each of these, and of no others, it is asked whether they have changed.
    taken = {str(path) for path in folder.glob("t*/*/*.png")} - seen
    for path in sorted(taken)[:3]:
        Path(path).unlink()
        Path(path).symlink_to(folder / "nowhere")
    again = ImageFolderData(folder, cache=cache, val_fraction=val_fraction, limit_train=20, limit_test=4)
    if cache != "memory":
        assert torch.equal(again.split("train").pixels[:], train.pixels[:])
        assert len(seen) == 20 + 4 + n_val
    for path in sorted(taken)[:3]:
        Path(path).unlink()
        Image.new("RGB", (16, 16)).save(path)
    whole = ImageFolderData(folder, cache="memory", val_fraction=val_fraction)
    # Other limits are other files.
    more = ImageFolderData(folder, cache=cache, val_fraction=val_fraction, limit_train=30, limit_test=4)
    assert torch.equal(more.split("train").pixels[:], whole.split("train").pixels[:30])
    assert torch.equal(train.pixels[:], whole.split("train").pixels[:20])


@pytest.mark.parametrize("cache", STORED)
def test_a_part_without_a_limit_lies_where_it_did(cache: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ImageFolderData(folder, cache=cache)
    whole.setup()
    read: list[str] = []

    def counted(self: Reader, number: int) -> Any:
        read.append(self.listing.place)
        return self._read(number)

    monkeypatch.setattr(ledger, "read_all", lambda reader, numbers, *rest: [counted(reader, n) for n in numbers])
    for how in ({"limit_val": 3}, {"limit_val": 3, "limit_test": 4}, {"limit_train": 20}):
        read.clear()
        some = ImageFolderData(folder, cache=cache, **how)
        some.setup()
        assert len(some.split("val")) == how.get("limit_val", len(whole.split("val")))
        parts = {"limit_train": folder / "train", "limit_test": folder / "test"}
        assert {*read} <= {str(place) for key, place in parts.items() if key in how}


def test_in_memory_no_image_is_held_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, read = ImageFolderData(folder, cache="memory"), []
    whole.setup()
    monkeypatch.setattr(listed, "hold", lambda readers, *rest: read.append(readers) or caching.hold(readers, *rest))
    some = ImageFolderData(folder, cache="memory", limit_test=4)
    assert torch.equal(some.split("train").pixels[:], whole.split("train").pixels)
    assert torch.equal(some.split("val").pixels[:], whole.split("val").pixels)
    sizes = {split: len(reader) for split, reader in read[0].items()}
    assert sizes == {"train": len(whole.split("train")), "val": len(whole.split("val")), "test": 4}


def test_parts_of_another_size_are_refused(folder: Path) -> None:
    how: dict[str, Any] = {"cache": "memory", "limit_train": 1, "limit_val": 1, "limit_test": 1}
    for path in folder.glob("train/*/*.png"):
        Image.new("RGB", (16, 16)).save(path)
    listings = ImageFolderData(folder, **how).listings()
    numbers = [Images(torch.arange(len(one)), one.labels) for one in listings[:2]]
    val = ImageFolderData(folder, **how).divided(numbers[0], numbers[1], listings[2])[1]
    assert val is not None
    Image.new("RGB", (8, 16)).save(listings[0].name(int(val.pixels[:][0])))
    with pytest.raises(InputError, match=r"train images are \(16, 16\) pixels, val images \(16, 8\); set data.image"):
        ImageFolderData(folder, **how).setup()


def test_files_larger_than_memory_are_mapped(tmp_path: Path) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shape = (4096, 4096, 3)
    n_images = 4 * memory // int(np.prod(shape))
    with (tmp_path / "big").open("wb") as file:
        file.truncate(n_images * int(np.prod(shape)))
        file.seek(-1, os.SEEK_END)
        file.write(b"7")
    found = MappedPixels(tmp_path / "big", shape, Ledger(np.zeros(n_images, ROW)))[n_images - 1]
    assert (int(found.max()), int(found[2, -1, -1])) == (ord("7"), ord("7"))


@pytest.mark.parametrize("cache", ["memory", *STORED])
def test_the_middle_of_wide_images_wherever_they_are_held(cache: str, folder: Path) -> None:
    drawn = np.random.default_rng(0)
    for file in folder.rglob("*.png"):
        Image.fromarray(drawn.integers(0, 256, (16, 26, 3), dtype=np.uint8)).save(file)
    whole, middle = ImageFolderData(folder, cache="memory"), ImageFolderData(folder, cache=cache, eval_size=10)
    assert torch.equal(middle.split("val").pixels[:], whole.split("val").pixels[..., 3:13, 8:18])


def test_trained_to_the_same_bits_wherever_they_are_held(folder: Path) -> None:
    final = []
    for cache, workers in (("memory", None), ("disk", None), ("none", 2)):
        pl.seed_everything(0, verbose=False)
        data = ImageFolderData(folder, cache=cache, num_workers=workers, batch_size=8)
        module = Classifier({"name": "resnet8", "num_classes": 2, "stage_widths": [4, 4, 8]})
        run = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        run.fit(module, datamodule=data)
        final.append(module.net.state_dict())
    assert all(torch.equal(value, other[key]) for other in final[1:] for key, value in final[0].items())


def test_auto_decides_by_the_free_memory_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert (caching.free_memory() or 0) > 2**20
    size = 96 * 3 * 16 * 16
    for free, kind, chosen in ((2 * size, torch.Tensor, "memory"), (2 * size - 1, MappedPixels, "disk")):
        monkeypatch.setattr(caching, "free_memory", lambda free=free: free)
        assert isinstance(ImageFolderData(folder).split("train").pixels, kind)
        assert f"data.cache=auto: the images take 7.37e-05 GB, free memory is 0.000147 GB: data.cache={chosen}" in (
            caplog.text
        )


def test_auto_takes_little_where_the_system_does_not_say_what_is_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "free_memory", lambda: None)
    assert isinstance(ImageFolderData(folder).split("train").pixels, torch.Tensor)
    monkeypatch.setattr(caching, "_FREE_ANYWHERE", 96 * 3 * 16 * 16)
    assert isinstance(ImageFolderData(folder).split("train").pixels, MappedPixels)


def test_auto_leaves_room_for_the_processes_beside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a job that is going to start them, and of torchrun."""
    monkeypatch.setattr(caching, "free_memory", lambda: 4 * 96 * 3 * 16 * 16)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    kinds = []
    for count in (1, 2, 3):
        kinds.append(Context().run(_pixels_beside, folder, count))
    assert kinds == [torch.Tensor, torch.Tensor, MappedPixels]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert Context().run(_pixels_beside, folder, None) is MappedPixels


def _pixels_beside(folder: Path, count: int | None) -> type:
    if count is not None:
        expect(count)
    return type(ImageFolderData(folder).split("train").pixels)


@pytest.mark.parametrize(("n_images", "side"), [(3072, 256), (393_216, 16)])
def test_mapped_pages_are_handed_back(n_images: int, side: int, tmp_path: Path) -> None:
    """Of 604 MB read, in large and in small images, far less is held."""
    shape = (side, side, 3) if side == 256 else (side, side, 6)
    with (tmp_path / "big").open("wb") as file:
        file.truncate(n_images * int(np.prod(shape)))
    pixels = MappedPixels(tmp_path / "big", shape, Ledger(np.zeros(n_images, ROW)))

    def held() -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssFile"].split()[0]) * 1024

    before, most = held(), 0
    for rows in torch.randperm(n_images).split(n_images // 24):
        for some in rows.split(128)[:15]:
            assert not pixels[some].any()
        most = max(most, held() - before)
    assert most < 200 * 2**20


def test_an_image_that_goes_while_training_is_named(folder: Path) -> None:
    data = ImageFolderData(folder, cache="none", num_workers=1, batch_size=8)
    data.setup()
    (folder / "train" / "class0" / "07.png").write_text("gone")
    (folder / "train" / "class0" / "08.png").write_text("gone")
    (folder / "train" / "class0" / "09.png").write_text("gone")
    run = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)  # fmt: skip
    with pytest.raises(InputError, match=r"^\S+0[789].png is not a readable image"):
        run.fit(Classifier({"name": "resnet8", "num_classes": 2, "stage_widths": [4, 4, 8]}), datamodule=data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "dsk"}, "data.cache must be one of auto, memory, disk, none, got 'dsk'; did you mean disk"),
        ({"num_workers": -1}, "data.num_workers must be a whole number of at least 0, got -1"),
        (
            {"image_size": 0},
            "data.image_size must be one whole number of pixels, at least 1, as images become square, got 0",
        ),
        ({"interpolation": "cubic"}, "data.interpolation must be one of bilinear, bicubic, got 'cubic'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        ImageFolderData(folder, **settings)


def small(folder: Path, out: Path, cache: str) -> DictConfig:
    base = [item for item in SMALL if not item.startswith("data")]
    few = ("model.stage_widths=[4,4,8]", "data.batch_size=16", "tagging.per_class=true", "importance=snr")
    where = ("data=image_folder", f"data.root={folder}", f"data.cache={cache}")
    return config("prune", out, *where, "pruning.ratio=0.3", *few, base=base)


def test_a_cut_gets_the_same_images_wherever_they_are_held(folder: Path, tmp_path: Path) -> None:
    found = []
    for cache in ("memory", *STORED):
        settings = read_settings(small(folder, tmp_path, cache))
        run = Run(settings, load_data(settings.data), torch.device("cpu"))
        material = run._material()
        assert material.labelled is not None
        found.append((material.images, material.calibration, *material.labelled))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.slow
def test_a_network_is_tagged_cut_and_tuned_on_images_that_are_not_held(folder: Path, tmp_path: Path) -> None:
    net = build_model({"name": "resnet8", "num_classes": 2, "stage_widths": [4, 4, 8]})
    metrics, _ = prune(small(folder, tmp_path, "none"), net)
    assert metrics["finished"]
    with (tmp_path / "layers.csv").open() as file:
        assert {row["group"] for row in csv.DictReader(file)} == {"all", "class0", "class1"}


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_group_further_up_counts(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, groups = tmp_path / "own", tmp_path / "groups"
    folder = groups / ("memory/" if version == 1 else "") / "job_1" / "step_0"
    folder.mkdir(parents=True)
    limit, used, cache = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    for group, most in ((folder.parent, "1000000"), (folder, "max" if version == 2 else str(2**63))):
        (group / limit).write_text(most)
        (group / used).write_text("300000")
        (group / "memory.stat").write_text(f"anon 1\n{cache} 100000\n")
    own.write_text("4:memory:/job_1/step_0\n" if version == 1 else "0::/job_1/step_0\n")
    monkeypatch.setattr(memory, "_OWN", own)
    monkeypatch.setattr(memory, "_GROUPS", groups)
    assert memory.free_memory() == 1000000 - 300000 + 100000


def test_half_of_all_memory_counts_where_nothing_says_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS; on Windows nothing is said."""

    def nothing(_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(memory, "Path", nothing)
    assert memory.free_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    monkeypatch.delattr(os, "sysconf")
    assert memory.free_memory() is None
