"""Where training images come from: digits, CIFAR or a folder, all as uint8 images with labels."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.cache import DataError, ImageFiles, cached_images, cached_statistics, channel_statistics
from vit.preprocess import SUFFIXES, ImageError, Preprocess, open_image

__all__ = ["DataError", "ImageFiles", "Source", "Split", "load_source", "prepare_source", "stratified_split"]

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
CIFAR_STATISTICS = {  # of the training images, as published with most recipes
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
FORMS = "'digits', 'cifar10', 'cifar100' or a folder with one subfolder of images for each class"


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Images with labels.

    Args:
        images: uint8 pixels (N, C, H, W), or files that decode to them; ``images[indices]`` is (B, C, H, W) for both.
        labels: int64 class numbers (N,).
        files: The image files (N) if they come from a folder, for messages and reports: ``files.path(index)``.
    """

    images: Tensor | ImageFiles
    labels: Tensor
    files: ImageFiles | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A data set.

    Args:
        name: What the user asked for, or the folder's name.
        class_names: Name of each class number.
        mean: Mean of each channel over the training images, of values in [0, 1].
        std: Standard deviation of each channel over the training images, of values in [0, 1].
        train: Training images.
        val: Validation images, if the source has its own.
        test: Test images, if the source has any.
    """

    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    val: Split | None = None
    test: Split | None = None


def load_source(
    dataset: str,
    *,
    root: str | Path = "datasets",
    image_size: int | tuple[int, int] | None = None,
    num_workers: int = 2,
) -> Source:
    """Open a data set; the first time it is downloaded or decoded, later its cache is memory-mapped.

    Args:
        dataset: 'digits', 'cifar10', 'cifar100', or a folder: train/CLASS/*.jpg with val/ and test/ beside it if
            there are any, or just CLASS/*.jpg.
        root: Folder for downloads and the cache.
        image_size: Height and width to cut a folder's images to, in pixels; None if all of them have the same size.
        num_workers: Processes that decode images; 0 decodes in this one.

    Raises:
        DataError: If the data set cannot be used; one line that names the path.
    """
    root = Path(root).expanduser()
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and min(size) < 1:
        raise DataError(f"image_size is {image_size}, it must be at least 1 pixel")
    if dataset == "digits":
        source = load_digits()
    elif dataset in CIFAR_STATISTICS:
        source = load_cifar(dataset, root)
    else:
        return load_folder(dataset, root=root, image_size=size, num_workers=num_workers)
    native = source.train.images.shape[-2:]
    if size is not None and size != native:
        raise DataError(f"{dataset} has images of {native[0]}x{native[1]} pixels, image_size is {size[0]}x{size[1]}")
    return source


def prepare_source(
    dataset: str,
    *,
    root: str | Path = "datasets",
    image_size: int | tuple[int, int] | None = None,
    num_workers: int = 2,
) -> None:
    """Download and decode once, so that ``load_source`` with the same arguments is quick; run by one process a node."""
    load_source(dataset, root=root, image_size=image_size, num_workers=num_workers)


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divide images so that every class has the same share on both sides; depends on the arguments alone.

    Args:
        labels: Class numbers (N,).
        fraction: Share of the second part, in [0, 1); 0 leaves it empty.
        seed: Seed of the draw.

    Returns:
        Sorted indices of the first and second part. A class of two or more images has at least one in each; the one
        image of a class goes to the first.

    Raises:
        DataError: If the fraction is out of range.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"the held-out fraction is {fraction}, it must be at least 0 and below 1")
    generator = torch.Generator().manual_seed(seed)
    second = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        if fraction > 0 and len(members) > 1:
            count = min(max(round(len(members) * fraction), 1), len(members) - 1)
            second[members[order[:count]]] = True
    return (~second).nonzero().flatten(), second.nonzero().flatten()


def load_digits() -> Source:
    """scikit-learn's 1,797 grey digits of 8x8 pixels; a fifth, stratified and always the same, is the test split."""
    from sklearn import datasets

    values, targets = (torch.from_numpy(array) for array in datasets.load_digits(return_X_y=True))
    images = (values * (255 / 16)).round().to(torch.uint8).view(-1, 1, 8, 8)  # 0..16 -> 0..255
    train, test = stratified_split(targets, 0.2, seed=0)
    mean, std = channel_statistics([images[train]])
    return Source(
        name="digits",
        class_names=tuple("0123456789"),
        mean=mean,
        std=std,
        train=Split(images=images[train], labels=targets[train].long()),
        test=Split(images=images[test], labels=targets[test].long()),
    )


def load_cifar(name: str, root: Path) -> Source:
    """CIFAR-10 or CIFAR-100, downloaded by torchvision and checked by MD5."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        parts = {part: kind(root, train=part == "train", download=True) for part in ("train", "test")}
    except (OSError, RuntimeError, EOFError) as error:  # no network, no space, wrong checksum, cut short
        cause = " ".join(str(error).split())
        raise DataError(
            f"{name}: cannot get it into {root} ({cause}); download {kind.url} on a machine with a network, "
            f"put it there as {root / kind.filename} and start again"
        ) from None
    splits = {
        part: Split(
            images=torch.from_numpy(np.ascontiguousarray(found.data.transpose(0, 3, 1, 2))),
            labels=torch.tensor(found.targets),
        )
        for part, found in parts.items()
    }
    mean, std = CIFAR_STATISTICS[name]
    return Source(name=name, class_names=tuple(parts["train"].classes), mean=mean, std=std, **splits)


def load_folder(dataset: str, *, root: Path, image_size: tuple[int, int] | None, num_workers: int) -> Source:
    """A folder with one subfolder for each class, with or without train/, val/ and test/ above them."""
    folder = Path(dataset).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is no folder and no known data set"
        raise DataError(f"{dataset} {what}: give {FORMS}")
    class_names, parts = list_images(folder)
    size, size_from = (image_size, None) if image_size else first_size(*parts["train"][:2])
    preprocess = Preprocess(image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3)
    name = re.sub(r"[^\w.-]+", "_", folder.resolve().name)[:40]
    cache: dict[str, Any] = {"folder": root / "cache", "num_workers": num_workers}
    splits: dict[str, Split] = {}
    for split, (path, names, labels) in parts.items():
        files = ImageFiles(folder=str(path), names=names, preprocess=preprocess, size_from=size_from)
        images = cached_images(files, name=f"{name}-{split}", **cache)
        splits[split] = Split(images=images, labels=labels, files=files)
        if split == "train":
            mean, std = cached_statistics(files, images, name=f"{name}-{split}", **cache)
    return Source(name=name, class_names=class_names, mean=mean, std=std, **splits)


def list_images(folder: Path) -> tuple[tuple[str, ...], dict[str, tuple[Path, np.ndarray, Tensor]]]:
    """Class names, and of each split its folder, its files' paths below that and their labels."""
    try:
        folders = split_folders(folder)
        class_names = class_folders(folders["train"])
        parts = {split: (path, *find_images(path, class_names, split)) for split, path in folders.items()}
    except OSError as error:
        raise DataError(f"{os.fsdecode(error.filename or folder)}: {error.strerror}") from None
    counts = parts["train"][2].bincount()
    if "val" not in parts and counts.min() == 1:
        raise DataError(
            f"{folders['train'] / class_names[int(counts.argmin())]} has one image, too few to train and validate: "
            "add images, remove the class or give a val/ folder"
        )
    return class_names, parts


def first_size(folder: Path, names: np.ndarray) -> tuple[tuple[int, int], str]:
    """Height and width in pixels of the first image that can be read, and its path."""
    errors = []
    for path in (os.path.join(folder, os.fsdecode(name)) for name in names):
        try:
            width, height = open_image(path).size
            return (height, width), path
        except ImageError as error:
            errors.append(f"{path}: {error}; repair or remove it")
    raise DataError(f"{errors[0]} (none of {len(errors)} files can be read)")


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
        return {"train": folder}  # a class may be called train
    if twice := [found for found in matches.values() if len(found) > 1]:
        raise DataError(f"{folder} has both {twice[0][0]}/ and {twice[0][1]}/: keep one of them")
    if known and not matches["train"]:
        raise DataError(f"{folder} has {min(known)}/ but no train/: put the training images there")
    return {split: folder / found[0] for split, found in matches.items() if found} or {"train": folder}


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the classes."""
    names = subfolders(folder)
    if len(names) < 2:
        inside = f"only one class folder, {names[0]}/" if names else "no class folders"
        raise DataError(f"{folder} has {inside}: give each class a folder of images, two classes or more")
    return tuple(names)


def find_images(folder: Path, class_names: tuple[str, ...], split: str) -> tuple[np.ndarray, Tensor]:
    """Image files of a split with their labels.

    Args:
        folder: The split's folder.
        class_names: The training split's classes.
        split: 'train', where every class needs an image, 'val' or 'test'.

    Returns:
        Paths below the folder as bytes (N,), sorted within each class, and int64 labels (N,).
    """
    unknown = set(subfolders(folder)) - set(class_names)
    if unknown:
        raise DataError(f"{folder / min(unknown)} is a class that the training images lack: rename or remove it")
    names: list[bytes] = []
    labels: list[int] = []
    for label, class_name in enumerate(class_names):
        of_class = sorted(image_names(folder / class_name))
        if not of_class and split == "train":
            kinds = ", ".join(sorted(SUFFIXES))
            raise DataError(f"{folder / class_name} has no images ({kinds}): add some or remove the folder")
        names += [os.fsencode(os.path.join(class_name, name)) for name in of_class]
        labels += [label] * len(of_class)
    if not names:
        raise DataError(f"{folder} has no images in class folders: add some or remove it")
    return np.array(names), torch.tensor(labels)


def image_names(folder: Path) -> list[str]:
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
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and (entry.is_file() or entry.is_symlink()):
                    found.append(os.path.join(inside, entry.name))
    return found
