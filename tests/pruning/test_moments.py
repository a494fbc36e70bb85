"""Second moments of what layers read, gradients of the logits there, and what is solved from them."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from freqprune.errors import InputError
from freqprune.pruning.elimination import elimination_errors
from freqprune.pruning.moments import (
    columns_of,
    counted_moments,
    input_moments,
    least_squares,
    mean_response,
    output_gradients,
)

X = torch.rand(6, 3, 10, 10, generator=torch.Generator().manual_seed(0))


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


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("kernel", "dilation"), [(2, 1), ((4, 3), 1), (2, 3)], ids=str)
def test_moments_of_layers_with_even_kernels_give_those_of_their_outputs(
    kernel: int | tuple[int, int], dilation: int
) -> None:
    conv = nn.Conv2d(3, 5, kernel, padding="same", dilation=dilation, bias=False).double()
    moments = input_moments(nn.Sequential(conv), ["0"], [X.double()], n_positions=None)["0"]
    weight = conv.weight.detach().flatten(1)
    outputs = conv(X.double()).detach().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(weight @ moments[:-1, :-1] @ weight.T, outputs.T @ outputs / len(outputs))
    torch.testing.assert_close(weight @ moments[:-1, -1], outputs.mean(0))


def test_layers_have_four_samples_a_value_where_there_are_as_many_positions() -> None:
    # Of 6 images: 4 x 27 / 6 and 4 x 72 / 6 positions; the linear layer has but one.
    _, counts = counted_moments(Chain(), ["conv1", "conv2", "linear"], [X], n_positions=2)
    assert counts == {"conv1": 6 * 18, "conv2": 6 * 48, "linear": 6}
    assert counted_moments(Chain(), ["conv1"], [X], n_positions=20)[1] == {"conv1": 6 * 20}


def test_moments_of_a_network_in_training_are_those_of_its_running_statistics() -> None:
    net = Chain()
    net.norm.running_mean.uniform_(-0.3, 0.3)
    before = copy.deepcopy(net)
    found = input_moments(net, ["linear"], [X])["linear"]
    # A new norm's variances are 1 and its bias 0.
    with torch.no_grad():
        maps = net.conv2(torch.relu(net.conv1(X))).double() - before.norm.running_mean[:, None, None]
    rows = torch.cat([torch.relu(maps / (1 + 1e-5) ** 0.5).mean((2, 3)), torch.ones(len(X), 1)], 1)
    torch.testing.assert_close(found, rows.T @ rows / len(X), rtol=1e-5, atol=1e-6)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in net.state_dict().items())


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


def test_gradients_of_a_layer_that_runs_twice_are_those_of_both() -> None:
    class AtTwoSizes(nn.Module):
        def __init__(self, one: nn.Module, other: nn.Module) -> None:
            super().__init__()
            self.one, self.other = one, other

        def forward(self, x: Tensor) -> Tensor:
            smaller = nn.functional.avg_pool2d(x, 2)
            return self.one(x).mean((2, 3)) + self.other(smaller).square().mean((2, 3))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    head = nn.Conv2d(3, 4, 3)
    twin = nn.Conv2d(3, 4, 3)
    twin.load_state_dict(head.state_dict())
    apart = output_gradients(AtTwoSizes(head, twin), ["one", "other"], [X[:3]])
    both = output_gradients(AtTwoSizes(head, head), ["one"], [X[:3]])
    torch.testing.assert_close(both["one"], apart["one"] + apart["other"])

    class Iterated(nn.Module):
        """Runs once without gradients, once in vain and once for its answer."""

        def __init__(self) -> None:
            super().__init__()
            self.one = head

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.one(x)
            self.one(2 * x)
            return self.one(x).mean((2, 3))  # type: ignore[no-any-return]

    class Once(Iterated):
        def forward(self, x: Tensor) -> Tensor:
            return self.one(x).mean((2, 3))  # type: ignore[no-any-return]

    found, expected = (output_gradients(net, ["one"], [X[:3]])["one"] for net in (Iterated(), Once()))
    torch.testing.assert_close(found, expected)


def test_moments_of_a_network_in_half_precision() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), 40 * X
    with torch.no_grad():
        net[0].weight.abs_()
    expected = input_moments(net, ["2"], [x], n_positions=None)["2"]
    # The sum over positions is beyond what half precision holds.
    assert float(expected[0, 0]) * x[:, 0].numel() > 65_504
    found = input_moments(net.half(), ["2"], [x.half()], n_positions=None)["2"]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_gradients_that_do_not_arrive_are_said() -> None:
    net = Chain().eval()
    net.unused = torch.nn.Conv2d(3, 3, 1)
    with pytest.raises(InputError, match="no gradients of unused: the forward does not reach them"):
        output_gradients(net, ["unused"], [X[:1]])
    with pytest.raises(InputError, match="no batch was given"):
        output_gradients(net, ["conv2"], [])
    with pytest.raises(InputError, match="must return logits"):
        output_gradients(net.conv1, [""], [X[:1]])


def test_checkpointed_layers_have_the_gradients_of_others() -> None:
    class Net(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
            self.checkpointed = checkpointed

        def forward(self, x: Tensor) -> Tensor:
            def both(x: Tensor) -> Tensor:
                return self.b(self.a(x).relu()).relu()  # type: ignore[no-any-return]

            x = checkpoint(both, x, use_reentrant=False) if self.checkpointed else both(x)
            return self.c(x.mean((2, 3)))  # type: ignore[no-any-return]

    batch = torch.rand(2, 3, 8, 8)
    found, expected = (output_gradients(Net(how).eval(), ["a", "b"], [batch]) for how in (True, False))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
