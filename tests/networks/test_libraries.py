"""Trained networks of torchvision and timm, read from where the libraries cache them; the files are made here."""

import importlib.util
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision import models

from freqprune.errors import InputError
from freqprune.networks.checkpoint import load_pruned, save_pruned
from freqprune.networks.libraries import class_names, preprocessing
from freqprune.networks.registry import build_model

NO_TIMM = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which torch keeps downloads, without a network to fill it."""

    def unreachable(*args: object, **more: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def cached(cache: Path, kind: str, **arguments: object) -> nn.Module:
    """A network whose weights lie where the download of its trained ones would."""
    torch.manual_seed(0)
    net: nn.Module = models.get_model(kind, weights=None, **arguments)
    torch.save(net.state_dict(), cache / Path(models.get_model_weights(kind).DEFAULT.url).name)
    return net.eval()


@pytest.mark.parametrize(
    ("kind", "head", "arguments"),
    [
        ("resnet18", "fc", {}),
        ("squeezenet1_1", "classifier.1", {}),
        ("shufflenet_v2_x0_5", "fc", {}),
        ("googlenet", "fc", {"init_weights": False}),
        ("inception_v3", "fc", {"init_weights": False}),
    ],
)
def test_weights_of_torchvision(
    cache: Path, tmp_path: Path, kind: str, head: str, arguments: dict[str, object]
) -> None:
    dense, x = cached(cache, kind, **arguments), torch.rand(2, 3, 80, 80)
    name = f"torchvision/{kind}"
    net = build_model({"name": name, "weights": "DEFAULT"}).eval()
    if kind in ("googlenet", "inception_v3"):
        dense.transform_input = True
        # Classifiers that help in training only do not come along, nor if that is said.
        assert not any("aux" in child.lower() for child, _ in net.named_children())
        build_model({"name": name, "weights": "DEFAULT", "aux_logits": False})
    with torch.no_grad():
        torch.testing.assert_close(net(x), dense(x))
    for kept in (net, build_model({"name": name, "weights": "DEFAULT", "num_classes": 7}).eval()):
        save_pruned(tmp_path / "pruned.ckpt", kept, {})
        with torch.no_grad():
            torch.testing.assert_close(load_pruned(tmp_path / "pruned.ckpt")(x), kept(x))
    # Also of a config that asks for weights: the file has its own.
    save_pruned(tmp_path / "pruned.ckpt", net, {}, model={"name": name, "weights": "DEFAULT"})
    for file in cache.rglob("*.pth"):
        file.rename(file.with_suffix(".gone"))
    with torch.no_grad():
        torch.testing.assert_close(load_pruned(tmp_path / "pruned.ckpt")(x), net(x))
    assert kept(x).shape == (2, 7)
    assert kept.get_submodule(head).weight.shape[0] == 7
    for key, value in net.state_dict().items():
        assert key.startswith(head) or torch.equal(kept.state_dict()[key], value)


def test_networks_that_need_versions_or_have_helpers(tmp_path: Path) -> None:
    x = torch.rand(2, 3, 96, 96)
    for name, extra in (("mnasnet0_5", {}), ("googlenet", {"init_weights": False})):
        net = build_model({"name": f"torchvision/{name}", **extra}).eval()
        save_pruned(tmp_path / "pruned.ckpt", net, {})
        with torch.no_grad():
            torch.testing.assert_close(load_pruned(tmp_path / "pruned.ckpt")(x), net(x))
        assert net.train()(x).shape == (2, 1000)


def test_what_torchvision_does_not_have(cache: Path) -> None:
    name = "torchvision/resnet18"
    with pytest.raises(InputError, match=r"one of DEFAULT, IMAGENET1K_V1, got 'IMAGENET1K_V2'; did you mean"):
        build_model({"name": name, "weights": "IMAGENET1K_V2"})
    place = cache / "resnet18-f37072fd.pth"
    with pytest.raises(InputError, match=rf"no network.*download https://.*resnet18.*put the file at {place}"):
        build_model({"name": name, "weights": "DEFAULT"})
    (cache / "resnet18-f37072fd.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="could not be read"):
        build_model({"name": name, "weights": "DEFAULT"})


def test_preprocessing_of_torchvision() -> None:
    found = preprocessing({"name": "torchvision/resnet50", "weights": "IMAGENET1K_V2"})
    assert found is not None
    assert (found.image_size, found.resize, found.interpolation) == (224, 232, "bilinear")
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert preprocessing({"name": "torchvision/resnet50"}) is None
    assert preprocessing({"name": "resnet32"}) is None


def test_names_of_classes() -> None:
    config = {"name": "torchvision/resnet50", "weights": "IMAGENET1K_V2"}
    names = class_names(config)
    assert names is not None
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet tissue")
    assert class_names({**config, "num_classes": 5}) is None
    assert class_names({"name": "torchvision/resnet50"}) is None


@NO_TIMM
def test_names_of_classes_of_timm() -> None:
    names = class_names({"name": "timm/resnet10t", "pretrained": True})
    assert names is not None
    assert (len(names), names[0]) == (1000, "tench, Tinca tinca")


@NO_TIMM
def test_weights_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    from huggingface_hub import constants
    from safetensors.torch import save_file

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name = "timm/resnet10t"
    with pytest.raises(InputError, match=r"of timm/resnet10t could not be read.*run this once and copy") as refused:
        build_model({"name": name, "pretrained": True})
    # Files that git or a browser has left in the place of the weights.
    for file in ("model.safetensors", "model.bin"):
        (tmp_path / file).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 20\n")
        with pytest.raises(InputError, match="of timm/resnet10t could not be read"):
            build_model({"name": name, "pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / file)}})
    with pytest.raises(AssertionError):
        build_model({"name": name, "pretrained": True, "output_stride": 5})
    with pytest.raises(InputError, match=r"does not take these arguments: .*nonsense"):
        build_model({"name": name, "pretrained": True, "nonsense": 3})
    # With the plus that a key of the library's needs on the command line.
    assert str(refused.value).endswith(" +model.pretrained_cfg_overlay.file=FILE")
    torch.manual_seed(0)
    dense, x = timm.create_model("resnet10t").eval(), torch.rand(2, 3, 64, 64)
    folder = tmp_path / "models--timm--resnet10t.c3_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0")
    (folder / "snapshots" / "0").mkdir(parents=True)
    save_file(dense.state_dict(), folder / "snapshots" / "0" / "model.safetensors")
    for classes in (1000, 5):
        net = build_model({"name": name, "pretrained": True, "num_classes": classes}).eval()
        save_pruned(tmp_path / "pruned.ckpt", net, {})
        with torch.no_grad():
            torch.testing.assert_close(load_pruned(tmp_path / "pruned.ckpt")(x), net(x))
            assert (classes == 5) or torch.equal(net(x), dense(x))
    found = preprocessing({"name": name, "pretrained": True})
    assert found is not None
    assert (found.image_size, found.resize, found.interpolation) == (176, int(176 / 0.875), "bicubic")


@NO_TIMM
def test_what_timm_does_not_have() -> None:
    with pytest.raises(InputError, match="timm has no model 'resnet10'"):
        build_model({"name": "timm/resnet10"})
    with pytest.raises(InputError, match=r"timm has no such weights .*c3_in2k.*did you mean"):
        build_model({"name": "timm/resnet10t.c3_in2k"})


@NO_TIMM
def test_names_that_timm_has_given_up_and_networks_of_others_in_it() -> None:
    import timm

    with pytest.warns(UserWarning, match="deprecated model name gluon_resnet18_v1b"):
        assert build_model({"name": "timm/gluon_resnet18_v1b", "num_classes": 5}).num_classes == 5

    def own_in_timm(pretrained: bool = False, **arguments: Any) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, arguments.get("num_classes", 7), 3))

    own_in_timm.__module__ = "timm.models.resnet"
    timm.models.register_model(own_in_timm)
    assert build_model({"name": "timm/own_in_timm", "num_classes": 4})[0].out_channels == 4  # type: ignore[index]
    # Where its weights are is its own business.
    assert build_model({"name": "timm/own_in_timm", "num_classes": 4, "pretrained": True})[0].out_channels == 4  # type: ignore[index]


@NO_TIMM
def test_what_cannot_be_had_of_timm_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("timm")
    with pytest.raises(InputError, match=r"timm has no weights of vovnet39a; leave model\.pretrained out"):
        build_model({"name": "timm/vovnet39a", "pretrained": True})
    found = preprocessing({"name": "timm/dm_nfnet_f0", "pretrained": True})
    assert found is not None
    assert found.resize == 213
    assert "squashed to 213 x 213 pixels, of which the middle 192 x 192 is cut out" in caplog.text


def test_images_are_squashed_where_the_weights_ask_for_it() -> None:
    found = preprocessing({"name": "timm/eva02_base_patch14_448", "pretrained": True})
    assert found is not None
    assert (found.image_size, found.resize) == (448, None)
