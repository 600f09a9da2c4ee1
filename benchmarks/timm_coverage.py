"""Which of timm's vision transformers our model can be: every name tried with random weights, logits and maps compared.

``python -m benchmarks.timm_coverage`` builds each model with its own configuration, but two blocks deep and without a
download, compares logits with timm's and the map with a float64 reference, and writes docs/timm.md and
benchmarks/results/timm_coverage.json. Blocks of a model are alike, so that a third one could show nothing new.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.record import record
from vit.pretrained import Unsupported, architecture_of, from_timm
from vit.rollout import attention_map

MODULES = (
    *("vision_transformer", "deit", "eva", "beit", "naflexvit", "cait"),
    *("vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam"),
)
CLASSES = 10
LARGEST = 1100  # tokens; models for larger images are compared at a smaller grid, for the sake of memory
PAGE = Path("docs/timm.md")


def names() -> list[str]:
    """All names in those parts of timm's registry that hold vision transformers."""
    return [name for module in MODULES for name in timm.list_models(module=module)]


def build(name: str, **more: Any) -> nn.Module:
    """timm's model without memory for weights, two blocks deep where it has a number of blocks."""
    with torch.device("meta"):
        try:
            return timm.create_model(name, depth=2, num_classes=CLASSES, **more)
        except (TypeError, AssertionError):  # no such argument, or others that must have an entry for each block
            return timm.create_model(name, num_classes=CLASSES)


def refusal(name: str) -> str | None:
    """Why ours cannot be this model; None if it can."""
    try:
        architecture_of(build(name))
    except Unsupported as error:
        return str(error)
    return None


def with_random_weights(model: nn.Module) -> nn.Module:
    """The model in memory and in eval mode, no weight at 0 or 1, where a difference would not show."""
    bank = torch.randn(1_000_003)  # a prime: rows of a matrix do not repeat
    model = model.to_empty(device="cpu").eval()
    for module in model.modules():  # numbers that are no weights, such as the periods of rotary positions
        getattr(module, "init_non_persistent_buffers", lambda: None)()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = bank.repeat(-(-parameter.numel() // len(bank)))[: parameter.numel()].view_as(parameter)
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_(values * (0.1 if parameter.ndim == 1 else 0.03) + norm)
    return model


def reference_rollout(theirs: Any, images: Tensor) -> Tensor:
    """Rollout map (grid height, grid width) of one image, summing to 1, of timm's weights: float64, full matrices."""
    theirs, attentions = theirs.double(), []
    for block in theirs.blocks:
        block.attn.fused_attn = False  # the weights are then the input of a module
        block.attn.attn_drop.register_forward_pre_hook(lambda _, given: attentions.append(given[0][0].mean(0)))
    with torch.inference_mode():
        theirs(images.double())
    product = identity = torch.eye(len(attentions[0]), dtype=torch.float64)
    for attention in attentions:
        product = (attention + identity) / 2 @ product
    prefix = theirs.num_prefix_tokens
    row = product[0] if theirs.global_pool == "token" else product[prefix:].mean(0)
    return (row[prefix:] / row[prefix:].sum()).view(theirs.patch_embed.grid_size)


def compare(name: str, **more: Any) -> dict[str, Any]:
    """Strict loading, then the largest differences of logits and map for one random image.

    Args:
        name: A timm model that ``refusal`` has nothing against.
        more: Arguments for timm, to make it smaller.
    """
    theirs: Any = with_random_weights(build(name, **more))
    ours, _ = from_timm(theirs)
    images = torch.randn(1, ours.in_chans, *theirs.patch_embed.img_size)
    seen = images[:, :, : ours.image_size[0], : ours.image_size[1]]  # timm leaves out what fills no patch
    with torch.inference_mode():
        logits, expected = ours(seen), theirs(images)
    mapped, grids = attention_map(ours, seen)
    reference = reference_rollout(theirs, images)
    return {
        "name": name,
        "tokens": ours.grid_size[0] * ours.grid_size[1] + ours.num_prefix_tokens,
        "embed_dim": theirs.embed_dim,
        "logits": (logits - expected).abs().max().item(),
        "logits_std": expected.std().item(),
        "logits_of_map": (mapped - expected).abs().max().item(),
        "map": (grids[0] - reference).abs().max().item(),
    }


def smaller(name: str) -> dict[str, Any]:
    """Arguments for a smaller grid where a model's own would not fit."""
    model: Any = build(name)
    embed = model.patch_embed
    return {} if embed.num_patches <= LARGEST else {"img_size": tuple(32 * side for side in embed.patch_size)}


def page(rows: list[dict[str, Any]], refused: dict[str, list[str]]) -> str:
    """The tables as Markdown."""
    count = sum(map(len, refused.values()))
    bare = sum(getattr(timm.get_pretrained_cfg(row["name"]), "num_classes", None) == 0 for row in rows)
    lines = [
        "# timm's vision transformers",
        "",
        f"Written by `python -m benchmarks.timm_coverage` with timm {timm.__version__}. Of the {len(rows) + count}",
        f"vision transformers in its registry, ours can be **{len(rows)}**: `--model.pretrained NAME`, and where the",
        f"weights have classes `predict.py --checkpoint NAME` (the default weights of {bare} have none, DINO's and",
        "SigLIP's among them: fine-tune those, or take their features: [pretrained.md](pretrained.md)). The others are",
        "refused before anything is downloaded, with the reason below.",
        "",
        "Each was built with its own configuration and random weights, two blocks deep, those of more than 1,100",
        "patches on 32x32 of them. All weights load strictly.",
        "*Logits* is the largest difference from timm's; *map* the largest difference of the rollout map (which sums",
        "to 1) from a float64 product of full attention matrices made from timm's own modules. *Tokens* include class",
        "token and registers.",
        "Preprocessing is taken over.",
        "",
        f"Largest of all: logits {max(r['logits'] for r in rows):.1e}, map {max(r['map'] for r in rows):.1e}.",
        "",
        "| name | width | tokens | logits | map |",
        "|---|--:|--:|--:|--:|",
        *(f"| {r['name']} | {r['embed_dim']} | {r['tokens']} | {r['logits']:.0e} | {r['map']:.0e} |" for r in rows),
        "",
        "## Refused",
        "",
        "| reason | names |",
        "|---|---|",
        *(f"| {reason} | {', '.join(found)} |" for reason, found in sorted(refused.items(), key=lambda i: -len(i[1]))),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names with this in them, printed and not written down")
    args = parser.parse_args()
    torch.manual_seed(0)
    started, rows, refused, claimed = time.perf_counter(), [], defaultdict(list), []
    for name in track([name for name in names() if args.only in name], "read"):
        if reason := refusal(name):
            refused[reason].append(name)
        else:
            claimed.append(name)
    for name in track(claimed, "compared"):
        rows.append(compare(name, **smaller(name)))
        if args.only:
            print(rows[-1])
    if not args.only:
        seconds = time.perf_counter() - started
        record("timm_coverage", rows, refused=dict(refused), seconds=round(seconds))
        PAGE.write_text(page(rows, refused))
        print(f"{len(rows)} models equal, {sum(map(len, refused.values()))} refused; written to {PAGE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
