"""Where maps go: names that are safe, unique, and mirror the images'. What the report gets of the images."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vit import gallery as module
from vit import preprocess
from vit.checkpoint import Checkpoint
from vit.gallery import PATH_MAX, Gallery, explored, map_name
from vit.model import VisionTransformer
from vit.predictor import Predictor
from vit.preprocess import Preprocess, open_image
from vit.records import OutputError
from vit.rollout import CLASS_METHOD, attention_map, layer_attention


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
        ("sheet", "%73heet.png"),  # sheet.png is that of the first maps
        ("./sheet-1-of-2", "%73heet-1-of-2.png"),
        ("sheet.png/b.jpg", "sheet%2Epng/b.jpg.png"),
        ("sheet.png", "sheet.png.png"),
        ("a/sheet", "a/sheet.png"),
    ],
)
def test_names(path, name):
    assert map_name(path) == name


def test_absolute_paths_among_themselves_need_no_mark():
    assert map_name("/a/b.jpg", absolute=True) == "a/b.jpg.png"
    assert map_name("/../b.jpg", absolute=True) == "%2E%2E/b.jpg.png"
    assert map_name("/sheet", absolute=True) == "%73heet.png"
    assert map_name("a/b.jpg", absolute=True) == "%2E/a/b.jpg.png"


@pytest.mark.parametrize("absolute", [False, True])
def test_different_images_have_different_maps(absolute):
    paths = [
        "a.jpg", "a.png", "a.jpg.png", "a.jpg.png/c.jpg", "A.jpg",
        "b/a.jpg", "/b/a.jpg", "../b/a.jpg", "%2E%2E/b/a.jpg", "%2F/b/a.jpg",
        "%2E/b/a.jpg",
        "b%2Fa.jpg", "b\\a.jpg", "b\n.jpg", "b%0A.jpg", *("x" * n + ".jpg" for n in (247, 248, 249, 251)),
        *(f"{'ü/' * 1300}{name}.jpg" for name in "ab"),
        "y" * 251 + ".jpg", "y" * 250 + "z.jpg", "ü" * 125 + ".png", "ü" * 125 + ".gif",
    ]  # fmt: skip
    names = [map_name(path, absolute=absolute) for path in paths]
    assert len(set(names)) == len(paths)
    for name in names:
        parts = PurePosixPath(name).parts
        assert not name.startswith("/")
        assert ".." not in parts
        assert max(len(part.encode()) for part in parts) <= 255  # what file systems allow
        assert len(name.encode()) <= PATH_MAX
        assert name.isprintable()


def test_the_sheet_keeps_small_images_and_where_their_maps_lie():
    kept = module._small({"image": Image.new("RGB", (896, 600)), "box": (148.0, 0.0, 748.0, 600.0)})
    assert (kept["image"].size, kept["box"]) == ((448, 300), (74, 0, 374, 300))


def test_of_a_large_image_no_more_is_kept_than_is_shown(tmp_path, monkeypatch):
    """And it is reduced while no other one is decoded; whatever its mode, it looks the same, and so do small ones."""
    monkeypatch.setattr("vit.preprocess.LARGE", 1000)
    y, x = np.mgrid[:400, :600]
    picture = Image.fromarray(np.stack([x // 3, y // 2, 128 + 90 * np.sin(x / 60)], -1).astype(np.uint8))
    deep = Image.fromarray(np.asarray(picture.convert("L"), np.uint16) * 257)
    alone, reduce = [], Image.Image.reduce
    monkeypatch.setattr(
        Image.Image, "reduce", lambda *given: alone.append(preprocess._one_large.locked()) or reduce(*given)
    )
    for name, image in (("rgb.png", picture), ("p.gif", picture.quantize(64)), ("deep.png", deep)):
        image.save(tmp_path / name)
        found = module.opened(str(tmp_path / name), 100, None)
        assert found.size == (100, 67)
        whole = open_image(tmp_path / name).resize(found.size, Image.Resampling.BOX)
        assert np.abs(np.asarray(found, int) - np.asarray(whole, int)).mean() < 1.5
        assert module.opened(str(tmp_path / name), 301, None).size == (600, 400)
    assert alone == [True] * 3


# ---- the report ----

NAMES = ("cat", "dog", "frog", "ship")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(2)
    model = VisionTransformer(
        image_size=(16, 24), patch_size=4, num_classes=4, embed_dim=24, depth=2, num_heads=3, num_registers=1
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    preprocess = Preprocess(image_size=(16, 24), mean=(0.5,) * 3, std=(0.25,) * 3)
    about = Checkpoint(architecture=model.architecture, class_names=NAMES, preprocess=preprocess)
    return Predictor(model, about, device="cpu")


@pytest.fixture
def paths(tmp_path) -> list[str]:
    """Twelve images of noise, in folders named by class."""
    random = np.random.default_rng(0)
    made = [tmp_path / NAMES[i % 3] / f"{i}.png" for i in range(12)]
    for path in made:
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return [str(path) for path in made]


def test_entries_hold_what_the_page_can_show(predictor, paths, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 5)
    images = predictor.normalized(torch.stack([predictor.preprocess.load(path) for path in paths]))
    logits, heads, patches = layer_attention(predictor.model, images)
    scores = predictor.probabilities(logits)
    likely = float(scores.sort(descending=True).values[:, 2].quantile(0.5))  # some images have a third likely class
    monkeypatch.setattr(module, "LIKELY", likely)
    entries = list(explored(predictor, paths, "last"))
    assert [entry["path"] for entry in entries] == paths
    counts = set()
    for i, entry in enumerate(entries):
        assert entry["scores"] == pytest.approx(dict(zip(NAMES, scores[i].tolist(), strict=True)), abs=1e-5)
        assert list(entry["maps"]) == ["last", "rollout", CLASS_METHOD, "contrast"]
        np.testing.assert_allclose(entry["attention"]["heads"], heads[i], atol=1e-6)
        np.testing.assert_allclose(entry["attention"]["patches"], patches[i], atol=1e-6)
        ordered = [NAMES[c] for c in scores[i].argsort(descending=True)]
        expected = [name for k, name in enumerate(ordered) if k < 2 or entry["scores"][name] >= likely]
        assert list(entry["maps"][CLASS_METHOD]) == expected
        assert list(entry["maps"]["contrast"]) == expected[1:]
        counts.add(len(expected))
        best, other = NAMES.index(expected[0]), NAMES.index(expected[1])
        one = images[i : i + 1]
        asked: dict[str, Any]
        for found, asked in (
            (entry["maps"]["last"], {"method": "last"}),
            (entry["maps"]["rollout"], {}),
            (entry["maps"][CLASS_METHOD][expected[1]], {"method": CLASS_METHOD, "target": other}),
            (entry["maps"]["contrast"][expected[1]], {"method": CLASS_METHOD, "target": best, "against": other}),
        ):
            np.testing.assert_allclose(found, attention_map(predictor.model, one, **asked)[1][0], atol=1e-5)
    assert len(counts) > 1  # so that the batch of questions is ragged
    monkeypatch.setattr(module, "LIKELY", 1.1)  # none is: then of the first two
    (entry,) = explored(predictor, paths[:1], "last")
    assert list(entry["maps"][CLASS_METHOD]) == list(entry["scores"])[:2]


def test_report_of_a_run(predictor, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REPORT", 7)
    file = tmp_path / "report.html"
    gallery = Gallery(predictor, method="rollout", folder=None, report=str(file))
    for part in (paths[:5], paths[5:]):
        (batch,) = predictor.classify([part], method="rollout")
        named = [predictor.prediction(scores).scores for scores in batch.scores]
        assert gallery.add(part, batch.grids, named) == [None] * len(part)
        gallery.flush()
        assert not file.exists()  # its figures are of all images
    os.remove(paths[0])
    gallery.flush(end=True)
    found = re.search(r'id="data">(.*?)</script>', file.read_text("utf-8"), re.DOTALL)
    assert found
    page = json.loads(found[1])
    assert 6 <= len(page["entries"]) <= 7
    assert page["total"] == 12
    assert paths[0] not in [entry["path"] for entry in page["entries"]]  # gone meanwhile
    assert sum(view["images"] for view in page["classes"]) == 12
    labels = [predictor.predict(path).label for path in paths[1:]]
    for view in page["classes"]:
        assert 0 <= view["images"] - labels.count(view["name"]) <= 1  # the one that is gone counts
        if view["images"]:
            assert view["shares"]["border"]["even"] == pytest.approx(16 / 24)
    assert {"border", "hint"} <= set(page["definitions"])


def test_maps_and_page_show_what_was_seen_of_a_wide_image_of_12_bits(predictor, tmp_path):
    """As the library explains it: bright, and the middle of it."""
    grey = np.random.default_rng(0).integers(0, 256, (16, 40))
    Image.fromarray((grey * 16).astype(np.uint16)).save(tmp_path / "a.png")
    about = replace(predictor.about, preprocess=replace(predictor.preprocess, white=4080))
    bright, paths = Predictor(predictor.model, about, device="cpu"), [str(tmp_path / "a.png")]
    expected = bright.explain(paths[0])
    assert expected.box == (8, 0, 32, 16)
    (entry,) = explored(bright, paths, "rollout")
    assert entry["box"] == expected.box
    assert entry["image"].tobytes() == expected.image.tobytes()
    gallery = Gallery(bright, method="rollout", folder=str(tmp_path / "maps"), report=None)
    (file,) = gallery.add(paths, torch.tensor(expected.grid)[None], [expected.prediction.scores])
    with Image.open(str(file)) as picture:
        assert picture.tobytes() == expected.overlay().tobytes()


def test_a_report_that_cannot_be_written_is_said_before_any_work(predictor, tmp_path):
    """And one that is there stays until the new one is written."""
    (page := tmp_path / "page.html").write_text("old")
    for report, reason in ((page / "r.html", "Not a directory"), (tmp_path, "Is a directory")):
        with pytest.raises(OutputError, match=f"^{report}: {reason}$"):
            Gallery(predictor, method="rollout", folder=None, report=str(report))
    long = tmp_path / f"{'x' * 244}.html"  # which leaves no room for what it is called as it grows
    with pytest.raises(OutputError, match="File name too long"):
        Gallery(predictor, method="rollout", folder=None, report=str(long))
    assert not long.exists()
    Gallery(predictor, method="rollout", folder=None, report=str(page))
    assert page.read_text() == "old"


def test_a_folder_that_cannot_take_maps_is_said_before_any_work(predictor, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "maps"):
        with pytest.raises(OutputError, match=f"^{folder}: Not a directory$"):
            Gallery(predictor, method="rollout", folder=str(folder), report=None)
    monkeypatch.setattr(os, "access", lambda path, how: path != tmp_path or how != os.W_OK | os.X_OK)
    with pytest.raises(OutputError, match=f"^{tmp_path / 'maps'}: Permission denied$"):
        Gallery(predictor, method="rollout", folder=str(tmp_path / "maps"), report=None)


def test_a_run_without_images_writes_nothing(predictor, tmp_path):
    gallery = Gallery(predictor, method="rollout", folder=str(tmp_path / "maps"), report=str(tmp_path / "r.html"))
    gallery.flush(end=True)
    assert not Path(tmp_path / "r.html").exists()
    assert not Path(tmp_path / "maps").exists()


def test_a_folder_in_which_no_page_can_grow_is_known_at_once(predictor, tmp_path, monkeypatch):
    """Though the page of before may be written itself."""
    (report := tmp_path / "report.html").write_text("before")

    def in_a_folder_of_others(file: Any, *mode: Any) -> Any:
        if not os.path.exists(file):
            raise PermissionError(13, "Permission denied")
        return open(file, *mode)

    monkeypatch.setattr(module, "open", in_a_folder_of_others, raising=False)
    with pytest.raises(OutputError, match=r"report\.html: Permission denied"):
        Gallery(predictor, method="rollout", folder=None, report=str(report))
    assert report.read_text() == "before"
