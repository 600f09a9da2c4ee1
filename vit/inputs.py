"""Which images a command line names: files, folders, globs, and paths on standard input; lazily, in a fixed order.

Paths are ``str`` as ``os.fsdecode`` makes them, so that names in no valid encoding come through unharmed.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from typing import BinaryIO

from vit.preprocess import SUFFIXES
from vit.records import PARTIAL

CHUNK = 1 << 16  # bytes read from standard input at once


@dataclass(frozen=True)
class Unreadable:
    """A source that leads to no image: it takes a record, so that nothing is lost in silence.

    Args:
        path: The source as named.
        error: One line on what is wrong with it.
    """

    path: str
    error: str


@dataclass
class Inputs:
    """The images that sources name, one by one; iterating again starts again (standard input excepted).

    Args:
        sources: Files, folders, globs with ``*``, ``?``, ``[...]`` and ``**``, or ``-``: paths on ``stdin``.
        recursive: Whether folders are searched with their subfolders.
        stdin: Binary stream of paths, a line each, or each ended by a zero byte as ``find -print0`` writes them.
        maps: Folder in which this run puts pictures: none of them is an image of it.
        passed_over: Files in folders that were left out because of their suffix, counted by suffix; what is hidden too.
        subfolders: How many folders in those that are named were not looked into.
        in_maps: How many of the files that ``stdin`` or a glob named were left out, as they lie in ``maps``.
    """

    sources: Iterable[str]
    recursive: bool = False
    stdin: BinaryIO | None = None
    maps: str | None = None
    passed_over: Counter[str] = field(default_factory=Counter)
    subfolders: int = 0
    in_maps: int = 0

    def absolute(self) -> bool:
        """Whether all sources are absolute paths; of those on ``stdin``, the first one, which is waited for."""
        peek = getattr(self.stdin, "peek", None)
        return all(peek(1)[:1] == b"/" if source == "-" and peek else os.path.isabs(source) for source in self.sources)

    def __iter__(self) -> Iterator[str | Unreadable]:
        self.passed_over.clear()
        self.subfolders = self.in_maps = 0
        for source in self.sources:
            try:
                yield from self._of(source)
            except RecursionError:
                yield Unreadable(source, "some of its folders lie too deep and are left out")

    def _of(self, source: str) -> Iterator[str | Unreadable]:
        if source == "-" and self.stdin is not None:
            yield from self._outside(read_paths(self.stdin))
        elif os.path.isdir(source):
            hint = "" if self.recursive else "; --recursive looks into its subfolders"
            yield from _or(self._walk(source, set()), Unreadable(source, f"no images in this folder{hint}"))
        elif glob.has_magic(source) and not os.path.lexists(source):
            beside = " outside the folder of --maps" if self.maps else ""
            yield from _or(self._outside(expand(source)), Unreadable(source, f"no file matches{beside}"))
        else:
            yield source

    def _outside(self, paths: Iterator[str]) -> Iterator[str]:
        for path in paths:
            if self.maps is not None and within(os.path.dirname(path), self.maps):
                self.in_maps += 1
            else:
                yield path

    def _walk(self, folder: str, seen: set[tuple[int, int]]) -> Iterator[str | Unreadable]:
        """Images of a folder by name, and of its subfolders: each once, or a few links would make billions of paths."""
        try:
            status = os.stat(folder)
            with os.scandir(folder) as entries:
                names = sorted((entry.name, _is_dir(entry)) for entry in entries)
        except OSError as error:
            yield Unreadable(folder, error.strerror or str(error))
            return
        identity = (status.st_dev, status.st_ino)
        if identity in seen or (self.maps and within(folder, self.maps)):
            return
        seen.add(identity)
        for name, is_folder in names:
            path = os.path.join(folder, name)
            if name.startswith("."):  # a thumbnail, what macOS writes beside each file, a cache
                if self.recursive or not is_folder:
                    self.passed_over["hidden"] += 1
            elif is_folder:
                if self.recursive:
                    yield from self._walk(path, seen)
                elif not (self.maps and within(path, self.maps)):
                    self.subfolders += 1
            elif (suffix := os.path.splitext(name)[1].lower()) in SUFFIXES:
                yield path
            elif suffix != PARTIAL:  # as a rule this run's own records
                self.passed_over[suffix] += 1


def within(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it, by whatever links."""
    path, folder = real(os.path.abspath(path)), real(os.path.abspath(folder))
    return path == folder or path.startswith(os.path.join(folder, ""))


real = lru_cache(maxsize=1024)(os.path.realpath)  # it asks for every folder of a path


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _or(items: Iterator[str | Unreadable], otherwise: Unreadable) -> Iterator[str | Unreadable]:
    """The items; where there are none, ``otherwise``."""
    none = True
    for item in items:
        none = False
        yield item
    if none:
        yield otherwise


def read_paths(stream: BinaryIO) -> Iterator[str]:
    """Paths from a stream: zero-terminated if its first block has a zero byte, lines if not; empty ones are skipped."""
    read = getattr(stream, "read1", stream.read)  # read1: what is there now, so that a slow writer is served
    block = read(CHUNK).removeprefix(b"\xef\xbb\xbf")  # as some editors begin a text
    while b"\0" not in block and b"\n" not in block and (more := read(CHUNK)):  # of a slow writer, half a path
        block += more
    ending, rest = (b"\0" if b"\0" in block else b"\n"), b""
    while block:
        *paths, rest = (rest + block).split(ending)
        yield from _decoded(paths, ending)
        block = read(CHUNK)
    yield from _decoded([rest], ending)


def _decoded(paths: list[bytes], ending: bytes) -> Iterator[str]:
    for path in paths:
        if path := path.removesuffix(b"\r") if ending == b"\n" else path:
            yield os.fsdecode(path)


def expand(pattern: str) -> Iterator[str]:
    """Files that match a glob, folder by folder and sorted.

    ``glob.iglob`` has the same rules (hidden names only when asked for) but no order, without which no run can be
    resumed.
    """
    parts = [part for part in pattern.split("/") if part]
    parts = [part for part, following in zip(parts, [*parts[1:], ""], strict=True) if not part == following == "**"]
    files = _expand("/" if pattern.startswith("/") else "", parts)
    if parts.count("**") > 1:  # which meet a file in more than one way
        yield from dict.fromkeys(files)
    else:
        yield from files


def _expand(folder: str, parts: list[str]) -> Iterator[str]:
    part, rest = parts[0], parts[1:]
    if part == "**" and rest:
        yield from _expand(folder, rest)
    elif not glob.has_magic(part):
        path = os.path.join(folder, part)
        if rest:
            yield from _expand(path, rest)
        elif os.path.isfile(path):
            yield path
        return
    matches = re.compile(translate(part)).match
    try:
        with os.scandir(folder or os.curdir) as entries:
            names = sorted((entry.name, _is_dir(entry), entry.is_symlink()) for entry in entries)
    except OSError:
        return  # not a folder, or one that may not be read: nothing matches in it
    for name, is_folder, is_link in names:
        if (name.startswith(".") and not part.startswith(".")) or not matches(name):
            continue
        path = os.path.join(folder, name)
        if part == "**":
            if is_folder and not is_link:  # as glob does: a link could lead back up
                yield from _expand(path, parts)
            elif not is_folder and not rest:
                yield path
        elif rest:
            if is_folder:
                yield from _expand(path, rest)
        elif not is_folder:
            yield path
