"""Where training images come from: folders, tables, known sets and libraries, all as uint8 images with labels."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.cache import (
    DataError,
    ImageFiles,
    OnBad,
    alone,
    cached_images,
    cached_statistics,
    channel_statistics,
    file_name,
    one_line,
    readable,
    say_once,
)
from data.hub import StoredImages, hub_images, hub_shards, load_hub, load_tfds, load_torch
from data.labels import SPLITS, TABLES, list_images, list_table, refuse_among
from data.stream import Shards, Stream, load_tars, stream_statistics
from vit.preprocess import Preprocess

CIFAR_STATISTICS = {  # of the training images, as published with most recipes
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
FORMS = (
    "'digits', 'cifar10', 'cifar100', a folder with one subfolder of images for each class, a table of labels "
    f"(*{', *'.join(TABLES)}), or torch/NAME, hfds/NAME, hfids/NAME, tfds/NAME, wds/FOLDER"
)


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

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W) once decoded."""
        return tuple(self.images.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A data set.

    Args:
        class_names: Name of each class number.
        mean: Mean of each channel over the training images, of values in [0, 1].
        std: Standard deviation of each channel over the training images, of values in [0, 1].
        train: Training images; a Stream if they can only be read in order.
        val: Validation images, if the source has its own.
        test: Test images, if the source has any.
    """

    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split | Any  # Any: a Stream
    val: Split | Any | None = None
    test: Split | Any | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a data set is opened: the arguments of ``load_source``."""

    root: Path
    image_size: tuple[int, int] | None
    num_workers: int
    on_bad: OnBad
    white: float | None

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def preprocess(self) -> Preprocess:
        """How to decode to uint8; mean and std are not known yet, and stand for three channels."""
        return Preprocess(image_size=self.image_size or (1, 1), mean=(0.5,) * 3, std=(0.5,) * 3, white=self.white)


def load_source(
    dataset: str,
    *,
    root: str | Path = "datasets",
    image_size: int | tuple[int, int] | None = None,
    num_workers: int = 2,
    on_bad: OnBad = "fail",
    white: float | None = None,
) -> Source:
    """Open a data set; the first time it is downloaded or decoded, later its cache is memory-mapped.

    Args:
        dataset: 'digits', 'cifar10', 'cifar100'; a folder: train/CLASS/*.jpg with val/ and test/ beside it if there are
            any, or just CLASS/*.jpg, or several of them, divided by commas; a table FILE.csv, .tsv or .parquet with
            columns path, label and perhaps split; torch/NAME of torchvision, hfds/NAME of Hugging Face, tfds/NAME of
            TensorFlow Datasets; streamed: hfids/NAME, wds/FOLDER of tar files.
        root: Folder for downloads and the cache.
        image_size: Height and width to cut images to, in pixels; None if all of them have the same size.
        num_workers: Processes that decode images; 0 decodes in this one.
        on_bad: What to do about files that cannot be read: ``fail`` or ``skip``.
        white: Value that is white in grey images of more than 8 bits; none for 65535 of 16 bits.

    Raises:
        DataError: If the data set cannot be used; one line that names the path.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and min(size) < 1:
        raise DataError(f"image_size is {image_size}, it must be at least 1 pixel")
    if white is not None and not 0 < white < math.inf:
        raise DataError(f"data.white is {white}, it must be above 0")
    kind, slash, rest = dataset.partition("/")
    if dataset in ("digits", *CIFAR_STATISTICS) and Path(dataset).is_dir():
        say_once(f"{dataset}: the data set of that name; the folder here is --data.dataset ./{dataset}")
    options = Options(
        root=Path(root).expanduser(), image_size=size, num_workers=num_workers, on_bad=on_bad, white=white
    )
    if dataset == "digits":
        source = load_digits()
    elif dataset in CIFAR_STATISTICS:
        source = load_cifar(dataset, options)
    elif slash and kind in ("wds", "hfids"):
        return load_stream(dataset, kind, rest, options)
    elif slash and kind in ("hfds", "tfds", "torch"):
        return load_stored(dataset, kind, rest, options)
    else:
        return load_files(dataset, options)
    native = source.train.shape[-2:]
    if size is not None and size != native:
        raise DataError(f"{dataset} has images of {native[0]}x{native[1]} pixels, image_size is {size[0]}x{size[1]}")
    return source


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divide images so that every class has the same share on both sides; depends on the arguments alone.

    Args:
        labels: Class numbers (N,).
        fraction: Share of the second part, in (0, 1).
        seed: Seed of the draw.

    Returns:
        Sorted indices of the first and second part. A class of two or more images has at least one in each; the one
        image of a class goes to the first.
    """
    generator = torch.Generator().manual_seed(seed)
    second = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        if len(members) > 1:
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
        class_names=tuple("0123456789"),
        mean=mean,
        std=std,
        train=Split(images=images[train], labels=targets[train].long()),
        test=Split(images=images[test], labels=targets[test].long()),
    )


def load_cifar(name: str, options: Options) -> Source:
    """CIFAR-10 or CIFAR-100, downloaded by torchvision and checked by MD5."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind, root = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name], options.root
    try:
        with alone(options.cache / f"{name}.lock"):
            parts = {part: kind(root, train=part == "train", download=True) for part in ("train", "test")}
    except (OSError, RuntimeError, EOFError) as error:  # no network, no space, wrong checksum, cut short
        raise DataError(
            f"{name}: cannot get it into {root} ({one_line(error)}); download {kind.url} on a machine with a network, "
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
    return Source(class_names=tuple(parts["train"].classes), mean=mean, std=std, **splits)


def load_files(dataset: str, options: Options) -> Source:
    """Image files: of a folder with class folders, of several such folders, or of a table."""
    if not all(part.strip() for part in dataset.split(",")):  # which would be the present folder
        raise DataError(f"data.dataset {dataset!r} has an empty name in it: give {FORMS}")
    whole = Path(dataset).expanduser()
    paths = [whole] if whole.exists() else [Path(part.strip()).expanduser() for part in dataset.split(",")]
    if whole.is_file() and whole.suffix.lower() in TABLES:
        class_names, parts = list_table(whole)
    else:
        if len({path.resolve() for path in paths}) < len(paths):
            raise DataError(f"data.dataset {dataset!r} has a folder twice, and would train on what it holds out")
        for path in paths:
            if not path.is_dir():
                what = "is a file" if path.exists() else "is no folder and no known data set"
                if path.suffix.lower() in TABLES:
                    what = "is a table, which stands alone" if path.exists() else "is not there"
                raise DataError(f"{path} {what}: --data.dataset takes {FORMS}")
        refuse_among(paths, options.root, "data.root")
        class_names, parts = list_images(paths)
    files = {
        split: ImageFiles(folder=folder, names=names, preprocess=options.preprocess)
        for split, (folder, names, _) in parts.items()
    }
    labels = {split: part[2] for split, part in parts.items()}
    return decoded("-".join(path.resolve().name for path in paths), class_names, files, labels, options)


def load_stored(dataset: str, kind: str, name: str, options: Options) -> Source:
    """A set of torchvision, TensorFlow Datasets or Hugging Face that is on the disk after its download."""
    with alone(options.cache / f"{file_name(dataset)}.download.lock"):  # not by all processes at once
        if kind in ("tfds", "torch"):
            class_names, found = (load_tfds if kind == "tfds" else load_torch)(name, options.root)
        else:
            class_names, rows = load_hub(name, options.root, streaming=False)
            found = {split: hub_images(f"{dataset} {split}", *part) for split, part in rows.items()}
    files: dict[str, ImageFiles] = {}
    labels: dict[str, Tensor] = {}
    for split, (get, numbers, fingerprint) in usable(dataset, found).items():
        known = numbers >= 0  # -1: a secret, as those of ImageNet's test images
        if secret := int((~known).sum()):
            say_once(f"{dataset} {split}: {secret} of {len(numbers)} images have no label and are left out")
        if known.any():
            files[split] = StoredImages(
                folder=f"{dataset} {split}",
                names=known.nonzero()[:, 0].numpy(),
                preprocess=options.preprocess,
                get=get,
                fingerprint=fingerprint,
            )
            labels[split] = numbers[known]
    if "train" not in files:
        raise DataError(f"{dataset} has no labelled training split, only {', '.join(files) or 'images without labels'}")
    refuse_one_class(dataset, class_names)
    return decoded(dataset, class_names, files, labels, options)


def refuse_one_class(dataset: str, class_names: tuple[str, ...]) -> None:
    """A model of one class is right whatever it sees."""
    if len(class_names) < 2:
        found = f"one class alone, {class_names[0]!r}" if class_names else "no classes"
        raise DataError(f"{dataset} has {found}: two or more are needed")


def usable(dataset: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The splits for training, validation and test; others, such as SVHN's ``extra``, are left out, which is said."""
    if others := sorted(set(found) - set(SPLITS)):
        say_once(f"{dataset}: has a split {', '.join(others)} too, which is left out")
    return {split: found[split] for split in SPLITS if split in found}


def decoded(
    name: str,
    class_names: tuple[str, ...],
    files: Mapping[str, ImageFiles],
    labels: Mapping[str, Tensor],
    options: Options,
) -> Source:
    """A source from the files of each split: decoded once into the cache if they fit, else batch by batch.

    Args:
        name: What the cache files are called after.
        class_names: Name of each class number.
        files: Files of each split.
        labels: Class numbers of each split (N,).
        options: Without an image_size, that of the first image is taken and required of all.
    """
    name = file_name(name)
    if options.image_size is None:
        size, size_from = first_size(files["train"])
        preprocess = replace(files["train"].preprocess, image_size=size)
        files = {split: replace(part, preprocess=preprocess, size_from=size_from) for split, part in files.items()}
    cache: dict[str, Any] = {"folder": options.cache, "num_workers": options.num_workers}
    files, labels = readable(files, labels, name=name, on_bad=options.on_bad, **cache)
    with alone(options.cache / f"{name}.lock"):  # without bad files they are another set, which is decoded once too
        images = {split: cached_images(part, name=f"{name}-{split}", **cache) for split, part in files.items()}
        mean, std = cached_statistics(files["train"], images["train"], name=f"{name}-train", **cache)
    hint(name, files["train"])
    splits = {split: Split(images=images[split], labels=labels[split], files=part) for split, part in files.items()}
    return Source(class_names=class_names, mean=mean, std=std, **splits)


def hint(name: str, files: ImageFiles) -> None:
    """Say what one would hardly notice, by a few of the images: much of each is cut off, or they come out dark."""
    some = np.linspace(0, len(files) - 1, min(20, len(files))).astype(int).tolist()
    found = [stored for index in some if (stored := files.stored(index)) is not None]
    sizes = {size for size, _ in found}
    if len(sizes) == 1:
        (width, height), (rows, columns) = sizes.pop(), files.preprocess.image_size
        left, top, right, bottom = files.preprocess.box(width, height)
        if (seen := (right - left) * (bottom - top) / (width * height)) < 0.75:
            words = f"{name}: of images of {width}x{height} pixels the middle {seen:.0%} are seen, {columns}x{rows}"
            say_once(f"{words}; --data.image_size '[{height}, {width}]' (or in that proportion) shows all of them")
    values = [largest for _, largest in found if largest is not None]
    # A camera's 12 bits in a file of 16 would become 16 grey levels.
    if files.preprocess.white is None and values and len(values) == len(found) and 0 < max(values) < 2**14:
        words = f"{name}: 16-bit images, but no value above {max(values):,} in {len(values)} of them, so that they come"
        say_once(f"{words} out dark; --data.white {2 ** max(values).bit_length() - 1} takes that for white")


def load_stream(dataset: str, kind: str, name: str, options: Options) -> Source:
    """A set that is read in order, shard after shard, and never decoded as a whole."""
    if options.image_size is None:
        raise DataError(f"{dataset} is streamed, so its images have no one size: give data.image_size")
    shards: Mapping[str, Shards]
    if kind == "wds":
        class_names, shards = load_tars(Path(name).expanduser(), options.cache)
    else:
        class_names, rows = load_hub(name, options.root, streaming=True)
        shards = {
            split: hub_shards(f"{dataset} {split}", *part, options.cache / "hfids") for split, part in rows.items()
        }
    refuse_one_class(dataset, class_names)
    shards = usable(dataset, shards)
    if "train" not in shards:
        raise DataError(f"{dataset} has no training split, only {', '.join(shards)}")
    if empty := [split for split, part in shards.items() if not any(part.lengths)]:
        raise DataError(f"{dataset} has no image in its {empty[0]} split")
    splits = {
        split: Stream(
            shards=part,
            chosen=tuple(range(len(part.lengths))),
            classes=len(class_names),
            preprocess=options.preprocess,
            on_bad=options.on_bad,
        )
        for split, part in shards.items()
    }
    mean, std = stream_statistics(splits["train"], options.cache / f"{kind}-train-statistics")
    return Source(class_names=class_names, mean=mean, std=std, **splits)


def first_size(files: ImageFiles) -> tuple[tuple[int, int], str]:
    """Height and width in pixels of the first image that can be read, and its path."""
    errors = []
    for index in range(len(files)):
        try:
            width, height = files.open(index).size
            return (height, width), files.path(index)
        except DataError as error:
            errors.append(str(error))
    raise DataError(f"{errors[0]} (none of {len(errors)} files can be read)")
