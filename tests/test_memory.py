"""Memory that a script frees is there for its next pass: the system need not map it anew."""

import ctypes
import os
import subprocess
import sys

import pytest

MEASURE = """
import resource, torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    held = [torch.empty(2**22).fill_(1) for _ in range(8)]  # 16 MB each
    held.append(torch.empty(2**25).fill_(1))
use(), use(), use()
before = faults()
for _ in range(3):
    use()
print((faults() - before) * resource.getpagesize() / 2**20)
"""
SCRIPTS = {
    "predict.py": "import predict; assert predict.main(['--classes']) == 0",
    "train.py": "import train; assert train.main(['fit', '--data.dataset=nowhere']) == 2",
    "a worker of Ray's": "from vit.cluster import Worker\nfrom vit.checkpoint import SHIPPED, load_checkpoint\n"
    "model, about = load_checkpoint(SHIPPED)\nWorker(dict(model=model, about=about, device='cpu'), {}, None, '.')",
}


def mapped(code: str, **environment: str) -> float:
    """Megabytes that the system had to map while 256 MB were taken and freed three times, after the code has run."""
    run = [sys.executable, "-c", code + MEASURE]
    done = subprocess.run(run, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="another C library than glibc")
@pytest.mark.parametrize("script", SCRIPTS)
def test_freed_memory_is_kept_by(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.chdir(tmp_path)
    assert mapped(SCRIPTS[script]) < 100


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="another C library than glibc")
def test_freed_memory_goes_back_unasked_and_where_the_environment_says_so():
    ask = "from vit.memory import keep_freed_memory\nprint(keep_freed_memory())\n"
    assert mapped("") > 300
    assert mapped(ask) < 100
    assert mapped(ask, MALLOC_TRIM_THRESHOLD_="131072") > 300
