"""The sheet of maps in TensorBoard: there, of the right images, when it is due, and without a trace in the training."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from data.sources import load_digits
from vit.preprocess import Preprocess
from vit.watch import Watch, picture

ROOT = Path(__file__).parent.parent
WATCH = ["--trainer.callbacks=vit.watch.Watch", "--trainer.callbacks.every_n_epochs=2", "--trainer.callbacks.images=6"]


def fit(root: Path, *arguments: str) -> None:
    code = train.main(
        [
            "fit",
            f"--config={ROOT / 'configs/digits.yaml'}",
            "--model.embed_dim=16",
            "--model.depth=2",
            "--model.num_heads=2",
            "--model.drop_path_rate=0.2",  # random numbers beside those of the images
            "--data.batch_size=256",
            "--trainer.max_epochs=4",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={root}",
            *arguments,
        ]
    )
    assert code == 0


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("watched")
    fit(root, *WATCH)
    return root


def test_sheets_are_in_the_event_file_when_due(watched):
    (file,) = watched.glob("events.out.tfevents*")
    events = EventAccumulator(str(file), size_guidance={"images": 0})
    events.Reload()
    sheets = events.Images("val/maps")
    assert [sheet.step for sheet in sheets] == [5, 15]  # after epochs 1 and 3, of five steps each
    pictures = []
    for sheet in sheets:
        with Image.open(io.BytesIO(sheet.encoded_image_string)) as image:
            pictures.append(np.asarray(image.convert("RGB")))
    assert pictures[0].shape == pictures[1].shape
    assert pictures[0].std() > 30  # no blank page
    assert (pictures[0] != pictures[1]).any()  # the maps have moved on


def test_no_image_is_on_the_sheet_twice():
    images = torch.arange(12.0).view(12, 1, 1, 1)
    model: Any = None
    for limit in (None, 5):  # fewer images than the sheet has places, and validations that are cut short
        trainer: Any = SimpleNamespace(
            val_dataloaders=SimpleNamespace(dataset=images), world_size=1, is_global_zero=True, sanity_checking=False,
            strategy=None, state=SimpleNamespace(fn="fit"), loggers=[TensorBoardLogger("unused")],
        )  # fmt: skip
        watch = Watch(images=16)
        for _ in range(3):
            watch.on_validation_start(trainer, model)
            batch = SimpleNamespace(images=images[:limit], labels=torch.zeros(len(images[:limit])))
            watch.on_validation_batch_end(trainer, model, None, batch, 0)
        assert [int(image) for image, _ in watch.kept] == list(range(limit or 12))


def test_training_is_the_same_with_it(watched, tmp_path):
    fit(tmp_path)
    first, second = (torch.load(root / "last.ckpt", weights_only=True) for root in (watched, tmp_path))
    assert first["global_step"] == second["global_step"]
    assert all(torch.equal(first["state_dict"][name], second["state_dict"][name]) for name in first["state_dict"])


def test_it_shows_the_images_of_the_data_set():
    pixels = load_digits().train.images[torch.arange(3)]
    preprocess = Preprocess(image_size=(8, 8), mean=(0.3,), std=(0.4,))
    for image, expected in zip(preprocess.normalize(pixels), pixels, strict=True):
        np.testing.assert_array_equal(np.asarray(picture(image, preprocess))[..., 0], expected[0])
    colour = torch.randint(0, 256, (1, 3, 4, 6), dtype=torch.uint8)
    preprocess = Preprocess(image_size=(4, 6), mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))
    np.testing.assert_array_equal(
        np.asarray(picture(preprocess.normalize(colour)[0], preprocess)), colour[0].permute(1, 2, 0)
    )


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="Watch: method 'rolout' is not one of rollout, "):
        Watch(method="rolout")
    with pytest.raises(ValueError, match="at least 1 epoch and 1 image, got 0 and 16"):
        Watch(every_n_epochs=0)
