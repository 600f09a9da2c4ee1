"""The pictures of the README: ``python -m benchmarks.pictures``.

Four photographs that come with scikit-image and sixteen CIFAR-10 test images, with the shipped weights. Which sixteen
is decided by their number alone: every class's 1st image, then the 2nd of six classes, as the files are sorted.
"""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from vit import Predictor
from vit.visualize import contact_sheet

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
DOCS = Path(__file__).parent.parent / "docs"


def photographs() -> list[Image.Image]:
    """scikit-image's photographs, in the public domain or CC0."""
    from skimage import data

    return [Image.fromarray(getattr(data, name)()) for name in PHOTOGRAPHS]


def cifar10(folder: Path) -> list[Path]:
    """Sixteen test images of CIFAR-10 as JPEG files."""
    classes = sorted(path for path in (folder / "test").iterdir() if path.is_dir())
    files = [sorted(path.glob("*.jpg")) for path in classes]
    return [of_class[0] for of_class in files] + [of_class[1] for of_class in files[:6]]


def sheet(predictor: Predictor, images: Iterable[Image.Image | Path], **layout: Any) -> Image.Image:
    """A contact sheet of images with their rollout maps."""
    entries = []
    for image in images:
        e = predictor.explain(image)
        entries.append(
            {"image": e.image, "grid": e.grid, "box": e.box, "caption": f"{e.target} {e.prediction.score:.1%}"}
        )
    return contact_sheet(entries, **layout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="weights to draw with (default: the shipped ones)")
    args = parser.parse_args()
    predictor = Predictor.from_checkpoint(args.checkpoint)
    DOCS.mkdir(exist_ok=True)
    sheet(predictor, photographs()).save(DOCS / "photographs.png", optimize=True)
    print(DOCS / "photographs.png")
    if folder := os.environ.get("CIFAR10_JPEG"):
        sheet(predictor, cifar10(Path(folder)), columns=4, size=128).save(DOCS / "cifar10.png", optimize=True)
        print(DOCS / "cifar10.png")


if __name__ == "__main__":
    main()
