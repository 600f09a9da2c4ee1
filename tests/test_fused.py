"""Rollout through the fused kernel is that of full matrices, and what is our own of it compiles for GPUs."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from vit.model import VisionTransformer
from vit.rollout import attention_map, fusable

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton on this system")
ROOT = Path(__file__).parent.parent
SHAPES = {
    "class token": {"num_registers": 3, "image_size": (36, 36), "embed_dim": 64},
    "mean": {"pool": "mean", "image_size": (32, 48), "embed_dim": 48, "qk_norm": True, "stem": "conv", "rope": True},
    "mean, registers, one block": {"pool": "mean", "num_registers": 2, "image_size": 16, "embed_dim": 32, "depth": 1},
}
INTERPRETED = """
import torch
from tests.test_fused import SHAPES, example
from vit import fused
from vit.fused import fused_rollout, works
from vit.rollout import attention_map, pooling_weights

for name in SHAPES:
    for dtype in (torch.float32, torch.float16):
        model, images = example(name)
        tokens = model.grid_size[0] * model.grid_size[1] + model.num_prefix_tokens
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits, row = fused_rollout(model, images, pooling_weights(model, tokens))
        torch.testing.assert_close(row.sum(1), torch.ones(2), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-3)
        expected_logits, expected = attention_map(model.double(), images.double())
        patches = row[:, model.num_prefix_tokens :]
        found = (patches / patches.sum(1, keepdim=True)).view_as(expected)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(logits.double(), expected_logits, rtol=tolerance, atol=tolerance)
        assert (found - expected).abs().max() < tolerance * expected.max(), name
        assert expected.max() > 1.05 * expected.min(), name

with torch.autocast("cpu", torch.bfloat16):
    assert works(torch.device("cpu"), torch.float32) and works(torch.device("cpu"), torch.float16)
assert not works(torch.device("cpu"), torch.int64)
fused.step_kernel = None
works.cache_clear()
assert not works(torch.device("cpu"), torch.float32)
"""


def example(name: str) -> tuple[VisionTransformer, torch.Tensor]:
    """A model whose attention is uneven, and two images."""
    torch.manual_seed(0)
    model = VisionTransformer(**{"patch_size": 4, "depth": 3, "num_heads": 2, "num_classes": 5, **SHAPES[name]}).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, torch.randn(2, 3, *model.image_size)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is not None and tuple(map(int, version("triton").split(".")[:2])) < (3, 7),
    reason="the interpreter of Triton before 3.7 fails with numpy 2.4",
)
def test_equals_full_matrices():
    """In Triton's interpreter, which stands in for a GPU; it must be asked for before the kernel is read."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_for_a_gpu_that_is_not_here(capability, dtype, tmp_path, monkeypatch):
    """Triton brings its own assembler; the interpreter lets pass what the compiler refuses."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vit.fused import BLOCK, OPTIONS, step_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block = BLOCK[4 if dtype == "fp32" else 2]
    constants = {"BLOCK": block, "SIZE": 64, "q_size": 1, "k_size": 1, "lse_token": 1}
    types = dict.fromkeys(step_kernel.arg_names, "i32") | dict.fromkeys(("row", "lse", "out"), "*fp32")
    types |= dict.fromkeys(("q", "k"), f"*{dtype}") | {"scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(step_kernel, types, constants)
    program = compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
    assert program.asm["cubin"]
    assert program.metadata.shared < 99 * 1024  # what every GPU since 2020 has
    assert ("mma" in program.asm["ptx"]) == (
        dtype != "fp32"
    )  # tensor cores, but not for float32, which they would round


@pytest.fixture
def unrounded(monkeypatch):
    """Float32 as it is: a GPU rounds the factors of convolutions to ten bits, and of products once train.py has run."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_is_not_for_a_cpu():
    model, images = example("mean")
    assert not fusable(model, images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_real_gpu_shows_what_a_cpu_shows(name, dtype, unrounded):
    model, images = example(name)
    logits, maps = attention_map(model.double(), images.double())
    model, images = model.float().cuda(), images.cuda()
    assert fusable(model, images)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found_logits, found = attention_map(model, images)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found_logits.double().cpu(), logits, rtol=tolerance, atol=tolerance)
    assert (found.cpu() - maps).abs().max() < tolerance * maps.max()
