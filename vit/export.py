"""A trained model for other runtimes: ``python -m vit.export CHECKPOINT --format timm|onnx``.

``timm`` writes a folder as timm and the Hugging Face hub keep them (``model.safetensors`` and ``config.json`` with
labels and preprocessing): ``timm.create_model("local-dir:FOLDER", pretrained=True)``. ``onnx`` writes one file that
takes uint8 pixels and gives logits, probabilities and the attention map, checked in ONNX Runtime before it is kept.
"""

import argparse
import json
import logging
import os
import re
import sys
import warnings
from contextlib import redirect_stdout, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from vit.checkpoint import Checkpoint, CheckpointError, describe, load_checkpoint
from vit.model import VisionTransformer
from vit.records import printable, write_out
from vit.rollout import fuse_heads, pooling_weights, rollout

TOLERANCE = 1e-4  # between PyTorch and ONNX Runtime
OUTPUTS = ("logits", "probabilities", "map")
LARGE = 2**30  # bytes of weights above which they lie beside the ONNX file, which cannot hold 2 GiB
# A model of timm's registry by rope and the norms' epsilon; everything else is an argument that config.json can hold.
TIMM_BASE = {
    (False, 1e-6): "vit_base_patch16_224",
    (False, 1e-5): "vit_base_patch16_clip_224",
    (True, 1e-6): "eva_giant_patch14_224",
    (True, 1e-5): "vit_pe_core_base_patch16_224",
}


# ---- timm and the Hugging Face hub -----------------------------------------------------------------------------------


def to_timm(model: VisionTransformer) -> nn.Module:
    """timm's model with the same weights, in eval mode.

    Raises:
        CheckpointError: If timm has no such model.
    """
    import timm

    from vit.pretrained import ROTATION

    a, otherwise = model.architecture, "use --format onnx, or train from scratch with --model."
    if a["stem"] != "linear":
        raise CheckpointError(f"timm has no stem {a['stem']!r}: {otherwise}stem linear")
    if a["rope"] and a["act"] != "gelu":
        raise CheckpointError(f"timm's model with rope has no act {a['act']!r}: {otherwise}act gelu")
    if (a["rope"], a["norm_eps"]) not in TIMM_BASE:
        known = ", ".join(str(eps) for rope, eps in TIMM_BASE if rope == a["rope"])
        raise CheckpointError(f"timm cannot be told norm_eps {a['norm_eps']}, only {known}: use --format onnx")
    same = ("in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
    fc_norm = not isinstance(model.fc_norm, nn.Identity)
    if a["rope"]:
        more = {
            "use_pre_transformer_norm": a["pre_norm"],
            "use_fc_norm": fc_norm,
            "use_post_transformer_norm": not fc_norm,
            "num_reg_tokens": model.num_registers,
            "use_abs_pos_emb": True,
            "use_rot_pos_emb": True,
            "attn_type": "rope",  # where keys have a bias too
            "rope_type": "dinov3",
            **{
                f"rope_{name}": ROTATION[name]
                for name in ("temperature", "grid_indexing", "grid_offset", "rotate_half")
            },
        }
    else:
        more = {"pre_norm": a["pre_norm"], "fc_norm": fc_norm, "reg_tokens": model.num_registers, "act_layer": a["act"]}
    theirs = timm.create_model(
        TIMM_BASE[a["rope"], a["norm_eps"]],
        **{name: a[name] for name in same},
        **({"qk_norm": True} if a["qk_norm"] else {}),  # which older ones with rope do not know
        **more,
        img_size=model.image_size,
        patch_size=model.patch_size,
        init_values=None if a["init_values"] is None else 1e-5,
        class_token=model.pool == "token",
        global_pool="token" if model.pool == "token" else "avg",
        no_embed_class=not model.num_prefix_positions,
    )
    weights = model.state_dict()
    if a["rope"]:
        weights = {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): tensor for name, tensor in weights.items()}
    theirs.load_state_dict(weights, strict=True)
    return theirs.eval()


def export_timm(model: VisionTransformer, about: Checkpoint, folder: str | Path) -> Path:
    """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads, and transformers as well.

    Args:
        model: The model.
        about: Its description; labels and preprocessing go where timm keeps them, the rest into a part of our own.
        folder: Made if missing.

    Raises:
        CheckpointError: If timm has no such model.
        FileExistsError: If the folder holds a checkpoint of ours: timm's has the same name.
    """
    from timm.models import save_for_hf

    with suppress(CheckpointError):
        load_checkpoint(file := Path(folder) / "model.safetensors")
        raise FileExistsError(f"{file}: a checkpoint of this project, which would be overwritten; name another folder")

    theirs, preprocess = to_timm(model), about.preprocess
    save_for_hf(
        theirs,
        str(folder),
        model_config={
            "label_names": list(about.class_names),
            "pretrained_cfg": {"license": None, "origin_url": None, "tag": "vit_rollout"},
            "vit": {
                "temperature": about.temperature,
                "metrics": about.metrics,
                "training": about.training,
                "white": preprocess.white,
            },
        },
        safe_serialization=True,
        data_config={
            "input_size": (model.in_chans, *preprocess.image_size),
            "interpolation": preprocess.interpolation,
            "mean": preprocess.mean,
            "std": preprocess.std,
            "crop_pct": preprocess.crop,
            "crop_mode": "squash" if preprocess.squash else "center",
        },
    )
    config = json.loads((path := Path(folder, "config.json")).read_text("utf-8"))
    config["model_args"].pop("num_classes", None)  # which stands above it, too: of two transformers does not know which
    path.write_text(json.dumps(config, indent=2), "utf-8")
    return Path(folder)


# ---- ONNX ------------------------------------------------------------------------------------------------------------


class Explained(nn.Module):
    """Logits, probabilities (B, classes) and rollout maps (B, rows, columns) of uint8 pixels (B, C, H, W).

    Args:
        model: The model.
        about: Its description: normalisation and temperature become part of the graph.
    """

    def __init__(self, model: VisionTransformer, about: Checkpoint):
        super().__init__()
        self.model = VisionTransformer(**model.architecture)  # of its own, as the caller's may be in training
        self.model.load_state_dict(model.state_dict(), assign=True)
        self.about = about

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, matrices = self.model.forward_attention(self.about.preprocess.normalize(pixels), fuse_heads)
        start = pooling_weights(self.model, matrices[-1].shape[1])
        patches = rollout(matrices, start)[:, self.model.num_prefix_tokens :]
        grid = (patches / patches.sum(1, keepdim=True)).unflatten(1, self.model.grid_size)
        return logits, (logits / self.about.temperature).softmax(1), grid


def export_onnx(model: VisionTransformer, about: Checkpoint, path: str | Path) -> dict[str, float]:
    """Write an ONNX file, and return how far ONNX Runtime is from PyTorch: the largest difference of each output.

    The description lies in the file's metadata under ``vit``, as JSON.

    Args:
        model: The model, on the CPU.
        about: Its description.
        path: The file; replaced only by one that computes the same as PyTorch. Weights of more than ``LARGE`` bytes lie
            beside it, ``.data`` behind its name.

    Raises:
        CheckpointError: If a package is missing, the file cannot be written, or ONNX Runtime computes something else.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise CheckpointError(f"{error.name} is not installed: pip install onnx onnxscript onnxruntime") from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    explained = Explained(model, about).eval()
    example = torch.randint(256, (2, model.in_chans, *about.preprocess.image_size), dtype=torch.uint8)
    with warnings.catch_warnings(), redirect_stdout(sys.stderr), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's, about its own dependencies
        program: Any = torch.onnx.export(
            explained,
            (example,),
            dynamo=True,
            input_names=["pixels"],
            output_names=list(OUTPUTS),
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    program.model.metadata_props["vit"] = json.dumps(describe(about))
    try:
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", ignore_cleanup_errors=True) as folder:
            program.save(whole := Path(folder, path.name), external_data=is_large(model))
            session = onnxruntime.InferenceSession(whole, providers=["CPUExecutionProvider"])
            differences = compare(session, explained, example)
            if worst := [name for name, difference in differences.items() if not difference <= TOLERANCE]:
                raise CheckpointError(f"ONNX Runtime's {worst[0]} is {differences[worst[0]]:.1e} from PyTorch's")
            if is_large(model):
                path.unlink(missing_ok=True)  # an earlier one would compute with these weights
                data_of(whole).replace(data_of(path))
            whole.replace(path)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # the runtime has types of its own, without a common one
        raise CheckpointError(f"ONNX Runtime cannot run the export ({' '.join(str(error).split())[:200]})") from error
    return differences


def is_large(model: nn.Module) -> bool:
    """Whether the weights do not go into the ONNX file."""
    return sum(weights.nbytes for weights in model.parameters()) > LARGE


def data_of(path: Path) -> Path:
    """Where they lie then."""
    return path.with_name(f"{path.name}.data")


def compare(session: Any, explained: Explained, pixels: Tensor) -> dict[str, float]:
    """Largest difference of each output over batches of 1, 2 and 3 images; of its largest number, if above 1."""
    differences = dict.fromkeys(OUTPUTS, torch.zeros(()))
    for batch in (pixels[:1], pixels, torch.cat([pixels, pixels[:1] // 2])):
        with torch.inference_mode():
            expected = explained(batch)
        found = session.run(list(OUTPUTS), {"pixels": batch.numpy()})
        for name, ours, theirs in zip(OUTPUTS, expected, found, strict=True):
            if not ours.isfinite().all():
                raise CheckpointError(
                    f"not every value of PyTorch's {name} is finite; weights or temperature may be damaged"
                )
            difference = (ours - torch.from_numpy(theirs)).abs().max() / ours.abs().max().clamp_min(1)
            differences[name] = differences[name].maximum(difference)  # NaN stays NaN, unlike with max
    return {name: difference.item() for name, difference in differences.items()}


def main(args: list[str] | None = None) -> int:
    """Run the command line; 0 if the export was written, 2 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m vit.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="model.safetensors, .ckpt, a folder with config.json, or a timm name")
    parser.add_argument("--format", choices=["timm", "onnx"], required=True, help="what to write")
    parser.add_argument("--out", type=Path, help="folder (timm) or file (onnx); by default beside the checkpoint")
    options = parser.parse_args(args)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    from vit.pretrained import load_pretrained

    try:
        model, about = load_pretrained(options.checkpoint)
        if not about.class_names:
            raise CheckpointError(f"{options.checkpoint}: a backbone without classes; fine-tune it first")
        out = options.out or _beside(options.checkpoint, options.format)
        if options.format == "onnx" and out.is_dir():
            raise CheckpointError(f"--out {out}: a folder; name the file, such as {out / 'model.onnx'}")
        weights = (options.checkpoint, options.checkpoint.partition("=")[2])  # a file, or TIMM_NAME=FILE
        if out.is_file() and any(os.path.isfile(file) and os.path.samefile(out, file) for file in weights):
            raise CheckpointError(f"--out {out}: the checkpoint itself; name another file")
        if options.format == "timm":
            export_timm(model, about, out)
            said = [f'{out}: timm.create_model("local-dir:{out}", pretrained=True)']
        else:
            found = export_onnx(model, about, out)
            largest = ", ".join(f"{name} {difference:.0e}" for name, difference in found.items())
            said = [f"{out}: ONNX Runtime equals PyTorch (largest difference: {largest})"]
            if is_large(model):
                said.append(f"{data_of(out)}: its weights; it needs them beside it under this name")
        write_out("".join(f"{printable(line)}\n" for line in said))
    except (CheckpointError, OSError) as error:
        print(f"vit.export: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    return 0


def _beside(checkpoint: str, form: str) -> Path:
    """Where an export goes if nobody says: next to a file or a folder, or here for a name."""
    path = Path(checkpoint)
    if path.is_dir():
        stem = path.resolve()  # of "." too, which has no name
    else:
        stem = path.with_suffix("") if path.is_file() else Path(Path(checkpoint.partition("=")[0]).name)
    return stem.with_name(f"{stem.name}_timm") if form == "timm" else stem.with_name(f"{stem.name}.onnx")


if __name__ == "__main__":
    sys.exit(main())
