"""Which maps are true: deletion and insertion over test images, ``python -m benchmarks.faithfulness --data FOLDER``.

Every map answers for the predicted class of the same images, beside maps that know nothing of the model: random ones,
and a bright centre, since that is where photographs have their subject. ``deletion`` is the area under the probability
as patches go, most relevant first; ``insertion`` that of the least relevant first, which shows the same images as
putting the most relevant back; ``score`` is their difference, 0 in random order, and ``beside rollout`` the difference
of two maps' scores on the same image. Intervals are 95 %, by bootstrap over images, which are spread evenly over the
classes' sorted files. Makers of maps take turns at each batch, so that a busy machine slows all alike; a cost is the
median over batches.

What others offer for the same model joins in where it is installed (``pip install captum grad-cam lxt zennit
'transformers<4.54'``; legrad-torch takes OpenCLIP's models only), and where Quantus is, the curves are compared with
its PixelFlipping.
"""

import argparse
import copy
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.record import record
from vit.checkpoint import load_checkpoint
from vit.faithfulness import REMOVALS, area, deletion_curve
from vit.model import LayerNorm2d, VisionTransformer
from vit.predictor import SHIPPED
from vit.preprocess import open_image
from vit.rollout import GAMMA, METHODS, attention_map, pixel_relevance

Maker = Callable[[Tensor], Tensor]  # images (B, C, H, W) to maps (B, grid height, grid width)
BATCH = 64  # what a CPU's caches hold
RESAMPLED = 2000  # times


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
    """Every method; lrp with what speaks against the class, as others give it; rollout as much used code has it."""
    makers: dict[str, Maker] = {
        name: lambda images, name=name: attention_map(model, images, method=name)[1] for name in METHODS
    }
    makers["lrp, signed"] = lambda images: by_patch(model, pixel_relevance(model, images)[1])
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
            attribute, IntegratedGradients(model), n_steps=50, internal_batch_size=BATCH
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


def of_lxt(model: VisionTransformer) -> dict[str, Maker]:
    """lxt's AttnLRP, and where zennit is, with the gamma rule as in lxt's example for vision transformers."""
    makers = {"lxt AttnLRP": lxt_maker(model)}
    if importlib.util.find_spec("zennit"):
        from lxt.efficient import monkey_patch_zennit  # pyright: ignore[reportMissingImports]
        from zennit.composites import LayerMapComposite  # pyright: ignore[reportMissingImports]
        from zennit.rules import Gamma  # pyright: ignore[reportMissingImports]

        monkey_patch_zennit()
        rules = LayerMapComposite([(nn.Conv2d, Gamma(GAMMA[F.conv2d])), (nn.Linear, Gamma(GAMMA[F.linear]))])
        makers["lxt AttnLRP, gamma rule of zennit"] = lxt_maker(model, rules.register)
    return makers


def lxt_maker(model: VisionTransformer, prepare: Callable[[nn.Module], None] = lambda model: None) -> Maker:
    """Maps of a copy of the model that has lxt's own rules for norms, non-linearities and attention.

    Args:
        model: The model.
        prepare: Puts more into it.
    """
    from lxt.efficient.patches import layer_norm_forward  # pyright: ignore[reportMissingImports]
    from lxt.efficient.rules import divide_gradient, identity_rule_implicit  # pyright: ignore[reportMissingImports]

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.forward = partial(identity_rule_implicit, module.forward)
        elif isinstance(module, LayerNorm2d):
            module.forward = partial(over_channels, MethodType(layer_norm_forward, module))
        elif isinstance(module, nn.LayerNorm):
            module.forward = MethodType(layer_norm_forward, module)
    for block in model.blocks:
        block.attn.heads = shared(block.attn.heads, lambda part, value: divide_gradient(value, 2 if part == 2 else 4))

    prepare(model)

    def make(images: Tensor) -> Tensor:
        images = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(images).amax(1).sum(), images)
        return by_patch(model, (images * gradient).detach().sum(1))

    return make


def over_channels(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The norm over the channels of each pixel of (B, C, H, W)."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def shared(heads: Callable[..., Any], rule: Callable[[int, Tensor], Tensor]) -> Callable[..., Any]:
    """``heads`` with the rule applied to queries, keys and values (0, 1, 2)."""
    return lambda *args: tuple(rule(part, value) for part, value in enumerate(heads(*args)))


OTHERS = {"captum": of_captum, "pytorch_grad_cam": of_grad_cam, "lxt": of_lxt}


def installed(model: VisionTransformer) -> dict[str, Maker]:
    """Those of other libraries that are there."""
    there = [of(model) for package, of in OTHERS.items() if importlib.util.find_spec(package)]
    return {name: make for makers in there for name, make in makers.items()}


def difference_to_quantus(model: VisionTransformer, images: Tensor) -> float:
    """Largest difference between a point of our deletion curves and of Quantus's; images lose their mean colour first.

    Quantus orders single values of a picture and blanks them with a number, so maps are spread over the pixels and the
    number is the mean colour, 0.
    """
    import quantus  # pyright: ignore[reportMissingImports]

    images = images - images.mean((2, 3), keepdim=True)
    logits, maps = attention_map(model, images)
    rows, columns = maps.shape[1:]
    height, width = model.patch_size
    spread = maps.repeat_interleave(height, 1).repeat_interleave(width, 2)[:, None].expand_as(images)
    flipping = quantus.PixelFlipping(
        features_in_step=height * width, perturb_baseline=0.0, abs=False, normalise=False, disable_warnings=True
    )
    given = {"x_batch": images.cpu().numpy(), "y_batch": logits.argmax(1).cpu().numpy()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = flipping(
            model=model, a_batch=np.ascontiguousarray(spread.cpu()), device=str(images.device), softmax=True, **given
        )
    whole = np.array(theirs)[:, images.shape[1] - 1 :: images.shape[1]]  # a step blanks one channel of a patch
    ours = deletion_curve(model, images, maps, steps=rows * columns)[:, 1:]
    return float(np.abs(whole - ours.cpu().numpy()).max())


def load(folder: Path, number: int) -> list[Path]:
    """So many files of a folder of classes, as many of each class."""
    classes = [sorted(path.glob("*.*")) for path in sorted(folder.iterdir()) if path.is_dir()]
    each = -(-number // len(classes))
    chosen = [files[:: max(1, len(files) // each)][:each] for files in classes]
    return [path for files in chosen for path in files][:number]


def in_turns(makers: dict[str, Maker], images: Tensor) -> dict[str, tuple[Tensor, float]]:
    """Maps of all images by each maker, and what an image costs, in ms: the median over batches."""
    for make in makers.values():
        make(images[:BATCH])  # what libraries set up for themselves
    maps, costs = ({name: [] for name in makers} for _ in range(2))
    for part in images.split(BATCH):
        for name, make in makers.items():
            start = time.perf_counter()
            maps[name].append(make(part).cpu())  # waits for a GPU
            costs[name].append(1000 * (time.perf_counter() - start) / len(part))
    return {name: (torch.cat(maps[name]).to(images.device), median(costs[name])) for name in makers}


def interval(values: Tensor) -> list[float]:
    """Mean of values (B,) and the ends of its 95 % interval, by bootstrap."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLED, len(values)), generator=generator)
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return [round(x, 4) for x in (float(values.mean()), low, high)]


def shown(figures: list[float]) -> str:
    mean, low, high = figures
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CLASS/*.jpg, such as a test split")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=8, help="steps from the whole image to none of it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(args)
    model, about = load_checkpoint(options.checkpoint)
    model.to(options.device)
    pixels = [about.preprocess(open_image(path, about.preprocess.mode)) for path in load(options.data, options.images)]
    images = about.preprocess.normalize(torch.stack(pixels).to(options.device))
    with torch.inference_mode():
        target = torch.cat([model(part).argmax(1) for part in images.split(BATCH)])
    facts: dict[str, Any] = {"images": len(images), "steps": options.steps, "checkpoint": options.checkpoint.name}
    if importlib.util.find_spec("quantus"):
        facts["difference_to_quantus"] = difference_to_quantus(model, images[:: max(1, len(images) // 10)])
    rows: list[dict[str, Any]] = []
    scores: dict[tuple[str, str], Tensor] = {}
    for name, (maps, cost) in in_turns(ignorant(model) | ours(model) | installed(model), images).items():
        print(f"{name}: maps in {cost:.1f} ms an image", file=sys.stderr)
        for remove in REMOVALS:
            curves = (
                deletion_curve(
                    model, images, order, target=target, remove=remove, steps=options.steps, batch_size=BATCH
                )
                for order in (maps, -maps)
            )
            deletion, insertion = (area(curve).cpu() for curve in curves)
            scores[name, remove] = insertion - deletion
            rows.append({
                "map": name, "remove": remove, "deletion": interval(deletion), "insertion": interval(insertion),
                "score": interval(insertion - deletion), "ms": round(cost, 2),
            })  # fmt: skip
    for row in rows:
        row["beside_rollout"] = interval(scores[row["map"], row["remove"]] - scores["rollout", row["remove"]])
    table = Table("map", "remove", "deletion ↓", "insertion ↑", "score ↑", "beside rollout", "ms an image")
    for row in sorted(rows, key=lambda row: (row["remove"] != "mean", -row["score"][0])):
        figures = (shown(row[key]) for key in ("deletion", "insertion", "score", "beside_rollout"))
        table.add_row(row["map"], row["remove"], *figures, f"{row['ms']:.1f}")
    Console(width=160).print(table)
    print(record("faithfulness", rows, **facts))


if __name__ == "__main__":
    main()
