"""Images a second in training, at each resolution of a config: ``python -m benchmarks.train_speed --config FILE``.

Three ways side by side, interleaved in one run: this project's run under Lightning (its data path and augmentation
included), the same steps in a bare loop over one resident batch, and timm's model in such a loop with AdamW. Gives the
minutes that the whole config takes on this machine.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from benchmarks.record import record
from data.datamodule import ImageDataModule
from train import TrainCLI
from vit.classifier import ViTClassifier
from vit.optim import build_optimizer

WARMUP, STEPS = 3, 12  # steps of each turn


class Clock(Callback):
    """Seconds of each step, from the end of one to the end of the next: waiting for data included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        steps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(steps[WARMUP:])


def under_lightning(cli: TrainCLI, factor: float) -> float:
    """Seconds of a step of the real run, held at one resolution."""
    clock = Clock()
    model = ViTClassifier(**{**cli.model.hparams, "resolution": [] if factor == 1 else [(1.0, factor)]})
    kept = {name: cli.config.trainer[name] for name in ("accelerator", "devices", "precision", "gradient_clip_val")}
    trainer = Trainer(
        **kept,
        callbacks=[clock],
        max_epochs=1,
        limit_train_batches=WARMUP + STEPS + 1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tempfile.gettempdir(),
    )
    trainer.fit(model, cli.datamodule)
    return clock.seconds


def bare(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, bf16: bool) -> float:
    """Seconds of a step on one resident batch, with the same clipping."""
    device = images.device.type
    autocast = torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext()
    times = []
    for _ in range(WARMUP + STEPS):
        start = time.perf_counter()
        with autocast:
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARMUP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/cifar10_cpu.yaml")
    parser.add_argument("--data", default=os.environ.get("CIFAR10_JPEG", "cifar10"), help="data set or folder")
    parser.add_argument("--turns", type=int, default=3, help="times that each is measured; the median counts")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    cli = TrainCLI(
        ViTClassifier,
        ImageDataModule,
        args=["--config", args.config, "--data.dataset", args.data],
        run=False,
        auto_configure_optimizers=False,
        seed_everything_default=0,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = "bf16" in str(cli.config.trainer.precision)
    size, batch = cli.datamodule.image_size, cli.datamodule.batch_size
    stages = [*cli.model.resolution, (1.0, 1.0)]
    rows, minutes, previous = [], 0.0, 0.0
    cli.datamodule.setup()
    a = cli.model.vit.architecture
    per_epoch = len(cli.datamodule.train) // batch
    total = per_epoch * cli.config.trainer.max_epochs
    for until, factor in stages:
        side = tuple(round(s * factor) for s in size)
        images = torch.randn(batch, cli.model.vit.in_chans, *side, device=device)
        labels = torch.randint(cli.model.vit.num_classes, (batch,), device=device)

        def ours(images: Tensor = images, labels: Tensor = labels) -> float:
            model = ViTClassifier(**cli.model.hparams).vit.to(device)
            return bare(model, build_optimizer(model, **cli.model.optimizer), images, labels, bf16)

        def timm(images: Tensor = images, labels: Tensor = labels, side: Any = side) -> float:
            model = TimmVisionTransformer(
                img_size=side,
                patch_size=a["patch_size"],
                in_chans=images.shape[1],
                num_classes=cli.model.vit.num_classes,
                embed_dim=a["embed_dim"],
                depth=a["depth"],
                num_heads=a["num_heads"],
                class_token=False,
                global_pool="avg",
                qk_norm=a["qk_norm"],
            ).to(device)
            return bare(model, torch.optim.AdamW(model.parameters(), fused=True), images, labels, bf16)

        ways: dict[str, Callable[[], float]] = {
            "under Lightning": lambda factor=factor: under_lightning(cli, factor),
            "bare loop": ours,
            "timm, bare loop": timm,
        }
        turns: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.turns):
            for name, way in ways.items():
                turns[name].append(way())
        seconds = {name: statistics.median(values) for name, values in turns.items()}
        minutes += (until - previous) * total * seconds["under Lightning"] / 60
        rows.append(
            {"pixels": f"{side[0]}x{side[1]}", "share of steps": round(until - previous, 3)}
            | {f"images/s, {name}": round(batch / value) for name, value in seconds.items()}
        )
        previous = until
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    Console().print(table)
    print(f"{total:,} steps of {batch} images: {minutes:.1f} minutes without validation")
    written = record("train_speed", rows, config=args.config, batch=batch, steps=total, minutes=round(minutes, 1))
    print(written)


if __name__ == "__main__":
    main()
