"""How accurate in how many minutes: ``python -m benchmarks.race --config configs/cifar10.yaml --epochs 20 60 300``.

Trains a config on all training images, for every number of epochs with several seeds, and measures on the test images,
one view each. To choose a config, ``--choose`` trains on nine tenths and measures on the held-out tenth instead;
further arguments change the config, as in train.py: ``--choose --seeds 1 --model.patch_size 4``. Minutes are those of
the training alone: what the compiler took stands beside them. Then, in the minutes of the longest of these, the
control: CCT-7/3x1, the compact transformer with a convolutional tokenizer (2104.05704), as the package vit-pytorch has
it, on the same data path, with its authors' settings for CIFAR-10: AdamW at 5.5e-4, weight decay 0.06, batches of 128,
cosine with one thirtieth warm-up, label smoothing, random changes, mixup and cutmix in the first 58 %. ``pip install
vit-pytorch`` for that; ``--no-control`` leaves it out.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from itertools import islice, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from timm.optim._optim_factory import create_optimizer_v2
from torch import Tensor, nn

from benchmarks.record import record
from benchmarks.train_speed import bare_trainer, epochs_of, load, now, quiet, show
from data.augment import Augment
from data.datamodule import Draw, ImageDataModule
from vit.classifier import compiler_fault
from vit.memory import keep_freed_memory
from vit.optim import learning_rate

COMPILING = 20  # times the median: a step that takes longer had to wait for the compiler


class Stopwatch(Callback):
    """When each step ended, and before them when the first began; the host waits for the device at the end alone."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.times.append(now(pl_module.device))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.times.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.times[-1] = now(pl_module.device)


def split_time(times: list[float]) -> tuple[float, float]:
    """Seconds of training, and seconds that steps waited for the compiler beyond their own, from the steps' times."""
    steps = [b - a for a, b in pairwise(times)]
    usual = statistics.median(steps)
    compiling = sum(step - usual for step in steps if step > max(1.0, COMPILING * usual))
    return sum(steps) - compiling, compiling


def accuracy(network: Callable[[Tensor], Tensor], module: ImageDataModule, device: torch.device) -> float:
    """Share of the held-out training images, or of the test images where none are held out, that are named right."""
    dataset = module.val if module.val_fraction else module.test
    if dataset is None:
        raise SystemExit(f"{module.dataset}: has no test images")
    right = 0
    with torch.inference_mode():
        for chunk in torch.arange(len(dataset)).split(500):
            batch = dataset[Draw(0, chunk)]
            logits = network(module.preprocess.normalize(batch.images.to(device)))
            right += int((logits.argmax(1).cpu() == batch.labels).sum())
    return right / len(dataset)


def ours(options: Any, epochs: int, seed: int, device: torch.device) -> dict[str, Any]:
    """The config, once, with this many epochs."""
    held_out = 0.1 if options.choose else 0
    cli = load(
        options.config, options.data, f"--seed_everything={seed}", f"--data.val_fraction={held_out}", *options.more
    )
    module = cli.datamodule
    watch = Stopwatch()
    bare_trainer(cli, watch, max_epochs=epochs).fit(cli.model, module)
    return outcome(cli.model.vit.to(device), module, watch.times, device)


def control(options: Any, minutes: float, seed: int, device: torch.device) -> dict[str, Any]:
    """CCT-7/3x1 in this many minutes, once; how many epochs that makes is measured first."""
    augment = Augment(translate=0.125, flip=0.5, policy=1.0, mixup=0.5, cutmix=0.5, mix_until=0.583)
    held_out = 0.1 if options.choose else 0
    settings: dict[str, Any] = {"batch_size": 128, "val_fraction": held_out, "augment": augment, "compile": True}
    module = ImageDataModule(dataset=options.data, seed=seed, **settings)
    module.prepare_data()
    module.setup()
    torch.manual_seed(seed)
    model = cct_7(module.image_size, len(module.class_names)).to(device)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    network = torch.compile(model, dynamic=False) if device.type == "cuda" else model
    module.train_dataloader()
    epoch = len(module.order)
    tried = train(model, network, module, device, steps=min(epoch, 50))
    a_step = statistics.median(b - a for a, b in pairwise(tried))
    model.load_state_dict(start)
    epochs = max(1, round(minutes * 60 / a_step / epoch))
    found = outcome(model, module, train(model, network, module, device, steps=epochs * epoch), device)
    return found | {"compiling": found["compiling"] + split_time(tried)[1]}


def cct_7(image_size: Sequence[int], classes: int) -> nn.Module:
    """CCT-7/3x1 for images of this height and width."""
    cct: Any = import_module("vit_pytorch.cct")
    stem: dict[str, Any] = {"n_conv_layers": 1, "kernel_size": 3, "stride": 1, "padding": 1}
    return cct.cct_7(img_size=tuple(image_size), num_classes=classes, **stem, positional_embedding="learnable")


def train(model: nn.Module, network: Any, module: ImageDataModule, device: torch.device, *, steps: int) -> list[float]:
    """The control's recipe over this many steps; when the first began and each ended."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5.5e-4, weight_decay=0.06)
    factor = learning_rate(total=steps, warmup=steps // 30, shape="cosine")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    times = [now(device)]
    model.train()
    for batch in islice(epochs_of(module, device, steps / len(module.order)), steps):
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):  # as under Lightning
            loss = F.cross_entropy(network(batch.images).float(), batch.labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        times.append(time.perf_counter())
    return [*times[:-1], now(device)]


def outcome(model: nn.Module, module: ImageDataModule, times: list[float], device: torch.device) -> dict[str, Any]:
    """What a run comes to."""
    seconds, compiling = split_time(times)
    steps = len(times) - 1
    return {
        "accuracy": accuracy(model.eval(), module, device),
        "minutes": seconds / 60,
        "compiling": compiling,
        "images/s": steps * module.batch_size / seconds,
        "epochs": steps / len(module.order),
    }


def line(what: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A way's line of the table, from the runs of its seeds."""
    middle = {name: statistics.median(one[name] for one in runs) for name in runs[0]}
    return {
        "what": what,
        "epochs": round(middle["epochs"]),
        "minutes": round(middle["minutes"], 2),
        "compiling (s)": round(max(one["compiling"] for one in runs), 1),  # later runs need not
        "images/s": round(middle["images/s"]),
        "accuracy": round(statistics.mean(one["accuracy"] for one in runs), 4),
        "of the seeds": " ".join(f"{one['accuracy']:.2%}" for one in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/cifar10.yaml")
    parser.add_argument("--data", default=os.environ.get("CIFAR10_JPEG", "cifar10"), help="cifar10, or a folder of it")
    parser.add_argument("--epochs", type=int, nargs="+", default=[20, 60, 300], help="lengths of the run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each length")
    parser.add_argument("--control", action=argparse.BooleanOptionalAction, default=True, help="CCT-7/3x1 too")
    parser.add_argument("--choose", action="store_true", help="measure on a held-out tenth instead of the test images")
    parser.add_argument("--name", default="race", help="of the result file")
    options, options.more = parser.parse_known_args()
    if options.control:
        try:  # now rather than after hours
            cct_7((32, 32), 10)
        except ImportError as error:
            parser.error(f"the control needs the package vit-pytorch ({error}): install it, or pass --no-control")
    quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and (fault := compiler_fault(device)):  # ours would run uncompiled, the control not at all
        raise SystemExit(f"nothing can be compiled here ({fault}): a C compiler and Python's headers are needed")
    torch.set_float32_matmul_precision("high")  # both as train.py does
    keep_freed_memory()
    rows: list[dict[str, Any]] = []

    def add(what: str, run: Callable[[int], dict[str, Any]]) -> float:
        """All seeds of a way; a line, saved anew after each, as the time on the device may end; the minutes."""
        facts = {"config": options.config, "seeds": options.seeds, "data": os.path.basename(options.data)}
        runs: list[dict[str, Any]] = []
        rows.append({})
        for seed in range(options.seeds):
            runs.append(run(seed))
            rows[-1] = line(what, runs)
            record(options.name, rows, images="held out" if options.choose else "test", **facts)
        return statistics.median(one["minutes"] for one in runs)

    minutes = 0.0
    for epochs in options.epochs:
        once = partial(ours, options, epochs, device=device)
        minutes = max(minutes, add(options.config, lambda seed, once=once: once(seed=seed)))
    if options.control:
        add("CCT-7/3x1, its own recipe", lambda seed: control(options, minutes, seed, device))
    show(rows)


if __name__ == "__main__":
    main()
