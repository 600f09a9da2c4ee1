"""One HTML file to look into many predictions: images, scores, maps; it opens anywhere, without network or server."""

import base64
import io
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vit.checkpoint import Checkpoint
from vit.records import shown
from vit.survey import CLASSES, DEFINITIONS, SURVEYED, merging
from vit.visualize import PIXELATED, color_table

LONGEST = 448  # pixels of an image's longer side in the page; 200 photographs stay below 20 MiB with it
QUALITY = 75  # of its JPEG
TOP = 10  # classes listed for an image


def write_report(
    path: str | Path,
    about: Checkpoint,
    entries: Iterable[Mapping[str, Any]],
    classes: Sequence[Mapping[str, Any]] = (),
    total: int = 0,
) -> Path:
    """Write the page; entries are taken one by one, so they may be made as they are written.

    Args:
        path: The HTML file, replaced once the page is whole; its folder is made if missing.
        about: Description of the model, shown at the top.
        entries: One mapping an image: ``path`` (str), ``image`` (the opened image), ``box`` (the part the model sees:
            left, top, right, bottom in the image's pixels), ``scores`` (class name to probability), ``maps`` (method to
            grid, or to a mapping of class name to grid for methods that depend on the class), and optionally
            ``attention`` with ``heads`` (layers, heads, grid height, grid width) and ``patches`` (grid height,
            grid width, grid height, grid width): what the pooled token and what each patch attends to.
        classes: What ``vit.survey.Survey.view`` says of each class, of which the first CLASSES are shown; none for a
            page without that part.
        total: How many images the entries were chosen from; 0 where they are all.
    """
    partial, path = unfinished(path), Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    before, after = resources.files("vit").joinpath("report.html").read_text("utf-8").split("/*DATA*/")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(before)
            file.write(f'{{"about":{_json(_about(about))},"colors":{_json(_base64(color_table()))},"entries":[')
            for i, entry in enumerate(entries):
                file.write(("," if i else "") + "\n" + _json(_entry(entry)))
            kinds = [_class(view) for view in classes[:CLASSES]]
            file.write(f'],"total":{total},"limit":{SURVEYED},"classes":{_json(kinds)},"kinds":{len(classes)}')
            file.write(f',"definitions":{_json(DEFINITIONS)}}}' + after)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def unfinished(path: str | Path) -> Path:
    """Where a page grows: it may take minutes, and who stops it keeps the one before. A link stays one."""
    path = Path(os.path.realpath(path))
    return path.with_name(f".{path.name}.partial")


def _json(value: Any) -> str:
    """JSON that can stand in a script element: no text in it can close the element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _about(about: Checkpoint) -> dict[str, Any]:
    height, width = about.preprocess.image_size
    return {
        "size": f"{width}\u00d7{height}",
        "classes": len(about.class_names),
        "depth": about.architecture.get("depth"),
        "heads": about.architecture.get("num_heads"),
        "metrics": {k: v for k, v in about.metrics.items() if np.isfinite(v)},
    }


def _class(view: Mapping[str, Any]) -> dict[str, Any]:
    examples = {kind: [shown(path) for path in paths] for kind, paths in view["examples"].items()}
    mean = None if view["mean"] is None else _grid(view["mean"])
    truths = {shown(path): name for path, name in view["truths"].items()}
    return {**view, "mean": mean, "examples": examples, "truths": truths}


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    image, (left, top, right, bottom) = entry["image"].convert("RGB"), entry["box"]
    width, height = image.size
    scores = sorted(entry["scores"].items(), key=lambda item: -item[1])[:TOP]
    result = {
        "path": entry["path"],
        "image": _picture(image),
        "pixelated": max(width, height) <= PIXELATED,
        "width": width,
        "height": height,
        "box": [left / width, top / height, (right - left) / width, (bottom - top) / height],
        "scores": [[label, round(float(score), 6)] for label, score in scores],
        "maps": {
            method: {label: _grid(g) for label, g in grids.items()} if isinstance(grids, Mapping) else _grid(grids)
            for method, grids in entry["maps"].items()
        },
    }
    if attention := entry.get("attention"):
        heads, patches = np.asarray(attention["heads"]), _coarse(np.asarray(attention["patches"]))
        levels = [
            _levels(heads.reshape(-1, *heads.shape[2:])),
            _levels(patches.reshape(-1, *patches.shape[2:]), among=16),  # few, since these take most of the space
        ]
        result["attention"] = {
            "heads": heads.shape,
            "patches": patches.shape,
            "data": _base64(zlib.compress(b"".join(grids.tobytes() for grids in levels), 9)),
        }
    return result


def _picture(image: Image.Image) -> str:
    """The image as a data address: small ones as they are, others reduced."""
    file = io.BytesIO()
    if max(image.size) <= PIXELATED:
        image.save(file, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    image = image.copy()
    image.thumbnail((LONGEST, LONGEST))
    image.save(file, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _grid(grid: np.ndarray) -> dict[str, Any]:
    """A map in 256 levels of its largest value, and what the level 255 stands for as a share of the whole."""
    grid = np.nan_to_num(np.asarray(grid, dtype=np.float64))
    return {
        "shape": grid.shape,
        "data": _base64(_levels(grid[None])),
        "top": round(float(grid.max() / max(grid.sum(), 1e-30)), 6),
    }


def _levels(grids: np.ndarray, among: int = 256) -> np.ndarray:
    """Non-negative grids (n, height, width) in uint8, 255 for the largest value of each, in so many levels."""
    grids = np.nan_to_num(np.asarray(grids, dtype=np.float64))
    shares = (grids / np.maximum(grids.max((1, 2), keepdims=True), 1e-30)).clip(0, 1)
    return ((shares * (among - 1)).round() * (255 // (among - 1))).astype(np.uint8)


def _coarse(patches: np.ndarray) -> np.ndarray:
    """With neighbours merged, so that no side is too long: the square of the patches is what takes space."""
    for axis in range(4):
        patches = np.moveaxis(np.tensordot(merging(patches.shape[axis]).numpy(), patches, (1, axis)), 0, axis)
    return patches


def _base64(values: np.ndarray | bytes) -> str:
    return base64.b64encode(values if isinstance(values, bytes) else values.astype(np.uint8).tobytes()).decode()
