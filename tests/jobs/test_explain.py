"""``freqprune explain`` from a composed configuration: what it writes, how it reads images, what it refuses."""

import base64
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision import models

from freqprune import attribute, register_model, resnet32
from freqprune.attribution import images as images_of_attribution
from freqprune.errors import InputError
from freqprune.jobs.explain import OF_PARTS, _short, explain
from freqprune.jobs.explain_settings import Photographs, find_images
from freqprune.jobs.photographs import read_classes, read_images, read_segments
from freqprune.jobs.so_far import FOLDER
from freqprune.networks import registry
from freqprune.networks.checkpoint import save_pruned
from freqprune.networks.libraries import preprocessing
from freqprune.networks.registry import build_model
from freqprune.reports import save
from tests.conftest import ROOT
from tests.jobs.small import config
from tests.networks.test_libraries import NO_TIMM, cache, cached

__all__ = ["cache"]
FEW = ("grid=2", "forwards=32", "device=cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of scikit-learn's digits, 32 x 32, one of them in a folder of its own."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    digits = load_digits().images[:3]
    for name, digit in zip(("b.png", "a.png", "more/c.png"), digits, strict=True):
        Image.fromarray((digit * 15.9).astype(np.uint8)).resize((32, 32)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def asked(out: Path, *overrides: str) -> DictConfig:
    return config("explain", out, *FEW, *overrides, base=())


def test_explain_writes_what_it_says(images: Path, tmp_path: Path) -> None:
    found, objects = explain(asked(tmp_path, f"images={images}", "pretrained=true", "rows=3", "pairs=2"))
    names = ["1_a", "2_b", "3_c"]
    assert objects["names"] == names
    paths = [images / "a.png", images / "b.png", images / "more" / "c.png"]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1) for p in paths])
    assert torch.equal(objects["pixels"], pixels.float() / 255)
    net = resnet32(pretrained=True)
    expected = attribute(net, pixels.float() / 255, grid=2, forwards=32, mean=[0.4914, 0.4822, 0.4465],
                         std=[0.2470, 0.2435, 0.2616])  # fmt: skip
    torch.testing.assert_close(found.effects, expected.effects)
    with np.load(tmp_path / "attribution.npz") as file:
        assert file["names"].tolist() == names
        assert {*OF_PARTS, "maps", "parts", "target", "whole", "baseline", "names", "part_names", "forwards"} == {*file}
        for name in (*OF_PARTS, "maps", "parts", "target", "whole", "baseline"):
            assert np.array_equal(file[name], getattr(found, name).numpy())
        assert file["forwards"] == 32
    page = (tmp_path / "explain.html").read_text()
    # Nothing from elsewhere, every map inside.
    assert re.findall(r'(?:src|href)="(?!data:)([^"]*)"', page) == []
    shown = re.findall(r'<img src="data:image/png;base64,([^"]*)"', page)
    assert [base64.b64decode(one) for one in shown] == [(tmp_path / "maps" / f"{n}.png").read_bytes() for n in names]
    assert found.target is not None
    # Two lines at most and three numbered parts, as the table beside the map has them.
    drawn = save(found.plot(0, objects["pixels"][0], n_pairs=2, n_marked=3, alpha=0.05), tmp_path / "0.png", dpi=120)
    assert np.array_equal(np.array(Image.open(drawn)), np.array(Image.open(tmp_path / "maps" / "1_a.png")))
    kinds = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert all(f"Class {target}, {kinds[target]}: " in page for target in found.target.tolist())
    for image in range(3):
        for part in found.ranked(image):
            assert f"<td>{found.effects[image, part]:+.3g}</td>" in page
        for *_, value in found.strongest_pairs(image, 2, 0.05):
            assert f"<td>{value:+.3g}</td>" in page
    assert page.count("The other 1 part<") == 3
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["grid"] == 2


def test_parts_overlap_as_is_asked_for(images: Path, tmp_path: Path) -> None:
    given = (f"images={images / 'a.png'}", "pretrained=true", "overlap=0.7")
    found, objects = explain(asked(tmp_path, *given))
    expected = attribute(resnet32(pretrained=True), objects["pixels"], grid=2, forwards=32, overlap=0.7,
                         mean=[0.4914, 0.4822, 0.4465], std=[0.2470, 0.2435, 0.2616])  # fmt: skip
    torch.testing.assert_close(found.effects, expected.effects)


def test_some_files_a_class_and_a_mask(images: Path, tmp_path: Path) -> None:
    mask = np.full((32, 32), 255, dtype=np.uint8)
    mask[:16], mask[16:, :8] = 0, 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    np.save(tmp_path / "mask.npy", np.where(mask == 255, -1, mask.astype(np.int64)))
    (tmp_path / "classes.txt").write_text("\n".join(f"kind <{number}>" for number in range(10)))
    files = f"images=[{images / 'b.png'},{images / 'a.png'}]"
    more = (files, "pretrained=true", "target=3", f"classes={tmp_path / 'classes.txt'}", "score=probability")
    found, objects = explain(asked(tmp_path / "png", *more, f"segments={tmp_path / 'mask.png'}", "limit=1"))
    assert objects["names"] == ["1_b"]
    assert found.effects.shape == (1, 2)
    assert found.maps[0, 31, 31] == 0
    again, _ = explain(asked(tmp_path / "npy", *more, f"segments={tmp_path / 'mask.npy'}", "limit=1"))
    assert torch.equal(again.effects, found.effects)
    page = (tmp_path / "png" / "explain.html").read_text()
    assert "Class 3, kind &lt;3&gt;: probability" in page
    assert "segment 1" in page
    # What a part fades to can be an image: itself, and then nothing happens.
    still, _ = explain(asked(tmp_path / "still", files, "pretrained=true", "limit=1", f"baseline={images / 'b.png'}"))
    assert still.effects.abs().max() < 1e-5
    assert still.whole == pytest.approx(still.baseline)


def test_photographs_are_read_as_torchvision_and_timm_read_them(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (300, 420, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path = tmp_path / "one.png"
    Image.fromarray(noise.numpy()).save(path)
    for weights in (models.ResNet50_Weights.IMAGENET1K_V2, models.EfficientNet_B0_Weights.DEFAULT):
        kind = "efficientnet_b0" if "efficientnet" in weights.url else "resnet50"
        takes = preprocessing({"name": f"torchvision/{kind}", "weights": weights.name})
        assert takes is not None
        pixels = read_images([path], takes.image_size, takes.resize, takes.interpolation)
        mean, std = (torch.tensor(values)[:, None, None] for values in (takes.mean, takes.std))
        torch.testing.assert_close((pixels[0] - mean) / std, weights.transforms()(Image.open(path)))


@NO_TIMM
def test_photographs_as_timm_reads_them(tmp_path: Path) -> None:
    import timm

    noise = torch.randint(0, 256, (300, 420, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path = tmp_path / "one.png"
    Image.fromarray(noise.numpy()).save(path)
    takes = preprocessing({"name": "timm/resnet10t", "pretrained": True})
    assert takes is not None
    own = timm.data.resolve_data_config(
        pretrained_cfg=timm.get_pretrained_cfg("resnet10t").to_dict(), use_test_size=False
    )
    pixels = read_images([path], takes.image_size, takes.resize, takes.interpolation)
    mean, std = (torch.tensor(values)[:, None, None] for values in (takes.mean, takes.std))
    torch.testing.assert_close((pixels[0] - mean) / std, timm.data.create_transform(**own)(Image.open(path)))


def test_a_trained_network_of_torchvision(cache: Path, tmp_path: Path) -> None:
    net = cached(cache, "squeezenet1_1")
    noise = torch.randint(0, 256, (260, 300, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "one.png")
    named = ("model.name=torchvision/squeezenet1_1", "model.weights=DEFAULT", f"images={tmp_path / 'one.png'}")
    found, objects = explain(asked(tmp_path / "out", *named, "grid=1", "forwards=4"))
    inputs = models.SqueezeNet1_1_Weights.DEFAULT.transforms()(Image.open(tmp_path / "one.png"))[None]
    with torch.no_grad():
        answer = net(inputs)
    assert objects["pixels"].shape == (1, 3, 224, 224)
    assert found.target is not None
    assert found.target.tolist() == answer.argmax(1).tolist()
    torch.testing.assert_close(found.whole, answer.amax(1))
    label = models.SqueezeNet1_1_Weights.DEFAULT.meta["categories"][int(answer.argmax())]
    assert f"Class {int(answer.argmax())}, {label}: " in (tmp_path / "out" / "explain.html").read_text()


def test_a_checkpoint_says_what_its_inputs_are_normalised_with(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    net = build_model({"name": "resnet8"}).eval()
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.4, 0.3]
    save_pruned(tmp_path / "pruned.ckpt", net, {}, {"mean": mean, "std": std})
    found, objects = explain(asked(tmp_path / "out", f"images={images / 'a.png'}", f"ckpt={tmp_path / 'pruned.ckpt'}"))
    inputs = (objects["pixels"] - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(found.whole, net(inputs).amax(1))
    # No names of classes are known.
    assert found.target is not None
    assert f"<p>Class {int(found.target)}: logit" in (tmp_path / "out" / "explain.html").read_text()
    named = tmp_path / "named.ckpt"
    save_pruned(
        named, net, {}, {"mean": mean, "std": std}, classes=[f"kind {i}" for i in range(10)], image_size=[64, 64]
    )
    assert "was trained on images" not in caplog.text
    explain(asked(tmp_path / "named", f"images={images / 'a.png'}", f"ckpt={named}"))
    assert "was trained on images of 64 x 64 pixels, these have 32 x 32: unless that is meant" in caplog.text
    page = (tmp_path / "named" / "explain.html").read_text()
    assert f"Class {int(found.target)}, kind {int(found.target)}: " in page


def test_a_network_of_grey_images(there: Path) -> None:
    torch.manual_seed(0)
    register_model("grey", lambda num_classes=2: nn.Sequential(nn.Conv2d(1, 2, 32), nn.Flatten()))
    net = build_model({"name": "grey"})
    torch.save(net.state_dict(), "grey.pt")
    noise = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save("noise.png")
    found, objects = explain(
        asked(there / "out", "images=noise.png", "ckpt=grey.pt", "model.name=grey", "mean=[0.4]", "std=[0.2]")
    )
    # ITU-R 601, rounded to whole numbers.
    luma = (noise.double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)) / 255
    assert (objects["pixels"][0, 0] - luma).abs().max() < 1.01 / 255
    with torch.no_grad():
        torch.testing.assert_close(found.whole, net((objects["pixels"] - 0.4) / 0.2).amax(1))


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    expected = torch.from_numpy(np.array(image)[::-1, ::-1].copy()).float() / 255
    assert torch.equal(read_images([tmp_path / "turned.png"], None, None, "bilinear")[0, 1], expected)


class Draws(nn.Module):
    """Answers at random, or with NaN, or images of one size."""

    def __init__(self, nan: bool = False, num_classes: int = 2, only: int | None = None) -> None:
        super().__init__()
        self.conv, self.nan, self.only = nn.Conv2d(3, num_classes, 1), nan, only

    def forward(self, x: Tensor) -> Tensor:
        assert self.only in (None, x.shape[-1]), "another size"
        answer = self.conv(x).mean((2, 3))
        return answer * torch.nan if self.nan else answer + torch.rand(())


@pytest.fixture
def there(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with checkpoints and images to go wrong with, where the job is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))
    register_model("draws", Draws)
    net = build_model({"name": "resnet8"})
    torch.save(net.state_dict(), "plain.pt")
    torch.save(Draws().state_dict(), "draws.pt")
    Image.open(images / "a.png").save("a.png")
    Image.new("RGB", (40, 30)).save("other.png")
    Path("broken.png").write_bytes(b"no image")
    Path("empty").mkdir()
    np.save("small.npy", np.zeros((4, 4), dtype=np.int64))
    np.save("floats.npy", np.zeros((32, 32)))
    Path("three.txt").write_text("one\ntwo\nthree\n")
    return tmp_path


OURS = ["images=a.png", "pretrained=true"]
OPEN = ["images=a.png", "ckpt=draws.pt", "model.name=draws", "mean=[0,0,0]", "std=[1,1,1]"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pretrained=true"], "images is not set; give images=VALUE"),
        (["images=nowhere", "pretrained=true"], "images = nowhere does not exist; give a folder, a file"),
        (["images=empty", "pretrained=true"], "images = empty holds no image; image files end in .jpg"),
        (["images=[]", "pretrained=true"], "images names no image"),
        (["images=broken.png", "pretrained=true"], "images: broken.png is not a readable image"),
        (
            ["images=[a.png,other.png]", "ckpt=plain.pt", "model=resnet8", "mean=[0,0,0]", "std=[1,1,1]"],
            "images: other.png has 30 x 40 pixels, a.png has 32 x 32; set image_size=PIXELS",
        ),
        (["images=a.png"], "ckpt is not set: give the network to explain"),
        (["images=a.png", "model.name=torchvision/resnet18"], "ckpt is not set: give the network to explain"),
        ([*OURS, "ckpt=plain.pt"], "leave one of them out"),
        (["images=a.png", "ckpt=gone.pt"], r"ckpt = gone.pt does not exist; in that folder: .*plain.pt"),
        (["images=a.png", "ckpt=plain.pt", "model=resnet8"], "mean is not set, and the checkpoint does not say"),
        ([*OURS, "mean=[0.5,0.5,0.5]"], "mean and std come together: set both or neither"),
        ([*OPEN[:3], "mean=[0,0]", "std=[1,1]"], "mean must hold 3 values, or 1 for a network of grey images"),
        ([*OURS, "mean=[0.5,0.5,0.5]", "std=[1,1,1]"], "the network was trained with mean"),
        ([*OURS, "grid=8", "forwards=128"], "64 parts need an odd bin each: forwards must be at least 256, got 128"),
        ([*OURS, "grid=[2,2,2]"], "grid must be one number, or two along height and width"),
        ([*OURS, "grid=fine"], "grid must be a whole number or a list"),
        ([*OURS, "segments=small.npy"], r"segments must be integers of shape \(32, 32\)"),
        ([*OURS, "segments=floats.npy"], "holds float64, not whole numbers"),
        ([*OURS, "segments=three.txt"], "neither a readable .npy nor an image"),
        ([*OURS, "segments=gone.npy"], "segments = gone.npy does not exist"),
        ([*OURS, "target=10"], r"target must lie in \[0, 9\], got \[10\]"),
        ([*OURS, "classes=three.txt"], "classes = three.txt names 3 classes, the network tells 10 apart"),
        ([*OURS, "baseline=black"], "baseline must be one of mean, grey, blur or an image file, got 'black'"),
        (OPEN, "answers the same images differently from call to call"),
        ([*OPEN, "+model.nan=true"], "answers images with NaN or infinite values"),
        (
            [*OPEN, "+model.only=7"],
            r"(?s)Draws does not run on images of 3 x .*another size.*of freqprune explain: image_size",
        ),
        ([*OURS, "score=margin"], "score must be one of logit, probability, log_odds, got 'margin'"),
        ([*OURS, "half=float8"], "half must be one of float16, bfloat16, got 'float8'"),
        ([*OURS, "device=tpu"], "device = tpu cannot be used"),
        ([*OURS, "alpha=1"], "alpha must lie between 0 and 1, got 1"),
        ([*OURS, "rows=-1"], "rows must be at least 0"),
        ([*OURS, "limit=0"], "limit must be at least 1"),
        ([*OURS, "resize=40"], "resize = 40 is the shorter side out of which image_size = None is cut"),
        ([*OURS, "interpolation=nearest"], "interpolation must be one of bilinear, bicubic"),
        ([*OURS, "imports=[nothing_there]"], "there is no module 'nothing_there'"),
        ([*OURS, "+forward=12"], "forward is not a setting; did you mean forwards?"),
    ],
)
def test_bad_input(there: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        explain(asked(there / "out", *overrides))
    assert not (there / "out" / "attribution.npz").exists()


def test_every_command_and_every_piece_of_code_of_the_docs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number, digit in enumerate(load_digits().images[:2]):
        Image.fromarray((digit * 15.9).astype(np.uint8)).resize((32, 32)).save(f"photos/{number}.png")
    blocks = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "docs" / "explain.md").read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "python", "python"]
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text.replace("forwards=512", "forwards=256"), "docs/explain.md", "exec"), {})
            continue
        for line in text.strip().splitlines():
            command, job, *overrides = shlex.split(line, comments=True)
            assert (command, job) == ("freqprune", "explain")
            budget = "forwards=400" if "refine=2" in overrides else "forwards=64"
            explain(asked(tmp_path / "out", "grid=4", *overrides, "n_segments=8", budget, "limit=1"))
            assert (tmp_path / "out" / "explain.html").is_file()
    assert Path("map.png").is_file()
    assert Path("filters.png").is_file()


def test_what_is_hidden_or_drawn_by_a_run_is_no_photograph(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a.png", "outputs/explain/1/maps/1_a.png", "maps/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "outputs/explain/1/run.json").write_text("{}")
    found = find_images(Photographs(str(tmp_path), None, None, None, None, None, None))
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.png", "maps/b.png"]


def test_images_behind_links_to_folders_are_found(tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "archive" / "a.png")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "cat").symlink_to(tmp_path / "archive", target_is_directory=True)
    found = find_images(Photographs(str(tmp_path / "test"), None, None, None, None, None, None))
    assert [str(path.relative_to(tmp_path)) for path in found] == ["test/cat/a.png"]


def test_files_of_classes_and_masks_that_cannot_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.txt").write_bytes("café\nb".encode("latin-1"))
    with pytest.raises(InputError, match=r"classes = \S+ is not in UTF-8"):
        read_classes(str(tmp_path / "latin.txt"), 2)
    (tmp_path / "mark.txt").write_bytes("cat\nb".encode("utf-8-sig"))
    assert read_classes(str(tmp_path / "mark.txt"), 2) == ["cat", "b"]
    Image.new("L", (4, 4)).save(tmp_path / "mask.png")
    damaged = bytearray((tmp_path / "mask.png").read_bytes())
    damaged[40:60] = bytes(20)
    (tmp_path / "mask.png").write_bytes(damaged)
    with pytest.raises(InputError, match=r"segments = \S+ is neither a readable .npy nor an image"):
        read_segments(str(tmp_path / "mask.png"))


def test_quiet_reading_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FREQPRUNE_QUIET", "1")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    read_images([tmp_path / "a.png"] * 120, None, None, "bilinear")
    assert capfd.readouterr().out == ""


def test_networks_of_double_precision_and_names_of_any_length(images: Path, tmp_path: Path) -> None:
    net = build_model({"name": "resnet8"}).eval()
    of_mean = {"mean": [0.5] * 3, "std": [0.25] * 3}
    save_pruned(tmp_path / "double.ckpt", net.double(), {}, of_mean)
    name = "é" * 120
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{name}.png").write_bytes((images / "a.png").read_bytes())
    found, objects = explain(
        asked(tmp_path / "out", f"images={tmp_path / 'images'}", f"ckpt={tmp_path / 'double.ckpt'}")
    )
    expected = attribute(net, objects["pixels"], grid=2, forwards=32, **of_mean)
    assert torch.equal(found.effects, expected.effects)
    (figure,) = (tmp_path / "out" / "maps").iterdir()
    assert figure.stem == f"1_{name[:100]}"
    assert (tmp_path / "out" / "explain.html").is_file()


def test_what_is_refused_leaves_an_earlier_explanation(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And photographs of one's own in a folder that is called as that of the maps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maps").mkdir()
    photograph = (images / "a.png").read_bytes()
    for name in ("a", "b"):
        (tmp_path / "maps" / f"{name}.png").write_bytes(photograph)
    explain(asked(tmp_path, "images=maps/a.png", "pretrained=true"))
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {"a.png", "b.png", "1_a.png"}
    with pytest.raises(InputError, match="forwards must be at least 16, got 8"):
        explain(asked(tmp_path, "images=maps/a.png", "pretrained=true", "forwards=8"))
    assert (tmp_path / "explain.html").is_file()
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["forwards"] == 32
    # Of the one before only what it wrote.
    explain(asked(tmp_path, "images=maps/b.png", "pretrained=true"))
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {"a.png", "b.png", "1_b.png"}
    assert (tmp_path / "maps" / "a.png").read_bytes() == photograph


@pytest.mark.parametrize("left", [b"", b"PK\x03\x04"])
def test_half_a_file_of_an_earlier_explanation_is_written_anew(left: bytes, images: Path, tmp_path: Path) -> None:
    (tmp_path / "attribution.npz").write_bytes(left)
    explain(asked(tmp_path, f"images={images / 'a.png'}", "pretrained=true"))
    with np.load(tmp_path / "attribution.npz") as found:
        assert found["names"].tolist() == ["1_a"]


def test_an_explanation_that_broke_off_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    counted, fitted = [0], images_of_attribution._fitted

    def breaks_off(*args: Any) -> Any:
        counted[0] += 1
        if counted[0] == 3:
            raise KeyboardInterrupt
        return fitted(*args)

    monkeypatch.setattr(images_of_attribution, "_fitted", breaks_off)
    words = (f"images={images}", "pretrained=true", "target=3")
    with pytest.raises(KeyboardInterrupt):
        explain(asked(tmp_path / "out", *words))
    assert f"to go on: the same command with hydra.run.dir={tmp_path / 'out'}" in capfd.readouterr().out
    kept = sorted((tmp_path / "out" / FOLDER).rglob("*.*"))
    assert [path.suffix for path in kept] == [".npz"] * 2
    # Half a file is none, and what another network or score answers is something else.
    kept[0].write_bytes(kept[0].read_bytes()[:1000])
    for other in ("other", "another"):
        shutil.copytree(tmp_path / "out", tmp_path / other)
    counted[0] = 3
    found, _ = explain(asked(tmp_path / "out", *words))
    assert counted[0] == 3 + 2
    assert "going on with what an interrupted explanation has left" in capfd.readouterr().out
    whole, _ = explain(asked(tmp_path / "whole", *words))
    for name in OF_PARTS:
        assert torch.equal(getattr(found, name), getattr(whole, name))
    assert not (tmp_path / "out" / FOLDER).exists()
    counted[0] = 3
    explain(asked(tmp_path / "other", *words, "score=probability"))
    assert counted[0] == 3 + 3
    counted[0] = 3
    explain(asked(tmp_path / "another", words[0], "pretrained=resnet32_cifar10_45k", words[2]))
    assert counted[0] == 3 + 3
    assert "going on" not in capfd.readouterr().out


def test_a_run_is_no_folder_to_explain_into(images: Path, tmp_path: Path) -> None:
    for name, content in (("run.json", "{}"), ("metrics.json", '{"finished": true}')):
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"holds a run of train or prune.* hydra\.run\.dir=.*explain"):
        explain(asked(tmp_path, f"images={images}", "pretrained=true"))
    assert (tmp_path / "run.json").read_text() == "{}"


def test_names_are_cut_between_characters() -> None:
    name = _short("名" * 80)
    assert name == "名" * 66
    assert _short("a" * 200) == "a" * 200


def test_what_is_asked_for_reaches_the_attribution(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AskedError(Exception):
        pass

    seen: dict[str, object] = {}

    def asked_for(*_: object, **given: object) -> None:
        seen.update(given)
        raise AskedError

    monkeypatch.setattr("freqprune.jobs.explain.attribute_fine", asked_for)
    expected = {"refine": 1, "until": 0.5, "steepness": 2.0, "n_segments": 9, "seed": 5, "forwards": 400,
                "half": "bfloat16", "overlap": 0.3, "score": "probability", "parts": "grid"}  # fmt: skip
    words = ["grid=[2,4]", *(f"{key}={value}" for key, value in expected.items())]
    with pytest.raises(AskedError):
        explain(config("explain", tmp_path, "device=cpu", f"images={images}", "pretrained=true", *words, base=()))
    assert {key: seen[key] for key in expected} == expected
    assert seen["grid"] == (2, 4)
