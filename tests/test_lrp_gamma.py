"""How the gamma of lrp is chosen: by the score, on images that are held out."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import lrp_gamma, record
from vit.rollout import GAMMA


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_pairs_are_scored_on_held_out_images(tmp_path, monkeypatch):
    before, random = dict(GAMMA), np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "images" / f"class {number % 10}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(lrp_gamma, "LINEAR", (0, 0.5))
    monkeypatch.setattr(lrp_gamma, "PIXELS", (0, 2))
    monkeypatch.chdir(tmp_path)
    lrp_gamma.main(["--data", str(tmp_path / "images"), "--images", "9", "--steps", "2", "--device", "cpu"])
    found = json.loads((tmp_path / "lrp_gamma.json").read_text())
    assert found["images"] == 9  # of ten, a quarter of each class
    assert [(row["linear"], row["pixels"]) for row in found["rows"]] == [(0, 0), (0, 2), (0.5, 0), (0.5, 2)]
    assert len({row["score"][0] for row in found["rows"]}) == 4
    assert before == GAMMA
