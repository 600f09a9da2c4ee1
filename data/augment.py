"""Random views of a training batch, drawn for each image, on the device, and the same again when a run is repeated.

Every draw is a pure function of (seed, epoch, image), not of a generator's state: it does not depend on the number of
workers, ranks or micro-batches, and a resumed run sees the images that the uninterrupted run would have seen.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How much a training image may be changed; 0 switches a part off.

    Args:
        translate: Largest shift along each side, as a share of it in [0, 1); in whole pixels. 0.125 is the usual
            4-pixel crop of CIFAR.
        flip: Probability of a left-right mirror image, in [0, 1].
        rotate: Largest turn either way, in degrees.
        scale: Largest zoom either way, as a share in [0, 1); 0.1 means 0.9 to 1.1. Half of the images are neither
            turned nor zoomed, as both blur a little and the model shall see sharp images too.
        color: Largest change of brightness (in standard deviations), contrast and saturation (as shares), in [0, 1).
        erase: Probability that a square of up to half the side is blanked, in [0, 1] (1708.04552).
    """

    translate: float = 0.0
    flip: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    color: float = 0.0
    erase: float = 0.0

    def __call__(self, images: Tensor, *, seed: int, epoch: int, indices: Tensor) -> Tensor:
        """Augmented copies of normalised images (B, C, H, W), which are images ``indices`` (B,) of the data set."""
        draws = uniform(seed=seed, epoch=epoch, indices=indices, count=13)
        if self.translate or self.flip or self.rotate or self.scale:
            turned = torch.where(draws[:, 5:6] < 0.5, 0.5, draws[:, 1:3])  # 0.5: not at all
            where = torch.cat([draws[:, :1], turned, draws[:, 3:5]], 1)
            images = warp(images, self.matrices(where, images.shape[2], images.shape[3]))
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
    """Resample images (B, C, H, W) by affine maps (B, 2, 3); what lies outside is mirrored in."""
    grid = F.affine_grid(matrices.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def recolor(images: Tensor, changes: Tensor) -> Tensor:
    """Images (B, C, H, W) with brightness, contrast and saturation changed by (B, 3); 0 changes nothing."""
    brightness, contrast, saturation = changes.to(images.dtype).T[..., None, None, None]  # (B, 1, 1, 1) each
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (1 + saturation)
    middle = images.mean((1, 2, 3), keepdim=True)
    return middle + (images - middle) * (1 + contrast) + brightness


def erase(images: Tensor, draws: Tensor, probability: float) -> Tensor:
    """Images (B, C, H, W), some with a square of up to half their side at the mean, 0, from uniform draws (B, 4)."""
    height, width = images.shape[2:]
    half = draws[:, 1] / 4 * (draws[:, 0] < probability)  # of the square's side, as a share of the image's
    inside = []
    for draw, size in ((draws[:, 2], height), (draws[:, 3], width)):
        centres = (torch.arange(size, device=images.device) + 0.5) / size
        inside.append((centres - draw[:, None]).abs() < half[:, None])  # (B, size)
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def uniform(*, seed: int, epoch: int, indices: Tensor, count: int) -> Tensor:
    """Numbers (B, count) in [0, 1) that depend on nothing but the arguments.

    A counter-based generator (the mixing function of splitmix64, Steele et al. 2014): no state to save and restore.

    Args:
        seed: Seed of the run.
        epoch: Passes over the data set before this one.
        indices: Which images, int64 (B,).
        count: Numbers for each image.
    """
    key = _mix(_mix(torch.tensor(seed, device=indices.device)) ^ epoch)
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
