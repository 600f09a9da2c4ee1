"""Where a model looks, class by class, over all images of a run; and hints where it may look at the wrong thing.

Images count for the class the model calls them. Every quantity is defined in one sentence, in DEFINITIONS, which the
page shows. Shapes in comments: n images of a class, P cells of a grid.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vit.records import composed

SURVEYED = 50_000  # images; the rest of a longer run is left out, so that memory stays flat
COARSEST = 14  # rows and columns kept of a map, and on the page of what each patch attends to
CLASSES = 20  # classes the page shows; those with a hint come first
EXAMPLES = 3  # images of each kind
FEWEST = 10  # images of a class before anything is concluded from them
SIGMAS = 3  # standard errors by which a share must be above its bound
BORDER, SPOT = 1.1, 4.0  # times what is usual that the whole border may hold, and a single cell of it

DEFINITIONS = {
    "images": "Images count for the class the model calls them, whatever they show.",
    "recognised": "Share of the images in the folder of this name that the model calls so; then its commonest mistake.",
    "mean map": "The average of these images' maps, each of which sums to 1.",
    "border": "Share of the map on its outermost ring; the tick is the share of an even map.",
    "centre": "Share of the map on the middle half of its rows and columns; the tick is the share of an even map.",
    "most and least typical": "The images whose maps are most and least like the mean map, by cosine.",
    "most confident errors": "The highest scores of this class among images in another class's folder, which is named.",
    "hint": (
        f"Shown from {FEWEST} images on, where the border holds more than {BORDER:g} times, or one cell of it more "
        f"than {SPOT:g} times, what is there in an even map and in the other classes' maps (of a cell: there or beside "
        f"it), even with {SIGMAS} standard errors taken off: a frame, a watermark or the background may decide, not "
        f"the object. Cells that hold more than {SPOT:g} times an even map's share for the others, or are beside such, "
        "are left out of the whole border: others have a mark there, by whose absence this class may be told."
    ),
}


class Survey:
    """What is kept of each image of a run: path, label, score and a small map.

    Args:
        class_names: Of the model; a folder of one of these names says what the images in it show.
    """

    def __init__(self, class_names: Sequence[str]):
        self.class_names = tuple(class_names)
        self.number = {name: i for i, name in enumerate(class_names)}
        self.folders = {composed(name): i for i, name in enumerate(class_names)}
        self.paths: list[str] = []
        self.known: set[str] = set()
        self.labels: list[int] = []
        self.scores: list[float] = []
        self.maps: list[Tensor] = []  # (rows, columns) float16

    def add(self, paths: Sequence[str], grids: Iterable[Tensor], scores: Iterable[Mapping[str, float]]) -> None:
        """Take these images in, as long as there is room.

        Args:
            paths: Of the images.
            grids: Weight of each patch (grid height, grid width).
            scores: Probability of every class, highest first.
        """
        for path, grid, named in zip(paths, grids, scores, strict=True):
            if len(self.paths) == SURVEYED:
                return
            if path in self.known:  # given twice; the page shows it once
                continue
            self.known.add(path)
            label, score = next(iter(named.items()))
            self.paths.append(path)
            self.labels.append(self.number[label])
            self.scores.append(score)
            self.maps.append(coarse(grid).half())

    @cached_property
    def truths(self) -> list[int | None]:
        """Of each image, the class whose name the nearest of its folders has, up to the one that all images lie in.

        Of what is above that, nobody has said that it sorts images: it may be a user's name, or a year.
        """
        folders = [PurePath(os.path.abspath(path)).parent for path in self.paths]
        above = len(PurePath(os.path.commonpath(folders)).parts) - 1
        parts = ((self.folders.get(composed(part)) for part in reversed(folder.parts[above:])) for folder in folders)
        return [next((number for number in numbers if number is not None), None) for numbers in parts]

    @property
    def total(self) -> int:
        """Images taken in; one that was given twice counts once."""
        return len(self.paths)

    def view(self) -> list[dict[str, Any]]:
        """What the page says of each class: those with a hint first, then those with most images.

        A class that no image is called has no map, but is told of where it has a folder: it is the worst recognised.
        """
        labels = np.array(self.labels, dtype=int)
        maps = {c: torch.stack([self.maps[i] for i in np.flatnonzero(labels == c)]).float() for c in np.unique(labels)}
        hints, folders = find_hints(maps), self._folders(labels)
        views: list[dict[str, Any]] = [self._view(c, np.flatnonzero(labels == c), maps[c], hints[c]) for c in maps]
        nothing = {"images": 0, "known": 0, "right": None, "mean": None, "shares": {}, "hint": None}
        nothing |= {"examples": {}, "truths": {}}
        views += [{"name": self.class_names[c], **nothing} for c in folders if c not in maps]
        views = [view | {"folder": folders.get(self.number[view["name"]])} for view in views]
        return sorted(views, key=lambda view: (view["hint"] is None, -view["images"]))

    def _folders(self, labels: np.ndarray) -> dict[int, dict[str, Any]]:
        """For each class with a folder: its images, the share called so, and what most others are called."""
        truths = np.array([-1 if truth is None else truth for truth in self.truths], dtype=int)
        folders = {}
        for c in map(int, np.unique(truths[truths >= 0])):
            called = np.bincount(labels[truths == c], minlength=len(self.class_names)) / (truths == c).sum()
            right, called[c] = float(called[c]), 0
            other = int(called.argmax())
            taken = [self.class_names[other], float(called[other])] if called[other] else None
            folders[c] = {"images": int((truths == c).sum()), "right": right, "taken for": taken}
        return folders

    def _view(self, label: int, members: np.ndarray, maps: Tensor, hint: str | None) -> dict[str, Any]:
        mean = maps.mean(0)
        likeness = F.cosine_similarity(maps.flatten(1), mean.flatten()[None]).numpy()
        order = members[np.argsort(-likeness, kind="stable")]
        few = min(EXAMPLES, len(order) // 2)
        wrong = [i for i in members if self.truths[i] not in (None, label)]
        known = sum(self.truths[i] is not None for i in members)
        examples = {
            "most typical": order[: max(1, few)],
            "least typical": order[len(order) - few :][::-1],
            "most confident errors": sorted(wrong, key=lambda i: -self.scores[i])[:EXAMPLES],
        }
        return {
            "name": self.class_names[label],
            "images": len(members),
            "known": known,
            "right": (known - len(wrong)) / known if known else None,
            "mean": mean.numpy(),
            "shares": {name: share_of(maps, region) for name, region in regions(*mean.shape).items()},
            "hint": hint,
            "examples": {kind: [self.paths[i] for i in chosen] for kind, chosen in examples.items() if len(chosen)},
            "truths": {self.paths[i]: self.class_names[self.truths[i] or 0] for i in examples["most confident errors"]},
        }

    def chosen(self, views: Iterable[Mapping[str, Any]], number: int) -> list[str]:
        """Paths for the page, in their order: the classes' examples, and as many as there is room for of the others.

        Those are an even sample: folders come one after the other, so the first images would be those of one class.
        """
        wanted = dict.fromkeys(path for view in views for chosen in view["examples"].values() for path in chosen)
        examples = list(wanted)[:number]
        place = {path: i for i, path in enumerate(self.paths)}
        others = [path for path in place if path not in wanted]
        room = min(number - len(examples), len(others))
        sample = [others[(2 * i + 1) * len(others) // (2 * room)] for i in range(room)]
        return sorted(examples + sample, key=place.__getitem__)


def coarse(grid: Tensor) -> Tensor:
    """A map (rows, columns) summing to 1 in at most COARSEST rows and columns, each part of it where it was."""
    small = merging(grid.shape[0]) @ grid.cpu().double() @ merging(grid.shape[1]).T
    return (small / small.sum()).float()


@cache
def merging(size: int) -> Tensor:
    """How much of each of so many patches in a line lies in each of at most COARSEST parts, (parts, size)."""
    edges = torch.linspace(0, size, min(size, COARSEST) + 1, dtype=torch.float64)[:, None]
    first = torch.arange(size)
    return (edges[1:].minimum(first + 1) - edges[:-1].maximum(first)).clamp_min(0)


def regions(rows: int, columns: int) -> dict[str, Tensor]:
    """Cells (rows, columns) of the border and of the centre; none of a grid too small to have both."""
    if min(rows, columns) < 4:
        return {}
    border, centre = torch.ones(rows, columns, dtype=torch.bool), torch.zeros(rows, columns, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    centre[rows // 4 : rows - rows // 4, columns // 4 : columns - columns // 4] = True
    return {"border": border, "centre": centre}


def share_of(maps: Tensor, region: Tensor) -> dict[str, float | None]:
    """Mean share of maps (n, rows, columns) on a region, half of its 95 % interval, and an even map's share.

    Of fewer than FEWEST maps there is no interval: their spread does not tell what another image would have.
    """
    shares = maps[:, region].sum(1)
    error = 1.96 * standard_error(shares) if len(shares) >= FEWEST else None
    return {"mean": float(shares.mean()), "error": error, "even": float(region.float().mean())}


def standard_error(values: Tensor) -> float:
    """Of the mean of values (n,)."""
    return float(values.std() / len(values) ** 0.5)


def find_hints(maps: Mapping[int, Tensor]) -> dict[int, str | None]:
    """For each class, why it may be decided by its border; none where nothing says so.

    Args:
        maps: Of each class's images, (n, rows, columns), each summing to 1.
    """
    means = {label: of_class.mean(0) for label, of_class in maps.items()}
    hints = {}
    for label, of_class in maps.items():
        others = [mean for other, mean in means.items() if other != label]
        even = torch.full_like(means[label], 1 / means[label].numel())
        hints[label] = hint(of_class, torch.stack(others).mean(0) if others else even)
    return hints


def hint(maps: Tensor, others: Tensor) -> str | None:
    """Why a class may be decided by its border.

    Args:
        maps: Of its images, (n, rows, columns).
        others: Mean map of the other classes, (rows, columns). A place is set against its neighbours there too: a class
            without the mark of another one is told by its absence, and that is looked for about the same place. Of the
            whole border, such a place does not count.
    """
    found = regions(*maps.shape[1:])
    if len(maps) < FEWEST or not found:
        return None
    border = found["border"]
    shares, even = maps[:, border], 1 / maps[0].numel()  # (n, cells)
    beside = F.max_pool2d(others[None], 3, stride=1, padding=1)[0, border].clamp_min(even)  # (cells,)
    surely = shares.mean(0) - SIGMAS * shares.std(0) / len(maps) ** 0.5
    cell = int((surely / beside).argmax())
    if surely[cell] > SPOT * beside[cell]:
        row, column = (f"{i + 1} of {n}" for i, n in zip(border.nonzero()[cell].tolist(), border.shape, strict=True))
        times = shares.mean(0)[cell] / even
        return (
            f"One place on the border, row {row}, column {column}, counts {times:.1f} times as much as in an even map."
        )
    unmarked = beside <= SPOT * even
    whole = shares[:, unmarked].sum(1)
    usual = max(float(others[border][unmarked].sum()), even * int(unmarked.sum()))
    if whole.mean() - SIGMAS * standard_error(whole) > BORDER * usual:
        return f"The border counts for {shares.sum(1).mean():.0%}; in an even map it is {even * len(beside):.0%}."
    return None
