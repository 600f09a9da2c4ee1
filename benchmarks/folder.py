"""What ``configs/folder.yaml`` gives on a few thousand images: ``python -m benchmarks.folder --data FOLDER``.

Trains it from scratch on 500 images of each class of CIFAR-10, and again with one thing changed, a thread a run, and
compares accuracies of the last weights on as many other training images. The images have 32 pixels, and so the model,
with patches of 4. The test images are not looked at.
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.ablation import measure, show, trained
from benchmarks.record import record

CONFIG = "configs/folder.yaml"
SMALL = ["--data.image_size=32", "--model.patch_size=4"]
ONCE = ["--trainer.check_val_every_n_epoch=50", "--checkpoint.monitor=null"]
ONCE += ["--trainer.callbacks=null", "--model.compile=true"]
CHANGES = {
    "the config": [],
    "without policy, mixup and cutmix": [f"--data.augment.{name}=0" for name in ("policy", "mixup", "cutmix")],
    "without policy": ["--data.augment.policy=0"],
    "without mixup and cutmix": ["--data.augment.mixup=0", "--data.augment.cutmix=0"],
}


def subset(cifar10: Path, folder: Path, images: int) -> None:
    """Links to the first training images of each class, and as many others, the last ones, to validate on."""
    for kind in sorted((cifar10 / "train").iterdir()):
        files = sorted(kind.iterdir())
        for split, part in (("train", files[:images]), ("val", files[-images:])):
            (folder / split / kind.name).mkdir(parents=True)
            for file in part:
                (folder / split / kind.name / file.name).symlink_to(file.resolve())


def fit(folder: Path, name: str, *, data: Path, seed: int) -> tuple[float, float]:
    """Train the config with one change: validation accuracy at the end, and minutes of processor time."""
    options = ["--config", CONFIG, "--data.dataset", str(data), "--seed_everything", str(seed)]
    return trained(folder, [*options, *SMALL, *ONCE, *CHANGES[name]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default=os.environ.get("CIFAR10_JPEG"), help="folder of CIFAR-10, by default $CIFAR10_JPEG"
    )
    parser.add_argument("--images", type=int, default=500, help="of each class")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=CHANGES, help="these alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side, a thread each")
    args = parser.parse_args()
    if not args.data:
        parser.error("--data: which folder? `python -m benchmarks.cifar10_jpeg FOLDER` makes one")

    rows: list[dict[str, Any]] = [
        {"what": name, "accuracy": 0.0, "seeds": [], "core_minutes": []} for name in args.only or CHANGES
    ]
    facts = {"config": CONFIG, "options": SMALL, "images": args.images, "data": os.path.basename(args.data)}
    with tempfile.TemporaryDirectory() as scratch:
        subset(Path(args.data), data := Path(scratch, "images"), args.images)
        for seed in range(args.seeds):
            measure(rows, partial(fit, data=data, seed=seed), args.jobs)
            path = record(f"folder_{args.images}", rows, **facts)
    show(rows)
    print(path)


if __name__ == "__main__":
    main()
