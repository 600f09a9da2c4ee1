"""What leaves the project computes the same elsewhere: in timm, and in ONNX Runtime."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import save_for_hf

from vit import export
from vit.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from vit.model import VisionTransformer
from vit.preprocess import Preprocess
from vit.pretrained import load_pretrained
from vit.rollout import attention_map

CLASSES = ("cat", "dog", "owl", "red fox", "Grüße")
VARIANTS: dict[str, dict[str, Any]] = {
    "token": {},
    "mean, QK-norm, LayerScale": {"pool": "mean", "qk_norm": True, "init_values": 0.1},
    "registers, uneven": {"num_registers": 3, "patch_size": (2, 4), "mlp_ratio": 2.5, "qkv_bias": False},
    "CLIP": {"pre_norm": True, "norm_eps": 1e-5, "act": "quick_gelu"},
    "SigLIP": {"pool": "mean", "norm_after_pool": False, "act": "gelu_tanh"},
    "positions for registers": {"num_registers": 2, "prefix_positions": True},
    "no position for the class token": {"prefix_positions": False},
    "grey": {"in_chans": 1},
    "rope, as DINOv3": {"rope": True, "num_registers": 4, "init_values": 0.1, "norm_eps": 1e-5, "qkv_bias": False},
    "rope, mean": {"rope": True, "pool": "mean", "qk_norm": True, "pre_norm": True},
    "rope, positions": {"rope": True, "num_registers": 1, "prefix_positions": True, "patch_size": (2, 4)},
}
variants = pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS.keys())


def made(**arguments) -> tuple[VisionTransformer, Checkpoint]:
    sizes: dict[str, Any] = dict(image_size=(8, 12), patch_size=2, num_classes=5, embed_dim=32, depth=2, num_heads=4)
    model = VisionTransformer(**{**sizes, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    mean, std = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)) if model.in_chans == 3 else ((0.5,), (0.3,))
    preprocess = Preprocess(image_size=(8, 12), mean=mean, std=std, crop=8 / 9, interpolation="bilinear")
    about = Checkpoint(
        architecture=model.architecture,
        class_names=CLASSES,
        preprocess=preprocess,
        temperature=1.7,
        metrics={"val/acc": 0.5},
        training={"steps": 3},
    )
    return model, about


@variants
def test_round_trip_through_timm_is_bit_equal(tmp_path, arguments):
    """Ours, to a folder, into timm, which writes a folder of its own, and back."""
    model, about = made(**arguments)
    theirs: Any = timm.create_model(
        f"local-dir:{export.export_timm(model, about, tmp_path / 'a')}", pretrained=True
    ).eval()
    images = torch.randn(2, *(model.in_chans, *model.image_size))
    torch.testing.assert_close(theirs(images), model(images), atol=1e-5, rtol=0)
    labels = {"label_names": theirs.pretrained_cfg["label_names"]}
    save_for_hf(theirs, str(tmp_path / "b"), model_config=labels, safe_serialization=True)
    for folder in ("a", "b"):
        again, described = load_pretrained(tmp_path / folder)
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
        assert torch.equal(again(images), model(images))
        assert described.class_names == CLASSES
        assert described.preprocess == about.preprocess
    described = load_pretrained(tmp_path / "a")[1]
    assert (described.temperature, described.metrics, described.training) == (1.7, {"val/acc": 0.5}, {"steps": 3})
    white = replace(about.preprocess, white=4095.0, squash=True)  # timm knows nothing of the first
    export.export_timm(model, replace(about, preprocess=white), tmp_path / "c")
    assert load_pretrained(tmp_path / "c")[1].preprocess == white


def test_timm_gets_what_it_needs_to_classify(tmp_path):
    model, about = made()
    theirs: Any = timm.create_model(f"local-dir:{export.export_timm(model, about, tmp_path)}", pretrained=True)
    config = resolve_model_data_config(theirs)
    assert config["input_size"] == (3, 8, 12)
    assert (tuple(config["mean"]), tuple(config["std"])) == (about.preprocess.mean, about.preprocess.std)
    assert (config["crop_pct"], config["crop_mode"], config["interpolation"]) == (8 / 9, "center", "bilinear")
    assert theirs.pretrained_cfg["label_names"] == list(CLASSES)


@variants
def test_transformers_reads_a_folder_of_timm(tmp_path, arguments):
    auto = pytest.importorskip("transformers").AutoModelForImageClassification
    model, about = made(**arguments)
    theirs: Any = auto.from_pretrained(export.export_timm(model, about, tmp_path)).eval()
    images = torch.randn(2, *(model.in_chans, *model.image_size))
    torch.testing.assert_close(theirs(images).logits, model(images), atol=1e-5, rtol=0)
    assert tuple(theirs.config.id2label.values()) == CLASSES


def test_refuses_what_timm_has_not():
    with pytest.raises(CheckpointError, match="timm has no stem 'conv': use --format onnx"):
        export.to_timm(made(stem="conv")[0])
    with pytest.raises(CheckpointError, match="timm's model with rope has no act 'gelu_tanh': use --format onnx"):
        export.to_timm(made(rope=True, act="gelu_tanh")[0])
    with pytest.raises(CheckpointError, match=r"timm cannot be told norm_eps 0\.001"):
        export.to_timm(made(norm_eps=1e-3)[0])


def test_damaged_part_of_ours_is_named(tmp_path):
    export.export_timm(*made(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for damaged in ({"temperature": -1}, {"metrics": {"val/acc": "high"}}, {"training": []}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"vit": damaged}))
        with pytest.raises(CheckpointError, match="its entry 'vit' is damaged"):
            load_pretrained(tmp_path)


# ONNX -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["token", "mean, QK-norm, LayerScale", "CLIP"])
def exported(request, tmp_path_factory) -> tuple[VisionTransformer, Checkpoint, Path, dict[str, float]]:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    ours_alone: dict[str, Any] = {"stem": "conv", "drop_path_rate": 0.1, "rope": True}  # timm's class lacks these
    model, about = made(**VARIANTS[request.param], **(ours_alone if request.param.startswith("mean") else {}))
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return model, about, path, export.export_onnx(model, about, path)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_onnx_equals_pytorch_for_any_batch(exported, count):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, about, path, differences = exported
    assert max(differences.values()) < 1e-4
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels = torch.randint(256, (count, 3, 8, 12), dtype=torch.uint8)
    logits, probabilities, maps = session.run(["logits", "probabilities", "map"], {"pixels": pixels.numpy()})
    images = about.preprocess.normalize(pixels)
    expected, grids = attention_map(model, images)
    np.testing.assert_allclose(logits, model(images).detach(), atol=1e-4)
    np.testing.assert_allclose(probabilities, (expected / 1.7).softmax(1), atol=1e-4)
    np.testing.assert_allclose(maps, grids, atol=1e-4)
    assert maps.shape == (count, *model.grid_size)


def test_onnx_file_says_what_it_is(exported):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = exported[2]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    described = json.loads(session.get_modelmeta().custom_metadata_map["vit"])
    assert described["class_names"] == list(CLASSES)
    assert described["preprocess"]["crop"] == 8 / 9
    assert [path] == list(path.parent.iterdir())  # weights inside, nothing left over


def test_onnx_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(export, "compare", lambda *_: {"logits": 0.0, "probabilities": 0.0, "map": 0.01})
    with pytest.raises(CheckpointError, match=r"ONNX Runtime's map is 1\.0e-02 from PyTorch's"):
        export.export_onnx(*made(depth=1), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "compare", full)
    with pytest.raises(CheckpointError, match=r"model\.onnx: No space left on device"):
        export.export_onnx(*made(depth=1), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_no_numbers_are_no_agreement():
    """Whichever of the two gives them, and in whichever batch."""

    class Session:
        def run(self, names: list[str], given: dict[str, np.ndarray]) -> list[np.ndarray]:
            with torch.inference_mode():
                found = [output.numpy().copy() for output in explained(torch.tensor(given["pixels"]))]
            found[1][:] = np.nan if len(given["pixels"]) == 1 else found[1]
            return found

    model, about = made(depth=1)
    explained = export.Explained(model, about).eval()
    pixels = torch.randint(256, (2, model.in_chans, *about.preprocess.image_size), dtype=torch.uint8)
    differences = export.compare(Session(), explained, pixels)
    assert differences["logits"] == differences["map"] == 0
    assert np.isnan(differences["probabilities"])
    explained.about = replace(about, temperature=1e-45)
    with pytest.raises(CheckpointError, match="not every value of PyTorch's probabilities is finite"):
        export.compare(Session(), explained, pixels)


def test_weights_that_one_onnx_file_cannot_hold_lie_beside_it(tmp_path, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(export, "LARGE", 1000)
    model, about = made(depth=1)
    checkpoint = save_checkpoint(tmp_path / "model.safetensors", model.state_dict(), about)
    assert export.main([str(checkpoint), "--format", "onnx", "--out", str(tmp_path / "to" / "a.onnx")]) == 0
    assert f"{tmp_path}/to/a.onnx.data: its weights; it needs them beside it" in capsys.readouterr().out
    moved = (tmp_path / "to").rename(tmp_path / "moved")
    assert sorted(file.name for file in moved.iterdir()) == ["a.onnx", "a.onnx.data"]

    def logits() -> Any:
        session = onnxruntime.InferenceSession(moved / "a.onnx", providers=["CPUExecutionProvider"])
        return session.run(["logits"], {"pixels": np.full((1, 3, 8, 12), 99, np.uint8)})[0]

    before = logits()
    images = about.preprocess.normalize(torch.full((1, 3, 8, 12), 99, dtype=torch.uint8))
    np.testing.assert_allclose(before, model(images).detach(), atol=1e-4)
    monkeypatch.setattr(export, "TOLERANCE", -1)  # refused: the old one stays what it was
    with pytest.raises(CheckpointError, match="from PyTorch's"):
        export.export_onnx(*made(depth=1), moved / "a.onnx")
    np.testing.assert_array_equal(logits(), before)


# Command line ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "lr=0.1/model.safetensors"])
def test_command_does_not_overwrite_the_checkpoint(name, tmp_path, capsys):
    model, about = made()
    path = save_checkpoint(tmp_path / name, model.state_dict(), about)
    before = path.read_bytes()
    assert export.main([str(path), "--format", "onnx", "--out", str(path)]) == 2
    assert f"--out {path}: the checkpoint itself; name another file" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_command_writes_beside_the_checkpoint(tmp_path, capsys):
    model, about = made()
    path = save_checkpoint(tmp_path / "model.safetensors", model.state_dict(), about)
    assert export.main([str(path), "--format", "timm"]) == 0
    assert "local-dir:" in capsys.readouterr().out
    assert load_pretrained(tmp_path / "model_timm")[1].class_names == CLASSES
    assert export.main([str(path), "--format", "timm", "--out", str(tmp_path / "model_timm")]) == 0  # once more
    before = path.read_bytes()
    assert export.main([str(path), "--format", "timm", "--out", str(tmp_path)]) == 2
    assert f"{path}: a checkpoint of this project, which would be overwritten" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert export._beside("vit_tiny_patch16_224=sub/w.pth", "timm") == Path("vit_tiny_patch16_224_timm")


def test_an_export_of_a_folder_lies_beside_it(tmp_path, monkeypatch, capsys):
    model, about = made()
    path = save_checkpoint(tmp_path / "model.safetensors", model.state_dict(), about)
    assert export.main([str(path), "--format", "timm"]) == 0
    assert export.main([str(tmp_path / "model_timm"), "--format", "timm"]) == 0
    assert (tmp_path / "model_timm_timm" / "config.json").exists()
    monkeypatch.chdir(tmp_path / "model_timm")
    assert export.main([".", "--format", "onnx", "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path}: a folder; name the file, such as {tmp_path}/model.onnx" in capsys.readouterr().err


def test_command_refuses_in_one_line(tmp_path, capsys):
    assert export.main([str(tmp_path / "none.safetensors"), "--format", "onnx"]) == 2
    model, about = made(stem="conv")
    path = save_checkpoint(tmp_path / "model.safetensors", model.state_dict(), about)
    assert export.main([str(path), "--format", "timm"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("vit.export: ") for line in errors)
