"""A race that is stopped keeps what it has, and what it lacks it says before it trains."""

import json
import sys

import pytest

from benchmarks import race, record


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Sets a race's arguments; its results go to a folder of the test."""
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(race.torch, "set_float32_matmul_precision", lambda precision: None)
    return lambda *arguments: monkeypatch.setattr(sys, "argv", ["race", *arguments])


def test_a_stopped_race_keeps_the_seeds_that_are_done(command, monkeypatch, tmp_path):
    def run(options, epochs, seed, device):
        if seed == 2:
            raise KeyboardInterrupt
        figures = {"minutes": 1.0, "compiling": 0.0, "images/s": 100.0, "epochs": epochs}
        return figures | {"accuracy": [0.5, 0.7][seed]}

    monkeypatch.setattr(race, "ours", run)
    command("--no-control", "--epochs", "7", "--seeds", "3", "--name", "stopped")
    with pytest.raises(KeyboardInterrupt):
        race.main()
    (row,) = json.loads((tmp_path / "results/stopped.json").read_text())["rows"]
    assert (row["epochs"], row["accuracy"], row["of the seeds"]) == (7, 0.6, "50.00% 70.00%")


def test_a_missing_package_is_named_before_anything_is_trained(command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vit_pytorch", None)
    monkeypatch.setattr(race, "ours", lambda *_: pytest.fail("it trained"))
    command()
    with pytest.raises(SystemExit):
        race.main()
    assert "needs the package vit-pytorch" in capsys.readouterr().err.splitlines()[-1]


def test_a_race_trains_the_config_and_measures_on_test_or_held_out_images(command, tmp_path):
    short = ("--config", "configs/digits.yaml", "--data", "digits", "--epochs", "3", "--seeds", "1", "--no-control")
    for images in ("test", "held out"):
        command(*short, *(["--choose"] if images == "held out" else []), "--model.depth", "2")
        race.main()
        result = json.loads((tmp_path / "results/race.json").read_text())
        (row,) = result["rows"]
        assert (result["images"], row["epochs"]) == (images, 3)
        assert 0.5 < row["accuracy"] < 1
        assert row["images/s"] > 0
