"""Which images a command line names: walking, globs, standard input; against glob and os.walk where they apply."""

import glob
import io
import os
import subprocess
import sys
from itertools import islice

import pytest

from vit.inputs import Inputs, Unreadable, expand, read_paths

ODD = [b"a b.png", b"new\nline.png", b"\xc3\xbc.png", b"\xff\xfe.png", b"[1].png", b"-x.png", b"quote'\".PNG"]


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_folder_gives_its_images_by_name_and_counts_the_rest(tmp_path):
    touch(*(tmp_path / name for name in ("b.jpg", "a.PNG", "c.txt", "noending", "out.csv.partial", "sub/d.png")))
    inputs = Inputs([str(tmp_path)])
    assert list(inputs) == [f"{tmp_path}/a.PNG", f"{tmp_path}/b.jpg"]
    assert inputs.passed_over == {".txt": 1, "": 1}
    assert inputs.subfolders == 1
    assert list(inputs) == [f"{tmp_path}/a.PNG", f"{tmp_path}/b.jpg"]  # again from the start
    assert list(Inputs([str(tmp_path)], recursive=True))[-1] == f"{tmp_path}/sub/d.png"


def test_odd_names_come_through_unharmed(tmp_path):
    for name in ODD:
        (tmp_path / os.fsdecode(name)).touch()
    found = [os.path.basename(os.fsencode(str(path))) for path in Inputs([str(tmp_path)])]
    assert sorted(found) == sorted(ODD)
    assert list(Inputs([f"{tmp_path}/[1].png"])) == [f"{tmp_path}/[1].png"]  # a file, not a pattern


def test_links_are_followed_but_not_in_circles_and_folders_named_like_images_are_folders(tmp_path):
    touch(tmp_path / "tree/x.jpg/inside.png", tmp_path / "other/b.png")
    (tmp_path / "tree/up").symlink_to(tmp_path / "tree")
    (tmp_path / "tree/other").symlink_to(tmp_path / "other")
    (tmp_path / "tree/self.png").symlink_to(tmp_path / "tree/self.png")
    found = list(Inputs([str(tmp_path / "tree")], recursive=True))
    assert found == [f"{tmp_path}/tree/{name}" for name in ("other/b.png", "self.png", "x.jpg/inside.png")]
    assert list(Inputs([str(tmp_path / "tree/x.jpg")])) == [f"{tmp_path}/tree/x.jpg/inside.png"]


def test_links_do_not_multiply_folders(tmp_path):
    """Two links in each of forty folders to the next one: a million million paths to the last."""
    for number in range(40):
        touch(tmp_path / f"{number:02}/{number}.png")
        for link in ("a", "b") if number else ():
            (tmp_path / f"{number - 1:02}" / link).symlink_to(f"../{number:02}")
    found = list(Inputs([str(tmp_path)], recursive=True))
    assert sorted(os.path.basename(str(path)) for path in found) == sorted(f"{number}.png" for number in range(40))


def test_what_leads_to_no_image_takes_a_place(tmp_path):
    (tmp_path / "empty").mkdir()
    nothing, pattern, missing = f"{tmp_path}/empty", f"{tmp_path}/*.gif", f"{tmp_path}/missing.png"
    assert list(Inputs([nothing, pattern, missing])) == [
        Unreadable(nothing, "no images in this folder; --recursive looks into its subfolders"),
        Unreadable(pattern, "no file matches"),
        missing,  # which opening will find out
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_may_not_be_read_takes_a_place(tmp_path):
    touch(tmp_path / "closed/a.png", tmp_path / "z.png")
    (tmp_path / "closed").chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        found = list(Inputs([str(tmp_path)], recursive=True))
    finally:
        os.seteuid(0)
    assert found == [Unreadable(f"{tmp_path}/closed", "Permission denied"), f"{tmp_path}/z.png"]


def test_what_is_hidden_and_this_run_s_maps_are_no_images(tmp_path, monkeypatch):
    """Beside a.png: what macOS leaves, a thumbnail, a cache, and the maps of the run before."""
    touch(*(tmp_path / name for name in ("a.png", "._a.png", ".thumbs/t.png", "maps/sheet.png", "maps/b/a.png.png")))
    touch(tmp_path / "maps of it" / "b.png")
    monkeypatch.chdir(tmp_path)
    inputs = Inputs(["."], recursive=True, maps="maps")
    assert list(inputs) == ["./a.png", "./maps of it/b.png"]
    assert inputs.passed_over == {"hidden": 2}
    inputs = Inputs(["."])  # does not look for folders
    assert list(inputs) == ["./a.png"]
    assert inputs.passed_over == {"hidden": 1}
    (tmp_path / "._a.png").unlink()
    assert list(inputs) == ["./a.png"]
    assert not inputs.passed_over
    (tmp_path / "._a.png").touch()
    assert list(Inputs([".thumbs", "._a.png"])) == [".thumbs/t.png", "._a.png"]  # where they are named
    inputs = Inputs(["**/*.png"], maps=str(tmp_path / "maps"))
    assert list(inputs) == ["a.png", "maps of it/b.png"]
    assert inputs.in_maps == 2
    assert len(list(Inputs(["**/*.png"]))) == 4


def test_the_same_image_twice_is_two_images(tmp_path):
    touch(tmp_path / "a.png")
    assert list(Inputs([f"{tmp_path}/a.png", str(tmp_path)])) == [f"{tmp_path}/a.png"] * 2


@pytest.mark.parametrize(
    "pattern",
    [
        *("*.png", "**/*.png", "**", "a/**/c?.jpg", "*/*", "?[ab]*", "**/b/**/*", "**/**/*.png", ".*", "a/b/c1.jpg"),
        *("x/*", "./*.png", "a/../*.png"),
    ],
)
@pytest.mark.parametrize("absolute", [True, False])
def test_globs_match_what_glob_matches_in_a_fixed_order(pattern, absolute, tmp_path, monkeypatch):
    names = ["1.png", "ab.png", "aa/2.png", "a/b/c1.jpg", "a/c2.jpg", "a/b/b/c3.jpg", ".hidden.png", ".dot/3.png"]
    touch(*(tmp_path / name for name in names))
    (tmp_path / "a/link").symlink_to(tmp_path / "aa")
    monkeypatch.chdir(tmp_path)
    pattern = f"{tmp_path}/{pattern}" if absolute else pattern
    expected = {path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
    if "**" in pattern:  # glob goes through links there, and so twice to a file or for ever
        expected = {path for path in expected if "link" not in path}
    found = list(expand(pattern))
    assert set(found) == expected
    assert len(found) == len(expected)
    assert found == list(expand(pattern))
    folders = list(dict.fromkeys(map(os.path.dirname, found)))
    if "**" not in pattern:  # there what lies in a folder may come before and behind what lies below it
        assert found == [path for folder in folders for path in sorted(found) if os.path.dirname(path) == folder]


@pytest.mark.parametrize("ending", [b"\n", b"\0", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_paths_on_standard_input(ending, last):
    names = [name for name in ODD if ending == b"\0" or b"\n" not in name]
    stream = io.BytesIO(ending.join(names) + ending * last)
    assert [os.fsencode(path) for path in read_paths(stream)] == names


def test_a_writer_that_pauses_within_a_path_and_one_that_marks_its_text():
    class Slow(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            return super().read1(3)

    assert list(read_paths(Slow(b"a/long.png\0b.png\0"))) == ["a/long.png", "b.png"]
    assert list(read_paths(io.BytesIO(b"\xef\xbb\xbfa.png\nb.png\n"))) == ["a.png", "b.png"]


@pytest.fixture
def depth():
    """As deep as Python goes by itself; torch's compiler lets it go deeper, and leaves it so."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


def test_folders_too_deep_to_be_walked_take_a_place(tmp_path, depth):
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "a.png").touch()
    here = os.open(folder, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("b", dir_fd=here)
        below = os.open("b", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    try:
        for source in (str(folder), f"{folder}/**/*.png"):
            first, last = Inputs([source], recursive=True)
            assert (first, last) == (str(folder / "a.png"), Unreadable(source, last.error))  # type: ignore[union-attr]
            assert "too deep" in last.error  # type: ignore[union-attr]
    finally:
        subprocess.run(["rm", "-r", folder], check=True)  # which Python's own cannot


def test_paths_longer_than_a_block_are_whole():
    names = [f"{'x' * 300}{i}.png" for i in range(2000)]
    assert list(read_paths(io.BytesIO("\n".join(names).encode()))) == names


def test_a_hundred_thousand_paths_are_not_loaded_first():
    class Endless(io.RawIOBase):
        read_so_far = 0

        def readable(self):
            return True

        def read1(self, size):
            self.read_so_far += 1
            return b"a.png\n" * 100

    stream = Endless()
    assert list(islice(Inputs(["-"], stdin=stream), 1000)) == ["a.png"] * 1000  # pyright: ignore
    assert stream.read_so_far == 10
