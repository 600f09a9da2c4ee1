"""A race that is stopped keeps what it has, and what it lacks it says before it trains."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import race, record
from data.datamodule import CPU, ImageDataModule


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
    for images, count in (("test", 359), ("held out", 143)):
        command(*short, *(["--choose"] if images == "held out" else []), "--model.depth", "2")
        race.main()
        result = json.loads((tmp_path / "results/race.json").read_text())
        (row,) = result["rows"]
        assert (result["images"], row["epochs"]) == (images, 3)
        assert 0.5 < row["accuracy"] < 1
        assert row["accuracy"] * count == pytest.approx(round(row["accuracy"] * count), abs=0.02)  # a share of these
        assert row["images/s"] > 0


def test_what_the_compiler_took_is_no_training():
    assert race.split_time([0.0, 1.0, 2.0, 32.0, 33.0, 34.0]) == (5, 29)
    assert race.split_time([0.0, 0.01, 0.91, 0.92]) == pytest.approx((0.92, 0))  # within a second nothing is compiled


def test_accuracy_is_that_of_normalised_test_images():
    module, seen = ImageDataModule(dataset="digits", val_fraction=0), []
    module.setup()
    found = race.accuracy(lambda images: seen.append(images) or torch.eye(10)[:1].expand(len(images), -1), module, CPU)
    split: Any = module.source.test
    assert torch.equal(torch.cat(seen), module.preprocess.normalize(split.images))
    assert found == int((split.labels == 0).sum()) / 359  # all of them were called 0


def test_what_a_run_comes_to(monkeypatch):
    monkeypatch.setattr(race, "accuracy", lambda model, module, device: 0.1 if model.training else 0.5)
    module: Any = SimpleNamespace(batch_size=10, order=range(2))
    found = race.outcome(nn.Identity(), module, [0.0, 30.0, 60.0, 90.0, 120.0], CPU)
    assert found == {"accuracy": 0.5, "minutes": 2, "compiling": 0, "images/s": 40 / 120, "epochs": 2}


def test_the_control_has_the_minutes_of_the_longest_run(command, monkeypatch):
    def once(options, epochs, seed, device):
        return {"accuracy": 0.5, "minutes": 1 / epochs, "compiling": 0.0, "images/s": 1.0, "epochs": epochs}

    minutes = []
    monkeypatch.setattr(race, "ours", once)
    monkeypatch.setattr(race, "cct_7", lambda size, classes: None)
    monkeypatch.setattr(race, "control", lambda options, given, *_: minutes.append(given) or once(*(1,) * 4))
    command("--epochs", "4", "2", "8", "--seeds", "1")
    race.main()
    assert minutes == [0.5]


def test_the_control_trains_from_its_start_for_as_long_as_it_is_given(monkeypatch):
    """Of eleven batches an epoch, two seconds each, eleven minutes are thirty epochs."""
    seen = []

    def train(model, network, module, device, *, steps):
        seen.append((steps, float(model.weight.detach().sum())))
        model.weight.data += 1
        return [2.0 * step for step in range(steps + 1)]

    monkeypatch.setattr(race, "cct_7", lambda size, classes: nn.Linear(2, classes))
    monkeypatch.setattr(race, "train", train)
    monkeypatch.setattr(race, "accuracy", lambda *_: 0.5)
    options = SimpleNamespace(choose=False, data="digits")
    found = race.control(options, 11.0, 0, CPU)
    assert [steps for steps, _ in seen] == [11, 330]
    assert seen[0] == (11, seen[1][1])  # not from what the trial has learned
    assert (found["epochs"], found["minutes"]) == (30, 11)
