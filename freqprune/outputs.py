"""What a run leaves behind: tables, figures and a summary on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from freqprune import figures, figures_of_runs, report
from freqprune.callbacks import FrequencyTagging
from freqprune.drawing import save
from freqprune.response import TagResponse
from freqprune.verdict import Verdict


def write_response(out: Path, response: TagResponse, verdict: Verdict | None, image: Tensor, classes: Mapping[str, TagResponse]) -> None:
    report.write_filters(out / "filters.csv", response, verdict)
    report.write_layers(out / "layers.csv", {"all": response, **classes})
    folder, names = out / "figures", list(response.layers)
    save(figures.stimulus_figure(response.stimulus, image), folder / "stimulus.png")
    save(figures.part_preference_over_depth(response, classes), folder / "part_preference.png")
    save(figures.integration_over_depth(response, classes), folder / "integration.png")
    if verdict is None:
        return
    # A filter whose SNR is high but leaves its noise bins visible.
    layer = names[min(10, len(names)) - 1]
    number = int((response.snr(layer, ["f1"])[:, 0].nan_to_num(0) - 8).abs().argmin())
    save(figures.snr_bins(response, layer, number), folder / "snr_bins.png")
    for number in sorted({1, min(10, len(names))}):
        save(figures.snr_spectra(response, names[number - 1]), folder / f"spectra_layer{number}.png")
    title = f"Important filters, {response.n_images} images, pixel noise sd {response.noise_std:g}"
    save(figures.important_per_layer(verdict.important, title), folder / "important_filters.png")


def figures_of_training(tagging: FrequencyTagging, out: Path) -> None:
    if (out / "metrics.csv").is_file():
        save(figures_of_runs.training_curves(report.training_history(out / "metrics.csv")), out / "figures" / "training_curves.png")
    if tagging.latest:
        noise = f"pixel noise sd {tagging.latest['noise_std']:g}"
        title = f"Important filters after epoch {tagging.latest['epoch'] + 1}, {noise}"
        save(figures.important_per_layer(tagging.latest["important"], title), out / "figures" / "important_last_epoch.png")
        shares = report.important_shares(out / "importance.csv")
        save(figures_of_runs.important_over_epochs(shares, f"Important filters over training, {noise}"), out / "figures" / "important_over_epochs.png")
        if len(shares) > 1:
            agreement = report.rank_agreement(out / "importance.csv")
            save(
                figures_of_runs.agreement_over_epochs(agreement, f"Ranking of the filters over training, {noise}"), out / "figures" / "ranking_over_epochs.png"
            )


def name_of(net: nn.Module) -> str:
    return str(getattr(net, "config", {}).get("name", type(net).__name__))


def tell(cfg: DictConfig, metrics: Mapping[str, Any], out: Path, title: str, verdict: Verdict | None, device: str) -> None:
    """Print the table of stages, the important filters, the remarks and where everything lies."""
    report.show(report.stage_table(metrics, title))
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    report.show(
        f"latency: median of {cfg.latency.n_runs} forwards on {device}{threads}, networks in turn; MACs of convolutions and linear layers for one image"
    )
    if verdict is not None:
        counts = verdict.counts
        everything = sum(len(flags) for flags in verdict.important.values())
        report.show(
            f"{sum(counts.values())} of {everything} recorded filters answer the tags ({cfg.importance.important_by}), pixel noise sd {cfg.tagging.noise_std:g}"
        )
    for remark in metrics.get("remarks", []):
        report.show(f"note: {remark}")
    report.show(f"everything in {out}")
