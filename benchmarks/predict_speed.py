"""From image files to a CSV, ours beside timm's: ``CIFAR10_JPEG=FOLDER python -m benchmarks.predict_speed``.

timm's side does what its ``inference.py`` does (which is not in the package): ``create_dataset``, ``create_loader``
with the prefetcher and two worker processes, the model in float32 under inference mode, softmax, top-k, a CSV at the
end. Ours is ``predict.py``'s own ``main``. Same weights, files and batch size. The two take turns, each in a fresh
process whose imports are over before the clock starts. Memory is the largest sum over a process and its children of
what each holds, pages they share counted once (PSS), looked at twice a second.

The weights are random, with a head fitted to the images by least squares, so that the classes are told apart.
"""

import argparse
import csv
import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import time
import warnings
from contextlib import redirect_stderr, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

import predict
from benchmarks.record import record
from vit.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vit.model import VisionTransformer
from vit.preprocess import SUFFIXES, Preprocess

WIDTH: dict[str, Any] = dict(embed_dim=192, depth=12, num_heads=3)  # ViT-Ti
JOBS = ("ours", "timm", "ours float32")
TOP_K = 5


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=os.environ.get("CIFAR10_JPEG"), help="CLASS/*.jpg [%(default)s]")
    parser.add_argument("--small", type=int, default=10_000, help="images at 32 pixels, patches of 4 [%(default)s]")
    parser.add_argument("--large", type=int, default=400, help="photos of 1.2 megapixels at 224 pixels [%(default)s]")
    parser.add_argument("--turns", type=int, default=3, help="[%(default)s]; ours in float32 takes only one")
    parser.add_argument("--batch-size", type=int, default=64, help="of both [%(default)s]")
    options = parser.parse_args(args)
    if options.images is None:
        parser.error("--images names a folder of images")
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    sources = [path for path in sorted(options.images.rglob("*")) if path.suffix.lower() in SUFFIXES]
    sources = sources[:: max(1, len(sources) // options.small)][: options.small]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size, patch in ((32, 4), (224, 16)):
            images, weights = Path(folder, f"{size}"), Path(folder, f"{size}.safetensors")
            (copies if size == 32 else photos)(sources if size == 32 else spread(sources, options.large), images)
            fit(weights, size, patch, spread(sorted((images / "all").iterdir()), 500))
            kind = "CIFAR-10, 32 pixels" if size == 32 else "1.2 megapixel JPEG, 224 pixels"
            rows.append({"images": kind, **compare(images, weights, options.turns, options.batch_size)})
    table = Table("", *(str(row["images"]) for row in rows))
    for name in list(rows[0])[1:]:
        table.add_row(name, *(str(row[name]) for row in rows))
    Console().print(table)
    facts = {"turns": options.turns, "batch size": options.batch_size, "model": "ViT-Ti, patches of 4 and 16 pixels"}
    print(record("predict_speed", rows, **facts))


def spread(paths: list[Path], count: int) -> list[Path]:
    """So many of them, from all over."""
    return paths[:: max(1, len(paths) // count)][:count]


def copies(sources: list[Path], folder: Path) -> None:
    """One flat folder, as timm's reader wants it, of files that are called by number and class."""
    (folder / "all").mkdir(parents=True)
    for i, source in enumerate(sources):
        shutil.copy(source, folder / "all" / f"{i:06}-{source.parent.name}{source.suffix}")


def photos(sources: list[Path], folder: Path) -> None:
    """JPEG files the size of photographs, with grain, so that decoding costs what it costs."""
    (folder / "all").mkdir(parents=True)
    grain = np.random.default_rng(0).normal(0, 6, (960, 1280, 3))
    for i, source in enumerate(sources):
        with Image.open(source) as image:
            pixels = np.asarray(image.convert("RGB").resize((1280, 960), Image.Resampling.BICUBIC)) + grain
        file = folder / "all" / f"{i:06}-{source.parent.name}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)


@torch.inference_mode()
def fit(path: Path, size: int, patch: int, images: list[Path]) -> None:
    """Write a checkpoint: random layers, and the head that tells the classes of these images apart best."""
    names = tuple(sorted({image.stem.partition("-")[2] for image in images}))
    model = VisionTransformer(image_size=size, patch_size=patch, num_classes=len(names), **WIDTH).eval()
    preprocess = Preprocess(image_size=(size, size), mean=(0.5,) * 3, std=(0.25,) * 3)
    batches = torch.stack([preprocess.load(image) for image in images]).split(50)
    head, model.head = model.head, torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    features = torch.cat([model(preprocess.normalize(batch)) for batch in batches])
    spread = features.std(0)
    inputs = torch.cat([(features - features.mean(0)) / spread, torch.ones(len(features), 1)], 1)
    labels = torch.tensor([names.index(image.stem.partition("-")[2]) for image in images])
    ridge = len(images) * 0.1 * torch.eye(inputs.shape[1])
    targets = 10 * torch.nn.functional.one_hot(labels, len(names)).float()
    solution = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ targets)
    head.weight.copy_((solution[:-1] / spread[:, None]).T)
    head.bias.copy_(solution[-1] - head.weight @ features.mean(0))
    model.head = head
    about = Checkpoint(architecture=model.architecture, class_names=names, preprocess=preprocess)
    save_checkpoint(path, model.state_dict(), about)


def compare(images: Path, weights: Path, turns: int, batch_size: int) -> dict[str, object]:
    """Medians of images a second, peak memory, and how often the labels agree."""
    count = sum(1 for _ in (images / "all").iterdir())
    rates: dict[str, list[float]] = {name: [] for name in JOBS}
    memory: dict[str, float] = dict.fromkeys(JOBS, 0)
    labels: dict[str, dict[str, str]] = {}
    for turn in range(turns):
        for name in JOBS if turn == 0 else JOBS[:2][:: 1 if turn % 2 == 0 else -1]:
            out = images / f"{name}.csv"
            seconds, peak = alone(name, images, weights, out, batch_size)
            rates[name].append(count / seconds)
            memory[name] = max(memory[name], peak)
            labels[name] = labels_of(out)
    ratios = [a / b for a, b in zip(rates["ours"], rates["timm"], strict=True)]

    def agreement(name: str) -> float:
        return round(sum(labels[name][file] == label for file, label in labels["timm"].items()) / count, 4)

    return {
        "count": count,
        **{f"{name}, images/s": round(statistics.median(rates[name]), 1) for name in JOBS},
        "ratio, ours to timm": round(statistics.median(ratios), 2),
        "ratios": ", ".join(f"{ratio:.2f}" for ratio in ratios),
        "label agrees with timm": agreement("ours"),
        "label agrees with timm, float32": agreement("ours float32"),
        "labels seen": len(set(labels["timm"].values())),
        **{f"{name}, peak memory, MB": round(memory[name]) for name in JOBS},
    }


def alone(name: str, images: Path, weights: Path, out: Path, batch_size: int) -> tuple[float, float]:
    """Seconds and megabytes of one job in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=job, args=(there, name, images, weights, out, batch_size))
    process.start()
    there.close()
    peak = 0.0
    while not here.poll(0.5):
        peak = max(peak, tree_memory(process.pid or 0))
    seconds = here.recv()
    process.join()
    return seconds, peak


def job(there: Any, name: str, images: Path, weights: Path, out: Path, batch_size: int) -> None:
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    if name == "timm":
        timm(images, weights, out, batch_size)
    else:
        ours(images, weights, out, batch_size, "float32" if name == "ours float32" else "auto")
    there.send(time.perf_counter() - begin)


def tree_memory(process: int) -> float:
    """Megabytes that a process and its children hold."""
    total = 0
    with suppress(OSError):  # it has ended
        total = int(re.findall(r"^Pss:\s*(\d+)", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)[0])
        for task in Path(f"/proc/{process}/task").iterdir():
            children = (task / "children").read_text().split()
            total += sum(tree_memory(int(child)) * 1024 for child in children)
    return total / 1024


def ours(images: Path, weights: Path, out: Path, batch_size: int, precision: str) -> None:
    options = ["--checkpoint", str(weights), "--precision", precision, "--batch-size", str(batch_size)]
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        code = predict.main([str(images / "all"), "--device", "cpu", "--out", str(out), *options])
    if code:
        raise RuntimeError(f"predict.py ended with {code}")


TIMM_NAMES = {"image_size": "img_size"} | {
    name: name
    for name in ("patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
}


@torch.inference_mode()
def timm(images: Path, weights: Path, out: Path, batch_size: int) -> None:
    ours, about = load_checkpoint(weights)
    model = TimmVisionTransformer(
        **{TIMM_NAMES[name]: value for name, value in about.architecture.items() if name in TIMM_NAMES}
    ).eval()
    model.load_state_dict(ours.state_dict(), strict=True)
    preprocess = about.preprocess
    dataset: Any = create_dataset("", root=str(images))
    loader = create_loader(
        dataset,
        input_size=(3, *preprocess.image_size),
        batch_size=batch_size,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        num_workers=2,
        crop_pct=preprocess.crop,
        device=torch.device("cpu"),
    )
    rows: list[list[object]] = []
    names = dataset.filenames(basename=True)
    for pixels, _ in loader:
        scores, labels = model(pixels).softmax(-1).topk(TOP_K)
        for values, indices in zip(scores.tolist(), labels.tolist(), strict=True):
            pairs = (cell for i, v in zip(indices, values, strict=True) for cell in (about.class_names[i], f"{v:.6f}"))
            rows.append([names[len(rows)], *pairs])
    with out.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label_1"], *rows])


def labels_of(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        return {Path(row[0]).name: row[1] for row in islice(csv.reader(file), 1, None)}


if __name__ == "__main__":
    main()
