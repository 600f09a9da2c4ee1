"""How strong the gamma rule of lrp should be: ``python -m benchmarks.lrp_gamma --data FOLDER``.

Scores lrp's maps of held-out validation images, as ``benchmarks.faithfulness`` scores those of test images, for pairs
of gammas: of linear maps, and of convolutions, which see the pixels. ``vit.rollout.GAMMA`` is chosen here; 0 and 0 is
without the rule.
"""

import argparse
import os
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.faithfulness import BATCH, interval
from benchmarks.record import record
from data.datamodule import ImageDataModule
from vit.checkpoint import load_checkpoint
from vit.faithfulness import area, deletion_curve
from vit.model import VisionTransformer
from vit.predictor import SHIPPED
from vit.rollout import GAMMA, attention_map

LINEAR, PIXELS = (0, 0.01, 0.02, 0.05, 0.1), (0, 0.25, 0.5, 1, 2)


def scores(model: VisionTransformer, images: Tensor, steps: int) -> Tensor:
    """Score of the map of each image (B,), about the predicted class; patches are replaced by the mean colour."""
    logits, maps = attention_map(model, images, method="lrp")
    given: dict[str, Any] = {"target": logits.argmax(1), "steps": steps, "batch_size": BATCH}
    deletion, insertion = (area(deletion_curve(model, images, order, **given)) for order in (maps, -maps))
    return (insertion - deletion).cpu()


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("CIFAR10_JPEG", "cifar10"), help="data set, or a folder of it")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument("--images", type=int, default=500, help="of those held out, spread evenly over the classes")
    parser.add_argument("--steps", type=int, default=8, help="steps from the whole image to none of it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(args)
    model, about = load_checkpoint(options.checkpoint)
    model.to(options.device)
    module = ImageDataModule(dataset=options.data)
    module.setup()
    held_out = module.val.subset[module.val.split.labels[module.val.subset].argsort(stable=True)]
    chosen = held_out[torch.linspace(0, len(held_out) - 1, min(options.images, len(held_out))).long()]
    images = about.preprocess.normalize(torch.as_tensor(module.val.split.images[chosen]).to(options.device))

    rows, table = [], Table("gamma of linear maps", "of convolutions", "score")
    before = dict(GAMMA)
    for of_linear, of_pixels in product(LINEAR, PIXELS):
        GAMMA.update({F.linear: of_linear, F.conv2d: of_pixels})
        rows.append({"linear": of_linear, "pixels": of_pixels, "score": interval(scores(model, images, options.steps))})
    GAMMA.update(before)
    for row in sorted(rows, key=lambda row: -row["score"][0]):
        table.add_row(str(row["linear"]), str(row["pixels"]), "{:.3f} ({:.3f} to {:.3f})".format(*row["score"]))
    Console().print(table)
    print(record("lrp_gamma", rows, images=len(images), steps=options.steps, checkpoint=options.checkpoint.name))


if __name__ == "__main__":
    main()
