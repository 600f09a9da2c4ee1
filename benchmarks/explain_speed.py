"""What a map costs: logits and map against the plain fused forward, in turns: ``python -m benchmarks.explain_speed``.

``times`` is the median of the turns' ratios, with the middle half of them as its spread. Memory is the peak of a
process (CPU) or of the device's allocator (GPU) that does one thing once, less what stood before it.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from vit.model import VisionTransformer
from vit.rollout import METHODS, attention_map

MODELS: dict[str, tuple[dict[str, Any], int]] = {  # arguments, batch
    "128/4 @32": (dict(image_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4), 64),
    "ViT-Ti/16 @224": (dict(image_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3), 8),
    "ViT-S/16 @224": (dict(image_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6), 8),
    "ViT-S/16 @384": (dict(image_size=384, patch_size=16, embed_dim=384, depth=12, num_heads=6), 8),
    "ViT-S/14 @518": (dict(image_size=518, patch_size=14, embed_dim=384, depth=12, num_heads=6), 8),
}
COLUMNS = ("model", "batch", "method", "images/s", "times", "spread", "MiB")


def prepare(name: str, options: argparse.Namespace) -> tuple[VisionTransformer, torch.Tensor]:
    torch.manual_seed(0)
    arguments, batch = MODELS[name]
    side = arguments["image_size"]
    model = VisionTransformer(**arguments).eval().to(options.device)
    return model, torch.randn(batch * options.batch_factor, 3, side, side, device=options.device)


def act(method: str, model: VisionTransformer, images: torch.Tensor, precision: str) -> None:
    """One pass: plain inference, or logits and map."""
    with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        _ = model(images) if method == "forward" else attention_map(model, images, method=method)


def seconds(name: str, methods: list[str], options: argparse.Namespace) -> dict[str, list[float]]:
    """Times of each method, all taking turns, backwards every other turn."""
    model, images = prepare(name, options)
    sync = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
    times: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(options.warm_up + options.repeat):
        for method in methods[:: 1 if turn % 2 else -1]:
            sync()
            start = time.perf_counter()
            act(method, model, images, options.precision)
            sync()
            if turn >= options.warm_up:
                times[method].append(time.perf_counter() - start)
    return times


def peak(name: str, method: str, options: argparse.Namespace) -> float:
    """MiB that one pass adds; run in a process of its own."""
    model, images = prepare(name, options)
    act("forward", model, images[:1], options.precision)  # what libraries set up for themselves
    if options.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        act(method, model, images, options.precision)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    act(method, model, images, options.precision)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeat", type=int, default=7, help="timed turns of each method")
    parser.add_argument("--warm-up", type=int, default=1, help="turns before that")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-factor", type=int, default=1, help="multiplies the batches, which suit a small CPU")
    parser.add_argument("--name", default="explain_speed", help="of the result file")
    options = parser.parse_args(args)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        methods = ["forward", *options.methods]
        times = seconds(name, methods, options)
        batch = MODELS[name][1] * options.batch_factor
        for method in methods:
            with multiprocessing.get_context("spawn").Pool(1) as process:  # a fresh one, whose peak is this pass's
                memory = process.apply(peak, (name, method, options))
            ratios = [slow / fast for fast, slow in zip(times["forward"], times[method], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            rows.append({
                "model": name,
                "batch": batch,
                "method": method,
                "images/s": round(batch / statistics.median(times[method]), 2),
                "times": round(statistics.median(ratios), 3),
                "spread": f"{low:.2f}-{high:.2f}",
                "MiB": round(memory),
            })  # fmt: skip
    table = Table(*COLUMNS, title=f"Logits and map; times: as long as the fused forward ({options.precision})")
    for row in rows:
        table.add_row(*(str(row[column]) for column in COLUMNS))
    Console(width=100).print(table)
    facts = {"repeat": options.repeat, "warm_up": options.warm_up, "precision": options.precision}
    print(record(options.name, rows, **facts))


if __name__ == "__main__":
    main()
