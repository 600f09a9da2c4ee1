"""Sets that other libraries name and open: Hugging Face's ``datasets``, TensorFlow Datasets and torchvision's.

``hfds/NAME``, ``tfds/NAME`` and ``torch/NAME`` are read by number, as image files are; ``hfids/NAME`` is streamed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.cache import VERSION, DataError, ImageFiles, file_name, one_line, write_atomically
from data.labels import split_of
from data.stream import progress, remembered, states
from vit.preprocess import open_image
from vit.records import distinct


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredImages(ImageFiles):
    """Images that another library gives by number, and that otherwise are as files are; ``names`` are the numbers.

    Args:
        get: Gives the image of a number: an encoded file, or one that Pillow has opened.
        fingerprint: Of what ``get`` gives.
    """

    get: Callable[[int], BytesIO | Image.Image]  # worker processes can be sent it
    fingerprint: str

    def path(self, index: int) -> str:
        return f"{self.folder}, image {int(self.names[index])}"

    def file(self, index: int) -> BytesIO | Image.Image:
        return self.get(int(self.names[index]))

    def open(self, index: int, *, min_side: int | None = None) -> Image.Image:
        try:
            return open_image(self.file(index), self.preprocess.mode, min_side=min_side, white=self.preprocess.white)
        except Exception as error:  # some libraries decode by themselves, and raise what they like
            raise DataError(f"{self.path(index)}: {one_line(error)}") from None

    @property
    def key(self) -> str:  # type: ignore[override]
        decoding = (self.preprocess.image_size, self.preprocess.mode, self.size_from is None, self.preprocess.white)
        settings = (VERSION, self.fingerprint, self.names.tobytes(), *decoding)
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


Stored = tuple[Callable[[int], BytesIO | Image.Image], Tensor, str]  # image by number, labels (N,), fingerprint


# ---- Hugging Face datasets ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class HubShards:
    """A streamed set of the ``datasets`` library.

    Args:
        name: What it is called.
        rows: Its datasets.IterableDataset, images not decoded.
        image: Column of the images.
        label: Column of the class numbers.
        lengths: Rows in each of its shards.
        fingerprint: Of its files.
    """

    name: str
    rows: Any
    image: str
    label: str
    lengths: tuple[int, ...] = field(repr=False)
    fingerprint: str = field(repr=False)

    def called(self, shard: int) -> str:
        return f"{self.name}, shard {shard}"

    def read(self, shard: int, start: int, stop: int) -> Iterator[tuple[str, bytes, int]]:
        rows = self.rows.shard(num_shards=len(self.lengths), index=shard).skip(start).take(stop - start)
        # Row by row, but not by ``iter(rows)``: in a worker process that would share the rows out once more.
        for place, row in enumerate(rows.iter(batch_size=1), start):
            name = f"{self.called(shard)}, row {place}"
            try:
                image = encoded(row[self.image][0])
            except Exception as error:  # of whichever file system it is on
                raise DataError(f"{name}: {one_line(error)}") from None
            yield name, image, known(row[self.label][0])


def encoded(image: dict[str, Any]) -> bytes:
    """The stored file of an undecoded image of the ``datasets`` library, wherever it is."""
    if image["bytes"] is not None:
        return image["bytes"]
    from datasets.utils.file_utils import xopen

    with xopen(image["path"], "rb") as file:
        return file.read()


def known(number: int | None) -> int:
    """A class number; -1 where it is secret, as other sets write it."""
    return -1 if number is None else number


HubRows = tuple[Any, str, str, str]  # rows with undecoded images, the images' column, the labels', fingerprint


def load_hub(dataset: str, root: Path, *, streaming: bool) -> tuple[tuple[str, ...], dict[str, HubRows]]:
    """Class names, and the rows of each split.

    Args:
        dataset: Name on the Hugging Face hub, or a folder of parquet or image files.
        root: Where downloads are kept.
        streaming: Read in order, without a download; else by row number.

    Raises:
        DataError: If it cannot be had, or has no image and class columns.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{dataset}: needs the package datasets; pip install datasets") from None
    dataset = os.path.expanduser(dataset)
    try:
        cache = str(root / "huggingface")
        found: Any = datasets.load_dataset(dataset, cache_dir=cache, streaming=streaming)
        files: Any = None
        if streaming or os.path.isdir(dataset):
            files = datasets.load_dataset_builder(dataset, cache_dir=cache).config.data_files
    except Exception as error:  # no network, no such name, damaged files: each has its own
        if Path(dataset, "state.json").is_file():  # "please use load_from_disk", says the library
            how = "datasets.load_from_disk(FOLDER).to_parquet('OTHER/train.parquet')"
            raise DataError(f"{dataset}: written by save_to_disk: write it as parquet in a folder, {how}") from None
        raise DataError(f"{dataset}: cannot be loaded ({one_line(error)})") from None
    # Rows that are streamed have no fingerprint; their files do: on this machine by size and time of change, elsewhere
    # by the revision or tag that ``datasets`` found.
    state = json.dumps([(states(part), part.origin_metadata) for part in (files or {}).values()])
    splits: dict[str, HubRows] = {}
    class_names: tuple[str, ...] = ()
    for name, rows in found.items():
        features = rows.features or {}
        image = next((column for column, kind in features.items() if isinstance(kind, datasets.Image)), None)
        label = next((column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
        if image is None or label is None:
            raise DataError(f"{dataset}: needs an image and a class column, has {', '.join(features)}")
        class_names = tuple(features[label].names)
        rows = rows.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
        fingerprint = f"{image} {state}" if streaming else rows._fingerprint
        splits.setdefault(split_of(str(name)), (rows, image, label, fingerprint))
        for file in (files or {}).get(name, ()):
            refuse_other_classes(file, label, class_names)
    return class_names, splits


def refuse_other_classes(file: str, label: str, class_names: tuple[str, ...]) -> None:
    """Refuse a parquet file whose class numbers mean other classes; ``datasets`` reads all by the names in the first.

    Args:
        file: Of the set; what is not on this machine was written as a whole.
        label: Column of the class numbers.
        class_names: Of the set.
    """
    import datasets
    from pyarrow import parquet

    if not (file.endswith(".parquet") and os.path.isfile(file)):
        return
    kind = datasets.Features.from_arrow_schema(parquet.read_schema(file)).get(label)
    for number, (ours, theirs) in enumerate(zip_longest(class_names, getattr(kind, "names", class_names))):
        if ours != theirs:
            same = "give all parquet files the same datasets.ClassLabel(names=...)"
            raise DataError(f"{file}: class {number} is {theirs}, in the files before it {ours}: {same}")


def hub_shards(name: str, rows: Any, image: str, label: str, fingerprint: str, cache: Path) -> HubShards:
    """A streamed split with its rows counted: the first time that takes a pass over them, later none."""
    count = rows.num_shards

    def lengths() -> list[int]:
        parts = (rows.select_columns([label]).shard(num_shards=count, index=shard) for shard in range(count))
        return [sum(1 for _ in part) for part in progress(list(parts), "counting rows")]

    key = json.dumps([name, count, str(rows.info.version), rows.info.dataset_size, fingerprint])
    found = tuple(remembered(cache, key, lengths))
    return HubShards(name=name, rows=rows, image=image, label=label, lengths=found, fingerprint=f"{name} {fingerprint}")


def hub_images(name: str, rows: Any, image: str, label: str, fingerprint: str) -> Stored:
    """A split that was downloaded, by row number."""
    labels = torch.tensor([known(number) for number in rows[label][:]])
    return partial(row_image, rows, image), labels, f"{name} {fingerprint}"


def row_image(rows: Any, image: str, index: int) -> BytesIO:
    """The stored image file of a row."""
    return BytesIO(encoded(rows[index][image]))


# ---- TensorFlow Datasets --------------------------------------------------------------------------------------------


def load_tfds(name: str, root: Path) -> tuple[tuple[str, ...], dict[str, Stored]]:
    """Class names and splits of a set of TensorFlow Datasets, whose image files are copied into the cache once.

    Its array_record files are read without TensorFlow, but only by a process that is not forked from another that did:
    otherwise it hangs or crashes now and then. Hence the copy, made by a process of its own.

    Args:
        name: NAME, NAME/CONFIG or NAME:VERSION; prepared below ``root``, or else it is now.
        root: The folder above NAME, that TensorFlow Datasets calls data_dir.

    Raises:
        DataError: If it cannot be had, or has no image and class columns.
    """
    if not copy_of(name, root).exists():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            process.submit(copy_tfds, name, root).result()
    index = copy_of(name, root)
    stored = json.loads(index.read_text())
    splits: dict[str, Stored] = {}
    for split, (lengths, labels) in stored["splits"].items():
        file = str(index.with_suffix(f".{split}"))
        image = partial(stretch, file, np.cumsum([0, *lengths]))
        splits[split] = image, torch.tensor(labels, dtype=torch.int64), file
    return tuple(stored["class_names"]), splits


def copy_of(name: str, root: Path) -> Path:
    """The index of a set's copy in the cache; its name changes when another version is prepared."""
    infos = sorted((root / name.partition(":")[0]).rglob("dataset_info.json"))
    state = repr([name, *((str(path), path.stat().st_mtime_ns) for path in infos)])
    return root / "cache" / f"tfds_{file_name(name)}-{hashlib.sha256(state.encode()).hexdigest()[:16]}.json"


def copy_tfds(name: str, root: Path) -> None:
    """Prepare a set, if need be, and write of each split its image files, one after the other; then the index."""
    try:
        import tensorflow_datasets
    except ImportError:
        raise DataError(
            f"tfds/{name}: needs tensorflow-datasets; pip install tensorflow-datasets array_record importlib_resources"
        ) from None
    tfds: Any = tensorflow_datasets  # its types say too little and partly the wrong thing
    try:
        builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
        builder.download_and_prepare()
        info, columns = builder.info, dict(builder.info.features)
        rows = builder.as_data_source(deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    except Exception as error:  # no network, no such name, another format, TensorFlow missing: each has its own
        raise DataError(
            f"tfds/{name}: cannot be had ({one_line(error)}); where TensorFlow is installed, "
            f"'tfds build {name} --file_format=array_record --data_dir={root}' prepares it"
        ) from None
    order = [key for key in (*(info.supervised_keys or ()), *columns) if isinstance(key, str) and key in columns]
    image = next((key for key in order if isinstance(columns[key], tfds.features.Image)), None)
    label = next((key for key in order if isinstance(columns[key], tfds.features.ClassLabel)), None)
    if image is None or label is None:
        raise DataError(f"tfds/{name}: needs an image and a class column, has {', '.join(columns)}")
    wanted = tfds.features.FeaturesDict({image: columns[image], label: columns[label]})
    undecoded = {image: tfds.decode.SkipDecoding()}
    index = copy_of(name, root)
    splits: dict[str, tuple[list[int], list[int]]] = {}

    def files(records: Any, split: str) -> Iterator[bytes]:
        lengths, labels = splits[split] = [], []
        for number in progress(list(range(len(records))), f"copying {split}"):
            try:
                row = wanted.deserialize_example_np(records[number], decoders=undecoded)
            except Exception as error:  # a damaged file
                raise DataError(f"tfds/{name} {split}, image {number}: {one_line(error)}") from None
            lengths.append(len(row[image]))
            labels.append(int(row[label]))
            yield row[image]

    for split, records in rows.items():
        write_atomically(index.with_suffix(f".{split_of(str(split))}"), files(records, split_of(str(split))))
    content = {"class_names": columns[label].names, "splits": splits}
    write_atomically(index, [json.dumps(content).encode()])


def stretch(file: str, edges: np.ndarray, index: int) -> BytesIO:
    """The image file that is a stretch of a larger one: from one of these edges, in bytes, to the next."""
    start, stop = edges[index : index + 2].tolist()
    with open(file, "rb") as whole:
        whole.seek(start)
        return BytesIO(whole.read(stop - start))


# ---- torchvision ----------------------------------------------------------------------------------------------------

TEST = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")  # their second split; of others it is val


def load_torch(name: str, root: Path) -> tuple[tuple[str, ...], dict[str, Stored]]:
    """Class names and splits of a set that torchvision downloads, by timm's name for it.

    Raises:
        DataError: If there is none of that name, or it cannot be had.
    """
    from timm.data.dataset_factory import create_dataset

    name = name.lower()  # as timm reads it
    try:
        found: dict[str, Any] = {
            split: create_dataset(f"torch/{name}", root=str(root), split=theirs, download=True)
            for split, theirs in (("train", "train"), ("test" if name in TEST else "val", "validation"))
        }
        classes = {
            split: [c[0] if isinstance(c, tuple) else str(c) for c in part.classes] for split, part in found.items()
        }
        labels = {split: torch.as_tensor(part.targets, dtype=torch.int64) for split, part in found.items()}
    except Exception as error:  # no network, no such name (an AssertionError), wrong checksum
        raise DataError(f"torch/{name}: cannot be had ({one_line(error)})") from None
    names = classes["train"]
    for split, theirs in classes.items():
        if theirs != names:  # whose numbers mean something else: of folders each split counts its own
            odd = min(set(names) ^ set(theirs), default="the order")
            raise DataError(
                f"torch/{name}: {split} has other classes than train ({odd}); of a folder, give --data.dataset FOLDER "
                "itself: there the classes are those of train, and a split may lack some"
            )
    if any(part.ndim != 1 for part in labels.values()):  # QMNIST's say who wrote the digit too
        labels = {split: part[:, 0] for split, part in labels.items()}
    return distinct(names), {  # of ImageNet two are called crane
        split: (partial(item_image, part), labels[split], f"torch/{name} {split} {len(part)}")
        for split, part in found.items()
    }


def item_image(items: Any, index: int) -> Image.Image:
    """The image of a pair (image, label)."""
    return items[index][0]
