"""Making up for a cut in sequence: exact where it can be, against NumPy, never worse than doing nothing, refused by
name."""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2, resnet18

from freqprune.errors import InputError
from freqprune.networks.registry import build_model
from freqprune.networks.trace import equal_batches
from freqprune.pruning import walk
from freqprune.pruning.equations import Equations
from freqprune.pruning.in_sequence import Reconstruction
from freqprune.pruning.reconstruction import mute, reconstruct
from freqprune.pruning.refinement import Segment
from freqprune.pruning.surgery import Plan
from tests.pruning.doubled import Residual, concatenated, depthwise, double, images, residual, settled

EXACT = Reconstruction(positions=10_000, ridge=1e-9, rounds=0)


@pytest.mark.parametrize(
    "case",
    [lambda: residual(False), lambda: residual(True), concatenated, depthwise],
    ids=["identity", "projection", "concatenation", "depthwise"],
)
@pytest.mark.parametrize("rounds", [0, 1])
def test_copies_of_what_is_left_are_made_up_for_exactly(
    case: Callable[[], tuple[nn.Module, str, int]], rounds: int
) -> None:
    net, unit, n_kept = case()
    x = images()
    plan = Plan(net, x)
    kept = {unit: torch.arange(n_kept)}
    twin, remarks = reconstruct(net, plan.silenced(kept), equal_batches([x], 8), replace(EXACT, rounds=rounds))
    small = plan.apply(kept, weights=twin)
    new = images(seed=5)
    with torch.no_grad():
        cut, made_up = (float((one(new) - net(new)).abs().max()) for one in (plan.apply(kept), small))
    assert made_up < 2e-3 * cut
    assert not [remark for remark in remarks if "fewer samples" not in remark]


def test_weights_are_those_of_numpys_least_squares() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.AvgPool2d(2)).eval()
    x, ridge = images(16), 1e-3
    twin, _ = reconstruct(net, {"2": [1, 4]}, equal_batches([x], 4), Reconstruction(10_000, ridge, rounds=0))
    hidden = F.pad(net[1](net[0](x)), [1] * 4).detach().double().numpy()
    with torch.no_grad():
        target = net[2](net[1](net[0](x))).double().numpy()
    rows, answers = [], []
    for n in range(len(x)):
        for i in range(target.shape[2]):
            for j in range(target.shape[3]):
                rows.append(hidden[n][[0, 2, 3, 5], 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].ravel())
                answers.append(target[n, :, i, j])
    a, t = np.array(rows), np.array(answers)
    old = net[2].weight.detach().double().numpy()[:, [0, 2, 3, 5]].reshape(4, -1)
    # The ridge as further equations, the constant as a further column that it does not pull at.
    lift = np.sqrt(ridge * a.var(0).mean() * len(a))
    whole = np.block([[a, np.ones((len(a), 1))], [lift * np.eye(a.shape[1]), np.zeros((a.shape[1], 1))]])
    solved = np.linalg.lstsq(whole, np.vstack([t, lift * old.T]), rcond=None)[0]
    found = twin.get_submodule("2")
    np.testing.assert_allclose(found.weight.detach()[:, [0, 2, 3, 5]].flatten(1), solved[:-1].T, atol=2e-4)
    np.testing.assert_allclose(found.bias.detach(), solved[-1], atol=2e-4)
    assert not found.weight[:, [1, 4]].any()


NETWORKS = {
    "resnet8 A": lambda: build_model({"name": "resnet8"}),
    "resnet8 B": lambda: build_model({"name": "resnet8", "shortcut": "B"}),
    "resnet18": lambda: resnet18(num_classes=6),
    "mobilenet_v2": lambda: mobilenet_v2(num_classes=6),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "resnet18" else ()) for n in NETWORKS])
def test_never_further_from_the_dense_network_than_the_bare_cut(name: str) -> None:
    torch.manual_seed(0)
    net, x = settled(NETWORKS[name]()), images(16, 32)
    plan = Plan(net, x)
    widths = {unit: plan.unit(unit).n_filters for unit in plan.choose()}
    kept = {unit: torch.arange(-(-width * 2 // 3)) for unit, width in widths.items()}
    silenced, batches = plan.silenced(kept), equal_batches([x], 8)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    twin, _ = reconstruct(net, silenced, batches, Reconstruction(positions=16, rounds=0))
    muted = copy.deepcopy(net)
    mute(muted, silenced)
    with torch.no_grad():
        answers = net(x)
        made_up, cut = (float((one(x) - answers).square().mean()) for one in (twin, muted))
    assert made_up < 0.5 * cut
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    # The proof of the cut runs with the new weights.
    small = plan.apply(kept, weights=twin)
    torch.testing.assert_close(small(x), twin(x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_gauss_newton_step_comes_closer_and_bits_are_equal_for_equal_seeds() -> None:
    torch.manual_seed(0)
    net, x = settled(build_model({"name": "resnet8"})), images(240, 16)
    plan = Plan(net, x)
    kept = {unit: torch.arange(plan.unit(unit).n_filters // 2) for unit in plan.choose()}
    how = Reconstruction(positions=64, ridge=1e-4, rounds=0)
    silenced, batches = plan.silenced(kept), equal_batches([x], 60)
    errors, twins = [], []
    for one in (how, replace(how, rounds=3), replace(how, rounds=3), replace(how, rounds=3, seed=1)):
        twin, _ = reconstruct(net, silenced, batches, one)
        with torch.no_grad():
            errors.append(float((twin(x) - net(x)).square().mean()))
        twins.append(twin.state_dict())
    assert errors[1] < 0.93 * errors[0]
    assert all(torch.equal(tensor, twins[2][key]) for key, tensor in twins[1].items())
    assert not all(torch.equal(tensor, twins[3][key]) for key, tensor in twins[1].items())


def test_a_gauss_newton_step_starts_from_what_least_squares_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solution with a constant leaves residuals without a mean; a step that forgot the constant would see one."""
    seen = []

    def spy(segment: Segment, weight: Tensor, constant: Tensor, movable: bool, seed: int) -> None:
        for i, target in enumerate(segment.targets):
            answer = segment.read(segment.between(segment.feed(weight, constant, i), i), i)
            seen.append((target - answer).movedim(1, -1).flatten(0, -2))

    monkeypatch.setattr(walk, "gauss_newton", spy)
    torch.manual_seed(0)
    net, x = settled(Residual(True)), images(24)
    how = Reconstruction(positions=10_000, ridge=1e-9, rounds=1)
    reconstruct(net, {"conv2": range(6)}, [x], how)
    assert len(seen) == 1
    assert seen[0].mean(0).abs().max() < 1e-3 * seen[0].std(0).min()


def test_only_layers_that_lost_inputs_are_solved_if_asked_for() -> None:
    net, unit, n_kept = residual(False)
    plan = Plan(net, images())
    silenced = plan.silenced({unit: torch.arange(n_kept)})
    twin, _ = reconstruct(net, silenced, equal_batches([images()], 8), replace(EXACT, resolve="lost"))
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, twin.get_parameter(name))}
    assert changed == {"conv2.weight"}


class PadsItself(nn.Conv2d):
    """As TensorFlow pads: nothing at the left, one pixel at the right."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, [0, 1, 0, 1]), self.weight, self.bias, self.stride)


def test_a_convolution_that_pads_in_its_forward_is_solved_for_what_it_multiplies() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), PadsItself(8, 5, 3, stride=2), nn.Flatten(), nn.Linear(180, 4)
    ).eval()
    double(net[0])
    twin, _ = reconstruct(net, {"2": [4, 5, 6, 7]}, equal_batches([images()], 8), EXACT)
    new = images(seed=5)
    torch.testing.assert_close(twin(new), net(new), rtol=1e-3, atol=1e-4)


def test_too_few_samples_are_counted_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    net, unit, n_kept = residual(False)
    plan = Plan(net, images())
    how = Reconstruction(positions=1, rounds=0)
    _, remarks = reconstruct(net, plan.silenced({unit: torch.arange(n_kept)}), [images(10)], how)
    # 6 channels x 9 weights and a constant, 10 images of 1 position; 8 inputs of the head and a constant are enough.
    assert "1 layers have fewer samples than unknowns, worst conv2, which lacks 45" in remarks[0]
    assert remarks[0] in caplog.text


def test_a_group_has_the_unknowns_of_its_own_filters() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU()
    ).eval()
    _, remarks = reconstruct(net, {"2": [3]}, [images(12)], Reconstruction(positions=1, rounds=0))
    # 3 x 3 weights of the two channels of a group and a constant, 12 images of 1 position; 3 channels that are left and
    # a constant before it.
    assert remarks[0].startswith("1 layers have fewer samples than unknowns, worst 4, which lacks 7: ")


def test_images_that_do_not_fit_into_memory_are_left_out_and_that_is_said() -> None:
    net, unit, n_kept = residual(False)
    silenced = Plan(net, images()).silenced({unit: torch.arange(n_kept)})
    # 12 channels of 12 x 12 floats in the block, 8 in the stream, for two networks and a step: about 35 kB an image.
    how = replace(EXACT, memory_gb=1e-3)
    _, remarks = reconstruct(net, silenced, equal_batches([images(100)], 10), how)
    used = int(remarks[0].split()[4])
    assert (
        remarks[0]
        == f"made up for on {used} of 100 calibration images, whose activations fit into pruning.memory_gb = 0.001"
    )
    assert 10 <= used <= 50


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.5, training=True)).mean((2, 3))  # type: ignore[no-any-return]


class Chooses(Draws):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y if y.sum() > 0 else -y).mean((2, 3))  # type: ignore[no-any-return]


class Fails(Draws):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).log()).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Draws, "answers the same images differently from call to call"),
        (Chooses, "torch.export cannot follow Chooses"),
        (Fails, "Fails answers images with NaN or infinite values"),
    ],
)
def test_networks_that_cannot_be_taken_step_by_step_are_refused(net: type[Draws], message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(InputError, match=message):
        reconstruct(net().eval(), {"b": [0]}, [images(4)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positions": 0}, "positions must be at least 1"),
        ({"ridge": 0.0}, "ridge must be a finite number above 0"),
        ({"memory_gb": 0.0}, "memory_gb must be above 0"),
        ({"rounds": -1}, "rounds must be at least 0"),
        ({"resolve": "all"}, "resolve must be one of shifted, lost"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Reconstruction(**settings)  # type: ignore[arg-type]


def test_images_are_needed() -> None:
    with pytest.raises(InputError, match="needs calibration images"):
        reconstruct(Draws().eval(), {"b": [0]}, [])


class Odd(nn.Module):
    """Layers that trip those up who look at maps alone."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
        self.bn = nn.BatchNorm2d(6)
        self.f1, self.f2, self.head = nn.Linear(8, 10), nn.Linear(10, 8), nn.Linear(6, 4)
        self.tokens, self.out = nn.BatchNorm1d(256), nn.Linear(8, 4)
        self.register_buffer("table", torch.rand(5, 8))
        if how == "silent norm":
            nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if self.how == "table":
            x = x + self.f2(self.f1(self.table).relu()).mean(0)[:, None, None]
        if self.how == "tokens":
            tokens = self.tokens(self.f2(self.f1(x.flatten(2).mT).relu()))
            return self.out(tokens.relu().mean(1))  # type: ignore[no-any-return]
        return self.head((self.bn(self.b(x)) + x[:, :6]).relu().mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("how", "silenced"),
    [
        ("table", {"f2": [0, 3]}), ("tokens", {"f1": [1], "f2": [0, 3]}),
        ("silent norm", {"a": [0], "b": [1, 2], "head": [0]}), ("large seed", {"b": [1, 2]}),
    ],
)  # fmt: skip
def test_layers_of_other_kinds_are_solved(how: str, silenced: dict[str, list[int]]) -> None:
    torch.manual_seed(0)
    net = Odd(how).eval()
    seed = 2**32 - 1 if how == "large seed" else 0
    twin, _ = reconstruct(net, silenced, [torch.rand(4, 3, 16, 16) for _ in range(4)], Reconstruction(seed=seed))
    assert all(values.isfinite().all() for values in twin.parameters())


@pytest.mark.parametrize(("n_batches", "n_tried"), [(3, 1), (4, 5)])
def test_without_held_out_batches_the_ridge_is_not_the_least(
    n_batches: int, n_tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    solved = Equations.solve

    def spy(self: Equations, start: Tensor, ridge: float) -> Tensor | None:
        used.append(ridge)
        return solved(self, start, ridge)

    monkeypatch.setattr(Equations, "solve", spy)
    torch.manual_seed(0)
    batches = [torch.rand(4, 3, 16, 16) for _ in range(n_batches)]
    reconstruct(Odd("").eval(), {"b": [1, 2]}, batches, Reconstruction(ridge=None, rounds=0))
    assert len(set(used)) == n_tried
    assert n_tried > 1 or set(used) == {1e-2}
