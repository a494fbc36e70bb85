"""Terms of a training loss that are read off the tags: what the measurement says of a network, with its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from freqprune.errors import InputError, at_least, one_of
from freqprune.networks import device_of, dtype_of, norms_as_in_training
from freqprune.tagging.inputs import normalizer, pixels_of, rounding
from freqprune.tagging.layers import of_what_is_left, pick_layers
from freqprune.tagging.loss_terms import MEASURES, fundamentals, intermodulation
from freqprune.tagging.recording import Recorder
from freqprune.tagging.sites import WHERE, Site, find_sites
from freqprune.tagging.spectrum import frame_transform
from freqprune.tagging.stimulus import Stimulus

Weights = float | Mapping[str, float]
TERMS = tuple(MEASURES)
# Share of the pixels that may lie outside [0, 1].
OUTSIDE = 0.25


def _in_eval_mode(net: nn.Module) -> AbstractContextManager[None]:
    """cuDNN gives recurrent layers no gradient in eval mode; PyTorch itself does."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in net.modules())
    context: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    return context


@dataclass(eq=False)
class TagLoss:
    """A loss from the tags, to be added to that of the task in any training step.

    >>> loss = TagLoss(silence=0.1, every_n_steps=1)
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    >>> loss(net, torch.rand(2, 3, 8, 8), step=0).shape
    torch.Size([])

    Every term lies in [0, 1] for each layer, is multiplied by the layer's weight and averaged over the layers that have
    one. It is read off the clean amplitudes that `freqprune.tag` gives, at the components of the stimulus, with the
    network in eval mode: batch norms use their running statistics, which do not move, with the gradients of training
    (see `norms_as_in_training`). A layer whose amplitudes together are less than a thousandth of its mean answer, as on
    a black image, counts 0.

    Args:
        integration: weight of ``1 - share of the intermodulation``, see `freqprune.tagging.loss_terms.separation`: a
            positive weight teaches filters to combine the parts, a negative one to keep them apart. A number for all
            convolutions, or a mapping of layer patterns, such as ``{"layer3.*": 0.1}``; so for all three.
        balance: weight of the inequality of the parts, see `freqprune.tagging.loss_terms.imbalance`.
        silence: weight of the spread of the response over filters, see `freqprune.tagging.loss_terms.spread`: a
            positive weight empties filters.
        n_images: images of the batch that are tagged, the first.
        every_n_steps: show tags in every so many steps only, with so many times the weight. What it costs is
            `frames_a_step` further images a step.
        where: read at the ``"convolution"``, after its ``"norm"`` or after its ``"activation"``.
        stimulus: the tags; left and right half at 6 and 7.5 Hz if left out, 49 frames an image.
        mean: channel means that batches are normalised with; none if left out.
        std: channel standard deviations, likewise.

    Attributes:
        latest: the terms without their weights, as they were last read; for logs, see `due`.

    Weights may be changed at any time. Not for networks that use activation checkpoints, which run once more in
    training mode on the way back.

    Raises:
        InputError: for an argument out of range or of a wrong type, or a term that the stimulus has nothing for.
    """

    integration: Weights = 0.0
    balance: Weights = 0.0
    silence: Weights = 0.0
    n_images: int = 1
    every_n_steps: int = 4
    where: str = "activation"
    stimulus: Stimulus = field(default_factory=Stimulus)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    latest: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("n_images", "every_n_steps"):
            if not isinstance(getattr(self, name), int):
                raise InputError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        at_least(1, n_images=self.n_images, every_n_steps=self.every_n_steps)
        one_of(WHERE, where=self.where)
        if not isinstance(self.stimulus, Stimulus):
            raise InputError(f"stimulus must be a freqprune.Stimulus, got {self.stimulus!r}")
        for term in TERMS:
            given = getattr(self, term)
            if not all(_is_weight(weight) for weight in _values(given)):
                raise InputError(f"{term} must be a finite weight, or a mapping of layers to weights, got {given!r}")
        for name in ("mean", "std"):
            given = getattr(self, name)
            if given is not None and (not hasattr(given, "__len__") or isinstance(given, str)):
                raise InputError(f"{name} must hold one number a channel, got {given!r}")
        if (self.mean is None) != (self.std is None):
            raise InputError("mean and std come together: give both or neither")
        self._check_stimulus()
        self._found: WeakKeyDictionary[nn.Module, _Reading] = WeakKeyDictionary()

    def _check_stimulus(self) -> None:
        """Refuse terms of which nothing could be learned."""
        if self.terms and self.stimulus.control != "none":
            raise InputError(
                f"a stimulus with control = {self.stimulus.control} has no tags to learn from; use control='none'"
            )
        if "integration" in self.terms and not (intermodulation(self.stimulus) and fundamentals(self.stimulus)):
            raise InputError(
                f"integration needs intermodulation: two parts or more and max_order of at least 2, got "
                f"{len(self.stimulus.tag_freqs)} and {self.stimulus.max_order}"
            )
        if "balance" in self.terms and len(fundamentals(self.stimulus)) < 2:
            raise InputError(f"balance needs two parts or more, got {len(self.stimulus.tag_freqs)}")

    def __getstate__(self) -> dict[str, Any]:
        # What was found of networks is found again.
        return {**vars(self), "_found": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._found = WeakKeyDictionary()

    @property
    def terms(self) -> tuple[str, ...]:
        """Those with a weight that is not 0."""
        return tuple(term for term in TERMS if any(_values(getattr(self, term))))

    @property
    def frames_a_step(self) -> float:
        """Frames that go through the network in a step, on average; 0 without terms."""
        n_frames = self.n_images * len(self.stimulus.distinct_frames[0])
        return n_frames / self.every_n_steps if self.terms else 0.0

    def due(self, step: int) -> bool:
        """Whether a step shows tags."""
        return bool(self.terms) and step % self.every_n_steps == 0

    def check(self, net: nn.Module, images: Tensor) -> None:
        """Raise InputError, before any work is lost, where a call would, and for answers that are not finite; see
        `__call__`."""
        with torch.no_grad():
            self(net, images)
        for term, value in self.latest.items():
            if not torch.isfinite(value):
                raise InputError(f"the network answers the tags with values that are not finite ({term} = {value})")

    def __call__(self, net: nn.Module, images: Tensor, step: int = 0) -> Tensor:
        """The loss, a scalar; 0 in steps that show no tags.

        Args:
            net: the network that is trained.
            images: a batch as the network takes it, normalised, ``(n_images, n_channels, height, width)``.
            step: number of the step in the whole training, such as `pl.LightningModule.global_step`; one that begins
                anew with every epoch shows tags more often than `every_n_steps` says. Where several optimizers make a
                step each, Lightning counts every one: give ``self.trainer.fit_loop.total_batch_idx`` there.

        Raises:
            InputError: for weights that name no layer of the network, a batch that is no images or is normalised with
                something else than `mean` and `std`, or a network that does not answer.
        """
        if not self.due(step):
            return images.new_zeros(())
        if images.dim() != 4 or not len(images):
            raise InputError(f"images must be (n_images, n_channels, height, width), got {tuple(images.shape)}")
        loss: Tensor = self._read(net, images)
        return loss

    # Hooks and modes are nothing that a compiled training step can hold.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _read(self, net: nn.Module, images: Tensor) -> Tensor:
        # As the batch lies: a network that takes views may run on nothing else.
        last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        prepare = normalizer(images, self.mean, self.std, device_of(net), dtype_of(net), layout)
        # What augmentation puts around an image, or mixes into it, may lie outside.
        pixels = pixels_of(images[: self.n_images].detach().float(), self.mean, self.std)
        reading = self._found.get(net)
        if reading is None or not reading.holds(net, self):
            _check_pixels(pixels, rounding(images), self.mean, self.std)
            reading = self._found[net] = self._look_at(net, prepare(pixels[:1].clamp(0, 1)))
        if not reading.sites:
            self.latest = {}
            return images.new_zeros(())
        pixels = pixels.clamp(0, 1)
        first, _ = self.stimulus.distinct_frames
        frames = prepare(self.stimulus.frames(pixels, first).flatten(0, 1))
        with norms_as_in_training(net), _in_eval_mode(net), Recorder(net, reading.sites, gradients=True) as recorder:
            courses = list(recorder(frames).values())
            every = torch.cat(courses, 1).unflatten(0, (len(pixels), -1)).movedim(1, -1)
            # Apple's accelerator has no float64.
            every = (every.cpu() if every.device.type == "mps" else every).double()
            every = every @ reading.transform.to(every.device)
            amplitude = torch.view_as_complex(every.unflatten(-1, (-1, 2))).abs().mean(0)
            found = {
                site.layer: one
                for site, one in zip(reading.sites, amplitude.split([c.shape[1] for c in courses]), strict=True)
            }
            total = self._sum(found, reading.weights) * self.every_n_steps
            return total.to(images.device, torch.promote_types(images.dtype, torch.float32))

    def _sum(self, amplitudes: Mapping[str, Tensor], weights: Mapping[str, Mapping[str, float]]) -> Tensor:
        total = next(iter(amplitudes.values())).new_zeros(())
        self.latest = {}
        for term, by_layer in weights.items():
            values = {layer: MEASURES[term](amplitudes[layer], self.stimulus) for layer in by_layer}
            self.latest[term] = torch.stack([value.detach() for value in values.values()]).mean()
            total = total + sum(by_layer[layer] * value for layer, value in values.items()) / len(values)
        return total

    def _look_at(self, net: nn.Module, example: Tensor) -> _Reading:
        """Where the layers with weights are read."""
        self._check_stimulus()
        weights: dict[str, dict[str, float]] = {}
        for term in TERMS:
            given = getattr(self, term)
            # What went with a block has no weight any more.
            patterns: Iterable[str | None] = of_what_is_left(net, [*given]) if isinstance(given, Mapping) else [None]
            by_layer = {
                layer: float(given[pattern] if isinstance(given, Mapping) else given)
                for pattern in patterns
                for layer in pick_layers(net, pattern)
            }
            kept = {layer: weight for layer, weight in by_layer.items() if weight}
            if kept:
                weights[term] = kept
        wanted = {layer for by_layer in weights.values() for layer in by_layer}
        names = [name for name, _ in net.named_modules() if name in wanted]
        first, inverse = self.stimulus.distinct_frames
        bins = [0, *(component.bin for component in self.stimulus.components)]
        transform = torch.view_as_real(frame_transform(inverse, len(first))[:, bins]).flatten(1)
        sites = find_sites(net, example, names, self.where) if names else []
        modules = {name: net.get_submodule(name) for name in (*names, *(site.module for site in sites))}
        return _Reading(sites, weights, transform, modules, self.stimulus, self._settings())

    def _settings(self) -> tuple[Any, ...]:
        """What a reading hangs on, beside the stimulus and the network."""
        given = (getattr(self, term) for term in TERMS)
        return *(dict(one) if isinstance(one, Mapping) else one for one in given), self.where


@dataclass(frozen=True)
class _Reading:
    """Where a network is read, by which weights (term to layer to weight), and what takes the responses to distinct
    frames to real and imaginary parts at 0 Hz and at the components."""

    sites: list[Site]
    weights: dict[str, dict[str, float]]
    transform: Tensor
    modules: dict[str, nn.Module]
    stimulus: Stimulus
    settings: tuple[Any, ...]

    def holds(self, net: nn.Module, loss: TagLoss) -> bool:
        """Whether it is of the network as it is now, and of what the loss asks for now."""
        if loss.stimulus is not self.stimulus or loss._settings() != self.settings:
            return False
        now = dict(net.named_modules())
        return all(now.get(name) is module for name, module in self.modules.items())


def _values(weights: Weights) -> list[float]:
    return list(weights.values()) if isinstance(weights, Mapping) else [weights]


def _is_weight(given: object) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)


def _check_pixels(pixels: Tensor, slack: float, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Refuse what cannot be pixels; what augmentation draws may lie outside of their range."""
    outside = float(((pixels < -slack) | (pixels > 1 + slack)).float().mean())
    if outside > OUTSIDE:
        raise InputError(
            f"{100 * outside:.0f} % of the values of the images lie outside [0, 1] after undoing the normalisation "
            f"(mean {mean}, std {std}); give the loss the mean and std that the batches are normalised with"
        )
