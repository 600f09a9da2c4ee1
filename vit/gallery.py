"""Map pictures of a run: one an image, in folders like those of the images, a sheet of the first ones, a report."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image
from torch import Tensor

from vit.checkpoint import Checkpoint
from vit.preprocess import ImageError, open_image
from vit.records import OutputError, shown
from vit.visualize import LARGEST, contact_sheet, overlay

SHEET = 64  # images on the sheet
REPORT = 200  # images in the report
THUMBNAIL = 448  # pixels; what is kept for them is no larger, so that memory stays flat
NAME_MAX = 255  # bytes that file systems allow a name


def map_name(path: str) -> str:
    """Where an image's map goes inside the maps' folder: no two images share one, and none leads out of it.

    ``a/b.jpg`` gives ``a/b.jpg.png``. What no file name can safely hold becomes ``%XX``, as in addresses: control
    characters, undecodable bytes, ``%`` itself, ``..``, and the slash that an absolute path begins with.
    """
    parts = [escaped(part) for part in path.split("/") if part not in ("", ".")]
    parts[-1] += ".png"
    return "/".join(["%2F"] * path.startswith("/") + [_short(part) for part in parts])


def escaped(part: str) -> str:
    """One part of a path, with ``%XX`` for bytes that are unsafe."""
    if part == "..":
        return "%2E%2E"
    quoted = (c if c.isprintable() and c not in '%\\:*?"<>|' else _percent(c) for c in part)
    return "".join(quoted)


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))


def _short(part: str) -> str:
    """A name of at most NAME_MAX bytes: a long one keeps its beginning and gets a hash of the whole."""
    if len(part.encode()) <= NAME_MAX:
        return part
    ending = f"%{hashlib.sha256(part.encode()).hexdigest()[:16]}.png"
    return part.encode()[: NAME_MAX - len(ending)].decode(errors="ignore") + ending


class Gallery:
    """Writes the pictures of each batch as it comes; the sheet and the report as soon as they are full, or at the end.

    Args:
        about: The checkpoint's description.
        method: Name of the map method.
        folder: Where to put a map for each image, and ``sheet.png``; none for no maps.
        report: HTML file to write; none for no report.
    """

    def __init__(self, about: Checkpoint, *, method: str, folder: str | None, report: str | None):
        self.about, self.method, self.folder, self.report = about, method, folder, report
        self.limit = max(SHEET if folder else 0, REPORT if report else 0)
        self.entries: list[dict[str, Any]] = []
        self.unwritten = {name for name, wanted in (("sheet", folder), ("report", report)) if wanted}

    def add(
        self, paths: Sequence[str], grids: Iterable[Tensor], scores: Iterable[Mapping[str, float]]
    ) -> list[str | None]:
        """The map's file of each image, once written; None if no maps are wanted or the image is gone meanwhile.

        Args:
            paths: Of the images.
            grids: Weight of each patch (grid height, grid width).
            scores: Probability of every class, highest first.
        """
        remember = [len(self.entries) + i < self.limit for i in range(len(paths))]
        with ThreadPoolExecutor(thread_name_prefix="maps") as pool:
            drawn = list(pool.map(self._draw, paths, grids, scores, remember))
        self.entries += [entry for _, entry in drawn if entry]
        return [file for file, _ in drawn]

    def _draw(
        self, path: str, grid: Tensor, scores: Mapping[str, float], remember: bool
    ) -> tuple[str | None, dict[str, Any] | None]:
        try:
            image = open_image(path, min_side=LARGEST)
        except ImageError:
            return None, None
        entry = {"path": shown(path), "image": image, "grid": grid.numpy(), "scores": dict(scores)}
        entry["box"] = self.about.preprocess.box(*image.size)
        file = None
        if self.folder is not None:
            file = f"{self.folder}/{map_name(path)}"
            self._save(overlay(image, entry["grid"], box=entry["box"], caption=_caption(entry)), file)
        return file, _small(entry) if remember else None

    def flush(self, *, end: bool = False) -> None:
        """Write the sheet and the report if they are full, or if this is the end."""
        if "sheet" in self.unwritten and self.entries and (end or len(self.entries) >= SHEET):
            self.unwritten.remove("sheet")
            sheet = [
                {"image": e["image"], "grid": e["grid"], "box": e["box"], "caption": _caption(e)}
                for e in self.entries[:SHEET]
            ]
            self._save(contact_sheet(sheet), f"{self.folder}/sheet.png")
        if self.report and "report" in self.unwritten and self.entries and (end or len(self.entries) >= REPORT):
            from vit.report import write_report

            self.unwritten.remove("report")
            entries = [
                {"maps": {self.method: e["grid"]}, **{k: e[k] for k in ("path", "image", "box", "scores")}}
                for e in self.entries
            ]
            try:
                write_report(self.report, self.about, entries)
            except OSError as error:
                raise OutputError(f"{self.report}: {error.strerror or error}") from error

    @staticmethod
    def _save(picture: Image.Image, file: str) -> None:
        try:
            os.makedirs(os.path.dirname(file), exist_ok=True)
            picture.save(file, "PNG", compress_level=1)
        except OSError as error:
            raise OutputError(f"{file}: {error.strerror or error}") from error


def _small(entry: dict[str, Any]) -> dict[str, Any]:
    image = entry["image"]
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    scale = small.width / image.width, small.height / image.height
    return entry | {
        "image": small,
        "box": tuple(edge * side for edge, side in zip(entry["box"], scale * 2, strict=True)),
    }


def _caption(entry: Mapping[str, Any]) -> str:
    label, score = next(iter(entry["scores"].items()))
    return f"{label} {score:.1%}"
