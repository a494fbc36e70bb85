"""The two jobs behind `train.py` and `prune.py`, as functions of a composed configuration."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from freqprune import figures, report
from freqprune.assembly import (
    accuracy_of,
    check_match,
    device_of,
    fit,
    load_data,
    make_trainer,
    metric,
    model_config,
    normalization_of,
    prepare_output,
    quiet,
    tested,
    with_classes,
)
from freqprune.callbacks import FrequencyTagging
from freqprune.checkpoint import check_resumable, load_network, of_the_dense, save_pruned
from freqprune.config import amount_arguments, plain, stimulus_arguments, validate
from freqprune.data import ImageData
from freqprune.errors import InputError
from freqprune.importance import Evidence, Verdict, judge, needs_noise, needs_tags, scores
from freqprune.module import Classifier, check_optimizer
from freqprune.profiling import count_macs, count_parameters, latency_ms
from freqprune.response import TagResponse
from freqprune.selection import Amount, select
from freqprune.sites import pick_layers
from freqprune.stimulus import Stimulus
from freqprune.surgery import Plan, recalibrate_batch_norm
from freqprune.tagging import rounds, tag

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
    if cfg.ckpt is not None:
        raise InputError(f"ckpt = {cfg.ckpt} is the network that prune.py prunes; to resume training use ckpt_path={cfg.ckpt}")
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
        _planned(cfg, classifier.net, data.normalize(data.pixels("val", 1)))
    tagging = FrequencyTagging(
        stimulus,
        network="net",
        folder=out,
        seed=cfg.seed,
        **{name: plain(cfg.tagging)[name] for name in ("n_images", "every_n_epochs", "layers", "where", "noise_std", "average", "spatial", "half")},
        **plain(cfg.importance),
    )
    pick_layers(classifier.net, plain(cfg.tagging)["layers"])
    trainer = make_trainer(cfg, out, [tagging])
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
        report.write_metrics(out / "training.json", metrics)
        _figures_of_training(tagging, out)
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
    quiet()
    out = prepare_output(cfg)
    stimulus = Stimulus(**stimulus_arguments(cfg))
    earlier: dict[str, list[int]] = {}
    if dense is None:
        if cfg.ckpt is None:
            raise InputError("ckpt is not set: give the network to prune, ckpt=FILE")
        if cfg.ckpt_path is not None:
            raise InputError("ckpt_path resumes training and has no part in pruning a checkpoint; leave it out, or leave ckpt out to train first")
        config = plain(cfg.model)
        stored = load_network(cfg.ckpt, None if config["name"] is None else config)
        net, normalization, earlier = stored.net, stored.normalization, stored.kept
    else:
        net, normalization = dense, {}
    pick_layers(net, plain(cfg.tagging)["layers"])
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    data = data or load_data(cfg)
    check_match(net, data, normalization)
    stimulus.masks(*data.split("val").pixels.shape[-2:])
    device = device_of(cfg)
    net = net.to(device).to(memory_format=torch.channels_last).eval()
    example = data.normalize(data.pixels("val", 1)).to(device)
    plan, layers = _planned(cfg, net, example) if cfg.pruning.enabled else (None, [])

    metrics: dict[str, Any] = {"dense": _cost(net, example)}
    metrics["dense"]["test_accuracy"] = accuracy_of(cfg, net, data)
    response, verdict = _tagged(cfg, net, data, stimulus)
    _write_response(out, response, verdict, data.pixels("val", 1)[0], _by_class(cfg, net, data, stimulus))
    if plan is None:
        metrics["dense"]["latency_ms"] = _latency(cfg, data, {"dense": net}, device)["dense"]
        report.write_metrics(out / "metrics.json", metrics)
        _tell(cfg, metrics, out, f"{_name(net)}, tagged and not pruned", verdict)
        return metrics, {"response": response, "verdict": verdict, "kept": {}, "net": net}

    evidence = Evidence(net, response, plain(cfg.importance)["components"], cfg.seed)
    kept = select(scores(cfg.importance.criterion, evidence, layers), Amount(**amount_arguments(cfg)), plan.macs)
    small = plan.apply(kept).to(memory_format=torch.channels_last)
    latencies = _latency(cfg, data, {"dense": net, "pruned": small}, device)
    metrics["dense"]["latency_ms"] = latencies["dense"]
    metrics["pruned"] = {**_cost(small, example), "latency_ms": latencies["pruned"], "test_accuracy": accuracy_of(cfg, small, data)}
    metrics["kept"] = report.kept_counts(kept)

    def keep_result() -> None:
        save_pruned(out / "pruned.ckpt", small, of_the_dense(kept, earlier), normalization_of(data))
        report.write_metrics(out / "metrics.json", metrics)

    keep_result()
    if cfg.pruning.bn_images:
        recalibrate_batch_norm(small, _recalibration_batches(cfg, data), device)
        metrics["recalibrated"] = {"test_accuracy": accuracy_of(cfg, small, data)}
        keep_result()
    if cfg.finetune.epochs:
        small = _finetune(cfg, small, data, out)
        metrics["finetuned"] = {"test_accuracy": accuracy_of(cfg, small, data)}
        keep_result()
    cut = 1 - metrics["pruned"]["macs"] / metrics["dense"]["macs"]
    _tell(cfg, metrics, out, f"{_name(net)}, filters kept by {cfg.importance.criterion}, {100 * cut:.1f} % of the MACs cut, seed {cfg.seed}", verdict)
    return metrics, {"response": response, "verdict": verdict, "kept": kept, "net": small}


def _planned(cfg: DictConfig, net: nn.Module, example: Tensor) -> tuple[Plan, list[str]]:
    """What may be removed, after checking that the tags will tell what the criterion asks for."""
    plan = Plan(net, example)
    layers = plan.choose(plain(cfg.pruning)["layers"], plain(cfg.pruning)["exclude"])
    if needs_tags(cfg.importance.criterion):
        recorded = pick_layers(net, plain(cfg.tagging)["layers"])
        unread = [layer for layer in layers if layer not in recorded]
        if unread:
            raise InputError(f"importance.criterion = {cfg.importance.criterion} needs the response of {', '.join(unread)}, which tagging.layers leaves out")
        if cfg.tagging.noise_std == 0 and needs_noise(cfg.importance.criterion):
            raise InputError(
                f"importance.criterion = {cfg.importance.criterion} compares with noise, but tagging.noise_std = 0; use the default 0.02, or "
                "importance=amplitude"
            )
    return plan, layers


def _cost(net: nn.Module, example: Tensor) -> dict[str, Any]:
    return {"macs": count_macs(net, example), "params": count_parameters(net)}


def _latency(cfg: DictConfig, data: ImageData, nets: dict[str, nn.Module], device: torch.device) -> dict[str, float]:
    size = min(cfg.latency.batch_size, len(data.split("val")))
    batch = data.normalize(data.pixels("val", size)).to(device)
    return {name: round(value, 4) for name, value in latency_ms({k: n.to(device) for k, n in nets.items()}, batch, cfg.latency.n_runs).items()}


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
        if needs_tags(cfg.importance.criterion):
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


def _write_response(out: Path, response: TagResponse, verdict: Verdict | None, image: Tensor, classes: Mapping[str, TagResponse]) -> None:
    report.write_filters(out / "filters.csv", response, verdict)
    report.write_layers(out / "layers.csv", {"all": response, **classes})
    folder, names = out / "figures", list(response.layers)
    figures.save(figures.stimulus_figure(response.stimulus, image), folder / "stimulus.png")
    figures.save(figures.part_preference_over_depth(response, classes), folder / "part_preference.png")
    figures.save(figures.integration_over_depth(response, classes), folder / "integration.png")
    if verdict is None:
        return
    # A filter whose SNR is high but leaves its noise bins visible.
    layer = names[min(10, len(names)) - 1]
    number = int((response.snr(layer, ["f1"])[:, 0].nan_to_num(0) - 8).abs().argmin())
    figures.save(figures.snr_bins(response, layer, number), folder / "snr_bins.png")
    for number in sorted({1, min(10, len(names))}):
        figures.save(figures.snr_spectra(response, names[number - 1]), folder / f"spectra_layer{number}.png")
    title = f"Important filters, {response.n_images} images, pixel noise sd {response.noise_std:g}"
    figures.save(figures.important_per_layer(verdict.important, title), folder / "important_filters.png")


def _figures_of_training(tagging: FrequencyTagging, out: Path) -> None:
    if tagging.latest:
        noise = f"pixel noise sd {tagging.latest['noise_std']:g}"
        title = f"Important filters after epoch {tagging.latest['epoch'] + 1}, {noise}"
        figures.save(figures.important_per_layer(tagging.latest["important"], title), out / "figures" / "important_last_epoch.png")
        shares = report.important_shares(out / "importance.csv")
        figures.save(figures.important_over_epochs(shares, f"Important filters over training, {noise}"), out / "figures" / "important_over_epochs.png")


def _recalibration_batches(cfg: DictConfig, data: ImageData) -> list[Tensor]:
    images = data.split("train")
    count = min(cfg.pruning.bn_images, len(images))
    return [data.normalize(chunk) for chunk in images.pixels[:count].split(data.batch_size) if len(chunk) > 1]


def _finetune(cfg: DictConfig, small: nn.Module, data: ImageData, out: Path) -> nn.Module:
    settings = plain(cfg.finetune)
    epochs = settings.pop("epochs")
    config = getattr(small, "config", None)
    classifier = Classifier(dict(config) if config else small, **settings, num_classes=len(data.classes), normalization=normalization_of(data))
    classifier.net.load_state_dict(small.state_dict())
    trainer = make_trainer(cfg, out / "finetune", [], epochs)
    fit(trainer, classifier, data, None, f"interrupted while fine-tuning; {out / 'pruned.ckpt'} holds the network from before it")
    return classifier.net.eval()


def _name(net: nn.Module) -> str:
    return str(getattr(net, "config", {}).get("name", type(net).__name__))


def _tell(cfg: DictConfig, metrics: Mapping[str, Any], out: Path, title: str, verdict: Verdict | None) -> None:
    device, threads = device_of(cfg).type, torch.get_num_threads()
    heading = f"latency, ms (batch {cfg.latency.batch_size}, {device}{f', {threads} threads' if device == 'cpu' else ''})"
    report.show(report.stage_table(metrics, title, heading))
    if verdict is not None:
        counts = verdict.counts
        everything = sum(len(flags) for flags in verdict.important.values())
        report.show(
            f"{sum(counts.values())} of {everything} recorded filters answer the tags ({cfg.importance.important_by}), pixel noise sd {cfg.tagging.noise_std:g}"
        )
    report.show(f"everything in {out}")
