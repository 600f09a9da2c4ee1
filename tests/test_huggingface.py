"""Models of transformers: logits, maps and preprocessing are those of the library itself, and the rest is refused."""

import csv
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train
import vit.model
from vit import Predictor
from vit.checkpoint import CheckpointError
from vit.huggingface import ACTIVATIONS
from vit.pretrained import load_pretrained, start_from
from vit.rollout import attention_map

transformers: Any = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
PATCHES = {"image_size": 32, "patch_size": 8}
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
CLASSES = tuple(LABELS["id2label"].values())
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
    height, width = size_of(model)
    shape = {"size": {"height": height, "width": width}, **processor}
    transformers.ViTImageProcessor(**shape).save_pretrained(path)
    return path


def size_of(model: Any) -> tuple[int, int]:
    size = getattr(model.config, "vision_config", model.config).image_size
    return (size, size) if isinstance(size, int) else tuple(size)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name, tmp_path):
    """Logits, and the map by full matrices of the attention that the library gives out."""
    theirs = example(name)
    ours, about = load_pretrained(folder(tmp_path, theirs))
    assert about.class_names == ("cat", "dog", "owl")
    assert about.preprocess.image_size == ours.image_size == size_of(theirs)
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


def picture(path: Path, size: tuple[int, int]) -> Path:
    """A smooth image, so that Pillow and torchvision, which round apart when they resize, give nearly the same."""
    waves = np.sin(np.linspace(0, 9, size[0]))[None, :, None] * np.cos(np.linspace(0, 7, size[1]))[:, None, None]
    Image.fromarray((127 + 120 * waves * [1, 0.5, -0.7]).astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize("size", [(32, 32), (90, 50), (40, 131)])
def test_a_photograph_is_classified_as_by_its_pipeline(size, tmp_path):
    """From the file to the scores; all of a long image is seen, as there."""
    path, file = folder(tmp_path / "model", example()), picture(tmp_path / "a.png", size)
    pipeline = transformers.pipeline("image-classification", str(path), device="cpu")
    expected = {answer["label"]: answer["score"] for answer in pipeline(str(file))}
    predictor = Predictor.from_checkpoint(path, device="cpu")
    assert predictor.predict(file).scores == pytest.approx(expected, abs=0.01)
    assert predictor.predict(file).label == max(expected, key=lambda label: expected[label])
    assert predictor.explain(file).map.shape == size[::-1]


SQUARE, EDGE, CUT = {"height": 40, "width": 40}, {"shortest_edge": 40}, {"crop_size": {"height": 32, "width": 32}}


@pytest.mark.parametrize("size", [(90, 50), (50, 50)])
@pytest.mark.parametrize(
    ("kind", "options", "changed"),
    [
        ("ViT", {"size": {"height": 32, "width": 32}, "resample": 3}, {}),
        ("ViT", {"size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, {}),
        ("ViT", {"size": {"height": 32, "width": 32}, "do_normalize": False}, {"size": 32}),
        ("Siglip", {"size": {"height": 32, "width": 32}}, {}),
        ("DeiT", {"size": SQUARE, **CUT}, {}),
        ("DeiT", {"size": SQUARE, **CUT}, {"size": 40, "do_center_crop": ...}),  # as it does where nothing is said
        ("CLIP", {"size": EDGE, **CUT}, {}),
        ("CLIP", {"size": EDGE, **CUT}, {"size": 40, "crop_size": 32}),  # as version 4 wrote it
        ("Bit", {"size": EDGE, **CUT}, {}),
    ],
)
def test_pixels_are_those_of_its_processor(kind, options, changed, size, tmp_path):
    path, file = folder(tmp_path / "model", example()), picture(tmp_path / "a.png", size)
    getattr(transformers, f"{kind}ImageProcessor")(**options).save_pretrained(path)
    change(path / "preprocessor_config.json", **changed)
    theirs = transformers.AutoImageProcessor.from_pretrained(path)(Image.open(file), return_tensors="pt").pixel_values
    preprocess = load_pretrained(path)[1].preprocess
    found = preprocess.normalize(preprocess.load(file)[None])
    levels = (found - theirs).abs() * 255 * torch.tensor(preprocess.std).view(3, 1, 1)
    assert levels.mean() < 1  # of 255
    assert levels.max() < 8  # where centres are cut out, transformers goes by whole pixels


def wrapper(path: Path, **more: Any) -> Any:
    """A model of timm's that transformers saves."""
    cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0, "crop_mode": "squash", "input_size": [3, 160, 160]}
    names = {"classifier": "head", "first_conv": "patch_embed.proj"}
    given = {"architecture": "test_vit", "pretrained_cfg": cfg | names, **LABELS, **more}
    config = transformers.TimmWrapperConfig(**given)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("more", [{}, {"model_args": {"img_size": 32, "patch_size": 8}}])
def test_a_timm_model_that_transformers_trained(more, tmp_path):
    theirs = wrapper(tmp_path, **more)
    ours, about = load_pretrained(tmp_path)
    images = torch.randn(2, 3, *ours.image_size)
    torch.testing.assert_close(ours(images), theirs(images).logits, rtol=0, atol=1e-5)
    assert about.class_names == ("cat", "dog", "owl")
    assert (about.preprocess.std, about.preprocess.squash) == ((0.25,) * 3, True)


def test_refuses_a_timm_model_in_one_line(tmp_path):
    wrapper(tmp_path, problem_type="multi_label_classification")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: not supported, its problem_type is multi_label"):
        load_pretrained(tmp_path)
    wrapper(tmp_path, id2label={0: "yes"}, label2id={"yes": 0})
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: not supported, it has one class"):
        load_pretrained(tmp_path)
    wrapper(tmp_path, architecture="test_resnet")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: not supported, it has timm's class ResNet"):
        load_pretrained(tmp_path)


def pickled(model: Any, path: Path) -> None:
    """By the names that the model itself has for its weights in version 5."""
    torch.save(model.state_dict(), path / "pytorch_model.bin")


def old_pickled(model: Any, path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")


def in_parts(model: Any, path: Path) -> None:
    model.save_pretrained(path, max_shard_size="20KB")
    assert (path / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("written", [pickled, old_pickled, in_parts])
def test_weights_in_other_files(written, name, tmp_path):
    model = example(name)
    path = folder(tmp_path, model)
    expected = load_pretrained(path)[0].state_dict()
    written(model, path)
    (path / "model.safetensors").unlink(missing_ok=True)
    found = load_pretrained(path)[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_their_names(name):
    x = torch.linspace(-5, 5, 1001)
    expected = transformers.activations.ACT2FN[name](x)
    torch.testing.assert_close(vit.model.ACTIVATIONS[ACTIVATIONS[name]]()(x), expected, rtol=0, atol=1e-6)


def test_of_two_processors_that_of_the_newer_file_counts(tmp_path):
    path = folder(tmp_path, example())
    whole = json.loads((path / "preprocessor_config.json").read_text())
    newer = {"processor_class": "SiglipProcessor", "image_processor": whole | {"image_mean": [0.1, 0.2, 0.3]}}
    (path / "processor_config.json").write_text(json.dumps(newer))
    assert load_pretrained(path)[1].preprocess.mean == (0.1, 0.2, 0.3)
    change(path / "processor_config.json", image_processor=None)  # as version 4 wrote it
    assert load_pretrained(path)[1].preprocess.mean == (0.5, 0.5, 0.5)


def test_an_mlp_may_have_any_width(tmp_path):
    CONFIGS["odd"] = ("ViT", {"hidden_size": 28, "intermediate_size": 61})
    theirs = example("odd")
    del CONFIGS["odd"]
    images = torch.randn(1, 3, 32, 32)
    ours = load_pretrained(folder(tmp_path, theirs))[0]
    torch.testing.assert_close(ours(images), theirs(images).logits, rtol=0, atol=1e-5)


def test_training_starts_from_it(tmp_path):
    path = folder(tmp_path, example())
    model, notes = start_from(path, image_size=48, class_names=("cat", "owl"), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert model.image_size == (48, 48)
    assert any("head replaced: 3 classes before, 2 now" in note for note in notes)
    assert "long images were squashed before, and their middle is cut out now" in notes


def test_images_are_measured_at_its_size(tmp_path):
    """train.py validate names them as predict.py does, whatever size they have themselves."""
    model = example()
    with torch.no_grad():
        model.classifier.bias -= model(0.3 * torch.randn(64, 3, 32, 32)).logits.mean(0)  # or it names one class alone
    path = folder(tmp_path / "model", model, resample=3)
    for i in range(30):
        file = tmp_path / "images" / LABELS["id2label"][i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)).save(file)
    data = [f"--data.dataset={tmp_path / 'images'}", "--data.val_fraction=1", "--trainer.accelerator=cpu"]
    root = [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.enable_progress_bar=false"]
    assert train.main(["validate", *data, f"--model.pretrained={path}", *root]) == 0
    with open(tmp_path / "run" / "validate" / "confusion.csv", newline="") as file:
        found = {row["of the class"]: [int(row[f"named {name}"]) for name in CLASSES] for row in csv.DictReader(file)}
    files = sorted((tmp_path / "images").rglob("*.png"))
    answers: Any = Predictor.from_checkpoint(path, device="cpu").predict_iter(files)
    named = Counter((file.parent.name, answer.label) for file, answer in zip(files, answers, strict=True))
    assert found == {of: [named[of, name] for name in CLASSES] for of in CLASSES}
    assert len({name for _, name in named}) > 1


def change(path: Path, **entries: Any) -> None:
    """Entries of a JSON file; those that become ... are taken out."""
    found = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not ...}))


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("config.json", {"architectures": ["BeitForImageClassification"]}, "it is transformers' BeitForImageClass"),
        ("config.json", {"architectures": [], "model_type": "dinov2"}, "it is transformers' dinov2; read are ViTForIm"),
        ("config.json", {"id2label": {"0": "yes"}}, "not supported, it has one class"),
        (
            "config.json",
            {"id2label": {"0": "cat", "2": "dog", "5": "owl"}},
            "numbers 3 classes [0, 2, 5], not from 0 on",
        ),
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
        ("preprocessor_config.json", {"image_std": None}, "says nothing of image_std"),
        (
            "preprocessor_config.json",
            {"image_processor_type": "LevitImageProcessor"},
            "through LevitImageProcessor; read",
        ),
        (
            "preprocessor_config.json",
            {"do_flip_channel_order": True},
            "its images go through do_flip_channel_order True",
        ),
        (
            "preprocessor_config.json",
            {"do_resize": False},
            "takes images of (32, 32) and its preprocessing has {'do_resize'",
        ),
        ("preprocessor_config.json", {"size": {"longest_edge": 32}}, "its preprocessing has "),
        ("preprocessor_config.json", {"size": {"height": 24, "width": 24}}, "its preprocessing has "),
        (
            "preprocessor_config.json",
            {"size": {"height": 40, "width": 80}, "do_center_crop": True},
            "its preprocessing has ",
        ),
        ("preprocessor_config.json", {"size": 24, "do_center_crop": True, "crop_size": 32}, "its preprocessing has "),
        ("preprocessor_config.json", {"size": 32, "do_center_crop": True, "crop_size": 24}, "its preprocessing has "),
    ],
)
def test_refuses_in_one_line(file, entries, message, tmp_path):
    path = folder(tmp_path, example())
    change(path / file, **entries)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).count(str(path)) == 1
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_that_is_not_named_follows_from_the_type(tmp_path):
    path = folder(tmp_path, example())
    expected = load_pretrained(path)[1]
    change(path / "config.json", architectures=None)
    assert load_pretrained(path)[1] == expected


def test_says_what_to_give_instead(tmp_path):
    output, path = tmp_path / "output", folder(tmp_path / "output" / "checkpoint-20", example())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").touch()
    for given, words in (
        (path / "model.safetensors", f"written by another program?; give {path}"),
        (output, f"a folder without a config.json, not a checkpoint file; give {path}"),
        (adapter, "a folder of an adapter alone (PEFT); merge_and_unload() it into its model"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(words)):
            Predictor.from_checkpoint(given)


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
