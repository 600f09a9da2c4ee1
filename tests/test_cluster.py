"""A local Ray of two workers, one of them killed, against a plain run."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from vit.checkpoint import Checkpoint, save_checkpoint
from vit.model import VisionTransformer
from vit.preprocess import Preprocess

ROOT = Path(__file__).parent.parent
BATCHES, BATCH = 96, 2


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Random weights whose predictions differ from image to image."""
    model = VisionTransformer(image_size=16, patch_size=8, num_classes=7, embed_dim=32, depth=2, num_heads=2)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    preprocess = Preprocess(image_size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
    names = tuple(f"class {i}" for i in range(7))
    about = Checkpoint(architecture=model.architecture, class_names=names, preprocess=preprocess)
    return save_checkpoint(tmp_path / "model.safetensors", model.state_dict(), about)


@pytest.fixture
def images(tmp_path) -> Path:
    """Pictures that take their time to decode; one name is no valid text, one file is no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(8):
        pixels = generator.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((1000, 1000)).save(tmp_path / f"{i}.png", compress_level=1)
    for i in range(BATCHES * BATCH - 1):
        os.link(tmp_path / f"{i % 8}.png", os.fsencode(folder) + b"/%03d%s.png" % (i, b"\xff" if i == 5 else b""))
    (folder / "broken.png").write_text("no image")
    return folder


def workers(ancestor: int) -> list[int]:
    """Processes below this one that compute for Ray."""
    parents, found = {}, []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, name, fields = re.fullmatch(r"(\d+) \((.*)\) (.*)", status.read_text(), re.DOTALL).groups()  # pyright: ignore
        except OSError:
            continue  # it has ended
        parents[int(number)] = int(fields.split()[1])
        if name.startswith("ray::MapWorker"):
            found.append(int(number))

    def below(number: int) -> bool:
        while number not in (0, ancestor):
            number = parents.get(number, 0)
        return number == ancestor

    return [number for number in found if below(number)]


@pytest.mark.timeout(300)  # on a busy machine Ray takes its time to start
def test_two_workers_of_which_one_is_killed_give_the_records_of_a_plain_run(checkpoint, images, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or they wait for everything else that runs here
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    options = [sys.executable, "predict.py", str(images), "--checkpoint", str(checkpoint), "--batch-size", str(BATCH)]
    options += ["--device", "cpu", "--out"]
    out, partial = tmp_path / "ray.jsonl", tmp_path / "ray.jsonl.partial"
    said = tmp_path / "said"
    with said.open("w") as err:
        ray = subprocess.Popen([*options, str(out), "--engine", "ray", "--workers", "2"], cwd=ROOT, stderr=err)
    seen, there = set(), 0
    while ray.poll() is None:
        time.sleep(0.005)
        now = workers(ray.pid)
        if now and not there and partial.exists():
            there = partial.read_bytes().count(b"\n")
            if there:
                os.kill(now[0], signal.SIGKILL)
        seen |= set(now)
    assert ray.returncode == 3
    assert 0 < there < BATCHES * BATCH
    assert len(seen) >= 3  # two, and the one that took the place of the killed one
    assert len(said.read_text().splitlines()) == 3  # the summary with what failed, and nothing of what Ray says
    plain = tmp_path / "plain.jsonl"
    assert subprocess.run([*options, str(plain)], cwd=ROOT, capture_output=True).returncode == 3
    assert out.read_bytes() == plain.read_bytes()
    assert out.read_bytes().count(b"\n") == BATCHES * BATCH


def test_without_ray_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(predict, "find_spec", lambda name: None)
    assert predict.main(["a.png", "--engine", "ray"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("--engine ray needs ray: pip install 'ray[data]'")


def test_a_cluster_that_is_not_there_is_one_line(checkpoint, images):
    result = subprocess.run(
        [sys.executable, "predict.py", str(images), "--checkpoint", str(checkpoint), "--engine", "ray"],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == "predict.py: no Ray cluster at RAY_ADDRESS=127.0.0.1:1: Connection refused"
    assert "Traceback" not in result.stderr
