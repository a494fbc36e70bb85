"""The operations of a network, one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from freqprune.networks.profiling import macs_by_layer
from freqprune.networks.trace import Trace, equal_batches, run, same_answer
from tests.pruning.doubled import Concatenated, Residual, images, settled


class WritesInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(self.relu(x))
        y += x
        return self.relu(y).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("net", [WritesInPlace, lambda: Residual(True), Concatenated, lambda: resnet18(num_classes=3)])
def test_operations_give_what_the_network_gives_and_write_into_nothing(net: Callable[[], nn.Module]) -> None:
    model, x = settled(net()), images(2, 32)
    trace = Trace(model, x)
    values: dict[object, Tensor] = {trace.entrance: x.clone(), **trace.inputs(model)}
    for node in trace.nodes:
        before = {key: value.clone() for key, value in values.items() if isinstance(value, Tensor)}
        values[node] = run(node, values.__getitem__)
        assert all(torch.equal(values[key], value) for key, value in before.items())
    torch.testing.assert_close(values[trace.exit], model(x))
    assert set(trace.layers.values()) == {
        name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    assert trace.weights_made == []


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x).relu())).mean((2, 3))  # type: ignore[no-any-return]


def test_a_layer_that_runs_twice_is_no_single_operation() -> None:
    trace = Trace(Twice().eval(), images(2))
    assert list(trace.layers.values()) == ["b"]
    assert trace.weights_made == ["a"]


@pytest.mark.parametrize(
    ("shape", "size", "sizes"),
    [((13, 1), 4, [4, 4, 4]), ((7, 1), 4, [3, 3]), ((3, 1), 4, [3]), ((8, 3, 256, 256), None, [4, 4])],
)
def test_equal_batches_leave_out_few_images_and_hold_few_pixels(
    shape: tuple[int, ...], size: int | None, sizes: list[int]
) -> None:
    assert [len(batch) for batch in equal_batches([torch.zeros(shape)], size)] == sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_answers_are_the_same_up_to_the_last_digits_of_their_type(dtype: torch.dtype) -> None:
    expected = torch.linspace(-8, 8, 41).to(dtype)
    digit = torch.finfo(dtype).eps * expected.abs()
    assert same_answer(expected, expected + digit)
    assert not same_answer(expected, expected + 0.1 * expected.abs().max())
    assert not same_answer(expected, expected[:-1])


def test_layers_whose_weight_the_forward_multiplies_with_itself_count() -> None:
    """As Swin, BEiT and EVA do for queries, keys and values."""

    class Itself(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x.flatten(2).transpose(1, 2))
            return nn.functional.linear(x, self.b.weight, self.b.bias).mean(1)

    assert macs_by_layer(Itself(), torch.rand(1, 3, 4, 4)) == {"a": 16 * 3 * 8, "b": 16 * 8 * 6}


def test_layers_that_share_a_weight_count_once_a_call() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    assert macs_by_layer(net, torch.rand(1, 8)) == {"0": 64, "2": 64}


class Answers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        return {"loss": None, "logits": self.fc(x.mean((2, 3)))}


def test_an_answer_beside_nothing_is_the_exit() -> None:
    net, x = Answers().eval(), torch.rand(2, 3, 8, 8)
    trace = Trace(net, x)
    values: dict[Any, Any] = {trace.entrance: x}
    for _ in trace.walk(values, trace.inputs(net)):
        pass
    torch.testing.assert_close(values[trace.exit], net(x)["logits"])


def test_weights_that_are_computed_anew_count_once() -> None:
    def layers() -> list[nn.Linear]:
        return [nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)]

    normed = nn.Sequential(*(torch.nn.utils.parametrizations.weight_norm(one) for one in layers()))
    x = torch.rand(2, 4)
    assert macs_by_layer(normed, x) == macs_by_layer(nn.Sequential(*layers()), x) == {"0": 32, "1": 48, "2": 18}
