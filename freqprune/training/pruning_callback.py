"""Pruning by the tags while a LightningModule trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.networks import config_of, drop_blocks, dropped_blocks, is_known, left_by, picks_of_shortcuts
from freqprune.processes import from_first, shared_work
from freqprune.pruning import (
    Material,
    Plan,
    Recipe,
    check_components,
    check_folder,
    check_time,
    cut,
    needs,
    plan_cut,
    shared_batches,
)
from freqprune.tagging import Stimulus, find_components, normalizer_for
from freqprune.training.carrying import carry_over
from freqprune.training.replaceable import check_module, check_trainer, only_network
from freqprune.training.tags_in_training import TagsInTraining, begins_with, of_all

log = logging.getLogger(__name__)


class TagPruning(TagsInTraining):
    """Cut filters by their response to the tags at the start of given epochs of ``fit``, in any LightningModule.

    The network is replaced by a smaller one; the optimizer goes on with its parameters, and the kept filters keep their
    momentum (every state tensor of a parameter's shape). A checkpoint written after a cut resumes with the same
    callback; one of weights alone tells of cuts if it is written during ``fit``. A cut after the first that cannot be
    made is left out with a warning. Several processes (``strategy="ddp"``) share a cut and go on with the same network.

    Args:
        recipe: how to cut each time; its amount counts in the network of that time.
        epochs: epochs at whose start to cut, counted from 0.
        network: attribute of the LightningModule that holds the network; its only child with convolutions if left out.
        stimulus: the tags; left and right half at 6 and 7.5 Hz if left out.
        n_images: validation images to tag, and to calibrate with.
        mean: channel means that validation batches are normalised with; the data module's ``mean`` if left out, none if
            it has none.
        std: channel standard deviations, likewise.

    Raises:
        InputError: for epochs that are not 0, 1, 2, ..., a network that cannot be found, a strategy that splits the
            network among processes, or what `cut` refuses.
    """

    def __init__(
        self,
        recipe: Recipe,
        epochs: Sequence[int],
        *,
        network: str | None = None,
        stimulus: Stimulus | None = None,
        n_images: int = 32,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(n_images, network, mean, std)
        if not epochs or any(not isinstance(epoch, int) or epoch < 0 for epoch in epochs):
            raise InputError(f"epochs must be epochs to prune at, counted from 0, got {list(epochs)}")
        self.recipe, self.epochs = recipe, sorted(set(epochs))
        self.stimulus = stimulus or Stimulus()
        self.kept: list[dict[str, list[int]]] = []
        # Of each cut, the layers that lost filters together, and the blocks gone by then, see `drop_blocks`.
        self.members: list[dict[str, list[str]]] = []
        self.dropped: list[dict[str, list[str]]] = []
        # Of an image, for tracing the network before there are any.
        self.shape: list[int] | None = None
        self._made: nn.Module | None = None
        # The epoch that was begun last of those in which to cut.
        self._begun: int | None = None

    @property
    def state_key(self) -> str:
        return "TagPruning"

    def state_dict(self) -> dict[str, Any]:
        more = {} if self._made is None else {"shortcuts": picks_of_shortcuts(self._made)}
        return {"kept": self.kept, "members": self.members, "dropped": self.dropped, "shape": self.shape, **more}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = state_dict["kept"]
        self.members = state_dict.get("members", [{} for _ in self.kept])
        self.dropped = state_dict.get("dropped", [{} for _ in self.kept])
        self.shape = state_dict.get("shape")

    @property
    def kept_of_dense(self) -> dict[str, list[int]]:
        """Filters of the dense network that are left, by unit."""
        return left_by(self.state_dict())

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_trainer(trainer)
            if all(one is not self._made for one in pl_module.modules()):
                # Another module than that of an earlier fit has no cuts behind it; it may not have its network yet.
                self.kept, self.members, self.dropped, self.shape = [], [], [], None
        loading, saving = pl_module.on_load_checkpoint, pl_module.on_save_checkpoint

        def rebuild_first(checkpoint: dict[str, Any]) -> None:
            # The weights of a run that was cut are those of the smaller network.
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state is not None and not self._fits(pl_module, checkpoint["state_dict"]):
                self._rebuild(pl_module, state)
            elif state is not None and state["kept"]:
                # It was cut by another callback.
                self._made = self._net(pl_module)
            loading(checkpoint)

        def tell_of_cuts(checkpoint: dict[str, Any]) -> None:
            saving(checkpoint)
            if self.kept:
                checkpoint.setdefault("callbacks", {}).setdefault(self.state_key, self.state_dict())

        # Callbacks are restored only after the weights; this method of the module is called before them.
        pl_module.on_load_checkpoint = rebuild_first  # type: ignore[method-assign]
        # Of a checkpoint of weights alone callbacks are not asked, the module is.
        pl_module.on_save_checkpoint = tell_of_cuts  # type: ignore[method-assign]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for wrapped in ("on_load_checkpoint", "on_save_checkpoint"):
            pl_module.__dict__.pop(wrapped, None)

    def _fits(self, pl_module: pl.LightningModule, stored: Mapping[str, Tensor]) -> bool:
        """Whether the network has the weights of a checkpoint already, by their shapes."""
        prefix = f"{self._attribute(pl_module)}."
        here = {f"{prefix}{name}": value.shape for name, value in self._net(pl_module).state_dict().items()}
        return here == {name: value.shape for name, value in stored.items() if name.startswith(prefix)}

    def _rebuild(self, pl_module: pl.LightningModule, state: Mapping[str, Any]) -> None:
        """Cut a network as that of a checkpoint was, but for the cuts that it has behind it."""
        cuts = state["kept"]
        dropped = state.get("dropped", [{} for _ in cuts])
        done = len(self.kept) if self._made is self._net(pl_module) else 0
        if self.kept[:done] != cuts[:done]:
            raise InputError(
                f"{type(pl_module).__name__} has been cut otherwise than the network of the checkpoint, or further: "
                "load it into a module that has not been cut"
            )
        for kept, gone in zip(cuts[done:], dropped[done:], strict=True):
            example = self._example(pl_module, state.get("shape"))
            small = Plan(self._net(pl_module), example).apply(
                {name: torch.tensor(indices) for name, indices in kept.items()}, check=False
            )
            there = dropped_blocks(small)
            drop_blocks(small, {name: left for name, left in gone.items() if name not in there})
            self._replace(pl_module, small)
        self.load_state_dict(dict(state))

    def _replace(self, pl_module: pl.LightningModule, small: nn.Module) -> None:
        """Put a smaller network in the place of the old one, and into what checkpoints say of it."""
        old = self._net(pl_module)
        for name in [name for name, child in pl_module._modules.items() if child is old]:
            setattr(pl_module, name, small)
        self._made = small
        config, gone = config_of(small), dropped_blocks(small)
        # What others call so is their own.
        if config and is_known(pl_module.hparams.get("model")):
            pl_module.hparams["model"] = config
            if gone:
                pl_module.hparams["blocks"] = gone

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.enable_validation:
            raise InputError("TagPruning needs a validation loader: it tags validation images; pass val_dataloaders")
        self._check_share(self.n_images, trainer)
        self._net(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what the first cut would refuse, before epochs are lost."""
        last = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
        start = begins_with(trainer)
        # An epoch that is gone on with has begun.
        self._begun = trainer.current_epoch if start > trainer.current_epoch else None
        if not any(start <= epoch < last for epoch in self.epochs):
            if not self.kept and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                ends = "" if last == math.inf else f" and ends after {last} epochs"
                log.warning(
                    "epochs = %s: this training begins with epoch %d, counted from 0%s, so that nothing is cut; name "
                    "others%s", self.epochs, start, ends, ", or raise max_epochs" if ends else "",
                )  # fmt: skip
            return
        check_folder(self.recipe)
        check_module(trainer, pl_module, self._attribute(pl_module))
        if self._net(pl_module)._compiled_call_impl is not None:
            log.warning(
                "the network was compiled in place, and the smaller one that TagPruning puts there is not: after a cut "
                "it trains uncompiled, or give fit torch.compile(module)"
            )
        with isolate_rng():
            images, material, _ = self._material(trainer, pl_module)
        self.stimulus.masks(*images.shape[-2:])
        check_components(self.recipe.criterion, self.stimulus)
        if "tags" in needs(self.recipe.criterion):
            find_components(self.recipe.components, self.stimulus.components)
        if "labels" in needs(self.recipe.criterion) and not material.labelled:
            raise InputError(
                f"importance.criterion = {self.recipe.criterion} reads labelled images, and the validation batches "
                "hold no labels: let them be (images, labels), or use another criterion"
            )
        try:
            labels = None if material.labelled is None else material.labelled[1]
            plan, _ = plan_cut(self._net(pl_module), material.normalize(images[:1]), self.recipe, labels)
            if self.recipe.amount.by_time and not self.kept:
                with shared_work():
                    from_first(check_time, plan, material, self.recipe)
        except InputError:
            # Later cuts of a network may find nothing, and say so.
            if not self.kept:
                raise
        batches = shared_batches(self.recipe, images)
        if batches is not None and batches < trainer.world_size:
            raise InputError(
                f"n_images = {self.n_images} of TagPruning make {batches} batches to calibrate this recipe on, which "
                f"{trainer.world_size} processes cannot share; give more, use fewer processes, or a recipe without "
                "calibration, such as Recipe(Amount(macs_cut=0.3), 'amplitude')"
            )

    def _material(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> tuple[Tensor, Material, torch.memory_format]:
        """Pixels of validation images, what a cut is made with, and how the network wants its images to lie."""
        mean, std = self._normalization(trainer)
        raw, labels = self._at_the_start(trainer, pl_module)
        images = of_all(self._pixels(raw, mean, std), trainer)
        labels = None if labels is None else of_all(labels, trainer)
        net = self._net(pl_module)
        normalize, layout = normalizer_for(net, images, mean, std, pl_module.device, images.dtype)
        labelled = None if labels is None else (images, labels)
        return images, Material(images, normalize, mean, std, calibration=images, labelled=labelled), layout

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._cut_if_due(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            # After the last batch of an epoch, Lightning resumes with an epoch that it does not say begins.
            self._cut_if_due(trainer, pl_module)

    def _cut_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self._begun or trainer.current_epoch not in self.epochs:
            return
        self._begun = trainer.current_epoch
        net = self._net(pl_module)
        with isolate_rng():
            images, material, layout = self._material(trainer, pl_module)
            try:
                with shared_work():
                    done = cut(net, material, self.recipe, self.stimulus)
            except InputError as error:
                if not self.kept:
                    raise
                log.warning("nothing is cut in epoch %d: %s", trainer.current_epoch, error)
                return
        example = material.normalize(images[:1])
        small = done.net.to(memory_format=layout)
        for optimizer in trainer.optimizers:
            carry_over(optimizer, net, small, done.kept, example)
        self._replace(pl_module, small)
        self.shape = list(images.shape[1:])
        if isinstance(trainer.strategy, DDPStrategy):
            # Its view of the gradients is of the parameters that are gone.
            trainer.strategy.model = pl_module
            trainer.strategy.configure_ddp()
        self.kept.append({name: indices.tolist() for name, indices in done.kept.items()})
        self.members.append({name: [*layers] for name, layers in done.members.items()})
        self.dropped.append(dropped_blocks(small))
        for remark in done.remarks:
            log.warning("%s", remark)
        n_filters = float(sum(map(len, done.kept.values())))
        pl_module.log("pruning/filters", n_filters, on_step=False, on_epoch=True)

    def _attribute(self, pl_module: pl.LightningModule) -> str:
        if self.network is not None:
            self._network(pl_module)
            return self.network
        return only_network(pl_module)

    def _net(self, pl_module: pl.LightningModule) -> nn.Module:
        net = getattr(pl_module, self._attribute(pl_module))
        assert isinstance(net, nn.Module)
        return net

    def _example(self, pl_module: pl.LightningModule, shape: Sequence[int] | None) -> Tensor:
        """Input for tracing before any data are loaded: of a shape that is known; of a checkpoint of an earlier version
        the module's own example, or the size of its first layer and 32 x 32 pixels."""
        example = getattr(pl_module, "example_input_array", None)
        if shape is None and isinstance(example, Tensor):
            return example
        first = next(m for m in self._net(pl_module).modules() if isinstance(m, nn.modules.conv._ConvNd))
        return torch.zeros(1, *(shape or (first.in_channels, 32, 32)), device=first.weight.device)
