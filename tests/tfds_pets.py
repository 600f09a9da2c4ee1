"""Writes a small set of TensorFlow Datasets into a folder, as its users do: ``python tests/tfds_pets.py FOLDER``."""

import io
import sys
from typing import Any

import tensorflow_datasets
from PIL import Image

tfds: Any = tensorflow_datasets

SPLITS = {"train": range(40), "validation": range(40, 52), "test": range(60, 75)}
NAMES = ["cat", "dog", "owl"]


def png(number: int) -> io.BytesIO:
    """An image of one colour, which is its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (number, 3 * number, 99)).save(buffer, "PNG")
    buffer.seek(0)
    return buffer


class Pets(tfds.core.GeneratorBasedBuilder):
    """Has a second column of images and one of classes, and they come first in the alphabet."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        columns = {
            "age": tfds.features.ClassLabel(names=["young", "old"]),
            "depth": tfds.features.Image(),
            "kind": tfds.features.ClassLabel(names=NAMES),
            "photo": tfds.features.Image(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(columns),
            supervised_keys=("photo", "kind"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        for number in SPLITS[split]:
            yield number, {"age": 0, "depth": png(200), "kind": NAMES[number % 3], "photo": png(number)}


if __name__ == "__main__":
    Pets(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
