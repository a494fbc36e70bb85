"""What a job says before it begins: counted by hand for a network of known pace, measured for one that sleeps."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from freqprune.jobs import pace
from freqprune.jobs.announce import announce_explaining, announce_pruning, announce_training
from freqprune.jobs.explain_settings import Tags
from freqprune.jobs.forecast import PICTURE, Forecast, of_a_cut, of_explaining, of_pruning, of_training
from freqprune.jobs.pace import Pace, Span
from freqprune.jobs.settings import Settings, read
from freqprune.networks import build_model
from freqprune.pruning import Amount, Plan, Recipe, plan_cut, seen_in_a_step
from freqprune.training import DigitsData, Optimization
from freqprune.training.resizing import ProgressiveResizing
from tests.jobs.small import config

# Of one image: a second forward, three a step, half a second to read.
KNOWN = Pace(Span(1, 1), Span(3, 3), Span(0.5, 0.5), Span(0, 0))


@pytest.fixture(scope="module")
def data() -> DigitsData:
    found = DigitsData(batch_size=32, limit_train=96, limit_test=40)
    found.setup()
    return found


@pytest.fixture(scope="module")
def planned() -> tuple[Plan, list[str]]:
    """What a cut of a small network may remove."""
    return plan_cut(build_model({"name": "resnet8"}), torch.rand(1, 3, 32, 32), Recipe(Amount(macs_cut=0.4)))


def settings(out: Path, *overrides: str) -> Settings:
    return read(config("prune", out, *overrides))


def test_training_is_epochs_times_images(data: DigitsData, tmp_path: Path) -> None:
    given = settings(tmp_path, "tagging.epoch_images=2", "tagging.every_n_epochs=2")
    n_val = len(data.split("val"))
    found = of_training(KNOWN, given, data, 5)
    assert found["training"] == Span(5 * (96 * 3 + n_val * 1.5), 5 * (96 * 3 + n_val * 1.5))
    # Two of five epochs are tagged, two images each: 49 frames that differ, and 240 with noise.
    assert found["tags"] == Span(pytest.approx(4 * 289 * 0.7), pytest.approx(4 * 289 * 1.7))  # type: ignore[arg-type]
    assert of_training(KNOWN, settings(tmp_path, "tagging.spatial=map"), data, 1)["tags"] is None
    assert "tags" not in of_training(KNOWN, settings(tmp_path, "tagging.every_n_epochs=0"), data, 5)
    assert of_training(KNOWN, given, data, None)["training"] is None


def test_small_images_cost_less(data: DigitsData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "progressive_resizing", ProgressiveResizing(0.5, 0.5, 0.5))
    given, n_val = settings(tmp_path, "tagging.every_n_epochs=0"), len(data.split("val"))
    for done, size in ((0, 0.625), (2, 1.0), (1, 0.75)):
        found = of_training(KNOWN, given, data, 4 - done, done)["training"]
        assert found is not None
        assert found.low == pytest.approx((4 - done) * (96 * 3 * size + n_val * 1.5))


def test_fine_tuning_is_of_whole_images_and_a_training_from_scratch_of_small_ones(
    data: DigitsData, planned: tuple[Plan, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "progressive_resizing", ProgressiveResizing(0.5, 0.5, 0.5))
    fed = replace(KNOWN, fed=Span(0.25, 0.25))
    given = ("importance=l2", "pruning.macs_cut=0.25", "finetune.epochs=4", "pruning.steps=3", "pruning.step_epochs=1")
    n_val = len(data.split("val"))
    an_epoch = 96 * 0.25 + n_val * 1.5
    found = of_pruning(fed, settings(tmp_path, *given), data, planned)["fine-tuning"]
    assert found is not None
    assert found.high == pytest.approx(6 * (96 * 3 + an_epoch))
    found = of_pruning(fed, settings(tmp_path, *given, "finetune.from_scratch=true"), data, planned)[
        "training from scratch"
    ]
    assert found is not None
    # The steps before it are fine-tuned; images are read whole.
    assert found.high == pytest.approx(2 * (96 * 3 + an_epoch) + 4 * (96 * 3 * 0.625 + an_epoch))


def test_a_cut_is_counted_or_left_out(data: DigitsData, planned: tuple[Plan, list[str]], tmp_path: Path) -> None:
    def cut(*overrides: str) -> Span | None:
        given = settings(tmp_path, "pruning.calibration_images=10", "pruning.rounds=0", *overrides)
        return of_a_cut(KNOWN, given, data, *planned)

    assert cut("importance=l2") == Span(0, 0)
    assert cut("importance=redundancy", "pruning.compensation=none") == Span(20, 50)
    # Both frames of each image, and the images themselves.
    more = ("pruning.calibrate_on=both", "pruning.frames_an_image=2")
    assert cut("importance=redundancy", "pruning.compensation=none", *more) == Span(60, 150)
    # Three layers that can be cut alone, eight tries and the whole network, ten images, a bit more than half of it.
    measured, without = (
        cut("importance=logit_error"),
        cut("importance=logit_redundancy", "pruning.compensation=sequential"),
    )
    assert measured is not None
    assert without is not None
    assert measured.low - without.low == pytest.approx(3 * 9 * 10 * 0.35)
    longer = cut("importance=logit_error", "pruning.rounds=3")
    assert longer is not None
    assert longer.high > 5 * measured.high
    assert cut("importance=logit_error", "pruning.latency_cut=0.3") is None
    assert cut("importance=logit_error", "pruning.blocks=true") is None
    # Layers of 16, 32 and 64 filters, four frames of eight images for each filter.
    assert cut("importance=effect", "pruning.compensation=none") == Span(8 * 4 * 112, 2 * 8 * 4 * 112)


def test_a_step_of_photographs_sees_few_of_them() -> None:
    assert seen_in_a_step(1200, 32**2) == 1200
    assert seen_in_a_step(1200, 224**2) == 24
    assert seen_in_a_step(10, 224**2) == 10
    assert seen_in_a_step(10, 2000**2) == 1


def test_a_pruning_is_its_stages(data: DigitsData, planned: tuple[Plan, list[str]], tmp_path: Path) -> None:
    given = settings(tmp_path, "importance=l2", "pruning.macs_cut=0.25", "finetune.epochs=2")
    found = of_pruning(KNOWN, given, data, planned)
    assert list(found) == ["tags", "cut", "fine-tuning", "tests and report"]
    tuned, n_val = found["fine-tuning"], len(data.split("val"))
    # At best as much faster as it has fewer MACs.
    assert tuned == Span(0.75 * 2 * (96 * 3 + n_val * 1.5), 2 * (96 * 3 + n_val * 1.5))
    look = of_pruning(KNOWN, settings(tmp_path, "pruning=none"), data, None)
    assert list(look) == ["tags", "tests and report"]
    # The first of two processes draws the pictures of all images.
    explained = of_explaining(KNOWN, 3, 6, 512)
    # Each step tags anew, if the criterion reads tags.
    for criterion, times in (("snr", 5), ("l2", 1)):
        one, several = (
            of_pruning(KNOWN, settings(tmp_path, f"importance={criterion}", f"pruning.steps={n}"), data, planned)[
                "tags"
            ]
            for n in (1, 5)
        )
        assert one is not None
        assert several == one.times(1, times)
    assert explained["effects"] == Span(3 * 512, 3 * 512 * 2)
    assert explained["pictures"] == PICTURE.times(6)


def test_it_is_said_in_words_with_what_is_not_counted() -> None:
    assert str(Forecast({"tags": Span(10, 20), "cut": None, "report": Span(0.1, 0.2)})) == (
        "about 10 to 20 s, not counting the cut"
    )
    assert (
        str(Forecast({"a": Span(60, 90), "b": Span(240, 480)}))
        == "about 5 to 9.5 minutes (a 60 to 90 s, b 4 to 8 minutes)"
    )
    assert str(Forecast({"effects": Span(7, 7)}, at_most=True)) == "at most about 7 s"
    assert str(Forecast({"cut": None})) == str(Forecast()) == ""
    assert Forecast({"cut": None}).record() == {"cut": None, "total": None}


class Sleeper(nn.Module):
    """Takes four milliseconds an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 10)
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.004 * len(x))
        answer: Tensor = self.dropout(self.layer(x.mean((2, 3))))
        return answer


def test_a_pace_is_measured_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "BUDGET_S", 0.05)
    net, example = Sleeper().train(), torch.rand(8, 3, 4, 4)
    before, drawn = [p.clone() for p in net.parameters()], torch.get_rng_state()
    for found in (pace.of_forward(net, example), pace.of_training(net, example, Optimization(), 8)):
        # A machine that does other things as well sleeps longer, now and then where calls of few images are timed.
        assert 0.003 <= found.low < found.high
        assert found.low < 0.04
    assert net.training
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, net.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_pace_is_of_the_first_of_several_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "BUDGET_S", 0.05)

    class Pair(Sleeper):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return super().forward(x), None

    assert pace.of_training(Pair(), torch.rand(8, 3, 4, 4), Optimization(), 8).low > 0


def test_images_in_memory_cost_next_to_nothing_to_read(data: DigitsData) -> None:
    train, test = pace.of_reading(data)
    assert 0 <= train.high < 0.01
    assert 0 <= test.high < 0.01


def test_a_job_says_what_it_will_do_unless_it_is_quiet(
    data: DigitsData,
    planned: tuple[Plan, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace, "BUDGET_S", 0.02)
    net, example = build_model({"name": "resnet8"}).eval(), torch.rand(1, 3, 32, 32)
    given = settings(tmp_path, "pruning.macs_cut=0.4", "finetune.epochs=2")
    announce_pruning(given, net, data, example, planned, alone=True)
    network, said, expected = capsys.readouterr().out.splitlines()
    assert network.startswith("resnet8 (0.08 M parameters, 12 M MACs) on Digits: 96 images to train on, ")
    assert said == "cut 40 % of the MACs by logit_error, made up for in sequence; fine-tune 2 epochs"
    assert expected.startswith("about ")
    assert expected.endswith(" on cpu, 1 thread")
    written = json.loads((tmp_path / "forecast.json").read_text())
    assert set(written) == {"tags", "cut", "fine-tuning", "tests and report", "total"}
    assert 0 < written["total"][0] < written["total"][1]

    # What takes long is said how to do quicker.
    monkeypatch.setattr("freqprune.jobs.announce.LONG_S", 0.0)
    announce_pruning(given, net, data, example, planned, alone=True)
    quicker = (
        "for a quicker look: tagging=quick, fewer pruning.calibration_images, importance=l2, fewer finetune.epochs"
    )
    assert " ".join(capsys.readouterr().out.split()).endswith(quicker)

    # A script finds it in the folder.
    (tmp_path / "forecast.json").unlink()
    monkeypatch.setenv("FREQPRUNE_QUIET", "1")
    announce_pruning(given, net, data, example, planned, alone=True)
    assert capsys.readouterr().out == ""
    assert (tmp_path / "forecast.json").is_file()

    # Nothing is said of what several processes share.
    (tmp_path / "forecast.json").unlink()
    announce_pruning(given, net, data, example, planned, alone=False)
    assert not (tmp_path / "forecast.json").exists()


def test_small_images_and_a_training_from_scratch_are_announced(
    data: DigitsData,
    planned: tuple[Plan, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data, "progressive_resizing", ProgressiveResizing())
    given = settings(tmp_path, "pruning.macs_cut=0.5", "finetune.epochs=3", "finetune.from_scratch=true")
    trainer = pl.Trainer(max_epochs=9, max_steps=-1, accelerator="cpu", logger=False, enable_checkpointing=False)
    announce_training(given, build_model({"name": "resnet8"}), data, trainer, planned, done=2)
    said = " ".join(capsys.readouterr().out.split())
    assert "train 7 epochs after 2, on images of 16 x 16 at first, tagged" in said
    # Of those that are left all are whole.
    announce_training(given, build_model({"name": "resnet8"}), data, trainer, planned, done=8)
    assert "train 1 epoch after 8, tagged" in " ".join(capsys.readouterr().out.split())
    assert "made up for in sequence; train the same widths from scratch for 3 epochs" in said


def test_a_forecast_never_ends_a_job(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tags = Tags(None, "grid", 2, None, 4, 1, 64, None, "logit", "mean", 1.0, 0.0, None)
    net, pixels = build_model({"name": "resnet8"}), torch.rand(2, 3, 32, 32)
    announce_explaining(tmp_path, net, pixels, tags)
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "explain by grid, refined 1x, at most 64 forwards an image"
    assert said[2].startswith("at most about ")

    def broken(*_: object) -> Span:
        raise RuntimeError("no memory")

    monkeypatch.setattr(pace, "of_forward", broken)
    announce_explaining(tmp_path, net, pixels, tags)
    assert len(capsys.readouterr().out.splitlines()) == 2
    # Nor are those of an earlier job in the folder this one's.
    assert not (tmp_path / "forecast.json").exists()
    assert "how long this takes cannot be said (RuntimeError: no memory)" in caplog.text


def test_classes_are_tagged_without_noise_and_no_more_than_there_are(data: DigitsData, tmp_path: Path) -> None:
    alone, by_class = (
        of_pruning(
            KNOWN, settings(tmp_path, "pruning=none", "tagging.n_images=2", f"tagging.per_class={how}"), data, None
        )
        for how in ("false", "true")
    )
    counts = data.split("val").labels.bincount()
    n_clean, n_all = 49, 49 + 240
    share = n_clean * int(counts.clamp(max=2).sum()) / (n_all * 2)
    assert alone["tags"] is not None
    assert by_class["tags"] is not None
    assert by_class["tags"].low == pytest.approx(alone["tags"].low * (1 + share))
