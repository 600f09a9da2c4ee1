"""What is saved comes back bit for bit, and whatever else lies in the file is refused in one line and never run."""

import contextlib
import json
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vit import checkpoint
from vit.checkpoint import FORMAT_VERSION, KEY, Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from vit.model import VisionTransformer
from vit.preprocess import Preprocess

ROOT = Path(__file__).parent.parent
ARCHITECTURE: dict[str, Any] = dict(image_size=(8, 12), patch_size=4, num_classes=3, embed_dim=16, depth=2, num_heads=2)
ABOUT = Checkpoint(
    architecture=ARCHITECTURE,
    class_names=("cat", "naïve 猫", 'with "quotes"'),
    preprocess=Preprocess(image_size=(8, 12), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), crop=0.9),
    temperature=1.25,
    metrics={"val/acc": 0.75},
    training={"dataset": "digits", "steps": 10},
)


@pytest.fixture
def model() -> VisionTransformer:
    return VisionTransformer(**ARCHITECTURE).eval()


@pytest.fixture
def path(tmp_path, model) -> Path:
    """A good model.safetensors."""
    return save_checkpoint(tmp_path / "model.safetensors", model.state_dict(), ABOUT)


def rewrite(path: Path, *, weights: dict | None = None, drop: tuple[str, ...] = (), **description) -> None:
    """Write a good file again with some weights or parts of the description changed."""
    tensors = load_file(path) | (weights or {})
    raw = {"format_version": FORMAT_VERSION, **asdict(ABOUT)} | description
    tensors = {name: tensor for name, tensor in tensors.items() if name not in drop}
    save_file(tensors, path, {KEY: json.dumps({k: v for k, v in raw.items() if k not in drop})})


def refusal(path: Path) -> str:
    """The message with which a file is refused: one line that starts with its path."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    return message.removeprefix(f"{path}: ")


# Round trip -----------------------------------------------------------------------------------------------------------


def test_round_trip_is_bit_equal(path, model):
    again, about = load_checkpoint(path)
    assert about == ABOUT
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(again(images), model(images))


def test_every_kind_of_model_comes_back(tmp_path):
    for more in (
        {"pool": "mean", "num_registers": 2, "init_values": 0.1},
        {"stem": "conv", "qk_norm": True, "in_chans": 1},
    ):
        model = VisionTransformer(**ARCHITECTURE, **more).eval()
        channels = (0.5,) * model.in_chans
        about = replace(
            ABOUT, architecture=model.architecture, preprocess=replace(ABOUT.preprocess, mean=channels, std=channels)
        )
        again, _ = load_checkpoint(save_checkpoint(tmp_path / "m.safetensors", model.state_dict(), about))
        images = torch.randn(2, model.in_chans, 8, 12)
        assert torch.equal(again(images), model(images))


def test_half_size_file_loads_as_float32(tmp_path, path, model):
    small = save_checkpoint(tmp_path / "small.safetensors", model.state_dict(), ABOUT, torch.bfloat16)
    again, _ = load_checkpoint(small)
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == torch.float32
        assert torch.equal(again.state_dict()[name], tensor.bfloat16().float())
    assert small.stat().st_size < 0.75 * path.stat().st_size


def test_loaded_weights_do_not_hang_on_the_file(path, model):
    again, _ = load_checkpoint(path)
    with open(path, "r+b") as file:  # in place: a memory map would see it
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_lightning_checkpoint_gives_the_same_model(tmp_path, model):
    file = tmp_path / "best.ckpt"
    weights = {f"vit.{name}": tensor for name, tensor in model.state_dict().items()}
    description = {"format_version": FORMAT_VERSION, **asdict(ABOUT)}
    torch.save({"state_dict": weights | {"loss.weight": torch.ones(3)}, "vit": description, "global_step": 7}, file)
    again, about = load_checkpoint(file)
    assert about == ABOUT
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


# Saving ---------------------------------------------------------------------------------------------------------------


def test_makes_missing_folders(tmp_path, model):
    save_checkpoint(tmp_path / "a" / "b" / "m.safetensors", model.state_dict(), ABOUT)
    assert load_checkpoint(tmp_path / "a" / "b" / "m.safetensors")[1] == ABOUT


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_failed_save_leaves_the_old_file(path, model, monkeypatch, call, error):
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint.os, call, fail)
    with pytest.raises(type(error)) as caught:
        save_checkpoint(path, {name: tensor + 1 for name, tensor in model.state_dict().items()}, ABOUT)
    assert getattr(caught.value, "filename", str(path)) == str(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_save_leaves_the_old_file(path, call):
    """A process that dies by SIGKILL, first with the new file half done, then with it whole but not in place."""
    before = path.read_bytes()
    script = f"""
import os, signal
from vit import checkpoint
model, about = checkpoint.load_checkpoint({str(path)!r})
os.{call} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_checkpoint({str(path)!r}, {{k: v + 1 for k, v in model.state_dict().items()}}, about)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == -signal.SIGKILL
    assert len(os.listdir(path.parent)) == 2  # it had begun
    assert path.read_bytes() == before


def test_description_that_is_no_json_leaves_the_old_file(path, model):
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_checkpoint(path, model.state_dict(), replace(ABOUT, training={"model": object()}))
    assert path.read_bytes() == before


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, model, umask, mode):
    old = os.umask(umask)
    try:
        file = save_checkpoint(tmp_path / "m.safetensors", model.state_dict(), ABOUT)
    finally:
        os.umask(old)
    assert stat.S_IMODE(file.stat().st_mode) == mode


# Damage ---------------------------------------------------------------------------------------------------------------


def test_truncated_anywhere(path):
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    offsets = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1}
    offsets |= {random.Random(0).randrange(len(whole)) for _ in range(40)}
    for offset in sorted(offsets):
        path.write_bytes(whole[:offset])
        assert "truncated" in refusal(path), offset


def test_truncated_lightning_checkpoint(tmp_path, model):
    file = tmp_path / "last.ckpt"
    weights = {f"vit.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, "vit": {"format_version": FORMAT_VERSION, **asdict(ABOUT)}}, file)
    whole = file.read_bytes()
    for offset in (0, 1, 100, 5000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:offset])
        assert "truncated" in refusal(file), offset


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("size", [0, 1, 8, 100, 100_000])
def test_random_bytes(tmp_path, suffix, size):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(random.Random(size).randbytes(size))
    refusal(file)


def test_header_with_flipped_bytes_never_ends_in_a_traceback(path, model):
    """Any other error than a CheckpointError fails; a flip in a name or number may still load."""
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(header)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            refused += 1
            load_checkpoint(path)
            refused -= 1
    assert refused > 200


def test_a_link_stays_one_and_a_name_may_be_long(tmp_path, path):
    model, about = load_checkpoint(path)
    long, link = tmp_path / f"{'x' * 240}.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(long)
    save_checkpoint(link, model.state_dict(), about)
    assert link.is_symlink()
    assert load_checkpoint(long)[1] == about
    assert sorted(tmp_path.iterdir()) == sorted([long, link, path])


def test_missing_file(tmp_path):
    assert refusal(tmp_path / "nowhere.safetensors") == "no such checkpoint file"


def test_a_path_that_is_no_text_is_not_called_damage(tmp_path, path):
    path.rename(odd := tmp_path / os.fsdecode(b"\xff.safetensors"))
    assert refusal(odd) == "its path is no valid UTF-8; rename it, or name a link to it that is"
    (tmp_path / "link.safetensors").symlink_to(odd)
    load_checkpoint(tmp_path / "link.safetensors")


def test_of_a_folder_it_says_what_to_give(tmp_path, path):
    assert refusal(tmp_path) == f"a folder without a config.json, not a checkpoint file; give {path}"
    path.rename(tmp_path / "last.ckpt")
    assert refusal(tmp_path).endswith(f"; give {tmp_path / 'last.ckpt'}")
    (tmp_path / "best.ckpt").touch()
    assert refusal(tmp_path).endswith(f"; give {tmp_path / 'best.ckpt'}")
    (tmp_path / "best.ckpt").unlink()
    (tmp_path / "last.ckpt").unlink()
    assert refusal(tmp_path) == "a folder without a config.json, not a checkpoint file; give the file in it"


@pytest.mark.parametrize("name", ["model.onnx", "weights.pth", "model"])
def test_of_another_kind_of_file_it_says_which_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(random.Random(0).randbytes(1000))
    assert refusal(tmp_path / name).endswith("only .safetensors files and the .ckpt files of train.py are read")


# Weights that do not fit ----------------------------------------------------------------------------------------------


def test_wrong_shape(path):
    rewrite(path, weights={"head.weight": torch.zeros(3, 17)})
    assert refusal(path) == "weight head.weight has shape (3, 17), expected (3, 16)"


def test_missing_weight(path):
    rewrite(path, drop=("blocks.1.attn.qkv.bias",))
    assert refusal(path) == "weight blocks.1.attn.qkv.bias is missing"


def test_unknown_weights(path):
    rewrite(path, weights={"blocks.2.norm1.weight": torch.ones(16), "more": torch.ones(1)})
    assert refusal(path) == "unknown weight blocks.2.norm1.weight and 1 more"
    rewrite(path, weights={"\x1b]0;title\a": torch.ones(1)}, drop=("more",))
    assert refusal(path) == r"unknown weight \x1b]0;title\x07 and 1 more"


def test_weights_that_are_no_numbers(path):
    rewrite(path, weights={"head.bias": torch.tensor([0.0, float("nan"), 0.0])})
    assert refusal(path) == "weight head.bias has values that are not finite"
    rewrite(path, weights={"head.bias": torch.zeros(3, dtype=torch.int64)})
    assert refusal(path) == "weight head.bias is of type torch.int64, expected a float"


def test_weights_larger_than_their_file(tmp_path, model):
    """A few bytes in a .ckpt may call themselves any number of values: filling those in could take all memory."""
    weights = {f"vit.{name}": tensor for name, tensor in model.state_dict().items()}
    weights["vit.head.weight"] = torch.zeros(1).expand(3, 16)
    torch.save({"vit": checkpoint.describe(ABOUT), "state_dict": weights}, tmp_path / "last.ckpt")
    assert refusal(tmp_path / "last.ckpt") == "weight head.weight is not there in full"


# Descriptions that do not fit -----------------------------------------------------------------------------------------


def test_newer_format(path):
    rewrite(path, format_version=FORMAT_VERSION + 1)
    assert refusal(path) == f"format version {FORMAT_VERSION + 1} is newer than {FORMAT_VERSION}; please update"


def test_class_names_that_do_not_match(path):
    rewrite(path, class_names=["cat", "dog"])
    assert refusal(path) == "2 class names for 3 classes"
    rewrite(path, class_names=["cat", "dog", "owl", "fox"])
    assert refusal(path) == "4 class names for 3 classes"
    rewrite(path, class_names="cat")
    assert refusal(path) == "its class names are not a list of texts"


def test_a_class_name_is_there_once(path):
    """Scores are kept by name: of two of one name one would be lost."""
    with pytest.raises(CheckpointError, match=r"^class name 'cat' is there twice: tell them apart"):
        replace(ABOUT, class_names=("cat", "dog", "cat"))
    rewrite(path, class_names=["cat", "dog", "cat"])  # as older versions wrote them
    assert load_checkpoint(path)[1].class_names == ("cat (0)", "dog", "cat (2)")


def test_channels_that_do_not_match(path):
    rewrite(path, preprocess=asdict(replace(ABOUT.preprocess, mean=(0.5,), std=(0.2,))))
    assert refusal(path) == "1 channel means for 3 channels"


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}], ids=str)
def test_another_program(tmp_path, model, metadata):
    save_file(model.state_dict(), tmp_path / "m.safetensors", metadata)
    assert "another program" in refusal(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '"text"', "{}", "[" * 100_000, '{"format_version": null}']
)
def test_description_of_another_kind(path, model, text):
    save_file(model.state_dict(), path, {KEY: text})
    refusal(path)


@pytest.mark.parametrize("name", ["format_version", "architecture", "class_names", "preprocess"])
def test_description_lacks_a_part(path, name):
    rewrite(path, drop=(name,))
    assert name in refusal(path)


HUGE, BEYOND = 10**6, 10**18


@pytest.mark.parametrize(
    "change",
    [
        *({name: size} for name in ("embed_dim", "depth", "num_classes", "in_chans") for size in (HUGE, BEYOND)),
        *({name: size} for name in ("num_registers", "mlp_ratio") for size in (HUGE, BEYOND, -1)),
        *({"image_size": [s, s], "patch_size": [p, p]} for s, p in ((HUGE, 4), (HUGE, HUGE), (BEYOND, BEYOND))),
        {"stem": "conv", "image_size": BEYOND, "patch_size": BEYOND},
        {"embed_dim": HUGE, "num_heads": HUGE, "depth": HUGE},
        {"embed_dim": 8192},  # 6 GB: no machine refuses it, but filling them takes seconds
        *({"embed_dim": value} for value in (0, -16, 16.5, "16", None, [16], {}, True, float("nan"), float("inf"))),
        *({"image_size": value} for value in (0, [], [8], [[8]], "8", None, -8)),
        *({"depth": value} for value in (0, 1, 3, None, "2", 2.5)),
        {"num_heads": 2.0},
        {"num_registers": 0.0},
        {"pool": "max"},
        {"pool": []},
        {"layers": 3},
        {"drop_path_rate": float("nan")},
        {"init_values": "0.1"},
    ],
    ids=str,
)
def test_hostile_architecture_costs_nothing(path, change):
    rewrite(path, architecture=ARCHITECTURE | change)
    start = time.process_time()
    refusal(path)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "change",
    [
        *({"image_size": value} for value in (None, 8, [], [8], [9, 12], [0, 0], [-8, 12], ["8", "12"], [8.0, 12.0])),
        *({"mean": value} for value in (None, 0.5, [], ["a", "b", "c"], [float("nan")] * 3)),
        *({"std": value} for value in (None, [0, 0, 0], [0.5, 0.5, float("inf")])),
        *({"crop": value} for value in (0, -1, 2, "1", None, float("nan"))),
        *({"interpolation": value} for value in ("cubist", None, 3)),
        {"filter": "box"},
    ],
    ids=str,
)
def test_preprocessing_that_cannot_work(path, change):
    rewrite(path, preprocess=asdict(ABOUT.preprocess) | change)
    refusal(path)


def test_preprocessing_for_another_model(path):
    """A model would take them, but it was trained on its own size; and a hostile size takes all memory."""
    rewrite(path, preprocess=asdict(replace(ABOUT.preprocess, image_size=(80_000, 80_000))))
    assert refusal(path) == "its preprocessing makes images of size (80000, 80000), its model takes (8, 12)"


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf"), "1", None, [1]], ids=str)
def test_temperature_that_cannot_work(path, temperature):
    rewrite(path, temperature=temperature)
    refusal(path)


def test_a_file_that_says_no_temperature_has_none(path):
    """Nor metrics, of which any number is one."""
    rewrite(path, drop=("temperature", "metrics", "training"))
    assert (load_checkpoint(path)[1].temperature, load_checkpoint(path)[1].metrics) == (1, {})
    rewrite(path, metrics={"val/loss": 1e30, "seen": 2**53})
    assert load_checkpoint(path)[1].metrics == {"val/loss": 1e30, "seen": 2**53}


def test_metrics_and_training_that_nobody_can_show(path):
    for metrics in ([1], None, "x", {"val/acc": "high"}, {"val/acc": {}}, {"val/acc": None}, {"val/acc": 10**400}):
        rewrite(path, metrics=metrics)
        assert "its metric" in refusal(path)
    for training in ([1], None, "x"):
        rewrite(path, training=training)
        assert "its training must be values by name" in refusal(path)


# Code in disguise -----------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["model.safetensors", "last.ckpt", "model.pt"])
@pytest.mark.parametrize(
    "write", [torch.save, lambda bomb, file: file.write_bytes(pickle.dumps(bomb))], ids=["zip", "raw"]
)
@pytest.mark.parametrize("deep", [False, True])
def test_pickle_is_refused_and_never_run(tmp_path, name, write, deep):
    marker, file = tmp_path / "marker", tmp_path / name
    bomb = Bomb(marker)
    write({"state_dict": {"vit.head.weight": bomb}, "vit": {"training": [bomb]}} if deep else bomb, file)
    refusal(file)
    assert not marker.exists()
    if write is not torch.save:  # the bomb is a real one
        pickle.loads(file.read_bytes())
        assert marker.exists()


def test_lightning_checkpoint_with_odd_contents(tmp_path):
    file = tmp_path / "last.ckpt"
    description = {"format_version": FORMAT_VERSION, **asdict(ABOUT)}
    for contents in (
        {},
        [],
        torch.zeros(3),
        {"state_dict": {}},
        {"state_dict": {}, "vit": description},
        {"state_dict": 7, "vit": description},
        {"state_dict": {"vit.cls_token": 7}, "vit": description},
        {"state_dict": {7: torch.zeros(3)}, "vit": description},
    ):
        torch.save(contents, file)
        refusal(file)


def test_what_older_versions_do_not_know_is_there_only_where_it_says_something():
    described = checkpoint.describe(replace(ABOUT, architecture=ABOUT.architecture | {"rope": False}))
    assert "rope" not in described["architecture"]
    assert not {"white", "squash"} & described["preprocess"].keys()
    preprocess = replace(ABOUT.preprocess, white=9.0, squash=True)
    described = checkpoint.describe(
        replace(ABOUT, architecture=ABOUT.architecture | {"rope": True}, preprocess=preprocess)
    )
    assert described["architecture"]["rope"] is True
    assert (described["preprocess"]["white"], described["preprocess"]["squash"]) == (9.0, True)
