"""CIFAR-10 as JPEG files, as this project's figures were measured: ``python -m benchmarks.cifar10_jpeg FOLDER``.

torchvision downloads the original; each image becomes ``FOLDER/train/CLASS/NNNN.jpg`` or ``FOLDER/test/...`` with
Pillow's standard quality, 75. Train on it with ``--data.dataset FOLDER``.
"""

import argparse
from collections import Counter
from pathlib import Path

from PIL import Image
from torchvision.datasets import CIFAR10


def write(folder: Path, images: CIFAR10) -> None:
    """Save images one folder a class, numbered in their order."""
    seen: Counter[int] = Counter()
    for pixels, label in zip(images.data, images.targets, strict=True):
        path = folder / images.classes[label] / f"{seen[label]:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=75)
        seen[label] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to")
    parser.add_argument("--root", default="datasets", help="where the original is, or goes [datasets]")
    options = parser.parse_args()
    try:
        for split in ("train", "test"):
            write(options.folder / split, CIFAR10(options.root, train=split == "train", download=True))
    except (OSError, RuntimeError) as error:  # no network, no space, a wrong checksum
        raise SystemExit(f"{options.folder}: cannot be made ({error})") from None


if __name__ == "__main__":
    main()
