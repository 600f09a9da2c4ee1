"""Attention maps: how much each patch counts for what the model says.

The arithmetic is in pure functions of attention weights; ``attention_map`` runs a model and calls them. Only the pooled
row of the products of N x N matrices is ever needed, so a row is propagated from the last layer down: O(L N^2) and
exact, where full matrices cost O(L N^3). Of the last layer's matrix only the rows that are pooled are needed, R of N,
the first: one for a class token, all for mean pooling.

Sources: rollout, Abnar & Zuidema 2020 (2005.00928); relevance, Chefer et al. 2021 (2103.15679); LeGrad, Bousselham et
al. 2024 (2404.03214); AttnLRP, Achtibat et al. 2024 (2402.05602).
Shapes in comments: B images, N tokens, P patches, h heads, L layers, D embed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode

from vit.model import VisionTransformer

MEMORY = 2**29  # bytes of attention weights and of what is kept for gradients; a batch that needs more goes in parts
GPU_MEMORY = 8  # times as much on a GPU, idle with few images; fixed, as the parts show in the last digits of a map
ROWS = 256  # of the attention matrix at a time on a CPU: with six heads and 1,370 tokens the fastest of 64 to 512
GAMMA: dict[Callable, float] = {F.linear: 0.02, F.conv2d: 1.0}  # of lrp; by benchmarks/lrp_gamma.py level with the best
Target = int | Sequence[int] | Tensor  # a class for all images, or one for each


# ---- pure functions ----------------------------------------------------------------------------------------------


def rollout(attentions: Sequence[Tensor], start: Tensor) -> Tensor:
    """Rollout of one row: start Â_L … Â_1 with Â = ½A + ½I, where the identity stands for the residual branch.

    Args:
        attentions: Heads fused, rows summing to 1, (B, N, N) a layer, first layer first; the last may be (B, R, N).
        start: Weight of each of the last layer's rows in what is classified, (R,) or (B, R).
    """
    row = start.to(attentions[-1].dtype).expand(attentions[-1].shape[:2])
    with torch.autocast(row.device.type, enabled=False):  # which would round the products to 16 bits
        for attention in reversed(attentions):
            residual = _widened(row, attention)[:, None]
            row = torch.baddbmm(residual, row[:, None], attention, beta=0.5, alpha=0.5)[:, 0]
    return row  # (B, N)


def relevance(attentions: Sequence[Tensor], start: Tensor) -> Tensor:
    """Relevance of one row: start (R - I) with R = (I + A_L) … (I + A_1), A the positive part of gradient x attention.

    Without the identity, since it is no evidence: with mean pooling it would add a constant to every patch. Only the
    excess over it is propagated, because a difference of near-equal numbers would lose it.

    Args:
        attentions: Mean over heads of (gradient x attention)⁺, (B, N, N) a layer, first layer first; the last may be
            (B, R, N).
        start: Weight of each of the last layer's rows in what is classified, (R,) or (B, R).
    """
    start = start.to(attentions[-1].dtype).expand(attentions[-1].shape[:2])
    excess = torch.zeros_like(start)
    for attention in reversed(attentions):
        excess, start = _widened(excess, attention) + _times(start + excess, attention), _widened(start, attention)
    return excess  # (B, N)


def fuse_heads(weights: Tensor, how: str = "mean") -> Tensor:
    """One matrix (B, R, N) from the heads (B, h, R, N), in at least float32, rows summing to 1.

    Args:
        weights: Attention weights of a layer.
        how: ``mean``, ``max`` or ``min`` over the heads; the last two are renormalised.
    """
    dtype = torch.promote_types(weights.dtype, torch.float32)
    if how == "mean" and weights.dtype == dtype and weights.device.type == "cpu":  # where products are the faster means
        each = weights.new_full(weights.shape[:2], 1 / weights.shape[1])
        return _times(each, weights.flatten(2)).unflatten(1, weights.shape[2:])
    if how == "mean":
        return weights.mean(1, dtype=dtype)
    fused = (weights.amax(1) if how == "max" else weights.amin(1)).to(dtype)
    return fused / fused.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)


def discard_lowest(attention: Tensor, ratio: float, protect: int | None = None) -> Tensor:
    """The matrix of each image without its lowest weights; rows sum to 1 again, an emptied row keeps its own token.

    Args:
        attention: Heads fused, (B, N, N); (B, R, N) for the first R rows.
        ratio: Share of the weights to discard, in [0, 1).
        protect: Token whose column is never discarded: the class token.
    """
    B, R, N = attention.shape
    lowest = int(ratio * R * N)
    if not lowest:
        return attention
    keep = attention > attention.flatten(1).kthvalue(lowest).values.view(B, 1, 1)
    if protect is not None:
        keep[:, :, protect] = True
    kept = attention * keep
    kept = kept + torch.eye(R, N, dtype=kept.dtype, device=kept.device) * (kept.sum(-1, keepdim=True) == 0)
    return kept / kept.sum(-1, keepdim=True)


def _widened(row: Tensor, matrix: Tensor) -> Tensor:
    """The row (B, R) with zeros for the tokens that have no row in the matrix (B, R, N)."""
    return F.pad(row, (0, matrix.shape[2] - matrix.shape[1]))  # (B, N)


def _times(row: Tensor, matrix: Tensor) -> Tensor:
    with torch.autocast(row.device.type, enabled=False):  # which would round the products to 16 bits
        return (row[:, None] @ matrix)[:, 0]  # (B, N)


# ---- methods: a model, images and a question in; logits (B, classes) and a weight for each token (B, N) out ----------


@dataclass(frozen=True)
class Question:
    """What a map is asked: about which classes (B,), and how attention is reduced to a matrix."""

    target: Tensor | None = None
    against: Tensor | None = None
    fuse: str = "mean"
    discard: float = 0.0

    def score(self, logits: Tensor) -> Tensor:
        """Sum over images of the target's logit, the predicted one if none is named, less the one it is against."""
        target = logits.argmax(1) if self.target is None else self.target
        picked = logits.gather(1, target[:, None])
        return (picked if self.against is None else picked - logits.gather(1, self.against[:, None])).sum()

    def matrix(self, model: VisionTransformer, weights: Tensor) -> Tensor:
        """One matrix (B, R, N) from the heads (B, h, R, N); the column of a class token is kept whole."""
        return discard_lowest(fuse_heads(weights, self.fuse), self.discard, 0 if model.pool == "token" else None)


def pooling_weights(model: VisionTransformer, tokens: int) -> Tensor:
    """Weight of each token in what is classified, (tokens,): one-hot on the class token, or even over the patches."""
    start = torch.zeros(tokens, device=model.pos_embed.device)
    start[0 if model.pool == "token" else slice(model.num_prefix_tokens, None)] = 1
    return start / start.sum()


def _fused_rollout(model: VisionTransformer, images: Tensor, ask: Question) -> tuple[Tensor, Tensor]:
    from vit.fused import fused_rollout  # needs Triton

    grid = model.grid_of(images.shape[-2], images.shape[-1])
    return fused_rollout(model, images, pooling_weights(model, grid[0] * grid[1] + model.num_prefix_tokens))


def fusable(model: VisionTransformer, images: Tensor) -> bool:
    """Whether a rollout of heads' means can go through the fused attention kernel: on NVIDIA's GPUs since 2020."""
    head = model.architecture["embed_dim"] // model.architecture["num_heads"]
    if not images.is_cuda or torch.version.cuda is None or find_spec("triton") is None or head not in range(8, 257, 8):
        return False
    if images.dtype == torch.float64 or torch.cuda.get_device_capability(images.device) < (8, 0):
        return False
    from vit.fused import works

    return works(images.device, torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else images.dtype)


@torch.inference_mode()
def _rollout(model: VisionTransformer, images: Tensor, ask: Question) -> tuple[Tensor, Tensor]:
    logits, matrices = model.forward_attention(images, partial(ask.matrix, model))
    return logits, rollout(matrices, pooling_weights(model, matrices[-1].shape[1]))


@torch.inference_mode()
def _rollout_by_rows(model: VisionTransformer, images: Tensor, ask: Question) -> tuple[Tensor, Tensor]:
    # Blocks of rows, whose weights stay in a processor's cache until the heads are fused and the values multiplied.
    (x, turns), matrices = model.embed(images), []
    for i, block in enumerate(model.blocks, 1):
        first = model.num_read if i == len(model.blocks) else None
        q, k, v = (heads.contiguous() for heads in block.attn.heads(block.norm1(x), turns, first))
        attended = torch.empty_like(q, dtype=v.dtype)
        matrix = q.new_empty(len(q), q.shape[2], k.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
        for image in range(len(q)):
            for start in range(0, q.shape[2], ROWS):
                one, rows = slice(image, image + 1), slice(start, start + ROWS)
                weights = block.attn.weights(q[one, :, rows], k[one])
                attended[one, :, rows] = weights.to(v.dtype) @ v[one]
                matrix[one, rows] = fuse_heads(weights, ask.fuse)
        x = block.add(x[:, :first], block.attn.merge(attended))
        matrices.append(matrix)
    return model.forward_head(model.norm(x)), rollout(matrices, pooling_weights(model, matrices[-1].shape[1]))


@torch.inference_mode()
def _last(model: VisionTransformer, images: Tensor, ask: Question) -> tuple[Tensor, Tensor]:
    *blocks, last = model.blocks
    x, turns = model.embed(images)
    for block in blocks:
        x = block(x, turns)
    x, weights = last.explain(x, turns, model.num_read)
    matrix = ask.matrix(model, weights)
    start = pooling_weights(model, x.shape[1]).to(matrix.dtype).expand(x.shape[:2])
    return model.forward_head(model.norm(x)), _times(start, matrix)


@torch.enable_grad()
def _relevance(model: VisionTransformer, images: Tensor, ask: Question) -> tuple[Tensor, Tensor]:
    logits, weights = model.forward_attention(images, lambda weights: weights)
    gradients = torch.autograd.grad(ask.score(logits), weights)
    with torch.no_grad():
        matrices = [fuse_heads((g * w).clamp_min(0)) for g, w in zip(gradients, weights, strict=True)]
        return logits, relevance(matrices, pooling_weights(model, matrices[-1].shape[1]))


@torch.enable_grad()
def _legrad(model: VisionTransformer, images: Tensor, ask: Question) -> tuple[Tensor, Tensor]:
    # Each layer's output goes through the head, and the gradient of that score with respect to the layer's own weights
    # counts; none crosses a block, so the weights of one layer at a time are held.
    with torch.no_grad():
        x, turns = model.embed(images)
        inputs = [x]
        for block in model.blocks:
            inputs.append(block(inputs[-1], turns))
        logits = model.forward_head(model.norm(inputs.pop()))
    if ask.target is None:
        ask = replace(ask, target=logits.argmax(1))
    shape, dtype = inputs[0].shape[:2], torch.promote_types(inputs[0].dtype, torch.float32)
    rows = torch.zeros(shape, dtype=dtype, device=images.device)
    for block, x in zip(model.blocks, inputs, strict=True):
        x, weights = block.explain(x.requires_grad_(), turns)
        (gradient,) = torch.autograd.grad(ask.score(model.forward_head(model.norm(x))), weights)
        rows += gradient.clamp_min(0).mean((1, 2), dtype=dtype)
    return logits, rows


def _lrp(model: VisionTransformer, images: Tensor, ask: Question) -> tuple[Tensor, Tensor]:
    logits, pixels = _pixel_lrp(model, images, ask)
    rows, columns = model.grid_of(images.shape[-2], images.shape[-1])
    patches = pixels.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).sum((2, 4))
    return logits, F.pad(patches.flatten(1), (model.num_prefix_tokens, 0))


@torch.enable_grad()
def _pixel_lrp(model: VisionTransformer, images: Tensor, ask: Question) -> tuple[Tensor, Tensor]:
    """Logits, and the relevance of every pixel (B, H, W), its channels summed."""
    if model.training:  # which leaves branches out, and goes ways that have no rule
        raise ValueError("lrp is of a model that is not in training: call model.eval() before")
    with AttnLRP():
        features = model(images, pre_logits=True)
    logits = model.head(features)  # without the gamma rule: so a contrast of classes is that of their relevance
    (gradient,) = torch.autograd.grad(ask.score(logits), images)
    return logits, (images * gradient).detach().sum(1, dtype=torch.promote_types(images.dtype, torch.float32))


class AttnLRP(TorchFunctionMode):
    """In a forward pass ``with AttnLRP():``, input x gradient is the relevance of AttnLRP: some gradients are others.

    Normalisation: the standard deviation counts as a constant. Element-wise non-linearity: so does its output over its
    input. Product of two activations: half the relevance goes to each. Softmax keeps its gradient, which times the
    input is the paper's Taylor rule. Linear maps: the gamma rule (Montavon et al. 2019; for inputs of both signs Andéol
    et al. 2021), which its authors take for vision transformers: what pulled a sum to its side of 0 counts 1 + gamma
    times as much as what pulled against it.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return LRP_RULES.get(func, func)(*args, **(kwargs or {}))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, _, inverse = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(weight, inverse)  # of the standard deviation
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, inverse = ctx.saved_tensors
        gradient = gradients[0] * weight
        return gradient.sub_(gradient.mean(-1, keepdim=True)).mul_(inverse), None, None, None, None


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        y = activation(x)
        ctx.save_for_backward((y / x).nan_to_num_(0.5))  # 0 / 0: both tend to a half there
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


def _halved(x: Tensor) -> Tensor:
    """The same numbers, and half the gradient."""
    x.register_hook(lambda gradient: gradient / 2)
    return x


def _lrp_activation(activation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, inplace=False, **options: _Activation.apply(x, partial(activation, **options))


def _lrp_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Two products: values get a half, queries and keys a half of the other half.
    return _halved(F.scaled_dot_product_attention(_halved(q), _halved(k), v))


class _Linear(torch.autograd.Function):
    """Sums y of parts, and their gradient by the gamma rule: relevance goes by y + gamma times the parts of y's sign.

    Those add up to (y + sign(y) s) / 2 with s the sum of all parts' sizes, so that two products are all it takes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, linear: Any, turned: Any, gamma: float, options: Any
    ) -> Tensor:
        y = linear(x, weight, bias, *options)
        share = linear(x.abs(), weight.abs(), bias if bias is None else bias.abs(), *options)  # s, and then y / ...
        share.mul_(gamma / 2).add_(y.abs(), alpha=1 + gamma / 2).clamp_min_(torch.finfo(y.dtype).tiny)
        ctx.save_for_backward(weight, torch.div(y, share, out=share), x.sign().to(torch.int8))
        ctx.gamma, ctx.turned = gamma, lambda *given, shape=x.shape: turned(shape, *given, *options)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, share, signs = ctx.saved_tensors
        weight = weight.to(share.dtype)  # which autocast had made of it; a GPU's thread for gradients has none
        through_sizes = ctx.turned(weight.abs(), gradients[0] * share).mul_(signs)
        through_y = ctx.turned(weight, share.abs().mul_(gradients[0])).mul_(1 + ctx.gamma / 2)
        return through_y.add_(through_sizes, alpha=ctx.gamma / 2), *(None,) * 6


def _lrp_linear(linear: Callable[..., Tensor], turned: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The rule of a linear map, whose transpose takes the shape of the inputs, the weight and a gradient."""

    def rule(x: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any) -> Tensor:
        return _Linear.apply(x, weight, bias, linear, turned, GAMMA[linear], options)  # type: ignore[return-value]

    return rule


def _lrp_layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _LayerNorm.apply(x, shape, weight, bias, eps)  # type: ignore[return-value]  # torch 2.11 takes no names here


LRP_RULES: dict[Callable, Callable] = {
    F.linear: _lrp_linear(F.linear, lambda shape, weight, gradient: gradient @ weight),
    F.conv2d: _lrp_linear(F.conv2d, conv2d_input),
    F.layer_norm: _lrp_layer_norm,
    F.gelu: _lrp_activation(F.gelu),
    F.silu: _lrp_activation(F.silu),
    F.scaled_dot_product_attention: _lrp_attention,
    torch.baddbmm: lambda *args, **options: _halved(torch.baddbmm(*args, **options)),
    Tensor.matmul: lambda a, b: _halved(a @ b),  # what a @ b arrives as
}

METHODS: dict[str, Callable[[VisionTransformer, Tensor, Question], tuple[Tensor, Tensor]]] = {
    "rollout": _rollout,
    "relevance": _relevance,
    "last": _last,
    "legrad": _legrad,
    "lrp": _lrp,
}
CLASS_SPECIFIC = frozenset(("relevance", "legrad", "lrp"))  # the others look the same whatever class is asked about
CLASS_METHOD = "lrp"  # the default where a class is asked about: the truest by benchmarks/faithfulness.py
FUSIONS = ("mean", "max", "min")


# ---- the one entrance ----------------------------------------------------------------------------------------------


def attention_map(
    model: VisionTransformer,
    images: Tensor,
    *,
    method: str = "rollout",
    target: Target | None = None,
    against: Target | None = None,
    fuse: str = "mean",
    discard: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Logits (B, classes), and maps (B, grid height, grid width) in float32, non-negative, each summing to 1.

    Args:
        model: In eval mode.
        images: Normalised images (B, in_chans, H, W), on the model's device and of its type.
        method: One of METHODS.
        target: Class the map is about, one for all images or one each; none for the predicted class.
        against: Class to set it against: what speaks for ``target`` rather than for this one.
        fuse: How rollout and last make one matrix of the heads: mean, max or min.
        discard: Share of the lowest attention weights that rollout and last leave out, in [0, 1).

    Raises:
        ValueError: If the method is unknown, has no use for another argument, a class is not one of the model's, or the
            model is in training and the method lrp.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if method in CLASS_SPECIFIC and (fuse != "mean" or discard):
        raise ValueError(f"method {method} weighs heads by gradients: fuse and discard are for rollout and last")
    if method not in CLASS_SPECIFIC and not (target is None and against is None):
        raise ValueError(
            f"method {method} is the same for every class; ask {', '.join(sorted(CLASS_SPECIFIC))} instead"
        )
    if fuse not in FUSIONS:
        raise ValueError(f"fuse {fuse!r} is not one of {', '.join(FUSIONS)}")
    if not 0 <= discard < 1:
        raise ValueError(f"discard must be in [0, 1), got {discard}")
    grid = model.grid_of(images.shape[-2], images.shape[-1])
    way, function = method, METHODS[method]
    if method == "rollout" and not discard:
        if fuse == "mean" and fusable(model, images):
            way, function = "fused", _fused_rollout
        elif images.device.type == "cpu" and grid[0] * grid[1] > ROWS:
            way, function = "by rows", _rollout_by_rows
    logits, maps = [], []
    with torch.inference_mode(False):  # class-specific methods need gradients, whatever the caller has switched off
        for part, ask in _parts(model, images, way, target, against, fuse=fuse, discard=discard):
            part_logits, rows = function(model, part, ask)
            logits.append(part_logits.detach())
            maps.append(_normalized(rows.detach()[:, model.num_prefix_tokens :]).unflatten(1, grid))
    return torch.cat(logits), torch.cat(maps)


def pixel_relevance(
    model: VisionTransformer, images: Tensor, *, target: Target | None = None, against: Target | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (B, classes), and AttnLRP's relevance of every pixel (B, H, W) in float32; its maps are sums of these.

    Positive where a pixel speaks for the class, negative where against it, in units of the logit; what biases and
    positions contribute belongs to no pixel. A pixel of the mean colour says nothing, since it enters as 0.

    Args:
        model: In eval mode.
        images: Normalised images (B, in_chans, H, W), on the model's device and of its type.
        target: Class asked about, one for all images or one each; none for the predicted class.
        against: Class to set it against.

    Raises:
        ValueError: If a class is not one of the model's, or the model is in training.
    """
    logits, maps = [], []
    with torch.inference_mode(False):
        for part, ask in _parts(model, images, "lrp", target, against):
            part_logits, pixels = _pixel_lrp(model, part, ask)
            logits.append(part_logits.detach())
            maps.append(pixels.float())
    return torch.cat(logits), torch.cat(maps)


def _parts(
    model: VisionTransformer, images: Tensor, way: str, target: Target | None, against: Target | None, **reduce: Any
) -> Iterator[tuple[Tensor, Question]]:
    """The images in parts of which what is held stays within MEMORY, each with the question about it."""
    classes = [_classes(value, model, images) for value in (target, against)]
    most = _part_size(model, model.grid_of(images.shape[-2], images.shape[-1]), way)
    parts = -(-len(images) // most) or 1
    size = -(-len(images) // parts) or 1  # parts alike: a small last one would take more for each image
    for i in range(0, len(images) or 1, size):  # no images are a part too
        part = images[i : i + size].detach()
        if way in CLASS_SPECIFIC:
            part = part.clone().requires_grad_()
        about, other = (c if c is None else c[i : i + size] for c in classes)
        yield part, Question(target=about, against=other, **reduce)


def _classes(value: Target | None, model: VisionTransformer, images: Tensor) -> Tensor | None:
    if value is None:
        return None
    try:
        classes = torch.as_tensor(value, device=images.device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"a class is a number from 0 to {model.num_classes - 1}, got {value!r}") from None
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise ValueError(f"classes are whole numbers, got {classes.dtype}")
    if classes.shape not in ((), (len(images),)):
        raise ValueError(f"{len(images)} images need one class or {len(images)}, got {classes.numel()}")
    for c in classes.flatten().tolist():
        if not 0 <= c < model.num_classes:
            raise ValueError(f"class {c} is not one of the model's 0 to {model.num_classes - 1}")
    return classes.long().expand(len(images))


def _part_size(model: VisionTransformer, grid: tuple[int, int], way: str) -> int:
    """Images to take at a time, so that what is held of them stays within MEMORY, or GPU_MEMORY times that.

    Args:
        model: The model.
        grid: Rows and columns of patches.
        way: A method, ``layers`` for ``layer_attention``, or for rollout ``fused``, through the fused kernel, and ``by
            rows``, in blocks of them.
    """
    heads, depth, width = model.architecture["num_heads"], len(model.blocks), model.architecture["embed_dim"]
    tokens = grid[0] * grid[1] + model.num_prefix_tokens
    # Numbers held of a token. Rows of matrices: scores and weights of the heads of a block; with gradients those of
    # every block, and some 16 vectors of each with the usual MLP: queries, keys, values before and after their norms,
    # what is attended to, what the MLP holds. lrp runs through the fused kernel and keeps 18, what its rules need, and
    # of a convolutional stem three numbers for each channel of each pixel.
    stem = 3 * (width // 4) * math.prod(model.patch_size) if model.architecture["stem"] == "conv" else 0
    held = {
        "relevance": depth * (4 * heads * tokens + 16 * width),
        "legrad": 4 * heads * tokens + (16 + depth) * width,
        "lrp": 18 * depth * width + stem,
        "fused": 3 * depth * width,
        "by rows": 8 * width,
    }
    matrices = 0 if way == "fused" else depth * tokens
    memory = MEMORY * GPU_MEMORY if model.pos_embed.is_cuda else MEMORY
    return max(1, memory // (4 * tokens * (held.get(way, 4 * heads * tokens) + matrices)))


def _normalized(rows: Tensor) -> Tensor:
    """Positive part, summing to 1; even where nothing is positive. What is no number stays none."""
    rows = rows.float().clamp_min(0)
    total = rows.sum(1, keepdim=True)
    return torch.where(total == 0, 1 / rows.shape[1], rows / total)


@torch.no_grad()
def layer_attention(model: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, classes), and attention as it is, unmixed, for people to browse.

    Also returned: what the pooled token attends to in every layer and head, (B, L, h, grid height, grid width), and
    what each patch attends to, mean over layers and heads, (B, grid height, grid width, grid height, grid width). The
    prefix tokens are left out, so that neither need sum to 1.

    Args:
        model: In eval mode.
        images: Normalised images (B, in_chans, H, W), on the model's device and of its type.
    """
    found = [_layer_attention(model, part) for part, _ in _parts(model, images, "layers", None, None)]
    logits, heads, mean = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logits, heads, mean


def _layer_attention(model: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grid = model.grid_of(images.shape[-2], images.shape[-1])
    patches = slice(model.num_prefix_tokens, None)
    x, turns = model.embed(images)
    heads, total = [], torch.zeros((), device=images.device)
    start = pooling_weights(model, x.shape[1])
    for block in model.blocks:
        x, weights = block.explain(x, turns)
        heads.append((start.to(weights.dtype) @ weights)[..., patches].float())  # (B, h, P)
        total = total + fuse_heads(weights)[:, patches, patches]  # (B, P, P)
    mean = (total / len(heads)).unflatten(2, grid).unflatten(1, grid)
    return model.forward_head(model.norm(x)), torch.stack(heads, 1).unflatten(-1, grid), mean
