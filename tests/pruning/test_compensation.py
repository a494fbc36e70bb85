"""Second moments, least squares and elimination against plain NumPy on explicit patches."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks.registry import build_model
from freqprune.pruning.compensation import compensate, readers_of
from freqprune.pruning.criteria import _readers, scores
from freqprune.pruning.elimination import elimination_errors
from freqprune.pruning.graph import ChannelGraph
from freqprune.pruning.importance import Evidence
from freqprune.pruning.moments import (
    columns_of,
    input_moments,
    least_squares,
    mean_response,
    output_gradients,
)
from freqprune.pruning.surgery import Plan

X = torch.rand(6, 3, 10, 10)


class Chain(nn.Module):
    """Two convolutions with what a reader can have after it: a bias, a batch norm, or neither."""

    def __init__(self, ending: str = "norm", **second: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 5, 3, bias=ending == "bias", **second)  # type: ignore[arg-type]
        self.norm = nn.BatchNorm2d(5) if ending == "norm" else nn.Identity()
        self.linear = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv2(torch.relu(self.conv1(x))))
        return self.linear(torch.relu(x).mean((2, 3)))


def patches(net: Chain, x: Tensor) -> np.ndarray:
    """Rows of what conv2 multiplies with its weights and a 1, by unfold."""
    conv = net.conv2
    with torch.no_grad():
        rows = nn.functional.unfold(
            torch.relu(net.conv1(x)), conv.kernel_size, conv.dilation, conv.padding, conv.stride
        )
    flat = rows.transpose(1, 2).flatten(0, 1).double().numpy()
    return np.hstack([flat, np.ones((len(flat), 1))])


@pytest.mark.parametrize("second", [{}, {"padding": 1, "stride": 2}, {"dilation": 2, "padding": (2, 1)}], ids=str)
def test_moments_are_those_of_the_patches(second: dict[str, object]) -> None:
    net = Chain(**second).eval()
    rows = patches(net, X)
    found = input_moments(net, ["conv2"], X.split(4), n_positions=None)["conv2"]
    np.testing.assert_allclose(found.numpy(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
    # Random positions estimate the same.
    some = input_moments(net, ["conv2"], [X] * 60, n_positions=8)["conv2"]
    assert abs(some - found).max() < 0.1 * found.abs().max()
    assert torch.equal(some, input_moments(net, ["conv2"], [X] * 60, n_positions=8)["conv2"])


def test_moments_of_a_linear_layer() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    x = torch.rand(50, 3, 2, 2)
    rows = torch.cat([x.flatten(1), torch.ones(50, 1)], 1).double()
    torch.testing.assert_close(input_moments(net, ["1"], [x])["1"], rows.T @ rows / 50, rtol=1e-5, atol=1e-6)


def test_moments_refuse_what_they_cannot_take() -> None:
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(InputError, match="without groups"):
        input_moments(grouped, ["0"], [])
    with pytest.raises(InputError, match="no batch was given"):
        input_moments(Chain(), ["conv2"], [])
    with pytest.raises(InputError, match=r"reads 9000 values, at most 8192 .*pruning.exclude"):
        input_moments(nn.Sequential(nn.Linear(9000, 1)), ["0"], [])


def test_least_squares_is_that_of_numpy() -> None:
    net = Chain(padding=1).eval()
    rows = patches(net, X)
    weight = net.conv2.weight.detach().flatten(1)
    kept = columns_of(net.conv2, [0, 2, 3, 7])
    moments = torch.from_numpy(rows.T @ rows / len(rows))
    found, constant = least_squares(weight, moments, kept, ridge=0)
    expected, *_ = np.linalg.lstsq(rows[:, [*kept.tolist(), -1]], rows[:, :-1] @ weight.double().numpy().T, rcond=None)
    np.testing.assert_allclose(found.numpy(), expected[:-1].T, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(constant.numpy(), expected[-1], rtol=1e-5, atol=1e-7)
    without, zero = least_squares(weight, moments, kept, constant=False, ridge=0)
    expected, *_ = np.linalg.lstsq(rows[:, kept.tolist()], rows[:, :-1] @ weight.double().numpy().T, rcond=None)
    np.testing.assert_allclose(without.numpy(), expected.T, rtol=1e-5, atol=1e-7)
    assert not zero.any()


def test_mean_response_by_hand() -> None:
    rows = patches(Chain(), X)
    weight = Chain().conv2.weight.detach().flatten(1)
    removed = columns_of(Chain().conv2, [1, 4])
    found = mean_response(weight, torch.from_numpy(rows.T @ rows / len(rows)), removed)
    np.testing.assert_allclose(
        found.numpy(), (rows[:, removed.tolist()] @ weight.double().numpy()[:, removed.tolist()].T).mean(0), rtol=1e-6
    )


def test_elimination_follows_brute_force() -> None:
    """At every step the filter whose loss a refit by lstsq makes up for best, and its error."""
    net = Chain().eval()
    rows = patches(net, X)
    weight = net.conv2.weight.detach().flatten(1).double()
    target = rows[:, :-1] @ weight.numpy().T
    columns = torch.stack([columns_of(net.conv2, [c]) for c in range(8)])
    found = elimination_errors({"conv2": (weight, torch.from_numpy(rows.T @ rows / len(rows)), columns)}, ridge=0)

    def error(left: list[int]) -> float:
        inputs = rows[:, [*columns[left].flatten().tolist(), -1]]
        fit, *_ = np.linalg.lstsq(inputs, target, rcond=None)
        return float(((inputs @ fit - target) ** 2).mean(0).sum())

    variance = float(target.var(0).sum())
    left, before, worst = list(range(8)), 0.0, 0.0
    for _ in range(7):
        costs = {c: error([d for d in left if d != c]) for c in left}
        gone = min(costs, key=costs.__getitem__)
        worst = max(worst, (costs[gone] - before) / variance)
        assert float(found[gone]) == pytest.approx(worst, rel=1e-4)
        left.remove(gone)
        before = costs[gone]


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


def test_compensation_after_batch_norms_were_re_estimated() -> None:
    net = Chain().eval()
    plan, kept = Plan(net, X), {"conv1": torch.tensor([0, 1, 2, 5])}
    moments = input_moments(net, ["conv2"], [X], n_positions=None)
    small = plan.apply(kept)
    with torch.no_grad():
        small.norm.running_mean.copy_(small.conv2(torch.relu(small.conv1(X))).mean((0, 2, 3)))
        compensate(plan, small, kept, moments, "least_squares", reestimated=True)
        mean = small.conv2(torch.relu(small.conv1(X))).mean((0, 2, 3))
    torch.testing.assert_close(small.norm.running_mean, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["mean", "least_squares"])
def test_a_bias_before_a_norm_that_was_re_estimated_moves_with_the_weights_only(method: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)).eval()
    plan, kept = Plan(net, X), {"0": torch.tensor([0, 1, 5])}
    moments = input_moments(net, ["2"], [X], n_positions=None)
    small = plan.apply(kept)
    convolutions, norm = nn.Sequential(*list(small.children())[:3]), small.get_submodule("3")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    with torch.no_grad():
        norm.running_mean.copy_(convolutions(X).mean((0, 2, 3)))
        compensate(plan, small, kept, moments, method, reestimated=True)
        mean = convolutions(X).mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("layer", ["conv2", "linear"])
def test_output_gradients_against_those_of_every_logit(layer: str) -> None:
    """Random sums of logits come to the sum over them, computed logit by logit."""
    net = Chain().eval().requires_grad_(False)
    x = X[:3]
    module = net.get_submodule(layer)
    expected = torch.zeros(module.weight.shape[0], module.weight.shape[0], dtype=torch.float64)
    caught: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: caught.append(output))
    for image in x:
        caught.clear()
        logits = net(image[None].requires_grad_(True))[0]
        for value in logits:
            (g,) = torch.autograd.grad(value, caught[-1], retain_graph=True)
            g = g[0].flatten(1).double() if g.dim() == 4 else g.T.double()
            assert g.shape[0] == len(expected)
            expected += g @ g.T / len(x)
    handle.remove()
    found = output_gradients(net, [layer], [x.repeat(300, 1, 1, 1)] * 5)[layer]
    assert float((found - expected).norm() / expected.norm()) < 0.05
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_gradients_that_do_not_arrive_are_said() -> None:
    net = Chain().eval()
    net.unused = torch.nn.Conv2d(3, 3, 1)
    with pytest.raises(InputError, match="no gradients of unused: the forward does not reach them"):
        output_gradients(net, ["unused"], [X[:1]])
    with pytest.raises(InputError, match="no batch was given"):
        output_gradients(net, ["conv2"], [])
    with pytest.raises(InputError, match="must return logits"):
        output_gradients(net.conv1, [""], [X[:1]])


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
