import io
import os
import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional

from freqprune.errors import InputError
from freqprune.jobs.photographs import read_images
from freqprune.training import image_files, listing
from freqprune.training.augment import random_crop_flip
from freqprune.training.classifier import Classifier
from freqprune.training.datamodule import ImageData
from freqprune.training.downloads import alone
from freqprune.training.image_files import in_bytes, upright
from freqprune.training.listed import ImageFolderData
from freqprune.training.listing import Fitting
from freqprune.training.loading import _fits
from freqprune.training.pixels import sent
from freqprune.training.sources import Images, Source, as_folder, channel_statistics, stratified_split
from freqprune.training.whole_sets import CIFAR10Data, DigitsData, digits
from tests.forked import FORKED
from tests.jobs.small import config
from tests.training.small import trainer
from tests.training.test_defaults import crop_and_flip


def write_tree(root: Path, classes: int = 2, per_class: int = 20, size: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for c in range(classes):
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(per_class):
                Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return root


def test_image_folder_reads_pixels_exactly(tmp_path: Path) -> None:
    write_tree(tmp_path)
    data = ImageFolderData(tmp_path, val_fraction=0.25)
    data.setup()
    assert data.classes == ("class0", "class1")
    assert (len(data.split("train")), len(data.split("val")), len(data.split("test"))) == (30, 10, 40)
    with Image.open(tmp_path / "test" / "class1" / "03.png") as image:
        assert np.array_equal(data.split("test").pixels[23].permute(1, 2, 0).numpy(), np.array(image))
    assert data.split("test").labels[23] == 1


def test_hidden_copies_are_no_images(tmp_path: Path) -> None:
    write_tree(tmp_path)
    first = tmp_path / "train" / "class0" / "00.png"
    for copy, content in ((".ipynb_checkpoints/00-checkpoint.png", first.read_bytes()), ("._00.png", b"of a Mac")):
        (first.parent / copy).parent.mkdir(exist_ok=True)
        (first.parent / copy).write_bytes(content)
    (tmp_path / "train" / ".cache").mkdir()
    for split in ("train", "test"):
        (tmp_path / "none" / split / ".cache").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no images, or a class folder in it is empty: no class folder in"):
        ImageFolderData(tmp_path / "none").setup()
    with pytest.raises(InputError, match=r"data\.root must name a folder, got none"):
        ImageFolderData(None)  # type: ignore[arg-type]
    data = ImageFolderData(tmp_path, val_fraction=0.25)
    assert data.split("train").labels.bincount().tolist() == [15, 15]
    assert data.classes == ("class0", "class1")


def test_folders_named_by_the_number_of_their_class(tmp_path: Path) -> None:
    """A part of the classes, others in train than in test, one image each: such as ImageNet's validation images."""
    rng = np.random.default_rng(0)
    for split, numbers in (("train", (2, 10, 11, 40)), ("test", (3, 10))):
        for number in numbers:
            (tmp_path / split / str(number)).mkdir(parents=True)
            pixels = np.full((8, 8, 3), number, dtype=np.uint8) + rng.integers(0, 2, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / str(number) / "0.png")
    data = ImageFolderData(tmp_path, n_classes=50, val_fraction=0.25)
    assert data.split("test").labels.tolist() == [10, 3]
    for split, size in (("train", 3), ("val", 1)):
        images = data.split(split)
        assert len(images) == size
        assert images.labels.tolist() == [int(image.min()) for image in images.pixels]
    assert data.classes == tuple(str(i) for i in range(50))
    with pytest.raises(InputError, match=r"n_classes = 40 .* 0 to 39; '40' is not"):
        ImageFolderData(tmp_path, n_classes=40).setup()
    (tmp_path / "test" / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "cat" / "0.png")
    with pytest.raises(InputError, match=r"'cat' is not: rename it, or leave data.n_classes out"):
        ImageFolderData(tmp_path, n_classes=50).setup()


def test_own_statistics_are_those_of_the_training_split(tmp_path: Path) -> None:
    data = ImageFolderData(write_tree(tmp_path))
    data.setup()
    pixels = data.split("train").pixels.double() / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3), correction=0), atol=1e-6)
    assert channel_statistics(data.split("train").pixels) == (data.mean, data.std)


def test_split_is_stratified_seeded_and_disjoint() -> None:
    labels = torch.arange(5).repeat_interleave(40)
    images = Images(torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1), labels)
    rest, part = stratified_split(images, 0.25, seed=3)
    assert torch.bincount(part.labels).tolist() == [10] * 5
    assert sorted([*rest.pixels.flatten().tolist(), *part.pixels.flatten().tolist()]) == list(range(200))
    again = stratified_split(images, 0.25, seed=3)[1]
    assert torch.equal(part.pixels, again.pixels)
    assert not torch.equal(part.pixels, stratified_split(images, 0.25, seed=4)[1].pixels)
    # In random order: the first few are no single class.
    assert len(part.labels[:10].unique()) > 1


def test_the_seed_of_the_split_says_which_images_are_held_out(tmp_path: Path) -> None:
    write_tree(tmp_path)
    first, again, other = (
        ImageFolderData(tmp_path, val_fraction=0.25, split_seed=seed).split("val").pixels.flatten(1).unique(dim=0)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_digits() -> None:
    source = digits()
    assert source.train.pixels.shape[1:] == (3, 32, 32)
    assert len(source.train) + len(source.test) == 1797
    assert source.train.pixels.dtype == torch.uint8
    assert source.train.pixels.max() > 250


def test_every_image_gets_its_own_crop_and_flip() -> None:
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8)
    batch = random_crop_flip(image.expand(300, -1, -1, -1), 2, True, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(image[0, 0], (2, 2, 2, 2))
    legal = {}
    for y in range(5):
        for x in range(5):
            window = padded[y : y + 8, x : x + 8]
            legal[window.numpy().tobytes()] = legal[window.flip(1).contiguous().numpy().tobytes()] = (y, x)
    found = [legal[one[0].contiguous().numpy().tobytes()] for one in batch]
    assert len(set(found)) == 25
    assert len({one.contiguous().numpy().tobytes() for one in batch}) == 50


@pytest.mark.parametrize(("size", "padding"), [((20, 24), 5), ((70, 80), 5), ((3, 80), 5), ((70, 80), 90)])
def test_small_and_large_images_are_cut_as_one_by_one(size: tuple[int, int], padding: int) -> None:
    batch = torch.randint(0, 256, (30, 3, *size), dtype=torch.uint8)
    found = random_crop_flip(batch, padding, True, torch.Generator().manual_seed(4))
    assert torch.equal(found, crop_and_flip(batch, padding, torch.Generator().manual_seed(4)))


def test_no_augmentation_is_the_identity() -> None:
    batch = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(random_crop_flip(batch, 0, False), batch)


def test_batches_are_normalised_and_only_training_ones_augmented(tmp_path: Path) -> None:
    data = ImageFolderData(write_tree(tmp_path), mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], batch_size=8)
    pixels, labels = next(iter(data.test_dataloader()))
    assert pixels.dtype == torch.uint8
    found, same = data.on_after_batch_transfer((pixels, labels), 0)
    expected = (pixels.float() / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(3, 1, 1)
    torch.testing.assert_close(found, expected)
    assert same is labels
    # More images than a CPU takes at once.
    many = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (data.mean, data.std))
    assert torch.equal(data.normalize(many), (many.float() / 255 - mean) / std)
    assert data.normalize(many[:0]).shape == (0, 3, 224, 224)


def test_loaders_cover_each_split_once(tmp_path: Path) -> None:
    data = ImageFolderData(write_tree(tmp_path), batch_size=7)
    seen = torch.cat([labels for _, labels in data.test_dataloader()])
    assert torch.equal(seen, data.split("test").labels)
    assert all(len(labels) == 7 for _, labels in data.train_dataloader())


def test_images_go_to_an_accelerator_that_has_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    images, device = Images(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.zeros(10)), torch.device("cuda")
    for free, fits in ((4 * 1920, True), (4 * 1920 - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 0))
        assert _fits(images, device) is fits


def test_limits_and_pixels(tmp_path: Path) -> None:
    data = ImageFolderData(write_tree(tmp_path), limit_train=5, limit_test=6, val_fraction=0.5)
    assert (len(data.split("train")), len(data.split("test"))) == (5, 6)
    # Files are sorted by class: the first six are all of one.
    assert len(data.split("test").labels.unique()) == 2
    assert torch.equal(data.pixels("val", 3), data.split("val").pixels[:3].float() / 255)
    with pytest.raises(InputError, match=r"n_images must lie in \[1, 20\]"):
        data.pixels("val", 21)


def test_no_image_is_held_out_where_none_is_wanted(tmp_path: Path) -> None:
    data = ImageFolderData(write_tree(tmp_path), val_fraction=0)
    assert not data.validates
    assert len(data.split("train")) == 40
    assert len(data.split("train").labels[:10].unique()) > 1
    assert torch.equal(data.pixels("val", 5), data.pixels("train", 5))
    held_out = ImageFolderData(tmp_path, val_fraction=0.25)
    everything = torch.cat([held_out.split(name).pixels for name in ("train", "val")]).flatten(1)
    assert torch.equal(everything.unique(dim=0), data.split("train").pixels.flatten(1).unique(dim=0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "data.batch_size must be a whole number of at least 1"),
        ({"val_fraction": -0.1}, r"val_fraction must lie between 0 \(no validation\) and 1, got -0.1"),
        ({"mean": [0.5]}, "come together"),
        ({"crop_padding": -1}, "crop_padding must be a whole number of at least 0"),
        ({"limit_train": 0}, "limit_train must be a whole number of at least 1"),
        ({"mean": 0.5, "std": 0.25}, r"are lists, one number a channel, got 0.5: write \[0.5\]"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DigitsData(**settings)  # type: ignore[arg-type]


def damage(root: Path, how: str) -> None:
    if how == "nothing there":
        return
    write_tree(root, classes=1 if how == "one class" else 2)
    first = root / "train" / "class0" / "00.png"
    match how:
        case "no test":
            (root / "test").rename(root / "tset")
        case "val":
            (root / "test").rename(root / "val")
        case "pages":
            pages = [Image.new("RGB", (8, 8)) for _ in range(3)]
            pages[0].save(first.with_name("stack.tif"), save_all=True, append_images=pages[1:])
        case "empty class":
            for path in (root / "train" / "class1").iterdir():
                path.unlink()
        case "corrupt":
            first.write_bytes(first.read_bytes()[:40])
        case "text":
            first.write_text("hello")
        case "sizes":
            Image.new("RGB", (9, 8)).save(first)
        case "classes":
            (root / "test" / "class1").rename(root / "test" / "other")
        case "too few":
            for path in sorted((root / "train" / "class1").iterdir())[1:]:
                path.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nothing there", "is missing; data.root must hold"),
        ("no test", "test is missing; data.root must hold"),
        ("val", "test is missing; rename val to it, or link it; data.root must hold"),
        ("one class", r"holds one class \(class0\)"),
        ("empty class", "holds no images, or a class folder"),
        ("corrupt", r"00.png is not a readable image"),
        ("text", r"00.png is not a readable image"),
        ("sizes", "set data.image_size"),
        ("classes", "same classes; only one of them has class1, other"),
        ("pages", r"stack\.tif is not a readable image \(it holds 3 pages: save each"),
        ("too few", r"does not split the one image of class class1: one to train on .* or remove the class"),
    ],
)
def test_bad_folders(how: str, message: str, tmp_path: Path) -> None:
    damage(tmp_path, how)
    with pytest.raises(InputError, match=message):
        ImageFolderData(tmp_path).setup()


def test_too_few_images_to_hold_some_out_of_each_class() -> None:
    images = Images(torch.zeros(90, 1, 1, 1, dtype=torch.uint8), torch.arange(10).repeat(9))
    with pytest.raises(InputError, match=r"90 images of 10 classes .*\(data.val_fraction=0.12\), or none"):
        stratified_split(images, 0.1, seed=0)
    assert len(stratified_split(images, 0.12, seed=0)[1]) == 11


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        ImageFolderData(tmp_path / "none").setup()


def test_image_size_resizes(tmp_path: Path) -> None:
    damage(tmp_path, "sizes")
    data = ImageFolderData(tmp_path, image_size=16)
    assert data.split("train").pixels.shape[1:] == (3, 16, 16)


@pytest.mark.parametrize(
    ("interpolation", "how"), [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)]
)
def test_images_are_resized_as_by_pillow(interpolation: str, how: Image.Resampling) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    # The shorter side to 12, and 10 x 10 out of the middle of 18 x 12.
    cut = np.array(image.resize((18, 12), how))[1:11, 4:14]
    np.testing.assert_array_equal(Fitting(10, 12, interpolation)(image), cut)
    np.testing.assert_array_equal(Fitting(10, None, interpolation)(image), np.array(image.resize((10, 10), how)))


@pytest.mark.parametrize("size", [(420, 300), (300, 421)])
def test_photographs_are_prepared_as_by_torchvision(size: tuple[int, int]) -> None:
    """As its weights ask for: 232 / 300 of 420 are 324.8 pixels, and 324 there."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    expected = functional.center_crop(functional.resize(image, [232]), [224, 224])
    np.testing.assert_array_equal(Fitting(224, 232)(image), np.array(expected))


def test_statistics_must_fit_the_channels(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.mean must hold 3 values"):
        ImageFolderData(write_tree(tmp_path), mean=[0.5], std=[0.5]).setup()


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4], r"pixels are scaled to \[0, 1\]; divide mean and std by 255"),
        ([0.5] * 3, [0.25, 0.25, float("nan")], "std must be positive"),
        ([float("nan"), 0.5, 0.5], [0.25] * 3, r"pixels are scaled to \[0, 1\]"),
    ],
)
def test_statistics_are_of_pixels_from_0_to_1(mean: list[float], std: list[float], message: str) -> None:
    data = DigitsData(mean=mean, std=std)
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            data.setup()


def test_pixels_of_ones_own_data_are_bytes() -> None:
    class Own(ImageData):
        def load(self) -> Source:
            images = Images(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
            return Source(images, images, ("a", "b"))

    with pytest.raises(InputError, match=r"pixels of Own\.load\(\) must be uint8, got float32; multiply"):
        Own().setup()


@pytest.mark.parametrize("value", [[48, 96], 64.0, True, 0])
def test_sizes_are_whole_numbers(value: Any) -> None:
    for name in ("image_size", "resize"):
        with pytest.raises(InputError, match=rf"data\.{name} must be one whole number of pixels, at least 1"):
            Fitting(**{name: value})


def test_a_folder_of_validation_images_that_is_not_read_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tree(tmp_path)
    ImageFolderData(tmp_path).setup()
    assert "is not read" not in caplog.text
    (tmp_path / "val").mkdir()
    ImageFolderData(tmp_path).setup()
    assert f"{tmp_path / 'val'} is not read: for validation data.val_fraction" in caplog.text
    # Not where it is the test images, linked as the refusal of such a folder advises.
    caplog.clear()
    (tmp_path / "val").rmdir()
    (tmp_path / "test").rename(tmp_path / "val")
    (tmp_path / "test").symlink_to(tmp_path / "val", target_is_directory=True)
    ImageFolderData(tmp_path).setup()
    assert "is not read" not in caplog.text


def test_a_smaller_copy_is_no_page(tmp_path: Path) -> None:
    whole, copy = Image.new("RGB", (8, 8), (9, 8, 7)), Image.new("RGB", (4, 4))
    copy.encoderinfo = {"tiffinfo": {254: 1}}
    whole.save(tmp_path / "a.tif", save_all=True, append_images=[copy])
    with Image.open(tmp_path / "a.tif") as image:
        assert image.n_frames == 2
        assert np.array_equal(np.array(in_bytes(upright(image), "RGB")), np.array(whole))


def test_greys_of_twelve_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(image_files, "_dark", False)
    # A packed TIFF: black, white and a sixteenth of white, a half byte of padding behind them.
    values = (0, 4095, 256)
    bits = "".join(f"{value:012b}" for value in values) + "0000"
    data = int(bits, 2).to_bytes(5, "big")
    tags = [(256, 3), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, 1), (279, 5)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0" + data)
    with Image.open(tmp_path / "a.tif") as image:
        assert np.array(in_bytes(upright(image), "L")).tolist() == [[0, 255, 16]]
    assert not caplog.text
    for name in ("b.png", "c.png"):
        Image.fromarray(np.array([[0, 4095]], dtype=np.uint16)).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            in_bytes(upright(image), "L")
    assert caplog.text.count("has 16 bits and nothing above 4095") == 1
    assert "b.png" in caplog.text


def test_cifar10_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"could not be downloaded .* use data=image_folder"):
        CIFAR10Data(tmp_path, download=False).setup()


def test_cifar10_goes_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(self: CIFAR10, root: str, train: bool, download: bool) -> None:
        self.data = np.random.default_rng(train).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % 10 for i in range(60)]
        self.classes = [str(i) for i in range(10)]

    monkeypatch.setattr(CIFAR10, "__init__", fake)
    data = CIFAR10Data(tmp_path, val_fraction=0.5)
    test: Tensor = data.split("test").pixels
    # Sorted by class: the second image of class 0 is the eleventh of the file.
    assert np.array_equal(
        test[1].permute(1, 2, 0).numpy(),
        np.random.default_rng(False).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)[10],
    )
    assert data.split("test").labels.tolist() == [i for i in range(10) for _ in range(6)]
    assert data.mean == [0.4914, 0.4822, 0.4465]


def test_cifar10_folder(cifar10: Path) -> None:
    data = ImageFolderData(cifar10)
    data.setup()
    assert data.classes == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    counts = {name: torch.bincount(data.split(name).labels) for name in ("train", "val", "test")}
    assert all(len(c) == 10 and c.min() == c.max() for c in counts.values())
    assert counts["train"][0] == 9 * counts["val"][0]
    # The statistics of the whole set; a part of it comes close.
    np.testing.assert_allclose(data.mean, [0.4914, 0.4822, 0.4465], atol=0.02)
    np.testing.assert_allclose(data.std, [0.2470, 0.2435, 0.2616], atol=0.02)


def test_photographs_are_read_upright_as_they_are_explained(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    turned = np.zeros((6, 8, 3), np.uint8)
    turned[:3] = 255
    for file in root.rglob("*.png"):
        image = Image.fromarray(turned)
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(file, exif=exif)
    data = ImageFolderData(root)
    expected = read_images([next(root.rglob("*.png"))], None, None, "bilinear")
    assert torch.equal(data.pixels("test", 1), expected)
    assert expected.shape[-2:] == (8, 6)


@pytest.mark.parametrize("number", range(10))
def test_an_image_lies_as_its_exif_says(number: int) -> None:
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    file = io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = number
    image.save(file, "PNG", exif=exif)
    with Image.open(file) as read, Image.open(file) as again:
        np.testing.assert_array_equal(np.array(upright(read)), np.array(ImageOps.exif_transpose(again)))


def test_odd_exif_does_not_make_an_image_unreadable() -> None:
    """A resolution in words, which cannot be written again."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    file = io.BytesIO()
    Image.new("RGB", (8, 6)).save(file, "JPEG", exif=exif)
    with Image.open(file) as image:
        assert upright(image).size == (6, 8)
    with Image.open(file) as image, pytest.raises((TypeError, struct.error)):
        ImageOps.exif_transpose(image)


def test_photographs_of_other_endings_are_taken_and_files_beside_them_are_not(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    files = list(root.rglob("*.png"))
    for file in files[::2]:
        Image.open(file).convert("RGB").save(file.with_suffix(".jfif"), "JPEG")
        file.unlink()
    for name in ("figure.eps", "depth.pfm", "preview.gif", "notes.txt", "x.fits"):
        (files[0].parent / name).write_bytes(b"not of the images")
    data = ImageFolderData(root, val_fraction=0)
    assert len(data.split("train")) + len(data.split("test")) == len(files)


def test_transforms_that_leave_images_of_many_sizes_are_refused() -> None:
    data = DigitsData(
        batch_size=8, limit_train=32, transforms=[{"name": "RandomRotation", "degrees": 40, "expand": True}]
    )
    with pytest.raises(InputError, match=r"data.transforms leave images of different sizes, such as .* Resize"):
        data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)


def test_trying_transforms_leaves_the_images() -> None:
    plain, erased = DigitsData(), DigitsData(transforms=[{"name": "RandomErasing", "p": 1, "inplace": True}])
    assert torch.equal(plain.pixels("train", 4), erased.pixels("train", 4))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_batches_have_the_type_of_the_network(precision: Any, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, precision=precision)
    module = Classifier({"name": "resnet8", "stage_widths": [4, 4, 8]})
    run.fit(module, datamodule=DigitsData(limit_train=32, limit_test=20, batch_size=16, transforms=["MixUp"]))
    assert run.global_step == 2


def fetch(root: str, log: str) -> None:
    with alone(root):
        with open(log, "a") as file:
            file.write("in ")
        time.sleep(0.3)
        with open(log, "a") as file:
            file.write("out ")


def test_one_process_downloads_at_a_time(tmp_path: Path) -> None:
    both = [FORKED.Process(target=fetch, args=(str(tmp_path), str(tmp_path / "log"))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert (tmp_path / "log").read_text().split() == ["in", "out", "in", "out"]


def test_a_folder_whose_name_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = config("train", tmp_path, "data=image_folder", "data.root=2024_01_02").data.root
    with pytest.raises(InputError, match=r"data\.root = 20240102 is a number and no folder.* quote the name"):
        as_folder(given)
    (tmp_path / "20240102").mkdir()
    assert as_folder(given) == Path("20240102")
    assert as_folder(config("train", tmp_path, "data=image_folder", "data.root='2024_01_02'").data.root) == Path(
        "2024_01_02"
    )


@pytest.mark.parametrize("value", [1e3, 2.5, True])
def test_numbers_of_images_are_whole(value: object) -> None:
    with pytest.raises(InputError, match=r"data\.limit_train must be a whole number of at least 1, got"):
        DigitsData(limit_train=value)  # type: ignore[arg-type]


def test_a_device_waits_for_what_it_is_sent_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, bool] = {}

    def to(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        asked[device.type] = non_blocking
        return tensor

    monkeypatch.setattr(Tensor, "to", to)
    for kind in ("cpu", "mps", "cuda"):
        sent(torch.zeros(1), torch.device(kind))
    assert asked == {"cpu": False, "mps": False, "cuda": True}


def test_a_slow_disk_is_asked_about_many_files_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        (tmp_path / "ab"[number // 20]).mkdir(exist_ok=True)
        (tmp_path / "ab"[number // 20] / f"{number:02d}.png").write_bytes(b"x" * number)
    found = listing.FolderListing(tmp_path)
    asked, stat = set[int](), os.stat

    def slow(path: Any, *given: Any, **more: Any) -> os.stat_result:
        asked.add(threading.get_ident())
        time.sleep(0.002)
        return stat(path, *given, **more)

    monkeypatch.setattr(listing, "_ASKED", 4)
    expected = found.stamps(np.arange(40))
    assert expected[:, 0].tolist() == list(range(40))
    monkeypatch.setattr(listing.os, "stat", slow)
    assert np.array_equal(found.stamps(np.arange(40)[::-1]), expected[::-1])
    assert len(asked) > 2
