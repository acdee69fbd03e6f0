"""Checkpoints: whole or invisible, and nothing but tensors is unpickled."""

import errno
import json
import os
import pickle

import pytest
import torch

from switchdit.engine import checkpoint
from switchdit.engine.checkpoint import (
    TensorsOnlyCheckpointEngine,
    complete_checkpoints,
    find_checkpoint,
    read_state,
    remove_partial_checkpoints,
)
from switchdit.errors import UserError
from switchdit.files import atomic_write, sha256_of, write_json


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil_was_here",)


def test_code_in_a_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"module": Evil()}, "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        TensorsOnlyCheckpointEngine().load("evil.pt")
    assert not (tmp_path / "evil_was_here").exists()


def test_tensors_survive(tmp_path):
    engine = TensorsOnlyCheckpointEngine()
    state = {"a": torch.randn(3), "b": [1, {"c": torch.ones(2, dtype=torch.bfloat16)}]}
    engine.save(state, str(tmp_path / "x.pt"))
    loaded = engine.load(str(tmp_path / "x.pt"))
    assert torch.equal(loaded["a"], state["a"])
    assert torch.equal(loaded["b"][1]["c"], state["b"][1]["c"])


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    TensorsOnlyCheckpointEngine().save({"a": torch.zeros(3)}, str(path))
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as info:
        TensorsOnlyCheckpointEngine().save({"a": torch.ones(3)}, str(path))
    assert info.value.filename == str(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_torch_save_reports_a_full_disk_as_such():
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "wb") as file:
        torch.save({"a": torch.zeros(1_000_000)}, file)
        file.flush()


def make(root, step: int, **state):
    folder = root / checkpoint.checkpoint_name(step)
    folder.mkdir(parents=True)
    write_json(folder / "state.json", {"format_version": 1, "step": step, **state})
    return folder


def test_only_whole_checkpoints_are_found(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    old, new = make(root, 9), make(root, 1000)
    (root / ".partial_step_0002000").mkdir()
    (root / "step_0003000").mkdir()  # no state.json
    assert complete_checkpoints(root) == [old, new]
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(root) == find_checkpoint(new) == new
    assert find_checkpoint(old) == old
    remove_partial_checkpoints(root)
    assert not list(root.glob(".partial*"))
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path)


def test_unreadable_state(tmp_path):
    folder = make(tmp_path, 1)
    assert read_state(folder)["step"] == 1
    (folder / "state.json").write_text('{"format_version": 2}')
    with pytest.raises(UserError, match="another format than version 1"):
        read_state(folder)
    (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_state(folder)


def test_atomic_write_keeps_the_old_file_on_any_error(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})
    digest = sha256_of(path)
    with pytest.raises(KeyboardInterrupt), atomic_write(path, "w") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert sha256_of(path) == digest
    assert json.loads(path.read_text()) == {"a": 1}
    assert len(list(path.parent.iterdir())) == 1
