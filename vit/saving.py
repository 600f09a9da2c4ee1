"""Checkpoint files of a run: whole or absent, proven readable before they replace an older one, and only data."""

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class SaveError(OSError):
    """A checkpoint that could not be written; the message is one line that names it."""


class CheckpointFile(TorchCheckpointIO):
    """Writes ``.ckpt`` files that survive a kill, a full disk and a power cut at any moment, or says so.

    The bytes go to a hidden file in the same folder, so that replacing is one step on every file system; they are
    forced to the disk and read back, each against its checksum, before they take the name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write one file; the one it replaces is untouched unless all went well.

        Raises:
            SaveError: If the folder, the disk or a quota refuses any part of it.
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")  # one name, so that killed runs do not fill the disk
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            with zipfile.ZipFile(partial) as archive:
                if damaged := archive.testzip():
                    raise OSError(f"{damaged} does not read back as written")
            os.replace(partial, path)
            sync_folder(path.parent)
        except Exception as error:  # torch's writer turns a refused write into RuntimeError
            with contextlib.suppress(OSError):
                partial.unlink()
            kept = "; the previous one is kept" if path.exists() else ""
            raise SaveError(f"{path}: the checkpoint could not be saved ({reason(error)}){kept}") from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Tensors, numbers and texts of a file; whatever else it holds is refused, not run."""
        return super().load_checkpoint(path, map_location, weights_only=True)


class Best(ModelCheckpoint):
    """Keeps the run's best weights, as ``best.ckpt``.

    A class of its own, so that its state is not taken for that of a user's ModelCheckpoint of the same number.
    """

    @property
    def state_key(self) -> str:
        """By what it is the best of alone; Lightning's forgets the best where ``every_n_epochs`` is another."""
        alike = {"every_n_train_steps": 0, "every_n_epochs": 1, "train_time_interval": None}
        return self._generate_state_key(monitor=self.monitor, mode=self.mode, **alike)

    @property
    def _legacy_state_key(self) -> str:  # type: ignore[override]
        return self.state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)  # in older files


def keeper_of(trainer: Trainer) -> Best | None:
    """The callback that keeps the run's best weights."""
    return next((callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Best)), None)


def reason(error: BaseException) -> str:
    """What the system said, though it may be buried under what the library made of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())[:200]


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
