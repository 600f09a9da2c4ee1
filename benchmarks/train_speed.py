"""Images a second in training, four ways side by side: ``python -m benchmarks.train_speed --config FILE``.

For each resolution of the config, in turns in one run: this project's run under Lightning, its data path and
augmentation included; the same steps on the same data in a bare loop; our model and timm's on one batch that is always
there. At full resolution also what people use today: timm's model in a bare loop, its images read by torchvision's
ImageFolder and transforms in worker processes. Shows how long steps wait for data, augmentation included, what
Lightning adds to a step, what share of the matrix products' speed, measured in the same run, a step reaches, and how
many minutes the config takes.

On a GPU, where every model has to be compiled for every resolution, timm's takes part at full resolution alone, and in
the config's precision alone.

Further arguments change the config, as in train.py: ``--model.embed_dim 384``. ``--grow`` instead shows how it grows:
image size (64 tokens each), batch, workers, processes.
"""

import argparse
import contextlib
import json
import logging
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice, pairwise, repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks.record import record
from data.datamodule import Batch, ImageDataModule
from vit.classifier import ViTClassifier, compiler_fault
from vit.cli import TrainCLI
from vit.device import has_bfloat16
from vit.info import flops
from vit.memory import keep_freed_memory
from vit.optim import build_optimizer

WARMUP, STEPS = 4, 16  # steps of each turn
GPU_WARMUP, GPU_STEPS = 20, 100
LEFT_OUT = {"accumulate_grad_batches": (1,), "limit_train_batches": (None, 1, 1.0), "callbacks": (None, [])}


def steps_of(device: torch.device) -> tuple[int, int]:
    """Steps of each turn that do not count, and that do."""
    return (GPU_WARMUP, GPU_STEPS) if device.type == "cuda" else (WARMUP, STEPS)


@dataclass
class Speed:
    """Of one turn: median seconds of a step, and the share of all steps' time that was spent waiting for images."""

    seconds: float
    waiting: float

    @classmethod
    def of(cls, starts: list[Any], ready: list[Any], device: torch.device) -> "Speed":
        """From the moments when steps began to ask for their images, and when they had them; one more start ends it."""
        now(device)
        first = steps_of(device)[0]
        steps = [between(a, b) for a, b in pairwise(starts)][first:]
        waits = [between(a, b) for a, b in zip(starts, ready, strict=False)][first : first + len(steps)]
        return cls(statistics.median(steps), sum(waits) / sum(steps))


def now(device: torch.device) -> float:
    """The time when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def moment(device: torch.device) -> Any:
    """Now; on a GPU when it comes to this point of its work, for which the host does not wait."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(a: Any, b: Any) -> float:
    """Seconds from one moment to another; both must have come."""
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1000


class Clock(Callback):
    """When each step of a Lightning run asked for its images, and when it had them on the device."""

    def __init__(self, file: str | None = None) -> None:
        self.file = file
        self.starts: list[Any] = []
        self.ready: list[Any] = []
        self.device = torch.device("cpu")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.device = pl_module.device
        self.starts.append(moment(self.device))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.ready.append(moment(self.device))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.starts.append(moment(self.device))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.file and trainer.is_global_zero:
            Path(self.file).write_text(json.dumps({"speed": vars(self.speed), "memory": peak_memory(self.device)}))

    @property
    def speed(self) -> Speed:
        return Speed.of(self.starts, self.ready, self.device)


def held_at(model: ViTClassifier, factor: float, compiles: bool | None = None) -> ViTClassifier:
    """The config's model, at one resolution throughout; compiled as in the config, or as asked for."""
    arguments: dict[str, Any] = {
        name: value for name, value in model.hparams.items() if name != "_instantiator"
    }  # LightningCLI's own
    arguments["resolution"] = [] if factor == 1 else [(1.0, factor)]
    if compiles is not None:
        arguments["compile"] = compiles
    return ViTClassifier(**arguments)


def bare_trainer(cli: Any, callback: Callback, **limits: Any) -> Trainer:
    """Lightning's trainer as the config has it, but nothing validated, logged or saved."""
    given = cli.config.trainer
    for name, usual in LEFT_OUT.items():
        if given[name] not in usual:
            raise SystemExit(f"trainer.{name} {given[name]}: what is measured here would go without; leave it out")
    names = ("accelerator", "devices", "strategy", "gradient_clip_val", "benchmark")
    return Trainer(
        **{name: given[name] for name in names},
        precision="32-true" if given.precision == "bf16-mixed" and not in_bf16(cli) else given.precision,
        **limits,
        callbacks=[callback],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tempfile.gettempdir(),
    )


def in_bf16(cli: Any) -> bool:
    """Whether the config's trainer computes in bfloat16; as in train.py, where the hardware has it."""
    return "bf16" in str(cli.config.trainer.precision) and has_bfloat16(device_of(cli))


def device_of(cli: Any) -> torch.device:
    """Where the config's trainer computes."""
    cpu = cli.config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    return torch.device("cpu" if cpu else "cuda")


def under_lightning(cli: Any, model: ViTClassifier, file: str | None = None) -> Speed | None:
    """The real run of this model; of several processes the speed is in the file alone."""
    clock = Clock(file)
    steps = sum(steps_of(device_of(cli)))
    bare_trainer(cli, clock, max_steps=steps, max_epochs=-1).fit(model, cli.datamodule)
    cli.datamodule.trainer = None
    return clock.speed if clock.starts else None


def loop(
    batches: Iterator[tuple[Tensor, Tensor]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable[[Tensor], Tensor],
    smoothing: float,
    bf16: bool,
) -> Speed:
    """Training without any framework: the least that a step can take."""
    device = next(model.parameters()).device
    # Without the cache, as Lightning has it: a compiled network depends on it and would be compiled a second time.
    autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if bf16 else contextlib.nullcontext()
    starts, ready = [moment(device)], []
    model.train()
    for images, labels in islice(batches, sum(steps_of(device))):
        ready.append(moment(device))
        with autocast:
            loss = F.cross_entropy(step(images).float(), labels, label_smoothing=smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        starts.append(moment(device))
    return Speed.of(starts, ready, device)


def epochs_of(module: ImageDataModule, device: torch.device, epochs: float = math.inf) -> Iterator[Batch]:
    """Batches without end, as in a run under Lightning of so many epochs: the same loader, each in another order."""
    module.device = device
    for epoch in count():
        loader = module.train_dataloader()
        module.order.position = lambda epoch=epoch: (epoch, 0)
        for batch in loader:
            yield module.augmented(module.transfer_batch_to_device(batch, device, 0), epoch / epochs)


def worker_batches(folder: Path, size: Any, batch: int, workers: int, device: torch.device) -> Iterator[Any]:
    """The usual input pipeline: torchvision reads, crops, mirrors, recolours and erases image by image, in workers."""
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomCrop(size, padding=size[0] // 8),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.2, 0.2, 0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.25] * 3),
            v2.RandomErasing(0.3),
        ]
    )
    images = torchvision.datasets.ImageFolder(str(folder), transform)
    loader = DataLoader(
        images,
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    while True:
        for pixels, labels in loader:
            yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def timm_model(model: Any, side: tuple[int, int]) -> nn.Module:
    """timm's model of the same size, with its own patch embedding: it has no convolutional stem, nor ``rope``."""
    a = model.architecture
    return TimmVisionTransformer(
        img_size=side,
        patch_size=a["patch_size"],
        in_chans=model.in_chans,
        num_classes=model.num_classes,
        embed_dim=a["embed_dim"],
        depth=a["depth"],
        num_heads=a["num_heads"],
        mlp_ratio=a["mlp_ratio"],
        qkv_bias=a["qkv_bias"],
        class_token=False,
        global_pool="avg",
        qk_norm=a["qk_norm"],
        init_values=a["init_values"],
        drop_path_rate=a["drop_path_rate"],
    )


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product, median of ten."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    moments = [moment(device)]
    for _ in range(13):
        torch.mm(a, b)
        moments.append(moment(device))
    now(device)
    return 2 * size**3 / statistics.median(between(a, b) for a, b in pairwise(moments[3:]))


def load(config: str, dataset: str, *more: str) -> Any:
    """The config's model and data, without its trainer."""
    cli = TrainCLI(
        ViTClassifier,
        ImageDataModule,
        args=["--config", config, "--data.dataset", dataset, "--trainer.logger=false", *more],
        run=False,
        auto_configure_optimizers=False,
        seed_everything_default=0,
    )
    cli.datamodule.prepare_data()
    cli.datamodule.setup()
    return cli


def compare(cli: Any, dataset: str, turns: int, workers: int) -> Iterator[tuple[list[dict[str, Any]], float]]:
    """After each resolution: a line for it and each way, and the minutes of the config's steps up to here."""
    device = device_of(cli)
    bf16 = in_bf16(cli)
    cli.datamodule.augment = replace(cli.datamodule.augment, mix_until=1.0)  # throughout: it is the dearer part
    top = peak(device, torch.bfloat16 if bf16 else torch.float32)
    size, batch, smoothing = cli.datamodule.image_size, cli.datamodule.batch_size, cli.model.label_smoothing
    total = len(cli.datamodule.train) // batch * cli.config.trainer.max_epochs
    minutes, previous = 0.0, 0.0
    for until, factor in [*cli.model.resolution, (1.0, 1.0)]:
        side = (round(size[0] * factor), round(size[1] * factor))
        images = torch.randn(batch, cli.model.vit.in_chans, *side, device=device)
        labels = torch.randint(cli.model.vit.num_classes, (batch,), device=device)
        model, other = held_at(cli.model, factor), timm_model(cli.model.vit, side).to(device)
        network = torch.compile(other, dynamic=False) if cli.model.compiles else other

        def ours(batches: Callable[[], Iterator[Any]], model: ViTClassifier = model) -> Speed:
            model.to(device)  # Lightning leaves it on the host
            optimizer = build_optimizer(model.vit, **model.optimizer)
            return loop(batches(), model, optimizer, model.network, smoothing, bf16)

        def timm(
            batches: Callable[[], Iterator[Any]], bf16: bool, model: nn.Module = other, step: Any = network
        ) -> Speed:
            return loop(batches(), model, torch.optim.AdamW(model.parameters(), fused=True), step, smoothing, bf16)

        def same_data(side: tuple[int, int] = side) -> Iterator[Any]:
            for batch in epochs_of(cli.datamodule, device):
                scaled = (
                    F.interpolate(batch.images, side, mode="bilinear", antialias=True) if list(side) != size else None
                )
                yield batch.images if scaled is None else scaled, batch.labels

        one_batch = partial(repeat, (images, labels))
        ways: dict[str, Callable[[], Any]] = {
            "this project, under Lightning": partial(under_lightning, cli, model),
            "the same steps, bare loop": partial(ours, same_data),
            "our model, one batch": partial(ours, one_batch),
        }
        if cli.model.compiles and device.type == "cpu":  # what compiling gives, and whether it is worth its minutes
            ways["our model, one batch, uncompiled"] = partial(ours, one_batch, held_at(cli.model, factor, False))
        if factor == 1 or device.type == "cpu":
            ways["timm's model, one batch"] = partial(timm, one_batch, bf16)
        if factor == 1 and Path(dataset).is_dir():
            folder = Path(dataset) / "train"
            for precision in {bf16, False} if device.type == "cpu" else {bf16}:
                name = f"timm + torchvision, {workers} workers" + (", bf16" if precision else ", fp32")
                ways[name] = partial(timm, partial(worker_batches, folder, size, batch, workers, device), precision)
        taken: dict[str, list[Speed]] = {name: [] for name in ways}
        for turn in range(turns):
            for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
                taken[name].append(ways[name]())
        first = [speed.seconds for speed in taken["this project, under Lightning"]]
        minutes += (until - previous) * total * statistics.median(first) / 60
        work = 3 * flops(cli.model.vit, side)
        rows = []
        for name, speeds in taken.items():
            rate = batch / statistics.median(speed.seconds for speed in speeds)
            ratios = [speed.seconds / mine for speed, mine in zip(speeds, first, strict=True)]
            rows.append(
                {
                    "pixels": f"{side[0]}x{side[1]}",
                    "share of steps": round(until - previous, 3),
                    "way": name,
                    "images/s": round(rate),
                    "ours, times as fast": round(statistics.median(ratios), 2),
                    "of the turns": f"{min(ratios):.2f}-{max(ratios):.2f}",
                    "waiting for data": round(statistics.median(speed.waiting for speed in speeds), 3),
                    "of matmul peak": round(rate * work / top, 3),
                }
            )
        previous = until
        yield rows, minutes


def quiet() -> None:
    """Without the hints of Lightning that are for its users."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def peak_memory(device: torch.device) -> float:
    """Of this process, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()  # unlike getrusage it does not count what the parent held
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def one(config: str, dataset: str, setting: dict[str, int], file: str) -> None:
    """Run the project at one setting and leave the speed and peak memory of its first process in the file."""
    quiet()
    keep_freed_memory()
    size, processes = setting["size"], setting["processes"]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    more = [f"--data.image_size={size}", f"--data.batch_size={setting['batch'] // processes}"]
    more += [f"--data.num_workers={setting['workers']}", f"--model.patch_size={size // 8}", "--model.resolution=[]"]
    cli = load(config, dataset, *more)
    if processes > 1:
        cli.config.trainer["devices"], cli.config.trainer["strategy"] = processes, "ddp_spawn"
    under_lightning(cli, cli.model, file)


def growth(config: str, dataset: str) -> list[dict[str, Any]]:
    """The run at other sizes, each in a process of its own, so that the peak memory is its own."""
    usual = {"size": 32, "batch": 64, "workers": 2, "processes": 1}
    settings = [usual | {"size": size} for size in (32, 64, 128, 224)]
    settings += [usual | {"batch": batch} for batch in (128, 512)]
    settings += [usual | {"size": 128, "workers": 1}]
    settings += [usual | {"processes": 2}] if torch.cuda.device_count() != 1 else []  # one GPU takes one process
    rows = []
    for setting in settings:
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=context) as process:
            file = str(Path(folder, "speed.json"))
            process.submit(one, config, dataset, setting, file).result()
            measured = json.loads(Path(file).read_text())
        speed, memory = Speed(**measured["speed"]), measured["memory"]
        rows.append(setting | {"images/s": round(setting["batch"] / speed.seconds)})
        rows[-1] |= {"waiting for data": round(speed.waiting, 3), "peak memory (GiB)": round(memory, 2)}
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/cifar10_cpu.yaml")
    parser.add_argument("--data", default=os.environ.get("CIFAR10_JPEG", "cifar10"), help="data set or folder")
    parser.add_argument("--turns", type=int, default=3, help="times that each is measured; the median counts")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of torchvision's pipeline")
    parser.add_argument("--grow", action="store_true", help="other image sizes, batches, workers and processes")
    parser.add_argument("--name", help="of the result file; default: train_speed, or with --grow train_growth")
    options, more = parser.parse_known_args()
    quiet()
    torch.set_float32_matmul_precision("high")  # both as train.py does; all ways have the good of it
    keep_freed_memory()
    if options.grow:
        rows = growth(options.config, options.data)
        show(rows)
        print(record(options.name or "train_growth", rows, config=options.config))
        return
    cli = load(options.config, options.data, *more)
    if cli.model.compiles and (fault := compiler_fault(device_of(cli))):
        raise SystemExit(
            f"nothing can be compiled here ({fault}), which the config asks for: add --model.compile=false"
        )
    facts = {"config": options.config, "batch": cli.datamodule.batch_size, "turns": options.turns}
    rows, minutes = [], 0.0
    for more_rows, minutes in compare(cli, options.data, options.turns, options.workers):
        rows += more_rows
        file = record(options.name or "train_speed", rows, **facts, minutes=round(minutes, 1))  # what is done is kept
    show(rows)
    print(f"the whole config: {minutes:.1f} minutes without validation")
    print(file)


if __name__ == "__main__":
    main()
