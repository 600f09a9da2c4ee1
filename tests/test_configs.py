"""Every experiment in configs/ says how to run it, and runs: one step of training and of validation on the digits."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import train

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
each = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def test_there_are_configs():
    assert {"digits", "cifar10"} <= {path.stem for path in CONFIGS}


@each
def test_header_gives_the_command(path):
    lines = path.read_text().splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert any(f"configs/{path.name}" in line for line in header)


@each
def test_writes_where_its_name_says(path):
    if path.stem == "fsdp":  # is laid over another, and writes where that does
        assert "default_root_dir" not in read(path)["trainer"]
    else:
        assert read(path)["trainer"]["default_root_dir"] == f"runs/{path.stem}"


@each
def test_trains_a_step(path, tmp_path):
    overlay = "dataset" not in read(path).get("data", {})  # changes another config and is none by itself
    files = [ROOT / "configs/digits.yaml", path] if overlay else [path]
    shallow = ["--model.depth=1"] if "depth" in read(files[0])["model"] else []
    status = train.main(
        [
            "fit",
            *(f"--config={file}" for file in files),
            "--data.dataset=digits",
            "--data.batch_size=8",
            "--data.image_size=null",  # the digits' own 8x8 pixels, which half of would be less than a patch
            "--model.resolution=[]",
            *shallow,
            "--model.compile=false",  # takes long; test_resume and test_classifier compile
            "--trainer.fast_dev_run=1",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.num_nodes=1",
            "--trainer.strategy=auto",
            "--trainer.precision=32-true",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert status == 0
