"""What each format writes, and the output file that survives being killed; against the standard parsers."""

import csv
import fcntl
import io
import json
import os
import resource
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from rich.cells import cell_len

from vit.records import Csv, Json, JsonLines, Output, OutputError, Parquet, Table, distinct

PREDICTIONS = [{"label": "cat", "score": 0.75}, {"label": 'a,"b"\nc', "score": 0.125}]
RECORDS = [
    {"path": "a.png", "predictions": PREDICTIONS, "unsure": True},
    {"path": os.fsdecode(b"\xff new\nline,\xc3\xbc.png"), "error": "no such file"},
    {"path": "\x1b[31mred\r.png", "predictions": PREDICTIONS[::-1], "unsure": False},
]
FORMATS = {"jsonl": JsonLines, "csv": lambda: Csv(2, ("unsure",))}


def written(format, records=RECORDS) -> bytes:
    return b"".join([format.start(), *map(format.record, records), format.end()])


def test_json_lines_are_json_and_give_back_every_byte_of_a_path():
    lines = written(JsonLines()).decode("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == RECORDS
    assert os.fsencode(json.loads(lines[1])["path"]) == os.fsencode(RECORDS[1]["path"])
    assert "ü.png" in lines[1]  # as people read it


@pytest.mark.parametrize("format", [JsonLines, Json])
def test_json_lets_no_name_move_the_terminal(format):
    """Nor end a line: U+2028 does for many readers."""
    record = {"path": "ü\x1b[31m\x7f\x9b\u2028\u202e\U000e0001" + os.fsdecode(b"\xff"), "error": "no such file"}
    text = written(format(), [record]).decode()
    assert text.replace("\n", "").isprintable()
    assert json.loads(text) in (record, [record])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_json_is_one_array(count):
    assert json.loads(text := written(Json(), RECORDS[:count])) == RECORDS[:count]
    assert ("ü.png" in text.decode()) == (count > 1)


def test_csv_is_read_by_csv():
    rows = list(csv.DictReader(io.StringIO(written(Csv(2, ("unsure",))).decode("utf-8"), newline="")))
    assert [row["path"] for row in rows] == ["a.png", "\\udcff new\nline,ü.png", "\x1b[31mred\r.png"]
    assert [row["label_2"] for row in rows] == ['a,"b"\nc', "", "cat"]
    assert [row["score_1"] for row in rows] == ["0.750000", "", "0.125000"]
    assert [row["error"] for row in rows] == ["", "no such file", ""]
    assert [row["unsure"] for row in rows] == ["True", "", "False"]


def test_csv_gives_back_what_a_run_that_goes_on_asks_for():
    format = Csv(2, ("unsure", "map"))
    data = written(format, [{**RECORDS[0], "map": "maps/a.png"}, *RECORDS[1:]])
    records = [record for record, _ in format.read(io.BytesIO(data))]
    assert [record["unsure"] for record in records] == [True, False, False]
    assert [record["map"] for record in records] == ["maps/a.png", None, None]
    assert [record.get("error") for record in records] == [None, "no such file", None]
    first = [RECORDS[i]["predictions"][0] for i in (0, 2)]
    assert [record.get("predictions") for record in records] == [[first[0]], None, [first[1]]]


def test_parquet_is_read_by_pyarrow(monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("vit.records.ROW_GROUP", 2)
    file = parquet.ParquetFile(io.BytesIO(written(Parquet(2, ("unsure",)))))
    assert file.num_row_groups == 2
    rows = file.read().to_pylist()
    assert [row["score_1"] for row in rows] == [0.75, None, 0.125]
    assert [row["error"] for row in rows] == [None, "no such file", None]
    assert [row["unsure"] for row in rows] == [True, None, False]


@pytest.mark.parametrize("format", [Csv, Parquet])
def test_columns_take_a_label_that_is_no_valid_text(format):
    label = os.fsdecode(b"caf\xe9")
    data = written(format(1), [{"path": "a.png", "predictions": [{"label": label, "score": 0.5}]}])
    if format is Csv:
        assert data.decode().splitlines()[1] == "a.png,caf\\udce9,0.500000,"
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        assert parquet.read_table(io.BytesIO(data)).column("label_1").to_pylist() == ["caf\\udce9"]


def test_table_lets_no_name_move_the_terminal():
    text = written(Table(("cat", "dog"))).decode()
    assert text.count("\n") == len(RECORDS)
    assert text.replace("\n", "").isprintable()
    assert "75.0%" in text
    assert "unsure" in text


def test_table_fits_the_terminal():
    names = ("airplane", "cat", "dog", "truck")
    record = {"path": "a.png", "predictions": [{"label": name, "score": 0.25} for name in names], "unsure": True}
    for width, classes in ((200, 4), (80, 2), (20, 1)):
        line = Table(names, width=width).record(record).decode().rstrip()
        assert line.count("25.0%") == classes
        assert len(line) <= width or classes == 1
        assert line.endswith("   unsure")


def test_table_lines_up_letters_of_two_columns():
    table = Table(("猫", "dog"))
    table.expect(["写真/一つ目の大きな画像.png"])
    for path, label in (("写真/一つ目の大きな画像.png", "猫"), ("a.png", "dog")):
        line = table.record({"path": path, "predictions": [{"label": label, "score": 0.5}]}).decode()
        assert cell_len(line[: line.index(label)]) == cell_len("写真/一つ目の大きな画像.png") + 3
        assert cell_len(line[: line.index("50.0%")]) == cell_len("写真/一つ目の大きな画像.png") + 3 + 3 + 2
    table.expect(["x" * 100])  # makes no more than sixty columns of it
    line = table.record({"path": "a.png", "predictions": [{"label": "dog", "score": 0.5}]}).decode()
    assert line.index("dog") == 60 + 3
    line = Table(("x" * 100, "dog")).record({"path": "a.png", "predictions": PREDICTIONS[:1]}).decode()
    assert line.index("75.0%") == 20 + 3 + 24 + 2


def test_table_says_how_far_a_map_can_be_trusted():
    record = {**RECORDS[0], "map_score": 0.4149}
    assert Table(("cat", "dog")).record(record).decode().rstrip().endswith("map score +0.41")


# ---- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_cut_anywhere_goes_on_to_the_same_bytes(name, tmp_path):
    whole, path = written(FORMATS[name]()), tmp_path / "out"
    for size in range(len(whole) + 1):
        (tmp_path / "out.partial").write_bytes(whole[:size])
        output = Output(str(path), FORMATS[name](), resume=True)
        kept = [record["path"] for record, _ in output.kept()]
        output.start()
        for record in RECORDS[len(kept) :]:
            output.write(record)
        assert not path.exists()
        output.finish()
        output.close()
        assert path.read_bytes() == whole, size
        path.unlink()
    assert len(kept) == len(RECORDS)  # the last turn began with all of them


def test_what_is_added_to_a_device_is_whole(tmp_path):
    with open(tmp_path / "all.csv", "ab", buffering=0) as file:
        file.write(b"before\n")
        output = Output(f"/dev/fd/{file.fileno()}", FORMATS["csv"]())
        output.start()
        output.write(RECORDS[0])
        output.finish()
        output.close()
    assert (tmp_path / "all.csv").read_bytes() == b"before\n" + written(FORMATS["csv"](), RECORDS[:1])


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    """... and on the disk, where a machine may lose its power."""
    order, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), rename(*paths)))
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    output = Output(str(path), JsonLines())
    output.write(RECORDS[0])
    assert path.read_text() == "old"
    assert json.loads((tmp_path / "out.jsonl.partial").read_text()) == RECORDS[0]  # at once, in no buffer
    assert not order
    output.finish()
    output.close()
    assert order == ["fsync", "replace"]
    assert json.loads(path.read_text()) == RECORDS[0]
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_two_runs_do_not_write_one_file(tmp_path):
    first = Output(str(tmp_path / "out"), JsonLines())
    with pytest.raises(OutputError, match="out: another run is writing it"):
        Output(str(tmp_path / "out"), JsonLines())
    first.close()
    Output(str(tmp_path / "out"), JsonLines()).close()


def test_a_run_that_ends_just_then_keeps_its_records(tmp_path, monkeypatch):
    """Between another run's opening of the unfinished file and its lock on it."""
    path = tmp_path / "out"
    first, lock = Output(str(path), JsonLines()), fcntl.flock
    first.write(RECORDS[0])

    def end(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        first.finish()
        first.close()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", end)
    second = Output(str(path), JsonLines())
    assert json.loads(path.read_text()) == RECORDS[0]
    second.write(RECORDS[2])
    second.finish()
    second.close()
    assert json.loads(path.read_text()) == RECORDS[2]


FOREIGN = [
    ("jsonl", '{"a": 1}\n'), ("jsonl", '{"path": 1}\n'), ("jsonl", '{"path": "a.png"}\n'), ("jsonl", "no end of line"),
    ("jsonl", '{"path": "a.png", "predictions": [{"label": "cat", "score": "0.9"}]}\n'),
    ("jsonl", "nonsense\n"), ("jsonl", "[1]\n"), ("csv", "path,x\na,b\n"), ("csv", "x"), ("csv", 'x,"y'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), FOREIGN)
def test_records_of_another_kind_are_not_gone_on_with_and_stay(name, text, tmp_path):
    for place in ("out", "out.partial") if text.endswith("\n") else ("out",):  # an unfinished file may be torn
        (tmp_path / place).write_text(text)
        output = Output(str(tmp_path / "out"), FORMATS[name](), resume=True)
        with pytest.raises(OutputError, match=f"{place}: not the records of such a run .*; run without --resume"):
            list(output.kept())
        output.close()
        assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {place: text}
        (tmp_path / place).unlink()


@pytest.mark.parametrize("name", FORMATS)
def test_a_finished_file_is_whole_at_every_moment_of_going_on(name, tmp_path):
    path, partial, whole = tmp_path / "out", tmp_path / "out.partial", written(FORMATS[name]())
    path.write_bytes(before := written(FORMATS[name](), RECORDS[:2]))
    output = Output(str(path), FORMATS[name](), resume=True)
    assert len(list(output.kept())) == 2
    output.start()
    with pytest.raises(OutputError, match="out: another run is writing it"):
        Output(str(path), FORMATS[name](), resume=True)
    assert path.read_bytes() == before  # until there is more to it
    output.write(RECORDS[2])
    assert not path.exists()
    assert partial.read_bytes() == whole
    with pytest.raises(OutputError, match="out: another run is writing it"):
        Output(str(path), FORMATS[name]())
    output.finish()
    output.close()
    assert path.read_bytes() == whole
    assert not partial.exists()


def test_a_finished_file_does_not_replace_what_another_run_has_begun(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(before := written(JsonLines(), RECORDS[:1]))
    output, other = Output(str(path), JsonLines(), resume=True), Output(str(path), JsonLines())
    assert len(list(output.kept())) == 1
    with pytest.raises(OutputError, match="out: another run is writing it"):
        output.write(RECORDS[1])
    output.close()
    other.close()
    assert path.read_bytes() == before


def test_a_finished_file_that_was_replaced_since_is_not_gone_on_with(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(written(JsonLines(), RECORDS[:1]))
    output = Output(str(path), JsonLines(), resume=True)
    assert len(list(output.kept())) == 1
    (tmp_path / "new").write_bytes(b"another run's")
    (tmp_path / "new").rename(path)
    with pytest.raises(OutputError, match="out: another run is writing it, or has since"):
        output.write(RECORDS[1])
    output.close()
    assert path.read_bytes() == b"another run's"


def test_a_file_that_is_finished_is_where_it_is_said_to_be(tmp_path):
    output = Output(str(tmp_path / "out"), JsonLines())
    output.start()
    output.write(RECORDS[0])
    assert output.current == tmp_path / "out.partial"
    output.finish()
    output.close()
    assert output.current == tmp_path / "out"
    assert output.current.exists()


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm")
def test_a_file_in_shared_memory_is_a_file():
    with TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder, "out")
        path.write_bytes(b"before")
        output = Output(str(path), JsonLines())
        output.write(RECORDS[0])
        assert path.read_bytes() == b"before"
        output.finish()
        output.close()
        assert path.read_bytes() == JsonLines().record(RECORDS[0])


def test_a_disk_that_fills_up_is_named_and_gone_on_with(tmp_path):
    whole, path = written(JsonLines()), tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in range(0, len(whole), 7):
        output = Output(str(path), JsonLines())
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # as if no more bytes were there
        try:
            with pytest.raises(OutputError, match=r"out\.jsonl: File too large"):
                [output.write(record) for record in RECORDS]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        output.close()
        output = Output(str(path), JsonLines(), resume=True)
        kept = len(list(output.kept()))
        assert kept == whole[:room].count(b"\n")
        for record in RECORDS[kept:]:
            output.write(record)
        output.finish()
        output.close()
        assert path.read_bytes() == whole


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(OutputError, match="out: Is a directory"):
        Output(str(tmp_path / "out"), JsonLines())
    full = Output("/dev/full", JsonLines())
    with pytest.raises(OutputError, match="/dev/full: No space left on device"):
        full.write(RECORDS[0])
    full.close()


def test_names_are_made_distinct_whatever_they_are():
    assert distinct(["crane", "owl", "crane"]) == ("crane (0)", "owl", "crane (2)")
    names = distinct(["crane", "crane", "crane (1)"])
    assert len(set(names)) == 3
    assert distinct(names) == names
