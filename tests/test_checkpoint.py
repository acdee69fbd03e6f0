"""Checkpoints of a run: whole or invisible, kept as asked for, and seen to be damaged."""

import errno
import json
import os
import shutil
import threading
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from deepspeed import comm as dist
from launching import free_port

from switchdit.engine import checkpoint, checkpoint_folder, ownership
from switchdit.engine.checkpoint import Checkpoints
from switchdit.engine.checkpoint_folder import (
    checkpoint_folders,
    complete_checkpoints,
    damage,
    find_checkpoint,
    read_ema,
    read_state,
    remove_partial_checkpoints,
    step_of,
    write_state,
)
from switchdit.engine.checkpoint_writer import SnapshotEngine, load_tensors, remove_folder, tensor_file, write_hashed
from switchdit.engine.engine import init_processes
from switchdit.engine.ownership import Ownership
from switchdit.engine.run_directory import check_unchanged
from switchdit.errors import FaultError, UserError
from switchdit.files import atomic_write, sha256_of, write_json


def make(root, step: int, **state):
    folder = root / checkpoint_folder.checkpoint_name(step)
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
    (root / "step_of_mine").mkdir()
    assert checkpoint_folders(root) == [old, new, root / "step_0003000"]
    remove_folder(old)
    assert complete_checkpoints(root) == [new]
    (root / ".removing_step_0000007").mkdir()
    remove_partial_checkpoints(root)
    assert not list(root.glob(".*"))
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path)


def test_unreadable_state(tmp_path):
    folder = make(tmp_path, 1)
    assert read_state(folder)["step"] == 1
    (folder / "state.json").write_text('{"format_version": 2}')
    with pytest.raises(UserError, match="is of format version 2; this program reads 1"):
        read_state(folder)
    (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_state(folder)


def test_damage_is_seen_and_named(tmp_path):
    folder = tmp_path / "step_0000001"
    folder.mkdir()
    files = {f"{i}.pt": write_hashed(folder / f"{i}.pt", tensor_file({"a": torch.arange(100)})) for i in range(5)}
    write_state(folder, {"format_version": 1, "step": 1, "files": files})
    assert damage(folder) is None
    path, whole = folder / "3.pt", (folder / "3.pt").read_bytes()
    path.write_bytes(whole[:-1])
    assert damage(folder) == f"3.pt has {len(whole) - 1:,} bytes instead of {len(whole):,}"
    path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    assert damage(folder) == "3.pt is not what was written (its SHA-256 differs)"
    seen_by = [damage(folder, rank, 3) for rank in range(3)]
    assert [problem is None for problem in seen_by] == [False, True, True]  # each looks at its share
    path.unlink()
    assert damage(folder) == "3.pt cannot be read: No such file or directory"
    path.write_bytes(whole)
    state = (folder / "state.json").read_text()
    (folder / "state.json").write_text(state.replace('"step": 1', '"step": 2'))
    assert damage(folder) == "state.json is not what was written (its SHA-256 differs)"
    (folder / "state.json").write_text(state.replace('"sha256": "', '"sha257": "'))
    assert damage(folder) == "state.json is not what was written (its SHA-256 differs)"
    (folder / "state.json").unlink()
    assert damage(folder) == "state.json cannot be read: No such file or directory"
    with pytest.raises(UserError, match=r"^checkpoint '.*step_0000001': state\.json cannot be read: No such file"):
        read_state(folder)


def test_what_is_no_damage_does_not_put_a_checkpoint_aside(tmp_path, monkeypatch):
    folder = tmp_path / "step_0000001"
    folder.mkdir()
    entry = write_hashed(folder / "a.pt", tensor_file({"a": torch.arange(100)}))
    write_state(folder, {"format_version": 2, "step": 1, "files": {"a.pt": entry}})
    with pytest.raises(UserError, match="is of format version 2; this program reads 1"):
        damage(folder)
    write_state(folder, {"format_version": 1, "step": 1, "files": {"a.pt": entry}})

    def unreadable(number):
        def read(path):
            raise OSError(number, os.strerror(number))  # as read() does, without a name

        return read

    monkeypatch.setattr(checkpoint_folder, "sha256_of", unreadable(errno.EACCES))
    with pytest.raises(FaultError, match=r"a\.pt cannot be read: Permission denied"):
        damage(folder)
    monkeypatch.setattr(checkpoint_folder, "sha256_of", unreadable(errno.EIO))
    assert damage(folder) == "a.pt cannot be read: Input/output error"
    renamed = folder.rename(tmp_path / "step_0000002")
    assert damage(renamed) == "it is of step 1: somebody has renamed it"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"../../passwd": {"bytes": 1, "sha256": "0"}}, "'../../passwd' is refused: it is no name of a file inside"),
        ({"/etc/passwd": {"bytes": 1, "sha256": "0"}}, "'/etc/passwd' is refused"),
        (["weights.pt"], "state.json has no table of files"),
        ({"weights.pt": 5}, "state.json has no table of files"),
        ({"weights.pt": {}}, "state.json has no table of files"),
    ],
)
def test_a_hostile_list_of_files_is_refused(tmp_path, files, says):
    write_state(tmp_path, {"format_version": 1, "step": 1, "files": files})
    assert says in damage(tmp_path)


def test_who_started_last_owns_the_run(run):
    _, checkpoints = run()
    run_dir = checkpoints.root.parent
    first = checkpoints.owner = Ownership(run_dir, is_first=True)
    checkpoints.save(1, ABOUT, {})
    checkpoints.finish()
    second = Ownership(run_dir, is_first=True)
    second.check()
    (checkpoints.root / ".partial_of_the_second").mkdir()
    checkpoints.save(2, ABOUT, {})
    with pytest.raises(UserError, match=r"has been taken over by a later start of the run, on .* \(pid \d+\)"):
        checkpoints.finish()
    with pytest.raises(UserError, match="has been taken over"):
        first.check()
    assert [step_of(path) for path in complete_checkpoints(checkpoints.root)] == [1]
    assert (checkpoints.root / ".partial_of_the_second").is_dir()


def test_an_earlier_start_that_still_writes_is_told(tmp_path):
    config = SimpleNamespace(run_dir=str(tmp_path))
    checkpoint = tmp_path / "checkpoints/step_0000003"
    check_unchanged(config, "auto", [])
    checkpoint.mkdir(parents=True)
    with pytest.raises(FaultError, match="was loading nothing: its newest checkpoint is step_0000003 now; start again"):
        check_unchanged(config, "auto", [])
    check_unchanged(config, "auto", [checkpoint])


def test_a_folder_that_is_not_shared_is_told(run, monkeypatch):
    _, checkpoints = run()
    monkeypatch.setattr(ownership, "PATIENCE", 0.3)
    with pytest.raises(
        UserError, match=r"is not the folder that process 0 on .* run_dir must be one that all machines"
    ):
        Ownership(checkpoints.root.parent / "another machine's", is_first=False)


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


class OneTensor:
    """As much of DeepSpeed's engine and of `Ema` as `Checkpoints` asks for, in one process."""

    def __init__(self):
        self.weight = torch.zeros(1000)
        self.module, self.device, self.checkpoint_engine = torch.nn.Linear(1, 1), torch.device("cpu"), SnapshotEngine()
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1.0)

    def save_checkpoint(self, root, tag, save_latest):
        self.checkpoint_engine.save({"weight": self.weight}, f"{root}/{tag}/weights.pt")

    def zero_optimization_stage(self):
        return 0

    def bfloat16_enabled(self):
        return False

    def state_dict(self):
        return {"weight": self.weight.clone()}


@pytest.fixture
def run(tmp_path, monkeypatch):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for variable, value in {**alone, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(variable, value)
    init_processes()
    (tmp_path / "checkpoints").mkdir()

    def make_run(**kept) -> tuple[OneTensor, Checkpoints]:
        engine = OneTensor()
        return engine, Checkpoints(tmp_path / "checkpoints", engine, engine, **kept)

    yield make_run
    dist.destroy_process_group()


ABOUT = {"model": {"name": "DiT-S/2"}}


def test_training_goes_on_while_a_checkpoint_is_written(run, monkeypatch):
    engine, checkpoints = run()
    write, hold = checkpoint.tensor_file, threading.Event()
    monkeypatch.setattr(checkpoint, "tensor_file", lambda state: lambda file: hold.wait() and write(state)(file))
    checkpoints.save(1, ABOUT, {})
    engine.weight += 7  # the next steps
    assert checkpoints.writer.busy
    assert complete_checkpoints(checkpoints.root) == []
    start = time.monotonic()
    threading.Timer(0.3, hold.set).start()
    checkpoints.save(2, ABOUT, {})  # waits for the first
    assert time.monotonic() - start > 0.2
    checkpoints.finish()
    one, two = complete_checkpoints(checkpoints.root)
    assert load_tensors(one / "weights.pt")["weight"].unique().tolist() == [0]
    assert load_tensors(two / "weights.pt")["weight"].unique().tolist() == [7]
    assert read_ema(one)["weight"].unique().tolist() == [0]
    assert damage(one) is damage(two) is None
    assert (checkpoints.root / "latest").read_text() == "step_0000002\n"


def test_what_is_kept(run):
    _, checkpoints = run(keep_last=2, keep_every=4)
    for step in range(1, 12):
        checkpoints.save(step, ABOUT, {})
    checkpoints.finish()
    assert [step_of(path) for path in complete_checkpoints(checkpoints.root)] == [4, 8, 10, 11]
    assert not list(checkpoints.root.glob(".*"))


def test_a_disk_too_small_is_told_before_anything_is_written(run, monkeypatch):
    _, checkpoints = run()
    checkpoints.save(1, ABOUT, {})
    checkpoints.finish()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 5000))
    before = sorted(checkpoints.root.rglob("*"))
    with pytest.raises(UserError, match=r"^the next checkpoint needs 0\.00101 GB, but the disk .* has 5e-06 GB left"):
        checkpoints.save(2, ABOUT, {})
    assert sorted(checkpoints.root.rglob("*")) == before
    monkeypatch.undo()
    checkpoints.save(2, ABOUT, {})
    checkpoints.finish()
    assert len(complete_checkpoints(checkpoints.root)) == 2


def test_a_checkpoint_that_cannot_be_written_is_told_and_leaves_nothing(run, monkeypatch):
    _, checkpoints = run()
    checkpoints.save(1, ABOUT, {})
    checkpoints.finish()

    def full(file):
        raise OSError(28, "No space left on device")

    def broken(file):
        raise RuntimeError("boom")

    def bad_disk(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for write, says in (
        (full, r"no space left on the disk that holds .*weights\.pt"),
        (broken, "cannot be written: RuntimeError: boom"),
        (bad_disk, r"weights\.pt cannot be written|cannot be written: Input/output error"),
    ):
        monkeypatch.setattr(checkpoint, "tensor_file", lambda state, write=write: write)
        checkpoints.save(2, ABOUT, {})
        with pytest.raises(UserError if write is full else FaultError, match=says):  # after a fault: start again
            checkpoints.finish()
    assert [p.name for p in sorted(checkpoints.root.iterdir())] == ["latest", "step_0000001"]
