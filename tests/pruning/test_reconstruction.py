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
from freqprune.networks.trace import Trace, equal_batches
from freqprune.pruning import walk
from freqprune.pruning.damage import logit_errors
from freqprune.pruning.equations import Equations, Sums, solve
from freqprune.pruning.moments import input_moments
from freqprune.pruning.recipe import Reconstruction
from freqprune.pruning.reconstruction import mute, reconstruct
from freqprune.pruning.refinement import Segment, gauss_newton
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


@pytest.mark.parametrize("constant", [True, False])
def test_weights_are_those_of_numpys_least_squares(constant: bool) -> None:
    torch.manual_seed(0)
    second = nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=constant)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), second, nn.AvgPool2d(2)).eval()
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
    lift = np.sqrt(ridge * (a.var(0) if constant else np.square(a)).mean() * len(a))
    n = int(constant)
    whole = np.block([[a, np.ones((len(a), n))], [lift * np.eye(a.shape[1]), np.zeros((a.shape[1], n))]])
    solved = np.linalg.lstsq(whole, np.vstack([t, lift * old.T]), rcond=None)[0]
    found = twin.get_submodule("2")
    np.testing.assert_allclose(found.weight.detach()[:, [0, 2, 3, 5]].flatten(1), solved[: a.shape[1]].T, atol=2e-4)
    if constant:
        np.testing.assert_allclose(found.bias.detach(), solved[-1], atol=2e-4)
    assert not found.weight[:, [1, 4]].any()


class Summed(nn.Module):
    """A shortcut that runs before its branch, and a norm after the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.conv = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        return self.norm(self.conv(x)) + shortcut  # type: ignore[no-any-return]


def test_a_branch_makes_up_for_what_a_stream_lost_behind_its_norm() -> None:
    torch.manual_seed(0)
    net, x = settled(Summed().double()), images().double()
    # The branch reads all that the shortcut has lost: nothing need be missing in their sum.
    twin, _ = reconstruct(net, {"shortcut": [1]}, [x], EXACT)
    assert not twin.get_parameter("shortcut.weight")[:, 1].any()
    torch.testing.assert_close(twin(x), net(x), rtol=1e-6, atol=1e-7)


def test_weights_that_come_out_worse_than_the_bare_cut_are_not_kept() -> None:
    net = nn.Sequential(nn.Linear(2, 1), nn.ReLU()).eval()
    with torch.no_grad():
        net[0].weight.fill_(1)
        net[0].bias.zero_()
    x = torch.tensor([[1.0, 0], [2, 0], [1, 0], [2, 0], [1, 0], [2, 0], [1, -40], [2, -40]])
    # Without the second feature six of eight answers stay right; with its mean, -10, as a constant, all would be zero.
    twin, remarks = reconstruct(net, {"0": [1]}, [x])
    assert twin.get_parameter("0.weight").tolist() == [[1, 0]]
    assert twin.get_parameter("0.bias").tolist() == [0]
    assert [remark.split(" the answers ")[0] for remark in remarks] == ["making up for the cut in sequence brought"]


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


def test_each_gauss_newton_step_learns_from_other_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(walk, "gauss_newton", lambda segment, *_: seen.append(list(segment.numbers)))
    monkeypatch.setattr(walk, "STEP_PIXELS", 2 * 4 * 12 * 12)
    # Two of five batches of 4 images of 12 x 12 fit into a step.
    reconstruct(Residual(True).eval(), {"conv2": range(6)}, equal_batches([images(20)], 4), replace(EXACT, rounds=3))
    assert seen == [[0, 1], [2, 3], [0, 4]]


@pytest.mark.parametrize("movable", [True, False])
def test_a_step_counts_on_constants_only_where_they_can_move(movable: bool) -> None:
    x, t = torch.tensor([[1.0], [3.0]]).double(), torch.full((2, 1), 2.0).double()
    energy = x.square().mean(0, keepdim=True)
    segment = Segment(lambda w, c, i: x @ w.T + c, lambda z, i: z, lambda h, i: h, [t], energy, -1)
    start = torch.zeros(1, 1).double(), torch.zeros(1).double()
    found = gauss_newton(segment, *start, movable)
    assert found is not None
    # Normal equations of 1 w + c = 2 and 3 w + c = 2, a tenth more on their diagonal.
    expected = np.linalg.solve([[11, 4], [4, 2.2]], [8, 4]) if movable else [8 / 11, 0]
    np.testing.assert_allclose([float(found[0]), float(found[1])], expected, rtol=1e-9)


@pytest.mark.parametrize(("start", "share"), [(0.5, 1.0), (2.0, 0.5), (10.0, None)])
def test_a_step_is_taken_only_as_far_as_it_comes_closer(start: float, share: float | None) -> None:
    """Towards the zero of an arc tangent, whose Newton steps go too far from 1.39 on."""
    zero = torch.zeros(1, 1).double()
    segment = Segment(lambda w, c, i: w + c, lambda z, i: z.atan(), lambda h, i: h, [zero], zero + 1)
    found = gauss_newton(segment, zero + start, zero[0], False)
    if share is None:
        assert found is None
    else:
        assert found is not None
        # By a derivative of 1 / (1 + w^2), and damped by a tenth of the diagonal.
        assert float(found[0]) == pytest.approx(start - share * np.arctan(start) * (1 + start**2) / 1.1, rel=1e-9)


@pytest.mark.parametrize(("held_out", "ridge"), [(1.0, 1.0), (3.0, 1e-4)])
def test_the_ridge_is_the_one_that_does_best_on_what_it_has_not_seen(held_out: float, ridge: float) -> None:
    parts = [Sums(1, (torch.zeros(1), torch.zeros(1))) for _ in range(2)]
    x = torch.tensor([[1.0], [-1.0]])
    # The first half wants a weight of 3; a ridge of r towards 1 leaves 2 / (1 + r) of the 2 to go.
    for part, slope in zip(parts, (3.0, held_out), strict=True):
        part.add(x, slope * x)
    found = solve(parts, torch.ones(1, 1), torch.tensor([True]), None, constant=True)
    assert found is not None
    assert float(found[0]) == pytest.approx(1 + ((3 + held_out) / 2 - 1) / (1 + ridge), rel=1e-9)


def test_a_held_out_error_that_rounding_makes_negative_is_none() -> None:
    """A filter that another one makes up for wholly: what is missed without a ridge is rounding, of either sign."""
    parts = [Sums(1, (torch.zeros(1), torch.zeros(1))) for _ in range(2)]
    x = torch.tensor([[1.0], [-1.0]])
    for part in parts:
        part.add(x, 2 * x)
    parts[1].tt = parts[1].tt * (1 - 5e-8)
    found = solve(parts, torch.ones(1, 1), torch.tensor([True]), None, constant=True)
    assert found is not None
    assert float(found[0]) == pytest.approx(1 + 1 / (1 + 1e-4), rel=1e-9)


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
    batches = [torch.rand(4, 3, 16, 16) for _ in range(4)]
    twin, _ = reconstruct(net, silenced, batches, Reconstruction(seed=seed))
    assert all(values.isfinite().all() for values in twin.parameters())
    muted = copy.deepcopy(net)
    mute(muted, silenced)
    x = torch.cat(batches)
    with torch.no_grad():
        made_up, cut = (float((one(x) - net(x)).square().mean()) for one in (twin, muted))
    assert made_up < cut


def test_a_layer_that_is_not_solved_is_said_once_and_nothing_moves_for_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 34 * 34, 4)).eval()
    twin, remarks = reconstruct(net, {"3": range(4 * 34 * 34)}, [torch.rand(16, 3, 34, 34)])
    assert sum("reads 9248 values" in one for one in remarks) == 1
    assert torch.equal(twin.get_parameter("0.weight"), net.get_parameter("0.weight"))


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


class Elsewhere(nn.Module):
    """Adds a bias that is made of other parameters, as the queries, keys and values of BEiT, EVA and Swin v2 do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 6, bias=False)
        self.q, self.v = nn.Parameter(torch.full((3,), 3.0)), nn.Parameter(torch.full((3,), 3.0))
        self.c, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x.flatten(2).transpose(1, 2)))
        x = F.linear(x, self.b.weight, torch.cat((self.q, self.v)))
        return self.head(F.relu(self.c(F.relu(x))).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_bias_that_the_forward_makes_of_other_parameters_counts_once(rounds: int) -> None:
    torch.manual_seed(0)
    net, x = Elsewhere().eval(), images()
    double(net.a)
    twin, _ = reconstruct(net, {"b": [4, 5, 6, 7]}, equal_batches([x], 8), replace(EXACT, rounds=rounds))
    new = images(seed=5)
    muted = copy.deepcopy(net)
    mute(muted, {"b": [4, 5, 6, 7]})
    with torch.no_grad():
        made_up, cut = (float((one(new) - net(new)).abs().max()) for one in (twin, muted))
    assert made_up < 2e-3 * cut


def test_it_counts_once_in_the_measured_change_of_the_logits_too() -> None:
    torch.manual_seed(0)
    net, x = Elsewhere().eval(), images(8)
    double(net.a)
    moments = input_moments(net, ["b"], [x], n_positions=None)
    weight = net.b.weight.detach()
    columns = torch.arange(8)[:, None]
    order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    copies, everything = logit_errors(net, {"b": (weight, moments["b"], columns)}, order, [4, 8], [x], Trace(net, x))
    assert float(copies) < 1e-6
    assert float(everything) > 1e-6


class Late(nn.Linear):
    """Adds its bias after the product."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.bias


def test_a_bias_that_is_added_after_the_product_counts_once_in_the_change_of_the_logits() -> None:
    class AddsLater(Elsewhere):
        def __init__(self) -> None:
            super().__init__()
            self.b = Late(8, 6)
            nn.init.constant_(self.b.bias, 3.0)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(F.relu(self.a(x.flatten(2).transpose(1, 2))))
            return self.head(F.relu(self.c(F.relu(x))).mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net, x = AddsLater().eval(), images(8)
    double(net.a)
    moments = input_moments(net, ["b"], [x], n_positions=None)
    given = {"b": (net.b.weight.detach(), moments["b"], torch.arange(8)[:, None])}
    order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    copies, everything = logit_errors(net, given, order, [4, 8], [x], Trace(net, x))
    assert float(copies) < 1e-6
    assert float(everything) > 1e-6


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_bias_of_two_layers_stays_as_it_is(rounds: int) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q, self.a, self.b = (nn.Conv2d(n, 8, 1) for n in (3, 8, 8, 8))
            self.b.bias, self.head = self.a.bias, nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.p, self.q, self.a, self.b):
                x = F.relu(layer(x))
            return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net, batches = Tied().eval(), equal_batches([images()], 8)
    twin, _ = reconstruct(net, {"q": [4, 5, 6, 7]}, batches, replace(EXACT, rounds=rounds))
    assert torch.equal(twin.a.bias, net.a.bias)
    assert torch.equal(twin.b.bias, net.a.bias)
    assert not torch.equal(twin.a.weight, net.a.weight)


def test_networks_in_half_precision_are_made_up_for_as_well_as_others() -> None:
    net, unit, n_kept = residual(False)
    net, batches = net.eval(), equal_batches([images() * 300], 8)
    gone = Plan(net, batches[0]).silenced({unit: torch.arange(n_kept - 2)})
    exact, _ = reconstruct(net, gone, batches, replace(EXACT, rounds=3))
    half, _ = reconstruct(copy.deepcopy(net).half(), gone, [one.half() for one in batches], replace(EXACT, rounds=3))
    assert {one.dtype for one in half.parameters()} == {torch.float16}
    with torch.no_grad():
        expected, new = net(batches[0]), half.float()(batches[0])
        assert float((new - expected).square().sum()) < 1.2 * float((exact(batches[0]) - expected).square().sum())
