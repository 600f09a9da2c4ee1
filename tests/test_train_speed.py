"""The benchmark of training takes the project's own parts: where they change, it must still run."""

import json
import sys

from benchmarks import record, train_speed


def test_every_way_is_measured_at_every_resolution_and_what_is_done_is_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(train_speed.torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(train_speed, "WARMUP", 1)
    monkeypatch.setattr(train_speed, "STEPS", 2)
    facts = ("--config", "configs/digits.yaml", "--data", "digits", "--model.depth", "2", "--turns", "1")
    monkeypatch.setattr(sys, "argv", ["train_speed", *facts, "--model.resolution", "[[0.5, 0.5]]"])
    kept = []
    monkeypatch.setattr(train_speed, "record", lambda *a, **k: kept.append(len(a[1])) or record.record(*a, **k))
    train_speed.main()
    rows = json.loads((tmp_path / "train_speed.json").read_text())["rows"]
    ways = [
        "this project, under Lightning",
        "the same steps, bare loop",
        "our model, one batch",
        "timm's model, one batch",
    ]
    assert [(row["way"], row["pixels"]) for row in rows] == [(w, p) for p in ("4x4", "8x8") for w in ways]
    assert all(row["images/s"] > 0 and 0 <= row["waiting for data"] < 1 for row in rows)
    assert kept == [4, 8]
    assert "minutes without validation" in capsys.readouterr().out
