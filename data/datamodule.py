"""Images of one data set, in batches: uint8 up to the device, normalised and augmented there."""

import hashlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data.augment import DRAWS, Augment, epoch_key, uniform
from data.cache import OnBad, say_once, start_method
from data.labels import refuse_among
from data.sources import DataError, Source, Split, Stream, load_source, stratified_split
from data.stream import Batch, StreamDataset, StreamOrder, even
from vit.preprocess import Preprocess, usable_cores

CPU = torch.device("cpu")
MOST_WORKERS = 32  # processes that decode; more only take memory
SHARE = 4  # a split may take a quarter of the device's free memory; the rest is for the model and its activations


class Draw(NamedTuple):
    """Which images make one batch, and in which epoch: all that augmentation needs to know."""

    epoch: int
    indices: Tensor  # (B,) views: image + turn * images in the split, where turn counts its repetitions in the epoch


class SplitDataset(Dataset):
    """Whole batches of a split: slices of a tensor, where that lies, or files decoded in a worker."""

    def __init__(self, split: Split, subset: Tensor | None = None):
        self.split = split
        self.subset = torch.arange(len(split.labels)) if subset is None else subset

    def __len__(self) -> int:
        return len(self.subset)

    @property
    def device(self) -> torch.device:
        """Where the batches are; draws have to be there too."""
        return self.subset.device

    def __getitem__(self, draw: Draw) -> Batch:
        where = self.subset[draw.indices % len(self.subset)]
        return Batch(self.split.images[where], self.split.labels[where], draw.indices, draw.epoch)


class TrainOrder(Sampler[Draw]):
    """Shuffled batches of one rank, a function of (seed, epoch) alone; starts in mid-epoch when a run is resumed.

    The last, partial batch of an epoch is left out (another part of the images each time).

    Args:
        size: Images in the data set.
        batch_size: Images in a batch of one rank; at most the rank's share of ``size`` is used.
        seed: Seed of the order.
        rank: This process.
        world_size: Number of processes; together they see each image at most once an epoch.
        position: Called at the start of an epoch, gives (epoch, batches to skip).
        balance: Class numbers (N,), to show the classes equally often; none to show every image equally often.
        device: Where the images are; an epoch's whole order goes there at once, so that a step sends nothing.
    """

    def __init__(
        self,
        *,
        size: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        position: Callable[[], tuple[int, int]],
        balance: Tensor | None = None,
        device: torch.device = CPU,
    ):
        self.size, self.seed, self.rank, self.world_size = size, seed, rank, world_size
        self.batch_size = min(batch_size, size // world_size)
        self.position = position
        self.balance, self.device = balance, device

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Draw]:
        epoch, skip = self.position()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.size, generator=generator)
        if self.balance is not None:
            order = balanced(self.balance, generator)[order]
        order = order.to(self.device, non_blocking=True)
        for batch in range(skip, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield Draw(epoch, order[start : start + self.batch_size])


def balanced(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Views (N,) of N images in which every class comes equally often, and every image of a class too, to within one.

    A large class is represented by another part of its images each time; those of a small one come again and again, as
    other views.

    Args:
        labels: Class numbers (N,).
        generator: Of the draw.
    """
    classes = labels.unique()
    shares = pairwise(even(0, len(labels), len(classes)))
    views = []
    for label, (start, stop) in zip(classes[torch.randperm(len(classes), generator=generator)], shares, strict=True):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        turns = torch.arange(stop - start)
        views.append(members[turns % len(members)] + turns // len(members) * len(labels))
    return torch.cat(views)


class EvalOrder(Sampler[Draw]):
    """Each image once over all ranks, none twice, so that every number of ranks measures the same.

    All have as many batches, the last one of some perhaps empty: where weights are shared out (FSDP), a rank that has
    one more would wait for the others for ever.

    Args:
        size: Images in the split.
        batch_size: Largest number of images in a batch of one rank.
        rank: This process.
        world_size: Number of processes.
        mixed: In an order drawn once and for all: for the first batches alone, which would be of the first classes.
        device: Where the images are.
    """

    def __init__(
        self,
        *,
        size: int,
        batch_size: int,
        rank: int,
        world_size: int,
        mixed: bool = False,
        device: torch.device = CPU,
    ):
        count = max(1, -(-size // (world_size * batch_size)))
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0)) if mixed else torch.arange(size)
        chunks = order.to(device)[rank::world_size].split(batch_size)
        self.chunks = (*chunks, *[chunks[0][:0]] * (count - len(chunks)))

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Draw]:
        return (Draw(0, chunk) for chunk in self.chunks)


def batches(split: Split | Stream) -> SplitDataset | StreamDataset:
    """A split in its own order."""
    return StreamDataset(split) if isinstance(split, Stream) else SplitDataset(split)


def where(dataset: str) -> str:
    """A data set's name, which is the same for all ways to write a folder."""
    folder = Path(dataset).expanduser()
    return str(folder.resolve()) if folder.exists() else dataset


def home(device: torch.device, size: int, free: int) -> torch.device:
    """Where a split's images are kept while a model trains on this device: there, or in the host's memory.

    Args:
        device: Of the model.
        size: Bytes of the images.
        free: Bytes of the device that nobody uses.
    """
    return device if device.type != "cpu" and SHARE * size <= free else CPU


def free_memory(device: torch.device) -> int:
    """Bytes of an accelerator that nobody uses; 0 where it does not say."""
    tell = getattr(torch.get_device_module(device), "mem_get_info", None)
    return tell(device)[0] if tell else 0


def ignore_signals(worker: int) -> None:
    """Signals go to every process of a run; the trainer decides, and still needs its workers to end a step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class ImageDataModule(LightningDataModule):
    """A data set of images in classes.

    Args:
        dataset: ``digits``, ``cifar10``, ``cifar100``; a folder: ``train/CLASS/*.jpg`` with optional ``val/`` and
            ``test/``, or just ``CLASS/*.jpg``; several folders with commas between; a table ``FILE.csv`` (``.tsv``,
            ``.parquet``) with columns path, label and perhaps split; ``torch/NAME``, ``hfds/NAME``; streamed:
            ``hfids/NAME``, ``wds/FOLDER`` of tar files; ``tfds/NAME`` (docs/data.md).
        root: Where downloads and decoded copies are kept.
        image_size: Height and width of the model's input, in pixels; none for the images' own.
        batch_size: Images in a batch of one device.
        val_fraction: Share of the training images held out for validation where the data set brings none, in [0, 1];
            0 trains on all of them, for a last run whose settings are chosen: nothing is measured then, the last
            weights are kept, and the temperature stays 1. With 1 ``validate`` measures on all images of a set.
        seed: Of the order and the augmentation; the held-out images are the same for every seed.
        num_workers: Processes that decode images; none for one a core, shared between the processes that train here.
            Sets that fit in memory are decoded once and need none after that.
        augment: Random changes to training images.
        on_bad: What to do about image files that cannot be read, which are looked for before the training: ``fail`` or
            ``skip``; they are listed in a file of the cache.
        white: Value that is white in grey images of more than 8 bits, such as 4095 of a 12-bit camera; none for 65535
            in 16 bits.
        balance: Show the classes equally often in training, however many images they have, and choose the best weights
            by val/balanced_acc.
        compile: Compile the augmentation, on a GPU.
    """

    def __init__(
        self,
        *,
        dataset: str,
        root: str = "datasets",
        image_size: int | tuple[int, int] | None = None,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int | None = None,
        augment: Augment = Augment(),  # noqa: B008 (frozen)
        on_bad: OnBad = "fail",
        white: float | None = None,
        balance: bool = False,
        compile: bool = False,
    ):
        super().__init__()
        if batch_size < 1:
            raise DataError(f"data.batch_size must be at least 1, got {batch_size}")
        if num_workers is not None and num_workers < 0:
            raise DataError(f"data.num_workers must be at least 0, got {num_workers}")
        if not 0 <= val_fraction <= 1:
            raise DataError(f"data.val_fraction must be in [0, 1], got {val_fraction}")
        self.dataset, self.batch_size, self.val_fraction, self.seed = dataset, batch_size, val_fraction, seed
        self.num_workers, self.augment, self.balance, self.compile = num_workers, augment, balance, compile
        self.resumed = 0  # optimiser steps done when this run was resumed
        self.device = CPU  # of the model
        self.copies: dict[tuple[Split, torch.device], Split] = {}  # what lies on it
        self.white = white
        self._how: Any = {"root": root, "image_size": image_size, "num_workers": self.workers, "on_bad": on_bad}

    # The facts that the model needs; train.py links them to its arguments.

    @cached_property
    def source(self) -> Source:
        return load_source(self.dataset, white=self.white, **self._how)

    @property
    def workers(self) -> int:
        """How many processes decode for this one."""
        if self.num_workers is not None:
            return self.num_workers
        return max(1, min(MOST_WORKERS, usable_cores()) // (self.trainer.num_devices if self.trainer else 1))

    @property
    def class_names(self) -> list[str]:
        return list(self.source.class_names)

    @property
    def mean(self) -> list[float]:
        return list(self.source.mean)

    @property
    def std(self) -> list[float]:
        return list(self.source.std)

    @property
    def image_size(self) -> list[int]:
        return [int(side) for side in self.source.train.shape[-2:]]

    @cached_property
    def preprocess(self) -> Preprocess:
        height, width = self.image_size
        return Preprocess(image_size=(height, width), mean=self.source.mean, std=self.source.std, white=self.white)

    def prepare_data(self) -> None:
        _ = self.source  # downloads and decodes; one process a node does, and the others find it done

    def setup(self, stage: str | None = None) -> None:
        if stage == "fit":
            self.resumed = 0  # until its checkpoint, if there is one, is restored
            vars(self).pop("preprocess", None)  # which an earlier one may have brought
        if self.trainer is not None:
            self.device = self.trainer.strategy.root_device
            if self.trainer.world_size > 1:  # Lightning's default: it would share out once more what is shared out
                self.trainer._accelerator_connector.use_distributed_sampler = False
            if stage == "fit" and (folder := Path(self.dataset).expanduser()).is_dir():
                refuse_among([folder], self.trainer.default_root_dir, "trainer.default_root_dir")
        train, val, test = self.source.train, self.source.val, self.source.test
        self.train: SplitDataset | Any  # Any: StreamDataset, as for the others
        self.val: Any = None if val is None else batches(val)
        self.test: SplitDataset | Any | None = None if test is None else batches(test)
        if val is None and self.val_fraction == 1:
            if stage == "fit":
                raise DataError(f"{self.dataset}: data.val_fraction 1 leaves no image to train on; it is for validate")
            self.val = batches(train)
        if isinstance(train, Stream):
            if self.balance:
                raise DataError(f"{self.dataset}: data.balance needs the labels of all images; a stream has them not")
            if self.val is None and self.val_fraction:
                train, val = train.hold_out(self.val_fraction)
                self.val = batches(val)
            self.train = StreamDataset(train, seed=self.seed)
        elif self.val is None and self.val_fraction:
            kept, held_out = stratified_split(train.labels, self.val_fraction, seed=0)  # the same for every run's seed
            if not len(held_out):
                hint = "give more, or hold none out (data.val_fraction 0)"
                raise DataError(f"{self.dataset}: one image a class is too few to train and validate; {hint}")
            self.train, self.val = SplitDataset(train, kept), SplitDataset(train, held_out)
            if stage == "fit" and (ones := (train.labels.bincount() == 1).nonzero().flatten().tolist()):
                names = ", ".join(self.class_names[one] for one in ones[:5]) + ", ..." * (len(ones) > 5)
                say_once(f"{self.dataset}: validation has no image of classes with one alone, which trains: {names}")
        else:
            self.train = SplitDataset(train)

    def teardown(self, stage: str) -> None:
        self.copies.clear()

    def near(self, dataset: SplitDataset) -> SplitDataset:
        """The data set with its pixels on the model's device if they fit there, copied once for all who share them."""
        split, key = dataset.split, (dataset.split, self.device)
        if not isinstance(split.images, Tensor):
            return dataset
        if key not in self.copies:
            place = home(self.device, split.images.nbytes, free_memory(self.device))
            self.copies[key] = replace(split, images=split.images.to(place), labels=split.labels.to(place))
        copy = self.copies[key]
        return SplitDataset(copy, dataset.subset.to(copy.labels.device))

    @property
    def stage(self) -> str | None:
        """What the trainer does: ``fit``, ``validate``, ``test``; none without one."""
        return self.trainer.state.fn if self.trainer else None

    def position(self) -> tuple[int, int]:
        """(epoch, batches of it done), from the only counter that survives every kind of restart: optimiser steps."""
        trainer = self.trainer
        if trainer is None:
            return 0, 0
        # Workers ask for their first batches before the trainer has restored its step.
        epoch, steps = divmod(max(trainer.global_step, self.resumed), self.steps_an_epoch(trainer))
        return epoch, steps * trainer.accumulate_grad_batches

    def steps_an_epoch(self, trainer: Trainer) -> int:
        """Optimiser steps that this trainer takes in an epoch; the last may be of fewer batches."""
        batches = max(1, int(min(len(self.order), trainer.num_training_batches)))  # trainer.limit_train_batches
        return -(-batches // trainer.accumulate_grad_batches)

    def state_dict(self) -> dict[str, Any]:
        steps = self.trainer.global_step if self.trainer else 0
        return {"steps": steps, "dataset": self.dataset, "validation": self.held_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.stage == "fit":  # and not a measurement, which a training may follow
            self.resumed = state_dict["steps"]
        self.compare_training(state_dict)

    def compare_training(self, before: dict[str, Any]) -> None:
        """Say so where a model was trained on images that validate now.

        Args:
            before: Of its training: ``dataset`` and ``validation``, what was held out then; older files lack that.
        """
        changed = "validation" in before and self.held_out not in (None, before["validation"])
        if changed and self.stage != "test" and where(str(before.get("dataset"))) == where(self.dataset):
            say_once(
                f"{self.dataset}: other images are held out than before, as the data or data.val_fraction changed; the "
                "model has trained on some of them, and validation finds it better than it is"
            )

    @property
    def held_out(self) -> str | None:
        """Fingerprint of the images that are held out of the training images; none where the set has its own."""
        if self.val is None or self.source.val is not None:
            return None
        if isinstance(self.val, StreamDataset):
            stream = self.val.stream
            return hashlib.sha256(repr((stream.chosen, stream.shards.lengths)).encode()).hexdigest()[:16]
        chosen, split = self.val.subset.cpu().numpy(), self.val.split
        digest = hashlib.sha256(chosen.tobytes() + b"%d" % len(split.labels))
        if split.files is not None:
            digest.update(split.files.names[chosen].tobytes())
        return digest.hexdigest()[:16]

    def train_dataloader(self) -> DataLoader:
        rank = self._rank()
        if len(self.train) < (count := rank["world_size"]):
            raise DataError(
                f"{len(self.train)} training images cannot be shared by {count} processes: use fewer devices"
            )
        places = {"size": len(self.train), "batch_size": self.batch_size, "position": self.position, **rank}
        if isinstance(self.train, StreamDataset):
            self.order = StreamOrder(**places, workers=self.workers)
            return self._loader(self.train, self.order)
        labels = self.train.split.labels[self.train.subset] if self.balance else None
        dataset = self.near(self.train)
        self.order = TrainOrder(**places, seed=self.seed, balance=labels, device=dataset.device)
        return self._loader(dataset, self.order)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if self.val is None and self.stage != "fit":
            raise DataError(f"{self.dataset}: has no validation images, and data.val_fraction 0 holds none out")
        if self.val is None:
            return []
        if self.stage == "validate" and isinstance(self.val, SplitDataset):
            say_once(f"{self.dataset}: {self.told_of_val()}")
        return self._eval_loader(self.val, "limit_val_batches")

    def told_of_val(self) -> str:
        """Which images validate."""
        count, all_of = len(self.val), len(self.source.train)
        if self.source.val is not None:
            return f"{count:,} images, its own for validation"
        if count < all_of:
            hint = "to measure on all images, of a data set that the model has not seen: --data.val_fraction 1"
            return f"{count:,} of {all_of:,} images, those held out ({hint})"
        return f"all {count:,} images" + (", but for its test images" if self.test is not None else "")

    def test_dataloader(self) -> DataLoader:
        if self.test is None:
            raise DataError(
                f"{self.dataset}: has no test images; put class folders into train/ and test/, or use `validate`, "
                "which measures on those held out"
            )
        return self._eval_loader(self.test, "limit_test_batches")

    def _eval_loader(self, dataset: SplitDataset | StreamDataset, limited_by: str) -> DataLoader:
        places = {"size": len(dataset), "batch_size": 2 * self.batch_size, **self._rank()}
        if isinstance(dataset, StreamDataset):
            return self._loader(dataset, StreamOrder(**places, workers=self.workers, position=lambda: (0, 0)))
        dataset = self.near(dataset)
        limit = getattr(self.trainer, limited_by, 1.0)  # a number of batches, or the share of them
        mixed = isinstance(limit, int) or limit < 1
        return self._loader(dataset, EvalOrder(**places, mixed=mixed, device=dataset.device))

    def _rank(self) -> dict[str, int]:
        trainer = self.trainer
        return {"rank": trainer.global_rank if trainer else 0, "world_size": trainer.world_size if trainer else 1}

    def _loader(self, dataset: SplitDataset | StreamDataset, order: Sampler) -> DataLoader:
        in_memory = isinstance(dataset, SplitDataset) and isinstance(dataset.split.images, Tensor)
        workers = 0 if in_memory else self.workers
        on_device = isinstance(dataset, SplitDataset) and dataset.device.type != "cpu"
        return DataLoader(
            dataset,
            sampler=order,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=start_method(workers),
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda" and not on_device,  # so that the host need not wait for the copy
            worker_init_fn=ignore_signals,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self.trainer is None or not self.trainer.training:
            return batch._replace(images=self.preprocess.normalize(batch.images))
        return self.augmented(batch, self.done(batch.epoch))

    def done(self, epoch: int) -> float:
        """Share of the trainer's run that is over when an epoch begins, in [0, 1]."""
        trainer = self.trainer
        assert trainer is not None
        epochs = [] if trainer.max_epochs in (None, -1) else [float(trainer.max_epochs)]
        if trainer.max_steps != -1:
            epochs.append(trainer.max_steps / self.steps_an_epoch(trainer))
        return epoch / min(epochs) if epochs else 0.0

    def augmented(self, batch: Batch, done: float = 0.0) -> Batch:
        """What a training step sees of a batch of uint8 images, on their device.

        Args:
            batch: As it comes from the loader.
            done: Share of the run that is over when its epoch begins, in [0, 1].
        """
        mixed = len(self.class_names) if self.augment.mixes(done) else 0
        images, labels = self.views(
            *batch[:3], epoch_key(self.seed, batch.epoch), augment=self.augment, preprocess=self.preprocess, mixed=mixed
        )
        return batch._replace(images=images, labels=labels)

    @cached_property
    def views(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """``make_views``, perhaps compiled: three hundred small operations would keep a GPU waiting."""
        if self.compile and self.device.type == "cuda":
            return torch.compile(make_views, dynamic=False)
        return make_views


def make_views(
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    key: Tensor,
    *,
    augment: Augment,
    preprocess: Preprocess,
    mixed: int,
) -> tuple[Tensor, Tensor]:
    """Random views of images, and their labels.

    Args:
        images: uint8 (B, C, H, W).
        labels: Class numbers, int64 (B,).
        indices: Which images these are, int64 (B,).
        key: Of the run and the epoch, ().
        augment: How much is changed.
        preprocess: What normalises.
        mixed: Number of classes where images are mixed, else 0.

    Returns:
        Normalised images (B, C, H, W), and their labels; shares of the classes (B, classes) where images are mixed.
    """
    draws = uniform(key, indices, DRAWS)
    images = augment(preprocess.normalize(augment.pixels(images, draws)), draws)
    return augment.mix(images, labels, draws, classes=mixed) if mixed else (images, labels)
