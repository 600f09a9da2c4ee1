"""Trained weights as our model, be they timm's or our own, and fitted to new data.

A timm model is translated by looking at its modules, not by its name: either everything in it has a counterpart here,
and then all weights load strictly and the logits are equal, or it is refused with the reason (docs/timm.md lists both).
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.layers.attention import Attention, AttentionRope
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed, resample_patch_embed
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models import adapt_input_conv
from timm.models import eva as timm_eva
from timm.models import load_pretrained as load_weights
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from vit.checkpoint import SHIPPED, Checkpoint, CheckpointError, load_checkpoint, of_folder
from vit.huggingface import WRAPPER, class_of, config_of, from_transformers, in_folder, named, on_hub
from vit.model import VisionTransformer, mlp_ratio_of
from vit.preprocess import Preprocess
from vit.records import distinct

ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}  # by timm's class names
PARTS = {  # timm's classes of models, and what is in those that ours can be: of EVA's, DINOv3 above all
    timm_vit.VisionTransformer: (timm_vit.Block, (Attention,)),
    timm_eva.Eva: (timm_eva.EvaBlock, (timm_eva.EvaAttention, AttentionRope)),
}
ROTATION = {  # arguments of timm's class with which it turns as ``vit.model.rotation`` does
    **{"temperature": 100, "min_period": None, "max_period": None, "normalize_coords": "separate"},
    **{"grid_offset": 0, "grid_indexing": "ij", "rotate_half": True},
}
REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")  # what timm.create_model takes beside the names of its registry
# Of an architecture, what fine-tuning may change; everything else is the pretrained model's.
ADAPTED = ("image_size", "in_chans", "num_classes", "patch_size", "drop_path_rate")


class Unsupported(CheckpointError):
    """A model that does something ours does not."""


# ---- reading -------------------------------------------------------------------------------------------------------


def load_pretrained(source: str | Path) -> tuple[VisionTransformer, Checkpoint]:
    """A pretrained model, in eval mode with float32 weights, and what is known about it.

    A backbone without a classifier has no class names, and a head of one zero output.

    Args:
        source: A file of ours (``model.safetensors``, ``.ckpt``); a folder as timm and transformers keep
            (``config.json`` beside the weights); a timm name such as ``vit_small_patch16_224.augreg_in21k``, downloaded
            by timm; ``hf-hub:OWNER/NAME``, such a folder on the Hugging Face hub; ``TIMM_NAME=FILE`` for a file of
            plain weights; or ``cifar10``, the weights that come along.

    Raises:
        CheckpointError: If there is no such thing, it cannot be read, or ours cannot compute what it computes.
    """
    text = str(source)
    name, equals, file = text.partition("=")
    if text == "cifar10":  # also where there is a folder of that name: that is ./cifar10
        return load_checkpoint(SHIPPED)
    if os.path.isdir(source):  # not by Path, which raises where one may not look
        if not Path(source, "config.json").is_file():
            raise CheckpointError(f"{source}: {of_folder(Path(source))}")
        if found := _of_transformers(text, partial(in_folder, text)):
            return found
        model, about = _read(text, lambda **more: timm.create_model(f"local-dir:{text}", **more))
        return model, _with_our_part(about, Path(source, "config.json"))
    if os.path.isfile(source):
        try:
            return load_checkpoint(source)
        except CheckpointError as error:
            plain = text.endswith((".pth", ".pt", ".bin", ".tar")) or "written by another program" in str(error)
            if not plain:
                raise
            raise CheckpointError(
                f"{source}: plain weights do not say what model they are of; write TIMM_NAME={source}, or name the "
                "folder with its config.json"
            ) from error
    if equals and timm.is_model(_architecture_name(name)):
        if not os.path.isfile(file):
            raise CheckpointError(f"{file}: no such weights file")
        return _read(text, lambda **more: timm.create_model(name, **more), file=file)
    if text.startswith(REMOTE[:2]) and (found := _of_transformers(text, partial(on_hub, text.partition(":")[2]))):
        return found
    if text.startswith(REMOTE) or timm.is_model(_architecture_name(text)):
        return _read(text, lambda **more: timm.create_model(text, **more))
    on_hub_perhaps = text.count("/") == 1 and not Path(text).suffix
    hint = f"if it is on the hub: hf-hub:{source}" if on_hub_perhaps else "timm.list_models('vit*')"
    raise CheckpointError(f"{source}: neither a file or folder nor the name of a timm model; {hint}")


def _architecture_name(name: str) -> str:
    return name.partition(".")[0]  # what is behind the dot says on what it was trained


def _of_transformers(source: str, find: Callable[[str], Path]) -> tuple[VisionTransformer, Checkpoint] | None:
    """A model that transformers saved, be it its own or one of timm's; none if timm did."""
    with named(source):
        config = config_of(find)
        name = class_of(config)
    if name != WRAPPER:
        return from_transformers(source, config, find) if name else None
    with named(source):
        names = config.get("label_names", ())
        about = {"architecture": config["architecture"], "label_names": names, "num_classes": len(names)}
        more = {"num_classes": len(names), "pretrained_cfg": {**config["pretrained_cfg"], **about}}
        create = partial(timm.create_model, config["architecture"], **{**config.get("model_args", {}), **more})
        file = str(find("model.safetensors"))
    return _read(source, create, file)


def _read(source: str, create: Callable[..., nn.Module], file: str = "") -> tuple[VisionTransformer, Checkpoint]:
    """Refuse what we do not support before anything is downloaded, then build it with its weights."""
    with named(source):
        try:
            with torch.device("meta"):
                architecture_of(usual := create(pretrained=False))
            overlay: dict[str, Any] = {"file": file, "custom_load": file.endswith(".npz")} if file else {}
            asked: dict[str, Any] = {"pretrained_cfg_overlay": overlay} if file else {}
            if file and not overlay["custom_load"]:  # perhaps fine-tuned, for other classes or sizes than the name says
                weights = timm.models.load_state_dict(file)
                if "blocks.0.norm1.weight" in weights:  # timm's own names, so that the head's would be timm's too
                    asked["num_classes"] = overlay["num_classes"] = len(weights.get("head.weight", ()))
                    asked |= sizes_in(weights, usual)
            theirs: Any = create(pretrained=False, **asked)
            for weights in theirs.parameters():
                weights.data.fill_(math.nan)  # what a file of arrays lacks would stay random, without a word
            told = theirs.pretrained_cfg.get("num_classes")  # as by the model, or timm would drop the head and be lax
            load_weights(theirs, num_classes=told, in_chans=theirs.in_chans, filter_fn=_filtered)
            for name, weights in theirs.named_parameters():
                if weights.isnan().all():
                    raise CheckpointError(f"has no {name} of that shape; is it of another model, or of other classes?")
            return from_timm(theirs)
        except Unsupported as error:
            raise Unsupported(f"not supported, it has {error}") from error
        except KeyError as error:
            if error.args != ("architecture",):
                raise
            raise CheckpointError("its config.json is neither timm's nor transformers'") from error


def sizes_in(weights: dict[str, Tensor], usual: Any) -> dict[str, Any]:
    """Patch and image size that weights were trained for, where they are others: timm would resample both, unsaid.

    Args:
        weights: By timm's names.
        usual: The model that timm makes of their name. Another image size than its own is taken to be square.
    """
    embed, positions = usual.patch_embed, weights.get("pos_embed")
    kernel: Any = weights.get("patch_embed.proj.weight", embed.proj.weight)
    patch = tuple(kernel.shape[2:]) if kernel.ndim == 4 else embed.patch_size
    found: dict[str, Any] = {} if patch == embed.patch_size else {"patch_size": patch}
    if positions is not None and usual.pos_embed is not None:
        patches = positions.shape[1] - (usual.pos_embed.shape[1] - embed.num_patches)
        side = math.isqrt(max(0, patches))
        if side and side**2 == patches and (found or patches != embed.num_patches):
            found["img_size"] = tuple(side * pixels for pixels in patch)
    return found


def _filtered(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """As timm, but the pooling that SigLIP's files bring is left out here: timm ignores whatever is there or missing.

    DeiT's layer scale has another name in its files. Those of DINOv3 have biases that are zero, which timm's names
    without ``qkvb`` have no place for. Names have a prefix where transformers has trained a model of timm's.
    """
    weights = {name.removeprefix("timm_model."): tensor for name, tensor in weights.items()}
    if isinstance(model, timm_eva.Eva):
        if "storage_tokens" in weights and getattr(model.blocks[0].attn, "q_bias", None) is None:
            for name in [name for name in weights if name.endswith("attn.qkv.bias")]:
                queries, _, values = weights.pop(name).chunk(3)  # that of the keys is masked there
                if queries.any() or values.any():
                    raise CheckpointError(f"has {name}, which is not zero; give timm's name with _qkvb")
        return timm_eva.checkpoint_filter_fn(weights, model)
    weights = timm_vit.checkpoint_filter_fn(weights, model, adapt_layer_scale=True)  # type: ignore[arg-type]
    return {name: tensor for name, tensor in weights.items() if not name.startswith("attn_pool.")}


def _with_our_part(about: Checkpoint, config: Path) -> Checkpoint:
    """What ``vit.export`` wrote beside timm's own entries, if it was the writer."""
    try:
        ours = json.loads(config.read_text()).get("vit", {})
        about = replace(about, **{name: ours[name] for name in ("temperature", "metrics", "training") if name in ours})
        about = replace(about, preprocess=replace(about.preprocess, white=ours.get("white")))
        good = 0 < about.temperature < math.inf
    except Exception:
        good = False
    if not good:
        raise CheckpointError(f"{config}: its entry 'vit' is damaged; without the entry the folder can be read")
    return about


def from_timm(theirs: nn.Module) -> tuple[VisionTransformer, Checkpoint]:
    """Our model with a timm model's weights, shared and not copied, and its labels and preprocessing.

    Args:
        theirs: From ``timm.create_model``, on the CPU or without memory (``meta``).

    Raises:
        Unsupported: If it has a part that ours has not; the message says which.
    """
    architecture = architecture_of(theirs)
    weights = {name: tensor.float() for name, tensor in _by_our_names(theirs).items()}
    headless = "head.weight" not in weights
    if headless:
        weights |= {"head.weight": torch.zeros(1, architecture["embed_dim"]), "head.bias": torch.zeros(1)}
    with torch.device("meta"):  # no time for weights that are replaced
        ours = VisionTransformer(**architecture)
    ours.load_state_dict(weights, strict=True, assign=True)
    about = Checkpoint(
        architecture=ours.architecture,
        class_names=() if headless else labels_of(theirs),
        preprocess=preprocess_of(theirs, ours.image_size),
        training={"pretrained": _tagged_name(theirs)},
    )
    return ours.eval().requires_grad_(True), about


def _tagged_name(theirs: nn.Module) -> str:
    config: dict[str, Any] = getattr(theirs, "pretrained_cfg", None) or {}
    return ".".join(part for part in (config.get("architecture"), config.get("tag")) if part)


# ---- translating a timm model --------------------------------------------------------------------------------------


def architecture_of(theirs: nn.Module) -> dict[str, Any]:
    """Arguments with which our model computes what timm's does.

    Args:
        theirs: A timm model.

    Raises:
        Unsupported: With what it has that ours has not.
    """
    rope = getattr(theirs, "rope", None)
    ours = type(rope) is RotaryEmbeddingDinoV3 and all(getattr(rope, k) == value for k, value in ROTATION.items())
    if not (rope is None or ours):
        raise Unsupported("rotary positions (RoPE) other than DINOv3's")
    if type(theirs) not in PARTS:
        raise Unsupported(f"timm's class {type(theirs).__name__} instead of its VisionTransformer")
    model: Any = theirs
    block, embed = model.blocks[0], model.patch_embed
    for reason, found in _foreign_parts(model, block):
        if found:
            raise Unsupported(reason)
    weights, pool = _by_our_names(theirs), "token" if model.global_pool == "token" else "mean"
    return {
        # Where sizes do not divide (384 by 14), timm leaves the last pixels out: the same for an image without them.
        "image_size": tuple(g * p for g, p in zip(embed.grid_size, embed.patch_size, strict=True)),
        "patch_size": tuple(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes or 1,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": mlp_ratio_of(block.mlp.fc1.out_features, model.embed_dim),
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "pool": pool,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in weights else None,  # a start; the weights replace it
        "num_registers": model.num_prefix_tokens - (pool == "token"),
        "prefix_positions": weights["pos_embed"].shape[1] > embed.num_patches,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "norm_after_pool": not isinstance(model.fc_norm, nn.Identity),
        "act": ACTIVATIONS[type(block.mlp.act).__name__],
        "norm_eps": block.norm1.eps,
        "rope": rope is not None,
    }


def _by_our_names(theirs: Any) -> dict[str, Tensor]:
    """A timm model's weights as ours has them.

    A class token that is not what is classified is one more register. Where there is no position embedding it is zero.
    """
    weights = dict(theirs.state_dict())
    if isinstance(theirs, timm_eva.Eva):
        weights = {re.sub(r"gamma_([12])$", r"ls\1.gamma", name): tensor for name, tensor in weights.items()}
        for name in [name for name in weights if name.endswith("attn.q_bias")]:
            queries, values = weights.pop(name), weights.pop(name.replace("q_bias", "v_bias"))
            weights[name.replace("q_bias", "qkv.bias")] = torch.cat([queries, torch.zeros_like(queries), values])
    if theirs.global_pool == "avg" and "cls_token" in weights:
        tokens = [weights.pop(name) for name in ("cls_token", "reg_token") if name in weights]
        weights["reg_token"] = torch.cat(tokens, 1)
    patches = theirs.patch_embed.proj.weight.new_zeros(1, theirs.patch_embed.num_patches, theirs.embed_dim)
    return {"pos_embed": patches} | weights


def _foreign_parts(model: Any, block: Any) -> Any:
    """Pairs (what, whether the timm model has it) of all that ours lacks, one after the other; outer parts first."""
    plain, attentions = PARTS[type(model)]
    yield f"{type(block).__name__} instead of plain pre-norm blocks", type(block) is not plain
    yield f"{type(block.attn).__name__} instead of plain attention", type(block.attn) not in attentions
    yield f"{type(block.mlp).__name__} instead of a plain MLP", type(block.mlp) is not Mlp
    yield f"{type(block.norm1).__name__} instead of LayerNorm", not isinstance(block.norm1, nn.LayerNorm)
    yield (
        "another norm inside the attention or the MLP",
        not all(isinstance(norm, nn.Identity) for norm in (block.attn.norm, block.mlp.norm)),
    )
    yield "GELU by its tanh approximation under GELU's name", getattr(block.mlp.act, "approximate", "none") != "none"
    yield "gated attention", block.attn.gate is not None
    yield "heads that are not embed_dim / num_heads wide", block.attn.proj.in_features != model.embed_dim
    yield "queries, keys and values by maps of their own", block.attn.qkv is None
    yield f"activation {type(block.mlp.act).__name__}", type(block.mlp.act).__name__ not in ACTIVATIONS
    yield f"pooling by attention ({model.global_pool})", model.attn_pool is not None
    yield f"pooling {model.global_pool!r}", model.global_pool not in ("token", "avg")
    yield "a mean that includes registers", getattr(model, "pool_include_prefix", False)
    norms = [norm for norm in (model.norm, model.fc_norm) if not isinstance(norm, nn.Identity)]
    yield f"{len(norms)} norms before the head instead of one", len(norms) != 1
    yield "no position embedding", model.pos_embed is None and getattr(model, "rope", None) is None
    plain = type(model.patch_embed) is PatchEmbed and isinstance(model.patch_embed.norm, nn.Identity)
    yield f"another patch embedding ({type(model.patch_embed).__name__})", not plain
    pre_norm = not isinstance(model.norm_pre, nn.Identity)
    yield "a patch embedding with unusual bias", (model.patch_embed.proj.bias is None) != pre_norm
    yield "a linear map without bias", block.attn.proj.bias is None or block.mlp.fc1.bias is None
    yield "norms of different epsilon", len({m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}) > 1


def preprocess_of(theirs: nn.Module, image_size: tuple[int, int]) -> Preprocess:
    """The eval-time transform of a timm model, as near as ours comes: always the centre."""
    config = resolve_data_config({}, model=theirs)
    side = min(image_size)  # which timm cuts out of an image of whole pixels: 224 of 248 for 0.9
    filters = {name.lower() for name in Image.Resampling.__members__}
    return Preprocess(
        image_size=image_size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"] if config["interpolation"] in filters else "bicubic",
        crop=min(1.0, side / math.floor(side / config["crop_pct"])),
        squash=config["crop_mode"] == "squash",
    )


def labels_of(theirs: Any) -> tuple[str, ...]:
    """Names of a timm model's classes: those it carries, ImageNet's by the number of classes, or else numbers."""
    count, config = theirs.num_classes, getattr(theirs, "pretrained_cfg", None) or {}
    carried = config.get("label_names")
    if carried and len(carried) == count:
        names = [carried[str(i)] for i in range(count)] if isinstance(carried, dict) else list(carried)
        described = config.get("label_descriptions") or {}
    elif subset := infer_imagenet_subset(theirs):
        info = ImageNetInfo(subset)
        names = info.label_names()
        described = {name: info.label_name_to_description(name) for name in names}
    else:
        return tuple(str(i) for i in range(count))
    texts = [str(described.get(name, name)) for name in names]
    often = Counter(texts)  # a label must name one class: ImageNet has two kinds of crane
    marked = [
        text if often[text] == 1 or text == name else f"{text} ({name})"
        for text, name in zip(texts, names, strict=True)
    ]
    return distinct(marked)  # for names that are carried may be there twice themselves


# ---- fitting it to new data ----------------------------------------------------------------------------------------


def start_from(
    source: str | Path,
    *,
    image_size: int | tuple[int, int],
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    white: float | None = None,
    **asked: Any,
) -> tuple[VisionTransformer, list[str]]:
    """A model for new data with the weights of an old one, and what had to be changed, in words.

    Args:
        source: What ``load_pretrained`` takes.
        image_size: Height and width of the new images, in pixels.
        class_names: Names of the new classes; the head is kept only if they are the old ones.
        mean: Mean of each channel of the new images, of values in [0, 1].
        std: Standard deviation of each channel of the new images, of values in [0, 1].
        white: Value that is white in the new images, if they are grey with more than 8 bits.
        asked: Arguments of VisionTransformer; a patch_size other than the old one resamples the patch embedding, and
            drop_path_rate is 0 unless asked for: how the old weights were trained says nothing of the new training.

    Raises:
        CheckpointError: As ``load_pretrained``, and if the weights cannot be fitted to what is asked.
    """
    old, about = load_pretrained(source)
    fresh = {"image_size": image_size, "in_chans": len(mean), "num_classes": len(class_names)}
    for name, value in asked.items():
        if name not in ADAPTED and name in old.architecture and value != old.architecture[name]:
            theirs = old.architecture[name]
            raise CheckpointError(f"{source}: has {name} {theirs}; give --model.{name} {theirs} or none, not {value}")
    kept = {name: value for name, value in asked.items() if name in ADAPTED}
    new = VisionTransformer(**{**old.architecture, "drop_path_rate": 0.0, **kept, **fresh})
    weights, notes = dict(old.state_dict()), []

    if new.patch_size != old.patch_size or new.in_chans != old.in_chans:
        notes += _fit_patches(weights, old, new, source)
    if folded := _fit_normalisation(weights, about.preprocess, mean, std):
        notes.append(folded)
    if new.grid_size != old.grid_size:
        weights["pos_embed"] = old.positions(new.grid_size)
        if weights["pos_embed"].any():  # or there is none: rope alone
            notes.append(f"position embedding resampled from {_by(old.grid_size)} to {_by(new.grid_size)} patches")
        if math.prod(new.grid_size) < math.prod(old.grid_size):  # perhaps by an image_size that nobody thought of
            height, width = (n * side for n, side in zip(old.grid_size, new.patch_size, strict=True))
            size = height if height == width else f"'[{height}, {width}]'"
            found = f"an image is {_by(new.grid_size)} patches, and was {_by(old.grid_size)}"
            notes.append(f"{found}: --data.image_size {size} keeps them")
    if tuple(class_names) != about.class_names:
        weights |= {name: new.state_dict()[name] for name in ("head.weight", "head.bias")}
        notes.append(f"head replaced: {len(about.class_names)} classes before, {len(class_names)} now")
    if about.preprocess.squash:
        notes.append("long images were squashed before, and their middle is cut out now")
    if white != about.preprocess.white:
        notes.append(f"data.white {about.preprocess.white} before, {white} now")
    new.load_state_dict(weights, strict=True)
    return new, notes


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _fit_patches(
    weights: dict[str, Tensor], old: VisionTransformer, new: VisionTransformer, source: str | Path
) -> list[str]:
    """Adapt the first convolution to another number of channels and, if it is the whole stem, to another patch size."""
    notes = []
    first = "patch_embed.proj.weight" if "patch_embed.proj.weight" in weights else "patch_embed.proj.0.weight"
    if new.patch_size != old.patch_size:
        if old.architecture["stem"] != "linear":
            raise CheckpointError(f"{source}: a convolutional stem keeps its patch size {_by(old.patch_size)}")
        weights[first] = resample_patch_embed(weights[first], list(new.patch_size))
        notes.append(f"patch embedding resampled from {_by(old.patch_size)} to {_by(new.patch_size)} pixels")
    if new.in_chans != old.in_chans:
        weights[first] = adapt_input_conv(new.in_chans, weights[first], base_chans=old.in_chans)
        notes.append(f"patch embedding adapted from {old.in_chans} to {new.in_chans} channels")
    return notes


def _fit_normalisation(
    weights: dict[str, Tensor], before: Preprocess, mean: Sequence[float], std: Sequence[float]
) -> str:
    """Make the patch embedding see new images as it saw the old: the other mean and std become part of it, exactly.

    Where the stem has no bias to take up the mean, or pads with zeros, nothing is done.
    """
    same = tuple(mean) == before.mean and tuple(std) == before.std
    if same or len(mean) != len(before.mean) or "patch_embed.proj.bias" not in weights:
        return ""
    weight = weights["patch_embed.proj.weight"].double()
    m0, s0, m1, s1 = (torch.tensor(v).double().view(1, -1, 1, 1) for v in (before.mean, before.std, mean, std))
    bias = weights["patch_embed.proj.bias"].double() + (weight * (m1 - m0) / s0).sum((1, 2, 3))
    weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"] = (weight * s1 / s0).float(), bias.float()
    return "mean and std of the new images folded into the patch embedding"
