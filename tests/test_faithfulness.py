"""Curves and areas of a model whose answer is known, and of orders that are right, wrong and random."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vit.faithfulness import area, blank, deletion_curve, faithfulness, removal_masks
from vit.model import VisionTransformer

ROWS, COLUMNS, PATCH = 2, 3, 4


class Sum:
    """The logit of class 1 is the weighted sum of the patches' brightness, that of class 0 is zero."""

    def __init__(self, weights: Tensor):
        self.weights, self.calls, self.largest = weights, 0, 0

    def __call__(self, images: Tensor) -> Tensor:
        self.calls, self.largest = self.calls + 1, max(self.largest, len(images))
        patches = images.mean(1).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).mean((-1, -2))
        logit = (patches * self.weights).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(logit), logit], 1)


def balanced(batch: int) -> Tensor:
    """Images of patches worth 1 on one row and -1 on the other, so that their mean colour is worth nothing."""
    signs = torch.tensor([[1.0], [-1.0]]).repeat(1, COLUMNS)
    return signs.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1).expand(batch, 3, -1, -1).clone()


def test_deletion_of_a_sum_has_a_closed_form():
    weights = torch.tensor([[3.0, 0.5, 2.0], [-1.0, -0.25, -4.0]])  # every patch speaks for class 1: sign x weight
    worth = weights.abs()
    curve = deletion_curve(Sum(weights), balanced(2), worth.expand(2, -1, -1), target=torch.tensor([1, 0]), steps=6)
    left = worth.flatten().sort(descending=True).values.flip(0).cumsum(0).flip(0)  # sum of those not yet removed
    expected = torch.sigmoid(torch.cat([left, torch.zeros(1)]))
    torch.testing.assert_close(curve, torch.stack([expected, 1 - expected]))


def test_areas_of_a_sum():
    weights = torch.tensor([[3.0, 0.5, 2.0], [-1.0, -0.25, -4.0]])
    worth = weights.abs().expand(3, -1, -1)
    true = faithfulness(Sum(weights), balanced(3), worth, steps=6)
    false = faithfulness(Sum(weights), balanced(3), 1 / worth, steps=6)
    rising = torch.sigmoid(torch.tensor([0, 4.0, 7.0, 9.0, 10.0, 10.5, 10.75]))  # patches added, the worthiest first
    falling = torch.sigmoid(10.75 - torch.tensor([0, 4.0, 7.0, 9.0, 10.0, 10.5, 10.75]))
    torch.testing.assert_close(true["insertion"], torch.trapezoid(rising, dx=1 / 6).expand(3))
    torch.testing.assert_close(true["deletion"], torch.trapezoid(falling, dx=1 / 6).expand(3))
    torch.testing.assert_close(true["score"], true["insertion"] - true["deletion"])
    torch.testing.assert_close(false["score"], -true["score"])
    assert (true["deletion"] < true["random"]).all()
    assert (true["random"] < true["insertion"]).all()


def test_insertion_is_what_it_says():
    """Adding patches to a blank image, written out, gives the area that is read off the other curve."""
    torch.manual_seed(3)
    model = VisionTransformer(
        image_size=(8, 12), patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    images, maps, target = torch.randn(1, 3, 8, 12), torch.rand(1, 2, 3), torch.tensor([1])
    shown = images.mean((2, 3), keepdim=True).expand_as(images).clone()
    curve = [model(shown).softmax(1)[0, 1].item()]
    for index in maps.flatten().argsort(descending=True).tolist():
        cell = (..., *(slice(4 * i, 4 * i + 4) for i in divmod(index, 3)))
        shown[cell] = images[cell]
        curve.append(model(shown).softmax(1)[0, 1].item())
    expected = sum((a + b) / 2 for a, b in pairwise(curve)) / 6
    result = faithfulness(model, images, maps, target=target, steps=6)
    assert result["insertion"].item() == pytest.approx(expected, abs=1e-5)


def test_random_order_knows_nothing():
    weights = torch.randn(ROWS, COLUMNS)
    images = torch.randn(400, 3, ROWS * PATCH, COLUMNS * PATCH)
    generator = torch.Generator().manual_seed(0)
    target = torch.ones(400, dtype=torch.long)
    noise = torch.rand(400, ROWS, COLUMNS, generator=generator)
    result = faithfulness(Sum(weights), images, noise, target=target, generator=generator)
    error = result["score"].std() / 20
    assert result["score"].mean().abs() < 4 * error


def test_random_order_repeats_with_its_generator():
    images, maps = torch.randn(3, 3, 8, 12), torch.rand(3, ROWS, COLUMNS)
    model = Sum(torch.randn(ROWS, COLUMNS))
    a, b, c = (
        faithfulness(model, images, maps, generator=torch.Generator().manual_seed(s))["random"] for s in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_batches_change_nothing_and_are_kept_to():
    images, maps = torch.randn(5, 3, 8, 12), torch.rand(5, ROWS, COLUMNS)
    weights = torch.randn(ROWS, COLUMNS)
    whole = deletion_curve(Sum(weights), images, maps, steps=4)
    model = Sum(weights)
    torch.testing.assert_close(deletion_curve(model, images, maps, steps=4, batch_size=3), whole)
    assert model.largest == 3
    assert model.calls == 2 + 9  # predictions of 5 images, then 25 cases, by threes


@pytest.mark.parametrize(
    ("steps", "counts"),
    [(6, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 2, 4, 6]), (4, [0, 2, 3, 4, 6]), (99, [0, 1, 2, 3, 4, 5, 6])],
)
def test_masks_grow_from_nothing_to_everything(steps, counts):
    maps = torch.rand(4, ROWS, COLUMNS)
    masks = removal_masks(maps, steps)
    assert masks.sum((2, 3)).tolist() == [counts] * 4
    assert (masks[:, 1:] >= masks[:, :-1]).all()
    first = masks[:, 1].flatten(1).float() * maps.flatten(1)
    assert torch.equal(first.amax(1), maps.flatten(1).amax(1))


@pytest.mark.parametrize("remove", ["mean", "blur"])
def test_ends_are_the_image_and_the_blank(remove):
    seen = []

    def model(images: Tensor) -> Tensor:
        seen.append(images.clone())
        return torch.zeros(len(images), 2)

    images = torch.randn(1, 3, 8, 12)
    deletion_curve(model, images, torch.rand(1, ROWS, 2 * COLUMNS), target=torch.tensor([0]), remove=remove)
    assert torch.equal(seen[0][0], images[0])
    torch.testing.assert_close(seen[0][-1], blank(images, remove, (PATCH, PATCH // 2))[0])  # patches need not be square
    mixed = (seen[0] == images) | (seen[0] == seen[0][-1])
    assert mixed.all()  # every pixel is of one or of the other


def test_blur_keeps_the_mean_and_loses_the_patch():
    images = torch.randn(2, 3, 32, 48)
    blurred = blank(images, "blur", (4, 4))
    assert blurred.std() < 0.15 * images.std()
    flat = torch.full((1, 3, 32, 48), 0.7)
    torch.testing.assert_close(blank(flat, "blur", (4, 4)), flat)
    assert blank(torch.randn(1, 3, 8, 8), "blur", (8, 8)).shape == (1, 3, 8, 8)  # a patch as large as the image
    given = Sum(torch.randn(ROWS, COLUMNS)), torch.randn(2, 3, 8, 12), torch.rand(2, ROWS, COLUMNS)
    scores = {remove: faithfulness(*given, remove=remove)["deletion"] for remove in ("mean", "blur")}
    torch.testing.assert_close(scores["blur"], area(deletion_curve(*given, remove="blur")))
    assert not torch.allclose(scores["blur"], scores["mean"])
    for size in ((1, 3, 32, 1), (1, 3, 1, 32)):  # as far along each side as the patch is long there
        images = torch.randn(size).expand(-1, -1, 32, 32)
        assert (blank(images, "blur", (8, 1)).std() < 0.3 * images.std()) == (size[2] > 1)


def test_area_of_a_line():
    torch.testing.assert_close(area(torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])), torch.tensor([0.5, 1.0]))


def test_maps_and_classes_of_any_kind():
    """Of whole numbers and truths, one class for all, and no images."""
    weights = torch.tensor([[3.0, 0.5, 2.0], [-1.0, -0.25, -4.0]])
    maps = (10 * weights.abs()).round().expand(2, -1, -1)
    expected = faithfulness(Sum(weights), balanced(2), maps, target=torch.tensor([1, 1]))["score"]
    for given in (maps.to(torch.uint8), maps.long()):
        assert torch.equal(faithfulness(Sum(weights), balanced(2), given, target=1)["score"], expected)
    assert faithfulness(Sum(weights), balanced(2), maps > 10, target=[1, 1])["score"].shape == (2,)
    assert faithfulness(Sum(weights), balanced(2)[:0], maps[:0])["score"].shape == (0,)


def test_refusals():
    images, maps = torch.randn(1, 3, 8, 12), torch.rand(1, ROWS, COLUMNS)
    with pytest.raises(ValueError, match="8 x 12 pixels cannot be cut into 3 x 3"):
        deletion_curve(Sum(torch.ones(ROWS, COLUMNS)), images, torch.rand(1, 3, 3))
    with pytest.raises(ValueError, match="remove 'black' is not one of mean, blur"):
        deletion_curve(Sum(torch.ones(ROWS, COLUMNS)), images, maps, remove="black")  # pyright: ignore
    for wrong in (maps * torch.nan, maps.expand(2, -1, -1), maps[0]):
        with pytest.raises(ValueError, match=r"1 images need maps of finite numbers \(1, rows, columns\), got "):
            faithfulness(Sum(torch.ones(ROWS, COLUMNS)), images, wrong)
    assert deletion_curve(Sum(torch.ones(ROWS, COLUMNS)), images, maps, steps=1, batch_size=1).shape == (1, 2)
    for steps, size in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"steps and batch_size must be at least 1, got {steps} and {size}"):
            faithfulness(Sum(torch.ones(ROWS, COLUMNS)), images, maps, steps=steps, batch_size=size)
