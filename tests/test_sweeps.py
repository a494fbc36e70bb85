"""Tables of sweeps from folders as Hydra leaves them."""

import csv
import json
import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from freqprune.errors import InputError
from freqprune.jobs import read_sweep
from freqprune.report import layer_medians
from freqprune.sweeps import gather, grouped, table


def job(folder: Path, overrides: list[str], finetuned: float | None = None, failed: str = "") -> None:
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
    if finetuned is not None:
        stages = {"dense": {"test_accuracy": 0.9, "macs": 200, "params": 100}, "pruned": {"test_accuracy": 0.1, "macs": 100, "params": 75}}
        counts = {"kept": {"a": 3, "b": 2}, "widths": {"a": 4, "b": 8}}
        (folder / "metrics.json").write_text(json.dumps({**stages, **counts, "finetuned": {"test_accuracy": finetuned}, "finished": True}))
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


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    job(folder / "0", ["data=digits", "compile=False", "importance=snr", "seed=0"], 0.80)
    job(folder / "1", ["data=digits", "compile=False", "importance=snr", "seed=1"], 0.82)
    job(folder / "2", ["data=digits", "compile=False", "importance=l2", "seed=0"], failed="InputError: no | pipes\nmore")
    job(folder / "10", ["data=digits", "compile=False", "importance=l2", "seed=1"], 0.7)
    job(folder / "9", ["data=digits", "compile=False", "importance=random", "seed=0"])
    given = ["data=digits", "compile=false", "importance=snr,l2,random", "seed=0,1"]
    OmegaConf.save(
        OmegaConf.create({"hydra": {"overrides": {"task": given, "hydra": ["hydra/launcher=joblib", "hydra.mode=MULTIRUN"]}}}), folder / "multirun.yaml"
    )
    return folder


def test_means_and_deviations_over_seeds(sweep: Path) -> None:
    groups = grouped(read_sweep(sweep))
    assert [(g.settings, g.seeds) for g in groups] == [({"importance": "snr"}, 2), ({"importance": "l2"}, 1)]
    assert groups[0].mean["finetuned"] == pytest.approx(81)
    assert groups[0].sd["finetuned"] == pytest.approx(2**0.5)
    assert groups[0].mean["cut"] == pytest.approx(50)
    header, rows = table(groups)
    assert header == ["importance", "seeds", "MACs cut, %", "parameters cut, %", "dense, %", "pruned, %", "finetuned, %"]
    assert rows[0] == ["snr", "2", "50.00 ± 0.00", "25.00 ± 0.00", "90.00 ± 0.00", "10.00 ± 0.00", "81.00 ± 1.41"]
    assert rows[1][-1] == "70.00"


def test_no_job_is_dropped(sweep: Path) -> None:
    jobs = read_sweep(sweep)
    assert [(j.name, j.state) for j in jobs] == [
        ("0", "finished"), ("1", "finished"), ("2", "failed"), ("9", "unfinished"), ("10", "finished"), ("5", "not started"),
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
    assert '<pre class="command">python prune.py -m data=digits compile=false importance=snr,l2,random seed=0,1 hydra/launcher=joblib</pre>' in page
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
    assert "| 0 | repeated | importance=l2, seed=1 |  |" in text


def test_medians_of_a_layer_are_over_the_filters_that_answer(sweep: Path) -> None:
    medians = layer_medians(sweep / "0" / "layers.csv")
    assert medians["part_preference"]["a"] == pytest.approx(0.3)
    assert medians["integration"]["a"] == pytest.approx(1.5)
    assert math.isnan(medians["integration"]["b"])


def test_folders_without_jobs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no jobs"):
        read_sweep(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        read_sweep(tmp_path / "none")
