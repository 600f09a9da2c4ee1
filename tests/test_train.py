"""The command line: what a run leaves behind, how it goes on after a crash, and one line for every mistake."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image

import data.cache
import train
import vit.classifier
import vit.cli
from data.sources import Split, load_digits
from vit import Predictor
from vit.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
TINY = [
    f"--config={ROOT / 'configs/digits.yaml'}",
    "--model.embed_dim=16",
    "--model.depth=2",
    "--model.num_heads=2",
    "--model.drop_path_rate=0.2",  # random numbers beside those of the images
    "--data.batch_size=256",  # five steps an epoch
    "--trainer.enable_progress_bar=false",
]

FINETUNE = [
    *(f"--config={ROOT / 'configs/finetune.yaml'}", "--data.dataset=digits", "--data.batch_size=512"),
    *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.limit_train_batches=1"),
]


def run(command: str, root: Path, *arguments: str) -> int:
    return train.main([command, *TINY, f"--trainer.default_root_dir={root}", *arguments])


def process(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """train.py, or some code around it, in a process of its own that computes as this one does."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    start = ["-c", code] if code else [str(ROOT / "train.py")]
    return subprocess.run([sys.executable, *start, *arguments], env=environment, capture_output=True, text=True)


def table(root: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv, without empty cells."""
    with open(root / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def pixels(images: torch.Tensor, checkpoint: Path) -> torch.Tensor:
    return load_checkpoint(checkpoint)[1].preprocess.normalize(images)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    """The folder of a run of two epochs."""
    root = tmp_path_factory.mktemp("fitted")
    assert run("fit", root, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1") == 0
    return root


# What a run leaves behind


def test_everything_lies_in_the_run_folder(fitted):
    names = {path.name for path in fitted.iterdir()}
    assert {"config.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "model.safetensors"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if "-v" in name or (name.startswith(".") and name != ".lock")]


def test_metrics_are_written_down(fitted):
    rows = table(fitted)
    measured = [row["val/acc"] for row in rows if "val/acc" in row]
    assert len(measured) == 2
    _, about = load_checkpoint(fitted / "best.ckpt")
    assert about.metrics["val/acc"] == pytest.approx(max(measured), abs=1e-6)
    assert load_checkpoint(fitted / "last.ckpt")[1].metrics["val/acc"] == pytest.approx(measured[-1], abs=1e-6)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 10
    assert losses[-1] < losses[0]


def test_config_repeats_the_run(fitted, tmp_path):
    config = yaml.safe_load((fitted / "config.yaml").read_text())
    assert config["data"]["dataset"] == "digits"
    arguments = [f"--config={fitted / 'config.yaml'}", f"--trainer.default_root_dir={tmp_path}"]
    assert train.main(["fit", *arguments]) == 0
    first, second = weights(fitted / "last.ckpt"), weights(tmp_path / "last.ckpt")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_all_files_hold_the_same_model(fitted):
    """Logits from best.ckpt, model.safetensors and the module that was trained."""
    images = pixels(load_digits().test.images[:50], fitted / "best.ckpt")  # type: ignore[union-attr]
    trained = train.ViTClassifier.load_from_checkpoint(fitted / "best.ckpt", weights_only=True).eval()
    with torch.no_grad():
        expected = trained(images)
        for name in ("best.ckpt", "model.safetensors"):
            torch.testing.assert_close(load_checkpoint(fitted / name)[0](images), expected, rtol=0, atol=1e-6)


def test_model_file_says_what_it_is(fitted):
    about = load_checkpoint(fitted / "model.safetensors")[1]
    assert about.class_names == tuple("0123456789")
    assert about.training["dataset"] == "digits"
    assert about.training["steps"] == 5 * about.training["epochs"]
    assert about.metrics["val/acc"] == max(row["val/acc"] for row in table(fitted) if "val/acc" in row)
    assert json.dumps(about.training)


def test_a_checkpoint_that_knows_nothing_of_an_option_has_its_default(fitted, tmp_path, capfd):
    """Rotary positions have no weights, so nothing else would tell."""
    path, rope = fitted / "best.ckpt", "--model.rope=true"
    assert "rope" not in torch.load(path, weights_only=True)["vit"]["architecture"]  # so that older versions read it
    for root, *more in ((tmp_path / "without",), (tmp_path / "asked", rope)):
        assert run("test", root, f"--ckpt_path={path}", *more) == 0
    assert table(tmp_path / "without/test") == table(tmp_path / "asked/test")
    assert run("fit", tmp_path / "on", f"--ckpt_path={path}", rope, "--trainer.max_epochs=3") == 2
    assert "the checkpoint's model has rope False, this one True; train anew without" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["test", "validate"])
@pytest.mark.parametrize("checkpoint", ["best", "path"])
def test_measuring_the_best_weights(fitted, tmp_path, capsys, command, checkpoint):
    """In a later run and by another way than the trainer's: all images at once."""
    path = fitted / "best.ckpt"
    root = fitted if checkpoint == "best" else tmp_path
    kept = ("model.safetensors", "metrics.csv", "config.yaml")
    before = [(fitted / name).read_bytes() for name in kept]
    assert run(command, root, f"--ckpt_path={'best' if checkpoint == 'best' else path}") == 0
    (row,) = table(root / command)  # of its own: the run's table is kept
    model, about = load_checkpoint(path)
    if command == "validate":
        assert row["val/acc"] == pytest.approx(about.metrics["val/acc"], abs=1e-6)
        assert row["val/loss"] == pytest.approx(about.metrics["val/loss"], rel=1e-5)
    else:
        split = load_digits().test
        assert isinstance(split, Split)
        with torch.no_grad():
            logits = model(pixels(split.images, path))  # type: ignore[arg-type]
        assert row["test/acc"] == pytest.approx(float((logits.argmax(-1) == split.labels).double().mean()), abs=1e-6)
        loss = torch.nn.functional.cross_entropy(logits, split.labels)
        assert row["test/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert [(fitted / name).read_bytes() for name in kept] == before
    assert "Traceback" not in capsys.readouterr().err


def test_last_is_the_last_and_best_the_best(tmp_path):
    """The rate is absurd after warm-up, so that the first epoch is the best."""
    arguments = ["--trainer.max_epochs=3", "--model.optimizer=adamw", "--model.lr=3", "--model.warmup=0.5"]
    assert run("fit", tmp_path, *arguments, "--checkpoint.monitor=val/acc", "--checkpoint.mode=max") == 0
    accuracies = [row["val/acc"] for row in table(tmp_path) if "val/acc" in row]
    best, last = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert last["global_step"] == 15
    assert best["global_step"] == 5 * (1 + accuracies.index(max(accuracies)))
    assert load_checkpoint(tmp_path / "model.safetensors")[1].metrics["val/acc"] == pytest.approx(max(accuracies))


# Going on


def test_killed_run_goes_on_bit_for_bit(tmp_path):
    """kill -9 in the middle of the second of three epochs; a checkpoint was saved after each step."""
    kill = (
        "import os, sys, train, vit.guard; from vit.classifier import ViTClassifier as C\n"
        "vit.guard.SAVING = float('inf')\n"
        "start = C.on_train_batch_start\n"
        "def stop(self, batch, i): os.kill(os.getpid(), 9) if self.global_step == 7 else start(self, batch, i)\n"
        "C.on_train_batch_start = stop; sys.exit(train.main())"
    )
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = ["--trainer.max_epochs=3", "--trainer.log_every_n_steps=1"]
    result = process("fit", *TINY, *arguments, "--guard.minutes=0", f"--trainer.default_root_dir={killed}", code=kill)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert torch.load(killed / "last.ckpt", weights_only=True)["global_step"] == 7
    assert not (killed / "model.safetensors").exists()
    for root in (killed, whole):  # the second has nothing to go on from and begins
        assert run("fit", root, *arguments, "--ckpt_path=last") == 0
    for name in ("last.ckpt", "best.ckpt"):
        first, second = weights(killed / name), weights(whole / name)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), (name, key)
    first, second = (load_checkpoint(root / "model.safetensors")[1] for root in (killed, whole))
    assert first.training["steps"] == second.training["steps"]
    assert first.metrics == second.metrics
    assert (killed / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert [row["step"] for row in table(whole) if "train/loss" in row] == list(range(15))


def test_new_run_in_an_old_folder_has_a_table_of_its_own(tmp_path):
    tables = []
    for seed in (0, 0, 1):
        assert run("fit", tmp_path, "--trainer.max_epochs=1", f"--seed_everything={seed}") == 0
        tables.append((tmp_path / "metrics.csv").read_text())
    assert tables[0] == tables[1] != tables[2]


def test_finished_run_is_left_alone(tmp_path):
    assert run("fit", tmp_path, "--trainer.max_epochs=1") == 0
    names = ("last.ckpt", "best.ckpt", "model.safetensors", "metrics.csv")
    before = [(tmp_path / name).read_bytes() for name in names]
    with pytest.raises(SystemExit, match="0"):
        run("fit", tmp_path, "--trainer.max_epochs=1", "--ckpt_path=last")
    assert [(tmp_path / name).read_bytes() for name in names] == before


def test_no_epoch_is_left_to_train(tmp_path, capfd):
    """A checkpoint from the end of its run would otherwise train nothing, and not say so."""
    assert run("fit", tmp_path, "--trainer.max_epochs=1") == 0
    assert run("fit", tmp_path, "--trainer.max_epochs=1", "--ckpt_path=best") == 2
    best = tmp_path / "best.ckpt"
    assert f"train.py: {best}: nothing is left to train, 1 of 1 epochs are done." in capfd.readouterr().err
    assert run("fit", tmp_path, "--trainer.max_epochs=2", "--ckpt_path=best") == 0
    assert load_checkpoint(tmp_path / "model.safetensors")[1].training["epochs"] == 2


def test_run_goes_on_with_the_settings_of_today(tmp_path):
    """Learning rates, weight decay and length are those of the command, not of the checkpoint."""
    assert run("fit", tmp_path, "--trainer.max_epochs=1", "--model.optimizer=muon") == 0
    today = ["--trainer.max_epochs=2", "--model.lr=1e-5", "--model.muon_lr=1e-4", "--model.weight_decay=0.7"]
    assert run("fit", tmp_path, *today, "--model.optimizer=muon", "--model.schedule=linear", "--ckpt_path=last") == 0
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    groups = state["optimizer_states"][0]["param_groups"]
    assert {group["initial_lr"] for group in groups} == set(state["lr_schedulers"][0]["base_lrs"]) == {1e-5, 1e-4}
    assert max(group["weight_decay"] for group in groups) == 0.7


# Several processes


def test_two_ranks_train_and_measure_as_one(tmp_path):
    """143 validation images do not divide by two."""
    two, one = tmp_path / "two", tmp_path / "one"
    ranks = ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.max_epochs=1"]
    result = process("fit", *TINY, f"--trainer.default_root_dir={two}", "--data.batch_size=64", *ranks)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in two.iterdir() if "tfevents" not in path.name)
    assert {"best.ckpt", "last.ckpt", "metrics.csv", "model.safetensors"} <= set(names)
    assert not [name for name in names if "-v" in name]
    about = load_checkpoint(two / "model.safetensors")[1]
    assert (about.training["devices"], about.training["steps"]) == (2, 10)

    assert run("validate", one, f"--ckpt_path={two / 'last.ckpt'}") == 0
    (together,) = [row for row in table(two) if "val/acc" in row]
    (alone,) = table(one / "validate")
    for name in ("val/acc", "val/acc5", "val/loss", "val/ece"):
        assert together[name] == pytest.approx(alone[name], abs=1e-6), name
    assert 0 < alone["val/acc"] * 143 == pytest.approx(round(alone["val/acc"] * 143), abs=1e-4)


@pytest.mark.timeout(300)
def test_weights_shared_out_over_ranks_are_the_same_weights(tmp_path):
    """FSDP: an epoch on two processes, then one without it, against both on one process without it.

    Without dropped paths, as ranks drop others.
    """
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    same = ["--model.drop_path_rate=0", "--trainer.log_every_n_steps=1"]
    ranks = [f"--config={ROOT / 'configs/fsdp.yaml'}", "--trainer.devices=2", "--data.batch_size=128"]
    start = ["fit", *TINY, *same, *ranks, "--trainer.max_epochs=1", f"--trainer.default_root_dir={shared}"]
    result = process(*start)
    assert result.returncode == 0, result.stderr
    assert run("fit", alone, *same, "--trainer.max_epochs=1") == 0

    plain, sharded = (
        torch.load(root / "last.ckpt", weights_only=True)["optimizer_states"][0]["state"] for root in (alone, shared)
    )
    assert plain.keys() == sharded.keys()
    for number, state in plain.items():  # so that either may go on from the other
        for name, value in state.items():
            found = torch.as_tensor(sharded[number][name])
            torch.testing.assert_close(found, torch.as_tensor(value), rtol=0, atol=0.02)
    images = load_digits().test.images[:8]  # type: ignore[union-attr]
    expected, found = (load_checkpoint(root / "model.safetensors") for root in (alone, shared))
    assert found[1].architecture == expected[1].architecture
    assert found[1].training["devices"] == 2
    with torch.no_grad():
        logits = [model(pixels(images, alone / "best.ckpt")) for model, _ in (expected, found)]
    torch.testing.assert_close(*logits, rtol=0, atol=0.05)
    predictor = Predictor.from_checkpoint(shared / "model.safetensors", device="cpu")
    assert predictor.predict(Image.fromarray(images[0, 0].numpy())).label in predictor.class_names

    for root in (alone, shared):
        assert run("fit", root, *same, "--trainer.max_epochs=2", "--ckpt_path=last") == 0
    for one, other in zip(table(shared), table(alone), strict=True):
        if one["epoch"] == 0 and "train/loss" in one:
            continue  # of the images of the first of the two processes
        assert one == pytest.approx(other, abs=1e-4)
    states = [torch.load(root / "last.ckpt", weights_only=True) for root in (shared, alone)]
    assert states[0]["global_step"] == states[1]["global_step"] == 10
    for name, tensor in states[0]["state_dict"].items():
        torch.testing.assert_close(tensor, states[1]["state_dict"][name], rtol=0, atol=0.02)


# Help and mistakes


def test_help_begins_with_what_is_ours(capsys):
    """Model and data, and before them one line of usage instead of a hundred."""
    with pytest.raises(SystemExit):
        train.main(["fit", "--help"])
    found = capsys.readouterr().out
    names = ("usage:", "--model.lr LR", "--data.dataset D", "--trainer.max_epochs M", "--checkpoint.monitor M")
    places = [found.index(name) for name in names]
    assert places == sorted(places)
    assert found[: places[1]].count("\n") < 40
    assert "Train, or go on where a run was stopped" in found[: places[1]]
    told = " ".join(found.split())
    assert "``best`` of the folder --trainer.default_root_dir" in told
    assert "Its architecture; with --model.pretrained that of those weights" in told
    assert "Number of blocks. (type: int, default: 12)" in told
    # Words of the libraries for what we refuse, and for what means nothing to a reader.
    for no in ("Conditional", "NOT_ACCEPTED", "Linked arguments", "optimization routine", "save_top_k", "registry"):
        assert no not in found


@pytest.mark.parametrize("command", ["test", "validate"])
def test_random_weights_are_not_measured(command, tmp_path, capsys):
    assert train.main([command, *TINY, f"--trainer.default_root_dir={tmp_path}"]) == 2
    ways = "--ckpt_path best (or last, or FILE.ckpt), or --model.pretrained FILE"
    assert capsys.readouterr().err.endswith(f"train.py: {command} needs trained weights: {ways}\n")
    for name in ("best", "last"):
        assert train.main([command, *TINY, f"--trainer.default_root_dir={tmp_path}", f"--ckpt_path={name}"]) == 2
        assert f"{tmp_path / name}.ckpt: no such checkpoint file" in capsys.readouterr().err
    new_head = ["--model.pretrained=vit/weights/cifar10.safetensors", f"--trainer.default_root_dir={tmp_path}"]
    assert train.main([command, f"--config={ROOT / 'configs/finetune.yaml'}", "--data.dataset=digits", *new_head]) == 2
    assert "vit/weights/cifar10.safetensors knows 10 classes, here are 10; 0 differs" in (capsys.readouterr().err)


def test_a_short_trial_is_validated_and_replaces_the_last_with_a_word(tmp_path, capsys):
    for words in (False, True):
        short = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=5", "--trainer.limit_train_batches=2"]
        assert run("fit", tmp_path, *short) == 0
        assert (f"the run that was here is in {tmp_path / 'previous'}" in capsys.readouterr().err) == words
        assert (tmp_path / "model.safetensors").exists()
        assert (tmp_path / "previous" / "model.safetensors").exists() == words


@pytest.mark.parametrize(("epochs", "every", "steps"), [(3, 2, [9, 14]), (2, 5, [9])])
def test_the_last_epoch_is_validated(epochs, every, steps, tmp_path):
    """However often that is done: else the run's best part could be thrown away."""
    short = [f"--trainer.max_epochs={epochs}", f"--trainer.check_val_every_n_epoch={every}"]
    assert run("fit", tmp_path, *short) == 0
    assert [row["step"] for row in table(tmp_path) if "val/acc" in row] == steps


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_last_step_is_validated(accumulate, tmp_path, capfd):
    """In the middle of an epoch too, and of a run that was gone on with in the middle of its last epoch."""
    short = [f"--trainer.accumulate_grad_batches={accumulate}", "--trainer.check_val_every_n_epoch=5"]
    assert run("fit", tmp_path, *short, "--trainer.max_epochs=-1", "--trainer.max_steps=7") == 0
    assert [row["step"] for row in table(tmp_path) if "val/acc" in row] == [6]
    assert load_checkpoint(tmp_path / "model.safetensors")[1].metrics["val/acc"] > 0
    epochs = 2 if accumulate == 1 else 3  # of five steps, or of three
    other = tmp_path.with_name(f"{tmp_path.name}-best")
    shutil.copytree(tmp_path, other)
    longer = [f"--trainer.max_epochs={epochs}", "--ckpt_path=last"]
    assert run("fit", tmp_path, *short, *longer) == 0
    assert [row["step"] for row in table(tmp_path) if "val/acc" in row] == [6, 9 if accumulate == 1 else 8]
    fewer = ["--trainer.max_epochs=-1", "--trainer.max_steps=8", "--ckpt_path=last"]
    assert run("fit", tmp_path, *short, *fewer) == 2
    assert "of 8 steps are done. Longer: --trainer.max_steps;" in capfd.readouterr().err
    assert run("fit", other, *short, *longer[:1], "--ckpt_path=best") == 0  # of the same step
    ours, theirs = (weights(path / "last.ckpt") for path in (tmp_path, other))
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_a_machine_without_bfloat16_trains_in_float32(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(vit.cli, "has_bfloat16", lambda device: False)
    assert run("fit", tmp_path, "--trainer.max_epochs=1", "--trainer.precision=bf16-mixed") == 0
    assert "training in float32: this cpu has no fast bfloat16" in capfd.readouterr().err
    assert load_checkpoint(tmp_path / "model.safetensors")[1].training["precision"] == "32-true"


def test_a_run_from_pretrained_weights_needs_them_once(fitted, tmp_path, capfd):
    """They may be gone when it is measured; and a run that moves them away could not go on."""
    base, root = tmp_path / "base.ckpt", tmp_path / "run"
    shutil.copy(fitted / "best.ckpt", base)
    tuned = [*FINETUNE, f"--trainer.default_root_dir={root}", "--trainer.max_epochs=1", "--model.drop_path_rate=0.1"]
    assert train.main(["fit", *tuned, f"--model.pretrained={base}"]) == 0
    config = yaml.safe_load((root / "config.yaml").read_text())["model"]
    assert config["pretrained"] == str(base)
    assert "embed_dim" not in config
    base.unlink()
    assert train.main(["test", *tuned, "--ckpt_path=best"]) == 0
    assert (root / "test" / "metrics.csv").exists()
    more = ["--trainer.max_epochs=2", "--ckpt_path=last"]
    assert train.main(["fit", *tuned, *more, f"--model.pretrained={base}"]) == 0
    assert yaml.safe_load((root / "config.yaml").read_text())["model"]["pretrained"] == str(base)
    assert load_checkpoint(root / "last.ckpt")[1].training["pretrained"] == str(base)
    capfd.readouterr()
    for name in ("best.ckpt", "last.ckpt", "model.safetensors"):
        assert train.main(["fit", *tuned, f"--model.pretrained={root / name}"]) == 2
        assert f"{name}: a new run in {root} moves it to {root / 'previous'}" in capfd.readouterr().err
    assert train.main(["fit", *tuned, f"--model.pretrained={root / 'best.ckpt'}", "--model.pool=token"]) == 2
    assert (
        "best.ckpt: has pool mean; give --model.pool mean or none, not token" in capfd.readouterr().err
    )  # though a default
    assert train.main(["fit", *tuned, "--model.pretrained=cifar10"]) == 0
    assert (root / "previous" / "test" / "metrics.csv").exists()
    assert not (root / "test").exists()


def test_no_earlier_run_is_lost(tmp_path, capfd):
    """Each new one moves the last aside, TensorBoard's file with it; one that cannot begin leaves it where it is.

    One that fails later keeps what it has.
    """
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    for seed in range(3):
        assert run("fit", tmp_path, *short, f"--seed_everything={seed}") == 0
    found = [Path(tmp_path, place, "config.yaml").read_text() for place in ("previous", "previous-2", "")]
    assert [int(config.partition("seed_everything: ")[2][0]) for config in found] == [0, 1, 2]
    for place in ("previous", "previous-2", ""):
        assert len(list(Path(tmp_path, place).glob("events.out.tfevents.*"))) == 1
        assert Path(tmp_path, place, "model.safetensors").exists()
    capfd.readouterr()
    Image.new("RGB", (8, 8)).save(png := io.BytesIO(), "PNG")
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for i in range(4):
            for name, data in ((f"{i}.png", png.getvalue()), (f"{i}.cls", b"%d" % (i % 2))):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    stream = [f"--data.dataset=wds/{tmp_path}", "--data.image_size=8", f"--data.root={tmp_path}"]
    assert run("fit", tmp_path, *stream, "--data.balance=true") == 2
    assert "data.balance needs the labels of all images" in capfd.readouterr().err
    assert run("fit", tmp_path, "--trainer.max_epochs=0") == 2
    assert "trainer.max_epochs and max_steps must be above 0" in capfd.readouterr().err
    assert run("fit", tmp_path, "--trainer.val_check_interval=1000") == 2  # which Lightning sees when all is set up
    assert f"{tmp_path}: the run that was here is back" in capfd.readouterr().err
    assert "seed_everything: 2" in (tmp_path / "config.yaml").read_text()
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    assert (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "previous-3").exists()
    (tmp_path / ".last.ckpt.partial").mkdir()  # refused as on a full disk, but behind an epoch whose best is kept
    assert run("fit", tmp_path, "--trainer.max_epochs=1", "--seed_everything=3") == 2
    assert "seed_everything: 3" in (tmp_path / "config.yaml").read_text()
    assert (tmp_path / "best.ckpt").exists()
    assert (tmp_path / "previous-3" / "best.ckpt").exists()


def test_classes_of_different_size(tmp_path, capfd):
    """Balanced training chooses by balanced accuracy; a test says how well each class is told."""
    for label, number in {"many": 40, "some": 12, "few": 6}.items():
        for split in ("train", "test"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(number if split == "train" else 5):
                level = {"many": 20, "some": 120, "few": 230}[label] + i % 7
                Image.new("RGB", (8, 8), (level, level, level)).save(folder / f"{i}.png")
    data = [f"--data.dataset={tmp_path / 'images'}", f"--data.root={tmp_path}", "--data.num_workers=0"]
    data += ["--data.balance=true", "--data.batch_size=16", "--data.val_fraction=0.2"]
    root = tmp_path / "run"
    data += ["--checkpoint.monitor=val/balanced_acc", "--checkpoint.mode=max"]
    shown = ["--trainer.max_epochs=6", "--trainer.enable_progress_bar=true"]
    assert run("fit", root, *data, *shown) == 0
    assert re.search(r"best weights, epoch \d+, val balanced acc ", capfd.readouterr().err)
    losses = [row for row in table(root) if "train/loss" in row]
    assert len(losses) == 6  # of three steps each: fewer than Lightning's 50
    rows = [row for row in table(root) if "val/acc" in row]
    best = max(rows, key=lambda row: row["val/balanced_acc"])
    metrics = load_checkpoint(root / "model.safetensors")[1].metrics
    assert metrics["val/balanced_acc"] == pytest.approx(best["val/balanced_acc"], abs=1e-6)
    assert "val/acc5" not in metrics
    stopping = "[{class_path: EarlyStopping, init_args: {monitor: val/acc5, mode: max}}]"
    for wrong in ("--checkpoint.monitor=val/acc5", f"--trainer.callbacks={stopping}"):
        assert run("fit", tmp_path / "5", *data, wrong) == 2
        assert "monitor val/acc5 is not measured of 3 classes; give val/acc" in capfd.readouterr().err
    assert run("test", root, *data, "--ckpt_path=best") == 0
    printed = capfd.readouterr().out
    with open(root / "test" / "confusion.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["of the class", "named few", "named many", "named some"]
    assert [row[0] for row in rows[1:]] == ["few", "many", "some"]
    counts = torch.tensor([[int(cell) for cell in row[1:]] for row in rows[1:]])
    assert counts.sum(1).tolist() == [5, 5, 5]
    right = counts.diagonal().sum() / 15  # of classes of one size
    assert re.search(rf"^acc {right:.2%}, balanced acc {right:.2%}, ece .*, loss \d\.\d{{4}}$", printed, re.M)
    predictor = Predictor.from_checkpoint(root / "model.safetensors", device="cpu")
    for label, row in zip(predictor.class_names, counts.tolist(), strict=True):
        files = sorted((tmp_path / "images" / "test" / label).iterdir())
        named = [predictor.predict(file).label for file in files]
        assert [named.count(name) for name in predictor.class_names] == row
        assert re.search(rf"{label} .* 5 .* {row[predictor.class_names.index(label)] / 5:.1%}", printed)
    assert run("validate", root, *data, "--ckpt_path=best") == 0
    assert "right when named" in capfd.readouterr().out
    assert (root / "validate" / "confusion.csv").read_text().startswith("of the class,named few,")


@pytest.mark.parametrize("asked", [None, "val/acc"])
def test_balance_changes_what_chooses_the_best_unless_that_is_asked_for(asked, tmp_path):
    options = [*FINETUNE, "--model.pretrained=cifar10", "--data.balance=true", "--trainer.max_epochs=1"]
    options += [f"--trainer.default_root_dir={tmp_path}", *([f"--checkpoint.monitor={asked}"] if asked else [])]
    assert train.main(["fit", *options]) == 0
    monitor = yaml.safe_load((tmp_path / "config.yaml").read_text())["checkpoint"]["monitor"]
    assert monitor == (asked or "val/balanced_acc")


def test_a_table_too_large_is_said_not_to_be_made(fitted, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(vit.classifier, "MOST_TABLED", 9)
    shutil.copytree(fitted, tmp_path / "run", ignore=shutil.ignore_patterns("test"))
    (tmp_path / "run" / "test").mkdir()
    (tmp_path / "run" / "test" / "confusion.csv").write_text("of an earlier test")
    assert run("test", tmp_path / "run", "--ckpt_path=best") == 0
    *_, why, measured = capfd.readouterr().out.splitlines()
    assert why.startswith("no table of the classes, and no confusion.csv: 10 classes are more than")
    assert measured.startswith(f"acc {table(tmp_path / 'run' / 'test')[-1]['test/acc']:.2%}, acc5 ")
    assert not (tmp_path / "run" / "test" / "confusion.csv").exists()


def test_white_goes_from_the_data_to_the_model_file(tmp_path, capfd):
    for i in range(12):
        path = tmp_path / "cells" / "ab"[i % 2] / f"{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 100 + 3000 * (i % 2) + i, dtype=np.uint16)).save(path)
    data = [f"--data.dataset={tmp_path / 'cells'}", f"--data.root={tmp_path}", "--data.num_workers=0"]
    white = [*data, "--data.batch_size=4", "--data.white=4095", "--trainer.max_epochs=1"]
    assert run("fit", tmp_path / "run", *white) == 0
    assert load_checkpoint(tmp_path / "run" / "model.safetensors")[1].preprocess.white == 4095
    assert run("validate", tmp_path / "run", *white[:-1], "--ckpt_path=best") == 0
    capfd.readouterr()
    assert run("validate", tmp_path / "run", *data, "--ckpt_path=best") == 2
    assert "the checkpoint's images have data.white 4095.0, these None" in capfd.readouterr().err
    start = f"--model.pretrained={tmp_path / 'run' / 'model.safetensors'}"
    assert run("validate", tmp_path / "other", *data, start) == 2
    assert "model.safetensors: trained on images with data.white 4095.0, here it is None" in capfd.readouterr().err
    assert run("fit", tmp_path / "other", *data, start, "--trainer.max_epochs=1") == 0
    assert "model.safetensors: data.white 4095.0 before, None now" in capfd.readouterr().err


def test_nothing_of_an_earlier_run_is_taken_for_the_new_one(tmp_path, capfd):
    """A new run that ends before its first save leaves no checkpoint, not one of the run before it."""
    assert run("fit", tmp_path, "--trainer.max_epochs=1") == 0
    for name in ("last.ckpt", "model.safetensors"):  # as if it had been killed before its first save
        (tmp_path / name).unlink()
    assert run("fit", tmp_path, "--trainer.max_epochs=1", "--model.lr=1e30", "--trainer.gradient_clip_val=null") == 5
    assert "nothing was saved before" in capfd.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".ckpt", ".safetensors")]


def test_what_does_not_fit_into_memory_is_said(tmp_path, capfd):
    """More than a processor can address, so that no machine tries to find it."""
    assert run("fit", tmp_path, "--trainer.max_epochs=1", "--model.mlp_ratio=1e12") == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("train.py: out of memory; try half the --data.batch_size, or a smaller model (")


def test_a_dry_run_leaves_the_run_in_its_folder_alone(fitted, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(fitted, root)
    before = {name: (root / name).read_bytes() for name in ("last.ckpt", "best.ckpt", "model.safetensors")}
    assert run("fit", root, "--trainer.fast_dev_run=true") == 0
    assert {name: (root / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("option", ["--trainer.limit_val_batches=0", "--data.val_fraction=0"])
def test_a_run_without_validation_keeps_its_last_weights(option, tmp_path, capfd):
    """And says nothing about how good they are: no image is left to measure that on."""
    assert run("fit", tmp_path, option, "--trainer.max_epochs=1", "--trainer.enable_progress_bar=true") == 0
    assert "last (nothing was validated) weights: " in capfd.readouterr().err
    about = load_checkpoint(tmp_path / "model.safetensors")[1]
    assert (about.training["epochs"], about.metrics, about.temperature) == (1, {}, 1.0)
    if "data" in option:
        assert run("validate", tmp_path, option, "--ckpt_path=last") == 2
        assert "digits: has no validation images, and data.val_fraction 0 holds none out" in capfd.readouterr().err


def test_part_of_the_batches_is_an_epoch(tmp_path):
    """Every epoch has as many steps, and the last of them is validated."""
    assert run("fit", tmp_path, "--trainer.max_epochs=3", "--trainer.limit_train_batches=0.7") == 0
    assert load_checkpoint(tmp_path / "model.safetensors")[1].training["steps"] == 9
    assert [row["step"] for row in table(tmp_path) if "val/acc" in row] == [2, 5, 8]


def test_a_run_that_was_copied_keeps_its_best_and_leaves_the_other_alone(tmp_path, monkeypatch):
    """The largest loss, which is that of the first epoch, stays the best in the copy too."""
    monkeypatch.setitem(vit.cli.MEASURED, "val/loss", "max")  # else refused
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("fit", one, "--trainer.max_epochs=2", "--checkpoint.mode=max") == 0
    best = weights(one / "best.ckpt")
    shutil.copytree(one, two)
    assert run("fit", two, "--trainer.max_epochs=3", "--checkpoint.mode=max", "--ckpt_path=last") == 0
    assert all(torch.equal(best[key], value) for key, value in weights(two / "best.ckpt").items())
    assert (one / "best.ckpt").exists()
    state = torch.load(two / "last.ckpt", weights_only=True)["callbacks"]
    assert [part["best_model_path"] for part in state.values() if "dirpath" in part] == [str(two / "best.ckpt")]


@pytest.mark.parametrize("key", ["Best", "ModelCheckpoint"])
def test_the_best_so_far_is_known_to_a_run_that_goes_on(key, fitted, tmp_path, capfd):
    """Its state had the name of Lightning's class once; where its file is gone, the next one is the best."""
    shutil.copytree(fitted, root := tmp_path / "run")
    state = torch.load(root / "last.ckpt", weights_only=True)
    (was,) = (name for name in state["callbacks"] if name.startswith("Best{"))
    state["callbacks"][was.replace("Best", key, 1)] = state["callbacks"].pop(was)
    torch.save(state, root / "last.ckpt")
    best = weights(root / "best.ckpt")
    go_on = ["--ckpt_path=last", "--model.lr=3"]  # which makes it worse
    assert run("fit", root, *go_on, "--trainer.max_epochs=3") == 0
    assert all(torch.equal(value, best[name]) for name, value in weights(root / "best.ckpt").items())
    (root / "best.ckpt").unlink()
    assert run("fit", root, *go_on, "--trainer.max_epochs=4") == 0
    assert f"{root / 'best.ckpt'}: is gone" in capfd.readouterr().err
    assert torch.load(root / "best.ckpt", weights_only=True)["epoch"] == 3
    assert (root / "model.safetensors").exists()


def test_a_run_goes_on_with_as_many_steps_an_epoch_only(tmp_path, capfd):
    """More devices or batches of other sizes that make as many steps are fine, also within an epoch."""
    begun = ["--trainer.max_epochs=2", "--trainer.max_steps=3"]
    assert run("fit", tmp_path, *begun) == 0
    shutil.copytree(tmp_path, whole := tmp_path / "whole")
    go_on = ["--trainer.max_epochs=2", "--ckpt_path=last"]
    assert run("fit", tmp_path, *go_on, "--data.batch_size=200") == 2
    assert "step 3 of epoch 0 cannot go on with epochs of 6 steps" in capfd.readouterr().err
    halves = ["--data.batch_size=128", "--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=10"]
    assert run("fit", tmp_path, *go_on, *halves) == 0
    assert run("fit", whole, *go_on) == 0
    ends = [torch.load(root / "last.ckpt", weights_only=True) for root in (tmp_path, whole)]
    assert [end["global_step"] for end in ends] == [10, 10]
    assert [end["epoch"] for end in ends] == [1, 1]
    assert [end["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] for end in ends] == [10, 5]
    assert ends[0]["lr_schedulers"][0]["_last_lr"] == ends[1]["lr_schedulers"][0]["_last_lr"]


def test_validation_by_the_clock(tmp_path):
    assert run("fit", tmp_path, "--trainer.max_epochs=2", "--trainer.val_check_interval=00:00:00:01") == 0
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 10
    assert (tmp_path / "model.safetensors").exists()


def test_home_is_the_user_s(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    assert run("fit", Path("~/run"), *short) == 0
    assert {"metrics.csv", "best.ckpt", "config.yaml"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert run("validate", Path("~/run"), "--ckpt_path=best") == 0
    assert not Path("~").exists()


def test_a_config_of_no_run_is_not_overwritten(tmp_path, capfd):
    (tmp_path / "config.yaml").write_text("mine: 1")
    assert run("fit", tmp_path, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1") == 2
    assert f"{tmp_path}/config.yaml: of no run, and would be overwritten" in capfd.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "mine: 1"


def test_the_best_does_not_depend_on_how_often_it_is_looked_for(tmp_path):
    """Every second epoch, after that every third; the last is looked at too."""
    often = "--checkpoint.every_n_epochs"
    assert run("fit", tmp_path, "--trainer.max_epochs=3", f"{often}=2") == 0
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 2
    best = min(row["val/loss"] for row in table(tmp_path) if "val/loss" in row and row["epoch"] > 0)
    ruin = ["--model.lr=3", "--model.muon_lr=3"]
    assert run("fit", tmp_path, "--trainer.max_epochs=6", f"{often}=3", "--ckpt_path=last", *ruin) == 0
    found = load_checkpoint(tmp_path / "model.safetensors")[1].metrics["val/loss"]
    assert found == pytest.approx(min(best, found), abs=1e-6)


def test_last_is_that_of_this_folder(tmp_path):
    """And not the file that a checkpoint callback of the user's has left elsewhere."""
    made = f"{{class_path: ModelCheckpoint, init_args: {{dirpath: {tmp_path / 'own'}, save_last: true}}}}"
    own = [f"--trainer.callbacks=[{made}]"]
    short = ["--trainer.max_epochs=1", "--ckpt_path=last", *own]
    for name in ("one", "two"):
        assert run("fit", tmp_path / name, *short) == 0
        assert torch.load(tmp_path / name / "last.ckpt", weights_only=True)["global_step"] == 5


def test_a_setting_that_is_an_enumeration_is_written_as_its_text(tmp_path):
    assert run("fit", tmp_path, "--trainer.max_epochs=1", "--trainer.callbacks+=Timer") == 0
    assert "interval: step" in (tmp_path / "config.yaml").read_text()


def test_options_are_laid_over_files_wherever_they_stand(fitted, tmp_path):
    """A run's config.yaml holds ``ckpt_path: null``: the run began again where it was to go on."""
    shutil.copytree(fitted, root := tmp_path / "run")
    before = (root / "last.ckpt").read_bytes()
    with pytest.raises(SystemExit) as ended:
        train.main(["fit", "--ckpt_path=last", f"--trainer.default_root_dir={root}", f"--config={root}/config.yaml"])
    assert ended.value.code == 0
    assert (root / "last.ckpt").read_bytes() == before
    assert not (root / "previous").exists()
    options = ["--ckpt_path", "best", f"--trainer.default_root_dir={root}", "--config", f"{root}/config.yaml"]
    assert train.main(["test", *options]) == 0


def test_a_logger_stands_beside_ours(tmp_path):
    root, other = tmp_path / "run", tmp_path / "other"
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={other}"]
    assert run("fit", root, "--trainer.max_epochs=1", *logger) == 0
    assert "CSVLogger" in (root / "config.yaml").read_text()
    assert table(root)[-1]["val/acc"] > 0
    (theirs,) = other.rglob("metrics.csv")
    assert "val/acc" in theirs.read_text()
    assert run("test", root, "--ckpt_path=best", *logger) == 0
    assert "test/acc" in (root / "test/metrics.csv").read_text()
    assert (root / "config.yaml").read_text().count("subcommand") == 0


def test_a_measurement_leaves_the_settings_of_the_run_alone(fitted, tmp_path):
    shutil.copytree(fitted, root := tmp_path / "run")
    assert run("test", root, "--ckpt_path=best", "--trainer.logger=false", "--data.batch_size=7") == 0
    assert (root / "config.yaml").read_text() == (fitted / "config.yaml").read_text()


def test_a_measurement_that_is_ended_has_no_result(fitted, tmp_path, monkeypatch):
    def stop(*_: Any) -> None:
        raise SIGTERMException

    monkeypatch.setattr("vit.classifier.ViTClassifier.test_step", stop)
    assert run("test", tmp_path, f"--ckpt_path={fitted / 'best.ckpt'}") == 128 + signal.SIGTERM


def test_a_run_that_goes_on_says_so_where_files_have_other_names(tmp_path, capfd):
    for i in range(40):
        (place := tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 6 * i).save(place / f"{i:02}.png")
    options = [f"--data.root={tmp_path}", "--data.val_fraction=0.5", f"--data.dataset={tmp_path / 'images'}/"]
    assert run("fit", tmp_path / "run", *options, "--trainer.max_epochs=1") == 0
    for said in (False, True):
        capfd.readouterr()
        assert run("validate", tmp_path / "run", "--ckpt_path=last", *options[:2], options[2].rstrip("/")) == 0
        assert ("other images are held out than before" in capfd.readouterr().err) == said
        if not said:
            (tmp_path / "images" / "a" / "00.png").rename(tmp_path / "images" / "a" / "99.png")


def test_all_images_of_another_folder_measure_a_model(tmp_path, capfd):
    """At the size that it was trained for, whatever theirs; of its own folder it is said that it has seen most."""
    root, seen, other = (tmp_path / name for name in ("run", "seen", "other"))
    for folder, count, sizes in ((seen, 40, (8, 8)), (other, 30, (9, 12))):
        for i in range(count):
            (place := folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("L", (sizes[i % 3 == 0], 8), 6 * i).save(place / f"{i:02}.png")
    options = [f"--data.root={tmp_path}", f"--data.dataset={seen}/"]
    assert run("fit", root, *options, "--trainer.max_epochs=1") == 0
    alone = [f"--model.pretrained={root / 'model.safetensors'}", "--data.val_fraction=1", options[0]]
    capfd.readouterr()
    assert train.main(["validate", *alone, f"--data.dataset={other}", f"--trainer.default_root_dir={root}"]) == 0
    counts = [line.split(",")[1:] for line in (root / "validate/confusion.csv").read_text().splitlines()[1:]]
    assert [sum(map(int, line)) for line in counts] == [15, 15]
    assert run("validate", root, "--ckpt_path=last", *options, "--data.val_fraction=1") == 0
    assert run("validate", root, "--ckpt_path=last", *options) == 0
    said = capfd.readouterr().err
    assert f"{other}: all 30 images\n" in said
    assert said.count("other images are held out than before") == 1
    assert f"{seen}/: 4 of 40 images, those held out (to measure on all images, of a data set that" in said
    assert run("test", root, "--ckpt_path=last", *options) == run("fit", root, *options, "--data.val_fraction=1") == 2
    said = capfd.readouterr().err
    assert f"{seen}/: has no test images" in said
    assert f"{seen}/: data.val_fraction 1 leaves no image to train on" in said


def test_a_run_that_goes_on_says_so_where_other_images_are_held_out(tmp_path, capfd):
    """Half of the images as validation images: most of them it has trained on."""
    assert run("fit", tmp_path, "--trainer.max_epochs=1") == 0
    held_out = "digits: other images are held out than before"
    for command, option, said in (("validate", "0.1", False), ("validate", "0.5", True), ("test", "0.5", False)):
        capfd.readouterr()
        data.cache.say_once.cache_clear()
        assert run(command, tmp_path, "--ckpt_path=last", f"--data.val_fraction={option}") == 0
        assert (held_out in capfd.readouterr().err) == said, (command, option)
    short, start = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1"], tmp_path / "model.safetensors"
    cases = [("fit", "0.1", False), ("fit", "0.5", True), ("fit", "0", False), ("validate", "0.5", True)]
    for command, option, said in cases:
        data.cache.say_once.cache_clear()
        more = [*(short if command == "fit" else ()), f"--data.val_fraction={option}"]
        assert run(command, tmp_path / "other", f"--model.pretrained={start}", *more) == 0
        assert (held_out in capfd.readouterr().err) == said, (command, option)


def test_a_run_goes_on_in_another_folder_and_what_was_there_is_put_aside(tmp_path, monkeypatch, capfd):
    """Its best comes along, and nothing of the run that was there is taken for it."""
    monkeypatch.setitem(vit.cli.MEASURED, "val/loss", "max")  # that of the first epoch is the best, as above
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("fit", one, "--trainer.max_epochs=2", "--checkpoint.mode=max") == 0
    assert run("fit", two, "--trainer.max_epochs=1", "--checkpoint.mode=max", "--seed_everything=5") == 0
    best, other = weights(one / "best.ckpt"), weights(two / "best.ckpt")
    assert run("fit", two, "--trainer.max_epochs=3", "--checkpoint.mode=max", f"--ckpt_path={one / 'last.ckpt'}") == 0
    assert f"the run that was here is in {two / 'previous'}" in capfd.readouterr().err
    for name, wanted in (("best.ckpt", best), ("previous/best.ckpt", other)):
        assert all(torch.equal(value, wanted[key]) for key, value in weights(two / name).items())
    exported = load_checkpoint(two / "model.safetensors")[0].state_dict()
    assert all(torch.equal(value, best[f"vit.{key}"]) for key, value in exported.items())
    assert {row["epoch"] for row in table(two)} == {2}
    assert (one / "best.ckpt").exists()


def test_a_run_that_was_put_aside_goes_on_in_its_old_place(tmp_path, monkeypatch):
    """With its own best, not that of the run which had come there."""
    monkeypatch.setitem(vit.cli.MEASURED, "val/loss", "max")  # that of the first epoch is the best, as above
    for seed in range(2):
        assert run("fit", tmp_path, "--trainer.max_epochs=1", "--checkpoint.mode=max", f"--seed_everything={seed}") == 0
    best, last = weights(tmp_path / "previous" / "best.ckpt"), tmp_path / "previous" / "last.ckpt"
    assert run("fit", tmp_path, "--trainer.max_epochs=2", "--checkpoint.mode=max", f"--ckpt_path={last}") == 0
    assert all(torch.equal(value, best[key]) for key, value in weights(tmp_path / "best.ckpt").items())
    assert "seed_everything: 1" in (tmp_path / "previous-2" / "config.yaml").read_text()


def test_a_run_without_a_folder_is_in_the_present_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*TINY, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    assert train.main(["fit", *options, "--trainer.default_root_dir=null"]) == 0
    assert {"best.ckpt", "last.ckpt", "config.yaml"} <= {path.name for path in tmp_path.iterdir()}


def test_checkpoints_of_one_s_own_do_not_become_the_best(tmp_path, monkeypatch):
    monkeypatch.setitem(vit.cli.MEASURED, "val/loss", "max")
    made = "{class_path: ModelCheckpoint, init_args: {save_top_k: -1, %s, dirpath: %s}}"
    own = [made % ("every_n_epochs: 1", tmp_path / "own"), made % ("monitor: val/loss, mode: max", tmp_path / "same")]
    options = ["--trainer.max_epochs=2", "--checkpoint.mode=max", f"--trainer.callbacks=[{', '.join(own)}]"]
    assert run("fit", tmp_path / "run", *options) == 0
    assert len(list((tmp_path / "own").iterdir())) == len(list((tmp_path / "same").iterdir())) == 2
    best = weights(tmp_path / "run" / "best.ckpt")
    assert torch.load(tmp_path / "run" / "best.ckpt", weights_only=True)["epoch"] == 0
    exported = load_checkpoint(tmp_path / "run" / "model.safetensors")[0].state_dict()
    assert all(torch.equal(value, best[f"vit.{key}"]) for key, value in exported.items())


@pytest.mark.parametrize(
    ("batches", "accumulate", "steps"),
    [(7, 1, 7), (10, 1, 10), (8, 2, 5)],
    ids=["within an epoch", "at its end", "within a step"],
)
def test_out_of_time_is_not_done(batches, accumulate, steps, tmp_path, monkeypatch):
    """A run that ``trainer.max_time`` ended goes on to what it would have been.

    What is kept of it are the last weights where none are to be chosen, and with figures that are theirs alone.
    """

    def check(timer: Timer, trainer: Any) -> None:
        timer.left = 1.0 if trainer.fit_loop.epoch_loop.total_batch_idx + 1 < batches else -1.0  # type: ignore[attr-defined]
        trainer.should_stop = trainer.should_stop or timer.left < 0  # type: ignore[attr-defined]

    monkeypatch.setattr(Timer, "_check_time_remaining", check)
    monkeypatch.setattr(Timer, "time_remaining", lambda timer, stage=None: getattr(timer, "left", 1.0))
    parted, whole = tmp_path / "parted", tmp_path / "whole"
    options = ["--trainer.max_epochs=3", f"--trainer.accumulate_grad_batches={accumulate}", "--checkpoint.monitor=null"]
    assert run("fit", parted, *options, "--trainer.max_time=00:01:00:00") == 0
    assert torch.load(parted / "last.ckpt", weights_only=True)["global_step"] == steps
    about = load_checkpoint(parted / "model.safetensors")[1]
    assert (about.training["steps"], bool(about.metrics)) == (steps, steps == 10)
    for root in (parted, whole):
        assert run("fit", root, *options, "--ckpt_path=last") == 0
    first, second = weights(parted / "last.ckpt"), weights(whole / "last.ckpt")
    assert all(torch.equal(first[key], value) for key, value in second.items())


def test_a_run_that_early_stopping_ended_within_an_epoch_goes_on_step_by_step(tmp_path, capfd):
    """Five steps an epoch: the second validation is at the end of the fourth step, and better by no whole 1."""
    options = ["--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]
    stopping = [
        *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/acc", "--trainer.callbacks.mode=max"),
        *("--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=1"),
    ]
    parted, whole = tmp_path / "parted", tmp_path / "whole"
    assert run("fit", parted, *options, "--trainer.max_epochs=1", *stopping) == 0
    assert torch.load(parted / "last.ckpt", weights_only=True)["global_step"] == 4
    with pytest.raises(SystemExit) as ended:
        run("fit", parted, *options, "--trainer.max_epochs=1", "--ckpt_path=last")
    assert ended.value.code == 0
    said = (
        f"finished, 4 steps, as a callback stopped it; nothing was changed. To go on all the same: --ckpt_path {parted}"
    )
    assert said in capfd.readouterr().err
    for root in (parted, whole):
        assert run("fit", root, *options, "--trainer.max_epochs=2", "--ckpt_path=last") == 0
    steps = [[row["step"] for row in table(root) if "train/loss" in row] for root in (parted, whole)]
    assert steps[0] == steps[1] == list(range(10))


def test_weights_are_measured_with_their_own_preprocessing(tmp_path, capfd):
    """Dark images stay dark: their own mean would make them as bright as those of the training.

    Also those of ``model.safetensors``, which is all that may be left of a run.
    """
    digits = load_digits().test
    assert digits is not None
    pixels = digits.images.expand(-1, 3, -1, -1)  # type: ignore[union-attr]
    dark = (pixels.float() * 0.3).byte()
    for name, images in (("bright", pixels), ("dark", dark)):
        for number, (image, label) in enumerate(zip(images, digits.labels.tolist(), strict=True)):
            path = tmp_path / name / ("train" if number % 2 else "test") / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    data = [f"--data.root={tmp_path}", "--data.val_fraction=0.2", "--trainer.max_epochs=1"]
    assert run("fit", tmp_path, *data, f"--data.dataset={tmp_path / 'bright'}") == 0
    assert run("test", tmp_path, *data, f"--data.dataset={tmp_path / 'dark'}", "--ckpt_path=best") == 0
    model, about = load_checkpoint(tmp_path / "best.ckpt")
    with torch.no_grad():
        logits = model(about.preprocess.normalize(dark[::2]))
    expected = torch.nn.functional.cross_entropy(logits, digits.labels[::2]).item()
    (of_run,) = table(tmp_path / "test")
    assert of_run["test/loss"] == pytest.approx(expected, rel=1e-4)
    other, dark_ones = tmp_path / "other", f"--data.dataset={tmp_path / 'dark'}"
    assert run("test", other, *data, dark_ones, f"--model.pretrained={tmp_path / 'model.safetensors'}") == 0
    (of_file,) = table(other / "test")
    assert of_file == pytest.approx({**of_run, "epoch": of_file["epoch"], "step": of_file["step"]}, rel=1e-5)
    assert of_file["test/ece_calibrated"] != of_file["test/ece"]
    assert "predict.py cuts" not in capfd.readouterr().err
    cut = replace(about, preprocess=replace(about.preprocess, crop=0.875, interpolation="bilinear"))
    path = save_checkpoint(tmp_path / "cut.safetensors", model.state_dict(), cut)
    assert run("test", other, *data, dark_ones, f"--model.pretrained={path}") == 0
    words = "crop 0.875, squash False, interpolation bilinear; here it is crop 1.0, squash False, interpolation bicubic"
    assert f"{path}: predict.py cuts images by {words}" in capfd.readouterr().err


def test_options_are_not_abbreviated(capsys):
    assert train.main(["fit", *TINY, "--trainer.max_epoch=1"]) == 2
    assert "did you mean --trainer.max_epochs?" in capsys.readouterr().err


def mistakes(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments, and what the message must name."""
    nowhere, garbage = folder / "nowhere", folder / "garbage.ckpt"
    return {
        "no folder": ([f"--data.dataset={nowhere}"], f"{nowhere} is no folder"),
        "patch size": (["--model.patch_size=3"], "8 is not a multiple of patch size 3"),
        "heads": (["--model.num_heads=3"], "embed_dim 16 is not a multiple of num_heads 3"),
        "no config": ([f"--config={nowhere}.yaml"], f"{nowhere}.yaml"),
        "unknown key": (["--model.patchsize=3"], "--model.patchsize=3; did you mean --model.patch_size?"),
        "key of another part": (["--model.batch_size=3"], "--model.batch_size=3; did you mean --data.batch_size?"),
        "key like no other": (["--model.class_weights=3"], "unrecognized arguments: --model.class_weights=3\n"),
        "key like none beside it": (["--data.augment.randaug=3"], "arguments: --data.augment.randaug=3\n"),
        "no length": (
            [f"--config={folder / 'endless.yaml'}"],
            "how long? Give a --config (such as configs/folder.yaml), or --trainer.max_epochs",
        ),
        "no checkpoint": ([f"--ckpt_path={nowhere}.ckpt"], f"{nowhere}.ckpt: no such checkpoint file"),
        "garbage": ([f"--ckpt_path={garbage}"], f"{garbage}: refused"),
        "not a run's": (
            [f"--ckpt_path={folder / 'model.safetensors'}"],
            f"takes a .ckpt file of a run, best or last; weights alone go to --model.pretrained {folder}/model.safet",
        ),
        "no smoothing": (["--model.label_smoothing=1.5"], "model.label_smoothing must be in [0, 1), got 1.5"),
        "endless warm-up": (["--model.warmup=3"], "model.warmup must be in [0, 1), got 3"),
        "never validated": (["--trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch must be above 0"),
        "overfit": (["--trainer.overfit_batches=1"], "trainer.overfit_batches is not supported"),
        "three best": (["--checkpoint.save_top_k=3"], "checkpoint.save_top_k 3: leave it out, there is one best.ckpt"),
        "best by another name": (
            ["--checkpoint.filename=mine"],
            "checkpoint.filename mine: leave it out, there is one",
        ),
        "not measured yet": (["--checkpoint.every_n_train_steps=7"], "checkpoint.every_n_train_steps 7: leave it out"),
        "averages not kept": (
            [
                *("--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"),
                "--checkpoint.save_weights_only=true",
            ],
            "checkpoint.save_weights_only would keep the weights that are not averaged",
        ),
        "no best": (["--ckpt_path=best"], "best.ckpt: no such checkpoint file"),
        "endless": (["--trainer.max_epochs=-1"], "give trainer.max_epochs"),
        "accelerator": (["--trainer.accelerator=abacus"], "abacus"),
        "no rate": (["--model.lr=0"], "model.lr must be above 0, got 0"),
        "growing weights": (["--model.weight_decay=-4"], "model.weight_decay must be at least 0, got -4"),
        "no workers": (["--data.num_workers=-2"], "data.num_workers must be at least 0, got -2"),
        "empty name": (["--data.dataset=a,"], "data.dataset 'a,' has an empty name in it"),
        "size": (["--data.image_size=64,96"], "data.image_size cannot be 64,96; give 224, or [224, 320] for height"),
        "precision": (["--trainer.precision=fp99"], "trainer.precision cannot be fp99; give 16, 16-mixed, 16-true"),
        "all in less": (["--trainer.precision=bf16-true"], "trainer.precision bf16-true: the weights stay in float32"),
        "not measured": (["--checkpoint.monitor=val_acc"], "checkpoint: monitor val_acc is not measured; give one of"),
        "of one batch": (
            ["--checkpoint.monitor=train/loss"],
            "checkpoint: monitor train/loss is of the last batch alone, as it was augmented; give val/loss",
        ),
        "of one batch too": (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=train/loss"],
            "EarlyStopping: monitor train/loss is of the last batch alone",
        ),
        "the worst": (
            ["--checkpoint.mode=max"],
            "checkpoint: mode max takes the worst val/loss for the best; give mode",
        ),
        "stopped early": (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/acc"],
            "EarlyStopping: mode min takes the worst val/acc for the best; give mode max",
        ),
        "averaged too late": (
            ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.1"],
            "StochasticWeightAveraging averages behind the last save; EMAWeightAveraging is kept",
        ),
        "nothing to stop by": (
            ["--data.val_fraction=0", "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"],
            "EarlyStopping: monitor val/loss is not measured: there is no validation",
        ),
        "stopped where nothing is measured": (
            [
                *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"),
                *("--trainer.callbacks.check_on_train_epoch_end=true", "--trainer.check_val_every_n_epoch=2"),
            ],
            "EarlyStopping: check_on_train_epoch_end looks for val/loss after each epoch, and with",
        ),
        "other steps later": (
            ["--trainer.callbacks+=GradientAccumulationScheduler", "--trainer.callbacks.scheduling={4: 1}"],
            "GradientAccumulationScheduler changes the steps of an epoch",
        ),
        "batches found": (["--trainer.callbacks+=BatchSizeFinder"], "BatchSizeFinder changes the steps of an epoch"),
        "shared out twice": (
            ["--trainer.use_distributed_sampler=true"],
            "trainer.use_distributed_sampler would share out what the processes have shared",
        ),
        "unknown callback": (
            ["--trainer.callbacks+=Earlystop"],
            "trainer.callbacks cannot be Earlystop; give EarlyStopping?",
        ),
        "own callback": (
            ["--trainer.callbacks+=my_package.Callback"],
            "trainer.callbacks cannot be my_package.Callback; give one of lightning or vit; import_path_allowlist in",
        ),
        "another callback's": (
            [f"--config={ROOT}/configs/folder.yaml", "--trainer.callbacks+=EarlyStopping"],
            "trainer.callbacks cannot be EarlyStopping; give it with --trainer.callbacks.monitor",
        ),
        "callback alone": (
            ["--trainer.callbacks=EarlyStopping"],
            "trainer.callbacks cannot be EarlyStopping; give it with --trainer.callbacks.monitor",
        ),
        "callback's option": (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitr=val/loss"],
            "trainer.callbacks.monitr: there is no such option of what trainer.callbacks names",
        ),
        "callback's value": (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.patience=abc"],
            "trainer.callbacks.patience cannot be abc; give a whole number",
        ),
        "logger": (
            ["--trainer.logger=CSVLogger"],
            "trainer.logger cannot be CSVLogger; give it with --trainer.logger.save_dir FOLDER",
        ),
        "logger's package": (
            ["--trainer.logger=WandbLogger"],
            "WandbLogger needs what is not installed: pip install 'wandb",
        ),
        "a list of settings": (
            ["--data.augment=[1,2]"],
            "data.augment is [1,2], where settings belong: give them one by one, as --data.augment.NAME VALUE",
        ),
        "pairs": (["--model.resolution=[0.5,0.5]"], "model.resolution cannot be 0.5; give [[0.4, 0.5], [0.7, 0.75]]: "),
        "number": (["--model.depth=x"], "model.depth cannot be x; give a whole number"),
        "choice": (
            ["--model.pool=max"],
            "model.pool cannot be max; give token, mean",
        ),
        "spawned": (["--trainer.strategy=ddp_spawn"], "trainer.strategy ddp_spawn copies what cannot be copied"),
        "any seed": (["--seed_everything=true"], "seed_everything takes a number"),
        "negative clipping": (
            ["--trainer.gradient_clip_val=-1"],
            "trainer.gradient_clip_val must be at least 0, got -1",
        ),
        "negative accumulation": (["--trainer.accumulate_grad_batches=-1"], "accumulate_grad_batches must be above 0"),
        "all devices": (["--trainer.devices=-1"], "trainer: "),
        "finder": (["--trainer.callbacks+=LearningRateFinder"], "LearningRateFinder trains by a schedule of its own"),
        "no batches": (["--trainer.limit_train_batches=0"], "trainer.limit_train_batches must be above 0"),
        "resolution": (["--model.resolution=[[0.5, 0.6]]"], "model.resolution: 0.6 of 8x8: image height 5 is not a"),
        "a file as folder": ([f"--trainer.default_root_dir={garbage}"], f"default_root_dir {garbage}: cannot be made"),
    }


@pytest.mark.parametrize("case", mistakes(Path()))
def test_mistake_is_one_line(tmp_path, capfd, case):
    arguments, message = mistakes(tmp_path)[case]
    (tmp_path / "garbage.ckpt").write_bytes(b"garbage" * 99)
    (tmp_path / "endless.yaml").write_text("trainer: {max_epochs: null}")
    assert run("fit", tmp_path / "run", *arguments) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert len(said) == 1, said
    assert said[0].startswith("train.py: ")
    assert message in f"{said[0]}\n"


def test_names_move_no_terminal(tmp_path, capfd):
    """Of folders, images and settings, which others may have chosen; bytes in no valid encoding too."""
    name = os.fsdecode(b"\x1b]0;title\x07\xc2\x9b31m\xff")
    for folder in ("0", "1"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / folder / "a.png")
    (tmp_path / "images" / "0" / f"{name}.txt").touch()
    (tmp_path / "images" / "1" / f"{name}.png").write_bytes(b"no image")
    (tmp_path / "a.yaml").write_text(f"model: {{{json.dumps(name[:10])}: 1}}")
    images = ["--data.dataset", str(tmp_path / "images"), "--data.root", str(tmp_path / "root")]
    for arguments in (images, [f"--data.dataset={name}"], [f"--config={tmp_path}/a.yaml"]):
        assert run("fit", tmp_path / "run", *arguments) == 2
        assert "\\x1b]0;title" in (said := capfd.readouterr().err)
        assert said.replace("\n", "").isprintable()
    (listed,) = (tmp_path / "root/cache").glob("*-unreadable.txt")
    assert listed.read_text().replace("\n", "").isprintable()


@pytest.mark.parametrize("validated", [True, False])
def test_weights_whose_averaging_has_not_begun_are_measured_and_kept_as_they_are(tmp_path, validated):
    short = ("--trainer.max_epochs=1", *(() if validated else ("--data.val_fraction=0",)))
    late = ("--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.update_starting_at_step=999")
    assert run("fit", tmp_path / "plain", *short) == 0
    assert run("fit", tmp_path / "late", *short, *late) == 0
    plain, as_plain = load_checkpoint(tmp_path / "plain/model.safetensors")
    model, about = load_checkpoint(tmp_path / "late/model.safetensors")
    assert about.metrics == as_plain.metrics
    assert all(torch.equal(weights, model.state_dict()[name]) for name, weights in plain.state_dict().items())


def test_tasks_that_slurm_has_not_shared_out_are_one_line(tmp_path, monkeypatch, capsys):
    """A job of four tasks whose script calls python without srun."""
    for name, value in {"JOB_ID": "77", "JOB_NAME": "vit", "NTASKS": "4"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert run("fit", tmp_path) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("train.py: trainer: You set `--ntasks=4` in your SLURM")


@pytest.mark.parametrize(
    ("setting", "default"),
    [
        ("data.val_fraction", "leave it out for its default"),
        ("data.augment", "leave it out for its default"),
        ("model.resolution", "leave it out for its default"),
        ("model.mlp_ratio", "leave it out for its default"),
        ("trainer.max_steps", "-1 is no limit"),
    ],
)
def test_null_in_a_file_is_one_line(tmp_path, capsys, setting, default):
    part, _, name = setting.partition(".")
    (path := tmp_path / "mine.yaml").write_text(f"{part}:\n  {name}: null\n")
    assert run("fit", tmp_path / "run", f"--config={path}") == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"train.py: {setting} cannot be null; {default}"


def test_bad_images_are_known_before_the_first_step(tmp_path, capfd, monkeypatch):
    """And left out on request. The set counts as too large to be decoded beforehand."""
    monkeypatch.setattr(data.cache, "LIMIT", 0)
    for i in range(24):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(path)
    for bad in ("a/8.png", "b/3.png"):
        (tmp_path / "images" / bad).write_bytes(b"no image")
    arguments = [f"--data.dataset={tmp_path / 'images'}", f"--data.root={tmp_path}", "--data.num_workers=0"]
    arguments += ["--data.batch_size=4", "--trainer.max_epochs=1"]
    report = tmp_path / "cache" / "images-unreadable.txt"
    for root in ("first", "second"):
        assert run("fit", tmp_path / root, *arguments) == 2
        said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("Seed set")]
        assert len(said) == 1, said
        assert f"{tmp_path}/images/a/8.png: " in said[0]
        assert f"(and 1 more of 24 files); all are listed in {report}; --data.on_bad skip" in said[0]
        assert not (tmp_path / root).exists()
    assert [line.partition(": ")[0][-7:] for line in report.read_text().splitlines()] == ["a/8.png", "b/3.png"]
    assert run("fit", tmp_path / "third", *arguments, "--data.on_bad=skip") == 0
    assert capfd.readouterr().err.count("2 of 24 files cannot be read and are left out") == 1
    assert load_checkpoint(tmp_path / "third" / "model.safetensors")[1].class_names == ("a", "b")


def test_run_goes_on_with_its_own_model_and_optimiser_only(fitted, tmp_path, capfd):
    shutil.copy(fitted / "last.ckpt", tmp_path)
    assert run("fit", tmp_path, "--ckpt_path=last", "--model.embed_dim=32") == 2
    assert "embed_dim 16, this one 32; train anew without --ckpt_path" in capfd.readouterr().err
    assert not (tmp_path / "config.yaml").exists()  # that of the run would have been lost
    assert run("fit", tmp_path, "--ckpt_path=last", "--trainer.max_epochs=1") == 2
    assert "last.ckpt: nothing is left to train, 2 of 1 epochs are done. Longer: " in capfd.readouterr().err
    for size, steps in ((1024, 1), (128, 10)):  # the rate would be 0 from now on; and at the end far from it
        assert run("fit", tmp_path, "--ckpt_path=last", "--trainer.max_epochs=9", f"--data.batch_size={size}") == 2
        assert f"step 10 of epoch 2 cannot go on with epochs of {steps} steps: keep " in capfd.readouterr().err
    assert run("fit", tmp_path, "--ckpt_path=last", "--model.layer_decay=0.5") == 2
    assert "last.ckpt: trained with model.layer_decay 1.0, which cannot become 0.5; a new" in capfd.readouterr().err
    other = ["--checkpoint.monitor=val/acc", "--checkpoint.mode=max"]  # of which the best so far is not known
    assert run("fit", tmp_path, "--ckpt_path=last", "--trainer.max_epochs=9", *other) == 2
    assert "last.ckpt: trained with checkpoint.monitor val/loss, which cannot become val/acc" in capfd.readouterr().err


def test_model_is_taken_from_the_checkpoint(fitted, tmp_path):
    """No configuration is needed to measure."""
    arguments = [f"--ckpt_path={fitted / 'best.ckpt'}", "--data.dataset=digits", "--trainer.accelerator=cpu"]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}"]
    assert train.main(["test", *arguments, *quiet]) == 0
    assert 0.1 < table(tmp_path / "test")[0]["test/acc"] < 1


def test_no_command_and_help(capfd):
    assert train.main([]) == 2
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    assert "measure a checkpoint on the test images, class by class" in " ".join(capfd.readouterr().out.split())


def test_script_ends_with_the_status():
    result = process("fit", "--model.nonsense=1")
    assert result.returncode == 2
    assert result.stderr.startswith("train.py: ")
    assert result.stderr.count("\n") == 1
