import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import freqprune
from freqprune.errors import InputError
from freqprune.jobs.assembly import with_classes
from freqprune.networks.checkpoint import load_network, load_pruned, save_pruned
from freqprune.networks.files import read
from freqprune.networks.libraries import rebuilt_from
from freqprune.networks.registry import build_model, register_model
from freqprune.networks.resnet import IndexShortcut
from freqprune.pruning.surgery import Plan
from freqprune.training.whole_sets import DigitsData
from tests.counting import Counts

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CLASSES = [f"kind {i}" for i in range(10)]


@pytest.fixture
def pruned(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    net = build_model({"name": "resnet8"}).eval()
    kept = {"layer1.0.conv1": torch.tensor([0, 3, 7]), "layer3.0.conv1": torch.arange(5)}
    small = Plan(net, X).apply(kept)
    save_pruned(
        tmp_path / "pruned.ckpt",
        small,
        kept,
        {"mean": [0.5] * 3, "std": [0.2] * 3},
        classes=CLASSES,
        image_size=X.shape[2:],
    )
    return tmp_path / "pruned.ckpt", small


def test_rebuilds_in_a_fresh_process(pruned: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    path, net = pruned
    torch.save({"x": X, "y": net(X).detach()}, tmp_path / "io.pt")
    code = (
        "import sys, torch, freqprune; torch.set_num_threads(1)\n"
        "io = torch.load(sys.argv[2], weights_only=True); net = freqprune.load_pruned(sys.argv[1])\n"
        "assert not net.training; torch.testing.assert_close(net(io['x']), io['y'], rtol=0, atol=1e-6); print('equal')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "io.pt")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr


def test_pruned_checkpoint_is_plain(pruned: tuple[Path, torch.nn.Module]) -> None:
    content = torch.load(pruned[0], weights_only=True)
    assert content["kept"] == {"layer1.0.conv1": [0, 3, 7], "layer3.0.conv1": [0, 1, 2, 3, 4]}
    assert content["model"]["widths"] == {"layer1.0.conv1": 3, "layer3.0.conv1": 5}
    stored = load_network(pruned[0])
    assert stored.normalization == {"mean": [0.5] * 3, "std": [0.2] * 3}
    assert stored.classes == CLASSES
    assert stored.other_size(32, 32) == ""
    assert stored.other_size(32, 48) == "the network was trained on images of 32 x 32 pixels, these have 32 x 48"
    assert os.listdir(pruned[0].parent) == ["pruned.ckpt"]


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_plain_state_dicts(prefix: str, tmp_path: Path) -> None:
    net = build_model({"name": "resnet8"}).eval()
    torch.save({f"{prefix}{k}": v for k, v in net.state_dict().items()}, tmp_path / "w.pt")
    found = load_network(tmp_path / "w.pt", {"name": "resnet8"}).net
    assert torch.equal(found(X), net(X))
    torch.save({"state_dict": {f"{prefix}{k}": v for k, v in net.state_dict().items()}}, tmp_path / "w.pt")
    assert torch.equal(load_network(tmp_path / "w.pt", {"name": "resnet8"}).net(X), net(X))


class Wrapper(nn.Module):
    """A network whose only child has the name that wrappers use."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.model = nn.Conv2d(3, num_classes, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_plain_state_dicts_of_wrappers(prefix: str, tmp_path: Path) -> None:
    register_model("wrapper", Wrapper)
    net = Wrapper()
    torch.save({f"{prefix}{k}": v for k, v in net.state_dict().items()}, tmp_path / "w.pt")
    assert torch.equal(load_network(tmp_path / "w.pt", {"name": "wrapper"}).net(X), net(X))


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": Harmful()}, "bad.ckpt")
    Path("raw.ckpt").write_bytes(pickle.dumps(Harmful()))
    for name in ("bad.ckpt", "raw.ckpt"):
        with pytest.raises(InputError, match=r"pickled Python objects|no PyTorch checkpoint"):
            read(name)
    with pytest.raises(InputError, match="holds pickled Python objects"):
        read("bad.ckpt")
    assert not Path("executed").exists()


@pytest.mark.parametrize("keep", [0, 10, 1000, 0.5, 0.99])
def test_truncated(keep: float, pruned: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    whole = pruned[0].read_bytes()
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    with pytest.raises(InputError, match=r"truncated|damaged"):
        read(cut)


def test_missing_names_what_is_there(pruned: tuple[Path, torch.nn.Module]) -> None:
    with pytest.raises(InputError, match=r"does not exist; in that folder: .*pruned.ckpt"):
        read(pruned[0].with_name("last.ckpt"))


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_text("hello")
    with pytest.raises(InputError, match="no PyTorch checkpoint"):
        read(tmp_path / "x.ckpt")
    torch.save(torch.ones(3), tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="holds a Tensor"):
        read(tmp_path / "x.ckpt")


def test_another_architecture(pruned: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    torch.save(build_model({"name": "resnet8"}).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"does not fit resnet14 .*missing"):
        load_network(tmp_path / "w.pt", {"name": "resnet14"})
    with pytest.raises(InputError, match=r"of another shape, e.g. linear.weight is \(10, 64\), expected \(7, 64\)"):
        load_network(tmp_path / "w.pt", {"name": "resnet8", "num_classes": 7})
    with pytest.raises(InputError, match="say which with model=resnet32"):
        load_network(tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"holds a resnet8, but model.name = resnet20; use model=resnet8"):
        load_network(pruned[0], {"name": "resnet20"})
    with pytest.raises(InputError, match=r"not a pruned.ckpt"):
        load_pruned(tmp_path / "w.pt")


def test_what_a_model_says_of_a_file_that_names_its_network_must_hold(pruned: tuple[Path, torch.nn.Module]) -> None:
    agreeing = {"name": "resnet8", "num_classes": 10, "shortcut": None, "not in the file": 1}
    assert torch.equal(load_network(pruned[0], agreeing).net(X), pruned[1](X))
    for key, held, said in (("num_classes", 10, 7), ("shortcut", "A", "B")):
        with pytest.raises(InputError, match=rf"holds a resnet8 with {key} = {held}, but model\.{key} = {said}; leave"):
            load_network(pruned[0], {"name": "resnet8", key: said})


def test_networks_without_a_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no config to rebuild it from"):
        save_pruned(tmp_path / "p.ckpt", torch.nn.Linear(2, 2), {})


def test_every_public_name_resolves() -> None:
    assert all(getattr(freqprune, name) is not None for name in freqprune.__all__)
    with pytest.raises(AttributeError, match="nope"):
        _ = freqprune.nope


def test_no_damage_ends_in_anything_but_a_message(pruned: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    import random

    torch.save({"a": torch.arange(4), "b": [1, "x", {"y": 2.0}]}, tmp_path / "small.pt")
    refused = 0
    for whole in ((tmp_path / "small.pt").read_bytes(), pruned[0].read_bytes()):
        for seed in range(150):
            draw = random.Random(seed)
            damaged = bytearray(whole)
            for _ in range(draw.choice([1, 5, 50])):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            (tmp_path / "damaged.ckpt").write_bytes(damaged)
            try:
                read(tmp_path / "damaged.ckpt")
            except InputError:
                refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}, "hyper_parameters": {"model": "resnet8"}}, "does not name its network; say which with"),
        ({"state_dict": 3, "hyper_parameters": {}}, "state_dict is a int, expected a dict"),
        ({"format": "freqprune.pruned/1", "model": {}}, "is incomplete: it has no state_dict, kept, normalization"),
        ({"state_dict": {}, "hyper_parameters": {}}, "does not name its network"),
    ],
)
def test_foreign_files(content: dict[str, object], message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=message):
        load_network(tmp_path / "x.ckpt")


class Odd(nn.Module):
    """Layers that a cut changes and whose sizes are said by other tensors than a weight, or by none."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.stem, self.bare = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.conv1, self.norm = nn.Conv2d(8, 6, 3, padding=1), nn.InstanceNorm2d(6, affine=True)
        self.act, self.conv2 = nn.PReLU(6), nn.Conv2d(6, 8, 3, padding=1)
        self.batch = nn.BatchNorm2d(8, track_running_stats=False)
        self.shortcut, self.head = IndexShortcut(range(8), 8, 1), nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bare(self.stem(x)))
        y = self.batch(self.conv2(self.act(self.norm(self.conv1(x)))))
        return self.head(torch.relu(y + self.shortcut(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_every_layer_that_a_cut_changes_is_rebuilt(tmp_path: Path) -> None:
    register_model("odd", Odd)
    x = torch.rand(2, 3, 8, 8)
    net = build_model({"name": "odd"}).train()
    for _ in range(3):
        net(x)
    plan = Plan(net.eval(), x)
    units = plan.choose(streams=True)
    assert "conv1" in units
    stream = next(unit for unit in units if unit != "conv1")
    kept = {"conv1": torch.tensor([0, 2, 5]), stream: torch.tensor([1, 4, 6, 7])}
    small = plan.apply(kept)
    save_pruned(tmp_path / "pruned.ckpt", small, kept)
    again = load_pruned(tmp_path / "pruned.ckpt")
    assert again.act.num_parameters == 3
    assert again.shortcut.index.tolist() == small.shortcut.index.tolist()
    with torch.no_grad():
        torch.testing.assert_close(again(x), small(x))


class Slopes(nn.Module):
    """Attention with a number a head that no state dict holds (ALiBi)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, 5.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT + self.slopes[:, None, None]).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_buffers_that_no_state_dict_holds_are_kept(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self, num_classes: int = 3) -> None:
            super().__init__()
            self.patches, self.a, self.head = nn.Conv2d(3, 8, 4, 4), Slopes(), nn.Linear(8, num_classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(self.patches(x).flatten(2).mT).mean(1))  # type: ignore[no-any-return]

    register_model("slopes", Net)
    net, x = build_model({"name": "slopes"}).eval(), torch.rand(2, 3, 16, 16)
    small = Plan(net, x[:1]).apply({"a.qkv": torch.tensor([2, 3])})
    save_pruned(tmp_path / "p.ckpt", small, {"a.qkv": [2, 3]}, model={"name": "slopes"})
    again = load_pruned(tmp_path / "p.ckpt")
    assert torch.equal(again.get_buffer("a.slopes"), small.get_buffer("a.slopes"))
    assert torch.equal(again(x), small(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_pruned_network_keeps_its_type_but_takes_float_images(dtype: torch.dtype, tmp_path: Path) -> None:
    net = build_model({"name": "resnet8"}).to(dtype)
    save_pruned(tmp_path / "p.ckpt", net, {})
    again, expected = load_pruned(tmp_path / "p.ckpt"), torch.promote_types(dtype, torch.float32)
    assert {v.dtype for v in again.state_dict().values() if v.is_floating_point()} == {expected}
    assert again(torch.rand(1, 3, 16, 16, dtype=expected)).isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), net.parameters(), strict=True))


def test_a_network_whose_only_child_is_called_model_is_read(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self, num_classes: int = 10) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 10))

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)  # type: ignore[no-any-return]

    register_model("wrapped", Wrapped)
    net = build_model({"name": "wrapped"})
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"model": {"name": "wrapped"}}}, tmp_path / "last.ckpt")
    again = load_network(tmp_path / "last.ckpt").net
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), net.parameters(), strict=True))


@pytest.mark.parametrize("prefix", ["model.", "net._orig_mod.", "_orig_mod.", "net."])
def test_checkpoints_of_other_modules_and_of_compiled_networks(prefix: str, tmp_path: Path) -> None:
    net = build_model({"name": "resnet8"})
    state = {f"{prefix}{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"lr": 0.1}}, tmp_path / "l.ckpt")
    stored = load_network(tmp_path / "l.ckpt", {"name": "resnet8"})
    assert torch.equal(stored.net.get_parameter("conv1.weight"), net.get_parameter("conv1.weight"))


def test_compiled_networks_are_saved_as_they_are(tmp_path: Path) -> None:
    save_pruned(tmp_path / "p.ckpt", cast(nn.Module, torch.compile(build_model({"name": "resnet8"}))), {})
    assert load_pruned(tmp_path / "p.ckpt").get_parameter("conv1.weight").shape == (16, 3, 3, 3)


@pytest.mark.parametrize("what", ["stem", "pool", "activation", "kernel", "setting"])
def test_networks_that_their_config_does_not_build_are_not_saved(what: str, tmp_path: Path) -> None:
    net = build_model({"name": "torchvision/resnet18", "num_classes": 10}).eval()
    if what == "stem":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    elif what == "kernel":
        net.conv1 = nn.Conv2d(3, 64, 3, padding=3, stride=2, bias=False)
    elif what == "setting":
        # Average pooling of another size, which only other images tell.
        net.avgpool = nn.AdaptiveAvgPool2d(2)
        net.layer4[1].relu = nn.LeakyReLU(0.1)  # type: ignore[index, union-attr]
    elif what == "pool":
        net.maxpool = nn.Identity()
    else:
        net.layer1[0].relu = nn.Identity()  # type: ignore[index, union-attr]
    with pytest.raises(InputError, match=r"conv1|maxpool|layer1\.0\.relu|avgpool"):
        save_pruned(tmp_path / "p.ckpt", net, {})
    assert not (tmp_path / "p.ckpt").exists()


def test_settings_that_no_tensor_holds_are_compared(tmp_path: Path) -> None:
    class Maps(nn.Module):
        def __init__(self, num_classes: int = 4, align: bool = False, heads: int = 2) -> None:
            super().__init__()
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=align)
            self.conv, self.attention = nn.Conv2d(3, 8, 1), nn.MultiheadAttention(8, heads, batch_first=True)
            self.head = nn.Linear(8, num_classes)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(self.up(x)).flatten(2).mT
            return self.head(self.attention(x, x, x)[0].mean(1))  # type: ignore[no-any-return]

    register_model("maps", Maps)
    for given, where in (({"align": True}, "up"), ({"heads": 4}, "attention")):
        net = build_model({"name": "maps", **given})
        with pytest.raises(InputError, match=where):
            save_pruned(tmp_path / "p.ckpt", net, {}, model={"name": "maps"})
        save_pruned(tmp_path / "p.ckpt", net, {}, model={"name": "maps", **given})
        x = torch.rand(1, 3, 8, 8)
        torch.testing.assert_close(load_pruned(tmp_path / "p.ckpt")(x), net.eval()(x))


def test_a_dropout_that_was_taken_out_changes_no_answer(tmp_path: Path) -> None:
    net = build_model({"name": "torchvision/mobilenet_v2", "num_classes": 4}).eval()
    net.classifier[0] = nn.Identity()  # type: ignore[index, operator]
    save_pruned(tmp_path / "p.ckpt", net, {})
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(load_pruned(tmp_path / "p.ckpt")(x), net(x))


def test_children_that_are_called_as_settings_are_none(tmp_path: Path) -> None:
    class Padded(nn.Module):
        def __init__(self, num_classes: int = 4, drop: bool = False) -> None:
            super().__init__()
            self.padding, self.conv = nn.ZeroPad2d(1), nn.Conv2d(3, num_classes, 3)
            self.stride, self.path = torch.tensor([8.0, 16.0]), nn.Dropout(0.5) if drop else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.path(self.conv(self.padding(x))).mean((2, 3))  # type: ignore[no-any-return]

    register_model("padded", Padded)
    # Trained with a dropout that its config does not have.
    net = Padded(drop=True).eval()
    save_pruned(tmp_path / "p.ckpt", net, {}, model={"name": "padded"})
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(load_pruned(tmp_path / "p.ckpt")(x), net(x))


def test_arguments_that_our_own_networks_cannot_take_are_said_in_words() -> None:
    with pytest.raises(InputError, match="model 'resnet8' does not take these arguments"):
        build_model({"name": "resnet8", "stage_widths": 16})


@pytest.mark.parametrize(
    "said",
    [
        {"blocks": {"depth": 4}},
        {"blocks": {"stage1": [64, 64]}},
        {"blocks": {"stage1": ["a"]}},
        {"normalization": {"mean": 0.1307, "std": 0.3081}},
        {"model": {"name": "my_backbone", "dim": 64}},
        {"normalization": {"type": "imagenet"}},
        {"model": "resnet8"},
        {"model": {"_target_": "a.B"}},
        {"classes": 10, "blocks": [3, 4, 6, 3], "normalization": "imagenet", "image_size": 224},
        {"image_size": [3, 224, 224]},
    ],
)
def test_hyper_parameters_of_others_are_their_own_business(said: dict[str, object], tmp_path: Path) -> None:
    net = build_model({"name": "resnet8"})
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": said}, tmp_path / "x.ckpt")
    found = load_network(tmp_path / "x.ckpt", {"name": "resnet8"})
    assert all(torch.equal(a, b) for a, b in zip(found.net.parameters(), net.parameters(), strict=True))
    assert (found.classes, found.normalization, found.image_size) == ([], {}, [])
    assert found.other_size(7, 9) == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_tables_that_no_state_dict_holds_have_the_type_of_the_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    class Positions(nn.Module):
        def __init__(self, num_classes: int = 4) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, num_classes, 3), nn.Linear(2, num_classes)
            self.register_buffer("table", torch.linspace(0, 1, 2), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3)) + self.fc(self.table)  # type: ignore[no-any-return]

    name = f"positions in {dtype}"
    register_model(name, Positions)
    save_pruned(tmp_path / "p.ckpt", build_model({"name": name}).to(dtype), {})
    again = load_pruned(tmp_path / "p.ckpt")
    assert again(torch.rand(1, 3, 8, 8, dtype=torch.promote_types(dtype, torch.float32))).isfinite().all()


def test_what_a_constructor_trips_over_is_no_wrong_argument() -> None:
    class Broken(nn.Module):
        def __init__(self, num_classes: int = 4) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, num_classes)  # type: ignore[call-arg]

    register_model("broken", Broken)
    with pytest.raises(TypeError, match="kernel_size"):
        build_model({"name": "broken"})
    with pytest.raises(InputError, match="does not take these arguments"):
        build_model({"name": "broken", "depth": 3})


def test_own_networks_may_load_weights_of_their_own() -> None:
    class Loads(nn.Module):
        def __init__(self, num_classes: int = 4, pretrained: bool = False) -> None:
            super().__init__()
            self.conv, self.pretrained = nn.Conv2d(3, num_classes, 3), pretrained

    register_model("loads", Loads)
    config = {"name": "loads", "pretrained": True}
    assert rebuilt_from(config, build_model(config)) == {"name": "loads"}
    data = DigitsData(limit_train=32)
    data.setup()
    assert with_classes(config, data) == {**config, "num_classes": 10}


def test_a_state_dict_of_a_cut_network_is_told_from_a_wrong_one(tmp_path: Path) -> None:
    net = build_model({"name": "resnet8"}).eval()
    small = Plan(net, torch.rand(1, 3, 32, 32)).apply({"layer1.0.conv1": torch.arange(4)})
    torch.save(small.state_dict(), tmp_path / "small.pt")
    with pytest.raises(InputError, match="if filters were cut from it, write it with save_pruned"):
        load_network(tmp_path / "small.pt", {"name": "resnet8"})
    torch.save(net.state_dict(), tmp_path / "wide.pt")
    with pytest.raises(InputError, match=r"check model=\.\.\., model.shortcut, model.num_classes$"):
        load_network(tmp_path / "wide.pt", {"name": "resnet8", "num_classes": 7})


def test_extra_state_is_no_tensor_of_another_shape(tmp_path: Path) -> None:
    def build(num_classes: int = 7) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), Counts(), nn.Flatten(), nn.Linear(64, num_classes))

    register_model("counting", build)
    net = build(10)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with pytest.raises(InputError, match="does not fit counting"):
        load_network(tmp_path / "net.pt", {"name": "counting"})


def test_weights_of_ones_own_builder_are_its_own_business(tmp_path: Path) -> None:
    register_model("needs_weights", lambda weights, num_classes=10: nn.Sequential(nn.Conv2d(3, num_classes, 1)))
    net = build_model({"name": "needs_weights", "weights": "a.pth"})
    save_pruned(tmp_path / "p.ckpt", net, {}, model={"name": "needs_weights", "weights": "a.pth"})
    assert torch.equal(load_pruned(tmp_path / "p.ckpt").get_parameter("0.weight"), net.get_parameter("0.weight"))
