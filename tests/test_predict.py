"""The command: records, exit codes, and what it leaves behind when it is stopped in any way."""

import csv
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import predict
from vit import Predictor
from vit.checkpoint import Checkpoint, save_checkpoint
from vit.faithfulness import faithfulness
from vit.gallery import map_name
from vit.inputs import Inputs
from vit.model import VisionTransformer
from vit.preprocess import Preprocess
from vit.rollout import CLASS_METHOD, CLASS_SPECIFIC, METHODS
from vit.run import Stopped, Summary, is_long, progress, signals, write_classes

ROOT = Path(__file__).parent.parent
NAMES = tuple(f"class {i}" for i in range(7))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A file of random weights whose predictions differ from image to image."""
    torch.manual_seed(3)
    model = VisionTransformer(image_size=16, patch_size=8, num_classes=7, embed_dim=32, depth=2, num_heads=2)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    preprocess = Preprocess(image_size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
    about = Checkpoint(architecture=model.architecture, class_names=NAMES, preprocess=preprocess)
    return str(save_checkpoint(tmp_path_factory.mktemp("weights") / "model.safetensors", model.state_dict(), about))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """120 images under names that are no valid text, have newlines, or repeat in folders; every tenth is broken."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(120):
        (folder / f"{i % 3}").mkdir(exist_ok=True)
        name = os.fsencode(folder) + b"/%d/" % (i % 3) + [b"%d.png", b"\xff%d.png", b"a\n%d.png"][i % 3] % (i // 3)
        with open(name, "wb") as file:
            pixels = generator.integers(0, 256, (3, 3, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((20, 20)).save(file, "PNG")
            if i % 10 == 9:
                file.truncate(60)
    return folder


@pytest.fixture
def run(checkpoint, capfd):
    """Calls the command; gives its exit code, standard output and standard error."""

    def run(*args: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = predict.main(["--checkpoint", checkpoint, "--device", "cpu", *map(str, args)])
        return code, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def start(checkpoint):
    """Starts the command in a process of its own that has its imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["predict", "vit.predictor"])

    def start(*args: object) -> multiprocessing.Process:
        arguments = ["--checkpoint", checkpoint, "--device", "cpu", *map(str, args)]
        process = context.Process(target=command, args=(arguments,))
        process.start()
        return process  # pyright: ignore

    return start


def command(args: list[str]) -> None:
    torch.set_num_threads(1)
    sys.exit(predict.main(args))


def content(path: Path) -> bytes:
    """What a file holds that may be renamed at any moment; nothing if it is not there."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def lines(path: Path) -> int:
    return content(path).count(b"\n")


def wait_for(condition, process) -> None:
    while not condition() and process.is_alive():
        time.sleep(0.001)


# ---- records and exit codes --------------------------------------------------------------------------------------


def test_every_format_holds_what_the_predictor_says(run, images, checkpoint):
    code, out, err = run(images, "--recursive", "--format", "jsonl", "--top-k", 3, "--precision", "float32")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 3
    assert len(records) == 120
    assert sum("error" in record for record in records) == 12
    paths = [record["path"] for record in records]
    assert paths == sorted(paths)
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu")
    for record in records[:20]:
        if "error" not in record:
            expected = list(predictor.predict(record["path"]).scores.items())[:3]
            assert [p["label"] for p in record["predictions"]] == [label for label, _ in expected]
            assert [p["score"] for p in record["predictions"]] == pytest.approx([s for _, s in expected], abs=2e-6)
    assert "120 images" in err
    assert "108 classified, 12 failed" in err

    options = (images, "--recursive", "--top-k", 3, "--precision", "float32", "--format")
    assert json.loads(run(*options, "json")[1]) == records
    rows = list(csv.DictReader(io.StringIO(run(*options, "csv")[1], newline="")))
    assert [row["label_2"] for row in rows] == [
        r["predictions"][1]["label"] if "error" not in r else "" for r in records
    ]
    assert [row["error"] for row in rows] == [record.get("error", "") for record in records]
    table = run(*options, "table")[1].splitlines()
    assert len(table) == 120
    assert all(("error:" in row) == ("error" in record) for row, record in zip(table, records, strict=True))


def test_every_mode_and_every_orientation(run, tmp_path):
    """The 10 modes are classified; grey of 16 bits as its 8-bit source, and 8 orientations as the picture upright."""
    y, x = np.mgrid[:40, :56]
    picture = Image.fromarray(np.stack([4 * x, 6 * y, 128 + 90 * np.sin(x / 3)], -1).astype(np.uint8))
    modes = {"1": "png", "L": "png", "LA": "png", "P": "gif", "RGB": "png", "RGBA": "webp", "CMYK": "jpg", "F": "tif"}
    for mode, ending in modes.items():
        picture.convert(mode).save(tmp_path / f"{mode}.{ending}")
    grey = np.asarray(picture.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "I;16.png")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "I.tif")
    for orientation, undo in enumerate((None, 0, 3, 1, 5, 2, 6, 4), 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = picture if undo is None else picture.transpose(Image.Transpose(undo))
        turned.save(tmp_path / f"upright{orientation}.png", exif=exif)
    code, out, _ = run(tmp_path, "--format", "jsonl", "--top-k", 7, "--batch-size", 1, "--precision", "float32")
    assert code == 0
    records = {Path(record["path"]).stem: record["predictions"] for record in map(json.loads, out.splitlines())}
    assert len(records) == 10 + 8
    assert records["I;16"] == records["I"] == records["L"]
    assert all(records[f"upright{i}"] == records["RGB"] for i in range(1, 9))


def test_many_images_are_told_by_a_walk(images, monkeypatch):
    """So many that a GPU's model is compiled for them; those on standard input are not known."""
    monkeypatch.setattr("vit.run.LONG", 120)
    options = predict.parser().parse_args([str(images), "--recursive"])
    assert is_long(options)
    monkeypatch.setattr("vit.run.LONG", 121)
    assert not is_long(options)
    assert not is_long(predict.parser().parse_args(["-"] * 2))


def test_exit_codes(run, images, tmp_path):
    good, bad = images / "0/0.png", tmp_path / "missing.png"
    assert run(good)[0] == 0
    assert run(good, bad)[0] == 3
    assert run(bad)[0] == 4
    assert run(tmp_path)[0] == 4
    assert run("--", "-name.png", "--", "--help")[0] == run(bad, "--", "-name.png")[0] == 4
    _, out, err = run(bad, "--format", "jsonl")
    assert json.loads(out) == {"path": str(bad), "error": "no such file"}
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name at least one image"),
        (["a", "--top-k", "0"], "'0' is not a whole number of at least 1"),
        (["a", "--threshold", "1.5"], "'1.5' is not a number from 0 to 1"),
        (["a", "--threshold", "60"], "'60' is not a number from 0 to 1; 60 % is 0.6"),
        (["a", "--threshold", "60%"], "'60%' is not a number from 0 to 1; 60 % is 0.6"),
        (["a", "--threshold", "-0.1"], "'-0.1' is not a number from 0 to 1"),
        (["a", "--threshold", "much"], "'much' is not a number from 0 to 1"),
        (["a", "--out", "x.xlsx"], "--out x.xlsx: .xlsx is the ending of no known format; use .txt, .table, .json, .j"),
        (["a", "--out", "x.csv.gz"], "--out x.csv.gz: .gz is the ending of no known format; use .txt, .table, .json, "),
        (["a", "--report", "r.txt"], "--report r.txt: it is a page for a browser, whose name ends in .html"),
        (["a", "--shard", "3/2"], "'3/2' is not I/N with I from 1 to N"),
        (["a", "--resume"], "--resume needs --out FILE"),
        (["a", "--resume", "--out", "x.json"], "--resume needs --out FILE"),
        (["a", "--format", "parquet"], "--format parquet needs --out FILE"),
        (["a", "--method", "lrp"], "--method says how maps are made; ask for some: --maps DIR, "),
        (["a", "--out", "./r.csv", "--maps", "r.csv/"], "--out ./r.csv and --maps r.csv/ are the same; each needs a"),
        (
            ["a", "--out", "r.html", "--format", "csv", "--report", "./r.html"],
            "--out r.html and --report ./r.html are t",
        ),
        (["a", "--target", "class 1"], "--target says which class maps are about; ask for some: --maps DIR or "),
        (["a", "--maps", "m", "--against", "class 1"], "--against class 1 needs a --target to set it against"),
        (["a", "--maps", "m", "--target", "class 1", "--report", "r.html"], "--target is for --maps and --score-maps"),
        (
            ["a", "--maps", "m", "--target", "class 1", "--method", "last"],
            "--method last is the same for every class; ",
        ),
        (["a", "--maps", "m", "--target", "clas 1"], "no class 'clas 1'; the classes are class 0, class 1, class 2, "),
        (["a", "--maps", "m", "--target", "class 1", "--against", "class 1"], "target and against are both 'class 1'"),
        (["a", "--format", "xml"], "invalid choice: 'xml'"),
        (["--\x1b[31m.png"], r"unrecognized arguments: --\x1b[31m.png"),  # a file, where a shell has put it for *
        (["a", "--checkpoint", "/nowhere/model.safetensors"], "/nowhere/model.safetensors: no such checkpoint file"),
        (["a", "--device", "gpu"], "no device 'gpu'"),
        (["a", "--device", "meta"], "device 'meta' cannot be used"),
        (["a", "--out", "/dev/full"], "/dev/full: No space left on device"),
        (["a", "--out", "/proc/no/file"], "/proc/no/file: No such file or directory"),
    ],
)
def test_usage_errors(args, message, run):
    code, out, err = run(*args)
    assert code == 2
    assert out == ""
    assert message in err.splitlines()[-1]
    assert len(err.splitlines()) == 1 + err.startswith("usage: predict.py SOURCE ...")


@pytest.mark.parametrize("name", ["labels", "labels.txt", "labels.TXT"])
def test_a_text_file_gets_the_table(name, run, images, tmp_path):
    assert run(images / "0/0.png", "--out", tmp_path / name)[0] == 0
    assert (tmp_path / name).read_text() == run(images / "0/0.png")[1]


def test_why_an_image_failed_is_said_where_its_record_is_not_seen(run, images, tmp_path):
    broken = images / "0/3.png"
    reason = run(broken)[1].partition("error: ")[2].strip()
    assert reason
    assert "failed: " not in run(broken, images / "0/13.png")[2]
    assert f"  failed: {broken}: {reason}\n" in run(broken, "--out", tmp_path / "one.csv")[2]
    assert f"  first failed: {broken}: {reason}\n" in run(broken, "none.png", "--out", tmp_path / "two.csv")[2]


def test_an_ending_means_nothing_where_the_format_is_named(run, images, tmp_path):
    assert run(images / "0/0.png", "--out", tmp_path / "x.data", "--format", "json")[0] == 0
    assert len(json.loads((tmp_path / "x.data").read_text())) == 1


def test_classes_threshold_and_top_k(run, images):
    assert run("--classes")[:2] == (0, "".join(f"{name}\n" for name in NAMES))
    _, out, err = run(images / "0", "--format", "jsonl", "--threshold", 0.5, "--top-k", 100)
    good = [record for record in map(json.loads, out.splitlines()) if "error" not in record]
    assert all(len(record["predictions"]) == len(NAMES) for record in good)
    unsure = [record["predictions"][0]["score"] < 0.5 for record in good]
    assert [record["unsure"] for record in good] == unsure
    assert 0 < sum(unsure) < len(good)
    assert f"{sum(unsure)} unsure" in err
    alone = (good[0]["path"], "--format", "jsonl", "--threshold")
    best = json.loads(run(*alone, 0)[1])["predictions"][0]["score"]  # which is not below itself
    assert not json.loads(run(*alone, best)[1])["unsure"]


def test_precision_is_what_is_asked_for(run, images):
    full, low = (run(images / "0/?.png", "--format", "jsonl", "--precision", p)[1] for p in ("float32", "bfloat16"))
    assert full != low


def test_the_end_says_ten_classes_and_how_fast_this_run_was(capfd):
    summary = Summary()
    for number in range(13):
        summary.add({"path": f"{number}.png", "predictions": [{"label": f"class {number}", "score": 1.0}]})
    summary.begin -= 10
    summary.resumed = 8  # are another run's
    summary.tell(predict.parser().parse_args(["a"]), Inputs([]))
    first, second = capfd.readouterr().err.splitlines()
    assert first == "13 images in 10.0 s (0.5/s): 13 classified, 0 failed"
    assert second.endswith("class 9 1 and 3 more classes")


def test_the_bar_counts_the_images_of_its_part(images, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("vit.run.UNIT", 8)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "120")):
        monkeypatch.setenv(name, value)
    for part, total in (("1/4", 32), ("3/4", 32), ("4/4", 24), ("1/1", 120)):  # of fifteen blocks of eight
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        options = predict.parser().parse_args([str(images), "--recursive", "--shard", part, "--out", "x.csv"])
        with progress(options, Inputs(options.sources, recursive=True)) as advance:
            advance(3)
            end = time.monotonic() + 20
            while "left" not in terminal.getvalue() and time.monotonic() < end:
                time.sleep(0.01)
        assert f" 3/{total} images" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


def test_class_names_for_a_full_disk(monkeypatch, capfd):
    with suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert write_classes(NAMES) == 2
    assert capfd.readouterr().err == "predict.py: standard output: No space left on device\n"


def test_a_class_whose_folder_is_no_valid_text(images, tmp_path, monkeypatch, capsys):
    """Is called by its escapes wherever it is shown: no byte that a folder may have ends a run or moves a terminal."""
    model = VisionTransformer(image_size=16, patch_size=8, num_classes=2, embed_dim=32, depth=1, num_heads=2)
    preprocess = Preprocess(image_size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
    names = (os.fsdecode(b"caf\xe9\x1b[31m"), os.fsdecode(b"\xff\n"))
    about = Checkpoint(architecture=model.architecture, class_names=names, preprocess=preprocess)
    checkpoint = save_checkpoint(tmp_path / "model.safetensors", model.state_dict(), about)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file := io.BytesIO(), encoding="utf-8", errors="strict"))
    common = ["--checkpoint", str(checkpoint), "--device", "cpu"]
    assert predict.main([*common, "--classes"]) == 0
    assert file.getvalue() == b"caf\\udce9\\x1b[31m\n\\udcff\\n\n"
    wanted = ["--maps", str(tmp_path / "maps"), "--report", str(tmp_path / "report.html")]
    for ending in ("table", "json", "jsonl", "csv", "parquet"):
        out = tmp_path / f"out.{ending}"
        assert predict.main([*common, str(images / "0/0.png"), "--out", str(out), *wanted]) == 0
        assert b"caf\\udce9" in out.read_bytes()
    (tmp_path / "name.\x1b[31m").touch()
    predict.main([*common, str(tmp_path)])
    assert ".\\x1b[31m 1" in (said := capsys.readouterr().err)
    assert "\x1b" not in said


@pytest.mark.parametrize("ending", [b"\n", b"\0"])
def test_paths_on_standard_input(ending, run, images, monkeypatch):
    paths = [path for path in sorted(os.listdir(os.fsencode(images / "1")))]
    stdin = io.TextIOWrapper(io.BytesIO(ending.join(os.fsencode(images / "1") + b"/" + path for path in paths)))
    monkeypatch.setattr(sys, "stdin", stdin)
    _, out, _ = run("-", "--format", "jsonl")
    assert [os.fsencode(Path(json.loads(line)["path"]).name) for line in out.splitlines()] == paths


@pytest.mark.parametrize("first", ["absolute", "relative"])
def test_maps_of_paths_on_standard_input_lie_in_folders_like_theirs(first, run, images, tmp_path, monkeypatch):
    monkeypatch.chdir(images)
    paths = [str(images / "0/0.png"), "0/1.png"]
    files = [tmp_path / f"maps{images}/0/0.png.png", tmp_path / "maps/%2E/0/1.png.png"]
    if first == "relative":
        paths.reverse()
        files = [tmp_path / "maps/0/1.png.png", tmp_path / f"maps/%2F{images}/0/0.png.png"]
    stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO("\n".join(paths).encode())))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run("-", "--maps", tmp_path / "maps", "--format", "json")[0] == 0
    assert sorted(path for path in (tmp_path / "maps").rglob("*.png") if path.name != "sheet.png") == sorted(files)
    record = json.loads(run(images / "0/0.png", "--maps", f"{tmp_path}/maps/", "--format", "jsonl")[1])
    assert record["map"] == f"{tmp_path}/maps{images}/0/0.png.png"  # no slash more


def test_methods_are_those_of_the_library():
    assert set(predict.METHODS) == set(METHODS)
    assert set(predict.CLASS_SPECIFIC) == CLASS_SPECIFIC
    assert predict.CLASS_METHOD == CLASS_METHOD


# ---- maps --------------------------------------------------------------------------------------------------------


def test_paths_that_lie_where_maps_are_put_are_not_lost_in_silence(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{images}/0/0.png\n{images}/0/1.png\n".encode())))
    code, out, err = run("-", "--maps", images / "0", "--format", "jsonl")
    assert (code, out) == (4, "")
    assert f"2 images in the folder of --maps left out, where maps are put: {images}/0" in err


def test_maps_sheet_and_report(run, images, tmp_path):
    maps, report = tmp_path / "maps", tmp_path / "report.html"
    options = (images, "--recursive", "--format", "jsonl")
    code, out, _ = run(*options, "--maps", maps, "--report", report, "--method", "relevance")
    assert code == 3
    records = [json.loads(line) for line in out.splitlines()]
    plain = [json.loads(line) for line in run(*options, "--precision", "float32")[1].splitlines()]
    for record, expected in zip(records, plain, strict=True):
        if "error" in record:
            assert record == expected
            continue
        assert record["path"] == expected["path"]
        for a, b in zip(record["predictions"], expected["predictions"], strict=True):
            assert a["score"] == pytest.approx(b["score"], abs=2e-6)
        with Image.open(record["map"]) as picture:
            picture.verify()
    assert len({record.get("map") for record in records}) == 108 + 1
    with Image.open(maps / "sheet.png") as sheet:
        assert min(sheet.size) > 1000
    assert "class 3" in report.read_text("utf-8")


def test_maps_about_a_class(run, images, checkpoint, tmp_path):
    """They, and their scores, are those of the library for the same question; a run is gone on with by the same one."""
    out, maps = tmp_path / "out.jsonl", tmp_path / "maps"
    options = (images / "0", "--batch-size", 4, "--out", out, "--maps", maps, "--score-maps", "--target", "class 3")
    assert run(*options, "--against", "class 1")[0] == 3
    records = [json.loads(line) for line in out.read_text().splitlines()]
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu")
    for record in [record for record in records if "error" not in record][:5]:
        explanation = predictor.explain(record["path"], target="class 3", against="class 1")
        assert explanation.method == "lrp"
        with Image.open(record["map"]) as picture:
            difference = np.asarray(picture, np.float32) - np.asarray(explanation.overlay(), np.float32)
        assert np.abs(difference).max() < 8  # of 255: in another batch sums are rounded otherwise
        pixels = predictor.normalized(predictor.preprocess.load(record["path"])[None])
        expected = faithfulness(predictor.model, pixels, torch.tensor(explanation.grid)[None], target=torch.tensor([3]))
        assert record["map_score"] == pytest.approx(float(expected["score"]), abs=1e-4)
    said = "the maps so far are by lrp (class 3, not class 1), these would be by lrp (class 3"
    for other, words in (("class 2", f"{said}, not class 2); ask for the same ones"), (None, f"{said}); ask")):
        code, _, err = run(*options, "--resume", *(("--against", other) if other else ()))
        assert code == 2
        assert words in err
    assert run(*options, "--resume", "--against", "class 1")[0] == 3


@pytest.mark.parametrize("there", [True, False])
def test_gone_on_with_sheet_and_report_are_those_of_one_run(there, run, images, tmp_path, monkeypatch):
    """They are of the first images, however many are recorded already; even if they were deleted meanwhile."""
    monkeypatch.setattr("vit.gallery.SHEET", 6)
    monkeypatch.setattr("vit.gallery.SURVEYED", 12)
    monkeypatch.setattr("vit.survey.SURVEYED", 12)
    out, sheet, report = tmp_path / "out.jsonl", tmp_path / "maps/sheet.png", tmp_path / "report.html"
    wanted = ("--maps", tmp_path / "maps", "--report", report)[: None if there else 2]
    options = (images / "0", images / "1", "--batch-size", 4, "--out", out, *wanted)
    assert run(*options)[0] == 3
    made = [file for file in (out, sheet, report) if file.exists()]
    whole = [file.read_bytes() for file in made]
    for kept in (40, 59, 80):  # between two batches, within one, and nothing left to do
        if not there:
            sheet.unlink()
        out.rename(tmp_path / "out.jsonl.partial").write_bytes(b"".join(whole[0].splitlines(True)[:kept]))
        code, _, err = run(*options, "--resume")
        assert code == 3
        assert "80 images in" in err
        assert [file.read_bytes() for file in made] == whole


def test_shards_have_a_sheet_and_a_page_each(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr("vit.run.UNIT", 20)
    options = (images / "0", "--batch-size", 20, "--maps", tmp_path, "--report", tmp_path / "page.html")
    for part in ("1", "2"):
        said = run(*options, "--shard", f"{part}/2")[2]
        assert f"side by side in {tmp_path}/sheet-{part}-of-2.png" in said
        assert f"page: {tmp_path}/page-{part}-of-2.html" in said
        assert (tmp_path / f"page-{part}-of-2.html").exists()
    assert not (tmp_path / "page.html").exists()
    first, second = (Image.open(tmp_path / f"sheet-{part}-of-2.png").tobytes() for part in (1, 2))
    assert first != second
    assert not (tmp_path / "sheet.png").exists()


def test_score_maps_says_how_far_each_map_can_be_trusted(run, images, checkpoint, tmp_path):
    """The score of ``faithfulness`` for the very map, in every format that has room for it; a damaged file has none."""
    out = tmp_path / "scores.csv"
    assert run(images, "--recursive", "--score-maps", "--method", "lrp", "--out", out)[0] == 3
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(bool(row["error"]) != bool(row["map_score"]) for row in rows)
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu")
    for row in [row for row in rows if not row["error"] and Path(row["path"]).exists()][:5]:
        pixels = predictor.preprocess.load(row["path"])[None]
        _, grids = predictor.mapped(pixels, "lrp")
        expected = faithfulness(predictor.model, predictor.normalized(pixels), grids)["score"]
        assert float(row["map_score"]) == pytest.approx(float(expected), abs=1e-4)
    record = json.loads(run(images / "0/0.png", "--score-maps", "--format", "jsonl")[1])
    assert -1 <= record["map_score"] <= 1
    assert run(images / "0", "--score-maps", "--method", "lrp", "--out", tmp_path / "scores.parquet")[0] == 3
    shown = pq.read_table(tmp_path / "scores.parquet").column("map_score").to_pylist()
    folder = [row for row in rows if Path(row["path"]).parent.name == "0"]
    assert shown == [pytest.approx(float(row["map_score"]), abs=1e-6) if row["map_score"] else None for row in folder]


def test_a_map_that_cannot_be_written_is_named(run, images, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "out.csv.partial").write_text("unfinished")
    code, out, err = run(images / "0/0.png", "--maps", tmp_path / "file", "--out", tmp_path / "out.csv")
    assert (code, out, err) == (2, "", f"predict.py: {tmp_path}/file: Not a directory\n")
    assert (tmp_path / "out.csv.partial").read_text() == "unfinished"
    (image := tmp_path / "a.png").write_bytes((images / "0/0.png").read_bytes())
    (tmp_path / "maps").mkdir()
    place = tmp_path / "maps" / map_name(str(image), absolute=True)
    place.mkdir(parents=True)  # which is found out only when its turn comes
    code, _, err = run(image, "--maps", tmp_path / "maps")
    assert (code, err.splitlines()[-1]) == (2, f"predict.py: {place}: Is a directory")


def test_a_report_that_cannot_be_written_costs_no_records(run, images, tmp_path):
    (tmp_path / "out.csv.partial").write_text("unfinished")
    (report := tmp_path / "report.html").mkdir()
    code, out, err = run(images / "0/0.png", "--report", report, "--out", tmp_path / "out.csv")
    assert (code, out, err) == (2, "", f"predict.py: {report}: Is a directory\n")
    assert (tmp_path / "out.csv.partial").read_text() == "unfinished"


def test_maps_replace_nothing_but_maps(run, images, tmp_path, monkeypatch):
    """Neither an image that is named, which is known at once, nor any other file."""
    monkeypatch.chdir(tmp_path)
    for name in ("sheet.png", "x.jpg", "x.jpg.png"):
        shutil.copy(images / "0/0.png", name)
    before = Path("sheet.png").read_bytes()
    for named in ("sheet.png", "./x.jpg", tmp_path / "x.jpg"):
        code, out, err = run(named, "--maps", ".")
        said = f"predict.py: --maps .: {named} lies in it; maps and images would mix, name another\n"
        assert (code, out, err) == (2, "", said)
    image = images / "0/0.png"
    for kept in ("sheet.png", map_name(str(image), absolute=True)):
        Path("maps", kept).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, Path("maps", kept))
        code, _, err = run(image, "--maps", "maps")
        said = f"predict.py: maps/{kept}: no map, and would be replaced by one; move it, or name another --maps"
        assert (code, err.splitlines()[-1]) == (2, said)
        assert Path("maps", kept).read_bytes() == before
        Path("maps", kept).write_bytes(b"")  # as a run leaves it that is killed just then
    assert run(image, "--maps", "maps")[0] == run(image, "--maps", "maps")[0] == 0


# ---- parts and stops ---------------------------------------------------------------------------------------------


def test_maps_are_no_images_of_the_next_run(run, images, tmp_path, monkeypatch):
    for number in (0, 1, 2):
        shutil.copy(images / "0" / f"{number}.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    options = (".", "--recursive", "--maps", "maps", "--format", "jsonl", "--out", "labels.jsonl")
    assert run(*options)[0] == 0
    first = Path("labels.jsonl").read_bytes()
    assert len(list(Path("maps").rglob("*.png"))) == 4
    code, _, err = run(*options)
    assert (code, Path("labels.jsonl").read_bytes()) == (0, first)
    paths = b"\0".join(str(path).encode() for path in Path().rglob("*.png"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(paths))))
    assert run("-", "--maps", "maps", "--format", "jsonl")[1].count("\n") == 3
    assert "no file matches outside the folder of --maps" in run("maps/*.png", "--maps", "maps")[1]
    code, _, err = run(".", "--maps", ".")
    assert code == 2
    assert err == "predict.py: --maps .: . lies in it; maps and images would mix, name another\n"


def test_shards_are_one_run(run, images, monkeypatch):
    monkeypatch.setattr("vit.run.UNIT", 8)
    options = (images, "--recursive", "--format", "jsonl")
    whole = run(*options, "--batch-size", 8)[1].splitlines()
    parts = [run(*options, "--batch-size", 8, "--shard", f"{i}/4")[1].splitlines() for i in range(1, 5)]
    assert sorted(line for part in parts for line in part) == sorted(whole)
    assert min(map(len, parts)) >= 24
    assert run(images / "0/0.png", "--shard", "2/2")[:2] == (0, "")  # a part of so few that it has none
    for i, part in enumerate(parts, 1):  # on machines with batches of other sizes too
        other = run(*options, "--batch-size", 3 * i, "--shard", f"{i}/4")[1].splitlines()
        assert [json.loads(line)["path"] for line in other] == [json.loads(line)["path"] for line in part]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_killed_at_any_moment_and_gone_on_with(ending, start, images, tmp_path):
    out, partial = tmp_path / f"out.{ending}", tmp_path / f"out.{ending}.partial"
    options = (images, "--recursive", "--batch-size", 4, "--out", out)
    process = start(*options)
    process.join(60)
    assert process.exitcode == 3
    whole = out.read_bytes()
    out.unlink()
    rng = random.Random(ending)
    kills: list[bool] = []
    while sum(kills) < 10:  # and ten of the other format
        size = 0
        while not out.exists():
            process = start(*options, "--resume")
            size = rng.randint(size, len(whole) + 4000)
            wait_for(lambda target=size: len(content(partial)) >= target, process)
            time.sleep(rng.random() * 0.003)
            process.kill()
            process.join(60)
            kills.append(process.exitcode == -signal.SIGKILL)
        assert out.read_bytes() == whole
        out.unlink()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(number, code, checkpoint, images, tmp_path):
    fifo, out = tmp_path / "paths", tmp_path / "out.jsonl"
    os.mkfifo(fifo)
    process = multiprocessing.get_context("forkserver").Process(
        target=fed,
        args=(fifo, tmp_path / "err", ["--checkpoint", checkpoint, "-", "--batch-size", "4", "--out", str(out)]),
    )
    process.start()
    with fifo.open("wb", buffering=0) as paths:
        paths.write(b"%s/0/0.png\n" % os.fsencode(images) * 40)
        partial = tmp_path / "out.jsonl.partial"
        wait_for(lambda: lines(partial) >= 4, process)
        os.kill(process.pid or 0, number)
        process.join(60)
    assert process.exitcode == code
    assert not out.exists()
    records = [json.loads(line) for line in partial.read_bytes().splitlines()]
    assert all("predictions" in record for record in records)
    err = (tmp_path / "err").read_text()
    assert f"{len(records)} images" in err
    assert f"stopped by {number.name}; the records so far are in {out}.partial; --resume goes on" in err


def fed(paths: Path, err: Path, args: list[str]) -> None:
    """The command with standard input and standard error on files."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    sys.stdin, sys.stderr = paths.open(), err.open("w")
    command(args)


def test_a_signal_that_was_swallowed_is_not_lost(run, images, tmp_path, monkeypatch):
    """As torch, while it is loaded, does it to whatever is raised in what it imports."""

    def swallowed(*args: object, **options: object) -> object:
        with suppress(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)  # type: ignore[arg-type]

    real = Predictor.from_checkpoint
    monkeypatch.setattr(Predictor, "from_checkpoint", swallowed)
    code, out, err = run(images, "--recursive", "--out", tmp_path / "out.csv")
    assert (code, out, err.splitlines()[-1]) == (143, "", "stopped by SIGTERM")
    assert not (tmp_path / "out.csv").exists()


def test_a_second_signal_is_heard_where_the_first_was_swallowed_and_breaks_no_end():
    def swallowing(failure: BaseException | None) -> None:
        with signals():
            with suppress(Stopped):
                os.kill(os.getpid(), signal.SIGTERM)
            if failure:  # of what was left half done
                raise failure
            os.kill(os.getpid(), signal.SIGTERM)

    def ending() -> None:
        with signals():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                try:
                    raise OSError
                except OSError:  # as closing a file may
                    os.kill(os.getpid(), signal.SIGTERM)
                ended.append(True)

    ended: list[bool] = []
    for stopping in (lambda: swallowing(RuntimeError()), lambda: swallowing(None), ending):
        with pytest.raises(Stopped):
            stopping()
    assert ended


def test_what_is_still_decoded_does_not_hold_up_the_end(checkpoint, images, tmp_path):
    process = multiprocessing.get_context("forkserver").Process(
        target=slow, args=(tmp_path / "err", ["predict.py", "--checkpoint", checkpoint, str(images / "0/0.png")])
    )
    process.start()
    wait_for(lambda: content(tmp_path / "err"), process)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 143
    assert (tmp_path / "err").read_text().splitlines()[2:] == ["stopped by SIGTERM"]


def slow(err: Path, args: list[str]) -> None:
    """The command as a process, which never has its image."""

    def never(*_: object) -> None:
        print("decoding", file=sys.stderr, flush=True)
        time.sleep(60)

    sys.argv, sys.stderr, Predictor._decode = args, err.open("w"), never  # type: ignore[method-assign]
    torch.set_num_threads(1)
    project = tomllib.loads((Path(predict.__file__).parent / "pyproject.toml").read_text())["project"]
    getattr(predict, project["scripts"]["vit-predict"].removeprefix("predict:"))()


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_an_image_that_was_repaired_meanwhile_is_no_other_run(ending, run, images, tmp_path):
    out, folder = tmp_path / f"out.{ending}", tmp_path / "images"
    shutil.copytree(images / "0", folder)
    names = sorted(folder.iterdir())
    good = next(path for path in names if run(path)[0] == 0).read_bytes()
    names[2].write_bytes(b"damaged")
    options = (folder, "--batch-size", 4, "--out", out)
    assert run(*options)[0] == 3
    lines = out.read_bytes().splitlines(True)
    names[2].write_bytes(good)
    out.unlink()
    kept = b"".join(lines[: 3 + (ending == "csv")])
    (tmp_path / f"out.{ending}.partial").write_bytes(kept)  # within the first batch, which is run again
    assert run(*options, "--resume")[0] == 3
    assert out.read_bytes() == b"".join(lines)  # and the record of then stays


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_resuming_refuses_maps_of_another_method(ending, run, images, tmp_path):
    out = tmp_path / f"out.{ending}"
    options = (images / "0", "--batch-size", 4, "--out", out, "--maps", tmp_path / "maps")
    run(*options)
    code, _, err = run(*options, "--resume", "--method", "last")
    assert code == 2
    assert (
        "the maps so far are by rollout, these would be by last; ask for the same ones, or run without --resume" in err
    )
    assert run(*options, "--resume")[0] in (0, 3)


def test_resuming_refuses_other_images_and_other_options(run, images, tmp_path):
    out = tmp_path / "out.jsonl"
    options = (images, "--recursive", "--batch-size", 8, "--out", out)
    assert run(*options)[0] == 3
    whole = out.read_bytes()
    assert run(*options, "--resume")[0] == 3  # nothing left to do
    assert out.read_bytes() == whole
    code, _, err = run(images / "1", *options[1:], "--resume")
    assert code == 2
    assert "where the images now have" in err
    code, _, err = run(*options, "--top-k", 2, "--resume")
    assert code == 2
    assert err.count("\n") == 1  # no summary: this run has classified nothing
    assert f"{out}: this run gives another record for " in err
    assert "other weights, options or machine" in err
    assert out.read_bytes() == whole
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_resuming_refuses_another_threshold(ending, run, images, tmp_path):
    """Though the records that are made again would be the same by it."""
    out = tmp_path / f"out.{ending}"
    options = (images / "0", "--batch-size", 4, "--out", out)
    assert run(*options, "--threshold", 0.4)[0] == 3
    whole = out.read_bytes()
    run(images / "0", "--out", copy := tmp_path / "copy.jsonl")
    records = [record for record in map(json.loads, copy.read_text().splitlines()) if "error" not in record]
    made_again = {record["path"] for record in records[-4:]}
    between = next(
        s for r in records[8:-8] if (s := r["predictions"][0]["score"]) < 0.4 and r["path"] not in made_again
    )
    code, _, err = run(*options, "--resume", "--threshold", between)
    assert (code, out.read_bytes()) == (2, whole)
    assert re.search(rf"its record of .* is not by --threshold {between:g}; ask for the same one", err)
    assert run(*options, "--resume", "--threshold", 0.4)[0] == 3


def test_maps_that_are_gone_are_made_again(run, images, tmp_path, monkeypatch):
    """In the first batch, in one between, in one that is recorded in part; and all."""
    monkeypatch.setattr("vit.gallery.SHEET", 2)
    out = tmp_path / "out.jsonl"
    options = (images / "0/1?.png", "--batch-size", 2, "--out", out, "--maps", tmp_path / "maps")
    assert run(*options)[0] == 3
    whole = out.read_bytes()
    maps = {path: path.read_bytes() for path in (tmp_path / "maps").rglob("*.png")}
    recorded = [record["map"] for record in map(json.loads, whole.splitlines()) if "map" in record]
    for lost, kept in (([1, 3, 5], 7), ([4], 10), (range(9), 10)):
        for number in lost:
            os.unlink(recorded[number])
        out.rename(tmp_path / "out.jsonl.partial").write_bytes(b"".join(whole.splitlines(True)[:kept]))
        assert run(*options, "--resume")[0] == 3
        assert out.read_bytes() == whole
        assert {path: path.read_bytes() for path in (tmp_path / "maps").rglob("*.png")} == maps


def test_resuming_looks_at_an_image_that_was_classified(run, images, tmp_path):
    """Errors behind it are the same by any weights and options."""
    good, bad, out = tmp_path / "good", tmp_path / "bad", tmp_path / "out.jsonl"
    shutil.copytree(images / "0", good, ignore=lambda folder, names: [name for name in names if not name[0].isdigit()])
    bad.mkdir()
    for number in range(9):
        (bad / f"{number}.png").write_bytes(b"damaged")
    options = ("--recursive", "--batch-size", 4, "--out", out)
    assert run(good, bad, *options)[0] == 3
    whole = out.read_bytes()
    assert run(good, bad, images / "1", *options, "--top-k", 2, "--resume")[0] == 2
    assert out.read_bytes() == whole
    assert run(good, bad, *options, "--resume")[0] == 3
    assert out.read_bytes() == whole


def test_what_is_said_of_the_records_so_far_is_true(run, images, tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> object:
        raise Stopped(signal.SIGINT)

    def after(number: int) -> object:
        def classify(self: object, pieces: object, **options: object) -> Iterator[object]:
            yield from islice(real(self, pieces, **options), number)  # type: ignore[arg-type]
            stop()

        return classify

    real = Predictor.classify
    for name, batches, said in (
        ("a.csv", 0, ""),
        ("a.csv", 1, f"; the records so far are in {tmp_path / 'a.csv'}.partial; --resume goes on"),
        ("a.json", 1, f"; the records so far are in {tmp_path / 'a.json'}.partial"),
        ("a.parquet", 1, "; the records so far are lost: a Parquet file is whole or none"),
    ):
        monkeypatch.setattr(Predictor, "classify", after(batches))
        code, _, err = run(images / "0", "--batch-size", 2, "--out", tmp_path / name)
        assert (code, err.splitlines()[-1]) == (130, f"stopped by SIGINT{said}")


def test_records_to_a_device_are_added(run, images, tmp_path):
    out = tmp_path / "all.jsonl"
    out.write_text("before\n")
    with out.open("ab") as file:
        assert run(images / "0/0.png", "--format", "jsonl", "--out", f"/dev/fd/{file.fileno()}")[0] == 0
    first, second = out.read_text().splitlines()
    assert (first, json.loads(second)["path"]) == ("before", str(images / "0/0.png"))
    assert json.loads(run(images / "0/0.png", "--format", "jsonl", "--out", "-")[1])["path"]


def test_records_do_not_replace_what_is_none(run, images, checkpoint, tmp_path):
    code, _, err = run(images / "0/0.png", "--format", "csv", "--out", images / "0/1.png")
    assert (code, "has the name of an image" in err) == (2, True)
    page = tmp_path / "page.html"
    code, _, err = run(images / "0/0.png", "--format", "csv", "--out", page, "--report", page)
    assert (code, f"--out {page} and --report {page} are the same; each needs a name" in err) == (2, True)
    weights = Path(checkpoint).read_bytes()
    code, _, err = run(images / "0/0.png", "--format", "json", "--out", checkpoint)
    assert (code, f"--out {checkpoint} and --checkpoint {checkpoint} are the same; each" in err) == (2, True)
    assert Path(checkpoint).read_bytes() == weights


def test_records_and_page_replace_no_source(run, images, tmp_path, monkeypatch):
    """By whatever name, nor by what they are called while they grow; a device is no such file."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(images / "0/0.png", "image")
    shutil.copy("image", "page-1-of-2.html")
    os.link("image", "same.partial")
    list_file = Path("list.txt")
    list_file.write_text("image\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    stdin = os.dup(0)
    try:
        os.dup2(os.open(list_file, os.O_RDONLY), 0)
        for options, said in (
            (("image", "--out", "image"), "--out image: would replace image"),
            (("image", "--out", "same"), "--out same: would replace image"),
            (("-", "--out", "list.txt"), "--out list.txt: would replace the file on standard input"),
            (
                ("page-1-of-2.html", "--report", "page.html", "--shard", "1/2"),
                "--report page.html: would replace page-1-of-2.html",
            ),
        ):
            assert run(*options) == (2, "", f"predict.py: {said}; take another name\n")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        assert run("/dev/null", "image", "--out", "/dev/null")[0] == 3
    finally:
        os.dup2(stdin, 0)


def test_what_reads_the_photographs_of_iphones_is_said(run, tmp_path, monkeypatch):
    monkeypatch.setattr("vit.inputs.SUFFIXES", {".png"})  # as without pillow-heif
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.HEIC").touch()
    code, _, err = run(tmp_path)
    assert code == 0
    said = "1 other file in the folders left out (.heic 1; .heic: pip install pillow-heif); name what to try"
    assert err.splitlines()[-1].strip() == said


def test_folders_in_a_folder_are_looked_into_or_mentioned(run, tmp_path):
    for name in ("a.png", "sub/b.png", ".hidden/c.png", "maps/a.png.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for options, images, said in (([], 1, "1 subfolder not looked into"), (["--recursive"], 2, None)):
        code, out, err = run(tmp_path, "--maps", tmp_path / "maps", "--format", "jsonl", *options)
        assert code == 0
        assert len(out.splitlines()) == images
        assert (f"{said}; --recursive does that" in err) if said else "subfolder" not in err


def test_a_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert predict.main(["x.png"]) == 2
    assert "the folder one is in is gone" in capsys.readouterr().err
    tmp_path.mkdir()


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_unfinished_records_are_not_discarded_without_a_word(ending, run, images, tmp_path):
    out, partial = tmp_path / f"out.{ending}", tmp_path / f"out.{ending}.partial"
    partial.write_text("unfinished")
    code, _, err = run(images / "0/0.png", "--out", out)
    said = f"predict.py: {partial}: the records of an unfinished run were discarded"
    assert code == 0
    assert err.splitlines()[0] == said + "; --resume would have gone on with them" * (ending == "csv")
    assert "unfinished" not in out.read_text()
    assert not partial.exists()
    partial.touch()  # nothing is lost with this one
    assert "discarded" not in run(images / "0/0.png", "--out", out)[2]


def test_records_go_where_a_link_leads(run, images, tmp_path):
    (tmp_path / "out.jsonl").symlink_to("real.jsonl")
    (tmp_path / "real.jsonl").write_text("old")
    assert run(images / "0/0.png", "--out", tmp_path / "out.jsonl")[0] == 0
    assert (tmp_path / "out.jsonl").is_symlink()
    assert "predictions" in json.loads((tmp_path / "real.jsonl").read_text())


@pytest.mark.parametrize("name", ["out", "maps", "report"])
def test_empty_names_are_refused(name, run, images):
    code, out, err = run(images / "0/0.png", f"--{name}", "")
    assert (code, out) == (2, "")
    assert f"--{name} has an empty name" in err


def test_standard_streams_that_are_closed(checkpoint, images, tmp_path):
    """As daemons start programs: nothing goes where it does not belong, and nothing fails."""
    text = f"{sys.executable} predict.py --checkpoint {checkpoint} --format jsonl --device cpu"
    image, out = images / "0/0.png", tmp_path / "out.jsonl"
    for command, code, printed in (
        (f"{text} {image} --out {out} <&- >&- 2>&-", 0, b""),
        (f"{text} {image} 2>&-", 0, out),
        (f"{text} {image} >&-", 0, b""),
        (f"{text} - <&-", 4, b""),
    ):
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, timeout=100)
        assert done.returncode == code, command
        assert done.stdout == (printed if isinstance(printed, bytes) else printed.read_bytes()), command
        assert b"predictions" not in done.stderr
        assert b"Traceback" not in done.stderr


def test_a_reader_that_goes_away(checkpoint, images):
    text = f"{sys.executable} predict.py --checkpoint {checkpoint} '{images}/**' --batch-size 4 --format jsonl"
    result = subprocess.run(
        ["bash", "-c", f"{text} | head -n 1; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True, timeout=100
    )
    assert result.returncode in (141, 3)  # 3: all was in the pipe before its reader went
    assert b"predictions" in result.stdout
    assert b"Traceback" not in result.stderr
    assert b"Exception" not in result.stderr


# ---- hostile files -----------------------------------------------------------------------------------------------


def test_pillow_s_own_test_images(checkpoint, pillow_images, tmp_path):
    """One record for every file, no traceback, within a minute and 1.5 GB."""
    out = tmp_path / "out.jsonl"
    args = ["--checkpoint", checkpoint, f"{pillow_images}/**", "--out", str(out)]
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen([sys.executable, "predict.py", *args], cwd=ROOT, stdout=err, stderr=err)
        memory, done = 0, 0
        while not done:  # the child's own peak: ru_maxrss would begin with that of the process which forked it
            with suppress(OSError, StopIteration):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                memory = max(memory, next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            time.sleep(0.01)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 3
    files = [path for path in pillow_images.rglob("*") if path.is_file() and not path.name.startswith(".")]
    records = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert sorted(record["path"] for record in records) == sorted(map(str, files))
    assert sum("predictions" in record for record in records) > 600
    said = (tmp_path / "err").read_text()
    assert len(said.splitlines()) <= 3, said  # the summary, and nothing that a library said
    assert usage.ru_utime + usage.ru_stime < 60
    assert 0 < memory < 1.5 * 2**20  # kB
