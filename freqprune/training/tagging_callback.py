"""Frequency tagging during training, for any LightningModule."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from freqprune.errors import InputError, check_fields
from freqprune.networks import device_of, dtype_of
from freqprune.pruning import OF_TAGS, Evidence, Judgement, check_components, judge, needs, scores
from freqprune.reports import write_importance
from freqprune.tagging import (
    Readout,
    Stimulus,
    check_pixels,
    check_readable,
    find_components,
    normalizer_for,
    pick_layers,
    tag,
)
from freqprune.training.tags_in_training import TagsInTraining, begins_with


class FrequencyTagging(TagsInTraining):
    """Tag the network at the end of every N-th epoch and count its important filters.

    Works in any LightningModule whose forward takes images and whose validation batches are ``(images, ...)`` or a dict
    with ``"image"``. With several processes each tags its share of the images. Logs ``important/<layer>``, their sum
    ``important/total`` and the time it took; writes ``importance.csv``; keeps the latest SNR and verdict in the
    checkpoint (`latest`). A trainer has one: for a control or a second network beside it call `freqprune.tag` in a
    callback of your own.

    Args:
        stimulus: the tags; left and right half at 6 and 7.5 Hz if left out.
        n_images: validation images, the first of the validation loader.
        every_n_epochs: tag every so many epochs, counted from the first; 0 for never.
        images: tag these pixels in [0, 1], ``(n_images, n_channels, height, width)``, at most ``n_images`` of them,
            instead of validation images: for a training without validation. With validation, tags are shown whenever
            there is one in such an epoch.
        network: attribute of the LightningModule that holds the network; the module itself if left out.
        components: components of the score and the verdict.
        criterion: score written to ``importance.csv``.
        important_by: ``"significance"`` or ``"threshold"``, see `freqprune.pruning.verdict.judge`.
        alpha: false discovery rate.
        threshold: SNR above which a filter is important.
        mean: channel means that validation batches are normalised with; the data module's ``mean`` if left out, none if
            it has none.
        std: channel standard deviations, likewise.
        folder: where ``importance.csv`` goes; the trainer's ``default_root_dir`` if left out.
        seed: seed of the noise, the same every epoch.
        readout: further arguments of `freqprune.tag`: ``layers``, ``where``, ``spatial``, ``noise_std``, ``average``,
            ``half``.
    """

    def __init__(
        self,
        stimulus: Stimulus | None = None,
        *,
        n_images: int = 32,
        every_n_epochs: int = 1,
        images: Tensor | None = None,
        network: str | None = None,
        components: Sequence[str] | str = "fundamentals",
        criterion: str = "snr",
        important_by: str = "significance",
        alpha: float = 0.001,
        threshold: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        folder: str | Path | None = None,
        seed: int = 0,
        **readout: Any,
    ) -> None:
        super().__init__(n_images, network, mean, std)
        check_fields(Readout, readout)
        if every_n_epochs < 0:
            raise InputError(f"every_n_epochs must be 0 (never) or more, got {every_n_epochs}")
        self.readout = Readout(**readout)
        self.tag_settings = {**asdict(self.readout), "seed": seed}
        if self.tag_settings["noise_std"] == 0:
            raise InputError("noise_std must be above 0 to judge filters by signal against noise, got 0")
        Judgement(components, important_by, alpha, threshold)
        if images is not None:
            if not isinstance(images, Tensor):
                raise InputError(f"images must be a tensor of pixels in [0, 1], got {type(images).__name__}")
            check_pixels(images)
        self.stimulus = stimulus or Stimulus()
        if not needs(criterion) <= OF_TAGS:
            raise InputError(
                f"criterion = {criterion} reads more than the tags, which a training does not give; use snr"
            )
        check_components(criterion, self.stimulus)
        find_components(components, self.stimulus.components)
        self.every_n_epochs = every_n_epochs
        self.images = images
        self.components, self.criterion = components, criterion
        self.verdict_settings = {"by": important_by, "alpha": alpha, "threshold": threshold}
        self.folder = folder
        self.latest: dict[str, Any] = {}
        self.seconds = 0.0
        self._epoch_start = time.perf_counter()
        # Epoch at which this training began, until its first tags are written.
        self._since: int | None = None

    @property
    def state_key(self) -> str:
        return "FrequencyTagging"

    def state_dict(self) -> dict[str, Any]:
        return dict(self.latest)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.latest = dict(state_dict)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_epochs and self.images is None and not trainer.enable_validation:
            raise InputError(
                "FrequencyTagging needs a validation loader, whose images it tags, or images=; pass val_dataloaders, "
                "images=, or every_n_epochs=0"
            )
        # Not before: a module may build its network as late as in configure_model.
        network = self._network(pl_module)
        if self.every_n_epochs:
            pick_layers(network, self.tag_settings["layers"])
        count = self.n_images if self.images is None else min(self.n_images, len(self.images))
        if self.every_n_epochs:
            self._check_share(count, trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse images that could not be tagged, and networks that do not run on them, before epochs are lost."""
        self._since = begins_with(trainer)
        last = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
        if not self.every_n_epochs or self.every_n_epochs > last:
            return
        if trainer.enable_validation:
            # Else it is not known before the first validation whether there are batches.
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        images = self.images
        if images is None:
            with isolate_rng():
                first = self._at_the_start(trainer, pl_module, trainer.world_size)[0]
            images = self._pixels(first, *self._normalization(trainer))
        network = self._network(pl_module)
        if network is pl_module and type(network).forward is pl.LightningModule.forward:
            children = ", ".join(name for name, _ in pl_module.named_children())
            raise InputError(
                f"{type(pl_module).__name__} has no forward, which FrequencyTagging calls: give it one, or say which "
                f"of its modules is the network with network=..., one of {children}"
            )
        with isolate_rng():
            prepare, _ = normalizer_for(
                network, images, *self._normalization(trainer), device_of(network), dtype_of(network)
            )
            check_readable(network, images, self.stimulus, prepare, self.readout)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_start = time.perf_counter()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Inside the validation stage batches come without augmentation, and this runs before checkpoints are written.
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self._due(trainer):
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        # Those before this one have put the weights back already.
        self._show_average(trainer, pl_module, callbacks[: callbacks.index(self)] if self in callbacks else [])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        validated = trainer.enable_validation and any(trainer.num_val_batches)
        if not validated and self._due(trainer):
            self._show_average(trainer, pl_module, trainer.callbacks)  # type: ignore[attr-defined]

    def _show_average(self, trainer: pl.Trainer, pl_module: pl.LightningModule, callbacks: Sequence[Any]) -> None:
        """What is validated, and saved in the end, is the average where there is one."""
        averages = [one for one in callbacks if isinstance(one, WeightAveraging)]
        for average in averages:
            average.on_validation_epoch_start(trainer, pl_module)
        try:
            self._show(trainer, pl_module)
        finally:
            for average in averages:
                average.on_validation_epoch_end(trainer, pl_module)

    def _due(self, trainer: pl.Trainer) -> bool:
        return bool(self.every_n_epochs) and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _show(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = time.perf_counter()
        mean, std = self._normalization(trainer)
        network = self._network(pl_module)
        # A loader draws from the global generators as it starts: training must not notice that tags were shown.
        with isolate_rng():
            # Lightning's sampler deals the images out in turn: image i of this process is number rank + i * world_size
            # of all.
            if self.images is None:
                images = self._pixels(self._validation_images(trainer, pl_module)[0], mean, std)
            else:
                images = self.images[: self.n_images][trainer.global_rank :: trainer.world_size].to(pl_module.device)
            numbers = [trainer.global_rank + i * trainer.world_size for i in range(len(images))]
            together = trainer.world_size > 1
            response = tag(
                network, images, self.stimulus, mean=mean, std=std, numbers=numbers, share=together, **self.tag_settings
            )
        verdict = judge(response, self.components, **self.verdict_settings)  # type: ignore[arg-type]
        score = scores(self.criterion, Evidence(network, response, self.components), list(response.layers))
        self.latest = {
            "epoch": trainer.current_epoch,
            "criterion": self.criterion,
            "layers": list(response.layers),
            "components": [c.name for c in response.components("all")],
            "noise_std": response.noise_std,
            "n_images": response.n_images,
            "snr": {layer: response.snr(layer, "all") for layer in response.layers},
            "score": score,
            "important": verdict.important,
        }
        if trainer.is_global_zero:
            folder = Path(self.folder or trainer.default_root_dir)
            path, since = folder / "importance.csv", self._since
            judged = {"components": _plain(self.components), "judged": self.verdict_settings}
            write_importance(path, trainer.current_epoch, response, score, verdict, since, self.criterion, judged)
            self._since = None
        self.seconds = time.perf_counter() - start
        counts = {f"important/{layer}": float(count) for layer, count in verdict.counts.items()}
        share = self.seconds / max(1e-9, time.perf_counter() - self._epoch_start)
        pl_module.log_dict(
            {**counts, "important/total": sum(counts.values()), "tagging/seconds": self.seconds, "tagging/share": share}
        )


def _plain(names: Sequence[str] | str) -> list[str] | str:
    return names if isinstance(names, str) else list(names)
