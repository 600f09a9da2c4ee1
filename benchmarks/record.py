"""Where and with what a figure was measured: every benchmark writes its rows to ``benchmarks/results`` through here.

Where the environment variable BENCHMARK_RESULTS names a folder, they go there: a machine may keep nothing that is
written into the repository.
"""

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")
PACKAGES = ("torch", "torchvision", "timm", "lightning", "pillow")


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def circumstances() -> dict[str, Any]:
    """Device, versions, date and command of this process."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = ["-m", spec.name] if spec else [sys.argv[0]]
    device = {"cpu": cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        device |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return {
        "command": shlex.join(["python", *script, *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": device,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def record(name: str, rows: list[dict[str, Any]], **facts: Any) -> Path:
    """Write a benchmark's figures and how they came about to NAME.json in the folder of the results.

    Args:
        name: Of the benchmark.
        rows: Its table, one entry a line.
        facts: What else a reader must know: units, repetitions, seeds.
    """
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**circumstances(), **facts, "rows": rows}, indent=1) + "\n")
    return path
