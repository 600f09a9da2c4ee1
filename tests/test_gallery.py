"""Where maps go: names that are safe, unique, and mirror the images'."""

import os
from pathlib import PurePosixPath

import pytest

from vit.gallery import NAME_MAX, map_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/b.jpg", "a/b.jpg.png"),
        ("./a//b.jpg", "a/b.jpg.png"),  # the same image
        ("/a/b.jpg", "%2F/a/b.jpg.png"),
        ("../b.jpg", "%2E%2E/b.jpg.png"),
        ("ü ñ.jpg", "ü ñ.jpg.png"),
        ("new\nline.jpg", "new%0Aline.jpg.png"),
        ("100%.jpg", "100%25.jpg.png"),
        (os.fsdecode(b"\xff.jpg"), "%FF.jpg.png"),
    ],
)
def test_names(path, name):
    assert map_name(path) == name


def test_different_images_have_different_maps():
    paths = [
        "a.jpg", "a.png", "a.jpg.png", "A.jpg", "b/a.jpg", "/b/a.jpg", "../b/a.jpg", "%2E%2E/b/a.jpg", "%2F/b/a.jpg",
        "b%2Fa.jpg", "b\\a.jpg", "b\n.jpg", "b%0A.jpg", *("x" * n + ".jpg" for n in (247, 248, 249, 251)),
        "y" * 251 + ".jpg", "y" * 250 + "z.jpg", "ü" * 125 + ".png", "ü" * 125 + ".gif",
    ]  # fmt: skip
    names = [map_name(path) for path in paths]
    assert len(set(names)) == len(paths)
    for name in names:
        parts = PurePosixPath(name).parts
        assert not name.startswith("/")
        assert ".." not in parts
        assert max(len(part.encode()) for part in parts) <= NAME_MAX
        assert name.isprintable()
