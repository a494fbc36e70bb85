from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d

from freqprune.errors import InputError
from freqprune.networks.blocks import drop_blocks
from freqprune.networks.registry import build_model
from freqprune.tagging.layers import default_layers, match_layers, pick_layers
from freqprune.tagging.loss import TagLoss
from freqprune.tagging.sites import find_sites


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 5, 3)
        self.unused = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.leaky_relu(self.norm(self.first(x)), 0.1, inplace=True)))


class SharedReLU(nn.Module):
    """One ReLU for both convolutions, a residual added in place: as torchvision's blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.conv1(x)))
        out += x
        return self.relu(out)


def test_every_convolution_of_a_resnet_is_followed(images: Tensor) -> None:
    sites = find_sites(build_model({"name": "resnet32"}), images[:1])
    assert len(sites) == 31
    assert [s.layer for s in sites][:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    by_layer = {s.layer: s for s in sites}
    assert (by_layer["layer2.3.conv1"].module, by_layer["layer2.3.conv1"].stage) == ("layer2.3.relu1", "activation")
    inner = by_layer["layer2.3.conv2"]
    assert (inner.module, inner.stage) == ("layer2.3.bn2", "norm")
    assert "no activation of its own" in inner.note
    assert "add" in inner.note


@pytest.mark.parametrize(
    ("where", "module"), [("convolution", "layer1.0.conv1"), ("norm", "layer1.0.bn1"), ("activation", "layer1.0.relu1")]
)
def test_where(where: str, module: str, images: Tensor) -> None:
    (site,) = find_sites(build_model({"name": "resnet8"}), images[:1], ["layer1.0.conv1"], where)
    assert (site.module, site.stage, site.note) == (module, where, "")


def test_functional_activations_are_replayed(images: Tensor) -> None:
    net = Functional()
    first, second = find_sites(net, images[:1], ["first", "second"])
    assert (first.module, first.stage) == ("norm", "activation")
    assert (second.module, second.stage) == ("second", "activation")
    assert first.then is not None
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(first.then(x), F.leaky_relu(x, 0.1))
    assert x.min() < 0, "the replay must not work in place"


def test_in_place_sums_end_the_trail(images: Tensor) -> None:
    first, second = find_sites(SharedReLU(), images[:1])
    assert (first.module, first.call, first.stage) == ("relu", 0, "activation")
    assert (second.module, second.stage) == ("conv2", "convolution")
    assert "add" in second.note


def test_layers_run_twice_are_read_the_first_time(images: Tensor) -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    net = nn.Sequential(shared, nn.Tanh(), shared, nn.ReLU())
    (site,) = find_sites(net, images[:1], ["0"])
    assert (site.module, site.call, site.runs) == ("1", 0, 2)
    assert site.note == "runs 2 times in a forward; read in its first call"


class AnswersByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.conv(x)}


def test_a_module_that_answers_with_a_mapping_is_read(images: Tensor) -> None:
    (site,) = find_sites(nn.Sequential(AnswersByName()), images[:1], ["0"])
    assert (site.module, site.n_filters) == ("0", 3)


def test_transformer_blocks_have_sites() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    sites = find_sites(layer, torch.randn(1, 5, 8), ["linear1"], "convolution")
    assert (sites[0].n_filters, sites[0].channel_dim) == (16, 2)


@pytest.mark.parametrize(
    ("layers", "where", "message"),
    [
        (["frist"], "norm", "no layer 'frist'; did you mean first"),
        (["unused"], "norm", "never runs unused"),
        (None, "relu", "where must be one of"),
    ],
)
def test_bad_requests(layers: list[str] | None, where: str, message: str, images: Tensor) -> None:
    with pytest.raises(InputError, match=message):
        find_sites(Functional(), images[:1], layers, where)


def test_layers_that_run_over_windows_and_those_that_do_not_run_are_named_with_a_way_out(images: Tensor) -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc, self.aux = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 6), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.conv(x)
            return self.fc(maps.flatten(2).mT.flatten(0, 1)[:, None]).unflatten(0, (len(x), -1)).mean((1, 2))  # type: ignore[no-any-return]

    net = Windows()
    with pytest.raises(InputError, match=r"fc: .* it answers does not count images.*pruning\.exclude=\[fc\]"):
        find_sites(net, images[:1], ["conv", "fc"])
    with pytest.raises(
        InputError, match=r"never runs aux; name others with layers=\.\.\., such as layers=\['conv\*'\]"
    ):
        find_sites(net, images[:1])
    assert [site.layer for site in find_sites(net, images[:1], pick_layers(net, ["conv*"]))] == ["conv"]


def test_hooks_of_ones_own_do_not_move_where_a_filter_is_read(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    expected = find_sites(net, images[:1])
    seen: list[Tensor] = []
    for layer in net[:2]:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.mean((2, 3))))
    assert find_sites(net, images[:1]) == expected
    assert expected[0].stage == "activation"


def test_no_layers_to_record(images: Tensor) -> None:
    with pytest.raises(InputError, match="no convolution and no linear layer"):
        find_sites(nn.ReLU(), images[:1])
    with pytest.raises(InputError, match=r"whole network \(Conv2d\) has none; put it into a torch\.nn\.Sequential"):
        find_sites(nn.Conv2d(3, 4, 3), images[:1])


def test_nothing_is_left_behind(images: Tensor) -> None:
    net = Functional().train()
    net.norm.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(InputError):
        find_sites(net, images[:1])
    assert net.training
    assert not net.norm.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_layers_that_went_with_their_block_are_not_missed() -> None:
    net = build_model({"name": "resnet14"})
    drop_blocks(net, {"layer1.1": []})
    assert pick_layers(net, ["layer1.1.conv1", "layer1.0.*"]) == ["layer1.0.conv1", "layer1.0.conv2"]
    with pytest.raises(InputError, match="matches none"):
        pick_layers(net, ["layer1.1.conv1"])
    images = torch.rand(1, 3, 32, 32)
    left, one = TagLoss(silence={"layer1.1.*": 0.1, "layer3.*": 0.1}), TagLoss(silence={"layer3.*": 0.1})
    assert torch.equal(left(net, images), one(net, images))
    assert TagLoss(silence={"layer1.1.*": 0.1})(net, images) == 0
    with pytest.raises(InputError, match="matches none"):
        TagLoss(silence={"layr*": 0.1, "layer3.*": 0.1})(build_model({"name": "resnet14"}), images)
    with pytest.raises(InputError, match="matches none"):
        pick_layers(build_model({"name": "resnet14"}), ["layr*", "layer1.0.*"])


def test_pick_layers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3, 4), nn.Linear(4, 2))
    assert pick_layers(net, None) == ["0"]
    assert pick_layers(net, "*") == ["0"]
    assert pick_layers(net, ["4", "3", "0"]) == ["0", "3", "4"]
    assert pick_layers(net, "1") == ["1"]
    with pytest.raises(InputError, match="'9' matches none of 0, 3, 4"):
        pick_layers(net, "9")


def test_convolutions_of_every_kind_are_recorded_by_default(images: Tensor) -> None:
    decoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2), nn.ReLU())
    sites = find_sites(decoder, images[:1])
    assert [(s.layer, s.n_filters, s.module) for s in sites] == [("0", 4, "1"), ("2", 5, "3")]
    kinds = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d)
    assert default_layers(nn.Sequential(nn.Linear(3, 3), *(kind(3, 3, 1) for kind in kinds))) == ["1", "2", "3", "4"]


def test_patterns() -> None:
    names = default_layers(build_model({"name": "resnet8"}))
    assert match_layers(names, ["*.conv1", "conv1"]) == ["conv1", "layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"]
    with pytest.raises(InputError, match="matches none of"):
        match_layers(names, "block*")


class InTheLast(nn.Module):
    """A block of tokens in rows and columns, as Swin has them: channels come last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Turned(nn.Module):
    """Tokens of a flattened map."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class Weighed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 5, 3), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.gate(x.mean((2, 3)))[..., None, None]  # type: ignore[no-any-return]


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(x), self.layer(x)], 1)


class Eca(nn.Module):
    """Weighs channels by what their neighbours are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x.mean((2, 3))[:, None]).mT[..., None]  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self, n_inputs: int, n_units: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(n_inputs, n_units, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("block", "shape", "dim"),
    [
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), (2, 3, 8, 9), 1),
        (nn.BatchNorm2d(3), (2, 3, 8, 9), 1),
        (nn.GroupNorm(1, 3), (2, 3, 8, 9), 1),
        (nn.Identity(), (2, 3, 8, 9), 1),
        (InTheLast(), (2, 8, 9, 3), 3),
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(2), Turned()), (2, 3, 8, 9), 2),
        (nn.Sequential(nn.Conv2d(3, 5, 3), ChannelsLast(), nn.LayerNorm(5)), (2, 3, 8, 9), 3),
        (nn.Sequential(nn.Conv2d(3, 5, 3), LayerNorm2d(5)), (2, 3, 8, 9), 1),
        (nn.Sequential(ChannelsLast(), nn.Linear(3, 5), ChannelsFirst()), (2, 3, 8, 9), 1),
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(2), Turned()), (2, 3, 8, 9), 2),
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(2)), (2, 3, 8, 9), 1),
        (Weighed(), (2, 3, 8, 9), 1),
        (nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 3)), (2, 7, 3), 2),
        (nn.Sequential(nn.Conv1d(3, 5, 3), nn.GELU(), Turned()), (2, 3, 9), 2),
        (nn.Sequential(nn.BatchNorm1d(3), Turned()), (2, 3, 9), 2),
        (nn.Sequential(nn.Conv1d(3, 5, 3), Turned(), Recurrent(5, 4)), (2, 3, 9), 2),
        (nn.Sequential(nn.Conv1d(3, 4, 3), Turned(), Recurrent(4, 3), Turned()), (2, 3, 9), 1),
        (nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.LayerNorm([16, 8, 9])), (2, 3, 8, 9), 1),
        (nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.LayerNorm([9, 8, 9])), (2, 3, 8, 9), 1),
        (nn.LayerNorm([3, 8, 9]), (2, 3, 8, 9), 1),
        (Twice(nn.Conv2d(3, 9, 3, padding=1)), (2, 3, 8, 9), 1),
        (nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2)), (2, 3, 8, 8), 1),
        (nn.Sequential(nn.Conv2d(3, 5, 1), Eca(), nn.ReLU()), (2, 3, 8, 9), 1),
        (nn.Linear(3, 4), (2, 8, 9, 3), 3),
        (nn.Linear(3, 4), (2, 3), 1),
    ],
)
def test_filters_are_counted_where_the_channels_are(block: nn.Module, shape: tuple[int, ...], dim: int) -> None:
    x = torch.rand(shape)
    net = nn.Sequential(block)
    site = find_sites(net, x, ["0"], "convolution")[0]
    assert site.channel_dim == dim
    assert site.n_filters == net(x).shape[dim]


@pytest.mark.parametrize(
    ("net", "shape", "dims"),
    [
        (nn.Sequential(nn.Conv1d(3, 5, 3), nn.MaxPool1d(2), nn.Dropout()), (1, 3, 20), [1, 1, 1]),
        (nn.Sequential(nn.Linear(3, 5), nn.GELU(), Turned(), nn.Identity()), (1, 20, 3), [2, 2, 1, 1]),
        (nn.Sequential(nn.Identity(), nn.Conv1d(3, 5, 3)), (1, 3, 20), [2, 1]),
        (nn.Sequential(nn.Conv2d(3, 9, 1), Eca(), nn.ReLU()), (1, 3, 8, 9), [1, 1, 1]),
        (nn.Sequential(Twice(nn.Conv2d(3, 9, 1)), nn.ReLU()), (1, 3, 8, 9), [1, 1]),
    ],
)
def test_modules_without_weights_are_read_as_the_layer_before_them(
    net: nn.Sequential, shape: tuple[int, ...], dims: list[int]
) -> None:
    sites = find_sites(net, torch.rand(shape), [str(at) for at in range(len(net))], "convolution")
    assert [site.channel_dim for site in sites] == dims


@pytest.mark.parametrize(
    "activation",
    [
        *(nn.SiLU(), nn.SiLU(inplace=True), nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh()),
        *(nn.ReLU6(), nn.LeakyReLU(), nn.ELU(), nn.SELU(), nn.CELU(), nn.GELU(), nn.Hardtanh(), nn.Softplus()),
        *(nn.PReLU(), nn.Softsign(), nn.LogSigmoid(), nn.RReLU(), nn.Hardshrink(), nn.Softshrink()),
    ],
    ids=repr,
)
def test_modules_of_activations_are_activations(activation: nn.Module, images: Tensor) -> None:
    (site,) = find_sites(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation), images[:1])
    assert (site.stage, site.module, site.note) == ("activation", "2", "")


class Gated(nn.Module):
    """What its activation reads is read beside it as well."""

    def __init__(self, gate: Callable[[Tensor], Tensor], join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.gate, self.join = nn.Conv2d(3, 4, 3), gate, join

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.join(y, self.gate(y))


@pytest.mark.parametrize("gate", [torch.sigmoid, nn.Sigmoid(), F.relu], ids=["function", "module", "rectifier"])
@pytest.mark.parametrize(("join", "name"), [(torch.mul, "mul"), (torch.add, "add")], ids=["product", "sum"])
def test_a_gate_is_not_the_answer_of_a_filter(
    gate: Callable[[Tensor], Tensor], join: Callable[[Tensor, Tensor], Tensor], name: str, images: Tensor
) -> None:
    (site,) = find_sites(Gated(gate, join), images[:1])
    assert (site.module, site.stage, site.then) == ("conv", "convolution", None)
    assert "no activation of its own" in site.note
    assert name in site.note


class NormAndActivation(nn.Module):
    """As timm's norms: one module that calls a function for the norm and holds its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(4), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return self.act(nn.functional.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias))  # type: ignore[no-any-return]


def test_an_activation_behind_a_norm_that_is_a_function_is_read() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), NormAndActivation(), nn.Conv2d(4, 2, 3)).eval()
    first, last = find_sites(net, torch.rand(1, 3, 12, 12))
    assert (first.module, first.stage, first.note) == ("1.act", "activation", "")
    assert (last.stage, last.note != "") == ("convolution", True)
    of_norm, _ = find_sites(net, torch.rand(1, 3, 12, 12), where="norm")
    assert of_norm.stage == "convolution"
    assert "batch_norm" in of_norm.note
