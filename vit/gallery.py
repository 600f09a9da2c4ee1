"""Map pictures of a run: one an image, in folders like those of the images, a sheet of the first ones, a report."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from errno import EACCES, ENOTDIR
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from vit.predictor import Predictor, batches, subject
from vit.preprocess import ImageError, open_image
from vit.records import OutputError, shown
from vit.report import LONGEST, unfinished, write_report
from vit.rollout import CLASS_METHOD, CLASS_SPECIFIC, attention_map, layer_attention
from vit.survey import CLASSES, SURVEYED, Survey
from vit.visualize import LARGEST, contact_sheet, overlay

SHEET = 64  # images on the sheet
REPORT = 200  # images in the report: an even sample of those surveyed, with each class's examples
THUMBNAIL = 448  # pixels; what is kept for the sheet is no larger, so that memory stays flat
AT_ONCE = 8  # images whose attention in all layers is held at a time, for the report, at most ...
PATCHES = 2**24  # ... of so many squares of patches together: 64 MiB
METHOD = "map"  # the name under which a picture says how its map was made
ASKED, LIKELY = 5, 0.02  # classes an image's report has maps for, at most; those above this probability, at least two
NAME_MAX = 255  # bytes that file systems allow a name
PATH_MAX = 3072  # bytes of a map's path in its folder: systems allow 4,096 of all, and an image's may be near that


def map_name(path: str, *, absolute: bool = False) -> str:
    """Where an image's map goes inside the maps' folder: no two images share one, and none leads out of it.

    ``a/b.jpg`` gives ``a/b.jpg.png``. What no file name can safely hold becomes ``%XX``, as in addresses: control
    characters, undecodable bytes, ``%`` itself, ``..``, the dot of a folder ``x.png``, which may be the map of a file
    ``x``, and the ``s`` of what would have the name of a sheet. What is absolute in a run of relative paths, or the
    other way round, gets a folder ``%2F`` or ``%2E`` around it.

    Args:
        path: Of the image.
        absolute: Whether the paths of the run are absolute: they lose the slash that they begin with.
    """
    *folders, file = (escaped(part) for part in path.split("/") if part not in ("", "."))
    parts = [re.sub(r"\.png$", "%2Epng", folder) for folder in folders] + [f"{file}.png"]
    slash = path.startswith("/")
    root = [] if slash == absolute else [_percent("/" if slash else ".")]
    name = "/".join(root + [_short(part) for part in parts])
    if len(name.encode()) > PATH_MAX:
        return f"%{_hash(name)}.png"
    return f"%73{name[1:]}" if re.fullmatch(r"sheet(-\d+-of-\d+)?\.png", name) else name


def of_shard(file: str, shard: tuple[int, int]) -> str:
    """What a file is called: parts of a run have a sheet, and a report, each."""
    part, parts = shard
    stem, ending = os.path.splitext(file)
    return f"{stem}-{part}-of-{parts}{ending}" if parts > 1 else file


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
    ending = f"%{_hash(part)}.png"
    return part.encode()[: NAME_MAX - len(ending)].decode(errors="ignore") + ending


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Gallery:
    """Writes the pictures of each batch as it comes, the sheet as soon as it is full, and the report at the end.

    Args:
        predictor: What made the maps; the report asks it more about its images.
        method: Name of the map method.
        target: Class the maps are about; none for the predicted one.
        against: Class that the target is set against.
        folder: Where to put a map for each image, and the sheet; none for no maps.
        report: HTML file to write; none for no report.
        shard: Which part of the run this is, of how many.
        absolute: Whether the images of the run have absolute paths.

    Raises:
        OutputError: If the report or the folder cannot be written, before there is any work in it.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        method: str,
        target: str | None = None,
        against: str | None = None,
        folder: str | None,
        report: str | None,
        shard: tuple[int, int] = (1, 1),
        absolute: bool = False,
    ):
        report = report and of_shard(report, shard)
        self.predictor, self.method, self.folder, self.report = predictor, method, folder, report
        self.target, self.against, self.absolute = target, against, absolute
        self.way = method if target is None else f"{method} ({shown(subject(target, against))})"
        self.sheet = of_shard("sheet.png", shard)
        self.survey = Survey(predictor.class_names) if report else None
        self.limit = SURVEYED if report else SHEET  # of the first so many images something is kept until the end
        self.entries: list[dict[str, Any]] = []
        self.sheet_due = folder is not None
        if report:
            with _named(report):
                _try(report)
                _try(unfinished(report))  # under which name the page grows, perhaps in another folder
        if folder:
            with _named(folder):
                _try_folder(Path(folder))

    def add(
        self, paths: Sequence[str], grids: Iterable[Tensor], scores: Sequence[Mapping[str, float]]
    ) -> list[str | None]:
        """The map's file of each image, once written; None if no maps are wanted or the image is gone meanwhile.

        Args:
            paths: Of the images.
            grids: Weight of each patch (grid height, grid width).
            scores: Probability of every class, highest first.
        """
        grids = list(grids)
        if self.survey:
            self.survey.add(paths, grids, scores)
        if self.folder is None:
            return [None] * len(paths)
        remember = [len(self.entries) + i < SHEET for i in range(len(paths))]
        with ThreadPoolExecutor(thread_name_prefix="maps") as pool:
            drawn = list(pool.map(self._draw, paths, grids, scores, remember))
        self.entries += [entry for _, entry in drawn if entry]
        return [file for file, _ in drawn]

    def _draw(
        self, path: str, grid: Tensor, scores: Mapping[str, float], remember: bool
    ) -> tuple[str | None, dict[str, Any] | None]:
        try:
            image = opened(path, LARGEST, self.predictor.preprocess.white)
        except ImageError:
            return None, None
        target = next(iter(scores)) if self.target is None else self.target
        caption = f"{subject(target, self.against)} {scores[target]:.1%}"
        entry = {"image": image, "grid": grid.numpy(), "caption": caption}
        entry["box"] = self.predictor.preprocess.box(*image.size)
        file = os.path.join(self.folder or "", map_name(path, absolute=self.absolute))
        self._save(overlay(**{**entry, "caption": f"{caption} · {self.method}"}), file)
        return file, _small(entry) if remember else None

    def flush(self, *, end: bool = False) -> None:
        """Write the sheet if it is full, and at the end what is not yet written."""
        if self.sheet_due and self.entries and (end or len(self.entries) >= SHEET):
            self.sheet_due = False
            self._save(contact_sheet(self.entries[:SHEET]), os.path.join(self.folder or "", self.sheet))
        if end and self.report and self.survey and self.survey.paths:
            view = self.survey.view()
            entries = explored(self.predictor, self.survey.chosen(view[:CLASSES], REPORT), self.method)
            with _named(self.report):
                write_report(self.report, self.predictor.about, entries, view, self.survey.total)

    def refuse_other(self, file: str) -> None:
        """See that a map of the run that is gone on with was made the same way, which is written in it.

        Raises:
            OutputError: If it was not.
        """
        try:
            with Image.open(file) as image:
                way = image.info.get(METHOD, self.way)
        except OSError:  # moved away meanwhile
            return
        if way != self.way:
            words = f"the maps so far are by {way}, these would be by {self.way}"
            raise OutputError(f"{file}: {words}; ask for the same ones, or run without --resume to start again")

    def lacks(self, records: Iterable[Mapping[str, Any]]) -> bool:
        """Whether a map that is named in these records of the run is not there any more."""
        return self.folder is not None and any(r.get("map") and not os.path.exists(r["map"]) for r in records)

    def _save(self, picture: Image.Image, file: str) -> None:
        text = PngInfo()
        text.add_text(METHOD, self.way)
        with _named(file):
            if os.path.isfile(file) and os.path.getsize(file) and not _is_map(file):  # empty: of a run that was killed
                raise OutputError(f"{file}: no map, and would be replaced by one; move it, or name another --maps")
            os.makedirs(os.path.dirname(file), exist_ok=True)
            picture.save(file, "PNG", compress_level=1, pnginfo=text)


@contextmanager
def _named(file: str) -> Iterator[None]:
    """What the system has against writing a file is said with its name."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{file}: {error.strerror or error}") from error


def _try(file: str | Path) -> None:
    """Open a file to write, and leave all as it was but for its folder, which is made."""
    with suppress(FileExistsError):  # its folder is a file: what opening it says is clearer
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    there = os.path.lexists(file)
    open(file, "ab").close()
    if not there:
        Path(file).unlink(missing_ok=True)


def _try_folder(folder: Path) -> None:
    """See that files can be put into a folder, or that it can be made; nothing is made yet, as there may be none."""
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(EACCES, os.strerror(EACCES))


def _is_map(file: str) -> bool:
    """Whether a file is a map or a sheet."""
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            return METHOD in picture.info
    except Exception:  # whatever it is
        return False


def opened(path: str, longest: int, white: float | None) -> Image.Image:
    """The image as a person sees it, with not many more pixels on its longer side than are shown."""

    def reduced(image: Image.Image) -> Image.Image:
        factor = max(image.size) // longest
        return image.reduce(factor) if factor > 1 else image

    return open_image(path, min_side=longest, white=white, reduce=reduced)


def _small(entry: dict[str, Any]) -> dict[str, Any]:
    image = entry["image"]
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    scale = small.width / image.width, small.height / image.height
    return entry | {
        "image": small,
        "box": tuple(edge * side for edge, side in zip(entry["box"], scale * 2, strict=True)),
    }


def explored(predictor: Predictor, paths: Iterable[str], method: str) -> Iterator[dict[str, Any]]:
    """Entries for ``write_report``, lazily; images that are gone meanwhile are left out.

    Each has the map of the run's method, rollout, a class-specific map for each likely class, what sets the best class
    apart from each of the others (``contrast``), and the attention of every layer, head and patch.

    Args:
        predictor: What to ask.
        paths: Of the images.
        method: Of the run; its map comes first.
    """

    def load(path: str) -> tuple[Image.Image, Tensor] | None:
        try:
            return opened(path, LONGEST, predictor.preprocess.white), predictor.preprocess.load(path)
        except ImageError:
            return None

    rows, columns = predictor.model.grid_size
    with ThreadPoolExecutor(thread_name_prefix="report") as pool:
        for part in batches(paths, max(1, min(AT_ONCE, PATCHES // (rows * columns) ** 2))):
            found = [(path, *loaded) for path, loaded in zip(part, pool.map(load, part), strict=True) if loaded]
            if not found:
                continue
            answers = explore(predictor, torch.stack([pixels for _, _, pixels in found]), method)
            for (path, image, _), answer in zip(found, answers, strict=True):
                yield {"path": shown(path), "image": image, "box": predictor.preprocess.box(*image.size), **answer}


def explore(predictor: Predictor, pixels: Tensor, method: str) -> list[dict[str, Any]]:
    """Scores, maps and attention of each image, from uint8 pixels (B, C, H, W)."""
    model, names, images = predictor.model, predictor.class_names, predictor.normalized(pixels)
    logits, heads, patches = layer_attention(model, images)
    scores = predictor.probabilities(logits)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :ASKED]  # (B, classes asked about)
    asked = [(i, int(c)) for i, row in enumerate(best) for k, c in enumerate(row) if k < 2 or scores[i, c] >= LIKELY]
    others = [(i, c) for i, c in asked if c != best[i, 0]]
    maps: list[dict[str, Any]] = [{} for _ in images]
    for name in dict.fromkeys([method, "rollout", CLASS_METHOD]):
        if name not in CLASS_SPECIFIC:
            for i, grid in enumerate(attention_map(model, images, method=name)[1].cpu()):
                maps[i][name] = grid.numpy()
            continue
        rows, classes = zip(*asked, strict=True)
        grids = attention_map(model, images[list(rows)], method=name, target=classes)[1].cpu()
        for (i, c), grid in zip(asked, grids, strict=True):
            maps[i].setdefault(name, {})[names[c]] = grid.numpy()
    if others:
        rows, against = zip(*others, strict=True)
        target = best[list(rows), 0].to(images.device)
        grids = attention_map(model, images[list(rows)], method=CLASS_METHOD, target=target, against=against)[1].cpu()
        for (i, c), grid in zip(others, grids, strict=True):
            maps[i].setdefault("contrast", {})[names[c]] = grid.numpy()
    return [
        {
            "scores": predictor.prediction(scores[i]).scores,
            "maps": maps[i],
            "attention": {"heads": heads[i].cpu().numpy(), "patches": patches[i].cpu().numpy()},
        }
        for i in range(len(images))
    ]
