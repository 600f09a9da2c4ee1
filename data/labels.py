"""Which image belongs to which class and split: read from class folders, several of them, or a table of labels."""

import csv
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.cache import DataError, one_line, say_once
from vit.preprocess import SUFFIXES, by_ending
from vit.records import composed

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
TABLES = (".csv", ".tsv", ".parquet")

Listing = tuple[str, np.ndarray, Tensor]  # a folder, paths below it as bytes (N,), class numbers (N,)


def split_of(name: str) -> str:
    """'train', 'val' or 'test' for each of its spellings; other names as they are."""
    return next((split for split, spellings in SPLITS.items() if name.casefold() in spellings), name)


# ---- class folders --------------------------------------------------------------------------------------------------


def list_images(roots: list[Path]) -> tuple[tuple[str, ...], dict[str, Listing]]:
    """Class names, and of each split its images, from one folder or several that are taken together.

    Args:
        roots: Folders with class folders, or with train/, val/ and test/ above those.
    """
    folders: dict[str, list[Path]] = {}
    passed_over: Counter[str] = Counter()
    beside: list[str] = []
    try:
        for root in roots:
            found = split_folders(root)
            for split, folder in found.items():
                folders.setdefault(split, []).append(folder)
            beside += outside(root, found.values())
        class_names = class_folders(folders["train"])
        parts = {s: find_images(folders[s], class_names, s, passed_over) for s in SPLITS if s in folders}
    except OSError as error:
        raise DataError(f"{os.fsdecode(error.filename or roots[0])}: {error.strerror}") from None
    if passed_over or beside:
        say_once(f"{', '.join(map(str, roots))}: left out: {'; '.join(left_out(passed_over, beside))}")
    return class_names, parts


def left_out(passed_over: Counter[str], beside: list[str]) -> Iterator[str]:
    """In words, other files of the class folders, counted by ending, and what lies beside those folders."""
    if passed_over:
        yield f"{passed_over.total()} other files in the class folders ({by_ending(passed_over)})"
    if beside:
        yield f"{len(beside)} outside them ({', '.join(beside[:3])}{', ...' * (len(beside) > 3)})"


def refuse_among(folders: Iterable[Path], place: str | Path, what: str) -> None:
    """Refuse a folder that this program writes in and that the next start would take for a class.

    Args:
        folders: With class folders, or with train/, val/ and test/ above those.
        place: Where it is, or would be.
        what: The setting that says so.
    """
    for folder in folders:
        among = Path(os.path.realpath(place)).is_relative_to(os.path.realpath(folder))
        if among and split_folders(folder) == {"train": folder}:
            raise DataError(f"{what} {place} would lie among the class folders of {folder}: name another place for it")


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def split_folders(folder: Path) -> dict[str, Path]:
    """Where the splits are: those of train/, val/, test/ that exist, or the folder itself as the training split."""
    names = subfolders(folder)
    matches = {split: [n for n in names if n.casefold() in spellings] for split, spellings in SPLITS.items()}
    known = {name for found in matches.values() for name in found}
    if known != set(names) and not any(subfolders(folder / name) for name in known):
        refuse_half_named(folder, names)
        return {"train": folder}  # a class may be called train
    if twice := [found for found in matches.values() if len(found) > 1]:
        raise DataError(f"{folder} has both {twice[0][0]}/ and {twice[0][1]}/: keep one of them")
    if known and not matches["train"]:
        raise DataError(
            f"{folder} has {min(known)}/ but no train/: move the class folders of the training images into train/"
        )
    return {split: folder / found[0] for split, found in matches.items() if found} or {"train": folder}


def refuse_half_named(folder: Path, names: list[str]) -> None:
    """Refuse training_set/ and test_set/, which would be two classes, where they have folders in them."""
    said: dict[str, str] = {}
    for name in names:
        words = {split_of(word.removesuffix("set")) for word in re.split(r"[\W\d_]+", name.casefold())}
        if len(of := words & set(SPLITS)) == 1 and subfolders(folder / name):
            said.setdefault(of.pop(), name)
    if len(said) > 1:
        renamed = ", ".join(f"{name}/ to {split}/" for split, name in said.items())
        raise DataError(f"{folder} has splits with names that are not theirs: rename {renamed}")


def outside(root: Path, splits: Collection[Path]) -> list[str]:
    """Images beside class folders, and what lies beside the folders of the splits: it belongs to no class."""
    found = [] if root in splits else [f"{root / name}/" for name in subfolders(root) if root / name not in splits]
    for folder in dict.fromkeys((root, *splits)):
        with os.scandir(folder) as entries:
            found += sorted(entry.path for entry in entries if is_image(entry))
    return found


def class_folders(folders: list[Path]) -> tuple[str, ...]:
    """Names of the classes that any of the folders has."""
    names = sorted({composed(name) for folder in folders for name in subfolders(folder)})
    if len(names) < 2:
        inside = f"only one class folder, {names[0]}/" if names else "no class folders"
        shards = f"; its tar files as shards: wds/{folders[0]}" if any(folders[0].glob("*.tar")) else ""
        raise DataError(f"{folders[0]} has {inside}: give each class a folder of images, two classes or more{shards}")
    return tuple(names)


def find_images(folders: list[Path], class_names: tuple[str, ...], split: str, passed_over: Counter[str]) -> Listing:
    """Image files of a split with their labels, sorted within each class and folder.

    Args:
        folders: The split's folders.
        class_names: The training split's classes.
        split: 'train', where every class needs an image, 'val' or 'test'.
        passed_over: Counts the other files in the class folders, by ending.
    """
    base = folders[0] if len(folders) == 1 else Path()  # what the paths start from
    stored: dict[str, list[Path]] = {name: [] for name in class_names}
    for folder in folders:
        inside = subfolders(folder)
        if unknown := [name for name in inside if composed(name) not in stored]:
            raise DataError(f"{folder / min(unknown)} is a class that the training images lack: rename or remove it")
        for name in inside:
            stored[composed(name)].append(Path(name) if len(folders) == 1 else folder / name)
    names: list[bytes] = []
    labels: list[int] = []
    for label, (class_name, insides) in enumerate(stored.items()):
        of_class = [os.path.join(i, name) for i in insides for name in sorted(image_names(base / i, passed_over))]
        if not of_class and split == "train":
            kinds = ", ".join(sorted(SUFFIXES))
            raise DataError(f"{folders[0] / class_name} has no images ({kinds}): add some or remove the folder")
        names += map(os.fsencode, of_class)
        labels += [label] * len(of_class)
    if not names:
        raise DataError(f"{folders[0]} has no images in class folders: add some or remove it")
    return str(base), np.array(names), torch.tensor(labels)


def image_names(folder: Path, passed_over: Counter[str]) -> list[str]:
    """Paths of all image files below a folder, relative to it; links are followed, hidden files and folders are not."""
    found: list[str] = []
    seen: set[str] = set()
    waiting = [""] if folder.is_dir() else []
    while waiting:
        inside = waiting.pop()
        real = os.path.realpath(folder / inside)
        if real in seen:  # a link that leads back, or there twice
            continue
        seen.add(real)
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(os.path.join(inside, entry.name))
                elif is_image(entry):
                    found.append(os.path.join(inside, entry.name))
                else:
                    passed_over[os.path.splitext(entry.name)[1].lower()] += 1
    return found


def is_image(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file called like an image; a link to nowhere is, and opening it will say so."""
    kind = entry.is_file() or (entry.is_symlink() and not entry.is_dir())
    return kind and not entry.name.startswith(".") and os.path.splitext(entry.name)[1].lower() in SUFFIXES


# ---- tables of labels -----------------------------------------------------------------------------------------------


def list_table(file: Path) -> tuple[tuple[str, ...], dict[str, Listing]]:
    """Class names, and of each split its images, from a table with the columns path, label and perhaps split.

    Args:
        file: CSV, TSV or parquet; paths are absolute or start at its folder.
    """
    try:
        rows = read_table(file)
    except DataError:  # which says it in our words
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read ({one_line(error)})") from None
    if not rows:
        raise DataError(f"{file}: has no rows below its header")
    parts: dict[str, list[tuple[str, str]]] = {}
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if isinstance(label := row.get("label"), list | tuple | dict):
            label = str(label)[:40]
            raise DataError(f"{file}: row {number} has label {label}: one class an image is needed, text or number")
        values = {name: cell(row.get(name)) for name in ("path", "label", "split")}
        if missing := next((name for name in ("path", "label") if not values[name]), None):
            found = f"has {', '.join(map(repr, row))}" if missing not in row else f"row {number} is empty there"
            raise DataError(f"{file}: needs a column {missing!r} for each image, but {found}")
        if (first := seen.setdefault(os.path.abspath(file.parent / values["path"]), number)) != number:
            twice = f"rows {first} and {number} are both {values['path']}"
            raise DataError(f"{file}: {twice}: name each image once (data.balance shows small classes more often)")
        parts.setdefault(split_of(values["split"] or "train"), []).append((values["path"], composed(values["label"])))
    if odd := set(parts) - set(SPLITS):
        raise DataError(f"{file}: split {min(odd)!r} is none of {', '.join(SPLITS)}")
    class_names = in_order({label for _, label in parts.get("train", ())})
    if len(class_names) < 2:
        raise DataError(f"{file}: {len(class_names)} classes in the training images, two or more are needed")
    numbers = {name: number for number, name in enumerate(class_names)}
    listings: dict[str, Listing] = {}
    for split, pairs in ((split, parts[split]) for split in SPLITS if split in parts):
        if unknown := {label for _, label in pairs} - set(numbers):
            raise DataError(f"{file}: class {min(unknown)!r} of the {split} images is none of the training images")
        names = np.array([os.fsencode(path) for path, _ in pairs])
        listings[split] = str(file.parent), names, torch.tensor([numbers[label] for _, label in pairs])
    return class_names, listings


def cell(value: Any) -> str:
    """What a table holds in one place; nothing for what pandas writes there in a column of numbers."""
    return "" if value is None or value != value else str(value).strip()


def read_table(file: Path) -> Iterable[dict[str, Any]]:
    """The table's rows, by column."""
    if file.suffix.lower() == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise DataError(f"{file}: needs the package pyarrow; pip install pyarrow") from None
        return parquet.read_table(file).to_pylist()
    with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        header = lines.readline()
        if header.startswith("\udcff\udcfe") or header.startswith("\udcfe\udcff"):
            raise DataError(f"{file}: is UTF-16: save the table as UTF-8")
        lines.seek(0)
        # A spreadsheet of a country where the comma is in numbers has semicolons in its CSV.
        comma = ";" if ";" in header and "," not in header else ","
        delimiter = "\t" if file.suffix.lower() == ".tsv" else comma
        table = csv.DictReader(lines, delimiter=delimiter, strict=True)  # a quote that opens nothing eats no rows
        table.fieldnames = [name.strip() for name in table.fieldnames or ()]
        rows = list(table)
    for number, row in enumerate(rows, 1):
        path = str(row.get("path") or "")
        if not path.isascii() and any("\udc80" <= c <= "\udcff" for c in path) and not (file.parent / path).exists():
            raise DataError(f"{file}: row {number} is no UTF-8: save the table as UTF-8")
        if any("\udc80" <= c <= "\udcff" for c in str(row.get("label") or "")):
            raise DataError(f"{file}: the label of row {number} is no UTF-8: save the table as UTF-8")
    return rows


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sorted: by value if all are whole numbers."""
    numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))
