"""The measured change of the logits against the network that surgery and compensation really leave."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks.hooks import hooked
from freqprune.networks.registry import build_model
from freqprune.networks.trace import Trace, equal_batches
from freqprune.pruning.compensation import compensate, readers_of
from freqprune.pruning.criteria import scores
from freqprune.pruning.damage import corrected, logit_errors
from freqprune.pruning.importance import Evidence
from freqprune.pruning.moments import columns_of, input_moments, output_gradients
from freqprune.pruning.surgery import Plan

X = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return build_model({"name": "resnet8", "stage_widths": [6, 8, 8]}).eval()


def evidence_of(net: nn.Module, plan: Plan, layers: list[str]) -> Evidence:
    readers = readers_of(plan.graph, layers)
    moments, gradients = input_moments(net, readers, [X], n_positions=None), output_gradients(net, readers, [X])
    return Evidence(net, graph=plan.graph, moments=moments, gradients_at=gradients, frames=[X[:7], X[7:]])


def test_it_is_the_change_that_surgery_and_least_squares_leave(net: nn.Module) -> None:
    plan = Plan(net, X[:1])
    moments = input_moments(net, ["layer2.0.conv2"], [X], n_positions=None)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    weight = net.get_parameter("layer2.0.conv2.weight").detach().flatten(1)
    columns = torch.stack([columns_of(net.get_submodule("layer2.0.conv2"), [channel]) for channel in range(8)])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = logit_errors(
        net, {"layer2.0.conv2": (weight, moments["layer2.0.conv2"], columns)}, order, [2, 5, 8], [X[:7], X[7:]]
    )
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for count, error in zip([2, 5], found.tolist(), strict=False):
        kept = {"layer2.0.conv1": order[count:].sort().values}
        small = plan.apply(kept)
        compensate(plan, small, kept, moments, "least_squares")
        with torch.no_grad():
            assert error == pytest.approx(float((small(X) - net(X)).square().sum(1).mean()), rel=1e-3)
    assert found[0] < found[1] < found[2]


def test_a_change_that_falls_counts_as_what_it_was_before() -> None:
    """Moments in which the first input is ten times the second; without it the second gets a weight of 1 + 10. For the
    input (0, 1) that is wrong by 10, squared 100, and without both it is wrong by 1."""
    net = nn.Sequential(nn.Identity(), nn.Linear(2, 1, bias=False, dtype=torch.float64))
    weight = nn.init.ones_(net[1].weight).detach()
    moments = torch.tensor([[100.0, 10.0, 0.0], [10.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    batch, columns = torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.tensor([[0], [1]])
    found = logit_errors(net, {"1": (weight, moments, columns)}, torch.arange(2), [1, 2], [batch])
    # But for the ridge.
    assert found.tolist() == pytest.approx([100.0, 100.0], rel=1e-3)


def test_what_comes_before_the_layers_runs_once_and_changes_nothing(net: nn.Module) -> None:
    order, batches = torch.arange(8), equal_batches([X], 6)
    moments = input_moments(net, ["layer2.0.conv2"], [X], n_positions=None)
    weight = net.get_parameter("layer2.0.conv2.weight").detach().flatten(1)
    columns = torch.stack([columns_of(net.get_submodule("layer2.0.conv2"), [channel]) for channel in range(8)])
    reader = {"layer2.0.conv2": (weight, moments["layer2.0.conv2"], columns)}
    calls = {"stem": 0, "head": 0}

    def count(name: str) -> Callable[..., None]:
        def after(*_: object) -> None:
            calls[name] += 1

        return after

    whole = logit_errors(net, reader, order, [1, 4, 8], batches)
    trace = Trace(net, batches[0])
    with hooked(
        [(net.get_submodule("conv1"), None, count("stem")), (net.get_submodule("linear"), None, count("head"))]
    ):
        found = logit_errors(net, reader, order, [1, 4, 8], batches, trace)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=0)
    # The first batch alone goes through the modules, to see that they give logits.
    assert calls == {"stem": 1, "head": 1}


def test_estimates_are_scaled_between_the_measured_points() -> None:
    estimates = torch.tensor([3.0, 1.0, 8.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    order = torch.tensor([4, 5, 1, 3, 0, 2])
    # Gone in this order: 0 and 0 (nothing to share out by: equal shares), 1 and 2, 3 and 8.
    found = corrected(estimates, order, [2, 4, 6], torch.tensor([1.0, 7.0, 29.0]))
    assert found[order].tolist() == [0.5, 0.5, 2.0, 4.0, 6.0, 16.0]
    # A filter never counts for less than one that goes before it.
    found = corrected(torch.ones(4, dtype=torch.float64), torch.arange(4), [2, 4], torch.tensor([6.0, 8.0]))
    assert found.tolist() == [3.0, 3.0, 3.0, 3.0]


def test_scores_add_up_to_what_was_measured(net: nn.Module) -> None:
    plan = Plan(net, X[:1])
    layers = plan.choose()
    evidence = evidence_of(net, plan, layers)
    found, estimated = (scores(name, evidence, layers) for name in ("logit_error", "logit_redundancy"))
    for layer in layers:
        # The order within a layer is that of the estimate.
        order = estimated[layer].argsort(stable=True)
        assert torch.equal(found[layer][order], found[layer].sort().values)
        with torch.no_grad():
            # With all filters gone the block passes on its shortcut and a constant, the mean of what it would have
            # added.
            block = net.get_submodule(layer.rsplit(".", 1)[0])
            captured: list[Tensor] = []
            handle = block.conv2.register_forward_hook(lambda _m, _i, output, into=captured: into.append(output))
            whole = net(X)
            handle.remove()
            mean = captured[0].mean((0, 2, 3), keepdim=True)
            handle = block.conv2.register_forward_hook(lambda _m, _i, output, mean=mean: mean.expand_as(output))
            error = float((net(X) - whole).square().sum(1).mean())
            handle.remove()
        assert float(found[layer].sum()) >= 0.999 * error


def test_what_is_missing_is_said(net: nn.Module) -> None:
    plan = Plan(net, X[:1])
    evidence = evidence_of(net, plan, ["layer1.0.conv1"])
    bare = Evidence(net, graph=plan.graph, moments=evidence.moments, gradients_at=evidence.gradients_at)
    with pytest.raises(InputError, match=r"pass Evidence\(frames="):
        scores("logit_error", bare, ["layer1.0.conv1"])
    with pytest.raises(InputError, match="no batch was given"):
        logit_errors(net, {}, torch.arange(2), [1], [])
    with pytest.raises(InputError, match="must return logits"):
        logit_errors(net.conv1, {}, torch.arange(2), [1], [X])


class Shifted(nn.Module):
    """Writes into a slice, as networks do that shift channels in time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        y = torch.zeros_like(x)
        y[:, :, 1:] = x[:, :, :-1]
        return self.b(y).mean((2, 3))  # type: ignore[no-any-return]


def test_operations_that_do_not_come_to_the_answer_are_not_measured_with() -> None:
    torch.manual_seed(0)
    net = Shifted().eval()
    assert Evidence(net, frames=[torch.rand(4, 3, 8, 8)]).trace is None
    assert Evidence(build_model({"name": "resnet8"}).eval(), frames=[torch.rand(4, 3, 8, 8)]).trace is not None


def test_what_a_shortcut_without_weights_hands_on_counts() -> None:
    """Option A: the only way from the first stage to the logits; nothing makes up for what is lost on it."""
    torch.manual_seed(0)
    net = build_model({"name": "resnet8", "stage_widths": [6, 8, 8]}).eval()
    with torch.no_grad():
        net.layer1[0].conv1.weight.zero_()  # type: ignore[index, union-attr]
        net.layer2[0].conv1.weight.zero_()  # type: ignore[index, union-attr]
    plan = Plan(net, X[:1])
    evidence = evidence_of(net, plan, ["conv1"])
    assert evidence.trace is not None
    found = scores("logit_error", evidence, ["conv1"])["conv1"]
    evidence.__dict__["trace"] = None
    torch.testing.assert_close(scores("logit_error", evidence, ["conv1"])["conv1"], found, rtol=1e-4, atol=1e-9)
    order = found.argsort(stable=True)
    small = plan.apply({"conv1": order[3:].sort().values})
    with torch.no_grad():
        moved = float((small(X) - net(X)).square().sum(1).mean())
    assert moved > 0
    assert float(found[order[:3]].sum()) >= 0.999 * moved
