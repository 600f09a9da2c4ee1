"""How long one waits before anything happens: ``python -m benchmarks.startup``.

Each command is a process of its own, run in turns; the first turn fills the file cache and does not count.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.record import record

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import vit": ["-c", "import vit"],
    "predict.py --help": ["predict.py", "--help"],
    "import torch": ["-c", "import torch"],
    "import timm": ["-c", "import timm"],
    "from vit import Predictor": ["-c", "from vit import Predictor"],
    "predict.py, one image": ["predict.py", "docs/cifar10.png"],
    "train.py --help": ["train.py", "--help"],
}


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7, help="timed turns of each command")
    options = parser.parse_args(args)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(options.repeat + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
            if turn:
                times[name].append(time.perf_counter() - start)
    rows = [
        {"command": name, "median": round(statistics.median(taken), 3), "slowest": round(max(taken), 3)}
        for name, taken in times.items()
    ]
    table = Table("command", "median (s)", "slowest (s)")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    print(record("startup", rows, unit="s", repeat=options.repeat))


if __name__ == "__main__":
    main()
