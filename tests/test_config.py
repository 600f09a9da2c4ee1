"""A configuration file that cannot be used is refused in one line, with the file and the line in it."""

from pathlib import Path

import pytest

import train
from vit.config import ConfigError, check_config, configs_first, mentioned

MISTAKES = {
    "tab": (b"model:\n\tlr: 1\n", ", line 2: a tab, where YAML wants spaces"),
    "twice": (b"model:\n  lr: 1\n  depth: 2\n  lr: 2\n", ", line 4: 'lr' is there twice"),
    "twice at the top": (b"model: {}\ndata: {}\nmodel: {}\n", ", line 3: 'model' is there twice"),
    "no value": (
        b"data:\n  dataset: digits\n  augment:\n    # flip: 0.5\n",
        ", line 3: 'augment' has no value; ",
    ),
    "no value at the top": (b"data:\nmodel: {}\n", ", line 1: 'data' has no value; give it one, or null, or remove it"),
    "latin": ("model:\n  depth: 2 # grö\n".encode("latin-1"), ", line 2: no UTF-8; save the file as UTF-8"),
    "open bracket": (b"model:\n  resolution: [[0.4, 0.5]\ndata: {}\n", ", line 3: "),
    "empty": (b"", ": holds no settings"),
    "a list": (b"- model\n", ": holds no settings"),
    "a list of settings": (
        b"data:\n- batch_size: 4\n",
        ": data is [{'batch_size': 4}], where settings belong: 'NAME: V",
    ),
    "a number": (b"fit:\n  trainer: 5\n", ": trainer is 5, where settings belong"),
    "a name": (b"data:\n  augment: much\n", ": data.augment is 'much', where settings belong"),
    "control character": (b"model: \x00\n", ": no YAML ("),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_names_file_and_line(tmp_path, mistake):
    content, message = MISTAKES[mistake]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        check_config(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


def test_ours_are_good_and_merge_keys_are_no_repetition(tmp_path):
    for path in Path(__file__).parent.parent.glob("configs/*.yaml"):
        check_config(path)
    path = tmp_path / "anchors.yaml"
    path.write_text("model: &small\n  depth: 2\nmore:\n  <<: *small\n  depth: 3\n  a: null\n  b: ''\n  c: ~\n")
    check_config(path)
    check_config(tmp_path / "none.yaml")  # the parser says so


def test_settings_may_lie_in_a_file_of_their_own(tmp_path):
    (tmp_path / "model.yaml").write_text("depth: 2\n")
    for name in (f"{tmp_path}/model.yaml", "model.yaml"):
        (tmp_path / "mine.yaml").write_text(f"model: {name}\ndata:\n  augment: null\n")
        check_config(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text(f"model: {'x' * 5000}\n")
    with pytest.raises(ConfigError, match="where settings belong"):
        check_config(tmp_path / "mine.yaml")


def test_files_stand_before_the_options_that_are_laid_over_them():
    given = ["fit", "--a", "1", "-c", "x", "--config", "y", "--b=2", "--config=z", "-cv", "-c=w", "c", "--config"]
    assert configs_first(given) == [
        "fit",
        "-c",
        "x",
        "--config",
        "y",
        "--config=z",
        "-cv",
        "-c=w",
        "--config",
        "--a",
        "1",
        "--b=2",
        "c",
    ]


@pytest.mark.parametrize("form", ["--config={}", "--config {}", "-c {}", "-c{}", "-c={}", "--config=~/mine.yaml"])
def test_train_looks_at_them(tmp_path, capsys, monkeypatch, form):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "mine.yaml"
    path.write_text("model:\n\tlr: 1\n")
    assert train.main(["fit", *form.format(path).split()]) == 2
    assert f"train.py: {path}, line 2: a tab" in capsys.readouterr().err


def test_what_is_mentioned_of_a_model_in_every_form(tmp_path):
    """A default of the command line must not change what a pretrained model is, and what was asked for must."""
    names = ("plain", "dotted", "parted", "joined", "whole")
    plain, dotted, parted, joined, whole = (tmp_path / f"{name}.yaml" for name in names)
    plain.write_text("model: {lr: 1, depth: 2}\ndata: {dataset: digits}\n")
    dotted.write_text("model.pool: mean\n")
    parted.write_text("fit: {model: {stem: conv}}\n")
    joined.write_text("model: {qk_norm: true}\n")
    whole.write_text("model: other.yaml\n")
    files = ["--config", str(plain), f"--config={dotted}", "-c", str(parted), f"-c{joined}"]
    assert mentioned(["fit", *files, "--model.rope=true", "--model.depth", "3"], "model") == {
        *("lr", "depth", "pool", "stem", "qk_norm", "rope"),
    }
    for options in (["--model", "a.yaml"], ["--model={}"], ["--config", str(whole)]):
        with pytest.raises(ValueError, match="give the model's settings one by one"):
            mentioned(["fit", *files, *options], "model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("model: {image_size: 64}\n", "model.image_size follows from data.image_size: give that"),
        ("fit:\n  model: {white: 4095}\n", "model.white follows from data.white: give that"),
        ("model: {class_names: [a, b]}\n", "model.class_names comes from the images: leave it out"),
        ("data: {seed: 3}\n", "data.seed follows from seed_everything: give that"),
        ("checkpoint: {dirpath: there}\n", "checkpoint.dirpath follows from trainer.default_root_dir: give that"),
    ],
)
def test_what_follows_from_something_else_is_refused_and_not_passed_over(tmp_path, capsys, settings, message):
    (tmp_path / "mine.yaml").write_text(settings)
    given = ["--data.dataset", "digits", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps", "1"]
    assert train.main(["fit", "--config", f"{tmp_path}/mine.yaml", *given]) == 2
    assert capsys.readouterr().err == f"train.py: {message}\n"


def test_as_an_option_too_and_a_file_that_is_not_there_is_the_parsers_affair(tmp_path, capsys):
    assert train.main(["fit", "--data.dataset", "digits", "--model.image_size=64"]) == 2
    assert capsys.readouterr().err == "train.py: model.image_size follows from data.image_size: give that\n"
    assert train.main(["fit", "--config", f"{tmp_path}/none.yaml", "--model.image_size=64"]) == 2
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ("{class_path: EarlyStopping, init_args: {monitor: val/loss, patienc: 3}}", ": there is no option patienc"),
        (
            "{EarlyStopping: {monitor: val/loss}}",
            ": there is no option EarlyStopping.monitor; give a class as 'class_path: NAME', and its options below "
            "'init_args:'",
        ),
        (
            "{class_path: vit.watch.Watch, init_args: {every_n_epochs: often}}",
            ".every_n_epochs cannot be often; give a whole number",
        ),
        ("{class_path: vit.watch.Wotch}", " cannot be vit.watch.Wotch: module 'vit.watch' has no attribute 'Wotch'"),
        ("{class_path: EarlyStoping}", " cannot be EarlyStoping; give EarlyStopping?"),
    ],
)
def test_what_is_wrong_with_a_callback_of_a_file_is_named(tmp_path, capsys, callback, message):
    (tmp_path / "mine.yaml").write_text(f"trainer:\n  callbacks:\n    - {callback}\n")
    assert train.main(["fit", "--config", f"{tmp_path}/mine.yaml", "--data.dataset", "digits"]) == 2
    assert capsys.readouterr().err == f"train.py: trainer.callbacks{message}\n"
