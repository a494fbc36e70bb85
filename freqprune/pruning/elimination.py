"""What each filter adds to the others, by removing one after the other, at about the cost of an inversion.

Removing filters is a block Cholesky decomposition of ``H = G^-1`` that picks its pivots as it goes, with the weights W
as further rows. Costs need only the diagonal blocks of H and of ``W^T W``, one a filter: these are small, and kept up
to date. All of H and W follows after a block of filters, in one matrix product, and sheds what is gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from freqprune.errors import InputError
from freqprune.pruning.moments import RIDGE, with_ridge

BLOCK = 160
"""Columns that go before all of the inverse is brought up to date."""
CHUNK = 256
"""Rows of the inverse that are moved at once."""
TIE = 1e-9
"""Errors that differ by less, relatively, are equal but for rounding."""


def elimination_errors(
    readers: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    gradients: Mapping[str, Tensor] | None = None,
    ridge: float = RIDGE,
) -> Tensor:
    """What each filter adds that the others cannot make up for, found by removing the least missed one after the other.

    The structured form of the optimal brain surgeon (Hassibi & Stork 1993). With ``H = G^-1``, removing filter c and
    letting the others make up for it costs ``tr(W_c [H_cc]^-1 W_c^T)`` in the mean squared output of a layer that reads
    it; W and H are then updated. With the gradients S of `output_gradients` it is ``tr(S W_c [H_cc]^-1 W_c^T)``: the
    squared change of the logits, to first order in the outputs.

    Args:
        readers: for each layer that reads the filters its weight ``(n_outputs, n_values)``, its moments and the columns
            of each filter, ``(n_filters, n_columns)``.
        gradients: for each reader S, ``(n_outputs, n_outputs)``, to weigh its outputs with.
        ridge: see `least_squares`.

    Returns:
        Error over the variance of the layer's output (with `gradients`: in squared logits), summed over the readers,
        ``(n_filters,)``; never below that of a filter removed before. Of filters that cost the same the first goes
        first.

    Raises:
        InputError: if moments cannot be inverted, or something is not finite.
    """
    n_filters = len(next(iter(readers.values()))[2])
    found = torch.zeros(n_filters, dtype=torch.float64)
    with torch.inference_mode():
        for at, error in _eliminated(readers, gradients, ridge):
            found[at] = error
    return found


def _eliminated(
    readers: Mapping[str, tuple[Tensor, Tensor, Tensor]], gradients: Mapping[str, Tensor] | None, ridge: float
) -> Iterator[tuple[int, float]]:
    """Filters in the order in which they go, and what that costs, never less than before."""
    states = [
        _Reader(name, *reader, None if gradients is None else gradients[name], ridge)
        for name, reader in readers.items()
    ]
    left = torch.arange(states[0].n_filters)
    block = max(1, BLOCK // max(state.size for state in states))
    worst = 0.0
    while len(left):
        gone = torch.zeros(len(left), dtype=torch.float64)
        for _ in range(min(block, len(left))):
            errors = sum((state.errors() for state in states), gone).clamp(min=0)
            at = int((errors <= float(errors.min()) * (1 + TIE)).byte().argmax())
            error = float(errors[at])
            if not math.isfinite(error):
                raise InputError(f"weights, moments or gradients of {', '.join(readers)} are not finite")
            worst = max(worst, error)
            yield int(left[at]), worst
            gone[at] = math.inf
            for state in states:
                state.remove(at)
        stays = (gone == 0).nonzero().flatten()
        left = left[stays]
        if len(left):
            for state in states:
                state.settle(stays)


class _Reader:
    """A layer that reads the filters: H and W^T as of the last `settle`, and what was removed since."""

    def __init__(
        self, name: str, weight: Tensor, moments: Tensor, columns: Tensor, gradients: Tensor | None, ridge: float
    ) -> None:
        self.n_filters, self.size = columns.shape
        own = columns.flatten()
        w = weight.double()
        if gradients is None:
            means = moments[:-1, -1]
            covariance = moments[:-1, :-1] - torch.outer(means, means)
            w = w / (w @ covariance * w).sum().clamp(min=1e-30).sqrt()
            del covariance
        else:
            eigenvalues, vectors = torch.linalg.eigh(gradients)
            w = (vectors * eigenvalues.clamp(min=0).sqrt()).T @ w
        self.weight = w[:, own].T.contiguous()
        # What no filter feeds, such as the constant, never goes, and its part of the inverse is not read.
        self.inverse = _inverse(name, moments, ridge)[own][:, own]
        self._start()

    def _start(self) -> None:
        n, k = len(self.inverse) // self.size, self.size
        blocks = self.inverse.unflatten(1, (n, k)).unflatten(0, (n, k)).diagonal(dim1=0, dim2=2)
        self.blocks = blocks.permute(2, 0, 1).contiguous()
        if self.weight.shape[1] > 2 * n * k:
            # Only W^T W matters.
            self.weight = torch.linalg.qr(self.weight.T, mode="r").R.T.contiguous()
        pieces = self.weight.unflatten(0, (n, k))
        self.grams = pieces @ pieces.mT
        # H is now `inverse - rows.T @ rows`, W^T `weight - rows.T @ outputs`, of the first n_removed of both.
        self.rows = self.inverse.new_empty(max(BLOCK, k), n * k)
        self.outputs = self.inverse.new_empty(max(BLOCK, k), self.weight.shape[1])
        self.n_removed = 0

    def errors(self) -> Tensor:
        """Cost of each filter, were it the next to go."""
        if self.size == 1:
            return (self.grams / self.blocks).flatten()
        return torch.linalg.solve(self.blocks, self.grams).diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, at: int) -> None:
        """Let the others make up for a filter."""
        k, start, end = self.size, self.n_removed, self.n_removed + self.size
        own = slice(at * k, at * k + k)
        rows, outputs = self.rows[:start], self.outputs[:start]
        before = rows[:, own].T
        row = torch.addmm(self.inverse[own], before, rows, alpha=-1)
        block = row[:, own]
        root = _inverse_root(block)
        row = torch.mm(root, row, out=self.rows[start:end])
        output = torch.mm(root, torch.addmm(self.weight[own], before, outputs, alpha=-1), out=self.outputs[start:end])
        # W loses `output.T @ row`, so that W^T W loses half and half^T.
        overlaps = output @ self.outputs[:end].T
        overlaps[:, start:] /= 2
        half = torch.addmm(output @ self.weight.T, overlaps, self.rows[:end], alpha=-1)
        by_filter = row.unflatten(1, (-1, k)).transpose(0, 1)
        half = half.unflatten(1, (-1, k)).permute(1, 2, 0) @ by_filter
        self.grams -= half
        self.grams -= half.mT
        self.blocks.baddbmm_(by_filter.mT, by_filter, alpha=-1)
        # Its own would be nothing but rounding, perhaps without an inverse.
        self.blocks[at] = block
        self.n_removed = end

    def settle(self, stays: Tensor) -> None:
        """Bring H and W up to date for the filters that stay: H in place, as these move only forward."""
        k, n = self.size, len(stays) * self.size
        own = (stays[:, None] * k + torch.arange(k)).flatten()
        rows = self.rows[: self.n_removed, own]
        self.weight = self.weight[own].addmm_(rows.T, self.outputs[: self.n_removed], alpha=-1)
        for start in range(0, n, CHUNK):
            part = self.inverse[own[start : start + CHUNK]]
            part = part.unflatten(1, (-1, k)).index_select(1, stays).flatten(1)
            these = slice(start, start + len(part))
            torch.addmm(part, rows[:, these].T, rows, alpha=-1, out=self.inverse[these, :n])
        self.inverse = self.inverse[:n, :n]
        self._start()


def _inverse_root(block: Tensor) -> Tensor:
    """R with ``R^T R`` the inverse of a positive definite block."""
    if len(block) == 1:
        return block.rsqrt()
    eye = torch.eye(len(block), dtype=block.dtype)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(block), eye, upper=False)


def _inverse(name: str, moments: Tensor, ridge: float) -> Tensor:
    # Sums of float32 products can miss being positive by more than the ridge.
    for lift in (1, 10, 100):
        factor, info = torch.linalg.cholesky_ex(with_ridge(moments, len(moments) - 1, ridge * lift))
        if not info:
            return torch.cholesky_inverse(factor)
    raise InputError(f"the moments of {name!r} with a ridge of {ridge:g} cannot be inverted")
