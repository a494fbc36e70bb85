"""What a run leaves behind: tables, figures and a summary on the terminal."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.jobs.advice import advise
from freqprune.jobs.assembly import settings_of_weights
from freqprune.jobs.settings import Settings
from freqprune.networks import config_of
from freqprune.pruning import OF_TAGS, Amount, Kept, Plan, Verdict, needs
from freqprune.reports import (
    filters_of,
    filters_over_epochs,
    important_shares,
    rank_agreement,
    response_figures,
    run_figures,
    save,
    show,
    show_folder,
    stage_table,
    tables,
    trial_of,
    with_cut,
    write_explorer,
)
from freqprune.tagging import TagResponse
from freqprune.training import FrequencyTagging

log = logging.getLogger(__name__)


def write_response(
    out: Path, response: TagResponse, verdict: Verdict | None, image: Tensor, classes: Mapping[str, TagResponse]
) -> None:
    tables.write_filters(out / "filters.csv", response, verdict)
    # A class may be called so, too.
    of_classes = {"class all" if name == "all" else name: one for name, one in classes.items()}
    tables.write_layers(out / "layers.csv", {"all": response, **of_classes})
    folder, names = out / "figures", list(response.layers)
    save(response_figures.stimulus_figure(response.stimulus, image), folder / "stimulus.png")
    save(response_figures.part_preference_over_depth(response, classes), folder / "part_preference.png")
    save(response_figures.integration_over_depth(response, classes), folder / "integration.png")
    if verdict is None:
        return
    # A filter whose SNR is high but leaves its noise bins visible.
    layer = names[min(10, len(names)) - 1]
    number = int((response.snr(layer, ["f1"])[:, 0].nan_to_num(0) - 8).abs().argmin())
    save(response_figures.snr_bins(response, layer, number), folder / "snr_bins.png")
    for number in sorted({1, min(10, len(names))}):
        save(response_figures.snr_spectra(response, names[number - 1]), folder / f"spectra_layer{number}.png")
    title = f"Important filters, {response.n_images} images, pixel noise sd {response.noise_std:g}"
    save(response_figures.important_per_layer(verdict.important, title), folder / "important_filters.png")


def plan_of(net: nn.Module, example: Tensor) -> Plan | None:
    """What a cut may remove; None for a network that can only be looked at."""
    try:
        return Plan(net, example)
    except InputError as error:
        log.warning("explore.html tries no cuts: %s", error)
        return None


def explore_training(
    settings: Settings, tagging: FrequencyTagging, title: str, net: nn.Module, example: Tensor
) -> None:
    """Write ``explore.html`` of the tagged epochs, if there are any, with what a cut by the scores of the last would
    keep."""
    path = settings.out / "importance.csv"
    if tagging.latest and path.is_file():
        # A training that went on to no tagged epoch may be given another now.
        criterion = tagging.latest.get("criterion", tagging.criterion)
        epochs = filters_over_epochs(path, tagging.stimulus, criterion)
        if not epochs:
            # Tagged otherwise before the training went on here, and not since.
            return
        plan, found = plan_of(net, example), tagging.latest["score"]
        units = [] if plan is None else [plan.unit(name) for name in plan.layers]
        # As a cut scores them: by the layer of a unit that answers most.
        known = {
            unit.name: torch.stack([unit.by_filter(found[member]) for member in unit.members]).amax(0)
            for unit in units
            if {*unit.members} <= {*found}
        }
        trial = None if plan is None or not known else trial_of(plan, None, criterion, known)
        images = f"{tagging.latest['n_images']} images, pixel noise sd {tagging.latest['noise_std']:g}."
        note = f"{images} Spectra over training hold the components only; after prune.py they hold every frequency."
        write_explorer(settings.out, title, epochs, tagging.stimulus, trial, [note])


def explore_cut(
    settings: Settings,
    title: str,
    response: TagResponse,
    verdict: Verdict | None,
    plan: Plan | None,
    scores: Mapping[str, Tensor] | None = None,
    kept: Kept | None = None,
    dropped: Collection[str] = (),
) -> None:
    """Write ``explore.html`` of the dense network: with the cut, if there was one, after the epochs of its training, if
    it was trained here."""
    filters = filters_of(response, verdict, "dense network")
    notes = [f"{response.n_images} images, pixel noise sd {response.noise_std:g}."]
    trial = None
    recipe, criterion = settings.recipe, settings.scoring.criterion
    if plan is not None:
        try:
            amount = None if recipe is None else recipe.amount
            if amount is not None and kept is not None:
                amount = _by_macs(amount, plan, kept, dropped)
            components = settings.judgement.components
            trial = trial_of(plan, response, None if scores is None else criterion, scores, amount, components)
            if components != "fundamentals":
                words = components if isinstance(components, str) else ", ".join(components)
                notes.append(f"Criteria that can be tried read {words}; the column SNR is the mean over fundamentals.")
        except InputError as error:
            notes.append(f"No cut can be tried here: {error}.")
        if scores is not None and kept is not None:
            filters = with_cut(filters, plan, criterion, scores, kept, dropped)
    if settings.course.steps > 1 and kept is not None:
        notes.append(f"Scores are those before the first of {settings.course.steps} steps; kept is what all left.")
    path, earlier = settings.out / "importance.csv", []
    if path.is_file():
        earlier = filters_over_epochs(path, response.stimulus, training_criterion(settings), beside=response)
    # One page has one kind of spectra.
    alike = [one for one in earlier if ("snr" in one.columns) == ("snr" in filters.columns)]
    same = [one for one in alike if dict(one.widths) == dict(filters.widths)]
    write_explorer(settings.out, title, [*same, filters], response.stimulus, trial, notes)


def _by_macs(amount: Amount, plan: Plan, kept: Kept, dropped: Collection[str]) -> Amount:
    """The amount that a trial begins with: of a cut by a ratio or by time, the share of the MACs that it removed."""
    if amount.macs_cut is not None or amount.threshold is not None:
        return amount
    left = {name: len(indices) for name, indices in kept.items()} | {name: 0 for name in dropped if name in plan.blocks}
    share = 1 - plan.macs(left) / plan.macs({})
    scope = "per_mac" if amount.scope == "per_ms" else amount.scope
    if not 0 < share < 1:
        return amount
    multiple = 1 if amount.multiple_of == "auto" else amount.multiple_of
    return Amount(
        macs_cut=share, scope=scope, normalize=amount.normalize, min_filters=amount.min_filters, multiple_of=multiple
    )


def training_criterion(settings: Settings) -> str:
    """What ranks filters over training: scores that need more than tags are for pruning, the SNR stands for them."""
    criterion = settings.scoring.criterion
    return criterion if needs(criterion) <= OF_TAGS else "snr"


def figures_of_training(tagging: FrequencyTagging, out: Path) -> None:
    if (out / "metrics.csv").is_file():
        save(
            run_figures.training_curves(tables.training_history(out / "metrics.csv")),
            out / "figures" / "training_curves.png",
        )
    if tagging.latest:
        noise = f"pixel noise sd {tagging.latest['noise_std']:g}"
        title = f"Important filters after epoch {tagging.latest['epoch'] + 1}, {noise}"
        save(
            response_figures.important_per_layer(tagging.latest["important"], title),
            out / "figures" / "important_last_epoch.png",
        )
        if not (out / "importance.csv").is_file():
            # Tagged before the training went on in another folder, and not since.
            return
        shares = important_shares(out / "importance.csv")
        save(
            run_figures.important_over_epochs(shares, f"Important filters over training, {noise}"),
            out / "figures" / "important_over_epochs.png",
        )
        if len(shares) > 1:
            agreement = rank_agreement(out / "importance.csv")
            save(
                run_figures.agreement_over_epochs(agreement, f"Ranking of the filters over training, {noise}"),
                out / "figures" / "ranking_over_epochs.png",
            )


def name_of(net: nn.Module) -> str:
    return str(config_of(net).get("name", type(net).__name__))


def tell(settings: Settings, metrics: Mapping[str, Any], title: str, verdict: Verdict | None) -> None:
    """Print the table of stages, the important filters, the remarks and where everything lies."""
    show(stage_table(metrics, title))
    n_runs = metrics.get("timed_runs", settings.latency.n_runs)
    show(
        f"latency: median of {n_runs} forwards on {tables.timed_on(metrics)}, networks in turn; MACs "
        "of convolutions and linear layers for one image"
    )
    if verdict is not None:
        important, everything = sum(verdict.counts.values()), sum(len(flags) for flags in verdict.important.values())
        show(
            f"{important} of {everything} filters that were read are important (by "
            f"{settings.judgement.important_by}), pixel noise sd "
            f"{settings.readout.noise_std:g}"
        )
    for remark in metrics.get("remarks", []):
        show(f"note: {remark}")
    show_folder(settings.out)
    advise("look" if settings.recipe is None else "prune", settings.out, settings_of_weights(settings))
