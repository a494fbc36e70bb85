"""The training from a composed configuration, small: what it writes and what it refuses."""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from freqprune.errors import InputError
from freqprune.jobs import assembly
from freqprune.jobs.assembly import model_config
from freqprune.jobs.prune import _network_to_prune
from freqprune.jobs.settings import read
from freqprune.jobs.train import _tagging, train
from freqprune.networks.checkpoint import load_network
from freqprune.networks.registry import build_model, register_model
from freqprune.reports.record import OF_A_TRAINING
from freqprune.reports.tables import training_history
from freqprune.training.classifier import Classifier
from tests.jobs.small import READOUT, check_page, config


def test_train_writes_what_it_says(trained: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = trained
    assert json.loads((out / "training.json").read_text()) == metrics
    assert set(metrics) == {"val_accuracy", "test_accuracy", "epochs", "seconds"}
    assert metrics["epochs"] == 1
    expected = json.loads((out / "forecast.json").read_text())
    assert {"training", "tags", "total"} <= expected.keys()
    assert {"best.ckpt", "last.ckpt"} <= {path.name for path in (out / "checkpoints").iterdir()}
    stored = load_network(out / "checkpoints" / "last.ckpt")
    assert stored.classes == [str(digit) for digit in range(10)]
    assert stored.image_size == [32, 32]
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = {key for row in rows for key, value in row.items() if value}
    assert {"train/loss", "val/accuracy", "important/layer1.0.conv1", "tagging/share"} <= logged
    with (out / "importance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(
        m.out_channels for m in build_model({"name": "resnet8"}).modules() if isinstance(m, torch.nn.Conv2d)
    )
    # As the settings judge, which the callback alone would not.
    above = [float(row["snr_f1"]) + float(row["snr_f2"]) > 2 * 10 for row in rows]
    assert [row["important"] == "1" for row in rows] == above
    assert 0 < sum(above) < len(above)
    assert {path.name for path in (out / "figures").iterdir()} == {
        "important_last_epoch.png",
        "important_over_epochs.png",
        "training_curves.png",
    }
    check_page(out)


@pytest.mark.slow
def test_resume_continues_to_the_last_epoch(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    last = trained[0] / "checkpoints" / "last.ckpt"
    metrics, _ = train(config("train", tmp_path, f"ckpt_path={last}", "trainer.max_epochs=2", "logger=jsonl"))
    assert metrics["epochs"] == 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (found,) = (line["val/accuracy"] for line in lines if "val/accuracy" in line)
    assert found == pytest.approx(metrics["val_accuracy"])
    assert {line["epoch"] for line in lines} >= {1}
    # The report draws from the table.
    assert (tmp_path / "figures" / "training_curves.png").is_file()


def test_a_network_that_has_learned_nothing_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config("train", tmp_path, "tagging.every_n_epochs=0", "optimizer.lr=1e-9"))
    assert "hardly better than chance (10.0 % of 10 classes)" in caplog.text
    caplog.clear()
    monkeypatch.setattr("freqprune.jobs.trainers.tested", lambda *args: {"test_accuracy": 0.9})
    train(config("train", tmp_path / "other", "tagging.every_n_epochs=0"))
    assert "chance" not in caplog.text


TERMS = ["integration", *(pytest.param(term, marks=pytest.mark.slow) for term in ("balance", "silence"))]


@pytest.mark.parametrize("term", TERMS)
def test_trains_with_a_loss_from_the_tags(
    term: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    more = [f"tag_loss={term}", "tag_loss.every_n_steps=1", "trainer.max_epochs=2"]
    metrics, made = train(config("train", tmp_path, *more))
    assert metrics["epochs"] == 2
    assert f"{term} from the tags in the loss" in " ".join(capsys.readouterr().out.split())
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = [float(row[f"tag_loss/{term}"]) for row in rows if row.get(f"tag_loss/{term}")]
    assert len(values) == 2
    assert all(0 < value < 1 for value in values)
    assert made["classifier"].tag_loss.mean == list(made["data"].mean)
    assert (
        "the tags of the loss add 49 images to every step of 32 on the average: tag_loss.every_n_steps=8" in caplog.text
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tagging.tag_freqs=[6.0,7.3]"], "7.3 Hz is not on a bin"),
        (["tagging.tag_freqs=[6.0,61.0]"], "Nyquist"),
        (["tagging.tag_freqs=[6.0,6.0]"], "also the frequency of part 1"),
        (["tagging.tag_freqs=fast"], "tagging.tag_freqs must be a list"),
        (["tagging.n_images=2.5"], "tagging.n_images must be a whole number, got 2.5"),
        (["pruning=filters", "pruning.ratio=half"], "pruning.ratio must be a number or null, got 'half'"),
        (["pruning=filters", "pruning.bn_when=before"], "pruning.bn_when must be one of auto, after, got 'before'"),
        (["compile=maybe"], "compile must be true or false or reduce-overhead or max-autotune, got 'maybe'"),
        (["+tagging.n_image=3"], "tagging.n_image is not a setting; did you mean"),
        (["+finetune.lrs=3"], "finetune.lrs is not a setting; did you mean finetune.lr"),
        (["resume=5"], "resume = 5 goes on with pruning"),
        (["imports=foo"], r"imports must be a list"),
        (["~tagging.n_images"], "tagging.n_images is not set; give tagging.n_images=VALUE"),
        (["~optimizer.lr"], "optimizer.lr is not set"),
        (["~logger"], "logger is not set"),
        (["importance.components=abc"], "importance.components: "),
        (["tagging.where=relu"], "tagging.where must be one of"),
        (["tagging.average=max"], "tagging.average must be one of"),
        (["tagging.n_images=0"], "tagging.n_images must be at least 1"),
        (["tagging.noise_std=2"], "tagging.noise_std must lie"),
        (["importance.criterion=loudness"], "importance.criterion must be one of"),
        (["importance.components=f7"], "got 'f7'"),
        (["importance.alpha=0"], "importance.alpha"),
        (
            ["importance.important_by=threshold", "importance.threshold=0"],
            "importance.threshold must be a positive SNR",
        ),
        (["+trainers.max_epochs=3"], "trainers is not a setting; did you mean trainer"),
        (["pruning=filters", "pruning.ratio=1.0"], "pruning.ratio must lie between"),
        (["pruning=filters", "pruning.ratio=0.5", "pruning.threshold=3"], "set exactly one"),
        (["finetune.epochs=-1"], "finetune.epochs must be at least 0"),
        (["finetune.lr=0"], "finetune.lr must be above 0"),
        (["optimizer.lr=0"], "optimizer.lr must be above 0"),
        (["optimizer.name=AdamV"], r"optimizer.name must be one of torch.optim's .*; did you mean Adam"),
        (["optimizer.arguments=5"], r"optimizer.arguments must be a mapping \({...}\) or null, got 5"),
        (["optimizer.class_weights=[1,2]"], "class_weights must hold 10 numbers"),
        (["tag_loss.silence=much"], r"tag_loss.silence must be a number or a mapping \({...}\), got 'much'"),
        (["tag_loss.every_n_steps=0"], "tag_loss.every_n_steps must be at least 1"),
        (["tag_loss.balance={layer9.*: 1}"], "layer pattern 'layer9.*' matches none of"),
        (["+tag_loss.loudness=1"], "tag_loss.loudness is not a setting"),
        (["data.transforms=[TrivialAugment]"], "no transform 'TrivialAugment'; did you mean TrivialAugmentWide"),
        (["data.transforms=[{name:RandomErasing,q:1}]"], "RandomErasing does not take"),
        (["matmul_precision=low"], "matmul_precision must be"),
        (["seed=-1"], "seed must be at least 0"),
        (["seed=20260101123000"], r"seed must be below 2\*\*32 = 4294967296, got 20260101123000"),
        (["model.name=resnet33"], "model.name must be one of"),
        (["model.num_classes=7"], "the data have 10 classes"),
        (["data.val_fraction=2"], "val_fraction must lie"),
        (["ckpt_path=none.ckpt"], "none.ckpt does not exist"),
        (["ckpt=x.ckpt"], "to resume training use ckpt_path=x.ckpt"),
        (["pruning=filters", "pruning.layers='layer9*'"], "matches none of"),
        (["tagging.gap=40"], "leaves the part 'left'"),
        (["tagging.layers='block*'"], "matches none of"),
        (["data=image_folder", "data.root=nowhere"], "nowhere is not a folder"),
        (["model=auto", "model.name=torchvision/alexnet"], "AlexNet does not run on images of 3 x 32 x 32"),
    ],
)
def test_train_refuses_before_any_work(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(config("train", tmp_path, *overrides))
    assert not (tmp_path / "checkpoints").exists()


def test_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        train(config("train", tmp_path / "file" / "out"))


def test_training_checkpoint_of_another_network_does_not_resume(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    last = trained[0] / "checkpoints" / "last.ckpt"
    with pytest.raises(InputError, match=r"with name = resnet8, but model.name = resnet14"):
        train(config("train", tmp_path, "model=resnet14", f"ckpt_path={last}"))


def test_training_checkpoint_of_something_else_does_not_resume(tmp_path: Path) -> None:
    torch.save(build_model({"name": "resnet8"}).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="is no training checkpoint"):
        train(config("train", tmp_path, f"ckpt_path={tmp_path / 'w.pt'}"))


def test_a_training_with_no_epoch_left_is_what_it_was(tmp_path: Path) -> None:
    common = ("optimizer.ema=0.9", "optimizer.lr=0.05")
    metrics, objects = train(config("train", tmp_path / "a", *common, "+trainer.check_val_every_n_epoch=2"))
    # Nobody has validated on the way.
    assert math.isfinite(metrics["val_accuracy"])
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    # Elsewhere, where no epoch is tagged.
    again, resumed = train(config("train", tmp_path / "b", *common, f"ckpt_path={last}"))
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0, "epochs_here": 0}
    assert "trained for 1 epoch, none of them now in" in (tmp_path / "b" / "report.html").read_text()
    # The average, not what it is the average of.
    torch.testing.assert_close(resumed["classifier"].state_dict(), objects["classifier"].state_dict())
    assert (tmp_path / "b" / "report.html").is_file()
    with pytest.raises(InputError, match=r"has 1 epochs behind it, trainer\.max_epochs = 0 asks for fewer in all"):
        train(config("train", tmp_path / "c", *common, f"ckpt_path={last}", "trainer.max_epochs=0"))


def test_validation_accuracy_is_of_the_last_epoch(tmp_path: Path) -> None:
    """Validated after every second of three epochs."""
    metrics, objects = train(
        config("train", tmp_path, "+trainer.check_val_every_n_epoch=2", "trainer.max_epochs=3", "data.limit_train=300")
    )
    images = objects["data"].split("val")
    with torch.no_grad():
        answers = objects["classifier"].net.eval()(objects["data"].normalize(images.pixels.float() / 255)).argmax(1)
    assert metrics["val_accuracy"] == pytest.approx(float((answers == images.labels).float().mean()), abs=1e-6)
    with (tmp_path / "metrics.csv").open() as file:
        logged = [(row["epoch"], float(row["val/accuracy"])) for row in csv.DictReader(file) if row["val/accuracy"]]
    assert logged[0][0] == "1"
    # The point of the last epoch is drawn at it.
    assert [epoch for epoch, _ in training_history(tmp_path / "metrics.csv")["val/accuracy"]] == [1, 2]
    assert logged[0][1] != pytest.approx(metrics["val_accuracy"], abs=1e-3)


def test_training_refuses_what_only_pruning_reads(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pretrained=true names a network that is trained already"):
        train(config("train", tmp_path, "pretrained=true"))
    with pytest.raises(InputError, match=r"needs the dense network: use prune.py with ckpt=x/checkpoints/last\.ckpt"):
        train(config("train", tmp_path, "resume=x"))


def test_the_network_trained_by_default_is_no_setting_of_a_network(tmp_path: Path) -> None:
    cfg = config("train", tmp_path, "model=auto", "model.name=torchvision/resnet18")
    assert model_config(read(cfg).model)["name"] == "torchvision/resnet18"
    assert "fallback" not in model_config(read(cfg).model)
    torch.save(build_model({"name": "torchvision/resnet18", "num_classes": 10}).state_dict(), tmp_path / "w.pt")
    cfg = config(
        "prune",
        tmp_path,
        "model=auto",
        "model.name=torchvision/resnet18",
        "+model.num_classes=10",
        f"ckpt={tmp_path / 'w.pt'}",
    )
    assert "fallback" not in _network_to_prune(read(cfg)).net.config


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_new_training_leaves_no_checkpoints_of_an_earlier_one(
    goes_on: bool, trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is killed before its first epoch is complete would go on from them; one that goes on needs them."""
    names = {"best.ckpt", "last.ckpt"}
    (tmp_path / "checkpoints").mkdir()
    for name in names:
        shutil.copy(trained[0] / "checkpoints" / name, tmp_path / "checkpoints")
    for name in OF_A_TRAINING:
        (tmp_path / name).write_text("")
    monkeypatch.setattr(Classifier, "training_step", killed)
    more = [f"ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}"] if goes_on else []
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(config("train", tmp_path, "trainer.max_epochs=2", *more))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == (names if goes_on else set())
    left = {name for name in OF_A_TRAINING if (tmp_path / name).is_file()} - {"metrics.csv", "metrics.jsonl"}
    assert left == ({"importance.csv", "importance.json"} if goes_on else set())


def test_what_the_trainer_refuses_leaves_what_was_there(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Another optimizer's state, or a training without an end, shows only as Lightning sets the training up."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    for name in ("metrics.json", "report.html"):
        (tmp_path / name).write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    ckpt = f"ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}"
    for more, said in (
        ((ckpt, "trainer.max_epochs=2", "optimizer.decay_norms=false"), "cannot go on with that state"),
        (("trainer.max_epochs=-1",), "follows the length of the training"),
    ):
        with pytest.raises(InputError, match=said):
            train(config("train", tmp_path, *more))
        now = {path: path.read_bytes() for path in tmp_path.glob("*.json") if path.name != "forecast.json"}
        assert now == {path: content for path, content in before.items() if path.name != "forecast.json"}
        assert (tmp_path / "report.html").is_file()
        assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_training_that_goes_on_leaves_no_cut_of_the_network_as_it_was(
    epochs: int, trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    names = {"metrics.json", "filters.csv", "pruned.ckpt", "training.json"}
    for name in names:
        (tmp_path / name).write_text("{}")
    of_the_cut = (tmp_path / "run.json").write_text('{"settings": {"of": "the cut"}}')
    monkeypatch.setattr(Classifier, "training_step", killed)
    # With no epoch left it is the test that comes next.
    monkeypatch.setattr("freqprune.jobs.train._tested", killed)
    ckpt = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(config("train", tmp_path, f"trainer.max_epochs={epochs}", f"ckpt_path={ckpt}"))
    left = {name for name in names if (tmp_path / name).is_file()}
    assert left == ({"pruned.ckpt"} if epochs == 2 else names)
    # Of a cut that stays the record does, too.
    assert ((tmp_path / "run.json").stat().st_size == of_the_cut) == (epochs == 1)
    assert (tmp_path / "importance.csv").is_file()


@pytest.mark.parametrize("cut", [False, True])
def test_a_training_with_no_step_left_is_what_it_was(
    cut: bool, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Also where its end is one in steps, after which Lightning does not count the epoch."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    last = tmp_path / "checkpoints" / "last.ckpt"
    steps = torch.load(last, weights_only=True)["global_step"]
    if cut:
        (tmp_path / "metrics.json").write_text('{"finished": true}')
    kept = ["metrics.json", "training.json", "explore.html", "report.html"] if cut else []
    before = {name: (tmp_path / name).read_bytes() for name in kept}
    rows = training_history(tmp_path / "metrics.csv")
    given = ("trainer.max_epochs=5", f"+trainer.max_steps={steps}", f"ckpt_path={last}")
    metrics, _ = train(config("train", tmp_path, *given))
    assert (metrics["epochs"], metrics["epochs_here"]) == (1, 0)
    assert {name: (tmp_path / name).read_bytes() for name in kept} == before
    now = training_history(tmp_path / "metrics.csv")
    assert now["train/loss"] == rows["train/loss"]
    assert now["val/loss"][0] == rows["val/loss"][0]


class Stubborn(torch.nn.Module):
    """A thousand classes, whatever is asked for, and a choice that no exporter follows."""

    def __init__(self, num_classes: int = 1000, heeds: bool = False) -> None:
        super().__init__()
        self.conv, self.linear = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, num_classes if heeds else 1000)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.linear(self.conv(x).relu().mean((2, 3)))
        return x if x.mean() > 0 else x * 2


def test_what_no_training_would_make_good_is_refused_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_model("stubborn", Stubborn)
    monkeypatch.setattr(Classifier, "training_step", killed)
    given = ("model=auto", "model.name=stubborn", "importance=l2", "pruning.compensation=none")
    with pytest.raises(InputError, match=r"answers for 1000 classes, the data have 10: .*num_classes=10"):
        train(config("train", tmp_path, *given))
    with pytest.raises(InputError, match=r"export\.onnx = true cannot take this network"):
        train(config("prune", tmp_path, *given, "+model.heeds=true", "export.onnx=true"))


def test_checkpoints_of_an_earlier_start_are_not_removed(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr("freqprune.jobs.train.named_by_launcher", lambda folder: folder == tmp_path)
    with pytest.raises(InputError, match="holds the checkpoints of an earlier start: go on with ckpt_path="):
        train(config("train", tmp_path))
    (tmp_path / "pruned.ckpt").touch()
    (tmp_path / "metrics.json").write_text('{"pruned": {}}')
    # The criterion of prune.py is another.
    with pytest.raises(InputError, match=r"prune\.py with the same settings and resume=.* ckpt=.* importance.*=snr"):
        train(config("train", tmp_path, "pruning=filters", "pruning.macs_cut=0.5"))
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_a_training_follows_its_seed(tmp_path: Path) -> None:
    settings = read(config("train", tmp_path, "seed=3"))
    assembly.seed(settings.common)
    assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(3)))
    assert np.array_equal(np.random.rand(4), np.random.RandomState(3).rand(4))
    data = assembly.load_data(assembly.data_settings(settings))
    assert _tagging(settings, data).tag_settings["seed"] == 3


def test_further_arguments_of_an_optimizer_are_given_like_any_setting(tmp_path: Path) -> None:
    given = ["optimizer.name=AdamW", "optimizer.arguments={betas: [0.8, 0.9]}"]
    optimizer = read(config("train", tmp_path, *given)).optimizer.optimizer(torch.nn.Linear(2, 2))
    assert list(optimizer.param_groups[0]["betas"]) == [0.8, 0.9]
    # And of what a section holds already, with a plus, as before.
    plus = read(config("train", tmp_path, given[0], "+optimizer.arguments.betas=[0.8,0.9]"))
    assert plus.optimizer.further == {"betas": [0.8, 0.9]}


def test_every_setting_of_the_tags_reaches_the_callback(tmp_path: Path) -> None:
    settings = read(config("train", tmp_path, "seed=5", *(f"tagging.{key}={value}" for key, value in READOUT.items())))
    assert _tagging(settings, assembly.load_data(assembly.data_settings(settings))).tag_settings == {
        **READOUT,
        "seed": 5,
    }


def test_the_loss_from_the_tags_shows_the_tags_that_are_set(tmp_path: Path) -> None:
    settings = read(config("train", tmp_path, "tag_loss=silence", "tagging.tag_freqs=[4.0,10.0]"))
    assert list(settings.tag_loss.stimulus.tag_freqs) == [4.0, 10.0]
