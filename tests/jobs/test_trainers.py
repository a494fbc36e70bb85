"""Where networks are after a trainer had them, and how they run while it does."""

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from freqprune.errors import InputError
from freqprune.jobs import assembly, trainers
from freqprune.jobs.compiled import ReleaseGradients
from freqprune.jobs.finetuning import finetune, how_to_go_on
from freqprune.jobs.prune import prune
from freqprune.jobs.settings import read
from freqprune.jobs.train import train
from freqprune.networks import build_model, device_of
from freqprune.reports import record
from freqprune.training import Classifier, DigitsData
from tests.jobs.small import config


class Pretended:
    """A trainer that leaves the network on the CPU, as Lightning does after an accelerator."""

    def __init__(self) -> None:
        self.compiled: list[bool] = []
        self.callbacks: list[pl.Callback] = []
        self.error: Exception | None = None
        self.received_sigterm = False

    def test(self, classifier: Classifier, **_: Any) -> list[dict[str, float]]:
        classifier.net.to_empty(device="cpu")
        return [{"test/accuracy": 0.5}]

    def fit(self, classifier: Classifier, **_: Any) -> None:
        assert classifier.teacher is not None
        self.compiled += [net._compiled_call_impl is not None for net in (classifier.net, classifier.teacher)]
        if self.error is not None:
            raise self.error


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Modes that networks were compiled with; here they are followed, and their operations run as they are."""
    found: list[Any] = []
    really = torch.compile

    def compiled(call: Callable[..., Any], mode: Any = None) -> Callable[..., Any]:
        found.append(mode)
        return really(call, backend="eager")

    monkeypatch.setattr(torch, "compile", compiled)
    return found


def test_a_network_stays_on_its_device() -> None:
    net = nn.Linear(4, 10, device="meta")
    trainer: Any = Pretended()
    data: Any = None
    assert trainers.tested(trainer, Classifier(net, num_classes=10), data) == {"test_accuracy": 0.5}
    assert device_of(net).type == "meta"


@pytest.fixture
def learning() -> Classifier:
    return Classifier(nn.Linear(4, 10), num_classes=10, teacher=nn.Linear(4, 10), distill=0.5)


def test_networks_are_compiled_while_they_train_only(
    learning: Classifier, modes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[bool] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: cleared.append(True))
    pretended = Pretended()
    trainer: Any = pretended
    data: Any = None
    for how, expected in ((True, [None, None]), ("reduce-overhead", ["reduce-overhead"] * 2), (False, [])):
        modes.clear()
        trainers.fit(trainer, learning, data, None, "", how)
        assert modes == expected
        assert pretended.compiled[-2:] == [bool(how)] * 2
        assert _calls(learning) == [None, None]
    assert len(cleared) == 2
    # CUDA graphs keep no gradients over a validation.
    assert [type(callback) for callback in pretended.callbacks] == [ReleaseGradients]


def test_a_network_that_comes_in_eval_mode_is_trained_in_training_mode(learning: Classifier) -> None:
    """As one does that was cut: Lightning would leave its norms frozen."""
    learning.net.eval()
    trainer: Any = Pretended()
    data: Any = None
    trainers.fit(trainer, learning, data, None, "")
    assert learning.net.training


def test_a_network_that_was_compiled_before_stays_so(learning: Classifier, modes: list[Any]) -> None:
    learning.net.compile()
    trainer: Any = Pretended()
    data: Any = None
    before = _calls(learning)
    assert before[0] is not None
    trainers.fit(trainer, learning, data, None, "", "reduce-overhead")
    assert _calls(learning) == before


def test_what_cannot_be_compiled_is_an_error_that_says_how_to_go_on(learning: Classifier, modes: list[Any]) -> None:
    pretended = Pretended()
    trainer: Any = pretended
    data: Any = None
    pretended.error = TorchDynamoException("no compiler was found\nmore")
    with pytest.raises(InputError, match=r"here \(no compiler was found\): use compile=false; to go on: resume=it"):
        trainers.fit(trainer, learning, data, None, "to go on: resume=it", True)
    assert _calls(learning) == [None, None]
    pretended.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        trainers.fit(trainer, learning, data, None, "", True)
    assert _calls(learning) == [None, None]


def _calls(classifier: Classifier) -> list[Any]:
    assert classifier.teacher is not None
    return [net._compiled_call_impl for net in (classifier.net, classifier.teacher)]


def test_gradients_go_before_a_validation_and_at_the_end() -> None:
    net = nn.Linear(4, 10)
    trainer: Any = type("Trainer", (), {"state": type("State", (), {"fn": "fit"})})
    module: Any = net
    for hook in (ReleaseGradients().on_validation_start, ReleaseGradients().on_train_end):
        net(torch.ones(1, 4)).sum().backward()
        assert net.weight.grad is not None
        hook(trainer, module)
        assert net.weight.grad is None


def test_there_is_no_bar_where_none_is_asked_for(tmp_path: Path) -> None:
    settings = read(config("prune", tmp_path))
    assert settings.callbacks["progress"] is None
    for trainer in (trainers.make_trainer(settings, tmp_path, []), trainers.evaluator(settings)):
        assert trainer.progress_bar_callback is None
    own = "+callbacks.bar={_target_: pytorch_lightning.callbacks.TQDMProgressBar}"
    for more in ("+trainer.enable_progress_bar=true", own):
        settings = read(config("prune", tmp_path, more))
        assert trainers.make_trainer(settings, tmp_path, []).progress_bar_callback is not None


@pytest.mark.parametrize("job", [train, prune])
def test_graphs_of_one_step_do_not_gather_gradients(job: Callable[..., Any], tmp_path: Path) -> None:
    more = ("trainer.accumulate_grad_batches=2", "pretrained=true" if job is prune else "seed=0")
    with pytest.raises(
        InputError, match=r"trainer\.accumulate_grad_batches = 2; use compile=true, or batches as large"
    ):
        job(config(job.__name__, tmp_path, "compile=reduce-overhead", *more))


def test_a_fine_tuned_network_lies_where_its_teacher_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = build_model({"name": "resnet8"})
    teacher = copy.deepcopy(net).to("meta")
    settings = read(config("prune", tmp_path, "pretrained=true"))
    data = assembly.load_data(assembly.data_settings(settings))
    monkeypatch.setattr(trainers, "fit", lambda *_: None)
    found, _ = finetune(settings, data, net, teacher, 1, "finetune")
    assert device_of(found).type == "meta"


def test_training_and_fine_tuning_are_compiled(modes: list[Any], tmp_path: Path) -> None:
    more = (
        "compile=true",
        "optimizer.ema=0.9",
        "tag_loss=silence",
        "tag_loss.every_n_steps=1",
        "tagging.every_n_epochs=0",
    )
    metrics, _ = train(config("train", tmp_path / "run", *more))
    assert metrics["epochs"] == 1
    assert modes == [None]
    modes.clear()
    ckpt = tmp_path / "run" / "checkpoints" / "last.ckpt"
    _, made = prune(
        config("prune", tmp_path / "cut", f"ckpt={ckpt}", "compile=reduce-overhead", "importance=l2",
               "pruning.macs_cut=0.3", "finetune.distill=0.5")
    )  # fmt: skip
    # The smaller network and the one it learns from.
    assert modes == ["reduce-overhead", "reduce-overhead"]
    assert made["net"]._compiled_call_impl is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("more", [(), ("compile=reduce-overhead", "trainer=gpu", "finetune.distill=0.5")])
def test_everything_on_an_accelerator(more: tuple[str, ...], tmp_path: Path) -> None:
    there = ("trainer=auto", *more)
    train(config("train", tmp_path / "run", *there))
    ckpt = tmp_path / "run" / "checkpoints" / "last.ckpt"
    metrics, made = prune(config("prune", tmp_path / "cut", f"ckpt={ckpt}", "pruning.macs_cut=0.3", *there))
    assert metrics["finished"]
    assert device_of(made["net"]).type == "cuda"


def test_how_an_interrupted_fine_tuning_goes_on_depends_on_where_the_dense_network_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FREQPRUNE_COMMAND", raising=False)
    given = read(config("prune", tmp_path / "given", "pretrained=true"))
    assert how_to_go_on(given) == f"prune.py with the same settings and resume={tmp_path / 'given'}"
    # train.py has another criterion by default, and the resumed run is to be told.
    trained = read(config("train", tmp_path / "trained", "pruning=filters"))
    (tmp_path / "trained" / "checkpoints").mkdir(parents=True)
    (tmp_path / "trained" / "checkpoints" / "last.ckpt").touch()
    found = how_to_go_on(trained)
    how = " importance.criterion=snr importance.scope=layer importance.compensation=none"
    assert found.endswith(f" ckpt={tmp_path / 'trained' / 'checkpoints' / 'last.ckpt'}{how}")
    resumed = read(config("prune", tmp_path / "resumed", "pruning=filters", *found.split()[-4:]))
    assert resumed.recipe is not None
    assert trained.recipe is not None
    for name in ("criterion", "scope", "compensation"):
        one, other = (vars(recipe) | vars(recipe.amount) for recipe in (resumed.recipe, trained.recipe))
        assert one[name] == other[name]
    # A training that itself was gone on with, there or elsewhere with no epoch left.
    last = tmp_path / "trained" / "checkpoints" / "last.ckpt"
    for folder in ("trained", "other"):
        further = read(config("train", tmp_path / folder, "pruning=filters", f"ckpt_path={last}"))
        said = f"settings but ckpt_path and resume={tmp_path / folder} ckpt={last} "
        assert said in how_to_go_on(further)
    # prune.py has its own default again.
    monkeypatch.setenv("FREQPRUNE_COMMAND", "python prune.py")
    assert how_to_go_on(trained) == found.removesuffix(how)


@pytest.mark.parametrize("in_sweep", [True, False])
def test_a_job_of_a_sweep_goes_on_with_its_sweep(
    in_sweep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def fit(*given: Any) -> None:
        told.append(given[4])
        raise KeyboardInterrupt

    monkeypatch.setattr(trainers, "fit", fit)
    monkeypatch.setattr(record, "in_sweep", lambda: in_sweep)
    monkeypatch.setattr(record, "done_before", lambda *_: False)
    sweep = SimpleNamespace(sweep=SimpleNamespace(dir="multirun/x"))
    monkeypatch.setattr("freqprune.jobs.advice.HydraConfig", SimpleNamespace(get=lambda: sweep))
    with pytest.raises(KeyboardInterrupt):
        train(config("train", tmp_path / "0", "tagging.every_n_epochs=0"))
    torch.save(build_model({"name": "resnet8"}).state_dict(), tmp_path / "w.pt")
    with pytest.raises(KeyboardInterrupt):
        prune(config("prune", tmp_path / "1", f"ckpt={tmp_path / 'w.pt'}", "importance=l2"))
    assert [("the same command with hydra.sweep.dir=multirun/x" in one) for one in told] == [in_sweep] * 2
    assert [("ckpt_path=" in one, "resume=" in one) for one in told] == (
        [(False, False)] * 2 if in_sweep else [(True, False), (False, True)]
    )


class Killed(Classifier):
    """Gets SIGTERM in a batch of its test, or of its validation."""

    at = 0

    def test_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        super().test_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        super().validation_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore")
def test_a_last_validation_that_is_killed_ends_with_the_usual_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes after the training, which had none in its last epoch."""
    monkeypatch.setattr("freqprune.jobs.train.Classifier", Killed)
    with pytest.raises(SystemExit) as ended:
        train(config("train", tmp_path, "+trainer.check_val_every_n_epoch=2", "tagging.every_n_epochs=0"))
    assert ended.value.code == 128 + signal.SIGTERM


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at", [0, 1])
def test_a_test_that_is_killed_ends_with_the_usual_status(at: int, tmp_path: Path) -> None:
    settings = read(config("train", tmp_path))
    module = Killed({"name": "resnet8"})
    module.at = at
    with pytest.raises(SystemExit) as ended:
        trainers.tested(trainers.evaluator(settings), module, DigitsData(limit_test=40, batch_size=32))
    assert ended.value.code == 128 + signal.SIGTERM


def test_what_waits_for_a_validation_that_never_comes_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop = "{_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: val/accuracy, mode: max}"
    settings = read(config("train", tmp_path, f"+callbacks.stop={stop}", "data.val_fraction=0"))
    made = trainers.make_trainer(settings, tmp_path, [])
    assert not made.early_stopping_callbacks
    assert "callbacks.stop, which follows a validation metric, is left out" in caplog.text
    caplog.clear()
    trainers.make_trainer(read(config("train", tmp_path, "data.val_fraction=0")), tmp_path, [])
    assert not caplog.text


def test_a_callback_of_ones_own_writes_where_it_is_told(tmp_path: Path) -> None:
    more = "{_target_: pytorch_lightning.callbacks.ModelCheckpoint, dirpath: /x, every_n_epochs: 10}"
    settings = read(config("train", tmp_path, f"+callbacks.every={more}"))
    made = trainers.make_trainer(settings, tmp_path, []).checkpoint_callbacks
    assert sorted({str(one.dirpath) for one in made}) == sorted({"/x", str(tmp_path / "checkpoints")})  # type: ignore[attr-defined]
    # A stage of the run has checkpoints of its own, wherever they lie.
    inside = more.replace("/x", "'${output_dir}/keep'")
    for spec, of_stage in ((more, "/x/finetune"), (inside, str(tmp_path / "finetune" / "keep"))):
        settings = read(config("train", tmp_path, f"+callbacks.every={spec}"))
        made = trainers.make_trainer(settings, tmp_path / "finetune", [], 1).checkpoint_callbacks
        expected = {of_stage, str(tmp_path / "finetune" / "checkpoints")}
        assert {str(one.dirpath) for one in made} == expected  # type: ignore[attr-defined]
    for same in ("null", f"{tmp_path}//checkpoints/"):
        settings = read(config("train", tmp_path, f"callbacks.last.dirpath={same}"))
        assert len(trainers.make_trainer(settings, tmp_path, []).checkpoint_callbacks) == 2
    settings = read(config("train", tmp_path, "callbacks.last.dirpath=/x"))
    with pytest.raises(InputError, match=r"callbacks.last.dirpath = /x: a run is gone on with from"):
        trainers.make_trainer(settings, tmp_path, [])
