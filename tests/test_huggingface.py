"""Models of transformers: logits, maps and preprocessing are those of the library itself, and the rest is refused."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vit import Predictor
from vit.checkpoint import CheckpointError
from vit.huggingface import preprocess_of
from vit.pretrained import load_pretrained, start_from
from vit.rollout import attention_map

transformers: Any = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
PATCHES = {"image_size": 32, "patch_size": 8}
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
CONFIGS = {  # of models: class, what its config is made of
    "vit": ("ViT", {}),
    "vit, wide images, without biases": ("ViT", {"image_size": [16, 40], "qkv_bias": False, "hidden_act": "gelu_new"}),
    "deit": ("DeiT", {}),
    "siglip": ("Siglip", {}),
}


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def example(name: str = "vit") -> Any:
    """A model with weights that matter, in eval mode."""
    torch.manual_seed(0)
    kind, more = CONFIGS[name]
    sizes = {**SIZES, **PATCHES, **more}
    sizes = (
        {"vision_config": sizes, "text_config": {"eos_token_id": 1, "bos_token_id": 1}} if kind == "Siglip" else sizes
    )
    config = getattr(transformers, f"{kind}Config")(**sizes, **LABELS)
    model = getattr(transformers, f"{kind}ForImageClassification")._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2).add_(parameter.ndim == 1)
    return model.eval()


def folder(path: Path, model: Any, **processor: Any) -> Path:
    """What transformers itself saves."""
    model.save_pretrained(path)
    height, width = load_size(model)
    shape = {"size": {"height": height, "width": width}, **processor}
    transformers.ViTImageProcessor(**shape).save_pretrained(path)
    return path


def load_size(model: Any) -> tuple[int, int]:
    size = getattr(model.config, "vision_config", model.config).image_size
    return (size, size) if isinstance(size, int) else tuple(size)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name, tmp_path):
    """Logits, and the map by full matrices of the attention that the library gives out."""
    theirs = example(name)
    ours, about = load_pretrained(folder(tmp_path, theirs))
    assert about.class_names == ("cat", "dog", "owl")
    assert about.preprocess.image_size == ours.image_size == load_size(theirs)
    images = torch.randn(2, 3, *ours.image_size, dtype=torch.double)
    found, maps = attention_map(ours.double(), images)
    answer = theirs.double()(images, output_attentions=True)
    assert answer.logits.std() > 0.1
    torch.testing.assert_close(found, answer.logits, rtol=0, atol=1e-6)

    tokens, prefix = answer.attentions[0].shape[-1], ours.num_prefix_tokens
    rows = torch.eye(tokens).double()
    for attention in answer.attentions:  # softmax in float32, whatever the model's type
        rows = (attention.double().mean(1) + torch.eye(tokens)) / 2 @ rows
    row = rows[:, 0] if ours.pool == "token" else rows.mean(1)
    expected = row[:, prefix:] / row[:, prefix:].sum(1, keepdim=True)
    torch.testing.assert_close(maps.flatten(1).double(), expected, rtol=1e-5, atol=1e-7)


def test_a_backbone_gives_its_features(tmp_path):
    theirs = example().vit.eval()
    ours, about = load_pretrained(folder(tmp_path, theirs))
    assert about.class_names == ()
    images = torch.randn(2, 3, 32, 32)
    expected = theirs(images).last_hidden_state[:, 0]
    torch.testing.assert_close(ours(images, pre_logits=True), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (90, 50), (40, 131)])
@pytest.mark.parametrize("resample", [2, 3])
def test_a_photograph_is_classified_as_by_its_pipeline(size, resample, tmp_path):
    """From the file to the scores; all of a long image is seen, as there."""
    path = folder(
        tmp_path / "model", example(), resample=resample, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]
    )
    waves = np.sin(np.linspace(0, 9, size[0]))[None, :, None] * np.cos(np.linspace(0, 7, size[1]))[:, None, None]
    Image.fromarray((127 + 120 * waves * [1, 0.5, -0.7]).astype(np.uint8)).save(tmp_path / "a.png")
    pipeline = transformers.pipeline("image-classification", str(path), device="cpu")
    expected = {answer["label"]: answer["score"] for answer in pipeline(str(tmp_path / "a.png"))}
    predictor = Predictor.from_checkpoint(path, device="cpu")
    found = predictor.predict(tmp_path / "a.png").scores
    assert found == pytest.approx(expected, abs=0.01)  # Pillow and torchvision round apart when they resize
    explanation = predictor.explain(tmp_path / "a.png")
    assert explanation.map.shape == size[::-1]
    assert predictor.predict(tmp_path / "a.png").label == max(expected, key=lambda label: expected[label])


def test_a_timm_model_that_transformers_trained(tmp_path):
    cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0, "crop_mode": "squash", "input_size": [3, 32, 32]}
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2}
    names = {"classifier": "head", "first_conv": "patch_embed.proj"}
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=sizes, pretrained_cfg=cfg | names, **LABELS
    )
    theirs = transformers.TimmWrapperForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, about = load_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images).logits, rtol=0, atol=1e-5)
    assert about.class_names == ("cat", "dog", "owl")
    assert (about.preprocess.std, about.preprocess.squash) == ((0.25,) * 3, True)


def test_old_weights_are_pickles(tmp_path):
    theirs = folder(tmp_path, example())
    expected = load_pretrained(theirs)[0].state_dict()
    torch.save(load_file(theirs / "model.safetensors"), theirs / "pytorch_model.bin")
    (theirs / "model.safetensors").unlink()
    found = load_pretrained(theirs)[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_training_starts_from_it(tmp_path):
    path = folder(tmp_path, example())
    model, notes = start_from(path, image_size=48, class_names=("cat", "owl"), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert model.image_size == (48, 48)
    assert any("head replaced: 3 classes before, 2 now" in note for note in notes)


@pytest.mark.parametrize(
    ("processor", "crop", "squash"),
    [
        ({}, 1, True),
        ({"size": 224}, 1, True),
        ({"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": 224}, 7 / 8, True),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
            7 / 8,
            False,
        ),
        ({"size": {"shortest_edge": 224}}, 1, False),
    ],
)
def test_preprocessing(processor, crop, squash):
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}
    found = preprocess_of(statistics | processor, (224, 224))
    assert (found.crop, found.squash, found.interpolation) == (crop, squash, "bicubic")
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    plain = preprocess_of(statistics | processor | {"do_normalize": False}, (224, 224))
    assert (plain.mean, plain.std) == ((0, 0, 0), (1, 1, 1))


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("config.json", {"architectures": ["BeitForImageClassification"]}, "it is transformers' BeitForImageClass"),
        ("config.json", {"architectures": []}, "it is transformers' vit; read are ViTForImageClassification, "),
        (
            "config.json",
            {"problem_type": "multi_label_classification"},
            "its problem_type is multi_label_classification",
        ),
        ("config.json", {"hidden_act": "relu"}, "not supported, it has activation relu"),
        ("config.json", {"num_hidden_layers": 4}, "weight blocks.3.norm1.weight is missing"),
        ("config.json", {"num_hidden_layers": 2}, "unknown weight blocks.2."),
        (
            "config.json",
            {"id2label": {"0": "cat", "1": "dog"}},
            "weight head.weight has shape (3, 32), expected (2, 32)",
        ),
        ("config.json", {"hidden_size": "wide"}, "cannot be loaded ("),
        ("preprocessor_config.json", {"rescale_factor": 1 / 127.5}, "its preprocessing does not divide pixels by 255"),
        ("preprocessor_config.json", {"do_rescale": False}, "its preprocessing does not divide pixels by 255"),
        ("preprocessor_config.json", {"image_std": [0, 1, 1]}, "std above 0"),
    ],
)
def test_refuses_in_one_line(file, entries, message, tmp_path):
    path = folder(tmp_path, example())
    change(path / file, **entries)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_says_what_is_missing_or_damaged(tmp_path):
    path = folder(tmp_path, example())
    weights = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}  # no views of it
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_pretrained(path)
    save_file(weights | {"classifier.bias": torch.full((3,), torch.nan)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"weight head\.bias has values that are not finite"):
        load_pretrained(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor pytorch_model\.bin"):
        load_pretrained(path)
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json, which says how images get in"):
        load_pretrained(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, whose one repository is a folder; and what was asked of it."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            owner, name, _, revision, file = self.path.strip("/").split("/")
            asked.append(f"{self.command} {owner}/{name}@{revision} {file}")
            path = tmp_path / "repository" / file
            there = (owner, name, revision) == ("someone", "model", "main") and path.is_file()
            body = path.read_bytes() if there else b""
            self.send_response(200 if there else 404)
            for key, value in {
                "X-Repo-Commit": "c" * 40,
                "ETag": f'"{file}"',
                "Content-Length": str(len(body)),
            }.items():
                self.send_header(key, value)
            if not there:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, places = f"http://127.0.0.1:{server.server_port}", "huggingface_hub.constants"
    monkeypatch.setattr(f"{places}.ENDPOINT", address)
    monkeypatch.setattr(f"{places}.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(f"{places}.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield asked
    server.shutdown()
    server.server_close()


def test_reads_from_the_hub(hub, tmp_path):
    path = folder(tmp_path / "repository", example())
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    expected = load_pretrained(path)[0].state_dict()
    for source in ("hf-hub:someone/model", "hf_hub:someone/model@main"):
        ours, about = load_pretrained(source)
        assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in expected.items())
        assert about.training == {"pretrained": source}
    assert len([line for line in hub if line.startswith("GET") and line.endswith("pytorch_model.bin")]) == 1


def test_what_is_refused_is_not_fetched(hub, tmp_path):
    change(folder(tmp_path / "repository", example()) / "config.json", architectures=["Dinov2ForImageClassification"])
    with pytest.raises(CheckpointError, match=r"^hf-hub:someone/model: not supported, it is transformers' Dinov2For"):
        load_pretrained("hf-hub:someone/model")
    assert all(line.endswith(" config.json") for line in hub)
    with pytest.raises(CheckpointError, match=r"^hf-hub:someone/other: cannot be loaded \("):
        load_pretrained("hf-hub:someone/other")
