"""From an image file to what the model was trained on: opening safely, cutting, scaling, normalising.

The numbers (size, mean, std, ...) travel in the checkpoint, so that training and prediction cannot disagree.
Every function here may run in many threads at once.
"""

import io
import logging
import math
import os
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, JpegImagePlugin
from torch import Tensor

try:
    import pillow_heif  # photographs of iPhones, for those who have installed it
except ImportError:
    HEIC = False
else:
    HEIC = True
    pillow_heif.register_heif_opener()
    pillow_heif.options.DECODE_THREADS = 1  # files are decoded in threads

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") + ("HEIF",) * HEIC
SUFFIXES = frozenset(  # all that Pillow knows of these formats; by them folders are searched
    f".{ending}"
    for ending in (
        *("png", "apng", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm", "pfm", "avif", "avifs"),
        *("heic", "heics", "heif", "heifs", "hif") * HEIC,
    )
)
MODES = {1: "L", 3: "RGB"}
DRAFT_GAP = 2  # source pixels left for each target pixel when a JPEG is decoded at a reduced size
PHOTOMETRIC = 262  # TIFF's tag that says what its values mean
SMALLEST_CROP = 0.01  # a file could ask for what is no pixel, nor a number of them
LARGE = 4_000_000  # pixels; images above it are decoded one at a time, so that memory stays flat

# Pillow warns of odd metadata, which is not the user's concern. Said once for the process: a filter around each file
# (warnings.catch_warnings) would be shared with every other thread.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

_one_large = threading.Lock()
_turns = [threading.Lock() for _ in range(64)]  # of objects, by their addresses


def _new_locks() -> None:
    """In a process that is forked while threads decode, for they are not there to let go."""
    global _one_large
    _one_large = threading.Lock()
    _turns[:] = [threading.Lock() for _ in _turns]


os.register_at_fork(after_in_child=_new_locks)


class ImageError(ValueError):
    """A file that is no image we can read; the message is one line."""


def open_image(
    source: str | Path | IO[bytes] | Image.Image,
    mode: str = "RGB",
    *,
    min_side: int | None = None,
    white: float | None = None,
    reduce: Callable[[Image.Image], Image.Image] | None = None,
) -> Image.Image:
    """Decode one image as a person sees it: upright, in sRGB, transparency on white, 16 bits scaled to 8.

    Args:
        source: Path or binary file of a PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM, AVIF or, with the package pillow-heif,
            HEIC, or an image opened by Pillow; of an animation the first frame.
        mode: "RGB", or "L" for grey.
        min_side: A JPEG may come back reduced by 2, 4 or 8 while its shorter side keeps this many pixels; none to get
            every pixel, or half the side of a JPEG beyond Pillow's bomb limit, which bounds what is decoded.
        white: Value that is white in grey images of more than 8 bits; none for ``scaled_to_8_bits``' own rule.
        reduce: What is wanted of the image, for less memory: of large ones only one is there whole at a time.

    Raises:
        ImageError: If it is missing, no image, truncated, of another format, or larger than Pillow's bomb limit.
    """
    try:
        if isinstance(source, Image.Image):
            if 0 in source.size:
                raise ImageError("no pixels")
            with turn(source):
                pgm, white = is_pgm(source), told(source, white)
                image = source.copy()
            image = to_mode(upright(image.convert("I;16") if pgm else image), mode, white)
            return reduce(image) if reduce else image
        if isinstance(source, str | Path) and not os.path.isfile(source):  # a pipe or a device could wait for ever
            os.stat(source)  # says what is wrong if there is no such file, or no permission to look
            raise ImageError("a folder, not an image file" if os.path.isdir(source) else "not a regular file")
        with turn(source), of_any_size(source) as image:
            white, whole = told(image, white), image.size
            if image.format in ("JPEG", "MPO"):  # MPO: several of them, the first counts
                if min_side is not None:
                    scale = min_side / min(image.size)
                    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
                elif too_large(whole):
                    image.draft(None, (image.width // 2, image.height // 2))
            refuse_bomb(image.size)
            held = whole if image.info.get("progressive") else image.size  # libjpeg: all of it until the last scan
            refuse_bomb(held, allowed=2)
            with _one_large if math.prod(held) > LARGE else nullcontext():
                image.load()
                refuse_bomb(image.size)
                opened = to_mode(upright(image.convert("I;16") if is_pgm(image) else image), mode, white)
                return reduce(opened) if reduce else opened
    except ImageError:
        raise
    except Exception as error:  # a corrupt file raises whatever its decoder stumbles on
        raise ImageError(reason(error, source)) from error


def by_ending(passed_over: Counter[str]) -> str:
    """Files whose names are no images', in words: how many of the commonest endings, and what would read them."""
    kinds = ", ".join(f"{ending or 'without ending'} {n}" for ending, n in passed_over.most_common(5))
    return kinds + "; .heic: pip install pillow-heif" * (".heic" in passed_over)


def is_pgm(image: Image.Image) -> bool:
    """Whether it is a PGM of 16 bits, which Pillow keeps in 32."""
    return image.format == "PPM" and image.mode == "I"


def told(image: Image.Image, white: float | None) -> float | None:
    """The value that is white, but in a PGM that says so itself, where Pillow has scaled it; before it is decoded."""
    tiles = getattr(image, "tile", ())  # a copy has none, nor has an image that is decoded
    if is_pgm(image) and any(t.codec_name.startswith("ppm") and t.args[1] != 65535 for t in tiles):
        image.info["scaled"] = True  # goes with the image and its copies
    if image.mode == "I;16" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:
        image.info["negative"] = True  # 0 is white, which Pillow heeds up to 8 bits only
    return None if image.info.get("scaled") else white


def turn(source: object) -> AbstractContextManager:
    """One thread at a time decodes an image or a file object, which may be given several times; files by name all."""
    return nullcontext() if isinstance(source, str | Path) else _turns[id(source) // 64 % len(_turns)]


def of_any_size(source: str | Path | IO[bytes]) -> Image.Image:
    """Opened, not yet decoded; a JPEG of any size, as less can be decoded: some telephones give 200 megapixels."""
    try:
        return Image.open(source, formats=FORMATS)
    except Image.DecompressionBombError as bomb:
        if not isinstance(source, str | Path):
            source.seek(0)
        try:
            return JpegImagePlugin.JpegImageFile(source)
        except SyntaxError:  # of another format
            raise bomb from None


def too_large(size: tuple[int, int], allowed: int = 1) -> bool:
    """Whether these are more pixels than Pillow's bomb limit, so many times."""
    return Image.MAX_IMAGE_PIXELS is not None and math.prod(size) > allowed * Image.MAX_IMAGE_PIXELS


def refuse_bomb(size: tuple[int, int], allowed: int = 1) -> None:
    """Refuse sizes of which Pillow only warns: a small file can claim gigabytes of pixels."""
    if too_large(size, allowed):
        limit = allowed * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(f"{size[0]} x {size[1]} pixels, more than the limit of {limit}; make it smaller")


def reason(error: Exception, source: object) -> str:
    """One line on why an image could not be read.

    Args:
        error: What was raised.
        source: As for ``open_image``.
    """
    if isinstance(error, FileNotFoundError):
        address = isinstance(source, str) and re.match(r"[a-z][a-z0-9+.-]+://", source, re.IGNORECASE)
        return "no such file; an address is not fetched, download it first" if address else "no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        start = beginning(source)
        if start == b"":
            return "empty file"
        start = start or b""
        if "HEIF" not in FORMATS and start[4:] in (b"ftyphei", b"ftyphev", b"ftypmif"):
            return "a HEIC image: pip install pillow-heif"
        if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):  # Pillow looks for its directory, often at the end
            return "a TIFF that is cut off or of a kind that cannot be read"
        return f"not an image of a known format ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more pixels than the limit of {Image.MAX_IMAGE_PIXELS}; make it smaller"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):  # a large image, or a damaged one that says it is
        return "no memory to decode it"
    text = " ".join(str(error).split())
    return f"damaged image ({text or type(error).__name__})"


def beginning(source: object) -> bytes | None:
    """The first bytes of a file; none of what cannot be read again, such as a pipe."""
    try:
        if isinstance(source, str | Path):
            with open(source, "rb") as file:
                return file.read(11)
        file: Any = source
        file.seek(0)
        return file.read(11)
    except Exception:  # a file object may be anything
        return None


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation asks; a damaged EXIF block is passed over, for the pixels are fine."""
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def to_mode(image: Image.Image, mode: str, white: float | None = None) -> Image.Image:
    """Convert any Pillow mode to RGB or L without the silent losses of ``convert``."""
    if deep(image):
        image = scaled_to_8_bits(image, white)
    opacity = None
    if image.mode == "La":  # opacity multiplied in, from which Pillow knows one way only
        image = image.convert("LA")
    if image.has_transparency_data or image.mode == "P":
        image = image.convert("RGBA")
        opacity, image = image.getchannel("A"), image.convert("RGB")
    if image.mode in ("RGB", "CMYK", "LAB"):
        image = to_srgb(image)
    if opacity is not None:
        paper = Image.new("RGB", image.size, "white")
        paper.paste(image, mask=opacity)
        image = paper
    return image if image.mode == mode else image.convert(mode)


def to_srgb(image: Image.Image) -> Image.Image:
    """Colours by the embedded profile, where there is one and it is not sRGB (Adobe RGB, Display P3, print CMYK)."""
    profile = image.info.get("icc_profile")
    about = (profile or b"")[:4096].replace(b"\0", b"")  # the description, of 8 or 16 bit
    if image.mode == "LAB":
        source = ImageCms.createProfile("LAB")
    elif not profile or (
        b"sRGB" in about and b"inear" not in about and b"-g10" not in about
    ):  # sRGB's colours, not light
        return image
    else:
        source = io.BytesIO(profile)
    try:
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image  # a damaged profile, or one of another colour space: the plain conversion
    return converted or image


def deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits a value: 16, 32, or floating point."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def scaled_to_8_bits(image: Image.Image, white: float | None = None) -> Image.Image:
    """16-bit and float images in grey levels 0 to 255, transparency on white; ``convert`` would clip them to white.

    Args:
        image: Of a mode that ``deep`` knows.
        white: Value that becomes 255, as do those above it. None takes 65535 for sixteen bits; images of 32 bits or
            floats do not say, for them 1, 255 or 65535, the smallest that holds their largest value.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0, posinf=np.inf, neginf=0.0)
    largest = values.max(initial=0, where=values < np.inf)  # what is infinite is white, whatever the others are
    tops = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    top = white or next((top for top in tops if largest <= top), 65535)
    levels = (values * (255 / top)).round().clip(0, 255).astype(np.uint8)
    if image.info.get("negative"):
        levels = 255 - levels
    if isinstance(hidden := image.info.get("transparency"), int | float):
        levels[values == hidden] = 255
    return Image.fromarray(levels)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The eval-time transform a model expects.

    Args:
        image_size: Height and width of the model's input, in pixels.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel, of values in [0, 1].
        interpolation: Resampling filter by Pillow's name: bicubic, bilinear, lanczos, nearest, box, hamming.
        crop: Share of the image's shorter side that is kept, in [SMALLEST_CROP, 1].
        white: Value that is white in grey images of more than 8 bits, as 4095 of a 12-bit camera; none for 65535.
        squash: Whether height and width are scaled apart, so that all of a long image is seen, and not its middle.

    Raises:
        ValueError: If a number is out of its range, or there is no such filter.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop: float = 1.0
    white: float | None = None
    squash: bool = False

    def __post_init__(self) -> None:
        if len(self.image_size) != 2 or not all(isinstance(side, int) and side >= 1 for side in self.image_size):
            raise ValueError(f"image_size must be a height and a width of at least 1, got {self.image_size}")
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means for {len(self.std)} standard deviations")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise ValueError(f"mean and std must be finite and std above 0, got {self.mean} and {self.std}")
        if not SMALLEST_CROP <= self.crop <= 1:
            raise ValueError(f"crop must be in [{SMALLEST_CROP}, 1], got {self.crop}")
        if self.white is not None and not 0 < self.white < math.inf:
            raise ValueError(f"white must be a value above 0, got {self.white}")
        if self.interpolation.upper() not in Image.Resampling.__members__:
            names = ", ".join(name.lower() for name in Image.Resampling.__members__)
            raise ValueError(f"interpolation must be one of {names}, got {self.interpolation!r}")

    @property
    def mode(self) -> str:
        """Pillow mode of the model's input."""
        if len(self.mean) not in MODES:
            raise ValueError(f"image files have 1 or 3 channels, the model expects {len(self.mean)}")
        return MODES[len(self.mean)]

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The centred part (left, top, right, bottom) of an image that the model sees, in the image's pixels."""
        if self.squash:
            w, h = width * self.crop, height * self.crop
        else:
            scale = min(height / self.image_size[0], width / self.image_size[1]) * self.crop
            w, h = min(scale * self.image_size[1], width), min(scale * self.image_size[0], height)  # min: rounding
        left, top = (width - w) / 2, (height - h) / 2
        return left, top, left + w, top + h

    def cut(self, image: Image.Image) -> Image.Image:
        """The part the model sees, at the model's size."""
        height, width = self.image_size
        if image.size == (width, height) and self.crop == 1:
            return image
        filter = Image.Resampling[self.interpolation.upper()]
        return image.resize((width, height), filter, box=self.box(*image.size), reducing_gap=3.0)

    def __call__(self, image: Image.Image) -> Tensor:
        """uint8 pixels (C, H, W) of an opened image."""
        pixels = np.array(self.cut(image if image.mode == self.mode else to_mode(image, self.mode, self.white)))
        return torch.from_numpy(pixels.reshape(*self.image_size, -1)).permute(2, 0, 1).contiguous()

    def load(self, source: str | Path | IO[bytes] | Image.Image) -> Tensor:
        """uint8 pixels (C, H, W) of a file or an image, decoding a large JPEG no further than the model can see.

        Raises:
            ImageError: As ``open_image``.
        """
        return self(open_image(source, self.mode, min_side=self.min_side, white=self.white))

    @property
    def min_side(self) -> int:
        """Pixels of an image's shorter side beyond which the model sees no more."""
        return math.ceil(DRAFT_GAP * max(self.image_size) / self.crop)

    def normalize(self, images: Tensor) -> Tensor:
        """Float images (B, C, H, W) with the model's mean and std from uint8 pixels."""
        numbers = (self.mean, self.std)
        # Not torch.tensor(device=...), which would wait for all that a GPU has been given to do.
        mean, std = (
            torch.tensor(n, dtype=torch.float32).view(-1, 1, 1).to(images.device, non_blocking=True) for n in numbers
        )
        return (images.float() / 255 - mean) / std


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
