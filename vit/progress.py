"""What a person watches while a model trains."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from vit.records import printable
from vit.saving import keeper_of

WIDE = 100  # columns of a terminal in which the bar, the time gone and all words have room


class TrainingProgress(ProgressBar):
    """One bar for the whole run in a terminal, one line an epoch (and at most one a few seconds) elsewhere.

    Shows epoch, loss (a running mean), validation accuracy, images a second, time gone and time left. Numbers are
    fetched from another device than the CPU only when they are drawn, a few times a second; from a GPU without waiting
    for it, so that the loss that is drawn is the one that was sent for at the drawing before. On a CPU every loss
    counts, so that equal runs have equal lines.
    """

    def __init__(self) -> None:
        super().__init__()
        self.console = Console(stderr=True)
        self.enabled = True
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.loss = self.rate = self.images = self.drawn = self.since = self.line = 0.0
        self.accuracy: float | None = None
        self.metric = "val/acc"
        self.sent: tuple[Any, Any] | None = None  # a loss on its way from the GPU, and the event of its arrival
        self.unsaid = ""  # line of an epoch that came too soon after the last one

    def disable(self) -> None:
        self.enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        self.console.print(*args)

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled or not trainer.is_global_zero:
            return
        self._introduce(trainer, pl_module)
        self.since = self.drawn = time.monotonic()
        self.images = self.loss = 0.0
        self.accuracy, self.sent = None, None
        monitor = getattr(keeper_of(trainer), "monitor", None)
        self.metric = monitor if monitor == "val/balanced_acc" else "val/acc"
        total = trainer.estimated_stepping_batches
        wide = self.console.width >= WIDE
        self.unit = " images/s" if wide else "/s"
        columns = (
            *((SpinnerColumn(),) if wide else ()),
            TextColumn("[bold]{task.description}"),
            *((BarColumn(bar_width=None),) if wide else ()),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[numbers]}"),
            *((TimeElapsedColumn(), TextColumn("gone,")) if wide else ()),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal, refresh_per_second=4)
        self.task = self.bar.add_task("training", total=total, completed=trainer.global_step, numbers="")
        self.bar.start()

    def _introduce(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Who learns what, where: two lines before the bar."""
        vit: Any = pl_module.vit
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        size = sum(p.numel() for p in vit.parameters())
        (height, width), (rows, columns) = vit.patch_size, vit.grid_size
        what = f"{data.dataset}: {len(data.train):,} training and {len(data.val or ()):,} validation images, "
        total, devices = int(trainer.estimated_stepping_batches), trainer.num_devices * trainer.num_nodes
        lines = [
            f"{what}{vit.num_classes} classes",
            f"ViT of {size / 1e6:.2f} M parameters, {rows}x{columns} patches of {height}x{width} pixels; "
            f"{total:,} step{'s' * (total != 1)} on {devices} x {pl_module.device.type}",
        ]
        model: Any = pl_module
        if model.resolution and (until := model.resolution[-1][0]) * total > trainer.global_step:
            smaller = " then ".join("{}x{}".format(*model.scaled(factor)) for _, factor in model.resolution)
            words = "validation is at full size, and says little before that"
            lines.append(f"images of {smaller} pixels until step {round(until * total):,}; {words}")
        if trainer.global_step:
            lines.append(f"going on at step {trainer.global_step:,}")
        for line in lines:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar is None:
            return
        self.images += len(batch.labels) * trainer.world_size
        now = time.monotonic()
        due = not self.loss or now - self.drawn >= 0.25
        if due or outputs["loss"].is_cpu:
            self._fetch(outputs["loss"], trainer.accumulate_grad_batches)
        if not due:
            return
        self.rate = self.images / max(now - self.drawn, 1e-9)
        self.drawn, self.images = now, 0.0
        self._draw(trainer)

    def _fetch(self, loss: Any, divided: int) -> None:
        """Take up this loss; from a GPU, but for the first, the one sent for before, once it has arrived.

        Lightning has divided it by the batches of a step.
        """
        if self.loss and loss.is_cuda:
            before = self.sent
            if before is not None and not before[1].query():
                return
            self.sent = send(loss)
            if before is None:
                return
            loss = before[0]
        number = float(loss) * divided
        self.loss = number if not self.loss else 0.9 * self.loss + 0.1 * number

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is not None and (accuracy := trainer.callback_metrics.get(self.metric)) is not None:
            self.accuracy = float(accuracy)  # here once, not whenever it is drawn: the metric is on the device

    def _draw(self, trainer: Trainer) -> None:
        assert self.bar is not None
        assert self.task is not None
        numbers = [f"loss {self.loss:.3f}"]
        if self.accuracy is not None:
            numbers.append(f"{self.metric_name} {self.accuracy:.1%}")
        numbers.append(f"{self.rate:,.0f}{self.unit}")
        self.bar.update(
            self.task,
            completed=trainer.global_step,
            description=f"epoch {epoch_of(trainer)}",
            numbers="  ".join(numbers),
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is None or self.console.is_terminal:
            return
        now = time.monotonic()
        shown = f"  {self.metric_name} {self.accuracy:.1%}" if self.accuracy is not None else ""
        self.unsaid = f"epoch {epoch_of(trainer):>7}  loss {self.loss:.3f}{shown}  {now - self.since:,.0f} s"
        if now - self.line >= 5:
            self.line = now
            self._say()

    def _say(self) -> None:
        if self.unsaid:
            print(self.unsaid, file=sys.stderr, flush=True)
            self.unsaid = ""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is not None:
            self._draw(trainer)
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Where the result lies, how good it is, and what to do with it."""
        exported = getattr(pl_module, "exported", None)
        if not self.enabled or exported is None or stage != "fit":
            return
        path, about = exported
        score = f", {self.metric_name} {about.metrics[self.metric]:.1%}" if self.metric in about.metrics else ""
        why = "none were kept as the best" if pl_module.validated is not None else "nothing was validated"
        predict = "vit-predict" if Path(sys.argv[0]).name == "vit-train" else "python predict.py"  # as this was called
        which = f"best weights, epoch {about.training['epochs']}" if pl_module.measured else f"last ({why}) weights"
        for line in (
            f"{which}{score}: {path}",
            f"classify with them: {predict} IMAGE --checkpoint {path}",
        ):
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    @property
    def metric_name(self) -> str:
        return self.metric.replace("/", " ").replace("_", " ")

    def _close(self) -> None:
        self._say()
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def measured(metrics: Mapping[str, Tensor]) -> str:
    """What was measured, in a line: shares in percent, the loss as it is."""
    words = []
    for name, value in sorted(metrics.items(), key=lambda item: item[0].endswith("loss")):
        word = name.partition("/")[2].replace("_", " ")
        words.append(f"{word} {value:.4f}" if word == "loss" else f"{word} {value:.2%}")
    return ", ".join(words)


def class_table(confusion: Tensor, names: Sequence[str], most: int = 30) -> Table:
    """How well each class is told, for people: all classes, or those that are recognised worst.

    Args:
        confusion: Images of each class (row) that were given each class (column).
        names: Of the classes.
        most: Rows of the table.
    """
    images, given, right = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    recall = right / images
    rows = torch.arange(len(names))
    if len(names) > most:
        rows = recall.nan_to_num(2.0).argsort(stable=True)[:most]
    title = f"the {most} of {len(names)} classes that are recognised worst" if len(names) > most else None
    table = Table("class", title=title)
    for column in ("images", "recognised", "right when named"):
        table.add_column(column, justify="right")
    table.add_column("most often taken for")
    wrong = confusion.clone().fill_diagonal_(0)
    for row in map(int, rows):
        other = int(wrong[row].argmax())
        mistaken = f"{printable(names[other])} ({wrong[row, other] / images[row]:.1%})" if wrong[row, other] else ""
        shares = (f"{right[row] / whole:.1%}" if whole else "" for whole in (images[row], given[row]))
        table.add_row(escape(printable(names[row])), str(int(images[row])), *shares, escape(mistaken))
    return table


def send(loss: Any) -> tuple[Any, Any]:
    """A copy of a GPU's number on the host, there when the event has happened."""
    copy, event = loss.detach().to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()
    return copy, event


def epoch_of(trainer: Trainer) -> str:
    """Number of the present epoch, from 1, and of how many if that is known."""
    if trainer.max_epochs and trainer.max_epochs > 0:  # at the end the count has gone on already
        return f"{min(trainer.current_epoch + 1, trainer.max_epochs)}/{trainer.max_epochs}"
    return f"{trainer.current_epoch + 1}"
