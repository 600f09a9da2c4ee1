"""Ten times the images, the same memory: ``CIFAR10_JPEG=FOLDER python -m benchmarks.predict_scale``.

Hard links of real images in nested folders, classified by ``predict.py`` into a JSONL file, in a process of its own.
The model is tiny: what is measured is all around it, the paths, the decoding and the records. The memory is the peak
resident set that the kernel keeps for that process (VmHWM); ``predict.py`` has no others. The seconds are those it
tells, from the first path to the last record; the CPU seconds those of the whole process, imports included: a busy
machine changes them less.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from vit.checkpoint import Checkpoint, save_checkpoint
from vit.model import VisionTransformer
from vit.preprocess import SUFFIXES, Preprocess

ROOT = Path(__file__).parent.parent
FOLDER = 500  # images in a folder
COLUMNS = ("images", "peak memory, MB", "seconds", "images/s", "CPU seconds", "records", "exit")


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=os.environ.get("CIFAR10_JPEG"), help="[%(default)s]")
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000] * 3, help="[%(default)s]")
    options = parser.parse_args(args)
    if options.images is None:
        parser.error("--images names a folder of images")
    sources = [p for p in sorted(options.images.rglob("*")) if p.suffix.lower() in SUFFIXES]
    table, rows = Table(*COLUMNS), []
    with tempfile.TemporaryDirectory() as folder:
        weights = tiny_model(Path(folder, "model.safetensors"))
        for count in options.counts:
            tree = hard_links(sources[:10_000], count, Path(folder, "images"))
            rows.append(classify(tree, count, weights, Path(folder, "records.jsonl")))
            table.add_row(*(str(rows[-1][column]) for column in COLUMNS))
            shutil.rmtree(tree)
    Console().print(table)
    print(record("predict_scale", rows, model="16 pixels, 2 layers of width 32", peak="VmHWM of predict.py"))


def tiny_model(path: Path) -> Path:
    """Random weights that cost next to nothing."""
    model = VisionTransformer(image_size=16, patch_size=8, num_classes=10, embed_dim=32, depth=2, num_heads=2)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    about = Checkpoint(
        architecture=model.architecture,
        class_names=tuple(f"class {i}" for i in range(10)),
        preprocess=Preprocess(image_size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3),
    )
    return save_checkpoint(path, model.state_dict(), about)


def hard_links(sources: list[Path], count: int, tree: Path) -> Path:
    """So many images in folders of folders, as links to copies of the sources."""
    originals = tree.with_name("originals")
    if not originals.exists():  # copied once: the sources may lie on another file system
        originals.mkdir()
        for i, source in enumerate(sources):
            shutil.copy(source, originals / f"{i}{source.suffix}")
    for i, original in enumerate(islice(cycle(sorted(originals.iterdir())), count)):
        folder = tree / f"{i // FOLDER // 10:03}" / f"{i // FOLDER % 10}"
        if i % FOLDER == 0:
            folder.mkdir(parents=True)
        os.link(original, folder / f"{i:06}{original.suffix}")
    return tree


def classify(tree: Path, count: int, weights: Path, out: Path) -> dict[str, object]:
    """What predict.py needs for a tree of images."""
    command = ["predict.py", str(tree), "--recursive", "--device", "cpu", "--out", str(out)]
    code, memory, cpu, said = watched([*command, "--checkpoint", str(weights)])
    seconds = float(re.findall(r" images in ([\d.]+) s ", said)[0])
    with out.open("rb") as lines:
        records = sum("predictions" in json.loads(line) for line in lines)
    values = (count, round(memory / 1024, 1), seconds, round(count / seconds), round(cpu, 1), records, code)
    return dict(zip(COLUMNS, values, strict=True))


def watched(command: list[str]) -> tuple[int, int, float, str]:
    """Exit code, peak resident memory in kB, CPU seconds and standard error of a Python command.

    The peak is read from the process while it lives: getrusage's would begin with that of its parent.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said)
        peak, done = 0, 0
        while not done:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *(int(kb) for kb in re.findall(r"VmHWM:\s*(\d+) kB", status)), 0)
            time.sleep(0.02)
            done, end, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(end)
        said.seek(0)
        return process.returncode, peak, usage.ru_utime + usage.ru_stime, said.read()


if __name__ == "__main__":
    main()
