"""Models of the library transformers as ours: what its ``save_pretrained`` writes and the Hugging Face hub keeps.

That is three files: ``config.json``, ``preprocessor_config.json`` and the weights. The library itself is not needed.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vit.checkpoint import Checkpoint, CheckpointError, build
from vit.model import VisionTransformer
from vit.preprocess import Preprocess
from vit.records import distinct

# What a config.json need not say. Those of SigLIP say of the part that sees only what differs.
SIZES = {
    **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    **{"image_size": 224, "patch_size": 16, "num_channels": 3, "qkv_bias": True},
}
VIT = {**SIZES, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
SIGLIP = {**SIZES, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
CLASSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what is read: such defaults, and what ours is then
    "ViTForImageClassification": (VIT, {}),
    "ViTModel": (VIT, {}),
    "DeiTForImageClassification": (VIT, {"num_registers": 1, "prefix_positions": True}),  # the token of distillation
    "SiglipForImageClassification": (SIGLIP, {"pool": "mean", "norm_after_pool": False}),
}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
UNREAD = re.compile(r"(\w+\.)?(pooler|head|embeddings\.(mask_token|position_ids))\b")  # by what classifies
NAMES = [  # of weights, and how ours are called
    (r"^(vit|deit|vision_model)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "reg_token"),
    (r"^embeddings\.position_embedding(s|\.weight)$", "pos_embed"),
    (r"^embeddings\.patch_embedding(s\.projection)?\.", "patch_embed.proj."),
    (r"^encoder\.layers?\.", "blocks."),
    (r"\.(attention\.output\.dense|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.(attention\.attention|self_attn)\.([qkv])\w*\.", r".attn.\2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"^(post_)?layernorm\.", "norm."),
    (r"^classifier\.", "head."),
]


def in_folder(folder: str, name: str) -> Path:
    """The path of a file in a folder; raises an OSError if there is none."""
    path = Path(folder, name)
    path.stat()
    return path


def on_hub(place: str, name: str) -> Path:
    """The path of a file of ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` on the hub, fetched once; an OSError likewise."""
    repository, _, revision = place.partition("@")
    return Path(hf_hub_download(repository, name, revision=revision or None))


def from_transformers(source: str, find: Callable[[str], Path]) -> tuple[VisionTransformer, Checkpoint] | None:
    """The model, in eval mode with float32 weights, and what is known about it; none if it is timm's.

    Logits are those of transformers. A backbone (``ViTModel``) has no class names, and a head of one zero output.

    Args:
        source: Its name, for messages.
        find: ``in_folder`` of a folder, or ``on_hub`` of a name.

    Raises:
        CheckpointError: If it is of a class other than CLASSES, has what ours has not, or is damaged.
    """
    try:
        config = json.loads(find("config.json").read_text("utf-8"))
        if "architecture" in config or "architectures" not in config:
            return None
        architecture = architecture_of(config)
        backbone = "ForImageClassification" not in config["architectures"][0]
        names = ("",) if backbone else labels_of(config)
        try:
            processor = json.loads(find("preprocessor_config.json").read_text("utf-8"))
        except OSError as error:
            hint = "transformers' image_processor.save_pretrained writes it"
            raise CheckpointError(f"has no preprocessor_config.json, which says how images get in; {hint}") from error
        about = Checkpoint(
            architecture={**architecture, "num_classes": len(names)},
            class_names=names,
            preprocess=preprocess_of(processor, architecture["image_size"]),
            training={"pretrained": source},
        )
        weights = by_our_names(weights_of(find))
        if backbone:
            width = architecture["embed_dim"]
            weights |= {"head.weight": torch.zeros(1, width), "head.bias": torch.zeros(1)}
        return build(about, weights), Checkpoint(**{**vars(about), "class_names": () if backbone else names})
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    except Exception as error:  # what a damaged file, or one that is not there, can raise has no end
        raise CheckpointError(f"{source}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error


def architecture_of(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of our model but for the number of classes.

    Args:
        config: Of ``config.json``.

    Raises:
        CheckpointError: If ours cannot compute what that model computes; the message says why.
    """
    name = next(iter(config["architectures"] or ()), config.get("model_type"))
    if name not in CLASSES:
        others = "timm has most others under names of its own"
        raise CheckpointError(f"not supported, it is transformers' {name}; read are {', '.join(CLASSES)}; {others}")
    if (kind := config.get("problem_type")) not in (None, "single_label_classification"):
        raise CheckpointError(f"not supported, its problem_type is {kind}; ours gives an image one label")
    usual, more = CLASSES[name]
    c = {**usual, **config.get("vision_config", config)}
    if c["hidden_act"] not in ACTIVATIONS:
        raise CheckpointError(f"not supported, it has activation {c['hidden_act']}")
    patch = _pair(c["patch_size"])
    return {
        "image_size": tuple(side // p * p for side, p in zip(_pair(c["image_size"]), patch, strict=True)),
        "patch_size": patch,
        "in_chans": c["num_channels"],
        "embed_dim": c["hidden_size"],
        "depth": c["num_hidden_layers"],
        "num_heads": c["num_attention_heads"],
        "mlp_ratio": c["intermediate_size"] / c["hidden_size"],
        "qkv_bias": c["qkv_bias"],
        "act": ACTIVATIONS[c["hidden_act"]],
        "norm_eps": c["layer_norm_eps"],
        **more,
    }


def labels_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of the classes in the order of the logits; numbered where the config has none."""
    names = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    return distinct([str(names[number]) for number in sorted(names, key=int)])


def preprocess_of(processor: dict[str, Any], image_size: tuple[int, int]) -> Preprocess:
    """The eval-time transform that an image processor of transformers makes.

    Args:
        processor: Of ``preprocessor_config.json``.
        image_size: Height and width of the model's images, in pixels.

    Raises:
        CheckpointError: If pixels do not become values in [0, 1] before they are normalised.
    """
    if not processor.get("do_rescale", True) or abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise CheckpointError("not supported, its preprocessing does not divide pixels by 255")
    size, cut = processor.get("size", image_size), processor.get("do_center_crop")
    shorter = size.get("shortest_edge") if isinstance(size, dict) else None
    normal = processor.get("do_normalize", True)
    return Preprocess(
        image_size=image_size,
        mean=tuple(processor["image_mean"]) if normal else (0.0,) * 3,
        std=tuple(processor["image_std"]) if normal else (1.0,) * 3,
        interpolation=Image.Resampling(processor.get("resample", Image.Resampling.BILINEAR)).name.lower(),
        crop=min(1.0, _pair(processor["crop_size"])[0] / (shorter or _pair(size)[0])) if cut else 1.0,
        squash=not shorter,
    )


def weights_of(find: Callable[[str], Path]) -> dict[str, Tensor]:
    """The weights by their own names, of a safetensors file or else a pickle that may hold tensors alone."""
    try:
        return load_file(find("model.safetensors"))
    except OSError:
        try:
            file = find("pytorch_model.bin")
        except OSError as error:
            raise CheckpointError("has neither model.safetensors nor pytorch_model.bin") from error
    return torch.load(file, map_location="cpu", weights_only=True)


def by_our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by our names; queries, keys and values are one map."""
    weights = {}
    for name, tensor in theirs.items():
        if UNREAD.match(name):
            continue
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        weights[name] = tensor[None] if name == "pos_embed" and tensor.ndim == 2 else tensor
    for name in [name for name in weights if ".attn.q." in name]:
        parts = [weights.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        weights[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return weights


def _pair(size: Any) -> tuple[int, int]:
    """Height and width, of one number for both, two numbers, or both by name."""
    if isinstance(size, dict):
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else tuple(size)
