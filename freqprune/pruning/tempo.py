"""A cut to a given time: filters and blocks ranked by score a millisecond, the time measured, the cut taken further."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import MULTIPLES, Speed, Times, Trace, cache_file, compare, copied, runner
from freqprune.pruning.amount import AUTO, Amount
from freqprune.pruning.recipe import Material, Recipe
from freqprune.pruning.selection import Kept, select
from freqprune.pruning.surgery import Plan
from freqprune.tagging import Progress, layout_of

# Shares of the time: the measured one may lie so far below what is asked for, or above, before the cut is taken further
# or back.
BELOW, ABOVE = 0.0, 0.05
# What a cut may miss before it is told.
MISSED = 0.05
N_TRIES = 6
# Spread of a measured share above which it is measured again, with more forwards, and in the end given up.
NOISY = 0.02
N_PAIRS = (15, 40, 100, 400, 1000, 4000, 20_000)
# Seconds that a measurement takes at least, since machines are slow for a second now and then, and at most, but for the
# first three.
LEAST_S, MOST_S = 3.0, 30.0


@dataclass(frozen=True)
class Promise:
    """What a cut by time was asked for, and what came of it.

    Attributes:
        asked: share of the time to remove.
        asked_ms: milliseconds to leave, where those were asked for.
        speed: of the dense and the smaller network before anything was made up for, in turn.
        target: where they ran, see `runner`.
        batch_size: images of a batch.
    """

    asked: float
    speed: Speed
    target: str
    batch_size: int
    asked_ms: float | None = None

    def record(self) -> dict[str, float | int | str]:
        """For ``metrics.json``: shares of the time asked for, measured, and its spread; milliseconds of both."""
        speed = self.speed
        return {
            "asked": round(self.asked, 4), "got": round(speed.saved, 4), "spread": round(speed.spread, 4),
            "dense_ms": round(speed.dense_ms, 4), "pruned_ms": round(speed.small_ms, 4),
            "target": self.target, "batch_size": self.batch_size,
            **({} if self.asked_ms is None else {"asked_ms": self.asked_ms}),
        }  # fmt: skip


def folder_of(given: str | None) -> Path:
    """Where times are kept."""
    return Path(given).expanduser() if given is not None else Path.home() / ".cache" / "freqprune"


def check_folder(recipe: Recipe) -> None:
    """Raise InputError for a cut by time whose folder of times cannot be written."""
    if not recipe.amount.by_time:
        return
    folder = folder_of(recipe.latency.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"measured times cannot be kept in {folder} ({error.strerror}); name another folder (latency.folder)"
        ) from error


class Clock:
    """What a network and its operations take, and what of it is to go. Made before anything else is measured for a cut:
    a target that takes no such network, or a time that asks for nothing, shows here.

    Args:
        plan: of the network.
        material: its images make the batch that is timed.
        recipe: amount, and where it counts.
        progress: see `freqprune.tag`.

    Raises:
        InputError: for a network that the target cannot run, a time above what it takes, or a damaged file of times.
    """

    def __init__(self, plan: Plan, material: Material, recipe: Recipe, progress: Progress | None = None) -> None:
        how = recipe.latency
        # ONNX Runtime runs on the CPU, and so do the operations that are timed for it.
        device = torch.device("cpu") if how.target == "onnx" else plan.example.device
        pixels = material.images[torch.arange(how.batch_size) % len(material.images)].to(plan.example.device)
        self.plan, self.batch = plan, material.normalize(pixels).to(device)
        self.dense = _ready(plan.model, self.batch)
        self.time_dense = runner(self.dense, self.batch, how.target)
        eager = runner(self.dense, self.batch)
        dense_ms = compare(eager, eager, N_PAIRS[0], progress=progress).dense_ms
        self.target_ms = dense_ms
        if how.target != "eager":
            self.target_ms = compare(self.time_dense, self.time_dense, N_PAIRS[0], progress=progress).dense_ms
        asked = recipe.amount.latency_cut
        if asked is None:
            assert recipe.amount.latency_ms is not None
            asked = 1 - recipe.amount.latency_ms / self.target_ms
            if asked <= 0:
                raise InputError(
                    f"pruning.latency_ms = {recipe.amount.latency_ms:g} asks for no less than the network takes "
                    f"already, {self.target_ms:.4g} ms at batch {how.batch_size}"
                )
        self.asked = asked
        whole = plan.blocks and how.batch_size == 1 and device == plan.example.device
        self.trace = plan.trace if whole else Trace(self.dense, self.batch, "pruning.macs_cut")
        self.blocks = plan.blocks_of(self.trace)
        cache = cache_file(folder_of(how.folder), device)
        self.times = Times(self.dense, self.trace, self.batch, dense_ms, cache, progress)

    def ms(self, widths: Mapping[str, int]) -> float:
        """Milliseconds of a forward with `widths` filters left in the named units, and 0 of a block that is gone."""
        gone = {node for name, block in self.blocks.items() if widths.get(name, 1) == 0 for node in block.gone}
        units = {name: width for name, width in widths.items() if name not in self.blocks}
        return self.times.ms(self.plan.graph.left(units), gone)


def check_time(plan: Plan, material: Material, recipe: Recipe) -> None:
    """Raise InputError where a `Clock` would; what it has measured is not measured again."""
    Clock(plan, material, recipe)


def to_time(
    plan: Plan, scores: Mapping[str, Tensor], clock: Clock, recipe: Recipe, progress: Progress | None = None
) -> tuple[Kept, Amount, list[str], Promise]:
    """Choose what to keep so that the measured time falls by what `recipe.amount` asks for.

    Args:
        plan: of the network.
        scores: of filters and blocks.
        clock: of it.
        recipe: amount, and where it counts.
        progress: see `freqprune.tag`.

    Returns:
        What is kept, the amount with the multiple that was measured, remarks, and what was measured.

    Raises:
        InputError: for a time that cannot be reached, or a device too noisy to measure.
    """
    how, asked, target_ms, asked_ms = recipe.latency, clock.asked, clock.target_ms, recipe.amount.latency_ms
    wanted, said = recipe.amount, []
    if wanted.multiple_of == AUTO:
        least = min((name for name in scores if name not in plan.blocks), key=lambda name: len(scores[name]))
        smallest = len(scores[least])
        most = max(1, smallest // 2)
        multiple = clock.times.multiple(clock.dense, clock.trace, clock.batch, most)
        wanted = replace(wanted, multiple_of=multiple)
        said = [
            f"widths are multiples of {multiple}, by the steps in the measured times of the layers"
            + (f"; at most {most}, as {least} has {smallest} filters" if most < MULTIPLES[-1] else "")
        ]
    goal, best, off_best = asked, None, 0.0
    for _ in range(N_TRIES):
        amount = replace(wanted, latency_ms=None, latency_cut=min(goal, 0.99))
        try:
            by = plan.macs if amount.scope == "per_mac" else None
            kept = plan.sensible(select(scores, amount, clock.ms, plan.blocks, by))
        except InputError as error:
            if best is None and recipe.amount.latency_ms is not None:
                raise InputError(
                    f"pruning.latency_ms = {recipe.amount.latency_ms:g} asks to remove {100 * asked:.1f} % of "
                    f"the {target_ms:.4g} ms that the network takes at batch {how.batch_size}; {error}"
                ) from error
            if best is None:
                raise
            if off_best >= -MISSED:
                break
            raise InputError(
                f"a cut of {100 * asked:.1f} % of the time cannot be reached; {100 * best[1].saved:.1f} % was "
                f"measured. {error}"
            ) from error
        small = _ready(plan.apply(kept, check=False), clock.batch)
        speed = _measured(clock.time_dense, small, clock.batch, how.target, progress)
        if asked_ms is not None:
            # Of the dense network as it was measured beside this one, not in a few forwards at the start.
            asked = 1 - asked_ms / speed.dense_ms
        off = speed.saved - asked
        if best is None or _badness(off) < _badness(off_best):
            best, off_best = (kept, speed), off
        if -BELOW <= off <= ABOVE:
            break
        goal = min(0.99, max(0.01, goal - off))
    assert best is not None
    kept, speed = best
    asked = speed.saved - off_best
    where = f"batch {how.batch_size}, {how.target} on {clock.batch.device.type}"
    if clock.batch.device.type == "cpu":
        where += f" with {torch.get_num_threads()} threads"
    if how.target != "onnx" and layout_of(clock.dense, clock.batch) == torch.channels_last:
        where += ", channels last"
    wish = f"{100 * asked:.1f} %" if asked_ms is None else f"{asked_ms:g} ms"
    said += [
        f"{100 * speed.saved:.1f} % of the time saved, {wish} asked for: {speed.dense_ms:.4g} ms before, "
        f"{speed.small_ms:.4g} ms now ({where}; spread {100 * speed.spread:.1f} %)"
    ]
    if asked_ms is not None and speed.small_ms > (1 + MISSED) * asked_ms:
        said.append(f"{asked_ms:g} ms were asked for, and missed by {speed.small_ms - asked_ms:.3g} ms")
    elif off_best < -MISSED:
        said.append(f"the time asked for was missed by {-100 * off_best:.1f} % of the dense network's")
    return kept, wanted, said, Promise(asked, speed, how.target, how.batch_size, asked_ms)


def _badness(off: float) -> float:
    """Too little saved is worse than too much."""
    return off if off >= 0 else -3 * off


def _ready(net: nn.Module, batch: Tensor) -> nn.Module:
    """A copy that lies as it runs fastest."""
    twin = copied(net).eval().to(batch.device).to(memory_format=torch.channels_last)
    return twin.to(memory_format=layout_of(twin, batch))


def _measured(
    time_dense: Callable[[], object], small: nn.Module, batch: Tensor, target: str, progress: Progress | None = None
) -> Speed:
    time_small = runner(small, batch, target)
    taken = N_PAIRS[0]
    speed = compare(time_dense, time_small, taken, progress=progress)
    for n_pairs in N_PAIRS[1:]:
        a_pair = (speed.dense_ms + speed.small_ms) / 1000
        enough = speed.spread <= NOISY and taken * a_pair >= LEAST_S
        if enough or (n_pairs > N_PAIRS[2] and n_pairs * a_pair > MOST_S):
            break
        speed, taken = compare(time_dense, time_small, n_pairs, progress=progress), n_pairs
    if speed.spread <= NOISY:
        return speed
    raise InputError(
        f"this device is too noisy to measure a cut on: over {taken} pairs of forwards the share saved is "
        f"{100 * speed.saved:.1f} % with a spread of {100 * speed.spread:.1f} %, above {100 * NOISY:g} %; stop what "
        "else runs on it, or cut by pruning.macs_cut"
    )
