"""What is said while a model trains: a bar in a terminal, a line now and then elsewhere."""

import re
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import vit.progress
from vit.model import VisionTransformer
from vit.progress import TrainingProgress, class_table


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(vit.progress, "time", clock)
    return clock


@pytest.fixture
def module() -> Any:
    sizes = {"image_size": (4, 8), "patch_size": 2, "in_chans": 1, "num_classes": 3, "embed_dim": 8, "depth": 1}
    vit = VisionTransformer(**sizes, num_heads=2)
    return SimpleNamespace(vit=vit, device=torch.device("cpu"), resolution=[])


def trainer_of(max_epochs: int = 12, batches: int = 4, accumulate: int = 1) -> Any:
    return SimpleNamespace(
        is_global_zero=True,
        estimated_stepping_batches=max_epochs * batches,
        global_step=0,
        current_epoch=0,
        max_epochs=max_epochs,
        world_size=2,
        accumulate_grad_batches=accumulate,
        num_devices=2,
        num_nodes=1,
        callback_metrics={},
        checkpoint_callbacks=[],
        datamodule=SimpleNamespace(dataset="digits", train=range(1294), val=range(143)),
    )


def train(progress, trainer, module, clock, *, epochs: int, seconds: float, batches: int = 4, end: bool = True) -> None:
    """Go through the hooks as the trainer does: batches of 25 images a rank, the loss 2 at first and 1 then.

    It comes divided by the batches of a step, as from Lightning.
    """
    progress.on_train_start(trainer, module)
    batch = SimpleNamespace(labels=torch.zeros(25))
    for epoch in range(epochs):
        trainer.current_epoch = epoch
        for i in range(batches):
            clock.now += seconds / batches
            trainer.global_step += 1
            loss = {"loss": torch.tensor(2.0 if trainer.global_step == 1 else 1.0) / trainer.accumulate_grad_batches}
            progress.on_train_batch_end(trainer, module, loss, batch, i)
        trainer.callback_metrics = {"val/acc": torch.tensor(0.5 + epoch / 100)}
        progress.on_validation_end(trainer, module)
        progress.on_train_epoch_end(trainer, module)
    if end:
        trainer.current_epoch = epochs
        progress.on_train_end(trainer, module)


def quiet() -> TrainingProgress:
    """As when the output goes to a file."""
    progress = TrainingProgress()
    progress.console = Console(file=StringIO(), width=200)
    return progress


def watched() -> TrainingProgress:
    progress = TrainingProgress()
    progress.console = Console(file=StringIO(), force_terminal=True, width=140, legacy_windows=False)
    return progress


def text(progress: TrainingProgress) -> str:
    """All that was drawn, without colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", progress.console.file.getvalue())  # type: ignore[attr-defined]


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_at_most_every_five_seconds_and_the_last(clock, module, capsys):
    train(quiet(), trainer_of(accumulate=4), module, clock, epochs=12, seconds=1)
    said = lines(capsys)
    assert [int(line.split()[1].split("/")[0]) for line in said] == [1, 6, 11, 12]
    assert said[-1].split() == ["epoch", "12/12", "loss", said[-1].split()[3], "val", "acc", "61.0%", "12", "s"]
    assert 1 <= float(said[-1].split()[3]) < 1.1


def test_every_slow_epoch_has_its_line(clock, module, capsys):
    train(quiet(), trainer_of(3), module, clock, epochs=3, seconds=60)
    assert [line.split()[1] for line in lines(capsys)] == ["1/3", "2/3", "3/3"]


@pytest.mark.parametrize("max_epochs", [100, -1])
def test_last_epoch_is_told_when_a_run_ends_early(clock, module, capsys, max_epochs):
    """Stopped by a callback, by a number of steps or by time."""
    train(quiet(), trainer_of(max_epochs), module, clock, epochs=3, seconds=1)
    assert [line.split()[1].removesuffix("/100") for line in lines(capsys)] == ["1", "3"]


def test_an_error_leaves_the_last_line_and_no_bar(clock, module, capsys):
    progress, trainer = quiet(), trainer_of()
    train(progress, trainer, module, clock, epochs=3, seconds=1, end=False)
    progress.on_exception(trainer, module, RuntimeError())
    assert [line.split()[1] for line in lines(capsys)] == ["1/12", "3/12"]
    assert progress.bar is None


def test_very_short_run_has_a_loss(clock, module, capsys):
    train(quiet(), trainer_of(1), module, clock, epochs=1, seconds=0.0)
    assert "loss 1.729" in lines(capsys)[0]


def test_introduction_says_what_learns_from_what(clock, module):
    progress = quiet()
    train(progress, trainer_of(), module, clock, epochs=1, seconds=1)
    said = " ".join(text(progress).split())
    assert "digits: 1,294 training and 143 validation images, 3 classes" in said
    assert "2x4 patches of 2x2 pixels; 48 steps on 2 x cpu" in said
    assert "until" not in said
    assert "going on" not in said


def test_introduction_says_what_one_would_wonder_about(clock, module):
    """Why validation is bad while images are small, and that a run goes on."""
    module.resolution, module.scaled = [(0.4, 0.5), (0.65, 0.75)], lambda factor: (int(4 * factor), int(8 * factor))
    for step, small in ((12, True), (32, False)):
        progress, trainer = quiet(), trainer_of()
        trainer.global_step = step
        train(progress, trainer, module, clock, epochs=1, seconds=1)
        said = " ".join(text(progress).split())
        assert ("images of 2x4 then 3x6 pixels until step 31; validation is at full size, and says" in said) == small
        assert f"going on at step {step}" in said


def test_classes_of_a_test():
    confusion = torch.tensor([[6, 0, 2], [3, 1, 0], [0, 0, 0]])
    console = Console(file=(file := StringIO()), width=100)
    console.print(class_table(confusion, ("cat", "[red]", "owl")))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in file.getvalue().splitlines()]
    assert ["cat", "8", "75.0%", "66.7%", "owl (25.0%)"] in rows
    assert ["[red]", "4", "25.0%", "100.0%", "cat (75.0%)"] in rows
    assert ["owl", "0", "", "0.0%", ""] in rows
    console.print(class_table(confusion, ("\x1b[31m", "b", "owl")))  # the name of a folder moves no terminal
    assert "\x1b" not in file.getvalue()
    assert file.getvalue().count("\\x1b[31m") == 2
    console.print(class_table(confusion, ("cat", "[red]", "owl"), most=1))
    assert "the 1 of 3 classes that are recognised worst" in file.getvalue()


def test_bar_shows_all_that_one_wants_to_know(clock, module, capsys):
    progress = watched()
    train(progress, trainer_of(3), module, clock, epochs=2, seconds=4, end=False)
    assert progress.bar is not None
    progress.bar.refresh()
    said = text(progress)
    last = said.splitlines()[-1]
    assert "epoch 2/3" in last
    assert "val acc 50.0%" in last  # of the epoch before
    assert "50 images/s" in last  # 25 images a second on each of two ranks
    assert "67%" in last
    assert re.search(r"loss 1\.\d{3}", last)
    assert re.search(r"\d:\d\d:\d\d gone,\s+[-\d]+:[-\d]+:[-\d]+\s+left", last)
    progress.on_train_end(trainer_of(), module)
    assert progress.bar is None
    assert lines(capsys) == []  # no lines beside the bar


@pytest.mark.parametrize("width", [66, 80, 100])
def test_a_narrow_terminal_has_the_time_that_is_left(width, clock, module):
    progress = watched()
    progress.console = Console(file=StringIO(), force_terminal=True, width=width, legacy_windows=False)
    train(progress, trainer_of(120), module, clock, epochs=1, seconds=4, end=False)
    assert progress.bar is not None
    progress.bar.refresh()
    last = text(progress).splitlines()[-1]
    assert re.search(r"epoch 1/120.*%.*loss 1\.\d{3}.* 50( images)?/s.* \S+:\d\d:\d\d\s+left", last), last
    assert "…" not in last


def test_equal_runs_have_equal_losses_however_fast_they_are(clock, module):
    losses = []
    for seconds in (0.01, 0.7, 30):
        train(progress := quiet(), trainer_of(), module, clock, epochs=5, seconds=seconds)
        losses.append(progress.loss)
    assert losses == [pytest.approx(1 + 0.9**19)] * 3


def test_loss_is_read_a_few_times_a_second_only(clock, module):
    """Reading waits for the device."""

    class Loss:
        read = 0
        is_cuda = is_cpu = False

        def __float__(self) -> float:
            Loss.read += 1
            return 1.0

    progress, trainer = watched(), trainer_of(1, 1000)
    progress.on_train_start(trainer, module)
    for i in range(1000):
        clock.now += 0.005
        progress.on_train_batch_end(trainer, module, {"loss": Loss()}, SimpleNamespace(labels=torch.zeros(1)), i)
    progress.on_train_end(trainer, module)
    assert Loss.read <= 21


def test_on_a_gpu_a_loss_is_read_once_it_has_arrived(clock, module, monkeypatch):
    """The first at once; after that nothing waits for the device, and what is drawn is what was sent for before."""
    arrived: list[bool] = []
    monkeypatch.setattr(vit.progress, "send", lambda loss: (loss.number, SimpleNamespace(query=lambda: arrived[-1])))

    class Loss:
        is_cuda, is_cpu = True, False

        def __init__(self, number: float) -> None:
            self.number = number

        def __float__(self) -> float:
            assert self.number == 1, "read while it may still be computed"
            return self.number

    progress, trainer, shown = watched(), trainer_of(1, 6), []
    progress.on_train_start(trainer, module)
    for number, there in [(1, True), (2, True), (3, False), (4, True), (5, True)]:
        arrived.append(there)
        clock.now += 1
        progress.on_train_batch_end(
            trainer, module, {"loss": Loss(float(number))}, SimpleNamespace(labels=torch.zeros(1)), 0
        )
        shown.append(progress.loss)
    progress.on_train_end(trainer, module)
    assert shown == pytest.approx([1, 1, 1, 0.9 + 0.1 * 2, 0.9 * 1.1 + 0.1 * 4])  # the third came too soon to be sent


@pytest.mark.parametrize("reason", ["disabled", "other rank"])
def test_silence(clock, module, capsys, reason):
    progress, trainer = quiet(), trainer_of()
    if reason == "disabled":
        progress.disable()
    trainer.is_global_zero = reason == "disabled"
    train(progress, trainer, module, clock, epochs=2, seconds=10)
    assert lines(capsys) == []
    assert text(progress) == ""


@pytest.mark.parametrize(("called", "predict"), [("train.py", "python predict.py"), ("bin/vit-train", "vit-predict")])
def test_the_end_is_drawn_and_says_where_the_result_lies(clock, module, monkeypatch, called, predict):
    monkeypatch.setattr(sys, "argv", [called, "fit"])
    progress, trainer = watched(), trainer_of(max_epochs=2)
    train(progress, trainer, module, clock, epochs=2, seconds=0.1)
    assert re.search(r"epoch 2/2 .* 100%.* val acc 51.0%.* 0:00:00 left", text(progress).splitlines()[-1])
    module.exported = (
        Path("runs/x/model.safetensors"),
        SimpleNamespace(metrics={"val/acc": 0.512}, training={"epochs": 7}),
    )
    module.measured, module.validated = True, 2
    progress.teardown(trainer, module, "test")
    assert "best weights" not in text(progress)
    progress.teardown(trainer, module, "fit")
    assert text(progress).splitlines()[-2:] == [
        "best weights, epoch 7, val acc 51.2%: runs/x/model.safetensors",
        f"classify with them: {predict} IMAGE --checkpoint runs/x/model.safetensors",
    ]


def test_a_run_that_left_nothing_says_nothing(clock, module):
    progress, trainer = quiet(), trainer_of(max_epochs=2)
    train(progress, trainer, module, clock, epochs=1, seconds=1)
    module.exported = None
    said = text(progress)
    progress.teardown(trainer, module, "fit")
    assert text(progress) == said
