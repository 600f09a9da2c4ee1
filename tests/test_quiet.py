"""What libraries below Python write to the terminal does not reach it; what Python says does."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
ALONE = """
import os, sys
from vit.quiet import quiet_libraries
with quiet_libraries():
    os.write(2, b"a library's\\n")
    print("ours", file=sys.stderr)
os.write(2, b"afterwards\\n")
"""
DECODING = """
import os, sys, data.cache
from data.sources import load_source
decode = data.cache._Chunks.__getitem__
def noisy(chunks, index):
    os.write(2, b"TIFFFetchNormalTag: a library's\\n")
    return decode(chunks, index)
data.cache._Chunks.__getitem__ = noisy
assert len(load_source(sys.argv[1], root=sys.argv[2], image_size=8, num_workers=int(sys.argv[3])).train.labels) == 4
os.write(2, b"afterwards\\n")
"""


def said(code: str, *arguments: str) -> list[str]:
    """Lines on standard error of a process."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr.splitlines()


def test_only_python_is_heard():
    assert said(ALONE) == ["ours", "afterwards"]


@pytest.mark.parametrize("workers", [0, 2])
def test_decoding_is_quiet(tmp_path, workers):
    for i in range(4):
        (folder := tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    assert said(DECODING, str(tmp_path / "set"), str(tmp_path / "root"), str(workers)) == ["afterwards"]
