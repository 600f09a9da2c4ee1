"""Models of the library transformers as ours: what its ``save_pretrained`` writes and the Hugging Face hub keeps.

That is three files: ``config.json``, ``preprocessor_config.json`` and the weights. The library itself is not needed.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vit.checkpoint import Checkpoint, CheckpointError, build
from vit.model import VisionTransformer, mlp_ratio_of
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
WRAPPER = "TimmWrapperForImageClassification"  # a model of timm's
USUAL = {  # class by the model's type, for a config that names none
    **{"vit": "ViTForImageClassification", "deit": "DeiTForImageClassification"},
    **{"siglip": "SiglipForImageClassification", "timm_wrapper": WRAPPER},
}
TANH = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh")  # names of one formula
ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "quick_gelu": "quick_gelu", **dict.fromkeys(TANH, "gelu_tanh")}
# Processors of images: whether one number as size is that of the shorter side, and whether they cut out the middle.
PROCESSORS = {
    **{"ViT": (False, False), "Siglip": (False, False), "DeiT": (False, True)},
    **{"CLIP": (True, True), "Bit": (True, True)},
}
FOREIGN = ("do_pad", "do_flip_channel_order", "rescale_offset", "crop_pct")  # what those do not, and so ours does not
UNREAD = re.compile(r"(\w+\.)?(pooler|head|embeddings\.(mask_token|position_ids))\b")  # by what classifies
NAMES = [  # of weights, in files and in transformers 5, and how ours are called
    (r"^(vit|deit|vision_model)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "reg_token"),
    (r"^embeddings\.position_embedding(s|\.weight)$", "pos_embed"),
    (r"^embeddings\.patch_embedding(s\.projection)?\.", "patch_embed.proj."),
    (r"^(encoder\.)?layers?\.", "blocks."),
    (r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.(attention\.attention|attention|self_attn)\.([qkv])(uery|ey|alue|_proj)\.", r".attn.\2."),
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


def from_transformers(
    source: str, config: dict[str, Any], find: Callable[[str], Path]
) -> tuple[VisionTransformer, Checkpoint]:
    """The model, in eval mode with float32 weights, and what is known about it; logits are those of transformers.

    A backbone (``ViTModel``) has no class names, and a head of one zero output.

    Args:
        source: Its name, for messages.
        config: Of ``config_of``.
        find: Gives its files: ``in_folder`` of a folder, or ``on_hub`` of a name.

    Raises:
        CheckpointError: If it is of a class other than CLASSES, has what ours has not, or is damaged.
    """
    with named(source):
        name = class_of(config)
        backbone = name == "ViTModel"
        c = {**CLASSES[name][0], **config.get("vision_config", config)}
        architecture = architecture_of(c)
        seen = preprocess_of(processor_of(find), _pair(c["image_size"]), c["num_channels"])
        labels = ("",) if backbone else labels_of(config)
        about = Checkpoint(
            architecture={**architecture, **CLASSES[name][1], "num_classes": len(labels)},
            class_names=labels,
            preprocess=replace(seen, image_size=architecture["image_size"]),
            training={"pretrained": source},
        )
        weights = by_our_names(weights_of(find))
        if backbone:
            weights |= {"head.weight": torch.zeros(1, c["hidden_size"]), "head.bias": torch.zeros(1)}
        return build(about, weights), replace(about, class_names=()) if backbone else about


@contextmanager
def named(source: str) -> Iterator[None]:
    """Errors in one line that begins with the model's name; what a damaged file can raise has no end."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"{source}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{source}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error


def there(find: Callable[[str], Path], name: str) -> Path | None:
    """The path of a file, if it is there."""
    try:
        return find(name)
    except OSError:
        return None


def read(file: Path) -> dict[str, Any]:
    """What a JSON file holds."""
    return json.loads(file.read_text("utf-8"))


def config_of(find: Callable[[str], Path]) -> dict[str, Any]:
    """What ``config.json`` holds, without what it leaves open."""
    return {name: value for name, value in read(find("config.json")).items() if value is not None}


def class_of(config: dict[str, Any]) -> str:
    """Whose ``config.json`` it is: a class of transformers, or an empty text for timm.

    Raises:
        CheckpointError: If it is of transformers and gives not one class of several.
    """
    if "model_type" not in config and "architectures" not in config:
        return ""
    kind = str(config.get("model_type", ""))
    name: str = next(iter(config.get("architectures", ())), USUAL.get(kind, kind))
    if (problem := config.get("problem_type")) not in (None, "single_label_classification"):
        raise CheckpointError(f"not supported, its problem_type is {problem}; ours gives an image one label of several")
    if name.endswith("ForImageClassification") and len(config.get("id2label") or config.get("label_names", "  ")) == 1:
        raise CheckpointError("not supported, it has one class; ours gives an image one label of several")
    if name not in (WRAPPER, *CLASSES):
        others = "timm has most others under names of its own"
        raise CheckpointError(f"not supported, it is transformers' {name}; read are {', '.join(CLASSES)}; {others}")
    return name


def architecture_of(c: dict[str, Any]) -> dict[str, Any]:
    """Arguments of our model: those that do not follow from the class.

    Args:
        c: What the config says of the part that sees, with what goes without saying.

    Raises:
        CheckpointError: If ours cannot compute what that model computes; the message says why.
    """
    if c["hidden_act"] not in ACTIVATIONS:
        raise CheckpointError(f"not supported, it has activation {c['hidden_act']}")
    image_size, patch_size = _pair(c["image_size"]), _pair(c["patch_size"])
    return {
        # Where patches do not fill an image, transformers leaves its last pixels out; here it is made smaller.
        "image_size": tuple(side // patch * patch for side, patch in zip(image_size, patch_size, strict=True)),
        "patch_size": patch_size,
        "in_chans": c["num_channels"],
        "embed_dim": c["hidden_size"],
        "depth": c["num_hidden_layers"],
        "num_heads": c["num_attention_heads"],
        "mlp_ratio": mlp_ratio_of(c["intermediate_size"], c["hidden_size"]),
        "qkv_bias": c["qkv_bias"],
        "act": ACTIVATIONS[c["hidden_act"]],
        "norm_eps": c["layer_norm_eps"],
    }


def labels_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of the classes in the order of the logits; numbered where the config has none."""
    names = config.get("id2label") or {i: f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    names = {int(number): str(name) for number, name in names.items()}
    if set(names) != set(range(len(names))):
        raise CheckpointError(f"its id2label numbers {len(names)} classes {sorted(names)[:9]}, not from 0 on")
    return distinct([names[number] for number in range(len(names))])


def processor_of(find: Callable[[str], Path]) -> dict[str, Any]:
    """What makes pixels of an image; where both files are there, transformers takes the first of these as well."""
    if (file := there(find, "processor_config.json")) and (found := read(file).get("image_processor")):
        return found
    if file := there(find, "preprocessor_config.json"):
        return read(file)
    hint = "transformers' image_processor.save_pretrained writes it"
    raise CheckpointError(f"has no preprocessor_config.json, which says how images get in; {hint}")


def preprocess_of(processor: dict[str, Any], image_size: tuple[int, int], in_chans: int) -> Preprocess:
    """The eval-time transform that an image processor of transformers makes.

    Args:
        processor: Of ``processor_of``.
        image_size: Height and width of the images that the model takes, in pixels.
        in_chans: Channels of an image.

    Raises:
        CheckpointError: If it does what ours does not, or makes other images than the model takes.
    """
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type") or "ViTImageProcessor")
    kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind)
    if kind not in PROCESSORS:
        raise CheckpointError(
            f"not supported, its images go through {kind}ImageProcessor; read are {', '.join(PROCESSORS)}"
        )
    for name in FOREIGN:
        if processor.get(name):
            raise CheckpointError(f"not supported, its images go through {name} {processor[name]}")
    if not processor.get("do_rescale", True) or abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise CheckpointError("not supported, its preprocessing does not divide pixels by 255")
    normal = processor.get("do_normalize", True)
    needed = ("size", "resample", *(("image_mean", "image_std") if normal else ()))
    if missing := [name for name in needed if processor.get(name) is None]:
        raise CheckpointError(f"its preprocessor_config.json says nothing of {', '.join(missing)}")

    shorter, cuts = PROCESSORS[kind]
    size, cut = processor["size"], image_size
    if isinstance(size, int):
        size = {"shortest_edge": size} if shorter else {"height": size, "width": size}
    squash = size.keys() == {"height", "width"}
    if processor.get("do_center_crop", cuts):
        cut = _pair(processor.get("crop_size", image_size))
    whole = _pair(size) if squash else (size.get("shortest_edge", 0),) * 2
    parts = [c / w if w else 0 for c, w in zip(cut, whole, strict=True)]
    if not processor.get("do_resize", True) or cut != image_size or parts[0] != parts[1] or not 0 < parts[0] <= 1:
        made = {
            name: processor[name] for name in ("do_resize", "size", "do_center_crop", "crop_size") if name in processor
        }
        raise CheckpointError(f"not supported, the model takes images of {image_size} and its preprocessing has {made}")
    return Preprocess(
        image_size=image_size,
        mean=tuple(processor["image_mean"]) if normal else (0.0,) * in_chans,
        std=tuple(processor["image_std"]) if normal else (1.0,) * in_chans,
        interpolation=Image.Resampling(processor["resample"]).name.lower(),
        crop=parts[0],
        squash=squash,
    )


def weights_of(find: Callable[[str], Path]) -> dict[str, Tensor]:
    """The weights by their own names: of a safetensors file, of several, or of a pickle that may hold tensors alone."""
    if file := there(find, "model.safetensors"):
        return load_file(file)
    if index := there(find, "model.safetensors.index.json"):
        parts = sorted(set(read(index)["weight_map"].values()))
        return {name: tensor for part in parts for name, tensor in load_file(find(part)).items()}
    if file := there(find, "pytorch_model.bin"):
        return torch.load(file, map_location="cpu", weights_only=True)
    raise CheckpointError("has neither model.safetensors nor pytorch_model.bin")


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
    return (size, size) if isinstance(size, int) else (size[0], size[1])
