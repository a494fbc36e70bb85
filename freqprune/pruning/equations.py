"""Normal equations of a layer, summed over batches, and weights that solve them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freqprune.processes import added_up

# Taken where none can be tried.
RIDGE = 1e-2
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Sums:
    """Moments of inputs and targets of the groups of a layer about an origin, summed over batches in float64."""

    def __init__(self, groups: int, origin: tuple[Tensor, Tensor]) -> None:
        self.groups, self.origin, self.n_samples = groups, origin, 0
        # Of no samples too, they lie where all others do.
        self.xx = self.xt = self.x = self.t = self.tt = origin[0].new_zeros((), dtype=torch.float64)

    def add(self, x: Tensor, t: Tensor) -> None:
        """Add rows of inputs ``(n_samples, groups * n_values)`` and of targets ``(n_samples, groups * n_outputs)``."""
        self.n_samples += len(x)
        # Float32 products of what is small beside its mean would hold nothing but rounding, half ones anyway.
        x, t = (
            (v - zero).to(torch.promote_types(v.dtype, torch.float32)).view(len(v), self.groups, -1).transpose(0, 1)
            for v, zero in zip((x, t), self.origin, strict=True)
        )
        self.xx = self.xx + (x.mT @ x).double()
        self.xt = self.xt + (x.mT @ t).double()
        self.x, self.t = self.x + x.double().sum(1), self.t + t.double().sum(1)
        self.tt = self.tt + t.double().square().sum()

    def add_shares(self) -> None:
        """Add up the sums of all processes, whichever of them have seen something."""
        n_values, n_outputs = (len(zero) // self.groups for zero in self.origin)
        shapes = {"xx": (n_values, n_values), "xt": (n_values, n_outputs), "x": (n_values,), "t": (n_outputs,)}
        for name, shape in shapes.items():
            setattr(self, name, added_up(getattr(self, name).expand(self.groups, *shape)))
        self.tt = added_up(self.tt)
        self.n_samples = int(added_up(torch.tensor(self.n_samples)))

    @property
    def finite(self) -> bool:
        return bool(self.xx.isfinite().all() and self.xt.isfinite().all())

    def __add__(self, other: Sums) -> Sums:
        both = Sums(self.groups, self.origin)
        both.n_samples = self.n_samples + other.n_samples
        for name in ("xx", "xt", "x", "t", "tt"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def equations(self, where: Tensor, constant: bool) -> Equations:
        """Normal equations for the inputs `where` of each group."""
        zero_x, zero_t = (zero.double().view(self.groups, -1) for zero in self.origin)
        xx, xt = self.xx[:, where][:, :, where] / self.n_samples, self.xt[:, where] / self.n_samples
        x, t, zero_x = self.x[:, where] / self.n_samples, self.t / self.n_samples, zero_x[:, where]
        # The constant takes the means away; without one the moments are about zero.
        xx, xt = xx - x[:, :, None] * x[:, None, :], xt - x[:, :, None] * t[:, None, :]
        tt = self.tt / self.n_samples - t.square().sum()
        x, t = x + zero_x, t + zero_t
        if not constant:
            xx, xt = xx + x[:, :, None] * x[:, None, :], xt + x[:, :, None] * t[:, None, :]
            tt = tt + t.square().sum()
        return Equations(xx, xt, x, t, float(tt))


@dataclass
class Equations:
    """``xx w = xt`` for each group, of centred variables where there is a constant; means of inputs and targets, and
    the targets' mean square."""

    xx: Tensor
    xt: Tensor
    x: Tensor
    t: Tensor
    tt: float

    def solve(self, start: Tensor, ridge: float) -> Tensor | None:
        """Weights ``(n_groups, n_values, n_outputs)``, ridge towards `start`; None if that does not determine them."""
        variance = self.xx.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
        # Sums of float32 products can miss being positive by more than the ridge.
        for lift in (1, 10, 100):
            at = (ridge * lift * variance)[:, None]
            matrix = self.xx.clone()
            matrix.diagonal(dim1=1, dim2=2).add_(at)
            factor, info = torch.linalg.cholesky_ex(matrix)
            if not info.any():
                return torch.cholesky_solve(self.xt + at[:, :, None] * start, factor)
        return None

    def error(self, w: Tensor) -> float:
        """Mean squared error of weights, summed over the outputs."""
        return self.tt + float(((self.xx @ w - 2 * self.xt) * w).sum())


def solve(
    parts: Sequence[Sums], weight: Tensor, stays: Tensor, ridge: float | None, constant: bool
) -> tuple[Tensor, Tensor] | None:
    """Weights ``(n_outputs, n_values)`` on the columns that stay and constants ``(n_outputs,)``, from all parts
    together.

    Args:
        parts: moments; without a ridge given, the one that does best on the second from the first is taken, or
            `RIDGE` if one is empty.
        weight: which the ridge pulls towards, ``(n_outputs, n_values)``.
        stays: columns that may be other than zero, ``(n_values,)``.
        ridge: in units of the mean variance of the inputs.
        constant: let a constant help.
    """
    groups = parts[0].groups
    old = weight.double().view(groups, -1, weight.shape[1]).mT
    where = stays.nonzero().flatten()
    start = old[:, where]
    if ridge is None:
        ridge = RIDGE
        if all(part.n_samples for part in parts):
            seen, held_out = (part.equations(where, constant) for part in parts)
            tried = {one: seen.solve(start, one) for one in RIDGES}
            # Nothing that is less than the rounding of the sums.
            none = torch.finfo(torch.float32).eps * held_out.tt
            errors = {one: max(held_out.error(w), none) for one, w in tried.items() if w is not None}
            # The least of those that do about as well.
            ridge = next((one for one, error in errors.items() if error <= 1.01 * min(errors.values())), ridge)
    together = parts[0] + parts[1] if parts[1].n_samples else parts[0]
    equations = together.equations(where, constant)
    solved = equations.solve(start, ridge)
    if solved is None:
        return None
    whole = torch.zeros_like(old)
    whole[:, where] = solved
    constants = equations.t - (solved * equations.x[:, :, None]).sum(1)
    return whole.mT.flatten(0, 1), constants.flatten()
