"""What the README says is true: commands parse, files exist, and each figure stands in benchmarks/results."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace
from PIL import Image

import predict
from vit.cli import TrainCLI

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(?:\w*)\n(.*?)```", README, re.S)


def commands(script: str) -> list[list[str]]:
    """Arguments of every call of a script in the README's blocks, comments and line ends with a backslash removed."""
    found = []
    for line in "\n".join(BLOCKS).replace("\\\n", " ").splitlines():
        if not re.match(r"(find .* )?(\S*python|torchrun) ", line):
            continue
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            if (word == script and i and "python" in words[i - 1]) or (word == script and "torchrun" in words):
                end = words.index("|") if "|" in words else len(words)
                found.append(words[i + 1 : end])
    return found


@pytest.mark.parametrize("args", commands("predict.py"), ids=" ".join)
def test_predict_commands_parse(args: list[str]) -> None:
    predict.parser().parse_intermixed_args(args)


@pytest.mark.parametrize("args", commands("train.py"), ids=" ".join)
def test_train_commands_parse(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(TrainCLI, "_parse_ckpt_path", _stop)  # parsed by then, and nothing made yet
    with pytest.raises(StopIteration):
        TrainCLI(*_classes(), args=args, seed_everything_default=0, auto_configure_optimizers=False)


def _classes() -> tuple[type, type]:
    from data.datamodule import ImageDataModule
    from vit.classifier import ViTClassifier

    return ViTClassifier, ImageDataModule


def _stop(self: TrainCLI) -> None:
    assert isinstance(self.config, Namespace)
    raise StopIteration


def test_there_are_commands() -> None:
    assert len(commands("predict.py")) >= 4
    assert len(commands("train.py")) >= 5


def test_files_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    (tree,) = (block for block in BLOCKS if block.startswith("train.py predict.py"))
    for name in re.findall(r"(?:^|; )((?:[\w/.]+ ?)+?)(?=  |:)", tree, re.M):
        for path in name.split():
            assert (ROOT / path).exists(), path


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "teal").save("photo.jpg")
    exec("".join(examples), {})
    for name, width in (("map.png", 41), ("pixels.png", 32)):
        with Image.open(name) as picture:
            assert picture.width >= width


def test_a_probe_of_features(cifar10_jpeg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example that stands by itself, on 40 images of two classes."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pretrained.md").read_text(), re.S)
    (example,) = (text for text in examples if "features_iter" in text)
    for kind in ("cat", "ship"):
        (tmp_path / "FOLDER" / kind).mkdir(parents=True)
        for path in sorted((cifar10_jpeg / "test" / kind).glob("*.jpg"))[1:21]:
            shutil.copy(path, tmp_path / "FOLDER" / kind)
    shutil.copy(cifar10_jpeg / "test/ship/0000.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["probe"].predict(list(names["predictor"].features_iter(["photo.jpg"]))).tolist() == ["ship"]
    assert names["probe"].score(names["features"], names["labels"]) == 1


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_training_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, changed = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "runs.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    exec(changed, names)  # own loss, augmentation, batches
    assert Path(names["path"]).is_relative_to("runs/python")
    images = names["images"]
    accuracy = names["trainer"].validate(names["model"], images, verbose=False)[0]["val/acc"]
    assert accuracy > 0.9
    one = images.source.train.images[0, 0].numpy()
    assert names["predictor"].predict(one).label in images.class_names


def test_sample_of_records_is_what_is_written(
    cifar10_jpeg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All but the speed; a score may be another by 1 point where another processor rounds bfloat16 differently."""
    (sample,) = (block for block in BLOCKS if block.startswith("$ python predict.py photos"))
    command, *shown = sample.splitlines()
    images, photos = cifar10_jpeg / "test", tmp_path / "photos"
    photos.mkdir()
    for name, source in {"cat": "cat/0000", "kitten": "cat/0008", "ship": "ship/0000"}.items():
        shutil.copy(images / f"{source}.jpg", photos / f"{name}.jpg")
    (photos / "damaged.jpg").write_bytes((images / "dog/0000.jpg").read_bytes()[:300])
    monkeypatch.chdir(tmp_path)
    assert predict.main(shlex.split(command)[3:]) == 3
    output = capfd.readouterr()
    lines = [*output.out.splitlines(), *output.err.splitlines()]
    number = re.compile(r" *(\d+\.\d)%")
    for line, expected in zip(lines, shown, strict=True):
        assert number.sub("", line.partition(" in ")[0]) == number.sub("", expected.partition(" in ")[0])
        scores, printed = ([float(score) for score in number.findall(text)] for text in (line, expected))
        assert scores == pytest.approx(printed, abs=1)


def result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_figures_are_the_measured_ones() -> None:
    digits = result("digits")
    shown = [row["test_accuracy"] for row in digits["rows"]] + [min(digits["seeds"]), max(digits["seeds"])]
    assert all(f"{value:.1%}" in README for value in shown)
    rows = {row["what"]: row["value"] for row in result("cifar10")["rows"]}
    assert all(f"{rows[what]:.2%}" in README for what in ("accuracy", "accuracy, flip averaged"))
