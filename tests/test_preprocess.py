"""Opening files safely and as a person sees them; cutting and scaling; against files made in known ways."""

import io
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torchvision.transforms.v2.functional import center_crop, normalize, pil_to_tensor

from benchmarks.predict_robust import mutations
from vit import preprocess
from vit.preprocess import FORMATS, SUFFIXES, ImageError, Preprocess, open_image

PREPROCESS = Preprocess(image_size=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def picture(width: int = 48, height: int = 40) -> Image.Image:
    """Colour gradients with some texture."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x / (width - 1), 255 * y / (height - 1)
    blue = 128 + 90 * np.sin(x / 3) * np.cos(y / 4)
    return Image.fromarray(np.stack([red, green, blue], -1).round().astype(np.uint8))


def stored(image: Image.Image, format: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference, in grey levels of 255."""
    assert a.size == b.size
    assert a.mode == b.mode
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


# ---- modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "format", "tolerance"),
    [
        ("1", "PNG", 0),
        ("L", "PNG", 0),
        ("LA", "PNG", 0),
        ("P", "GIF", 0),
        ("P", "PNG", 0),
        ("RGB", "WEBP", 6),
        ("RGBA", "PNG", 0),
        ("CMYK", "TIFF", 1),
        ("CMYK", "JPEG", 8),
        ("YCbCr", "JPEG", 6),
        ("I", "TIFF", 0),
        ("F", "TIFF", 1),
        ("RGB", "AVIF", 6),
        ("RGB", "HEIF", 6),
        ("RGB", "BMP", 0),
        ("RGB", "PPM", 0),
    ],
)
def test_every_mode_looks_as_it_was_stored(mode, format, tolerance):
    image = picture().convert(mode)
    reference = (image.convert("L") if mode in ("I", "F") else image).convert("RGB")
    assert difference(open_image(stored(image, format)), reference) <= tolerance
    assert PREPROCESS.load(stored(image, format)).shape == (3, 32, 32)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_equals_its_8_bit_source(format):
    grey = picture().convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    opened = open_image(stored(deep, format), "L")
    assert difference(opened, grey) == 0


def test_16_bit_grey_with_a_hidden_level_or_white_as_0_equals_its_8_bit_source():
    grey = picture().convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    for level in (15, 100):
        eight, sixteen = stored(grey, "PNG", transparency=level), stored(deep, "PNG", transparency=level * 257)
        assert (np.asarray(grey) == level).any()
        assert difference(open_image(sixteen, "L"), open_image(eight, "L")) == 0
    negative = Image.fromarray(65535 - np.asarray(deep))  # Pillow turns 8 bits round by itself, also as it writes them
    eight, sixteen = (stored(image, "TIFF", tiffinfo={262: 0}) for image in (grey, negative))
    assert difference(open_image(eight, "L"), grey) == difference(open_image(sixteen, "L"), grey) == 0
    with Image.open(sixteen) as opened:
        assert difference(open_image(opened, "L"), grey) == 0


@pytest.mark.parametrize(("kind", "white"), [(np.uint16, 4095), (np.int32, 4095), (np.float32, 2.5)])
def test_white_is_what_is_said(kind, white):
    """All images of a set on one scale, whatever the brightest value of each; above it all is white."""
    pre = Preprocess(image_size=(32, 32), mean=(0.5,), std=(0.5,), white=white)
    grey = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    for brightest in (0.5, 1.0, 2.0):
        values = (grey * brightest * white).astype(kind)
        for image in (Image.fromarray(values), stored(Image.fromarray(values), "TIFF")):
            seen = pre.load(image)[0].float()
            assert (seen - torch.from_numpy(grey * brightest * 255).clamp(max=255)).abs().max() <= 1
        assert torch.equal(pre(Image.fromarray(values))[0].float(), seen)  # opened by somebody else
    with pytest.raises(ValueError, match="white must be a value above 0, got 0"):
        Preprocess(image_size=(32, 32), mean=(0.5,), std=(0.5,), white=0)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("most", [65535, 4095, 1000])
def test_16_bits_of_a_pgm(most, plain):
    """Its header says what is white, however dark the image; of the largest, that of a camera may be told."""
    values = (np.array([[0, 0.25, 0.5, 0.003]]) * most).round().astype(">u2")
    pixels = " ".join(map(str, values.flatten())).encode() if plain else values.tobytes()
    file = io.BytesIO((b"P2" if plain else b"P5") + b"\n4 1\n%d\n" % most + pixels)
    expected = (values.astype(float) / most * 255).round()
    assert np.abs(np.asarray(open_image(file, "L")) - expected).max() <= 1
    opened = Image.open(file)
    for source in (file, opened, opened):  # which the second time is decoded already
        assert np.asarray(open_image(source, "L", white=4095)).max() == (255 if most == 65535 else expected.max())


def test_opacity_multiplied_in_is_what_it_was_before():
    for mode, other in (("RGBA", "RGBa"), ("LA", "La")):
        image = picture().convert(mode)
        image.putalpha(200)
        assert difference(open_image(image.convert(other)), open_image(image)) <= 2


def test_floats_in_0_to_1_and_in_0_to_65535_and_no_numbers():
    grey = np.asarray(picture().convert("L"), dtype=np.float32)
    for scale in (1 / 255, 1, 257):
        opened = open_image(stored(Image.fromarray(grey * np.float32(scale)), "TIFF"), "L")
        assert np.abs(np.asarray(opened, dtype=float) - grey).max() <= 1
    broken = grey / 255
    broken[0] = np.nan
    broken[1] = -np.inf
    broken[2] = np.inf
    for white in (None, 1.0):
        opened = np.asarray(open_image(stored(Image.fromarray(broken), "TIFF"), "L", white=white))
        assert (opened[:2] == 0).all()
        assert (opened[2] == 255).all()
        assert np.abs(opened[3:].astype(float) - grey[3:]).max() <= 1


def test_transparency_is_on_white_and_hidden_colours_stay_hidden():
    image = picture().convert("RGBA")
    image.paste((255, 0, 0, 0), (0, 0, 10, 10))  # invisible red
    image.paste((0, 0, 0, 128), (10, 0, 20, 10))  # half black
    pixels = np.asarray(open_image(stored(image, "PNG")))
    assert (pixels[:10, :10] == 255).all()
    assert (np.abs(pixels[:10, 10:20].astype(int) - 127) <= 1).all()
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0, 0, 0] * 3 + [200, 10, 10] + [0, 0, 0] * 252)
    pixels = np.asarray(open_image(stored(palette, "PNG", transparency=3)))
    assert (pixels == 255).all()


def test_animation_is_its_first_frame():
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        opened = open_image(stored(frames[0], format, save_all=True, append_images=frames[1:], **options))
        assert difference(opened, frames[0]) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_eight_orientations_are_one_picture(orientation):
    image = picture(50, 32)
    undo = [None, 0, 3, 1, 5, 2, 6, 4][orientation - 1]  # Image.Transpose that the viewer will take back
    turned = image if undo is None else image.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert difference(open_image(stored(turned, "PNG", exif=exif)), image) == 0
    assert difference(open_image(stored(turned, "HEIF", exif=exif.tobytes())), image) < 6
    torch.testing.assert_close(
        PREPROCESS.load(stored(turned, "PNG", exif=exif)), PREPROCESS.load(image), atol=0, rtol=0
    )


def test_damaged_exif_does_not_cost_the_image():
    image = picture()
    file = stored(image, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12nonsense")
    assert difference(open_image(file), image) == 0


def test_colours_go_by_the_profile():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swap = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}
    count = int.from_bytes(srgb[128:132], "big")
    tags = b"".join(swap.get(tag[:4], tag[:4]) + tag[4:] for tag in (srgb[132 + 12 * i :][:12] for i in range(count)))
    swapped = (srgb[:132] + tags + srgb[132 + len(tags) :]).replace(b"s\0R\0G\0B", b"t\0e\0s\0t")
    image = picture()
    assert difference(open_image(stored(image, "PNG", icc_profile=srgb)), image) == 0
    red, green, blue = image.split()
    expected = Image.merge("RGB", (green, red, blue))  # a profile in which red is called green
    assert difference(open_image(stored(image, "PNG", icc_profile=swapped)), expected) < 2
    assert difference(open_image(stored(image, "PNG", icc_profile=b"damaged")), image) == 0
    linear = swapped.replace(b"t\0e\0s\0t", b"s\0R\0G\0B").replace(b"b\0u\0i\0l\0t", b"i\0n\0e\0a\0r")
    assert linear.count(b"i\0n\0e\0a\0r") == 1
    assert difference(open_image(stored(image, "PNG", icc_profile=linear)), expected) < 2  # its colours, not its light
    opaque = image.convert("RGBA")  # as a screenshot is stored
    assert difference(open_image(stored(opaque, "PNG", icc_profile=swapped)), expected) < 2
    few = image.quantize(16)
    red, green, blue = few.convert("RGB").split()
    expected = Image.merge("RGB", (green, red, blue))
    assert difference(open_image(stored(few, "PNG", icc_profile=swapped)), expected) < 2


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_folders_are_searched_for_all_endings_of_the_formats():
    assert {ending for ending, format in Image.registered_extensions().items() if format in FORMATS} <= SUFFIXES


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_refused_not_half_read(format):
    whole = stored(picture(100, 80), format).getvalue()
    open_image(io.BytesIO(whole))
    with pytest.raises(ImageError):
        open_image(io.BytesIO(whole[: len(whole) * 2 // 3]))


def test_without_its_package_a_heic_says_which_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "FORMATS", FORMATS[:-1])
    picture().save(tmp_path / "a.png", "HEIF")
    for file in (tmp_path / "a.png", stored(picture(), "HEIF")):
        with pytest.raises(ImageError, match=r"^a HEIC image: pip install pillow-heif$"):
            open_image(file)


def test_an_address_is_no_file():
    with pytest.raises(ImageError, match=r"^no such file; an address is not fetched, download it first$"):
        open_image("https://example.com/a.png")


def test_other_formats_are_refused_whatever_their_name(tmp_path):
    picture().save(tmp_path / "a.png", "PCX")
    with pytest.raises(ImageError, match="not an image of a known format"):
        open_image(tmp_path / "a.png")


def test_what_is_no_file_is_said_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "empty.png").touch()
    for name, message in {
        "missing.png": "no such file",
        "pipe.png": "not a regular file",
        "folder.png": "a folder, not an image file",
        "loop.png": "symbolic links",
        "empty.png": "^empty file$",
        "nul\0.png": "null",
    }.items():
        with pytest.raises(ImageError, match=message) as caught:
            open_image(f"{tmp_path}/{name}")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"II*\0\x08", "a TIFF that is cut off or of a kind that cannot be read"),
        (b"MM\0*" + bytes(100), "a TIFF that is cut off or of a kind that cannot be read"),
        (b"II*", f"not an image of a known format ({', '.join(FORMATS)})"),
    ],
)
def test_a_file_that_nothing_knows_is_told_by_its_beginning(tmp_path, data, message):
    (tmp_path / "a.tif").write_bytes(data)
    for source in (tmp_path / "a.tif", str(tmp_path / "a.tif"), io.BytesIO(data)):
        with pytest.raises(ImageError) as caught:
            open_image(source)
        assert str(caught.value) == message


def test_an_image_in_a_pipe_is_not_called_empty():
    """What was read of a pipe is gone; so it is told as before."""
    read, write = os.pipe()
    os.write(write, b"no image")
    os.close(write)
    with os.fdopen(read, "rb") as pipe, pytest.raises(ImageError, match="not an image of a known format"):
        open_image(pipe)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_file_that_may_not_be_read_is_said_in_one_line(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(ImageError, match=r"^Permission denied$"):
            open_image(tmp_path / "a.png")
    finally:
        os.seteuid(0)


def test_a_huge_image_within_the_limit_is_an_image():
    image = Image.new("1", (9400, 9500), 1)  # 89.3 million pixels of 89.5
    assert PREPROCESS.load(stored(image, "PNG")).flatten(1).float().mean(1).tolist() == [255, 255, 255]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [1000, 1900])  # Pillow raises above twice the limit and only warns below that
def test_bombs_are_refused(limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match=f"limit of {limit}"):
        open_image(stored(picture(48, 45), "PNG"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_of_a_jpeg_the_pixels_that_are_decoded_count(monkeypatch):
    """Some telephones give photographs of 108 or 200 million; of them a quarter of the side, or less, is decoded."""
    photo = picture(480, 451)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    for least in (200, None):
        assert open_image(stored(photo, "JPEG"), min_side=least).size == (240, 226)
    for file, least in ((stored(photo, "JPEG"), 300), (stored(photo, "PNG"), None)):
        with pytest.raises(ImageError, match="480 x 451 pixels, more than the limit of 200000; make it smaller"):
            open_image(file, min_side=least)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_jpeg_of_more_than_twice_pillows_limit_is_decoded_smaller(monkeypatch, tmp_path):
    photo = picture(960, 451)
    small = open_image(stored(photo, "JPEG"), min_side=100)
    file, progressive = tmp_path / "a.jpg", stored(photo, "JPEG", progressive=True)
    file.write_bytes(stored(photo, "JPEG").getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    for source in (file, str(file), stored(photo, "JPEG")):
        assert open_image(source, min_side=100) == small
    assert open_image(file).size == (480, 226)
    with pytest.raises(ImageError, match="960 x 451 pixels, more than the limit of 400000; make it smaller"):
        open_image(progressive, min_side=100)  # however little is wanted of it, its coefficients are held
    with pytest.raises(ImageError, match="more pixels than the limit of 200000"):
        open_image(stored(photo, "PNG"), min_side=100)


@pytest.mark.parametrize(("progressive", "alone"), [(False, False), (True, True)])
def test_a_large_progressive_jpeg_is_decoded_alone(monkeypatch, progressive, alone):
    """However little is wanted of it, its coefficients are held until the last scan."""
    one = MagicMock()
    monkeypatch.setattr(preprocess, "LARGE", 100_000)
    monkeypatch.setattr(preprocess, "_one_large", one)
    file = stored(picture(480, 450), "JPEG", progressive=progressive)
    assert open_image(file, min_side=100).size == (120, 113)
    assert one.__enter__.called == alone


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_mutated_files_neither_crash_nor_hang():
    """2,000 files with some bytes changed, cut out or repeated: a picture or an ImageError, at once."""
    outcomes = {"picture": 0, "refused": 0}
    for _, data in islice(mutations(seed=0), 2000):
        begin = time.process_time()
        try:
            open_image(io.BytesIO(data))
            outcomes["picture"] += 1
        except ImageError:
            outcomes["refused"] += 1
        assert time.process_time() - begin < 2
    assert min(outcomes.values()) > 200, outcomes


# ---- what the model sees -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (33, 31), (32, 32)])
def test_any_size_fits(size):
    assert PREPROCESS.load(Image.new("RGB", size, (10, 20, 30))).flatten(1).float().mean(1).tolist() == [10, 20, 30]


@pytest.mark.parametrize(("size", "crop"), [((90, 60), 1.0), ((60, 90), 1.0), ((30, 30), 0.8), ((250, 170), 0.4)])
def test_cut_is_the_centre_resized(size, crop):
    image = picture(*size)
    side = round(min(size) * crop)
    pre = Preprocess(image_size=(30, 30), mean=(0.5,) * 3, std=(0.5,) * 3, crop=crop)
    left, top, right, bottom = pre.box(*size)
    assert (right - left, bottom - top) == pytest.approx((side, side))
    assert (left + right, top + bottom) == pytest.approx(size)
    inner = Image.fromarray(center_crop(pil_to_tensor(image), [side, side]).permute(1, 2, 0).numpy())
    assert difference(pre.cut(image), inner.resize((30, 30), Image.Resampling.BICUBIC)) < 1


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_images_are_resampled_by_the_filter_that_is_named(name):
    image = picture(90, 60)
    pre = Preprocess(image_size=(30, 45), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation=name)
    assert difference(pre.cut(image), image.resize((45, 30), Image.Resampling[name.upper()])) == 0


@pytest.mark.parametrize("crop", [1.0, 0.8])
def test_squashed_images_keep_their_ends(crop):
    image = picture(90, 50)
    pre = Preprocess(image_size=(30, 40), mean=(0.5,) * 3, std=(0.5,) * 3, crop=crop, squash=True)
    assert pre.box(90, 50) == pytest.approx((45 - 45 * crop, 25 - 25 * crop, 45 + 45 * crop, 25 + 25 * crop))
    inner = Image.fromarray(
        center_crop(pil_to_tensor(image), [round(50 * crop), round(90 * crop)]).permute(1, 2, 0).numpy()
    )
    assert difference(pre.cut(image), inner.resize((40, 30), Image.Resampling.BICUBIC)) < 1


def test_box_of_a_model_that_is_not_square():
    pre = Preprocess(image_size=(16, 32), mean=(0.5,), std=(0.5,))
    assert pre.box(100, 100) == (0, 25, 100, 75)
    assert pre(picture(100, 100)).shape == (1, 16, 32)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    photo = picture(200, 150).resize((1600, 1200))
    file = stored(photo, "JPEG", quality=95)
    assert open_image(file, min_side=200).size == (400, 300)
    assert open_image(file, min_side=600).size == (800, 600)
    assert open_image(file, min_side=601).size == (1600, 1200)
    assert open_image(file).size == (1600, 1200)
    two = stored(photo, "MPO", save_all=True, append_images=[picture()])  # of a stereo camera, or a phone
    assert open_image(two, min_side=200).size == (400, 300)
    full = PREPROCESS(open_image(file)).float()
    assert (PREPROCESS.load(file).float() - full).abs().mean() < 1
    part = Preprocess(image_size=(50, 100), mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.25)
    assert part.min_side == 800  # of which the model sees 200, twice its longer side


def test_normalize_is_torchvision_s():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = normalize(images / 255, list(PREPROCESS.mean), list(PREPROCESS.std))
    torch.testing.assert_close(PREPROCESS.normalize(images), expected)


def test_threads_do_not_disturb_each_other():
    files = [stored(picture(40 + i, 50), "PNG").getvalue() for i in range(40)]
    alone = [PREPROCESS.load(io.BytesIO(file)) for file in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda file: PREPROCESS.load(io.BytesIO(file)), files))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_an_image_given_is_left_as_it_was():
    image = picture().convert("P")
    exif = image.getexif()
    exif[0x0112] = 6
    before = image.tobytes()
    assert PREPROCESS.load(image).shape == (3, 32, 32)
    assert (image.mode, image.size, image.tobytes(), image.getexif()[0x0112]) == ("P", (48, 40), before, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (0, 32)}, "image_size must be a height and a width of at least 1, got (0, 32)"),
        ({"image_size": (32,)}, "image_size must be a height and a width of at least 1, got (32,)"),
        ({"mean": (0.5,)}, "1 means for 3 standard deviations"),
        ({"std": (0.5, 0.0, 0.5)}, "std above 0, got (0.5, 0.5, 0.5) and (0.5, 0.0, 0.5)"),
        ({"crop": 1.2}, "crop must be in [0.01, 1], got 1.2"),
        ({"crop": 5e-324}, "crop must be in [0.01, 1], got 5e-324"),
        ({"interpolation": "cubic"}, "interpolation must be one of nearest, box"),
    ],
)
def test_numbers_out_of_range_are_named(change, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        Preprocess(**{"image_size": (32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3} | change)
    assert message in str(caught.value)
