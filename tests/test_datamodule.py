"""Who sees which image when: once an epoch over all ranks, the same after a restart, and each once in evaluation."""

import io
import os
import tarfile
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data.cache
import data.datamodule
from data.augment import DRAWS, Augment, epoch_key, uniform
from data.datamodule import Batch, Draw, EvalOrder, ImageDataModule, TrainOrder, free_memory, home, make_views
from data.sources import DataError

START = (0, 0)


def order(rank: int = 0, world_size: int = 1, position=START, size: int = 103, batch_size: int = 12, seed: int = 0):
    made = TrainOrder(
        size=size, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, position=lambda: position
    )
    return [draw.indices.tolist() for draw in made]


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


@pytest.fixture(scope="module")
def digits() -> ImageDataModule:
    module = ImageDataModule(dataset="digits", batch_size=100)
    module.setup()
    return module


@pytest.fixture
def folder(tmp_path) -> Path:
    """26 colour images in two classes, no two alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (26, 8, 6, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = tmp_path / "images" / ("cat", "dog")[i % 2]
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / f"{i:02}.png")
    return tmp_path / "images"


def write_tars(folder: Path, tars: Path) -> None:
    """The folder's images in shards of up to six: 20 to train on, and one shard that is held out."""
    tars.mkdir()
    files = sorted(folder.glob("*/*.png"), key=lambda path: path.name)
    for shard, first in enumerate(range(0, len(files), 6)):
        with tarfile.open(tars / f"train-{shard}.tar", "w") as tar:
            for path in files[first : first + 6]:
                tar.add(path, path.name)
                label = tarfile.TarInfo(f"{path.stem}.cls")
                label.size = 1
                tar.addfile(label, io.BytesIO(b"0" if path.parent.name == "cat" else b"1"))


# The order of training


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_no_image_twice_an_epoch(world_size):
    seen = flat([batch for rank in range(world_size) for batch in order(rank, world_size)])
    assert len(seen) == len(set(seen)) == 103 // (12 * world_size) * 12 * world_size
    assert set(seen) <= set(range(103))


def test_number_of_ranks_does_not_change_the_batches():
    """With the same images a step, each step has the same ones, so more devices are the same training."""
    one = [set(batch) for batch in order(batch_size=12)]
    for world_size in (2, 3, 4):
        ranks = [order(rank, world_size, batch_size=12 // world_size) for rank in range(world_size)]
        assert [set(flat(list(batches))) for batches in zip(*ranks, strict=True)] == one


def test_order_differs_by_epoch_and_seed_and_is_repeatable():
    orders = [order(position=(epoch, 0), seed=seed) for epoch in range(3) for seed in range(3)]
    assert len({tuple(flat(batches)) for batches in orders}) == 9
    assert order(position=(2, 0), seed=1) == orders[7]


def test_every_image_has_its_turn():
    """What an epoch leaves out is another part each time."""
    left_out = [set(range(103)) - set(flat(order(position=(epoch, 0)))) for epoch in range(8)]
    assert set.intersection(*left_out[:4]) == set()
    assert all(a != b for a, b in pairwise(left_out))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("skip", [0, 1, 3, 4])
def test_resumed_order_is_the_tail(world_size, skip):
    for rank in range(world_size):
        assert order(rank, world_size, (5, skip)) == order(rank, world_size, (5, 0))[skip:]


def test_small_sets_are_one_batch():
    assert [len(batch) for batch in order(size=7, batch_size=12)] == [7]
    assert [len(batch) for batch in order(0, 2, size=7, batch_size=12)] == [3]


def test_more_processes_than_images_is_one_line():
    module = ImageDataModule(dataset="digits")
    module.setup()
    module.trainer = SimpleNamespace(global_rank=0, world_size=2000)  # type: ignore[assignment]
    with pytest.raises(DataError, match=f"{len(module.train)} training images cannot be shared by 2000 processes"):
        module.train_dataloader()


def test_lightning_does_not_share_out_once_more_what_is_shared_out():
    """Which is its default where a program of the user's makes the trainer: half of the images would be left out."""
    module = ImageDataModule(dataset="digits")
    module.trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, barebones=True)
    module.setup()
    loaders: list[Any] = [module.train_dataloader(), module.val_dataloader(), module.test_dataloader()]
    assert not any(map(module.trainer._data_connector._requires_distributed_sampler, loaders))


@pytest.mark.parametrize("accumulate", [1, 2, 3, 8])
def test_position_counts_as_the_trainer_steps(accumulate):
    """A step is taken after every few batches and at the end of an epoch."""
    module = ImageDataModule(dataset="digits")
    module.order = TrainOrder(size=103, batch_size=12, seed=0, rank=0, world_size=1, position=module.position)
    expected, steps = {0: (0, 0)}, 0
    for epoch in range(3):
        for batch in range(1, 9):
            if batch % accumulate == 0 or batch == 8:
                steps += 1
                expected[steps] = (epoch, batch) if batch < 8 else (epoch + 1, 0)
    for steps, position in expected.items():
        module.trainer = SimpleNamespace(  # type: ignore
            global_step=steps, accumulate_grad_batches=accumulate, num_training_batches=float("inf")
        )
        assert module.position() == position


# A restart, in Lightning's hands


class Recorder(LightningModule):
    """Writes down which images it is shown, by their pixels after augmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int], float]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append((batch.epoch, batch.indices.tolist(), float(batch.images.double().sum())))
        return self.weight * batch.images.mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches  # as our classifier does, before a checkpoint is restored
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize("kind", ["memory", "files", "shards"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_restarted_run_sees_what_the_whole_run_would_have(folder, tmp_path, monkeypatch, kind, accumulate):
    monkeypatch.setattr(data.cache, "LIMIT", 2**30 if kind == "memory" else 0)  # 0: files, decoded by workers
    workers, dataset = {"memory": (0, folder), "files": (1, folder), "shards": (2, f"wds/{tmp_path}/tars")}[kind]
    if kind == "shards":
        write_tars(folder, tmp_path / "tars")

    def seen(checkpoint: str | None = None) -> list[Any]:
        every_step = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=3,
            accumulate_grad_batches=accumulate,
            limit_val_batches=0,
            use_distributed_sampler=False,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[every_step],
        )
        source = {"dataset": str(dataset), "root": str(tmp_path / "cache"), "num_workers": workers}
        options: dict[str, Any] = {"image_size": (8, 6), "batch_size": 4, "val_fraction": 0.2}
        module = ImageDataModule(**source, **options, augment=Augment(translate=0.2, flip=0.5))
        recorder = Recorder()
        trainer.fit(recorder, module, ckpt_path=checkpoint, weights_only=True)
        return recorder.seen

    whole = seen()
    assert len(whole) == 3 * 5
    assert {epoch for epoch, _, _ in whole} == {0, 1, 2}
    steps = -(-5 // accumulate)
    for step in (1, steps, steps + 1):  # in mid-epoch, at an epoch's end, and in mid-epoch again
        epoch, done = divmod(step, steps)
        assert seen(str(tmp_path / "saved" / f"step={step}.ckpt")) == whole[5 * epoch + done * accumulate :]


# Evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 5, 21, 24, 143])
def test_evaluation_sees_every_image_once(size, world_size):
    orders = [EvalOrder(size=size, batch_size=10, rank=rank, world_size=world_size) for rank in range(world_size)]
    chunks = [draw.indices for made in orders for draw in made]
    assert sorted(torch.cat(chunks).tolist()) == list(range(size))
    assert max(len(chunk) for chunk in chunks) <= 10
    assert all(len(list(made)) == len(made) > 0 for made in orders)  # a rank without images takes part all the same
    assert len({len(made) for made in orders}) == 1  # ranks that share out weights (FSDP) go on together


@pytest.mark.parametrize(("limit", "classes"), [(1, {0, 1}), (0.5, {0, 1}), (1.0, {0})])
def test_a_part_of_the_batches_is_of_all_classes(limit, classes, folder, tmp_path):
    """Always the same part, for every number of ranks; the whole is in the order of the files."""
    module = ImageDataModule(dataset=str(folder), root=str(tmp_path / "cache"), val_fraction=0.4, batch_size=3)
    module.setup()
    seen = []
    for ranks in (1, 2):
        module.batch_size = 2 // ranks
        loaders = []
        for rank in range(ranks):
            fitting = {"state": SimpleNamespace(fn="fit"), "limit_val_batches": limit}
            module.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, **fitting)  # type: ignore[assignment]
            loaders.append(module.val_dataloader())
        first: list[Batch] = [next(iter(loader)) for loader in loaders]
        seen.append({index for batch in first for index in batch.indices.tolist()})
        assert {label for batch in first for label in batch.labels.tolist()} == classes
    assert seen[0] == seen[1]
    assert len(seen[0]) == 4


def test_loaders_cover_the_splits(digits):
    for loader, split in ((digits.val_dataloader(), digits.val), (digits.test_dataloader(), digits.test)):
        batches = list(loader)
        where = split.subset
        assert torch.equal(torch.cat([batch.images for batch in batches]), split.split.images[where])
        assert torch.equal(torch.cat([batch.labels for batch in batches]), split.split.labels[where])


def test_training_batches_hold_the_images_they_name(digits):
    batch = next(iter(digits.train_dataloader()))
    where = digits.train.subset[batch.indices]
    assert batch.images.dtype == torch.uint8
    assert len(batch.labels) == 100
    assert torch.equal(batch.images, digits.source.train.images[where])
    assert torch.equal(batch.labels, digits.source.train.labels[where])


# Where the images are

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
EVERYTHING = Augment(translate=0.2, flip=0.5, rotate=9, scale=0.1, color=0.3, erase=0.5, crop=0.5, policy=1, mixup=0.5)


@pytest.mark.parametrize(
    ("device", "size", "free", "place"),
    [(GPU, 25, 100, GPU), (GPU, 26, 100, CPU), (GPU, 1, 0, CPU), (CPU, 25, 100, CPU), (CPU, 0, 0, CPU)],
)
def test_images_move_to_the_device_if_they_take_a_quarter_of_what_is_free(device, size, free, place):
    assert home(device, size, free) == place


def test_on_a_cpu_images_stay_where_they_are(digits):
    """Memory-mapped, that is: no copy."""
    assert free_memory(CPU) == 0
    for split, loader in ((digits.train, digits.train_dataloader()), (digits.val, digits.val_dataloader())):
        dataset: Any = loader.dataset
        assert dataset.split.images.data_ptr() == split.split.images.data_ptr()
        assert not loader.pin_memory


@pytest.mark.parametrize("balance", [False, True])
def test_batches_are_slices_by_view(balance):
    """Also where an image comes more than once an epoch: the number of such a view is beyond that of the images."""
    module = ImageDataModule(dataset="digits", batch_size=100, balance=balance)
    module.setup()
    module.train.subset = module.train.subset[module.source.train.labels[module.train.subset].sort().indices[:300]]
    beyond = 0
    for batch in module.train_dataloader():
        where = module.train.subset[batch.indices % 300]
        beyond += int((batch.indices >= 300).sum())
        assert torch.equal(batch.images, module.source.train.images[where])
        assert torch.equal(batch.labels, module.source.train.labels[where])
    assert (beyond > 0) == balance


class Traffic(TorchDispatchMode):
    """Fails where the host waits for the device, and notes what is copied from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[tuple[int, bool]] = []  # numbers, and whether the host waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))  # .item(), nonzero() and the like fail here: fake tensors have no values
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if len({x.device.type for x in tensors}) > 1:
            if func.overloadpacket.__name__ in ("_to_copy", "copy_"):
                self.copied.append((tensors[0].numel(), not (kwargs or {}).get("non_blocking")))
            else:  # a number of the host is handed over with the kernel, all else would be copied
                assert all(x.ndim == 0 for x in tensors if x.device.type == "cpu"), func
                assert func.overloadpacket.__name__ != "where", "where() copies numbers of the host, and waits"
        return result


@pytest.fixture
def on_gpu(monkeypatch) -> ImageDataModule:
    """A data module that believes in a GPU; to be used with fake tensors."""
    monkeypatch.setattr(data.datamodule, "free_memory", lambda device: 2**40)
    module = ImageDataModule(dataset="digits", batch_size=100, augment=EVERYTHING)
    module.setup()
    assert module.preprocess
    module.device = GPU
    return module


def test_on_a_gpu_a_step_sends_no_image_and_waits_for_nothing(on_gpu):
    with FakeTensorMode(allow_non_fake_inputs=True), Traffic() as traffic:
        loader: Any = on_gpu.train_dataloader()
        assert [size for size, _ in traffic.copied] == [1438 * 64, 1438, 1295]  # pixels, labels, which to train on
        draws = iter(loader.sampler)
        first = next(draws)
        assert traffic.copied[3:] == [(1295, False)]  # the epoch's order
        traffic.copied.clear()
        for draw in (first, next(draws)):
            batch = on_gpu.transfer_batch_to_device(loader.dataset[draw], GPU, 0)
            assert traffic.copied == []
            seen = on_gpu.augmented(batch)
            assert traffic.copied == [(1, False)] * 2  # mean and standard deviation
            traffic.copied.clear()
            assert (seen.images.device, seen.labels.device, seen.indices.device) == (GPU, GPU, GPU)
            assert (seen.images.shape, seen.labels.shape) == ((100, 1, 8, 8), (100, 10))


def test_compiled_views_are_the_same_and_compiled_once_for_all_epochs(digits, monkeypatch):
    """And once more when mixing ends. Traced whole and called in PyTorch, so that no compiler is needed here."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # all changes for all images
    augment = replace(EVERYTHING, cutmix=0.5, mix_until=0.6)
    modules = [ImageDataModule(dataset="digits", augment=augment, compile=compile) for compile in (False, True)]
    for module in modules:
        module.setup()
        module.device = GPU if module.compile else CPU
        assert (module.views is make_views) != module.compile
    batch = digits.train[Draw(0, torch.arange(8))]
    batch = batch._replace(images=batch.images.clone())
    for epoch in range(5):
        plain, compiled = (module.augmented(batch._replace(epoch=epoch), epoch / 5) for module in modules)
        assert plain.labels.ndim == (2 if epoch < 3 else 1)
        for ours, theirs in zip(plain[:3], compiled[:3], strict=True):
            assert torch.equal(ours, theirs)
    assert counter.frame_count == 2


def test_on_a_gpu_training_and_validation_share_one_copy(on_gpu):
    with FakeTensorMode(allow_non_fake_inputs=True):
        loaders: list[Any] = [on_gpu.train_dataloader(), on_gpu.val_dataloader(), on_gpu.test_dataloader()]
        train, val, test = (loader.dataset.split for loader in loaders)
        assert train.images.device == test.images.device == GPU
        assert train is val is not test
        for batch in (loaders[1].dataset[draw] for draw in loaders[1].sampler):
            assert {x.device for x in batch[:3]} == {GPU}
        on_gpu.teardown("fit")
        assert not on_gpu.copies


def test_what_does_not_fit_is_sent_without_waiting(on_gpu, monkeypatch):
    monkeypatch.setattr(data.datamodule, "free_memory", lambda device: 1000)
    loader: Any = on_gpu.train_dataloader()
    assert loader.pin_memory
    assert loader.dataset[next(iter(loader.sampler))].images.device == CPU


@pytest.mark.parametrize(
    ("limits", "shares"),
    [
        ({"max_epochs": 4}, [0, 0.25, 0.5, 0.75]),
        ({"max_steps": 18}, [0, 0.5]),  # of two batches: two epochs
        ({"max_steps": 15, "accumulate_grad_batches": 4}, [0, 1 / 3, 2 / 3]),  # five steps, the last of two batches
        ({"max_epochs": 3, "max_steps": 36}, [0, 1 / 3, 2 / 3]),
        ({"max_steps": 6, "limit_train_batches": 4}, [0, 1 / 3, 2 / 3]),
    ],
)
def test_share_of_the_run_that_is_done(limits, shares):
    module = ImageDataModule(dataset="digits", batch_size=71)
    module.setup()
    options = {"accumulate_grad_batches": 2} | limits
    module.trainer = Trainer(**options, accelerator="cpu", logger=False, barebones=True)
    module.train_dataloader()
    assert len(module.order) == 18
    module.trainer.fit_loop.max_batches = limits.get("limit_train_batches", float("inf"))
    assert [module.done(epoch) for epoch in range(len(shares))] == pytest.approx(shares)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_a_real_gpu_sees_what_a_cpu_sees(compiled):
    """The same slices, and after augmentation the same images but for rounding; without a wait (torch checks)."""
    facts: dict[str, Any] = {"dataset": "digits", "batch_size": 100, "augment": EVERYTHING}
    modules = [ImageDataModule(**facts, compile=compile) for compile in (False, compiled)]
    modules[1].device = GPU
    batches = []
    for module in modules:
        module.setup()
        stream = iter(module.train_dataloader())
        module.augmented(next(stream))
        torch.cuda.set_sync_debug_mode("error" if module.device == GPU else "default")
        try:
            batch = next(stream)
            batches.append((batch, module.augmented(batch)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    (batch, seen), (gpu_batch, gpu_seen) = batches
    assert {x.device for x in (*gpu_batch[:3], *gpu_seen[:3])} == {GPU}
    for ours, theirs in zip(batch[:3], gpu_batch[:3], strict=True):
        assert torch.equal(ours, theirs.cpu())
    torch.testing.assert_close(gpu_seen.labels.cpu(), seen.labels, rtol=0, atol=1e-5)
    assert (gpu_seen.images.cpu() - seen.images).abs().mean() < 1e-2


# Splits and facts


def test_validation_is_a_tenth_of_every_class_whatever_the_seed(digits):
    train, val = digits.train.subset, digits.val.subset
    assert sorted(train.tolist() + val.tolist()) == list(range(len(digits.source.train)))
    labels = digits.source.train.labels
    assert (labels[val].bincount(minlength=10) - labels.bincount(minlength=10) / 10).abs().max() <= 1
    other = ImageDataModule(dataset="digits", seed=7)
    other.setup()
    assert torch.equal(other.val.subset, val)


def test_given_validation_images_are_used_whole(folder, tmp_path):
    for split, names in (("train", range(20)), ("val", range(20, 26))):
        for i in names:
            target = tmp_path / "split" / split / ("cat", "dog")[i % 2]
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{i:02}.png").write_bytes((folder / ("cat", "dog")[i % 2] / f"{i:02}.png").read_bytes())
    module = ImageDataModule(dataset=str(tmp_path / "split"), root=str(tmp_path / "cache"), num_workers=0)
    module.setup()
    assert (len(module.train), len(module.val), module.test) == (20, 6, None)
    with pytest.raises(DataError, match=r"has no test images; put class folders into train/ and test/"):
        module.test_dataloader()


def test_workers_are_the_cores_of_this_process_shared_between_those_that_train(monkeypatch):
    monkeypatch.setattr("data.datamodule.usable_cores", lambda: 100)
    module = ImageDataModule(dataset="digits")
    assert module.workers == 32
    module.trainer = SimpleNamespace(num_devices=5)  # type: ignore[assignment]
    assert module.workers == 6
    assert ImageDataModule(dataset="digits", num_workers=3).workers == 3
    monkeypatch.undo()
    assert 1 <= ImageDataModule(dataset="digits").workers <= (os.cpu_count() or 1)


def test_no_held_out_images_for_a_last_run():
    module = ImageDataModule(dataset="digits", val_fraction=0)
    module.setup()
    assert len(module.train) == len(module.source.train)
    assert module.val is None


def test_facts_are_those_of_the_images(digits, folder, tmp_path):
    pixels = digits.source.train.images.double().numpy() / 255
    assert digits.class_names == list("0123456789")
    assert digits.image_size == [8, 8]
    assert (digits.mean, digits.std) == (
        pytest.approx([pixels.mean()], abs=1e-6),
        pytest.approx([pixels.std()], abs=1e-6),
    )
    module = ImageDataModule(dataset=str(folder), root=str(tmp_path / "cache"), num_workers=0)
    values = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*/*.png"))]) / 255
    assert module.class_names == ["cat", "dog"]
    assert module.image_size == [8, 6]
    assert module.mean == pytest.approx(values.mean((0, 1, 2)), abs=1e-6)
    assert module.std == pytest.approx(values.std((0, 1, 2)), abs=1e-6)


def test_images_reach_the_model_normalised(digits):
    batch = next(iter(digits.train_dataloader()))
    images = digits.on_after_batch_transfer(batch, 0).images
    expected = (batch.images.double() / 255 - digits.mean[0]) / digits.std[0]
    torch.testing.assert_close(images, expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_augmentation_is_for_training_only(training):
    module = ImageDataModule(dataset="digits", batch_size=8, augment=Augment(flip=1))
    module.setup()
    batch = next(iter(module.train_dataloader()))
    plain = module.preprocess.normalize(batch.images)
    module.trainer = SimpleNamespace(training=training, max_epochs=1, max_steps=-1)  # type: ignore[assignment]
    images = module.on_after_batch_transfer(batch, 0).images
    torch.testing.assert_close(images, plain.flip(-1) if training else plain, rtol=0, atol=1e-5)


def test_a_step_sees_the_views_of_its_seed_and_epoch():
    """Grey levels are changed before they are normalised, and mixing ends when that share of the run is done."""
    augment = replace(EVERYTHING, mix_until=0.5)
    module = ImageDataModule(dataset="digits", batch_size=8, seed=3, augment=augment)
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert batch.indices.tolist() == order(size=len(module.train), batch_size=8, seed=3)[0]
    module.trainer = SimpleNamespace(training=True, max_epochs=4, max_steps=-1)  # type: ignore[assignment]
    for epoch in range(4):
        draws = uniform(epoch_key(3, epoch), batch.indices, DRAWS)
        levels = augment.pixels(batch.images, draws)
        assert not torch.equal(levels, batch.images)
        images, labels = augment(module.preprocess.normalize(levels), draws), batch.labels
        if epoch < 2:
            images, labels = augment.mix(images, labels, draws, classes=10)
        seen = module.on_after_batch_transfer(batch._replace(epoch=epoch), 0)
        assert torch.equal(seen.images, images)
        assert torch.equal(seen.labels, labels)


def test_files_and_their_cache_give_the_same_batches(folder, tmp_path, monkeypatch):
    batches = {}
    for limit in (0, 2**30):
        monkeypatch.setattr(data.cache, "LIMIT", limit)
        source = {"dataset": str(folder), "root": str(tmp_path / "cache"), "num_workers": 1}
        module = ImageDataModule(**source, batch_size=5)
        module.setup()
        batches[limit] = [*module.train_dataloader(), *module.val_dataloader()]
    for first, second in zip(*batches.values(), strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.labels, second.labels)


@pytest.mark.parametrize(
    ("change", "message"), [({"batch_size": 0}, "at least 1, got 0"), ({"val_fraction": 1.5}, r"in \[0, 1\], got 1.5")]
)
def test_numbers_out_of_range_are_one_line(change, message):
    with pytest.raises(DataError, match=message):
        ImageDataModule(dataset="digits", **change)
