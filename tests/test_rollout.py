"""Every method against a float64 reference by full matrices, for each shape of model; what attention_map promises."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit import rollout as module
from vit.model import Attention, VisionTransformer
from vit.rollout import (
    CLASS_SPECIFIC,
    FUSIONS,
    GAMMA,
    METHODS,
    AttnLRP,
    attention_map,
    discard_lowest,
    fuse_heads,
    layer_attention,
    pixel_relevance,
    relevance,
    rollout,
)

CLASSES = 5
SHAPES = [
    pytest.param(
        dict(pool=pool, num_registers=registers, image_size=size), id=f"{pool}-{registers}-{size[0]}x{size[1]}"
    )
    for pool in ("token", "mean")
    for registers in (0, 4)
    for size in ((16, 16), (8, 20))
] + [
    pytest.param(dict(pool="token", num_registers=1, image_size=(8, 20), rope=True), id="token-rope"),
    pytest.param(dict(pool="mean", num_registers=2, image_size=(16, 16), rope=True), id="mean-rope"),
]


def build(**arguments) -> VisionTransformer:
    """A small model whose attention is far from even."""
    torch.manual_seed(1)
    model = VisionTransformer(**{
        "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": CLASSES, **arguments,
    })  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def images_for(model: VisionTransformer, batch: int = 3) -> Tensor:
    return torch.randn(batch, model.in_chans, *model.image_size)


def start_of(model: VisionTransformer, tokens: int) -> Tensor:
    start = torch.zeros(tokens, dtype=torch.float64)
    if model.pool == "token":
        start[0] = 1
        return start
    patches = model.grid_size[0] * model.grid_size[1]
    start[-patches:] = 1 / patches
    return start


def as_map(model: VisionTransformer, rows: Tensor) -> Tensor:
    """The reference's last step: patches only, positive part, sum 1."""
    patches = rows[:, -model.grid_size[0] * model.grid_size[1] :].clamp_min(0)
    total = patches.sum(1, keepdim=True)
    return torch.where(total > 0, patches / total, 1 / patches.shape[1]).view(-1, *model.grid_size)


def double(model: VisionTransformer) -> VisionTransformer:
    copy = VisionTransformer(**model.architecture).double().eval()
    copy.load_state_dict(model.state_dict())
    return copy


def attentions_of(model: VisionTransformer, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """All rows of all layers, though of the last one only those that are pooled are ever read."""
    model = double(model)
    (x, turns), attentions = model.embed(images.double()), []
    for block in model.blocks:
        x, weights = block.explain(x, turns)
        attentions.append(weights)
    return model.forward_head(model.norm(x)), attentions


def reference_rollout(model: VisionTransformer, images: Tensor, fuse: Callable[[Tensor], Tensor]) -> Tensor:
    _, attentions = attentions_of(model, images)
    identity = torch.eye(attentions[0].shape[-1], dtype=torch.float64)
    product = identity.expand(len(images), -1, -1)
    for attention in attentions:
        product = (fuse(attention) / 2 + identity / 2) @ product
    return as_map(model, start_of(model, product.shape[-1]) @ product)


def reference_relevance(model: VisionTransformer, images: Tensor, target: Tensor) -> Tensor:
    logits, attentions = attentions_of(model, images)
    gradients = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), attentions)
    identity = torch.eye(attentions[0].shape[-1], dtype=torch.float64)
    product = identity.expand(len(images), -1, -1)
    for attention, gradient in zip(attentions, gradients, strict=True):
        product = product + (attention * gradient).clamp_min(0).mean(1) @ product
    return as_map(model, start_of(model, product.shape[-1]) @ (product - identity))


def reference_last(model: VisionTransformer, images: Tensor, fuse: Callable[[Tensor], Tensor]) -> Tensor:
    _, attentions = attentions_of(model, images)
    return as_map(model, start_of(model, attentions[0].shape[-1]) @ fuse(attentions[-1]))


def reference_legrad(model: VisionTransformer, images: Tensor, target: Tensor) -> Tensor:
    """One graph through all layers, in which a layer's score has its gradient taken for its own weights only."""
    model = double(model)
    total = torch.zeros((), dtype=torch.float64)
    x, turns = model.embed(images.double())
    for block in model.blocks:
        x, weights = block.explain(x, turns)
        score = model.forward_head(model.norm(x)).gather(1, target[:, None]).sum()
        total = total + torch.autograd.grad(score, weights, retain_graph=True)[0].clamp_min(0).mean(1).mean(1)
    return as_map(model, total)


# AttnLRP the long way: relevance goes back operation by operation, by the rules of 2402.05602, without autograd.


def linear_rule(x: Tensor, weight: Tensor, y: Tensor, r: Tensor, gamma: float = GAMMA[F.linear]) -> Tensor:
    """Each part of a sum by itself: of the sum's sign it counts 1 + gamma times; the bias is a part too."""
    parts = x[..., None, :] * weight
    parts = torch.cat([parts, (y - parts.sum(-1))[..., None]], -1)
    parts = torch.where(parts * y[..., None] > 0, (1 + gamma) * parts, parts)
    return (parts / parts.sum(-1, keepdim=True) * r[..., None]).sum(-2)[..., :-1]


def norm_rule(norm: Any, x: Tensor, r: Tensor, y: Tensor | None = None) -> Tensor:
    if isinstance(norm, nn.Identity):
        return r
    size = x.shape[-1]
    centre = torch.eye(size, dtype=x.dtype) - 1 / size
    deviation = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    return x * ((r / (norm(x) if y is None else y) * norm.weight / deviation) @ centre)


def turn_matrices(turns: Tensor | None, tokens: int, size: int) -> Tensor:
    """The rotation of each token as a matrix (N, d, d)."""
    if turns is None:
        return torch.eye(size, dtype=torch.float64).expand(tokens, -1, -1)
    cos, sin = (part[:, 0, : size // 2].diag_embed() for part in turns)
    return torch.cat([torch.cat([cos, -sin], 2), torch.cat([sin, cos], 2)], 1)


def attention_rule(attn: Any, x: Tensor, r: Tensor, turns: Tensor | None) -> Tensor:
    B, N, D = x.shape
    raw = attn.qkv(x).view(B, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    matrices = turn_matrices(turns, N, D // attn.num_heads)
    normed_q, normed_k, v = attn.q_norm(raw[0]), attn.k_norm(raw[1]), raw[2]
    q, k = (torch.einsum("nij,bhnj->bhni", matrices, normed) for normed in (normed_q, normed_k))
    scores = q @ k.transpose(-2, -1) * attn.scale
    weights = scores.softmax(-1)
    mixed = weights @ v
    flat = mixed.transpose(1, 2).reshape(B, N, D)
    r = linear_rule(flat, attn.proj.weight, attn.proj(flat), r).view(B, N, attn.num_heads, -1).transpose(1, 2)
    r_weights = weights * (r / mixed @ v.transpose(-2, -1)) / 2
    r_v = v * (weights.transpose(-2, -1) @ (r / mixed)) / 2
    r_scores = scores * (r_weights - weights * r_weights.sum(-1, keepdim=True))
    # A turn is a linear map: what a number after it has been given goes back by its part in it.
    by_q, by_k = r_scores / scores @ k, (r_scores / scores).transpose(-2, -1) @ q
    by_q, by_k = (torch.einsum("nij,bhni->bhnj", matrices, by) * attn.scale / 2 for by in (by_q, by_k))
    r_q, r_k = norm_rule(attn.q_norm, raw[0], normed_q * by_q), norm_rule(attn.k_norm, raw[1], normed_k * by_k)
    r_qkv = torch.stack([r_q, r_k, r_v]).permute(1, 3, 0, 2, 4).reshape(B, N, 3 * D)
    return linear_rule(x, attn.qkv.weight, attn.qkv(x), r_qkv)


def block_rule(block: Any, x: Tensor, r: Tensor, turns: Tensor | None) -> Tensor:
    normed = block.norm1(x)
    attended = block.attn(normed, turns)
    middle = x + block.ls1(attended)
    normed2 = block.norm2(middle)
    hidden, added = block.mlp.fc1(normed2), block.mlp(normed2)
    out = middle + block.ls2(added)
    # A residual shares by what each branch brings; LayerScale and the non-linearity pass relevance through.
    r_branch = linear_rule(block.mlp.act(hidden), block.mlp.fc2.weight, added, r * block.ls2(added) / out)
    r_branch = linear_rule(normed2, block.mlp.fc1.weight, hidden, r_branch)
    r = r * middle / out + norm_rule(block.norm2, middle, r_branch)
    r_branch = attention_rule(block.attn, normed, r * block.ls1(attended) / middle, turns)
    return r * x / middle + norm_rule(block.norm1, x, r_branch)


def reference_lrp(model: VisionTransformer, images: Tensor, target: Tensor) -> Tensor:
    height, width = model.patch_size
    pixels = reference_pixel_relevance(model, images, target).unfold(1, height, height).unfold(2, width, width)
    return as_map(model, pixels.sum((-1, -2)).flatten(1))


@torch.no_grad()
def reference_token_relevance(model: VisionTransformer, images: Tensor, target: Tensor) -> Tensor:
    """What each number that enters the first block (B, N, D) has brought to the logit; the model is in float64."""
    x, turns = model.embed(images.double())
    inputs = []
    for block in model.blocks:
        inputs.append(x)
        x = block(x, turns)
    normed, first = model.norm(x), model.num_prefix_tokens
    pooled = normed[:, 0] if model.pool == "token" else normed[:, first:].mean(1)
    logits = model.head(model.fc_norm(pooled))
    r = torch.zeros_like(logits).scatter(1, target[:, None], logits.gather(1, target[:, None]))
    r = norm_rule(model.fc_norm, pooled, linear_rule(model.fc_norm(pooled), model.head.weight, logits, r, 0))
    tokens = torch.zeros_like(normed)
    if model.pool == "token":
        tokens[:, 0] = r
    else:
        tokens[:, first:] = normed[:, first:] / (normed.shape[1] - first) * (r / pooled)[:, None]
    r = norm_rule(model.norm, x, tokens)
    for block, x in zip(reversed(model.blocks), reversed(inputs), strict=True):
        r = block_rule(block, x, r, turns)
    return r


def conv_rule(conv: Any, x: Tensor, r: Tensor) -> Tensor:
    windows = dict(kernel_size=conv.kernel_size, stride=conv.stride, padding=conv.padding)
    columns, y = F.unfold(x, **windows).mT, conv(x)
    y, r = (outputs.flatten(2).mT for outputs in (y, r))
    return F.fold(linear_rule(columns, conv.weight.flatten(1), y, r, GAMMA[F.conv2d]).mT, x.shape[2:], **windows)


@torch.no_grad()
def reference_pixel_relevance(model: VisionTransformer, images: Tensor, target: Tensor) -> Tensor:
    """On through the stem: positions and biases keep their part, a non-linearity passes relevance through."""
    model, images = double(model), images.double()
    r = reference_token_relevance(model, images, target)
    patches = model.patch_embed(images)
    tokens = patches.flatten(2).transpose(1, 2)
    first = model.num_prefix_tokens
    prefix = [token for token in (model.cls_token, model.reg_token) if token is not None]
    joined = torch.cat([*(token.expand(len(images), -1, -1) for token in prefix), tokens], 1)
    before = joined + F.pad(model.pos_embed, (0, 0, first - model.num_prefix_positions, 0))
    r = norm_rule(model.norm_pre, before, r)[:, first:]
    r = r * tokens / before[:, first:]
    r = r.transpose(1, 2).reshape(patches.shape)
    if isinstance(model.patch_embed.proj, nn.Conv2d):
        return conv_rule(model.patch_embed.proj, images, r).sum(1)
    inputs, x = [], images
    layers: list[Any] = list(model.patch_embed.proj)  # pyright: ignore[reportArgumentType]
    for layer in layers:
        inputs.append(x)
        x = layer(x)
    for layer, x in zip(reversed(layers), reversed(inputs), strict=True):
        if isinstance(layer, nn.Conv2d):
            r = conv_rule(layer, x, r)
        elif isinstance(layer, nn.LayerNorm):
            r = norm_rule(layer, x.movedim(1, -1), r.movedim(1, -1), y=layer(x).movedim(1, -1)).movedim(-1, 1)
    return r.sum(1)


VARIANTS = [
    pytest.param(dict(act="quick_gelu", pre_norm=True, norm_eps=1e-5, image_size=(8, 12)), id="clip"),
    pytest.param(dict(act="gelu_tanh", prefix_positions=True, num_registers=2, norm_after_pool=True), id="tanh"),
    pytest.param(dict(pool="mean", stem="conv", norm_after_pool=False, init_values=0.5), id="norm-before-mean"),
]

# ---- exactness ----


@pytest.mark.parametrize("rows", [256, 3], ids=["whole", "by_rows"])
@pytest.mark.parametrize("arguments", SHAPES)
def test_rollout_is_the_product_of_full_matrices(arguments, rows, monkeypatch):
    monkeypatch.setattr(module, "ROWS", rows)
    model = build(**arguments)
    images = images_for(model)
    logits, maps = attention_map(model, images)
    torch.testing.assert_close(maps.double(), reference_rollout(model, images, lambda a: a.mean(1)), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits, model(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("arguments", SHAPES)
def test_last_is_the_last_layer(arguments):
    model = build(**arguments)
    images = images_for(model)
    logits, maps = attention_map(model, images, method="last")
    torch.testing.assert_close(maps.double(), reference_last(model, images, lambda a: a.mean(1)), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits, model(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", sorted(CLASS_SPECIFIC))
@pytest.mark.parametrize("arguments", SHAPES + VARIANTS)
def test_class_specific_methods_equal_their_references(arguments, method):
    model = build(qk_norm=arguments.get("num_registers", 0) > 0, **{"image_size": (16, 16), **arguments})
    images, target = images_for(model), torch.tensor([1, 4, 0])
    logits, maps = attention_map(model, images, method=method, target=target)
    reference = {"relevance": reference_relevance, "legrad": reference_legrad, "lrp": reference_lrp}[method]
    torch.testing.assert_close(maps.double(), reference(model, images, target), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, model(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(pool="token", image_size=(8, 20)),
        dict(pool="mean", image_size=(16, 16), stem="conv", num_registers=2, qk_norm=True),
        dict(pool="mean", image_size=(8, 12), pre_norm=True, act="quick_gelu"),
    ],
    ids=["linear", "conv", "norm"],
)
def test_pixel_relevance_equals_its_reference(arguments, monkeypatch):
    model = build(**arguments)
    images, target = images_for(model), torch.tensor([1, 4, 0])
    expected = reference_pixel_relevance(model, images, target)
    logits, found = pixel_relevance(model, images, target=target)
    assert found.shape == (3, *model.image_size)
    torch.testing.assert_close(found.double(), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
    torch.testing.assert_close(logits, model(images), atol=1e-5, rtol=1e-5)
    close: dict[str, Any] = {"atol": 1e-4 * float(expected.abs().max()), "rtol": 1e-3}
    difference = found - pixel_relevance(model, images, target=2)[1]  # of two logits, and so of what made them
    torch.testing.assert_close(pixel_relevance(model, images, target=target, against=2)[1], difference, **close)
    monkeypatch.setattr(module, "MEMORY", 1)  # one image at a time, also where the caller wants no gradients
    with torch.inference_mode():
        torch.testing.assert_close(
            pixel_relevance(model, images.clone(), target=target)[1], found, atol=1e-5, rtol=1e-3
        )


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_lrp_is_the_same_through_the_fused_kernel_and_through_products(pool, monkeypatch):
    model = build(pool=pool, qk_norm=True, image_size=(16, 16))
    images = images_for(model)
    _, fused = pixel_relevance(model, images, target=2)
    monkeypatch.setattr(Attention, "forward", lambda attn, *args: attn.explain(*args)[0])
    _, found = pixel_relevance(model, images, target=2)
    torch.testing.assert_close(found, fused, atol=1e-4 * float(fused.abs().max()), rtol=1e-4)


def test_lrp_refuses_a_model_in_training():
    model = build(image_size=(16, 16)).train()
    for method in METHODS:
        if method == "lrp":
            with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
                attention_map(model, images_for(model), method=method)
        else:
            attention_map(model, images_for(model), method=method)
    assert model.training


def test_lrp_has_gradients_outside_of_the_autocast_that_it_was_computed_in():
    """As on a GPU, where another thread computes them."""
    layer, gradients = nn.Linear(6, 3), []
    for enabled in (False, True):
        x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), AttnLRP():
            y = layer(x)
        gradients += torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(*gradients, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("activation", [F.gelu, F.silu])
def test_lrp_of_a_non_linearity_has_the_gradient_of_a_factor_even_at_zero(activation):
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0], requires_grad=True)
    with AttnLRP():
        y = activation(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    slope = torch.stack([activation(x[0]) / -2, *(torch.tensor(0.5),) * 3, activation(x[4]) / 3])
    torch.testing.assert_close(gradient, slope, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(y, activation(x))


@pytest.mark.parametrize("how", ["max", "min"])
def test_fusion_by_extremes_is_renormalised(how):
    model = build(pool="token", image_size=(8, 20))
    images = images_for(model)

    def fuse(attention: Tensor) -> Tensor:
        fused = getattr(attention, how)(1).values
        return fused / fused.sum(-1, keepdim=True)

    _, maps = attention_map(model, images, fuse=how)
    torch.testing.assert_close(maps.double(), reference_rollout(model, images, fuse), atol=1e-6, rtol=0)
    _, maps = attention_map(model, images, method="last", fuse=how)
    torch.testing.assert_close(maps.double(), reference_last(model, images, fuse), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_discard_is_per_image_by_rows_and_spares_the_class_token(pool, ratio):
    model = build(pool=pool, image_size=(8, 20), num_registers=2)
    images = images_for(model)
    layers = iter(range(1, 4))

    def fuse(attention: Tensor) -> Tensor:
        fused = attention.mean(1)
        tokens = fused.shape[-1]
        read = 1 if pool == "token" and next(layers) == 3 else tokens  # rows of the last layer that matter
        for matrix in fused:  # one image, then one entry at a time, lowest first
            for index in matrix[:read].flatten().argsort()[: int(ratio * read * tokens)].tolist():
                if not (pool == "token" and index % tokens == 0):
                    matrix[index // tokens, index % tokens] = 0
            for i, row in enumerate(matrix):
                if row.sum() == 0:
                    row[i] = 1
                row /= row.sum()
        return fused

    _, maps = attention_map(model, images, discard=ratio)
    torch.testing.assert_close(
        maps.double(), reference_rollout(model, images, lambda a: fuse(a.detach())), atol=1e-6, rtol=0
    )
    layers = iter([3])
    _, maps = attention_map(model, images, method="last", discard=ratio)
    torch.testing.assert_close(
        maps.double(), reference_last(model, images, lambda a: fuse(a.detach())), atol=1e-6, rtol=0
    )


def test_discarding_leaves_a_stochastic_matrix_even_where_a_row_is_emptied():
    attention = torch.tensor([[[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3]]])
    kept = discard_lowest(attention, 0.7)  # six of nine: the last row goes altogether
    expected = torch.tensor([[[1.0, 0, 0], [0, 0, 1.0], [0, 0, 1.0]]])
    torch.testing.assert_close(kept, expected)
    assert discard_lowest(attention, 0.0) is attention


def test_even_attention_has_a_closed_form():
    layers, tokens = 4, 7
    even = torch.full((2, tokens, tokens), 1 / tokens, dtype=torch.float64)
    start = torch.zeros(tokens, dtype=torch.float64)
    start[0] = 1
    row = rollout([even] * layers, start)
    other = (1 - 0.5**layers) / tokens  # the residual keeps half of a half of a ...
    torch.testing.assert_close(row[:, 1:], torch.full((2, tokens - 1), other, dtype=torch.float64))
    torch.testing.assert_close(row.sum(1), torch.ones(2, dtype=torch.float64))


def test_layers_are_applied_in_order():
    move = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    move[0, 0, 1, 2] = move[1, 0, 0, 1] = 1  # layer 1: token 1 takes from 2; layer 2: token 0 takes from 1
    start = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(relevance(list(move), start), torch.tensor([[0.0, 1, 1]], dtype=torch.float64))
    torch.testing.assert_close(relevance(list(move.flip(0)), start), torch.tensor([[0.0, 1, 0]], dtype=torch.float64))


def test_small_relevance_is_not_lost_beside_the_identity():
    attention = torch.rand(1, 50, 50) * 1e-9
    start = torch.full((50,), 1 / 50)
    expected = start.double() @ attention[0].double()
    torch.testing.assert_close(relevance([attention], start)[0].double(), expected, rtol=1e-5, atol=0)


def test_a_start_for_each_image():
    attentions = [torch.rand(2, 4, 4).softmax(-1) for _ in range(3)]
    starts = torch.eye(4)[:2]
    both = rollout(attentions, starts)
    for i in range(2):
        torch.testing.assert_close(both[i], rollout([a[i : i + 1] for a in attentions], starts[i])[0])


# ---- what attention_map promises, for every method ----


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return build(image_size=(8, 20), pool="mean", num_registers=1, stem="conv")


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_shares_and_do_not_depend_on_the_batch(model, method, monkeypatch):
    images = images_for(model, 5)
    logits, maps = attention_map(model, images, method=method)
    assert maps.shape == (5, 2, 5)
    assert maps.dtype == torch.float32
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(5))
    monkeypatch.setattr(module, "MEMORY", 1)  # one image at a time
    alone_logits, alone = attention_map(model, images, method=method)
    torch.testing.assert_close(alone, maps, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(alone_logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "most", "parts"), [(64, 56, [32, 32]), (9, 4, [3, 3, 3]), (5, 4, [3, 2]), (2, 9, [2])]
)
def test_large_batches_are_taken_in_parts_alike(model, monkeypatch, images, most, parts):
    monkeypatch.setattr(module, "_part_size", lambda *_: most)
    taken = list(module._parts(model, images_for(model, images), "rollout", None, None))
    assert [len(part) for part, _ in taken] == parts


@pytest.mark.parametrize("method", ["relevance", "legrad", "lrp"])
@pytest.mark.parametrize("shape", [{}, {"embed_dim": 128, "depth": 6, "num_heads": 4, "patch_size": 4}])
def test_what_is_kept_for_gradients_stays_within_memory_and_makes_use_of_it(method, shape, monkeypatch):
    model = build(image_size=(32, 32), **shape)
    monkeypatch.setattr(module, "MEMORY", 2**24)
    most = module._part_size(model, model.grid_size, method)
    assert len(list(module._parts(model, images_for(model, 2 * most), method, None, None))) == 2
    weights, kept = {p.data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept.update({storage.data_ptr(): storage} if storage.data_ptr() not in weights else {})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention_map(model, images_for(model, most), method=method)
    total = sum(storage.nbytes() for storage in kept.values())
    at_once = total / len(model.blocks) if method == "legrad" else total
    assert module.MEMORY / 4 < at_once < module.MEMORY


@pytest.mark.parametrize("method", METHODS)
def test_gradient_modes_do_not_matter_and_nothing_is_left_behind(model, method):
    images = images_for(model)
    _, expected = attention_map(model, images, method=method)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            logits, maps = attention_map(model, images.clone(), method=method)
        torch.testing.assert_close(maps, expected)
        assert not logits.requires_grad
        assert not maps.requires_grad
    for parameter in model.parameters():
        assert parameter.grad is None
        parameter.requires_grad_(False)
    torch.testing.assert_close(attention_map(model, images, method=method)[1], expected)  # frozen weights
    model.requires_grad_(True)
    assert not images.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_comes_near(model, method):
    images = images_for(model)
    target = 2 if method in CLASS_SPECIFIC else None
    _, maps = attention_map(model, images, method=method, target=target)
    with torch.autocast("cpu", torch.bfloat16):
        _, near = attention_map(model, images, method=method, target=target)
    low = VisionTransformer(**model.architecture).to(torch.bfloat16).eval()
    low.load_state_dict(model.state_dict())
    _, half = attention_map(low, images.bfloat16(), method=method, target=target)
    for other in (near, half):
        assert other.dtype == torch.float32
        torch.testing.assert_close(other.sum((1, 2)), torch.ones(3))
        assert torch.corrcoef(torch.stack([maps.flatten(), other.flatten()]))[0, 1] > 0.95


@pytest.mark.parametrize("how", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
def test_many_tokens_go_by_rows_that_come_to_the_same(model, how, dtype, monkeypatch):
    images, calls = images_for(model), []
    weights = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    low = VisionTransformer(**model.architecture).to(weights).eval()
    low.load_state_dict(model.state_dict())
    by_rows = module._rollout_by_rows
    monkeypatch.setattr(module, "_rollout_by_rows", lambda *given: calls.append(1) or by_rows(*given))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        expected = attention_map(low, images.to(weights), fuse=how)
        assert not calls
        monkeypatch.setattr(module, "ROWS", 4)
        found = attention_map(low, images.to(weights), fuse=how)
    assert calls
    absolute, relative = (1e-6, 1e-5) if dtype == torch.float32 else (0.02, 0.02)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=absolute, rtol=relative)


@pytest.mark.parametrize("method", METHODS)
def test_the_grid_is_that_of_the_images(model, method):
    assert attention_map(model, torch.randn(2, 3, 12, 8), method=method)[1].shape == (2, 3, 2)


@pytest.mark.parametrize("method", sorted(CLASS_SPECIFIC))
def test_targets(model, method):
    images = images_for(model)
    logits, predicted = attention_map(model, images, method=method)
    torch.testing.assert_close(attention_map(model, images, method=method, target=logits.argmax(1))[1], predicted)
    same = attention_map(model, images, method=method, target=3)[1]
    torch.testing.assert_close(attention_map(model, images, method=method, target=[3, 3, 3])[1], same)
    assert not torch.allclose(same, attention_map(model, images, method=method, target=0)[1], atol=1e-3)


@pytest.mark.parametrize("method", sorted(CLASS_SPECIFIC))
def test_contrast_asks_about_the_difference_of_two_logits(model, method, monkeypatch):
    images = images_for(model)
    _, maps = attention_map(model, images, method=method, target=3, against=1)
    # The same question to a model whose only logit is that difference.
    asked = VisionTransformer(**{**model.architecture, "num_classes": 1}).eval()
    state = model.state_dict()
    for name in ("head.weight", "head.bias"):
        state[name] = (state[name][3] - state[name][1])[None]
    asked.load_state_dict(state)
    torch.testing.assert_close(maps, attention_map(asked, images, method=method, target=0)[1], atol=1e-5, rtol=1e-3)
    _, nothing = attention_map(model, images, method=method, target=2, against=2)
    torch.testing.assert_close(nothing, torch.full_like(nothing, 0.1))  # no evidence either way: even
    asked_each: dict[str, Any] = {"target": [3, 2, 0], "against": [1, 0, 4]}
    _, together = attention_map(model, images, method=method, **asked_each)
    monkeypatch.setattr(module, "MEMORY", 1)  # one image at a time
    torch.testing.assert_close(
        attention_map(model, images, method=method, **asked_each)[1], together, atol=1e-5, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(method="magic"), "method 'magic' is not one of rollout, relevance"),
        (dict(target=1), "method rollout is the same for every class"),
        (dict(method="last", against=1), "method last is the same for every class"),
        (dict(method="lrp", fuse="max"), "fuse and discard are for rollout and last"),
        (dict(method="legrad", discard=0.5), "fuse and discard are for rollout and last"),
        (dict(fuse="median"), "fuse 'median' is not one of mean, max, min"),
        (dict(discard=1.0), r"discard must be in \[0, 1\), got 1.0"),
        (dict(method="lrp", target=5), "class 5 is not one of the model's 0 to 4"),
        (dict(method="lrp", target=-1), "class -1 is not one"),
        (dict(method="lrp", target="cat"), "a class is a number from 0 to 4, got 'cat'"),
        (dict(method="lrp", target=1.0), "classes are whole numbers, got torch.float32"),
        (dict(method="lrp", target=[1, 2]), "3 images need one class or 3, got 2"),
    ],
)
def test_what_makes_no_sense_is_refused(model, arguments: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        attention_map(model, images_for(model), **arguments)


@pytest.mark.parametrize("memory", [module.MEMORY, 1], ids=["at once", "one by one"])
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_layer_attention(pool, memory, monkeypatch):
    monkeypatch.setattr(module, "MEMORY", memory)
    model = build(pool=pool, image_size=(8, 20), num_registers=2)
    images = images_for(model)
    logits, heads, patches = layer_attention(model, images)
    _, attentions = attentions_of(model, images)
    stacked = torch.stack(attentions, 1).float()  # (B, L, h, N, N)
    first, grid = model.num_prefix_tokens, model.grid_size
    start = start_of(model, stacked.shape[-1]).float()
    torch.testing.assert_close(heads, (start @ stacked)[..., first:].unflatten(-1, grid), atol=1e-6, rtol=1e-4)
    mean = stacked.mean((1, 2))[:, first:, first:].unflatten(2, grid).unflatten(1, grid)
    torch.testing.assert_close(patches, mean, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(logits, model(images), atol=1e-5, rtol=1e-5)


def test_fused_heads_are_at_least_float32():
    weights = torch.rand(1, 2, 3, 3).softmax(-1)
    assert fuse_heads(weights.bfloat16()).dtype == torch.float32
    assert fuse_heads(weights.double()).dtype == torch.float64


def test_heads_that_have_no_token_in_common_have_nothing_rather_than_no_number():
    assert torch.equal(fuse_heads(torch.eye(2).view(1, 2, 1, 2), "min"), torch.zeros(1, 1, 2))


@pytest.mark.parametrize("method", METHODS)
def test_no_images_give_no_maps(method):
    model = build()
    logits, maps = attention_map(model, images_for(model)[:0], method=method)
    assert (logits.shape, maps.shape) == ((0, model.architecture["num_classes"]), (0, *model.grid_size))


@pytest.mark.parametrize("function", [module.rollout, module.relevance], ids=lambda function: function.__name__)
def test_matrices_are_multiplied_in_full_under_autocast(function):
    torch.manual_seed(0)
    layers = [torch.rand(2, 9, 9).softmax(-1) for _ in range(4)]
    expected = function([layer.double() for layer in layers], torch.full((9,), 1 / 9).double())
    with torch.autocast("cpu", torch.bfloat16):
        found = function(layers, torch.full((9,), 1 / 9))
        fused = fuse_heads(torch.stack(layers, 1))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(fused, sum(layers) / 4, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_maps_and_logits_can_be_trained_with(model, method):
    logits, maps = attention_map(model, images_for(model), method=method)
    weight = torch.ones((), requires_grad=True)  # of something that learns from them, which keeps them for its gradient
    ((weight * maps).sum() + (weight * logits).sum()).backward()
    torch.testing.assert_close(weight.grad, maps.sum() + logits.sum())
