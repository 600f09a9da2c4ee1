"""Training that starts from trained weights: what is kept, what is frozen, and how fast each layer may move."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import train
from vit.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vit.classifier import ViTClassifier
from vit.model import VisionTransformer
from vit.optim import build_optimizer
from vit.preprocess import Preprocess

CONFIG = str(Path(__file__).parent.parent / "configs" / "finetune.yaml")
SIZES: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 4,
}
DATA: dict[str, Any] = {"image_size": (8, 8), "class_names": ["a", "b"], "mean": [0.5], "std": [0.25]}


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """A model of 16-pixel colour images in four classes."""
    model = VisionTransformer(**SIZES, pool="mean", stem="conv", drop_path_rate=0.2)
    preprocess = Preprocess(image_size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
    about = Checkpoint(architecture=model.architecture, class_names=tuple("wxyz"), preprocess=preprocess)
    return save_checkpoint(tmp_path / "pretrained.safetensors", model.state_dict(), about)


def test_architecture_is_read_from_the_file(pretrained):
    model = ViTClassifier(**DATA, pretrained=str(pretrained), drop_path_rate=0.1)
    assert model.vit.architecture["embed_dim"] == 32
    assert model.vit.architecture["drop_path_rate"] == 0.1
    assert (model.vit.image_size, model.vit.in_chans, model.vit.num_classes) == ((8, 8), 1, 2)
    block = load_checkpoint(pretrained)[0].blocks[1].state_dict()
    assert all(torch.equal(tensor, block[name]) for name, tensor in model.vit.blocks[1].state_dict().items())


def test_stochastic_depth_is_what_this_training_asks_for(pretrained):
    """... and not what the old one did, or else `--model.drop_path_rate 0` would be ignored without a word."""
    assert load_checkpoint(pretrained)[1].architecture["drop_path_rate"] == 0.2
    asked: dict[str, Any]
    for asked in ({"drop_path_rate": 0.0}, {}):
        model = ViTClassifier(**DATA, pretrained=str(pretrained), **asked)
        assert model.vit.architecture["drop_path_rate"] == 0
        assert isinstance(model.vit.blocks[-1].drop_path, torch.nn.Identity)


def test_what_contradicts_the_file_is_refused(pretrained):
    with pytest.raises(ValueError, match=r"has depth 3; give --model.depth 3 or none, not 5"):
        ViTClassifier(**DATA, pretrained=str(pretrained), depth=5)
    with pytest.raises(
        ValueError, match=r"has stem conv; give --model.stem conv or none, not linear"
    ):  # though a default
        ViTClassifier(**DATA, pretrained=str(pretrained), stem="linear")
    with pytest.raises(ValueError, match=r"layer_decay must be in \(0, 1\], got 0"):
        ViTClassifier(**DATA, pretrained=str(pretrained), layer_decay=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_backbone_leaves_the_head_to_the_optimiser(pretrained, name):
    model = ViTClassifier(**DATA, pretrained=str(pretrained), freeze=True, optimizer=name)
    optimizer = build_optimizer(model.vit, **model.optimizer)
    found = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert found == {id(p) for p in model.vit.head.parameters()}


@pytest.mark.parametrize(("name", "hidden"), [("adamw", 0.01), ("muon", 0.05)])
def test_layers_move_slower_the_lower_they_are(name, hidden):
    model = VisionTransformer(**SIZES, qk_norm=True, init_values=0.1, num_registers=1)
    optimizer = build_optimizer(model, name=name, lr=0.01, muon_lr=0.05, weight_decay=0.1, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {key: rates[id(parameter)] for key, parameter in model.named_parameters()}
    assert len(rates) == len(named)
    assert named["head.weight"] == named["norm.bias"] == 0.01
    assert named["blocks.2.norm1.weight"] == named["blocks.2.ls1.gamma"] == 0.01 / 2
    assert named["blocks.2.attn.qkv.weight"] == hidden / 2
    assert named["blocks.0.mlp.fc1.weight"] == hidden / 8
    for key in ("pos_embed", "cls_token", "reg_token", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert named[key] == 0.01 / 16
    mean = VisionTransformer(**SIZES, pool="mean")  # whose last norm has another name
    groups = build_optimizer(mean, name=name, lr=0.01, muon_lr=0.05, weight_decay=0.1, layer_decay=0.5).param_groups
    assert [g["lr"] for g in groups for p in g["params"] if p is mean.fc_norm.weight] == [0.01]
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim == 2 or p.ndim == 4}


def test_linear_probe_from_the_command_line(pretrained, tmp_path, capsys):
    """One run of train.py, in mixed precision: messages, frozen weights bit-equal in the result, a head that moved."""
    run = tmp_path / "run"
    status = train.main(
        [
            "fit",
            *("--config", CONFIG, "--model.pretrained", str(pretrained), "--model.freeze", "true"),
            *("--data.dataset", "digits", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3"),
            *("--trainer.default_root_dir", str(run), "--trainer.accelerator", "cpu", "--trainer.devices", "1"),
            *("--trainer.enable_progress_bar", "false", "--trainer.precision", "bf16-mixed"),
        ]
    )
    assert status == 0
    messages = capsys.readouterr().err
    assert "patch embedding adapted from 3 to 1 channels" in messages
    assert "position embedding resampled from 4x4 to 2x2 patches" in messages
    assert "head replaced: 4 classes before, 10 now" in messages
    model, about = load_checkpoint(run / "model.safetensors")
    before = load_checkpoint(pretrained)[0]
    assert all(torch.equal(t, before.blocks.state_dict()[name]) for name, t in model.blocks.state_dict().items())
    assert model.head.bias.abs().max() > 0
    assert about.training["pretrained"] == str(pretrained)


def test_much_larger_and_rectangular_images_than_before(tmp_path, capsys):
    """From 28 x 28 to 266 x 518 pixels, as DINOv2's 14-pixel patches are used, with layer decay, from a folder."""
    model = VisionTransformer(**{**SIZES, "image_size": 28, "patch_size": 14, "depth": 1, "num_registers": 2})
    about = Checkpoint(
        architecture=model.architecture,
        class_names=tuple("wxyz"),
        preprocess=Preprocess(image_size=(28, 28), mean=(0.5,) * 3, std=(0.25,) * 3),
    )
    start, run = save_checkpoint(tmp_path / "small.safetensors", model.state_dict(), about), tmp_path / "run"
    for i in range(6):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((600 - 50 * i, 400), 50).convert("RGB").save(path)
    status = train.main(
        [
            *("fit", "--config", CONFIG, "--model.pretrained", str(start), "--data.dataset", str(tmp_path / "images")),
            *("--data.image_size", "[266, 518]", "--data.batch_size", "2", "--data.root", str(tmp_path / "root")),
            *("--data.augment.crop", "0.5", "--data.augment.policy", "1", "--data.augment.cutmix", "0.5"),
            *("--trainer.default_root_dir", str(run), "--trainer.accelerator", "cpu", "--trainer.devices", "1"),
            *("--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1"),
        ]
    )
    errors = capsys.readouterr().err
    assert status == 0, errors
    assert "position embedding resampled from 2x2 to 19x37 patches" in errors
    model, about = load_checkpoint(run / "model.safetensors")
    assert (model.image_size, about.class_names) == ((266, 518), ("a", "b"))


def test_unusable_start_is_one_line(tmp_path, capsys):
    arguments = ["fit", "--config", CONFIG, "--data.dataset", "digits"]
    assert train.main([*arguments, "--model.pretrained", "nonsense", "--trainer.default_root_dir", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nonsense: neither a file or folder nor the name of a timm model" in line
