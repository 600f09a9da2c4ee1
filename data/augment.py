"""Random views of a training batch, drawn for each image, on the device, and the same again when a run is repeated.

Every draw is a pure function of (seed, epoch, image), not of a generator's state: it does not depend on the number of
workers, ranks or micro-batches, and a resumed run sees the images that the uninterrupted run would have seen.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

# Random numbers for each image: 0-4 moves, 5 whether, 6-8 colours, 9-12 hole, 13-16 crop, 17-19 policy, 20-23 mix.
DRAWS = 24
CHANGES = (  # of which the policy draws one; the first is not drawn but stands for an image that gets none
    *("none", "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness", "posterize", "solarize", "autocontrast"),
)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How much a training image may be changed; 0 switches a part off.

    Args:
        translate: Largest shift along each side, as a share of it in [0, 1); in whole pixels. 0.125 is the usual
            4-pixel crop of CIFAR.
        flip: Probability of a left-right mirror image, in [0, 1].
        rotate: Largest turn either way, in degrees, in [0, 180].
        scale: Largest zoom either way, as a share in [0, 1); 0.1 means 0.9 to 1.1. Half of the images are neither
            turned nor zoomed, as both blur a little and the model shall see sharp images too.
        color: Largest change of brightness (in standard deviations), contrast and saturation (as shares), in [0, 1).
        erase: Probability that a square of up to half the side is blanked, in [0, 1] (arXiv:1708.04552).
        crop: Smallest part that a random crop keeps, as a share of the area in (0, 1]; its sides are stretched by up to
            4/3 against each other, as far as they fit, and it is resized to the whole image (arXiv:1409.4842). 0.35 and
            above suit small sets; 0: no crop.
        policy: Probability of one change more, of random kind (shear, turn, colour, sharpness ...) and strength, in
            [0, 1] (TrivialAugment, arXiv:2103.10158, without equalize).
        mixup: Probability that an image is blended with another, in any proportion, and so its label, in [0, 1]
            (arXiv:1710.09412).
        cutmix: Probability that a rectangle of any size comes from another image, in [0, 1] (arXiv:1905.04899); with
            mixup at most 1.
        mix_until: Share of the run's epochs, in [0, 1], after which images are neither blended nor pasted, so that the
            last ones are clean.

    Raises:
        ValueError: If a number is out of its range.
    """

    translate: float = 0.0
    flip: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    color: float = 0.0
    erase: float = 0.0
    crop: float = 0.0
    policy: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_until: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            top = 180 if name == "rotate" else 1
            closed = name not in ("translate", "scale", "color")  # a shift or a zoom by 1 would leave no image
            if not 0 <= value <= top or (value == top and not closed):
                raise ValueError(f"data.augment.{name} must be in [0, {top}{']' if closed else ')'}, got {value}")
        if self.mixup + self.cutmix > 1:
            raise ValueError(f"data.augment: mixup {self.mixup} and cutmix {self.cutmix} are more than 1 together")

    def pixels(self, images: Tensor, draws: Tensor) -> Tensor:
        """Images (B, C, H, W) of 0 to 255 with those changes that are about grey levels; before they are normalised."""
        apart = images.device.type == "cpu" and not torch.compiler.is_compiling()
        return change_levels(images.float(), *self.changes(draws), apart=apart) if self.policy else images

    def changes(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Number of each image's change in ``CHANGES`` (B,) and its strength in [-1, 1) (B,); 0 is none."""
        change = 1 + (draws[:, 18] * (len(CHANGES) - 1)).long()
        return torch.where(draws[:, 17] < self.policy, change, 0), 2 * draws[:, 19] - 1

    def mixes(self, done: float) -> bool:
        """Whether images are mixed in an epoch before which this share of the run was done."""
        return bool(self.mixup or self.cutmix) and done < self.mix_until

    def mix(self, images: Tensor, labels: Tensor, draws: Tensor, *, classes: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), some mixed with the one before them in the batch, and labels that say so.

        Args:
            images: Normalised images (B, C, H, W).
            labels: Class numbers, int64 (B,).
            draws: ``uniform`` numbers of these images (B, DRAWS).
            classes: Number of classes.

        Returns:
            The images, and shares of the classes (B, classes) that add up to 1.
        """
        which, share, y, x = draws[:, 20:].T
        blend = torch.where(which < self.mixup, share, 1)
        inside = (which >= self.mixup) & (which < self.mixup + self.cutmix)
        side = (1 - share).sqrt() * inside  # of the rectangle, as a share of the image's; cut off at its borders
        mask = rectangles(y, x, side / 2, images.shape[2:])
        own = blend - mask.float().mean((1, 2))  # one of the two is at rest
        shares = F.one_hot(labels, classes)
        shares = shares * own[:, None] + shares.roll(1, 0) * (1 - own[:, None])
        others = images.roll(1, 0)
        blend = blend.to(images.dtype)[:, None, None, None]
        return torch.where(mask[:, None], others, blend * images + (1 - blend) * others), shares

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augmented copies of normalised images (B, C, H, W), from ``uniform`` numbers of these (B, DRAWS)."""
        height, width = images.shape[2:]
        moves = []  # what is written first acts on the image first
        if self.crop:
            moves.append(crops(draws[:, 13:17], self.crop))
        if self.policy:
            moves.append(change_places(*self.changes(draws), height, width))
        if self.translate or self.flip or self.rotate or self.scale:
            turned = torch.where(draws[:, 5:6] < 0.5, 0.5, draws[:, 1:3])  # 0.5: not at all
            moves.append(self.matrices(torch.cat([draws[:, :1], turned, draws[:, 3:5]], 1), height, width))
        if moves:
            images = warp(images, reduce(compose, moves))  # one resampling, however many moves
        if self.color:
            images = recolor(images, (2 * draws[:, 6:9] - 1) * self.color)
        if self.erase:
            images = erase(images, draws[:, 9:13], self.erase)
        return images

    def matrices(self, draws: Tensor, height: int, width: int) -> Tensor:
        """Affine maps (B, 2, 3) from output to input coordinates in [-1, 1], from uniform draws (B, 5)."""
        flip = torch.where(draws[:, 0] < self.flip, -1.0, 1.0)
        angle = (2 * draws[:, 1] - 1) * math.radians(self.rotate)
        zoom = 1 / (1 + (2 * draws[:, 2] - 1) * self.scale)
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        shifts = []
        for draw, size in ((draws[:, 3], width), (draws[:, 4], height)):
            reach = int(self.translate * size + 0.5)  # whole pixels: interpolating would blur the training images
            shifts.append(((draw * (2 * reach + 1)).floor() - reach) * (2 / size))
        rows = (
            torch.stack([flip * cos, -sin * height / width, shifts[0]], 1),
            torch.stack([flip * sin * width / height, cos, shifts[1]], 1),
        )
        return torch.stack(rows, 1)


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample images (B, C, H, W) by affine maps (B, 2, 3); what lies outside is mirrored in.

    No matrix products, of which a GPU may round the factors to ten bits (TF32): whole pixels would be none.
    """
    rows, columns = (
        (2 * torch.arange(size, dtype=images.dtype, device=images.device) + 1) / size - 1 for size in images.shape[2:]
    )
    of_column, of_row, shift = matrices.to(images.dtype)[:, None, None].unbind(-1)  # (B, 1, 1, 2) each
    grid = of_column * columns[:, None] + (of_row * rows[:, None, None] + shift)  # (B, H, W, 2): column and row
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """One affine map (B, 2, 3) for two, from output to input coordinates: ``first`` acts on the image first."""
    linear, shift = first[:, :, :2], first[:, :, 2:]
    return (linear[..., None] * second[:, None]).sum(2) + F.pad(shift, (2, 0))


def crops(draws: Tensor, smallest: float) -> Tensor:
    """Affine maps (B, 2, 3) that enlarge a part of at least this share of the area, from uniform draws (B, 4)."""
    area = smallest + (1 - smallest) * draws[:, 0]
    side = area.sqrt()
    stretch = ((2 * draws[:, 1] - 1) * (math.log(4 / 3) / 2)).exp()  # square root of width / height
    stretch = stretch.clamp(side, 1 / side)  # no side is longer than the image's, and the area stays what was drawn
    sides = torch.stack([side * stretch, side / stretch], 1).clamp(max=1)  # of width and height; max: rounding
    shifts = (2 * draws[:, 2:4] - 1) * (1 - sides)
    return torch.cat([torch.diag_embed(sides), shifts[:, :, None]], 2)


def change_places(change: Tensor, strength: Tensor, height: int, width: int) -> Tensor:
    """Affine maps (B, 2, 3) of those ``CHANGES`` that move pixels; of the others they do nothing.

    Args:
        change: Number in ``CHANGES`` (B,).
        strength: In [-1, 1] (B,).
        height: Of the images, in pixels.
        width: Of the images, in pixels.
    """

    def amount(name: str, largest: float) -> Tensor:
        return torch.where(change == CHANGES.index(name), strength * largest, 0)

    angle = amount("rotate", math.radians(30))
    cos, sin = angle.cos(), angle.sin()
    rows = (
        torch.stack([cos, (amount("shear_x", 0.3) - sin) * (height / width), amount("translate_x", 0.6)], 1),
        torch.stack([(amount("shear_y", 0.3) + sin) * (width / height), cos, amount("translate_y", 0.6)], 1),
    )
    return torch.stack(rows, 1)  # 0.6 of the coordinates' -1 to 1 is 0.3 of a side


def change_levels(images: Tensor, change: Tensor, strength: Tensor, *, apart: bool) -> Tensor:
    """Images (B, C, H, W) of 0 to 255 after those ``CHANGES`` that are about grey levels; others leave them alone.

    Args:
        images: Images.
        change: Number in ``CHANGES`` (B,).
        strength: In [-1, 1] (B,).
        apart: Compute a change for its images alone: a tenth of the arithmetic, but each count of them is waited for,
            which on a GPU would cost more.
    """
    strength = strength[:, None, None, None]
    changed = images.clone()
    for name, function in LEVELS.items():
        drawn = change == CHANGES.index(name)
        if apart:
            where = drawn.nonzero()[:, 0]
            changed[where] = function(images[where], strength[where])
        else:
            changed = torch.where(drawn[:, None, None, None], function(images, strength), changed)
    return changed.clamp(0, 255)


def _away_from(neutral: Callable[[Tensor], Tensor | float]) -> Callable[[Tensor, Tensor], Tensor]:
    """A change that goes to what is neutral, or away from it, by a factor of 0.1 to 1.9, as in the paper."""

    def function(images: Tensor, strength: Tensor) -> Tensor:
        middle = neutral(images)
        return middle + (images - middle) * (1 + 0.9 * strength)

    return function


def _smooth(images: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)


def _posterize(images: Tensor, strength: Tensor) -> Tensor:
    step = 2 ** (4 * strength.abs()).round()  # 8 to 4 bits are left
    return (images / step).floor() * step


def _solarize(images: Tensor, strength: Tensor) -> Tensor:
    return torch.where(images >= 255 * (1 - strength.abs()), 255 - images, images)


def _autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) * (255 / (high - low)), images)


LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": _away_from(lambda images: 0.0),
    "color": _away_from(lambda images: images.mean(1, keepdim=True)),
    "contrast": _away_from(lambda images: images.mean((1, 2, 3), keepdim=True)),
    "sharpness": _away_from(_smooth),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
}


def recolor(images: Tensor, changes: Tensor) -> Tensor:
    """Images (B, C, H, W) with brightness, contrast and saturation changed by (B, 3); 0 changes nothing."""
    brightness, contrast, saturation = changes.to(images.dtype).T[..., None, None, None]  # (B, 1, 1, 1) each
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (1 + saturation)
    middle = images.mean((1, 2, 3), keepdim=True)
    return middle + (images - middle) * (1 + contrast) + brightness


def erase(images: Tensor, draws: Tensor, probability: float) -> Tensor:
    """Images (B, C, H, W), some with a square of up to half their side at the mean, 0, from uniform draws (B, 4)."""
    half = draws[:, 1] / 4 * (draws[:, 0] < probability)  # of the square's side, as a share of the image's
    return images.masked_fill(rectangles(draws[:, 2], draws[:, 3], half, images.shape[2:])[:, None], 0)


def rectangles(y: Tensor, x: Tensor, half: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (B, H, W) of rectangles in the proportions of the image, cut off at its borders.

    Args:
        y: Centre, as a share of the height (B,).
        x: Centre, as a share of the width (B,).
        half: Half of the sides, as a share of the image's (B,).
        size: Height and width in pixels.
    """
    inside = []
    for centre, side in ((y, size[0]), (x, size[1])):
        places = (torch.arange(side, device=half.device) + 0.5) / side
        inside.append((places - centre[:, None]).abs() < half[:, None])  # (B, side)
    return inside[0][:, :, None] & inside[1][:, None, :]


def epoch_key(seed: int, epoch: int) -> Tensor:
    """The number () of a run's epoch that ``uniform`` starts from, on the host.

    Args:
        seed: Seed of the run.
        epoch: Passes over the data set before this one.
    """
    return _mix(_mix(torch.tensor(seed)) ^ epoch)


def uniform(key: Tensor, indices: Tensor, count: int) -> Tensor:
    """Numbers (B, count) in [0, 1) that depend on nothing but the arguments.

    A counter-based generator (the mixing function of splitmix64, Steele et al. 2014): no state to save and restore.

    Args:
        key: Of the run and the epoch.
        indices: Which images, int64 (B,).
        count: Numbers for each image.
    """
    columns = torch.arange(count, device=indices.device)
    bits = _mix(_mix(key ^ indices)[:, None] ^ columns)
    return (bits >> 40 & 0xFFFFFF).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, which wraps around as the unsigned arithmetic of the paper does."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)  # >> copies the sign of an int64; the paper's shift brings in zeros


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
