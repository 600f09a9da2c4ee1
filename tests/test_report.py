"""The page: what is in it, that nothing leaves it, and that it works in a browser."""

import base64
import html
import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vit.checkpoint import Checkpoint
from vit.preprocess import Preprocess
from vit.report import TOP, write_report
from vit.survey import CLASSES, COARSEST, SURVEYED

NAMES = ("airplane", "data", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck", "lorry", "van")
ABOUT = Checkpoint(
    architecture={"depth": 2, "num_heads": 3},
    class_names=NAMES,
    preprocess=Preprocess(image_size=(32, 48), mean=(0.5,) * 3, std=(0.5,) * 3),
    metrics={"val/acc": 0.8214, "val/loss": float("nan")},
)


def entry(
    i: int = 0, *, size: tuple[int, int] = (48, 32), grid: tuple[int, int] = (4, 6), **changes: Any
) -> dict[str, Any]:
    random = np.random.default_rng(i)
    image = Image.fromarray(random.integers(0, 255, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8))
    return {
        "path": f"photos/{i}.jpg",
        "image": image.resize(size, Image.Resampling.BICUBIC),
        "box": (0.0, 0.0, *map(float, size)),
        "scores": dict(zip(NAMES, random.dirichlet(np.ones(len(NAMES))).tolist(), strict=True)),
        "maps": {
            "rollout": random.random(grid),
            "relevance": {name: random.random(grid) for name in NAMES[:3]},
        },
        "attention": {"heads": random.random((2, 3, *grid)), "patches": random.random((*grid, *grid))},
        **changes,
    }


def view(name: str = "cat", **changes: Any) -> dict[str, Any]:
    """What a survey says of a class."""
    return {
        "name": name,
        "images": 40,
        "known": 36,
        "right": 0.75,
        "folder": {"images": 1000, "right": 0.889, "taken for": ["dog", 0.066]},
        "mean": np.random.default_rng(0).random((4, 6)),
        "shares": {
            "border": {"mean": 0.5, "error": 0.01, "even": 0.6},
            "centre": {"mean": 0.3, "error": 0.0, "even": 0.2},
        },
        "hint": None,
        "examples": {
            "most typical": ["photos/0.jpg", "photos/1.jpg"],
            "most confident errors": ["photos/2.jpg", "gone.jpg"],
        },
        "truths": {"photos/2.jpg": "dog", "gone.jpg": "ship"},
        **changes,
    }


def data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])


def values(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=np.uint8)


def test_page_says_what_was_given(tmp_path):
    given = entry(1, box=(6.0, 0.0, 42.0, 32.0))
    page = write_report(tmp_path / "new" / "report.html", ABOUT, [given])
    content = data(page)
    (one,) = content["entries"]
    assert one["path"] == "photos/1.jpg"
    assert one["box"] == pytest.approx([6 / 48, 0, 36 / 48, 1])
    ordered = sorted(given["scores"].items(), key=lambda item: -item[1])[:TOP]
    assert [label for label, _ in one["scores"]] == [label for label, _ in ordered]
    assert [score for _, score in one["scores"]] == pytest.approx([score for _, score in ordered], abs=1e-6)
    for found, grid in (
        (one["maps"]["rollout"], given["maps"]["rollout"]),
        (one["maps"]["relevance"]["bird"], given["maps"]["relevance"]["bird"]),
    ):
        assert found["shape"] == [4, 6]
        shares = values(found["data"]).reshape(4, 6) / 255 * found["top"]
        np.testing.assert_allclose(shares, grid / grid.sum(), atol=0.003 * grid.max() / grid.sum())
    assert content["about"]["metrics"] == {"val/acc": 0.8214}  # what is no number is left out
    assert content["about"]["size"] == "48\u00d732"
    assert content["classes"] == []


def test_the_page_has_the_first_classes_and_says_how_many_there_are(tmp_path):
    content = data(write_report(tmp_path / "r.html", ABOUT, [], [view(str(i)) for i in range(CLASSES + 5)]))
    assert [one["name"] for one in content["classes"]] == [str(i) for i in range(CLASSES)]
    assert content["kinds"] == CLASSES + 5


def test_attention_comes_through(tmp_path):
    given = entry(2)
    (one,) = data(write_report(tmp_path / "r.html", ABOUT, [given]))["entries"]
    levels = np.frombuffer(zlib.decompress(base64.b64decode(one["attention"]["data"])), dtype=np.uint8)
    heads, patches = given["attention"]["heads"].reshape(6, -1), given["attention"]["patches"].reshape(24, -1)
    assert one["attention"]["heads"] == [2, 3, 4, 6]
    expected = [(g / g.max(1, keepdims=True)).ravel() for g in (heads, patches)]
    np.testing.assert_allclose(levels[: heads.size] / 255, expected[0], atol=0.5 / 255)
    np.testing.assert_allclose(levels[heads.size :] / 255, expected[1], atol=0.51 / 15)


def test_large_grids_are_averaged(tmp_path):
    patches = np.zeros((28, 30, 28, 30))
    patches[0, 0, 27, 29] = 1
    given = entry(3, attention={"heads": np.ones((1, 1, 28, 30)), "patches": patches})
    (one,) = data(write_report(tmp_path / "r.html", ABOUT, [given]))["entries"]
    assert one["attention"]["patches"] == [COARSEST] * 4
    levels = np.frombuffer(zlib.decompress(base64.b64decode(one["attention"]["data"])), dtype=np.uint8)[28 * 30 :]
    assert levels.reshape([COARSEST] * 4)[0, 0, -1, -1] == 255
    assert (levels > 0).sum() == 1


def test_small_images_are_exact_and_large_ones_reduced(tmp_path):
    small, large = entry(4, size=(32, 32)), entry(5, size=(1000, 700))
    for given, one in zip(
        (small, large), data(write_report(tmp_path / "r.html", ABOUT, [small, large]))["entries"], strict=True
    ):
        kind, _, text = one["image"].partition(";base64,")
        (tmp_path / "image").write_bytes(base64.b64decode(text))
        with Image.open(tmp_path / "image") as image:
            if given is small:
                assert kind == "data:image/png"
                np.testing.assert_array_equal(np.asarray(image), np.asarray(given["image"]))
            else:
                assert kind == "data:image/jpeg"
                assert max(image.size) == 448
        assert (one["width"], one["height"]) == given["image"].size


@pytest.mark.parametrize(
    "name",
    ["</script><script>alert(1)</script>", "<!--<script>", 'a "quoted" \\ name', "猫 \u2028 кот", "no text \udcff"],
)
def test_names_stay_text(tmp_path, name):
    given = entry(6, path=name, scores={name: 1.0}, maps={name: np.ones((2, 2))})
    page = write_report(tmp_path / "r.html", ABOUT, [given])
    (one,) = data(page)["entries"]
    assert one["path"] == name
    assert one["scores"] == [[name, 1.0]]
    assert page.read_text("utf-8").count("<script") == 2


def test_page_is_self_contained(tmp_path):
    page = write_report(tmp_path / "r.html", ABOUT, [entry(7)]).read_text("utf-8")
    assert not re.search(r"""https?://|src=["']?[^"'$]|href=|@import|url\(""", page.split('id="data"')[0])
    assert "fetch(" not in page
    assert "XMLHttpRequest" not in page


def test_entries_are_taken_one_by_one(tmp_path):
    seen = []
    write_report(tmp_path / "r.html", ABOUT, (seen.append(i) or entry(i, attention=None) for i in range(3)))
    assert seen == [0, 1, 2]
    assert data(write_report(tmp_path / "empty.html", ABOUT, []))["entries"] == []


def test_a_page_that_is_stopped_leaves_the_one_before(tmp_path):
    """... also behind a link, which stays one."""
    before = write_report(tmp_path / "report.html", ABOUT, [entry()]).read_bytes()
    (tmp_path / "link.html").symlink_to("report.html")

    def entries():
        yield entry()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path / "link.html", ABOUT, entries())
    assert (tmp_path / "report.html").read_bytes() == before
    write_report(tmp_path / "link.html", ABOUT, [])
    assert (tmp_path / "report.html").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "report.html"]
    assert (tmp_path / "link.html").is_symlink()


def test_two_hundred_photographs_stay_small(tmp_path):
    astronaut = pytest.importorskip("skimage.data", reason="scikit-image has the photograph").astronaut()
    given = entry(8, image=Image.fromarray(astronaut), grid=(14, 14))
    per_class = {name: np.random.default_rng(i).random((14, 14)) for i, name in enumerate(NAMES[:5])}
    given["maps"] = {"rollout": per_class[NAMES[0]], "lrp": per_class, "contrast": per_class}
    given["attention"] = {
        "heads": np.random.default_rng(0).random((12, 6, 14, 14)),
        "patches": np.random.default_rng(0).random((14, 14, 14, 14)),
    }
    fixed, full = (
        write_report(tmp_path / f"{n}.html", ABOUT, [given] * n, [view()] * 20).stat().st_size for n in (0, 5)
    )
    assert fixed + (full - fixed) / 5 * 200 < 20 * 2**20


# ---- in a browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom"),
]

# Uses the page as a person would, and writes down what came of it.
VISIT = f"<script>{(Path(__file__).parent / 'report_visit.js').read_text()}</script>"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(
    ("window", "total", "said"),
    [
        ("1280,900", 596, "3 of 596 images, examples of the classes and an even sample · 12 classes · "),
        ("500,800", SURVEYED, "3 of the first 50,000 images, examples of the classes and an even sample · "),
        ("500,800", 3, "3 images · "),
        ("1366,768", 3, "3 images · "),
    ],
)
def test_page_works_in_a_browser(tmp_path, window, total, said):
    never = {"images": 0, "known": 0, "mean": None, "right": None, "shares": {}, "examples": {}, "truths": {}}
    views = [
        view(hint="One place <b>counts</b>."),
        view("dog", right=None, folder=None, shares={}),
        view("ship", **never, folder={"images": 1, "right": 0.0, "taken for": ["cat", 1.0]}),
    ]
    long = entry(2, scores={"long-haired dachshund": 0.7, "Rhinozerosvogelfamilie": 0.2, "of many words " * 9: 0.1})
    rows = np.broadcast_to(np.eye(16)[:, None, :, None], (16, 6, 16, 6))  # each patch attends to its own row
    fine = entry(1, grid=(16, 6), attention={"heads": np.ones((2, 3, 16, 6)), "patches": rows})
    page = write_report(tmp_path / "r.html", ABOUT, [entry(0), fine, long], views, total)
    page.write_text(page.read_text("utf-8").replace("</html>", VISIT + "</html>"), encoding="utf-8")
    result = subprocess.run(
        [
            str(CHROMIUM),
            *QUIET,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={window}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "CONSOLE" not in result.stderr
    dumped = re.search(r'<pre id="found">(.*?)</pre>', result.stdout, re.DOTALL)
    assert dumped, result.stderr
    found = json.loads(html.unescape(dumped[1]).replace("\u00a0", " "))
    assert found["cards"] == 3
    assert found["path"] == "photos/0.jpg"
    assert "validation accuracy 82.1 %" in found["facts"]
    assert found["facts"].startswith(said)
    assert len(found["bars"]) == TOP
    assert found["strip"] == 6
    assert found["ratio"] == pytest.approx(6 / 4, rel=0.01)  # the grid's
    assert (found["cut"], found["outside"]) == ([], 0)  # names are all there, and inside their cards
    assert found["said"] == "Shown: rollout."
    assert found["method"] == "relevance"
    assert len({found[k] for k in ("rollout", "relevance", "other", "sharp", "hovered", "headShown")}) == 6
    assert found["otherSaid"].startswith("Shown: relevance for ")
    assert found["rollout"] == found["again"] == found["left"] == found["escaped"] == found["back"]
    assert re.fullmatch(r"Row 1, column 6: [\d.]+ % of rollout. Shown: what this patch attends to.", found["hover"])
    assert found["walked"].startswith("Row 4, column 4")
    assert found["mark"]
    assert found["touched"] == found["hover"]
    assert found["rows"] == [3, 3]  # of 14: where most of the fifth of 16 rows lies, at its upper end and at its lower
    assert found["head"] == "Shown: layer 1, head 1."
    assert found["kept"] == "layer 1, head 1"
    assert (found["invisible"], found["visible"]) == ("0", "0.1")
    assert found["next"] == "photos/1.jpg"
    assert found["before"] == found["off"] == "photos/0.jpg"
    assert found["skipped"] == [True, True]  # seen while it has the focus, and past all the cards
    assert found["found"] == 1
    assert found["none"] == "No image has this label or name."
    assert found["classes"] == ["cat", "dog", "ship"]
    assert found["counted"].startswith("80 images · maps by rollout")
    assert found["hints"] == ["Perhaps a shortcut. One place <b>counts</b>."]
    assert found["words"] == [
        "40 images · 36 of them in folders of classes, 75.0 % of these in the folder of this name",
        "Of 1,000 in its folder 88.9 % recognised; most often taken for dog (6.6 %)",
    ]
    assert found["never"] == [
        "no image is called so",
        "Of 1 in its folder 0.0 % recognised; most often taken for cat (100.0 %)",
    ]
    assert found["means"] == 2
    assert found["examples"] == [3, 3, 0]  # those that are on the page
    assert found["error"] == "dog"
    assert found["defined"] == 8
    assert found["asked"] == [True, False]
    assert found["opened"] == ["photos/2.jpg", False, True]
    assert found["main"] == ["classes"]
    assert found["meter"] == "50.0 % ± 1.0 %; an even map: 60.0 %"
    assert found["handed"]  # not lost with the button that was pressed
    assert found["whole"]  # a long name wraps
    assert found["paper"] != found["otherPaper"]
    assert found["wide"]
    assert found["longest"]
    assert found["percents"]
    assert found["likeliest"] == "10"  # not 2, which JavaScript puts first
    assert found["wideClasses"]
    assert found["reached"]  # the last head
    assert found["beside"] or window.startswith("500")  # with the map in sight
