"""What is advised at the end of a job: commands that compose and are not refused; the JSON lines of a log."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir

from freqprune.jobs import advice
from freqprune.jobs.advice import after_explaining, commands
from freqprune.jobs.config import check_pruning
from freqprune.jobs.explain_settings import check_explaining
from freqprune.jobs.jsonl import JSONLinesLogger
from freqprune.jobs.settings import read
from freqprune.networks import save_pruned
from freqprune.networks.registry import build_model
from freqprune.reports import record
from tests.conftest import ROOT

TRAINED = ["data=digits", "data.limit_train=96", "model=resnet8", "trainer.max_epochs=1", "tagging.n_frames=480"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with what a job leaves, whose name a shell would take apart."""
    out = tmp_path / "my runs"
    (out / "checkpoints").mkdir(parents=True)
    torch.save(build_model({"name": "resnet8"}).state_dict(), out / "checkpoints" / "last.ckpt")
    save_pruned(out / "pruned.ckpt", build_model({"name": "resnet8"}), {}, {})
    return out


@pytest.mark.parametrize(
    ("job", "given"),
    [
        ("train", TRAINED),
        ("train", ["data=digits", "model=auto", "model.name=torchvision/resnet18", "model.weights=DEFAULT"]),
        ("train", ["experiment=quickstart", "pruning=none", "optimizer.lr=0.05"]),
        ("look", ["data=digits", "pruning=none", "ckpt={out}/checkpoints/last.ckpt"]),
        ("prune", ["data=digits", "pruning.latency_cut=0.2", "ckpt={out}/checkpoints/last.ckpt", "finetune.epochs=1"]),
        ("prune", [*TRAINED, "pruning.threshold=2", "importance=snr"]),
        ("prune", ["pretrained=true", "data=digits", "pruning.macs_cut=0.2"]),
    ],
)
def test_what_is_advised_can_be_typed(job: str, given: list[str], out: Path) -> None:
    found = commands(job, out, "python prune.py", [word.format(out=str(out).replace(" ", "\\ ")) for word in given])
    assert len(found) == 3
    assert found[0].startswith("python -m webbrowser file:///")
    assert "my%20runs" in found[0]
    assert any("pruning.macs_cut=0.5" in one or "pruning.macs_cut=0.3,0.5,0.7" in one for one in found)
    typed = [shlex.split(one) for one in found if one.startswith("python prune.py")]
    assert typed
    for words in typed:
        overrides = [word.replace("0.3,0.5,0.7", "0.3") for word in words[2:] if word != "-m"]
        with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("prune", [*overrides, f"output_dir={out}"])
        check_pruning(cfg)
        settings = read(cfg)
        assert "digits" in settings.data["_target_"].lower()
        if settings.recipe is not None:
            assert settings.recipe.amount.macs_cut in (0.3, 0.5)
        if not settings.common.pretrained:
            assert Path(settings.common.ckpt or "").is_file()
    if job == "prune":
        words = shlex.split(found[1])
        assert words[:2] == ["python", "-c"]
        exec(compile(words[2], "advice", "exec"), {})


@pytest.mark.parametrize("given", [["model=resnet8"], ["model.name=torchvision/resnet18", "model.weights=DEFAULT"]])
@pytest.mark.parametrize("job", ["train", "prune"])
def test_where_no_epoch_was_left_the_checkpoint_is_the_one_it_began_from(
    job: str, given: list[str], tmp_path: Path
) -> None:
    before = tmp_path / "before.ckpt"
    found = commands(job, tmp_path, "python prune.py", ["data=digits", *given, f"ckpt_path={before}"])
    words = [shlex.split(one) for one in found if one.startswith("python prune.py")]
    assert words
    assert all(f"ckpt={before}" in one and not any("ckpt_path" in word for word in one) for one in words)


@pytest.mark.parametrize("more", [[], ["grid=3", "refine=1"], ["parts=channels", "forwards=64"]])
def test_what_is_advised_after_an_explanation_can_be_typed(more: list[str], out: Path) -> None:
    images = out / "one.png"
    images.write_bytes(b"")
    found = after_explaining(out, [f"images='{images}'", "pretrained=true", "until=0.1", *more])
    # A standard error of logits means something else of probabilities.
    assert ["until=0.1" in one for one in found] == [False, False, True]
    assert found[0] == f"python -m webbrowser {(out / 'explain.html').as_uri()}"
    for command in found[1:]:
        words = shlex.split(command)
        assert words[:2] == ["freqprune", "explain"]
        with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
            asked = check_explaining(compose("explain", [*words[2:], f"output_dir={out}"]))
        assert asked.tags.forwards == 1024
        assert asked.tags.refine in (0, 1, 2)


def test_what_a_network_cannot_answer_is_not_advised(out: Path) -> None:
    plain, one, masks = (
        after_explaining(out, ["images=a.png", *more], of_classes=of_classes)[1]
        for more, of_classes in (([], True), ([], False), (["segments=mask.png"], True))
    )
    assert ("score=probability" in plain, "overlap=" in plain) == (True, True)
    assert ("score=" in one, "overlap=" in one) == (False, True)
    assert ("score=probability" in masks, "overlap=" in masks) == (True, False)


def test_what_is_not_there_is_not_advised(out: Path) -> None:
    for job in ("train", "look"):
        given = ["data=digits", "tagging.every_n_epochs=0", "tagging.depth=0.4"]
        assert "report.html" in commands(job, out, "python prune.py", given)[0]
    (out / "explore.html").touch()
    found = commands("train", out, "python prune.py", given)
    assert "explore.html" in found[0]
    assert "tagging.depth=0.4" in found[1]
    assert "every_n_epochs" not in found[1]


@pytest.mark.parametrize(
    "given",
    [["pruning.latency_cut=0.3", "pruning.multiple_of=auto", "pruning.scope=per_ms"], ["pruning.enabled=false"]],
)
def test_shares_of_macs_are_advised_without_what_goes_with_time(given: list[str], out: Path) -> None:
    for job in ("look", "prune"):
        sweep = shlex.split(commands(job, out, "python prune.py", ["pretrained=true", *given])[2])
        assert [word for word in sweep if word.startswith("pruning")] == ["pruning.macs_cut=0.3,0.5,0.7"]


# As the preprocessing of a library has them.
OF_WEIGHTS = {"mean": (0.5, 0.5, 0.25), "std": (0.2, 0.2, 0.2), "image_size": 48, "resize": None}


@pytest.mark.parametrize("job", ["train", "look", "prune"])
def test_a_library_network_that_was_trained_further_is_not_that_of_the_library(job: str, out: Path) -> None:
    given = ["data=image_folder", "data.root=photos", "model=auto", "model.name=timm/resnet18", "model.pretrained=true",
             "model.num_classes=3", "data.image_size=64"]  # fmt: skip
    found = [
        one for one in commands(job, out, "python prune.py", given, OF_WEIGHTS) if one.startswith("python prune.py")
    ]
    assert found
    for one in found:
        words = shlex.split(one)
        assert f"ckpt={out / 'checkpoints' / 'last.ckpt'}" in words
        assert not any(word.startswith("model") for word in words)
        # What the weights brought, and the checkpoint does not know of; what was asked for goes before it.
        assert {"data.mean=[0.5,0.5,0.25]", "data.std=[0.2,0.2,0.2]", "data.image_size=64"} <= set(words)
        assert not {"data.image_size=48", "data.resize=None"} & set(words)
        typed = [word.replace("0.3,0.5,0.7", "0.3") for word in words[2:] if word != "-m"]
        with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
            assert compose("prune", [*typed, f"output_dir={out}"]).data.mean == [0.5, 0.5, 0.25]
    if job != "train":
        # Pruned as it comes, it has no checkpoint.
        (out / "checkpoints" / "last.ckpt").unlink()
        found = commands(job, out, "python prune.py", given, OF_WEIGHTS)
        assert "model.pretrained=true" in found[2]
        assert "data.mean" not in found[2]


@pytest.mark.parametrize("name", ["lr=0.1,seed=0", "größe", "it's", "a b", "[1] {x}", "plain-1.2"])
def test_commands_name_folders_of_any_name(name: str, tmp_path: Path) -> None:
    out = tmp_path / name
    (out / "checkpoints").mkdir(parents=True)
    assert len(commands("train", out, "python prune.py", ["data=digits"])) == 1
    assert not any("last.ckpt" in one for one in commands("prune", out, "python prune.py", ["data=digits"]))
    (out / "checkpoints" / "last.ckpt").touch()
    words = shlex.split(commands("train", out, "python prune.py", ["data=digits"])[2])[2:]
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        assert compose("prune", words).ckpt == str(out / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("job", ["train", "prune"])
def test_what_follows_runs_where_the_job_ran(job: str, out: Path) -> None:
    where = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    for one in commands(job, out, "python prune.py", [*TRAINED, *where])[1:]:
        if one.startswith("python prune.py"):
            assert set(where) <= set(shlex.split(one))
            assert "trainer.max_epochs" not in one


def test_every_entry_is_a_line(tmp_path: Path) -> None:
    logger = JSONLinesLogger(save_dir=tmp_path, name="", version="")
    logger.log_metrics({"epoch": 1.0, "train/loss": torch.tensor(0.5)}, step=7)
    logger.log_metrics({"val/loss": float("nan")}, step=8)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 7, "epoch": 1, "train/loss": 0.5}, {"step": 8, "val/loss": None}]
    logger.save()
    assert "train/loss" in (tmp_path / "metrics.csv").read_text()


def test_an_experiments_network_does_not_stand_for_that_of_the_checkpoint(out: Path) -> None:
    given = ["experiment=cifar10_resnet32", "model=resnet56"]
    for command in commands("train", out, "python prune.py", given)[1:]:
        words = [word for word in shlex.split(command)[2:] if word != "-m"]
        with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("prune", [*words, f"output_dir={out}"])
        assert read(cfg).model["name"] is None


def test_commands_keep_the_folder_of_configs_that_was_typed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = SimpleNamespace(
        runtime=SimpleNamespace(
            config_sources=[
                SimpleNamespace(provider="main", path="/conf"),
                SimpleNamespace(provider="command-line", path="/my configs"),
            ]
        ),
        mode=None,
        job=SimpleNamespace(config_name="big"),
        overrides=SimpleNamespace(task=["experiment=mine", "pretrained=true"]),
    )
    hydra = SimpleNamespace(initialized=lambda: True, get=lambda: typed)
    for module in (record, advice):
        monkeypatch.setattr(module, "HydraConfig", hydra)
    monkeypatch.setenv("FREQPRUNE_COMMAND", "freqprune prune")
    said: list[str] = []
    monkeypatch.setattr(advice, "show", lambda *lines: said.extend(lines))
    advice.advise("look", out, {})
    advice.advise_explaining(out)
    with_configs = [one.strip() for one in said if "--config-dir '/my configs'" in one]
    assert [one.split()[:2] for one in with_configs] == 2 * [["freqprune", "prune"]] + 2 * [["freqprune", "explain"]]
    assert all("--config-name big" in one for one in with_configs)
    said.clear()
    advice.advise("train", out, {})
    # By what trains nothing is pruned.
    assert len([one for one in said if "--config-dir" in one]) == 2
    assert not any("--config-name" in one for one in said)
