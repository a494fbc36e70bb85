"""The two jobs behind `train.py` and `prune.py`, as functions of a composed configuration."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from freqprune import figures_of_runs, report, runs
from freqprune.assembly import (
    accuracy_of,
    check_match,
    device_of,
    fit,
    load_data,
    make_trainer,
    metric,
    model_config,
    model_settings,
    normalization_of,
    prepare_output,
    quiet,
    tested,
    with_classes,
)
from freqprune.callbacks import FrequencyTagging
from freqprune.checkpoint import Stored, check_resumable, load_network, load_pruned, of_the_dense, save_pruned
from freqprune.config import plain, recipe_arguments, stimulus_arguments, validate
from freqprune.data import ImageData
from freqprune.drawing import save
from freqprune.errors import InputError
from freqprune.export import check_exports, export
from freqprune.importance import needs
from freqprune.module import Classifier, check_optimizer
from freqprune.outputs import figures_of_training, name_of, tell, write_response
from freqprune.page import write_page
from freqprune.pretrained import pretrained_path
from freqprune.profiling import cost, latency_ms
from freqprune.pruning import Material, Recipe, cut, plan_cut, step_amount
from freqprune.response import TagResponse
from freqprune.selection import Kept
from freqprune.sites import pick_layers
from freqprune.stimulus import Stimulus
from freqprune.surgery import recalibrate_batch_norm
from freqprune.tagging import rounds, tag
from freqprune.verdict import Verdict, judge

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train the configured network, tagging it as it goes, and test it at the end.

    Args:
        cfg: composed from ``conf/train.yaml`` or ``conf/prune.yaml``.

    Returns:
        Metrics (``val_accuracy`` and ``test_accuracy`` of the last epoch as fractions, ``epochs``, ``seconds``), which are also written to
        ``training.json``, and the objects: ``data``, ``classifier``, ``trainer``, ``tagging``.

    Raises:
        InputError: for a bad setting, before any work; for a loss that is not finite.
    """
    validate(cfg)
    check_optimizer("optimizer", **plain(cfg.optimizer))
    check_optimizer("finetune", **plain(cfg.finetune))
    quiet()
    out = prepare_output(cfg)
    rank_zero_only(runs.record)(out, cfg)
    if cfg.ckpt is not None:
        raise InputError(f"ckpt = {cfg.ckpt} is the network that prune.py prunes; to resume training use ckpt_path={cfg.ckpt}")
    if cfg.pretrained:
        raise InputError("pretrained=true names a network that is trained already, for prune.py; leave it out to train")
    if cfg.resume is not None:
        trained = Path(cfg.resume) / "checkpoints" / "last.ckpt"
        raise InputError(f"resume = {cfg.resume} goes on with pruning and needs the dense network: use prune.py with ckpt={trained} as well")
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    config = model_config(cfg)
    data = load_data(cfg)
    config = with_classes(config, data)
    if cfg.ckpt_path is not None:
        check_resumable(cfg.ckpt_path, config)
    stimulus = Stimulus(**stimulus_arguments(cfg))
    stimulus.masks(*data.split("val").pixels.shape[-2:])
    classifier = Classifier(config, **plain(cfg.optimizer), num_classes=len(data.classes), normalization=normalization_of(data))
    if cfg.pruning.enabled:
        plan_cut(classifier.net, data.normalize(data.pixels("val", 1)), Recipe(**recipe_arguments(cfg)))
    tagging = FrequencyTagging(
        stimulus,
        network="net",
        folder=out,
        seed=cfg.seed,
        n_images=cfg.tagging.epoch_images,
        **{name: plain(cfg.tagging)[name] for name in ("every_n_epochs", "layers", "where", "noise_std", "average", "spatial", "half")},
        components=plain(cfg.importance)["components"],
        # Scores that need more than tags are for pruning; over training the SNR stands for them.
        criterion=cfg.importance.criterion if needs(cfg.importance.criterion) <= {"tags", "noise"} else "snr",
        **{name: cfg.importance[name] for name in ("important_by", "alpha", "threshold")},
    )
    pick_layers(classifier.net, plain(cfg.tagging)["layers"])
    trainer = make_trainer(cfg, out, [tagging])
    if trainer.world_size > 1 and cfg.pruning.enabled:
        raise InputError(f"{trainer.world_size} processes train, one prunes: use train.py pruning=none, then prune.py ckpt=... on one device")
    if cfg.compile:
        classifier.net.compile()
    start = time.perf_counter()
    last = out / "checkpoints" / "last.ckpt"
    fit(trainer, classifier, data, cfg.ckpt_path, f"interrupted; to go on, if an epoch was complete: ckpt_path={last}")
    seconds = time.perf_counter() - start
    metrics = {
        "val_accuracy": metric(trainer, "val/accuracy"),
        "test_accuracy": tested(trainer, classifier, data),
        "epochs": trainer.current_epoch,
        "seconds": round(seconds, 2),
    }
    if trainer.is_global_zero:
        runs.write_json(out / runs.TRAINING, metrics)
        figures_of_training(tagging, out)
        write_page(out)
        total = sum(int(flags.sum()) for flags in tagging.latest.get("important", {}).values())
        report.show(
            f"trained {config['name']} for {metrics['epochs']} epochs in {seconds:.0f} s: validation {100 * metrics['val_accuracy']:.2f} %, "
            f"test {100 * metrics['test_accuracy']:.2f} %" + (f"; {total} important filters" if tagging.latest else "") + f"; everything in {out}"
        )
    return metrics, {"data": data, "classifier": classifier, "trainer": trainer, "tagging": tagging}


def prune(cfg: DictConfig, dense: nn.Module | None = None, data: ImageData | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tag a network, remove filters, re-estimate batch norms, fine-tune and test; with ``pruning=none`` only tag and test.

    Args:
        cfg: composed from ``conf/prune.yaml``.
        dense: the network, if it is at hand; read from ``cfg.ckpt`` otherwise.
        data: the data module, if it is at hand.

    Returns:
        Metrics as in ``metrics.json`` (see the README) and the objects: ``response``, ``verdict``, ``kept``, ``net``.

    Raises:
        InputError: for a bad setting, before any work is done or lost.
    """
    validate(cfg)
    check_optimizer("optimizer", **plain(cfg.optimizer))
    check_optimizer("finetune", **plain(cfg.finetune))
    check_exports(**plain(cfg.export))
    quiet()
    out = prepare_output(cfg)
    runs.record(out, cfg)
    stimulus = Stimulus(**stimulus_arguments(cfg))
    stored = _network_to_prune(cfg, dense)
    net = stored.net
    pick_layers(net, plain(cfg.tagging)["layers"])
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    data = data or load_data(cfg)
    check_match(net, data, stored.normalization)
    stimulus.masks(*data.split("val").pixels.shape[-2:])
    device = device_of(cfg)
    net = net.to(device).to(memory_format=torch.channels_last).eval()
    run = _Run(cfg, out, data, stimulus, device)
    recipe = Recipe(**recipe_arguments(cfg)) if cfg.pruning.enabled else None
    if recipe is not None:
        plan_cut(net, run.example, recipe)
    if cfg.resume is not None:
        return run.go_on(net, Path(cfg.resume))
    run.metrics["network"] = name_of(net)
    run.measure("dense", net)
    response, verdict = _tagged(cfg, net, data, stimulus)
    write_response(out, response, verdict, data.pixels("val", 1)[0], _by_class(cfg, net, data, stimulus))
    if recipe is None:
        run.latencies({"dense": net})
        run.finish()
        tell(cfg, run.metrics, out, f"{name_of(net)}, tagged and not pruned", verdict, device.type)
        return run.metrics, {"response": response, "verdict": verdict, "kept": {}, "net": net}
    small, kept = run.shrink(net, stored.kept, recipe, response)
    small = run.recover(net, small)
    run.finish()
    run.tell(net, verdict)
    return run.metrics, {"response": response, "verdict": verdict, "kept": kept, "net": small}


def _network_to_prune(cfg: DictConfig, dense: nn.Module | None) -> Stored:
    if dense is not None:
        return Stored(dense, {})
    if cfg.pretrained and cfg.ckpt is not None:
        raise InputError(f"pretrained=true names the package's own network and ckpt = {cfg.ckpt} another; leave one of them out")
    ckpt = pretrained_path("resnet32") if cfg.pretrained else cfg.ckpt
    if ckpt is None:
        raise InputError("ckpt is not set: give the network to prune, ckpt=FILE, or pretrained=true for the package's ResNet-32")
    if cfg.ckpt_path is not None:
        raise InputError("ckpt_path resumes training and has no part in pruning a checkpoint; leave it out, or leave ckpt out to train first")
    config = model_settings(cfg)
    return load_network(ckpt, None if config["name"] is None else config)


class _Run:
    """A pruning run: its settings, data, and the metrics gathered so far."""

    def __init__(self, cfg: DictConfig, out: Path, data: ImageData, stimulus: Stimulus, device: torch.device) -> None:
        self.cfg, self.out, self.data, self.stimulus, self.device = cfg, out, data, stimulus, device
        self.example = data.normalize(data.pixels("val", 1)).to(device)
        self.metrics: dict[str, Any] = {}
        self.kept: dict[str, list[int]] = {}

    def measure(self, stage: str, net: nn.Module) -> None:
        """Cost and test accuracy of a stage."""
        self.metrics[stage] = {**cost(net, self._batch(max(self.cfg.latency.batch_sizes))), "test_accuracy": accuracy_of(self.cfg, net, self.data)}

    def latencies(self, nets: dict[str, nn.Module]) -> None:
        """Time the networks in turn, at every batch size."""
        for stage in nets:
            self.metrics[stage]["latency_ms"] = {}
        for size in self.cfg.latency.batch_sizes:
            found = latency_ms({stage: net.to(self.device) for stage, net in nets.items()}, self._batch(size), self.cfg.latency.n_runs)
            for stage, value in found.items():
                self.metrics[stage]["latency_ms"][str(size)] = round(value, 4)

    def _batch(self, size: int) -> Tensor:
        pixels = self.data.pixels("val", min(size, len(self.data.split("val"))))
        return self.data.normalize(pixels.repeat(-(-size // len(pixels)), 1, 1, 1)[:size]).to(self.device)

    def write(self, net: nn.Module | None = None) -> None:
        """Keep the network and the metrics as they are now."""
        if net is not None:
            save_pruned(self.out / "pruned.ckpt", net, self.kept, normalization_of(self.data))
        runs.write_json(self.out / runs.METRICS, self.metrics)

    def finish(self) -> None:
        """Mark the run as complete and write its report."""
        self.metrics["finished"] = True
        self.write()
        if "pruned" in self.metrics:
            point = {name: (value, math.nan) for name, value in report.percentages(self.metrics).items()}
            whole = {name: point["dense"] for name in point if name in report.STAGES} | {"cut": (0.0, math.nan)}
            save(figures_of_runs.accuracy_over_cut({self.cfg.importance.criterion: [whole, point]}), self.out / "figures" / "accuracy_over_cut.png")
        write_page(self.out)

    def shrink(self, net: nn.Module, earlier: dict[str, list[int]], recipe: Recipe, response: TagResponse) -> tuple[nn.Module, Kept]:
        """Cut in as many steps as asked for, each after tagging anew; returns the smaller network and its filters counted in `net`."""
        n_steps = self.cfg.pruning.steps
        plan, chosen = plan_cut(net, self.example, recipe)
        widths = {name: plan.unit(name).n_filters for name in chosen}
        whole = plan.macs({})
        small, ours, notes = net, {name: torch.arange(width) for name, width in widths.items()}, []
        for step in range(n_steps):
            counts = {name: len(indices) for name, indices in ours.items()}
            left = sum(counts.values()) / sum(widths.values()) if recipe.amount.ratio is not None else plan.macs(counts) / whole
            amount = step_amount(recipe.amount, step, n_steps, left)
            now = Recipe(**{**vars(recipe), "amount": amount})
            done = cut(small, self._material(), now, self.stimulus, response if step == 0 else None, rounds)
            small = done.net.to(memory_format=torch.channels_last)
            ours = {name: indices[done.kept[name]] if name in done.kept else indices for name, indices in ours.items()}
            notes = done.remarks
            if step + 1 < n_steps:
                self._recalibrate(small)
                if self.cfg.pruning.step_epochs:
                    small = self._finetune(small, net, self.cfg.pruning.step_epochs, f"step{step + 1}")
        self.measure("pruned", small)
        self.latencies({"dense": net, "pruned": small})
        self.metrics["kept"], self.metrics["widths"] = report.kept_counts(ours), widths
        title = f"Filters kept by {self.cfg.importance.criterion}"
        save(figures_of_runs.kept_per_layer(self.metrics["kept"], widths, title), self.out / "figures" / "kept_per_layer.png")
        self.metrics["remarks"] = notes
        self.kept = of_the_dense(ours, earlier)
        self.write(small)
        return small, ours

    def recover(self, net: nn.Module, small: nn.Module, ckpt_path: Path | None = None) -> nn.Module:
        """Re-estimate batch norms, fine-tune (from a checkpoint on, if given), export; what an interrupted run had done is not done again."""
        if "recalibrated" not in self.metrics and self._recalibrate(small):
            self.metrics["recalibrated"] = {"test_accuracy": accuracy_of(self.cfg, small, self.data)}
            self.write(small)
        if self.cfg.finetune.epochs:
            small = self._finetune(small, net, self.cfg.finetune.epochs, "finetune", ckpt_path)
            self.metrics["finetuned"] = {"test_accuracy": accuracy_of(self.cfg, small, self.data)}
            self.write(small)
        exported = export(small, self.example, self.out, **plain(self.cfg.export))
        if exported:
            self.metrics["exports"] = exported
            self.write()
        return small

    def go_on(self, net: nn.Module, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Go on with the fine-tuning of an interrupted run, as the unbroken run would have."""
        pruned, metrics = folder / "pruned.ckpt", folder / "metrics.json"
        if not pruned.is_file() or not metrics.is_file():
            raise InputError(f"resume = {folder} holds no pruned.ckpt and metrics.json: that run was interrupted before it had pruned; start it again")
        self.metrics = runs.read_json(metrics)
        small = load_pruned(pruned).to(self.device).to(memory_format=torch.channels_last)
        self.kept = load_network(pruned).kept
        last = folder / "finetune" / "checkpoints" / "last.ckpt"
        if "finetuned" in self.metrics:
            report.show(f"{folder} is complete; its fine-tuning is not repeated")
        else:
            small = self.recover(net, small, last if last.is_file() else None)
        self.finish()
        self.tell(net, None)
        return self.metrics, {"response": None, "verdict": None, "kept": {k: torch.tensor(v) for k, v in self.kept.items()}, "net": small}

    def tell(self, net: nn.Module, verdict: Verdict | None) -> None:
        share = report.percentages(self.metrics)["cut"]
        title = f"{name_of(net)}, filters kept by {self.cfg.importance.criterion}, {share:.1f} % of the MACs cut, seed {self.cfg.seed}"
        tell(self.cfg, self.metrics, self.out, title, verdict, self.device.type)

    def _material(self) -> Material:
        settings, train = self.cfg.pruning, self.data.split("train")
        n_labelled = min(self.cfg.importance.labelled_images, len(train))
        before = settings.bn_when == "before" and settings.bn_images
        return Material(
            images=self.data.pixels("val", min(self.cfg.tagging.n_images, len(self.data.split("val")))),
            normalize=self.data.normalize,
            mean=self.data.mean,
            std=self.data.std,
            calibration=self.data.pixels("train", min(settings.calibration_images, len(train))),
            bn_images=self.data.pixels("train", min(settings.bn_images, len(train))) if before else None,
            labelled=(self.data.pixels("train", n_labelled), train.labels[:n_labelled]),
        )

    def _recalibrate(self, net: nn.Module) -> bool:
        if not self.cfg.pruning.bn_images or self.cfg.pruning.bn_when == "before":
            return False
        images = self.data.split("train")
        count = min(self.cfg.pruning.bn_images, len(images))
        batches = [self.data.normalize(chunk) for chunk in images.pixels[:count].split(self.data.batch_size) if len(chunk) > 1]
        recalibrate_batch_norm(net, batches, self.device)
        return True

    def _finetune(self, small: nn.Module, teacher: nn.Module, epochs: int, name: str, ckpt_path: Path | None = None) -> nn.Module:
        settings = plain(self.cfg.finetune)
        settings.pop("epochs")
        # The same order of images whether or not something was drawn before, as after a resume.
        pl.seed_everything(self.cfg.seed, workers=True, verbose=False)
        config = getattr(small, "config", None) if hasattr(type(small), "config") else None
        classifier = Classifier(
            dict(config) if config else small, **settings, num_classes=len(self.data.classes), normalization=normalization_of(self.data), teacher=teacher
        )
        classifier.net.load_state_dict(small.state_dict())
        trainer = make_trainer(self.cfg, self.out / name, [], epochs)
        dense = "" if self.cfg.ckpt is not None or self.cfg.pretrained else f" ckpt={self.out / 'checkpoints' / 'last.ckpt'}"
        resumable = f"; to go on: prune.py with the same settings and resume={self.out}{dense}" if name == "finetune" else ""
        fit(trainer, classifier, self.data, None if ckpt_path is None else str(ckpt_path), f"interrupted while fine-tuning{resumable}")
        return classifier.net.eval()


def _tagged(cfg: DictConfig, net: nn.Module, data: ImageData, stimulus: Stimulus) -> tuple[TagResponse, Verdict | None]:
    settings = plain(cfg.tagging)
    images = data.pixels("val", min(settings["n_images"], len(data.split("val"))))
    response = tag(
        net,
        images.to(next(net.parameters()).device),
        stimulus,
        **{name: settings[name] for name in ("layers", "where", "noise_std", "average", "spatial", "half")},
        mean=data.mean,
        std=data.std,
        seed=cfg.seed,
        progress=rounds,
    )
    if settings["noise_std"] == 0:
        if "tags" in needs(cfg.importance.criterion):
            log.warning("tagging.noise_std = 0: amplitudes only, no SNR and no important filters")
        return response, None
    judgement = {key: value for key, value in plain(cfg.importance).items() if key in ("alpha", "threshold", "components")}
    return response, judge(response, by=cfg.importance.important_by, **judgement)


def _by_class(cfg: DictConfig, net: nn.Module, data: ImageData, stimulus: Stimulus) -> dict[str, TagResponse]:
    """Clean responses to the validation images of each class, if asked for."""
    if not cfg.tagging.per_class:
        return {}
    settings = plain(cfg.tagging)
    images = data.split("val")
    device = next(net.parameters()).device
    found = {}
    for number, name in enumerate(data.classes):
        chosen = images.pixels[images.labels == number][: settings["n_images"]].float() / 255
        arguments = {key: settings[key] for key in ("layers", "where", "average", "spatial", "half")}
        found[name] = tag(net, chosen.to(device), stimulus, **arguments, noise_std=0.0, mean=data.mean, std=data.std, seed=cfg.seed)
    return found
