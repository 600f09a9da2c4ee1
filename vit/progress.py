"""What a person watches while a model trains."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress(ProgressBar):
    """One bar for the whole run in a terminal, one line an epoch (and at most one a few seconds) elsewhere.

    Shows epoch, loss (a running mean), validation accuracy, images a second, time gone and time left. Numbers are
    fetched from the device only when they are drawn, a few times a second.
    """

    def __init__(self) -> None:
        super().__init__()
        self.console = Console(stderr=True)
        self.enabled = True
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.loss = self.images = self.drawn = self.since = self.line = 0.0

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        self.console.print(*args)

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled or not trainer.is_global_zero:
            return
        self.since = self.drawn = time.monotonic()
        self.images = self.loss = 0.0
        total = trainer.estimated_stepping_batches
        columns = (
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("gone,"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal, refresh_per_second=4)
        self.task = self.bar.add_task("training", total=total, completed=trainer.global_step, numbers="")
        self.bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar is None:
            return
        self.images += len(batch.labels) * trainer.world_size
        now = time.monotonic()
        if now - self.drawn < 0.25:
            return
        loss = float(outputs["loss"])
        self.loss = loss if not self.loss else 0.9 * self.loss + 0.1 * loss
        rate = self.images / (now - self.drawn)
        self.drawn, self.images = now, 0.0
        self._draw(trainer, rate)

    def _draw(self, trainer: Trainer, rate: float | None = None) -> None:
        assert self.bar is not None and self.task is not None
        numbers = [f"loss {self.loss:.3f}"]
        if (accuracy := trainer.callback_metrics.get("val/acc")) is not None:
            numbers.append(f"val acc {float(accuracy):.1%}")
        if rate is not None:
            numbers.append(f"{rate:,.0f} images/s")
        epochs = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        self.bar.update(
            self.task,
            completed=trainer.global_step,
            description=f"epoch {trainer.current_epoch + 1}{epochs}",
            numbers="  ".join(numbers),
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is None or self.console.is_terminal:
            return
        now, last = time.monotonic(), trainer.current_epoch + 1 == trainer.max_epochs
        if now - self.line < 5 and not last:
            return
        self.line = now
        accuracy = trainer.callback_metrics.get("val/acc")
        shown = f"  val acc {float(accuracy):.1%}" if accuracy is not None else ""
        print(
            f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}  loss {self.loss:.3f}{shown}  "
            f"{now - self.since:,.0f} s",
            file=sys.stderr,
            flush=True,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
