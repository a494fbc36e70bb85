"""Data sets by way of Hugging Face's library, from files: no network."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from freqprune.errors import InputError
from freqprune.training.hub_sets import HuggingFaceData
from freqprune.training.listed import ImageFolderData
from tests.training.test_data import write_tree

datasets = pytest.importorskip("datasets", reason="pip install 'freqprune[datasets]'")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.disable_progress_bars()
    return write_tree(tmp_path / "images", per_class=8)


def by_hub(folder: Path, **settings: Any) -> HuggingFaceData:
    return HuggingFaceData("imagefolder", arguments={"data_dir": str(folder)}, **{"val_fraction": 0.25, **settings})


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_the_same_images_as_from_the_folder(cache: str, folder: Path) -> None:
    expected, found = ImageFolderData(folder, val_fraction=0.25), by_hub(folder, cache=cache)
    for split in ("train", "val", "test"):
        assert torch.equal(found.split(split).pixels[:], expected.split(split).pixels)
        assert torch.equal(found.split(split).labels, expected.split(split).labels)
    assert found.classes == ("class0", "class1")
    assert (found.mean, found.std) == (expected.mean, expected.std)


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_some_of_the_images(cache: str, folder: Path) -> None:
    whole, some = by_hub(folder, cache=cache), by_hub(folder, cache=cache, limit_train=3, limit_val=2)
    assert torch.equal(some.split("train").pixels[:], whole.split("train").pixels[:3])
    assert torch.equal(some.split("val").pixels[:], whole.split("val").pixels[:2])
    assert torch.equal(some.split("test").pixels[:], whole.split("test").pixels[:])


def test_the_part_that_is_called_test_comes_before_the_one_for_validation(folder: Path) -> None:
    for number in range(2):
        (folder / "validation" / f"class{number}").mkdir(parents=True)
        shutil.copy(folder / "train" / f"class{number}" / "00.png", folder / "validation" / f"class{number}")
    expected = ImageFolderData(folder).split("test").pixels
    assert torch.equal(by_hub(folder).split("test").pixels[:], expected)
    shutil.rmtree(folder / "test")
    assert by_hub(folder).split("test").labels.tolist() == [0, 1]


def test_labels_that_are_words(folder: Path) -> None:
    """As in a table of files and words beside the images."""
    rows = {"image": [str(folder / "test" / "class1" / f"0{i}.png") for i in range(4)], "kind": list("baba")}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    for split in ("train", "test"):
        table.to_parquet(folder / f"{split}.parquet")
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "test")}
    data = HuggingFaceData("parquet", label_column="kind", arguments={"data_files": files}, val_fraction=0.5)
    assert data.split("test").labels.tolist() == [1, 0, 1, 0]
    assert data.classes == ("a", "b")
    path = folder / "test.parquet"
    path.write_bytes(path.read_bytes()[:40])
    broken = HuggingFaceData("parquet", label_column="kind", arguments={"data_files": files}, val_fraction=0.5)
    with pytest.raises(InputError, match=r"data.path = parquet could not be loaded \((?!DatasetGenerationError)"):
        broken.setup()


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.test_split = tset is no part of imagefolder; it has train, test; did"):
        by_hub(folder, test_split="tset").setup()
    with pytest.raises(InputError, match=r"data.label_column = kind is no column; there are image, label"):
        by_hub(folder, label_column="kind").setup()
    with pytest.raises(InputError, match=r"data.path = imagefolder could not be loaded"):
        by_hub(tmp_path / "nowhere").setup()
    first = folder / "train" / "class0" / "00.png"
    first.write_bytes(first.read_bytes()[:40])
    with pytest.raises(InputError, match=r"image 0 of imagefolder \(train\) is not a readable image"):
        by_hub(folder).setup()


def test_a_class_that_is_missing_in_test(folder: Path) -> None:
    shutil.rmtree(folder / "test" / "class1")
    with pytest.raises(InputError, match=r"imagefolder \(test\)\) must be .* only one part has class1: name"):
        by_hub(folder).setup()
    meant = by_hub(folder, n_classes=2)
    assert meant.split("test").labels.tolist() == [0] * 8
    assert meant.classes == ("class0", "class1")
    with pytest.raises(InputError, match=r"data.n_classes = 3, but imagefolder has 2 classes; leave it out"):
        by_hub(folder, n_classes=3).setup()


def test_other_data_under_one_path_have_files_of_their_own(folder: Path, tmp_path: Path) -> None:
    other = write_tree(tmp_path / "others", per_class=9)
    for images, n_files in ((folder, 2), (other, 4), (folder, 4)):
        by_hub(images, cache="disk", cache_dir=tmp_path / "bytes").setup()
        assert len(list((tmp_path / "bytes").glob("*.pixels"))) == n_files


@pytest.mark.parametrize("more", [{"split": "train"}, {"streaming": True}])
def test_arguments_that_load_something_else_are_refused(more: dict[str, Any], folder: Path) -> None:
    arguments = {"data_dir": str(folder), **more}
    with pytest.raises(InputError, match=r"leave out split and streaming, and name its parts with data\.train_split"):
        HuggingFaceData("imagefolder", arguments=arguments).setup()


@pytest.mark.parametrize("labels", [[0, 1], [None, 1], [1, None], [None, None]])
def test_columns_of_several_labels_or_none_are_refused(labels: list[Any], folder: Path) -> None:
    parts = datasets.load_dataset("imagefolder", data_dir=str(folder))
    for name in ("train", "test"):
        column = [labels] * len(parts[name]) if None not in labels else labels * (len(parts[name]) // 2)
        parts[name].add_column("kinds", column).to_parquet(folder / f"{name}.parquet")
    files = {name: str(folder / f"{name}.parquet") for name in ("train", "test")}
    for more in ({}, {"n_classes": 2}):
        with pytest.raises(InputError, match=r"kinds of parquet .* holds (list|NoneType|int) as well, not one class"):
            HuggingFaceData("parquet", label_column="kinds", arguments={"data_files": files}, **more).setup()


def test_words_that_one_part_lacks_are_classes_where_that_is_meant(folder: Path) -> None:
    parts = datasets.load_dataset("imagefolder", data_dir=str(folder))
    for name, kinds in (("train", "abc"), ("test", "ab")):
        words = [kinds[number % len(kinds)] for number in range(len(parts[name]))]
        parts[name].add_column("kind", words).remove_columns("label").to_parquet(folder / f"{name}.parquet")
    files = {name: str(folder / f"{name}.parquet") for name in ("train", "test")}
    how: dict[str, Any] = {"label_column": "kind", "arguments": {"data_files": files}, "val_fraction": 0.25}
    with pytest.raises(InputError, match="only one of them has c"):
        HuggingFaceData("parquet", **how).setup()
    meant = HuggingFaceData("parquet", n_classes=3, **how)
    assert set(meant.split("test").labels.tolist()) == {0, 1}
    assert meant.classes == ("a", "b", "c")
