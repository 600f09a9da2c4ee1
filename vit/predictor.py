"""Classify images with one file of weights: one at a time, a stream of them, or with a map of what counted."""

import io
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import IO, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit.checkpoint import SHIPPED, Checkpoint, CheckpointError, load_checkpoint
from vit.device import DEVICES, device_of, has_bfloat16
from vit.faithfulness import area, deletion_curve
from vit.inputs import Unreadable
from vit.model import VisionTransformer
from vit.preprocess import ImageError, open_image, reason, told, turn, usable_cores
from vit.records import composed
from vit.rollout import CLASS_METHOD, CLASS_SPECIFIC, attention_map
from vit.visualize import enlarged, overlay

File = str | Path | IO[bytes] | Image.Image
Source = File | np.ndarray
Decoded = tuple[Sequence[Source | Unreadable], list[ImageError | None], Tensor | None]
Precision = Literal["auto", "float32", "bfloat16"]
T = TypeVar("T")

BATCH_SIZE = {"cpu": 64, "cuda": 256}
AHEAD = 2  # batches that are decoded while one is computed
# Where bfloat16 leaves the first two classes closer than this, in logits or in standard deviations of the logits
# if those are larger, float32 decides. The largest lead that it turned round in 10,000 CIFAR-10 images was 0.063.
CLOSE_CALL = 0.1
SHOWN = 10  # classes of many that a text names
NO_NUMBER = "the model gives no number for this image; its weights may be damaged"


@dataclass(frozen=True)
class Prediction:
    """What an image shows.

    Args:
        label: The class with the highest score.
        score: Its probability, in [0, 1].
        scores: Probability of every class, highest first; they sum to 1.
    """

    label: str
    score: float
    scores: dict[str, float]

    def __repr__(self) -> str:
        first = ", ".join(f"{name!r}: {score:.6g}" for name, score in islice(self.scores.items(), SHOWN))
        more = f", ... {len(self.scores) - SHOWN:,} more" if len(self.scores) > SHOWN else ""
        return f"Prediction(label={self.label!r}, score={self.score:.6g}, scores={{{first}{more}}})"


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where the model looked.

    Args:
        prediction: What it says.
        target: The class the map is about, or the predicted one.
        method: How the map was made, a name in ``vit.rollout.METHODS``.
        grid: Weight of each patch (grid height, grid width), non-negative, summing to 1.
        image: The image as a person sees it.
        box: The part (left, top, right, bottom) of it that the model saw, in pixels.
        against: The class that the target was set against, if there is one.
    """

    prediction: Prediction
    target: str
    method: str
    grid: np.ndarray
    image: Image.Image
    box: tuple[float, float, float, float]
    against: str | None = None

    def __repr__(self) -> str:
        height, width = self.grid.shape
        return f"<Explanation {self.caption}: {height} x {width} patches>"

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows."""
        return self.overlay()._repr_png_()

    @property
    def map(self) -> np.ndarray:
        """The grid from its least, 0, to its most, 1, smoothly enlarged to the pixels (H, W) of ``image.crop(box)``."""
        left, top, right, bottom = (round(edge) for edge in self.box)
        return enlarged(self.grid, max(1, right - left), max(1, bottom - top))

    @property
    def caption(self) -> str:
        """The target, what it was set against, its probability, and how the map was made."""
        return f"{subject(self.target, self.against)} {self.prediction.scores[self.target]:.1%} · {self.method}"

    def overlay(self) -> Image.Image:
        """A picture of image, map and caption."""
        return overlay(self.image, self.grid, box=self.box, caption=self.caption)


@dataclass(frozen=True, eq=False)
class Batch:
    """What became of some sources; the rows of ``scores`` and ``grids`` are those without an error, in order.

    Args:
        sources: What was to be classified.
        errors: Why not, or None, for each source.
        scores: Probabilities (classified, classes).
        grids: Weight of each patch (classified, grid height, grid width), if maps were asked for.
        map_scores: How far each map can be trusted (classified,), in [-1, 1], if that was asked.
    """

    sources: Sequence[Source | Unreadable]
    errors: Sequence[ImageError | None]
    scores: Tensor
    grids: Tensor | None = None
    map_scores: Tensor | None = None


class Predictor:
    """A model and all that is needed to ask it: ``Predictor.from_checkpoint("model.safetensors").predict("a.jpg")``.

    Its methods may be called from many threads at once, and in forked processes, which compute with one thread each.

    Args:
        model: In eval mode.
        about: Class names, preprocessing and temperature.
        device: Such as ``cpu`` or ``cuda:1``; ``auto`` for an accelerator if there is one.
        precision: ``float32``; ``bfloat16``, faster and to about two digits of a score, with the same predicted label,
            as close calls are decided in float32; or ``auto``: bfloat16 where the hardware has it. Maps are always
            computed in float32. On NVIDIA's GPUs PyTorch rounds the factors of convolutions, those of the patch
            embedding, to 10 bits (TF32), unless ``torch.backends.cudnn.allow_tf32`` is False, as in predict.py.
        name: Of the weights, for its repr.

    Raises:
        ValueError: If there is no such device or precision, or the model does not take images of 1 or 3 channels.
    """

    def __init__(
        self,
        model: VisionTransformer,
        about: Checkpoint,
        *,
        device: str = "auto",
        precision: Precision = "float32",
        name: str = "",
    ):
        _survive_fork()
        if precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision must be auto, float32 or bfloat16, got {precision!r}")
        self.device = device_of(device)
        try:
            torch.zeros(1, device=self.device).tolist()  # "meta" takes models, but gives no number back
            self.model = model.to(self.device).eval()
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = str(error).splitlines()[0].split(". ")[0].rstrip(".!")  # some lines are a screenful
            raise ValueError(f"device {device!r} cannot be used: {reason}; {DEVICES}") from error
        self.name, self.about, self.preprocess = name, about, about.preprocess
        _ = self.preprocess.mode  # refuses other numbers of channels
        self.class_names = about.class_names
        self.precision = ("bfloat16" if has_bfloat16(self.device) else "float32") if precision == "auto" else precision
        self.batch_size = BATCH_SIZE.get(self.device.type, 64)
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def __repr__(self) -> str:
        height, width = self.preprocess.image_size
        name = f" {self.name}" if self.name else ""
        return f"<Predictor{name}: {len(self.class_names)} classes, {height} x {width} pixels, {self.device}>"

    @classmethod
    @torch.inference_mode(False)  # or else gradients, which some maps are made of, could never be had
    def from_checkpoint(
        cls, path: str | Path | None = None, *, device: str = "auto", precision: Precision = "float32"
    ) -> "Predictor":
        """A predictor from one file, or from a model of timm's or transformers'.

        Args:
            path: ``model.safetensors`` or a Lightning ``.ckpt``; the name of a model of timm's, such as
                ``vit_small_patch16_224.augreg_in21k_ft_in1k``, which timm downloads; a folder of timm's or
                transformers' with ``config.json`` beside the weights, or ``hf-hub:OWNER/NAME``
                (``vit.pretrained.load_pretrained`` lists all); none for the CIFAR-10 weights that come with the code.
            device: As for the class.
            precision: As for the class.

        Raises:
            CheckpointError: If there is no such thing, it is no checkpoint, or our model cannot compute what it
                computes.
        """
        if path is not None and not str(path):
            raise CheckpointError("the checkpoint has an empty name; leave it out for the CIFAR-10 weights")
        if path is None and not SHIPPED.is_file():
            raise CheckpointError(f"{SHIPPED}: the weights that come with the code are missing; name a checkpoint")
        path = path or SHIPPED
        if of_others(path):
            from vit.pretrained import load_pretrained  # which takes seconds to import

            model, about = load_pretrained(path)
        else:
            model, about = load_checkpoint(path)
        try:
            about.preprocess.mode  # noqa: B018 (raises)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return cls(model, about, device=device, precision=precision, name=str(path))

    def predict(self, image: Source) -> Prediction:
        """What one image shows.

        Args:
            image: Path, binary file, an image opened by Pillow, or its pixels as an array of uint8 or uint16: (H, W) or
                (H, W, channels), which are 1, 3 in the order red, green, blue, or 4 with opacity last.

        Raises:
            ImageError: If it cannot be read, or is none of these.
        """
        (result,) = self.predict_iter([image])
        if isinstance(result, ImageError):
            raise result
        return result

    def predict_iter(
        self, images: Iterable[Source], *, batch_size: int | None = None, workers: int | None = None
    ) -> Iterator[Prediction | ImageError]:
        """What each image shows, in order and lazily: any number of images in flat memory.

        An image that cannot be read gives the ImageError that says why, in its place, and the stream goes on.

        Args:
            images: Each as for ``predict``. Of a list all stay as they are until they are answered; what a generator
                gives is read when it is taken, so that it may close a file, or fill the same array, before the next;
                paths alone are decoded in parallel then.
            batch_size: Images computed at once, while those of two batches more are decoded; 1 answers each image
                before it takes the next, as a camera wants; none for one that suits the device.
            workers: Threads that decode; none for one that suits the machine.

        Raises:
            ValueError: If it is given one image, whose letters, lines or rows it would take for images, or a
                ``batch_size`` below 1.
        """
        for batch in self.classify(self._batches(images, batch_size, workers), workers=workers):
            rows = iter(batch.scores)
            for source, error in zip(batch.sources, batch.errors, strict=True):
                yield self.prediction(next(rows)) if error is None else _named(source, error)

    def features_iter(
        self, images: Iterable[Source], *, batch_size: int | None = None, workers: int | None = None
    ) -> Iterator[np.ndarray | ImageError]:
        """What the head makes its classes of, (embed_dim,) float32, for each image: for neighbours, or a linear probe.

        Needs no classes, so a backbone of timm's will do. Arguments, errors and what is raised as for
        ``predict_iter``.
        """
        for sources, errors, pixels in self._decoded(self._batches(images, batch_size, workers), workers):
            rows = iter(() if pixels is None else self.features(pixels).numpy())
            for source, error in zip(sources, errors, strict=True):
                if error is None and np.isfinite(row := next(rows)).all():
                    yield row
                else:
                    yield _named(source, error or ImageError(NO_NUMBER))

    def _batches(
        self, images: Iterable[Source], batch_size: int | None, workers: int | None
    ) -> Iterator[list[Source | Unreadable]]:
        one = isinstance(images, str | bytes | os.PathLike | Image.Image) or hasattr(images, "read")
        if one or (isinstance(images, np.ndarray) and is_picture(images)):
            raise ValueError("predict_iter and features_iter take many images, in a list, say; predict takes one")
        given: Iterable[Source | Unreadable] = (
            images if isinstance(images, Sequence | np.ndarray) else map(kept, images)
        )
        for name, number in (("batch_size", batch_size), ("workers", workers)):
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}, it must be at least 1")
        return batches(given, batch_size or self.batch_size)

    def explain(
        self, image: Source, target: str | None = None, method: str | None = None, *, against: str | None = None
    ) -> Explanation:
        """What one image shows, and which parts of it counted; both from the same pass.

        Args:
            image: As for ``predict``.
            target: Class the map is about; none for the predicted one.
            method: A name in ``vit.rollout.METHODS``; none for ``rollout``, or where a class is named for
                ``CLASS_METHOD`` there, since rollout is the same for every class.
            against: Class to set the target against: what speaks for the one rather than for the other.

        Raises:
            ImageError: As ``predict``, and where the model gives no number.
            ValueError: If there is no such class or method, or a class is set against itself.
        """
        numbers = self.numbers(target, against)
        target, against = (None if number is None else self.class_names[number] for number in numbers)
        method = method or ("rollout" if target is against is None else CLASS_METHOD)
        source = kept(image)  # as it is now: it is decoded twice
        try:
            if isinstance(source, Unreadable):
                raise ImageError(source.error)
            file = as_file(source)
            pixels = self.preprocess.load(file)  # what ``predict`` sees: a large JPEG is decoded smaller
            opened = open_image(file, self.preprocess.mode, white=self.preprocess.white)
        except ImageError as error:
            raise _named(image, error) from error
        scores, grids = self.mapped(pixels[None], method, *numbers)
        if not (scores.isfinite().all() and grids.isfinite().all()):
            raise _named(image, ImageError(NO_NUMBER))
        prediction = self.prediction(scores[0])
        if prediction.label == against and target is None:
            raise ValueError(f"against is {against!r}, which is the predicted class; name another one as target")
        about = prediction.label if target is None else target
        left, top, right, bottom = self.preprocess.box(*opened.size)
        (left, right), (top, bottom) = at_least_a_pixel(left, right), at_least_a_pixel(top, bottom)
        box = left, top, right, bottom
        return Explanation(prediction, about, method, grids[0].numpy(), opened, box, against)

    def numbers(self, target: str | None, against: str | None) -> tuple[int | None, int | None]:
        """Of the classes with these names.

        Args:
            target: Class that a map is about; none for the predicted one.
            against: Class to set it against; none for no other.

        Raises:
            ValueError: If there is no such class, or it is set against itself, or there are no classes at all.
        """
        if not self.class_names:
            name = self.name or "this"
            raise ValueError(f"{name}: a backbone without classes; fine-tune it with --model.pretrained {name}")
        numbers = self._number(target), self._number(against)
        if target is not None and numbers[0] == numbers[1]:
            raise ValueError(f"target and against are both {target!r}; a class can only be set against another one")
        return numbers

    def _number(self, name: str | None) -> int | None:
        """The class of this name."""
        if name is None:
            return None
        if name in self.class_names:
            return self.class_names.index(name)
        same = [i for i, other in enumerate(self.class_names) if composed(other) == composed(str(name))]
        if not same:
            near = get_close_matches(str(name), self.class_names, n=SHOWN, cutoff=0.5) or self.class_names[:SHOWN]
            many = len(self.class_names) > SHOWN
            names = f"{len(self.class_names):,} classes have names like" if many else "the classes are"
            raise ValueError(f"no class {name!r}; {names} {', '.join(near if many else self.class_names)}")
        return same[0]

    def prediction(self, scores: Tensor) -> Prediction:
        """The probabilities (classes,) of an image, with their names."""
        ordered = scores.argsort(descending=True, stable=True).tolist()
        named = {self.class_names[i]: score for i, score in zip(ordered, scores[ordered].tolist(), strict=True)}
        return Prediction(self.class_names[ordered[0]], float(scores[ordered[0]]), named)

    def classify(
        self,
        batches: Iterable[Sequence[Source | Unreadable]],
        *,
        method: str | None = None,
        target: str | None = None,
        against: str | None = None,
        score_maps: bool = False,
        workers: int | None = None,
    ) -> Iterator[Batch]:
        """Batches of sources, in order; the next ones are decoded while one is computed, unless it is of one image.

        The scores of a batch depend on nothing but its sources, so a run that starts at any batch gives the same bits.

        Args:
            batches: Sources, batch by batch.
            method: Of the maps to make, a name in ``vit.rollout.METHODS``; none for no maps.
            target: Class the maps are about; none for the predicted one.
            against: Class to set the target against.
            score_maps: Measure how far the maps can be trusted; 34 more passes an image.
            workers: Threads that decode; none for one that suits the machine.

        Raises:
            ValueError: If there is no such class, or maps are to be measured that no method makes.
        """
        if score_maps and method is None:
            raise ValueError("score_maps measures maps: name the method that makes them")
        numbers = self.numbers(target, against)

        def compute(decoded: Decoded) -> Batch:
            sources, errors, pixels = decoded
            if pixels is None:
                return Batch(sources, errors, torch.empty(0, len(self.class_names)))
            if method is None:
                return self._checked(sources, errors, self.scores(pixels))
            scores, grids = self.mapped(pixels, method, *numbers)
            about = scores.argmax(1) if numbers[0] is None else torch.full((len(scores),), numbers[0])
            trust = self.map_scores(pixels, grids, about) if score_maps else None
            return self._checked(sources, errors, scores, grids, trust)

        yield from map(compute, self._decoded(batches, workers))

    def _decoded(self, batches: Iterable[Sequence[Source | Unreadable]], workers: int | None) -> Iterator[Decoded]:
        """The sources of each batch, why some are no images, and the pixels of the others.

        Nothing here keeps what was given; the next batches are decoded meanwhile.
        """
        pool = ThreadPoolExecutor(workers or min(32, usable_cores()), thread_name_prefix="decode")
        waiting: deque[tuple[Sequence[Source | Unreadable], list[Future[Tensor | ImageError]]]] = deque()
        given, failure = iter(batches), None  # failure: what ended them before their end
        try:
            while True:
                try:
                    sources = next(given)
                except Exception as error:  # what came so far is answered first
                    failure = None if isinstance(error, StopIteration) else error
                    break
                waiting.append((sources, [pool.submit(self._decode, source) for source in sources]))
                if len(waiting) > (AHEAD if len(sources) > 1 else 0):
                    yield collected(*waiting.popleft())
            while waiting:
                yield collected(*waiting.popleft())
            if failure is not None:
                raise failure
        finally:
            del failure  # whose traceback has this frame, and that all images
            for future in (future for _, futures in waiting for future in futures):
                future.cancel()  # not by shutdown, which fails where the interpreter ends before this generator
            pool.shutdown(wait=False)

    def _decode(self, source: Source | Unreadable) -> Tensor | ImageError:
        if isinstance(source, Unreadable):
            return ImageError(source.error)
        try:
            return self.preprocess.load(as_file(source))
        except ImageError as error:
            return error

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> Tensor:
        """What the head makes its logits of (B, embed_dim), on the CPU in float32, of uint8 pixels (B, C, H, W)."""
        with self._autocast():
            return self.model(self.normalized(pixels), pre_logits=True).float().cpu()

    def map_scores(self, pixels: Tensor, grids: Tensor, target: Tensor) -> Tensor:
        """How far each map can be trusted (B,): insertion less deletion, in [-1, 1]; 0 is chance (vit/faithfulness.py).

        Args:
            pixels: uint8 pixels of the images (B, C, H, W).
            grids: Their maps (B, grid height, grid width).
            target: Number of the class they are about (B,).
        """
        images, target = self.normalized(pixels), target.to(self.device)
        grids = grids.to(self.device).nan_to_num()  # an image that has no numbers is no reason to leave out the others
        deletion, insertion = (
            area(deletion_curve(self.model, images, order, target=target, batch_size=self.batch_size))
            for order in (grids, -grids)
        )
        return (insertion - deletion).cpu()

    @staticmethod
    def _checked(
        sources: Sequence[Source | Unreadable],
        errors: list[ImageError | None],
        scores: Tensor,
        grids: Tensor | None = None,
        map_scores: Tensor | None = None,
    ) -> Batch:
        """Rows that are no numbers (weights of a diverged training) become errors."""
        finite = scores.isfinite().all(1)
        if grids is not None:
            finite &= grids.isfinite().all(2).all(1)
        if not finite.all():
            rows = iter(finite.tolist())
            errors = [error if error or next(rows) else ImageError(NO_NUMBER) for error in errors]
            scores = scores[finite]
            grids, map_scores = (given if given is None else given[finite] for given in (grids, map_scores))
        return Batch(sources, errors, scores, grids, map_scores)

    @torch.inference_mode()
    def scores(self, pixels: Tensor) -> Tensor:
        """Probabilities (B, classes), on the CPU in float32, of uint8 pixels (B, C, H, W)."""
        self.numbers(None, None)  # there must be some
        images = self.normalized(pixels)
        with self._autocast():
            logits = self._logits(images).float()
        if self.precision == "bfloat16" and logits.shape[1] > 1:
            first, second = logits.topk(2).values.T
            if len(close := (first - second < CLOSE_CALL * logits.std(1).clamp_min(1)).nonzero()[:, 0]):
                logits[close] = self.model(images[close])
        return self.probabilities(logits)

    def compile(self, batch_size: int) -> None:
        """Compile the model, for a long run on a GPU: a minute at the start, faster from then on.

        Scores move by rounding errors. Where no compiler is installed nothing changes. Maps are not concerned.

        Args:
            batch_size: Images computed at once; smaller batches are filled up, so that one compilation serves all.
        """
        from torch import _dynamo

        _dynamo.config.suppress_errors = True  # uncompiled then
        logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)
        self._compiled, self.batch_size = torch.compile(self.model, dynamic=False), batch_size

    def _logits(self, images: Tensor) -> Tensor:
        missing = self.batch_size - len(images)
        if self._compiled is None or missing < 0:
            return self.model(images)
        return self._compiled(torch.nn.functional.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)))[: len(images)]

    def mapped(
        self, pixels: Tensor, method: str, target: int | None = None, against: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Probabilities (B, classes) and maps (B, grid height, grid width) of uint8 pixels, from one pass.

        Args:
            pixels: Of the images (B, C, H, W).
            method: A name in ``vit.rollout.METHODS``.
            target: Number of the class the maps are about; none for the predicted one.
            against: Number of the class to set it against; none for no contrast.

        Raises:
            ValueError: If the map is about a class and there are none, or the pixels are not the model's.
        """
        if method in CLASS_SPECIFIC:
            self.numbers(None, None)
        logits, grids = attention_map(
            self.model, self.normalized(pixels), method=method, target=target, against=against
        )
        return self.probabilities(logits), grids.cpu()

    def normalized(self, pixels: Tensor) -> Tensor:
        """What the model takes, on its device, of uint8 pixels (B, C, H, W).

        Raises:
            ValueError: If they are no such pixels, or of another size than the model's.
        """
        channels, height, width = expected = (self.model.in_chans, *self.preprocess.image_size)
        is_tensor = isinstance(pixels, Tensor)
        if not is_tensor or pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != expected:
            found = f"{pixels.dtype} {tuple(pixels.shape)}" if is_tensor else type(pixels).__name__
            right = f"a torch.uint8 tensor (B, {channels}, {height}, {width})"
            raise ValueError(f"expected {right}, of images as preprocess.load makes them, got {found}")
        if self.device.type == "cuda":  # pinned memory goes over while the device computes
            pixels = pixels.pin_memory()
        return self.preprocess.normalize(pixels.to(self.device, non_blocking=True))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Calibrated, on the CPU, of logits (B, classes)."""
        return (logits.float() / self.about.temperature).softmax(1).cpu()

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def collected(sources: Sequence[Source | Unreadable], decoded: list[Future[Tensor | ImageError]]) -> Decoded:
    """What was decoded of a batch, when it is."""
    results = [future.result() for future in decoded]
    images = [result for result in results if isinstance(result, Tensor)]
    errors = [result if isinstance(result, ImageError) else None for result in results]
    return sources, errors, torch.stack(images) if images else None


def at_least_a_pixel(low: float, high: float) -> tuple[float, float]:
    """The edges of a box, between which rounding leaves a pixel, as it may not in an image that is a thin line."""
    return (low, high) if round(high) > round(low) else (math.floor(low), math.floor(low) + 1)


def subject(target: str, against: str | None) -> str:
    """What a map is about, in words."""
    return target if against is None else f"{target}, not {against}"


def as_file(source: Source) -> File:
    """The source as ``open_image`` takes it: an array as a Pillow image, which then goes the way of one from a file.

    Args:
        source: Whatever the user gave.

    Raises:
        ImageError: If it is no source, or an array that is no picture.
    """
    if isinstance(source, np.ndarray):
        if is_picture(source):
            return picture(source)
        given, many = f"an array of {source.dtype} {source.shape}", source.ndim == 4
    else:
        readable = hasattr(source, "read") and not isinstance(source, io.TextIOBase)
        if isinstance(source, os.PathLike):
            return os.fspath(source)
        if readable or isinstance(source, str | Image.Image):
            return source
        given, many = type(source).__name__, isinstance(source, list | tuple)
    hint = "; predict_iter takes many images" if many else ""
    hint = "; io.BytesIO makes a file of them" if isinstance(source, bytes | bytearray | memoryview) else hint
    raise ImageError(
        "an image is a path, a file opened in binary mode, a Pillow image, or an array of uint8 or uint16 (H, W) or "
        f"(H, W, 1, 3 or 4), not {given}{hint}"
    )


def is_picture(array: np.ndarray) -> bool:
    """Whether the array is the pixels of one image."""
    shaped = array.ndim >= 2 and array.size and array.shape[2:] in ((), (1,), (3,), (4,))
    return bool(shaped and array.dtype in (np.uint8, np.uint16))


def picture(array: np.ndarray) -> Image.Image:
    """The Pillow image of an array for which ``is_picture``."""
    if array.shape[2:] == (1,):
        array = array[..., 0]
    if array.ndim == 3 and array.dtype == np.uint16:  # Pillow has no colour of 16 bits; of files it makes 8 too
        array = (array / 257).round().astype(np.uint8)
    return Image.fromarray(array)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of so many items each; the last one, or that before an error, may be shorter."""
    batch: list[T] = []
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def kept(source: Source) -> Source | Unreadable:
    """The source as it is now: what is no path may be gone, or be another image, when its turn comes."""
    try:
        with turn(source):
            if isinstance(source, np.ndarray):
                return source.copy()
            if isinstance(source, Image.Image):
                told(source, None)  # before it is decoded
                copy = source.copy()
                copy.format = source.format  # by which a PGM of 16 bits is known
                return copy
            if not isinstance(source, str | Path | io.TextIOBase) and hasattr(source, "read"):
                if getattr(source, "seekable", bool)():
                    source.seek(0)
                return io.BytesIO(source.read())
    except Exception as error:  # a file object may be anything
        return Unreadable("", reason(error, source))
    return source


@cache
def _survive_fork() -> None:
    """Processes that are forked from this one, as servers do it, compute with one thread: more would hang for ever.

    They lack the other threads of OpenMP's pool, which would be waited for.
    """
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


def _named(source: object, error: ImageError) -> ImageError:
    return ImageError(f"{os.fspath(source)}: {error}" if isinstance(source, str | os.PathLike) else str(error))


def of_others(path: str | Path) -> bool:
    """Whether this is a folder as timm and transformers keep it, or may be a name of theirs, and not a file of ours."""
    given = Path(path)
    if os.path.isdir(given):  # not by Path, which raises where one may not look
        return (given / "config.json").is_file()
    return not os.path.isfile(given) and ("=" in given.name or given.suffix not in (".safetensors", ".ckpt"))
