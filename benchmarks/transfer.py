"""What pre-training gives: the same model on small real sets, from trained weights and from random ones.

``python -m benchmarks.transfer`` trains both ways on sets with other images, another size and other classes than
CIFAR-10, several seeds each, and writes benchmarks/results: two sets that come with scikit-image and scikit-learn, and
with ``--fashion FOLDER`` Fashion-MNIST, whose files Debian's package dataset-fashion-mnist puts into
/usr/share/datasets/fashion-mnist. ``--pretrained`` is the start, by default the CIFAR-10 weights that come along.
"""

import argparse
import gzip
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression

import train
from benchmarks.record import record
from vit.predictor import SHIPPED, Predictor
from vit.preprocess import ImageError
from vit.pretrained import load_pretrained

SHOTS = 20  # training images of each digit and each kind of clothes
LONGER = 3  # times the epochs in the better of the two recipes


def faces(folder: Path) -> int:
    """skimage's subset of Labeled Faces in the Wild, grey, 25 x 25: 100 faces and 100 patches that are none."""
    from skimage.data import lfw_subset

    images = (lfw_subset() * 255).round().astype(np.uint8)
    for i, image in enumerate(images):
        split = "train" if i % 5 < 2 else "test"  # 80 to learn from, 120 to test on
        save(folder / split / ("face" if i < 100 else "no_face") / f"{i:03d}.png", image)
    return 24


def digits(folder: Path) -> int:
    """scikit-learn's handwritten digits, grey, 8 x 8, enlarged: a few of each to learn from, the rest to test on."""
    from sklearn.datasets import load_digits

    source: Any = load_digits()
    seen = [0] * 10
    for i, (image, label) in enumerate(zip(source.images, source.target, strict=True)):
        seen[label] += 1
        split = "train" if seen[label] <= SHOTS else "test"
        save(folder / split / str(label) / f"{i:04d}.png", (image / 16 * 255).round().astype(np.uint8))
    return 16


def fashion(folder: Path, files: Path) -> int:
    """Fashion-MNIST, grey, 28 x 28, ten kinds of clothes: the first of each to learn from, 200 of each to test on."""
    for split, part in (("train", "train"), ("test", "t10k")):
        images = np.frombuffer(gzip.decompress((files / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
        labels = np.frombuffer(gzip.decompress((files / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
        of_class = [np.flatnonzero(labels == label) for label in range(10)]
        for label, where in enumerate(of_class):
            for i in where[: SHOTS if split == "train" else 200]:
                save(folder / split / str(label) / f"{i:05d}.png", images.reshape(-1, 28, 28)[i])
    return 28


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).convert("RGB").save(path)


def accuracy(run: Path, test: Path) -> float:
    """Share of the test images whose class the run's model names."""
    predictor = Predictor.from_checkpoint(run / "model.safetensors", device="cpu")
    files = sorted(test.glob("*/*.png"))
    answers = predictor.predict_iter(files)
    right = [not isinstance(a, ImageError) and a.label == f.parent.name for a, f in zip(answers, files, strict=True)]
    return sum(right) / len(right)


def fit(folder: Path, run: Path, size: int, seed: int, start: list[str], epochs: int) -> tuple[float, float]:
    """Train once; test accuracy and seconds."""
    started = time.perf_counter()
    code = train.main(
        [
            *("fit", "--config", "configs/finetune.yaml", "--seed_everything", str(seed), *start),
            *("--data.dataset", str(folder), "--data.image_size", str(size), "--data.batch_size", "20"),
            *("--data.val_fraction", "0", "--data.root", str(folder.parent / "cache")),  # settings are not tuned here
            *("--trainer.default_root_dir", str(run), "--trainer.max_epochs", str(epochs)),
            *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", "bf16-mixed"),
            *("--trainer.enable_progress_bar", "false"),
            *("--trainer.check_val_every_n_epoch", str(epochs), "--checkpoint.monitor", "null"),
        ]
    )
    if code:
        raise SystemExit(code)
    return accuracy(run, folder / "test"), time.perf_counter() - started


def probe(start: str, folder: Path) -> tuple[float, float]:
    """A logistic regression of the features, which nothing of chance is in; test accuracy and seconds."""
    started, predictor = time.perf_counter(), Predictor.from_checkpoint(start, device="cpu")
    features, labels = {}, {}
    for split in ("train", "test"):
        files = sorted((folder / split).glob("*/*.png"))
        features[split] = np.stack([found for found in predictor.features_iter(files) if isinstance(found, np.ndarray)])
        labels[split] = [file.parent.name for file in files]
    model = LogisticRegression(max_iter=1000).fit(features["train"], labels["train"])
    return float(model.score(features["test"], labels["test"])), time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default=str(SHIPPED), help="what to start from (default: the shipped weights)")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each kind (default: 5)")
    parser.add_argument("--epochs", type=int, default=30, help="of each training (default: 30)")
    parser.add_argument("--folder", type=Path, default=Path("runs/transfer"), help="where images and runs are written")
    parser.add_argument("--fashion", type=Path, help="folder of Fashion-MNIST's four .gz files (default: leave it out)")
    args = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    model, about = load_pretrained(args.pretrained)
    architecture: dict[str, Any] = {
        name: value
        for name, value in model.architecture.items()
        if name not in ("image_size", "in_chans", "num_classes", "drop_path_rate") and value is not None
    }
    scratch = ["--model.pretrained", "null"]
    for name, value in architecture.items():
        text = list(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else value
        scratch += [f"--model.{name}", str(text)]
    muon = ["--model.optimizer", "muon", "--model.muon_lr", "0.02", "--model.lr", "0.004"]
    ways = {
        "fine-tuned": ["--model.pretrained", args.pretrained],
        f"fine-tuned, Muon, {LONGER} x the epochs": ["--model.pretrained", args.pretrained, *muon],
        "linear probe": ["--model.pretrained", args.pretrained, "--model.freeze", "true", "--model.lr", "0.01"],
        "from scratch": [*scratch, "--model.layer_decay", "1"],
        f"from scratch, Muon, {LONGER} x the epochs": [*scratch, "--model.layer_decay", "1", *muon],
    }
    rows = []
    tasks: dict[str, Callable[[Path], int]] = {"faces": faces, "digits": digits}
    if args.fashion:
        tasks["fashion"] = partial(fashion, files=args.fashion)
    for task, write in tasks.items():
        size = write(args.folder / task)
        for way, start in {**ways, "logistic regression of the features": []}.items():
            epochs = args.epochs * (LONGER if "Muon" in way else 1)
            runs = [
                fit(args.folder / task, args.folder / f"{task}_run", size, seed, start, epochs)
                for seed in range(args.seeds if start else 0)
            ] or [probe(args.pretrained, args.folder / task)]
            accuracies = [found for found, _ in runs]
            rows.append(
                {
                    "task": task,
                    "way": way,
                    "test_accuracy": statistics.mean(accuracies),
                    "spread": statistics.stdev(accuracies) if len(runs) > 1 else 0.0,
                    "accuracies": accuracies,
                    "seconds": statistics.median(seconds for _, seconds in runs),
                }
            )
    table = Table("task", "way", "test accuracy", "min", "max", "s")
    for row in rows:
        low, high = min(row["accuracies"]), max(row["accuracies"])
        shown = f"{row['test_accuracy']:.3f} ± {row['spread']:.3f}"
        table.add_row(row["task"], row["way"], shown, f"{low:.3f}", f"{high:.3f}", f"{row['seconds']:.0f}")
    Console().print(table)
    start = {"file": Path(args.pretrained).name, "metrics": about.metrics, "training": about.training}
    print("written to", record("transfer", rows, seeds=args.seeds, epochs=args.epochs, pretrained=start))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
