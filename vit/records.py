"""The records of a prediction run: how each format writes them, and an output file that survives being killed.

A record is ``{"path": ..., "predictions": [{"label": ..., "score": ...}, ...]}``, with ``"unsure"``, ``"map"`` and
``"map_score"`` where asked for, or ``{"path": ..., "error": ...}``. No torch.
"""

import csv
import fcntl
import io
import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rich.cells import cell_len

Record = dict[str, Any]
Kept = tuple[Record, bytes]  # a record that is there already, and how it is written
PARTIAL = ".partial"  # what an unfinished output file is called, behind its name
ROW_GROUP = 8192  # records that Parquet holds in memory before it writes them


class OutputError(ValueError):
    """Records that cannot be written or gone on with; the message is one line that names the file."""


def shown(name: str) -> str:
    """The name of a file or a class as valid text: bytes in no valid encoding as ``\\udcXX``, as JSON writes them."""
    return name.encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    """Text that moves no terminal: control characters, newlines included, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def as_json(record: Record) -> bytes:
    """JSON in UTF-8 with escapes for what does not print: no name moves a terminal, and every byte of it comes back."""
    text = json.dumps(record, ensure_ascii=False)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    return text.encode()


def write_out(text: str) -> None:
    """Text to standard output, with escapes for letters that its encoding has not.

    Raises:
        OSError: If it cannot be written; Python does not try again at its end.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise OSError(error.errno, error.strerror, "standard output") from error


def composed(name: str) -> str:
    """A name with each accented letter as one character: macOS stores two, which look the same."""
    return unicodedata.normalize("NFC", name)


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """The names, those that are there more than once with their number."""
    often = Counter(names)
    named = tuple(name if often[name] == 1 else f"{name} ({number})" for number, name in enumerate(names))
    return named if len(set(named)) == len(named) else distinct(named)  # one may be called like another with its number


def best_of(record: Record) -> tuple[str, float]:
    """Label and score of the class that a record has first."""
    best = record["predictions"][0]
    return best["label"], 0.0 + best["score"]


class Format:
    """How records become bytes; ``read`` turns them back where a run can be resumed."""

    def start(self) -> bytes:
        return b""

    def expect(self, paths: Iterable[str]) -> None:
        """Learn the paths of the next records."""

    def record(self, record: Record) -> bytes:
        raise NotImplementedError

    def end(self) -> bytes:
        return b""

    def read(self, file: BinaryIO) -> Iterator[Kept]:
        raise NotImplementedError


class JsonLines(Format):
    """One object a line, UTF-8; undecodable bytes of a path are ``\\udcXX`` escapes, as ``os.fsencode`` takes them."""

    def record(self, record: Record) -> bytes:
        return as_json(record) + b"\n"

    def read(self, file: BinaryIO) -> Iterator[Kept]:
        """Whole records and their bytes; a torn one at the end is left out."""
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield json.loads(line), line


class Json(Format):
    """One JSON array, written as it grows."""

    def __init__(self) -> None:
        self.separator = b""

    def start(self) -> bytes:
        return b"[\n"

    def record(self, record: Record) -> bytes:
        separator, self.separator = self.separator, b",\n"
        return separator + as_json(record)

    def end(self) -> bytes:
        return (b"\n" if self.separator else b"") + b"]\n"


class Csv(Format):
    """A row an image: path, label_1, score_1, ... label_k, score_k, error; unsure, map and map_score where asked for.

    Args:
        top_k: Number of label and score columns.
        extra: Further columns: "unsure", "map", "map_score".
    """

    def __init__(self, top_k: int, extra: tuple[str, ...] = ()):
        self.top_k, self.extra = top_k, extra
        pairs = [f"{name}_{i + 1}" for i in range(top_k) for name in ("label", "score")]
        self.columns = ["path", *pairs, "error", *extra]

    def row(self, record: Record) -> list[Any]:
        """Values of the columns."""
        cells: list[Any] = [value for p in record.get("predictions", ()) for value in (p["label"], p["score"])]
        cells += [None] * (2 * self.top_k - len(cells))
        row = [record["path"], *cells, record.get("error"), *(record.get(name) for name in self.extra)]
        return [shown(cell) if isinstance(cell, str) else cell for cell in row]

    def start(self) -> bytes:
        return self._line(self.columns)

    def record(self, record: Record) -> bytes:
        return self._line(self.row(record))

    @staticmethod
    def _line(cells: list[Any]) -> bytes:
        text = io.StringIO()
        csv.writer(text).writerow(f"{c:.6f}" if isinstance(c, float) else c for c in cells)
        # Written to end with \r\n, so that cells with either are quoted; stored as other tools like it.
        return text.getvalue().removesuffix("\r\n").encode("utf-8", "backslashreplace") + b"\n"

    def read(self, file: BinaryIO) -> Iterator[Kept]:
        """Whole records (path, best class, error, unsure, map) and their bytes; a torn one at the end is left out."""
        taken: list[bytes] = []

        def lines() -> Iterator[str]:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                taken.append(line)
                yield line.decode()

        csv.field_size_limit(2**31 - 1)  # a path may be long; it was written by us
        rows = csv.reader(lines(), strict=True)
        try:
            for number, row in enumerate(rows):
                data = b"".join(taken)
                taken.clear()
                if number == 0:
                    if row != self.columns:
                        raise ValueError("its columns are not those of this run")
                    continue
                cells = dict(zip(self.columns, row, strict=True))
                if cells["error"]:
                    said: Record = {"error": cells["error"]}
                else:
                    said = {"predictions": [{"label": cells["label_1"], "score": float(cells["score_1"])}]}
                more = {"unsure": cells.get("unsure") == "True", "map": cells.get("map") or None}
                yield {"path": cells["path"], **more, **said}, data
        except csv.Error:
            return  # the file ends inside quotes: torn


class Parquet(Csv):
    """The columns of ``Csv`` in Parquet, by pyarrow; in groups of rows, so that memory stays flat."""

    def __init__(self, top_k: int, extra: tuple[str, ...] = ()):
        import pyarrow
        from pyarrow import parquet

        super().__init__(top_k, extra)
        types = {"label": pyarrow.string(), "score": pyarrow.float64(), "unsure": pyarrow.bool_()}
        kinds = {name: "score" if name == "map_score" else name.split("_")[0] for name in self.columns}
        self.schema = pyarrow.schema([(name, types.get(kind, pyarrow.string())) for name, kind in kinds.items()])
        self.table = pyarrow.Table
        self.sink = _Pieces()
        self.writer = parquet.ParquetWriter(self.sink, self.schema)
        self.rows: list[list[Any]] = []

    def start(self) -> bytes:
        return self.sink.take()

    def record(self, record: Record) -> bytes:
        self.rows.append(self.row(record))
        return self._group() if len(self.rows) == ROW_GROUP else b""

    def end(self) -> bytes:
        last = self._group() if self.rows else b""
        self.writer.close()
        return last + self.sink.take()

    def _group(self) -> bytes:
        columns = dict(zip(self.columns, zip(*self.rows, strict=True), strict=True))
        self.writer.write_table(self.table.from_pydict(columns, self.schema))
        self.rows = []
        return self.sink.take()


class _Pieces(io.RawIOBase):
    """A file that hands on what is written to it."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        data, self.pieces = b"".join(self.pieces), []
        return data


class Table(Format):
    """Columns for people.

    Args:
        labels: All class names, for the width of their column.
        width: Of the terminal, which has as many classes of a record as fit, at least one; none for all of them.
    """

    def __init__(self, labels: tuple[str, ...], width: int | None = None):
        self.width = width
        self.label_width = min(24, max(map(cell_len, labels)))
        self.path_width = 20

    def expect(self, paths: Iterable[str]) -> None:
        """Make room for the paths of the next records, so that their columns line up."""
        self.path_width = max(self.path_width, *(min(cell_len(printable(shown(path))), 60) for path in paths))

    def record(self, record: Record) -> bytes:
        path = printable(shown(record["path"]))
        if "error" in record:
            text = f"error: {printable(record['error'])}"
        else:
            cells = [
                f"{padded(printable(p['label']), self.label_width)} {p['score']:6.1%}" for p in record["predictions"]
            ]
            more = "   unsure" if record.get("unsure") else ""
            more += f"   map score {record['map_score']:+.2f}" if "map_score" in record else ""
            if self.width is not None:
                room = self.width - max(self.path_width, cell_len(path)) - len(more)
                cells = cells[: max(1, room // (cell_len(cells[0]) + 3))]
            text = "   ".join(cells) + more
        return f"{padded(path, self.path_width)}   {text}\n".encode("utf-8", "backslashreplace")


def padded(text: str, width: int) -> str:
    """The text and blanks up to so many columns of a terminal, of which Chinese and Japanese letters take two each."""
    return text + " " * (width - cell_len(text))


class Output:
    """Where records go: standard output, or a file that is either the old one or the whole new one.

    While a run goes on its records are in ``FILE.partial``, each written whole and at once; the last step renames it.
    What a killed run leaves there is gone on with by ``resume``; so is a finished FILE, which becomes FILE.partial only
    when a record is added, so that a run which is refused leaves it as it was.

    Args:
        path: The file; none for standard output.
        format: Writes the records.
        resume: Go on behind the whole records of an unfinished (or finished) file.

    Raises:
        OutputError: If the file cannot be opened, or another run is writing it.
    """

    def __init__(self, path: str | None, format: Format, *, resume: bool = False):
        self.name = path or "standard output"
        self.format = format
        self.discarded = False  # whether an unfinished run's records have made room for this one's
        special = path is not None and os.path.abspath(path).startswith(("/dev/fd/", "/dev/std", "/proc/"))
        device = path is not None and os.path.exists(path) and (special or not os.path.isfile(path))
        self.path = None if path is None or device else Path(os.path.realpath(path))  # a link stays one
        try:
            if self.path is None:  # standard output, or a device such as /dev/null
                self.descriptor = os.dup(1) if path is None else os.open(path, os.O_WRONLY | os.O_APPEND)
            else:
                self.descriptor = self._open(self.path, resume)
        except OSError as error:
            raise OutputError(f"{self.name}: {error.strerror}") from error

    def _open(self, path: Path, resume: bool) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.partial = path.with_name(path.name + PARTIAL)
        self.current = path if resume and not self.partial.exists() and path.exists() else self.partial
        descriptor = os.open(self.current, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(f"{path}: another run is writing it") from None
        except OSError:
            pass  # a file system without locks
        if not (self.current.exists() and os.path.samestat(os.fstat(descriptor), os.stat(self.current))):
            os.close(descriptor)  # another run has ended meanwhile, and this is its finished file
            return self._open(path, resume)
        if not resume:
            self.discarded = os.fstat(descriptor).st_size > 0
            os.ftruncate(descriptor, 0)
        return descriptor

    def kept(self) -> Iterator[Kept]:
        """Whole records of the run that is gone on with; when they are used up, a torn one behind them is cut off."""
        if self.path is None:
            return
        size = len(self.format.start())
        try:
            with open(self.current, "rb") as file:
                for record, data in self.format.read(file):
                    _ = shown(record["path"]), "error" in record or best_of(record)
                    size += len(data)
                    yield record, data
            there = os.fstat(self.descriptor).st_size
            if self.current == self.path and 0 < there != size:
                raise ValueError("it ends within one")  # which no finished file does: nothing of it is cut off
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            text = f"{self.current}: not the records of such a run ({error}); run without --resume to start again"
            raise OutputError(text) from error
        os.ftruncate(self.descriptor, size if there >= len(self.format.start()) else 0)

    def start(self) -> None:
        """Write what stands before the first record, unless it is there."""
        if self.path is None or os.fstat(self.descriptor).st_size == 0:
            self._write(self.format.start())

    def write(self, record: Record) -> None:
        """Add a record, whole.

        Raises:
            OutputError: If the disk is full, say; the file is named.
            BrokenPipeError: If nobody reads any more.
        """
        self._write(self.format.record(record))

    def _write(self, data: bytes) -> None:
        # One system call a record, no buffer: what a killed process leaves are whole records, and a reader of a pipe
        # sees each one at once.
        try:
            if data and self.path is not None and self.current == self.path:
                if self.partial.exists() or not os.path.samestat(os.fstat(self.descriptor), os.stat(self.path)):
                    raise OutputError(f"{self.path}: another run is writing it, or has since")
                os.replace(self.path, self.partial)
                self.current = self.partial
            while data:
                data = data[os.write(self.descriptor, data) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"{self.name}: {error.strerror}") from error

    def finish(self) -> None:
        """All records are there: the file takes its name."""
        self._write(self.format.end())
        if self.path is not None:
            try:
                os.fsync(self.descriptor)
                os.replace(self.current, self.path)
                self.current = self.path
            except OSError as error:
                raise OutputError(f"{self.name}: {error.strerror}") from error

    def close(self) -> None:
        os.close(self.descriptor)
