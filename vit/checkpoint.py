"""``model.safetensors``: one file that says everything about a model, and executes nothing.

Weights are plain tensors; the metadata holds one JSON text with the architecture, class names, preprocessing,
temperature, metrics and how it was trained. Also read: Lightning's ``.ckpt``, tensors and primitives only.
"""

import json
import math
import os
import uuid
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vit.model import VisionTransformer
from vit.preprocess import Preprocess
from vit.records import distinct, printable, shown

SHIPPED = Path(__file__).parent / "weights" / "cifar10.safetensors"  # the weights that come with the code
FORMAT_VERSION = 1
KEY = "vit"  # of the JSON text in the file's metadata
LARGEST = 1_000_000  # number an architecture may hold; a hostile one could keep us busy for ever


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

    Raises:
        CheckpointError: If a class name is there twice: of what is kept by name, such as scores, one would be lost; or
            if metrics are no numbers by name, or training is nothing by name.
    """

    architecture: dict[str, Any]
    class_names: tuple[str, ...]
    preprocess: Preprocess
    temperature: float = 1.0
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if twice := [name for name, times in Counter(self.class_names).items() if times > 1]:
            raise CheckpointError(f"class name {twice[0]!r} is there twice: tell them apart, as in 'crane (bird)'")
        for name in ("metrics", "training"):
            if not isinstance(getattr(self, name), dict):
                raise CheckpointError(f"its {name} must be values by name, got {type(getattr(self, name)).__name__}")
        for name, value in self.metrics.items():
            if not isinstance(value, int | float) or (isinstance(value, int) and abs(value) > 2**53):
                raise CheckpointError(f"its metric {name!r} must be a number, got {str(value)[:80]!r}")


def save_checkpoint(
    path: str | Path, state_dict: dict[str, Tensor], about: Checkpoint, dtype: torch.dtype | None = None
) -> Path:
    """Write weights and description to one file; readers see the old file or the whole new one, never a part.

    Args:
        path: The file; its folder is made if missing.
        state_dict: Weights of a VisionTransformer, by timm's keys.
        about: The description.
        dtype: Type to store the weights in, such as torch.bfloat16 for half the size; none keeps theirs.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in state_dict.items()}
    text = json.dumps(describe(about))
    payload = save(tensors, metadata={KEY: text, "format": "pt"})
    temporary = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}")  # same folder, so that replacing is atomic
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:  # a full disk does not say which file it was
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    return path


def describe(about: Checkpoint) -> dict[str, Any]:
    """The description as plain data, as both kinds of checkpoint hold it."""
    described = {"format_version": FORMAT_VERSION, **asdict(about)}
    # So that versions that do not know these read all files without them.
    for name, usual in {"white": None, "squash": False}.items():
        if described["preprocess"][name] == usual:
            del described["preprocess"][name]
    if not described["architecture"].get("rope"):
        described["architecture"].pop("rope", None)
    return described


def load_checkpoint(path: str | Path) -> tuple[VisionTransformer, Checkpoint]:
    """The model, in eval mode with float32 weights, and its description.

    Args:
        path: ``model.safetensors``, or a Lightning ``.ckpt`` written by train.py.

    Raises:
        CheckpointError: If the file is missing, truncated, of a newer format, a pickle with code in it, or its
            weights do not fit the architecture it names; of a folder it says what to give instead.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise CheckpointError(of_folder(path))
        if not path.is_file():
            raise CheckpointError("no such checkpoint file")
        weights, about = _read_ckpt(path) if path.suffix == ".ckpt" else _read_safetensors(path)
        model = build(about, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {printable(str(error))}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or _line(error)})") from error
    except Exception as error:  # what a damaged or hostile description can raise has no end
        raise CheckpointError(f"{path}: not a checkpoint of this project ({_line(error)})") from error
    return model, about


def of_folder(folder: Path) -> str:
    """What to give instead of it."""
    if (folder / "config.json").is_file():  # beside it lies a model.safetensors of theirs
        return "a folder of timm or transformers, not a checkpoint file; predict.py and --model.pretrained read it"
    if (folder / "adapter_config.json").is_file():
        return "a folder of an adapter alone (PEFT); merge_and_unload() it into its model and save_pretrained that"
    files = [folder / name for name in ("model.safetensors", "best.ckpt", "last.ckpt")]
    saved = [path for path in folder.glob("checkpoint-*") if (path / "config.json").is_file()]  # by transformers
    files += sorted(saved, key=lambda path: path.stat().st_mtime)[-1:]
    found = next((file for file in files if file.exists()), None)
    return f"a folder without a config.json, not a checkpoint file; give {found or 'the file in it'}"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Checkpoint]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                hint = f"; give {path.parent}" if (path.parent / "config.json").is_file() else ""
                raise CheckpointError(f"safetensors without a {KEY!r} description; written by another program?{hint}")
            about = _description(json.loads(metadata[KEY]))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        if shown(str(path)) != str(path):
            raise CheckpointError("its path is no valid UTF-8; rename it, or name a link to it that is") from error
        if path.suffix != ".safetensors":
            kinds = "only .safetensors files and the .ckpt files of train.py are read"
            raise CheckpointError(f"not a checkpoint of this project; {kinds}") from error
        raise CheckpointError(f"not a safetensors file, or a truncated one ({_line(error)})") from error


def _read_ckpt(path: Path) -> tuple[dict[str, Tensor], Checkpoint]:
    with open(path, "rb") as file:
        whole = is_zipfile(file)  # whose table of contents is at its end; torch has other words, or none, without it
    if not whole:
        raise CheckpointError("refused, truncated or not written by train.py")
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler raises many types; whatever it was, nothing in the file was executed
        raise CheckpointError("refused, not a plain checkpoint of tensors and numbers") from error
    about = _description(dict(raw["vit"]))
    return {k.removeprefix("vit."): v for k, v in raw["state_dict"].items() if k.startswith("vit.")}, about


def _description(raw: dict[str, Any]) -> Checkpoint:
    version = raw.pop("format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"format version {version} is newer than {FORMAT_VERSION}; please update")
    architecture, preprocess = _tuples(raw.pop("architecture")), Preprocess(**_tuples(raw.pop("preprocess")))
    names = raw.pop("class_names")
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise CheckpointError("its class names are not a list of texts")
    names = distinct(names)  # older versions wrote some twice
    about = Checkpoint(architecture=architecture, class_names=names, preprocess=preprocess, **raw)
    if not (math.isfinite(about.temperature) and about.temperature > 0):
        raise CheckpointError(f"its temperature must be above 0, got {about.temperature}")
    return about


def _tuples(raw: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; ours are never lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}


def build(about: Checkpoint, weights: dict[str, Tensor]) -> VisionTransformer:
    """The model the description asks for, in eval mode; nothing is allocated before the weights are known to fit.

    Args:
        about: The description.
        weights: By the names of VisionTransformer; they become float32.

    Raises:
        CheckpointError: If they do not fit it, are not finite, or there is no such architecture.
    """
    for name, value in about.architecture.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not abs(number) <= LARGEST:
                raise CheckpointError(f"its architecture cannot be built ({name} is {number})")
    if about.architecture.get("depth", 0) > len(weights):
        raise CheckpointError(f"{len(weights)} weights are too few for a depth of {about.architecture['depth']}")
    try:
        with torch.device("meta"):  # shapes without memory: a description may ask for terabytes
            model = VisionTransformer(**about.architecture)
    except Exception as error:
        raise CheckpointError(f"its architecture cannot be built ({_line(error)})") from error
    if about.preprocess.image_size != model.image_size:
        sizes = f"{about.preprocess.image_size}, its model takes {model.image_size}"
        raise CheckpointError(f"its preprocessing makes images of size {sizes}")
    if len(about.class_names) != model.num_classes:
        raise CheckpointError(f"{len(about.class_names)} class names for {model.num_classes} classes")
    if len(about.preprocess.mean) != model.in_chans:
        raise CheckpointError(f"{len(about.preprocess.mean)} channel means for {model.in_chans} channels")
    _check_weights(model.state_dict(), weights)
    # Copied: those of a safetensors file are views of it, and it may change.
    model.load_state_dict({k: v.to(torch.float32, copy=True) for k, v in weights.items()}, assign=True)
    return model.eval()


def _check_weights(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        if name not in found:
            raise CheckpointError(f"weight {name} is missing")
        if found[name].shape != tensor.shape:
            raise CheckpointError(f"weight {name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")
        if not found[name].is_floating_point():
            raise CheckpointError(f"weight {name} is of type {found[name].dtype}, expected a float")
        if found[name].untyped_storage().nbytes() < found[name].nbytes:  # one number for all, as a pickle may say
            raise CheckpointError(f"weight {name} is not there in full")
        if not found[name].isfinite().all():
            raise CheckpointError(f"weight {name} has values that are not finite")
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(f"unknown weight {extra[0]}" + (f" and {len(extra) - 1} more" if extra[1:] else ""))


def _line(error: BaseException) -> str:
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))[:200]
