"""The LightningModule that trains and fine-tunes classifiers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from freqprune.errors import InputError, check_fields
from freqprune.networks import build_model, rebuilt_from


@dataclass(frozen=True)
class Optimization:
    """SGD with a cosine schedule to zero.

    Args:
        lr: peak learning rate.
        momentum: momentum of SGD.
        nesterov: Nesterov's form of it.
        weight_decay: L2 penalty, on weights of convolutions and linear layers and on batch norms alike.
        warmup_epochs: epochs of linear warm-up.
        label_smoothing: of the training loss.

    Raises:
        InputError: for an argument out of range.
    """

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr must be above 0, got {self.lr}")
        for name in ("momentum", "weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} must be a finite number of at least 0, got {value}")
        if self.momentum >= 1 or (self.nesterov and self.momentum == 0):
            raise InputError(f"momentum must lie in [0, 1), and above 0 for nesterov, got {self.momentum}")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")


@dataclass(frozen=True)
class Distillation:
    """A share of the loss that follows another network's outputs (Hinton, Vinyals & Dean 2015, arXiv 1503.02531).

    Args:
        distill: the teacher's share of the loss, 0 for none.
        temperature: softens both networks' outputs for that part.

    Raises:
        InputError: for an argument out of range.
    """

    distill: float = 0.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.distill <= 1:
            raise InputError(
                f"distill is the dense network's share of the loss; it must lie in [0, 1], got {self.distill}"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"temperature must be above 0, got {self.temperature}")


class Classifier(pl.LightningModule):
    """Cross-entropy training with SGD (Nesterov) and a cosine schedule to zero, one update of the rate a step.

    Args:
        model: config for `freqprune.build_model`, or a network. Only the config is saved in the checkpoint: to
            load a checkpoint of another network, pass the network again.
        num_classes: classes, for the metrics; read off the config's ``num_classes`` if left out.
        normalization: ``{"mean": [...], "std": [...]}`` of the inputs, kept with the weights.
        teacher: network to learn from; not saved with the checkpoint.
        distill: the teacher's share of the loss, see `Distillation`.
        temperature: softens both networks' outputs for that part.
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
        **optimization: Any,
    ) -> None:
        super().__init__()
        check_fields(Optimization, optimization)
        optimizer = Optimization(**optimization)
        Distillation(distill, temperature)
        if distill and teacher is None:
            raise InputError(
                f"distill = {distill} needs a teacher to learn from; pass the dense network, or distill = 0"
            )
        # In a list, so that its weights are no part of this module's parameters, checkpoints or train mode.
        self._teacher = [teacher] if teacher is not None and distill else []
        self.distill, self.temperature = distill, temperature
        self.net: nn.Module = model if isinstance(model, nn.Module) else build_model(model)
        config = None if isinstance(model, nn.Module) else rebuilt_from(model, self.net)
        num_classes = num_classes or (config or {}).get("num_classes", 10)
        # Plain numbers, strings, lists and dicts only, so that the checkpoint loads under weights_only=True.
        self.save_hyperparameters(
            {
                "model": config,
                **asdict(optimizer),
                "num_classes": num_classes,
                "normalization": {key: list(value) for key, value in (normalization or {}).items()},
            }
        )
        self.loss = nn.CrossEntropyLoss(label_smoothing=optimizer.label_smoothing)
        self.train_accuracy, self.val_accuracy, self.test_accuracy = (
            # Checking the labels would make an accelerator wait in every step.
            MulticlassAccuracy(num_classes, average="micro", validate_args=False)
            for _ in range(3)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``(n_images, n_channels, height, width)`` to logits ``(n_images, num_classes)``."""
        logits = self.net(images)
        assert isinstance(logits, Tensor)
        return logits

    def setup(self, stage: str) -> None:
        # Before a distributed run takes its view of the gradients: with strides changed after that it would mix their
        # elements up.
        self.net.to(memory_format=torch.channels_last)

    def on_fit_start(self) -> None:
        for teacher in self._teacher:
            teacher.to(device=self.device).to(memory_format=torch.channels_last).eval()

    def _distillation(self, logits: Tensor, images: Tensor) -> Tensor:
        """Distance of the softened outputs from the teacher's (Hinton, Vinyals & Dean 2015, arXiv 1503.02531)."""
        with torch.no_grad():
            target = nn.functional.log_softmax(self._teacher[0](images) / self.temperature, dim=1)
        own = nn.functional.log_softmax(logits / self.temperature, dim=1)
        # Gradients of the softened outputs shrink with the square of the temperature.
        return nn.functional.kl_div(own, target, reduction="batchmean", log_target=True) * self.temperature**2

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = self.loss(logits, labels)
        if self._teacher:
            loss = (1 - self.distill) * loss + self.distill * self._distillation(logits, images)
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
                f"{self.hparams['lr']:g}) or add warm-up; the checkpoints of earlier epochs are intact"
            )

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

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        settings = self.hparams
        optimizer = torch.optim.SGD(
            self.net.parameters(),
            lr=settings["lr"],
            momentum=settings["momentum"],
            nesterov=settings["nesterov"],
            weight_decay=settings["weight_decay"],
        )
        total = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = round(settings["warmup_epochs"] * total / max(1, self.trainer.max_epochs or 1))

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
