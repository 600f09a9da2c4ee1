"""metrics.csv over the restarts of a run."""

import csv
from pathlib import Path

import pytest

from vit.history import History


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def first(tmp_path) -> History:
    """A run of six steps, validated after each three of them."""
    history = History(tmp_path)
    history.go_on_at(0)
    for step in range(6):
        history.log_metrics({"train/loss": 9.0 - step}, step)
        if step % 3 == 2:
            history.log_metrics({"val/acc": step / 10}, step)
    return history


def test_rows_are_there_at_once_and_in_order(first, tmp_path):
    found = [(row["step"], row["train/loss"], row["val/acc"]) for row in rows(tmp_path)]
    assert found[:4] == [("0", "9.0", ""), ("1", "8.0", ""), ("2", "7.0", ""), ("2", "", "0.2")]
    assert found[-1] == ("5", "", "0.5")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize(("step", "kept"), [(6, 8), (4, 5), (3, 4), (0, 0)])
def test_rows_after_the_checkpoint_come_again(first, tmp_path, step, kept):
    before = rows(tmp_path)
    second = History(tmp_path)
    second.go_on_at(step)
    assert rows(tmp_path) == before[:kept]
    for later in before[kept:]:
        values = {name: float(text) for name, text in later.items() if text and name != "step"}
        second.log_metrics(values, int(later["step"]))
    assert rows(tmp_path) == before


def test_column_that_comes_later(first, tmp_path):
    second = History(tmp_path)
    second.go_on_at(6)
    second.log_metrics({"test/acc": 0.7}, 6)
    found = rows(tmp_path)
    assert len(found) == 9
    assert (found[0]["train/loss"], found[0]["test/acc"]) == ("9.0", "")
    assert found[-1]["test/acc"] == "0.7"


def test_row_logged_twice_is_there_once(first, tmp_path):
    """The guard has it logged before it saves, Lightning after that."""
    for _ in range(2):
        first.log_metrics({"train/loss": 1.5}, 6)
    assert [row["train/loss"] for row in rows(tmp_path)][-2:] == ["", "1.5"]


@pytest.mark.parametrize("end", ["6", "6,1.5,0.", "x\n", "5,1,2,3\n"])
def test_half_a_row_is_forgotten(first, tmp_path, end):
    """Of a machine that lost power, or two in one; columns are step, train/loss and val/acc."""
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write(end)
    second = History(tmp_path)
    second.go_on_at(7)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2", "2", "3", "4", "5", "5"]


def test_damaged_table_does_not_stop_a_run(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"\xff\xfe\0garbage\n\n")
    history = History(tmp_path)
    history.go_on_at(3)
    history.log_metrics({"train/loss": 1.0}, 3)
    assert rows(tmp_path) == [{"step": "3", "train/loss": "1.0"}]


def test_measuring_starts_a_table(first, tmp_path):
    """``validate`` and ``test`` write one row and go on from nothing."""
    History(tmp_path).log_metrics({"val/acc": 0.5}, 0)
    assert rows(tmp_path) == [{"step": "0", "val/acc": "0.5"}]
