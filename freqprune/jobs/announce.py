"""What a job is about to do, said before it does it: network, data, cut, and about how long that takes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.jobs import pace, trainers
from freqprune.jobs.explain_settings import Tags
from freqprune.jobs.forecast import Forecast, of_explaining, of_pruning, of_training
from freqprune.jobs.outputs import name_of
from freqprune.jobs.pace import Pace
from freqprune.jobs.settings import Settings
from freqprune.networks import copied, count_macs, count_parameters, device_of, dtype_of
from freqprune.processes import rank_and_size
from freqprune.pruning import Plan, Recipe
from freqprune.reports import record, show
from freqprune.training import ImageData

log = logging.getLogger(__name__)

# Images that are repeated to batches of any size.
SHOWN = 8
# Seconds from which on a job is told how it gets quicker.
LONG_S = 600
CUT_FASTER = "fewer pruning.calibration_images, importance=l2"


def announce_training(
    settings: Settings,
    net: nn.Module,
    data: ImageData,
    trainer: pl.Trainer,
    cut: tuple[Plan, list[str]] | None,
    done: int = 0,
) -> None:
    """Say what a training will do, with the cut that follows it, if one does.

    Args:
        settings: of the job.
        net: the network, on any device.
        data: its images.
        trainer: that is going to train it.
        cut: what may be removed, and what of it is picked; None without a cut.
        done: epochs that it has behind it.
    """
    device = trainer.strategy.root_device
    ends = trainer.max_epochs not in (None, -1) and trainer.max_steps == -1
    todo = max(0, (trainer.max_epochs or 0) - done) if ends else None
    how_long = "until it is stopped" if todo is None else _many(todo, "epoch")
    if trainer.max_steps != -1:
        how_long = f"for at most {_many(trainer.max_steps, 'step')}"
    said = f"train {how_long}"
    said += f" after {done}" if done else ""
    if todo and (sides := data.sides(done, done + todo)) != data.training_size():
        said += f", on images of {' x '.join(map(str, sides))} at first"
    if settings.tag_loss.terms:
        said += f", {' and '.join(settings.tag_loss.terms)} from the tags in the loss"
    if every := settings.showing.every_n_epochs:
        said += ", tagged after each" if every == 1 else f", tagged after every {every}"
    said += f"; {_cut_in_words(settings)}" if cut is not None else ""

    def forecast() -> Forecast:
        if trainer.world_size > 1 or settings.common.compile or trainer.limit_train_batches != 1.0:
            return Forecast()
        found = _pace(settings, net, data, device, trains=True, context=trainer.precision_plugin.forward_context)
        stages = of_training(found, settings, data, todo, done)
        if cut is not None:
            stages |= of_pruning(found, settings, data, cut)
        return Forecast(stages)

    faster = "tagging=quick, tagging.every_n_epochs=0, fewer trainer.max_epochs" + (f", {CUT_FASTER}" if cut else "")
    _announce(settings.out, _about(net, data), said, forecast, device, faster)


def announce_pruning(
    settings: Settings,
    net: nn.Module,
    data: ImageData,
    example: Tensor,
    cut: tuple[Plan, list[str]] | None,
    alone: bool,
) -> None:
    """Say what a pruning, or a look at a network, will do.

    Args:
        settings: of the job.
        net: the dense network, on its device.
        data: its images.
        example: one input, there.
        cut: what may be removed, and what of it is picked; None for a look.
        alone: no other process shares the work.
    """

    def forecast() -> Forecast:
        trains = cut is not None and settings.finetune_epochs + settings.course.step_epochs > 0
        if not alone or (trains and settings.common.compile):
            return Forecast()
        return Forecast(of_pruning(_pace(settings, net, data, example.device, trains), settings, data, cut))

    faster = f"tagging=quick{f', {CUT_FASTER}, fewer finetune.epochs' if cut else ''}"
    _announce(settings.out, _about(net, data), _cut_in_words(settings), forecast, example.device, faster)


def announce_explaining(out: Path, net: nn.Module, pixels: Tensor, tags: Tags) -> None:
    """Say what an explanation will do.

    Args:
        out: the folder of the job.
        net: the network, on its device.
        pixels: of the images, ``(n_images, n_channels, height, width)``.
        tags: how their parts are tagged.
    """
    # How long a forward takes does not hang on the values.
    inputs = pixels[: pace.IMAGES].to(device_of(net), dtype_of(net))

    def forecast() -> Forecast:
        if tags.half is not None:
            return Forecast()
        own = -(-len(pixels) // rank_and_size()[1])
        seconds = of_explaining(Pace(pace.of_forward(net, inputs)), own, len(pixels), tags.forwards)
        return Forecast(seconds, at_most=True)

    _announce(
        out,
        f"{_named(net, inputs[:1])} on {_many(len(pixels), 'image')} of {_size(pixels)}",
        f"explain by {tags.parts if tags.segments is None else tags.segments}, "
        f"{f'refined {tags.refine}x, ' if tags.refine else ''}at most {tags.forwards:,} forwards an image",
        forecast,
        inputs.device,
    )


def _announce(
    out: Path, network: str, said: str, forecast: Callable[[], Forecast], device: torch.device, faster: str = ""
) -> None:
    show(network, said)
    record.clear([out / record.FORECAST])
    try:
        found = forecast()
    except InputError:
        raise
    except Exception as error:
        # A job must not fail for its forecast.
        log.warning("how long this takes cannot be said (%s: %s)", type(error).__name__, error)
        return
    if words := str(found):
        show(f"{words} on {trainers.said_of(device)}")
        if found.total.low > LONG_S and faster:
            show(f"for a quicker look: {faster}")
        record.write_json(out / record.FORECAST, found.record())


def _pace(
    settings: Settings, net: nn.Module, data: ImageData, device: torch.device, trains: bool, **context: Any
) -> Pace:
    """How fast the network is on this machine with these data."""
    example = data.normalize(data.pixels("val", min(SHOWN, len(data.split("val"))))).to(device)
    reading, read = pace.of_reading(data)
    step = None
    if trains:
        bare = pace.of_training(net, example, settings.optimizer, data.batch_size, **context)
        step = bare.times(1 + settings.tag_loss.frames_a_step / data.batch_size)
    forward = pace.of_forward(copied(net).to(device).to(memory_format=torch.channels_last), example)
    return Pace(forward, step, read, pace.of_inversion(), reading)


def _about(net: nn.Module, data: ImageData) -> str:
    example = data.normalize(data.pixels("val", 1)).to(device_of(net))
    counts = f"{len(data.split('train')):,} images to train on"
    counts += f", {len(data.split('val')):,} to validate" if data.validates else ""
    name = getattr(data, "name", None) or type(data).__name__.removesuffix("Data")
    return (
        f"{_named(net, example)} on {name}: {counts}, {len(data.split('test')):,} to test, {_size(example)}, "
        f"{len(data.classes)} classes"
    )


def _named(net: nn.Module, example: Tensor) -> str:
    return (
        f"{name_of(net)} ({count_parameters(net) / 1e6:.2f} M parameters, {count_macs(net, example) / 1e6:,.0f} M MACs)"
    )


def _size(images: Tensor) -> str:
    return " x ".join(map(str, images.shape[1:]))


def _cut_in_words(settings: Settings) -> str:
    recipe: Recipe | None = settings.recipe
    if recipe is None:
        return f"tag {_many(settings.showing.n_images, 'image')}, cut nothing"
    amount = recipe.amount
    how_much = (
        f"{100 * amount.macs_cut:g} % of the MACs" if amount.macs_cut is not None
        else f"{100 * amount.ratio:g} % of the filters" if amount.ratio is not None
        else f"filters that score below {amount.threshold:g}" if amount.threshold is not None
        else f"{100 * amount.latency_cut:g} % of the time" if amount.latency_cut is not None
        else f"down to {amount.latency_ms:g} ms"
    )  # fmt: skip
    steps = f" in {settings.course.steps} steps" if settings.course.steps > 1 else ""
    made_up = "" if recipe.compensation == "none" else f", made up for by {recipe.compensation.replace('_', ' ')}"
    made_up = made_up.replace("by sequential", "in sequence")
    how = "train the same widths from scratch for" if settings.from_scratch else "fine-tune"
    tuned = f"; {how} {_many(settings.finetune_epochs, 'epoch')}" if settings.finetune_epochs else ""
    return f"cut {how_much} by {recipe.criterion}{steps}{made_up}{tuned}"


def _many(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
