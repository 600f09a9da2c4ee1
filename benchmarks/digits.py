"""The whole path on scikit-learn's digits: train, test beside two classics, classify image files, see.

``python -m benchmarks.digits`` is ``make demo``; ``--seeds 5`` repeats the training and writes
benchmarks/results/digits.json. The test split is the same fifth of the images for all three classifiers.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

import predict
import train
from benchmarks.record import record
from data.sources import Source, Split, load_source
from vit.checkpoint import load_checkpoint

CONFIG = "configs/digits.yaml"
SHOWN = 40  # held-out digits that are written as image files and classified by predict.py


def pixels(split: Split) -> Tensor:
    """The images (N, 1, 8, 8), uint8; digits are always in memory."""
    assert isinstance(split.images, Tensor)
    return split.images


def classics(source: Source) -> dict[str, float]:
    """Test accuracy of logistic regression and of a support vector machine with an RBF kernel, on the pixels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MaxAbsScaler
    from sklearn.svm import SVC

    assert source.test is not None
    train_x, test_x = (pixels(split).flatten(1).numpy() for split in (source.train, source.test))
    models = {
        "logistic regression": make_pipeline(MaxAbsScaler(), LogisticRegression(max_iter=2000)),
        "SVM, RBF kernel": make_pipeline(MaxAbsScaler(), SVC(gamma="scale")),
    }
    return {
        name: float(model.fit(train_x, source.train.labels.numpy()).score(test_x, source.test.labels.numpy()))
        for name, model in models.items()
    }


def fit(seed: int, folder: Path) -> tuple[float, float]:
    """Train with one seed; test accuracy of the best weights and seconds of training."""
    started = time.perf_counter()
    common = ["--config", CONFIG, "--seed_everything", str(seed), "--trainer.default_root_dir", str(folder)]
    if code := train.main(["fit", *common]):
        raise SystemExit(code)
    seconds = time.perf_counter() - started
    model, about = load_checkpoint(folder / "model.safetensors")
    test = load_source("digits").test
    assert test is not None
    with torch.inference_mode():
        predicted = model(about.preprocess.normalize(pixels(test))).argmax(1)
    return float((predicted == test.labels).float().mean()), seconds


def write_digits(source: Source, folder: Path) -> None:
    """Some held-out digits as PNG files named by their class."""
    assert source.test is not None
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(SHOWN):
        label = source.class_names[int(source.test.labels[i])]
        Image.fromarray(pixels(source.test)[i, 0].numpy()).save(folder / f"{i:03d}_is_{label}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="number of trainings; the median is shown (default: 1)")
    parser.add_argument("--folder", type=Path, default=Path("runs/digits"), help="where everything is written")
    args = parser.parse_args()
    console = Console()
    source = load_source("digits")

    console.rule("1  train")
    runs = [fit(seed, args.folder) for seed in range(args.seeds)]
    accuracies, seconds = [accuracy for accuracy, _ in runs], statistics.median(seconds for _, seconds in runs)
    rows = {"this vision transformer": statistics.median(accuracies), **classics(source)}
    table = Table("held-out digits", "accuracy", title="")
    for name, accuracy in rows.items():
        table.add_row(name, f"{accuracy:.3f}")
    console.print(table)
    console.print(f"trained in {seconds:.0f} s")
    if args.seeds > 1:
        figures = [{"classifier": name, "test_accuracy": accuracy} for name, accuracy in rows.items()]
        written = record("digits", figures, seeds=accuracies, seconds=[round(seconds, 1) for _, seconds in runs])
        console.print(f"{args.seeds} seeds, {min(accuracies):.3f} to {max(accuracies):.3f}; written to {written}")

    console.rule("2  classify")
    write_digits(source, args.folder / "images")
    command = [
        str(args.folder / "images"),
        *("--checkpoint", str(args.folder / "model.safetensors"), "--top-k", "3"),
        *("--maps", str(args.folder / "maps"), "--report", str(args.folder / "report.html")),
    ]
    console.print(f"[bold]python predict.py {' '.join(command)}", soft_wrap=True)
    if code := predict.main(command):
        return code

    console.rule("3  see")
    console.print(f"where it looked, all on one sheet:  {args.folder / 'maps' / 'sheet.png'}")
    console.print(f"the same to explore in a browser:   {args.folder / 'report.html'}")
    console.print("next: your own images, one folder a class:")
    console.print("  .venv/bin/python train.py fit --config configs/folder.yaml --data.dataset FOLDER", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
