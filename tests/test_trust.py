"""Checkpoints and configurations are data: none of them gets code to run, whichever command it is given to."""

import contextlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils import collect_env

import predict
import train

ROOT = Path(__file__).parent.parent
TINY = [
    f"--config={ROOT / 'configs/digits.yaml'}",
    "--model.embed_dim=16",
    "--model.depth=1",
    "--model.num_heads=2",
    "--data.batch_size=512",
    "--trainer.enable_progress_bar=false",
    "--trainer.max_epochs=1",
]


class Call:
    """Pickles as a call, which an unpickler makes."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> dict[str, Any]:
    """What a run of ours saves."""
    root = tmp_path_factory.mktemp("honest")
    assert train.main(["fit", *TINY, f"--trainer.default_root_dir={root}"]) == 0
    return torch.load(root / "last.ckpt", weights_only=True)


def plain(path: Path, honest: dict[str, Any], evil: Call) -> None:
    path.write_bytes(pickle.dumps({**honest, "epoch": evil}, protocol=2))


def among_weights(path: Path, honest: dict[str, Any], evil: Call) -> None:
    torch.save({**honest, "state_dict": {**honest["state_dict"], "vit.norm.bias": evil}}, path)


def in_callbacks(path: Path, honest: dict[str, Any], evil: Call) -> None:
    torch.save({**honest, "callbacks": {"Guard": {"done": evil}}}, path)


def in_the_old_format(path: Path, honest: dict[str, Any], evil: Call) -> None:
    torch.save({**honest, "optimizer_states": [evil]}, path, _use_new_zipfile_serialization=False)


def by_torch_itself(path: Path, honest: dict[str, Any], evil: Call) -> None:
    """A function of the library itself, which starts programs."""
    torch.save({**honest, "lr_schedulers": Call(collect_env.run, f"mkdir {path.parent / 'marker'}")}, path)


@pytest.fixture(
    params=[plain, among_weights, in_callbacks, in_the_old_format, by_torch_itself], ids=lambda f: f.__name__
)
def malicious(request, tmp_path, honest) -> Path:
    """A checkpoint that makes a file ``marker`` beside it if it is unpickled."""
    path = tmp_path / "last.ckpt"
    request.param(path, honest, Call(os.mkdir, str(tmp_path / "marker")))
    return path


def test_they_are_malicious(malicious, monkeypatch):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")  # train.py set it
    with contextlib.suppress(Exception):  # a plain pickle is not all that torch expects
        torch.load(malicious, weights_only=False)
    assert (malicious.parent / "marker").exists()


@pytest.mark.parametrize("command", ["predict", "validate", "test", "resume"])
def test_refused_in_one_line(malicious, capfd, monkeypatch, command):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # even where someone turned torch's guard off
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    folder = malicious.parent
    if command == "predict":
        Image.new("L", (8, 8)).save(folder / "image.png")
        status = predict.main([str(folder / "image.png"), "--checkpoint", str(malicious), "--device", "cpu"])
    else:
        given = ["--ckpt_path=last" if command == "resume" else f"--ckpt_path={malicious}"]
        given.append(f"--trainer.default_root_dir={folder}")
        status = train.main(["fit" if command == "resume" else command, *TINY, *given])
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert status == 2
    assert len(said) == 1, said
    assert str(malicious) in said[0]
    assert not (folder / "marker").exists()


def callback(name: str, **arguments: Any) -> str:
    """An option that asks for a callback of Lightning with arguments of our choice."""
    return "--trainer.callbacks=" + json.dumps([{"class_path": f"lightning.pytorch.callbacks.{name}", **arguments}])


COMMAND = {"class_path": "subprocess.Popen", "init_args": {"args": ["mkdir", "MARKER"]}}
DETOUR = "lightning.pytorch.trainer.connectors.signal_connector.os.abort"
CONFIGS = {
    "a class for a number": f"--model.depth={json.dumps(COMMAND)}",
    "a class for a callback": f"--trainer.callbacks={json.dumps([COMMAND])}",
    "a function": callback("LambdaCallback", init_args={"setup": "os.abort"}),
    "a function by a detour": callback("LambdaCallback", init_args={"setup": DETOUR}),
    "YAML that makes objects": "--model.depth=!!python/object/apply:os.mkdir [MARKER]",
}


@pytest.mark.parametrize("value", CONFIGS.values(), ids=list(CONFIGS))
def test_config_cannot_run_code(tmp_path, capfd, value):
    marker = tmp_path / "marker"
    arguments = [f"--trainer.default_root_dir={tmp_path}", "--trainer.fast_dev_run=1"]
    status = train.main(["fit", *TINY, *arguments, value.replace("MARKER", str(marker))])
    assert not marker.exists()
    assert status == 2, capfd.readouterr().err


def test_class_for_any_value_is_not_made(tmp_path):
    """Where every value is right, one that describes an object stays a description."""
    value = callback("EMAWeightAveraging", dict_kwargs={"multi_avg_fn": COMMAND})
    arguments = [f"--trainer.default_root_dir={tmp_path}", "--trainer.fast_dev_run=1"]
    with contextlib.suppress(TypeError):  # what the callback makes of it
        train.main(["fit", *TINY, *arguments, value.replace("MARKER", str(tmp_path / "marker"))])
    assert not (tmp_path / "marker").exists()


def test_arguments_in_a_checkpoint_cannot_run_code(tmp_path, honest, capfd):
    """Texts and numbers only, so that the unpickler has no objection; Lightning takes the model's arguments from it."""
    command = {"class_path": "subprocess.Popen", "init_args": {"args": ["mkdir", str(tmp_path / "marker")]}}
    for name in ("depth", "optimizer", "norm"):
        parameters = {**honest["hyper_parameters"], name: command}
        torch.save({**honest, "hyper_parameters": parameters}, tmp_path / "a.ckpt")
        arguments = [f"--ckpt_path={tmp_path / 'a.ckpt'}", f"--trainer.default_root_dir={tmp_path}"]
        assert train.main(["test", *TINY, *arguments]) == 2
        assert not (tmp_path / "marker").exists()


def test_honest_callbacks_work(tmp_path):
    averaged = callback("EMAWeightAveraging", init_args={"decay": 0.9})
    arguments = [f"--trainer.default_root_dir={tmp_path}", "--trainer.fast_dev_run=1"]
    assert train.main(["fit", *TINY, *arguments, averaged]) == 0
