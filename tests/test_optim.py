"""Weight decay where it belongs, each parameter moved once, and the learning rate's way up and down."""

import copy
import math
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm.optim.muon
import torch
from lightning.pytorch.plugins import MixedPrecision
from timm.optim.muon import Muon, zeropower_via_newtonschulz
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.multiprocessing.spawn import spawn

import vit.optim
from vit.model import VisionTransformer
from vit.optim import build_optimizer, learning_rate, parameter_groups

HIDDEN = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight"
WEIGHTS = r"(patch_embed\.proj(\.[036])?|head)\.weight"
REST = r".*\.bias|.*norm\d?\.weight|patch_embed\.proj\.[14]\.weight|.*\.gamma|pos_embed|cls_token|reg_token"
VARIANTS = [
    {"pool": "token", "stem": "linear", "num_registers": 3, "init_values": 0.1},
    {"pool": "mean", "stem": "conv", "qk_norm": True},
    {"pool": "token", "stem": "conv", "qkv_bias": False},
]
RATES = {"lr": 0.01, "muon_lr": 0.05, "weight_decay": 0.2}


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def model(request) -> VisionTransformer:
    """A model of which no parameter is zero, so that decay shows."""
    sizes = {"image_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 5, "embed_dim": 16, "depth": 2}
    model = VisionTransformer(**sizes, num_heads=2, **request.param)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def stepped(model, name: Any, gradient) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each parameter before and after one step with the gradient that a function makes for it."""
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, name=name, **RATES)
    for parameter in model.parameters():
        parameter.grad = gradient(parameter)
    optimizer.step()
    return {key: (before[key], parameter.detach()) for key, parameter in model.named_parameters()}


def test_groups_are_what_their_names_say(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group, pattern in {"hidden": HIDDEN, "weights": WEIGHTS, "rest": REST}.items():
        found = {names[id(parameter)] for parameter in parameter_groups(model)[group]}
        assert found == {name for name in names.values() if re.fullmatch(pattern, name)}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(model, name):
    groups = build_optimizer(model, name=name, **RATES).param_groups
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())


def test_frozen_parameters_are_left_out(model):
    model.head.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    found = {id(parameter) for group in parameter_groups(model).values() for parameter in group}
    assert found == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def share(name: str, key: str) -> float:
    """What one step's weight decay takes off a parameter."""
    if re.fullmatch(REST, key):
        return 0.0
    return RATES["weight_decay"] * RATES["muon_lr" if name == "muon" and re.fullmatch(HIDDEN, key) else "lr"]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_without_a_gradient_only_matrices_shrink(model, name):
    for key, (before, after) in stepped(model, name, torch.zeros_like).items():
        if re.fullmatch(REST, key):
            assert torch.equal(after, before), key
        else:
            assert share(name, key) > 0
            torch.testing.assert_close(after, before * (1 - share(name, key)), rtol=1e-6, atol=0)


def test_muon_turns_hidden_matrices_only(model):
    """Its step is a matrix whose singular values are near 1; Adam's first step has entries of one size."""
    for key, (before, after) in stepped(model, "muon", torch.randn_like).items():
        step = after - before * (1 - share("muon", key))
        if re.fullmatch(HIDDEN, key):
            stretch = torch.linalg.svdvals(step) / RATES["muon_lr"] / max(1, step.shape[0] / step.shape[1]) ** 0.5
            assert stretch.max() < 1.4, key
            assert stretch.median() > 0.6, key
        else:
            size = step.abs().flatten() / RATES["lr"]
            assert size.median() > 0.9, key
            assert size.max() / size.median() < 1.01, key


@pytest.mark.parametrize("bfloat16", [True, False])
def test_muon_is_timms(model, bfloat16, monkeypatch):
    """Several steps, one without a gradient for a block, to the bit, and the same to save and to go on from.

    Where bfloat16 would be emulated, which takes twenty times as long, both multiply in float32, and round otherwise.
    """
    monkeypatch.setattr(vit.optim, "has_bfloat16", lambda device: bfloat16)
    if not bfloat16:
        exact = partial(zeropower_via_newtonschulz, dtype=torch.float32)
        monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", exact)
    rtol, atol = (0, 0) if bfloat16 else (1e-4, 1e-5)
    twin = copy.deepcopy(model)
    ours = build_optimizer(model, name="muon", **RATES)
    theirs = Muon(
        [
            {
                **{key: value for key, value in group.items() if key != "params"},
                "params": [dict(twin.named_parameters())[names[id(parameter)]] for parameter in group["params"]],
            }
            for names in [{id(parameter): name for name, parameter in model.named_parameters()}]
            for group in ours.param_groups
        ]
    )
    for step in range(3):
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        if step == 1:
            for part in (*model.blocks[0].parameters(), *twin.blocks[0].parameters()):
                part.grad = None
        ours.step()
        theirs.step()
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)
    assert {group["betas"] for group in ours.param_groups} == {(0.9, 0.99)}  # as with AdamW
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == other["param_groups"]
    torch.testing.assert_close(mine["state"], other["state"], rtol=0, atol=0)


def shared_out(rank: int, folder: Path) -> None:
    """A process of two that hold a part of each matrix, of which neither the rows nor the parts are even."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    twin = VisionTransformer(image_size=8, patch_size=4, num_classes=3, embed_dim=15, depth=2, num_heads=1)
    model, mesh = copy.deepcopy(twin), init_device_mesh("cpu", (2,))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    ours, theirs = (build_optimizer(m, name="muon", **RATES) for m in (model, twin))
    for _ in range(2):
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = torch.randn_like(other)
            mine.grad = distribute_tensor(other.grad, mesh, [Shard(0)])
        theirs.step()
        with CommDebugMode() as exchanged:
            ours.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.full_tensor(), other)  # type: ignore[attr-defined]
    assert exchanged.get_total_counts() == len({p.shape for p in parameter_groups(twin)["hidden"]}) == 4
    torch.distributed.destroy_process_group()


def test_matrices_that_are_shared_out_are_turned_as_whole_ones(tmp_path):
    spawn(shared_out, (tmp_path,), nprocs=2)


def test_adamw_is_torchs(model):
    torch.manual_seed(1)
    moved = stepped(model, "adamw", torch.randn_like)
    torch.manual_seed(1)
    for key, (before, after) in moved.items():
        single = torch.nn.Parameter(before.clone())
        decay = 0 if re.fullmatch(REST, key) else RATES["weight_decay"]
        reference = torch.optim.AdamW([single], lr=RATES["lr"], weight_decay=decay, betas=(0.9, 0.99))
        single.grad = torch.randn_like(before)
        reference.step()
        torch.testing.assert_close(after, single.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
@pytest.mark.parametrize(("total", "warmup"), [(100, 10), (100, 0), (7, 3), (1, 0), (2, 1)])
def test_learning_rate_rises_in_a_line_and_falls_to_zero(shape, total, warmup):
    factor = learning_rate(total=total, warmup=warmup, shape=shape)
    values = [factor(step) for step in range(total + 3)]
    assert values[: warmup + 1] == pytest.approx([(i + 1) / (warmup + 1) for i in range(warmup + 1)])
    assert max(values) == values[warmup] == 1
    down = values[warmup : total + 1]
    assert all(a > b for a, b in pairwise(down))
    assert values[total:] == [0, 0, 0]


def test_shapes_of_the_way_down():
    cosine, linear = (learning_rate(total=110, warmup=10, shape=shape) for shape in ("cosine", "linear"))
    assert [linear(step) for step in (10, 35, 60, 85)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert [cosine(step) for step in (10, 35, 60, 85)] == pytest.approx(
        [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_closure_is_called_with_gradients_and_its_loss_given(model, name):
    optimizer = build_optimizer(model, name=name, **RATES)
    before = model.head.weight.detach().clone()

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 1, 8, 8)).square().sum()
        loss.backward()
        return loss.detach()

    with torch.no_grad():  # Lightning's loop steps so
        loss = optimizer.step(closure)
    assert loss > 0
    assert not torch.equal(before, model.head.weight)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_lightning_may_clip_gradients_in_mixed_precision(model, name):
    model.head.weight.grad = torch.full_like(model.head.weight, 3.0)
    MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")).clip_gradients(
        build_optimizer(model, name=name, **RATES), 1.0
    )
    assert model.head.weight.grad.norm() <= 1.0001
