import pytest
import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks.registry import build_model
from freqprune.tagging.recording import Recorder, every_position, map_mean
from freqprune.tagging.sites import find_folds, find_sites
from tests.shaken import shaken


def test_reads_what_the_network_computes(images: Tensor) -> None:
    net = build_model({"name": "resnet8"}).eval()
    with Recorder(net, find_sites(net, images[:1], ["conv1", "layer1.0.conv2"])) as recorder:
        found = recorder(images)
    with torch.no_grad():
        x = net.relu1(net.bn1(net.conv1(images)))
        block = net.layer1[0]
        y = block.bn2(block.conv2(block.relu1(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(found["conv1"], x.mean((2, 3)))
    torch.testing.assert_close(found["layer1.0.conv2"], y.mean((2, 3)))


def test_reductions() -> None:
    maps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(every_position(maps, 1).mean(-1), map_mean(maps, 1))
    tokens = torch.randn(2, 7, 3)
    assert map_mean(tokens, 2).shape == (2, 3)
    assert every_position(tokens, 2).shape == (2, 3, 7)
    assert every_position(torch.randn(2, 3), 1).shape == (2, 3, 1)
    # An answer of one value an image.
    assert map_mean(torch.randn(2), 0).shape == (2, 1)
    assert every_position(torch.randn(2), 0).shape == (2, 1, 1)


def test_the_forward_stops_after_the_last_site(images: Tensor) -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("ran past the last site")

    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Identity())
    sites = find_sites(net, images[:1])
    net[2] = Never()
    with Recorder(net, sites) as recorder:
        assert recorder(images)["0"].shape == (4, 2)


def test_a_crash_in_the_forward_leaves_nothing_behind(images: Tensor) -> None:
    class Fuse(nn.Module):
        blown = False

        def forward(self, x: Tensor) -> Tensor:
            if self.blown:
                raise RuntimeError("fuse")
            return x

    net = nn.Sequential(nn.Conv2d(3, 2, 3), Fuse(), nn.ReLU(), nn.Conv2d(2, 2, 3)).train()
    net[2].eval()
    sites = find_sites(net, images[:1])
    net[1].blown = True
    with pytest.raises(RuntimeError, match="fuse"), Recorder(net, sites) as recorder:
        recorder(images)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert [m.training for m in net] == [True, True, False, True]
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_a_site_that_is_not_reached_is_named(images: Tensor) -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.right = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3), False

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x) if self.right else self.a(x)

    net = Fork()
    sites = find_sites(net, images[:1], ["a"])
    net.right = True
    with pytest.raises(InputError, match="did not reach a"), Recorder(net, sites) as recorder:
        recorder(images)


@pytest.mark.parametrize("reduce", [map_mean, every_position])
def test_later_operations_in_place_do_not_reach_what_was_read(reduce: object, images: Tensor) -> None:
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(784, 5), nn.ReLU(inplace), nn.Linear(5, 2)
        )
        sites = find_sites(net, images[:1], ["0", "3", "5"], "convolution")
        with Recorder(net, sites, reduce) as recorder:  # type: ignore[arg-type]
            found.append(recorder(images))
    for layer in ("0", "3", "5"):
        assert torch.equal(found[0][layer], found[1][layer]), layer


def test_compiled_networks_are_read_uncompiled(images: Tensor) -> None:
    net = build_model({"name": "resnet8"}).eval()
    expected = None
    for _ in range(2):
        with Recorder(net, find_sites(net, images[:1])) as recorder:
            found = recorder(images)
        expected = expected or found
        net.compile(backend="eager")
        net(images)
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)


def test_works_inside_inference_mode(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    with torch.inference_mode():
        sites = find_sites(net, images[:1])
        with Recorder(net, sites) as recorder:
            assert recorder(images)["0"].min() >= 0
    assert sites[0].module == "1"


@pytest.mark.parametrize("where", ["convolution", "norm", "activation"])
def test_folded_batch_norms_read_the_same(images: Tensor, where: str) -> None:
    net = shaken(build_model({"name": "resnet8", "shortcut": "B"})).double()
    x = images.double()
    sites = find_sites(net, x[:1], where=where)
    folds = find_folds(net, x[:1], sites)
    assert len(folds) == (0 if where == "convolution" else 9)
    modules = dict(net.named_modules())
    with Recorder(net, sites) as recorder:
        plain = recorder(x)
    with Recorder(net, sites, folds=folds) as recorder:
        assert isinstance(net.bn1, nn.Identity if folds else nn.BatchNorm2d)
        folded = recorder(x)
    for layer, response in plain.items():
        torch.testing.assert_close(folded[layer], response, rtol=1e-10, atol=1e-10)
    assert dict(net.named_modules()) == modules


def test_what_is_used_twice_is_not_folded(images: Tensor) -> None:
    class Odd(nn.Module):
        """Where an output, a weight, a module or a norm serves twice, the norm cannot move into the convolution."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))
            self.na, self.nb, self.nc, self.nd, self.ne = (nn.BatchNorm2d(3) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            x = self.na(y) + y
            x = self.nb(self.b(x)) + torch.conv2d(x, self.b.weight, padding=1)
            x = self.nc(self.c(self.nc(self.c(x))))
            x = self.nd(self.d(x))
            return torch.relu(self.ne(self.e(x)))

    net = shaken(Odd())
    assert find_folds(net, images[:1], []) == [("d", "nd"), ("e", "ne")]
    net.e.register_forward_hook(lambda m, a, out: None)
    assert find_folds(net, images[:1], []) == [("d", "nd")]
    sites = find_sites(net, images[:1], ["d"], "convolution")
    assert find_folds(net, images[:1], sites) == []


def test_folds_are_undone_after_a_crash(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval()
    before = list(net)
    sites = find_sites(net, images[:1])
    with pytest.raises(RuntimeError, match="channels"), Recorder(net, sites, folds=[("0", "1")]) as recorder:
        recorder(images[:, :2])
    assert all(a is b for a, b in zip(net, before, strict=True))
    with pytest.raises(KeyError), Recorder(net.train(), sites, folds=[("gone", "1")]):
        pass
    assert net.training
    assert not any(m._forward_hooks for m in net.modules())


def test_a_module_behind_two_layers_is_read_in_the_call_of_each(images: Tensor) -> None:
    """As the one ReLU of a bottleneck is."""
    relu = nn.ReLU()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 5, 3), relu).eval()
    sites = find_sites(net, images[:1])
    assert [(site.module, site.call) for site in sites] == [("1", 0), ("1", 1)]
    with Recorder(net, sites) as recorder:
        found = recorder(images)
    with torch.no_grad():
        torch.testing.assert_close(found["0"], net[:2](images).mean((2, 3)))
        torch.testing.assert_close(found["2"], net(images).mean((2, 3)))
