"""Draws that are random yet functions of (seed, epoch, image), and images moved exactly as they say."""

import numpy as np
import pytest
import torch
from scipy import stats

from data.augment import Augment, _mix, erase, recolor, uniform, warp

EVERYTHING = Augment(translate=0.125, flip=0.5, rotate=15, scale=0.1, color=0.3, erase=0.5)
SIZES = [(8, 8), (12, 8), (7, 10)]


def draws(count: int = 1, images: int = 20_000, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    return uniform(seed=seed, epoch=epoch, indices=torch.arange(images), count=count)


def pictures(count: int, size: tuple[int, int] = (8, 8), channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(0))


def view(augment: Augment, images: torch.Tensor, indices=None, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    return augment(images, seed=seed, epoch=epoch, indices=torch.arange(len(images)) if indices is None else indices)


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
    assert torch.equal(uniform(seed=3, epoch=4, indices=order, count=5), draws(5, images=500, seed=3, epoch=4)[order])


def test_first_draws_do_not_depend_on_their_number():
    assert torch.equal(draws(5)[:, :2], draws(2))


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
