"""The vision transformer, in one file and bottom-up: patches, attention, block, model.

Names and state-dict keys are timm's, so weights move between the two with ``load_state_dict(strict=True)`` (not those
of a convolutional stem, which timm has not; those trained with ``rope``, which has no weights of its own, belong to
timm's class Eva, and vit/pretrained.py and vit/export.py translate between the two).
Shapes in comments: B batch, N tokens, D embed, h heads, d = D / h.
Sources: Vaswani et al. 2017 (1706.03762), Dosovitskiy et al. 2020 (2010.11929); registers: Darcet et al. 2023
(2309.16588); QK-norm: Dehghani et al. 2023 (2302.05442); LayerScale: Touvron et al. 2021 (2103.17239); convolutional
stem: Xiao et al. 2021 (2106.14881); rotary positions: Su et al. 2021 (2104.09864), of two axes Heo et al. 2024
(2403.13298).
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6  # timm's, and the original's
# Up to this many tokens the CPU trains faster in bfloat16 with the weights held than with its fused kernel, whose
# backward pass is slow there (1.5 to 1.8 times for 64 tokens, level at 196, slower at 1369); in float32 it never does.
CPU_TRAIN_TOKENS = 512


def pair(value: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """(height, width) from one number or two."""
    if not isinstance(value, int) and not (isinstance(value, tuple | list) and len(value) == 2):
        raise ValueError(f"a size is one number of pixels or two, height and width, got {value!r}")
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def mlp_ratio_of(hidden: int, embed_dim: int) -> float:
    """The mlp_ratio with which an MLP is that wide; rounding may make the quotient a unit too narrow."""
    return next(ratio for ratio in (hidden / embed_dim, (hidden + 0.5) / embed_dim) if int(embed_dim * ratio) == hidden)


def as_they_are(weights: Tensor) -> Tensor:
    """Attention weights for those who want them whole."""
    return weights


class PatchEmbed(nn.Module):
    """Cut an image into patches and map each to a token.

    ``linear`` is one matrix on the pixels of a patch (2010.11929, eq. 1). ``conv`` is three small convolutions, the
    last two with strides that multiply to the patch size: a token still stands for its own cell of the grid, but sees
    a few pixels of its neighbours, which small images need. After three epochs of CIFAR-10 at 16x16 pixels: 0.57 with
    two plain convolutions, 0.63 with three normalised ones; on 8x8 digits a linear map came to 0.71, two convolutions
    to 0.97. A window is a pixel larger on each side than its stride, so that the cell is in the middle of what its
    token sees: with windows of odd size a map would lie up to half a patch beside what it shows. Each pixel is
    normalised by itself, so that nothing else travels between patches. The first convolution starts as ``whitening``.
    """

    def __init__(
        self,
        *,
        patch_size: tuple[int, int],
        in_chans: int,
        embed_dim: int,
        stem: str,
        bias: bool = True,
        norm_eps: float = LAYER_NORM_EPS,
    ):
        super().__init__()
        if stem == "linear":
            self.proj: nn.Module = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)
        else:
            rows, columns = (max(s for s in range(1, p + 1) if p % s == 0 and s * s <= p) for p in patch_size)
            first, second = (rows, columns), (patch_size[0] // rows, patch_size[1] // columns)
            widths = max(1, embed_dim // 4), max(1, embed_dim // 2)
            self.proj = nn.Sequential(
                *(self._conv(in_chans, widths[0], (1, 1)), LayerNorm2d(widths[0], norm_eps), nn.GELU()),
                *(self._conv(widths[0], widths[1], first), LayerNorm2d(widths[1], norm_eps), nn.GELU()),
                self._conv(widths[1], embed_dim, second),
            )

    @staticmethod
    def _conv(inputs: int, outputs: int, stride: tuple[int, int]) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, (stride[0] + 2, stride[1] + 2), stride, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)  # (B, D, grid height, grid width)


def whitening(outputs: int, channels: int, height: int, width: int) -> Tensor:
    """Filters (outputs, channels, height, width) that make of natural images numbers of like size, hardly correlated.

    Neighbouring pixels and colours are nearly alike, and a network first has to learn how they differ; CNNs whose first
    layer begins with the principal components of its data train in half the time (2404.00498, section 3.2). No data are
    needed for that: the discrete cosine transform of channels, rows and columns comes so close to the components that
    on CIFAR-10 the deviations of its first 14 outputs are theirs within a tenth. They fall to about a third with each
    step in frequency, for which the filters make up, low frequencies first; where there are more outputs than filters,
    the rest are their negatives. For images normalised to deviation 1.
    """
    size = (channels, height, width)
    frequencies = sorted(product(*map(range, size)), key=sum)
    filters = torch.empty(outputs, *size)
    for i, into in enumerate(filters):
        frequency = frequencies[i % len(frequencies)]
        waves = (torch.cos(math.pi * k * (torch.arange(n) + 0.5) / n) for k, n in zip(frequency, size, strict=True))
        wave = torch.einsum("c,y,x->cyx", *waves)
        sign, steps = (-1) ** (i // len(frequencies)), min(sum(frequency), 3)  # beyond that there is but noise
        torch.mul(wave, sign * 0.2 * 3**steps / wave.norm(), out=into)
    return filters


def rotation(
    grid: tuple[int, int],
    size: int,
    *,
    prefix: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Cosine and sine (2, prefix + rows * columns, 1, size) of the angles by which a head's numbers are turned.

    Each pair of numbers is turned by an angle that grows with the row of its patch, or with the column (2403.13298,
    section 3.2): a query and a key then meet at an angle that tells how far apart their patches lie. Both axes run from
    -1 to 1, whatever the number of patches, and a whole turn takes from half an axis up to nearly fifty of them, as in
    DINOv3 (2508.10104).

    Args:
        grid: Rows and columns of patches.
        size: Numbers of a head, a multiple of 4.
        prefix: Tokens before the patches, which are not turned.
        dtype: Type of the result.
        device: Where it is made: a GPU would wait for numbers from elsewhere.
    """
    quarter, *places = (torch.arange(n, dtype=dtype, device=device) for n in (size // 4, *grid))
    frequencies = 2 * math.pi * 100 ** (-4 / size * quarter)
    places = ((2 * place + 1) / n - 1 for place, n in zip(places, grid, strict=True))
    rows, columns = torch.meshgrid(*places, indexing="ij")
    angles = torch.cat([axis.reshape(-1, 1) * frequencies for axis in (rows, columns)], 1)  # (patches, size / 2)
    angles = F.pad(angles, (0, 0, prefix, 0)).repeat(1, 2)[:, None]
    return torch.stack([angles.cos(), angles.sin()])


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Queries or keys (B, N, h, d), their two halves taken as pairs, turned by ``rotation`` (2104.09864, eq. 34)."""
    first, second = x.chunk(2, -1)
    return (x * turns[0] + torch.cat([-second, first], -1) * turns[1]).to(x.dtype)


class Scores(torch.autograd.Function):
    """Scaled products of queries (B, R, d) and keys (B, N, d), with the gradient of the keys laid out as they are.

    PyTorch's own is laid out as the transposed keys: what is compiled then gathers it number by number, and training
    takes a seventh longer.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.scale = scale
        return torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        q, k = (x.to(gradient.dtype) for x in ctx.saved_tensors)
        unused = gradient.new_empty(())
        of_q = torch.baddbmm(unused, gradient, k, beta=0, alpha=ctx.scale)
        return of_q, torch.baddbmm(unused, gradient.transpose(1, 2), q, beta=0, alpha=ctx.scale), None


class Attention(nn.Module):
    """Multi-head self-attention: every token asks all tokens and takes the weighted sum of their values.

    softmax(q kᵀ / √d) v, 1706.03762 eq. 1. ``forward`` is the fused kernel and never holds the N x N weights, but
    where training in 16 bits on a CPU is faster with them; ``explain`` computes the same output the long way and gives
    the weights too.
    """

    def __init__(
        self, *, embed_dim: int, num_heads: int, qkv_bias: bool, qk_norm: bool, norm_eps: float = LAYER_NORM_EPS
    ):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (embed_dim // num_heads) ** -0.5
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(embed_dim // num_heads, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(embed_dim // num_heads, norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(embed_dim, embed_dim)

    def heads(self, x: Tensor, turns: Tensor | None, first: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the first tokens, or all, and keys and values of all tokens, for each head.

        Args:
            x: Tokens (B, N, D).
            turns: ``rotation`` of the tokens' positions, by which queries and keys are turned; none for no turn.
            first: How many of the tokens ask, the first; none for all.
        """
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads).unbind(2)  # (B, N, h, d)
        # Heads come forward after the norms, which write anew: a GPU's kernel lays its output out like the queries, and
        # so leaves the heads of a token side by side, where merge needs them.
        q, k = self.q_norm(q[:, :first]), self.k_norm(k)
        if turns is not None:
            q, k = turned(q, turns[:, :first]), turned(k, turns)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, h, first or N, d), (B, h, N, d) twice

    def merge(self, x: Tensor) -> Tensor:
        """Heads side by side again, through the output projection."""
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)

    def forward(self, x: Tensor, turns: Tensor | None, first: int | None = None) -> Tensor:
        """What the first tokens, or all, take from all tokens: (B, first or N, D) from (B, N, D)."""
        q, k, v = self.heads(x, turns, first)
        few = x.device.type == "cpu" and x.shape[1] <= CPU_TRAIN_TOKENS
        fewer_bits = x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        if few and fewer_bits and self.training and torch.is_grad_enabled():
            weights = Scores.apply(q.flatten(0, 1), k.flatten(0, 1), self.scale).softmax(-1)
            return self.merge(weights.unflatten(0, q.shape[:2]).to(v.dtype) @ v)
        return self.merge(F.scaled_dot_product_attention(q, k, v))

    def explain(
        self, x: Tensor, turns: Tensor | None, first: int | None = None, keep: Callable[[Tensor], Tensor] = as_they_are
    ) -> tuple[Tensor, Tensor]:
        """``forward``, and what ``keep`` makes of the weights it is computed from, (B, h, first or N, N).

        A weight is what a token (row) takes from another (column).
        """
        q, k, v = self.heads(x, turns, first)
        weights = self.weights(q, k)
        kept = keep(weights)  # at once: the weights are in the processor's cache
        return self.merge(weights.to(v.dtype) @ v), kept

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """How much each query (B, h, R, d) takes from each key (B, h, N, d): (B, h, R, N), rows sum to 1."""
        # One pass for product and scale. Flat before it is transposed: the product would copy the keys one by one.
        keys = k.flatten(0, 1).transpose(-2, -1)
        scores = torch.baddbmm(q.new_empty(()), q.flatten(0, 1), keys, beta=0, alpha=self.scale)
        return scores.softmax(-1).unflatten(0, q.shape[:2])


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, C, H, W)


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch, small at the start."""

    def __init__(self, size: int, init_values: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((size,), float(init_values)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the GELU of OpenAI's CLIP; by silu, so that the maps' rule for silu holds here too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
}


class Mlp(nn.Module):
    def __init__(self, *, embed_dim: int, hidden: int, act: str):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden)
        self.act = ACTIVATIONS[act]()
        self.fc2 = nn.Linear(hidden, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Leaves a residual branch out for some images of a batch in training (1603.09382).

    torchvision has one, but importing it would cost every prediction a second.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], 1, 1), self.rate)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_norm: bool,
        init_values: float | None,
        drop_path: float,
        act: str,
        norm_eps: float,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, norm_eps)
        self.attn = Attention(
            embed_dim=embed_dim, num_heads=num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm, norm_eps=norm_eps
        )
        self.ls1 = nn.Identity() if init_values is None else LayerScale(embed_dim, init_values)
        self.norm2 = nn.LayerNorm(embed_dim, norm_eps)
        self.mlp = Mlp(embed_dim=embed_dim, hidden=int(embed_dim * mlp_ratio), act=act)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(embed_dim, init_values)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, turns: Tensor | None, first: int | None = None) -> Tensor:
        """The first tokens, or all, after this block: (B, first or N, D) from (B, N, D)."""
        return self.add(x[:, :first], self.attn(self.norm1(x), turns, first))

    def explain(
        self, x: Tensor, turns: Tensor | None, first: int | None = None, keep: Callable[[Tensor], Tensor] = as_they_are
    ) -> tuple[Tensor, Tensor]:
        """``forward``, and what ``keep`` makes of the attention weights (B, h, first or N, N) it came from."""
        attended, kept = self.attn.explain(self.norm1(x), turns, first, keep)
        return self.add(x[:, :first], attended), kept

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        """Tokens (B, N, D) with what attention took for them, and then with what the MLP makes of each."""
        x = x + self.drop_path(self.ls1(attended))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches, position embedding, blocks, pooling, linear head (2010.11929).

    Args:
        image_size: Height and width of the images, in pixels; one number for a square. A multiple of patch_size.
        patch_size: Height and width of a patch, in pixels; one number for a square.
        in_chans: Channels of an image: 1 grey, 3 colour, or any other number.
        num_classes: Number of logits.
        embed_dim: Width D of a token; a multiple of num_heads.
        depth: Number of blocks.
        num_heads: Attention heads in a block.
        mlp_ratio: Hidden width of a block's MLP over embed_dim.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_path_rate: Stochastic depth of the last block in [0, 1), growing linearly from 0 (arXiv:1603.09382).
        pool: What is classified: ``token``, a learned class token, or ``mean`` of the patch tokens.
        stem: How a patch becomes a token: ``linear``, or ``conv`` for three small convolutions.
        qk_norm: Whether queries and keys are normalised before their product; steadier at high learning rates.
        init_values: Start of LayerScale; none for no LayerScale.
        num_registers: Extra learned tokens that belong to no patch; they keep attention maps clean.
        prefix_positions: Whether class token and registers have positions too; none: a class token without registers.
        pre_norm: Whether tokens are normalised before the first block, as in CLIP; the stem then has no bias.
        norm_after_pool: Whether the last norm follows the pooling; none: for a mean, not for a class token.
        act: Non-linearity of the MLP: ``gelu``, its ``gelu_tanh`` approximation (SigLIP) or ``quick_gelu`` (CLIP).
        norm_eps: Added to the variance in every norm.
        rope: Whether queries and keys turn with their patch's row and column, too; embed_dim / num_heads is 4, 8, ...

    Raises:
        ValueError: If sizes do not divide or a number is out of range; both numbers are named.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        pool: Literal["token", "mean"] = "token",
        stem: Literal["linear", "conv"] = "linear",
        qk_norm: bool = False,
        init_values: float | None = None,
        num_registers: int = 0,
        prefix_positions: bool | None = None,
        pre_norm: bool = False,
        norm_after_pool: bool | None = None,
        act: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu",
        norm_eps: float = LAYER_NORM_EPS,
        rope: bool = False,
    ):
        # Everything needed to build this model again; goes into the checkpoint as it is.
        self.architecture: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.image_size, self.patch_size = pair(image_size), pair(patch_size)
        self.in_chans, self.num_classes, self.pool, self.num_registers = in_chans, num_classes, pool, num_registers
        self._check()
        self.grid_size = self.grid_of(*self.image_size)

        self.patch_embed = PatchEmbed(
            patch_size=self.patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            stem=stem,
            bias=not pre_norm,
            norm_eps=norm_eps,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if pool == "token" else None
        self.reg_token = nn.Parameter(torch.zeros(1, num_registers, embed_dim)) if num_registers else None
        if prefix_positions is None:  # what most of timm's models do
            prefix_positions = pool == "token" and not num_registers
        self.num_prefix_positions = self.num_prefix_tokens if prefix_positions else 0
        positions = self.grid_size[0] * self.grid_size[1] + self.num_prefix_positions
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim))
        self.norm_pre = nn.LayerNorm(embed_dim, norm_eps) if pre_norm else nn.Identity()
        self.blocks: Any = nn.ModuleList(  # Any: a type checker cannot see what a ModuleList holds
            Block(
                embed_dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_norm=qk_norm,
                init_values=init_values,
                drop_path=drop_path_rate * i / max(1, depth - 1),
                act=act,
                norm_eps=norm_eps,
            )
            for i in range(depth)
        )
        if norm_after_pool is None:  # timm's places
            norm_after_pool = pool == "mean"
        self.norm = nn.Identity() if norm_after_pool else nn.LayerNorm(embed_dim, norm_eps)
        self.fc_norm = nn.LayerNorm(embed_dim, norm_eps) if norm_after_pool else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes)
        self._init_weights()

    def _check(self) -> None:
        a = self.architecture
        counts = dict.fromkeys(("in_chans", "num_classes", "embed_dim", "depth", "num_heads"), 1)
        for name, least in {**counts, "num_registers": 0}.items():
            if a[name] < least or not isinstance(a[name], int):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {a[name]}")
        if min(self.patch_size) < 1:
            raise ValueError(f"patch_size must be at least 1, got {min(self.patch_size)}")
        if int(a["embed_dim"] * a["mlp_ratio"]) < 1:
            raise ValueError(f"mlp_ratio {a['mlp_ratio']} times embed_dim {a['embed_dim']} is less than one unit")
        if a["embed_dim"] % a["num_heads"]:
            raise ValueError(f"embed_dim {a['embed_dim']} is not a multiple of num_heads {a['num_heads']}")
        if a["rope"] and a["embed_dim"] // a["num_heads"] % 4:
            raise ValueError(f"rope: a head's {a['embed_dim'] // a['num_heads']} numbers are not a multiple of 4")
        if not 0 <= a["drop_path_rate"] < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {a['drop_path_rate']}")
        if not a["norm_eps"] > 0:
            raise ValueError(f"norm_eps must be above 0, got {a['norm_eps']}")
        if a["pre_norm"] and a["stem"] == "conv":
            raise ValueError("pre_norm needs the linear stem: the convolutions of the other one have biases")
        for name, choices in (("pool", ("token", "mean")), ("stem", ("linear", "conv")), ("act", tuple(ACTIVATIONS))):
            if a[name] not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {a[name]!r}")

    def _init_weights(self) -> None:
        if self.pos_embed.is_meta:  # has no values; and torch would import its compiler for normal_: 2 s, 160 MB
            return
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.architecture["stem"] == "conv":
            first = self.patch_embed.proj[0]  # type: ignore[index]
            with torch.no_grad():
                first.weight.copy_(whitening(*first.weight.shape))
                first.bias.zero_()

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token and registers."""
        return (self.pool == "token") + self.num_registers

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of this size; refuses sizes that do not divide."""
        for side, size, patch in (("height", height, self.patch_size[0]), ("width", width, self.patch_size[1])):
            if size < patch or size % patch:
                raise ValueError(f"image {side} {size} is not a multiple of patch size {patch}")
        return height // self.patch_size[0], width // self.patch_size[1]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding for a grid; bicubic where the grid is not the one trained for (as timm does)."""
        if grid == self.grid_size:
            return self.pos_embed
        prefix, patches = self.pos_embed.split(
            [self.num_prefix_positions, self.pos_embed.shape[1] - self.num_prefix_positions], dim=1
        )
        patches = patches.unflatten(1, self.grid_size).permute(0, 3, 1, 2)  # (1, D, rows, columns)
        patches = F.interpolate(patches.float(), grid, mode="bicubic", antialias=True)
        return torch.cat([prefix, patches.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)

    def turns(self, grid: tuple[int, int]) -> Tensor | None:
        """``rotation`` of all tokens for a grid; none without rope."""
        if not self.architecture["rope"]:
            return None
        size = self.architecture["embed_dim"] // self.architecture["num_heads"]
        dtype = torch.promote_types(self.pos_embed.dtype, torch.float32)  # 16 bits have no room for angles
        return rotation(grid, size, prefix=self.num_prefix_tokens, dtype=dtype, device=self.pos_embed.device)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens that enter the first block: class token, registers, then patches row by row; and their ``turns``."""
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"expected images (B, {self.in_chans}, H, W), got {tuple(images.shape)}")
        grid = self.grid_of(images.shape[2], images.shape[3])
        positions, turns = self.positions(grid), self.turns(grid)
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, patches, D)
        B = x.shape[0]
        prefix = [token.expand(B, -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.num_prefix_positions:  # prefix tokens have positions: add after joining
            return self.norm_pre(torch.cat([*prefix, x], dim=1) + positions), turns
        return self.norm_pre(torch.cat([*prefix, x + positions], dim=1)), turns  # (B, N, D)

    @property
    def num_read(self) -> int | None:
        """How many tokens, the first, the head reads; none for all. The last block need not compute the others."""
        return 1 if self.pool == "token" else None

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) from the tokens after the last block and ``norm``, all or those the head reads.

        With ``pre_logits`` what the head makes the logits of, (B, embed_dim).
        """
        pooled = x[:, 0] if self.pool == "token" else x[:, self.num_prefix_tokens :].mean(1)
        pooled = self.fc_norm(pooled)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of normalised images (B, in_chans, H, W); with ``pre_logits`` (B, embed_dim).

        H and W may differ from ``image_size`` if they are multiples of the patch size: the position embedding is
        resampled.
        """
        x, turns = self.embed(images)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, turns)
        return self.forward_head(self.norm(last(x, turns, self.num_read)), pre_logits)

    def forward_attention(self, images: Tensor, keep: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits, and what ``keep`` makes of each block's attention weights (B, h, N, N), first block first.

        Of the last block there are only the rows that the head reads: one for a class token, (B, h, 1, N).
        Blocks are reduced as they go by (heads fused, say), so that at no time more than one block's heads are held.
        The logits come from these very weights: gradients of logits with respect to them are defined.
        """
        (x, turns), kept = self.embed(images), []
        for i, block in enumerate(self.blocks, 1):
            x, of_block = block.explain(x, turns, self.num_read if i == len(self.blocks) else None, keep)
            kept.append(of_block)
        return self.forward_head(self.norm(x)), kept
