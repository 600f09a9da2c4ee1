"""Draws that are random yet functions of (seed, epoch, image), and images moved exactly as they say."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as tv

from data.augment import (
    CHANGES,
    DRAWS,
    LEVELS,
    Augment,
    _mix,
    change_levels,
    change_places,
    compose,
    crops,
    epoch_key,
    erase,
    recolor,
    uniform,
    warp,
)

EVERYTHING = Augment(translate=0.125, flip=0.5, rotate=15, scale=0.1, color=0.3, erase=0.5, crop=0.5, policy=0.5)
SIZES = [(8, 8), (12, 8), (7, 10)]


def draws(count: int = 1, images: int = 20_000, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    return uniform(epoch_key(seed, epoch), torch.arange(images), count)


def of(indices: torch.Tensor, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    """All random numbers of these images."""
    return uniform(epoch_key(seed, epoch), indices, DRAWS)


def pictures(count: int, size: tuple[int, int] = (8, 8), channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(0))


def view(augment: Augment, images: torch.Tensor, indices=None, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    return augment(images, of(torch.arange(len(images)) if indices is None else indices, seed=seed, epoch=epoch))


# The generator


def test_mixing_function_is_splitmix64():
    """First outputs for seeds 0 and 1234567 as the reference implementation in C gives them."""
    expected = {0: [0xE220A8397B1DCDAF], 1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423]}
    for seed, outputs in expected.items():
        for turn, output in enumerate(outputs):
            state = (seed + turn * 0x9E3779B97F4A7C15) % 2**64
            signed = state - 2**64 if state >= 2**63 else state
            assert int(_mix(torch.tensor(signed))) % 2**64 == output


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 0), (0, 1), (2**40, 1000)])
def test_draws_are_uniform(seed, epoch):
    values = draws(2, seed=seed, epoch=epoch).numpy()
    assert values.min() >= 0
    assert values.max() < 1
    for column in values.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
        assert stats.chisquare(np.histogram(column, 64, (0, 1))[0]).pvalue > 1e-3


def test_draws_are_unrelated():
    """Between numbers of an image, neighbouring images, epochs and seeds: no correlation."""
    here = draws(2)
    pairs = {
        "columns": (here[:, 0], here[:, 1]),
        "images": (here[:-1, 0], here[1:, 0]),
        "epochs": (here[:, 0], draws(2, epoch=1)[:, 0]),
        "seeds": (here[:, 0], draws(2, seed=1)[:, 0]),
        "seed and epoch": (draws(1, seed=1)[:, 0], draws(1, epoch=1)[:, 0]),
    }
    for name, (a, b) in pairs.items():
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / len(a) ** 0.5, name
        assert (a == b).float().mean() < 1e-3, name


def test_draws_do_not_depend_on_the_batch():
    order = torch.randperm(500)
    assert torch.equal(uniform(epoch_key(3, 4), order, 5), draws(5, images=500, seed=3, epoch=4)[order])


def test_first_draws_do_not_depend_on_their_number():
    assert torch.equal(draws(5)[:, :2], draws(2))


def test_no_two_parts_share_a_number():
    """Or else what is mirrored would be what is cut, say: of which numbers each part's images and labels are made."""
    numbers = torch.full((1 + 2 * DRAWS, DRAWS), 0.6)
    for column in range(DRAWS):
        numbers[[1 + column, 1 + DRAWS + column], column] = torch.tensor([0.1, 0.9])
    images, labels = pictures(1).expand(len(numbers), -1, -1, -1), torch.arange(len(numbers))
    for part, places in {
        **{"translate": [3, 4], "flip": [0], "rotate": [1, 5], "scale": [2, 5], "color": [6, 7, 8]},
        **{"erase": [9, 10, 11, 12], "crop": [13, 14, 15, 16], "policy": [17, 18, 19]},
        **{"mixup": [20, 21], "cutmix": [20, 21, 22, 23]},
    }.items():
        augment = Augment(**{part: 20 if part == "rotate" else 0.75})
        views = augment(augment.pixels(images * 200, numbers), numbers)
        own = augment.mix(images, labels, numbers, classes=len(labels))[1].diagonal()
        found = torch.cat([views.flatten(1), own[:, None]], 1)
        differs = (found != found[0]).any(1)[1:].view(2, DRAWS).any(0)
        assert differs.nonzero()[:, 0].tolist() == places, part


def test_global_generator_is_not_touched():
    before = torch.get_rng_state()
    view(EVERYTHING, pictures(3))
    assert torch.equal(torch.get_rng_state(), before)


# The images


def test_nothing_asked_changes_nothing():
    images = pictures(5)
    assert torch.equal(view(Augment(), images), images)


@pytest.mark.parametrize("size", SIZES)
def test_an_image_is_changed_alike_in_every_batch(size):
    images, order = pictures(40, size), torch.randperm(40)
    whole = view(EVERYTHING, images)
    torch.testing.assert_close(view(EVERYTHING, images[order], order), whole[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(view(EVERYTHING, images[7:8], torch.tensor([7])), whole[7:8], rtol=0, atol=1e-5)


def test_views_depend_on_seed_epoch_and_image():
    one = pictures(1).expand(6, -1, -1, -1)
    views = [
        view(EVERYTHING, one, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]  # six images of one picture, three times
    flat = torch.cat(views).flatten(1)
    distances = torch.cdist(flat, flat) + torch.eye(len(flat)) * 100
    assert distances.min() > 0.05
    assert torch.equal(view(EVERYTHING, one), views[0])


@pytest.mark.parametrize("size", SIZES)
def test_shifts_are_whole_pixels_with_mirrored_edges(size):
    """Every shift of up to a quarter of each side, equally often, and the pixels are the very ones of the image."""
    height, width = size
    reach = [int(0.25 * side + 0.5) for side in size]
    image = pictures(1, size)[0]
    padded = np.pad(image.numpy(), ((0, 0), *((r, r) for r in reach)), mode="symmetric")
    shifts = [(y, x) for y in range(2 * reach[0] + 1) for x in range(2 * reach[1] + 1)]
    possible = np.stack([padded[:, y : y + height, x : x + width] for y, x in shifts])
    count = 40 * len(shifts)
    views = view(Augment(translate=0.25), image.expand(count, -1, -1, -1)).numpy()
    apart = np.abs(views[:, None] - possible[None]).max((2, 3, 4))
    assert apart.min(1).max() < 1e-5  # sampling positions are floats: whole to about 1e-6 of a pixel
    assert stats.chisquare(np.bincount(apart.argmin(1), minlength=len(shifts))).pvalue > 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_flip_mirrors_left_and_right(size):
    images = pictures(200, size)
    torch.testing.assert_close(view(Augment(flip=1), images), images.flip(-1), rtol=0, atol=1e-5)
    some = view(Augment(flip=0.3), images)
    flipped = (some - images).abs().amax((1, 2, 3)) > 1e-3
    torch.testing.assert_close(some[flipped], images[flipped].flip(-1), rtol=0, atol=1e-5)
    assert stats.binomtest(int(flipped.sum()), 200, 0.3).pvalue > 1e-3


@pytest.mark.parametrize(("size", "margin"), [((8, 8), (0, 0)), ((8, 12), (0, 2)), ((11, 7), (2, 0))])
def test_rotation_keeps_proportions(size, margin):
    """A quarter turn of the central square, also where the image is not one."""
    side, (top, left) = min(size), margin
    images = pictures(2, size)
    quarter = torch.tensor([[0.5, 1.0, 0.5, 0.5, 0.5]]).expand(2, -1)  # the largest angle, nothing else
    turned = warp(images, Augment(rotate=90).matrices(quarter, *size))
    square = (..., slice(top, top + side), slice(left, left + side))
    torch.testing.assert_close(turned[square], images[square].rot90(1, (-2, -1)), rtol=0, atol=1e-5)


def test_zoom_enlarges_about_the_middle():
    """Of brightness that grows evenly, bilinear sampling makes no error."""
    x, y = torch.arange(12.0) - 5.5, torch.arange(8.0) - 3.5
    ramp = (x + 3 * y[:, None]).expand(1, 1, 8, 12)
    for draw, factor in ((1.0, 1.5), (0.5, 1.0)):
        numbers = torch.tensor([[0.5, 0.5, draw, 0.5, 0.5]])
        zoomed = warp(ramp, Augment(scale=0.5).matrices(numbers, 8, 12))
        torch.testing.assert_close(zoomed, ramp / factor, rtol=0, atol=1e-4)


def test_nothing_drifts():
    """On average an image stays where it is and as it is turned."""
    size = (8, 12)
    matrices = Augment(translate=0.25, rotate=20, scale=0.2).matrices(draws(5), *size)
    for name, values in {"x": matrices[:, 0, 2], "y": matrices[:, 1, 2], "turn": matrices[:, 1, 0]}.items():
        assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5, name
        assert values.std() > 0.05, name


def test_ranges_are_kept():
    matrices = Augment(rotate=20, scale=0.2).matrices(draws(5), 8, 8)
    angle = torch.atan2(matrices[:, 1, 0], matrices[:, 1, 1]).rad2deg()
    zoom = 1 / torch.linalg.det(matrices[:, :, :2]).sqrt()
    for values, low, high in ((angle, -20, 20), (zoom, 0.8, 1.2)):
        assert low <= values.min() + 1e-4
        assert values.min() < low + 0.01 * (high - low)
        assert high >= values.max() - 1e-4
        assert values.max() > high - 0.01 * (high - low)


def test_half_of_the_images_stay_sharp():
    images = pictures(400)
    for augment in (Augment(rotate=20), Augment(scale=0.2)):
        same = (view(augment, images) - images).abs().amax((1, 2, 3)) < 1e-5
        assert stats.binomtest(int(same.sum()), 400, 0.5).pvalue > 1e-3


# Colours and holes


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_change_as_said(channels):
    images = pictures(3, (7, 10), channels)

    def changed(brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0) -> torch.Tensor:
        return recolor(images, torch.tensor([[brightness, contrast, saturation]]).expand(3, -1))

    middle, grey = images.mean((1, 2, 3), keepdim=True), images.mean(1, keepdim=True)
    for found, expected in (
        (changed(), images),
        (changed(brightness=0.3), images + 0.3),
        (changed(contrast=-1.0), middle.expand_as(images)),
        (changed(contrast=0.5), 1.5 * images - 0.5 * middle),
        (changed(saturation=-1.0), grey.expand_as(images)),
        (changed(saturation=0.5), 1.5 * images - 0.5 * grey),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_each_image_has_its_own_colours():
    changes = torch.tensor([[0.3, 0.2, 0.1], [-0.1, 0.5, 0.4]])
    images = pictures(2)
    torch.testing.assert_close(recolor(images, changes)[1:], recolor(images[1:], changes[1:]))


def test_colour_draws_have_their_range_and_no_drift():
    views = view(Augment(color=0.4), torch.zeros(5000, 3, 1, 1))[:, 0, 0, 0]  # of black, brightness is all that shows
    assert stats.kstest(views.numpy(), stats.uniform(-0.4, 0.8).cdf).pvalue > 1e-3


@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_holes_are_rectangles_of_up_to_half_the_side(probability):
    count, height, width = 2000, 12, 16
    images = pictures(1, (height, width)).expand(count, -1, -1, -1) + 1  # nowhere 0
    views = view(Augment(erase=probability), images)
    hole = (views == 0).all(1)  # (B, H, W)
    assert torch.equal(views[~hole[:, None].expand_as(views)], images[~hole[:, None].expand_as(images)])
    rows, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, rows[:, :, None] & columns[:, None, :])
    assert rows.sum(1).max() in (height // 2, height // 2 + 1)
    assert columns.sum(1).max() in (width // 2, width // 2 + 1)
    share = hole.any((1, 2)).float().mean()  # a hole between two pixels' centres does not show
    assert 0.8 * probability < share <= probability + 4 * (0.21 / count) ** 0.5
    middle = hole.float().mean(0)  # everywhere possible, and alike on the left and the right
    assert middle.min() > 0
    assert (middle - middle.flip(-1)).abs().max() < 0.1


def test_probability_of_a_hole():
    draws = torch.tensor([[0.29, 1.0, 0.5, 0.5], [0.31, 1.0, 0.5, 0.5]])
    assert (erase(torch.ones(2, 1, 8, 8), draws, 0.3) == 0).sum((1, 2, 3)).tolist() == [16, 0]


# Random crops


def at(matrices: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Where points (P, 2) of the output come from, (B, P, 2)."""
    return points @ matrices[:, :, :2].mT + matrices[:, None, :, 2]


CORNERS = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])


def test_crops_lie_inside_and_have_their_area_and_shape():
    matrices = crops(draws(4), 0.3)
    corners = at(matrices, CORNERS)
    assert corners.abs().max() <= 1 + 1e-6
    sides = corners[:, 2] - corners[:, 0]
    area, shape = (sides / 2).prod(1), sides[:, 0] / sides[:, 1]
    whole = (sides > 2 - 1e-6).any(1)  # of a part that would be longer than the image the stretch is limited
    assert stats.kstest(area[~whole & (area < 0.7)].numpy(), stats.uniform(0.3, 0.4).cdf).pvalue > 1e-3
    assert 0.3 - 1e-6 <= area.min() < 0.31
    assert 3 / 4 - 1e-6 <= shape.min() < 0.77
    assert 4 / 3 + 1e-6 >= shape.max() > 1.3
    spare = 1 - (sides / 2)
    where = (corners[:, 0] + 1) / 2 / spare.clamp(min=1e-9)  # of the room there is, as a share
    assert stats.kstest(where[~whole].flatten().numpy(), "uniform").pvalue > 1e-3
    assert abs(shape.log().mean()) < 4 * shape.log().std() / len(shape) ** 0.5


@pytest.mark.parametrize("smallest", [0.08, 0.35, 0.9, 1.0])
def test_crops_keep_the_area_that_was_drawn(smallest):
    """Also where the stretch would make a side longer than the image's; where it does not, nothing limits it."""
    uniform = draws(4)
    sides = crops(uniform, smallest)[:, [0, 1], [0, 1]]
    area = smallest + (1 - smallest) * uniform[:, 0]
    assert sides.max() <= 1
    assert sides.prod(1).min() >= smallest - 1e-6
    torch.testing.assert_close(sides.prod(1), area, rtol=0, atol=1e-6)
    stretch = (4 / 3) ** (uniform[:, 1] - 0.5)
    free = torch.stack([area.sqrt() * stretch, area.sqrt() / stretch], 1)
    fits = (free <= 1).all(1)
    torch.testing.assert_close(sides[fits], free[fits], rtol=0, atol=1e-6)
    assert (sides[~fits] > 1 - 1e-6).any(1).all()


def test_a_crop_that_keeps_the_whole_area_changes_nothing():
    whole = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    matrices = crops(draws(4), 1.0)
    assert torch.equal(matrices, whole.expand_as(matrices))


def test_a_crop_is_what_torchvision_resizes():
    """The middle half of each side, enlarged to the whole: as cutting it out and resizing it, away from the border."""
    images = pictures(1, (16, 24))
    middle = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]])[None]
    expected = tv.resize(tv.crop(images, 4, 6, 8, 12), [16, 24], antialias=False)
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(warp(images, middle)[inside], expected[inside], rtol=0, atol=1e-5)


def test_places_are_those_of_torch():
    images, matrices = pictures(3, (16, 24)).double(), torch.randn(3, 2, 3, dtype=torch.float64)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    expected = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    torch.testing.assert_close(warp(images, matrices), expected)


def test_no_place_is_a_matrix_product():
    """Of whose factors a GPU keeps ten bits, where training allows that."""

    class NoProducts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not {"mm", "bmm", "addmm", "baddbmm", "affine_grid_generator"} & set(str(func).split("."))
            return func(*args, **(kwargs or {}))

    images, numbers = pictures(4, (16, 24)), of(torch.arange(4))
    with NoProducts():
        Augment(crop=0.5, policy=1.0, translate=0.1, flip=0.5, rotate=15, scale=0.1)(images, numbers)
    with pytest.raises(AssertionError), NoProducts():
        F.affine_grid(torch.randn(4, 2, 3), [4, 3, 16, 24], align_corners=False)


def test_composed_moves_are_one_after_the_other():
    first, second = torch.randn(2, 7, 2, 3)
    points = torch.rand(5, 2)
    expected = torch.stack([at(first[i : i + 1], at(second[i : i + 1], points)[0])[0] for i in range(7)])
    torch.testing.assert_close(at(compose(first, second), points), expected)


def test_crop_and_flip_are_both_done():
    images = pictures(50)
    cropped, both = view(Augment(crop=0.4), images), view(Augment(crop=0.4, flip=1), images)
    torch.testing.assert_close(both, cropped.flip(-1), rtol=0, atol=1e-4)


# The policy


def changed(name: str, images: torch.Tensor, strength: float) -> torch.Tensor:
    count = len(images)
    change, strengths = torch.full((count,), CHANGES.index(name)), torch.full((count,), strength)
    return change_levels(images, change, strengths, apart=False)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [-1.0, -0.4, 0.0, 0.3, 1.0])
def test_grey_levels_change_as_torchvisions(strength, channels):
    pixels = torch.randint(256, (3, channels, 9, 7), dtype=torch.uint8)
    bits = 8 - round(4 * abs(strength))
    for name, expected in {
        "brightness": tv.adjust_brightness(pixels.float() / 255, 1 + 0.9 * strength) * 255,
        "posterize": tv.posterize(pixels, bits),
        "solarize": tv.solarize(pixels, 255 * (1 - abs(strength))),
        "autocontrast": tv.autocontrast(pixels),
        "none": pixels,
        "identity": pixels,
        "rotate": pixels,
    }.items():
        found = changed(name, pixels.float(), strength)
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1.001 if name == "autocontrast" else 1e-3)


def test_contrast_colour_and_sharpness_end_where_they_should():
    images = pictures(2, (9, 7)) * 100 + 70
    grey, middle = images.mean(1, keepdim=True), images.mean((1, 2, 3), keepdim=True)
    for name, neutral in (("color", grey), ("contrast", middle)):
        for strength in (-1.0, 0.5):
            expected = (neutral + (images - neutral) * (1 + 0.9 * strength)).clamp(0, 255)
            torch.testing.assert_close(changed(name, images, strength), expected)
    step = torch.tensor([0.0, 0.0, 0.0, 90.0, 90.0, 90.0]).expand(1, 3, 6, 6) + 60
    softer, sharper = (changed("sharpness", step, strength).diff().abs().max() for strength in (-1.0, 1.0))
    assert softer < 90 < sharper


def test_every_image_has_its_own_change():
    """Whether all changes are computed for all images, or each for its own; and what is given is left as it is."""
    images, change = pictures(3 * len(CHANGES)) * 255, torch.arange(len(CHANGES)).repeat(3)
    strength, before = torch.linspace(-1, 1, len(change)), images.clone()
    whole = change_levels(images, change, strength, apart=False)
    for i in range(len(change)):
        part = slice(i, i + 1)
        assert torch.equal(change_levels(images[part], change[part], strength[part], apart=False), whole[part])
    torch.testing.assert_close(change_levels(images, change, strength, apart=True), whole)
    assert (whole != images).any((1, 2, 3)).sum() >= 18
    assert torch.equal(images, before)


@pytest.mark.parametrize("size", [(8, 8), (8, 16)])
def test_places_change_as_named(size):
    """In pixels, as an image of any shape is turned and slanted without being stretched."""
    height, width = size
    half = torch.tensor([width, height]) / 2
    point = torch.tensor([[2.0, 1.0]])  # pixels right of and below the middle
    for name, strength, expected in (
        ("shear_x", 1.0, [2 + 0.3 * 1, 1]),
        ("shear_y", -1.0, [2, 1 - 0.3 * 2]),
        ("translate_x", 1.0, [2 + 0.3 * width, 1]),
        ("translate_y", 0.5, [2, 1 + 0.15 * height]),
        ("rotate", 1.0, [2 * 3**0.5 / 2 - 1 / 2, 2 / 2 + 3**0.5 / 2]),
        ("solarize", 1.0, [2, 1]),
    ):
        matrices = change_places(torch.tensor([CHANGES.index(name)]), torch.tensor([strength]), height, width)
        torch.testing.assert_close(at(matrices, point / half)[0] * half, torch.tensor([expected]).float())


def test_changes_come_equally_often():
    change, strength = Augment(policy=0.6).changes(draws(24))
    counts = change.bincount(minlength=len(CHANGES))
    assert stats.binomtest(int(counts[1:].sum()), len(change), 0.6).pvalue > 1e-3
    assert stats.chisquare(counts[1:].numpy()).pvalue > 1e-3
    assert stats.kstest(strength.numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert Augment().changes(draws(24))[0].max() == 0


@pytest.mark.parametrize("size", SIZES)
def test_grey_levels_do_not_depend_on_the_batch(size):
    images, order = pictures(60, size) * 255, torch.randperm(60)
    augment = Augment(policy=1)
    whole = augment.pixels(images, of(torch.arange(60)))
    torch.testing.assert_close(augment.pixels(images[order], of(order)), whole[order])
    assert (augment.pixels(images, of(torch.arange(60), epoch=3)) != whole).any()
    assert whole.min() >= 0
    assert whole.max() <= 255
    assert Augment().pixels(images, of(order)) is images


# Mixing


def mixed(augment: Augment, images: torch.Tensor, labels: torch.Tensor, epoch: int = 0, classes: int = 5):
    return augment.mix(images, labels, of(torch.arange(len(images)), epoch=epoch), classes=classes)


def test_labels_say_how_much_of_each_image_is_there():
    """Of images of one colour each, the shares of the two colours are those of the two labels."""
    count = 400
    labels = torch.arange(count) % 5
    images = torch.arange(count).float()[:, None, None, None].expand(-1, 3, 32, 48)
    for augment in (Augment(mixup=1), Augment(cutmix=1), Augment(mixup=0.3, cutmix=0.4)):
        found, shares = mixed(augment, images, labels)
        other = images.roll(1, 0)[:, 0, 0, 0]
        own = 1 - (found.mean((1, 2, 3)) - images[:, 0, 0, 0]) / (other - images[:, 0, 0, 0])
        torch.testing.assert_close(shares.sum(1), torch.ones(count))
        torch.testing.assert_close(shares.gather(1, labels[:, None])[:, 0], own, rtol=0, atol=2e-3)
        torch.testing.assert_close(shares.gather(1, labels.roll(1)[:, None])[:, 0], 1 - own, rtol=0, atol=2e-3)


def test_mixup_blends_whole_images_in_any_proportion():
    images, labels = pictures(500), torch.arange(500) % 5
    found, shares = mixed(Augment(mixup=1), images, labels)
    own = shares.gather(1, labels[:, None])[:, 0]
    assert stats.kstest(own.numpy(), "uniform").pvalue > 1e-3  # Beta(1, 1)
    weight = own[:, None, None, None]
    torch.testing.assert_close(found, weight * images + (1 - weight) * images.roll(1, 0), rtol=0, atol=1e-5)


def test_cutmix_pastes_a_rectangle():
    images, labels = pictures(300, (12, 16)), torch.arange(300) % 5
    found, _ = mixed(Augment(cutmix=1), images, labels)
    pasted = (found != images).any(1)
    assert torch.equal(found, torch.where(pasted[:, None], images.roll(1, 0), images))
    assert torch.equal(pasted, pasted.any(2)[:, :, None] & pasted.any(1)[:, None, :])
    assert 0.1 < pasted.float().mean() < 0.5
    assert pasted.float().mean(0).min() > 0.05  # everywhere


def test_probability_of_mixing():
    images, labels = pictures(2000, (4, 4)), torch.zeros(2000, dtype=torch.int64)
    labels[::2] = 1  # neighbours differ
    for augment, share in (
        (Augment(mixup=0.3), 0.3),
        (Augment(cutmix=0.2), 0.2),
        (Augment(mixup=0.3, cutmix=0.2), 0.5),
    ):
        changes = (mixed(augment, images, labels)[0] != images).any((1, 2, 3)).sum()
        assert abs(changes / 2000 - share) < 0.05


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"mix_until": 46}, r"mix_until must be in \[0, 1\], got 46"),
        ({"flip": -0.1}, r"flip must be in \[0, 1\], got -0.1"),
        ({"scale": 1.0}, r"scale must be in \[0, 1\), got 1.0"),
        ({"rotate": 200}, r"rotate must be in \[0, 180\], got 200"),
        ({"erase": math.nan}, "got nan"),
        ({"mixup": 0.6, "cutmix": 0.5}, "mixup 0.6 and cutmix 0.5 are more than 1"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Augment(**wrong)


def test_mixing_ends_where_it_should_and_is_repeatable():
    images, labels = pictures(40), torch.arange(40) % 5
    augment = Augment(mixup=1, mix_until=0.6)
    assert (mixed(augment, images, labels, epoch=2)[0] != images).any()
    assert torch.equal(mixed(augment, images, labels, epoch=2)[0], mixed(augment, images, labels, epoch=2)[0])
    assert [augment.mixes(epoch / 5) for epoch in range(5)] == [True, True, True, False, False]
    assert Augment(cutmix=0.1).mixes(0.999)
    assert not Augment().mixes(0)


def test_sharpness_invents_no_edge_at_the_border():
    plain = torch.full((2, 3, 5, 7), 100.0)
    found = LEVELS["sharpness"](plain, torch.tensor([-0.9, 0.9]).view(2, 1, 1, 1))
    torch.testing.assert_close(found, plain)
