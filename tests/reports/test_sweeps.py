"""Tables of sweeps from folders as Hydra leaves them."""

import csv
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from freqprune.errors import InputError
from freqprune.jobs import cli
from freqprune.reports import record, sweeps
from freqprune.reports.record import failures_kept, is_finished
from freqprune.reports.run_figures import kept_over_depth, medians_over_depth
from freqprune.reports.sweep_jobs import Job, check_goes_on, commands_of, counted_once, planned, read_sweep, told_apart
from freqprune.reports.sweeps import Group, gather, grouped, table
from freqprune.reports.tables import layer_medians


def job(folder: Path, overrides: list[str], finetuned: float | None = None, failed: str = "") -> None:
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
    if finetuned is not None:
        stages = {
            "dense": {"test_accuracy": 0.9, "macs": 200, "params": 100},
            "pruned": {"test_accuracy": 0.1, "macs": 100, "params": 75},
        }
        counts = {"kept": {"a": 3, "b": 2}, "widths": {"a": 4, "b": 8}}
        (folder / "metrics.json").write_text(
            json.dumps({**stages, **counts, "finetuned": {"test_accuracy": finetuned}, "finished": True})
        )
        rows = [
            "group,layer_index,layer,filter,part_preference,integration",
            "all,0,a,0,0.5,1",
            "all,0,a,1,,",
            "all,0,a,2,0.1,2",
            "cat,0,a,0,9,9",
            "all,1,b,0,,",
        ]
        (folder / "layers.csv").write_text("\n".join(rows) + "\n")
    if failed:
        (folder / "failed.txt").write_text(failed)


def multirun(folder: Path, task: Sequence[str], hydra: Sequence[str] = ()) -> None:
    content = {"hydra": {"job": {"name": "prune"}, "overrides": {"task": list(task), "hydra": list(hydra)}}}
    OmegaConf.save(OmegaConf.create(content), folder / "multirun.yaml")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    job(folder / "0", ["data=digits", "compile=False", "importance=snr", "seed=0"], 0.80)
    job(folder / "1", ["data=digits", "compile=False", "importance=snr", "seed=1"], 0.82)
    job(
        folder / "2", ["data=digits", "compile=False", "importance=l2", "seed=0"], failed="InputError: no | pipes\nmore"
    )
    job(folder / "10", ["data=digits", "compile=False", "importance=l2", "seed=1"], 0.7)
    job(folder / "9", ["data=digits", "compile=False", "importance=random", "seed=0"])
    given = ["data=digits", "compile=false", "importance=snr,l2,random", "seed=0,1"]
    multirun(folder, given, ["hydra/launcher=joblib", "hydra.mode=MULTIRUN"])
    return folder


def test_means_and_deviations_over_seeds(sweep: Path) -> None:
    groups = grouped(read_sweep(sweep))
    assert [(g.settings, g.seeds) for g in groups] == [({"importance": "snr"}, 2), ({"importance": "l2"}, 1)]
    assert groups[0].mean["finetuned"] == pytest.approx(81)
    assert groups[0].sd["finetuned"] == pytest.approx(2**0.5)
    assert groups[0].mean["cut"] == pytest.approx(50)
    header, rows = table(groups)
    assert header == [
        "importance",
        "seeds",
        "MACs cut, %",
        "parameters cut, %",
        "dense, %",
        "pruned, %",
        "finetuned, %",
    ]
    assert rows[0] == ["snr", "2", "50.00 ± 0.00", "25.00 ± 0.00", "90.00 ± 0.00", "10.00 ± 0.00", "81.00 ± 1.41"]
    assert rows[1][-1] == "70.00"


def test_no_job_is_dropped(sweep: Path) -> None:
    jobs = read_sweep(sweep)
    assert [(j.name, j.state) for j in jobs] == [
        ("0", "finished"), ("1", "finished"), ("2", "failed"), ("9", "unfinished"), ("10", "finished"), ("5", "not "
                                                                                                              "started"),
    ]  # fmt: skip
    assert jobs[-1].overrides == {"data": "digits", "compile": "false", "importance": "random", "seed": "1"}


def test_what_gathering_writes(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = gather([sweep], tmp_path / "out")
    text = (out / "sweep.md").read_text()
    assert "3 of 6 jobs are missing" in text
    assert r"| 2 | failed | importance=l2, seed=0 | InputError: no \| pipes |" in text
    assert "| 5 | not started | importance=random, seed=1 |  |" in text
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["finetuned_mean"] == "81.0000"
    assert rows[1]["finetuned_sd"] == ""
    for name in ("accuracy_over_cut", "kept_over_depth", "part_preference", "integration"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 5000
    page = (out / "report.html").read_text()
    assert "3 of 6 jobs are missing" in page
    assert "81.00 ± 1.41" in page
    assert (
        '<pre class="command">python prune.py -m data=digits compile=false importance=snr,l2,random seed=0,1 '
        "hydra/launcher=joblib</pre>" in page
    )
    assert page.count("<img ") == 4
    assert "81.00 ± 1.41" in capsys.readouterr().out


def test_several_sweeps_go_into_one_table(sweep: Path, tmp_path: Path) -> None:
    job(tmp_path / "more" / "0", ["data=digits", "compile=false", "importance=random", "seed=0"], 0.6)
    gather([sweep, tmp_path / "more"], tmp_path / "out")
    assert "| random | 1 |" in (tmp_path / "out" / "sweep.md").read_text()


def test_a_job_that_was_done_twice_counts_once(sweep: Path, tmp_path: Path) -> None:
    job(tmp_path / "more" / "0", ["data=digits", "compile=false", "importance=l2", "seed=1"], 0.9)
    text = (gather([sweep, tmp_path / "more"], tmp_path / "out") / "sweep.md").read_text()
    assert "| l2 | 1 | 50.00 | 25.00 | 90.00 | 10.00 | 70.00 |" in text
    assert "| more/0 | repeated | importance=l2, seed=1 |  |" in text


def test_medians_of_a_layer_are_over_the_filters_that_answer(sweep: Path) -> None:
    medians = layer_medians(sweep / "0" / "layers.csv")
    assert medians["part_preference"]["a"] == pytest.approx(0.3)
    assert medians["integration"]["a"] == pytest.approx(1.5)
    assert math.isnan(medians["integration"]["b"])


def settings(folder: Path, **changed: object) -> None:
    record = {
        "settings": {"seed": 0, "importance": {"criterion": "snr"}, **changed},
        "versions": {"torch": "2"},
        "machine": {"system": "x", "cores": 2},
    }
    (folder / "run.json").write_text(json.dumps({"command": None, **record}))


def test_jobs_that_ran_with_other_defaults_are_told_apart(tmp_path: Path) -> None:
    tags = {
        "tag_freqs": [6.0],
        "n_frames": 240,
        "frame_rate": 120.0,
        "noise_std": 0.02,
        "n_images": 4,
        "parts": "halves",
    }
    for name, criterion in (("old", "snr"), ("new", "l2")):
        for seed in (0, 1):
            job(tmp_path / name / str(seed), ["pretrained=true", f"seed={seed}"], 0.8 if name == "old" else 0.9)
            settings(
                tmp_path / name / str(seed),
                seed=seed,
                importance={"criterion": criterion},
                tagging=tags,
                finetune={"epochs": 1},
            )
    # Another layout of run.json, as of an older version, is no other setting.
    settings(tmp_path / "old" / "0", importance={"criterion": "snr"}, tagging=tags, finetune={"epochs": 1}, gone=1)
    text = (gather([tmp_path / "old", tmp_path / "new"], tmp_path / "out") / "sweep.md").read_text()
    assert '| "snr" | 2 | 50.00 ± 0.00 | 25.00 ± 0.00 | 90.00 ± 0.00 | 10.00 ± 0.00 | 80.00 ± 0.00 |' in text
    assert '| "l2" | 2 | 50.00 ± 0.00 | 25.00 ± 0.00 | 90.00 ± 0.00 | 10.00 ± 0.00 | 90.00 ± 0.00 |' in text


def test_groups_that_were_adjusted_are_told_apart(tmp_path: Path) -> None:
    for number, compensation in enumerate(("none", "least_squares")):
        job(tmp_path / str(number), ["importance=snr", "seed=0"], 0.5 + 0.4 * number)
        settings(tmp_path / str(number), importance={"criterion": "snr", "compensation": compensation})
    text = (gather([tmp_path], tmp_path / "out") / "sweep.md").read_text()
    assert "| importance.compensation | seeds |" in text
    assert "repeated" not in text


def test_a_job_without_overrides_is_a_job_of_its_own_and_seed_0_the_same_as_none(tmp_path: Path) -> None:
    for name, overrides in (("0", []), ("1", ["importance=l2"]), ("2", ["seed=0"])):
        job(tmp_path / name, overrides, 0.8)
        settings(tmp_path / name)
    rows = table(grouped(counted_once(told_apart(read_sweep(tmp_path)))))[1]
    assert [row[:2] for row in rows] == [["default", "1"], ["l2", "1"]]


def test_seeds_that_stand_in_a_config_are_told_of_all_jobs(tmp_path: Path) -> None:
    for seed in (0, 1):
        job(tmp_path / str(seed) / "0", ["importance=snr"], 0.8 + 0.02 * seed)
        settings(tmp_path / str(seed) / "0", seed=seed)
        path = tmp_path / str(seed) / "0" / "run.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "versions": {"torch": str(seed)}}))
    text = (gather([tmp_path / "0", tmp_path / "1"], tmp_path / "out") / "report.html").read_text()
    assert "Seeds 0 and 1" in text
    assert "2 of 2 jobs are in the table" in text


def test_an_older_record_of_a_run_still_makes_a_report(tmp_path: Path) -> None:
    job(tmp_path / "0", ["importance=snr"], 0.8)
    (tmp_path / "0" / "run.json").write_text('{"settings": {"importance": {"criterion": "snr"}}}')
    assert "1 of 1 jobs are in the table" in (gather([tmp_path], tmp_path / "out") / "report.html").read_text()


def test_what_a_job_recorded_counts_not_what_was_refused_in_its_folder(tmp_path: Path) -> None:
    job(tmp_path / "0", ["importance=snr"], 0.8)
    settings(tmp_path / "0", tagging={}, finetune={})
    record = json.loads((tmp_path / "0" / "run.json").read_text())
    (tmp_path / "0" / "run.json").write_text(json.dumps({**record, "command": "python prune.py importance=l2"}))
    (found,) = read_sweep(tmp_path)
    assert found.overrides == {"importance": "l2"}
    command = "freqprune prune --config-dir 'my configs' importance=l2"
    (tmp_path / "0" / "run.json").write_text(json.dumps({**record, "command": command}))
    assert read_sweep(tmp_path)[0].overrides == {"importance": "l2"}
    with pytest.raises(InputError, match="refused"), failures_kept(tmp_path / "0"):
        raise InputError("refused")
    assert not (tmp_path / "0" / "failed.txt").exists()
    with pytest.raises(InputError), failures_kept(tmp_path):
        raise InputError("caf\udce9.jpg is no image")
    assert (tmp_path / "failed.txt").read_text() == "caf\\udce9.jpg is no image\n"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.json", ""),
        ("metrics.json", "null"),
        ("metrics.json", '{"finished": true}'),
        ("run.json", "{"),
        (".hydra/overrides.yaml", "[1"),
    ],
)
def test_a_damaged_job_is_listed_and_the_others_counted(sweep: Path, tmp_path: Path, file: str, content: str) -> None:
    (sweep / "10" / file).write_text(content)
    text = (gather([sweep], tmp_path / "out") / "sweep.md").read_text()
    assert "| snr | 2 |" in text
    assert "| 10 | damaged |" in text


def test_a_damaged_multirun_file_or_reason_does_not_stop_the_table(sweep: Path, tmp_path: Path) -> None:
    (sweep / "multirun.yaml").write_text("")
    (sweep / "2" / "failed.txt").write_bytes(b"\xff out of memory")
    text = (gather([sweep], tmp_path / "out") / "sweep.md").read_text()
    assert "2 of 5 jobs are missing" in text
    assert "out of memory" in text


def test_a_refused_job_does_not_show_the_figures_of_another(sweep: Path) -> None:
    (sweep / "0" / "failed.txt").write_text("holds a finished job with other settings")
    assert read_sweep(sweep)[0].state == "failed"


@pytest.mark.parametrize(
    "given",
    [
        ["optimizer.lr=1e-5,0.1", "compile=True,no"],
        ["+q=a b,c", "~text"],
        ["ckpt=runs/d${seed}/last.ckpt", "seed=0,1"],
        ["++seed=range(0,3)"],
        ["tagging.tag_freqs=[6.0,7.5],[5.0,7.0]", "pruning.layers='layer3.*.conv1'"],
        ["x=choice(a,b)", "hydra.verbose=true"],
        ["ckpt='a\\${seed}'"],
    ],
)
def test_planned_jobs_are_those_that_hydra_starts(given: list[str], tmp_path: Path) -> None:
    parsed = OverridesParser.create().parse_overrides(given)
    (started,) = BasicSweeper.split_arguments(parsed, None)
    for number, overrides in enumerate(started):
        job(tmp_path / str(number), list(overrides), 0.8)
    multirun(tmp_path, given)
    assert [one.state for one in read_sweep(tmp_path)] == ["finished"] * len(started)
    assert len(planned(given)) == len(started)


def test_a_checkpoint_of_each_seed_makes_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed, and in a config of one's own."""
    given = ["ckpt=runs/d${seed}/last.ckpt", "seed=0,1"]
    for folder, words in (("typed", given), ("mine", ["experiment=mine", "seed=0,1"])):
        for seed in (0, 1):
            out = tmp_path / folder / str(seed)
            task = [words[0], f"seed={seed}"]
            job(out, task, 0.8)
            settings = OmegaConf.create({"seed": seed, "ckpt": "runs/d${seed}/last.ckpt", "output_dir": str(out)})
            # As Hydra has them: they follow the settings of the job.
            overrides = OmegaConf.create({"task": task})
            overrides._set_parent(settings)
            hydra = SimpleNamespace(
                overrides=overrides,
                job=SimpleNamespace(name="prune", config_name="prune"),
                runtime=SimpleNamespace(config_sources=[]),
                mode=RunMode.RUN,
            )
            monkeypatch.setattr(record.HydraConfig, "initialized", lambda: True)
            monkeypatch.setattr(record.HydraConfig, "get", lambda hydra=hydra: hydra)
            record.write(out, settings)
        multirun(tmp_path / folder, words)
        jobs = read_sweep(tmp_path / folder)
        assert [one.state for one in jobs] == ["finished"] * 2
        assert [group.seeds for group in grouped(told_apart(jobs))] == [2]
        check_goes_on(tmp_path / folder, words)


def test_checkpoints_of_each_seed_of_two_trainings_make_two_rows(tmp_path: Path) -> None:
    for name in ("plain", "tagloss"):
        for seed in (0, 1):
            out = tmp_path / name / str(seed)
            job(out, [f"seed={seed}"], 0.8)
            template = f"runs/{name}_${{seed}}/last.ckpt"
            content = {
                "settings": {"seed": seed, "ckpt": f"runs/{name}_{seed}/last.ckpt"},
                "follows_seed": {"ckpt": template},
            }
            (out / "run.json").write_text(json.dumps(content))
    groups = grouped(counted_once(told_apart(read_sweep(tmp_path))))
    assert [group.seeds for group in groups] == [2, 2]
    assert [group.settings["ckpt"] for group in groups] == [
        f'"runs/{n}_${{seed}}/last.ckpt"' for n in ("plain", "tagloss")
    ]


def test_layers_of_networks_of_different_depth_are_in_the_order_of_each() -> None:
    shallow = {f"layer{stage}.{block}": 1.0 for stage in (1, 2, 3) for block in range(3)}
    deep = {f"layer{stage}.{block}": 1.0 for stage in (1, 2, 3) for block in range(5)}
    for figure in (medians_over_depth({"20": shallow, "32": deep}, "x"), kept_over_depth({"20": shallow, "32": deep})):
        labels = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
        assert labels == list(deep)


def test_sweeps_of_one_name_and_jobs_without_a_setting_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(sweeps, "kept_over_depth", lambda shares: drawn.extend(shares) or Figure())
    job(tmp_path / "m1" / "sweep" / "0", ["seed=0"], 0.8)
    job(tmp_path / "m2" / "sweep" / "0", ["importance=snr", "seed=0"], 0.7)
    job(tmp_path / "m2" / "sweep" / "1", ["importance=snr", "seed=1"], failed="no room")
    gather([tmp_path / "m1" / "sweep", tmp_path / "m2" / "sweep"], tmp_path / "all")
    assert drawn == ["default", "snr"]
    assert "| m2/1 | failed |" in (tmp_path / "all" / "sweep.md").read_text()


def test_jobs_of_a_glob_are_those_that_began(sweep: Path, tmp_path: Path) -> None:
    multirun(sweep, ["importance=glob(*)"])
    assert len(read_sweep(sweep)) == 5


def test_a_sweep_does_not_start_over_the_jobs_of_another(sweep: Path) -> None:
    check_goes_on(sweep, ["data=digits", "compile=false", "importance=snr,l2,random", "seed=0,1"])
    # Only the first two are finished; l2 with seed 0 failed.
    check_goes_on(sweep, ["data=digits", "compile=false", "importance=snr", "seed=0,1,2"])
    with pytest.raises(InputError, match="0 holds a finished job of another sweep"):
        check_goes_on(sweep, ["data=digits", "compile=false", "importance=random", "seed=0"])


def test_jobs_that_go_on_with_other_runs_are_jobs_of_their_own(tmp_path: Path) -> None:
    for number, run in enumerate("ab"):
        given = ["data=digits", f"resume=runs/{run}"]
        job(tmp_path / str(number), given, 0.8)
        record.write_json(tmp_path / str(number) / record.RUN, {"settings": {"seed": 0, "resume": f"runs/{run}"}})
    assert [one.state for one in counted_once(told_apart(read_sweep(tmp_path)))] == ["finished", "finished"]
    with pytest.raises(InputError, match="0 holds a finished job of another sweep"):
        check_goes_on(tmp_path, ["data=digits", "resume=runs/c,runs/d"])


def test_a_job_that_was_finished_in_its_folder_is_the_job_that_began_there(sweep: Path) -> None:
    asked = ["data=digits", "compile=false", "importance=snr,l2,random", "seed=0,1"]
    states = {one.name: one.state for one in read_sweep(sweep)}
    given = ["data=digits", "compile=false", "importance=snr", "seed=1"]
    # With the network that was trained there, where it was.
    own = [
        f"resume='{sweep / '1'}'",
        f"ckpt={sweep / '1' / 'checkpoints' / 'last.ckpt'}",
        f"hydra.run.dir={sweep / '1'}",
    ]
    typed = shlex.join([*given, *own])
    # What the job's own record does not hold, as it went on where it was.
    settings = {"seed": 1, "resume": None, "ckpt": None}
    record.write_json(sweep / "1" / record.RUN, {"command": f"freqprune prune {typed}", "settings": settings})
    check_goes_on(sweep, asked)
    assert {one.name: one.state for one in read_sweep(sweep)} == states
    # A null that was typed is no folder to go on in.
    nothing = {"command": f"freqprune prune {shlex.join([*given, 'ckpt=null'])}", "settings": settings}
    record.write_json(sweep / "1" / record.RUN, nothing)
    assert next(one for one in read_sweep(sweep) if one.name == "1").overrides["ckpt"] == "null"
    # A network that was trained there and cut there is another job.
    typed = shlex.join([*given, *own[1:]])
    settings |= {"ckpt": "${output_dir}/checkpoints/last.ckpt"}
    record.write_json(sweep / "1" / record.RUN, {"command": f"freqprune prune {typed}", "settings": settings})
    with pytest.raises(InputError, match="1 holds a finished job of another sweep"):
        check_goes_on(sweep, asked)


def test_what_a_job_goes_on_with_may_be_called_by_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert record.gone_on_with({"ckpt": 5, "ckpt_path": None, "resume": None}, tmp_path / "1") == []
    assert record.gone_on_with({"ckpt": 5, "ckpt_path": None, "resume": 1}, tmp_path / "1") == ["resume"]


def test_commands_of_configs_of_ones_own_are_read(sweep: Path) -> None:
    typed = ["--config-dir", "/my configs", "--config-name", "big", "seed=0"]
    record.write_json(sweep / "0" / record.RUN, {"command": f"freqprune prune {shlex.join(typed)}"})
    assert next(one for one in read_sweep(sweep) if one.name == "0").overrides == {"seed": "0"}
    assert commands_of(sweep)[0].startswith("freqprune prune --config-dir '/my configs' --config-name big -m ")


def test_a_parent_folder_counts_the_jobs_of_every_sweep(sweep: Path, tmp_path: Path) -> None:
    job(tmp_path / "other" / "0", ["data=digits", "compile=false", "importance=lamp", "seed=0"], 0.6)
    multirun(tmp_path / "other", ["data=digits", "compile=false", "importance=lamp,taylor", "seed=0"])
    jobs = read_sweep(tmp_path)
    assert [(one.name, one.state) for one in jobs if one.overrides["importance"] in ("lamp", "taylor")] == [
        ("other/0", "finished"), ("other/1", "not started")
    ]  # fmt: skip
    assert len(commands_of(tmp_path)) == 2


def test_the_report_of_a_single_run_is_not_overwritten(sweep: Path, tmp_path: Path) -> None:
    settings(sweep / "0")
    with pytest.raises(
        InputError, match="folder of a single run, whose report would be overwritten; give another with --out"
    ):
        gather([sweep / "0"])
    (sweep / "0" / "run.json").unlink()
    gather([sweep, sweep], tmp_path / "out")
    assert "3 of 6 jobs are missing" in (tmp_path / "out" / "sweep.md").read_text()


def test_figures_of_an_earlier_gathering_go(sweep: Path, tmp_path: Path) -> None:
    out = gather([sweep], tmp_path / "out")
    for path in sweep.glob("*/layers.csv"):
        path.unlink()
    gather([sweep], out)
    assert {path.name for path in (out / "figures").iterdir()} == {"accuracy_over_cut.png", "kept_over_depth.png"}


def test_stages_that_only_some_jobs_reached(sweep: Path) -> None:
    metrics = json.loads((sweep / "0" / "metrics.json").read_text())
    del metrics["finetuned"]
    (sweep / "0" / "metrics.json").write_text(json.dumps(metrics))
    assert table(grouped(read_sweep(sweep)))[1][0][-1] == "82.00 (1 of 2)"


def test_labels_stay_apart_and_short(tmp_path: Path) -> None:
    for number in range(2):
        for key in ("optimizer.lr", "finetune.lr"):
            job(tmp_path / f"{key}{number}", [f"{key}=0.1", f"seed={number}", "ckpt='a$_$b^'"], 0.8)
    job(tmp_path / "plain", ["seed=0", "ckpt=" + "x" * 300], 0.8)
    groups = grouped(read_sweep(tmp_path))
    assert len({group.label("") for group in groups}) == len(groups) == 3
    gather([tmp_path], tmp_path / "out")


def test_an_explanation_in_the_folder_of_a_job_is_passed_over(sweep: Path) -> None:
    before = len(read_sweep(sweep))
    (sweep / "0" / "explain" / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(["ckpt=x"]), sweep / "0" / "explain" / ".hydra" / "overrides.yaml")
    (sweep / "0" / "explain" / "explain.html").write_text("")
    assert len(read_sweep(sweep)) == before
    with pytest.raises(InputError, match="is a sweep of explain"):
        read_sweep(sweep / "0" / "explain")


def test_sweeps_of_explain_beside_others_are_passed_over(sweep: Path) -> None:
    """Also jobs of them that failed, or have not begun."""
    before = [(job.name, job.state) for job in read_sweep(sweep)]
    other = sweep / "explain"
    for number, page in ((0, "explain.html"), (1, "failed.txt")):
        (other / str(number) / ".hydra").mkdir(parents=True)
        OmegaConf.save(OmegaConf.create([f"seed={number}"]), other / str(number) / ".hydra" / "overrides.yaml")
        (other / str(number) / page).write_text("no")
    hydra = {"job": {"name": "explain"}, "overrides": {"hydra": [], "task": ["seed=0,1,2"]}}
    OmegaConf.save(OmegaConf.create({"hydra": hydra}), other / "multirun.yaml")
    assert [(job.name, job.state) for job in read_sweep(sweep)] == before
    with pytest.raises(InputError, match="is a sweep of explain"):
        read_sweep(other)


def test_checkpoints_are_named_in_figures_by_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        job(tmp_path / str(number), [f"ckpt=multirun/train/today/{number}/checkpoints/last.ckpt"], 0.8)
    drawn: list[str] = []

    def draw(lines: Mapping[str, object], *_: object) -> Figure:
        drawn.extend(lines)
        return Figure()

    monkeypatch.setattr(sweeps, "accuracy_over_cut", draw)
    gather([tmp_path], tmp_path / "out")
    assert drawn == ["ckpt 0", "ckpt 1"]
    assert "today/1/checkpoints" in (tmp_path / "out" / "sweep.md").read_text()


def test_shares_of_filters_kept_are_of_those_that_the_layer_had(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Mapping[str, float]] = {}

    def draw(shares: Mapping[str, Mapping[str, float]]) -> Figure:
        drawn.update(shares)
        return Figure()

    monkeypatch.setattr(sweeps, "kept_over_depth", draw)
    monkeypatch.setattr(sweeps, "save", lambda *_: None)
    gather([sweep], tmp_path / "out")
    # 3 of 4 and 2 of 8.
    assert list(drawn.values()) == [{"a": 0.75, "b": 0.25}] * 2


def trained(folder: Path, pruning: bool) -> None:
    """A job of `train.py` whose training is done."""
    job(folder, ["optimizer.lr=0.1"])
    settings(folder, pruning={"enabled": pruning})
    (folder / "training.json").write_text(json.dumps({"epochs": 1, "val_accuracy": 0.75, "test_accuracy": 0.5}))


def test_validation_and_test_are_told_apart_in_a_sweep_of_trainings(tmp_path: Path) -> None:
    trained(tmp_path / "0", pruning=False)
    header, (row,) = table(grouped(read_sweep(tmp_path)))
    assert dict(zip(header, row, strict=True)).items() >= {("validation, %", "75.00"), ("test, %", "50.00")}


def test_a_job_that_trains_and_prunes_is_not_finished_after_its_training(tmp_path: Path) -> None:
    trained(tmp_path / "0", pruning=True)
    assert not is_finished(tmp_path / "0")
    assert [one.state for one in read_sweep(tmp_path)] == ["unfinished"]
    (tmp_path / "0" / "metrics.json").write_text('{"finished": true}')
    assert is_finished(tmp_path / "0")


def test_a_job_that_failed_and_was_done_again_counts(tmp_path: Path) -> None:
    job(tmp_path / "0", ["importance=snr"])
    with pytest.raises(RuntimeError, match="out of memory"), failures_kept(tmp_path / "0"):
        raise RuntimeError("out of memory")
    (before,) = read_sweep(tmp_path)
    assert (before.state, before.error) == ("failed", "RuntimeError: out of memory")
    stage = {"test_accuracy": 0.8, "macs": 2, "params": 2}
    with failures_kept(tmp_path / "0"):
        (tmp_path / "0" / "metrics.json").write_text(json.dumps({"dense": stage, "finished": True}))
    (after,) = read_sweep(tmp_path)
    assert (after.state, after.metrics) == ("finished", {"dense": 80.0})


def test_a_sweep_is_gathered_whatever_ended_it(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        cli.Gather.folder = str(sweep)
        raise RuntimeError("out of memory")

    for name in ("FREQPRUNE_RUN_ID", "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(RuntimeError, match="out of memory"):
        cli._run(main, "prune")
    assert "3 of 6 jobs are missing" in (sweep / "sweep.md").read_text()


def test_a_gathering_that_fails_does_not_hide_the_error(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cli.Gather, "folder", str(sweep))
    monkeypatch.setattr("freqprune.reports.gather", lambda folders: 1 / 0)
    cli.gather_sweep()
    assert "could not be gathered (ZeroDivisionError" in caplog.text


def test_folders_without_jobs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no jobs"):
        read_sweep(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        read_sweep(tmp_path / "none")


def test_layers_that_went_altogether_keep_none_of_their_filters(tmp_path: Path) -> None:
    jobs = []
    for number, kept in enumerate(({"a": 3}, {"a": 3, "b": 8})):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({"kept": kept, "widths": {"a": 4, "b": 8}}))
        jobs.append(Job(str(number), "finished", folder=folder))
    assert sweeps._shares_kept(Group({}, tuple(jobs), {}, {})) == {"a": 0.75, "b": 0.5}
