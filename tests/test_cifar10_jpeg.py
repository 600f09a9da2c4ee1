"""benchmarks/cifar10_jpeg.py: the files that the figures on CIFAR-10 were measured on."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

from benchmarks.cifar10_jpeg import write


def test_copy_is_written_as_the_one_that_was_measured(tmp_path, cifar10_jpeg):
    """Names by class and order; the same tables and the same colour resolution as the copy."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    images: Any = SimpleNamespace(data=pixels, targets=[0, 1, 1, 0, 1], classes=["cat", "dog"])
    write(tmp_path, images)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jpg"))
    assert files == ["cat/0000.jpg", "cat/0001.jpg", "dog/0000.jpg", "dog/0001.jpg", "dog/0002.jpg"]
    with Image.open(tmp_path / "dog/0000.jpg") as ours, Image.open(cifar10_jpeg / "test/dog/0000.jpg") as theirs:
        assert ours.quantization == theirs.quantization  # type: ignore[attr-defined]
        assert JpegImagePlugin.get_sampling(ours) == JpegImagePlugin.get_sampling(theirs)
