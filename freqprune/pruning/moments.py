"""Second moments of what a layer reads, and what follows from them: what each filter adds to the others, and weights
that make up for lost ones.

Notation: a layer computes ``y = W x`` with ``x`` a patch of its input (for a convolution ``n_channels * kernel``
values) and a 1 appended for the constant; ``G = E[x x^T]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import evaluating, first, hooked, images_at_once
from freqprune.processes import added_up, own_share
from freqprune.pruning.patches import Geometry, multiplications, pick
from freqprune.tagging import Progress, in_sight

MAX_VALUES = 8192
RIDGE = 1e-4
SAMPLES_A_VALUE = 4


def input_moments(
    model: nn.Module, layers: Sequence[str], batches: Iterable[Tensor], n_positions: int | None = 24, seed: int = 0
) -> dict[str, Tensor]:
    """Second moments of the inputs of convolutions and linear layers over batches of network inputs.

    Args:
        model: the network; runs in eval mode, which is restored.
        layers: names of 2-D convolutions without groups and of linear layers.
        batches: network inputs, e.g. tagged frames, ``(n_frames, n_channels, height, width)`` each.
        n_positions: random positions of each map, drawn anew for every batch; None for all.
        seed: of the positions.

    Returns:
        For each layer ``G``, float64 ``(n_values + 1, n_values + 1)``, the last row and column of the constant 1.

    Raises:
        InputError: for another kind of layer, one with too many inputs, or one that is not reached.
    """
    return counted_moments(model, layers, batches, n_positions, seed)[0]


def no_moments_of(module: nn.Module) -> str:
    """Why moments of the inputs of a layer cannot be taken; empty if they can."""
    if not (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)):
        return (
            f"is a {type(module).__name__}, and moments are taken of 2-D convolutions without groups and of linear "
            "layers"
        )
    n_values = module.weight[0].numel()
    return f"reads {n_values} values, at most {MAX_VALUES} can be inverted" if n_values > MAX_VALUES else ""


def counted_moments(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Tensor],
    n_positions: int | None = 24,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """`input_moments`, and how many samples each layer's come from; `progress` as of `freqprune.tag`.

    A layer that would get fewer than `SAMPLES_A_VALUE` for each of its values is read at more than `n_positions`.
    """
    modules = dict(model.named_modules())
    for name in layers:
        if why := no_moments_of(modules[name]):
            raise InputError(
                f"{name!r} {why}; leave the layer before it out (pruning.exclude), or do without moments "
                "(importance=amplitude pruning.compensation=none)"
            )
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    generator = torch.Generator()
    batches = list(batches)
    n_inputs = sum(map(len, batches))

    def seen(name: str, x: Tensor, geometry: Geometry) -> None:
        n_values = modules[name].weight[0].numel()
        least = -(-SAMPLES_A_VALUE * n_values // n_inputs)
        wanted = None if n_positions is None else max(n_positions, least)
        rows = geometry.patches(x, pick(geometry.n_positions(x.shape), wanted, generator))
        # Float32 products of a batch, also where the network runs in half precision, summed over batches in float64.
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        # Half as many bytes to move as of float64.
        total = (rows.T @ rows).cpu()
        sums[name] = sums[name].add_(total) if name in sums else total.double()
        counts[name] = counts.get(name, 0) + len(rows)

    with evaluating(model), torch.no_grad(), multiplications(model, layers, seen):
        for number, batch in in_sight(own_share(batches), "second moments", progress):
            # Of each batch its own, whichever process has it.
            generator.manual_seed(seed * 1_000_003 + number)
            model(batch)
    missing = [name for name in layers if name not in sums]
    if missing:
        raise InputError(
            f"no moments of {', '.join(missing)}: no batch was given, the forward does not reach them, or it "
            "multiplies with "
            "something else than their weight (standardised or shared weights); leave the layers before them out "
            "(pruning.exclude), or do without moments (importance=l2 pruning.compensation=none)"
        )
    counts = {name: int(added_up(torch.tensor(counts[name]))) for name in layers}
    return {name: added_up(sums[name]) / counts[name] for name in layers}, counts


def output_gradients(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Tensor],
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """How much the network's answer depends on the outputs of its layers: second moments of the gradients of its
    logits.

    With `input_moments` the Kronecker-factored Gauss-Newton matrix of the layer (Martens & Grosse 2015; of a
    convolution: Grosse & Martens 2016) for the squared change of the logits. No labels are needed, and no image counts
    for less because the network is sure of it.

    Args:
        model: a classifier; runs in eval mode, which is restored. Its parameters keep the gradients that they have.
        layers: names of convolutions and linear layers.
        batches: network inputs, e.g. tagged frames, ``(n_frames, n_channels, height, width)`` each.
        seed: of the random sums of logits that are differentiated, one an input, which estimates the sum over all
            logits without bias.
        progress: wraps the iteration over batches, for a progress bar.

    Returns:
        For each layer ``S = E[sum over logits and positions of g g^T]``, float64 ``(n_outputs, n_outputs)``, with g the
        gradient of a logit with respect to the output at one position.

    Raises:
        InputError: if a layer is not reached, or the network returns no logits.
    """
    modules = dict(model.named_modules())
    # Of a layer that runs more than once, all of them.
    outputs: list[tuple[str, Tensor]] = []
    sums: dict[str, Tensor] = {}
    batches = list(batches)
    n_inputs = sum(map(len, batches))
    generator = torch.Generator()

    def hook(name: str) -> Callable[..., Tensor]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if output.requires_grad:
                outputs.append((name, output))
            # What follows may write in place.
            return output.clone()

        return after

    with evaluating(model), torch.enable_grad(), hooked([(modules[name], None, hook(name)) for name in layers]):
        for number, batch in _parts(in_sight(own_share(batches), "gradients", progress)):
            generator.manual_seed(seed * 1_000_003 + number)
            outputs.clear()
            # Frozen networks have no gradients unless the input asks for them.
            logits = first(model(batch.detach().requires_grad_(True)))
            if logits.dim() != 2:
                raise InputError("the network must return logits, (n_images, n_classes), to take gradients of")
            missing = sorted(set(layers) - {name for name, _ in outputs})
            if missing:
                raise InputError(f"no gradients of {', '.join(missing)}: the forward does not reach them")
            direction = torch.randn(logits.shape, generator=generator).to(logits)
            # Checkpointed layers run once more for their gradients.
            reached = list(outputs)
            # A run may lead to no logit.
            gradients = torch.autograd.grad(
                (logits * direction).sum(), [output for _, output in reached], materialize_grads=True
            )
            for (name, _), gradient in zip(reached, gradients, strict=True):
                # Channels of a convolution come second, features of a linear layer last.
                g = (gradient.movedim(1, -1) if isinstance(modules[name], nn.Conv2d) else gradient).flatten(0, -2)
                g = g.to(torch.promote_types(g.dtype, torch.float32))
                total = (g.T @ g).cpu()
                sums[name] = sums[name].add_(total) if name in sums else total.double()
    if not n_inputs:
        raise InputError("no batch was given to take gradients of")
    return {name: added_up(sums[name]) / n_inputs for name in layers}


def _parts(batches: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Batches in parts of as many images as fit, each with a number of its own."""
    for number, batch in batches:
        for at, part in enumerate(batch.split(images_at_once(batch))):
            yield number * len(batch) + at, part


def columns_of(module: nn.Module, channels: Sequence[int]) -> Tensor:
    """Columns of the flattened weight ``(n_outputs, n_values)`` that read the given input channels (of a linear layer:
    features)."""
    size = module.kernel_size[0] * module.kernel_size[1] if isinstance(module, nn.Conv2d) else 1
    return (torch.tensor(list(channels), dtype=torch.long)[:, None] * size + torch.arange(size)).flatten()


def least_squares(
    weight: Tensor, moments: Tensor, kept: Tensor, constant: bool = True, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """Weights on the kept inputs that come closest to the layer's old output: ``W G[:, K] (G[K, K] + ridge)^-1``.

    Args:
        weight: ``(n_outputs, n_values)``.
        moments: ``G``, ``(n_values + 1, n_values + 1)``.
        kept: columns of the weight that stay.
        constant: let a constant help.
        ridge: added to the diagonal, in units of its mean.

    Returns:
        Weight ``(n_outputs, n_kept)`` and constant ``(n_outputs,)``, in float64.
    """
    columns = torch.cat([kept, kept.new_tensor([moments.shape[0] - 1])]) if constant else kept
    target = weight.double() @ moments[:-1][:, columns]
    matrix = with_ridge(moments[columns][:, columns], len(kept), ridge)
    factor, info = torch.linalg.cholesky_ex(matrix)
    # Moments that rounding has left not quite positive take the slower way.
    solved = (torch.linalg.solve(matrix, target.T) if info.any() else torch.cholesky_solve(target.T, factor)).T
    return (solved[:, :-1], solved[:, -1]) if constant else (solved, solved.new_zeros(len(solved)))


def mean_response(weight: Tensor, moments: Tensor, removed: Tensor) -> Tensor:
    """Mean of what the removed inputs add to each output, ``(n_outputs,)``."""
    return weight.double()[:, removed] @ moments[removed, -1]


def with_ridge(matrix: Tensor, n_values: int, ridge: float) -> Tensor:
    """A copy with the ridge on the first `n_values` of its diagonal, in units of their mean."""
    diagonal = matrix.diagonal()[:n_values]
    lift = torch.zeros(len(matrix), dtype=matrix.dtype)
    lift[:n_values] = ridge * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return matrix + torch.diag(lift)
