"""The model against timm's, the long way of attention against the fused one, and what is refused."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3, apply_rot_embed_cat
from timm.models import vision_transformer as timm_vit

from vit.model import Attention, VisionTransformer, rotation, turned

SMALL: dict[str, Any] = dict(image_size=(8, 12), patch_size=2, num_classes=5, embed_dim=32, depth=3, num_heads=4)
VARIANTS: dict[str, dict[str, Any]] = {
    "token": {},
    "mean": {"pool": "mean"},
    "token, registers": {"num_registers": 4},
    "mean, registers": {"pool": "mean", "num_registers": 4},
    "conv stem": {"stem": "conv"},
    "QK-norm, LayerScale": {"qk_norm": True, "init_values": 0.1},
    "no qkv bias, uneven patch": {"qkv_bias": False, "patch_size": (4, 2), "mlp_ratio": 2.5},
    "rotary positions": {"rope": True, "num_registers": 1},
    "everything": {
        **{"pool": "mean", "num_registers": 2, "stem": "conv", "qk_norm": True, "init_values": 0.1, "rope": True},
    },
}


def small(**arguments) -> VisionTransformer:
    """A small model in eval mode whose every parameter matters: tokens, biases and norms are not at 0 and 1."""
    model = VisionTransformer(**{**SMALL, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def images(model: VisionTransformer, count: int = 3) -> torch.Tensor:
    return torch.randn(count, model.in_chans, *model.image_size)


variants = pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS.keys())


# timm is the reference ------------------------------------------------------------------------------------------------


def width(embed_dim: int, num_heads: int, **more) -> dict[str, Any]:
    return dict(image_size=224, patch_size=16, embed_dim=embed_dim, depth=12, num_heads=num_heads) | more


def timm_small(**more) -> timm_vit.VisionTransformer:
    """timm's class with the same sizes as SMALL."""
    sizes: dict[str, Any] = dict(img_size=(8, 12), patch_size=2, num_classes=5, embed_dim=32, depth=3, num_heads=4)
    return timm_vit.VisionTransformer(**sizes | more)


MEAN: dict[str, Any] = dict(class_token=False, global_pool="avg")
TIMM = {
    "vit_tiny_patch16_224": (lambda: timm.create_model("vit_tiny_patch16_224"), width(192, 3)),
    "vit_small_patch16_224": (lambda: timm.create_model("vit_small_patch16_224"), width(384, 6)),
    "vit_base_patch16_224": (lambda: timm.create_model("vit_base_patch16_224"), width(768, 12)),
    "registers, LayerScale": (
        lambda: timm.create_model("vit_small_patch14_reg4_dinov2", img_size=224, num_classes=10),
        width(384, 6, patch_size=14, num_classes=10, num_registers=4, init_values=1e-5),
    ),
    "mean of patches, registers, LayerScale": (
        lambda: timm.create_model("vit_medium_patch16_reg4_gap_256"),
        width(512, 8, image_size=256, pool="mean", num_registers=4, init_values=1e-5),
    ),
    "QK-norm": (lambda: timm_small(qk_norm=True), SMALL | {"qk_norm": True}),
    "QK-norm, mean": (lambda: timm_small(qk_norm=True, **MEAN), SMALL | {"qk_norm": True, "pool": "mean"}),
    "no qkv bias, grey": (lambda: timm_small(qkv_bias=False, in_chans=1), SMALL | {"qkv_bias": False, "in_chans": 1}),
}


@pytest.mark.parametrize(("make", "arguments"), TIMM.values(), ids=TIMM.keys())
def test_equals_timm(make, arguments):
    theirs = make().eval()
    with torch.no_grad():  # timm starts class token, biases and norms at 0 and 1: differences there would not show
        for name, parameter in theirs.named_parameters():
            if parameter.ndim == 1 or name in ("cls_token", "reg_token"):
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    with torch.device("meta"):
        ours = VisionTransformer(**arguments).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)  # and back
    x = images(ours, 2)
    with torch.inference_mode():
        assert ours(x).std() > 1e-3
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)


def test_starts_like_timm():
    """Every weight of a fresh model has the spread of a fresh timm model's."""
    ours, theirs = VisionTransformer(**width(192, 3)), timm.create_model("vit_tiny_patch16_224", weight_init="")
    wanted = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if name not in ("head.weight", "patch_embed.proj.weight", "patch_embed.proj.bias"):
            assert value.std().item() == pytest.approx(wanted[name].std().item(), rel=0.2, abs=1e-5), name


def test_convolutions_start_by_whitening_photographs():
    photograph = torch.tensor(load_sample_images().images[0]).movedim(-1, 0)[None].float()
    photograph = (photograph - photograph.mean((2, 3), keepdim=True)) / photograph.std((2, 3), keepdim=True)

    def told(filters: torch.Tensor) -> float:
        """How many independent numbers the filters' outputs are worth (participation ratio)."""
        shares = torch.linalg.eigvalsh(torch.corrcoef(F.conv2d(photograph, filters).flatten(2)[0]))
        return float(shares.sum() ** 2 / shares.square().sum())

    model = VisionTransformer(image_size=32, patch_size=4, embed_dim=128, depth=1, num_heads=4, stem="conv")
    filters, rest = model.state_dict()["patch_embed.proj.0.weight"].split([27, 5])
    assert told(torch.rand(27, 3, 3, 3) - 0.5) < 4 < 18 < told(filters)
    flat = filters.flatten(1) / filters.flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(flat @ flat.T, torch.eye(27))  # a basis: nothing of the window is lost
    torch.testing.assert_close(rest, -filters[:5])


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (12, 8), (16, 24), (6, 30)])
@pytest.mark.parametrize(("pool", "num_registers"), [("token", 0), ("mean", 0), ("token", 4)])
def test_positions_resampled_like_timm(size, pool, num_registers):
    model = small(pool=pool, num_registers=num_registers)
    grid = (size[0] // 2, size[1] // 2)
    prefix = model.num_prefix_positions
    expected = resample_abs_pos_embed(model.pos_embed, list(grid), [4, 6], num_prefix_tokens=prefix)
    positions = model.positions(grid)
    assert positions.shape == (1, prefix + grid[0] * grid[1], 32)
    torch.testing.assert_close(positions, expected, atol=1e-6, rtol=0)


def test_other_image_size_equals_timm():
    ours, theirs = small(), timm_small(dynamic_img_size=True).eval()
    theirs.load_state_dict(ours.state_dict())
    for size in ((8, 12), (12, 8), (4, 20), (32, 32)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)


# Shapes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_any_number_of_channels_and_each_counts(in_chans, stem):
    model = small(in_chans=in_chans, stem=stem)
    x = images(model, 1)
    logits = model(x)
    assert logits.shape == (1, 5)
    for channel in range(in_chans):
        changed = x.clone()
        changed[:, channel] += 1
        assert (model(changed) - logits).abs().max() > 1e-4


@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("patch", [1, 2, 3, 4, 7, 8, 16, (2, 6), (16, 4)])
def test_grid_has_one_token_a_patch(patch, stem):
    height, width = (patch, patch) if isinstance(patch, int) else patch
    model = small(image_size=(3 * height, 5 * width), patch_size=patch, stem=stem)
    assert model.grid_size == (3, 5)
    assert model.patch_embed(images(model, 1)).shape == (1, 32, 3, 5)
    assert model(images(model)).shape == (3, 5)


@pytest.mark.parametrize("patch", [1, 2, 3, 4, 7, 8, 12, 16, (2, 6)])
def test_cell_is_in_the_middle_of_what_its_token_sees(patch):
    height, width = (patch, patch) if isinstance(patch, int) else patch
    model = small(image_size=(7 * height, 7 * width), patch_size=patch, stem="conv")
    x = images(model, 1).requires_grad_()
    model.patch_embed(x)[0, :, 3, 3].square().sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(0) > 0
    for axis, side in ((1, height), (0, width)):
        places = seen.any(axis).nonzero()[:, 0]
        above, below = 3 * side - places[0], places[-1] - (4 * side - 1)
        assert above == below > 0


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_token_stands_for_its_cell(stem):
    """Other pixels in a patch move its own token most, in rows before columns: the mean of some random models."""
    for row, column in ((0, 0), (1, 4), (3, 5)):
        moved = torch.zeros(4 * 6)
        for _ in range(10):
            model = small(image_size=(16, 24), patch_size=4, stem=stem)
            x = images(model, 8)
            changed = x.clone()
            changed[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = torch.randn(4, 4)
            moved += (model.embed(changed)[0] - model.embed(x)[0])[:, 1:].norm(dim=-1).mean(0)  # after the class token
        assert moved.argmax().item() == row * 6 + column


@variants
def test_images_of_a_batch_do_not_mix(arguments):
    model = small(**arguments)
    x = images(model, 4)
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(8, 8), (3, 5), (1, 4)])
@pytest.mark.parametrize(("size", "prefix"), [(16, 0), (16, 2), (196, 1)])
def test_turns_patches_like_timm(grid, size, prefix):
    turns = rotation(grid, size, prefix=prefix)
    x = torch.randn(2, prefix + grid[0] * grid[1], 3, size, dtype=torch.float64)
    found = turned(x, turns.double())
    theirs = RotaryEmbeddingDinoV3(size, feat_shape=list(grid)).double().get_embed()
    expected = apply_rot_embed_cat(x[:, prefix:].transpose(1, 2), theirs, half=True).transpose(1, 2)
    torch.testing.assert_close(found[:, prefix:], expected, atol=1e-5, rtol=0)  # timm's angles are in float32
    torch.testing.assert_close(found[:, :prefix], x[:, :prefix], atol=0, rtol=0)


def test_turns_are_made_where_the_model_is():
    with torch.device("meta"):  # stands for a GPU, which would wait for numbers from elsewhere
        model = VisionTransformer(**SMALL, rope=True)
    turns = model.turns((2, 3))
    assert turns is not None
    assert turns.is_meta
    assert small().turns((2, 3)) is None


def test_turned_queries_and_keys_meet_by_their_distance_alone():
    """The same two vectors at other places, equally far apart, have the same product."""
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turns = rotation((4, 6), 8, dtype=torch.float64)
    products = turned(q.expand(1, 24, 1, 8), turns)[0, :, 0] @ turned(k.expand(1, 24, 1, 8), turns)[0, :, 0].T
    products = products.view(4, 6, 4, 6)
    for rows, columns in ((1, 0), (0, 2), (2, 3)):
        pairs = torch.stack(
            [products[y, x, y + rows, x + columns] for y in range(4 - rows) for x in range(6 - columns)]
        )
        torch.testing.assert_close(pairs, pairs[:1].expand_as(pairs))
    assert products[0, 0].std() > 0.1


# Attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 65])
def test_weights_times_values_equals_fused_attention(qk_norm, tokens):
    attention = Attention(embed_dim=24, num_heads=3, qkv_bias=True, qk_norm=qk_norm)
    x = 3 * torch.randn(2, tokens, 24)
    q, k, v = attention.heads(x, None)
    output, weights = attention.explain(x, None)
    assert weights.shape == (2, 3, tokens, tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, tokens))
    torch.testing.assert_close(weights @ v, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output, attention(x, None), atol=1e-5, rtol=1e-5)


@variants
def test_forward_attention_equals_forward(arguments):
    model = small(**arguments)
    x = images(model)
    logits, kept = model.forward_attention(x, lambda weights: weights)
    torch.testing.assert_close(logits, model(x), atol=1e-5, rtol=0)
    tokens = model.num_prefix_tokens + model.grid_size[0] * model.grid_size[1]
    rows = 1 if model.pool == "token" else tokens
    assert [weights.shape for weights in kept] == [(3, 4, tokens, tokens)] * 2 + [(3, 4, rows, tokens)]
    tokens, turns = model.embed(x)
    for block in model.blocks:
        tokens = block(tokens, turns)  # the last one whole, too
    torch.testing.assert_close(logits, model.forward_head(model.norm(tokens)), atol=1e-5, rtol=0)


def test_forward_attention_keeps_what_it_is_asked_to_in_order():
    model = small()
    x = images(model)
    with torch.no_grad():
        _, means = model.forward_attention(x, lambda weights: weights.mean(1))
        tokens, turns = model.embed(x)
        for block, mean in zip(model.blocks, means, strict=True):
            torch.testing.assert_close(mean, block.explain(tokens, turns)[1].mean(1)[:, : mean.shape[1]])
            tokens = block(tokens, turns)


def test_logits_depend_on_the_kept_weights():
    model = small()
    logits, kept = model.forward_attention(images(model), lambda weights: weights)
    gradients = torch.autograd.grad(logits[:, 0].sum(), kept)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


# Training -------------------------------------------------------------------------------------------------------------


@variants
def test_gradient_reaches_every_parameter(arguments):
    model = small(**arguments).train()
    F.cross_entropy(model(images(model)), torch.tensor([0, 1, 2])).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]
    # What is added to all keys alike adds the same to all scores of a query: no softmax changes.
    assert [name for name in without if not name.endswith("k_norm.bias")] == []


def gradients(model: VisionTransformer, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    F.cross_entropy(model(x).float(), torch.tensor([0, 1, 2])).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@variants
def test_gradients_with_the_weights_held_are_those_of_fused_attention(arguments, monkeypatch):
    model = small(**arguments).double().train()
    x = images(model).double()
    held = gradients(model, x)
    monkeypatch.setattr("vit.model.Scores", None)
    with pytest.raises(AttributeError, match="apply"):
        model(x)
    monkeypatch.setattr("vit.model.CPU_TRAIN_TOKENS", 0)
    torch.testing.assert_close(held, gradients(model, x), atol=1e-6, rtol=0)


@variants
def test_gradients_in_mixed_precision(arguments):
    model = small(**arguments).train()
    x = images(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(model, x)
    for ours, exact in zip(mixed, gradients(model, x), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() < 0.05 * exact.norm() + 1e-3  # of a whole tensor: one number rounds as it likes


def test_stochastic_depth_drops_whole_branches_in_training_only():
    model = small(drop_path_rate=0.5, depth=2)
    block, x = model.blocks[1], torch.randn(400, 3, 32)
    with torch.no_grad():
        changed = (block.train()(x, None) - x).abs().amax(dim=(1, 2)) > 0  # unless both branches are dropped: 1 - 0.5²
        assert changed.float().mean().item() == pytest.approx(0.75, abs=0.08)
        block.eval()
        torch.testing.assert_close(block(x[:2], None), block(x[:2], None), atol=0, rtol=0)
        assert ((block(x, None) - x).abs().amax(dim=(1, 2)) > 0).all()


def test_a_model_of_stochastic_depth_is_exported_for_any_number_of_images():
    model = small(drop_path_rate=0.5)
    batch = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (images(model),), dynamic_shapes=batch).module()
    five = images(model, 5)
    torch.testing.assert_close(program(five), model(five), atol=1e-6, rtol=0)


def test_stochastic_depth_keeps_the_expectation():
    attention_only = small(drop_path_rate=0.5, depth=2, mlp_ratio=1)
    block, x = attention_only.blocks[1], torch.randn(1, 3, 32)
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
        block.mlp.fc2.bias.zero_()
        expected = block.eval()(x, None)
        mean = block.train()(x.expand(20_000, -1, -1), None).mean(0, keepdim=True)
    torch.testing.assert_close(mean, expected, atol=0.03, rtol=0)


def test_stochastic_depth_grows_linearly():
    rates = [getattr(block.drop_path, "rate", 0.0) for block in small(drop_path_rate=0.3, depth=4).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_can_learn_four_images_by_heart():
    model = VisionTransformer(**SMALL, qk_norm=True, pool="mean")
    x, labels = images(model, 4), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "numbers"),
    [
        ({"image_size": (32,)}, "a size is one number of pixels or two, height and width, got (32,)"),
        ({"image_size": 30, "patch_size": 4}, "image height 30 is not a multiple of patch size 4"),
        ({"image_size": (32, 30), "patch_size": 4}, "image width 30 is not a multiple of patch size 4"),
        ({"image_size": 8, "patch_size": 16}, "image height 8 is not a multiple of patch size 16"),
        ({"image_size": 0, "patch_size": 4}, "image height 0 is not a multiple of patch size 4"),
        ({"embed_dim": 100, "num_heads": 3}, "embed_dim 100 is not a multiple of num_heads 3"),
        ({"embed_dim": 20, "num_heads": 2, "rope": True}, "rope: a head's 10 numbers are not a multiple of 4"),
        ({"depth": 0}, "depth must be a whole number of at least 1, got 0"),
        ({"num_heads": 2.0}, "num_heads must be a whole number of at least 1, got 2.0"),
        ({"num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
        ({"in_chans": -1}, "in_chans must be a whole number of at least 1, got -1"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"num_registers": -1}, "num_registers must be a whole number of at least 0, got -1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio 0.0 times embed_dim 384 is less than one unit"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be in [0, 1), got 1.0"),
        ({"pool": "max"}, "pool must be one of token, mean, got 'max'"),
        ({"stem": "deep"}, "stem must be one of linear, conv, got 'deep'"),
    ],
)
def test_refuses_in_one_line_with_the_numbers(arguments, numbers):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared whole)
        VisionTransformer(**arguments)
    assert str(caught.value) == numbers


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 9, 12), r"image height 9 is not a multiple of patch size 2"),
        ((1, 3, 8, 13), r"image width 13 is not a multiple of patch size 2"),
        ((1, 1, 8, 12), r"expected images \(B, 3, H, W\), got \(1, 1, 8, 12\)"),
        ((3, 8, 12), r"expected images \(B, 3, H, W\), got \(3, 8, 12\)"),
    ],
)
def test_refuses_images_that_do_not_fit(shape, message):
    model = small()
    for run in (model, lambda x: model.forward_attention(x, lambda weights: weights)):
        with pytest.raises(ValueError, match=f"^{message}$"):
            run(torch.randn(shape))


def test_architecture_builds_the_same_model_again():
    model = small(**VARIANTS["everything"])
    again = VisionTransformer(**model.architecture)
    again.load_state_dict(model.state_dict(), strict=True)
    x = images(model)
    torch.testing.assert_close(again.eval()(x), model(x), atol=0, rtol=0)
