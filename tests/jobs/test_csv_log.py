"""The table of a training that is interrupted and resumed in its own folder."""

import csv
import json
from pathlib import Path

import pytest

from freqprune.jobs.csv_log import ResumedCSVLogger
from freqprune.jobs.jsonl import JSONLinesLogger

Logger = type[ResumedCSVLogger]


def logger_of(kind: Logger, folder: Path) -> ResumedCSVLogger:
    made = kind(str(folder), name="", version="")
    made.log_hyperparams({"lr": 0.1})
    return made


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", [ResumedCSVLogger, JSONLinesLogger])
def test_a_resumed_table_goes_on_after_the_epochs_before(kind: Logger, tmp_path: Path) -> None:
    first = logger_of(kind, tmp_path)
    for epoch in range(3):
        first.log_metrics({"epoch": epoch, "loss": 10.0 + epoch}, step=epoch)
        first.save()
    # Epoch 2 was interrupted; it is trained again, with something more to say.
    second = logger_of(kind, tmp_path)
    assert [row["loss"] for row in rows(tmp_path)] == ["10.0", "11.0", "12.0"]
    second.log_metrics({"epoch": 2, "loss": 7.0, "accuracy": 0.5}, step=2)
    second.log_metrics({"epoch": 3, "loss": 6.0}, step=3)
    second.save()
    second.save()
    assert [(row["epoch"], row["loss"], row["accuracy"]) for row in rows(tmp_path)] == [
        ("0", "10.0", ""),
        ("1", "11.0", ""),
        ("2", "7.0", "0.5"),
        ("3", "6.0", ""),
    ]


def test_rows_without_an_epoch_go_and_stay_with_their_steps(tmp_path: Path) -> None:
    """Learning rates are logged before the epoch that they belong to has an entry, and may fill the buffer first."""
    first = logger_of(ResumedCSVLogger, tmp_path)
    for epoch in range(2):
        first.log_metrics({"lr": 0.1 - 0.01 * epoch}, step=10 * epoch)
        first.log_metrics({"epoch": epoch, "loss": 10.0 + epoch}, step=10 * epoch + 9)
    first.save()
    second = logger_of(ResumedCSVLogger, tmp_path)
    second.log_metrics({"lr": 0.05, "momentum": 0.9}, step=10)
    second.save()
    second.log_metrics({"epoch": 1, "loss": 7.0}, step=19)
    second.save()
    assert [(row["step"], row["epoch"], row["loss"], row["lr"], row["momentum"]) for row in rows(tmp_path)] == [
        ("0", "", "", "0.1", ""),
        ("9", "0", "10.0", "", ""),
        ("10", "", "", "0.05", "0.9"),
        ("19", "1", "7.0", "", ""),
    ]


def test_rows_are_kept_where_no_epoch_has_an_entry(tmp_path: Path) -> None:
    first = logger_of(ResumedCSVLogger, tmp_path)
    first.log_metrics({"epoch": 0, "loss": 1.0}, step=0)
    first.finalize("success")
    second = logger_of(ResumedCSVLogger, tmp_path)
    second.log_metrics({"test": 0.5}, step=1)
    second.finalize("success")
    assert [(row["epoch"], row["loss"], row["test"]) for row in rows(tmp_path)] == [("0", "1.0", ""), ("", "", "0.5")]


def test_a_new_training_begins_with_an_empty_table(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        logger = logger_of(ResumedCSVLogger, tmp_path)
        logger.log_metrics({"epoch": 0, f"loss_{loss:.0f}": loss}, step=0)
        logger.save()
    assert rows(tmp_path) == [{"epoch": "0", "loss_2": "2.0", "step": "0"}]


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_of_an_earlier_run_end_where_the_new_one_begins(tmp_path: Path) -> None:
    first = logger_of(JSONLinesLogger, tmp_path)
    for epoch in range(3):
        first.log_metrics({"lr-SGD/pg1": 0.1}, step=epoch)
        first.log_metrics({"epoch": epoch, "loss": 10.0 + epoch}, step=epoch)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epo')
    second = logger_of(JSONLinesLogger, tmp_path)
    second.log_metrics({"lr-SGD/pg1": 0.2}, step=2)
    second.log_metrics({"epoch": 2, "loss": 7.0}, step=2)
    assert lines(tmp_path) == [
        {"step": 0, "lr-SGD/pg1": 0.1},
        {"step": 0, "epoch": 0, "loss": 10.0},
        {"step": 1, "lr-SGD/pg1": 0.1},
        {"step": 1, "epoch": 1, "loss": 11.0},
        {"step": 2, "lr-SGD/pg1": 0.2},
        {"step": 2, "epoch": 2, "loss": 7.0},
    ]
    logger_of(JSONLinesLogger, tmp_path).log_metrics({"epoch": 0, "loss": 5.0}, step=0)
    assert lines(tmp_path) == [{"step": 0, "epoch": 0, "loss": 5.0}]


def test_lines_of_stages_follow_the_training_and_the_stages_before(tmp_path: Path) -> None:
    logger_of(JSONLinesLogger, tmp_path).log_metrics({"epoch": 0, "loss": 5.0}, step=0)
    first = logger_of(JSONLinesLogger, tmp_path)
    for stage in ("dense", "pruned", "finetuned"):
        first.write_line({f"{stage}/macs": 1.0})
    # Resumed after the cut, then cut anew.
    logger_of(JSONLinesLogger, tmp_path).write_line({"finetuned/macs": 2.0})
    stages = [
        {"step": None, "dense/macs": 1.0},
        {"step": None, "pruned/macs": 1.0},
        {"step": None, "finetuned/macs": 2.0},
    ]
    assert lines(tmp_path) == [{"step": 0, "epoch": 0, "loss": 5.0}, *stages]
    logger_of(JSONLinesLogger, tmp_path).write_line({"dense/macs": 3.0})
    assert lines(tmp_path) == [{"step": 0, "epoch": 0, "loss": 5.0}, {"step": None, "dense/macs": 3.0}]


def test_a_training_without_an_epoch_left_keeps_one_row_of_each_stage(tmp_path: Path) -> None:
    """Lightning finalizes its loggers after a fit of no epochs, too; the test follows."""
    first = logger_of(ResumedCSVLogger, tmp_path)
    for epoch in range(2):
        first.log_metrics({"epoch": epoch, "loss": 10.0 + epoch}, step=epoch)
    first.log_metrics({"epoch": 2, "test": 0.4}, step=2)
    first.save()
    second = logger_of(ResumedCSVLogger, tmp_path)
    assert second.experiment is not None
    second.finalize("success")
    second.log_metrics({"epoch": 2, "test": 0.5}, step=2)
    second.save()
    assert [(row["epoch"], row["test"]) for row in rows(tmp_path)] == [("0", ""), ("1", ""), ("2", "0.5")]


def test_a_table_of_another_training_is_forgotten(tmp_path: Path) -> None:
    """Which goes on from a checkpoint elsewhere: epochs before its first are not this training's either."""
    first = logger_of(ResumedCSVLogger, tmp_path)
    for epoch in range(3):
        first.log_metrics({"epoch": epoch, "loss": 10.0 + epoch}, step=epoch)
    first.save()
    second = logger_of(ResumedCSVLogger, tmp_path)
    assert second.experiment is not None
    second.forget()
    second.log_metrics({"epoch": 2, "accuracy": 0.5}, step=2)
    second.save()
    assert [(row["epoch"], row["accuracy"]) for row in rows(tmp_path)] == [("2", "0.5")]
