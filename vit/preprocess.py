"""From an image file to what the model was trained on: opening safely, cutting, scaling, normalising.

The numbers (size, mean, std, ...) travel in the checkpoint, so that training and prediction cannot disagree.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"))
MODES = {1: "L", 3: "RGB"}


class ImageError(ValueError):
    """A file that is no image we can read; the message is one line."""


def open_image(source: str | Path | IO[bytes], mode: str = "RGB") -> Image.Image:
    """Decode one image file as a person sees it: upright, transparency on white, 16 bits scaled to 8.

    Args:
        source: Path or binary file of a PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM or AVIF; of an animation the first frame.
        mode: "RGB", or "L" for grey.

    Raises:
        ImageError: If it is missing, no image, truncated, of another format, or larger than Pillow's bomb limit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is not the user's concern ...
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # ... but a bomb is refused
            with Image.open(source, formats=FORMATS) as image:
                image.load()
                return to_mode(ImageOps.exif_transpose(image), mode)
    except Exception as error:  # a corrupt file raises whatever its decoder stumbles on
        raise ImageError(reason(error)) from error


def reason(error: Exception) -> str:
    """One line on why an image could not be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    if "cannot identify image file" in text:
        return f"not an image of a known format ({', '.join(FORMATS)})"
    return text or type(error).__name__


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert any Pillow mode to RGB or L without the silent losses of ``convert``."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = scaled_to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit and float images in grey levels 0 to 255; ``convert`` would clip them to white."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        top = 1.0 if np.nanmax(values, initial=0.0) <= 1 else 255.0 if np.nanmax(values) <= 255 else 65535.0
    else:
        top = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255.0
    values = np.nan_to_num(values * (255.0 / top), nan=0.0, posinf=255.0, neginf=0.0)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8), "L")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The eval-time transform a model expects.

    Args:
        image_size: Height and width of the model's input, in pixels.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel, of values in [0, 1].
        interpolation: Resampling filter by Pillow's name: bicubic, bilinear, lanczos, nearest, box.
        crop: Share of the image's shorter side that is kept, in (0, 1].
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop: float = 1.0

    @property
    def mode(self) -> str:
        """Pillow mode of the model's input."""
        if len(self.mean) not in MODES:
            raise ValueError(f"image files have 1 or 3 channels, the model expects {len(self.mean)}")
        return MODES[len(self.mean)]

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The centred part (left, top, right, bottom) of an image that the model sees, in the image's pixels."""
        scale = min(height / self.image_size[0], width / self.image_size[1]) * self.crop
        w, h = scale * self.image_size[1], scale * self.image_size[0]
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
        pixels = np.array(self.cut(image if image.mode == self.mode else to_mode(image, self.mode)))
        return torch.from_numpy(pixels.reshape(*self.image_size, -1)).permute(2, 0, 1).contiguous()

    def normalize(self, images: Tensor) -> Tensor:
        """Float images (B, C, H, W) with the model's mean and std from uint8 pixels."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images.float() / 255 - mean) / std
