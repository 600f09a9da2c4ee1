"""Tables of labels, and several folders taken together."""

import csv
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data.datamodule import ImageDataModule, TrainOrder, balanced
from data.labels import cell, in_order, list_table, split_of
from data.sources import DataError, load_source
from vit.checkpoint import load_checkpoint

START = (0, 0)


def image(path: Path, number: int) -> Path:
    """An image of one colour, which is its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (number, 2 * number, 99)).save(path)
    return path


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture
def load(tmp_path):
    here: dict[str, Any] = {"root": tmp_path / "root", "num_workers": 0}
    return lambda dataset, **options: load_source(str(dataset), **here | options)


@pytest.fixture
def rows(tmp_path) -> list[dict[str, str]]:
    """Twelve images in three classes and three splits, one of them outside the table's folder."""
    found = []
    for i in range(12):
        path = tmp_path / ("elsewhere" if i == 3 else "images") / f"{i}, an image.png"
        name = str(path) if i == 3 else str(path.relative_to(tmp_path))
        found.append({"path": name, "label": ("owl", "cat", "red fox")[i % 3], "split": ("train", "Valid", "")[i // 5]})
        image(path, i)
    return found


# Tables


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".CSV"])
def test_a_table_gives_images_labels_and_splits(tmp_path, load, rows, suffix):
    path = tmp_path / f"labels{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write(path, rows)
    source = load(path)
    assert source.class_names == ("cat", "owl", "red fox")
    numbers = {split: getattr(source, split).images[:, 0, 0, 0].tolist() for split in ("train", "val")}
    assert numbers == {"train": [0, 1, 2, 3, 4, 10, 11], "val": [5, 6, 7, 8, 9]}
    for split, found in numbers.items():
        assert getattr(source, split).labels.tolist() == [(1, 0, 2)[i % 3] for i in found]
    assert source.test is None
    assert source.train.files.path(3) == str(tmp_path / "elsewhere" / "3, an image.png")


def test_without_splits_all_are_for_training(tmp_path, load, rows):
    path = write(tmp_path / "labels.csv", [{"path": row["path"], "label": row["label"]} for row in rows])
    source = load(path)
    assert (len(source.train), source.val) == (12, None)


def test_labels_that_are_numbers_keep_their_order():
    assert in_order({"10", "9", "2"}) == ("2", "9", "10")
    assert in_order({"10", "9", "b"}) == ("10", "9", "b")


def test_spellings_of_splits():
    assert [split_of(name) for name in ("training", "Validation", "TEST", "other")] == ["train", "val", "test", "other"]


@pytest.mark.parametrize("separator", ";,")
def test_a_table_of_a_spreadsheet(tmp_path, load, rows, separator):
    """Semicolons where the comma is in numbers, and a mark at the beginning."""
    path = write(
        tmp_path / "labels.csv", [{"path": row["path"].replace(",", ""), "label": row["label"]} for row in rows]
    )
    path.write_text("\ufeff" + path.read_text().replace(",", separator))
    for row in rows:
        Path(tmp_path, row["path"]).rename(Path(tmp_path, row["path"].replace(",", "")))
    assert load(path).class_names == ("cat", "owl", "red fox")


def test_a_semicolon_in_a_table_with_commas_divides_nothing(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("path,label,seen by;checked by\na.png,cat;dog,x\nb.png,owl,y\n")
    assert list_table(path)[0] == ("cat;dog", "owl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,label\n", r"labels.csv: has no rows below its header"),
        (
            "path,label\na.png,x\nGr\xf6\xdfe.png,y\n".encode("latin-1"),
            r"labels.csv: row 2 is no UTF-8: save the table as",
        ),
        ("path,label\na.png,x\n".encode("utf-16"), r"labels.csv: .* UTF-8"),
        (b'path,label\na.png,"x\nb.png,y\nc.png,"x\nd.png,y\n', r"labels.csv: cannot be read \("),
        (
            "path,label\na.png,x\nb.png,K\xe4fer\n".encode("latin-1"),
            r"^[^:]*labels.csv: the label of row 2 is no UTF-8",
        ),
    ],
)
def test_a_table_in_another_encoding_or_without_rows(tmp_path, content, message):
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list_table(path)
    str(error.value).encode()


def test_spaces_in_a_tables_header_do_not_count(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("path, label ,split\na.png,x,\nb.png,y,\n")
    assert list_table(path)[0] == ("x", "y")


def test_accents_are_the_same_however_they_are_stored(tmp_path, load):
    """Training images copied from Linux, validation images from macOS."""
    forms: tuple[Any, Any] = ("NFC", "NFD")
    for split, form in zip(("train", "val"), forms, strict=True):
        for number, name in enumerate(("Fäden", "Größe")):
            for i in range(2):
                image(tmp_path / "cells" / split / unicodedata.normalize(form, name) / f"{i}.png", 10 * number + i)
    source = load(tmp_path / "cells")
    assert source.class_names == ("Fäden", "Größe")
    assert source.val.labels.tolist() == [0, 0, 1, 1]
    assert source.val.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    rows = [{"path": f"{i}.png", "label": unicodedata.normalize(form, "Fäden")} for i, form in enumerate(forms)]
    with pytest.raises(DataError, match="1 classes in the training images"):
        list_table(write(tmp_path / "labels.csv", rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([{"file": "a", "label": "cat"}], r"labels.csv: needs a column 'path' for each image, but has 'file', 'label'"),
        ([{"path": "a.png", "label": ""}], r"labels.csv: needs a column 'label' for each image, but row 1 is empty"),
        ([{"path": "a", "label": "cat"}], r"labels.csv: 1 classes in the training images, two or more are needed"),
        ([{"path": "a", "label": "x", "split": "fold3"}], r"labels.csv: split 'fold3' is none of train, val, test"),
        (
            [{"path": c, "label": c, "split": s} for c, s in (("x", ""), ("y", ""), ("z", "val"))],
            r"labels.csv: class 'z' of the val images is none of the training images",
        ),
    ],
)
def test_unusable_tables_are_one_line(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        list_table(write(tmp_path / "labels.csv", change))


def test_several_labels_an_image_are_refused(tmp_path):
    """Which parquet can hold, and which would be a class of that name."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"path": f"{i}.png", "label": ["cat", "dog"][: i + 1]} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "tags.parquet")
    with pytest.raises(DataError, match=r"tags.parquet: row 1 has label \['cat'\]: one class an image is needed"):
        list_table(tmp_path / "tags.parquet")


def test_unreadable_tables_are_one_line(tmp_path, monkeypatch):
    for name in ("none.csv", "none.parquet"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read \("):
            list_table(tmp_path / name)
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"bad.parquet: cannot be read \("):
        list_table(tmp_path / "bad.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"bad.parquet: needs the package pyarrow; pip install pyarrow"):
        list_table(tmp_path / "bad.parquet")


def test_an_image_under_two_names_is_there_twice(tmp_path, rows, monkeypatch):
    whole = {**rows[0], "path": str(tmp_path / rows[0]["path"]), "split": "val"}
    write(tmp_path / "table.csv", [*rows, whole])
    with pytest.raises(DataError, match=rf"rows 1 and {len(rows) + 1} are both .*: name each image once"):
        list_table(tmp_path / "table.csv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"rows 1 and {len(rows) + 1} are both "):
        list_table(Path("table.csv"))


def test_missing_image_of_a_table_is_named(tmp_path, load, rows):
    path = write(tmp_path / "labels.csv", [*rows, {"path": "gone.png", "label": "cat", "split": "train"}])
    with pytest.raises(DataError, match=r"gone.png: no such file"):
        load(path)


# Several folders


@pytest.fixture
def two(tmp_path) -> list[Path]:
    """One folder of cats and dogs with a test split, one of dogs and owls without."""
    number = 0
    for inside, count in {"a/train/cat": 2, "a/train/dog": 3, "a/test/dog": 1, "b/dog": 2, "b/owl": 2}.items():
        for i in range(count):
            image(tmp_path / inside / f"{i}.png", number)
            number += 1
    return [tmp_path / "a", tmp_path / "b"]


def test_several_folders_are_one_set_with_the_union_of_their_classes(load, two):
    source = load(",".join(map(str, two)))
    assert source.class_names == ("cat", "dog", "owl")
    assert source.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert source.train.labels.tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2]
    assert source.test.images[:, 0, 0, 0].tolist() == [5]
    assert source.train.files.path(5) == str(two[1] / "dog" / "0.png")


def test_a_folder_may_have_a_comma_in_its_name(tmp_path, load, two):
    two[0].rename(tmp_path / "x, y")
    assert load(tmp_path / "x, y").class_names == ("cat", "dog")


def test_a_folder_given_twice_is_refused(load, two):
    with pytest.raises(DataError, match="has a folder twice, and would train on what it holds out"):
        load(f"{two[0]},{two[1]},{two[0]}/")


def test_a_folder_called_like_a_known_set_is_mentioned(load, tmp_path, monkeypatch, capsys):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(load("digits").train) > 1000
    assert capsys.readouterr().err == "digits: the data set of that name; the folder here is --data.dataset ./digits\n"


def test_one_of_several_folders_missing_is_named(load, two):
    with pytest.raises(DataError, match=r"/none is no folder and no known data set"):
        load(f"{two[0]},{two[1].parent}/none")


# Classes that are not equally frequent


def test_balanced_order_shows_classes_equally_often():
    """Of 300 images, 9 : 90 : 201, every class 100 times an epoch; within a class all images alike; each view once."""
    labels = torch.cat([torch.full((count,), label) for label, count in ((0, 9), (1, 90), (2, 201))])
    labels = labels[torch.randperm(300)]
    epochs = [balanced(labels, torch.Generator().manual_seed(epoch)) for epoch in range(4)]
    for views in epochs:
        assert len(views.unique()) == 300  # repetitions of an image are different views of it
        images = views % 300
        assert labels[images].bincount().tolist() == [100, 100, 100]
        turns = images.bincount(minlength=300)
        for label, (low, high) in enumerate([(11, 12), (1, 2), (0, 1)]):
            assert turns[labels == label].unique().tolist() == [low, high]
    assert not torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    seen = torch.cat(epochs).remainder(300).unique()
    assert len(seen) > 270  # what a large class leaves out is another part each time


def order(labels: torch.Tensor, *, epoch: int = 0, skip: int = 0, rank: int = 0, world_size: int = 1):
    places: dict[str, Any] = {"batch_size": 8 // world_size, "seed": 1, "rank": rank, "world_size": world_size}
    made = TrainOrder(size=len(labels), position=lambda: (epoch, skip), balance=labels, **places)
    return [draw.indices.tolist() for draw in made]


def test_balanced_order_resumes_and_is_shared_out_as_the_plain_one():
    labels = torch.tensor([0] * 70 + [1] * 10)
    whole = order(labels, epoch=3)
    assert order(labels, epoch=3, skip=4) == whole[4:]
    assert order(labels, epoch=4) != whole
    ranks = [order(labels, epoch=3, rank=rank, world_size=2) for rank in range(2)]
    assert [set(a + b) for a, b in zip(*ranks, strict=True)] == [set(batch) for batch in whole]


def test_balanced_batches_hold_repeated_images_as_different_views(tmp_path):
    """What reaches the model: labels of equal frequency, and indices that tell the repetitions apart."""
    for i in range(24):
        image(tmp_path / "set" / ("rare" if i < 4 else "frequent") / f"{i}.png", i)
    module = ImageDataModule(
        dataset=str(tmp_path / "set"), root=str(tmp_path / "root"), batch_size=5, num_workers=0, balance=True,
        val_fraction=1 / 6,
    )  # fmt: skip
    module.setup()
    found = list(module.train_dataloader())
    size = len(module.train)
    labels, indices = (torch.cat([getattr(batch, name) for batch in found]) for name in ("labels", "indices"))
    pixels = torch.cat([batch.images for batch in found])[:, 0, 0, 0]
    assert labels.bincount().tolist() == [10, 10]  # of 17 and 3 images
    assert len(indices.unique()) == len(indices)
    first = {int(i) % size: int(p) for i, p in zip(indices, pixels, strict=True)}
    assert all(first[int(i) % size] == int(p) for i, p in zip(indices, pixels, strict=True))
    assert ((pixels < 4) == (labels == 1)).all()


# End to end


def test_training_from_a_table_with_balance(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(30):
        path = tmp_path / "images" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (14, 9, 3), dtype=np.uint8)).save(path)
        rows.append({"path": str(path), "label": "ab"[i < 6]})
    status = train.main(
        [
            *(
                "fit",
                "--data.dataset",
                str(write(tmp_path / "labels.csv", rows)),
                "--data.root",
                str(tmp_path / "root"),
            ),
            *("--data.image_size", "[12, 8]", "--data.batch_size", "5", "--data.balance", "true"),
            *("--model.embed_dim", "16", "--model.depth", "1", "--model.num_heads", "2", "--model.patch_size", "4"),
            *("--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.max_epochs", "1"),
            *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
        ]
    )
    assert status == 0, capsys.readouterr().err
    model, about = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert (model.image_size, about.class_names) == ((12, 8), ("a", "b"))


def test_what_pandas_writes_for_nothing_is_nothing():
    assert [cell(value) for value in (float("nan"), None, " a ", 3)] == ["", "", "a", "3"]
