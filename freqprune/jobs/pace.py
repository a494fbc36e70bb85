"""How fast a network runs on this machine: a few warm forwards and training steps, timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import copied, evaluating, first
from freqprune.training import ImageData, Optimization

# Seconds that each measurement takes, but for one call that takes longer.
BUDGET_S = 0.1
# A batch is followed by one this many times its size; of the first even if that takes so many seconds: what a call
# costs besides its images, such as the update of the weights, shows only then.
GROWTH, SECOND_S = 4, 4.0
# Images of the largest batch that is timed.
IMAGES = 64
# What a machine that does other things as well, or has just begun, may make of the median.
SLOWER = 1.5
# Images that are read one after the other: of eight on they are decoded in threads, as a worker does not.
READ = 7


@dataclass(frozen=True)
class Span:
    """Between how many and how many seconds something takes.

    >>> Span(1, 2) + Span(3, 5).times(2)
    Span(low=7, high=12)
    """

    low: float
    high: float

    def __add__(self, other: Span) -> Span:
        return Span(self.low + other.low, self.high + other.high)

    def times(self, low: float, high: float | None = None) -> Span:
        """So often, or between so often and so often."""
        return Span(self.low * low, self.high * (low if high is None else high))


NOTHING = Span(0.0, 0.0)


@dataclass(frozen=True)
class Pace:
    """Seconds of one image.

    Attributes:
        forward: through the network, in a batch.
        step: of a training step; None where nothing is trained.
        read: until a test image is at hand.
        inversion: of a matrix, over the cube of its rows.
        fed: until a training image is at hand.
    """

    forward: Span
    step: Span | None = None
    read: Span = NOTHING
    inversion: Span = NOTHING
    fed: Span = NOTHING


def of_forward(net: nn.Module, example: Tensor) -> Span:
    """Seconds that an image takes in eval mode.

    Args:
        net: the network; left as it is.
        example: inputs, ``(n_images, n_channels, height, width)``, on its device.
    """
    with evaluating(net), torch.inference_mode():
        return _an_image(net, example, IMAGES)


def of_training(
    net: nn.Module,
    example: Tensor,
    optimization: Optimization,
    most: int,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Span:
    """Seconds that an image takes in a training step: forward, backward and update, of a copy of the network.

    Args:
        net: the network; left as it is.
        example: inputs, ``(n_images, n_channels, height, width)``, on the device to train on.
        optimization: makes the optimizer.
        most: images of a batch; fewer where that takes too long.
        context: around forward and loss, such as autocast.
    """
    with isolate_rng():
        twin = copied(net).to(example.device).to(memory_format=torch.channels_last).train()
        optimizer = optimization.optimizer(twin)

        def step(batch: Tensor) -> None:
            optimizer.zero_grad()
            with context():
                logits = first(twin(batch))
                loss = nn.functional.cross_entropy(logits, logits.argmax(1))
            loss.backward()
            optimizer.step()

        # Batch norms cannot train on one image.
        return _an_image(step, example, most, least=2)


def of_reading(data: ImageData) -> tuple[Span, Span]:
    """Seconds until a training and a test image are read, decoded and transformed; zero for images in memory."""
    found = []
    with isolate_rng():
        for loader in (data.train_dataloader(), data.test_dataloader()):
            batches, n_images = loader.dataset, min(READ, len(data.split("train")), len(data.split("test")))
            start = time.perf_counter()
            batch = batches.__getitems__(list(range(n_images)))  # type: ignore[attr-defined]
            if isinstance(batch, InputError):
                raise batch
            seconds = (time.perf_counter() - start) / n_images / max(1, loader.num_workers)
            # Workers read while the network computes.
            found.append(Span(0.0 if loader.num_workers else seconds, SLOWER * seconds))
    return found[0], found[1]


def of_inversion(n_rows: int = 256) -> Span:
    """Seconds of an inversion in double precision, over the cube of the rows."""
    matrix = torch.eye(n_rows, dtype=torch.float64) + 1 / n_rows
    torch.linalg.inv(matrix)
    times = [_timed(torch.linalg.inv, matrix) for _ in range(3)]
    return Span(min(times) / n_rows**3, SLOWER * statistics.median(times) / n_rows**3)


def _an_image(work: Callable[[Tensor], object], example: Tensor, most: int, least: int = 1) -> Span:
    """Seconds of a call over the images of its batch, were that of the most images: after calls of growing batches, as
    long as the budget lasts, and of a second one where that takes no more than moments."""
    start, size, before = time.perf_counter(), least, None
    while True:
        batch = _batch(example, size)
        # The first of a size may choose an algorithm.
        _timed(work, batch)
        times = [_timed(work, batch)]
        grown = 2 * GROWTH * times[0]
        if size == most or grown > (SECOND_S if before is None else start + BUDGET_S - time.perf_counter()):
            break
        before, size = (size, times[0]), min(most, GROWTH * size)
    while time.perf_counter() - start < BUDGET_S:
        times.append(_timed(work, batch))
    low, high = (_with_more(seconds, size, before, most) for seconds in (min(times), statistics.median(times)))
    return Span(low / most, SLOWER * high / most)


def _with_more(seconds: float, size: int, before: tuple[int, float] | None, most: int) -> float:
    """Seconds of a call of the most images, on the straight line through that of a smaller batch and this one.

    An image more is held to cost between a quarter of what one cost so far and all of it: both may have been disturbed.

    >>> _with_more(1.0, 8, (2, 0.625), 64), _with_more(1.0, 8, None, 64)
    (4.5, 8.0)
    """
    one = seconds / size
    more = one if before is None else (seconds - before[1]) / (size - before[0])
    return seconds + (most - size) * min(one, max(one / 4, more))


def _batch(example: Tensor, size: int) -> Tensor:
    batch = example[torch.arange(size, device=example.device) % len(example)]
    return batch.to(memory_format=torch.channels_last)


def _timed(work: Callable[[Tensor], object], batch: Tensor) -> float:
    _wait(batch.device)
    start = time.perf_counter()
    work(batch)
    _wait(batch.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
