"""The folder of a run: one run at a time, an earlier one is put aside whole, and what is not a run's stays."""

import subprocess
import sys
from pathlib import Path

import pytest

from vit.folder import check_writable, locked, of_another, put_aside, put_back, refuse_foreign

ROOT = Path(__file__).parent.parent
RUN = {  # what a run leaves, and measurements of it
    "config.yaml", "metrics.csv", "hparams.yaml", "last.ckpt", "best.ckpt", "model.safetensors",
    "events.out.tfevents.1.host", "test/config.yaml", "test/metrics.csv", "test/confusion.csv",
    "test/events.out.tfevents.2.host", "validate/metrics.csv", "checkpoints/epoch=1.ckpt",
}  # fmt: skip
OTHERS = {"notes.txt", "images/cat.png", "test/cat/1.png"}


def fill(root: Path, names: set[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_one_run_in_a_folder(tmp_path):
    code = "import sys, vit.folder\nwith vit.folder.locked(vit.folder.Path(sys.argv[1])): pass"
    with locked(tmp_path):
        other = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert f"{tmp_path}: another run trains here; " in other.stderr
    assert subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT).returncode == 0


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/run: cannot be made"), locked(tmp_path / "file" / "run"):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    check_writable(tmp_path / "run" / "test")
    assert (tmp_path / "run" / "test").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/test: cannot be written \(Not a directory\)"):
        check_writable(tmp_path / "file" / "test")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # a read-only file system, to root too
    with pytest.raises(ValueError, match=r"run: cannot be written \(Permission denied\)"):
        check_writable(tmp_path / "run")


def test_a_run_moves_whole_and_alone(tmp_path, capsys):
    fill(tmp_path, RUN | OTHERS)
    aside = put_aside(tmp_path)
    assert aside
    assert aside == tmp_path / "previous"
    assert files(aside) == RUN
    assert files(tmp_path) == OTHERS | {"config.yaml"} | {f"previous/{name}" for name in RUN}  # it may be in use
    assert not any((tmp_path / name).exists() for name in ("validate", "checkpoints"))
    assert f"the run that was here is in {aside}" in capsys.readouterr().err
    fill(tmp_path, {"config.yaml", "model.safetensors"})
    assert put_aside(tmp_path) == tmp_path / "previous-2"
    assert f"--model.pretrained {tmp_path / 'previous-2' / 'model.safetensors'}" in capsys.readouterr().err
    assert (tmp_path / "test/cat/1.png").exists()


def test_a_run_that_was_put_aside_comes_back_in_place_of_one_that_did_not_begin(tmp_path):
    fill(tmp_path, RUN | OTHERS)
    aside = put_aside(tmp_path)
    assert aside
    fill(tmp_path, {"config.yaml", "events.out.tfevents.3.host"})
    put_back(tmp_path, aside)
    assert files(tmp_path) == RUN | OTHERS
    assert not aside.exists()


def test_whose_run_a_checkpoint_is_of(tmp_path):
    fill(tmp_path, RUN | {"best three/1.ckpt"})
    aside = put_aside(tmp_path)
    assert aside
    fill(tmp_path, RUN)
    own = ("last.ckpt", "best three/1.ckpt")
    assert [of_another(tmp_path / name, tmp_path) for name in own] == [False, False]
    assert of_another(aside / "last.ckpt", tmp_path)
    assert of_another(tmp_path / "last.ckpt", aside)


def test_no_run_is_put_aside_where_none_is(tmp_path):
    fill(tmp_path, OTHERS | {"config.yaml"})
    assert put_aside(tmp_path) is None
    assert files(tmp_path) == OTHERS | {"config.yaml"}


@pytest.mark.parametrize("sign", ["last.ckpt", "metrics.csv", ".lock"])
def test_a_config_that_no_run_left_is_not_overwritten(tmp_path, sign):
    refuse_foreign(tmp_path)
    fill(tmp_path, {"config.yaml"})
    with pytest.raises(ValueError, match=r"config\.yaml: of no run, and would be overwritten"):
        refuse_foreign(tmp_path)
    fill(tmp_path, {sign})
    refuse_foreign(tmp_path)
