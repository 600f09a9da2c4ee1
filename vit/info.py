"""What a checkpoint is: ``python -m vit.info CHECKPOINT`` prints architecture, size, classes, history."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils.flop_counter import FlopCounterMode

from vit.checkpoint import Checkpoint, CheckpointError
from vit.model import VisionTransformer
from vit.records import printable, write_out

SHOWN = 12  # class names that are listed


def flops(model: VisionTransformer, size: tuple[int, int] | None = None) -> int:
    """Floating-point operations for one image, a multiply-add counting as two.

    Matrix products and convolutions are counted, as is usual; nothing is computed.

    Args:
        model: The model.
        size: Height and width of the image, in pixels; none for the model's.
    """
    with torch.device("meta"):
        shape = VisionTransformer(**model.architecture)
        images = torch.empty(1, model.in_chans, *(size or model.image_size))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shape.forward_attention(images, lambda weights: weights)  # whose products are all visible to the counter
    return counter.get_total_flops()


def facts(model: VisionTransformer, about: Checkpoint) -> dict[str, dict[str, Any]]:
    """What there is to say, by section; empty sections are left out."""
    preprocess, names = about.preprocess, about.class_names
    rows, columns = model.grid_size
    listed = ", ".join(names[:SHOWN]) + (f", ... ({len(names) - SHOWN} more)" if len(names) > SHOWN else "")
    sections = {
        "architecture": {name: value for name, value in model.architecture.items() if value is not None},
        "size": {
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            "tokens": f"{rows} x {columns} patches + {model.num_prefix_tokens}",
            "GFLOPs an image": f"{flops(model) / 1e9:.3g}",
        },
        "classes": {"number": len(names), "names": listed}
        if names
        else {"number": "none: a backbone without a classifier"},
        "preprocessing": {
            "image size": " x ".join(map(str, preprocess.image_size)),
            "mean": ", ".join(f"{value:.4g}" for value in preprocess.mean),
            "std": ", ".join(f"{value:.4g}" for value in preprocess.std),
            "interpolation": preprocess.interpolation,
            "crop": preprocess.crop,
            **({"squash": "height and width apart"} if preprocess.squash else {}),
            **({} if preprocess.white is None else {"white": preprocess.white}),
            "temperature": f"{about.temperature:.4g}",
        },
        "metrics": {name: f"{value:.4g}{uncalibrated(name, about)}" for name, value in about.metrics.items()},
        "training": {name: value for name, value in about.training.items() if value is not None},
    }
    return {name: section for name, section in sections.items() if section}


def uncalibrated(name: str, about: Checkpoint) -> str:
    """What to add to a metric that training takes of the logits as they are; scores have the temperature in them."""
    return " (before the temperature)" if name.endswith(("/ece", "/loss")) and about.temperature != 1 else ""


def plain(text: str) -> Text:
    """Text that Rich prints as it is: a class may be called ``[red]``, or what moves the terminal."""
    return Text(printable(text))


def main(args: list[str] | None = None) -> int:
    """Run the command line; 0, or 2 if there is no such checkpoint or nowhere to write."""
    parser = argparse.ArgumentParser(prog="python -m vit.info", description=__doc__)
    parser.add_argument("checkpoint", help="model.safetensors, .ckpt, a folder with config.json, or a timm name")
    options = parser.parse_args(args)
    from vit.pretrained import load_pretrained

    try:
        model, about = load_pretrained(options.checkpoint)
    except CheckpointError as error:
        print(f"vit.info: {printable(str(error))}", file=sys.stderr)
        return 2
    path = Path(options.checkpoint)
    size = f" ({path.stat().st_size / 1e6:.1f} MB)" if path.is_file() else ""
    table = Table(title=plain(f"{options.checkpoint}{size}"), show_header=False, title_justify="left")
    for section, rows in facts(model, about).items():
        for i, (name, value) in enumerate(rows.items()):
            head = "" if i else f"[bold]{section}"
            table.add_row(head, plain(name), plain(str(value)), end_section=i == len(rows) - 1)
    try:
        with (console := Console()).capture() as text:
            console.print(table)
        write_out(text.get())
    except OSError as error:
        print(f"vit.info: standard output: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
