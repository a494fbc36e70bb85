"""What the explorer shows of filters: columns by part and by epoch, and what a cut would keep."""

import base64
import csv
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from freqprune import Amount, Plan, Stimulus, build_model, tag
from freqprune.networks import count_macs
from freqprune.pruning import Evidence, Verdict, judge, scores
from freqprune.pruning.graph import Unit
from freqprune.reports import filters_of, filters_over_epochs, trial_of, with_cut, write_importance
from freqprune.reports.filters import Filters
from freqprune.reports.shown import described
from freqprune.reports.trial import Trial
from freqprune.tagging import TagResponse
from tests.reports.conftest import STIMULUS


def unpacked(text: str, kind: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), kind)


def test_columns_and_spectra_by_numpy(response: TagResponse) -> None:
    found = filters_of(response, Verdict({k: torch.ones(len(v.amplitude)) > 0 for k, v in response.layers.items()}))
    clean = np.concatenate([one.amplitude.double().numpy() for one in response.layers.values()])
    noisy = np.concatenate([one.noisy_amplitude.double().numpy() for one in response.layers.values()])
    # 240 frames at 120 a second: bins of 0.5 Hz, tags in bins 12 and 15.
    first, second = clean[:, 12], clean[:, 15]
    mixed = [abs(12 * n + 15 * m) for n in range(-4, 5) for m in range(1, 5) if n and abs(n) + m <= 4]
    around = [noisy[:, [b - 2, b - 1, b + 1, b + 2]].mean(1) for b in (12, 15)]
    with np.errstate(invalid="ignore"):  # a dead filter: 0 / 0 in every column
        preference, integration = (first - second) / (first + second), clean[:, mixed].sum(1) / (first + second)
        snr = (noisy[:, 12] / around[0] + noisy[:, 15] / around[1]) / 2
        spectrum = noisy[:, 12] / around[0]
    np.testing.assert_allclose(found.columns["amplitude"], first + second)
    np.testing.assert_allclose(found.columns["preference"], preference, atol=1e-7)
    np.testing.assert_allclose(found.columns["integration"], integration, rtol=1e-5)
    np.testing.assert_allclose(found.columns["snr"], snr, rtol=1e-5)
    assert found.columns["important"].tolist() == [1.0] * len(clean)
    # Up to 4 x 7.5 Hz, bin 60, and a tenth beyond.
    assert found.freqs[[0, 12, -1]].tolist() == [0, 6, 33]
    np.testing.assert_allclose(found.spectra[:, 12], spectrum, rtol=1e-5)


def test_numbers_survive_the_packing(explored: tuple[Filters, Trial]) -> None:
    filters, trial = explored
    packed = filters.packed()
    for name, values in filters.columns.items():
        np.testing.assert_allclose(unpacked(packed["columns"][name], "<f4"), values, rtol=1e-6)
    upper = unpacked(packed["spectra"], "<u2").astype("<u4") << 16
    np.testing.assert_allclose(upper.view("<f4").reshape(filters.spectra.shape), filters.spectra, rtol=2**-8)
    for name, found in trial.scores.items():
        for unit, text in zip(trial.units, trial.packed()["scores"][name], strict=True):
            assert unpacked(text, "<f8").tolist() == found[unit.name].tolist()


def test_without_noise_amplitudes_stand_for_snr(net: nn.Module, pixels: torch.Tensor) -> None:
    response = tag(net, pixels[:1], STIMULUS, noise_std=0)
    found = filters_of(response)
    assert "snr" not in found.columns
    np.testing.assert_array_equal(found.spectra[:16], response.layers["conv1"].amplitude[:, : len(found.freqs)])
    assert "snr" not in trial_of(Plan(net, pixels[:1]), response).scores


def test_four_parts_name_the_strongest(net: nn.Module, pixels: torch.Tensor) -> None:
    four = Stimulus(tag_freqs=(8.5, 15.5, 19.0, 20.5), parts="quadrants", max_order=2)
    response = tag(net, pixels[:1], four, noise_std=0, layers=["conv1"])
    amplitude = response.amplitude("conv1").numpy()
    assert filters_of(response).columns["part"].tolist() == amplitude.argmax(1).tolist()


def test_a_filter_that_never_changes_has_no_part_that_drives_it(pixels: torch.Tensor) -> None:
    four = Stimulus(tag_freqs=(8.5, 15.5, 19.0, 20.5), parts="quadrants", max_order=2)
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    with torch.no_grad():
        net[0].weight[0].zero_()
        net[0].bias[0] = 0.3
    found = filters_of(tag(net, pixels[:1], four)).columns["part"]
    assert np.isnan(found).tolist() == [True, False]


def test_epochs_are_those_of_the_file(response: TagResponse, tmp_path: Path) -> None:
    path, verdict = tmp_path / "importance.csv", judge(response)
    found = scores("snr", Evidence(nn.Module(), response), list(response.layers))
    for epoch in range(5):
        write_importance(path, epoch, response, found, verdict)
    epochs = filters_over_epochs(path, STIMULUS, "snr", most=3)
    assert [one.label for one in epochs] == ["epoch 1", "epoch 3", "epoch 5"]
    whole = filters_of(response, verdict)
    assert dict(epochs[0].widths) == dict(whole.widths)
    for name, values in whole.columns.items():
        np.testing.assert_allclose(epochs[1].columns[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
    with path.open(newline="") as file:
        row = list(csv.DictReader(file))[20]
    place = [c.name for c in STIMULUS.components].index("f1+f2")
    assert epochs[0].spectra[20, place] == float(row["snr_f1+f2"])
    assert epochs[0].freqs[place] == 13.5


def test_kept_filters_are_marked_in_every_layer_of_a_unit(response: TagResponse, plan: Plan) -> None:
    stream = next(iter(plan.streams))
    n_filters = plan.unit(stream).n_filters
    kept = {stream: torch.tensor([0, 2])}
    found = with_cut(filters_of(response), plan, "l2", {stream: torch.arange(n_filters).double()}, kept)
    # Blocks that went took all filters of their layers along.
    block = SimpleNamespace(layers=("layer2.0.conv1", "layer2.0.conv2"))
    blocks: Any = SimpleNamespace(unit=plan.unit, blocks={"layer2.0": block})
    cut = with_cut(filters_of(response), blocks, "l2", {}, {}, ["layer2.0"])
    start = 0
    for layer, width in cut.widths.items():
        values = cut.columns["kept"][start : start + width]
        assert (values == 0).all() if layer in block.layers else np.isnan(values).all()
        start += width
    start = 0
    for layer, width in found.widths.items():
        flags, score = (found.columns[name][start : start + width] for name in ("kept", "score_l2"))
        if layer in plan.streams[stream]:
            assert np.flatnonzero(flags).tolist() == [0, 2]
            assert score.tolist() == list(range(width))
        else:
            assert np.isnan(flags).all()
        start += width


@pytest.mark.parametrize("streams", [False, True])
def test_macs_of_the_table_are_those_of_the_smaller_network(plan: Plan, streams: bool) -> None:
    rng = np.random.default_rng(0)
    names = plan.choose(streams=streams)
    found = {name: torch.rand(plan.unit(name).n_filters) for name in names}
    trial = trial_of(plan, None, "random", found)
    assert trial.macs_left({}) == pytest.approx(count_macs(plan.model, plan.example), rel=1e-12)
    for _ in range(3):
        widths = {name: int(rng.integers(1, len(found[name]) + 1)) for name in names}
        smaller = plan.apply({name: torch.arange(width) for name, width in widths.items()})
        assert trial.macs_left(widths) == pytest.approx(count_macs(smaller, plan.example), rel=1e-9)


def test_a_trial_of_a_cut_by_time_counts_macs(plan: Plan) -> None:
    amount = Amount(latency_cut=0.4, scope="per_ms", multiple_of="auto")
    packed = trial_of(
        plan, None, "random", {name: torch.rand(plan.unit(name).n_filters) for name in plan.choose()}, amount
    )
    assert packed.packed()["amount"] == {
        "scope": "per_mac", "normalize": False, "min_filters": 1, "multiple_of": 1, "macs_cut": None, "threshold": None,
    }  # fmt: skip


@pytest.mark.parametrize(("lowest", "scope"), [(-1e-3, "layer"), (0.0, "per_mac")])
def test_scores_below_zero_are_not_divided_by_macs(plan: Plan, lowest: float, scope: str) -> None:
    """One filter of one layer is enough, if the run has not asked for an amount of its own."""
    found = {name: torch.arange(plan.unit(name).n_filters).double() for name in plan.choose()}
    next(iter(found.values()))[0] = lowest
    assert trial_of(plan, None, "taylor", found).amount.scope == scope
    assert trial_of(plan, None, "taylor", found, Amount(macs_cut=0.5, scope="global")).amount.scope == "global"


def test_epochs_that_were_tagged_otherwise_are_not_shown(response: TagResponse, tmp_path: Path) -> None:
    path, verdict = tmp_path / "importance.csv", judge(response)
    found = scores("snr", Evidence(nn.Module(), response), list(response.layers))
    for epoch in range(2):
        write_importance(path, epoch, response, found, verdict, criterion="snr")
    assert [one.label for one in filters_over_epochs(path, STIMULUS, "amplitude")] == ["epoch 1", "epoch 2"]
    assert "score_snr" in filters_over_epochs(path, STIMULUS, "amplitude")[0].columns
    other = replace(STIMULUS, parts="top_bottom")
    assert filters_over_epochs(path, other, "snr") == []
    # Not known of which tags, but these have components that the file does not.
    path.with_suffix(".json").unlink()
    assert len(filters_over_epochs(path, other, "snr")) == 2
    assert filters_over_epochs(path, replace(STIMULUS, max_order=STIMULUS.max_order + 1), "snr") == []
    # A training that goes on under another criterion begins its own table.
    write_importance(path, 2, response, found, verdict, criterion="snr")
    assert len(filters_over_epochs(path, STIMULUS, "snr")) == 3
    write_importance(path, 3, response, found, verdict, criterion="amplitude")
    assert [one.label for one in filters_over_epochs(path, STIMULUS, "snr")] == ["epoch 4"]
    # So does one that reads other components, or judges otherwise.
    path.unlink()
    last = 3
    for components, alpha in (("all", 0.001), (["f1"], 0.001), (["f1"], 0.1)):
        judged = {"components": components, "judged": {"alpha": alpha}}
        for n_epochs in (1, 2):
            last += 1
            write_importance(path, last, response, found, verdict, criterion="amplitude", judged=judged)
            assert len(filters_over_epochs(path, STIMULUS, "snr")) == n_epochs


def test_epochs_that_were_read_otherwise_are_not_shown_beside(response: TagResponse, tmp_path: Path) -> None:
    path, verdict = tmp_path / "importance.csv", judge(response)
    found = scores("snr", Evidence(nn.Module(), response), list(response.layers))
    write_importance(path, 0, response, found, verdict, criterion="snr")
    louder, first = replace(response, noise_std=0.05), next(iter(response.layers))
    before = response.layers[first]
    assert before.site.stage != "convolution"
    earlier = replace(before, site=replace(before.site, stage="convolution"))
    at_convolutions = replace(response, layers={**response.layers, first: earlier})
    # A layer that one lacks says nothing against it.
    fewer = replace(response, layers={name: one for name, one in response.layers.items() if name != first})
    for beside, n_shown in ((response, 1), (fewer, 1), (louder, 0), (at_convolutions, 0)):
        assert len(filters_over_epochs(path, STIMULUS, "snr", beside=beside)) == n_shown
    # Nor do they stand in one table.
    write_importance(path, 1, louder, found, verdict, criterion="snr")
    assert [one.label for one in filters_over_epochs(path, STIMULUS, "snr")] == ["epoch 2"]


def test_filters_of_attention_heads_are_told_of_all_their_channels() -> None:
    """Two heads of two channels each: queries, keys and values one after the other."""
    unit = Unit("qkv", ("qkv",), 2, (), width=6, n_parts=3)
    plan: Any = SimpleNamespace(unit=lambda _: unit, blocks={})
    filters = Filters("now", {"qkv": 12}, {"snr": np.ones(12)}, np.arange(3.0), np.ones((12, 3)))
    found = with_cut(filters, plan, "l2", {"qkv": torch.tensor([1.0, 2.0])}, {"qkv": torch.tensor([1])})
    expected = np.full(12, 2.0)
    expected[unit.channels([0])] = 1
    assert np.array_equal(found.columns["score_l2"], expected)
    assert np.array_equal(found.columns["kept"], expected - 1)


def test_tags_are_told_as_json_has_them() -> None:
    """Numbers of other libraries, as a project with OmegaConf or fractions hands them over."""
    given = Stimulus(mode="contrast", pivot=OmegaConf.create([0.5, 0.4, 0.3]), frame_rate=Fraction(120))  # type: ignore[arg-type]
    same = Stimulus(mode="contrast", pivot=[0.5, 0.4, 0.3], frame_rate=120.0)
    assert described(given) == described(same)
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :, :4], masks[1, :, 4:] = True, True
    assert (
        described(Stimulus(parts=masks))
        == described(Stimulus(parts=masks.clone()))
        != described(Stimulus(parts=~masks))
    )


def test_parts_are_told_by_their_number_whatever_their_frequencies(tmp_path: Path) -> None:
    net, pixels = build_model({"name": "resnet8", "stage_widths": [4, 4, 8]}), torch.rand(2, 3, 16, 16)
    swapped = Stimulus(tag_freqs=(7.5, 6.0), max_order=1)
    response = tag(net, pixels, swapped)
    expected = torch.cat([response.part_preference(layer) for layer in response.layers]).numpy()
    np.testing.assert_array_equal(filters_of(response).columns["preference"], expected)
    verdict = judge(response, by="threshold", threshold=2.0)
    table = scores("amplitude", Evidence(net, response), list(response.layers))
    write_importance(tmp_path / "importance.csv", 0, response, table, verdict)
    # One order holds no intermodulation: nothing is known of how far filters combine the parts.
    (epoch,) = filters_over_epochs(tmp_path / "importance.csv", swapped, "amplitude")
    np.testing.assert_allclose(epoch.columns["preference"], expected, atol=1e-3)
    assert np.isnan(epoch.columns["integration"]).all()
    assert np.isnan(filters_of(response).columns["integration"]).all()
    four = Stimulus(parts="quadrants", tag_freqs=(20.5, 19.0, 15.5, 8.5), max_order=2)
    by_four = tag(net, pixels, four)
    amplitude = torch.cat([by_four.amplitude(layer, ["f1", "f2", "f3", "f4"]) for layer in by_four.layers])
    found = filters_of(by_four).columns["part"]
    answering = np.isfinite(found)
    assert answering.sum() > 30
    np.testing.assert_array_equal(found[answering], amplitude.argmax(-1).numpy()[answering])
