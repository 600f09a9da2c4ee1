"""What ``vit.memory.keep_freed_memory`` is worth in a program that predicts: ``python -m benchmarks.freed_memory``.

It cannot be taken back, so processes with it and without take turns. Each passes one batch of noise through a model of
random weights in float32 several times, and gives the median time and the most memory it held.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from vit.memory import keep_freed_memory
from vit.model import VisionTransformer

ROOT = Path(__file__).parent.parent
WARM_UP, PASSES = 2, 9
MODELS = {  # image size, patch size, width, heads, batch
    "128/4 @32": (32, 4, 128, 4, 64),
    "ViT-Ti/16 @224": (224, 16, 192, 3, 8),
    "ViT-S/16 @224": (224, 16, 384, 6, 8),
    "ViT-S/14 @518": (518, 14, 384, 6, 2),
}


def passes(name: str, keep: bool) -> dict[str, float]:
    """Median seconds of a pass of this process, and the most memory it held, in MiB."""
    if keep and not keep_freed_memory():
        sys.exit("this C library cannot keep freed memory, or MALLOC_... or GLIBC_TUNABLES in the environment say how")
    size, patch_size, width, heads, batch = MODELS[name]
    model = VisionTransformer(image_size=size, patch_size=patch_size, embed_dim=width, num_heads=heads).eval()
    images, times = torch.randn(batch, 3, size, size), []
    with torch.inference_mode():
        for _ in range(WARM_UP + PASSES):
            start = time.perf_counter()
            model(images)
            times.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": statistics.median(times[WARM_UP:]), "memory": memory}


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="processes of each kind")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "KEEP"), help=argparse.SUPPRESS)  # such a process
    options = parser.parse_args(args)
    if options.one:
        print(json.dumps(passes(options.one[0], options.one[1] == "True")))
        return
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    rows = []
    for name in MODELS:
        found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for _ in range(options.repeat):
            for keep, results in found.items():
                command = [sys.executable, "-m", "benchmarks.freed_memory", "--one", name, str(keep)]
                answer = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
                results.append(json.loads(answer.stdout))
        times = {keep: [result["seconds"] for result in results] for keep, results in found.items()}
        ratios = sorted(without / kept for without, kept in zip(*times.values(), strict=True))
        rows.append(
            {
                "model": name,
                "batch": MODELS[name][-1],
                "ms": round(1000 * statistics.median(times[False]), 1),
                "ms, kept": round(1000 * statistics.median(times[True]), 1),
                "ratio": round(statistics.median(ratios), 2),
                "spread": f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                "MiB": round(statistics.median(result["memory"] for result in found[False])),
                "MiB, kept": round(statistics.median(result["memory"] for result in found[True])),
            }
        )
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    print(record("freed_memory", rows, repeat=options.repeat, passes=PASSES))


if __name__ == "__main__":
    main()
