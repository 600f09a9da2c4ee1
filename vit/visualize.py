"""Pictures of maps: an image beside the same image with what counted lit up, and sheets of many.

matplotlib gives the colour table and the font; it is imported with the first picture, being slow to import.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from math import ceil, floor
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit.preprocess import to_mode

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

COLORS = "inferno"  # perceptually uniform: equal steps look equal, in grey print and to the colour-blind too
INK, PAPER = (32, 33, 36), (255, 255, 255)
SMALLEST, LARGEST = 320, 1600  # pixels of the longer side an image is enlarged or reduced to
PIXELATED = 96  # images up to this size are enlarged pixel by pixel: smoothing would draw what the model never saw
DIMMED = 0.35  # brightness of what the model does not see
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def overlay(
    image: Image.Image,
    grid: np.ndarray,
    *,
    box: Box | None = None,
    caption: str | None = None,
    size: int | None = None,
) -> Image.Image:
    """The image, beside it the image under its map, and the caption below.

    Args:
        image: The opened image, of any size and mode.
        grid: Weight of each patch, (grid height, grid width), non-negative; the largest glows brightest.
        box: The part the model sees, in the image's pixels; what lies outside is dimmed. None for all of it.
        caption: Text under the picture, such as label and score; shortened to one line.
        size: Longer side of each half, in pixels; none to enlarge small images and keep others.
    """
    width, height = image.size
    scale = (size or min(max(*image.size, SMALLEST), LARGEST)) / max(image.size)
    if scale > 1 and max(image.size) <= PIXELATED and size is None:
        scale = max(1, round(scale))  # whole pixels
    left = resized(to_mode(image, "RGB"), max(1, round(width * scale)), max(1, round(height * scale)))
    right = heat(left, grid, box=None if box is None else tuple(v * scale for v in box))  # pyright: ignore
    gap = max(4, left.width // 50)
    panel = Image.new("RGB", (2 * left.width + gap, left.height), PAPER)
    panel.paste(left, (0, 0))
    panel.paste(right, (left.width + gap, 0))
    return panel if caption is None else captioned(panel, caption)


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """Enlarged or reduced so that a person can look at it."""
    pixelated = max(image.size) <= PIXELATED and width > image.width
    return image.resize((width, height), Image.Resampling.NEAREST if pixelated else Image.Resampling.LANCZOS)


def heat(image: Image.Image, grid: np.ndarray, *, box: Box | None = None) -> Image.Image:
    """An RGB image under its map: greyer where little counts, glowing where much does, dark outside the box."""
    pixels = np.asarray(image, dtype=np.float32)
    left, top, right, bottom = box or (0, 0, *image.size)
    left, top, right, bottom = floor(left), floor(top), ceil(right), ceil(bottom)
    result = DIMMED * pixels
    inside = pixels[top:bottom, left:right]
    strength = enlarged(grid, inside.shape[1], inside.shape[0])
    opacity = 0.25 + 0.45 * strength[..., None]
    calm = 0.25 * inside + 0.75 * (inside @ LUMA)[..., None]
    color = color_table()[(255 * strength).astype(np.uint8)]
    result[top:bottom, left:right] = calm + (color - calm) * opacity
    return Image.fromarray(result.round().clip(0, 255).astype(np.uint8))


def enlarged(grid: np.ndarray, width: int, height: int) -> np.ndarray:
    """The grid stretched to [0, 1] and smoothly enlarged to (height, width); zeros where all patches are the same."""
    grid = np.asarray(grid, dtype=np.float32)
    low, high = grid.min(), grid.max()
    grid = (grid - low) / (high - low) if high - low > 1e-5 * high else np.zeros_like(grid)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)


@cache
def color_table() -> np.ndarray:
    """256 RGB colours (256, 3) from 0 to 255, for the least to the most."""
    from matplotlib import colormaps

    return (255 * colormaps[COLORS](np.arange(256))[:, :3]).astype(np.float32)


def font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """matplotlib's own DejaVu Sans, the same everywhere: Latin, Greek, Cyrillic, Arabic; for others what is there.

    Args:
        size: In pixels.
        text: What is to be written. Where letters of it are missing (Chinese, Japanese, Korean), the font of this
            machine that has most of them.
    """
    from matplotlib import get_data_path

    file, letters = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", frozenset(map(ord, text)) - {0x20}
    if not letters <= letters_of(file):
        from matplotlib.font_manager import fontManager

        upright = (e for e in fontManager.ttflist if e.style == "normal" and e.weight in (400, 500))
        others = {e.fname for e in upright if not e.name.startswith("Last Resort")}  # which has boxes for all letters
        file = max([file, *sorted(others)], key=lambda other: len(letters & letters_of(other)))
    return _face(file, size)


@cache
def _face(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@cache
def letters_of(file: str) -> frozenset[int]:
    """Letters of a font, by their numbers in Unicode; none of one that cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(file).get_charmap())
    except (RuntimeError, OSError):
        return frozenset()


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """An RGB picture with a line of text below it, shortened in the middle if it is too long."""
    size = min(max(14, picture.width // 40), 32)
    letters = font(size, text)
    line = shortened(text, letters, picture.width)
    result = Image.new("RGB", (picture.width, picture.height + 2 * size), PAPER)
    result.paste(picture, (0, 0))
    ImageDraw.Draw(result).text((0, picture.height + size), line, fill=INK, font=letters, anchor="lm")
    return result


def shortened(text: str, letters: ImageFont.FreeTypeFont, width: int) -> str:
    """The text in one line, or as much of its two ends as fits the width in pixels."""
    line = text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    keep = len(text)
    while keep > 1 and letters.getlength(line) > width:
        keep -= 1
        line = f"{text[: keep // 2]}…{text[len(text) - (keep - keep // 2) :]}"
    return line


def contact_sheet(entries: Sequence[Mapping[str, Any]], *, columns: int | None = None, size: int = 224) -> Image.Image:
    """One picture of many overlays, in rows.

    Args:
        entries: The arguments of ``overlay`` for each image: image, grid, and box and caption where there are any.
        columns: Overlays in a row; none for about as wide as high.
        size: Longer side of each image, in pixels.

    Raises:
        ValueError: If there are no entries.
    """
    if not entries:
        raise ValueError("a contact sheet needs at least one image")
    panels = [overlay(**{"caption": " ", **entry, "size": size}) for entry in entries]
    gap = size // 12
    width, height = max(p.width for p in panels), max(p.height for p in panels)
    columns = min(len(panels), columns or max(1, round((len(panels) * height / width) ** 0.5 + 0.25)))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(p.height for p in row) for row in rows]
    sheet = Image.new("RGB", (columns * (width + gap) + gap, sum(heights) + (len(rows) + 1) * gap), PAPER)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for i, panel in enumerate(row):  # images of other shapes stand on one line, captions side by side
            left = gap + i * (width + gap) + (width - panel.width) // 2
            sheet.paste(panel, (left, top + height - panel.height))
        top += height + gap
    return sheet
