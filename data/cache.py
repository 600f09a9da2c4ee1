"""Image files of one split: decoded batch by batch, or once into a memory-mapped file of uint8 pixels.

A cache file is a plain ``.npy`` and may be deleted at any time; its name changes with the files it was made from.
Either way every file is read once before the training starts: a bad one is known then, and not hours later.
"""

import hashlib
import io
import json
import math
import os
import re
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_only
from PIL import ExifTags, Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vit.preprocess import ImageError, Preprocess, of_any_size, open_image
from vit.quiet import quiet_libraries
from vit.records import printable

VERSION = 4  # part of every cache file's name: raise it when decoding or the layout changes
SAMPLED = 16  # files of a split whose beginnings are part of a cache file's name
LIMIT = 2 * 2**30  # bytes of pixels of one split; larger ones are decoded batch by batch
CHUNK = 2**19  # bytes of pixels that a worker sends back at a time: containers are short of shared memory
SAMPLE = 2000  # images that stand for a split too large for the cache, or for a stream
ADVICE = "; repair or remove it"
OnBad = Literal["fail", "skip"]


class DataError(ValueError):
    """A data set that cannot be used; the message is one line."""

    def __init__(self, message: str):
        if "Original Traceback" in message:  # torch re-raises a worker's error with its traceback as the message
            message = re.split(r"\n[\w.]+: ", message.strip())[-1]  # behind the name of the error's class
        super().__init__(printable(message))  # a path may hold any byte


def file_name(text: str) -> str:
    """What a file can be called after this text, on any file system."""
    return re.sub(r"[^\w.-]+", "_", text)[:40]


def one_line(error: Exception) -> str:
    """What another library says, in short."""
    return " ".join(str(error).split())[:300]


class BadFiles(DataError):
    """Images that cannot be read: of their number in the split, a line each that names the file and what is wrong."""

    def __init__(self, reasons: Mapping[int, str]):
        super().__init__(next(iter(reasons.values())))
        self.reasons = reasons


class OtherSize(DataError):
    """An image that is not as large as the others, of a set whose images are not cut."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFiles:
    """Image files that look like a tensor (N, C, H, W): ``files[indices]`` decodes uint8 (B, C, H, W).

    Args:
        folder: Folder that the names start from.
        names: Relative paths as bytes (N,): one block of memory, which worker processes share without copying.
        preprocess: Size and mode (by its number of means) to decode to.
        size_from: The image that gave the size, which all others must have then; None to cut them to size.
    """

    folder: str
    names: np.ndarray
    preprocess: Preprocess
    size_from: str | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) once decoded."""
        return len(self), len(self.preprocess.mean), *self.preprocess.image_size

    def path(self, index: int) -> str:
        """Path of one image."""
        return os.path.join(self.folder, os.fsdecode(self.names[index]))

    def open(self, index: int, *, min_side: int | None = None) -> Image.Image:
        """Decode one image at its own size, or a large JPEG with at least so many pixels along its shorter side.

        Raises:
            DataError: If the file cannot be read.
        """
        try:
            return open_image(self.path(index), self.preprocess.mode, min_side=min_side, white=self.preprocess.white)
        except ImageError as error:
            raise DataError(f"{self.path(index)}: {error}{ADVICE}") from None

    def file(self, index: int) -> str | io.BytesIO | Image.Image:
        """One image as it is stored."""
        return self.path(index)

    def stored(self, index: int) -> tuple[tuple[int, int], int | None] | None:
        """Width and height of one image, and the largest value of one that holds 16 or 32 bits; None if unreadable."""
        try:
            file = self.file(index)
            with file if isinstance(file, Image.Image) else of_any_size(file) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter ...
                turned &= image.format != "TIFF"  # ... of which Pillow has seen to the size
                width, height = image.size[::-1] if turned else image.size
                return (width, height), int(np.asarray(image).max()) if image.mode.startswith("I") else None
        except Exception:  # which the check of all files has said
            return None

    def pixels(self, index: int) -> Tensor:
        """uint8 pixels (C, H, W) of one image: those that predict.py sees.

        Raises:
            DataError: If the file cannot be read.
            OtherSize: If it has another size than the others and may not be cut.
        """
        if self.size_from is None:
            return self.preprocess(self.open(index, min_side=self.preprocess.min_side))
        image, (height, width) = self.open(index), self.preprocess.image_size
        if image.size != (width, height):
            raise OtherSize(
                f"{self.path(index)} is {image.width}x{image.height} pixels but {self.size_from} is {width}x{height}: "
                "give an image_size to cut all images to"
            )
        return self.preprocess(image)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Decode a batch of images (B,) to uint8 (B, C, H, W)."""
        return torch.stack([self.pixels(index) for index in indices.tolist()])

    def sample(self, count: int) -> "ImageFiles":
        """At most ``count`` of the files, evenly spaced, always the same."""
        indices = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        return replace(self, names=self.names[indices])

    @cached_property
    def key(self) -> str:
        """Fingerprint of what decoding gives: paths, sizes, times of change, some contents, and how it decodes."""
        white = () if self.preprocess.white is None else (self.preprocess.white,)
        settings = (VERSION, self.preprocess.image_size, self.preprocess.mode, self.size_from is None, *white)
        digest = hashlib.sha256(repr(settings).encode())
        for index, name in enumerate(self.names):
            try:
                stat = os.stat(self.path(index))
                size, changed = stat.st_size, stat.st_mtime_ns
            except OSError:  # a link to nowhere: opening it will say so
                size, changed = -1, 0
            digest.update(b"%s\0%d\0%d\0" % (name, size, changed))
        sample = self.sample(SAMPLED)  # two sets out of archives may agree in all of that
        for path in filter(os.path.isfile, map(sample.path, range(len(sample)))):  # a pipe could wait for ever
            with suppress(OSError), open(path, "rb") as file:
                digest.update(file.read(2**16))
        return digest.hexdigest()[:16]


def cached_images(files: ImageFiles, *, name: str, folder: Path, num_workers: int) -> Tensor | ImageFiles:
    """Pixels of a split, memory-mapped from a cache that is built if need be; of one beyond ``LIMIT`` its files.

    The files of either are read once, all of them, and what was found is kept.

    Args:
        files: The split's files.
        name: Start of the cache file's name.
        folder: Folder of the cache; made if missing.
        num_workers: Processes that decode; 0 decodes in this one.

    Raises:
        BadFiles: If images cannot be decoded.
        DataError: If sizes differ that may not, or the cache cannot be written.
    """
    small = math.prod(files.shape) <= LIMIT
    path, found = folder / f"{name}-{files.key}.npy", known_as(files, name, folder)
    if small and (pixels := open_array(path, files.shape)) is not None:
        return torch.from_numpy(pixels)
    known = known_bad(files, found)
    if known:
        raise BadFiles(known)
    try:
        if small:
            write_array(path, files.shape, decode(files, num_workers, f"decoding {name}"))
        elif known is None:
            for _ in decode(files, num_workers, f"checking {name}", keep=False):
                pass
            write_atomically(found, [b"{}"])
    except BadFiles as error:
        write_atomically(found, [json.dumps(error.reasons).encode()])
        raise
    if not small:
        return files
    pixels = open_array(path, files.shape)
    if pixels is None:
        raise DataError(f"{path}: the cache reads back wrong; is the disk full or another program changing it?")
    return torch.from_numpy(pixels)


def known_as(files: ImageFiles, name: str, folder: Path) -> Path:
    """Where it is kept which of these files are bad: a JSON object from number to reason."""
    return folder / f"{name}-{files.key}.unreadable.json"


def known_bad(files: ImageFiles, path: Path) -> dict[int, str] | None:
    """What an earlier check of these files found, if it is still so; None if it is not known."""
    try:
        numbers = [int(number) for number in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):  # never checked, or a damaged file
        return None
    reasons: dict[int, str] = {}
    for number in numbers:
        try:
            files.open(number)
        except DataError as error:
            reasons[number] = str(error)
        else:
            return None  # readable now: the network or a permission was the cause
    return reasons


def readable(
    files: Mapping[str, ImageFiles],
    labels: Mapping[str, Tensor],
    *,
    name: str,
    folder: Path,
    num_workers: int,
    on_bad: OnBad = "fail",
) -> tuple[dict[str, ImageFiles], dict[str, Tensor]]:
    """The files and labels of each split without the files that cannot be read, once all of them have been tried.

    Bad files are listed in ``NAME-unreadable.txt`` in the cache. Of the processes of a machine one does the work.

    Args:
        files: Files of each split.
        labels: Class numbers of each split (N,).
        name: Start of the cache files' names.
        folder: Folder of the cache.
        num_workers: Processes that decode; 0 decodes in this one.
        on_bad: ``fail`` if any file is bad, or ``skip`` such files.

    Raises:
        DataError: If there are bad files and none may be left out, or if nothing is left of a class.
    """
    bad: dict[str, Mapping[int, str]] = {}
    with alone(folder / f"{name}.lock"):
        for split, part in files.items():
            try:
                cached_images(part, name=f"{name}-{split}", folder=folder, num_workers=num_workers)
            except BadFiles as error:
                bad[split] = error.reasons
    if not bad:
        return dict(files), dict(labels)
    lines = [line for reasons in bad.values() for line in reasons.values()]
    report = folder / f"{name}-unreadable.txt"
    write_atomically(report, [f"{line.removesuffix(ADVICE)}\n".encode() for line in lines])
    total = sum(map(len, files.values()))
    if on_bad == "fail":
        more = f" (and {len(lines) - 1} more of {total} files)" if len(lines) > 1 else ""
        raise DataError(f"{lines[0]}{more}; all are listed in {report}; --data.on_bad skip leaves them out")
    say_once(f"{name}: {len(lines)} of {total} files cannot be read and are left out; they are listed in {report}")
    kept = {split: np.setdiff1d(np.arange(len(part)), list(bad.get(split, ()))) for split, part in files.items()}
    for split, where in kept.items():
        before, after = labels[split].unique(), labels[split][where].unique()
        if len(after) < (len(before) if split == "train" else 1):
            raise DataError(
                f"{lines[0]}: with all such files left out, a class of {name} has no {split} images; {report}"
            )
    good = {split: replace(part, names=part.names[kept[split]]) for split, part in files.items()}
    for split in bad:  # so that nobody tries them again
        write_atomically(known_as(good[split], f"{name}-{split}", folder), [b"{}"])
    return good, {split: labels[split][kept[split]] for split in files}


@cache
def say_once(text: str) -> None:
    """A line for the user, from the first process, however often the data set is opened."""
    if rank_zero_only.rank == 0:
        print(printable(text), file=sys.stderr)


def alone(path: Path) -> AbstractContextManager:
    """Lets one process of this machine in at a time; one that is killed lets the next one in."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path).acquire()
    except (OSError, NotImplementedError):  # a file system without locks: the work may be done twice
        return nullcontext()


def cached_statistics(
    files: ImageFiles, images: Tensor | ImageFiles, *, name: str, folder: Path, num_workers: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """``channel_statistics`` of a split, kept in a JSON file; of one beyond ``LIMIT`` those of ``SAMPLE`` images.

    Args:
        files: The split's files.
        images: What ``cached_images`` gave for them.
        name: Start of the cache file's name.
        folder: Folder of the cache.
        num_workers: Processes that decode; 0 decodes in this one.
    """
    known = files if isinstance(images, Tensor) else files.sample(SAMPLE)
    path = folder / f"{name}-{known.key}.json"
    try:
        stored = json.loads(path.read_text())
        return tuple(map(float, stored["mean"])), tuple(map(float, stored["std"]))
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        chunks = images.split(1024) if isinstance(images, Tensor) else decode(known, num_workers, f"sampling {name}")
        mean, std = channel_statistics(chunks)
        write_atomically(path, [json.dumps({"mean": mean, "std": std}).encode()])
        return mean, std


def channel_statistics(chunks: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation of each channel, of values in [0, 1].

    Args:
        chunks: uint8 images (B, C, H, W), several times.
    """
    each = [torch.stack([values.flatten().bincount(minlength=256) for values in chunk.unbind(1)]) for chunk in chunks]
    counts = torch.stack(each).sum(0)  # (C, 256)
    share = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt().clamp(min=1 / 255)  # images of one colour: no zero
    return tuple(round(x, 6) for x in mean.tolist()), tuple(round(x, 6) for x in std.tolist())


def decode(files: ImageFiles, num_workers: int, title: str, *, keep: bool = True) -> Iterator[Tensor]:
    """Decode all files in order in worker processes, with a progress bar on a terminal.

    Args:
        files: The files.
        num_workers: Processes; 0 decodes in this one.
        title: Of the progress bar.
        keep: Give the pixels; otherwise the files are only tried and what is given is empty.

    Raises:
        BadFiles: After the last file, if any cannot be read.
        DataError: If sizes differ that may not.
    """
    step = max(1, CHUNK // math.prod(files.shape[1:]))
    chunks = [range(start, min(start + step, len(files))) for start in range(0, len(files), step)]
    workers = num_workers if len(chunks) > num_workers else 0
    loader = DataLoader(
        _Chunks(files, chunks, keep),
        batch_size=None,
        worker_init_fn=_silence,
        num_workers=workers,
        multiprocessing_context=start_method(workers),
        generator=torch.Generator(),  # the default one would advance the run's random numbers, but only without a cache
    )
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    unreadable: dict[int, str] = {}
    wrong_size = None
    with quiet_libraries(), Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=len(files))
        for chunk, (pixels, failures, wrong_size) in zip(chunks, loader, strict=False):
            unreadable |= failures
            if wrong_size:  # rarely the only one: no need to look at the others
                break
            progress.advance(task, len(chunk))
            yield pixels
    if wrong_size:
        raise DataError(wrong_size)
    if unreadable:
        raise BadFiles(unreadable)


def start_method(workers: int) -> str | None:
    """How a loader starts so many workers: on Linux forked, for Python 3.14 would import all of torch in each anew."""
    return "fork" if workers and sys.platform == "linux" else None


class _Chunks(Dataset):
    """Map-style data set: chunk number -> pixels, errors of unreadable files, error of a wrong size.

    Errors are returned, not raised: a loader whose worker raises takes seconds to shut down.
    """

    def __init__(self, files: ImageFiles, chunks: list[range], keep: bool):
        self.files, self.chunks, self.keep = files, chunks, keep

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[int, str], str | None]:
        images = [torch.empty((0, *self.files.shape[1:]), dtype=torch.uint8)]
        unreadable: dict[int, str] = {}
        for i in self.chunks[index]:
            try:
                pixels = self.files.pixels(i)
            except OtherSize as error:
                return images[0], unreadable, str(error)
            except DataError as error:
                unreadable[i] = str(error)
            else:
                images += [pixels[None]] if self.keep else []
        return torch.cat(images), unreadable, None


def _silence(worker: int) -> None:
    """libtiff prints a line for each odd tag, past Python and into the progress bar; errors come back as values."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def array_header(shape: tuple[int, ...]) -> bytes:
    """First bytes of a ``.npy`` file of uint8 values."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def open_array(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Memory-map a ``.npy`` file of uint8 values (copy on write); None if missing, cut short or another."""
    header = array_header(shape)
    try:
        with open(path, "rb") as file:
            found, size = file.read(len(header)), os.fstat(file.fileno()).st_size
            if found != header or size != len(header) + math.prod(shape):
                return None
            return np.memmap(file, dtype=np.uint8, mode="c", offset=len(header), shape=shape)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot read the cache ({error.strerror}); remove it") from None


def write_array(path: Path, shape: tuple[int, ...], chunks: Iterable[Tensor]) -> None:
    """Write a ``.npy`` file of uint8 values that appears whole or not at all."""

    def content() -> Iterator[bytes | memoryview]:
        yield array_header(shape)
        for chunk in chunks:
            yield chunk.numpy().data

    write_atomically(path, content())


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file beside its final place, then move it there; several processes may do so at once."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except FileNotFoundError:
            if not path.exists():  # else another process was first and cleaned up
                raise
        finally:
            temporary.unlink(missing_ok=True)
        for left_over in path.parent.glob(f"{path.name}.*.tmp"):  # of killed processes, or of slower ones
            left_over.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: cannot write the cache ({reason}); free space or take another --data.root") from None
