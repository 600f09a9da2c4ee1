"""From image files to a CSV, ours beside timm's: ``python -m benchmarks.predict_speed --images FOLDER``.

timm's side is what its ``inference.py`` does: ``create_dataset``, ``create_loader`` with two worker processes, the
model, softmax and top-k, a CSV; ours is ``predict.py``'s own ``main``. Same weights, same files, same process; imports
are done before. The two take turns.
"""

import argparse
import csv
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
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
COLUMNS = ("images", "count", "ours, images/s", "ours float32", "timm, images/s", "ratio", "top-1 agrees")
CLASSES = 10
BATCH = 64


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=Path, required=True, help="folder of small images, such as CIFAR-10's test set"
    )
    parser.add_argument("--checkpoint", type=Path, help="weights of a 32-pixel model of --images [random]")
    parser.add_argument("--small", type=int, default=2000, help="images at 32 pixels [2000]")
    parser.add_argument("--large", type=int, default=200, help="photos of 1.2 megapixels, at 224 pixels [200]")
    parser.add_argument("--turns", type=int, default=3, help="[3]")
    options = parser.parse_args(args)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    sources = list(
        islice((p for p in sorted(options.images.rglob("*")) if p.suffix.lower() in SUFFIXES), options.small)
    )
    table, rows = Table(*COLUMNS), []
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        copy(sources, small)
        photos(sources[: options.large], large)
        for name, images, size, patch in (("32 px JPEG", small, 32, 4), ("1.2 megapixel JPEG", large, 224, 16)):
            path = Path(folder, f"{size}.safetensors")
            if size == 32 and options.checkpoint:
                path = options.checkpoint
            else:
                random_weights(path, size, patch)
            row = {"images": name, **compare(images, path, options.turns)}
            rows.append(row)
            table.add_row(*(f"{row[column]}" for column in COLUMNS))
    Console().print(table)
    print(record("predict_speed", rows, turns=options.turns, batch=BATCH, model="ViT-Ti, patches of 4 and 16 pixels"))


def copy(sources: list[Path], folder: Path) -> None:
    """One flat class folder, as timm's reader wants it, of files with names of their own."""
    (folder / "all").mkdir(parents=True)
    for i, source in enumerate(sources):
        shutil.copy(source, folder / "all" / f"{i:06}{source.suffix}")


def photos(sources: list[Path], folder: Path) -> None:
    """JPEG files the size of photographs, with grain, so that decoding costs what it costs."""
    (folder / "all").mkdir(parents=True)
    grain = np.random.default_rng(0).normal(0, 6, (960, 1280, 3))
    for i, source in enumerate(sources):
        with Image.open(source) as image:
            pixels = np.asarray(image.convert("RGB").resize((1280, 960), Image.Resampling.BICUBIC)) + grain
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "all" / f"{i:06}.jpg", quality=90)


def random_weights(path: Path, size: int, patch: int) -> None:
    model = VisionTransformer(image_size=size, patch_size=patch, num_classes=CLASSES, **WIDTH)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    preprocess = Preprocess(image_size=(size, size), mean=(0.5,) * 3, std=(0.25,) * 3)
    names = tuple(f"{i}" for i in range(CLASSES))
    save_checkpoint(
        path, model.state_dict(), Checkpoint(architecture=model.architecture, class_names=names, preprocess=preprocess)
    )


def compare(images: Path, checkpoint: Path, turns: int) -> dict[str, object]:
    """Medians of images a second, and the share of images with the same label."""
    model, about = load_checkpoint(checkpoint)
    theirs = TimmVisionTransformer(
        **{{"image_size": "img_size"}.get(k, k): v for k, v in about.architecture.items() if k in TIMM_ARGUMENTS}
    ).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    jobs: dict[str, Callable[[Path], None]] = {
        "ours": lambda out: ours(images, checkpoint, out, "auto"),
        "float32": lambda out: ours(images, checkpoint, out, "float32"),
        "timm": lambda out: timm(images, theirs, about, out),
    }
    count = sum(1 for _ in (images / "all").iterdir())
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(turns):
        for name in list(jobs)[:: 1 if turn % 2 == 0 else -1]:
            begin = time.perf_counter()
            jobs[name](images / f"{name}.csv")
            rates[name].append(count / (time.perf_counter() - begin))
    middle = {name: statistics.median(values) for name, values in rates.items()}
    labels = {name: labels_of(images / f"{name}.csv") for name in jobs}
    agreeing = sum(labels["ours"][path] == label for path, label in labels["timm"].items())
    ratios = [a / b for a, b in zip(rates["ours"], rates["timm"], strict=True)]
    return {
        "count": count,
        "ours, images/s": round(middle["ours"], 1),
        "ours float32": round(middle["float32"], 1),
        "timm, images/s": round(middle["timm"], 1),
        "ratio": round(statistics.median(ratios), 2),
        "top-1 agrees": round(agreeing / count, 4),
    }


TIMM_ARGUMENTS = ("image_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio")


def ours(images: Path, checkpoint: Path, out: Path, precision: str) -> None:
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        options = ["--checkpoint", str(checkpoint), "--precision", precision, "--batch-size", str(BATCH)]
        code = predict.main([str(images / "all"), "--out", str(out), *options])
    if code:
        raise RuntimeError(f"predict.py ended with {code}")


@torch.inference_mode()
def timm(images: Path, model: torch.nn.Module, about: Checkpoint, out: Path) -> None:
    pre = about.preprocess
    dataset: Any = create_dataset("", root=str(images))
    loader = create_loader(
        dataset,
        input_size=(3, *pre.image_size),
        batch_size=BATCH,
        use_prefetcher=False,
        interpolation=pre.interpolation,
        mean=pre.mean,
        std=pre.std,
        num_workers=2,
        crop_pct=pre.crop,
        device=torch.device("cpu"),
    )
    rows: list[list[object]] = []
    names = dataset.filenames(basename=True)
    for pixels, _ in loader:
        scores, labels = model(pixels).softmax(-1).topk(5)
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
