"""Data sets by name and by folder: what is found, with which values, and what is said when something is wrong."""

import hashlib
import os
import pickle
import threading
import urllib.error
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from lightning.pytorch import Trainer
from PIL import ExifTags, Image
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torchvision.datasets import CIFAR10, CIFAR100

import data.cache
import data.labels
from data.datamodule import ImageDataModule
from data.hub import StoredImages
from data.sources import DataError, hint, load_source, stratified_split
from vit.preprocess import Preprocess

SIZE = (8, 6)  # Pillow's order: width, height


@pytest.fixture
def load(tmp_path):
    """``load_source`` in one process, with downloads and cache in the test's own folder."""
    here: dict[str, Any] = {"root": tmp_path / "root", "num_workers": 0}
    return lambda dataset, **options: load_source(str(dataset), **here | options)


def make(folder, **counts: int):
    """Class folders of images, of one colour each, no two alike; ``train__cat=2`` makes two in train/cat."""
    for c, (path, count) in enumerate(counts.items()):
        inside = folder.joinpath(*path.split("__"))
        inside.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", SIZE, (c, i, 99)).save(inside / f"{i}.png")
    return folder


def test_the_only_image_of_a_class_trains(tmp_path, capsys):
    module = ImageDataModule(dataset=str(make(tmp_path / "x", a=4, b=1)), root=tmp_path, image_size=8, num_workers=0)
    module.prepare_data()
    module.setup("fit")
    assert (len(module.train), len(module.val)) == (4, 1)
    assert "x: validation has no image of classes with one alone, which trains: b\n" in capsys.readouterr().err
    alone = ImageDataModule(dataset=str(make(tmp_path / "y", a=1, b=1)), root=tmp_path, image_size=8, num_workers=0)
    with pytest.raises(DataError, match="y: one image a class is too few to train and validate; give more, or hold"):
        alone.setup("fit")


# digits


def test_digits_are_scikit_learns_and_learnable(load):
    source = load("digits")
    assert source.train.images.shape == (1438, 1, 8, 8)
    assert source.test.images.shape == (359, 1, 8, 8)
    assert source.train.images.dtype == torch.uint8
    assert source.train.labels.dtype == torch.int64
    assert (source.train.images.min(), source.train.images.max()) == (0, 255)
    assert source.class_names == tuple("0123456789")
    assert source.val is None
    pixels = source.train.images.double() / 255
    assert source.mean == pytest.approx([pixels.mean().item()], abs=1e-6)
    assert source.std == pytest.approx([pixels.std(correction=0).item()], abs=1e-6)

    (x, y), (test_x, test_y) = (
        (split.images.flatten(1).numpy() / 255, split.labels.numpy()) for split in (source.train, source.test)
    )
    assert SVC(C=10).fit(x, y).score(test_x, test_y) > 0.98
    assert LogisticRegression(max_iter=500).fit(x, y).score(test_x, test_y) > 0.94


def test_digits_split_is_always_the_same(load):
    first, second = load("digits"), load("digits")
    assert torch.equal(first.test.images, second.test.images)
    assert torch.equal(first.test.labels[:12], torch.tensor([1, 2, 6, 0, 3, 6, 2, 5, 9, 9, 8, 1]))  # on any machine


# stratified_split


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.25, 0.5, 0.999])
def test_stratified_split_gives_every_class_its_share(fraction):
    counts = {0: 100, 1: 2, 2: 3, 3: 1, 7: 41}
    labels = torch.cat([torch.full((count,), label) for label, count in counts.items()])
    labels = labels[torch.randperm(len(labels))]
    first, second = stratified_split(labels, fraction, seed=1)
    assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(len(labels)))
    assert torch.equal(first, first.sort().values)
    assert torch.equal(second, second.sort().values)
    for label, count in counts.items():
        held_out = (labels[second] == label).sum().item()
        assert held_out == (min(max(round(count * fraction), 1), count - 1) if count > 1 else 0)


def test_stratified_split_depends_on_its_arguments_alone():
    labels = torch.arange(400) % 4
    one = stratified_split(labels, 0.2, seed=5)
    state = torch.get_rng_state()
    torch.rand(3)
    two = stratified_split(labels, 0.2, seed=5)
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one[1], stratified_split(labels, 0.2, seed=6)[1])
    torch.set_rng_state(state)
    stratified_split(labels, 0.2, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_stratified_split_draws_rather_than_takes_the_first():
    _, second = stratified_split(torch.zeros(1000, dtype=torch.int64), 0.5, seed=0)
    assert abs(second.double().mean() - 499.5) < 40


# folders


def colours(split) -> list[tuple[int, int]]:
    """(class folder's number, image's number) in ``make``, of every image."""
    return [tuple(image[:2, 0, 0].tolist()) for image in split.images]


def test_plain_folder(tmp_path, load):
    source = load(make(tmp_path / "pets", dog=2, cat=3))
    assert source.class_names == ("cat", "dog")
    assert source.train.images.shape == (5, 3, 6, 8)
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert colours(source.train) == [(1, 0), (1, 1), (1, 2), (0, 0), (0, 1)]
    assert (source.val, source.test) == (None, None)
    assert source.train.files.path(3) == str(tmp_path / "pets" / "dog" / "0.png")
    expected = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 2, 0, 1], [99] * 5]) / 255
    assert source.mean == pytest.approx(expected.mean(1).tolist(), abs=1e-6)
    assert source.std[2] == pytest.approx(1 / 255, abs=1e-6)  # one value only: no division by zero


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
@pytest.mark.parametrize("train", ["train", "Train", "training"])
def test_given_splits(tmp_path, load, train, val):
    folder = make(tmp_path / "x", **{f"{train}__a": 2, f"{train}__b": 1, f"{val}__b": 2, "test__a": 1, "test__b": 0})
    source = load(folder)
    assert colours(source.train) == [(0, 0), (0, 1), (1, 0)]  # b has one image, which is fine as val/ is given
    assert colours(source.val) == [(2, 0), (2, 1)]
    assert source.val.labels.tolist() == [1, 1]
    assert colours(source.test) == [(3, 0)]
    assert source.test.labels.tolist() == [0]
    assert source.mean[0] == pytest.approx(1 / 3 / 255, abs=1e-6)  # of the training images alone


@pytest.mark.parametrize("present", ["val", "test"])
def test_one_given_split(tmp_path, load, present):
    source = load(make(tmp_path / "x", train__a=2, train__b=2, **{f"{present}__a": 1}))
    assert {"val": source.val is not None, "test": source.test is not None} == {
        "val": present == "val",
        "test": present == "test",
    }


def test_class_may_be_called_like_a_split(tmp_path, load):
    source = load(make(tmp_path / "x", train=2, bus=2, test=3))
    assert source.class_names == ("bus", "test", "train")
    assert source.train.labels.tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_nested_files_count_and_others_do_not(tmp_path, load):
    folder = make(tmp_path / "x", a=1, b=2, a__deep__er=2)
    Image.new("RGB", SIZE, (7, 7, 7)).save(folder / "a" / "PHOTO.JPEG", quality=100)
    Image.new("RGB", SIZE).save(folder / "loose.png")
    for name in ("notes.txt", "a/.hidden.png", "a/Thumbs.db", "a/noext"):
        (folder / name).write_text("no image")
    make(folder, **{".hidden": 1, "a__.thumbs": 1})
    (folder / "a" / "trap.png").mkdir()
    os.mkfifo(folder / "a" / "pipe.png")
    source = load(folder)
    assert [source.train.files.path(i)[len(str(folder)) + 1 :] for i in range(len(source.train))] == [
        "a/0.png",
        "a/PHOTO.JPEG",
        "a/deep/er/0.png",
        "a/deep/er/1.png",
        "b/0.png",
        "b/1.png",
    ]
    assert colours(source.train)[1] == (7, 7)


def test_what_is_left_out_is_said_in_one_line(tmp_path, load, capsys, monkeypatch):
    monkeypatch.setattr(data.labels, "SUFFIXES", {".png"})  # as without pillow-heif
    folder = make(tmp_path / "x", a=2, b=2)
    load(folder)
    assert capsys.readouterr().err == ""
    for name in ("a/0.heic", "b/1.HEIC", "b/LICENSE", "loose.png", "labels.csv", "b/.DS_Store"):
        (folder / name).touch()
    load(folder)
    heic = ".heic 2, without ending 1; .heic: pip install pillow-heif"
    said = f"3 other files in the class folders ({heic}); 1 outside them ({folder}/loose.png)"
    assert capsys.readouterr().err == f"{folder}: left out: {said}\n"
    load(folder)
    assert capsys.readouterr().err == ""  # once


def test_what_lies_beside_the_splits_is_said(tmp_path, load, capsys):
    folder = make(tmp_path / "x", train__a=2, train__b=2, test__a=1, more__a=2)
    (folder / "train" / "loose.jpg").touch()
    load(folder)
    assert capsys.readouterr().err == f"{folder}: left out: 2 outside them ({folder}/more/, {folder}/train/loose.jpg)\n"


@pytest.mark.parametrize("suffix", [".jfif", ".jpe"])
def test_other_endings_of_jpeg_are_read(tmp_path, load, suffix):
    folder = make(tmp_path / "x", a=2, b=2)
    Image.new("RGB", SIZE).save(folder / "b" / f"2{suffix}", "JPEG")
    assert len(load(folder).train) == 5


def test_a_camera_of_12_bits(tmp_path, load, capsys):
    """Its 16-bit files are nearly black until one says what is white; then they are another cache's."""
    for i in range(8):
        path = tmp_path / "cells" / "ab"[i % 2] / f"{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), 4000 - i, dtype=np.uint16)).save(path)
    dark = load(tmp_path / "cells")
    hint = "cells: 16-bit images, but no value above 4,000 in 8 of them, so that they come out dark; --data.white 4095"
    assert hint in capsys.readouterr().err
    assert dark.train.images.max() == 16
    for _ in range(2):
        assert load(tmp_path / "cells", white=4095).train.images.min() == 249
    assert capsys.readouterr().err == ""
    with pytest.raises(DataError, match=r"data\.white is 0, it must be above 0"):
        load(tmp_path / "cells", white=0)


def test_what_is_cut_off_is_said(tmp_path, load, capsys):
    """A third of each, where all have one shape; nothing of photographs that have several, or of what fits."""
    for i in range(8):
        for name, width in (("same", 12), ("several", 12 + 4 * (i % 2))):
            path = tmp_path / name / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (width, 8), (i, i, i)).save(path)
    load(tmp_path / "same", image_size=6)
    hint = "same: of images of 12x8 pixels the middle 67% are seen, 6x6; --data.image_size '[8, 12]'"
    assert hint in capsys.readouterr().err
    load(tmp_path / "same", image_size=(4, 6))
    load(tmp_path / "several", image_size=6)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".png"])
def test_what_is_cut_off_of_photographs_held_upright(tmp_path, load, capsys, suffix):
    """Whose pixels are stored lying, with a note that says how to turn them."""
    for i in range(8):
        path = tmp_path / f"phone{suffix}" / "ab"[i % 2] / f"{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (16, 8), (i, i, i))
        image.getexif()[ExifTags.Base.Orientation] = 6
        image.save(path, exif=image.getexif())
    load(tmp_path / f"phone{suffix}", image_size=4)
    assert (
        "of images of 8x16 pixels the middle 50% are seen, 4x4; --data.image_size '[16, 8]'" in capsys.readouterr().err
    )
    assert load(tmp_path / f"phone{suffix}").train.shape[2:] == (16, 8)
    assert capsys.readouterr().err == ""


def test_images_of_libraries_are_looked_at_as_files_are(capsys):
    """What is cut off and what comes out dark; and cut images are no cache of whole ones."""
    image = Image.fromarray(np.full((4, 8), 300, dtype=np.uint16))
    size = Preprocess(image_size=(4, 4), mean=(0.5,), std=(0.5,))
    files = StoredImages(
        folder="x", names=np.arange(3), preprocess=size, get=lambda _: image.copy(), fingerprint="", size_from=None
    )
    hint("x", files)
    said = capsys.readouterr().err
    assert "x: of images of 8x4 pixels the middle 50% are seen, 4x4" in said
    assert "x: 16-bit images, but no value above 300 in 3 of them" in said
    assert replace(files, size_from="x, image 0").key != files.key


@pytest.mark.usefixtures("no_network")
def test_processes_take_turns_to_download(tmp_path, load):
    """Side by side they would write the same file."""
    (tmp_path / "root" / "cache").mkdir(parents=True)
    ended = threading.Event()

    def download() -> None:
        with pytest.raises(DataError, match="cannot get it"):
            load("cifar10")
        ended.set()

    with FileLock(tmp_path / "root" / "cache" / "cifar10.lock"):
        waiting = threading.Thread(target=download)
        waiting.start()
        assert not ended.wait(0.5)
    assert ended.wait(30)
    waiting.join()


def test_processes_take_turns_to_decode_what_is_left(tmp_path, load, monkeypatch):
    """Without the bad file it is another set: side by side each would decode all of it."""
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "set" / name / f"{i}.png")
    (tmp_path / "set/a/bad.png").write_bytes(b"no image")
    write, held = data.cache.write_array, []

    def write_array(*arguments: Any) -> None:
        with pytest.raises(Timeout):
            FileLock(next((tmp_path / "root" / "cache").glob("*.lock"))).acquire(timeout=0)
        held.append(arguments[1][0])
        write(*arguments)

    monkeypatch.setattr(data.cache, "write_array", write_array)
    load(str(tmp_path / "set"), on_bad="skip")
    assert held[-1] == 4


def test_links_are_followed_but_not_in_circles(tmp_path, load):
    make(tmp_path / "elsewhere", more=2)
    folder = make(tmp_path / "x", a=1, b=2)
    (folder / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder / "a")
    (folder / "a" / "self").symlink_to(folder / "a")
    (folder / "c").symlink_to(folder / "b")
    (folder / "a" / "copy.png").symlink_to(folder / "b" / "0.png")
    source = load(folder)
    assert source.train.labels.tolist() == [0] * 4 + [1] * 2 + [2] * 2


def test_images_are_cut_to_the_size_asked_for(tmp_path, load):
    folder = make(tmp_path / "x", a=2, b=2)
    Image.new("RGB", (30, 50), "red").save(folder / "a" / "0.png")
    assert load(folder, image_size=4).train.images.shape == (4, 3, 4, 4)
    images = load(folder, image_size=(10, 5)).train.images
    assert images.shape == (4, 3, 10, 5)
    assert images[0].float().mean((1, 2)).tolist() == [255, 0, 0]


def test_large_folder_is_read_batch_by_batch(tmp_path, load, monkeypatch):
    folder = make(tmp_path / "x", train__a=2, train__b=3, test__b=2)
    small = load(folder)
    monkeypatch.setattr(data.cache, "LIMIT", 1)
    large = load(folder)
    indices = torch.tensor([4, 0, 1])
    assert torch.equal(large.train.images[indices], small.train.images[indices])
    assert torch.equal(large.test.images[torch.arange(2)], small.test.images)
    assert large.train.images.shape == small.train.images.shape
    assert len(large.train.images) == 5
    assert (large.mean, large.std) == (small.mean, small.std)


def test_source_is_decoded_once(tmp_path, load, monkeypatch):
    folder = make(tmp_path / "x", train__a=2, train__b=3, val__a=1, test__b=2)
    load(folder, image_size=(6, 8))
    monkeypatch.setattr(data.cache, "open_image", None)
    source = load(folder, image_size=(6, 8))
    assert colours(source.test) == [(3, 0), (3, 1)]


def test_folder_paths_may_start_at_home(tmp_path, load, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path / "x", a=2, b=2)
    assert len(load("~/x").train) == 4


def spoil(path):
    path.write_bytes(b"no image")


BAD_FOLDERS = {
    "no such folder": (
        lambda x: None,
        "x is no folder and no known data set: --data.dataset takes 'digits', 'cifar10'",
    ),
    "file": (lambda x: x.touch(), "x is a file: --data.dataset takes 'digits', 'cifar10'"),
    "empty": (lambda x: x.mkdir(), "x has no class folders: give each class a folder"),
    "shards": (
        lambda x: (x.mkdir(), (x / "a.tar").touch()),
        "x has no class folders: give each class a folder of images, two classes or more; its tar files as shards: wds",
    ),
    "loose images": (
        lambda x: (x.mkdir(), Image.new("L", SIZE).save(x / "0.png")),
        "x has no class folders: give each class a folder",
    ),
    "one class": (lambda x: make(x, a=2), "x has only one class folder, a/: give each class a folder"),
    "parent": (lambda x: make(x, y__a=2, y__b=2), "x has only one class folder, y/"),
    "empty class": (lambda x: make(x, a=2, b=0), "x/b has no images ("),
    "empty class below train": (lambda x: make(x, train__a=2, train__b=0), "x/train/b has no images ("),
    "class unknown to train": (
        lambda x: make(x, train__a=2, train__b=2, test__a=1, test__c=1),
        "x/test/c is a class that the training images lack",
    ),
    "empty test": (lambda x: make(x, train__a=2, train__b=2, test__a=0), "x/test has no images in class folders"),
    "empty train": (lambda x: (make(x, test__a=1), (x / "train").mkdir()), "x/train has no class folders"),
    "splits without classes": (lambda x: make(x, train=2, test=2), "x/train has no class folders"),
    "no train": (lambda x: make(x, val__a=1, test__a=1), "x has test/ but no train/"),
    "splits by names of their own": (
        lambda x: make(x, training_set__a=2, training_set__b=2, test_set__a=1),
        "x has splits with names that are not theirs: rename test_set/ to test/, training_set/ to train/",
    ),
    "two vals": (
        lambda x: make(x, train__a=2, train__b=2, val__a=1, valid__a=1),
        "/x has both val/ and valid/: keep one",
    ),
    "no image": (lambda x: spoil(make(x, a=2, b=2) / "b" / "1.png"), "x/b/1.png: not an image of a known format"),
    "in test": (
        lambda x: spoil(make(x, train__a=2, train__b=2, test__a=2) / "test" / "a" / "0.png"),
        "x/test/a/0.png: not an image",
    ),
    "the first": (lambda x: spoil(make(x, a=2, b=2) / "a" / "0.png"), "x/a/0.png: not an image"),
    "all": (lambda x: [spoil(path) for path in make(x, a=2, b=2).glob("*/*")], "x/a/0.png: not an image"),
    "dangling link": (lambda x: (make(x, a=2, b=2) / "a" / "2.png").symlink_to("nowhere"), "x/a/2.png: no such file"),
    "link to a pipe": (
        lambda x: [(make(x, a=2, b=2) / "a" / "2.png").symlink_to(x / "pipe"), os.mkfifo(x / "pipe")],
        "x/a/2.png: not a regular file",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder_is_one_line_that_names_the_path(tmp_path, load, case):
    prepare, expected = BAD_FOLDERS[case]
    prepare(tmp_path / "x")
    with pytest.raises(DataError) as error:
        load(tmp_path / "x")
    message = str(error.value)
    assert message.startswith(str(tmp_path))
    assert message[len(str(tmp_path)) :].startswith("/" + expected.lstrip("/"))
    assert "\n" not in message


def test_what_a_run_writes_is_no_class_of_the_next(tmp_path, load, monkeypatch):
    """Nor does it matter where there are folders of splits."""
    monkeypatch.chdir(make(tmp_path / "images", a=2, b=2))
    with pytest.raises(DataError, match=r"data\.root datasets would lie among the class folders of \.: name another"):
        load(".", root="datasets")
    module = ImageDataModule(dataset=".", root=str(tmp_path / "root"))
    module.trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    with pytest.raises(DataError, match=r"trainer\.default_root_dir .*/images would lie among the class folders of \."):
        module.setup("fit")
    monkeypatch.chdir(make(tmp_path / "split", train__a=2, train__b=2))
    load(".", root="datasets")
    assert load(".", root="datasets").class_names == ("a", "b")


def test_tables_that_are_not_there_or_not_alone(tmp_path, load):
    (tmp_path / "a.csv").write_text("path,label\n")
    with pytest.raises(DataError, match=r"b.csv is not there: --data.dataset takes 'digits'"):
        load(str(tmp_path / "b.csv"))
    with pytest.raises(DataError, match=r"a.csv is a table, which stands alone: --data.dataset takes 'digits'"):
        load(f"{tmp_path}/a.csv,{tmp_path}/b.csv")


def test_sizes_that_differ_name_both_files(tmp_path, load):
    folder = make(tmp_path / "x", train__a=2, train__b=2, val__a=1)
    Image.new("RGB", (7, 6)).save(folder / "val" / "a" / "0.png")
    with pytest.raises(DataError) as error:
        load(folder)
    assert str(error.value) == (
        f"{folder}/val/a/0.png is 7x6 pixels but {folder}/train/a/0.png is 8x6: give an image_size to cut all images to"
    )
    assert load(folder, image_size=6).val.images.shape == (1, 3, 6, 6)


def test_unreadable_folder_is_named(tmp_path, load, monkeypatch):
    folder = make(tmp_path / "x", a=2, b=2)
    scandir = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=f"^{folder}/b/?: Permission denied$"):
        load(folder)


def test_image_size_must_fit_the_data_set(load):
    assert load("digits", image_size=8).train.images.shape[-1] == 8
    with pytest.raises(DataError, match="digits has images of 8x8 pixels, image_size is 32x32"):
        load("digits", image_size=32)
    with pytest.raises(DataError, match="image_size is 0, it must be at least 1 pixel"):
        load("digits", image_size=0)


# CIFAR


def fake_cifar(kind, root, monkeypatch) -> dict[str, np.ndarray]:
    """Write two small CIFAR files of torchvision's form and make their checksums the right ones."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    key, fine = ("labels", False) if kind is CIFAR10 else ("fine_labels", True)
    classes = [f"class {i}" for i in range(100 if fine else 10)]
    written = {}

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for part, count in (("train", 5), ("test", 3)):
        values = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        md5 = write(part, {"data": values, key: list(range(count))})
        monkeypatch.setattr(kind, f"{part}_list", [[part, md5]])
        written[part] = values
    meta = {"filename": "meta", "key": kind.meta["key"], "md5": write("meta", {kind.meta["key"]: classes})}
    monkeypatch.setattr(kind, "meta", meta)
    return written


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("name", "kind"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar_files_keep_their_layout(tmp_path, load, monkeypatch, name, kind):
    written = fake_cifar(kind, tmp_path / "root", monkeypatch)
    source = load(name)
    for part, split in (("train", source.train), ("test", source.test)):
        expected = torch.from_numpy(written[part]).view(-1, 3, 32, 32)  # the file's own order: channels, rows, columns
        assert torch.equal(split.images, expected)
        assert split.images.is_contiguous()
        assert split.labels.tolist() == list(range(len(expected)))
        assert split.labels.dtype == torch.int64
    assert source.val is None
    assert source.class_names[3] == "class 3"
    assert len(source.class_names) == (100 if kind is CIFAR100 else 10)
    mean, std = (0.491, 0.247) if name == "cifar10" else (0.507, 0.267)  # of all pixels, as published
    assert (source.mean[0], source.std[0]) == pytest.approx((mean, std), abs=0.001)


def test_splits_that_number_their_classes_differently_are_refused(tmp_path, load):
    """As torchvision's folders do: a dog of val would be called a cat."""
    make(tmp_path / "images", train__cat=2, train__dog=2, val__dog=2)
    message = r"torch/image_folder: val has other classes than train \(cat\); of a folder, give --data.dataset FOLDER"
    with pytest.raises(DataError, match=message):
        load("torch/image_folder", root=tmp_path / "images")
    make(tmp_path / "images", val__cat=1)
    source = load("torch/image_folder", root=tmp_path / "images")
    assert source.val.labels.tolist() == [0, 1, 1]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_failed_download_says_what_to_do(tmp_path, load, name):
    with pytest.raises(DataError) as error:
        load(name)
    kind = CIFAR10 if name == "cifar10" else CIFAR100
    message = str(error.value)
    assert message.startswith(f"{name}: cannot get it into {tmp_path / 'root'} (")
    assert "name resolution" in message
    assert kind.url in message
    assert str(tmp_path / "root" / kind.filename) in message
    assert "\n" not in message


@pytest.mark.usefixtures("no_network")
def test_flipped_byte_in_cifar_is_never_used(tmp_path, load, monkeypatch):
    fake_cifar(CIFAR10, tmp_path / "root", monkeypatch)
    path = tmp_path / "root" / CIFAR10.base_folder / "train"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="cifar10: cannot get it into"):
        load("cifar10")


def test_cifar10_as_jpeg_files(cifar10_jpeg, load):
    source = load(cifar10_jpeg, num_workers=2)
    assert source.train.images.shape == (50_000, 3, 32, 32)
    assert source.test.images.shape == (10_000, 3, 32, 32)
    assert source.train.labels.bincount().tolist() == [5000] * 10
    assert source.test.labels.bincount().tolist() == [1000] * 10
    assert source.class_names == (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
    assert source.mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.001)  # as published
    assert source.std == pytest.approx([0.2470, 0.2435, 0.2616], abs=0.003)  # JPEG smooths a little
    for index in (0, 12_345, 49_999):
        with Image.open(source.train.files.path(index)) as image:
            expected = np.array(image.convert("RGB"))
        assert np.array_equal(source.train.images[index].permute(1, 2, 0), expected)
        assert source.class_names[source.train.labels[index]] in source.train.files.path(index)
