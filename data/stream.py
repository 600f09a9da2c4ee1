"""Image sets too large to list: shards of samples that are read in order, each sample once an epoch.

timm's own iterators give each worker whole shards and then cut or repeat them to one number of samples, so samples are
dropped and repeated wherever shards, workers and ranks do not divide evenly. Here the shards of an epoch, in an order
drawn from (seed, epoch), are one row of samples. Each worker of each rank takes an equal stretch of the row, wherever
in a shard that begins, and shuffles it in a buffer. Only the number of samples in each shard must be known; it is
counted once.
"""

import errno
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import accumulate, groupby, islice, pairwise
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Any, NamedTuple, Protocol

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from data.cache import ADVICE, SAMPLE, DataError, OnBad, channel_statistics, file_name, one_line, write_atomically
from data.labels import SPLITS, split_of
from vit.preprocess import SUFFIXES, ImageError, Preprocess
from vit.records import printable

GZIP = b"\x1f\x8b"  # what a compressed file begins with
MOST_CLASSES = 100_000  # that numbers alone may make; more only where there are as many samples
BUFFER = 1024  # undecoded samples among which a worker shuffles: their bytes, times workers, are in memory


class Sample(NamedTuple):
    index: int  # within the set, the same in every epoch
    name: str  # for messages
    image: bytes  # as stored: an encoded file
    label: int


class Shards(Protocol):
    """What a kind of storage must offer."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Samples in each shard."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of what ``read`` gives: another one when the files change."""
        ...

    def called(self, shard: int) -> str:
        """A shard, for messages."""
        ...

    def read(self, shard: int, start: int, stop: int) -> Iterator[tuple[str, bytes, int]]:
        """Name, encoded image and class number of samples ``start`` to ``stop`` of a shard, in order."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """A split that is read in order.

    Args:
        shards: Where the samples are.
        chosen: Numbers of the shards that belong to the split.
        classes: Number of classes.
        preprocess: Size and mode (by its number of means) to decode to.
        on_bad: What to do about images that cannot be read, found only at their turn: ``fail`` or ``skip``.
    """

    shards: Shards
    chosen: tuple[int, ...]
    classes: int
    preprocess: Preprocess
    on_bad: OnBad = "fail"

    def __len__(self) -> int:
        return sum(self.shards.lengths[shard] for shard in self.chosen)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) once decoded."""
        return len(self), len(self.preprocess.mean), *self.preprocess.image_size

    def hold_out(self, fraction: float) -> tuple["Stream", "Stream"]:
        """Divide into two by whole shards; always the same.

        Args:
            fraction: Share of the shards in the second part, above 0; at least one.

        Raises:
            DataError: If there is one shard.
        """
        count = max(1, round(fraction * len(self.chosen)))
        if count >= len(self.chosen):
            raise DataError(
                f"{len(self.chosen)} shards of training samples are too few to hold out {fraction:g} of them for "
                "validation: write more shards, or a val split"
            )
        second = set(random.Random(0).sample(self.chosen, count))
        first = tuple(shard for shard in self.chosen if shard not in second)
        return replace(self, chosen=first), replace(self, chosen=tuple(sorted(second)))

    def read(self, order: Sequence[int], start: int, stop: int) -> Iterator[Sample]:
        """Samples ``start`` to ``stop`` of the row that the shards make when put in this order."""
        lengths = self.shards.lengths
        firsts = [0, *accumulate(lengths)]
        ends = accumulate(lengths[shard] for shard in order)
        for shard, end in zip(order, ends, strict=True):
            begin = end - lengths[shard]
            first, last = max(start - begin, 0), min(stop - begin, lengths[shard])
            index = first
            for index, found in enumerate(self.shards.read(shard, first, last) if first < last else (), first + 1):
                yield Sample(firsts[shard] + index - 1, *found)
            if index < last:
                where = self.shards.called(shard)
                raise DataError(f"{where} ends after {index} samples, not {lengths[shard]}: has it changed?")

    def decode(self, samples: Iterable[Sample]) -> tuple[list[Sample], Tensor]:
        """Those samples that can be read, and their pixels, uint8 (B, C, H, W).

        Raises:
            DataError: If one is damaged, or its class unknown; with ``skip`` only if none is left.
        """
        kept, pixels, reason = [], [torch.empty((0, *self.shape[1:]), dtype=torch.uint8)], ""
        for sample in samples:
            if not 0 <= sample.label < self.classes:
                raise DataError(f"{sample.name}: class number {sample.label}, but there are {self.classes} classes")
            try:
                pixels.append(self.preprocess.load(BytesIO(sample.image))[None])
                kept.append(sample)
            except ImageError as error:
                reason = f"{sample.name}: {error}"
                if self.on_bad == "fail":
                    raise DataError(f"{reason}{ADVICE}") from None
                print(f"{printable(reason)}; skipped", file=sys.stderr)
        if reason and not kept:
            raise DataError(f"{reason}; nor can the others of its batch be read")
        return kept, torch.cat(pixels)


class StreamDraw(NamedTuple):
    """One batch: samples ``start`` to ``stop`` of the row, from the stretch that one worker reads."""

    epoch: int
    stretch: tuple[int, int]
    start: int
    stop: int


class Batch(NamedTuple):
    images: Tensor  # (B, C, H, W) uint8; normalised floats after the transfer to the device
    labels: Tensor  # (B,) int64; with mixup or cutmix (B, classes) shares after the transfer
    indices: Tensor  # (B,) int64, views: image + turn * images in the split
    epoch: int


class StreamOrder(Sampler[StreamDraw]):
    """Batches of one rank, as many on every rank, in all each sample once; sizes differ by one at most.

    Batch k goes to worker ``k % workers``, as torch's DataLoader hands them out, and the batches of one worker are
    neighbours in the row: it reads on where it was.

    Args:
        size: Samples in the split.
        batch_size: Largest number of samples in a batch.
        rank: This process.
        world_size: Number of processes.
        workers: Processes of this rank that read; 0 reads in this one.
        position: Called at the start of an epoch, gives (epoch, batches to skip).
    """

    def __init__(
        self,
        *,
        size: int,
        batch_size: int,
        rank: int,
        world_size: int,
        workers: int,
        position: Callable[[], tuple[int, int]],
    ):
        share = size * rank // world_size, size * (rank + 1) // world_size
        count = min(-(-size // (world_size * batch_size)), max(size // world_size, 1))  # none is empty
        edges = even(*share, count)
        self.batches: list[tuple[tuple[int, int], int, int]] = [((0, 0), 0, 0)] * count
        done = 0
        for worker in range(workers or 1):
            turns = range(worker, count, workers or 1)
            stretch = edges[done], edges[done + len(turns)]
            for turn in turns:
                self.batches[turn] = stretch, edges[done], edges[done + 1]
                done += 1
        self.position = position

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[StreamDraw]:
        epoch, skip = self.position()
        return (StreamDraw(epoch, *batch) for batch in self.batches[skip:])


def even(start: int, stop: int, parts: int) -> list[int]:
    """The ``parts + 1`` edges that divide a range into parts whose lengths differ by one at most."""
    return [start + (stop - start) * part // parts for part in range(parts + 1)]


class StreamDataset(Dataset):
    """Decoded batches of a stream, by ``StreamDraw``; quick if they are asked for in the order of a ``StreamOrder``.

    Args:
        stream: The split.
        seed: Of the order; None keeps the order of the shards.
        buffer: Undecoded samples among which to shuffle.
    """

    def __init__(self, stream: Stream, seed: int | None = None, buffer: int = BUFFER):
        self.stream, self.seed, self.buffer = stream, seed, buffer
        self._next: StreamDraw | None = None  # up to where ``_samples`` has been read
        self._samples: Iterator[Sample] = iter(())

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, draw: StreamDraw) -> Batch:
        if self._next is None or (draw.epoch, draw.stretch, draw.start) != self._next[:3]:  # a new epoch, or a restart
            self._samples = islice(self.samples(draw.epoch, *draw.stretch), draw.start - draw.stretch[0], None)
        samples = list(islice(self._samples, draw.stop - draw.start))
        self._next = StreamDraw(draw.epoch, draw.stretch, draw.stop, draw.stop)
        samples, images = self.stream.decode(samples)
        numbers = [[sample.label, sample.index] for sample in samples]
        labels, indices = torch.tensor(numbers, dtype=torch.int64).view(-1, 2).unbind(1)
        return Batch(images, labels, indices, draw.epoch)

    def samples(self, epoch: int, start: int, stop: int) -> Iterator[Sample]:
        """A stretch of an epoch's row, shuffled."""
        order = list(self.stream.chosen)
        if self.seed is None:
            return self.stream.read(order, start, stop)
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        return shuffled(
            self.stream.read(order, start, stop), self.buffer, random.Random(f"{self.seed} {epoch} {start}")
        )


def shuffled(samples: Iterator[Sample], size: int, draws: random.Random) -> Iterator[Sample]:
    """All samples, each drawn from the ``size`` that come next and those passed over before."""
    waiting = list(islice(samples, size))
    for sample in samples:
        place = draws.randrange(size)
        waiting[place], sample = sample, waiting[place]
        yield sample
    draws.shuffle(waiting)
    yield from waiting


# ---- tar files, as webdataset writes them ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TarShards:
    """Tar files in which files of one name and different endings are a sample: ``a/b.jpg`` and ``a/b.cls``.

    Read with Python's tarfile, which seeks past what is not wanted: counting and skipping read headers and labels.

    Args:
        files: Paths of the tar files.
        lengths: Samples in each.
    """

    files: tuple[str, ...]
    lengths: tuple[int, ...] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        return repr(states(self.files))

    def called(self, shard: int) -> str:
        return self.files[shard]

    def read(self, shard: int, start: int, stop: int) -> Iterator[tuple[str, bytes, int]]:
        path = self.files[shard]
        with open_tar(path) as tar:
            for name, image, label in islice(tar_samples(path, tar), start, stop):
                yield name, content(tar, image), class_number(tar, name, label)


@contextmanager
def open_tar(path: str) -> Iterator[tarfile.TarFile]:
    """A tar file; a compressed one unpacked into a temporary file, as going back in it would begin from its start."""
    with ExitStack() as files:
        try:
            plain = file = files.enter_context(open(path, "rb"))
            if file.read(2) == GZIP:
                plain = files.enter_context(TemporaryFile())
                shutil.copyfileobj(files.enter_context(gzip.open(path)), plain)
            plain.seek(0)
            tar = files.enter_context(tarfile.open(fileobj=plain))
        except Exception as error:  # a damaged one raises whatever its readers stumble on
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                where = f"{path}: no room in {gettempdir()} to unpack it"
                raise DataError(f"{where} ({one_line(error)}); free some, or set TMPDIR to another folder") from None
            raise DataError(f"{path}: cannot be read as a tar file ({one_line(error)})") from None
        yield tar


def tar_samples(path: str, tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarInfo | None]]:
    """Name, image and label of each sample with an image; nothing but headers is read."""

    def wanted(file: tarfile.TarInfo) -> bool:
        return file.isreg() and not os.path.basename(file.name).startswith(".")  # macOS leaves ._NAME beside each file

    def parts(file: tarfile.TarInfo) -> tuple[str, str]:
        folder, _, name = file.name.rpartition("/")
        stem, _, ending = name.partition(".")
        return f"{folder}/{stem}", f".{ending.lower()}"

    try:
        for key, files in groupby(filter(wanted, tar), lambda file: parts(file)[0]):
            endings = {parts(file)[1]: file for file in files}
            image = next((file for ending, file in endings.items() if ending in SUFFIXES), None)
            if image is None and (odd := [e for e in endings if e[e.rfind(".") :] in SUFFIXES]):
                names = f"{key.strip('/')}{odd[0]}"
                raise DataError(f"{path}: {names}: what is behind the first dot is the kind of a file: rename it")
            for file in (image, endings.get(".cls")):
                if file is not None and file.issparse():  # a few bytes that may become gigabytes
                    raise DataError(f"{path}: {file.name}: is stored as a sparse file: pack it without --sparse (-S)")
            if image is not None:
                yield f"{path}{key if key.startswith('/') else f'/{key}'}", image, endings.get(".cls")
        file: Any = tar.fileobj
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # for tarfile any end is a good one
            raise DataError(f"{path}: damaged tar file (it has no end: cut off, or not closed)")
    except DataError:
        raise
    except Exception as error:  # of a header that claims more than there can be, or leads to others without end
        raise DataError(f"{path}: damaged tar file ({one_line(error) or type(error).__name__})") from None


def content(tar: tarfile.TarFile, file: tarfile.TarInfo) -> bytes:
    stored = tar.extractfile(file)
    assert stored is not None  # a regular file
    return stored.read()


def class_number(tar: tarfile.TarFile, name: str, label: tarfile.TarInfo | None) -> int:
    text = b"" if label is None else content(tar, label).strip()
    if not text.isdigit() or len(text) > 9:
        raise DataError(f"{name}: no class number in a file of that name with the ending .cls")
    return int(text)


def load_tars(folder: Path, cache: Path) -> tuple[tuple[str, ...], dict[str, TarShards]]:
    """Class names and splits of a folder of tar files.

    Args:
        folder: It holds tar files with train, val and test as a word in their names, or without; or timm's
            ``_info.json``, that names files and their lengths. ``classes.txt`` has the classes' names, one a line.
        cache: Folder for what was counted.

    Raises:
        DataError: If there are none, their names do not say which split they are of, or one is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: give wds/FOLDER, a folder of tar files")
    splits, lengths = read_info(folder) or (find_tars(folder), {})
    files = [path for paths in splits.values() for path in paths]
    listed = folder / "classes.txt"
    class_names = read_classes(listed) if listed.exists() else ()
    if not class_names or any(path not in lengths for path in files):
        lengths, classes = count_tars(files, cache / f"wds_{file_name(folder.resolve().name)}")
        if not class_names and classes > max(MOST_CLASSES, sum(lengths.values())):
            raise DataError(
                f"{folder}: there is a class number {classes - 1}; class numbers go from 0 to one less than there are "
                "classes (a file classes.txt can name that many)"
            )
        class_names = class_names or tuple(map(str, range(classes)))
        if classes > len(class_names):
            raise DataError(f"{listed} has {len(class_names)} names, but there is a class number {classes - 1}")
    for split, paths in splits.items():
        if not sum(lengths[path] for path in paths):
            names = map(os.path.basename, paths[:1])
            raise DataError(f"{folder}: no image in the tar files for {split} ({', '.join([*names, '...'])})")
    shards = {s: TarShards(files=tuple(p), lengths=tuple(lengths[file] for file in p)) for s, p in splits.items()}
    return class_names, shards


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names, one a line, in the order of the class numbers."""
    lines: dict[str, int] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: is no UTF-8: save it as UTF-8") from None
    for number, line in enumerate(text.rstrip().splitlines(), 1):
        name = line.strip()
        if not name:  # dropped, it would shift the names below it
            raise DataError(f"{path}: line {number} is empty, but each line is the name of a class: fill or remove it")
        if name in lines:
            where = f"lines {lines[name]} and {number}"
            raise DataError(f"{path}: {where} are both {name!r}: tell them apart, as in 'crane (bird)'")
        lines[name] = number
    return tuple(lines)


def read_info(folder: Path) -> tuple[dict[str, list[str]], dict[str, int]] | None:
    """Files of each split and samples in each file from timm's ``_info.json``, if there is one."""
    path = folder / "_info.json"
    if not path.exists():
        return None
    try:
        named = json.loads(path.read_text())["splits"]
        splits = {split_of(s): [str(folder / file) for file in info["filenames"]] for s, info in named.items()}
        counts = [zip(info["filenames"], info["shard_lengths"], strict=True) for info in named.values()]
        return splits, {str(folder / file): int(count) for pairs in counts for file, count in pairs}
    except Exception as error:  # whatever is missing, or of another kind
        raise DataError(
            f"{path}: not as timm writes it ({error!r}); without the file the samples are counted"
        ) from None


def find_tars(folder: Path) -> dict[str, list[str]]:
    """Tar files by the split that is a word in their names (``set-train-000.tar``); all for training if none is."""
    there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))  # macOS leaves ._NAME
    files = [path for path in there if re.search(r"\.(tar|tar\.gz|tgz)$", path.name, re.I)]
    if others := [
        path.name for path in there if path not in files and re.search(r"\.(tar\.\w+|tbz2?|txz|tzst)$", path.name, re.I)
    ]:
        raise DataError(
            f"{folder}: of tar files .tar, .tar.gz and .tgz are read; unpack or move {', '.join(others[:3])}"
        )
    if not files:
        raise DataError(f"{folder} has no tar files")
    if inside := [path.name for path in there if path.is_dir() and any(path.glob("*.tar*"))]:
        raise DataError(f"{folder}: tar files lie in it and in {inside[0]}/ too: give them one folder")
    splits: dict[str, list[str]] = {}
    for path in files:
        said = sorted({split_of(word) for word in re.split(r"[\W\d_]+", path.name)} & set(SPLITS))
        if len(said) > 1:
            raise DataError(f"{path}: its name says both {said[0]} and {said[1]}: rename it")
        splits.setdefault(said[0] if said else "", []).append(str(path))
    unsaid = splits.pop("", [])
    if unsaid and splits:  # neither left out nor trained on by mistake
        names = ", ".join(os.path.basename(path) for path in unsaid[:3]) + ", ..." * (len(unsaid) > 3)
        raise DataError(f"{folder}: no train, val or test in the names of {names}, but in others: rename or move them")
    if unsaid:
        names = [os.path.basename(path) for path in unsaid]
        hints = [found for split in SPLITS if (found := [name for name in names if split in name.casefold()])]
        if len(hints) > 1:  # trainset-0.tar and valset-0.tar
            shown = ", ".join(found[0] for found in hints)
            raise DataError(f"{folder}: train, val or test must be a word of its own in {shown}: rename them")
        return {"train": unsaid}
    if "train" not in splits:
        raise DataError(f"{folder} has {min(splits)} tar files but no train: rename or add those for training")
    return {split: splits[split] for split in SPLITS if split in splits}


def count_tars(files: list[str], name: Path) -> tuple[dict[str, int], int]:
    """Samples in each tar file, and the largest class number + 1; kept in a file: it takes a pass over all."""

    def count() -> dict[str, Any]:
        lengths, classes = {}, 0
        for file in progress(files, "counting samples"):
            with open_tar(file) as tar:
                labels = [class_number(tar, name, label) for name, _, label in tar_samples(file, tar)]
            lengths[file] = len(labels)
            classes = max([classes, *(label + 1 for label in labels)])
        return {"lengths": lengths, "classes": classes}

    found = remembered(name, json.dumps(states(files)), count)
    return found["lengths"], found["classes"]


# ---- what was counted -----------------------------------------------------------------------------------------------


def states(files: Iterable[str]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of each file, that tell a rewritten one without reading it."""
    found = []
    for file in files:
        try:
            stat = os.stat(file)
            found.append((file, stat.st_size, stat.st_mtime_ns))
        except OSError:  # not on this machine, or missing: opening it will say so
            found.append((file, -1, 0))
    return found


def remembered(path: Path, key: str, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, kept as JSON in a file whose name ends with a fingerprint of the key."""
    path = path.with_name(f"{path.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # missing or damaged
        found = make()
        write_atomically(path, [json.dumps(found).encode()])
        return found


def progress(items: list[Any], title: str) -> Iterator[Any]:
    """The items, with a bar on a terminal."""
    console = Console(stderr=True)
    return iter(track(items, title, console=console, disable=not console.is_terminal))


def stream_statistics(stream: Stream, path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of values in [0, 1], over some images from all over the stream.

    Args:
        stream: The training split.
        path: Start of the name of the file that keeps them.
    """
    size, parts = len(stream), min(len(stream), 20)  # places at which reading begins

    def measure() -> list[Any]:
        places = [(start, min(start + SAMPLE // parts, stop)) for start, stop in pairwise(even(0, size, parts))]
        chunks = (stream.decode(stream.read(stream.chosen, *place))[1] for place in progress(places, "sampling images"))
        return list(channel_statistics(chunks))

    key = repr((stream.shards.fingerprint, stream.shards.lengths, stream.preprocess))
    mean, std = remembered(path, key, measure)
    return tuple(mean), tuple(std)
