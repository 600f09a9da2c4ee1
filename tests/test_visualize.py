"""Pictures: what a person must be able to see in them."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vit.visualize import (
    DIMMED,
    LARGEST,
    SMALLEST,
    captioned,
    color_table,
    contact_sheet,
    enlarged,
    font,
    heat,
    letters_of,
    overlay,
    shortened,
)

GRID = np.array([[0.0, 0.1, 0.1], [0.1, 0.6, 0.1]])


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(60, 190, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def grey(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L"), dtype=float)


def test_colors_grow_evenly_lighter():
    linear = (color_table() / 255) ** 2.2
    lightness = 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16  # CIE L*
    steps = np.diff(lightness[8:])  # below, L* is not a cube root
    assert (steps > 0).all()
    assert steps.std() < 0.5 * steps.mean()


def test_brightest_where_the_weight_is():
    lit = grey(heat(Image.new("RGB", (300, 200), (90, 90, 90)), GRID))
    y, x = np.unravel_index(lit.argmax(), lit.shape)
    assert 100 <= y < 200
    assert 100 <= x < 200
    assert lit[150, 150] > lit[:80, :80].max() + 80


def test_image_stays_visible_under_the_map():
    image, flat = photograph(300, 200), Image.new("RGB", (300, 200), (125, 125, 125))
    detail, under = grey(image) - grey(flat), grey(heat(image, GRID)) - grey(heat(flat, GRID))
    for where in ((slice(0, 90), slice(0, 90)), (slice(130, 170), slice(130, 170))):  # least and most relevant
        assert np.corrcoef(detail[where].ravel(), under[where].ravel())[0, 1] > 0.95
        assert under[where].std() > 0.25 * detail[where].std()


def test_outside_the_box_is_dimmed_and_uncolored():
    image = photograph(100, 60)
    box = (20.0, 0.0, 80.0, 60.0)
    result, pixels = (np.asarray(i, dtype=float) for i in (heat(image, GRID, box=box), image))
    for outside in (slice(0, 20), slice(80, 100)):
        np.testing.assert_allclose(result[:, outside], DIMMED * pixels[:, outside], atol=1)
    assert not np.allclose(result[:, 20:80], DIMMED * pixels[:, 20:80], atol=20)


def test_map_lies_where_the_box_is():
    corner = np.zeros((4, 4))
    corner[0, 0] = 1
    lit = grey(heat(Image.new("RGB", (200, 100), (90, 90, 90)), corner, box=(100.0, 0.0, 200.0, 100.0)))
    y, x = np.unravel_index(lit.argmax(), lit.shape)
    assert y < 25
    assert 100 <= x < 125


def test_the_box_is_enlarged_with_the_image():
    panel = overlay(Image.new("RGB", (40, 16), (100, 100, 100)), np.eye(2), box=(8, 0, 32, 16))
    seen = (np.asarray(panel)[:, -320:] != round(100 * DIMMED)).any(2)  # at eight times its size
    assert seen[:, 64:256].all()
    assert not seen[:, :64].any()
    assert not seen[:, 256:].any()


def test_enlarged_keeps_the_order_of_patches():
    grid = np.random.default_rng(0).random((7, 5))
    centres = enlarged(grid, 50, 70)[5::10, 5::10]
    assert np.corrcoef(centres.ravel(), grid.ravel())[0, 1] > 0.95
    assert enlarged(grid, 50, 70).min() >= 0
    assert enlarged(grid, 50, 70).max() <= 1


def test_what_only_rounding_tells_apart_is_not_drawn_as_a_map():
    assert not enlarged(np.array([[0.25, 0.25], [0.25, 0.2500001]]), 8, 8).any()


@pytest.mark.parametrize("grid", [np.full((3, 3), 1 / 9), np.zeros((2, 2)), np.array([[np.nan, 1.0]])])
def test_no_contrast_is_invented_or_stumbled_over(grid):
    strength = enlarged(grid, 12, 12)
    assert np.isfinite(strength).all()
    if np.ptp(grid) == 0:
        assert (strength == 0).all()


@pytest.mark.parametrize("size", [(32, 32), (1000, 700), (28, 28), (1, 1), (1, 900), (5000, 3)])
def test_any_size_becomes_a_picture_to_look_at(size):
    panel = overlay(photograph(*size), GRID, caption="tabby cat 93.1 %", box=(0, 0, *size))
    assert SMALLEST * 0.9 <= max(panel.width / 2, panel.height) <= LARGEST * 1.05 + 80


def test_small_images_keep_their_pixels():
    image = photograph(32, 32)
    left = overlay(image, GRID).crop((0, 0, 320, 320))
    np.testing.assert_array_equal(np.asarray(left)[5::10, 5::10], np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK"])
def test_any_mode(mode):
    assert overlay(photograph(40, 30, mode), GRID).mode == "RGB"


def test_more_than_8_bits_are_seen_as_the_model_sees_them():
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    panel = np.asarray(overlay(Image.fromarray(levels), GRID, size=64))
    assert abs(panel[:, :64].mean() - 127) < 3


def test_original_stands_beside_the_map():
    image = photograph(400, 300)
    panel = overlay(image, GRID)
    np.testing.assert_array_equal(np.asarray(panel.crop((0, 0, 400, 300))), np.asarray(image))
    np.testing.assert_array_equal(
        np.asarray(panel.crop((panel.width - 400, 0, panel.width, 300))), np.asarray(heat(image, GRID))
    )


def test_caption_is_written_below():
    image = photograph(400, 300)
    plain, captioned = overlay(image, GRID), overlay(image, GRID, caption="cat 93.1 %")
    strip = grey(captioned.crop((0, plain.height, *captioned.size)))
    assert strip.min() < 80  # ink
    assert strip.max() == 255  # paper
    other = grey(overlay(image, GRID, caption="dog 93.1 %").crop((0, plain.height, *captioned.size)))
    assert (strip != other).any()


@pytest.mark.parametrize("text", ["a", "собака 12 %", "x" * 300, "two\nlines", "", "no text \udcff\x00"])
def test_caption_fits(text):
    letters = font(20)
    line = shortened(text, letters, 200)
    assert letters.getlength(line) <= 200
    if len(text) > 100:
        assert "…" in line
        assert line.startswith("x")
        assert line.endswith("x")
    overlay(photograph(32, 32), GRID, caption=text)


def test_letters_that_one_font_lacks_are_taken_from_another():
    """Such as Chinese ones, which matplotlib's own lack; here those of a phonetic alphabet, which one of them has."""
    usual = font(20, "cat 93.1 % собака").path
    assert usual == font(20, "\udcff\uffff").path == font(20).path  # nobody has these
    other = font(20, "ᶁᶄ 93.1 %").path
    assert other != usual
    assert {0x1D81, 0x1D84} <= letters_of(other) - letters_of(usual)
    box = grey(captioned(Image.new("RGB", (100, 20)), "\uffff"))
    assert (grey(captioned(Image.new("RGB", (100, 20)), "ᶁ")) != box).any()


def test_contact_sheet_holds_every_image():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
    entries = [
        {"image": Image.new("RGB", (40 + 10 * i, 40), c), "grid": GRID, "caption": str(i)} for i, c in enumerate(colors)
    ]
    pixels = np.asarray(contact_sheet(entries, columns=2)).reshape(-1, 3)
    for color in colors:
        assert (pixels == color).all(1).sum() > 10000
    assert len({contact_sheet(entries, columns=n).width for n in (1, 2, 3)}) == 3
    assert contact_sheet(entries[:1]).width < contact_sheet(entries).width
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([])


def test_matplotlib_waits_for_the_first_picture():
    code = "import sys, vit.visualize; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
