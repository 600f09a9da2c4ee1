"""The folder of a run: who may write there, and where an earlier run goes."""

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path

RESULTS = ("last.ckpt", "best.ckpt", "model.safetensors")  # of a run, in its folder
MEASUREMENTS = ("test", "validate")  # folders in it for what these commands find
CHECKPOINTS = "checkpoints"  # folder in it where Lightning puts what a ModelCheckpoint of the user's keeps


def refuse_foreign(root: Path) -> None:
    """Refuse a folder with a ``config.yaml`` that no run has left there: ours would take its place."""
    file, signs = root / "config.yaml", (".lock", *RESULTS, "metrics.csv", "hparams.yaml")
    if file.exists() and not any((root / name).exists() for name in signs):
        raise ValueError(f"{file}: of no run, and would be overwritten; take another --trainer.default_root_dir")


def check_writable(folder: Path) -> None:
    """Make a folder for files.

    Raises:
        ValueError: If that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        text = f"{folder}: cannot be written ({error.strerror}); take another --trainer.default_root_dir"
        raise ValueError(text) from None


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the run folder; this process alone does, not its workers, so a run that was killed leaves it free.

    Raises:
        ValueError: If another run trains there.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"trainer.default_root_dir {root}: cannot be made ({error.strerror})") from None
    with open(root / ".lock", "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{root}: another run trains here; take another --trainer.default_root_dir") from None
        except OSError:
            pass  # a file system without locks
        yield


def put_aside(root: Path) -> Path | None:
    """Move the run that is in this folder to ``previous``, so that nothing of it can be taken for the new one's.

    If there is such a folder already, to ``previous-2`` and so on: no run is lost.

    Returns:
        Where it is now; none if there was none.
    """
    if not any((root / name).exists() for name in RESULTS):
        return None
    places = (root / name for name in chain(["previous"], (f"previous-{number}" for number in count(2))))
    aside = next(place for place in places if not place.exists())
    aside.mkdir()
    move_run(root, aside)
    begun = "--ckpt_path last would have gone on with it"
    if not (aside / "last.ckpt").exists():
        best = next(aside / name for name in RESULTS if (aside / name).exists())
        begun = f"it has no last.ckpt, but its best is a start: --model.pretrained {best}"
    print(f"{root}: the run that was here is in {aside}; {begun}", file=sys.stderr)
    return aside


def of_another(checkpoint: Path, root: Path) -> bool:
    """Whether a checkpoint is of a run with a folder of its own, such as ``previous``; both are absolute paths.

    A folder within the run's, in which a ModelCheckpoint keeps some, is none.
    """
    folder = checkpoint.parent
    return folder != root and (not folder.is_relative_to(root) or (folder / "config.yaml").exists())


def put_back(root: Path, aside: Path) -> None:
    """Undo ``put_aside``, for a run that has not begun."""
    for path in parts_of_run(root):
        path.unlink()
    move_run(aside, root)
    (aside / "config.yaml").unlink(missing_ok=True)
    aside.rmdir()
    print(f"{root}: the run that was here is back", file=sys.stderr)


def move_run(root: Path, place: Path) -> None:
    """Move what a run leaves in its folder, and nothing else that may be there.

    ``config.yaml`` stays there too, until that of the new run takes its place: it may be what the new one is started
    with, whose other processes read it later.
    """
    for path in parts_of_run(root):
        to = place / path.relative_to(root)
        to.parent.mkdir(exist_ok=True)
        (shutil.copyfile if path == root / "config.yaml" else os.rename)(path, to)
    for name in (*MEASUREMENTS, CHECKPOINTS):
        with suppress(OSError):  # not there, or not empty
            (root / name).rmdir()


def parts_of_run(root: Path) -> list[Path]:
    """The files that a run leaves in its folder."""
    found = [root / name for name in RESULTS]
    for folder in (root, *(root / name for name in MEASUREMENTS)):
        found += [folder / name for name in ("config.yaml", "metrics.csv", "hparams.yaml", "confusion.csv")]
        found += [*folder.glob("events.out.tfevents.*"), *folder.glob("hpc_ckpt_*.ckpt")]
    found += (root / CHECKPOINTS).glob("*.ckpt")
    return [path for path in found if path.is_file()]
