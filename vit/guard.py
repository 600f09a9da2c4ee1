"""What keeps a run resumable: finite numbers, a checkpoint in time, an orderly stop when a signal asks for one."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from vit.history import History
from vit.optim import local
from vit.saving import SaveError

BAD_LOSS, BAD_GRADIENT, DUE, SIGNAL = 1, 2, 4, 8  # what a process tells the others: a sum; signals count from SIGNAL on
COPIES = 9  # of the weights: weights and two moments, in last.ckpt, in best.ckpt and in the one being written
SAVING = 0.02  # largest share of the time that goes into last.ckpt


class Diverged(RuntimeError):
    """A loss or a gradient that is not finite; the message is one line that says where and what is left."""


class Stopped(SystemExit):
    """A run that a signal ended after its state was saved; exit status 128 + signal, as shells count."""


class Guard(Checkpoint):
    """Saves ``last.ckpt``, stops a run that diverged, and ends one in order on SIGINT, SIGTERM or SLURM's signal.

    Before each optimiser step the processes exchange one number each: whether loss and gradients are finite, whether
    a signal came, whether a save is due. So all of them stop, or save, at the same step. On a GPU the number is read
    one step later, when it has long arrived: the host never waits for the device; it is read at once before anything
    is saved or validated. A run is only saved between steps and never just before a validation, which a resumed run
    would otherwise miss.

    Args:
        minutes: Between two saves of ``last.ckpt``; more where saving would take over 2 % of the time. A run's end
            and a signal save at once.
    """

    def __init__(self, minutes: float = 5.0):
        if not minutes >= 0:
            raise ValueError(f"guard.minutes must be at least 0, got {minutes}")
        self.minutes = minutes
        self.received = 0  # signal that this process got
        self.signal, self.due = 0, False  # what all processes agreed on
        self.done: list[int | None] | None = None  # limits under which the run ended
        self.bad: Tensor | None = None
        self.sent: tuple[int, Tensor, Any] | None = None
        self.stepped = self.late = False
        self.saved, self.cost = time.monotonic(), 0.0  # end of the last save, and how long it took, in seconds
        self.requeue: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    # Start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved, self.late = time.monotonic(), pl_module.device.type == "cuda"
        self._check_start(trainer, pl_module)
        if not getattr(trainer, "fast_dev_run", False):
            self._check_space(Path(trainer.default_root_dir), pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, History):
                logger.go_on_at(trainer.global_step)
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may handle signals
        # After Lightning's own handlers, which save in the middle of a step; its teardown restores what was before.
        handled = [signal.SIGINT, signal.SIGTERM]
        if callable(requeue := signal.getsignal(signal.SIGUSR1)):
            self.requeue = requeue  # Lightning's, where SLURM runs us
            handled.append(signal.SIGUSR1)
        for signum in handled:
            signal.signal(signum, self._receive)
        # At every step Lightning asks all processes if its handler of SIGTERM was called, and waits for the devices.
        connector = trainer._signal_connector
        if connector.received_sigterm:  # by which Lightning would end this process alone
            self.received, connector.received_sigterm = signal.SIGTERM, False
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def _check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to exchange gradients of steps that do not belong together."""
        steps = torch.zeros(trainer.world_size, dtype=torch.long, device=pl_module.device)
        steps[trainer.global_rank] = trainer.global_step
        first, *others = cast(Tensor, trainer.strategy.reduce(steps, reduce_op="sum")).tolist()
        for rank, step in enumerate(others, 1):
            if step != first:
                raise ValueError(
                    f"process {rank} would begin at step {step}, process 0 at step {first}: trainer.default_root_dir "
                    f"{trainer.default_root_dir} has to be one folder that all machines share"
                )

    def _check_space(self, root: Path, pl_module: LightningModule) -> None:
        root.mkdir(parents=True, exist_ok=True)
        needed = COPIES * sum(p.numel() * p.element_size() for p in pl_module.parameters())
        if (free := shutil.disk_usage(root).free) < needed:
            raise SaveError(f"{root}: {free / 1e6:,.0f} MB are free, the checkpoints need {needed / 1e6:,.0f} MB")

    def _receive(self, signum: int, frame: Any) -> None:
        if self.received:
            raise SystemExit(128 + signum)
        self.received = signum
        if rank_zero_only.rank == 0:  # a terminal's Ctrl-C comes to every process
            text = f"\n{signal.Signals(signum).name}: saving after this step; once more to stop without\n"
            os.write(2, text.encode())  # print() may be in use by what was interrupted

    # Every step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        # What metrics.csv calls a step: going on behind a validation, Lightning counts one that nobody did.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        bad = ~loss.detach().isfinite()
        self.bad = bad if self.bad is None else self.bad | bad

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        code = BAD_LOSS * self.bad.long() if self.bad is not None else torch.zeros((), dtype=torch.long)
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # float16 finds its scale by overflowing
            gradients = [local(p.grad) for p in pl_module.parameters() if p.grad is not None]
            code = code + BAD_GRADIENT * ~torch.nn.utils.get_total_norm(gradients).isfinite()
        if self.late:
            self._read(trainer)
        self._send(trainer, code)
        if not self.late:
            self._read(trainer)
        self.bad, self.stepped = None, True

    def _send(self, trainer: Trainer, code: Tensor) -> None:
        due = time.monotonic() - self.saved >= max(60 * self.minutes, self.cost / SAVING)
        codes = code.new_zeros(trainer.world_size)
        codes[trainer.global_rank] = code + DUE * due + SIGNAL * self.received
        if trainer.world_size > 1:  # not by Lightning, which lets the host wait for all devices before
            torch.distributed.all_reduce(codes)  # a sum, in which each number stays alone in its place
        event = torch.cuda.Event() if codes.is_cuda else None
        self.sent = trainer.global_step + 1, codes.to("cpu", non_blocking=True), event
        if event is not None:
            event.record()

    def _read(self, trainer: Trainer) -> None:
        if self.sent is None:
            return
        (step, sent, event), self.sent = self.sent, None
        if event is not None:
            event.synchronize()
        codes = sent.tolist()
        for bit, what in ((BAD_LOSS, "loss"), (BAD_GRADIENT, "gradient")):  # gradients are averaged: not their origin
            if ranks := [rank for rank, code in enumerate(codes) if code & bit]:
                last = Path(trainer.default_root_dir) / "last.ckpt"
                left = f"{last} is from before" if last.exists() else "nothing was saved before"
                raise Diverged(f"the {what} is not finite at step {step} on process {ranks[0]} of {len(codes)}; {left}")
        self.signal, self.due = max(code // SIGNAL for code in codes), bool(codes[0] & DUE)

    # Saving

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        stepped, self.stepped = self.stepped, False
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.is_last_batch:
            return  # the epoch's end is near
        if not stepped:
            if out_of_time(trainer):
                trainer.should_stop = False  # until the next step, or the gradients so far would be lost
            return
        assert trainer.fit_loop._data_fetcher is not None
        # Out of time, Lightning validates at once; the run that goes on does so when it is its turn.
        asked = (self.signal or self.due) and not loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        if asked or out_of_time(trainer):
            trainer._logger_connector.update_train_step_metrics()  # what Lightning logs only after the save
            self._save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read(trainer)
        self._send(trainer, torch.zeros((), dtype=torch.long, device=pl_module.device))
        self._read(trainer)
        stopped = trainer.should_stop and trainer.fit_loop._can_stop_early
        if (
            trainer.current_epoch + 1 == trainer.max_epochs
            or trainer.global_step == trainer.max_steps
            or (stopped and not out_of_time(trainer))
        ):
            self.done = [trainer.max_epochs, trainer.max_steps]
        whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if out_of_time(trainer) and not whole and trainer.global_step != trainer.max_steps:
            self.done = None  # saved after the last step, before the validation of a moment that chance chose
        elif self.done or stopped or self.signal or self.due:
            self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Nothing is kept of a run that has diverged, whichever callback saves.

        A part of an epoch is no whole one: or else a run that goes on would leave out the rest of it.
        """
        self._read(trainer)
        loop = checkpoint["loops"]["fit_loop"]
        batches = loop["epoch_loop.batch_progress"]
        if batches["current"]["ready"] and not batches["is_last_batch"]:
            for counts in loop["epoch_progress"].values():
                done = max(0, counts["started"] - 1)
                counts.update(processed=min(counts["processed"], done), completed=min(counts["completed"], done))

    def _save(self, trainer: Trainer) -> None:
        self._read(trainer)
        path = Path(trainer.default_root_dir) / "last.ckpt"
        if not getattr(trainer, "fast_dev_run", False):
            start = time.monotonic()
            trainer.save_checkpoint(path)
            self.saved, self.due = time.monotonic(), False  # what was just read says that it is due
            self.cost = self.saved - start
        if not self.signal or self.done:
            return
        if self.signal == signal.SIGUSR1:
            self.requeue(self.signal, None)  # a checkpoint of its own, and scontrol requeue
            for extra in path.parent.glob("hpc_ckpt_*.ckpt") if trainer.is_global_zero else ():
                extra.unlink(missing_ok=True)  # or Lightning would begin any later run in this folder with it
        leave_children(trainer)
        if trainer.is_global_zero:
            text = (
                f"stopped by {signal.Signals(self.signal).name} at step {trainer.global_step}; {path} goes on from here"
            )
            os.write(2, f"{text}: the same command with --ckpt_path last\n".encode())
        raise Stopped(128 + self.signal)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Diverged):
            leave_children(trainer)


def out_of_time(trainer: Trainer) -> bool:
    """Whether ``trainer.max_time`` ends the run here, as the first process has it; its Timer comes before us."""
    if not (trainer.should_stop and trainer.fit_loop._can_stop_early):  # which all processes agree on
        return False
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return trainer.strategy.broadcast(any((timer.time_remaining() or 1) <= 0 for timer in timers))


def leave_children(trainer: Trainer) -> None:
    """All processes end by themselves now: nobody needs to kill them, or this one because of them."""
    getattr(trainer.strategy.launcher, "procs", []).clear()
