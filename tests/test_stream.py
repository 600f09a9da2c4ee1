"""Streams: every sample once an epoch however ranks, workers and shards divide, and the same again after a restart."""

import errno
import gzip
import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import train
from data.datamodule import ImageDataModule
from data.hub import HubShards, load_torch
from data.hub import encoded as hub_file
from data.sources import DataError, load_source
from data.stream import (
    Sample,
    Stream,
    StreamDataset,
    StreamDraw,
    StreamOrder,
    TarShards,
    even,
    find_tars,
    load_tars,
    shuffled,
)
from vit.checkpoint import load_checkpoint
from vit.preprocess import Preprocess

COUNTS = (7, 1, 12, 5, 9)  # samples in each shard: 34, which nothing divides


def encoded(number: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """A PNG of one colour, which is its number."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, 3 * number % 256, 99)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, samples: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_shards(folder: Path, counts=COUNTS, split: str = "train", first: int = 0) -> Path:
    """Shards of numbered samples in three classes, as webdataset lays them out."""
    for shard, count in enumerate(counts):
        samples = {}
        for number in range(first, first + count):
            samples[f"._{number:05}.png"] = b"what macOS leaves beside it"
            samples[f"{number:05}.png"] = encoded(number)
            samples[f"{number:05}.json"] = b'{"note": "ignored"}'
            samples[f"{number:05}.cls"] = str(number % 3).encode()
        write_tar(folder / f"{split}-{shard:03}.tar", samples)
        first += count
    return folder


@pytest.fixture
def shards(tmp_path) -> Path:
    return write_shards(tmp_path / "tars")


def stream(folder: Path, split: str = "train", size: tuple[int, int] = (8, 8)) -> Stream:
    names, splits = load_tars(folder, folder.parent / "cache")
    part = splits[split]
    preprocess = Preprocess(image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3)
    return Stream(shards=part, chosen=tuple(range(len(part.lengths))), classes=len(names), preprocess=preprocess)


def order(
    size: int, *, rank: int = 0, world_size: int = 1, workers: int = 0, batch_size: int = 4, position=(0, 0)
) -> StreamOrder:
    places = {"size": size, "batch_size": batch_size, "rank": rank, "world_size": world_size, "workers": workers}
    return StreamOrder(**places, position=lambda: position)


def seen(folder: Path, *, epoch: int = 0, world_size: int = 2, workers: int = 2, skip: int = 0, seed: int | None = 0):
    """Indices of each batch of each rank, read by real worker processes."""
    found = []
    for rank in range(world_size):
        dataset = StreamDataset(stream(folder), seed=seed, buffer=6)
        batches = order(len(dataset), rank=rank, world_size=world_size, workers=workers, position=(epoch, skip))
        loader = DataLoader(dataset, sampler=batches, batch_size=None, num_workers=workers)
        found.append([batch.indices.tolist() for batch in loader])
    return found


def flat(ranks: list[list[list[int]]]) -> list[int]:
    return [index for batches in ranks for batch in batches for index in batch]


# Each sample once


def test_every_sample_once_an_epoch_over_two_ranks_of_two_workers(shards):
    """The promise, with shards of a webdataset, two ranks and real worker processes; another order in each epoch."""
    epochs = [seen(shards, epoch=epoch) for epoch in range(3)]
    for ranks in epochs:
        assert sorted(flat(ranks)) == list(range(sum(COUNTS)))
        assert len({len(batches) for batches in ranks}) == 1  # or one rank would wait for the other for ever
        assert {len(batch) for batches in ranks for batch in batches} <= {3, 4}
    assert len({tuple(flat(ranks)) for ranks in epochs}) == 3
    assert seen(shards, epoch=1) == epochs[1]
    assert seen(shards, epoch=1, seed=5) != epochs[1]


@pytest.mark.parametrize("size", [1, 2, 7, 34, 101])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batches_cover_the_row(size, world_size, workers, batch_size):
    ranks = [
        list(order(size, rank=rank, world_size=world_size, workers=workers, batch_size=batch_size))
        for rank in range(world_size)
    ]
    draws = [draw for rank in ranks for draw in rank]
    ranges = sorted((draw.start, draw.stop) for draw in draws)
    assert [place for start, stop in ranges for place in range(start, stop)] == list(range(size))
    assert len({len(rank) for rank in ranks}) == 1
    sizes = {stop - start for start, stop in ranges}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(batch_size, 2)
    assert min(sizes) > 0 or size < world_size
    for rank in ranks:
        for worker in range(workers or 1):  # what DataLoader gives a worker is a row without gaps, its stretch
            mine = rank[worker :: workers or 1]
            assert len({draw.stretch for draw in mine}) <= 1
            edges = [mine[0].stretch[0], *(draw.stop for draw in mine)] if mine else [0]
            assert [draw.start for draw in mine] == edges[:-1]
            assert edges[-1] == (mine[0].stretch[1] if mine else 0)


def test_even_parts():
    assert even(3, 10, 3) == [3, 5, 7, 10]


def test_buffer_loses_nothing_and_mixes():
    import random

    samples = [Sample(i, "", b"", 0) for i in range(500)]
    for size in (1, 7, 100, 500, 1000):
        out = [sample.index for sample in shuffled(iter(samples), size, random.Random(0))]
        assert sorted(out) == list(range(500))
        assert size == 1 or out != sorted(out)
        assert all(place >= index - size for place, index in enumerate(out))  # nothing comes before it was read
        assert size == 1 or sum(b == a + 1 for a, b in pairwise(out)) < 500 / 4  # few are still neighbours


def test_each_epoch_orders_the_shards_and_mixes_their_samples_anew(shards):
    whole = stream(shards)
    for part, buffer in ((whole, 1), (replace(whole, chosen=(2,)), 6)):
        data = StreamDataset(part, seed=0, buffer=buffer)
        first, second = ([sample.index for sample in data.samples(epoch, 0, len(data))] for epoch in (0, 1))
        assert sorted(first) == sorted(second)
        assert first != second


def test_evaluation_keeps_the_order(shards):
    assert flat(seen(shards, world_size=1, workers=0, seed=None)) == list(range(sum(COUNTS)))


# A restart


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("skip", [1, 2, 3])
def test_restart_in_mid_epoch_goes_on_where_it_was(shards, workers, skip):
    whole = seen(shards, epoch=4, workers=workers)
    assert seen(shards, epoch=4, workers=workers, skip=skip) == [batches[skip:] for batches in whole]


def test_batches_do_not_depend_on_what_was_asked_before(shards):
    data = StreamDataset(stream(shards), seed=0, buffer=6)
    draws = list(order(len(data), batch_size=5))
    expected = [data[draw][2].tolist() for draw in draws]
    assert [data[draw][2].tolist() for draw in reversed(draws)] == expected[::-1]


def test_neighbours_are_read_on(shards, monkeypatch):
    """A batch after another opens no shard again."""
    opened = []
    original = TarShards.read

    def read(self, shard: int, start: int, stop: int) -> Iterator:
        opened.append(shard)
        return original(self, shard, start, stop)

    monkeypatch.setattr(TarShards, "read", read)
    data = StreamDataset(stream(shards), seed=0, buffer=6)
    for draw in order(len(data), batch_size=5):
        data[draw]
    assert sorted(opened) == list(range(len(COUNTS)))


# What is in a sample


def test_samples_are_their_files(shards):
    """Pixels, labels and indices of shuffled batches are those that were written; other files are ignored."""
    data = StreamDataset(stream(shards), seed=3, buffer=6)
    for draw in order(len(data)):
        images, labels, indices, epoch = data[draw]
        assert images.dtype == torch.uint8
        assert images.shape == (draw.stop - draw.start, 3, 8, 8)
        assert (epoch, labels.tolist()) == (0, [index % 3 for index in indices.tolist()])
        colours = torch.stack([indices, 3 * indices, torch.full_like(indices, 99)], 1)
        assert torch.equal(images.amax((2, 3)).long(), colours)
        assert torch.equal(images.amin((2, 3)).long(), colours)


def test_webdatasets_own_writer_is_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "tars").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "tars" / "train-%03d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            writer.write({"__key__": f"sub/{number:03}", "png": encoded(number), "cls": number % 3})
    data = stream(tmp_path / "tars")
    assert data.shards.lengths == (4, 4, 2)
    samples = list(data.read(data.chosen, 0, 10))
    assert [(sample.index, sample.label) for sample in samples] == [(i, i % 3) for i in range(10)]
    assert samples[5].image == encoded(5)
    assert samples[5].name.endswith("train-001.tar/sub/005")


def test_class_names_come_from_the_source(tmp_path, shards):
    assert load_source(f"wds/{shards}", root=tmp_path / "root", image_size=8).class_names == ("0", "1", "2")
    (shards / "classes.txt").write_text("cat\ndog\nred fox\n")
    assert load_source(f"wds/{shards}", root=tmp_path / "root", image_size=8).class_names == ("cat", "dog", "red fox")
    (shards / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"classes.txt has 2 names, but there is a class number 2"):
        load_source(f"wds/{shards}", root=tmp_path / "root", image_size=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\n\ndog\nred fox\n", "classes.txt: line 2 is empty, but each line is the name of a class: fill or remove"),
        ("crane\ndog\n crane\n", "classes.txt: lines 1 and 3 are both 'crane': tell them apart, as in 'crane (bird)'"),
    ],
)
def test_class_names_that_would_shift_or_merge_classes_are_refused(tmp_path, shards, text, message):
    (shards / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        load_tars(shards, tmp_path)
    (shards / "classes.txt").write_text("cat\ndog\nred fox\n\n\n")  # empty lines at the end are no classes
    assert load_tars(shards, tmp_path)[0] == ("cat", "dog", "red fox")
    (shards / "classes.txt").write_text("cat\ndog\nred fox\n", "utf-8-sig")  # as Windows' editor writes it
    assert load_tars(shards, tmp_path)[0] == ("cat", "dog", "red fox")
    (shards / "classes.txt").write_text("K\xe4fer\ndog\nred fox\n", "latin-1")
    with pytest.raises(DataError, match=r"classes.txt: is no UTF-8"):
        load_tars(shards, tmp_path)


def test_timms_info_gives_the_splits_and_saves_the_count(tmp_path, shards, monkeypatch):
    write_shards(shards, (4, 3), split="odd", first=34)
    (shards / "classes.txt").write_text("cat\ndog\nred fox\n")
    splits = {
        name: {"name": name, "filenames": [f"{prefix}-{i:03}.tar" for i in range(len(counts))],
               "shard_lengths": list(counts), "num_samples": sum(counts)}
        for name, prefix, counts in (("train", "train", COUNTS), ("validation", "odd", (4, 3)))
    }  # fmt: skip
    (shards / "_info.json").write_text(json.dumps({"splits": splits}))
    monkeypatch.setattr("data.stream.count_tars", None)
    names, found = load_tars(shards, tmp_path)
    assert names == ("cat", "dog", "red fox")
    assert {split: part.lengths for split, part in found.items()} == {"train": COUNTS, "val": (4, 3)}
    splits["train"]["shard_lengths"][2] += 1
    (shards / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(DataError, match=r"train-002\.tar ends after 12 samples, not 13"):
        flat(seen(shards, world_size=1, workers=0, seed=None))
    splits["train"] |= {"filenames": [], "shard_lengths": []}
    (shards / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(DataError, match=r"no image in the tar files for train"):
        load_tars(shards, tmp_path)
    splits["train"] |= {"filenames": ["train-000.tar"], "shard_lengths": [float("inf")]}
    for text in ("{}", "[" * 100_000, json.dumps({"splits": splits})):
        (shards / "_info.json").write_text(text)
        with pytest.raises(DataError, match=r"_info.json: not as timm writes it"):
            load_tars(shards, tmp_path)


def test_samples_are_counted_once(tmp_path, shards, monkeypatch):
    first = load_tars(shards, tmp_path)
    monkeypatch.setattr("data.stream.tar_samples", None)
    assert load_tars(shards, tmp_path)[1] == first[1]
    os.utime(shards / "train-001.tar", ns=(0, 0))
    with pytest.raises(TypeError):  # counted again
        load_tars(shards, tmp_path)


def test_statistics_are_those_of_the_pixels(tmp_path, shards):
    source: Any = load_source(f"wds/{shards}", root=tmp_path / "root", image_size=(4, 8))
    values = np.array([(i, 3 * i, 99) for i in range(34)]) / 255
    assert source.mean == pytest.approx(values.mean(0), abs=1e-6)
    assert source.std == pytest.approx(np.maximum(values.std(0), 1 / 255), abs=1e-6)


def test_statistics_of_many_are_of_some_from_all_over(tmp_path, shards, monkeypatch):
    monkeypatch.setattr("data.stream.SAMPLE", 20)  # of 34
    source: Any = load_source(f"wds/{shards}", root=tmp_path / "root", image_size=8)
    assert source.mean[0] == pytest.approx(16.5 / 255, abs=1 / 255)  # and not those of the first ones, 9.5


def test_the_seed_of_the_data_is_that_of_a_stream(tmp_path, shards):
    orders = []
    for seed in (0, 0, 1):
        source = {"dataset": f"wds/{shards}", "root": str(tmp_path / "root"), "image_size": 8, "num_workers": 0}
        module = ImageDataModule(**source, seed=seed, val_fraction=0)
        module.setup()
        orders.append([index for batch in module.train_dataloader() for index in batch.indices.tolist()])
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_statistics_follow_the_files(tmp_path, shards):
    """Shards written anew with other images, as many as before."""
    means = []
    for first in (0, 100):
        write_shards(shards, first=first)
        means.append(load_source(f"wds/{shards}", root=tmp_path / "root", image_size=8).mean)
    assert means[1][0] == pytest.approx(means[0][0] + 100 / 255, abs=1e-6)


def test_compressed_tars_are_read_as_others_and_once(tmp_path, shards, monkeypatch):
    """Going back in one would unpack it from its start again, once for each sample."""
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in shards.glob("*.tar"):
        (packed / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    rewinds, rewind = [], gzip._GzipReader._rewind  # pyright: ignore
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: rewinds.append(1) or rewind(self))  # pyright: ignore
    plain, unpacked = stream(shards), stream(packed)
    assert [sample[2:] for sample in unpacked.read(range(5), 0, 34)] == [s[2:] for s in plain.read(range(5), 0, 34)]
    assert not rewinds
    (packed / "train-000.tar.gz").write_bytes((packed / "train-000.tar.gz").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train-000.tar.gz: cannot be read as a tar file \("):
        list(unpacked.read([0], 0, 7))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(DataError, match=r"train-000.tar.gz: no room in .* to unpack it .*set TMPDIR"):
        list(unpacked.read([0], 0, 7))


def test_missing_tar_file_of_timms_info_is_one_line(tmp_path, shards):
    info = {"filenames": ["train-000.tar", "gone.tar"], "shard_lengths": [7, 1]}
    (shards / "_info.json").write_text(json.dumps({"splits": {"train": info}}))
    with pytest.raises(DataError, match=r"gone.tar: cannot be read as a tar file"):
        load_tars(shards, tmp_path)


# Splits


def test_splits_by_the_files_names(tmp_path, shards):
    write_shards(shards, (3,), split="validation", first=34)
    source: Any = load_source(f"wds/{shards}", root=tmp_path / "root", image_size=8)
    assert (len(source.train), len(source.val), source.test) == (34, 3, None)  # type: ignore[arg-type]


def tars(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    "expected",
    [
        {"train": ["imagenet1k-train-000.tar", "imagenet1k-train-001.tar"], "val": ["imagenet1k-validation-000.tar"]},
        {"train": ["set_Train.tar.gz"], "val": ["set_valid.tgz"], "test": ["test7.TAR"]},
        {"train": ["latest-0.tar", "photos-0.tar"]},  # a part of a word
    ],
)
def test_the_split_is_a_word_anywhere_in_the_name(tmp_path, expected):
    others = ("._train-0.tar", "classes.txt", "stars.jpg")
    found = find_tars(tars(tmp_path / "tars", *others, *(name for names in expected.values() for name in names)))
    assert {split: [Path(path).name for path in paths] for split, paths in found.items()} == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-0.tar", "holdout-0.tar"], r"tars: no train, val or test in the names of holdout-0.tar, but"),
        (["train-0.tar", *(f"{i}.tar" for i in range(4))], r"in the names of 0.tar, 1.tar, 2.tar, ..., but"),
        (["trainset-0.tar", "valset-0.tar"], r"tars: train, val or test must be a word of its own in trainset-0.tar"),
        (["test-train-0.tar"], r"test-train-0.tar: its name says both test and train: rename it"),
        (["val-0.tar", "test-0.tar"], r"tars has test tar files but no train: rename or add those for training"),
        (
            ["train-0.tar", "train-1.tar.bz2", "train-2.txz"],
            r"are read; unpack or move train-1\.tar\.bz2, train-2\.txz",
        ),
    ],
)
def test_no_tar_file_is_lost_or_trained_on_by_mistake(tmp_path, names, message):
    with pytest.raises(DataError, match=message):
        find_tars(tars(tmp_path / "tars", *names))


def test_tar_files_in_a_folder_below_are_not_left_out(tmp_path):
    tars(tars(tmp_path / "tars", "a.tar") / "more", "b.tar")
    with pytest.raises(DataError, match=r"tars: tar files lie in it and in more/ too"):
        find_tars(tmp_path / "tars")


def test_validation_is_held_out_by_shards(shards):
    whole = stream(shards)
    train, val = whole.hold_out(0.2)
    assert sorted(train.chosen + val.chosen) == [0, 1, 2, 3, 4]
    assert len(val.chosen) == 1
    assert whole.hold_out(0.2)[1].chosen == val.chosen
    assert len(whole.hold_out(0.35)[1].chosen) == 2
    drawn = replace(whole, chosen=tuple(range(40))).hold_out(0.25)[1].chosen  # shards may be of one class each
    assert len(drawn) == 10
    assert min(drawn) < 10 <= 30 <= max(drawn)
    indices = [[sample.index for sample in part.read(part.chosen, 0, len(part))] for part in (train, val)]
    assert sorted(indices[0] + indices[1]) == list(range(34))
    with pytest.raises(DataError, match=r"1 shards of training samples are too few to hold out 0.1"):
        val.hold_out(0.1)


# What goes wrong


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tar files"),
        ({"a.png": encoded(1)}, "a: no class number in a file of that name with the ending .cls"),
        ({"a.png": encoded(1), "a.cls": b"cat"}, "a: no class number"),
        ({"a.png": b"no image", "a.cls": b"1"}, "train-0.tar/a: not an image of a known format"),
        ({"a.png": encoded(1), "a.cls": b"0"}, "tars has one class alone, '0': two or more are needed"),
        (
            {"a.3.png": encoded(1), "a.3.cls": b"0"},
            "train-0.tar: a.3.png: what is behind the first dot is",
        ),
        ({"a.txt": b"", "a.cls": b"0"}, "no image in the tar files for train "),
        (
            {"a.png": encoded(1), "a.cls": b"20000000"},
            "tars: there is a class number 20000000; class numb",
        ),
        ({"a.png": encoded(1), "a.cls": b"9" * 5000}, "a: no class number in a file of that name with the ending .cls"),
    ],
)
def test_unusable_tars_are_one_line(tmp_path, files, message):
    folder = tmp_path / "tars"
    folder.mkdir()
    if files:
        write_tar(folder / "train-0.tar", files)
    with pytest.raises(DataError, match=message) as caught:
        load_source(f"wds/{folder}", root=tmp_path / "root", image_size=8)
    assert "\n" not in str(caught.value)


def test_a_few_bytes_do_not_become_gigabytes(tmp_path):
    (tmp_path / "tars").mkdir()
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(3 * 10**9)
    (tmp_path / "a.cls").write_text("0")
    tar = tmp_path / "tars/train-0.tar"
    subprocess.run(["tar", "--sparse", "-cf", tar, "-C", tmp_path, "a.png", "a.cls"], check=True)
    assert tar.stat().st_size < 20_000
    with pytest.raises(DataError, match=r"train-0.tar: a.png: is stored as a sparse file: pack it without --sparse"):
        load_source(f"wds/{tmp_path}/tars", root=tmp_path / "root", image_size=8)


def test_unreadable_images_are_named_or_skipped(tmp_path, shards, capsys):
    write_tar(shards / "train-001.tar", {"7.png": b"no image", "7.cls": b"1"})
    source = {"dataset": f"wds/{shards}", "root": str(tmp_path / "root"), "image_size": 8, "num_workers": 0}
    with pytest.raises(DataError, match=r"train-001.tar/7: not an image of a known format .*; repair or remove it"):
        load_source(**source)
    write_tar(shards / "train-001.tar", {"\x1b[31m7.png": b"no image", "\x1b[31m7.cls": b"1"})
    module = ImageDataModule(**source, batch_size=4, on_bad="skip", val_fraction=0)
    module.setup()
    seen = [index for batch in module.train_dataloader() for index in batch.indices.tolist()]
    assert sorted(seen) == [index for index in range(34) if index != 7]
    assert "train-001.tar/\\x1b[31m7: not an image of a known format" in capsys.readouterr().err


def test_damaged_tar_is_named(tmp_path, shards):
    whole = (shards / "train-002.tar").read_bytes()
    (shards / "train-002.tar").write_bytes(whole[: 512 + 20])  # in the middle of the first image
    with pytest.raises(DataError, match=r"train-002.tar: damaged tar file"):
        load_tars(shards, tmp_path)
    (shards / "train-002.tar").write_bytes(b"x" * 5000)
    with pytest.raises(DataError, match=r"train-002.tar: cannot be read as a tar file"):
        load_tars(shards, tmp_path)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Of a file in a tar, true or not."""
    file = tarfile.TarInfo(name)
    file.size, file.type = size, kind
    return file.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "start",
    [
        (header("././@LongLink", 2, tarfile.GNUTYPE_LONGNAME) + b"a\0".ljust(512, b"\0")) * 3000,
        header("a.png", 2**63),
        header("a.png", 2**80),
        header("a", 2**63, tarfile.XHDTYPE),
        header("a", 2**40, tarfile.XHDTYPE),
        header("a", 2**40, tarfile.GNUTYPE_LONGNAME),
    ],
    ids=["names of names", "2**63", "2**80", "attributes of 2**63", "attributes of 2**40", "name of 2**40"],
)
@pytest.mark.parametrize("place", ["first", "second"])
def test_a_tar_whose_headers_lie_is_named(place, start, tmp_path, shards):
    whole = (shards / "train-002.tar").read_bytes()
    (shards / "train-002.tar").write_bytes((b"" if place == "first" else whole[:1024]) + start + whole)
    with pytest.raises(DataError, match=r"train-002.tar: (damaged tar file|cannot be read as a tar file) \("):
        load_tars(shards, tmp_path)


def test_a_tar_that_is_cut_off_anywhere_is_known(tmp_path):
    """Behind a whole file too, where Python's tarfile sees nothing wrong; its end is a block of zeros."""
    path = write_shards(tmp_path / "tars", [3]) / "train-000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    for length in range(512, end + 512, 512):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"train-000.tar(: damaged tar file|/0000.: no class number)"):
            load_tars(path.parent, tmp_path / str(length))
    path.write_bytes(whole[: end + 512])
    assert load_tars(path.parent, tmp_path / "whole")[1]["train"].lengths == (3,)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wds/{}/none", {}, "none is no folder: give wds/FOLDER"),
        ("wds/{}/tars", {"image_size": None}, "is streamed, so its images have no one size: give data.image_size"),
    ],
)
def test_unusable_names_are_one_line(tmp_path, shards, name, options, message):
    with pytest.raises(DataError, match=message):
        load_source(name.format(tmp_path), root=tmp_path / "root", **{"image_size": 8, **options})


def test_balance_needs_labels(tmp_path, shards):
    module = ImageDataModule(dataset=f"wds/{shards}", root=str(tmp_path / "root"), image_size=8, balance=True)
    with pytest.raises(DataError, match=r"data.balance needs the labels of all images"):
        module.setup()


# Hugging Face


def write_hub(folder: Path, parts: dict[str, tuple[int, ...]]) -> Path:
    """A folder of parquet files in the layout of the datasets library, with so many rows in each."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "img": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog", "owl"]),
        }
    )
    first = 0
    folder.mkdir(exist_ok=True)
    for split, counts in parts.items():
        for shard, count in enumerate(counts):
            numbers = range(first, first + count)
            rows = {
                "id": list(numbers),
                "img": [{"bytes": encoded(i), "path": None} for i in numbers],
                "kind": [i % 3 for i in numbers],
            }
            datasets.Dataset.from_dict(rows, features=features).to_parquet(
                str(folder / f"{split}-{shard:05}-of-{len(counts):05}.parquet")
            )
            first += count
    return folder


@pytest.fixture
def hub(tmp_path) -> Path:
    return write_hub(tmp_path / "hub", {"train": COUNTS, "test": (4,)})


@pytest.fixture
def options(tmp_path) -> dict:
    return {"root": tmp_path / "root", "image_size": 8, "num_workers": 0}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|dill|multiprocess)")
def test_hub_sets_are_streamed_by_shards(hub, options):
    source: Any = load_source(f"hfids/{hub}", **options)
    assert source.class_names == ("cat", "dog", "owl")
    train, test = source.train, source.test
    assert isinstance(train, Stream)
    assert isinstance(test, Stream)
    assert (train.shards.lengths, test.shards.lengths) == (COUNTS, (4,))
    data = StreamDataset(train, seed=0, buffer=6)
    found = []
    for rank in range(2):
        for draw in order(len(data), rank=rank, world_size=2, workers=2):
            images, labels, indices, _ = data[draw]
            assert images[:, 0, 0, 0].tolist() == indices.tolist()
            assert labels.tolist() == [index % 3 for index in indices.tolist()]
            found += indices.tolist()
    assert sorted(found) == list(range(34))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|dill|multiprocess)")
@pytest.mark.parametrize("empty", ["train", "test"])
def test_hub_set_with_a_split_of_no_rows_is_refused(tmp_path, options, empty):
    folder = write_hub(tmp_path / "hub", {"train": (4,), "test": (4,)} | {empty: (0,)})
    with pytest.raises(DataError, match=rf"hub has no image in its {empty} split$"):
        load_source(f"hfids/{folder}", **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|dill|multiprocess)")
@pytest.mark.parametrize("workers", [1, 2])
def test_hub_sets_are_streamed_by_worker_processes(hub, options, workers):
    """Which their library would each give a part of the rows alone."""
    module = ImageDataModule(dataset=f"hfids/{hub}", **options | {"num_workers": workers}, batch_size=4, val_fraction=0)
    module.setup()
    found = [index for batch in module.train_dataloader() for index in batch.indices.tolist()]
    assert sorted(found) == list(range(34))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|dill|multiprocess)")
def test_hub_sets_may_name_files(tmp_path):
    """As those of image folders do; on the hub the path is an address."""
    pytest.importorskip("datasets")
    (tmp_path / "0.png").write_bytes(encoded(7))
    assert hub_file({"bytes": None, "path": str(tmp_path / "0.png")}) == encoded(7)
    rows: Any = SimpleNamespace(
        shard=lambda **_: rows,
        skip=lambda _: rows,
        take=lambda _: rows,
        iter=lambda batch_size: iter([{"img": [{"bytes": None, "path": str(tmp_path / "1.png")}], "kind": [1]}]),
    )
    shards = HubShards(name="hfids/x", rows=rows, image="img", label="kind", lengths=(1,), fingerprint="")
    with pytest.raises(DataError, match=r"^hfids/x, shard 0, row 0: .*1\.png"):
        list(shards.read(0, 0, 1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|dill|multiprocess)")
def test_other_splits_and_images_without_labels_are_left_out_with_a_word(tmp_path, options, capsys):
    datasets = pytest.importorskip("datasets")
    hub = write_hub(tmp_path / "hub", {})
    write_hub(hub / "data", {"train": COUNTS, "test": (4,), "extra": (3,)})  # a folder in which any split may be
    (file,) = hub.glob("data/test-*.parquet")
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(options["root"]))
    rows.map(lambda row: {"kind": None if row["id"] == 35 else row["kind"]}).to_parquet(str(file))
    source: Any = load_source(f"hfds/{hub}", **options)
    assert source.test.images[:, 0, 0, 0].tolist() == [34, 36, 37]
    assert source.test.labels.tolist() == [1, 0, 1]
    said = capsys.readouterr().err
    assert f"hfds/{hub} test: 1 of 4 images have no label and are left out" in said
    assert f"hfds/{hub}: has a split extra too, which is left out" in said
    assert not list((options["root"] / "cache").glob("*extra*"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|dill|multiprocess)")
def test_rows_of_hub_sets_are_counted_once_and_again_when_the_files_change(hub, options, monkeypatch):
    first: Any = load_source(f"hfids/{hub}", **options)
    with monkeypatch.context() as patch:
        patch.setattr("data.hub.progress", None)
        patch.setattr("data.stream.progress", None)
        again: Any = load_source(f"hfids/{hub}", **options)
    assert (again.train.shards.lengths, again.mean) == (first.train.shards.lengths, first.mean)
    write_hub(hub, {"train": (*COUNTS[:-1], 40), "test": (4,)})  # as many files
    changed: Any = load_source(f"hfids/{hub}", **options)
    assert changed.train.shards.lengths == (*COUNTS[:-1], 40)
    assert changed.mean != first.mean


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|dill|multiprocess)")
def test_hub_sets_are_read_by_number(hub, options):
    source: Any = load_source(f"hfds/{hub}", **options)
    assert source.class_names == ("cat", "dog", "owl")
    assert source.train.labels.tolist() == [i % 3 for i in range(34)]
    assert source.train.images[torch.tensor([30, 2])][:, 0, 0, 0].tolist() == [30, 2]
    assert source.test.images[:, 0, 0, 0].tolist() == [34, 35, 36, 37]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|dill|multiprocess)")
@pytest.mark.parametrize("secret", [-1, None])
def test_splits_whose_labels_are_secret_are_left_out(hub, options, secret):
    datasets = pytest.importorskip("datasets")
    (file,) = hub.glob("test-*.parquet")
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(options["root"]))
    rows.map(lambda row: {"kind": secret}).to_parquet(str(file))
    source: Any = load_source(f"hfds/{hub}", **options)
    assert source.test is None
    assert len(source.train.labels) == 34
    source = load_source(f"hfids/{hub}", **options)
    with pytest.raises(DataError, match="class number -1, but there are 3 classes"):
        StreamDataset(source.test)[StreamDraw(0, (0, 4), 0, 4)]


def test_a_set_that_was_saved_to_disk_is_said_how_to_write(tmp_path, options):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"label": [0, 1]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"saved: written by save_to_disk: write it as parquet in a folder, datasets\."):
        load_source(f"hfds/{tmp_path}/saved", **options)


def test_missing_hub_set_is_one_line(tmp_path, options, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"none: cannot be loaded \(") as caught:
        load_source(f"hfds/{tmp_path}/none", **options)
    assert "\n" not in str(caught.value)


# torchvision


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.mark.parametrize("name", ["fashion_mnist", "Fashion_MNIST"])
def test_torchvision_sets_by_timms_name(options, name):
    pixels = np.arange(9, dtype=np.uint8)[:, None, None] * np.ones((28, 28), np.uint8)
    raw = options["root"] / "FashionMNIST" / "raw"
    for part, images in (("train", pixels), ("t10k", pixels[:4] + 100)):
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(len(images)) % 3)
    source: Any = load_source(f"torch/{name}", **options | {"image_size": None})
    assert source.class_names[:2] == ("T-shirt/top", "Trouser")
    assert source.train.images.shape == (9, 3, 28, 28)
    assert source.train.images[:, 0, 5, 5].tolist() == list(range(9))
    assert source.train.labels.tolist() == [i % 3 for i in range(9)]
    assert source.test.images[:, 0, 5, 5].tolist() == [100, 101, 102, 103]
    assert source.val is None


def test_torchvisions_names_that_are_there_twice_are_told_apart(options, monkeypatch):
    class Part(list):
        classes, targets = [("crane",), ("dog", "hound"), ("crane",)], [0, 1, 2]

    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", lambda *_, **__: Part())
    assert load_torch("imagenet", options["root"])[0] == ("crane (0)", "dog", "crane (2)")


def test_images_that_torchvision_cannot_decode_are_listed_as_bad(options, monkeypatch):
    class Part:
        classes, targets = ["cat", "dog"], [0, 1, 0, 1]

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            if index == 2:
                raise OSError("image file is truncated")
            return Image.new("RGB", (8, 6)), self.targets[index]

    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", lambda *_, **__: Part())
    message = r"^torch/pets train, image 2: image file is truncated \(and 1 more of 8 files\)"
    with pytest.raises(DataError, match=message):
        load_source("torch/pets", **options)
    source: Any = load_source("torch/pets", **options, on_bad="skip")
    assert source.train.labels.tolist() == [0, 1, 1]


def test_unknown_torchvision_set_is_one_line(options):
    with pytest.raises(DataError, match=r"torch/none: cannot be had \(Unknown torchvision dataset none\)"):
        load_source("torch/none", **options)


# End to end


def test_training_from_shards(tmp_path):
    """train.py on shards of rectangular images: a stream for training, one for validation, one for the test."""
    folder = write_shards(tmp_path / "tars")
    write_shards(folder, (5, 6), split="test", first=34)
    (folder / "classes.txt").write_text("cat\ndog\nred fox\n")
    common = [
        *("--data.dataset", f"wds/{folder}", "--data.root", str(tmp_path / "root"), "--data.image_size", "[8, 12]"),
        *("--data.batch_size", "6", "--data.num_workers", "1", "--trainer.default_root_dir", str(tmp_path / "run")),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
        *("--model.embed_dim", "16", "--model.depth", "1", "--model.num_heads", "2", "--model.patch_size", "4"),
        *("--trainer.max_epochs", "1", "--data.val_fraction", "0.2"),
    ]
    assert train.main(["fit", *common]) == 0
    model, about = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert (model.image_size, about.class_names) == ((8, 12), ("cat", "dog", "red fox"))
    assert about.training["steps"] == 5  # 29 samples in batches of 6: a shard of five is held out
    assert train.main(["test", *common, "--ckpt_path", "best"]) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|dill|multiprocess)")
@pytest.mark.parametrize("kind", ["hfds", "hfids"])
def test_parquet_files_whose_numbers_mean_other_classes_are_refused(hub, options, kind):
    """As where each split was given numbers by itself, and one lacks a class."""
    datasets = pytest.importorskip("datasets")
    (file,) = hub.glob("test-*.parquet")
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(options["root"] / "other"))
    rows.cast_column("kind", datasets.ClassLabel(names=["cat", "owl", "dog"])).to_parquet(str(file))
    with pytest.raises(DataError, match=r"test-.*\.parquet: class 1 is owl, in the files before it dog: give all"):
        load_source(f"{kind}/{hub}", **options)
