"""The shipped weights: small, honest, and as good through predict.py as their card says."""

import json
import math
from pathlib import Path

import predict
from vit.checkpoint import load_checkpoint
from vit.predictor import SHIPPED

ROOT = Path(__file__).parent.parent
EACH = 100  # test images of each class


def figures() -> dict[str, float]:
    rows = json.loads((ROOT / "benchmarks/results/cifar10.json").read_text())["rows"]
    return {row["what"]: row["value"] for row in rows}


def test_file_is_small_and_says_what_it_is():
    assert SHIPPED.stat().st_size <= 16 * 2**20
    _, about = load_checkpoint(SHIPPED)
    assert len(about.class_names) == 10
    assert about.temperature != 1
    assert about.training["steps"] > 0


def test_accuracy_through_predict_is_that_of_the_card(cifar10_jpeg, tmp_path):
    classes = sorted(path for path in (cifar10_jpeg / "test").iterdir() if path.is_dir())
    images = [str(image) for folder in classes for image in sorted(folder.glob("*.jpg"))[:EACH]]
    out = tmp_path / "labels.jsonl"
    assert predict.main([*images, "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    right = sum(Path(r["path"]).parent.name == r["predictions"][0]["label"] for r in records)
    expected = figures()["accuracy"]
    error = math.sqrt(expected * (1 - expected) / len(images))
    assert abs(right / len(images) - expected) < 3 * error


def test_card_gives_the_measured_figures():
    card = (ROOT / "vit/weights/README.md").read_text()
    for what, value in figures().items():
        assert f"{value:.2%}" in card, what
