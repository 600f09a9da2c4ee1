"""A run of predict.py: sources in, records out, in order; what it came to and how it ended.

Imports are late: an interrupt while torch loads ends as quietly as any other.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit.quiet import quiet_libraries

if TYPE_CHECKING:
    from vit.cluster import Cluster
    from vit.gallery import Gallery
    from vit.inputs import Inputs, Unreadable
    from vit.predictor import Predictor
    from vit.records import Format, Kept, Output, Record

    Item = str | Unreadable

UNIT = 64  # images that one part of a run (--shard) takes together: the same everywhere, whatever the batches there
LONG = 50_000  # images for which a GPU's minute of compiling is won back
OK, USAGE, SOME_FAILED, NONE_SUCCEEDED = 0, 2, 3, 4


class Stopped(BaseException):
    """A signal asked for the end."""

    def __init__(self, number: int):
        self.number = number


def run(options: argparse.Namespace) -> int:
    """Classify everything; the exit code.

    Args:
        options: What predict.py's parser gives, checked.
    """
    try:
        os.getcwd()
    except OSError:
        say("predict.py: the folder one is in is gone; change to another")
        return USAGE
    try:
        with signals() as check, quiet_libraries():
            return load_and_classify(options, check)
    except Stopped as stop:
        with suppress(OSError):  # not by say, which imports more
            print(f"stopped by {signal.Signals(stop.number).name}", file=sys.stderr, flush=True)
        return 128 + stop.number


@contextmanager
def signals() -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM raise Stopped; where signals cannot be caught (another thread) nothing changes.

    Gives what raises it again, if there was one: code below Python, such as torch's start, may swallow an exception.
    """
    heard: list[int] = []

    def stop(number: int, frame: object) -> None:
        heard.append(number)
        error = sys.exception()
        while error is not None and not isinstance(error, Stopped):
            error = error.__context__  # which is being handled while that one is
        if error is None:  # else the end is on its way; a second one must not break it
            raise Stopped(number)

    def check() -> None:
        if heard:
            raise Stopped(heard[0])

    try:
        caught = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, stop) for number in caught}
    except ValueError:
        yield check
        return
    try:
        yield check
    except Exception:
        check()  # what was swallowed may have left something half done, which fails then
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def standard_streams() -> None:
    """Streams that were closed, as some daemons start a program, lead nowhere: no file takes their descriptors."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (the lowest descriptor that is free: its own)
    for descriptor in (0, 1):  # or a writer's pause would be the end, and a reader's an error
        with suppress(OSError):
            os.set_blocking(descriptor, True)


def say(text: str) -> None:
    """A line for the user, not a record; names of files and classes in it move no terminal."""
    from vit.records import printable

    with suppress(OSError):  # nobody may be listening
        print(printable(text), file=sys.stderr, flush=True)


def load_and_classify(options: argparse.Namespace, check: Callable[[], None]) -> int:
    """Load the model and classify everything; the exit code.

    Args:
        options: What predict.py's parser gives, checked.
        check: Raises Stopped if that was asked for and was lost.
    """
    import numpy  # noqa: F401 (before torch, which imports it from C and passes over what is raised in it)
    import torch

    from vit.cluster import ClusterError
    from vit.inputs import Inputs, within
    from vit.memory import keep_freed_memory
    from vit.predictor import Predictor
    from vit.preprocess import SUFFIXES
    from vit.records import Output, OutputError

    check()
    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # so that float32 is float32 on a GPU too; a program's own to say
    device = "cpu" if options.engine == "ray" else options.device  # the work is done elsewhere
    try:
        predictor = Predictor.from_checkpoint(options.checkpoint, device=device, precision=options.precision)
        numbers = predictor.numbers(options.target, options.against)
        options.target, options.against = (n if n is None else predictor.class_names[n] for n in numbers)
    except ValueError as error:
        say(f"predict.py: {error}")
        return USAGE
    if options.classes:
        return write_classes(predictor.class_names)
    if options.out and os.path.splitext(options.out)[1].lower() in SUFFIXES:
        say(f"predict.py: --out {options.out}: has the name of an image, which the records would replace; take another")
        return USAGE
    for option, file in files_of(options):
        for source in (source for source in options.sources if is_same(source, file)):
            name = "the file on standard input" if source == "-" else source
            say(f"predict.py: {option}: would replace {name}; take another name")
            return USAGE
    for source in options.sources if options.maps else ():
        folder = source if os.path.isdir(source) else os.path.dirname(source)
        if source != "-" and os.path.lexists(source) and within(folder, options.maps):
            say(f"predict.py: --maps {options.maps}: {source} lies in it; maps and images would mix, name another")
            return USAGE
    stdin = sys.stdin.buffer if "-" in options.sources else None
    inputs = Inputs(options.sources, recursive=options.recursive, stdin=stdin, maps=options.maps)
    summary, output = Summary(), None
    try:
        gallery = gallery_of(options, predictor, inputs)  # first: where it cannot write, nothing is touched
        output = Output(options.out, record_format(options, predictor), resume=options.resume)
        if output.discarded:
            hint = "; --resume would have gone on with them" if resumable(options) else ""
            say(f"predict.py: {output.partial}: the records of an unfinished run were discarded{hint}")
        try:
            with engine(options, predictor) as work, progress(options, inputs) as step:

                def advance(n: int) -> None:
                    check()
                    step(n)

                classify(options, predictor, gallery, work, inputs, output, summary, advance)
            output.finish()
        finally:
            output.close()
    except Stopped as stop:
        summary.tell(options, inputs)
        left = where(options, output) if summary.new or options.resume else ""
        say(f"stopped by {signal.Signals(stop.number).name}{left}")
        return 128 + stop.number
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except (OutputError, ClusterError) as error:
        if summary.new:
            summary.tell(options, inputs)
        say(f"predict.py: {error}{where(options, output) if summary.new else ''}")
        return USAGE
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        hint = f"try a --batch-size below {options.batch_size or predictor.batch_size}"
        say(f"predict.py: out of memory; {hint}{where(options, output) if summary.new else ''}")
        return USAGE
    summary.tell(options, inputs)
    if summary.classified and gallery:
        if gallery.folder:
            sheet = os.path.join(gallery.folder, gallery.sheet)
            say(f"  maps: {gallery.folder}, the first of them side by side in {sheet}")
        if gallery.report:
            say(f"  page: {gallery.report}")
    if not summary.failed and (summary.classified or options.shard[1] > 1):
        return OK
    return SOME_FAILED if summary.classified else NONE_SUCCEEDED


def files_of(options: argparse.Namespace) -> Iterator[tuple[str, str | Path]]:
    """The files that a run writes beside its maps, each with the option that names it."""
    from vit.records import PARTIAL

    if options.out:
        yield from ((f"--out {options.out}", os.path.realpath(options.out) + ending) for ending in ("", PARTIAL))
    if options.report:
        from vit.gallery import of_shard
        from vit.report import unfinished

        page = of_shard(options.report, options.shard)
        yield from ((f"--report {options.report}", file) for file in (page, unfinished(page)))


def is_same(source: str, file: str | Path) -> bool:
    """Whether a source, or what standard input is read from, is this file; a device is no file."""
    with suppress(OSError):
        return os.path.isfile(file) and os.path.samefile(0 if source == "-" else source, file)
    return False


def write_classes(names: tuple[str, ...]) -> int:
    """A name a line to standard output; the exit code."""
    from vit.records import printable, write_out

    try:
        write_out("".join(f"{printable(name)}\n" for name in names))
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        say(f"predict.py: standard output: {error.strerror}")
        return USAGE
    return OK


def where(options: argparse.Namespace, output: "Output | None") -> str:
    """What became of the records so far."""
    if output is None or output.path is None or not (output.current.exists() and output.current.stat().st_size):
        return ""
    if options.format == "parquet":
        return "; the records so far are lost: a Parquet file is whole or none"
    return f"; the records so far are in {output.current}{'; --resume goes on' if resumable(options) else ''}"


def resumable(options: argparse.Namespace) -> bool:
    """Whether --resume can go on with the records."""
    return options.format in ("jsonl", "csv")


def record_format(options: argparse.Namespace, predictor: "Predictor") -> "Format":
    """What writes the records."""
    from vit import records

    top_k = min(options.top_k, len(predictor.class_names))
    asked = {"unsure": options.threshold is not None, "map": options.maps is not None, "map_score": options.score_maps}
    extra = tuple(name for name, wanted in asked.items() if wanted)
    if options.format in ("csv", "parquet"):
        return (records.Csv if options.format == "csv" else records.Parquet)(top_k, extra)
    if options.format == "table":
        terminal = options.out is None and sys.stdout is not None and sys.stdout.isatty()
        return records.Table(predictor.class_names, width=shutil.get_terminal_size().columns if terminal else None)
    return records.Json() if options.format == "json" else records.JsonLines()


def gallery_of(options: argparse.Namespace, predictor: "Predictor", inputs: "Inputs") -> "Gallery | None":
    """What draws the maps, where any are asked for."""
    if not (options.maps or options.report):
        return None
    from vit.gallery import Gallery

    return Gallery(
        predictor,
        method=options.method,
        target=options.target,
        against=options.against,
        folder=options.maps,
        report=options.report,
        shard=options.shard,
        absolute=inputs.absolute(),
    )


def engine(options: argparse.Namespace, predictor: "Predictor") -> "AbstractContextManager[Predictor | Cluster]":
    """What computes the batches: the predictor itself, compiled for many images on a GPU, or a Ray cluster."""
    from vit.cluster import Cluster

    if options.engine == "ray":
        return Cluster(predictor, device=options.device, precision=options.precision, compile=is_long(options))
    if predictor.device.type == "cuda" and is_long(options):
        predictor.compile(options.batch_size or predictor.batch_size)
    return nullcontext(predictor)


def is_long(options: argparse.Namespace) -> bool:
    """Whether LONG images are to come; the same for all shards and for a run that is gone on with."""
    from vit.inputs import Inputs

    # Those on standard input are not known beforehand.
    inputs = Inputs(options.sources, recursive=options.recursive, maps=options.maps)
    return next(islice(inputs, LONG - 1, None), None) is not None


def classify(
    options: argparse.Namespace,
    predictor: "Predictor",
    gallery: "Gallery | None",
    work: "Predictor | Cluster",
    inputs: "Inputs",
    output: "Output",
    summary: "Summary",
    advance: Callable[[int], None],
) -> None:
    """Every input to a record of the output, batch by batch."""
    from vit.predictor import batches
    from vit.records import OutputError

    part, parts = options.shard
    mine = chain.from_iterable(islice(batches(inputs, UNIT), part - 1, None, parts)) if parts > 1 else inputs
    pieces = batches(mine, options.batch_size or work.batch_size)
    again: list[Kept] = []  # records that are there already and are made once more, to see that they are the same
    if options.resume:
        pieces, again = resumed(pieces, output, summary, gallery, options.threshold)
    output.start()
    advance(summary.resumed - len(again))
    done = 0
    maps = {"method": options.method, "target": options.target, "against": options.against}
    asked = {"score_maps": options.score_maps, **(maps if gallery or options.score_maps else {})}
    for batch in work.classify(pieces, **asked, workers=options.workers):
        output.format.expect(map(path_of, batch.sources))
        for record in records_of(batch, options, predictor, gallery):
            if done < len(again):
                before, data = again[done]
                if output.format.record(record) != data and "error" not in before:
                    raise OutputError(
                        f"{output.current}: this run gives another record for {record['path']} than is in it: "
                        "other weights, options or machine; run without --resume to start again"
                    )
            else:
                output.write(record)
                summary.add(record)
            done += 1
        advance(len(batch.sources))
    if gallery:
        gallery.flush(end=True)


def resumed(
    pieces: "Iterator[list[Item]]",
    output: "Output",
    summary: "Summary",
    gallery: "Gallery | None",
    threshold: float | None,
) -> "tuple[Iterator[list[Item]], list[Kept]]":
    """The batches that are to do, and the records that are there of those: the first ones, and from the last recorded.

    Among these is one with an image that was classified, if there is any: errors are the same by any weights.

    Args:
        pieces: All batches.
        output: Holds the records so far; their paths must be those of the inputs.
        summary: Counts them.
        gallery: Of its first images the batches are run again, as sheet and report are of them, and those that
            lack a map; its maps are the run's.
        threshold: Score below which the records must say that they are unsure; none where they do not say.
    """
    from vit.records import OutputError, best_of, shown

    kept, rerun_first = output.kept(), gallery.limit if gallery else 0
    head: list[tuple[list[Item], list[Kept]]] = []  # batches that the gallery needs, and their records
    proof: list[tuple[list[Item], list[Kept]]] = []  # the last batch behind those with an image that was classified
    tail: list[tuple[list[Item], list[Kept]]] = []  # the last batch with records, and the one behind it
    mapped = False
    for batch in pieces:
        records = list(islice(kept, len(batch)))
        whole = len(records) == len(batch)  # the last one goes to the end: what is new comes behind what is run again
        if summary.classified < rerun_first or (whole and gallery and gallery.lacks(record for record, _ in records)):
            head.append((batch, records))
        elif any("error" not in record for record, _ in records):
            proof, tail = [(batch, records)], []
        elif records:
            tail = [(batch, records)]
        else:
            tail.append((batch, records))
        for item, (record, _) in zip(batch, records, strict=False):
            if shown(path_of(item)) != shown(record["path"]):
                raise OutputError(
                    f"{output.name}: its records have {shown(record['path'])} where the images now have "
                    f"{shown(path_of(item))}; run without --resume to start again"
                )
            if gallery and record.get("map") and not mapped:
                mapped = True
                gallery.refuse_other(record["map"])
            unsure = threshold is not None and "error" not in record and best_of(record)[1] < threshold
            if threshold is not None and bool(record.get("unsure")) != unsure:
                raise OutputError(
                    f"{output.name}: its record of {shown(record['path'])} is not by --threshold {threshold:g}; "
                    "ask for the same one, or run without --resume to start again"
                )
            summary.add(record)
            summary.resumed += 1
        if not whole:
            break
    if next(kept, None) is not None:
        raise OutputError(f"{output.name}: more records than there are images; run without --resume to start again")
    again = head + proof + tail
    return chain((batch for batch, _ in again), pieces), [record for _, records in again for record in records]


def path_of(item: Any) -> str:
    """The path of an input, readable or not."""
    return item if isinstance(item, str) else item.path


def records_of(
    batch: Any, options: argparse.Namespace, predictor: "Predictor", gallery: "Gallery | None"
) -> "Iterator[Record]":
    """The records of a batch, in order; its maps are on disk before the first one is given."""
    top_k = min(options.top_k, len(predictor.class_names))
    best = batch.scores.sort(dim=1, descending=True, stable=True)  # equal ones in the order of the classes, as anywhere
    predictions = [
        [{"label": predictor.class_names[i], "score": round(score, 6)} for i, score in zip(*row, strict=True)]
        for row in zip(best.indices[:, :top_k].tolist(), best.values[:, :top_k].tolist(), strict=True)
    ]
    paths = [path_of(source) for source in batch.sources]
    maps: Iterator[str | None] = iter(())
    if gallery:
        good = [path for path, error in zip(paths, batch.errors, strict=True) if error is None]
        grids = () if batch.grids is None else batch.grids
        named = [predictor.prediction(scores).scores for scores in batch.scores]
        maps = iter(gallery.add(good, grids, named))
        gallery.flush()
    rows = iter(predictions)
    map_scores = iter(() if batch.map_scores is None else batch.map_scores.tolist())
    for path, error in zip(paths, batch.errors, strict=True):
        if error is not None:
            yield {"path": path, "error": str(error)}
            continue
        record: Record = {"path": path, "predictions": next(rows)}
        if options.threshold is not None:
            record["unsure"] = record["predictions"][0]["score"] < options.threshold
        if options.maps:
            record["map"] = next(maps)
        if options.score_maps:
            record["map_score"] = round(next(map_scores), 4)
        yield record


class Summary:
    """What a run came to."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.labels: Counter[str] = Counter()
        self.failed = self.unsure = self.resumed = 0
        self.first_failed = ""  # path and reason

    @property
    def classified(self) -> int:
        return self.labels.total()

    @property
    def new(self) -> int:
        """Records that this run has written."""
        return self.classified + self.failed - self.resumed

    def add(self, record: "Record") -> None:
        """Count a record."""
        if "error" in record:
            self.failed += 1
            self.first_failed = self.first_failed or f"{record['path']}: {record['error']}"
        else:
            self.labels[record["predictions"][0]["label"]] += 1
            self.unsure += bool(record.get("unsure"))

    def tell(self, options: argparse.Namespace, inputs: "Inputs") -> None:
        """Say it on standard error."""
        seconds = time.perf_counter() - self.begin
        total = self.classified + self.failed
        rate = self.new / seconds
        speed = f"{rate:.1f}" if rate < 10 else f"{rate:.0f}"
        words = f"{total} image{'s' * (total != 1)} in {seconds:.1f} s ({speed}/s): "
        words += f"{self.classified} classified, {self.failed} failed"
        say(words + f", {self.unsure} unsure" * bool(self.unsure))
        if self.labels:
            most = self.labels.most_common(10)
            rest = len(self.labels) - len(most)
            say("  " + ", ".join(f"{label} {n}" for label, n in most) + f" and {rest} more classes" * bool(rest))
        if self.failed and options.out is not None:  # else it is in what was just written
            say(f"  {'first failed' if self.failed > 1 else 'failed'}: {self.first_failed}")
        if n := inputs.in_maps:
            say(f"  {n} image{'s' * (n != 1)} in the folder of --maps left out, where maps are put: {options.maps}")
        if (n := inputs.subfolders) and self.classified:  # else the record of an empty folder says it
            say(f"  {n} subfolder{'s' * (n != 1)} not looked into; --recursive does that")
        if inputs.passed_over:
            from vit.preprocess import by_ending  # loaded long ago; not with this module, as torch comes with it

            kinds, count = by_ending(inputs.passed_over), inputs.passed_over.total()
            say(f"  {count} other file{'s' * (count != 1)} in the folders left out ({kinds}); name what to try")


@contextmanager
def progress(options: argparse.Namespace, inputs: "Inputs") -> Iterator[Callable[[int], None]]:
    """A bar on standard error, if that is a terminal and records do not scroll through it; gives the step function."""
    if not sys.stderr.isatty() or (options.out is None and os.isatty(1)):
        yield lambda n: None
        return
    import threading

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from vit.inputs import Inputs

    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("images"), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TextColumn("gone"), TimeRemainingColumn(), TextColumn("{task.fields[left]}"),
    )  # fmt: skip
    stop = threading.Event()
    done, before, begin = 0, None, 0.0
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("", total=None, rate="", left="")

        def count() -> None:  # beside the work, so that a million files need not be listed first
            total = 0
            for _ in Inputs(options.sources, recursive=options.recursive, maps=options.maps):
                total += 1
                if stop.is_set():
                    return
            part, parts = options.shard
            starts = range((part - 1) * UNIT, total, parts * UNIT)
            mine = total if parts == 1 else sum(min(UNIT, total - start) for start in starts)
            bar.update(task, total=mine, left="left")

        if inputs.stdin is None:
            threading.Thread(target=count, daemon=True).start()

        def advance(n: int) -> None:
            nonlocal done, before, begin
            done += n
            if before is None:  # the first step, of what a run that is gone on with has already
                before, begin = done, time.perf_counter()
            rate = (done - before) / (time.perf_counter() - begin)
            bar.update(task, completed=done, rate=f"({rate:,.0f}/s)" if rate else "")

        try:
            yield advance
        finally:
            stop.set()
