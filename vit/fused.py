"""Rollout on a GPU through the fused attention kernel: no N x N matrix is ever held, and the map is as exact.

A row r times softmax(q kᵀ / √d) is for each key j the sum over queries i of r_i exp(q_i·k_j / √d - L_i), where L_i, the
logarithm of row i's sum, is what the fused kernel (FlashAttention, 2205.14135) has left when it is done. So queries,
keys and these logarithms are kept, with the values beside them about 3 N D numbers a layer, and one kernel makes such a
step with scores that are computed again, block by block. On a CPU matrices are faster, so ``vit.rollout`` comes here
with a GPU only; a CPU runs this in Triton's interpreter (TRITON_INTERPRET=1), which is how it is tested.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vit.model import VisionTransformer
from vit.rollout import fuse_heads, rollout

BLOCK = {2: 64, 4: 32}  # queries, and keys, at a time, by bytes of a number: heads of up to 64 then fit the registers
OPTIONS = {"enable_fp_fusion": True}  # as Triton does by itself until 3.9, which warns that it will not


@torch.no_grad()
def fused_rollout(model: VisionTransformer, images: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, classes) and the rollout of one row (B, N), heads fused by their mean.

    Args:
        model: In eval mode.
        images: Normalised images (B, in_chans, H, W).
        start: Weight of each token in what is classified (N,).
    """
    (x, turns), kept = model.embed(images), []
    *blocks, last = model.blocks
    for block in blocks if model.num_read else model.blocks:
        q, k, v = block.attn.heads(block.norm1(x), turns)
        q, k = q.to(v.dtype), k.to(v.dtype)  # which their norms, under autocast, made float32
        attended, lse = attend(q, k, v)
        x = block.add(x, block.attn.merge(attended))
        kept.append((q, k, lse))
    row = start.float().expand(len(images), -1)
    if model.num_read:  # of whose matrix few rows are needed
        x, weights = last.explain(x, turns, model.num_read)
        row = rollout([fuse_heads(weights)], row[:, : model.num_read])
    for q, k, lse in reversed(kept):
        row = step(row, q, k, lse)
    return model.forward_head(model.norm(x)), row


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all this runs on a device and is right there: tried once, on something small.

    Triton needs a C compiler and Python's headers, and may not know a GPU; matrices do as well.
    """
    q, k, v = torch.linspace(-3, 3, 3 * 2 * 5 * 16, device=device).sin().to(dtype).view(3, 1, 2, 5, 16)
    row = torch.full((1, 5), 0.2, device=device)
    try:
        with torch.autocast(device.type, enabled=False):
            found = step(row, q, k, attend(q, k, v)[1])
    except Exception:  # whatever a compiler, a driver or a library may raise
        return False
    weights = (q.double() @ k.double().transpose(-2, -1) / 4).softmax(-1)
    return torch.allclose(found.double(), (row + row.double() @ weights.mean(1)[0]) / 2, atol=1e-3)


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What attention gives (B, h, N, d), and the logarithm of the sum that each row was divided by (B, h, N).

    These are the operators behind ``scaled_dot_product_attention``, which keeps the logarithms to itself.
    """
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if q.dtype == torch.float32:
        attended, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, compute_log_sumexp=True)
        return attended, lse[..., : q.shape[2]]
    attended, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
    return attended, lse


def step(row: Tensor, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """The row (B, N) times (A + I) / 2, where A is the mean of the heads' attention weights.

    Args:
        row: Float32 (B, N).
        q: Queries (B, h, N, d).
        k: Keys (B, h, N, d).
        lse: Logarithm of the sum of each row of exponentiated scores, float32 (B, h, N).
    """
    B, h, N, d = q.shape
    row = row.contiguous()
    out = torch.empty_like(row)
    block = BLOCK[q.element_size()]
    run: Any = step_kernel[(B, triton.cdiv(N, block))]
    strides = (*q.stride(), *k.stride(), *lse.stride())
    with torch.cuda.device_of(row):  # Triton launches on the current device, whichever the tensors are on
        size = max(16, triton.next_power_of_2(d))
        run(row, q, k, lse, out, h, N, d, d**-0.5, *strides, BLOCK=block, SIZE=size, **OPTIONS)
    return out


@triton.jit
def step_kernel(
    row, q, k, lse, out, h, N, d, scale,
    q_image, q_head, q_token, q_size, k_image, k_head, k_token, k_size, lse_image, lse_head, lse_token,
    BLOCK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One program makes the numbers of BLOCK keys of an image: over all heads and, block by block, all queries."""
    image = tl.program_id(0).to(tl.int64)
    keys = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sizes = tl.arange(0, SIZE)
    total = tl.zeros([BLOCK], tl.float32)
    for head in range(h):
        key_places = k + image * k_image + head * k_head + keys[None, :] * k_token + sizes[:, None] * k_size
        key = tl.load(key_places, mask=(keys[None, :] < N) & (sizes[:, None] < d), other=0.0)  # (SIZE, BLOCK)
        for first in range(0, N, BLOCK):
            queries = first + tl.arange(0, BLOCK)
            inside = queries < N
            query_places = q + image * q_image + head * q_head + queries[:, None] * q_token + sizes[None, :] * q_size
            query = tl.load(query_places, mask=inside[:, None] & (sizes[None, :] < d), other=0.0)  # (BLOCK, SIZE)
            weight = tl.load(row + image * N + queries, mask=inside, other=0.0)
            log = tl.load(lse + image * lse_image + head * lse_head + queries * lse_token, mask=inside, other=0.0)
            scores = tl.dot(query, key, input_precision="ieee") * scale
            total += tl.sum(weight[:, None] * tl.exp(scores - log[:, None]), 0)
    own = tl.load(row + image * N + keys, mask=keys < N, other=0.0)
    tl.store(out + image * N + keys, (own + total / h) / 2, mask=keys < N)
