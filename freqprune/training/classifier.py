"""The LightningModule that trains and fine-tunes classifiers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from freqprune.errors import InputError, check_fields
from freqprune.networks import build_model, drop_blocks, first, rebuilt_from
from freqprune.tagging import TagLoss
from freqprune.training.averaging import MovingAverage, check_average
from freqprune.training.distillation import Distillation
from freqprune.training.optimization import Optimization, check_same_optimizer
from freqprune.training.restored import go_on, go_on_after_an_epoch

log = logging.getLogger(__name__)

# With more classes than so many the share of images whose class is among the first five answers is measured too.
_FEW = 10


class Classifier(pl.LightningModule):
    """Cross-entropy training, one update of the learning rate a step; how, `Optimization` says.

    Args:
        model: config for `freqprune.build_model`, or a network. Only the config is saved in the checkpoint: to
            load a checkpoint of another network, pass the network again.
        num_classes: classes, for the metrics; read off the config's ``num_classes`` if left out.
        normalization: ``{"mean": [...], "std": [...]}`` of the inputs, kept with the weights.
        teacher: network to learn from; not saved with the checkpoint.
        distill: the teacher's share of the loss, see `Distillation`.
        temperature: softens both networks' outputs for that part.
        tag_loss: terms of the training loss that are read off the tags.
        classes: names of the outputs in order, kept with the weights.
        image_size: height and width of the images that it is validated on, likewise.
        blocks: residual blocks that a network of this config has lost, see `freqprune.networks.drop_blocks`.
        optimization: fields of `Optimization`: ``lr`` and so on.
    """

    def __init__(
        self,
        model: Mapping[str, Any] | nn.Module,
        num_classes: int | None = None,
        normalization: Mapping[str, list[float]] | None = None,
        teacher: nn.Module | None = None,
        distill: float = 0.0,
        temperature: float = 4.0,
        tag_loss: TagLoss | None = None,
        classes: Sequence[str] = (),
        image_size: Sequence[int] = (),
        blocks: Mapping[str, Sequence[str]] | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__()
        check_fields(Optimization, optimization)
        self.optimization = Optimization(**optimization)
        Distillation(distill, temperature)
        if distill and teacher is None:
            raise InputError(
                f"distill = {distill} needs a teacher to learn from; pass the dense network, or distill = 0"
            )
        # In a list, so that its weights are no part of this module's parameters, checkpoints or train mode.
        self._teacher = [teacher] if teacher is not None and distill else []
        self.distill, self.temperature, self.tag_loss = distill, temperature, tag_loss
        self.net: nn.Module = model if isinstance(model, nn.Module) else build_model(model)
        config = None if isinstance(model, nn.Module) else rebuilt_from(model, self.net)
        drop_blocks(self.net, blocks or {})
        num_classes = num_classes or (config or {}).get("num_classes", 10)
        # Plain numbers, strings, lists and dicts only, so that the checkpoint loads under weights_only=True.
        self.save_hyperparameters(
            {
                "model": config,
                **self.optimization.plain(),
                "num_classes": num_classes,
                "normalization": {key: list(value) for key, value in (normalization or {}).items()},
                "classes": [str(name) for name in classes],
                "image_size": [int(side) for side in image_size],
                "blocks": {name: list(left) for name, left in (blocks or {}).items()},
            }
        )
        self._schedule: LambdaLR | None = None
        self.loss = nn.CrossEntropyLoss(label_smoothing=self.optimization.label_smoothing)
        self.train_accuracy, self.val_accuracy, self.test_accuracy = (
            # Checking the labels would make an accelerator wait in every step.
            MulticlassAccuracy(num_classes, average="micro", validate_args=False)
            for _ in range(3)
        )
        self.top5 = nn.ModuleDict(
            {
                stage: MulticlassAccuracy(num_classes, top_k=5, average="micro", validate_args=False)
                for stage in ("val", "test")
                if num_classes > _FEW
            }
        )
        self.optimization.check_classes(num_classes)
        weights = self.optimization.class_weights
        # Not saved: weights that balance the classes follow the data.
        self.register_buffer("class_weights", None if weights is None else torch.ones(num_classes), persistent=False)

    @property
    def teacher(self) -> nn.Module | None:
        """The network that is learned from, if any."""
        return self._teacher[0] if self._teacher else None

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``(n_images, n_channels, height, width)`` to logits ``(n_images, num_classes)``."""
        return first(self.net(images))

    def setup(self, stage: str) -> None:
        # Before a distributed run takes its view of the gradients: with strides changed after that it would mix their
        # elements up.
        self.net.to(memory_format=torch.channels_last)

    def configure_callbacks(self) -> list[pl.Callback]:
        ema = self.optimization.ema
        if self.trainer.state.fn == "fit":
            check_average(ema, str(self.trainer.precision))
        return [MovingAverage(ema, self.trainer.strategy.root_device)] if ema else []

    def on_fit_start(self) -> None:
        if isinstance(self.class_weights, Tensor):
            data: Any = getattr(self.trainer, "datamodule", None)
            labels = data.split("train").labels if hasattr(data, "split") else None
            self.class_weights.copy_(self.optimization.weights_of(labels, len(self.class_weights)))
        for teacher in self._teacher:
            teacher.to(device=self.device).to(memory_format=torch.channels_last).eval()

    def _distillation(self, logits: Tensor, images: Tensor) -> Tensor:
        """Distance of the softened outputs from the teacher's (Hinton, Vinyals & Dean 2015, arXiv 1503.02531)."""
        with torch.no_grad():
            target = nn.functional.log_softmax(first(self._teacher[0](images)) / self.temperature, dim=1)
        own = nn.functional.log_softmax(logits / self.temperature, dim=1)
        # Gradients of the softened outputs shrink with the square of the temperature.
        return nn.functional.kl_div(own, target, reduction="batchmean", log_target=True) * self.temperature**2

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not isinstance(self.class_weights, Tensor):
            loss: Tensor = self.loss(logits, labels)
            return loss
        # Over the weights of the images' classes, also where an image has shares of two, which PyTorch would not do.
        counts = labels @ self.class_weights if labels.is_floating_point() else self.class_weights[labels]
        total = nn.functional.cross_entropy(
            logits, labels, self.class_weights, reduction="sum", label_smoothing=self.optimization.label_smoothing
        )
        # In the mean over processes: the mean of their gradients is then that of one batch.
        whole: Any = counts.sum() if self._trainer is None else self.trainer.strategy.reduce(counts.sum())
        return total / whole.clamp(min=torch.finfo(total.dtype).tiny)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = self._loss(logits, labels)
        if self._teacher:
            loss = (1 - self.distill) * loss + self.distill * self._distillation(logits, images)
        if self.tag_loss is not None:
            loss = loss + self.tag_loss(self.net, images, self.global_step)
            if self.tag_loss.due(self.global_step):
                terms = {f"tag_loss/{term}": value for term, value in self.tag_loss.latest.items()}
                self.log_dict(terms, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)
        self._check_finite(loss, batch_idx)
        # Mixed images have shares of classes for labels.
        self.train_accuracy.update(logits, labels.argmax(1) if labels.is_floating_point() else labels)
        self.log(
            "train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels), sync_dist=True
        )
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True, batch_size=len(labels))
        assert isinstance(loss, Tensor)
        return loss

    def _check_finite(self, loss: Tensor, batch_idx: int) -> None:
        # Reading the loss makes an accelerator wait: there, look at every 50th step and at the last, before a
        # checkpoint is written.
        if loss.device.type != "cpu" and batch_idx % 50 and not self.trainer.is_last_batch:
            return
        if not torch.isfinite(loss):
            raise InputError(
                f"the training loss became {loss.item()} in epoch {self.current_epoch}, step {batch_idx}: lower the "
                "learning rate (now "
                f"{self.hparams['lr']:g}) or add warm-up; the checkpoints of earlier epochs are intact and can be gone "
                "on from with another rate"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Before the state of the optimizer is restored, which fits another only by chance.
        own = type(self).configure_optimizers is Classifier.configure_optimizers
        if own and self._trainer is not None and self.trainer.state.fn == "fit":
            check_same_optimizer(self.optimization, checkpoint.get("hyper_parameters", {}))
            averages = any(isinstance(one, WeightAveraging) for one in self.trainer.callbacks)  # type: ignore[attr-defined]
            if not averages and "current_model_state" in checkpoint:
                # The optimizer's state is of the weights themselves, not of their average.
                checkpoint["state_dict"] = checkpoint["current_model_state"]
                rank_zero_only(log.warning)(
                    "the checkpoint was trained with an average of the weights, and this training has none: it goes on "
                    "with the weights themselves, not with their average"
                )

    def on_train_start(self) -> None:
        go_on_after_an_epoch(self.trainer.fit_loop)
        # Not kept: a module with it could not be pickled.
        made, self._schedule = self._schedule, None
        # Those of a subclass are its own business.
        if made is not None and made is self.lr_schedulers() and made.last_epoch:
            go_on(self.trainer, made, self.optimization, self.net, self._steps_an_epoch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # What follows an epoch, such as tagging, is of one network.
        if self.trainer.is_last_batch:
            self._take_statistics_of_the_first()

    def on_validation_epoch_start(self) -> None:
        self._take_statistics_of_the_first()

    def on_train_end(self) -> None:
        self._take_statistics_of_the_first()

    def _take_statistics_of_the_first(self) -> None:
        """Statistics of batch norms as the first of several processes has them, which checkpoints hold; each has its
        own otherwise, of the images that it saw last."""
        if self.trainer.world_size == 1 or not torch.distributed.is_initialized():
            return
        for buffer in self.net.buffers():
            torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", self.val_accuracy, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", self.test_accuracy, batch)

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        self.log(
            f"{stage}/loss",
            nn.functional.cross_entropy(logits, labels),
            prog_bar=stage == "val",
            batch_size=len(labels),
            sync_dist=True,
        )
        self.log(f"{stage}/accuracy", accuracy, prog_bar=stage == "val", batch_size=len(labels))
        if stage in self.top5:
            among_five = self.top5[stage]
            assert isinstance(among_five, MulticlassAccuracy)
            among_five.update(logits, labels)
            self.log(f"{stage}/top5", among_five, batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.optimization.optimizer(self.net)
        steps = self.trainer.estimated_stepping_batches
        schedule, warmup_epochs = self.optimization.schedule, self.optimization.warmup_epochs
        if math.isinf(steps) and (schedule != "constant" or warmup_epochs):
            raise InputError(
                f"schedule = {schedule} with warmup_epochs = {warmup_epochs:g} follows the length of the training, "
                "which trainer.max_epochs = -1 leaves open; set it or trainer.max_steps, or schedule=constant without "
                "warm-up"
            )
        total = 1 if math.isinf(steps) else max(1, int(steps))
        warmup = round(warmup_epochs * self._steps_an_epoch()) if warmup_epochs else 0
        if warmup >= total and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_only(log.warning)(
                "warmup_epochs = %g are %d steps, and the training has %d: the rate never reaches lr, nor falls; use "
                "fewer, or train for longer", warmup_epochs, warmup, total
            )  # fmt: skip
        scheduler = LambdaLR(optimizer, self.optimization.rate(total, warmup))
        self._schedule = scheduler
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _steps_an_epoch(self) -> int:
        if self.trainer.train_dataloader is None:
            self.trainer.fit_loop.setup_data()
        n_batches = self.trainer.num_training_batches
        if math.isinf(n_batches):
            raise InputError(
                f"warmup_epochs = {self.optimization.warmup_epochs:g} needs to know how many batches an epoch has, and "
                "the loader does not say; set trainer.limit_train_batches, or warmup_epochs = 0"
            )
        return math.ceil(n_batches / self.trainer.accumulate_grad_batches)
