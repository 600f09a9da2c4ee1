"""Which parameters are decayed, which optimiser moves them, and how the learning rate runs over the steps."""

import math
from collections.abc import Callable
from typing import Any, Literal

from timm.optim.muon import Muon
from torch import nn
from torch.optim import AdamW, Optimizer

TOKENS = ("pos_embed", "cls_token", "reg_token")


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by role: ``hidden`` matrices of the blocks, other ``weights``, and the ``rest``.

    The rest is what weight decay must not touch: biases, norms, LayerScale, and the embeddings of positions and
    tokens, none of which is a map from one space to another.
    """
    groups: dict[str, list[nn.Parameter]] = {"hidden": [], "weights": [], "rest": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or name.split(".")[-1] in TOKENS:
            groups["rest"].append(parameter)
        else:
            groups["hidden" if ".blocks." in f".{name}" and parameter.ndim == 2 else "weights"].append(parameter)
    return groups


def build_optimizer(
    model: nn.Module, *, name: Literal["adamw", "muon"], lr: float, muon_lr: float, weight_decay: float
) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019, 1711.05101), or Muon on the hidden matrices with AdamW for everything else.

    Args:
        model: The module whose parameters are trained.
        name: ``adamw``, or ``muon`` (Jordan et al. 2024; Liu et al. 2025, 2502.16982), by timm.
        lr: Peak learning rate of AdamW.
        muon_lr: Peak learning rate of Muon; its update has the size sqrt(max(1, rows / columns)) for rate 1.
        weight_decay: Decoupled decay of matrices; a step takes the learning rate times this off them. With Muon it is what
            keeps them small, as its updates do not shrink with the gradient.
    """
    groups = parameter_groups(model)
    decayed: dict[str, Any] = {"params": groups["weights"], "lr": lr, "weight_decay": weight_decay}
    plain: dict[str, Any] = {"params": groups["rest"], "lr": lr, "weight_decay": 0.0}
    if name == "adamw":
        decayed["params"] = groups["hidden"] + groups["weights"]
        fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
        return AdamW([g for g in (decayed, plain) if g["params"]], betas=(0.9, 0.99), fused=fused)
    hidden = {"params": groups["hidden"], "lr": muon_lr, "weight_decay": weight_decay}
    others = [{**group, "use_fallback": True} for group in (decayed, plain)]
    return Muon(
        [g for g in (hidden, *others) if g["params"]], nesterov=True, adjust_lr_fn="original", betas=(0.9, 0.99)
    )


def learning_rate(*, total: int, warmup: int, shape: Literal["cosine", "linear"]) -> Callable[[int], float]:
    """Factor of the peak learning rate at a step: up in a line, then down to 0 at the last step.

    Args:
        total: Optimiser steps of the whole run.
        warmup: Steps until the peak.
        shape: Way down: half a ``cosine`` (1608.03983) or ``linear``.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else 1 - done

    return factor
