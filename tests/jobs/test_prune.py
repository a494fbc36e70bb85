"""The pruning from a composed configuration, small: what it writes, keeps and refuses."""

import csv
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import false_discovery_control
from torch import nn

from freqprune import load_pruned
from freqprune.errors import InputError
from freqprune.jobs import assembly
from freqprune.jobs.outputs import _by_macs
from freqprune.jobs.prune import _by_class, _tagged, prune
from freqprune.jobs.settings import read
from freqprune.jobs.stages import Run
from freqprune.networks.checkpoint import load_network, save_pruned
from freqprune.networks.profiling import count_macs, count_parameters
from freqprune.networks.registry import build_model, register_model
from freqprune.pruning import Amount, Plan, cut, tempo
from freqprune.pruning.recipe import Recipe, Reconstruction
from freqprune.reports import tables
from freqprune.tagging import Readout, tag
from tests.jobs.small import READOUT, check_page, config
from tests.pruning.test_tempo import ByMacs

RECONSTRUCTION = {"positions": 9, "ridge": 0.5, "resolve": "lost", "rounds": 5, "memory_gb": 2.0}
RECIPE = {"layers": "layer2*", "exclude": "layer3*", "streams": True, "blocks": False, "compensation": "mean",
          "calibrate_on": "images", "frames_an_image": 3, "measured_images": 7}  # fmt: skip
AMOUNT = {"macs_cut": 0.3, "scope": "global", "normalize": True, "min_filters": 2, "multiple_of": 4}

# What metrics.json holds of a network that was tagged, and of one that was cut.
TAGGED = {"network", "tagged_images", "timed_on", "timed_runs", "dense", "finished"}
CUT = {*TAGGED, "pruned", "kept", "widths", "remarks"}


def test_prune_writes_what_it_says(pruned: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    out, metrics, objects = pruned
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert set(metrics) == {*CUT, "recalibrated", "finetuned"}
    assert (
        set(metrics["dense"])
        == set(metrics["pruned"])
        == {"test_accuracy", "macs", "params", "file_bytes", "memory_bytes", "latency_ms"}
    )
    assert set(metrics["recalibrated"]) == {"test_accuracy"}
    assert set(metrics["finetuned"]) == {"test_accuracy", "epochs"}
    assert metrics["finetuned"]["epochs"] == 1
    x = torch.rand(2, 3, 32, 32)
    assert metrics["dense"]["macs"] == count_macs(build_model({"name": "resnet8"}), x)
    assert 0.5 <= metrics["pruned"]["macs"] / metrics["dense"]["macs"] <= 0.6
    net = load_pruned(out / "pruned.ckpt")
    assert count_macs(net, x) == metrics["pruned"]["macs"]
    assert count_parameters(net) == metrics["pruned"]["params"]
    assert {layer: net.get_submodule(layer).out_channels for layer in metrics["kept"]} == metrics["kept"]
    dense = build_model({"name": "resnet8"})
    assert {layer: dense.get_submodule(layer).out_channels for layer in metrics["widths"]} == metrics["widths"]
    assert list(metrics["widths"]) == list(metrics["kept"])
    # The file holds the fine-tuned weights.
    torch.testing.assert_close(net(x), objects["net"](x))
    names = {path.name for path in (out / "figures").iterdir()}
    assert names == {
        "stimulus.png",
        "snr_bins.png",
        "spectra_layer1.png",
        f"spectra_layer{min(10, len(objects['response'].layers))}.png",
        "important_filters.png",
        "part_preference.png",
        "integration.png",
        "kept_per_layer.png",
        "accuracy_over_cut.png",
        "accuracy_over_time.png",
    }
    check_page(out)


def test_filters_csv_holds_every_filter_and_component(pruned: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    out, _, objects = pruned
    with (out / "filters.csv").open() as file:
        rows = list(csv.DictReader(file))
    response = objects["response"]
    n_filters = sum(len(r.amplitude) for r in response.layers.values())
    assert len(rows) == n_filters * len(response.components("all"))
    row = next(r for r in rows if (r["layer"], r["filter"], r["component"]) == ("layer1.0.conv1", "3", "f1"))
    assert float(row["snr"]) == pytest.approx(response.snr("layer1.0.conv1", ["f1"])[3, 0].item(), rel=1e-4)
    assert row["recorded_at"] == "layer1.0.relu1 (activation)"
    assert row["noise_std"] == "0.02"


@pytest.mark.slow
def test_removes_the_filters_with_the_lowest_snr(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    cfg = config(
        "prune",
        tmp_path,
        "model=auto",
        f"ckpt={ckpt}",
        "pruning.ratio=0.5",
        "importance=snr",
        "finetune.epochs=0",
        "pruning.bn_images=0",
    )
    metrics, objects = prune(cfg)
    assert set(metrics) == CUT
    for layer, kept in objects["kept"].items():
        snr = objects["response"].snr(layer).nan_to_num(0).mean(-1)
        assert kept.tolist() == sorted(snr.argsort(descending=True)[: len(snr) // 2].tolist())


@pytest.mark.slow
def test_threshold_keeps_what_is_above_it(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    common = (
        "model=auto",
        "importance=snr",
        f"ckpt={trained[0] / 'checkpoints' / 'last.ckpt'}",
        "finetune.epochs=0",
        "pruning.bn_images=0",
    )
    _, objects = prune(config("prune", tmp_path, *common, "pruning=none"))
    layers = [f"layer{s}.0.conv1" for s in (1, 2, 3)]
    snr = {layer: objects["response"].snr(layer).nan_to_num(0).mean(-1) for layer in layers}
    threshold = torch.cat(list(snr.values())).median().item()
    metrics, _ = prune(config("prune", tmp_path, *common, f"pruning.threshold={threshold}"))
    assert metrics["kept"] == {layer: max(1, int((values > threshold).sum())) for layer, values in snr.items()}


def test_pruning_none_only_tags_and_tests(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    cfg = config(
        "prune",
        tmp_path,
        "model=auto",
        f"ckpt={trained[0] / 'checkpoints' / 'last.ckpt'}",
        "pruning=none",
        "tagging.per_class=true",
    )
    metrics, objects = prune(cfg)
    with (tmp_path / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["group"] for row in rows} == {"all", *map(str, range(10))}
    first = next(row for row in rows if (row["group"], row["layer"], row["filter"]) == ("all", "conv1", "2"))
    assert float(first["part_preference"]) == pytest.approx(
        objects["response"].part_preference("conv1")[2].item(), rel=1e-4
    )
    last = [row["integration"] for row in rows if (row["group"], row["layer"]) == ("all", "layer3.0.conv2")]
    integration = objects["response"].integration("layer3.0.conv2")
    assert integration.nanmean() > 0
    torch.testing.assert_close(
        torch.tensor([float(value or "nan") for value in last], dtype=integration.dtype), integration,
        rtol=1e-4, atol=1e-6, equal_nan=True,
    )  # fmt: skip
    assert set(metrics) == TAGGED
    assert metrics["tagged_images"] == objects["response"].n_images
    check_page(tmp_path)
    assert metrics["dense"]["test_accuracy"] == pytest.approx(trained[1]["test_accuracy"])
    assert not (tmp_path / "pruned.ckpt").exists()
    assert (tmp_path / "filters.csv").exists()


def test_a_pruned_network_resumes_training_its_widths(pruned: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    content = torch.load(pruned[0] / "finetune" / "checkpoints" / "last.ckpt", weights_only=True)
    widths = content["hyper_parameters"]["model"]["widths"]
    assert widths == {
        layer: n
        for layer, n in pruned[1]["kept"].items()
        if n != content["hyper_parameters"]["model"]["stage_widths"][int(layer[5]) - 1]
    }


@pytest.mark.slow
def test_a_pruned_network_can_be_pruned_again(
    pruned: tuple[Path, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    cfg = config(
        "prune", tmp_path, "model=auto", f"ckpt={pruned[0] / 'pruned.ckpt'}", "pruning.ratio=0.2", "finetune.epochs=0"
    )
    metrics, _ = prune(cfg)
    assert metrics["dense"]["macs"] == pruned[1]["pruned"]["macs"]
    # The file still counts in filters of the dense network.
    first, second = (load_network(folder / "pruned.ckpt").kept for folder in (pruned[0], tmp_path))
    assert all(set(second[layer]) <= set(first[layer]) for layer in first)
    assert second != first
    assert metrics["pruned"]["macs"] < metrics["dense"]["macs"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pruning.layers='layer9*'"], "matches none of"),
        (["pruning.layers='*.conv2'"], "share their channels"),
        (["pruning.threshold=1e9"], "would remove every filter"),
        (["tagging.layers=conv1"], "which tagging.layers leaves out"),
        (["trainer.precision=bf16-true"], "trainer.precision = bf16-true turns the network itself into that type"),
        (["pruning.bn_images=1"], "bn_images must be 0, to leave batch norms as they are, or at least 2, got 1"),
        (["tagging.noise_std=0"], "compares with noise, but tagging.noise_std = 0"),
        (["data.mean=[0,0,0]", "data.std=[1,1,1]"], r"trained with mean .* use data.mean=\["),
        (["model=resnet14"], "holds a resnet8, but model.name = resnet14"),
        (["ckpt=nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["ckpt_path=x"], "has no part in pruning"),
        (["finetune.momentum=2"], "finetune.momentum must lie"),
        (["model=resnet8", "model.shortcut=B"], "with shortcut = A, but model.shortcut = B"),
        (["tagging.gap=40"], "leaves the part 'left'"),
    ],
)
def test_prune_refuses(
    overrides: list[str], message: str, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    with pytest.raises(InputError, match=message):
        prune(config("prune", tmp_path, "model=auto", "importance=snr", f"ckpt={ckpt}", *overrides))
    assert not (tmp_path / "pruned.ckpt").exists()


@pytest.mark.slow
def test_everything_at_once(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Residual streams, two steps with fine-tuning between, least squares, multiples, distillation, exports."""
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    metrics, objects = prune(
        config(
            "prune",
            tmp_path,
            f"ckpt={ckpt}",
            "importance=redundancy",
            "pruning.macs_cut=0.5",
            "pruning.streams=true",
            "pruning.steps=2",
            "pruning.step_epochs=1",
            "pruning.compensation=least_squares",
            "pruning.scope=global",
            "finetune.distill=0.5",
            "export.torch_export=true",
            "export.fold=true",
            "export.onnx=true",
            "export.int8=true",
        )
    )
    assert metrics["onnx"]["test_accuracy"] == pytest.approx(metrics["folded"]["test_accuracy"], abs=0.011)
    assert metrics["int8"]["file_bytes"] < metrics["onnx"]["file_bytes"]
    assert set(metrics["int8"]["latency_ms"]) == {"1", "4"}
    assert metrics["exports"]["model.int8.onnx"] > 0.5
    assert metrics["folded"]["test_accuracy"] == pytest.approx(metrics["finetuned"]["test_accuracy"], abs=0.011)
    assert metrics["folded"]["params"] < metrics["pruned"]["params"]
    assert set(metrics["folded"]["latency_ms"]) == set(metrics["dense"]["latency_ms"]) == {"1", "4"}
    assert 0.5 <= 1 - metrics["pruned"]["macs"] / metrics["dense"]["macs"] < 0.55
    assert metrics["exports"]["model.pt2"] < 1e-5
    assert metrics["pruned"]["file_bytes"] < metrics["dense"]["file_bytes"]
    assert set(metrics["pruned"]["latency_ms"]) == {"1", "4"}
    assert (tmp_path / "step1" / "metrics.csv").exists()
    net = load_pruned(tmp_path / "pruned.ckpt")
    assert {unit: net.get_submodule(unit).out_channels for unit in metrics["kept"]} == metrics["kept"]
    stored = load_network(tmp_path / "pruned.ckpt")
    assert {unit: len(indices) for unit, indices in stored.kept.items()} == metrics["kept"]
    assert all(len(set(indices)) == len(indices) for indices in stored.kept.values())
    torch.testing.assert_close(net.state_dict(), objects["net"].state_dict())


@pytest.mark.slow
def test_blocks_that_went_count_in_later_steps(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[tuple[float, float]] = []

    def watched(net: nn.Module, material: Any, recipe: Any, *args: Any) -> Any:
        left.append((count_macs(net, torch.rand(1, 3, 32, 32)), 1 - recipe.amount.macs_cut))
        return cut(net, material, recipe, *args)

    monkeypatch.setattr("freqprune.jobs.stages.cut", watched)
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    more = ("importance=logit_error", "pruning.blocks=true", "pruning.macs_cut=0.6", "pruning.rounds=0",
            "pruning.calibration_images=32", "pruning.measured_images=16", "pruning.steps=3",
            "finetune.epochs=0")  # fmt: skip
    metrics, _ = prune(config("prune", tmp_path, f"ckpt={ckpt}", *more))
    assert metrics["dropped_blocks"]
    assert len(left) > 1
    # The share of the dense network that each step is to leave: 0.8, 0.6 and 0.4.
    shares = [macs / metrics["dense"]["macs"] * share for macs, share in left]
    assert shares == pytest.approx([1 - 0.2 * (step + 1) for step in range(len(left))])


@pytest.mark.slow
def test_a_cut_by_time_says_what_was_measured(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempo, "Times", ByMacs)
    monkeypatch.setattr(tempo, "NOISY", 10.0)
    monkeypatch.setattr(tempo, "LEAST_S", 0.0)
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    more = ("importance=logit_error", "pruning.latency_cut=0.1", "latency.batch_size=3", "pruning.compensation=none",
            "pruning.calibration_images=32", "pruning.measured_images=16", "finetune.epochs=0",
            "logger=jsonl")  # fmt: skip
    metrics, _ = prune(config("prune", tmp_path, f"ckpt={ckpt}", *more))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [next(name for name in line if name != "step").split("/")[0] for line in lines] == [
        "dense", "pruned", "recalibrated",
    ]  # fmt: skip
    assert lines[1]["pruned/test_accuracy"] == metrics["pruned"]["test_accuracy"]
    assert lines[1]["pruned/macs"] == metrics["pruned"]["macs"]
    for stage in ("dense", "pruned"):
        assert list(metrics[stage]["latency_ms"]) == ["1", "3", "4"]
    found = json.loads((tmp_path / "metrics.json").read_text())["latency"]
    assert found["asked"] == 0.1
    assert (found["target"], found["batch_size"]) == ("eager", 3)
    before, after = (metrics[stage]["latency_ms"]["3"] for stage in ("dense", "pruned"))
    assert tables.percentages(metrics)["time_cut"] == pytest.approx(100 * (1 - after / before))


def test_what_is_refused_leaves_the_results_in_its_folder(tmp_path: Path) -> None:
    """And the next try does not take that run's pages for its own."""
    out = tmp_path / "run"
    (out / "figures").mkdir(parents=True)
    asked = json.dumps({"command": "freqprune prune", "settings": {"seed": 5}})
    earlier = {"run.json": asked, "metrics.json": '{"finished": true}', "figures/accuracy_over_time.png": "of seed 5"}
    for name, text in earlier.items():
        (out / name).write_text(text)
    save_pruned(tmp_path / "net.ckpt", build_model({"name": "resnet8"}), {})
    given = ["ckpt=" + str(tmp_path / "net.ckpt"), "pruning=none"]
    with pytest.raises(InputError, match="nothing_such"):
        prune(config("prune", out, *given, "tagging.layers=nothing_such"))
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(InputError, match=r"holds no pruned.ckpt and metrics.json"):
        prune(config("prune", out, given[0], f"resume={tmp_path / 'elsewhere'}"))
    assert {name: (out / name).read_text() for name in earlier} == earlier
    prune(config("prune", out, *given))
    assert json.loads((out / "run.json").read_text())["settings"]["seed"] == 0
    assert not (out / "figures" / "accuracy_over_time.png").exists()


def test_the_cut_of_an_earlier_start_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be where torchrun or srun start the same command again."""
    monkeypatch.setattr("freqprune.jobs.prune.named_by_launcher", lambda folder: folder == tmp_path)
    save_pruned(tmp_path / "net.ckpt", build_model({"name": "resnet8"}), {})
    (tmp_path / "pruned.ckpt").write_bytes(b"of the first start")
    (tmp_path / "metrics.json").write_text('{"pruned": {}}')
    said = r"holds the cut of an earlier start: go on with prune\.py with the same settings and resume="
    given = (f"ckpt={tmp_path / 'net.ckpt'}", "importance=l2", "pruning.ratio=0.5", "finetune.epochs=0")
    with pytest.raises(InputError, match=said):
        prune(config("prune", tmp_path, *given))
    assert (tmp_path / "pruned.ckpt").read_bytes() == b"of the first start"
    # Nor by one that goes on from elsewhere.
    prune(config("prune", tmp_path / "elsewhere", *given))
    with pytest.raises(InputError, match=said):
        prune(config("prune", tmp_path, *given, f"resume={tmp_path / 'elsewhere'}"))
    assert (tmp_path / "pruned.ckpt").read_bytes() == b"of the first start"
    # What a further training has left of a cut can be gone on with by nobody.
    (tmp_path / "metrics.json").unlink()
    assert prune(config("prune", tmp_path, *given))[0]["finished"]


class Tokens(nn.Module):
    """Patches, and layers behind them that are linear."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.patches(x).flatten(2).mT
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


def test_layers_that_are_not_read_by_default_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    register_model("prune_tokens", Tokens)
    save_pruned(tmp_path / "net.ckpt", Tokens(), {}, model={"name": "prune_tokens"})
    given = [f"ckpt={tmp_path / 'net.ckpt'}", "model=auto", "pruning=none"]
    prune(config("prune", tmp_path / "default", *given))
    assert "name those to look at, such as tagging.layers='blocks.*.0'" in caplog.text
    assert "patches" in (tmp_path / "default" / "filters.csv").read_text()
    caplog.clear()
    prune(config("prune", tmp_path / "named", *given, "tagging.layers='blocks.*.0'"))
    assert "name those" not in caplog.text
    assert "blocks.1.0" in (tmp_path / "named" / "filters.csv").read_text()


def filters(n_filters: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, n_filters, 3, bias=False), nn.ReLU()).eval()


def test_filters_are_tagged_on_the_first_images_held_out_for_validation(tmp_path: Path) -> None:
    settings = read(config("prune", tmp_path, "data.mean=[0,0,0]", "data.std=[1,1,1]"))
    data, net = assembly.load_data(assembly.data_settings(settings)), filters(2)
    found, _ = _tagged(settings, net, data)
    # Normalised with these, pixels stay as they are.
    expected = tag(net, data.split("val").pixels[:2] / 255, settings.stimulus)
    torch.testing.assert_close(found.layers["0"].amplitude, expected.layers["0"].amplitude)


def test_important_filters_are_those_at_the_rate_that_is_set(tmp_path: Path) -> None:
    rate = 0.5
    noisy = ("tagging.noise_std=1", "importance.important_by=significance", f"importance.alpha={rate}")
    settings = read(config("prune", tmp_path, *noisy))
    response, verdict = _tagged(settings, filters(16), assembly.load_data(assembly.data_settings(settings)))
    p_values = response.p_values("0").numpy()
    adjusted = false_discovery_control(p_values.ravel()).reshape(p_values.shape).min(1)
    assert verdict is not None
    assert verdict.important["0"].tolist() == (adjusted <= rate).tolist()
    # The usual rate of 0.001 calls others important.
    assert ((adjusted > 0.001) & (adjusted <= rate)).any()


def test_responses_by_class_are_those_to_normalised_images(tmp_path: Path) -> None:
    """Inputs of twice the contrast move a convolution twice as much."""
    settings = read(
        config("prune", tmp_path, "tagging.per_class=true", "tagging.where=convolution", "data.mean=[0,0,0]",
               "data.std=[0.5,0.5,0.5]")
    )  # fmt: skip
    data, net = assembly.load_data(assembly.data_settings(settings)), filters(2)
    found = _by_class(settings, net, data)
    images = data.split("val")
    present = images.labels.unique().tolist()
    assert list(found) == [data.classes[number] for number in present]
    pixels = images.pixels[images.labels == present[0]][:2] / 255
    raw = tag(net, pixels, settings.stimulus, where="convolution", noise_std=0.0)
    torch.testing.assert_close(found[data.classes[present[0]]].layers["0"].amplitude, 2 * raw.layers["0"].amplitude)


def test_a_cut_is_calibrated_on_training_images_and_tagged_on_others(tmp_path: Path) -> None:
    settings = read(config("prune", tmp_path))
    data = assembly.load_data(assembly.data_settings(settings))
    seen = Run(settings, data, torch.device("cpu"))._material()
    assert torch.equal(seen.calibration, data.split("train").pixels[:8] / 255)
    assert seen.labelled is not None
    assert torch.equal(seen.labelled[0], data.split("train").pixels[:8] / 255)
    assert torch.equal(seen.labelled[1], data.split("train").labels[:8])
    assert torch.equal(seen.images, data.split("val").pixels[:2] / 255)


def test_batch_norms_are_estimated_anew_between_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.4, 0.2]
    normal = (f"data.mean={mean}", f"data.std={std}", "importance=l2", "pruning.steps=2", "pruning.compensation=none")
    settings = read(config("prune", tmp_path, *normal))
    data, net = assembly.load_data(assembly.data_settings(settings)), build_model({"name": "resnet8"}).eval()

    class Stopped(Exception):  # noqa: N818
        pass

    def first_step(*given: Any) -> None:
        # A norm that sees the images themselves, and sums 32768 pixels of each channel in single precision.
        small = nn.Sequential(nn.BatchNorm2d(3))
        given[-1](small, 0)
        pixels = data.split("train").pixels[:64].numpy() / 255
        expected = (pixels.mean((0, 2, 3)) - mean) / std
        assert small[0].running_mean.tolist() == pytest.approx(expected.tolist(), rel=1e-3)
        raise Stopped

    monkeypatch.setattr("freqprune.jobs.stages.cut_in_steps", first_step)
    assert settings.recipe is not None
    response: Any = None
    with pytest.raises(Stopped):
        Run(settings, data, torch.device("cpu")).shrink(net, {}, settings.recipe, response)


@pytest.mark.parametrize(
    ("amount", "scope"),
    [
        (["pruning.macs_cut=0.3"], "per_mac"),
        (["pruning.latency_cut=0.3"], "per_ms"),
        (["pruning.latency_ms=2"], "per_ms"),
        (["pruning.latency_cut=0.3", "pruning.scope=per_mac"], "per_mac"),
        (["pruning.latency_cut=0.3", "importance.scope=global"], "global"),
    ],
)
def test_a_cut_by_time_ranks_filters_by_time(amount: list[str], scope: str, tmp_path: Path) -> None:
    recipe = read(config("prune", tmp_path, "importance=logit_error", *amount)).recipe
    assert recipe is not None
    assert recipe.amount.scope == scope


def test_a_cut_follows_the_seed(tmp_path: Path) -> None:
    recipe = read(config("prune", tmp_path, "importance=random", "seed=5")).recipe
    assert recipe is not None
    assert recipe.seed == 5


@pytest.mark.parametrize(
    ("given", "done"),
    [
        ((), False),
        (("pruning.bn_when=after",), True),
        (("pruning.compensation=none",), True),
        (("pruning.compensation=none", "pruning.bn_images=0"), False),
    ],
)
def test_norms_are_estimated_anew_but_not_after_a_cut_in_sequence(
    given: tuple[str, ...], done: bool, tmp_path: Path
) -> None:
    settings = read(config("prune", tmp_path, *given))
    data = assembly.load_data(assembly.data_settings(settings))
    run, net = Run(settings, data, torch.device("cpu")), build_model({"name": "resnet8"}).eval()
    before = net.bn1.running_mean.clone()
    assert run._recalibrate(net) is done
    images = data.split("train").pixels[:64]
    with torch.no_grad():
        expected = net.conv1(data.normalize(images)).mean((0, 2, 3)) if done else before
    torch.testing.assert_close(net.bn1.running_mean, expected, rtol=1e-4, atol=1e-5)
    # Nothing is estimated, and no stage of its own, where there is none.
    assert run._recalibrate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))) is False


@pytest.mark.parametrize("more", [("finetune.epochs=1",), ("finetune.epochs=0",)])
def test_accuracies_are_those_of_the_network_that_is_written(
    more: tuple[str, ...], trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    common = (f"ckpt={trained[0] / 'checkpoints' / 'last.ckpt'}", "importance=l2", "pruning.ratio=0.5")
    cfg = config("prune", tmp_path, *common, "pruning.compensation=none", "data.limit_test=300", *more)
    metrics, _ = prune(cfg)
    net, data = load_pruned(tmp_path / "pruned.ckpt"), assembly.load_data(assembly.data_settings(read(cfg)))
    images = data.split("test")
    with torch.no_grad():
        right = net(data.normalize(images.pixels)).argmax(1) == images.labels
    last = "finetuned" if more == ("finetune.epochs=1",) else "recalibrated"
    assert metrics[last]["test_accuracy"] == pytest.approx(float(right.float().mean()), abs=1e-6)
    assert metrics["dense"]["test_accuracy"] != metrics[last]["test_accuracy"]


@pytest.mark.parametrize("amount", [Amount(ratio=0.2), Amount(latency_cut=0.3, scope="per_ms", multiple_of="auto")])
def test_the_page_begins_with_what_the_cut_removed(amount: Amount) -> None:
    plan = Plan(build_model({"name": "resnet8"}).eval(), torch.rand(1, 3, 32, 32))
    kept = {"layer1.0.conv1": torch.arange(4), "layer3.0.conv1": torch.arange(60)}
    found = _by_macs(amount, plan, kept, ())
    whole = plan.macs({})
    assert found.macs_cut == pytest.approx(1 - plan.macs({"layer1.0.conv1": 4, "layer3.0.conv1": 60}) / whole)
    assert (found.scope, found.multiple_of) == ("per_mac" if amount.by_time else "global", 1)
    asked = Amount(macs_cut=0.4)
    assert _by_macs(asked, plan, kept, ()) is asked


def test_every_setting_of_a_cut_reaches_its_recipe(tmp_path: Path) -> None:
    words = [f"tagging.{key}={value}" for key, value in READOUT.items()]
    words += [f"pruning.{key}={value}" for key, value in {**RECONSTRUCTION, **RECIPE, **AMOUNT}.items()]
    cfg = config("prune", tmp_path, "importance=amplitude", "importance.components=[f2]", "seed=5", *words)
    found = read(cfg).recipe
    assert found is not None
    expected = Recipe(
        Amount(**AMOUNT),
        "amplitude",
        components=["f2"],
        tagging=READOUT,
        reconstruction=Reconstruction(**RECONSTRUCTION),
        seed=5,
        latency=found.latency,
        **RECIPE,
    )
    assert vars(found) == vars(expected)
    # Each of them is another than it would be without being set.
    usual = Recipe(Amount(ratio=0.5))
    assert {name for name, value in vars(found).items() if value == vars(usual)[name]} <= {"latency"}
    how, usual_how = vars(found.reconstruction), vars(usual.reconstruction)
    assert {name for name, value in how.items() if value == usual_how[name]} == {"seed"}
    assert set(READOUT) == {one.name for one in fields(Readout)}
