"""Decoding image files: values, the decode-once cache and what happens when files or disks are bad."""

import contextlib
import multiprocessing
import os
import pickle
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor
from torch._utils import ExceptionWrapper

import data.cache
from data.cache import (
    BadFiles,
    DataError,
    ImageFiles,
    OnBad,
    alone,
    cached_images,
    cached_statistics,
    channel_statistics,
    open_array,
    readable,
    write_array,
)
from vit.preprocess import Preprocess

SIZE = (6, 8)  # height, width


def noise(count: int) -> np.ndarray:
    """Images (N, H, W, 3) of which no two are alike."""
    return np.random.default_rng(0).integers(0, 256, (count, *SIZE, 3), dtype=np.uint8)


def files_of(folder, names, *, size=SIZE, size_from=None) -> ImageFiles:
    preprocess = Preprocess(image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3)
    names = np.array([os.fsencode(name) for name in names])
    return ImageFiles(folder=str(folder), names=names, preprocess=preprocess, size_from=size_from)


@pytest.fixture
def pixels():
    return noise(7)


@pytest.fixture
def files(tmp_path, pixels) -> ImageFiles:
    """Seven lossless images."""
    folder = tmp_path / "images"
    folder.mkdir()
    names = [f"{i}.png" for i in range(len(pixels))]
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image).save(folder / name)
    return files_of(folder, names)


@pytest.fixture
def build(tmp_path):
    """``cached_images`` with a cache of the test's own."""

    def run(files: ImageFiles, num_workers: int = 0):
        return cached_images(files, name="set", folder=tmp_path / "cache", num_workers=num_workers)

    return run


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Paths of the images decoded in this process."""
    calls = []
    original = data.cache.open_image

    def counting(path, mode, **how):
        calls.append(path)
        return original(path, mode, **how)

    monkeypatch.setattr(data.cache, "open_image", counting)
    return calls


@pytest.mark.parametrize("num_workers", [0, 2])
def test_cached_pixels_are_the_files_pixels_in_order(files, pixels, build, num_workers, monkeypatch):
    monkeypatch.setattr(data.cache, "CHUNK", 2 * pixels[0].size)  # 7 images: 4 chunks, the last one short
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    images = build(files, num_workers)
    assert images.dtype == torch.uint8
    assert torch.equal(images, expected)
    assert images.is_contiguous()
    chosen = torch.tensor([5, 0, 5])
    assert torch.equal(files[chosen], expected[chosen])


def test_second_load_maps_the_file_and_decodes_nothing(files, build, decoded):
    first = build(files)
    assert len(decoded) == len(files)
    again = build(files_of(files.folder, [os.fsdecode(name) for name in files.names]))
    assert len(decoded) == len(files)
    assert torch.equal(first, again)


def test_mapped_pixels_can_be_written_without_changing_the_cache(files, build):
    images = build(files)
    before = images.clone()
    images.zero_()
    assert torch.equal(build(files), before)


def test_changed_file_is_decoded_again(files, pixels, build):
    old = build(files)
    Image.fromarray(255 - pixels[3]).save(files.path(3))
    changed = files_of(files.folder, [os.fsdecode(name) for name in files.names])
    new = build(changed)
    assert torch.equal(new[3], 255 - old[3])
    assert torch.equal(new[:3], old[:3])


def test_key_depends_on_all_that_decoding_depends_on(files):
    names = [os.fsdecode(name) for name in files.names]

    def key(**changes):
        return files_of(files.folder, changes.pop("names", names), **changes).key

    os.utime(files.path(0), ns=(1, 1_000_000_001))
    keys = [key(), key(names=names[:-1]), key(names=names[::-1]), key(size=(6, 7)), key(size_from=files.path(0))]
    os.utime(files.path(0), ns=(1, 1_000_000_002))
    keys.append(key())
    path = Path(files.path(0))
    path.write_bytes(bytes(255 - b for b in path.read_bytes()))  # a file of the same size and time
    os.utime(path, ns=(1, 1_000_000_002))
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:40],
        lambda content: b"",
        lambda content: content + b"\0",
        lambda content: b"\0" * len(content),
        lambda content: content.replace(b"(7, 3, 6, 8)", b"(7, 3, 8, 6)"),
        lambda content: content.replace(b"|u1", b"|i1"),
    ],
    ids=["byte short", "header short", "empty", "byte long", "zeros", "other shape", "other type"],
)
def test_damaged_cache_is_rebuilt(files, build, tmp_path, damage, decoded):
    good = build(files).clone()
    (cache,) = (tmp_path / "cache").glob("*.npy")
    content = cache.read_bytes()
    assert damage(content) != content
    cache.write_bytes(damage(content))
    decoded.clear()
    assert torch.equal(build(files), good)
    assert len(decoded) == len(files)
    assert cache.read_bytes() == content


def test_cache_is_a_plain_numpy_file(files, build, tmp_path):
    images = build(files)
    (cache,) = (tmp_path / "cache").glob("*")
    assert np.array_equal(np.load(cache), images.numpy())


def test_slower_of_two_writers_loses_its_file_but_not_its_cache(tmp_path):
    """The quicker one removes the slower one's temporary file, taking it for a left-over."""
    path, shape = tmp_path / "x.npy", (2, 1, 1, 1)
    content = torch.tensor([1, 2], dtype=torch.uint8).view(shape)

    def slow():
        yield content[:1]
        write_array(path, shape, [content])
        yield content[1:]

    write_array(path, shape, slow())
    assert open_array(path, shape) is not None
    assert np.array_equal(np.load(path), content)
    assert os.listdir(tmp_path) == ["x.npy"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Python's own way is kept")
def test_on_linux_workers_see_what_is_in_memory_whatever_python_starts_by_default(files, tmp_path, monkeypatch):
    """As by 3.14 each imports all of torch anew, for seconds and a gigabyte."""
    before = multiprocessing.get_start_method()
    monkeypatch.setattr(data.cache, "CHUNK", 2 * 3 * SIZE[0] * SIZE[1])
    monkeypatch.setattr(data.cache, "open_image", lambda *_, **__: Image.new("RGB", (SIZE[1], SIZE[0]), "white"))
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        images = cached_images(files, name="set", folder=tmp_path / "cache", num_workers=2)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert (images[torch.arange(len(files))] == 255).all()


def build_at(barrier, files, folder, results):
    barrier.wait(60)
    images = cached_images(files, name="set", folder=folder, num_workers=0)
    results.put(images[torch.arange(len(files))].sum().item())


def test_two_processes_build_at_once(files, pixels, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (barrier, files, tmp_path / "cache", results)
    processes = [context.Process(target=build_at, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [pixels.sum()] * 2
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"]


def test_interrupted_build_leaves_nothing(tmp_path):
    def stopped():
        yield torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_array(tmp_path / "x.npy", (2, 1, 1, 1), stopped())
    assert os.listdir(tmp_path) == []


def test_a_cache_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Or else a machine that loses its power could leave one of the right size and full of zeros."""
    order, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), rename(*paths)))
    write_array(tmp_path / "x.npy", (1,), [torch.zeros(1, dtype=torch.uint8)])
    assert order == ["fsync", "replace"]


def test_left_over_of_a_killed_process_is_removed(tmp_path):
    (tmp_path / "x.npy.0123.tmp").touch()
    (tmp_path / "y.npy.0123.tmp").touch()
    write_array(tmp_path / "x.npy", (1,), [torch.zeros(1, dtype=torch.uint8)])
    assert sorted(os.listdir(tmp_path)) == ["x.npy", "y.npy.0123.tmp"]


def test_full_disk_names_the_cache_and_leaves_nothing(files, build, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # bytes a file may have
    try:
        with pytest.raises(DataError, match=r"cache/set-\w+\.npy: cannot write the cache \(File too large\)"):
            build(files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "cache") == []


def test_cache_folder_that_cannot_be_made_is_named(files, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/cache/set-\w+\.npy: cannot write the cache \(Not a directory\)"):
        cached_images(files, name="set", folder=tmp_path / "file" / "cache", num_workers=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_files_are_named(files, build, num_workers, monkeypatch):
    monkeypatch.setattr(data.cache, "CHUNK", 2 * 3 * SIZE[0] * SIZE[1])
    for index, content in [(1, b""), (4, b"no image"), (5, Path(files.path(5)).read_bytes()[:60])]:
        Path(files.path(index)).write_bytes(content)
    with pytest.raises(BadFiles, match=rf"^{files.path(1)}: .*; repair or remove it$") as error:
        build(files, num_workers)
    assert list(error.value.reasons) == [1, 4, 5]


@pytest.fixture
def check(tmp_path, files):
    """``readable`` for two splits: all seven images to train, of two classes, and the first three to test."""

    def run(on_bad: OnBad = "fail", num_workers: int = 0, **change: Tensor):
        parts = {"train": files, "test": replace(files, names=files.names[:3])}
        labels = {"train": torch.arange(7) % 2, "test": torch.arange(3) % 2} | change
        for part in parts.values():
            part.__dict__.pop("key", None)  # as a new process sees it
        cache = tmp_path / "cache"
        return readable(parts, labels, name="x", folder=cache, num_workers=num_workers, on_bad=on_bad)

    return run


def spoil(files: ImageFiles, *indices: int) -> None:
    """Cut files short: their headers and sizes are right, so that only decoding finds them."""
    for index in indices:
        path = Path(files.path(index))
        path.write_bytes(path.read_bytes()[:-40])


sizes = pytest.mark.parametrize("limit", [data.cache.LIMIT, 0], ids=["in memory", "large"])


@sizes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_bad_files_of_all_splits_are_listed(files, check, tmp_path, monkeypatch, limit, num_workers):
    monkeypatch.setattr(data.cache, "LIMIT", limit)
    monkeypatch.setattr(data.cache, "CHUNK", 2 * 3 * SIZE[0] * SIZE[1])
    spoil(files, 1, 4, 6)
    with pytest.raises(DataError) as error:
        check(num_workers=num_workers)
    report = tmp_path / "cache" / "x-unreadable.txt"
    assert str(error.value).startswith(f"{files.path(1)}: ")
    assert f"(and 3 more of 10 files); all are listed in {report}; --data.on_bad skip" in str(error.value)
    listed = [line.partition(": ")[0] for line in report.read_text().splitlines()]
    assert listed == [files.path(i) for i in (1, 4, 6, 1)]  # the last one of the test split


@sizes
def test_bad_files_are_left_out_on_request(files, pixels, check, monkeypatch, capfd, limit):
    monkeypatch.setattr(data.cache, "LIMIT", limit)
    spoil(files, 1, 4)
    for _ in range(2):  # said once a process
        kept, labels = check("skip")
    assert [kept["train"].path(i) for i in range(len(kept["train"]))] == [files.path(i) for i in (0, 2, 3, 5, 6)]
    assert labels["train"].tolist() == [0, 0, 1, 1, 0]
    assert labels["test"].tolist() == [0, 0]
    expected = torch.from_numpy(pixels[[0, 2, 3, 5, 6]]).permute(0, 3, 1, 2)
    assert torch.equal(kept["train"][torch.arange(5)], expected)
    assert capfd.readouterr().err.count("3 of 10 files cannot be read and are left out") == 1


@sizes
@pytest.mark.parametrize("on_bad", ["fail", "skip"])
def test_second_check_reads_the_bad_files_alone(files, check, monkeypatch, decoded, limit, on_bad):
    monkeypatch.setattr(data.cache, "LIMIT", limit)
    spoil(files, 1, 4)
    for expected in (10, 3):  # 1 and 4 of train, 1 of test
        decoded.clear()
        with contextlib.suppress(DataError):
            check(on_bad)
        assert len(decoded) == expected


def test_files_left_over_are_not_checked_once_more(files, check, tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(data.cache, "LIMIT", 0)
    spoil(files, 1, 4)
    kept, _ = check("skip")
    decoded.clear()
    assert cached_images(kept["train"], name="x-train", folder=tmp_path / "cache", num_workers=0) is kept["train"]
    assert not decoded


@sizes
def test_sound_files_are_read_once(check, monkeypatch, decoded, limit):
    monkeypatch.setattr(data.cache, "LIMIT", limit)
    check()
    assert len(decoded) == 10
    check()
    assert len(decoded) == 10


@sizes
def test_repaired_files_are_all_there(files, pixels, check, monkeypatch, limit):
    """One is written anew; the other is as it was, and only now may be read."""
    monkeypatch.setattr(data.cache, "LIMIT", limit)
    spoil(files, 1)
    opened = ImageFiles.open

    def refused(self: ImageFiles, index: int, **how: Any) -> Image.Image:
        if index == 2:
            raise DataError("stale file handle")
        return opened(self, index, **how)

    monkeypatch.setattr(ImageFiles, "open", refused)
    assert len(check("skip")[0]["train"]) == 5
    Image.fromarray(pixels[1]).save(files.path(1))
    assert len(check("skip")[0]["train"]) == 6
    monkeypatch.setattr(ImageFiles, "open", opened)
    assert len(check()[0]["train"]) == 7


def test_class_of_bad_files_alone_is_an_error(files, check):
    spoil(files, 5, 6)
    with pytest.raises(DataError, match=r"5\.png: .* a class of x has no train images"):
        check("skip", train=torch.tensor([0, 0, 0, 0, 0, 1, 1]))
    spoil(files, 0, 1, 2)  # all of the test split
    with pytest.raises(DataError, match=r"0\.png: .* a class of x has no test images"):
        check("skip", train=torch.tensor([0, 0, 0, 0, 1, 1, 1]))


def test_one_process_at_a_time(tmp_path):
    """The second waits for the first, and is let in by its death too."""
    context = multiprocessing.get_context("fork")
    inside = context.Event()

    def enter() -> None:
        with alone(tmp_path / "lock"):
            inside.set()
            time.sleep(60)

    first = context.Process(target=enter)
    first.start()
    assert inside.wait(20)
    with pytest.raises(Timeout):
        FileLock(tmp_path / "lock").acquire(timeout=0)
    first.kill()
    with alone(tmp_path / "lock"):
        first.join()


def test_large_jpegs_are_what_predict_sees(tmp_path, build):
    """In the cache and batch by batch: reduced while they are decoded, where the model sees no more."""
    waves = np.sin(np.linspace(0, 40, 400))[:, None] * np.cos(np.linspace(0, 30, 500)) * 120 + 128
    Image.fromarray(waves.astype(np.uint8)).convert("RGB").save(tmp_path / "large.jpg")
    files = files_of(tmp_path, ["large.jpg"])
    seen = files.preprocess.load(tmp_path / "large.jpg")
    assert torch.equal(build(files)[0], seen)
    assert torch.equal(files[torch.tensor([0])][0], seen)
    assert not torch.equal(seen, files.preprocess(files.open(0)))


def test_vanished_file_is_named(files, build):
    os.remove(files.path(2))
    with pytest.raises(DataError, match=r"images/2\.png: no such file; repair or remove it$"):
        build(files)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_other_size_is_refused_at_once_with_both_files_named(files, build, num_workers, decoded, monkeypatch):
    monkeypatch.setattr(data.cache, "CHUNK", 100 * 3 * SIZE[0] * SIZE[1])
    names = [f"{i % 7}.png" for i in range(5000)]  # many chunks are under way when it is found
    Image.new("RGB", (9, 5)).save(files.path(4))
    with pytest.raises(DataError) as error:
        build(files_of(files.folder, names, size_from=files.path(0)), num_workers)
    assert str(error.value) == (
        f"{files.path(4)} is 9x5 pixels but {files.path(0)} is 8x6: give an image_size to cut all images to"
    )
    assert len(decoded) == (0 if num_workers else 5)  # of 5000
    assert build(files_of(files.folder, names[:7])).shape == (7, 3, *SIZE)


def test_error_in_a_loader_worker_stays_one_line(files):
    """torch raises a worker's error again with the worker's traceback for a message."""
    Path(files.path(3)).write_bytes(b"no image")
    try:
        files[torch.tensor([2, 3])]
    except DataError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")  # as the worker does
    with pytest.raises(DataError) as error:
        wrapped.reraise()
    assert str(error.value).startswith(f"{files.path(3)}: not an image")
    assert str(error.value).endswith("; repair or remove it")


def test_error_message_is_one_printable_line():
    message = str(DataError("a\nb\r" + os.fsdecode(b"\xff") + "é\x1b[31m\x9b\u202e"))
    assert message == "a\\nb\\r\\udcffé\\x1b[31m\\x9b\\u202e"
    assert str(pickle.loads(pickle.dumps(DataError(message)))) == message


def test_names_of_any_bytes(tmp_path, build, pixels):
    names = [os.fsdecode(b"line\nend \xff.png"), "ümläut 猫.png"]
    for name, image in zip(names, pixels, strict=False):
        Image.fromarray(image).save(tmp_path / "plain.png")
        os.rename(tmp_path / "plain.png", tmp_path / name)
    images = build(files_of(tmp_path, names))
    assert torch.equal(images, torch.from_numpy(pixels[:2]).permute(0, 3, 1, 2))


def test_large_split_is_decoded_batch_by_batch(files, build, tmp_path, monkeypatch):
    monkeypatch.setattr(data.cache, "LIMIT", 7 * 3 * SIZE[0] * SIZE[1] - 1)
    assert build(files) is files
    assert not list((tmp_path / "cache").glob("*.npy"))
    monkeypatch.setattr(data.cache, "LIMIT", 7 * 3 * SIZE[0] * SIZE[1])
    assert isinstance(build(files), torch.Tensor)


def test_statistics_of_a_large_split_come_from_a_sample_once(files, pixels, tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(data.cache, "SAMPLE", 4)
    arguments = {"name": "set", "folder": tmp_path / "cache", "num_workers": 0}
    mean, std = cached_statistics(files, files, **arguments)
    assert decoded == [files.path(i) for i in (0, 2, 4, 6)]
    sample = pixels[[0, 2, 4, 6]] / 255
    assert np.allclose(mean, sample.mean((0, 1, 2)), atol=1e-6)
    assert np.allclose(std, sample.std((0, 1, 2)), atol=1e-6)
    assert cached_statistics(files, files, **arguments) == (mean, std)
    assert len(decoded) == 4


def test_statistics_are_exact_and_kept(files, pixels, build, tmp_path, monkeypatch):
    images = build(files)
    arguments = {"name": "set", "folder": tmp_path / "cache", "num_workers": 0}
    mean, std = cached_statistics(files, images, **arguments)
    assert np.allclose(mean, (pixels / 255).mean((0, 1, 2)), atol=1e-6)
    assert np.allclose(std, (pixels / 255).std((0, 1, 2)), atol=1e-6)
    (path,) = (tmp_path / "cache").glob("*.json")
    with monkeypatch.context() as patch:
        patch.setattr(data.cache, "channel_statistics", None)  # it must not be asked again
        assert cached_statistics(files, images, **arguments) == (mean, std)
    for damaged in ("", "{", "[]", '{"mean": [1]}', '{"mean": 1, "std": 2}'):
        path.write_text(damaged)
        assert cached_statistics(files, images, **arguments) == (mean, std)


def test_statistics_of_one_colour_never_divide_by_zero():
    mean, std = channel_statistics([torch.full((2, 1, 4, 4), 51, dtype=torch.uint8)])
    assert mean == (0.2,)
    assert std == (round(1 / 255, 6),)


def test_statistics_do_not_depend_on_the_chunks(pixels):
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert channel_statistics(images.split(3)) == channel_statistics([images])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_building_leaves_the_random_numbers_alone(files, build, num_workers, monkeypatch):
    monkeypatch.setattr(data.cache, "CHUNK", 1)
    before = torch.get_rng_state()
    build(files, num_workers)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_is_printed_without_a_terminal(files, build, capfd, num_workers, monkeypatch):
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE"):  # rich takes them for a terminal
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(data.cache, "CHUNK", 1)
    if num_workers:  # C libraries write to the file descriptor
        original = data.cache.open_image
        monkeypatch.setattr(
            data.cache, "open_image", lambda *args, **how: (os.write(2, b"odd tag"), original(*args, **how))[1]
        )
    build(files, num_workers)
    assert capfd.readouterr() == ("", "")


def test_progress_bar_on_a_terminal(files, build, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    build(files)
    out, err = capfd.readouterr()
    assert out == ""
    assert "decoding set" in err
    assert "7/7" in err


@pytest.mark.parametrize("kind", ["DataError", "data.cache.OtherSize"])
def test_a_worker_s_error_is_one_line(kind):
    """As torch's DataLoader raises it anew, with the class and the traceback as the message."""
    traced = f"Caught {kind} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    traced += f'  File "cache.py", line 1, in load\n    raise {kind}(f"a: b")\n{kind}: a.png: not like b.png: 3x3\n'
    assert str(DataError(traced)) == "a.png: not like b.png: 3x3"
