"""What a map costs: logits and map against the plain fused forward, in turns: ``python -m benchmarks.explain_speed``.

Each method takes turns with the forward pass alone, on a CPU in a process of its own, as where nothing else is asked
for. A turn is two batches, of which the second is timed: with the caches and the memory that the first one left, as in
a run of many. ``times`` is the median of the turns' ratios, with the middle half of them as its spread; the forward
pass beside itself shows what chance does. On a shared machine images/s of two rows do not compare, as they were
measured one after the other. Memory is the peak of a process (CPU) or of the device's allocator (GPU) that does one
thing once, less what stood before it; ``limit`` is 1.3 times that of the forward pass and a matrix of N x N floats for
each layer and image. Where fast-vit-rollout is installed it takes part, with timm's model of the same weights (whose
attention it needs unfused) and nothing discarded; ``difference`` is the largest one between its rollout and ours.
"""

import argparse
import importlib.util
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from vit.memory import keep_freed_memory
from vit.model import VisionTransformer
from vit.rollout import METHODS, attention_map

MODELS: dict[str, tuple[dict[str, Any], int, int]] = {  # arguments, batch, turns for each that is asked for
    "128/4 @32": (dict(image_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4), 64, 10),
    "ViT-Ti/16 @224": (dict(image_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3), 8, 10),
    "ViT-S/16 @224": (dict(image_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6), 8, 4),
    "ViT-S/16 @384": (dict(image_size=384, patch_size=16, embed_dim=384, depth=12, num_heads=6), 8, 1),
    "ViT-S/14 @518": (dict(image_size=518, patch_size=14, embed_dim=384, depth=12, num_heads=6), 8, 1),
}
COLUMNS = ("model", "batch", "method", "images/s", "times", "spread", "MiB", "limit MiB")
OTHER = "fast-vit-rollout"
Work = Callable[[torch.Tensor], Any]


def prepare(name: str, options: argparse.Namespace) -> tuple[VisionTransformer, torch.Tensor]:
    torch.manual_seed(0)
    arguments, batch, _ = MODELS[name]
    side = arguments["image_size"]
    model = VisionTransformer(**arguments).eval().to(options.device)
    return model, torch.randn(batch * options.batch_factor, 3, side, side, device=options.device)


def work(method: str, model: VisionTransformer) -> Work:
    """What one pass does: plain inference, or logits and map."""
    if method == OTHER:
        return other(model)
    if method == "forward":
        return model
    return lambda images: attention_map(model, images, method=method)[1]


def other(model: VisionTransformer) -> Work:
    """fast-vit-rollout on timm's model with our weights; rollout of the class token."""
    import timm.models.vision_transformer as theirs
    from fast_vit_rollout import ViTAttentionRollout  # pyright: ignore[reportMissingImports]

    a = model.architecture
    same = {key: a[key] for key in ("patch_size", "num_classes", "embed_dim", "depth", "num_heads")}
    twin = theirs.VisionTransformer(img_size=a["image_size"], **same).to(model.pos_embed.device).eval()
    twin.load_state_dict(model.state_dict())
    blocks: Any = twin.blocks
    for block in blocks:
        block.attn.fused_attn = False
    explain = ViTAttentionRollout(twin, discard_ratio=0.0)
    return lambda images: explain(images)[:, 0, 1:]  # pyright: ignore


def once(run: Work, images: torch.Tensor, precision: str) -> Any:
    """One pass."""
    with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return run(images)


def seconds(name: str, method: str, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Times of the forward pass and of the method, taking turns, in the other order every other turn."""
    keep_freed_memory()  # as predict.py does; both have the good of it
    model, images = prepare(name, options)
    runs = (model, work(method, model))
    sync = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(options.warm_up + options.repeat * MODELS[name][2]):
        for i in (0, 1) if turn % 2 else (1, 0):
            once(runs[i], images, options.precision)
            sync()
            start = time.perf_counter()
            once(runs[i], images, options.precision)
            sync()
            if turn >= options.warm_up:
                times[i].append(time.perf_counter() - start)
    return times


def difference(name: str, options: argparse.Namespace) -> float:
    """Largest difference between the other's rollout and ours, as shares of the map, on an image."""
    model, images = prepare(name, options)
    ours = once(work("rollout", model), images[:1], "fp32").flatten(1)
    theirs = once(other(model), images[:1], "fp32").to(ours.device)
    return float((theirs / theirs.sum(1, keepdim=True) - ours).abs().max())


def peak(name: str, method: str, options: argparse.Namespace) -> float:
    """MiB that one pass adds; run in a process of its own."""
    keep_freed_memory()
    model, images = prepare(name, options)
    once(model, images[:1], options.precision)  # what libraries set up for themselves
    run = work(method, model)
    if options.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(run, images, options.precision)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = resident("VmRSS")
    once(run, images, options.precision)
    return (resident("VmHWM") - before) / 2**10


def apart(function: Callable[..., Any], name: str, method: str, options: argparse.Namespace) -> Any:
    """What a function gives, on a CPU in a fresh process: memory and caches are this one's work alone."""
    if options.device.startswith("cuda"):
        return function(name, method, options)
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(function, (name, method, options))


def resident(which: str) -> int:
    """KiB of this process in memory: VmRSS now, VmHWM at most. (getrusage's peak begins with that of the parent.)"""
    return int(re.findall(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def matrices(name: str, options: argparse.Namespace) -> float:
    """MiB of a matrix of N x N floats for each layer and image."""
    a, batch, _ = MODELS[name]
    tokens = (a["image_size"] // a["patch_size"]) ** 2 + 1
    return 4 * batch * options.batch_factor * a["depth"] * tokens**2 / 2**20


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeat", type=int, default=4, help="timed turns of each method; small models take more")
    parser.add_argument("--warm-up", type=int, default=1, help="turns before that")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-factor", type=int, default=1, help="multiplies the batches, which suit a small CPU")
    parser.add_argument("--name", default="explain_speed", help="of the result file")
    options = parser.parse_args(args)
    rows: list[dict[str, Any]] = []
    installed = importlib.util.find_spec("fast_vit_rollout") is not None
    differences = {name: difference(name, options) for name in options.models} if installed else {}
    for name in options.models:
        plain = 0.0
        batch = MODELS[name][1] * options.batch_factor
        for method in ("forward", *options.methods, *([OTHER] if installed else [])):
            fast, slow = apart(seconds, name, method, options)
            memory = apart(peak, name, method, options)
            plain = memory if method == "forward" else plain
            ratios = [each / beside for beside, each in zip(fast, slow, strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            rows.append({
                "model": name,
                "batch": batch,
                "method": method,
                "images/s": round(batch / statistics.median(slow), 2),
                "times": round(statistics.median(ratios), 3),
                "spread": f"{low:.2f}-{high:.2f}",
                "MiB": round(memory),
                "limit MiB": round(1.3 * plain + matrices(name, options)),
            })  # fmt: skip
            print(rows[-1], flush=True)
    table = Table(*COLUMNS, title=f"Logits and map; times: as long as the fused forward ({options.precision})")
    for row in rows:
        table.add_row(*(str(row[column]) for column in COLUMNS))
    Console(width=100).print(table)
    facts = {"difference": differences} if differences else {}
    facts |= {"repeat": options.repeat, "warm_up": options.warm_up, "precision": options.precision}
    print(record(options.name, rows, **facts))


if __name__ == "__main__":
    main()
