"""Maps where the truth is known: ``python -m benchmarks.ground_truth`` (five minutes on two cores).

Nine digits of scikit-learn's stand on a grey canvas, in a grid of 3 x 3; eight are darker than the canvas, one is
brighter, by as much. The class is what the bright one shows, so the evidence lies in its cell and nowhere else, while
the other cells hold evidence for other classes: a model can only be right by attending to that one. It is trained by
train.py; then, on canvases of held-out digits, ``pointing`` is how often a map's largest patch lies in the cell, and
``mass`` the share of the map there. Chance is 1/9 for both. ``untrained`` is the pointing of the same method on random
weights: what it owes to the picture and not to the model. Intervals are 95 %.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms.v2.functional import affine

import train
from benchmarks.faithfulness import BATCH, Maker, ignorant, ours
from benchmarks.record import record
from data.sources import Split, load_source
from vit.checkpoint import load_checkpoint
from vit.model import VisionTransformer

CELLS = 3  # rows and columns of digits
SIDE = 8  # pixels of a digit
CONFIG = "configs/digits.yaml"
CHANGES = {  # to that config: a larger canvas, whose cells must stay where they are
    "model.patch_size": 4,
    "data.batch_size": 128,
    "data.augment.translate": 0,
    "data.augment.rotate": 0,
    "data.augment.scale": 0,
}


def canvases(split: Split, number: int, *, vary: bool, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (number, 24, 24) in uint8, their labels, the cell (0 to 8, row by row) that decides, and its digit.

    Args:
        split: Digits to draw from.
        number: Of canvases.
        vary: Whether each digit is turned, moved and scaled a little, as augmentation does for single ones.
        seed: Of every choice.
    """
    random = np.random.default_rng(seed)
    assert isinstance(split.images, Tensor)
    chosen = torch.from_numpy(random.integers(0, len(split.labels), (number, CELLS**2)))
    digits = split.images[chosen.flatten(), 0].float() / 255  # (number * 9, 8, 8)
    if vary:
        changes = random.uniform(-1, 1, (len(digits), 4))
        digits = torch.stack([
            affine(d[None], 10 * a, [round(x), round(y)], 1 + 0.1 * s, [0.0])[0]
            for d, (a, x, y, s) in zip(digits, changes.tolist(), strict=True)
        ])  # fmt: skip
    cells = torch.from_numpy(random.integers(0, CELLS**2, number))
    signs = torch.full((number, CELLS**2), -1.0)
    signs[torch.arange(number), cells] = 1.0
    tiles = digits.view(number, CELLS, CELLS, SIDE, SIDE) * signs.view(number, CELLS, CELLS, 1, 1)
    pictures = (128 + 127 * tiles).round().clamp(0, 255).to(torch.uint8)
    deciding = chosen[torch.arange(number), cells]
    pictures = pictures.permute(0, 1, 3, 2, 4).reshape(number, CELLS * SIDE, CELLS * SIDE)
    return pictures, split.labels[deciding], cells, deciding


def write(folder: Path, images: Tensor, labels: Tensor) -> None:
    """One PNG an image, in folders named by class."""
    for label in labels.unique().tolist():
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        Image.fromarray(image.numpy()).save(folder / str(label) / f"{i:05d}.png")


def in_cell(maps: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """For each map (B, rows, columns): whether its largest patch lies in the cell, and its share there."""
    B, rows, columns = maps.shape
    by_cell = (
        maps.view(B, CELLS, rows // CELLS, CELLS, columns // CELLS).permute(0, 1, 3, 2, 4).reshape(B, CELLS**2, -1)
    )
    points = by_cell.amax(2).argmax(1) == cells
    mass = by_cell.sum(2)[torch.arange(B), cells] / maps.sum((1, 2))
    return points, mass


def wilson(hits: Tensor, n: int) -> tuple[float, float]:
    """95 % interval of a share of successes (B,), of which so many are independent."""
    p, z = float(hits.float().mean()), 1.96
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def deviation(values: Tensor, groups: Tensor) -> float:
    """Of the mean of values (B,), of which those of a group (B,) are not independent."""
    sums = torch.zeros(int(groups.max()) + 1).index_add(0, groups, values - values.mean())
    return float(sums.square().sum().sqrt() / len(values))


def mapped(maker: Maker, images: Tensor) -> Tensor:
    """Maps of the images; only what speaks for the class, where a map has signs."""
    return torch.cat([maker(part).clamp_min(0) for part in images.split(BATCH)])


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=8000, help="canvases to train on (default: 8000)")
    parser.add_argument("--test", type=int, default=1000, help="canvases to measure on (default: 1000)")
    parser.add_argument("--epochs", type=int, default=12, help="of training (default: 12)")
    parser.add_argument("--folder", type=Path, default=Path("runs/ground_truth"), help="where everything is written")
    options = parser.parse_args(args)
    source = load_source("digits")
    assert source.test is not None
    images, labels, cells, deciding = canvases(source.test, options.test, vary=False, seed=1)
    data = options.folder / "data"
    write(data / "train", *canvases(source.train, options.train, vary=True, seed=0)[:2])
    started = time.perf_counter()
    common = ["--config", CONFIG, "--data.dataset", str(data), "--trainer.default_root_dir", str(options.folder)]
    changes = [f"--{name}={value}" for name, value in CHANGES.items()]
    if code := train.main(["fit", *common, *changes, f"--trainer.max_epochs={options.epochs}"]):
        raise SystemExit(code)
    seconds = time.perf_counter() - started
    model, about = load_checkpoint(options.folder / "model.safetensors")
    torch.manual_seed(0)
    untrained = VisionTransformer(**model.architecture).eval()
    images = about.preprocess.normalize(images[:, None].expand(-1, 3, -1, -1))
    with torch.inference_mode():
        accuracy = float((torch.cat([model(part).argmax(1) for part in images.split(BATCH)]) == labels).float().mean())
    without = {name: in_cell(mapped(maker, images), cells)[0] for name, maker in makers(untrained).items()}
    rows, digits = [], len(deciding.unique())  # some decide on several canvases
    table = Table("map", "pointing", "mass in the cell", "untrained", title=f"test accuracy {accuracy:.1%}")
    for name, maker in makers(model).items():
        points, mass = in_cell(mapped(maker, images), cells)
        (low, high), error = wilson(points, digits), 1.96 * deviation(mass, deciding)
        row = {
            "map": name,
            "pointing": round(float(points.float().mean()), 4),
            "pointing_95": [round(low, 4), round(high, 4)],
            "mass": round(float(mass.mean()), 4),
            "mass_95": [round(float(mass.mean()) + s * error, 4) for s in (-1, 1)],
            "pointing_untrained": round(float(without[name].float().mean()), 4),
        }
        rows.append(row)
        table.add_row(
            name,
            f"{row['pointing']:.1%} ({low:.1%} to {high:.1%})",
            f"{row['mass']:.1%} ({row['mass_95'][0]:.1%} to {row['mass_95'][1]:.1%})",
            f"{row['pointing_untrained']:.1%}",
        )
    Console(width=120).print(table)
    facts = {"chance": round(1 / CELLS**2, 4), "test_accuracy": round(accuracy, 4), "train_seconds": round(seconds, 1)}
    facts |= {"train": options.train, "test": options.test, "deciding_digits": digits, "epochs": options.epochs}
    print(record("ground_truth", rows, **facts))


def makers(model: VisionTransformer) -> dict[str, Maker]:
    """Those of this model, and those that know nothing."""
    return ignorant(model) | ours(model)


if __name__ == "__main__":
    main()
