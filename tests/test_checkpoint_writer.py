"""Snapshots of DeepSpeed's files, written beside training; nothing but tensors is unpickled."""

import errno
import os
import pickle
import shutil
import threading
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchdit.engine import checkpoint_writer
from switchdit.engine.checkpoint_folder import complete_checkpoints, damage, write_state
from switchdit.engine.checkpoint_writer import (
    CheckpointWriter,
    SnapshotEngine,
    commit,
    host_bytes,
    load_tensors,
    tensor_file,
    to_host,
    write_hashed,
)
from switchdit.files import sha256_of


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil_was_here",)


def test_code_in_a_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"module": Evil()}, "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        SnapshotEngine().load("evil.pt")
    assert not (tmp_path / "evil_was_here").exists()


def test_tensors_survive(tmp_path):
    state = {"a": torch.randn(3), "b": [1, {"c": torch.ones(2, dtype=torch.bfloat16)}]}
    entry = write_hashed(tmp_path / "x.pt", tensor_file(state))
    assert entry == {"bytes": (tmp_path / "x.pt").stat().st_size, "sha256": sha256_of(tmp_path / "x.pt")}
    for mmap in (False, True):
        loaded = load_tensors(tmp_path / "x.pt", mmap=mmap)
        assert torch.equal(loaded["a"], state["a"])
        assert torch.equal(loaded["b"][1]["c"], state["b"][1]["c"])


def test_a_snapshot_does_not_change_with_training():
    whole = torch.arange(1000.0)
    state = {"view": whole[10:12], "list": [whole[0], (1, "x")], "ordered": OrderedDict(b=whole[3:4], a=2)}
    engine = SnapshotEngine()
    engine.save(state, "somewhere/x.pt")
    whole += 1
    taken = engine.take()["x.pt"]
    assert taken["view"].tolist() == [10, 11]
    assert taken["view"].untyped_storage().nbytes() == 8  # not the thousand values it is a view of
    assert (taken["list"][0].item(), taken["list"][1]) == (0, (1, "x"))
    assert list(taken["ordered"]) == ["b", "a"]
    assert host_bytes(taken) == 8 + 4 + 4
    assert engine.take() == {}


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.integers() | st.text() | st.none() | st.integers(0, 5).map(torch.arange),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=10,
    )
)
def test_snapshots_keep_every_shape_of_state(state):
    def same(a, b) -> bool:
        if isinstance(a, torch.Tensor):
            return (torch.equal(a, b) and a.data_ptr() != b.data_ptr()) or not a.numel()
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b

    assert same(state, to_host(state))


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    write_hashed(path, tensor_file({"a": torch.zeros(3)}))
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as info:
        write_hashed(path, tensor_file({"a": torch.ones(3)}))
    assert info.value.filename == str(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_not_hidden_by_torch():
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        tensor_file({"a": torch.zeros(1_000_000)})(checkpoint_writer._HashingFile(file))


def write_by(ranks: int, partial, finish, files=None) -> list[CheckpointWriter]:
    partial.mkdir()
    writers = [CheckpointWriter(rank, ranks) for rank in range(ranks)]
    for rank in reversed(range(ranks)):
        of_rank = {f"{rank}.pt": tensor_file({"rank": torch.tensor(rank)})} | (files or {}).get(rank, {})
        writers[rank].start(partial, of_rank, finish)
    return writers


def test_the_first_writer_waits_for_all_and_then_gives_the_name(tmp_path):
    partial, final, seen = tmp_path / ".partial_step_0000003", tmp_path / "step_0000003", {}

    def finish(files):
        seen.update(files)
        write_state(partial, {"format_version": 1, "step": 3, "files": files})
        commit(partial, final)

    hold = threading.Event()
    slow = {2: {"slow.pt": lambda file: hold.wait() and file.write(b"slow") and None}}
    writers = write_by(3, partial, finish, slow)
    assert writers[0].wait_until_written() is None
    assert not final.exists()
    assert complete_checkpoints(tmp_path) == []
    hold.set()
    for writer in writers:
        assert writer.wait_until_written() is None
    for writer in writers:
        writer.wait_until_finished()
    assert sorted(seen) == ["0.pt", "1.pt", "2.pt", "slow.pt"]
    assert sorted(p.name for p in final.iterdir()) == [*sorted(seen), "state.json"]
    assert (tmp_path / "latest").read_text() == "step_0000003\n"
    assert damage(final) is None


def test_the_folder_gets_its_name_as_soon_as_the_last_list_is_there(tmp_path, monkeypatch):
    """Also where that process comes no further just then: it must have nothing left to do in the folder."""
    partial, final, rename = tmp_path / ".partial_step_0000003", tmp_path / "step_0000003", os.replace
    named = threading.Event()

    def rename_and_fall_asleep(source, target):
        rename(source, target)
        if target == partial / "files_of_rank_00001.json":
            named.wait(timeout=30)

    def finish(files):
        commit(partial, final)
        named.set()

    monkeypatch.setattr(os, "replace", rename_and_fall_asleep)
    for writer in write_by(2, partial, finish):
        assert writer.wait_until_written() is None
        writer.wait_until_finished()
    assert sorted(p.name for p in final.iterdir()) == ["0.pt", "1.pt"]


def test_a_folder_that_was_deleted_and_made_again_is_not_waited_for(tmp_path):
    """By a later start of the run, and then by a process of this one that had a file to write."""
    partial, begun, slow = tmp_path / "partial", threading.Event(), threading.Event()

    def write_slowly(file) -> None:
        begun.set()
        slow.wait()
        file.write(b"slow")

    first, second = write_by(2, partial, lambda files: pytest.fail("incomplete"), {1: {"slow.pt": write_slowly}})
    assert first.wait_until_written() is None
    assert begun.wait(60)  # the second writes nothing more into the folder
    shutil.rmtree(partial)
    partial.mkdir()
    first.wait_until_finished()
    assert f"{partial} vanished while the checkpoint was written" in str(first.problem)
    slow.set()
    second.give_up()


def test_what_counts_as_progress_is_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "SYNC_EVERY", 100)
    synced, progress = [], []
    monkeypatch.setattr(os, "fdatasync", lambda file: synced.append(os.fstat(file).st_size))
    content = bytes(range(256)) * 2
    entry = write_hashed(
        tmp_path / "x", lambda file: [file.write(content[:30]), file.write(content[30:])], lambda: progress.append(1)
    )
    assert synced == [130, 230, 330, 430, 512]
    assert len(progress) == 6
    assert (tmp_path / "x").read_bytes() == content
    assert entry == {"bytes": 512, "sha256": sha256_of(tmp_path / "x")}


def test_a_writer_that_fails_keeps_the_checkpoint_from_its_name(tmp_path):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    writers = write_by(2, tmp_path / "partial", lambda files: pytest.fail("incomplete"), {1: {"x.pt": full}})
    assert writers[0].wait_until_written() is None
    problem = writers[1].wait_until_written()
    assert (
        str(problem) == f"no space left on the disk that holds {tmp_path}/partial/x.pt; nothing half-written was kept"
    )
    writers[0].give_up()
    writers[1].give_up()
    assert not (tmp_path / "latest").exists()
