"""Which parameters are decayed, which optimiser moves them, and how the learning rate runs over the steps."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from timm.optim.muon import _COEFFICIENTS, Muon, get_lr_scale, resolve_ns_coefficients, zeropower_via_newtonschulz
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import AdamW, Optimizer

from vit.device import has_bfloat16

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


def split_by_depth(model: nn.Module, group: dict[str, Any], decay: float) -> list[dict[str, Any]]:
    """A group of parameters as one for each block, whose learning rates fall by a factor a block, head to embedding.

    Args:
        model: The module, with ``blocks``.
        group: Some of its parameters, with ``lr``.
        decay: The factor, in (0, 1] (ELECTRA, Clark et al. 2020, 2003.10555; for ViTs BEiT, 2106.08254).
    """
    blocks = [{id(p) for p in block.parameters()} for block in model.blocks]  # type: ignore[union-attr, arg-type]
    last = {id(p) for name, p in model.named_parameters() if name.split(".")[0] in ("norm", "fc_norm", "head")}
    parts: dict[int, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        below = next((i for i, ids in enumerate(blocks) if id(parameter) in ids), -1)
        height = len(blocks) if id(parameter) in last else below
        parts.setdefault(len(blocks) - height, []).append(parameter)
    return [{**group, "params": parts[n], "lr": group["lr"] * decay**n} for n in sorted(parts)]


class StackedMuon(Muon):
    """timm's Muon with Nesterov momentum, but all matrices of one shape are turned by the same products.

    One by one they are thirty small operations each, for which a GPU is waited for more than it computes. On a CPU with
    bfloat16 the numbers are timm's to the bit; a device that would have to emulate it, which can take twenty times as
    long, multiplies in float32. timm's other options (``scale_eps``, ``safety_factor``, convolutions) are not looked at
    here. Of matrices that are shared out over processes (FSDP) the momentum is too, and each process puts together, and
    turns, all of them: one exchange a shape, where timm's products of what is shared out take sixteen a matrix.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:
            if not group.get("use_fallback"):
                self.turn(group)
        self.param_groups = [group for group in groups if group.get("use_fallback")]  # timm's part
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def turn(self, group: dict[str, Any]) -> None:
        """Move the matrices of a group."""
        foreach: Any = torch  # whose functions for lists of tensors are not declared
        alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike[parameter.shape].append(parameter)
        coefficients = resolve_ns_coefficients(group["ns_coefficients"], _COEFFICIENTS)
        for shape, matrices in alike.items():
            for matrix in matrices:
                if not self.state[matrix]:
                    self.state[matrix] = {"use_muon": True, "momentum_buffer": torch.zeros_like(matrix)}
            momenta = [local(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
            gradients = [local(matrix.grad) for matrix in matrices]  # type: ignore[arg-type]
            foreach._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = together(foreach._foreach_lerp(gradients, momenta, group["momentum"]), matrices[0])  # Nesterov's
            dtype = torch.bfloat16 if has_bfloat16(ahead.device) else torch.float32
            turned = zeropower_via_newtonschulz(ahead, group["ns_steps"], coefficients, eps=group["eps"], dtype=dtype)
            turned = turned.to(matrices[0].dtype, memory_format=torch.contiguous_format)  # else added one by one
            matrices, turned = [local(matrix) for matrix in matrices], own_part(turned, matrices[0])
            foreach._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            scale = group["lr"] * get_lr_scale(shape, group["adjust_lr_fn"])
            foreach._foreach_add_(matrices, turned.unbind(), alpha=-scale)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be shared out (FSDP)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def together(parts: list[Tensor], like: Tensor) -> Tensor:
    """Stack matrices (n, rows, columns), of whose rows each process has those that it has of ``like``."""
    stacked = torch.stack(parts)
    if not isinstance(like, DTensor):
        return stacked
    shape = torch.Size((len(parts), *like.shape))
    stride = (like.numel(), *like.stride())
    return DTensor.from_local(
        stacked, like.device_mesh, [Shard(1)], run_check=False, shape=shape, stride=stride
    ).full_tensor()


def own_part(stacked: Tensor, like: Tensor) -> Tensor:
    """What :func:`together` began with."""
    if not isinstance(like, DTensor):
        return stacked
    whole = DTensor.from_local(stacked, like.device_mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=[Shard(1)]).to_local()


def build_optimizer(
    model: nn.Module,
    *,
    name: Literal["adamw", "muon"],
    lr: float,
    muon_lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019, 1711.05101), or Muon on the hidden matrices with NAdamW for the rest.

    Args:
        model: The module whose parameters are trained.
        name: ``adamw``, or ``muon`` (Jordan et al. 2024; Liu et al. 2025, 2502.16982), by timm.
        lr: Peak learning rate of (N)AdamW.
        muon_lr: Peak learning rate of Muon; its update has the size sqrt(max(1, rows / columns)) for rate 1.
        weight_decay: Decoupled decay of matrices; a step takes the learning rate times this off them. With Muon it is
            what keeps them small, as its updates do not shrink with the gradient.
        layer_decay: Factor of the learning rate from one block to the one before it, in (0, 1]; 1 for none.
    """

    def ready(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        groups = [group for group in groups if group["params"]]
        return groups if layer_decay == 1 else [part for g in groups for part in split_by_depth(model, g, layer_decay)]

    groups = parameter_groups(model)
    decayed: dict[str, Any] = {"params": groups["weights"], "lr": lr, "weight_decay": weight_decay}
    plain: dict[str, Any] = {"params": groups["rest"], "lr": lr, "weight_decay": 0.0}
    if name == "adamw":
        decayed["params"] = groups["hidden"] + groups["weights"]
        fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
        optimizer = AdamW(ready([decayed, plain]), betas=(0.9, 0.99), fused=fused)
        optimizer._step_supports_amp_scaling = False  # else Lightning refuses to clip gradients in mixed precision
        return optimizer
    hidden = {"params": groups["hidden"], "lr": muon_lr, "weight_decay": weight_decay}
    others = [{**group, "use_fallback": True} for group in (decayed, plain)]
    return StackedMuon(ready([hidden, *others]), nesterov=True, adjust_lr_fn="original", betas=(0.9, 0.99))


def learning_rate(*, total: int, warmup: int, shape: Literal["cosine", "linear"]) -> Callable[[int], float]:
    """Factor of the peak learning rate at a step: up in a line, then down, to 0 behind the last step.

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
