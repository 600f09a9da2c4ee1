"""``model.safetensors``: one file that says everything about a model, and executes nothing.

Weights are plain tensors; the metadata holds one JSON text with the architecture, class names, preprocessing,
temperature, metrics and how it was trained. Also read: Lightning's ``.ckpt``, tensors and primitives only.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vit.model import VisionTransformer
from vit.preprocess import Preprocess

FORMAT_VERSION = 1
KEY = "vit"  # of the JSON text in the file's metadata


class CheckpointError(ValueError):
    """A file that is no checkpoint of ours, or a damaged one; the message is one line that names it."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a file says beside the weights.

    Args:
        architecture: Arguments of VisionTransformer.
        class_names: Name of each logit, in order.
        preprocess: The transform the model expects.
        temperature: Divides the logits before the softmax, so that scores are honest (Guo et al. 2017, 1706.04599).
        metrics: Measured figures by name, such as ``val/acc``.
        training: How it was trained: data set, steps, versions.
    """

    architecture: dict[str, Any]
    class_names: tuple[str, ...]
    preprocess: Preprocess
    temperature: float = 1.0
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    path: str | Path, state_dict: dict[str, torch.Tensor], about: Checkpoint, dtype: torch.dtype | None = None
) -> Path:
    """Write weights and description to one file; readers see the old file or the whole new one, never a part.

    Args:
        path: The file; its folder is made if missing.
        state_dict: Weights of a VisionTransformer, by timm's keys.
        about: The description.
        dtype: Type to store the weights in, such as torch.bfloat16 for half the size; none keeps theirs.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in state_dict.items()}
    text = json.dumps({"format_version": FORMAT_VERSION, **asdict(about)})
    payload = save(tensors, metadata={KEY: text, "format": "pt"})
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own 0600 would keep the file from colleagues
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def load_checkpoint(path: str | Path) -> tuple[VisionTransformer, Checkpoint]:
    """The model, in eval mode with float32 weights, and its description.

    Args:
        path: ``model.safetensors``, or a Lightning ``.ckpt`` written by train.py.

    Raises:
        CheckpointError: If the file is missing, truncated, of a newer format, a pickle with code in it, or its
            weights do not fit the architecture it names.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        state_dict, about = _read_ckpt(path) if path.suffix == ".ckpt" else _read_safetensors(path)
    except CheckpointError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of this project ({_line(error)})") from error
    try:
        model = VisionTransformer(**about.architecture)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: its architecture cannot be built ({_line(error)})") from error
    if len(about.class_names) != model.num_classes:
        raise CheckpointError(f"{path}: {len(about.class_names)} class names for {model.num_classes} classes")
    _check_weights(path, model.state_dict(), state_dict)
    model.load_state_dict(state_dict)
    return model.eval(), about


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], Checkpoint]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise CheckpointError(f"{path}: safetensors without a {KEY!r} description; written by another program?")
            about = _description(path, json.loads(metadata[KEY]))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file, or a truncated one ({_line(error)})") from error


def _description(path: Path, raw: dict[str, Any]) -> Checkpoint:
    version = raw.pop("format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version} is newer than {FORMAT_VERSION}; please update")
    raw["preprocess"] = Preprocess(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw["preprocess"].items()})
    raw["class_names"] = tuple(raw["class_names"])
    return Checkpoint(**raw)


def _read_ckpt(path: Path) -> tuple[dict[str, torch.Tensor], Checkpoint]:
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many types; whatever it was, nothing in the file was executed
        raise CheckpointError(f"{path}: refused, not a plain checkpoint of tensors and numbers") from error
    about = _description(path, dict(raw["vit"]))
    return {k.removeprefix("vit."): v for k, v in raw["state_dict"].items() if k.startswith("vit.")}, about


def _check_weights(path: Path, wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    for name, tensor in wanted.items():
        if name not in found:
            raise CheckpointError(f"{path}: weight {name} is missing")
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: weight {name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
            )
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(f"{path}: unknown weight {extra[0]}" + (f" and {len(extra) - 1} more" if extra[1:] else ""))


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
