"""What there is to compute on."""

import platform
from pathlib import Path

import pytest
import torch

from vit.device import device_name, has_bfloat16

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.parametrize(("threads", "words"), [(1, ", 1 thread"), (2, ", 2 threads")])
def test_device_is_named(threads, words, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert device_name(torch.device("cpu")).endswith(words)


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.exists(), reason="the processor is not asked so")
def test_bfloat16_is_where_the_processor_says_so():
    flags = set(next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split())
    assert has_bfloat16(torch.device("cpu")) == bool(flags & {"avx512_bf16", "amx_tile"})
    assert not has_bfloat16(torch.device("meta"))
