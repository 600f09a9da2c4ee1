"""Is a map true? Take patches away, most relevant first, and watch the probability of the class (deletion).

A true map makes it fall fast, and makes it rise fast when patches are added to a blank image (insertion). The numbers
mean something only beside other orders, so least-relevant-first and random order always come with them. Adding the most
relevant patches first shows the same images as taking the least relevant away first, read backwards: three curves say
it all. Probabilities are those of the logits as they are: a checkpoint's temperature is not in them. One image's score
is rough (random maps of CIFAR-10 scatter by 0.15 to 0.17); means over many are not. Source: Petsiuk et al. 2018
(1806.07421).
Shapes in comments: B images, P patches, S steps.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

REMOVALS = ("mean", "blur")
Removal = Literal["mean", "blur"]


def faithfulness(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    *,
    target: Tensor | Sequence[int] | int | None = None,
    remove: Removal = "mean",
    steps: int = 16,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """How far each map can be trusted, as areas under the class probability, (B,) each.

    ``deletion`` (lower is better), ``insertion`` (higher is better), ``random`` (either of them in random order) and
    ``score``, insertion less deletion: 0 for a map that knows nothing, negative for one that is wrong.

    Args:
        model: Logits (B, classes) of images, such as a VisionTransformer in eval mode.
        images: Normalised images (B, C, H, W).
        maps: Weight of each patch (B, grid height, grid width); the grid divides H and W.
        target: Class of each image (B,), or one for all; none for the predicted one.
        remove: What takes a patch's place: ``mean`` colour of the image, or a ``blur`` of it.
        steps: Steps from the whole image to none of it; at most the number of patches.
        batch_size: Images a forward pass.
        generator: Of the random order; none for torch's own.

    Raises:
        ValueError: As ``deletion_curve``.
    """
    maps = maps.float()  # so that the lowest values can go first
    arguments = {"target": target, "remove": remove, "steps": steps, "batch_size": batch_size}
    most = deletion_curve(model, images, maps, **arguments)
    least = deletion_curve(model, images, -maps, **arguments)
    noise = torch.rand(maps.shape, generator=generator, device=generator.device if generator else None)
    random = deletion_curve(model, images, noise.to(maps.device), **arguments)
    areas = {"deletion": area(most), "insertion": area(least), "random": area(random)}
    return {**areas, "score": areas["insertion"] - areas["deletion"]}


def deletion_curve(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    *,
    target: Tensor | Sequence[int] | int | None = None,
    remove: Removal = "mean",
    steps: int = 16,
    batch_size: int = 256,
) -> Tensor:
    """Probability of the class as patches go, highest value first: (B, S + 1), from the whole image to none of it.

    Args are those of ``faithfulness``.

    Raises:
        ValueError: If the maps are not one of finite numbers for each image, their grid does not divide the images, the
            way to remove patches is unknown, or a number is below 1.
    """
    if maps.ndim != 3 or len(maps) != len(images) or not maps.isfinite().all():
        raise ValueError(
            f"{len(images)} images need maps of finite numbers ({len(images)}, rows, columns), got {tuple(maps.shape)}"
        )
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    height, width = images.shape[-2:]
    rows, columns = maps.shape[1:]
    if height % rows or width % columns:
        raise ValueError(f"images of {height} x {width} pixels cannot be cut into {rows} x {columns} patches")
    patch = height // rows, width // columns
    removed, blanks = removal_masks(maps, steps), blank(images, remove, patch)  # (B, S + 1, rows, columns)
    cases = removed.shape[1]
    curve = [torch.empty(0, device=images.device)]
    with torch.inference_mode():
        if target is None:
            target = torch.cat([model(part).argmax(1) for part in images.split(batch_size)])
        target = torch.as_tensor(target, device=images.device).expand(len(images))
        for part in torch.arange(len(images) * cases, device=images.device).split(batch_size):
            image, step = part // cases, part % cases
            mask = removed[image, step].repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)[:, None]
            logits = model(torch.where(mask, blanks[image], images[image]))
            curve.append(logits.float().softmax(1).gather(1, target[image, None])[:, 0])
    return torch.cat(curve).view(len(images), cases)


def removal_masks(maps: Tensor, steps: int) -> Tensor:
    """Which patches are gone after each step, (B, S + 1, grid height, grid width); ties go in reading order.

    Args:
        maps: Weight of each patch (B, grid height, grid width); the highest goes first.
        steps: Steps from none to all; at most the number of patches.
    """
    patches = maps.shape[1] * maps.shape[2]
    rank = maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (B, P), 0 goes first
    counts = torch.linspace(0, patches, min(steps, patches) + 1, device=maps.device).round()
    return (rank[:, None] < counts[:, None]).unflatten(2, maps.shape[1:])


def blank(images: Tensor, remove: Removal, patch: tuple[int, int]) -> Tensor:
    """What is left of images (B, C, H, W) where patches are gone; blurred so far that a patch tells nothing of itself.

    Args:
        images: Normalised images.
        remove: ``mean`` or ``blur``.
        patch: Height and width of a patch, in pixels.
    """
    if remove == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    if remove == "blur":
        from torchvision.transforms.v2.functional import gaussian_blur  # late: it takes seconds

        kernel = [2 * min(3 * p, size - 1) + 1 for p, size in zip(patch, images.shape[-2:], strict=True)]
        return gaussian_blur(images, kernel[::-1], [float(p) for p in patch[::-1]])
    raise ValueError(f"remove {remove!r} is not one of {', '.join(REMOVALS)}")


def area(curve: Tensor) -> Tensor:
    """Area (B,) under curves (B, S + 1) over [0, 1], by trapezia."""
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1), dim=1)
