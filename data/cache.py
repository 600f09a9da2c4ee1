"""Image files of one split: decoded batch by batch, or once into a memory-mapped file of uint8 pixels.

A cache file is a plain ``.npy`` and may be deleted at any time; its name changes with the files it was made from.
"""

import hashlib
import io
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vit.preprocess import ImageError, Preprocess, open_image

VERSION = 1  # part of every cache file's name: raise it when decoding or the layout changes
LIMIT = 2 * 2**30  # bytes of pixels of one split; larger ones are decoded batch by batch
CHUNK = 2**19  # bytes of pixels that a worker sends back at a time: containers are short of shared memory
SAMPLE = 2000  # images that stand for a split too large for the cache


class DataError(ValueError):
    """A data set that cannot be used; the message is one line."""

    def __init__(self, message: str):
        if "Original Traceback" in message:  # torch re-raises a worker's error with its traceback as the message
            message = message.strip().rpartition("DataError: ")[2]
        message = message.encode(errors="backslashreplace").decode()  # a path may hold any byte ...
        super().__init__(message.replace("\n", "\\n").replace("\r", "\\r"))  # ... and line ends


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

    def open(self, index: int) -> Image.Image:
        """Decode one image at its own size.

        Raises:
            DataError: If the file cannot be read.
        """
        try:
            return open_image(self.path(index), self.preprocess.mode)
        except ImageError as error:
            raise DataError(f"{self.path(index)}: {error}; repair or remove it") from None

    def cut(self, index: int, image: Image.Image) -> Tensor:
        """uint8 pixels (C, H, W) of an opened image.

        Raises:
            DataError: If it has another size than the others and may not be cut.
        """
        height, width = self.preprocess.image_size
        if self.size_from and image.size != (width, height):
            raise DataError(
                f"{self.path(index)} is {image.width}x{image.height} pixels but {self.size_from} is {width}x{height}: "
                "give an image_size to cut all images to"
            )
        return self.preprocess(image)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Decode a batch of images (B,) to uint8 (B, C, H, W)."""
        return torch.stack([self.cut(index, self.open(index)) for index in indices.tolist()])

    def sample(self, count: int) -> "ImageFiles":
        """At most ``count`` of the files, evenly spaced, always the same."""
        indices = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        return replace(self, names=self.names[indices])

    @cached_property
    def key(self) -> str:
        """Fingerprint of what decoding gives: paths, sizes and times of change, and how they are decoded."""
        settings = (VERSION, self.preprocess.image_size, self.preprocess.mode, self.size_from is None)
        digest = hashlib.sha256(repr(settings).encode())
        for index, name in enumerate(self.names):
            try:
                stat = os.stat(self.path(index))
            except OSError as error:
                raise DataError(f"{self.path(index)}: {error.strerror}") from None
            digest.update(b"%s\0%d\0%d\0" % (name, stat.st_size, stat.st_mtime_ns))
        return digest.hexdigest()[:16]


def cached_images(files: ImageFiles, *, name: str, folder: Path, num_workers: int) -> Tensor | ImageFiles:
    """Pixels of a split, memory-mapped from a cache that is built if need be; of one beyond ``LIMIT`` its files.

    Args:
        files: The split's files.
        name: Start of the cache file's name.
        folder: Folder of the cache; made if missing.
        num_workers: Processes that decode; 0 decodes in this one.

    Raises:
        DataError: If an image cannot be decoded or the cache cannot be written.
    """
    if math.prod(files.shape) > LIMIT:
        return files
    path = folder / f"{name}-{files.key}.npy"
    pixels = open_array(path, files.shape)
    if pixels is None:
        write_array(path, files.shape, decode(files, num_workers, f"decoding {name}"))
        pixels = open_array(path, files.shape)
        if pixels is None:
            raise DataError(f"{path}: the cache reads back wrong; is the disk full or another program changing it?")
    return torch.from_numpy(pixels)


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


def decode(files: ImageFiles, num_workers: int, title: str) -> Iterator[Tensor]:
    """Decode all files in order in worker processes, with a progress bar on a terminal.

    Raises:
        DataError: After the last file, if any cannot be read: it names the first and counts the rest.
    """
    step = max(1, CHUNK // math.prod(files.shape[1:]))
    chunks = [range(start, min(start + step, len(files))) for start in range(0, len(files), step)]
    loader = DataLoader(
        _Chunks(files, chunks),
        batch_size=None,
        collate_fn=_unchanged,
        worker_init_fn=_silence,
        num_workers=num_workers if len(chunks) > num_workers else 0,
        generator=torch.Generator(),  # the default one would advance the run's random numbers, but only without a cache
    )
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    unreadable: list[str] = []
    wrong_size = None
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=len(files))
        for pixels, failures, wrong_size in loader:
            unreadable += failures
            if wrong_size:  # rarely the only one: no need to look at the others
                break
            progress.advance(task, len(pixels) + len(failures))
            yield pixels
    if wrong_size:
        raise DataError(wrong_size)
    if unreadable:
        more = f" (and {len(unreadable) - 1} more of {len(files)} files)" if len(unreadable) > 1 else ""
        raise DataError(unreadable[0] + more)


class _Chunks(Dataset):
    """Map-style data set: chunk number -> pixels, errors of unreadable files, error of a wrong size.

    Errors are returned, not raised: a loader whose worker raises takes seconds to shut down.
    """

    def __init__(self, files: ImageFiles, chunks: list[range]):
        self.files, self.chunks = files, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[Tensor, list[str], str | None]:
        images = [torch.empty((0, *self.files.shape[1:]), dtype=torch.uint8)]
        unreadable = []
        for i in self.chunks[index]:
            try:
                image = self.files.open(i)
            except DataError as error:
                unreadable.append(str(error))
                continue
            try:
                images.append(self.files.cut(i, image).unsqueeze(0))
            except DataError as error:
                return images[0], unreadable, str(error)
        return torch.cat(images), unreadable, None


def _unchanged(item):
    return item


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
        raise DataError(f"{path}: cannot write the cache ({reason}); free space or choose another root") from None
