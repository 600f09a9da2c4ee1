"""What all tests share: few threads, a fixed seed, and folders of real images where the machine has them."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
# Small models: more threads make each other wait, and tests start processes of their own.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


LONG = ("test_train", "test_resume", "test_cluster", "test_predict", "test_sources", "test_memory", "test_survey")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: one left for the end would run alone, while the other processes wait."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def folder(variable: str, what: str) -> Path:
    """The folder an environment variable names; skips the test if it is not set."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no folder of {what}")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def cifar10_jpeg() -> Path:
    """Folder with ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``: CIFAR-10 as JPEG."""
    return folder("CIFAR10_JPEG", "CIFAR-10 images, train/CLASS/*.jpg and test/CLASS/*.jpg")


@pytest.fixture(scope="session")
def pillow_images() -> Path:
    """Folder with Pillow's own test images, hostile ones among them."""
    return folder("PILLOW_IMAGES", "Pillow's test images")
