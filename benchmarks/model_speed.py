"""Forward and training step, ours beside timm's same model with the same weights: ``python -m benchmarks.model_speed``.

The two take turns, and who goes first alternates, so that a machine which slows down slows both; the ratio is the
median of the turns' ratios, with the middle half of them as its spread.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.record import record
from vit.model import VisionTransformer

MODELS = {  # arguments of ours, batch
    "ViT-Ti/16 @224": (dict(image_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3), 8),
    "ViT-S/16 @224": (dict(image_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6), 4),
    "128/4 @32": (dict(image_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=2), 128),
    "192/4 @32": (dict(image_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3), 128),
    "384/4 @32": (dict(image_size=32, patch_size=4, embed_dim=384, depth=6, num_heads=6), 64),
    "192/4 @32, mean pooled": (
        dict(image_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, pool="mean"),
        128,
    ),
}
COLUMNS = ("model", "batch", "precision", "step", "ours", "timm", "ratio", "spread", "ours, math")


def two_of(arguments: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Our model and timm's with the same weights."""
    ours = VisionTransformer(**arguments)
    same = {k: v for k, v in arguments.items() if k != "image_size"}
    if same.pop("pool", "token") == "mean":
        same |= {"global_pool": "avg", "class_token": False}
    theirs = TimmVisionTransformer(img_size=arguments["image_size"], **same)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def forward(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    with torch.inference_mode():
        model.eval()(images)


def training(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model.train()(images).float(), labels).backward()
    model.zero_grad()


def seconds(jobs: dict[str, Callable[[], None]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Times of each job, all taking turns, backwards every other turn."""
    sync = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(options.warm_up + options.repeat):
        for name in list(jobs)[:: 1 if turn % 2 else -1]:
            sync()
            start = time.perf_counter()
            jobs[name]()
            sync()
            if turn >= options.warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def compare(
    arguments: dict[str, Any], batch: int, precision: str, step: Callable[..., None], options: argparse.Namespace
) -> dict[str, Any]:
    """One line of the table."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    ours, theirs = (model.to(device) for model in two_of(arguments))
    images = torch.randn(batch, 3, arguments["image_size"], arguments["image_size"], device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)

    def run(model: nn.Module, attention: AbstractContextManager) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"), attention:
            step(model, images, labels)

    jobs = {
        "ours": lambda: run(ours, nullcontext()),
        "timm": lambda: run(theirs, nullcontext()),
        "ours, math": lambda: run(ours, sdpa_kernel(SDPBackend.MATH)),  # attention by plain matrix products
    }
    times = seconds(jobs, options)
    ratios = [slow / fast for fast, slow in zip(times["ours"], times["timm"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "batch": batch,
        "precision": precision,
        "step": step.__name__,
        **{name: round(batch / statistics.median(taken), 1) for name, taken in times.items()},
        "ratio": round(statistics.median(ratios), 3),
        "spread": f"{low:.2f}-{high:.2f}",
    }


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9, help="timed turns of each job")
    parser.add_argument("--warm-up", type=int, default=2, help="turns before that")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-factor", type=int, default=1, help="multiplies the batches, which suit a small CPU")
    options = parser.parse_args(args)
    rows = [
        {"model": name, **compare(arguments, batch * options.batch_factor, precision, step, options)}
        for name, (arguments, batch) in MODELS.items()
        for precision in ("fp32", "bf16")
        for step in (forward, training)
    ]
    table = Table(*COLUMNS, title="images/s; ratio: ours to timm's, above 1 is faster")
    for row in rows:
        table.add_row(*(str(row[column]) for column in COLUMNS))
    Console(width=120).print(table)
    print(record("model_speed", rows, unit="images/s", repeat=options.repeat, warm_up=options.warm_up))


if __name__ == "__main__":
    main()
