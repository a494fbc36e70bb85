"""Second moments, least squares and elimination against plain NumPy on explicit patches."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks.registry import build_model
from freqprune.pruning.compensation import compensate, in_equal_parts, readers_of, recalibrate_batch_norm
from freqprune.pruning.criteria import _readers, scores
from freqprune.pruning.graph import ChannelGraph
from freqprune.pruning.importance import Evidence
from freqprune.pruning.moments import (
    RIDGE,
    columns_of,
    input_moments,
    output_gradients,
)
from freqprune.pruning.reconstruction import reconstruct
from freqprune.pruning.surgery import Plan
from tests.pruning.test_moments import Chain, X, patches


def test_a_double_is_redundant_and_nothing_is_lost_without_it() -> None:
    net = Chain(padding=1).eval()
    with torch.no_grad():
        for parameter in (net.conv1.weight, net.conv1.bias):
            parameter[6] = parameter[2]
    plan = Plan(net, X)
    moments = input_moments(net, readers_of(plan.graph, ["conv1"]), [X], n_positions=None)
    score = scores("redundancy", Evidence(net, graph=plan.graph, moments=moments), ["conv1"])["conv1"]
    assert set(score.argsort()[:1].tolist()) <= {2, 6}
    # The ridge is what is left of it.
    assert score.min() < 0.02 * score.median()
    kept = {"conv1": torch.tensor([i for i in range(8) if i != 6])}
    small = plan.apply(kept)
    compensate(plan, small, kept, moments, "least_squares")
    with torch.no_grad():
        torch.testing.assert_close(small(X), net(X), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("ending", ["norm", "bias", "neither"])
@pytest.mark.parametrize("method", ["mean", "least_squares"])
def test_compensation_comes_closer(ending: str, method: str) -> None:
    net = Chain(ending).eval()
    plan = Plan(net, X)
    kept = {"conv1": torch.tensor([0, 1, 2, 5])}
    moments = input_moments(net, ["conv2"], [X], n_positions=None)

    def distance(method: str) -> tuple[float, list[str]]:
        small = plan.apply(kept)
        remarks = compensate(plan, small, kept, moments, method)
        with torch.no_grad():
            before = net.norm(net.conv2(torch.relu(net.conv1(X))))
            after = small.norm(small.conv2(torch.relu(small.conv1(X))))
        return float((after - before).square().mean()), remarks

    plain, none = distance("none")
    found, remarks = distance(method)
    assert none == []
    if ending == "neither":
        assert "no bias and no batch norm of its own" in remarks[0]
        assert found == pytest.approx(plain) if method == "mean" else found < plain
    else:
        assert remarks == []
        assert found < (1.0 if method == "mean" else 0.7) * plain
        if method == "mean":
            # Exact where the mean is: the average over all positions is that of the dense network.
            small = plan.apply(kept)
            compensate(plan, small, kept, moments, method)
            with torch.no_grad():
                outputs = [n.norm(n.conv2(torch.relu(n.conv1(X)))).mean((0, 2, 3)) for n in (net, small)]
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_where_no_constant_can_go_least_squares_does_without() -> None:
    net = Chain("neither").eval()
    kept = torch.tensor([0, 1, 2, 5])
    plan, moments = Plan(net, X), input_moments(net, ["conv2"], [X], n_positions=None)
    small = plan.apply({"conv1": kept})
    compensate(plan, small, {"conv1": kept}, moments, "least_squares")
    rows, weight = patches(net, X)[:, :-1], net.conv2.weight.detach().flatten(1).double().numpy()
    left = rows[:, columns_of(net.conv2, kept.tolist()).tolist()]
    # The ridge as further equations, towards zero.
    lift = np.sqrt(RIDGE * np.square(left).mean() * len(left)) * np.eye(left.shape[1])
    targets = np.vstack([rows @ weight.T, np.zeros((len(lift), len(weight)))])
    expected, *_ = np.linalg.lstsq(np.vstack([left, lift]), targets, rcond=None)
    np.testing.assert_allclose(small.conv2.weight.detach().flatten(1), expected.T, atol=1e-4)


class SharedNorm(nn.Module):
    """Two layers, of which one reads the network's input, with one norm after both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1, bias=False)
        self.b, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(torch.relu(self.stem(x)))) * self.norm(self.b(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["mean", "least_squares", "sequential"])
def test_a_norm_that_another_layer_shares_takes_no_constant(method: str) -> None:
    net = SharedNorm().eval()
    plan, kept = Plan(net, X), {"stem": torch.tensor([0, 1, 5])}
    if method == "sequential":
        small, _ = reconstruct(net, plan.silenced(kept), [X])
    else:
        small = plan.apply(kept)
        remarks = compensate(plan, small, kept, input_moments(net, ["a"], [X]), method)
        assert [remark.split(":")[0] for remark in remarks] == ["a has no bias and no batch norm of its own after it"]
    torch.testing.assert_close(small.norm(small.b(X)), net.norm(net.b(X)), rtol=0, atol=0)


class NormAct(nn.BatchNorm2d):
    """A batch norm that other modules follow within it, as timm's do."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, 1e-5)
        return self.act(self.drop(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["mean", "least_squares"])
def test_the_constant_goes_into_a_norm_with_modules_of_its_own(method: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), NormAct(4)).eval()
    plan, kept = Plan(net, X), {"0": torch.tensor([0, 1, 5])}
    small = plan.apply(kept)
    assert not compensate(plan, small, kept, input_moments(net, ["2"], [X], n_positions=None), method)
    with torch.no_grad():
        before, after = (two[:3](X).mean((0, 2, 3)) - two[3].running_mean for two in (net, small))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_rows_stay_in_the_order_of_the_filters() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    moments = input_moments(net, ["2", "4"], [X], n_positions=None)
    answers = []
    for order in ([1, 3], [3, 1]):
        plan, kept = Plan(net, X), {"0": torch.tensor([0, 2]), "2": torch.tensor(order)}
        small = plan.apply(kept)
        compensate(plan, small, kept, moments, "least_squares")
        answers.append(small(X))
    torch.testing.assert_close(answers[1], answers[0])


class Twice(nn.Module):
    """A layer that reads each filter in two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(10, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        return self.conv2(torch.cat([x, nn.functional.max_pool2d(x, 3, 1, 1)], 1))  # type: ignore[no-any-return]


def test_all_that_a_filter_is_read_as_goes_with_it() -> None:
    net = Twice().eval()
    moments = input_moments(net, ["conv2"], [X], n_positions=None)
    evidence = Evidence(net, graph=ChannelGraph(net, X), moments=moments)
    _, _, columns = _readers(evidence, "conv1")["conv2"]
    for number in range(5):
        of_filter = torch.zeros(10, 3, 3)
        of_filter[[number, number + 5]] = 1
        assert columns[number].sort().values.tolist() == of_filter.flatten().nonzero().flatten().tolist()


def test_compensation_in_a_residual_network_with_streams() -> None:
    torch.manual_seed(0)
    net = build_model({"name": "resnet14", "stage_widths": [4, 8, 8]}).eval()
    x = torch.rand(8, 3, 16, 16)
    plan = Plan(net, x)
    units = plan.choose(streams=True)
    moments = input_moments(net, readers_of(plan.graph, units), [x], n_positions=None)
    table = scores("redundancy", Evidence(net, graph=plan.graph, moments=moments), units)
    kept = {unit: score.argsort(descending=True)[: len(score) - 1].sort().values for unit, score in table.items()}
    distances = {}
    for method in ("none", "least_squares"):
        small = plan.apply(kept)
        compensate(plan, small, kept, moments, method)
        with torch.no_grad():
            distances[method] = float((small(x) - net(x)).square().mean())
    assert distances["least_squares"] < distances["none"]


def test_compensation_refuses() -> None:
    net = Chain().eval()
    plan, kept = Plan(net, X), {"conv1": torch.tensor([0])}
    with pytest.raises(InputError, match="must be one of none, mean, least_squares, got 'median'"):
        compensate(plan, plan.apply(kept), kept, {}, "median")
    with pytest.raises(InputError, match=r"no moments of 'conv2'"):
        compensate(plan, plan.apply(kept), kept, {}, "mean")


def test_readers_are_layers_with_weights() -> None:
    graph = ChannelGraph(build_model({"name": "resnet8"}), torch.rand(1, 3, 8, 8))
    assert readers_of(graph, ["conv1"]) == ["layer1.0.conv1", "layer2.0.conv1"]
    assert copy.deepcopy(graph.units["conv1"]).members == ("conv1", "layer1.0.conv2")


def test_logit_redundancy_spares_what_the_answer_depends_on() -> None:
    """Two filters that nothing replaces; the class scores do not read what one of them feeds."""
    net = Chain(padding=1).eval()
    with torch.no_grad():
        # conv2's second half reads filter 0 only and is not read itself.
        half = net.conv2.out_channels // 2
        net.conv2.weight[:half, 0] = 0
        net.conv2.weight[half:, 1:] = 0
        net.linear.weight[:, half:] = 0
    plan = Plan(net, X)
    readers = readers_of(plan.graph, ["conv1"])
    moments, gradients = input_moments(net, readers, [X], n_positions=None), output_gradients(net, readers, [X])
    evidence = Evidence(net, graph=plan.graph, moments=moments, gradients_at=gradients)
    by_loss, by_output = (scores(name, evidence, ["conv1"])["conv1"] for name in ("logit_redundancy", "redundancy"))
    assert int(by_loss.argmin()) == 0
    assert float(by_loss[0]) < 1e-6 * float(by_loss.median())
    assert int(by_output.argmin()) != 0
    with pytest.raises(InputError, match=r"gradients_at=output_gradients"):
        scores("logit_redundancy", Evidence(net, graph=plan.graph, moments=moments), ["conv1"])


def test_left_over_images_count_no_more_than_others() -> None:
    images = torch.cat([torch.rand(128, 3, 4, 4), 50 + torch.rand(2, 3, 4, 4)])
    parts = in_equal_parts(images, 128)
    assert [len(part) for part in parts] == [65, 65]
    assert in_equal_parts(images[:1], 128) == []
    net = nn.Sequential(nn.BatchNorm2d(3))
    recalibrate_batch_norm(net, parts)
    torch.testing.assert_close(net[0].running_mean, images.mean((0, 2, 3)))


def test_an_error_leaves_the_norms_as_they_were() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3)).eval()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError):
        recalibrate_batch_norm(net, [torch.rand(4, 3, 4, 4), torch.rand(4, 2, 4, 4)])
    assert not net.training
    assert net[0].momentum == 0.1
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_norms_that_were_frozen_stay_so() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval())
    recalibrate_batch_norm(net, [torch.rand(4, 3, 4, 4)])
    assert [module.training for module in net.modules()] == [True, True, False]
