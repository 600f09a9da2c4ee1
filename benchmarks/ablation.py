"""What each ingredient of the CIFAR-10 recipe gives: ``python -m benchmarks.ablation --data FOLDER``.

Trains ``configs/cifar10_cpu.yaml`` for two epochs, with crops, mirror images and blanked squares alone, and again
with one thing changed each time, a thread a run, and compares accuracies on the held-out validation images. All get the
same time: where a change makes steps dearer, there are fewer of them. Several seeds of each show what chance does. The
test images are not looked at.
"""

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, record

CONFIG = "configs/cifar10_cpu.yaml"
EMA = "lightning.pytorch.callbacks.EMAWeightAveraging"
RANDOM = "random first convolution"  # as torch makes it; no option, as nobody should want it
CODE = "import torch, vit.model; vit.model.whitening = lambda *size: torch.nn.Conv2d(*size[1::-1], size[2:]).weight; "
BASE = {"policy": "0", "mixup": "0", "cutmix": "0"}  # what these are for, two epochs do not need
# Name of each change: its steps as a share of the base run's, and its options.
CHANGES: dict[str, tuple[float, list[str]]] = {
    "the recipe": (1, []),
    "AdamW alone at 2e-3, without Muon": (1, ["--model.optimizer=adamw", "--model.lr=2e-3"]),
    "AdamW alone at 6e-3": (1, ["--model.optimizer=adamw", "--model.lr=6e-3"]),
    "all steps at full resolution, as many as fit": (0.65, ["--model.resolution=[]"]),
    "linear stem": (1, ["--model.stem=linear"]),
    RANDOM: (1, []),
    "class token instead of mean pooling": (1, ["--model.pool=token"]),
    "no QK-norm": (1, ["--model.qk_norm=false"]),
    "no rotary positions": (1, ["--model.rope=false"]),
    "batches of 512 instead of 128": (0.25, ["--data.batch_size=512"]),
    "moving average of the weights, 0.99": (1, [f"--trainer.callbacks+={EMA}", "--trainer.callbacks.decay=0.99"]),
    "no drop path": (1, ["--model.drop_path_rate=0"]),
    "learning rate along a cosine instead of a line": (1, ["--model.schedule=cosine"]),
    "label smoothing 0.1": (1, ["--model.label_smoothing=0.1"]),
    "crops and mirror images alone": (1, ["--data.augment.erase=0"]),
    "crops of 35 % or more, resized, instead of shifts": (
        1,
        ["--data.augment.crop=0.35", "--data.augment.translate=0"],
    ),
    "a policy change in every image": (1, ["--data.augment.policy=1"]),
    "mixup 0.2 and cutmix 0.3 in the first epoch": (
        1,
        ["--data.augment.mixup=0.2", "--data.augment.cutmix=0.3", "--data.augment.mix_until=0.5"],
    ),
}


def trained(folder: Path, options: list[str], code: str = "") -> tuple[float, float]:
    """Train once, in a process of its own with one thread: validation accuracy at the end, and minutes of its time.

    Args:
        folder: Of the run, which is made.
        options: Of ``train.py fit``.
        code: Run before it.
    """
    folder.mkdir()
    command = [sys.executable, "-c", code + "import sys, train; sys.exit(train.main())", "fit", *options]
    command += ["--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false"]
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
        _, status, used = os.wait4(process.pid, 0)  # the minutes of this process alone
    if status:
        raise SystemExit(f"{shlex.join(command)}:\n{log.read_text()[-2000:]}")
    with (folder / "metrics.csv").open() as file:
        accuracies = [row["val/acc"] for row in csv.DictReader(file) if row["val/acc"]]
    return float(accuracies[-1]), (used.ru_utime + used.ru_stime) / 60


def fit(folder: Path, name: str, *, data: str, steps: int, seed: int) -> tuple[float, float]:
    """Train the config with one change."""
    share, changes = CHANGES[name]
    steps = round(steps * share)
    options = ["--config", CONFIG, "--seed_everything", str(seed), "--data.dataset", data]
    options += ["--checkpoint.monitor", "null", "--trainer.max_epochs", "-1", "--trainer.max_steps", str(steps)]
    options += ["--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", str(steps)]
    options += [f"--data.augment.{part}={value}" for part, value in BASE.items()]
    return trained(folder, [*options, *changes], CODE if name == RANDOM else "")


def measure(rows: list[dict[str, Any]], fit: Callable[[Path, str], tuple[float, float]], jobs: int) -> None:
    """Add to each row what a run of its name gives; so many run side by side."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(fit, Path(scratch, str(i)), row["what"]) for i, row in enumerate(rows)]
        for row, run in zip(rows, runs, strict=True):
            accuracy, minutes = run.result()
            row["seeds"].append(accuracy)
            row["core_minutes"].append(minutes)
            row["accuracy"] = statistics.mean(row["seeds"])
            print(row, flush=True)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table of accuracies."""
    table = Table("", "validation accuracy", "seeds", "core-minutes")
    for row in rows:
        each = ", ".join(f"{value:.1%}" for value in row["seeds"])
        table.add_row(row["what"], f"{row['accuracy']:.1%}", each, f"{statistics.mean(row['core_minutes']):.1f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("CIFAR10_JPEG", "cifar10"), help="cifar10, or a folder of it")
    parser.add_argument("--steps", type=int, default=702, help="of the base run; 351 are an epoch")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, at least one")
    parser.add_argument("--go-on", action="store_true", help="add to the seeds that the result file has, till --seeds")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=CHANGES, help="these alone")
    parser.add_argument("--name", default="ablation", help="of the result file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side, a thread each")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")

    names = args.only or list(CHANGES)
    rows: list[dict[str, Any]] = [{"what": name, "accuracy": 0.0, "seeds": [], "core_minutes": []} for name in names]
    facts = {"config": CONFIG, "steps": args.steps, "base": BASE, "images": 5000, "data": os.path.basename(args.data)}
    path = RESULTS / f"{args.name}.json"
    if args.go_on:
        before = json.loads(path.read_text())
        if {key: before[key] for key in facts} != facts or [row["what"] for row in before["rows"]] != names:
            parser.error(f"{path} is of other runs than these: leave out --go-on, or name another file with --name")
        rows = before["rows"]
    for seed in range(len(rows[0]["seeds"]), args.seeds):
        measure(rows, partial(fit, data=args.data, steps=args.steps, seed=seed), args.jobs)
        path = record(args.name, rows, **facts)  # after each seed: who stops here has the table so far
    show(rows)
    print(path)


if __name__ == "__main__":
    main()
