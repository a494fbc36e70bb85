"""How long a job will take: the pace of its network, times what it does, stage by stage.

What cannot be counted is left out, and that is said. The factors between forwards and stages were measured on
ResNets and a MobileNetV2 on one core, with small images and few; the ranges are as wide as those networks differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from freqprune.attribution import frames_for
from freqprune.jobs.pace import NOTHING, Pace, Span
from freqprune.jobs.settings import Settings
from freqprune.pruning import Plan, n_measured, needs, seen_in_a_step
from freqprune.tagging import Readout, Stimulus
from freqprune.training import ImageData

# Forwards that a tagged frame costs, noise and spectra and all.
FRAME = (0.7, 1.7)
# Of a calibration image: for the second moments, for the gradients of the logits, and for a walk through the network
# that makes up for a cut in sequence, with so many more for every round of Gauss-Newton steps.
MOMENTS, GRADIENTS, WALK, ROUND = (2.0, 5.0), (2.0, 4.0), (3.0, 8.0), (35.0, 80.0)
# Of an image whose logits are measured, for each of eight cuts of a layer and the whole network: what comes after it.
AFTER, TRIED = (0.35, 0.85), 9
# Of a labelled image.
LABELLED = (1.0, 8.0)
# Inversions of the moments of a layer: to score its filters; each time that it is solved for.
SCORED, SOLVED = (0.5, 1.5), (0.7, 2.5)
# A cut network saves less time than MACs.
WITHOUT_AMOUNT = 0.3
# Seconds for the figures and pages of a job that trains, and of one that tags and prunes.
TRAINING_PAGES, PRUNING_PAGES = Span(1, 4), Span(4, 15)
# Forwards of a frame of an explanation, with the fit of its effects; seconds for the picture of an image.
EXPLAINED, PICTURE = (1.0, 2.0), Span(0.3, 1.5)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Forecast:
    """Seconds of each stage of a job; None where nothing can be said.

    >>> forecast = Forecast({"training": Span(60, 100), "cut": None})
    >>> print(forecast)
    about 60 to 100 s, not counting the cut
    """

    stages: Mapping[str, Span | None] = field(default_factory=dict)
    at_most: bool = False

    @property
    def total(self) -> Span:
        """Seconds of all stages of which something can be said."""
        return sum((span for span in self.stages.values() if span is not None), NOTHING)

    def __str__(self) -> str:
        unsaid = [f"the {name}" for name, span in self.stages.items() if span is None]
        if len(unsaid) == len(self.stages):
            return ""
        named = {name: span for name, span in self.stages.items() if span is not None and span.high >= 1}
        parts = ", ".join(f"{name} {in_words(span)}" for name, span in named.items()) if len(named) > 1 else ""
        return (
            f"{'at most ' if self.at_most else ''}about {in_words(self.total)}"
            + (f" ({parts})" if parts else "")
            + (f", not counting {' and '.join(unsaid)}" if unsaid else "")
        )

    def record(self) -> dict[str, list[float] | None]:
        """Seconds by stage and of all, for scripts."""
        spans = {**self.stages, "total": self.total if str(self) else None}
        return {
            name: None if span is None else [round(span.low, 2), round(span.high, 2)] for name, span in spans.items()
        }


def in_words(span: Span) -> str:
    """A time as a person would say it.

    >>> [in_words(span) for span in (Span(0.2, 0.4), Span(12.3, 44), Span(95, 200), Span(3000, 3010), Span(4e4, 9e4))]
    ['1 s', '12 to 44 s', '1.6 to 3.3 minutes', '50 minutes', '11 to 25 hours']
    """
    unit, name = next(
        (u, n) for most, u, n in ((120, 1, "s"), (7200, 60, "minutes"), (1e99, 3600, "hours")) if span.high < most
    )
    low, high = (max(1.0, value) if unit == 1 else value for value in (span.low / unit, span.high / unit))
    digits = 1 if high < 10 and unit > 1 else 0
    said = list(dict.fromkeys(f"{value:.{digits}f}".removesuffix(".0") for value in (low, high)))
    return f"{' to '.join(said)} {name}"


def of_tags(pace: Pace, stimulus: Stimulus, readout: Readout, n_images: int) -> Span | None:
    """Seconds that it takes to tag images; nothing can be said of spectra at every position of a map, or of half
    precision."""
    if readout.spatial == "map" or readout.half is not None:
        return None
    n_frames = len(stimulus.distinct_frames[0]) + (stimulus.n_frames if readout.noise_std else 0)
    return pace.forward.times(n_images * n_frames).times(*FRAME)


def of_epochs(
    pace: Pace, data: ImageData, epochs: int, cheapest: float = 1.0, done: int = 0, whole: bool = False
) -> Span | None:
    """Seconds of so many epochs of training, each with its validation.

    Args:
        pace: of the network.
        data: its images.
        epochs: how many.
        cheapest: share of its time that the network may take, if it was cut.
        done: epochs before these, of the same training.
        whole: all of them with images as they are.
    """
    if pace.step is None:
        return None
    n_train, n_val = len(data.split("train")), len(data.split("val")) if data.validates else 0
    resizing, (height, width) = data.progressive_resizing, data.split("train").pixels.shape[-2:]
    size = 1.0 if resizing is None or whole else resizing.cost(done + epochs, height, width, done)
    an_epoch = pace.step.times(n_train * size) + pace.fed.times(n_train) + (pace.forward + pace.read).times(n_val)
    return an_epoch.times(epochs * cheapest, epochs)


def of_test(pace: Pace, data: ImageData, times: int = 1) -> Span:
    """Seconds of so many tests."""
    return (pace.forward + pace.read).times(times * len(data.split("test")))


def of_training(
    pace: Pace, settings: Settings, data: ImageData, epochs: int | None, done: int = 0
) -> dict[str, Span | None]:
    """Seconds of the stages of a training that has so many epochs to go, and some done; None: nobody knows how many."""
    showing = settings.showing
    every = showing.every_n_epochs
    tagged = epochs // every if epochs is not None and every else 0
    n_images = min(showing.epoch_images, len(data.split("val")))
    return {
        "training": None if epochs is None else of_epochs(pace, data, epochs, done=done),
        **({"tags": of_tags(pace, settings.stimulus, settings.readout, tagged * n_images)} if tagged else {}),
        "test and report": of_test(pace, data) + TRAINING_PAGES,
    }


def of_pruning(
    pace: Pace, settings: Settings, data: ImageData, cut: tuple[Plan, list[str]] | None
) -> dict[str, Span | None]:
    """Seconds of the stages of a pruning, or of a look at a network.

    Args:
        pace: of the dense network.
        settings: of the job.
        data: its images.
        cut: what may be removed, and what of it is picked; None for a look.
    """
    showing, course, latency = settings.showing, settings.course, settings.latency
    n_val = len(data.split("val"))
    tags = of_tags(pace, settings.stimulus, settings.readout, min(showing.n_images, n_val))
    if cut is not None and tags is not None and "tags" in needs(settings.scoring.criterion):
        # Each step tags anew what the ones before have left.
        tags = tags.times(1, course.steps)
    if showing.per_class:
        counts = data.split("val").labels.bincount().clamp(max=showing.n_images)
        clean = replace(settings.readout, noise_std=0.0)
        by_class = of_tags(pace, settings.stimulus, clean, int(counts.sum()))
        tags = None if tags is None or by_class is None else tags + by_class
    found: dict[str, Span | None] = {"tags": tags}
    n_nets = 1 if cut is None else 2
    by_time = settings.recipe is not None and settings.recipe.amount.by_time
    timed = sum(latency.sizes(by_time)) * (latency.n_runs + 5) * n_nets
    n_tests = n_nets
    if cut is not None:
        assert settings.recipe is not None
        one = of_a_cut(pace, settings, data, *cut)
        found["cut"] = None if one is None else one.times(1, course.steps)
        left = settings.recipe.amount.macs_cut
        cheapest = WITHOUT_AMOUNT if left is None else 1 - left
        last, before = settings.finetune_epochs, course.step_epochs * (course.steps - 1)
        epochs = last + before
        if epochs:
            tuned = of_epochs(pace, data, last, cheapest, whole=not settings.from_scratch)
            steps = of_epochs(pace, data, before, cheapest, whole=True)
            tuned = None if tuned is None or steps is None else tuned + steps
            if tuned is not None and settings.distillation.distill:
                tuned = tuned + pace.forward.times(epochs * len(data.split("train")))
            found["training from scratch" if settings.from_scratch else "fine-tuning"] = tuned
        n_tests += bool(course.bn_images) + bool(settings.finetune_epochs)
    found["tests and report"] = of_test(pace, data, n_tests) + pace.forward.times(timed) + PRUNING_PAGES
    return found


def of_a_cut(pace: Pace, settings: Settings, data: ImageData, plan: Plan, chosen: list[str]) -> Span | None:
    """Seconds of one cut; nothing can be said of one by time or one that ranks blocks."""
    recipe = settings.recipe
    assert recipe is not None
    if recipe.amount.by_time or recipe.with_blocks:
        return None
    wanted = needs(recipe.criterion)
    n_images = min(settings.course.calibration_images, len(data.split("train")))
    n_inputs = n_images * recipe.inputs_an_image
    seconds = pace.forward.times(n_inputs).times(*MOMENTS) if recipe.needs_moments else NOTHING
    if "gradients" in wanted:
        seconds += pace.forward.times(n_inputs).times(*GRADIENTS)
    if "frames" in wanted:
        measured = min(n_images, n_measured(recipe, data.split("val").pixels.shape)) * recipe.inputs_an_image
        seconds += pace.forward.times(len(chosen) * TRIED * measured).times(*AFTER)
    labelled = min(settings.scoring.labelled_images, len(data.split("train")))
    if recipe.criterion == "effect":
        # A recording in which each filter of a layer has a tag.
        n_filters = sum(plan.unit(name).n_filters * len(plan.unit(name).members) for name in chosen)
        seconds += pace.forward.times(labelled * frames_for(n_filters)).times(*EXPLAINED)
    elif "labels" in wanted:
        seconds += pace.forward.times(labelled).times(*LABELLED)
    readers = {reader for name in chosen for reader in plan.unit(name).readers}
    if "moments" in wanted:
        seconds += pace.inversion.times(_cubes(plan.model, readers)).times(*SCORED)
    if recipe.compensation == "sequential":
        rounds = recipe.reconstruction.rounds
        seconds += pace.forward.times(n_inputs).times(*WALK)
        stepped = seen_in_a_step(n_inputs, data.split("val").pixels.shape[-2:].numel())
        seconds += pace.forward.times(stepped * rounds).times(*ROUND)
        seconds += pace.inversion.times(_cubes(plan.model)).times((1 + rounds) * SOLVED[0], (1 + rounds) * SOLVED[1])
    return seconds


def of_explaining(pace: Pace, n_own: int, n_images: int, forwards: int) -> dict[str, Span | None]:
    """Seconds of an explanation with so many forwards an image, of which this process takes `n_own` and the first draws
    all."""
    return {
        "effects": pace.forward.times(n_own * forwards).times(*EXPLAINED),
        "pictures": PICTURE.times(n_images),
    }


def _cubes(net: nn.Module, names: set[str] | None = None) -> float:
    """Cubes of the numbers of inputs of layers, of all layers if none are named, summed up."""
    layers = [
        layer for name, layer in net.named_modules() if isinstance(layer, LAYERS) and (not names or name in names)
    ]
    return float(sum(layer.weight[0].numel() ** 3 for layer in layers))
