"""Files of checkpoints: replaced in one step or not at all, and never in silence."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from vit.saving import Best, CheckpointFile, SaveError

OLD, NEW = {"weight": torch.zeros(5000)}, {"weight": torch.ones(5000), "names": ["a", "b"], "step": 3}


@pytest.fixture
def last(tmp_path) -> Path:
    """A file that was saved before."""
    CheckpointFile().save_checkpoint(OLD, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def is_old(path: Path) -> bool:
    return torch.equal(CheckpointFile().load_checkpoint(path)["weight"], OLD["weight"])


def test_reads_what_was_written_and_leaves_nothing_else(last):
    CheckpointFile().save_checkpoint(NEW, last)
    found = CheckpointFile().load_checkpoint(last)
    assert torch.equal(found.pop("weight"), NEW["weight"])
    assert found == {"names": ["a", "b"], "step": 3}
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def test_makes_the_folder(tmp_path):
    CheckpointFile().save_checkpoint(NEW, tmp_path / "a/b/last.ckpt")
    assert (tmp_path / "a/b/last.ckpt").is_file()


def test_partial_file_of_a_killed_run_is_replaced(last):
    (last.parent / ".last.ckpt.partial").write_bytes(b"x" * 1_000_000)
    CheckpointFile().save_checkpoint(NEW, last)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
    assert not is_old(last)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_full_disk(last):
    (last.parent / ".last.ckpt.partial").symlink_to("/dev/full")
    with pytest.raises(SaveError) as caught:
        CheckpointFile().save_checkpoint(NEW, last)
    assert (
        str(caught.value)
        == f"{last}: the checkpoint could not be saved (No space left on device); the previous one is kept"
    )
    assert is_old(last)


@pytest.mark.parametrize("chained", [True, False])
def test_what_the_system_said_is_found_below_what_a_library_made_of_it(last, monkeypatch, chained):
    def fail(checkpoint, file):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            if chained:
                raise RuntimeError("unexpected pos 64 vs 0") from error
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(SaveError, match=r"last\.ckpt: .* \(No space left on device\); the previous one is kept"):
        CheckpointFile().save_checkpoint(NEW, last)
    assert is_old(last)


def test_refused_name(last, monkeypatch):
    """What Lightning's own writer takes for a success."""

    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SaveError, match=r"last\.ckpt: .*\(Permission denied\); the previous one is kept"):
        CheckpointFile().save_checkpoint(NEW, last)
    assert is_old(last)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(SaveError, match=r"runs/last\.ckpt: .*\(File exists\)$"):
        CheckpointFile().save_checkpoint(NEW, tmp_path / "runs/last.ckpt")


@pytest.mark.parametrize("damage", ["bit", "end"])
def test_disk_that_does_not_keep_what_it_took(last, monkeypatch, damage):
    """A flipped bit, or a file cut short, between writing and reading back."""

    def lossy(descriptor: int) -> None:
        path = last.parent / ".last.ckpt.partial"
        content = bytearray(path.read_bytes())
        where = content.index(b"\x00\x00\x80\x3f" * 100) + 200  # among the weights, all 1.0
        content[where] ^= 1
        path.write_bytes(content if damage == "bit" else content[:where])

    monkeypatch.setattr(os, "fsync", lossy)
    with pytest.raises(SaveError, match=r"last\.ckpt: the checkpoint could not be saved .*the previous one is kept"):
        CheckpointFile().save_checkpoint(NEW, last)
    monkeypatch.undo()
    assert is_old(last)


def test_forced_to_the_disk_before_it_takes_the_name(last, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda source, target: (order.append("replace"), replace(source, target)))
    CheckpointFile().save_checkpoint(NEW, last)
    assert order == ["fsync", "replace", "fsync"]  # content, name, folder


def test_the_best_of_an_older_file_is_found_again():
    """By what it was kept under when a plain ModelCheckpoint kept it."""
    what: dict[str, Any] = {"monitor": "val/acc", "mode": "max"}
    assert Best(**what)._legacy_state_key == ModelCheckpoint(**what).state_key != Best(**what).state_key
    assert Best(**what, every_n_epochs=3).state_key == Best(**what).state_key


class Code:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("weights_only", [None, True, False])
def test_code_in_a_file_is_refused(tmp_path, weights_only):
    torch.save({"state_dict": Code(tmp_path / "marker")}, tmp_path / "last.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        CheckpointFile().load_checkpoint(tmp_path / "last.ckpt", weights_only=weights_only)
    assert not (tmp_path / "marker").exists()
