"""Every timm name we claim computes the same, the rest is refused with its reason, and weights fit new data."""

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import save_for_hf
from torch import Tensor

from benchmarks.timm_coverage import PAGE, compare, refusal
from vit import Predictor
from vit.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from vit.model import VisionTransformer
from vit.preprocess import Preprocess
from vit.pretrained import _read, from_timm, labels_of, load_pretrained, start_from

ROOT = Path(__file__).parent.parent
COVERAGE = json.loads((ROOT / "benchmarks" / "results" / "timm_coverage.json").read_text())
NAMES = [row["name"] for row in COVERAGE["rows"]]
CLASSES = ("cat", "dog", "owl")
STATISTICS: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


# Coverage -------------------------------------------------------------------------------------------------------------


def narrow(name: str) -> dict[str, Any]:
    """Arguments for timm that keep everything of a model but its size."""
    patch = int(next(iter(re.findall(r"patch(\d+)", name)), 16))
    return {"embed_dim": 64, "num_heads": 4, "img_size": (2 * patch, 3 * patch)}


@pytest.mark.parametrize("name", NAMES)
def test_claimed_model_equals_timm(name):
    """Strict loading, logits and map; benchmarks/timm_coverage.py does it at full width and image size."""
    result = compare(name, **narrow(name))
    assert result["logits_std"] > 0.1
    assert result["logits"] < 1e-4
    assert result["logits_of_map"] < 1e-4
    assert result["map"] < 1e-6


def test_coverage_is_as_wide_as_we_say():
    assert len(NAMES) >= 60
    assert max(row["logits"] for row in COVERAGE["rows"]) < 1e-4
    assert max(row["map"] for row in COVERAGE["rows"]) < 1e-6
    page = (ROOT / PAGE).read_text()
    assert all(f"| {name} |" in page for name in NAMES)
    assert all(name in page for found in COVERAGE["refused"].values() for name in found)


@pytest.mark.parametrize("reason", COVERAGE["refused"])
def test_others_are_refused_with_the_reason(reason):
    cheapest = min(COVERAGE["refused"][reason], key=lambda name: ("giant" in name or "huge" in name, len(name)))
    assert refusal(cheapest) == reason


def google_arrays(model: Any) -> dict[str, np.ndarray]:
    """A timm model's weights by the names and shapes of Google's JAX files."""
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    heads = model.blocks[0].attn.num_heads
    arrays = {
        "cls": weights["cls_token"],
        "embedding/kernel": weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": weights["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": weights["pos_embed"],
        "Transformer/encoder_norm/scale": weights["norm.weight"],
        "Transformer/encoder_norm/bias": weights["norm.bias"],
        "head/kernel": weights["head.weight"].T,
        "head/bias": weights["head.bias"],
    }
    for i in range(len(model.blocks)):
        block, place = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = f"{place}MultiHeadDotProductAttention_1/"
        for number, name in enumerate(("query", "key", "value")):
            kernel = np.split(weights[f"{block}attn.qkv.weight"], 3)[number].T
            arrays[f"{attention}{name}/kernel"] = kernel.reshape(len(kernel), heads, -1)
            arrays[f"{attention}{name}/bias"] = np.split(weights[f"{block}attn.qkv.bias"], 3)[number].reshape(heads, -1)
        kernel = weights[f"{block}attn.proj.weight"].T
        arrays[f"{attention}out/kernel"] = kernel.reshape(heads, -1, kernel.shape[1])
        arrays[f"{attention}out/bias"] = weights[f"{block}attn.proj.bias"]
        for number, name in ((0, "LayerNorm_0"), (1, "LayerNorm_2")):
            arrays[f"{place}{name}/scale"] = weights[f"{block}norm{number + 1}.weight"]
            arrays[f"{place}{name}/bias"] = weights[f"{block}norm{number + 1}.bias"]
            dense = f"{place}MlpBlock_3/Dense_{number}/"
            arrays[f"{dense}kernel"] = weights[f"{block}mlp.fc{number + 1}.weight"].T
            arrays[f"{dense}bias"] = weights[f"{block}mlp.fc{number + 1}.bias"]
    return arrays


# Reading --------------------------------------------------------------------------------------------------------------


def tiny_timm(**more: Any) -> Any:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **more}).eval()


def folder(path: Path, crop_mode: str = "center", **more: Any) -> Path:
    """A folder as the hub keeps it, written by timm alone."""
    config = {"label_names": list(CLASSES)} if more.get("num_classes", 3) == 3 else {}
    data = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.25), "crop_pct": 0.9, "interpolation": "bilinear"}
    data["crop_mode"] = crop_mode
    save_for_hf(tiny_timm(**more), str(path), model_config=config, safe_serialization=True, data_config=data)
    return path


def test_reads_a_folder_of_timm(tmp_path):
    theirs = timm.create_model(f"local-dir:{folder(tmp_path)}", pretrained=True).eval()
    model, about = load_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert not model.training
    torch.testing.assert_close(model(images), theirs(images), atol=1e-5, rtol=0)
    assert about.class_names == CLASSES
    assert about.preprocess == Preprocess(
        image_size=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.25), crop=32 / 35, interpolation="bilinear"
    )


@pytest.mark.parametrize(
    ("crop_mode", "size"), [("center", (160, 160)), ("squash", (160, 160)), ("squash", (100, 240))]
)
def test_sees_of_an_image_what_timm_does(crop_mode, size, tmp_path):
    theirs = timm.create_model(f"local-dir:{folder(tmp_path, crop_mode, img_size=80)}", pretrained=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    preprocess = load_pretrained(tmp_path)[1].preprocess  # 80 pixels of 88, as a ninth of 80 is no whole number
    transform: Any = create_transform(**resolve_data_config({}, model=theirs))
    found = preprocess.normalize(preprocess(picture)[None])[0]
    torch.testing.assert_close(found, transform(picture), atol=1.01 / 255 / 0.2, rtol=0)  # a grey level, by rounding


def test_reads_plain_weights_if_told_of_what(tmp_path):
    file = tmp_path / "weights.safetensors"
    theirs = timm.create_model("test_vit").eval()
    save_file(theirs.state_dict(), file)
    with pytest.raises(CheckpointError, match=re.escape(f"write TIMM_NAME={file}")):
        load_pretrained(file)
    model, about = load_pretrained(f"test_vit={file}")
    images = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(model(images), theirs(images), atol=1e-5, rtol=0)
    assert len(about.class_names) == 1000


@pytest.mark.parametrize("classes", [7, 0])
def test_reads_what_timm_s_own_script_has_fine_tuned(tmp_path, classes):
    """Weights for other classes than the name says, or for none."""
    file = tmp_path / "model_best.pth.tar"
    theirs = timm.create_model("test_vit", num_classes=classes).eval()
    torch.save({"arch": "test_vit", "epoch": 3, "state_dict": theirs.state_dict()}, file)
    with pytest.raises(CheckpointError, match=re.escape(f"write TIMM_NAME={file}")):
        load_pretrained(file)
    model, about = load_pretrained(f"test_vit={file}")
    assert about.class_names == tuple("0123456"[:classes])
    if classes:
        images = torch.randn(2, 3, 160, 160)
        torch.testing.assert_close(model(images), theirs(images), atol=1e-5, rtol=0)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, theirs.state_dict()["blocks.1.mlp.fc2.weight"])


@pytest.mark.parametrize("sizes", [{"img_size": 224}, {"img_size": 96}, {"patch_size": 8, "img_size": 80}])
def test_plain_weights_keep_the_sizes_that_they_were_trained_for(tmp_path, sizes):
    file = tmp_path / "model_best.pth.tar"
    theirs: Any = timm.create_model("test_vit", num_classes=7, **sizes).eval()
    torch.save({"state_dict": theirs.state_dict()}, file)
    model, about = load_pretrained(f"test_vit={file}")
    images = torch.randn(2, 3, *theirs.patch_embed.img_size)
    assert about.preprocess.image_size == model.image_size == images.shape[2:]
    torch.testing.assert_close(model(images), theirs(images), atol=1e-5, rtol=0)


def test_reads_weights_under_open_clip_s_names(tmp_path):
    """Which timm renames, the projection to its head."""
    file = tmp_path / "weights.safetensors"
    theirs: Any = timm.create_model("test_vit").eval()
    weights = theirs.state_dict()
    theirs.head.bias.data.zero_()
    head = {"visual.head.proj.weight": weights.pop("head.weight")}
    save_file(head | {f"visual.trunk.{name}": tensor for name, tensor in weights.items() if name != "head.bias"}, file)
    images = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(load_pretrained(f"test_vit={file}")[0](images), theirs(images), atol=1e-5, rtol=0)


def test_no_weight_is_missing_or_left_over_silently(tmp_path):
    file = tmp_path / "weights.safetensors"
    weights = timm.create_model("test_vit").state_dict()
    save_file({**weights, "extra.weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"cannot be loaded \(.*Unexpected key.*extra\.weight"):
        load_pretrained(f"test_vit={file}")
    save_file({name: tensor for name, tensor in weights.items() if name != "blocks.0.norm1.weight"}, file)
    with pytest.raises(CheckpointError, match=r"cannot be loaded \(.*Missing key.*blocks\.0\.norm1\.weight"):
        load_pretrained(f"test_vit={file}")


def test_what_timm_loads_laxly_is_strict_here(tmp_path):
    """SigLIP's files bring a pooling that a mean does not need, for which timm lets everything pass."""
    name, file = "vit_base_patch16_siglip_gap_224", tmp_path / "weights.safetensors"
    theirs = timm.create_model(name, depth=2, embed_dim=64, num_heads=2).eval()
    weights = {**theirs.state_dict(), "attn_pool.latent": torch.zeros(1, 1, 64)}

    def loaded(weights: dict[str, Tensor]) -> VisionTransformer:
        save_file(weights, file)
        create = partial(timm.create_model, name, depth=2, embed_dim=64, num_heads=2)
        return _read(name, create, file=str(file))[0]

    assert torch.equal(loaded(weights).state_dict()["blocks.1.mlp.fc1.weight"], weights["blocks.1.mlp.fc1.weight"])
    with pytest.raises(CheckpointError, match=r"cannot be loaded \(.*Unexpected key.*extra\.weight"):
        loaded({**weights, "extra.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"cannot be loaded \(.*Missing key.*blocks\.1\.norm1\.weight"):
        loaded({name: tensor for name, tensor in weights.items() if name != "blocks.1.norm1.weight"})


@pytest.mark.parametrize(("told", "of_weights"), [(7, 3), (3, 7), (7, 7)])
def test_a_head_of_other_classes_than_told_does_not_stay_random(tmp_path, told, of_weights):
    config = folder(tmp_path) / "config.json"
    said = json.loads(config.read_text())
    of_weights = {**said["pretrained_cfg"], "num_classes": of_weights}
    config.write_text(json.dumps({**said, "num_classes": told, "pretrained_cfg": of_weights}))
    assert torch.equal(
        load_pretrained(tmp_path)[0].head.weight, load_file(tmp_path / "model.safetensors")["head.weight"]
    )


def test_an_array_file_of_other_classes_is_refused(tmp_path):
    """Google's files; timm leaves a head that does not fit as it is."""
    arrays: Any = google_arrays(timm.create_model("test_vit", num_classes=7))
    np.savez(tmp_path / "weights.npz", **arrays)
    with pytest.raises(CheckpointError, match=r"has no head\.weight of that shape"):
        load_pretrained(f"test_vit={tmp_path / 'weights.npz'}")
    theirs = timm.create_model("test_vit").eval()
    arrays = google_arrays(theirs)
    np.savez(tmp_path / "weights.npz", **arrays)
    images = torch.randn(2, 3, 160, 160)
    ours = load_pretrained(f"test_vit={tmp_path / 'weights.npz'}")[0]
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)


def test_layer_scale_by_the_name_it_has_in_deits_files(tmp_path):
    theirs: Any = timm.create_model("deit3_small_patch16_224", depth=2, embed_dim=64, num_heads=2)
    theirs.eval()
    for block in theirs.blocks:
        torch.nn.init.uniform_(block.ls1.gamma)
    save_file(
        {re.sub(r"ls(\d)\.gamma", r"gamma_\1", k): v for k, v in theirs.state_dict().items()},
        tmp_path / "w.safetensors",
    )
    create = partial(timm.create_model, "deit3_small_patch16_224", depth=2, embed_dim=64, num_heads=2)
    images = torch.randn(2, 3, 224, 224)
    ours = _read("deit3", create, file=str(tmp_path / "w.safetensors"))[0]
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)


def meta_names(model: Any) -> dict[str, Tensor]:
    """The weights of timm's DINOv3 by the names of Meta's files, with what else is in those."""
    weights: dict[str, Tensor] = {"mask_token": torch.ones(1, 64), "rope_embed.periods": torch.ones(4)}
    for name, tensor in model.state_dict().items():
        if name.endswith("qkv.weight"):
            place = name.removesuffix("weight")
            weights[f"{place}bias"] = torch.cat([torch.zeros(64), torch.ones(64), torch.zeros(64)])  # masked: the keys'
            weights[f"{place}bias_mask"] = torch.ones(192)
        name = re.sub(r"gamma_(\d)", r"ls\1.gamma", name)
        weights[name.replace("reg_token", "storage_tokens")] = tensor
    return weights


def test_reads_dinov3_as_meta_keeps_it(tmp_path, capfd):
    """A mean of patches beside a class token, which is one register more, and no position embedding."""
    create, with_bias = (
        partial(timm.create_model, f"vit_small_patch16_dinov3{more}", depth=2, embed_dim=64, num_heads=4)
        for more in ("", "_qkvb")
    )
    theirs, file = create().eval(), tmp_path / "dinov3.pth"
    weights = meta_names(theirs)
    torch.save(weights, file)
    ours, about = _read("dinov3", create, file=str(file))
    assert (ours.architecture["rope"], ours.pool, ours.num_registers, about.class_names) == (True, "mean", 5, ())
    assert not ours.pos_embed.any()
    ours.head = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    for size in ((256, 256), (64, 96)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)
    weights["blocks.1.attn.qkv.bias"][-1] = 1
    torch.save(weights, file)
    with pytest.raises(CheckpointError, match=r"has blocks\.1\.attn\.qkv\.bias, which is not zero; .* with _qkvb"):
        _read("dinov3", create, file=str(file))
    bias = _read("dinov3", with_bias, file=str(file))[0].blocks[1].attn.qkv.bias
    assert bias.nonzero().tolist() == [[191]]
    assert capfd.readouterr().out == ""  # timm's own reader prints there


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("vit_base_patch16_nothing", "neither a file or folder nor the name of a timm model"),
        ("missing.safetensors", "neither a file or folder nor the name of a timm model; timm.list_models('vit*')"),
        ("google/vit-base-patch16-224", "; if it is on the hub: hf-hub:google/vit-base-patch16-224"),
        ("vit_tiny_patch16_224=missing.safetensors", "missing.safetensors: no such weights file"),
        ("test_vit3", "test_vit3: not supported, it has pooling by attention (map)"),
        ("vit_tiny_patch16_224.no_such_tag", "vit_tiny_patch16_224.no_such_tag: cannot be loaded"),
        ("resnet18", "resnet18: not supported, it has timm's class ResNet instead of its VisionTransformer"),
    ],
)
def test_refuses_in_one_line(source, message):
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_a_folder_without_description(tmp_path):
    with pytest.raises(CheckpointError, match="without a config"):
        load_pretrained(tmp_path)
    folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_pretrained(tmp_path)


def test_a_folder_of_neither_is_told_apart(tmp_path):
    (tmp_path / "config.json").write_text('{"kind": "another"}')
    save_file({"embeddings.cls_token": torch.zeros(1, 1, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"its config\.json is neither timm's nor transformers'$"):
        load_pretrained(tmp_path)


def test_imagenet_labels_are_names_and_each_names_one_class():
    with torch.device("meta"):
        labels = labels_of(timm.create_model("test_vit"))
    assert len(set(labels)) == 1000
    assert labels[0] == "tench, Tinca tinca"
    assert [label for label in labels if label.startswith("crane (")] == ["crane (n02012849)", "crane (n03126707)"]


def test_labels_that_a_timm_model_carries_twice_are_told_apart():
    model = SimpleNamespace(num_classes=3, pretrained_cfg={"label_names": ["crane", "dog", "crane"]})
    assert len(set(labels_of(model))) == 3
    model.pretrained_cfg["label_descriptions"] = {"crane": "a bird or a machine"}
    assert len(set(labels_of(model))) == 3
    model.pretrained_cfg["label_names"] = {"1": "dog", "0": "cat", "2": "owl"}  # by number, in whatever order
    assert labels_of(model) == CLASSES


def test_predictor_with_a_timm_folder_classifies_and_explains(tmp_path):
    predictor = Predictor.from_checkpoint(str(folder(tmp_path)), device="cpu")
    image = Image.linear_gradient("L").resize((50, 40))
    explanation = predictor.explain(image, target="owl")
    assert set(explanation.prediction.scores) == set(CLASSES)
    assert explanation.grid.shape == (4, 4)


def test_of_a_backbone_there_are_features_and_maps_but_no_classes(tmp_path):
    path = str(folder(tmp_path, num_classes=0))
    predictor, theirs = (
        Predictor.from_checkpoint(path, device="cpu"),
        timm.create_model(f"local-dir:{path}", pretrained=True),
    )
    image = Image.linear_gradient("L").resize((50, 40))
    pixels = predictor.preprocess.load(image)[None]
    with torch.no_grad():
        expected = theirs(predictor.normalized(pixels))[0]
    (found,) = predictor.features_iter([image])
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-6)
    assert predictor.mapped(pixels, "rollout")[1].sum() == pytest.approx(1, abs=1e-5)
    refused: tuple[Any, ...] = (
        *(partial(ask, image) for ask in (predictor.predict, predictor.explain)),
        *(partial(predictor.scores, pixels), partial(predictor.mapped, pixels, "lrp")),
    )
    for ask in refused:
        with pytest.raises(ValueError, match=f"{path}: a backbone without classes; fine-tune it with --model.pretrain"):
            ask()


# Fitting to new data --------------------------------------------------------------------------------------------------


def start(
    source: Path, classes=CLASSES, size=32, statistics=STATISTICS, **asked
) -> tuple[VisionTransformer, list[str]]:
    return start_from(source, image_size=size, class_names=classes, **statistics, **asked)


def saved(path: Path, **more) -> tuple[VisionTransformer, Path]:
    """A small model of ours and its file."""
    arguments: dict[str, Any] = dict(image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    model = VisionTransformer(**{**arguments, **more}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    chans = model.in_chans
    preprocess = Preprocess(image_size=model.image_size, mean=(0.5,) * chans, std=(0.25,) * chans)
    about = Checkpoint(architecture=model.architecture, class_names=CLASSES, preprocess=preprocess)
    return model, save_checkpoint(path / "model.safetensors", model.state_dict(), about)


@pytest.mark.parametrize(
    "kind", [{}, {"pool": "mean"}, {"num_registers": 4}, {"num_registers": 4, "prefix_positions": True}]
)
@pytest.mark.parametrize("size", [(384, 384), (32, 32), (320, 160), (16, 48)])
def test_positions_are_resampled_as_timm_does(tmp_path, kind, size):
    old, path = saved(tmp_path, image_size=224, patch_size=16, **kind)
    new, notes = start(path, size=size)
    grid = [size[0] // 16, size[1] // 16]
    expected = resample_abs_pos_embed(old.pos_embed, grid, [14, 14], num_prefix_tokens=old.num_prefix_positions)
    torch.testing.assert_close(new.pos_embed, expected, atol=1e-6, rtol=0)
    resampled = f"position embedding resampled from 14x14 to {grid[0]}x{grid[1]} patches"
    fewer = f"an image is {grid[0]}x{grid[1]} patches, and was 14x14: --data.image_size 224 keeps them"
    assert notes == [resampled, fewer][: 1 + (grid[0] * grid[1] < 14 * 14)]


def test_nothing_changes_where_nothing_is_asked(tmp_path):
    old, path = saved(tmp_path, stem="conv", pool="mean", qk_norm=True)
    new, notes = start(path)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(new.eval()(images), old(images), atol=0, rtol=0)
    assert notes == []


def test_head_is_replaced_for_other_classes_only(tmp_path):
    old, path = saved(tmp_path)
    new, notes = start(path, classes=("a", "b"))
    assert notes == ["head replaced: 3 classes before, 2 now"]
    assert new.head.weight.shape == (2, 32)
    same = old.state_dict() | {name: new.state_dict()[name] for name in ("head.weight", "head.bias")}
    assert all(torch.equal(tensor, same[name]) for name, tensor in new.state_dict().items())
    same_number, notes = start(path, classes=("a", "b", "c"))
    assert notes == ["head replaced: 3 classes before, 3 now"]
    assert (same_number.head.weight - old.head.weight).abs().max() > 1e-3


def test_patches_and_channels_are_adapted(tmp_path):
    old, path = saved(tmp_path)
    new, notes = start(path, size=64, patch_size=16)
    assert notes[0] == "patch embedding resampled from 8x8 to 16x16 pixels"
    expected = resample_patch_embed(old.patch_embed.proj.weight, [16, 16])  # type: ignore[union-attr]
    torch.testing.assert_close(new.patch_embed.proj.weight, expected)
    grey, notes = start(path, statistics={"mean": (0.5,), "std": (0.25,)})
    assert notes == ["patch embedding adapted from 3 to 1 channels"]
    images = torch.randn(2, 1, 32, 32)  # grey as three equal channels was the same sum
    torch.testing.assert_close(grey.eval()(images), old(images.expand(-1, 3, -1, -1)), atol=1e-4, rtol=0)


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


@pytest.mark.parametrize("change", [{}, {"mean": (0.5,) * 3}, {"std": (0.25,) * 3}], ids=["both", "std", "mean"])
def test_other_statistics_do_not_change_what_the_weights_see(tmp_path, change):
    old, path = saved(tmp_path)
    other = {"mean": (0.3, 0.4, 0.7), "std": (0.1, 0.2, 0.5)} | change
    new, notes = start(path, statistics=other)
    assert notes == ["mean and std of the new images folded into the patch embedding"]
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(
        new.eval()(normalised(pixels, **other)), old(normalised(pixels, **STATISTICS)), atol=1e-4, rtol=0
    )


def test_a_backbone_gets_a_head(tmp_path):
    new, notes = start(folder(tmp_path, num_classes=0), statistics={"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.25)})
    assert notes == ["head replaced: 0 classes before, 3 now"]
    assert new(torch.randn(1, 3, 32, 32)).std() > 0


def test_a_backbone_without_positions_has_none_to_resample(tmp_path):
    old, path = saved(tmp_path, rope=True)
    old.pos_embed.data.zero_()
    save_checkpoint(path, old.state_dict(), load_pretrained(path)[1])
    assert start(path, size=16)[1][-1].endswith(": --data.image_size 32 keeps them")
    new, notes = start(path, size=64)
    assert new.pos_embed.shape == (1, 65, 32)
    assert not new.pos_embed.any()
    assert notes == []


def test_refuses_what_does_not_fit(tmp_path):
    _, path = saved(tmp_path, stem="conv")
    with pytest.raises(CheckpointError, match=r"has embed_dim 32; give --model.embed_dim 32 or none, not 48"):
        start(path, embed_dim=48)
    with pytest.raises(CheckpointError, match="a convolutional stem keeps its patch size 8x8"):
        start(path, patch_size=4)
    with pytest.raises(ValueError, match="image height 30 is not a multiple of patch size 8"):
        start(path, size=30)


def test_weights_of_timm_are_not_copied():
    theirs = tiny_timm()
    ours, _ = from_timm(theirs)
    assert ours.head.weight.data_ptr() == theirs.head.weight.data_ptr()
    assert from_timm(theirs.bfloat16())[0].head.weight.dtype == torch.float32  # but where they are of another type


def test_the_weights_that_come_along_have_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # from anywhere
    model, about = load_pretrained("cifar10")
    assert (model.num_classes, about.class_names[3]) == (10, "cat")
