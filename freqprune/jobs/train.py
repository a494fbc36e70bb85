"""The job behind `train.py` and ``freqprune train``."""

from __future__ import annotations

import logging
import math
import shlex
import time
from dataclasses import asdict, replace
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch.nn import functional

from freqprune.errors import InputError
from freqprune.jobs import assembly, trainers
from freqprune.jobs.advice import advise, same_folder
from freqprune.jobs.announce import announce_training
from freqprune.jobs.config import check_training
from freqprune.jobs.csv_log import ResumedCSVLogger
from freqprune.jobs.finetuning import check_anew, check_finetuning, how_to_go_on
from freqprune.jobs.launch import world_size
from freqprune.jobs.launched import named_by_launcher
from freqprune.jobs.loggers import log_results
from freqprune.jobs.outputs import explore_training, figures_of_training, training_criterion
from freqprune.jobs.settings import Settings, read
from freqprune.jobs.values import override
from freqprune.networks import build_model, check_export, check_resumable, device_of, dtype_of, rebuilt_from
from freqprune.pruning import check_folder, plan_cut
from freqprune.reports import record, show, show_folder, write_page
from freqprune.tagging import TagLoss, pick_layers
from freqprune.training import Classifier, FrequencyTagging, ImageData

log = logging.getLogger(__name__)

# Test accuracy over that of a guess, up to which a network is said to have learned nothing.
CHANCE = 1.2
# Share of a step's time that a loss from the tags may take before it is said how it takes less.
COSTLY = 0.2


def train(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train the configured network, tagging it as it goes, and test it at the end.

    Args:
        cfg: composed from ``conf/train.yaml`` or ``conf/prune.yaml``.

    Returns:
        Metrics (``val_accuracy`` and ``test_accuracy`` of the last epoch as fractions, with many classes ``test_top5``,
        ``epochs``, ``seconds``), which are also written to ``training.json``, and the objects: ``data``,
        ``classifier``, ``trainer``, ``tagging``.

    Raises:
        InputError: for a bad setting, before any work; for a loss that is not finite.
    """
    check_training(cfg)
    settings = read(cfg)
    common = settings.common
    assembly.quiet()
    world_size(settings.trainer)
    out = assembly.prepare_output(settings.out)
    assembly.seed(common)
    config = assembly.model_config(settings.model)
    data = assembly.load_data(assembly.data_settings(settings))
    config = assembly.with_classes(config, data)
    # As the network was built, with what its library has added.
    built = {} if common.ckpt_path is None else rebuilt_from(config, build_model(config))
    done = 0 if common.ckpt_path is None else check_resumable(common.ckpt_path, built)
    most = settings.trainer.get("max_epochs")
    if isinstance(most, int) and 0 <= most < done:
        raise InputError(
            f"ckpt_path = {common.ckpt_path} has {done} epochs behind it, trainer.max_epochs = {most} asks for fewer "
            f"in all: say trainer.max_epochs={done} or more"
        )
    settings.stimulus.masks(*data.split("val").pixels.shape[-2:])
    classifier = Classifier(
        config,
        num_classes=len(data.classes),
        normalization=assembly.normalization_of(data),
        classes=data.classes,
        image_size=data.split("val").pixels.shape[-2:],
        tag_loss=_tag_loss(settings, data),
        **asdict(settings.optimizer),
    )
    example = data.normalize(data.pixels("val", 1))
    assembly.check_sizes(classifier.net, data, example, most)
    assembly.check_classes(classifier.net, data, example)
    if classifier.tag_loss is not None:
        classifier.tag_loss.check(classifier.net, example)
        if data.progressive_resizing is not None and isinstance(most, int):
            classifier.tag_loss.check(classifier.net, functional.interpolate(example, data.sides(done, most)))
    cut = None
    if settings.recipe is not None:
        check_folder(settings.recipe)
        cut = plan_cut(classifier.net, example, settings.recipe)
        check_finetuning(settings, data)
        check_export(classifier.net, example, settings.exports)
        if settings.from_scratch:
            check_anew(classifier.net)
    pick_layers(classifier.net, settings.readout.layers)
    tagging = _tagging(settings, data)
    last = out / "checkpoints" / "last.ckpt"
    goes_on = common.ckpt_path is not None and record.lies_in(common.ckpt_path, out)

    is_cut = settings.recipe is not None and record.holds_cut(out)
    if (last.is_file() or is_cut) and not goes_on and named_by_launcher(out):
        words = shlex.quote(override("ckpt_path", last))
        if is_cut:
            # Its training is over, and the one of its cut would be removed.
            words = how_to_go_on(settings)
        raise InputError(
            f"{out} is called as its processes meet, and holds the checkpoints of an earlier start: go on with {words},"
            " or choose another folder (hydra.run.dir=FOLDER)"
        )

    of_a_cut = goes_on and (out / record.METRICS).is_file()
    began = False
    validated_at: int | None = None

    def begin(*_: Any) -> None:
        """Once nothing of the training can be refused any more."""
        nonlocal began
        began = True
        if not trainer.is_global_zero or (of_a_cut and not trainer.training):
            # Where nothing is trained, what was cut and shown, and its record, are of this network.
            return
        record.write(out, cfg, [record.TRAINING, record.METRICS, *record.PAGES])
        # Of an earlier training in this folder: it would be taken for one of this.
        own = [out / name for name in record.OF_A_TRAINING]
        of_its_cut = [out / record.METRICS, out / "pruned.ckpt"]
        record.clear([] if goes_on else [last, last.with_name("best.ckpt"), *own, *of_its_cut])
        for logger in [] if goes_on else trainer.loggers:
            if isinstance(logger, ResumedCSVLogger):
                logger.forget()
        if goes_on and trainer.training:
            # What was cut and shown is of the network as it was.
            stale = (record.TRAINING, record.METRICS, *record.PAGES)
            record.clear([path for name in stale for path in out.glob(name)])

    def note(*_: Any) -> None:
        """The steps behind a validation."""
        nonlocal validated_at
        if not trainer.sanity_checking:
            validated_at = trainer.global_step

    hooks = pl.callbacks.LambdaCallback(on_train_start=begin, on_validation_end=note)
    trainer = trainers.make_trainer(settings, out, [tagging, hooks])
    if trainer.is_global_zero:
        announce_training(settings, classifier.net, data, trainer, cut, done)
    start = time.perf_counter()
    how = f"if an epoch was complete: {shlex.quote(override('ckpt_path', last))}"
    # Of a sweep each job knows what it has left.
    advice = f"interrupted; to go on, {f'the same command with {same_folder(out)}' if record.in_sweep() else how}"
    trainers.fit(trainer, classifier, data, common.ckpt_path, advice, common.compile)
    trained = began
    if not trained:
        # No epoch was left, or no step, after which Lightning does not count the last epoch.
        trainer.fit_loop.epoch_progress.current.completed = max(trainer.current_epoch, done)
        begin()
    seconds = time.perf_counter() - start
    if data.validates and validated_at != trainer.global_step:
        # No epoch was left to train, or none to validate after the last.
        with trainers.ended_by_sigterm(trainer):
            trainer.validate(classifier, datamodule=data, verbose=False)
    accuracy = float(trainer.callback_metrics.get("val/accuracy", math.nan))
    validated = {"val_accuracy": accuracy} if data.validates else {}
    metrics = {
        **validated,
        **_tested(settings, trainer, classifier, data),
        "epochs": trainer.current_epoch,
        **({"epochs_here": trainer.current_epoch - done} if done else {}),
        "seconds": round(seconds, 2),
    }
    if trainer.is_global_zero:
        if trained or not of_a_cut:
            record.write_json(out / record.TRAINING, {**metrics, "finished": False})
            figures_of_training(tagging, out)
            title = f"{config['name']}, {metrics['epochs']} epochs, seed {common.seed}"
            shown = example.to(device_of(classifier.net), dtype_of(classifier.net))
            explore_training(settings, tagging, title, classifier.net, shown)
            write_page(out)
            record.write_json(out / record.TRAINING, metrics)
        log_results(trainer.logger, out, last=settings.recipe is None)
        total = sum(int(flags.sum()) for flags in tagging.latest.get("important", {}).values())
        show(
            f"trained {config['name']} for {metrics['epochs'] - done} {'further ' if done else ''}epochs in "
            f"{seconds:.0f} s: "
            + "".join(f"validation {100 * accuracy:.2f} %, " for accuracy in validated.values())
            + f"test {100 * metrics['test_accuracy']:.2f} %"
            + (f"; {total} important filters" if tagging.latest else "")
        )
        if metrics["test_accuracy"] <= CHANCE / len(data.classes):
            log.warning(
                "the network is hardly better than chance (%.1f %% of %d classes): more epochs (trainer.max_epochs), a "
                "lower optimizer.lr, or a smaller data.batch_size, which gives more steps an epoch",
                100 / len(data.classes), len(data.classes),
            )  # fmt: skip
        if settings.recipe is None:
            show_folder(out)
            advise("train", out, assembly.settings_of_weights(settings))
    return metrics, {"data": data, "classifier": classifier, "trainer": trainer, "tagging": tagging}


def _tested(settings: Settings, trainer: pl.Trainer, classifier: Classifier, data: ImageData) -> dict[str, float]:
    """Test accuracy. Several processes each see all images: dealt out, an odd one would be counted twice."""
    if not isinstance(trainer.strategy, DDPStrategy):
        return trainers.tested(trainer, classifier, data)
    found = trainers.tested(trainers.evaluator(settings), classifier, data)
    if trainer.logger is not None:
        values = {name.replace("_", "/", 1): value for name, value in found.items()}
        trainer.logger.log_metrics(values, trainer.global_step)
        trainer.logger.save()
    return found


def _tag_loss(settings: Settings, data: ImageData) -> TagLoss | None:
    """The terms of the loss, if any has a weight, for batches that are normalised as these are."""
    if not settings.tag_loss.terms:
        return None
    found = replace(settings.tag_loss, mean=data.mean, std=data.std)
    if found.frames_a_step > COSTLY * data.batch_size:
        rank_zero_only(log.warning)(
            "the tags of the loss add %.0f images to every step of %d on the average: tag_loss.every_n_steps=%d shows "
            "them less often, at %.0f %% of a step's time",
            found.frames_a_step, data.batch_size,
            math.ceil(found.frames_a_step * found.every_n_steps / (COSTLY * data.batch_size)), 100 * COSTLY,
        )  # fmt: skip
    return found


def _tagging(settings: Settings, data: ImageData) -> FrequencyTagging:
    n_images = settings.showing.epoch_images
    return FrequencyTagging(
        settings.stimulus,
        network="net",
        folder=settings.out,
        seed=settings.common.seed,
        n_images=n_images,
        every_n_epochs=settings.showing.every_n_epochs,
        images=None if data.validates else data.pixels("val", min(n_images, len(data.split("val")))),
        criterion=training_criterion(settings),
        **vars(settings.judgement),
        **vars(settings.readout),
    )
