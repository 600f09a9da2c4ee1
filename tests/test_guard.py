"""Runs that diverge, are told to stop or have no room: what they say, leave and return."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities import rank_zero_only

import train
import vit.guard
from vit.classifier import ViTClassifier
from vit.guard import Guard
from vit.saving import CheckpointFile

ROOT = Path(__file__).parent.parent
TINY = [
    f"--config={ROOT / 'configs/digits.yaml'}",
    "--model.embed_dim=16",
    "--model.depth=1",
    "--model.num_heads=2",
    "--data.batch_size=256",  # five steps an epoch
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=false",
    "--trainer.max_epochs=2",
]


def fit(root: Path, *arguments: str) -> int | str | None:
    """Exit status of a run."""
    try:
        return train.main(["fit", *TINY, f"--trainer.default_root_dir={root}", *arguments])
    except SystemExit as stop:
        return stop.code


def last(root: Path) -> dict[str, Any]:
    return torch.load(root / "last.ckpt", weights_only=True)


@pytest.fixture
def at_step(monkeypatch) -> Callable:
    """Has something done to the loss of a step; the tests that use it save after each step."""
    monkeypatch.setattr(vit.guard, "SAVING", float("inf"))
    training_step = ViTClassifier.training_step

    def change(step: int, action: Callable) -> None:
        def changed(self: ViTClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = training_step(self, batch, batch_idx)
            return action(self, loss) if self.global_step == step else loss

        monkeypatch.setattr(ViTClassifier, "training_step", changed)

    return change


@pytest.fixture
def saves(monkeypatch) -> list[tuple[str, int]]:
    """Name and step of each file saved from now on."""
    save, log = CheckpointFile.save_checkpoint, []

    def logged(self: CheckpointFile, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save(self, checkpoint, path, storage_options)
        log.append((Path(path).name, checkpoint["global_step"]))

    monkeypatch.setattr(CheckpointFile, "save_checkpoint", logged)
    return log


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever a run does with signals, it undoes."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(s) for s in signals]
    yield
    assert [signal.getsignal(s) for s in signals] == before


# Divergence


def infinite_gradient(self: ViTClassifier, loss: torch.Tensor) -> torch.Tensor:
    """A finite loss whose gradient is not."""
    return loss + (0 * self.vit.head.weight.sum()).sqrt()


@pytest.mark.parametrize(
    ("what", "action"),
    [
        ("loss", lambda self, loss: loss * float("nan")),
        ("loss", lambda self, loss: loss + float("inf")),
        ("gradient", infinite_gradient),
    ],
    ids=["nan", "inf", "gradient"],
)
def test_diverged_run_ends_at_that_step(tmp_path, at_step, capfd, what, action):
    at_step(7, action)
    assert fit(tmp_path, "--guard.minutes=0") == 5
    said = capfd.readouterr().err.splitlines()[-1]
    assert f"the {what} is not finite at step 8 on process 0 of 1; {tmp_path / 'last.ckpt'} is from before" in said
    state = last(tmp_path)
    assert state["global_step"] == 7
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 5


def test_one_bad_batch_of_several_in_a_step_counts(tmp_path, at_step, capfd):
    calls = []
    at_step(1, lambda self, loss: calls.append(0) or loss * (float("nan") if len(calls) == 1 else 1))
    assert fit(tmp_path, "--trainer.accumulate_grad_batches=2") == 5
    assert "the loss is not finite at step 2 on" in capfd.readouterr().err
    assert len(calls) == 2


@pytest.fixture
def late(monkeypatch) -> None:
    """Has the host read the numbers of a step after the next one was sent off, as on a GPU."""
    start = Guard.on_train_start

    def on_train_start(self: Guard, *arguments: Any) -> None:
        start(self, *arguments)
        self.late = True

    monkeypatch.setattr(Guard, "on_train_start", on_train_start)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("step", [3, 4], ids=["in mid-epoch", "before validation"])
def test_on_a_gpu_it_is_known_a_step_later_and_nothing_saved_since(tmp_path, at_step, saves, capfd, step):
    """It is read sooner where anything depends on it. What is due is known a step later too: every second one saves."""
    at_step(step, lambda self, loss: loss * float("nan"))
    assert fit(tmp_path, "--guard.minutes=0") == 5
    assert f"the loss is not finite at step {step + 1} on" in capfd.readouterr().err
    assert max(saves) == ("last.ckpt", step - step % 2)


@pytest.mark.usefixtures("late")
def test_on_a_gpu_another_callback_saves_nothing_of_it_either(tmp_path, at_step, saves, capfd):
    at_step(3, lambda self, loss: loss * float("nan"))
    own = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    assert fit(tmp_path, "--guard.minutes=60", *own, f"--trainer.callbacks.dirpath={tmp_path}/own") == 5
    assert "the loss is not finite at step 4 on" in capfd.readouterr().err
    assert [step for _, step in saves] == [1, 2, 3]


# Saving


def test_saves_between_steps_but_not_before_a_validation(tmp_path, monkeypatch, saves):
    monkeypatch.setattr(vit.guard, "SAVING", float("inf"))
    assert fit(tmp_path, "--guard.minutes=0") == 0
    assert [step for name, step in saves if name == "last.ckpt"] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert saves.index(("best.ckpt", 5)) < saves.index(("last.ckpt", 5))  # so it knows which is the best


def test_validation_within_an_epoch_is_not_missed(tmp_path, monkeypatch, saves):
    monkeypatch.setattr(vit.guard, "SAVING", float("inf"))
    assert fit(tmp_path, "--guard.minutes=0", "--trainer.val_check_interval=2", "--trainer.max_epochs=1") == 0
    assert [step for name, step in saves if name == "last.ckpt"] == [1, 3, 5]


def test_never_within_an_accumulation(tmp_path, monkeypatch, saves):
    """A run killed and started again twice: the counter of the first save is not the second's."""
    monkeypatch.setattr(vit.guard, "SAVING", float("inf"))
    assert fit(tmp_path, "--guard.minutes=0", "--trainer.accumulate_grad_batches=2") == 0
    assert [step for name, step in saves if name == "last.ckpt"] == [1, 2, 3, 4, 5, 6]  # 2 + 2 + 1 batches an epoch


def test_saves_at_the_end_only_where_time_is_short(tmp_path, saves):
    assert fit(tmp_path, "--guard.minutes=60") == 0
    assert [step for name, step in saves if name == "last.ckpt"] == [10]


def test_saves_at_the_end_only_where_time_is_over_too_early(tmp_path, saves, monkeypatch):
    """``min_epochs`` goes on all the same."""
    monkeypatch.setattr(Timer, "_check_time_remaining", lambda timer, trainer: setattr(trainer, "should_stop", True))
    monkeypatch.setattr(Timer, "time_remaining", lambda timer, stage=None: -1.0)
    assert fit(tmp_path, "--trainer.min_epochs=2", "--trainer.max_time=00:01:00:00") == 0
    assert [step for name, step in saves if name == "last.ckpt"] == [10]


@pytest.mark.usefixtures("late")
def test_on_a_gpu_too_it_saves_once_when_it_is_due(tmp_path, monkeypatch, saves):
    """By a clock of a second a step: what is read a step late must not be taken for due once more."""
    monkeypatch.setattr(vit.guard, "time", SimpleNamespace(monotonic=partial(next, count())))
    monkeypatch.setattr(vit.guard, "SAVING", float("inf"))
    assert fit(tmp_path, "--guard.minutes=0.1", "--data.batch_size=64", "--trainer.max_epochs=1") == 0
    steps = [step for name, step in saves if name == "last.ckpt"]
    assert len(steps) > 2
    assert min(later - step for step, later in pairwise(steps[:-1])) > 2


def test_saving_takes_a_bounded_share_of_the_time(tmp_path, monkeypatch, saves):
    """A save that takes long, by a clock that only it moves and the steps: one second each, a save three."""
    now = [0.0]
    monkeypatch.setattr(vit.guard, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(vit.guard, "SAVING", 0.5)
    step, save = ViTClassifier.training_step, CheckpointFile.save_checkpoint

    def training_step(self: ViTClassifier, *arguments: Any) -> torch.Tensor:
        now[0] += 1
        return step(self, *arguments)

    def slow(self: CheckpointFile, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        now[0] += 3 * (Path(path).name == "last.ckpt")
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(ViTClassifier, "training_step", training_step)
    monkeypatch.setattr(CheckpointFile, "save_checkpoint", slow)
    assert fit(tmp_path, "--guard.minutes=0", "--trainer.max_epochs=4") == 0
    # At once, then six seconds apart; what is due at an epoch's last step is saved at its end.
    assert [step for name, step in saves if name == "last.ckpt"] == [1, 7, 13, 19, 20]


def test_no_room(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000))
    assert fit(tmp_path) == 2
    assert f"{tmp_path}: 0 MB are free, the checkpoints need" in capfd.readouterr().err
    assert not list(tmp_path.glob("*.ckpt"))


def test_full_disk_keeps_the_old_best(tmp_path, monkeypatch, capfd):
    """The second one cannot be saved."""
    save, times = CheckpointFile.save_checkpoint, []

    def full(self: CheckpointFile, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        times.append(path)
        if len(times) == 2:
            os.symlink("/dev/full", Path(path).parent / f".{Path(path).name}.partial")
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(CheckpointFile, "save_checkpoint", full)
    assert fit(tmp_path, "--checkpoint.monitor=null", "--guard.minutes=60") == 2
    said = "best.ckpt: the checkpoint could not be saved (No space left on device); the previous one is kept"
    assert said in capfd.readouterr().err
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["best.ckpt"]
    assert CheckpointFile().load_checkpoint(tmp_path / "best.ckpt")["global_step"] == 5


def test_negative_minutes(tmp_path, capfd):
    assert fit(tmp_path, "--guard.minutes=-1") == 2
    assert "guard.minutes must be at least 0, got -1" in capfd.readouterr().err


# Signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_after_the_step(tmp_path, at_step, capfd, signum, code):
    at_step(2, lambda self, loss: os.kill(os.getpid(), signum) or loss)
    assert fit(tmp_path, "--guard.minutes=60") == code
    assert last(tmp_path)["global_step"] == 3
    assert f"stopped by {signum.name} at step 3; {tmp_path / 'last.ckpt'} goes on from here" in capfd.readouterr().err
    assert not (tmp_path / "model.safetensors").exists()


def test_lightning_does_not_ask_for_signals_at_every_step(tmp_path, at_step, monkeypatch, capfd):
    """Its question makes the host wait for the devices; one that it heard of before training is not forgotten."""

    def asked(self: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor", asked)  # which has to be there
    ask = lambda self, loss: self.trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() or loss  # noqa: E731
    at_step(1, ask)  # as it does where there are several processes
    assert fit(tmp_path) == 0
    for late in (False, True):  # on a GPU a step later

        def told(self: Guard, *_: Any, late: bool = late) -> None:
            self.late = late
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Guard, "_check_start", told)
        assert fit(tmp_path, "--guard.minutes=60") == 143
        assert f"stopped by SIGTERM at step {1 + late}" in capfd.readouterr().err


def test_processes_that_would_begin_at_different_steps_do_not():
    """Two machines with a folder each: one finds the last checkpoint, the other none."""
    strategy: Any = SimpleNamespace(reduce=lambda steps, reduce_op: steps + torch.tensor([5, 0]))
    trainer: Any = SimpleNamespace(
        world_size=2, global_rank=1, global_step=0, default_root_dir="here", strategy=strategy
    )
    with pytest.raises(
        ValueError, match=r"process 1 would begin at step 0, process 0 at step 5: .* here has to be one"
    ):
        Guard()._check_start(trainer, SimpleNamespace(device="cpu"))  # type: ignore[arg-type]
    trainer.global_step = 5
    Guard()._check_start(trainer, SimpleNamespace(device="cpu"))  # type: ignore[arg-type]


def test_signal_before_a_validation_stops_after_it(tmp_path, at_step, saves):
    at_step(4, lambda self, loss: os.kill(os.getpid(), signal.SIGTERM) or loss)
    assert fit(tmp_path, "--guard.minutes=60") == 143
    assert saves == [("best.ckpt", 5), ("last.ckpt", 5)]


def test_second_signal_stops_at_once(tmp_path, at_step):
    at_step(2, lambda self, loss: os.kill(os.getpid(), signal.SIGINT) or os.kill(os.getpid(), signal.SIGINT) or loss)
    assert fit(tmp_path, "--guard.minutes=60") == 130
    assert not (tmp_path / "last.ckpt").exists()


def test_one_process_of_several_says_that_a_signal_came(monkeypatch, capfd):
    """The terminal's Ctrl-C comes to all of them."""
    for rank in (0, 1):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        guard = Guard()
        guard._receive(signal.SIGINT, None)
        assert guard.received == signal.SIGINT
        said = "\nSIGINT: saving after this step; once more to stop without\n"
        assert capfd.readouterr().err == ("" if rank else said)


@pytest.mark.parametrize("where", ["setup", "on_fit_start"])
def test_interrupted_before_training(tmp_path, monkeypatch, where):
    def interrupt(self: Guard, *arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Guard, where, interrupt, raising=False)
    assert fit(tmp_path) == 130
    signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored: the process would end now


def test_slurm_requeues_after_the_step(tmp_path, at_step, monkeypatch):
    """Lightning's own plugin, with a scontrol that only writes down what it was asked."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (programs / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "77", "JOB_NAME": "vit", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "0")
    at_step(2, lambda self, loss: os.kill(os.getpid(), signal.SIGUSR1) or loss)
    root = tmp_path / "run"
    assert fit(root, "--guard.minutes=60") == 128 + signal.SIGUSR1
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert last(root)["global_step"] == 3
    assert not list(root.glob("hpc_ckpt_*"))  # which would start any later run in this folder
