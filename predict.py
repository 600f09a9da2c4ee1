"""Classify images: labels and scores on standard output, maps of what counted where asked for.

The command line; what it starts is in vit/run.py. No torch is imported here: ``--help`` answers at once.
"""

import argparse
import os
import signal
import sys
from contextlib import suppress
from importlib.util import find_spec
from itertools import combinations
from typing import NoReturn

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before and after the run Ctrl-C ends it without a traceback

from vit.run import resumable, run, standard_streams

FORMATS = ("table", "json", "jsonl", "csv", "parquet")
ENDINGS = {"": "table", "txt": "table"} | {name: name for name in FORMATS}  # of --out
METHODS = ("rollout", "relevance", "last", "legrad", "lrp")  # those of vit.rollout, without importing torch
CLASS_SPECIFIC, CLASS_METHOD = ("relevance", "legrad", "lrp"), "lrp"
USAGE = "%(prog)s SOURCE ... [--checkpoint FILE] [--out FILE] [--maps DIR] [--help] ..."
DESCRIPTION = "Classify images: records to standard output, in the order of the images; all else to standard error."
EPILOG = """\
exit codes: 0 all images classified, 2 usage or configuration, 3 some images failed, 4 none succeeded;
128 + N stopped by signal N (130 Ctrl-C, 143 termination, 141 the reader of the output went away)

examples:
  predict.py photo.jpg                                 one image, with the CIFAR-10 weights that come along
  predict.py photos --recursive --out labels.csv       a tree of folders; --resume goes on if it was stopped
  predict.py 'photos/**/*.jpg' --maps maps             and where the model looked
  find / -name '*.png' -print0 | predict.py - --format jsonl | jq .
"""


class Parser(argparse.ArgumentParser):
    """argparse's; what a shell made of ``*`` may be anyone's names, which move no terminal."""

    def error(self, message: str) -> NoReturn:
        from vit.records import printable

        super().error(printable(message))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        "predict.py", usage=USAGE, description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    p.add_argument("sources", metavar="SOURCE", nargs="*", help="image, folder, glob, or - for paths on standard input")
    p.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="model.safetensors, .ckpt, a timm name, a folder of timm or transformers [the shipped CIFAR-10 weights]",
    )
    p.add_argument("--recursive", action="store_true", help="search folders with their subfolders")
    p.add_argument("--classes", action="store_true", help="print the class names and stop")

    group = p.add_argument_group("records")
    group.add_argument("--top-k", metavar="N", type=positive, default=5, help="classes in a record [5]")
    group.add_argument("--threshold", metavar="P", type=share, help="mark records with a best score below P as unsure")
    group.add_argument("--format", choices=FORMATS, help="format of the records [by --out's ending, or table]")
    group.add_argument("--out", metavar="FILE", help="write them here; until all are there they are in FILE.partial")
    group.add_argument("--resume", action="store_true", help="go on behind the last record of --out (jsonl and csv)")

    group = p.add_argument_group("maps")
    group.add_argument("--maps", metavar="DIR", help="a map for each image, in folders like theirs, and sheet.png")
    group.add_argument(
        "--score-maps", action="store_true",
        help="add map_score to each record: how far its map can be trusted, -1 to 1, 0 is chance (slow: 34 passes)",
    )  # fmt: skip
    group.add_argument("--method", choices=METHODS, help="how maps are made [rollout; lrp where a class is named]")
    group.add_argument("--target", metavar="CLASS", help="what speaks for this class [the one predicted]")
    group.add_argument("--against", metavar="CLASS", help="... rather than for this one: why --target, and not it")
    group.add_argument("--report", metavar="FILE.html", help="a page: 200 images to look into, figures of each class")

    group = p.add_argument_group("speed")
    group.add_argument(
        "--batch-size", metavar="N", type=positive, help="images computed at once; 1: each as it comes [64; GPU 256]"
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... [auto]")
    group.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="bfloat16 moves scores by up to about 0.03, labels not; maps are always float32 [auto: bfloat16 if the "
        "hardware has it]",
    )
    group.add_argument("--workers", metavar="N", type=positive, help="threads that decode [one a core]")
    group.add_argument(
        "--engine", choices=("local", "ray"), default="local",
        help="ray: --workers processes [one a GPU or core] of the cluster at RAY_ADDRESS, or of this machine [local]",
    )  # fmt: skip
    group.add_argument(
        "--shard",
        metavar="I/N",
        type=shard,
        default=(1, 1),
        help="part I of N (1 to N); blocks of 64 images are dealt out in turn",
    )
    return p


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def share(text: str) -> float:
    """A number in [0, 1]."""
    hint = ""
    with suppress(ValueError):
        number = float(text.removesuffix("%"))
        if 0 <= number <= 1 and not text.endswith("%"):
            return number
        hint = f"; {number:g} % is {number / 100:g}" if 0 <= number <= 100 else ""
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1{hint}")


def shard(text: str) -> tuple[int, int]:
    """I and N of ``I/N``."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 1/4")
    return int(part), int(parts)


def main(args: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    standard_streams()
    args = sys.argv[1:] if args is None else args
    split = args.index("--") if "--" in args else len(args)
    try:
        options = parser().parse_intermixed_args(args[:split])
        options.sources += args[split + 1 :]  # argparse takes them for options again where none stands before "--"
        check(options)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    return run(options)


def check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together; choose the format."""
    error = parser().error
    if not options.sources and not options.classes:
        error("name at least one image, folder or glob (or - to read paths)")
    for name in ("out", "maps", "report"):
        if getattr(options, name) == "":
            error(f"--{name} has an empty name")
    if options.out == "-":
        options.out = None
    given = [(name, getattr(options, name)) for name in ("out", "maps", "report") if getattr(options, name)]
    if os.path.isfile(options.checkpoint or ""):  # a folder, or a name of timm's, may be that of the maps too
        given.append(("checkpoint", options.checkpoint))
    for (name, one), (other, same) in combinations(given, 2):
        if os.path.realpath(one) == os.path.realpath(same):
            error(f"--{name} {one} and --{other} {same} are the same; each needs a name of its own")
    if options.format is None:
        ending = os.path.splitext(options.out or "")[1].removeprefix(".").lower()
        if ending not in ENDINGS:
            known = ", ".join(f".{name}" for name in ENDINGS if name)
            error(f"--out {options.out}: .{ending} is the ending of no known format; use {known}, or name a --format")
        options.format = ENDINGS[ending]
    if options.format == "parquet" and not options.out:
        error("--format parquet needs --out FILE")
    if options.format == "parquet" and not find_spec("pyarrow"):
        error("--format parquet needs pyarrow: pip install pyarrow")
    if options.report and not options.report.lower().endswith((".html", ".htm")):
        error(f"--report {options.report}: it is a page for a browser, whose name ends in .html")
    if options.engine == "ray" and not (find_spec("ray") and find_spec("pyarrow")):
        error("--engine ray needs ray: pip install 'ray[data]'")
    if options.method and not (options.maps or options.report or options.score_maps):
        error("--method says how maps are made; ask for some: --maps DIR, --report FILE.html or --score-maps")
    if options.target is None and options.against is not None:
        error(f"--against {options.against} needs a --target to set it against")
    if options.target is not None:
        if not (options.maps or options.score_maps):
            error("--target says which class maps are about; ask for some: --maps DIR or --score-maps")
        if options.report:
            error("--target is for --maps and --score-maps: the page of --report has a switch for the class")
        if options.method and options.method not in CLASS_SPECIFIC:
            error(f"--method {options.method} is the same for every class; --target needs {', '.join(CLASS_SPECIFIC)}")
    options.method = options.method or ("rollout" if options.target is None else CLASS_METHOD)
    if options.resume and not (options.out and resumable(options)):
        error("--resume needs --out FILE with --format jsonl or csv")


def script() -> NoReturn:
    """The command as a process: all is closed once it is stopped, and images that are still decoded are of no use."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    code = main()
    if code > 128:  # else Python would wait for them, or show where a second signal met it
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    script()
