"""Which maps are true: deletion and insertion over test images, ``python -m benchmarks.faithfulness --data FOLDER``.

Every map answers for the predicted class of the same images, beside maps that know nothing of the model: random ones,
and a bright centre, since that is where photographs have their subject. What others offer for the same model joins in
where it is installed (``pip install captum grad-cam``). Intervals are 95 % over images; the images are spread evenly
over the classes' sorted files.
"""

import argparse
import importlib.util
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.record import record
from vit.checkpoint import load_checkpoint
from vit.faithfulness import REMOVALS, faithfulness
from vit.model import VisionTransformer
from vit.predictor import SHIPPED
from vit.preprocess import open_image
from vit.rollout import METHODS, attention_map

Maker = Callable[[Tensor], Tensor]  # images (B, C, H, W) to maps (B, grid height, grid width)
BATCH = 50


def by_patch(model: VisionTransformer, pixels: Tensor) -> Tensor:
    """Maps of patches from maps of pixels (B, H, W)."""
    rows, columns = model.grid_of(*pixels.shape[1:])
    return pixels.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).sum((2, 4))


def ignorant(model: VisionTransformer) -> dict[str, Maker]:
    """Maps that never look at the model."""
    rows, columns = model.grid_size
    generator = torch.Generator().manual_seed(1)
    y, x = (torch.linspace(-1, 1, n) for n in (rows, columns))
    centre = torch.exp(-(y[:, None] ** 2 + x**2))
    return {
        "random": lambda images: torch.rand(len(images), rows, columns, generator=generator).to(images.device),
        "centre": lambda images: centre.expand(len(images), -1, -1).to(images.device),
    }


def ours(model: VisionTransformer) -> dict[str, Maker]:
    """Every method, and two other reductions of rollout."""
    makers: dict[str, Maker] = {
        name: lambda images, name=name: attention_map(model, images, method=name)[1] for name in METHODS
    }
    makers["rollout, max of heads"] = lambda images: attention_map(model, images, fuse="max")[1]
    makers["rollout, 90 % discarded"] = lambda images: attention_map(model, images, discard=0.9)[1]
    return makers


def of_captum(model: VisionTransformer) -> dict[str, Maker]:
    """Captum's gradients on pixels, summed over a patch."""
    from captum.attr import InputXGradient, IntegratedGradients  # pyright: ignore[reportMissingImports]

    def attribute(method: Any, images: Tensor, **options: int) -> Tensor:
        target = model(images).argmax(1)
        pixels = method.attribute(images.clone().requires_grad_(), target=target, **options)
        return by_patch(model, pixels.sum(1).detach())

    return {
        "captum input x gradient": partial(attribute, InputXGradient(model)),
        "captum integrated gradients": partial(
            attribute, IntegratedGradients(model), n_steps=50, internal_batch_size=100
        ),
    }


def of_grad_cam(model: VisionTransformer) -> dict[str, Maker]:
    """pytorch-grad-cam's GradCAM on the last block's first norm, as its documentation says for transformers."""
    from pytorch_grad_cam import GradCAM  # pyright: ignore[reportMissingImports]

    rows, columns = model.grid_size

    def channels_first(tokens: Tensor) -> Tensor:
        return tokens[:, model.num_prefix_tokens :].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)

    cam = GradCAM(model, [model.blocks[-1].norm1], reshape_transform=channels_first)

    def make(images: Tensor) -> Tensor:
        pixels = torch.from_numpy(cam(images, targets=None))
        return by_patch(model, pixels).to(images.device)

    return {"grad-cam GradCAM": make}


OTHERS = {"captum": of_captum, "pytorch_grad_cam": of_grad_cam}


def load(folder: Path, number: int) -> list[Path]:
    """So many files of a folder of classes, as many of each class."""
    classes = [sorted(path.glob("*.*")) for path in sorted(folder.iterdir()) if path.is_dir()]
    each = -(-number // len(classes))
    chosen = [files[:: max(1, len(files) // each)][:each] for files in classes]
    return [path for files in chosen for path in files][:number]


def interval(values: Tensor) -> str:
    """Mean and half of its 95 % interval."""
    return f"{values.mean():.4f} ± {1.96 * values.std() / math.sqrt(len(values)):.4f}"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CLASS/*.jpg, such as a test split")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(args)
    model, about = load_checkpoint(options.checkpoint)
    model.to(options.device)
    pixels = [about.preprocess(open_image(path)) for path in load(options.data, options.images)]
    images = about.preprocess.normalize(torch.stack(pixels).to(options.device))
    with torch.inference_mode():
        target = torch.cat([model(part).argmax(1) for part in images.split(BATCH)])
    makers = ignorant(model) | ours(model)
    for package, of in OTHERS.items():
        if importlib.util.find_spec(package):
            makers |= of(model)
    rows = []
    table = Table("map", "remove", "deletion ↓", "insertion ↑", "score ↑", "ms an image")
    for name, make in makers.items():
        start = time.perf_counter()
        maps = torch.cat([make(part) for part in images.split(BATCH)])
        cost = 1000 * (time.perf_counter() - start) / len(images)
        for remove in REMOVALS:
            generator = torch.Generator().manual_seed(0)
            result = faithfulness(
                model, images, maps, target=target, remove=remove, steps=options.steps, generator=generator
            )
            texts = {key: interval(result[key]) for key in ("deletion", "insertion", "score")}
            rows.append({"map": name, "remove": remove, **texts, "ms": round(cost, 2)})
            table.add_row(name, remove, *texts.values(), f"{cost:.2f}")
    Console(width=120).print(table)
    facts = {"images": len(images), "steps": options.steps, "checkpoint": options.checkpoint.name}
    print(record("faithfulness", rows, **facts))


if __name__ == "__main__":
    main()
