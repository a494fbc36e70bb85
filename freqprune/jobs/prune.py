"""The job behind `prune.py` and ``freqprune prune``."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.jobs import assembly, trainers
from freqprune.jobs.announce import announce_pruning
from freqprune.jobs.config import check_pruning
from freqprune.jobs.finetuning import check_anew, check_finetuning, how_to_go_on
from freqprune.jobs.launch import in_all_processes
from freqprune.jobs.launched import named_by_launcher
from freqprune.jobs.outputs import explore_cut, name_of, plan_of, tell, write_response
from freqprune.jobs.resuming import check_same_cut, interrupted
from freqprune.jobs.settings import Settings, read
from freqprune.jobs.stages import Run
from freqprune.networks import Stored, check_export, device_of
from freqprune.processes import from_first, rank_and_size
from freqprune.pruning import Verdict, check_folder, judge, needs, plan_cut
from freqprune.reports import record
from freqprune.tagging import TagResponse, find_sites, in_sight, pick_layers, tag, unread_layers
from freqprune.training import ImageData

log = logging.getLogger(__name__)


def prune(
    cfg: DictConfig, dense: nn.Module | None = None, data: ImageData | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tag a network, remove filters, re-estimate batch norms, fine-tune and test; with ``pruning=none`` only tag and
    test.

    Args:
        cfg: composed from ``conf/prune.yaml``.
        dense: the network, if it is at hand; read from ``cfg.ckpt`` otherwise.
        data: the data module, if it is at hand.

    Returns:
        Metrics as in ``metrics.json`` (see the README) and the objects: ``response``, ``verdict``, ``kept``, ``net``.

    Raises:
        InputError: for a bad setting, before any work is done or lost.
    """
    check_pruning(cfg, at_hand=dense is not None)
    settings = read(cfg)
    if settings.common.resume is not None:
        check_same_cut(cfg, Path(settings.common.resume))
    assembly.quiet()
    assembly.prepare_output(settings.out)
    with in_all_processes(settings.trainer) as first:
        return _pruned(cfg, settings, first, dense, data)


def _pruned(
    cfg: DictConfig, settings: Settings, first: bool, dense: nn.Module | None, data: ImageData | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The job in each of its processes; the first one writes and speaks."""
    stored = _network_to_prune(settings) if dense is None else Stored(dense, {})
    net = stored.net
    pick_layers(net, settings.readout.layers)
    assembly.seed(settings.common)
    data = data or assembly.load_data(assembly.data_settings(settings))
    assembly.check_match(net, data, stored)
    settings.stimulus.masks(*data.split("val").pixels.shape[-2:])
    device = trainers.chosen_device(settings)
    net = net.to(device).to(memory_format=torch.channels_last).eval()
    run = Run(settings, data, device, first)
    if first and settings.readout.layers is None:
        _tell_of_unread(net, run.example)
    planned = None if settings.recipe is None else plan_cut(net, run.example, settings.recipe)
    if planned:
        check_finetuning(settings, data)
        from_first(check_export, net, run.example, settings.exports)
    if planned and settings.from_scratch:
        check_anew(net)
        assembly.check_sizes(net, data, run.example, settings.finetune_epochs)
    resumed = settings.common.resume
    # One reads: it writes into that folder as soon as it goes on.
    earlier = None if resumed is None else from_first(interrupted, Path(resumed), run.trained, settings.finetune_epochs)
    if earlier is None or earlier.folder.resolve() != settings.out.resolve():
        from_first(_spare_cut, settings)
    if settings.recipe is not None and earlier is None:
        check_folder(settings.recipe)
        assembly.warn_of_seen_images(settings.common.pretrained, data)
    # After a training it was said before that.
    if first and dense is None and earlier is None:
        announce_pruning(settings, net, data, run.example, planned, alone=rank_and_size()[1] == 1)
    if first:
        record.write(settings.out, cfg, [record.METRICS, *record.PAGES, *record.OF_A_TRAINING])
        if earlier is None:
            record.unfinish(settings.out)
    if earlier is not None:
        return run.go_on(net, earlier)
    run.metrics["network"] = name_of(net)
    run.measure("dense", net)
    response, verdict = _tagged(settings, net, data)
    run.metrics["tagged_images"] = response.n_images
    classes = _by_class(settings, net, data)
    if first:
        write_response(settings.out, response, verdict, data.pixels("val", 1)[0], classes)
    if settings.recipe is None:
        title = f"{name_of(net)}, tagged and not pruned"
        if first:
            explore_cut(settings, title, response, verdict, plan_of(net, run.example))
        run.latencies({"dense": net})
        run.finish()
        if first:
            tell(settings, run.metrics, title, verdict)
        return run.metrics, {"response": response, "verdict": verdict, "kept": {}, "net": net}
    small, kept = run.shrink(net, stored.kept, settings.recipe, response, verdict)
    small = run.recover(net, small)
    run.finish()
    run.tell(net, verdict)
    return run.metrics, {"response": response, "verdict": verdict, "kept": kept, "net": small}


def _tell_of_unread(net: nn.Module, example: Tensor) -> None:
    """Warn of a network most of whose layers are not looked at."""
    unread = unread_layers(net)
    # Where layers run over windows they cannot be.
    with suppress(InputError):
        if unread and find_sites(net, example, pick_layers(net, unread)):
            log.warning(
                "tags are read at convolutions only, and most layers of this network are linear: name those to look "
                "at, such as tagging.layers='%s'", unread,
            )  # fmt: skip


def _spare_cut(settings: Settings) -> None:
    """Refuse to cut anew where a second start of the same processes finds the cut of the first."""
    if settings.recipe is not None and record.holds_cut(settings.out) and named_by_launcher(settings.out):
        raise InputError(
            f"{settings.out} is called as its processes meet, and holds the cut of an earlier start: go on with "
            f"{how_to_go_on(settings)}, or choose another folder (hydra.run.dir=FOLDER)"
        )


def _network_to_prune(settings: Settings) -> Stored:
    common = settings.common
    return assembly.stored_network(assembly.model_settings(settings.model), common.ckpt, common.pretrained)


def _tagged(settings: Settings, net: nn.Module, data: ImageData) -> tuple[TagResponse, Verdict | None]:
    images = data.pixels("val", min(settings.showing.n_images, len(data.split("val"))))
    response = tag(
        net,
        images.to(device_of(net)),
        settings.stimulus,
        mean=data.mean,
        std=data.std,
        seed=settings.common.seed,
        progress=assembly.bars(),
        **asdict(settings.readout),
    )
    if settings.readout.noise_std == 0:
        if "tags" in needs(settings.scoring.criterion):
            log.warning("tagging.noise_std = 0: amplitudes only, no SNR and no important filters")
        return response, None
    how = settings.judgement
    return response, judge(response, how.components, how.important_by, how.alpha, how.threshold)


def _by_class(settings: Settings, net: nn.Module, data: ImageData) -> dict[str, TagResponse]:
    """Clean responses to the validation images of each class, if asked for."""
    if not settings.showing.per_class:
        return {}
    images = data.split("val")
    device = device_of(net)
    readout = asdict(settings.readout) | {"noise_std": 0.0}
    found = {}
    for number, name in in_sight(list(enumerate(data.classes)), "tagging by class", assembly.bars()):
        chosen = (images.labels == number).nonzero().flatten()[: settings.showing.n_images]
        if not len(chosen):
            continue
        pixels = (images.pixels[chosen].float() / 255).to(device)
        seed = settings.common.seed
        found[name] = tag(net, pixels, settings.stimulus, mean=data.mean, std=data.std, seed=seed, **readout)
    return found
