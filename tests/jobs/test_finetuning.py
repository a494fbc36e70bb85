"""Fine-tuning of a cut network, and training of its widths from scratch."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import nn

from freqprune import load_pruned
from freqprune.errors import InputError
from freqprune.jobs import assembly, trainers
from freqprune.jobs.config import check_pruning
from freqprune.jobs.finetuning import check_finetuning, finetune
from freqprune.jobs.prune import prune
from freqprune.jobs.resuming import _SAME, begin_anew, check_same_cut, forget_files, interrupted, undeployed
from freqprune.jobs.settings import read
from freqprune.jobs.train import train
from freqprune.networks.blocks import Shortcut
from freqprune.networks.checkpoint import epochs_done, load_network
from freqprune.networks.exports import Exports
from freqprune.networks.registry import build_model, register_model
from freqprune.pruning import AMOUNTS
from freqprune.training.classifier import Classifier
from tests.jobs.small import config
from tests.shaken import shaken


@pytest.mark.parametrize("blocks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_same_widths_are_trained_from_scratch(
    blocks: bool, trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    # A rate at which no weight moves: what was drawn is what is left.
    still = ("finetune.from_scratch=true", "finetune.epochs=1", "finetune.lr=1e-20", "finetune.momentum=0.9")
    more = ("importance=logit_error", "pruning.blocks=true", "pruning.macs_cut=0.6", "pruning.measured_images=16")
    cut = more if blocks else ("importance=l2", "pruning.ratio=0.5")
    metrics, objects = prune(config("prune", tmp_path, f"ckpt={ckpt}", *cut, *still))
    assert "from_scratch" in metrics
    assert "finetuned" not in metrics
    assert ("dropped_blocks" in metrics) is blocks
    assert "trained from scratch for 1 epoch" in (tmp_path / "report.html").read_text()
    dense, net = load_network(ckpt).net.state_dict(), objects["net"]
    kept = objects["kept"]["layer3.0.conv1"] if "layer3.0.conv1" in objects["kept"] else slice(None)
    drawn, cut_out = net.get_submodule("layer3.0.conv1").weight, dense["layer3.0.conv1.weight"][kept]
    assert drawn.shape == cut_out.shape
    assert torch.corrcoef(torch.stack([drawn.flatten(), cut_out.flatten()]))[0, 1].abs() < 0.1
    assert torch.equal(net.bn1.weight, torch.ones(16))
    # As a training of this network would begin: drawn by the seed, in the network's own way.
    assert drawn.std().item() == pytest.approx((2 / (9 * drawn.shape[1])) ** 0.5, rel=0.05)
    # The same training is not repeated, and another one needs a run of its own.
    monkeypatch.setattr("freqprune.jobs.stages.finetune", None)
    common = ("prune", tmp_path / "again", f"ckpt={ckpt}", *cut, *still, f"resume={tmp_path}")
    assert prune(config(*common))[0]["from_scratch"] == metrics["from_scratch"]
    with pytest.raises(InputError, match=r"is a run with finetune\.from_scratch=true; go on with that"):
        prune(config(*common, "finetune.from_scratch=false"))
    torch.testing.assert_close(load_pruned(tmp_path / "pruned.ckpt").state_dict(), net.state_dict())


class Own(nn.Module):
    """A network with a parameter that nobody can draw anew, for images of one size."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.net = build_model({"name": "resnet8", "num_classes": num_classes})

    def forward(self, images: torch.Tensor) -> Any:
        assert images.shape[-1] == 32, "another size"
        return self.net(images) * self.scale


@pytest.mark.parametrize(
    ("job", "settings", "said"),
    [
        ("train", ["pruning=filters", "finetune.from_scratch=true"], "has weights but no reset_parameters"),
        (
            "train",
            ["data.progressive_resizing={}", "trainer.max_epochs=3"],
            r"(?s)has images of 16 x 16 on the way: Own does not run .*initial_scale",
        ),
        ("prune", ["pretrained=true", "finetune.from_scratch=true", "finetune.epochs=0"], r"finetune\.epochs, got 0"),
        ("prune", ["pretrained=true", "finetune.from_scratch=true", "pruning=none"], "pruning=none cuts nothing"),
        (
            "train",
            ["pruning=filters", "finetune.class_weights=[1,2]", "optimizer.class_weights=null", "model.name=resnet8"],
            r"finetune\.class_weights must hold 10 numbers, one a class, got 2",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_training(
    job: str, settings: list[str], said: str, tmp_path: Path
) -> None:
    register_model("own32", Own)
    with pytest.raises(InputError, match=said):
        {"train": train, "prune": prune}[job](config(job, tmp_path, "model=auto", "model.name=own32", *settings))
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "metrics.json").exists()
    assert not (tmp_path / "filters.csv").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["finetune.class_weights=[1,2]"], r"finetune\.class_weights must hold 10 numbers, one a class, got 2"),
        (
            ["finetune.from_scratch=true", "data.progressive_resizing={}", "+trainer.max_steps=5"],
            r"leave trainer\.max_steps alone",
        ),
    ],
)
def test_what_fine_tuning_refuses_is_refused_before_the_cut(
    settings: list[str], said: str, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    with pytest.raises(InputError, match=said):
        prune(config("prune", tmp_path, f"ckpt={ckpt}", *settings))
    assert not (tmp_path / "metrics.json").exists()
    assert not (tmp_path / "filters.csv").exists()


def test_weights_that_cannot_be_drawn_anew_are_refused_at_the_start(tmp_path: Path) -> None:
    cfg = config("prune", tmp_path, "importance=l2", "finetune.from_scratch=true", "model=auto")
    with pytest.raises(
        InputError, match=r"finetune\.from_scratch cannot .* \(Own\) has weights but no reset_parameters"
    ):
        prune(cfg, Own())
    assert not (tmp_path / "pruned.ckpt").exists()


@pytest.mark.slow
def test_blocks_go_and_the_rest_is_fine_tuned(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    more = ("importance=logit_error", "pruning.blocks=true", "pruning.macs_cut=0.6", "pruning.rounds=0",
            "pruning.calibration_images=32", "pruning.measured_images=16", "finetune.epochs=1")  # fmt: skip
    metrics, objects = prune(config("prune", tmp_path / "a", f"ckpt={ckpt}", *more))
    assert 0.6 <= 1 - metrics["pruned"]["macs"] / metrics["dense"]["macs"] < 0.9
    gone = metrics["dropped_blocks"]
    assert gone
    assert not any(name.startswith(f"{block}.") for name in metrics["kept"] for block in gone)
    net = load_pruned(tmp_path / "a" / "pruned.ckpt")
    assert all(isinstance(net.get_submodule(block), Shortcut) for block in gone)
    torch.testing.assert_close(net.state_dict(), objects["net"].state_dict())
    # What is left can be pruned on.
    again, _ = prune(
        config("prune", tmp_path / "b", f"ckpt={tmp_path / 'a' / 'pruned.ckpt'}", "importance=l2", "pruning.ratio=0.2")
    )
    assert again["dense"]["macs"] == metrics["pruned"]["macs"]
    assert isinstance(load_pruned(tmp_path / "b" / "pruned.ckpt").get_submodule(gone[0]), Shortcut)


class Bomb(pl.Callback):
    """Ends a fine-tuning as a killed process would, after its first epoch, or after so many."""

    def __init__(self, after: int = 1) -> None:
        self.after = after

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.after:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*received KeyboardInterrupt.*")
def test_interrupted_fine_tuning_goes_on_to_the_same_result(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (
        f"ckpt={trained[0] / 'checkpoints' / 'last.ckpt'}",
        "pruning.ratio=0.5",
        "finetune.epochs=3",
        "finetune.distill=0.3",
    )
    metrics, whole = prune(config("prune", tmp_path / "whole", *common))
    for after, folder, resume in ((1, "cut", []), (1, "same", [f"resume={tmp_path / 'cut'}"]),
                                  (2, "later", [f"resume={tmp_path / 'same'}"])):  # fmt: skip
        bomb = f"+callbacks.bomb={{_target_: tests.jobs.test_finetuning.Bomb, after: {after}}}"
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            prune(config("prune", tmp_path / folder, *common, *resume, bomb))
        last = tmp_path / folder / "finetune" / "checkpoints" / "last.ckpt"
        assert epochs_done(last) == after
    again, resumed = prune(config("prune", tmp_path / "again", *common, f"resume={tmp_path / 'later'}"))
    with (tmp_path / "again" / "finetune" / "metrics.csv").open() as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"0", "1", "2"}
    for name, value in whole["net"].state_dict().items():
        assert torch.equal(resumed["net"].state_dict()[name], value), name
    assert again["finetuned"] == metrics["finetuned"]
    assert (
        load_network(tmp_path / "again" / "pruned.ckpt").kept == load_network(tmp_path / "whole" / "pruned.ckpt").kept
    )
    complete, _ = prune(config("prune", tmp_path / "more", *common, f"resume={tmp_path / 'whole'}"))
    assert complete == metrics
    # Times are not measured again: the table says where they were.
    kept = tmp_path / "whole" / "metrics.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "timed_on": "cuda"}))
    capsys.readouterr()
    prune(config("prune", tmp_path / "elsewhere", *common, f"resume={tmp_path / 'whole'}"))
    assert "forwards on cuda, networks in turn" in " ".join(capsys.readouterr().out.split())
    assert load_network(tmp_path / "more" / "pruned.ckpt").kept == load_network(tmp_path / "whole" / "pruned.ckpt").kept
    for setting, said in (
        ("seed=1", "was cut with seed = 0, and this command says 1"),
        ("importance=l2", r"was cut with importance\.criterion = logit_error, and this command says l2"),
        ("finetune.epochs=2", r"has 3 epochs of its training behind it, finetune\.epochs = 2"),
    ):
        with pytest.raises(InputError, match=said):
            prune(config("prune", tmp_path / "other", *common, f"resume={tmp_path / 'whole'}", setting))
    with pytest.raises(InputError, match=r"holds no pruned.ckpt and metrics.json"):
        prune(config("prune", tmp_path / "none", *common, f"resume={tmp_path}"))
    longer, _ = prune(
        config("prune", tmp_path / "longer", *common, f"resume={tmp_path / 'whole'}", "finetune.epochs=4")
    )
    with (tmp_path / "longer" / "finetune" / "metrics.csv").open() as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"0", "1", "2", "3"}
    assert epochs_done(tmp_path / "longer" / "finetune" / "checkpoints" / "last.ckpt") == 4
    assert longer["finished"]
    assert "fine-tuned for 4 epochs" in (tmp_path / "longer" / "report.html").read_text()


@pytest.mark.slow
def test_every_live_parameter_is_fine_tuned(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    seen: list[set[int]] = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(
                {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
                ^ {id(p) for p in pl_module.net.parameters()}
            )

    Watch.__module__, Watch.__qualname__ = __name__, "Watch"
    globals()["Watch"] = Watch
    ckpt = trained[0] / "checkpoints" / "last.ckpt"
    prune(
        config(
            "prune",
            tmp_path,
            f"ckpt={ckpt}",
            "pruning.ratio=0.5",
            "+callbacks.watch={_target_: tests.jobs.test_finetuning.Watch}",
        )
    )
    assert seen == [set()]


def test_a_run_goes_on_from_nothing_of_an_earlier_one_in_its_folder(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = f"ckpt={trained[0] / 'checkpoints' / 'last.ckpt'}"
    same = ("pruning.ratio=0.5", "pruning.scope=layer", "latency.batch_sizes=[1]")
    prune(config("prune", tmp_path, ckpt, "importance=l2", *same))
    assert (tmp_path / "figures" / "kept_per_layer.png").is_file()

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("freqprune.jobs.trainers.fit", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(config("prune", tmp_path, ckpt, "importance=random", *same))
    resumed = prune(config("prune", tmp_path, ckpt, "importance=random", *same, f"resume={tmp_path}"))[1]["net"]
    whole = prune(config("prune", tmp_path / "whole", ckpt, "importance=random", *same))[1]["net"]
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict())
    prune(config("prune", tmp_path, ckpt, "pruning=none"))
    assert not (tmp_path / "figures" / "kept_per_layer.png").exists()


def test_a_new_run_leaves_what_is_not_of_an_earlier_one(tmp_path: Path) -> None:
    files = {
        name: tmp_path / name / "checkpoints" / "last.ckpt"
        for name in ("finetune", "from_scratch", "step1", "step_lr_study", "checkpoints")
    }
    of_a_cut = [tmp_path / name for name in ("pruned.ckpt", "model.onnx", "model.int8.onnx", "model.pt2")]
    for file in (*files.values(), *of_a_cut):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    for logged in ("hparams.yaml", "metrics.csv", "metrics.jsonl"):
        (tmp_path / "from_scratch" / logged).write_text("")
    begin_anew(tmp_path)
    assert not (tmp_path / "from_scratch").exists()
    assert {name for name, file in files.items() if file.is_file()} == {"step_lr_study", "checkpoints"}
    assert not any(file.exists() for file in of_a_cut)


@pytest.mark.parametrize("where", ["pruned.ckpt", "finetune/checkpoints/last.ckpt", "step2/checkpoints/last.ckpt"])
def test_the_network_to_prune_is_not_written_over(where: str, tmp_path: Path) -> None:
    ckpt = tmp_path / where
    ckpt.parent.mkdir(parents=True, exist_ok=True)
    ckpt.write_text("of value")
    with pytest.raises(InputError, match=r"lies where this run writes its own network; choose another folder"):
        prune(config("prune", tmp_path, f"ckpt={ckpt}"))
    with pytest.raises(InputError, match=r"lies where this run writes its own network; choose another folder"):
        prune(config("prune", tmp_path, f"ckpt={ckpt}", f"resume={tmp_path}"))
    assert ckpt.read_text() == "of value"
    # A look writes no network.
    check_pruning(config("prune", tmp_path, f"ckpt={ckpt}", "pruning=none"))


def test_a_default_that_was_not_used_is_not_compared(tmp_path: Path) -> None:
    def ran(*settings: str) -> None:
        content = OmegaConf.to_container(config("prune", tmp_path, *settings), resolve=True)
        (tmp_path / "run.json").write_text(json.dumps({"settings": content}))

    other = config("prune", tmp_path, "pruning.macs_cut=0.3", "pruning.default_macs_cut=0.4")
    ran("pruning.macs_cut=0.3")
    check_same_cut(other, tmp_path)
    ran()
    with pytest.raises(InputError, match=r"was cut with pruning\.default_macs_cut = 0\.5, and this command says 0\.4"):
        check_same_cut(config("prune", tmp_path, "pruning.default_macs_cut=0.4"), tmp_path)


@pytest.mark.parametrize("other", ["pruning.compensation=none", "importance.scope=layer", "pruning.streams=true"])
def test_a_run_that_was_cut_in_another_way_is_not_gone_on_with(other: str, tmp_path: Path) -> None:
    content = OmegaConf.to_container(config("prune", tmp_path, "importance=logit_error"), resolve=True)
    (tmp_path / "run.json").write_text(json.dumps({"settings": content}))
    check_same_cut(config("prune", tmp_path, "importance=logit_error"), tmp_path)
    # A record of a time without such a setting says nothing against it.
    group, name = other.split("=")[0].split(".")
    older = {**content, group: {key: value for key, value in content[group].items() if key != name}}
    (tmp_path / "run.json").write_text(json.dumps({"settings": older}))
    check_same_cut(config("prune", tmp_path, "importance=logit_error"), tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"settings": content}))
    with pytest.raises(InputError, match=f"was cut with {re.escape(other.split('=')[0])} = "):
        check_same_cut(config("prune", tmp_path, "importance=logit_error", other), tmp_path)


def test_an_average_that_could_not_be_made_is_refused_before_the_cut(tmp_path: Path) -> None:
    settings = read(config("prune", tmp_path, "importance=l2", "trainer.precision=bf16-true", "finetune.ema=0.9"))
    with pytest.raises(InputError, match="averages weights in float32"):
        check_finetuning(settings, assembly.load_data(assembly.data_settings(settings)))


# Of each setting that says what was cut: what a run had, and what a command says instead.
OTHERS = {
    **{f"pruning.{name}": ("0.3", "0.4") for name in AMOUNTS},
    "seed": ("0", "1"),
    "importance.criterion": ("l2", "l1"),
    "importance.scope": ("layer", "global"),
    **{
        f"pruning.{name}": values
        for name, values in {
            "scope": ("layer", "global"), "compensation": ("none", "mean"), "normalize": ("false", "true"),
            "min_filters": ("1", "2"), "multiple_of": ("1", "8"), "layers": ("null", "layer1*"),
            "exclude": ("null", "layer1*"), "blocks": ("false", "true"), "streams": ("false", "true"),
            "steps": ("1", "2"), "step_epochs": ("0", "1"),
        }.items()
    },
}  # fmt: skip


def test_every_setting_that_says_what_was_cut_is_compared(tmp_path: Path) -> None:
    assert set(OTHERS) == set(_SAME)
    for name, (was, says) in OTHERS.items():
        base = [] if name in (f"pruning.{one}" for one in AMOUNTS) else ["pruning.macs_cut=0.3"]
        content = OmegaConf.to_container(config("prune", tmp_path, *base, f"{name}={was}"), resolve=True)
        (tmp_path / "run.json").write_text(json.dumps({"settings": content}))
        check_same_cut(config("prune", tmp_path, *base, f"{name}={was}"), tmp_path)
        with pytest.raises(InputError, match=f"was cut with {re.escape(name)} = "):
            check_same_cut(config("prune", tmp_path, *base, f"{name}={says}"), tmp_path)


def test_a_first_step_that_removes_nothing_leaves_no_earlier_run(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    earlier = [tmp_path / "finetune" / "checkpoints" / "last.ckpt", tmp_path / "model.onnx"]
    for path in earlier:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of another network")
    metrics, _ = prune(
        config(
            "prune", tmp_path, f"ckpt={trained[0] / 'checkpoints' / 'last.ckpt'}", "importance=l2", "pruning.ratio=0.5",
            "pruning.multiple_of=8", "pruning.layers=layer1.0.conv1", "pruning.steps=4", "finetune.epochs=0",
            "latency.batch_sizes=[1]",
        )
    )  # fmt: skip
    assert metrics["remarks"][0].startswith("step 1 of 4 cut nothing")
    assert metrics["kept"] == {"layer1.0.conv1": 8}
    assert not any(path.exists() for path in earlier)


def test_a_complete_run_goes_on_where_more_epochs_are_asked_for(tmp_path: Path) -> None:
    whole = {"dense": {}, "pruned": {}, "finetuned": {}, "folded": {}, "onnx": {}, "exports": {}, "finished": True}
    last = tmp_path / "finetune" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    torch.save({"epoch": 0}, last)
    (tmp_path / "pruned.ckpt").write_text("")
    (tmp_path / "metrics.json").write_text(json.dumps(whole))
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"finetune": {"epochs": 1}}}))
    assert interrupted(tmp_path, "finetuned", 1).metrics == whole
    assert interrupted(tmp_path, "finetuned", 3).metrics == {"dense": {}, "pruned": {}}
    (tmp_path / "finetune" / "metrics.jsonl").write_text("{}")
    interrupted(tmp_path, "finetuned", 3).hand_over(tmp_path / "new", "finetuned")
    assert (tmp_path / "new" / "finetune" / "metrics.jsonl").is_file()
    # One that a callback ended early is complete as it is.
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"finetune": {"epochs": 3}}}))
    assert interrupted(tmp_path, "finetuned", 3).metrics == whole
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"finetune": {"epochs": 1}}}))
    last.unlink()
    assert interrupted(tmp_path, "finetuned", 1).metrics == whole
    with pytest.raises(
        InputError, match=r"complete after 1 epochs, finetune\.epochs = 3 asks for more, and its finetune/"
    ):
        interrupted(tmp_path, "finetuned", 3)
    # Nothing was trained, and what was measured without is measured again.
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"finetune": {"epochs": 0}}}))
    (tmp_path / "metrics.json").write_text(json.dumps({key: whole[key] for key in whole if key != "finetuned"}))
    assert interrupted(tmp_path, "finetuned", 2).metrics == {"dense": {}, "pruned": {}}
    assert "finished" in interrupted(tmp_path, "finetuned", 0).metrics
    # A look at the network in the folder of a cut.
    (tmp_path / "metrics.json").write_text('{"dense": {}, "finished": true}')
    with pytest.raises(InputError, match="holds the metrics of a later look"):
        interrupted(tmp_path, "finetuned", 1)


def test_a_complete_run_writes_what_it_has_not_written_yet(tmp_path: Path) -> None:
    metrics: dict[str, Any] = {"onnx": {}, "exports": {"model.onnx": 0.0, "model.pt2": 0.0}}
    (tmp_path / "model.onnx").write_text("")
    metrics = forget_files(metrics, tmp_path)
    # The other file is in another folder, or was deleted.
    assert metrics == {"onnx": {}, "exports": {"model.onnx": 0.0}}
    for asked, missing in (
        (Exports(), False),
        (Exports(onnx=True), False),
        (Exports(onnx=True, torch_export=True), True),
        (Exports(onnx=True, int8=True), True),
        (Exports(fold=True), True),
    ):
        assert undeployed(metrics, asked) is missing, asked
    assert not undeployed({**metrics, "folded": {}}, Exports(fold=True))
    (tmp_path / "model.onnx").unlink()
    assert forget_files(metrics, tmp_path) == {}


def test_a_fold_that_is_asked_for_later_is_measured(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    same = (
        f"ckpt={trained[0] / 'checkpoints' / 'last.ckpt'}",
        "importance=l2",
        "pruning.ratio=0.5",
        "latency.batch_sizes=[1]",
    )
    assert "folded" not in prune(config("prune", tmp_path, *same))[0]
    metrics, _ = prune(config("prune", tmp_path, *same, f"resume={tmp_path}", "export.fold=true"))
    # The job that began in this folder is the one that is finished there.
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["resume"] is None
    assert set(metrics["folded"]) == set(metrics["pruned"])
    assert metrics["folded"]["params"] < metrics["pruned"]["params"]
    # One that was stopped as it exported holds the accuracy of the cut, before fine-tuning.
    stopped = json.loads((tmp_path / "metrics.json").read_text())
    del stopped["finished"]
    stopped["folded"]["test_accuracy"] = -1.0
    (tmp_path / "metrics.json").write_text(json.dumps(stopped))
    again, _ = prune(config("prune", tmp_path, *same, f"resume={tmp_path}", "export.fold=true"))
    assert again["finished"]
    assert again["folded"]["test_accuracy"] == pytest.approx(again["finetuned"]["test_accuracy"], abs=0.03)
    # What is deployed of another cut does not stay beside the one that goes on in its folder.
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.onnx").write_bytes(b"of another cut")
    (other / "forecast.json").write_text("{}")
    assert "onnx" not in prune(config("prune", other, *same, f"resume={tmp_path}"))[0]
    assert not (other / "model.onnx").exists()
    assert not (other / "forecast.json").exists()
    assert (other / "pruned.ckpt").is_file()
    # Times are of one session: what was exported in another is timed again with the rest.
    there = tmp_path / "there"
    prune(config("prune", there, *same, "export.fold=true"))
    earlier = json.loads((there / "metrics.json").read_text())
    earlier["folded"]["latency_ms"]["1"] = -1.0
    (there / "metrics.json").write_text(json.dumps(earlier))
    now, _ = prune(config("prune", there, *same, f"resume={there}", "export.onnx=true", "latency.n_runs=3"))
    assert now["folded"]["latency_ms"]["1"] > 0
    assert now["timed_runs"] == 3
    # What a cut that is not trained has left stays where more of it is asked for.
    bare = tmp_path / "bare"
    prune(config("prune", bare, *same, "finetune.epochs=0"))
    (bare / "model.onnx").write_bytes(b"of this cut")
    found, _ = prune(config("prune", bare, *same, "finetune.epochs=0", f"resume={bare}", "export.fold=true"))
    assert (bare / "model.onnx").is_file()
    assert "folded" in found
    # Nor that of a training which was shorter.
    (tmp_path / "model.onnx").write_bytes(b"of one epoch")
    assert prune(config("prune", tmp_path, *same, f"resume={tmp_path}", "finetune.epochs=2"))[0]["finished"]
    assert not (tmp_path / "model.onnx").exists()


def test_exports_without_a_cut_are_refused(tmp_path: Path) -> None:
    for name in ("prune", "train"):
        with pytest.raises(InputError, match=r"export\.fold writes the network that a cut leaves, and pruning=none"):
            read(config(name, tmp_path, "pruning=none", "export.fold=true"))


def test_epochs_of_fine_tuning_are_those_that_were_trained(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """A checkpoint after every second epoch is not of the third."""
    ckpt = f"ckpt={trained[0] / 'checkpoints' / 'last.ckpt'}"
    few = ("importance=l2", "pruning.ratio=0.5", "latency.batch_sizes=[1]")
    metrics, _ = prune(config("prune", tmp_path, ckpt, *few, "finetune.epochs=3", "+callbacks.last.every_n_epochs=2"))
    assert metrics["finetuned"]["epochs"] == 3


def test_a_folder_without_a_checkpoint_is_no_training_of_the_other_kind(tmp_path: Path) -> None:
    (tmp_path / "pruned.ckpt").write_text("")
    (tmp_path / "metrics.json").write_text('{"pruned": {}}')
    (tmp_path / "from_scratch" / "checkpoints").mkdir(parents=True)
    assert interrupted(tmp_path, "finetuned", 1).last is None
    torch.save({"epoch": 0}, tmp_path / "from_scratch" / "checkpoints" / "last.ckpt")
    with pytest.raises(InputError, match=r"is a run with finetune\.from_scratch=true; go on with that"):
        interrupted(tmp_path, "finetuned", 1)


@pytest.mark.parametrize(("folder", "grows"), [("finetune", False), ("from_scratch", True)])
def test_only_weights_drawn_anew_see_small_images_first(
    folder: str, grows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = read(config("prune", tmp_path, "data.progressive_resizing={}"))
    data, net = assembly.load_data(assembly.data_settings(settings)), build_model({"name": "resnet8"})
    sizes: list[int] = []
    monkeypatch.setattr(trainers, "fit", lambda *_: sizes.append(data.sides(0, 10)[0]))
    finetune(settings, data, net, net, 1, folder)
    # They begin at half the size by default.
    assert sizes == [16 if grows else 32]


def test_fine_tuning_begins_with_what_the_cut_left_and_learns_from_the_dense_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = read(config("prune", tmp_path, "finetune.distill=0.5", "finetune.lr=0.03"))
    data = assembly.load_data(assembly.data_settings(settings))
    dense, small = (shaken(build_model({"name": "resnet8"})) for _ in range(2))
    seen: list[Classifier] = []
    monkeypatch.setattr(trainers, "fit", lambda trainer, classifier, *_: seen.append(classifier))
    found, _ = finetune(settings, data, small, dense, 1, "finetune")
    for name, value in small.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    assert seen[0].teacher is dense
    assert (seen[0].distill, seen[0].optimization.lr) == (0.5, 0.03)


def test_what_fine_tuning_does_not_set_is_that_of_the_optimizer(tmp_path: Path) -> None:
    given = {"momentum": 0.5, "weight_decay": 0.01, "label_smoothing": 0.2, "gamma": 0.3, "milestones": [0.4],
             "decay_norms": False, "nesterov": False, "class_weights": "balanced"}  # fmt: skip
    found = read(config("prune", tmp_path, *(f"optimizer.{key}={value}" for key, value in given.items()))).finetune
    assert {key: getattr(found, key) for key in given} == given
    other = read(
        config("prune", tmp_path, "optimizer.lr=0.7", "optimizer.warmup_epochs=3", "optimizer.ema=0.9")
    ).finetune
    assert (other.lr, other.warmup_epochs, other.ema) == (0.02, 0, 0)
