import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torchvision.models import regnet_y_400mf
from torchvision.models.vision_transformer import VisionTransformer

from freqprune.errors import InputError
from freqprune.networks.registry import build_model
from freqprune.networks.shipped import CIFAR10, pretrained
from freqprune.pruning.adapter import TagImportance
from freqprune.pruning.compensation import readers_of
from freqprune.pruning.criteria import criterion_names, needs, scores
from freqprune.pruning.graph import ChannelGraph
from freqprune.pruning.importance import Evidence, criterion
from freqprune.pruning.moments import input_moments, output_gradients
from freqprune.pruning.pruners import CUSTOM_PRUNERS
from freqprune.pruning.verdict import judge
from freqprune.tagging.measurement import tag
from freqprune.tagging.response import TagResponse
from freqprune.tagging.stimulus import Stimulus
from freqprune.training.listed import ImageFolderData
from tests.pruning.doubled import Residual
from tests.tagging.test_measurement import WHITE, Affine


@pytest.mark.parametrize("name", criterion_names())
def test_every_criterion_scores_every_filter(name: str, images: Tensor) -> None:
    net = build_model({"name": "resnet8"})
    response = tag(net, images[:2])
    layers = ["layer1.0.conv1", "layer3.0.conv1"]
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    graph = ChannelGraph(net, images)
    moments = input_moments(net, readers_of(graph, layers), [images])
    gradients = output_gradients(net, readers_of(graph, layers), [images])
    labelled = [(images, torch.tensor([0, 1, 2, 3]))]
    table = scores(
        name,
        Evidence(
            net, response, graph=graph, moments=moments, gradients_at=gradients, labelled=labelled, frames=[images]
        ),
        layers,
    )
    assert {layer: score.shape for layer, score in table.items()} == {"layer1.0.conv1": (16,), "layer3.0.conv1": (64,)}
    assert all(score.isfinite().all() and score.dtype == torch.float64 for score in table.values())
    assert len(torch.unique(table["layer3.0.conv1"])) > 32


def test_scores_by_hand() -> None:
    response = tag(Affine(), WHITE.expand(5, -1, -1, -1))
    evidence = Evidence(Affine(), response)
    torch.testing.assert_close(
        scores("amplitude", evidence, ["conv"])["conv"], torch.tensor([0.25, 0.25, 0.25, 0], dtype=torch.float64)
    )
    snr = response.snr("conv").nan_to_num(0.0)
    torch.testing.assert_close(scores("snr", evidence, ["conv"])["conv"], snr.mean(1))
    assert scores("snr", evidence, ["conv"])["conv"][3] == 0
    torch.testing.assert_close(scores("snr_db", evidence, ["conv"])["conv"][:3], (20 * snr[:3].log10()).mean(1))
    torch.testing.assert_close(
        scores("l1", evidence, ["conv"])["conv"], torch.tensor([1, 1, 1, 0], dtype=torch.float64)
    )
    torch.testing.assert_close(
        scores("l2", evidence, ["conv"])["conv"], torch.tensor([128**-0.5, 128**-0.5, 1 / 16, 0], dtype=torch.float64)
    )


# Bins of f1, f2, and of what the default stimulus predicts of them, up to the fourth order.
TAGS = (12, 15)
HARMONICS = [n * tag for tag in TAGS for n in (1, 2, 3, 4)]
MIXED = [abs(n * 12 + m * 15) for n in (1, 2, 3) for m in (-3, -2, -1, 1, 2, 3) if n + abs(m) <= 4]


def test_z_is_the_mean_over_the_tags_in_deviations_of_ten_noise_bins_a_side() -> None:
    response = tag(Affine(), WHITE.expand(5, -1, -1, -1))
    noisy = response.layers["conv"].noisy_amplitude
    assert noisy is not None
    spectrum = noisy[:3].numpy()
    z = []
    for at in TAGS:
        around = spectrum[:, [b for b in range(at - 10, at + 11) if b not in {*HARMONICS, *MIXED}]]
        z.append((spectrum[:, at] - around.mean(1)) / around.std(1, ddof=1))
    found = scores("z", Evidence(Affine(), response), ["conv"])["conv"].numpy()
    np.testing.assert_allclose(found, [*np.mean(z, 0), 0], rtol=1e-9)


@pytest.mark.parametrize(("name", "bins"), [("corrected_amplitude", HARMONICS), ("intermodulation", MIXED)])
def test_scores_of_a_rectifier_sum_over_all_orders(name: str, bins: list[int]) -> None:
    """Hardly any noise, so that a bin holds what the rectified tags have there."""
    net = Affine(nn.ReLU())
    with torch.no_grad():
        courses = net(Stimulus().frames(WHITE)[0]).flatten(1).T.numpy()
    by_hand = 2 / 240 * np.abs(np.fft.rfft(courses))[:, bins].sum(1)
    found = scores(name, Evidence(net, tag(net, WHITE, noise_std=1e-9)), ["conv"])["conv"].numpy()
    np.testing.assert_allclose(found, by_hand, rtol=0, atol=1e-7)
    assert by_hand[2] > 0.03


def test_random_scores_follow_the_seed_and_differ_from_layer_to_layer() -> None:
    net, layers = build_model({"name": "resnet8"}), ["layer1.0.conv1", "layer1.0.conv2"]
    one, same, other = (scores("random", Evidence(net, seed=seed), layers) for seed in (1, 1, 2))
    for layer in layers:
        assert torch.equal(one[layer], same[layer])
        assert not torch.equal(one[layer], other[layer])
    assert not torch.equal(one[layers[0]], one[layers[1]])


def test_a_filter_of_a_stream_scores_the_largest_of_the_layers_that_write_it() -> None:
    net = Residual(projected=False).eval()
    graph = ChannelGraph(net, torch.rand(1, 3, 8, 8))
    found = scores("l1", Evidence(net, graph=graph), ["stem"])["stem"]
    writers = [net.get_submodule(name).weight.detach().flatten(1).double() for name in ("stem", "conv2")]
    torch.testing.assert_close(found, torch.maximum(*(weight.abs().sum(1) for weight in writers)))


def test_norms_and_activations_with_weights_have_scores() -> None:
    net, layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU()), ["1", "2"]
    found = scores("snr", Evidence(net, tag(net, torch.rand(2, 3, 8, 8), layers=layers)), layers)
    assert [len(values) for values in found.values()] == [4, 4]


def test_an_own_criterion() -> None:
    @criterion("bias")
    def bias(evidence: Evidence, layer: str) -> Tensor:
        return evidence.model.get_submodule(layer).bias.detach()

    assert scores("bias", Evidence(Affine()), ["conv"])["conv"].tolist() == [0, 0, -0.75, 0]

    @criterion("inputs", "graph")
    def inputs(evidence: Evidence, layer: str) -> Tensor:
        return evidence.model.get_submodule(layer).weight.abs().sum((0, 2, 3))

    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 2, 1))
    with pytest.raises(InputError, match=r"'inputs' gives '1' scores of shape \(8,\), expected one for each of its 32"):
        scores("inputs", Evidence(net, graph=ChannelGraph(net, torch.rand(1, 3, 4, 4))), ["1"])


@pytest.mark.parametrize(
    ("name", "message"), [("snrr", "did you mean snr"), ("snr", "needs the response of other"), ("random", "")]
)
def test_scores_refuse(name: str, message: str) -> None:
    response = tag(Affine(), WHITE)
    if name == "random":
        with pytest.raises(InputError, match="pass Evidence"):
            scores("snr", Evidence(Affine()), ["conv"])
    else:
        with pytest.raises(InputError, match=message):
            scores(name, Evidence(Affine(), response), ["other"])


@pytest.mark.parametrize("name", ["integration", "intermodulation"])
def test_criteria_of_parts_that_combine_need_such_components(name: str) -> None:
    assert needs(name) == {"tags", "intermodulation"}
    response = tag(Affine(), WHITE, Stimulus(max_order=1))
    with pytest.raises(InputError, match=f"criterion = {name} reads intermodulation components"):
        scores(name, Evidence(Affine(), response), ["conv"])


@pytest.mark.parametrize("name", ["snr", "snr_db", "z", "corrected_amplitude", "amplitude", "integration"])
def test_trained_networks_have_a_score_for_every_filter(name: str, photographs: TagResponse) -> None:
    """Some of their filters answer nothing, some hardly leave their mean."""
    words = {word for layer in photographs.layers for word in photographs.why_no_snr(layer)}
    assert words == {"", "dead", "noise-free"}
    found = scores(name, Evidence(pretrained(), photographs), list(photographs.layers))
    assert all(values.isfinite().all() for values in found.values())


@pytest.fixture(scope="module")
def photographs(cifar10: Path) -> TagResponse:
    data = ImageFolderData(
        root=str(cifar10), limit_train=10, limit_test=4, val_fraction=0, mean=CIFAR10.mean, std=CIFAR10.std
    )
    return tag(pretrained(), data.pixels("test", 4), mean=CIFAR10.mean, std=CIFAR10.std)


def test_noise_free_snr_is_no_score() -> None:
    response = tag(Affine(), WHITE, noise_std=0.0)
    with pytest.raises(InputError, match="hold rounding error only"):
        scores("snr", Evidence(Affine(), response), ["conv"])


@pytest.mark.parametrize("name", ["l2", "activation"])
def test_numbers_leave_a_device_before_they_are_doubled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's accelerator has no float64."""
    net, images = build_model({"name": "resnet8"}).eval(), torch.rand(4, 3, 32, 32)
    evidence = Evidence(net, labelled=[(images, torch.arange(4))])
    left: set[int] = set()
    cpu, double = Tensor.cpu, Tensor.double

    def moved(given: Tensor) -> Tensor:
        found = cpu(given).clone()
        left.add(id(found))
        kept.append(found)
        return found

    def doubled(given: Tensor) -> Tensor:
        assert given.dtype == torch.float64 or id(given) in left
        return double(given)

    kept: list[Tensor] = []
    expected = scores(name, evidence, ["layer1.0.conv1"])["layer1.0.conv1"]
    monkeypatch.setattr(Tensor, "cpu", moved)
    monkeypatch.setattr(Tensor, "double", doubled)
    found = scores(name, evidence, ["layer1.0.conv1"])["layer1.0.conv1"]
    assert kept
    torch.testing.assert_close(found, expected)


def test_too_little_noise_is_said_and_scored(caplog: pytest.LogCaptureFixture) -> None:
    response = tag(Affine(), WHITE, noise_std=1e-13)
    table = scores("snr", Evidence(Affine(), response), ["conv"])["conv"]
    assert "the noise bins of 3 of 3 filters that answer the tags hold rounding error only" in caplog.text
    assert table[3] == 0
    # Tags over what rounding can leave, far above 1; of that there is least in the third, whose mean is 0.
    assert 1e9 < table[0] < table[2]


def test_fits_the_pruners_of_torch_pruning(images: Tensor) -> None:
    net = build_model({"name": "resnet8", "shortcut": "B"}).eval()
    layers = ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"]
    table = scores("random", Evidence(net), layers)
    importance = TagImportance(net, table)
    ignored = [m for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and n not in layers]
    pruner = tp.pruner.BasePruner(net, images[:1], importance=importance, pruning_ratio=0.5, ignored_layers=ignored)
    kept_before = {layer: net.get_submodule(layer).weight.detach().clone() for layer in layers}
    pruner.step()
    for layer in layers:
        best = table[layer].argsort(descending=True)[: len(table[layer]) // 2].sort().values
        now = net.get_submodule(layer).weight.detach()
        torch.testing.assert_close(now, kept_before[layer][best])


@pytest.mark.parametrize(("reduce", "expected"), [("max", [13, 10]), ("mean", [7.5, 7.5])])
def test_layers_that_write_a_stream_have_one_score_between_them(reduce: str, expected: list[float]) -> None:
    net = Residual(projected=False).eval()
    # Channel 2 scores 2 and 13, channel 5 scores 5 and 10.
    table = {"stem": torch.arange(8.0), "conv2": torch.arange(8.0, 16.0).flip(0)}
    graph = tp.DependencyGraph().build_dependency(net, torch.rand(1, 3, 8, 8))
    group = graph.get_pruning_group(net.stem, tp.prune_conv_out_channels, idxs=[2, 5])
    assert TagImportance(net, table, reduce)(group).tolist() == expected  # type: ignore[union-attr]


def test_scores_are_not_read_for_a_layer_that_has_been_pruned_since() -> None:
    net = Residual(projected=False).eval()
    importance = TagImportance(net, {"conv1": torch.arange(12.0)})
    pruner = tp.pruner.BasePruner(
        net, torch.rand(1, 3, 8, 8), importance=importance, pruning_ratio=0.5, iterative_steps=2,
        ignored_layers=[net.stem, net.conv2, net.head],
    )  # fmt: skip
    pruner.step()
    assert net.conv1.out_channels < 12
    with pytest.raises(InputError, match="this layer has been pruned since; tag again, or prune in one step"):
        pruner.step()


def test_scores_of_transposed_convolutions_are_of_their_outputs() -> None:
    for groups in (1, 2):
        net = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, groups=groups), nn.ReLU())
        weight = net[0].weight.detach()
        expected = torch.stack([
            weight[16 // groups * (c * groups // 8) :][: 16 // groups, c % (8 // groups)].double().square().sum().sqrt()
            for c in range(8)
        ])  # fmt: skip
        torch.testing.assert_close(scores("l2", Evidence(net), ["0"])["0"], expected)
    net = nn.Sequential(nn.ConvTranspose2d(16, 8, 2), nn.Conv2d(8, 4, 1))
    graph = tp.DependencyGraph().build_dependency(net, torch.rand(1, 16, 4, 4))
    group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, idxs=[2, 5])
    found = TagImportance(net, {"0": torch.arange(8.0)})(group)
    assert found is not None
    assert found.tolist() == [2, 5]


class TwoAnswers(nn.Module):
    """Logits, and something beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv2(self.conv(x).relu())
        return x.mean((2, 3)), x


def test_gradients_of_a_network_with_several_answers_are_of_its_first() -> None:
    evidence = Evidence(TwoAnswers(), labelled=[(torch.rand(2, 3, 8, 8), torch.tensor([0, 2]))])
    assert float(evidence.gradients["conv.weight"][0].abs().sum()) > 0


def test_coupled_layers_share_one_score(images: Tensor) -> None:
    net = build_model({"name": "resnet8"}).eval()
    table = {"conv1": torch.arange(16.0), "layer1.0.conv2": torch.arange(16.0).flip(0)}
    graph = tp.DependencyGraph().build_dependency(net.layer1, torch.rand(1, 16, 8, 8))
    group = graph.get_pruning_group(net.layer1[0].conv2, tp.prune_conv_out_channels, idxs=[2, 5])
    assert TagImportance(net, table)(group).tolist() == [13, 10]
    group = graph.get_pruning_group(net.layer1[0].conv1, tp.prune_conv_out_channels, idxs=[2, 5])
    assert TagImportance(net, table)(group) is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"nope": torch.ones(16)}, "does not have: 'nope'"),
        ({"conv1": torch.ones(15)}, r"must have the shape \(16,\), got \(15,\)"),
        ({"conv1": torch.full((16,), torch.nan)}, "hold NaN"),
    ],
)
def test_tag_importance_refuses(table: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TagImportance(build_model({"name": "resnet8"}), table)


def test_one_dead_filter_does_not_stop_the_others(images: Tensor) -> None:
    net = build_model({"name": "resnet8"})
    with torch.no_grad():
        net.bn1.weight[2] = 1e-9
        net.bn1.bias.fill_(1.0)
    response = tag(net, images[:2])
    assert scores("snr", Evidence(net, response), ["conv1"])["conv1"][2] == 0
    assert not judge(response, by="threshold", threshold=0.1).important["conv1"][2]


def test_fits_the_pruners_of_torch_pruning_on_option_a() -> None:
    net, x = build_model({"name": "resnet20"}).eval(), torch.rand(1, 3, 32, 32)
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    importance = TagImportance(net, scores("random", Evidence(net), layers))
    pruner = tp.pruner.BasePruner(
        net,
        x,
        importance=importance,
        pruning_ratio=0.5,
        ignored_layers=[net.linear],
        customized_pruners=CUSTOM_PRUNERS,
        root_module_types=[nn.Conv2d],
    )
    pruner.step()
    assert net.conv1.out_channels == 8
    assert net.layer3[2].conv2.out_channels == 32
    assert net(x).shape == (1, 10)


def test_fits_the_pruners_of_torch_pruning_on_a_vision_transformer(images: Tensor) -> None:
    """Hidden features of the perceptrons, read at linear layers over tokens."""
    torch.manual_seed(0)
    net = VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5
    ).eval()
    layers = [name for name, _ in net.named_modules() if name.endswith("mlp.0")]
    table = scores("snr", Evidence(net, tag(net, images[:2], layers=layers)), layers)
    others = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    ignored = [m for n, m in net.named_modules() if isinstance(m, others) and n not in layers]
    before = {layer: net.get_submodule(layer).weight.detach().clone() for layer in layers}
    with warnings.catch_warnings():
        # Class token and position embedding are no layers.
        warnings.filterwarnings("ignore", "Unwrapped parameters")
        tp.pruner.BasePruner(
            net, images[:1], importance=TagImportance(net, table), pruning_ratio=0.5, ignored_layers=ignored,
            root_module_types=[nn.Linear],
        ).step()  # fmt: skip
    for layer in layers:
        best = table[layer].argsort(descending=True)[:12].sort().values
        assert torch.equal(net.get_submodule(layer).weight, before[layer][best])
    assert net(images).shape == (len(images), 5)


def test_fits_the_pruners_of_torch_pruning_on_a_regnet() -> None:
    """In convolutions in groups torch-pruning removes the same channels of every group, those of the lowest mean."""
    torch.manual_seed(0)
    net, x = regnet_y_400mf().eval(), torch.rand(2, 3, 64, 64)
    layers = [name for name, _ in net.named_modules() if name.endswith(".f.a.0")]
    table = scores("snr", Evidence(net, tag(net, x, layers=layers)), layers)
    others = [
        m for n, m in net.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and n not in layers and not n.endswith(".f.b.0")
    ]  # fmt: skip
    before = {layer: net.get_submodule(layer).weight.detach().clone() for layer in layers}
    tp.pruner.BasePruner(
        net, x[:1], importance=TagImportance(net, table), pruning_ratio=0.5, ignored_layers=others
    ).step()
    for layer in layers:
        n_groups = net.get_submodule(layer.replace(".a.", ".b.")).groups
        by_place = table[layer].view(n_groups, -1)
        width = by_place.shape[1]
        best = by_place.mean(0).argsort(descending=True)[: width // 2].sort().values
        kept = (best + width * torch.arange(n_groups)[:, None]).flatten()
        now = net.get_submodule(layer).weight.detach()
        # What comes before may have lost filters too.
        assert now.shape[0] == len(kept)
        if now.shape == before[layer][kept].shape:
            assert torch.equal(now, before[layer][kept])
    assert net(x).shape == (2, 1000)


def a_unit() -> nn.Sequential:
    """Conv, norm and reader, which torch-pruning's importances go over; each is the mean over these."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    ).eval()  # fmt: skip
    nn.init.uniform_(net[1].weight, 0.5, 1.5)
    return net


def test_the_hessian_by_hand() -> None:
    """Squared gradients of single losses, in eval mode, whatever mode the network is in."""
    net, images, labels = a_unit(), torch.rand(6, 3, 12, 12), torch.arange(6) % 3
    weights, squares = [net[0].weight, net[1].weight, net[3].weight], []
    for image, label in zip(images, labels, strict=True):
        loss = nn.functional.cross_entropy(net(image[None]), label[None])
        squares.append([gradient.square() for gradient in torch.autograd.grad(loss, weights)])
    own, norm, read = (
        (weight.square() * torch.stack(of_images).mean(0)).detach()
        for weight, of_images in zip(weights, zip(*squares, strict=True), strict=True)
    )
    expected = (own.sum((1, 2, 3)) + norm + read.sum((0, 2, 3))) / 3
    evidence = Evidence(
        net.train(), graph=ChannelGraph(net, images), labelled=[(images[:4], labels[:4]), (images[4:], labels[4:])]
    )
    torch.testing.assert_close(scores("hessian", evidence, ["0"])["0"].float(), expected, rtol=1e-4, atol=0)


def test_scores_of_weights_norms_and_gradients_by_hand() -> None:
    net = a_unit()
    images, labels = torch.rand(6, 3, 12, 12), torch.arange(6) % 3
    evidence = Evidence(net, graph=ChannelGraph(net, images), labelled=[(images, labels)])
    found = {name: scores(name, evidence, ["0"])["0"] for name in ("bn_scale", "activation", "group_l2", "fpgm")}
    with torch.no_grad():
        torch.testing.assert_close(found["bn_scale"].float(), net[1].weight.abs())
        torch.testing.assert_close(found["activation"].float(), net[:3](images).abs().mean((0, 2, 3)))
        own, read = net[0].weight.flatten(1), net[3].weight.transpose(0, 1).flatten(1)
        norms = [own.square().sum(1), net[1].weight.square(), read.square().sum(1)]
        torch.testing.assert_close(found["group_l2"].float(), torch.stack(norms).mean(0))
        apart = [torch.cdist(one.square(), one.square()).sum(1) for one in (own, read)]
        torch.testing.assert_close(found["fpgm"].float(), torch.stack(apart).mean(0))
    loss = nn.functional.cross_entropy(net(images), labels)
    (gradient,) = torch.autograd.grad(loss, [net[0].weight])
    taylor = scores("taylor", evidence, ["0"])["0"]
    # Most of it is the filter's own.
    own_taylor = (net[0].weight * gradient).abs().flatten(1).sum(1).detach()
    assert torch.corrcoef(torch.stack([taylor.float(), own_taylor]))[0, 1] > 0.5


def test_random_is_uniform_where_filters_go_together() -> None:
    """The largest of the numbers of three layers that write a stream would lie at 0.75 in the mean."""
    net = build_model({"name": "resnet14"})
    graph = ChannelGraph(net, torch.rand(1, 3, 16, 16))
    assert len(graph.streams["conv1"].members) == 3
    drawn = [scores("random", Evidence(net, graph=graph, seed=seed), ["conv1"])["conv1"] for seed in range(50)]
    assert float(torch.cat(drawn).mean()) == pytest.approx(0.5, abs=0.05)
    inner = scores("random", Evidence(net, graph=graph), ["layer1.0.conv1"])["layer1.0.conv1"]
    assert torch.equal(inner, scores("random", Evidence(net), ["layer1.0.conv1"])["layer1.0.conv1"])


def test_layers_that_only_a_second_answer_reads_have_no_gradient() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc, self.proj = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.a(x).relu().mean((2, 3))
            return self.fc(h), self.proj(h)

    torch.manual_seed(0)
    net, x, y = Two().eval(), torch.rand(4, 3, 8, 8), torch.arange(4)
    found = scores("taylor", Evidence(net, graph=ChannelGraph(net, x), labelled=[(x, y)]), ["a"])["a"]
    assert found.shape == (8,)
    assert len(found.unique()) == 8


def test_gradients_of_half_precision_are_no_zeros() -> None:
    """The square of 1e-4 is less than half of float16's smallest number."""
    net = a_unit()
    gradients = {
        name: (torch.rand_like(one) * 1e-4, (torch.rand_like(one) * 1e-4).square())
        for name, one in net.named_parameters()
    }
    labelled = [(torch.rand(1, 3, 12, 12), torch.zeros(1, dtype=torch.long))]
    graph = ChannelGraph(net, labelled[0][0])
    for name in ("hessian", "taylor"):
        single = Evidence(net, graph=graph, labelled=labelled)
        single.__dict__["gradients"] = gradients
        expected = scores(name, single, ["0"])["0"]
        graph.twin.half()
        found = scores(name, single, ["0"])["0"]
        graph.twin.float()
        torch.testing.assert_close(found / found.max(), expected / expected.max(), rtol=0.01, atol=0)


def test_lamp_and_taylor_by_hand() -> None:
    net, images, labels = a_unit(), torch.rand(6, 3, 12, 12), torch.arange(6) % 3
    graph = ChannelGraph(net, images)
    evidence = Evidence(net, graph=graph, labelled=[(images, labels)])
    # Of the filters in the order of their norm each over the sum of itself and all that are larger.
    norms = scores("group_l2", evidence, ["0"])["0"]
    order = norms.argsort()
    ranked, expected = norms[order], torch.empty_like(norms)
    expected[order] = ranked / ranked.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(scores("lamp", evidence, ["0"])["0"], expected, rtol=1e-4, atol=0)
    for one in net.parameters():
        one.grad = None
    nn.functional.cross_entropy(net(images), labels).backward()
    own = (net[0].weight * net[0].weight.grad).abs().sum((1, 2, 3))
    read = (net[3].weight * net[3].weight.grad).abs().sum((0, 2, 3))
    found = scores("taylor", evidence, ["0"])["0"]
    torch.testing.assert_close(found, ((own + read) / 2).detach().double(), rtol=1e-4, atol=1e-8)


def test_activations_below_zero_count_by_their_size() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    x = torch.rand(6, 3, 8, 8)
    found = scores("activation", Evidence(net, labelled=[(x, torch.zeros(6, dtype=torch.long))]), ["0"])["0"]
    with torch.no_grad():
        answers = net[:2](x)
    assert (answers < 0).any()
    torch.testing.assert_close(found.float(), answers.abs().mean((0, 2, 3)))


def test_criteria_are_known_in_a_process_that_pickle_brought_a_function_to() -> None:
    code = "from freqprune.pruning.importance import criterion_names, needs; needs('l2'); print(*criterion_names())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"snr", "l2", "logit_error"} <= {*done.stdout.split()}
