"""One Gauss-Newton step of a layer's weights towards what the layer after it is to answer, by conjugate gradients.

Least squares solves the layer that a target belongs to; the layer before it, on the other side of an activation, can
still move. Linearised there, its best step is a least-squares problem too, which needs products with the Jacobian and
its transpose only. A block-wise reconstruction (Li et al. 2021, BRECQ, arXiv 2102.05426) without labels and without a
learning rate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vjp

from freqprune.processes import added_up

N_PRODUCTS = 6
DAMPING = 0.1


@dataclass(frozen=True)
class Segment:
    """Two layers and what lies between them, for the batches by number.

    Attributes:
        feed: linear: weight and constants of the first layer, and the number of a batch, to its output.
        between: output of the first layer to input of the second.
        read: linear: input of the second layer to its answer.
        targets: what the second layer is to answer, one a batch.
        energy: mean square of what each weight of the first layer multiplies, in a shape that spreads over the weight.
        channel_dim: dimension of the first layer's output that its weights' first one is.
        numbers: of the batches among those of all processes; 0, 1, ... if left out.
    """

    feed: Callable[[Tensor, Tensor, int], Tensor]
    between: Callable[[Tensor, int], Tensor]
    read: Callable[[Tensor, int], Tensor]
    targets: Sequence[Tensor]
    energy: Tensor
    channel_dim: int = 1
    numbers: Sequence[int] = ()

    def error(self, weight: Tensor, constant: Tensor) -> float:
        """Squared error of the answers, summed."""
        total = 0.0
        for i, target in enumerate(self.targets):
            answer = self.read(self.between(self.feed(weight, constant, i), i), i)
            total += float((answer - target).double().square().sum())
        return float(added_up(torch.tensor(total, dtype=torch.float64)))


def gauss_newton(
    segment: Segment, weight: Tensor, constant: Tensor, movable: bool, seed: int = 0
) -> tuple[Tensor, Tensor] | None:
    """New weight and constants with a smaller squared error; None if the step finds none.

    Args:
        segment: the layer whose weights these are, first, and the layer that is to come close to its targets.
        weight: ``(n_outputs, ...)``.
        constant: added to the layer's output, ``(n_outputs,)``.
        movable: whether the constants may move.
        seed: of the random signs that scale the problem.
    """
    numbers = range(len(segment.targets))
    among_all = segment.numbers or numbers
    # Of linear maps, any point will do to take the transposed one at.
    start = [segment.feed(weight, constant, i) for i in numbers]
    back, to_weight = [], []
    for i in numbers:
        to_weight.append(vjp(lambda w, c, i=i: segment.feed(w, c, i), weight, constant)[1])
        inner, through = vjp(lambda z, i=i: segment.between(z, i), start[i])  # type: ignore[misc]
        answer, to_inner = vjp(lambda h, i=i: segment.read(h, i), inner)  # type: ignore[misc]
        back.append((answer, lambda u, a=to_inner, b=through: b(a(u)[0])[0]))

    def transposed(vectors: Callable[[int], Tensor]) -> list[Tensor]:
        """Jacobian, transposed, times a vector a batch, summed over batches."""
        # In float64, so that it is the same in whichever order batches come.
        total = [torch.zeros_like(weight, dtype=torch.float64), torch.zeros_like(constant, dtype=torch.float64)]
        for i in numbers:
            for into, found in zip(total, to_weight[i](back[i][1](vectors(i))), strict=True):
                into.add_(found)
        total = [added_up(one).to(weight) for one in total]
        if not movable:
            total[1].zero_()
        return total

    def times(direction: Sequence[Tensor], i: int) -> Tensor:
        """Jacobian times a direction, for a batch."""
        moved = segment.feed(direction[0], direction[1], i)
        with warnings.catch_warnings():
            # torch warns of its own use of torch.jit on the first call.
            warnings.simplefilter("ignore", FutureWarning)
            return segment.read(jvp(lambda z: segment.between(z, i), (start[i],), (moved,))[1], i)

    def signs(i: int) -> Tensor:
        shape = segment.targets[i].shape
        generator = torch.Generator().manual_seed(seed * 1_000_003 + among_all[i])
        drawn = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
        return (2 * drawn - 1).to(segment.targets[i])

    # The diagonal of the matrix to invert: squared gradients of random signs at the first layer's output (Hutchinson's
    # estimate), times the energy of what the weights multiply.
    reach = torch.zeros_like(constant, dtype=torch.float64)
    for i in numbers:
        gradient = back[i][1](signs(i)).square()
        reach += gradient.sum([d for d in range(gradient.dim()) if d != segment.channel_dim % gradient.dim()])
    reach = _floored(added_up(reach).to(weight))
    scales = [(reach.view(-1, *[1] * (weight.dim() - 1)) * _floored(segment.energy)).expand_as(weight), reach]
    residual = transposed(lambda i: segment.targets[i] - back[i][0])
    step = [torch.zeros_like(weight), torch.zeros_like(constant)]
    lifted = [r / s for r, s in zip(residual, scales, strict=True)]
    direction, size = lifted, _dot(residual, lifted)
    for _ in range(N_PRODUCTS):
        if size <= 0:
            break
        product = transposed(lambda i, towards=direction: times(towards, i))  # type: ignore[misc]
        product = [q + DAMPING * s * d for q, s, d in zip(product, scales, direction, strict=True)]
        length = size / max(_dot(direction, product), 1e-30)
        step = [x + length * d for x, d in zip(step, direction, strict=True)]
        residual = [r - length * q for r, q in zip(residual, product, strict=True)]
        lifted = [r / s for r, s in zip(residual, scales, strict=True)]
        before, size = size, _dot(residual, lifted)
        direction = [y + size / before * d for y, d in zip(lifted, direction, strict=True)]
    now = segment.error(weight, constant)
    for share in (1.0, 0.5):
        found = weight + share * step[0], constant + share * step[1]
        if segment.error(*found) < now:
            return found
    return None


def _floored(values: Tensor) -> Tensor:
    return values.clamp(min=1e-6 * float(values.max().clamp(min=1e-30)))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
