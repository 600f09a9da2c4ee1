"""The figures of a model against arithmetic done by hand, and what the command prints."""

import io
import os
import sys
from contextlib import suppress
from dataclasses import replace

import pytest

from vit import info
from vit.checkpoint import Checkpoint, save_checkpoint
from vit.model import VisionTransformer
from vit.preprocess import Preprocess


def made() -> tuple[VisionTransformer, Checkpoint]:
    model = VisionTransformer(image_size=(8, 12), patch_size=2, num_classes=5, embed_dim=32, depth=2, num_heads=4)
    preprocess = Preprocess(
        image_size=(8, 12), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), crop=0.875, interpolation="bilinear"
    )
    names = tuple(f"kind {i}" for i in range(5))
    about = Checkpoint(
        architecture=model.architecture,
        class_names=names,
        preprocess=preprocess,
        temperature=1.7,
        metrics={"val/acc": 0.5},
    )
    return model, about


@pytest.mark.parametrize(("depth", "embed_dim", "size"), [(12, 192, 224), (2, 64, 32)])
def test_flops_are_two_for_each_multiply_add(depth, embed_dim, size):
    model = VisionTransformer(image_size=size, embed_dim=embed_dim, depth=depth, num_heads=embed_dim // 64)
    n, d = (size // 16) ** 2 + 1, embed_dim
    patches = (n - 1) * 16 * 16 * 3 * d
    block = n * d * 3 * d + 2 * n * n * d + n * d * d + 2 * n * d * 4 * d  # qkv, scores and sum, projection, MLP
    last = n * d * 3 * d + 2 * n * d + d * d + 2 * d * 4 * d  # of the last block only the class token is needed
    assert info.flops(model) == 2 * (patches + (depth - 1) * block + last + d * 1000)
    large = VisionTransformer(**{**model.architecture, "image_size": (256, 256)})
    assert info.flops(model, (256, 256)) == info.flops(large) > info.flops(model)


def test_command_says_what_there_is(tmp_path, capsys):
    model, about = made()
    path = save_checkpoint(tmp_path / "model.safetensors", model.state_dict(), about)
    assert info.main([str(path)]) == 0
    text = capsys.readouterr().out
    parameters = sum(p.numel() for p in model.parameters())
    for expected in (f"{parameters:,}", "4 x 6 patches + 1", "kind 4", "8 x 12", "bilinear", "0.875", "1.7", "val/acc"):
        assert expected in text
    assert "MB)" in text  # of the file


def test_metrics_from_before_the_temperature_say_so():
    model, about = made()
    about = replace(about, metrics={"val/acc": 0.5, "val/ece": 0.04, "test/loss": 0.3, "test/ece_calibrated": 0.01})
    assert info.facts(model, about)["metrics"] == {
        "val/acc": "0.5",
        "val/ece": "0.04 (before the temperature)",
        "test/loss": "0.3 (before the temperature)",
        "test/ece_calibrated": "0.01",
    }
    assert info.facts(model, replace(about, temperature=1.0))["metrics"]["val/ece"] == "0.04"


def test_names_are_printed_as_they_are(tmp_path, monkeypatch):
    """A class may be called what looks like markup, or moves the terminal, or is no valid text; so may the file."""
    model, about = made()
    names = ("\x1b[31m", "[red]", "[/x]", os.fsdecode(b"caf\xe9"), "back\\")
    about = replace(about, class_names=names, metrics={"[val]": 0.5})
    path = save_checkpoint(tmp_path / "[b]model.safetensors", model.state_dict(), about)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file := io.BytesIO(), encoding="utf-8", errors="strict"))
    monkeypatch.setenv("COLUMNS", "300")
    assert info.main([str(path)]) == 0
    sys.stdout.flush()
    text = file.getvalue().decode().replace("\n", "")
    for expected in ("\\x1b[31m, [red], [/x], caf\\udce9, back\\ ", "[val]", "[b]model.safetensors"):
        assert expected in text


def test_standard_output_that_refuses(tmp_path, monkeypatch, capsys):
    """A letter that its encoding has not is escaped; what cannot be written is said in one line."""
    model, about = made()
    path = save_checkpoint(
        tmp_path / "model.safetensors", model.state_dict(), replace(about, class_names=tuple("éabcd"))
    )
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", text := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert info.main([str(path)]) == 0
    text.seek(0)
    assert b"\\xe9, a, b, c, d" in text.buffer.read()
    stdout = os.dup(1)
    try:
        with suppress(OSError), open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert info.main([str(path)]) == 2
    finally:
        os.dup2(stdout, 1)
    assert capsys.readouterr().err == "vit.info: standard output: No space left on device\n"


def test_command_refuses_in_one_line(tmp_path, capsys):
    assert info.main([str(tmp_path / "none.safetensors")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vit.info: ")


def test_many_classes_are_not_all_listed():
    model, about = made()
    section = info.facts(model, replace(about, class_names=tuple(map(str, range(1000)))))["classes"]
    assert section["number"] == 1000
    assert section["names"].endswith("11, ... (988 more)")
