"""Sets of TensorFlow Datasets, written here as its users write them; see test_stream.py for the other hubs."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import data.cache
import train
from data.datamodule import ImageDataModule
from data.hub import copy_of, copy_tfds
from data.sources import DataError, load_source
from vit.checkpoint import load_checkpoint

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None, reason="needs tensorflow-datasets"
)
SPLITS = {  # as tfds_pets.py writes them
    "train": range(40),
    "validation": range(40, 52),
    "test": range(60, 75),
}
NAMES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Written by a process of its own: array_record must not be used by one that is forked later."""
    folder = tmp_path_factory.mktemp("tfds")
    subprocess.run([sys.executable, Path(__file__).with_name("tfds_pets.py"), folder], check=True)
    return folder


def test_sets_are_read_by_name(root, monkeypatch):
    source: Any = load_source("tfds/pets", root=root, num_workers=0)
    assert source.class_names == tuple(NAMES)
    for split, numbers in (("train", SPLITS["train"]), ("val", SPLITS["validation"]), ("test", SPLITS["test"])):
        part = getattr(source, split)
        assert part.images.shape == (len(numbers), 3, 10, 12)
        assert part.images[:, 0, 4, 4].tolist() == list(numbers)
        assert part.labels.tolist() == [number % 3 for number in numbers]
    assert source.train.files.path(3) == "tfds/pets train, image 3"
    assert not {"tensorflow", "array_record"} & sys.modules.keys()  # not in the process whose workers are forked

    monkeypatch.setattr("data.hub.copy_tfds", None)  # the second time nothing is copied
    assert torch.equal(load_source("tfds/pets", root=root).train.labels, source.train.labels)


def test_large_sets_are_read_by_workers(root, monkeypatch):
    monkeypatch.setattr(data.cache, "LIMIT", 1)
    module = ImageDataModule(dataset="tfds/pets", root=str(root), image_size=8, num_workers=2, batch_size=8)
    module.setup()
    seen = {}
    for batch in module.train_dataloader():
        seen |= dict(zip(batch.indices.tolist(), batch.images[:, 0, 4, 4].tolist(), strict=True))
    assert seen == {number: number for number in SPLITS["train"]}


def test_training_by_name(root, tmp_path):
    common = [
        *("--data.dataset", "tfds/pets", "--data.root", str(root), "--data.image_size", "8", "--data.num_workers", "0"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
        *("--model.embed_dim", "16", "--model.depth", "1", "--model.num_heads", "2", "--model.patch_size", "4"),
        *("--trainer.max_epochs", "1", "--trainer.default_root_dir", str(tmp_path / "run")),
    ]
    assert train.main(["fit", *common]) == 0
    _, about = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert about.class_names == tuple(NAMES)
    assert train.main(["test", *common, "--ckpt_path", "best"]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonesuch", r"tfds/nonesuch: cannot be had \(Dataset nonesuch not found"),
        ("pets:2.0.0", r"tfds/pets:2.0.0: cannot be had \("),
    ],
)
def test_unusable_names_are_one_line(root, name, message):
    with pytest.raises(DataError, match=message) as caught:
        copy_tfds(name, root)
    assert "\n" not in str(caught.value)
    assert "array_record.python.array_record_module" not in sys.modules


def test_damaged_images_are_named(root, tmp_path):
    shutil.copytree(root / "pets", tmp_path / "pets")  # keeps the times of change
    (tmp_path / "cache").mkdir()
    index = copy_of("pets", tmp_path)
    for path in (root / "cache").glob(f"{copy_of('pets', root).stem}.*"):
        shutil.copy(path, index.with_suffix(path.suffix))
    stored = index.with_suffix(".train")
    stored.write_bytes(b"no image" + stored.read_bytes()[8:])
    with pytest.raises(DataError, match=r"^tfds/pets train, image 0: not an image of a known format"):
        load_source("tfds/pets", root=tmp_path, image_size=8, num_workers=0)


def test_damaged_record_files_are_one_line(root, tmp_path):
    shutil.copytree(root / "pets", tmp_path / "pets")
    (file,) = tmp_path.glob("pets/1.0.0/pets-train.array_record*")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"^tfds/pets.*: ") as caught:
        load_source("tfds/pets", root=tmp_path, num_workers=0)
    assert "\n" not in str(caught.value)
