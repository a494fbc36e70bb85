"""How a network is optimised: optimizer, schedule of its rate, weight decay, averaging, weights of classes."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from freqprune.errors import InputError, closest, one_of

log = logging.getLogger(__name__)

SCHEDULES = ("cosine", "step", "one_cycle", "constant")
BALANCED = "balanced"


@dataclass(frozen=True)
class Optimization:
    """SGD with a cosine schedule to zero, unless told otherwise.

    Args:
        name: class of ``torch.optim``, or of another module, with its dots: ``lion.Lion``.
        arguments: further ones of that class, such as ``betas``.
        lr: peak learning rate.
        momentum: momentum of SGD; others have theirs in `arguments`.
        nesterov: Nesterov's form of it.
        weight_decay: L2 penalty (of AdamW and the like: decoupled decay).
        decay_norms: on weights of norms, on biases, and on tokens, positions and scales of transformers too, not only
            on weights of convolutions and linear layers.
        schedule: ``"cosine"`` to zero; ``"step"``: times `gamma` at every milestone; ``"one_cycle"``: up from 1/25 and
            down to 1/250,000 in halves of a cosine (Smith & Topin 2018, arXiv 1708.07120); ``"constant"``.
        milestones: shares of the training.
        gamma: factor at a milestone.
        warmup_epochs: epochs of linear warm-up; of ``"one_cycle"`` epochs of its rise, 0 for 30 % of all.
        label_smoothing: of the training loss.
        ema: validate, save and keep an exponential moving average of the weights with this decay, e.g. 0.999; 0 for
            none.
        class_weights: weights of the classes in the training loss; ``"balanced"``: so that each class counts the same.

    Raises:
        InputError: for an argument out of range, an optimizer that does not exist or does not take its arguments.
    """

    name: str = "SGD"
    arguments: Mapping[str, Any] | None = None
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_norms: bool = True
    schedule: str = "cosine"
    milestones: Sequence[float] = (0.5, 0.75)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    class_weights: Sequence[float] | str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr must be above 0, got {self.lr}")
        for name in ("momentum", "weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} must be a finite number of at least 0, got {value}")
        if self.momentum >= 1 or (self.nesterov and self.momentum == 0):
            raise InputError(f"momentum must lie in [0, 1), and above 0 for nesterov, got {self.momentum}")
        for name in ("label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        one_of(SCHEDULES, schedule=self.schedule)
        if not all(0 < share < 1 for share in self.milestones):
            raise InputError(f"milestones must be shares of the training, in (0, 1), got {list(self.milestones)}")
        if not 0 < self.gamma <= 1:
            raise InputError(f"gamma must lie in (0, 1], got {self.gamma}")
        self._check_class_weights()
        # A module that draws nothing: the weights of the network to come stay as they would be.
        self.optimizer(nn.BatchNorm1d(1))

    def plain(self) -> dict[str, Any]:
        """The fields as plain lists and dicts, for a checkpoint."""
        return {**asdict(self), "milestones": list(self.milestones), "arguments": self.further}

    @property
    def further(self) -> dict[str, Any]:
        """The `arguments`."""
        return dict(self.arguments or {})

    def _check_class_weights(self) -> None:
        weights = self.class_weights
        fine = (
            weights == BALANCED
            if isinstance(weights, str)
            else weights is None or (all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0)
        )
        if not fine:
            raise InputError(
                f"class_weights must be {BALANCED}, null or a list of numbers of at least 0, got {weights!r}"
            )

    def check_classes(self, n_classes: int, group: str = "") -> None:
        """Raise InputError unless there are as many weights of classes as classes; `group` names the settings."""
        weights = self.class_weights
        if weights is not None and not isinstance(weights, str) and len(weights) != n_classes:
            raise InputError(f"{group}class_weights must hold {n_classes} numbers, one a class, got {len(weights)}")

    def optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a network's parameters."""
        kind = _class(self.name)
        own: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if kind is torch.optim.SGD:
            own |= {"momentum": self.momentum, "nesterov": self.nesterov}
        if "weight_decay" not in inspect.signature(kind).parameters:
            if self.weight_decay:
                raise InputError(f"weight_decay = {self.weight_decay} is nothing that {self.name} knows; set it to 0")
            del own["weight_decay"]
        parameters: Any = net.parameters()
        if not self.decay_norms:
            decayed: list[nn.Parameter] = []
            spared: list[nn.Parameter] = []
            for name, one in net.named_parameters():
                # Tokens, positions, tables of biases and scales may have several dimensions; none is called a weight.
                weighs = one.dim() > 1 and any("weight" in part for part in name.split(".")[-2:])
                (decayed if weighs else spared).append(one)
            parameters = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
        try:
            return kind(parameters, **{**own, **self.further})
        except (TypeError, ValueError) as error:
            raise InputError(f"arguments {self.further} do not go with {self.name} ({error})") from None

    def rate(self, total: int, warmup: int) -> Callable[[int], float]:
        """Factor of the learning rate by step, of `total` steps, the first `warmup` of them warm-up."""

        def after_warmup(step: int) -> float:
            if self.schedule == "cosine":
                return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
            if self.schedule == "step":
                return float(self.gamma ** sum(step >= share * total for share in self.milestones))
            return 1.0

        def rate(step: int) -> float:
            if self.schedule == "one_cycle":
                return _one_cycle(step, total, warmup or 0.3 * total)
            return (step + 1) / warmup if step < warmup else after_warmup(step)

        return rate

    def weights_of(self, labels: Tensor | None, n_classes: int) -> Tensor:
        """Weights of the classes; balanced ones are inverse to the frequency, 1 in the mean over images.

        Args:
            labels: of the training images ``(n_images,)``; None if they are not known.
            n_classes: classes; those that no image shows get a weight of 0.
        """
        if not isinstance(self.class_weights, str):
            assert self.class_weights is not None
            return torch.tensor([float(weight) for weight in self.class_weights])
        if labels is None:
            raise InputError("class_weights = balanced needs a data module of freqprune; give a list of numbers")
        counts = labels.bincount(minlength=n_classes).float()
        return torch.where(counts > 0, len(labels) / ((counts > 0).sum() * counts.clamp(min=1)), 0.0)


def _one_cycle(step: int, total: int, rise: float) -> float:
    def between(start: float, end: float, share: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))

    top = max(1.0, rise - 1)
    if step <= top:
        return between(1 / 25, 1.0, step / top)
    return between(1.0, 1 / 25 / 1e4, min(1.0, (step - top) / max(1.0, total - 1 - top)))


def _class(name: str) -> type[Any]:
    known = [key for key, kind in vars(torch.optim).items() if _is_optimizer(kind)]
    if name in known:
        return getattr(torch.optim, name)
    module, _, last = name.rpartition(".")
    if not module:
        raise InputError(
            f"name must be one of torch.optim's {', '.join(known)}, or a class with its module's dots, got "
            f"{name!r}{closest(name, known)}"
        )
    try:
        kind = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError) as error:
        raise InputError(f"name = {name} cannot be imported ({error})") from None
    if not _is_optimizer(kind):
        raise InputError(f"name = {name} is no torch.optim.Optimizer")
    return kind


def _is_optimizer(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer


def go_on_by_epochs(schedule: LambdaLR, done: int, steps: int) -> None:
    """Let a schedule that was restored after `done` epochs be where it is after as many of `steps` steps each."""
    step = steps * done
    if schedule.last_epoch == step:
        return
    rank_zero_only(log.warning)(
        "an epoch has %d steps here and had %d before: the learning rate goes on where it is after %d epochs",
        steps, round(schedule.last_epoch / done), done,
    )  # fmt: skip
    schedule.last_epoch = step
    schedule._last_lr = [base * rate(step) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, lr in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = lr


# Arguments of torch's optimizers for which these keep a state, that another training has not left.
WITH_STATE = ("amsgrad", "centered", "momentum")


def check_same_optimizer(here: Optimization, stored: Mapping[str, Any]) -> None:
    """Raise InputError where a training would go on with the state of another optimizer; `stored` are the settings of
    the checkpoint."""
    for name in ("name", "decay_norms"):
        if name in stored and _meant(stored[name]) != _meant(getattr(here, name)):
            raise InputError(
                f"the checkpoint was trained with {name} = {stored[name]} of its optimizer, and this training says "
                f"{getattr(here, name)}: it cannot go on with that state; give the same (optimizer.{name}, of a "
                f"fine-tuning finetune.{name}), or train anew"
            )
    before = stored.get("arguments") or {}
    for name in WITH_STATE:
        # SGD begins with a momentum of its own.
        if name == "momentum" and _class(here.name) is torch.optim.SGD:
            continue
        if here.further.get(name) and not before.get(name):
            raise InputError(
                f"the checkpoint was trained without arguments.{name} of its optimizer, which keeps a state of its own "
                "for that: leave it out, or train anew"
            )


def _meant(setting: Any) -> Any:
    """An optimizer's class for its name, which may be spelled with its module."""
    try:
        return _class(setting) if isinstance(setting, str) else setting
    except InputError:
        return setting


def take_settings(schedule: LambdaLR, asked: Optimization, net: nn.Module) -> None:
    """Let a restored optimizer go on with the rate, decay and so on that are asked for, and its own state.

    Args:
        schedule: of its rate, restored too.
        asked: the settings.
        net: the network that it trains.
    """
    groups, anew = schedule.optimizer.param_groups, asked.optimizer(net).param_groups
    constructor = inspect.signature(type(schedule.optimizer)).parameters
    # Groups that were added since are not of these settings.
    for number, (group, new) in enumerate(zip(groups, anew, strict=False)):
        # What else is in a group may be state, such as that of Prodigy.
        group |= {key: new[key] for key in {*constructor, *asked.further} - {"lr"} if key in new}
        base = float(new["lr"])
        if schedule.base_lrs[number] != base:
            rank_zero_only(log.warning)(
                "the checkpoint was trained with a rate of %g: it goes on with %g", schedule.base_lrs[number], base
            )
            schedule.base_lrs[number] = group["initial_lr"] = base
        # Also where the schedule is another, such as that of a longer training.
        schedule._last_lr[number] = group["lr"] = base * schedule.lr_lambdas[number](schedule.last_epoch)
