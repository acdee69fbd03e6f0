"""What a user sees of a mistake, of a full disk and of a lost process."""

import errno
import os
import subprocess
import sys

import pytest
from launching import ROOT, environment

from switchdit.errors import UserError, exit_on_user_error, nearest


def ends(problem: BaseException, rank: int, monkeypatch, capsys) -> tuple[int, str]:
    monkeypatch.setenv("RANK", str(rank))

    @exit_on_user_error
    def main():
        raise problem

    with pytest.raises(SystemExit) as info:
        main()
    return info.value.code, capsys.readouterr().err


def test_a_mistake_is_told_once(monkeypatch, capsys):
    assert ends(UserError("x is 3"), 0, monkeypatch, capsys) == (2, "error: x is 3\n")
    assert ends(UserError("x is 3"), 1, monkeypatch, capsys) == (2, "")


def test_a_full_disk_is_told_by_whoever_meets_it(monkeypatch, capsys):
    code, text = ends(OSError(errno.ENOSPC, "No space left on device", "/d/file"), 1, monkeypatch, capsys)
    assert code == 2
    assert text == "error: no space left on the disk that holds /d/file; nothing half-written was kept\n"


def test_ctrl_c_is_a_word(monkeypatch, capsys):
    assert ends(KeyboardInterrupt(), 0, monkeypatch, capsys) == (130, "interrupted\n")
    assert ends(KeyboardInterrupt(), 1, monkeypatch, capsys) == (130, "")


def test_a_lost_process_is_no_traceback(monkeypatch, capsys):
    lost = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:15014")
    assert ends(lost, 3, monkeypatch, capsys) == (1, "error: rank 3 stops because another process has ended\n")


@pytest.mark.parametrize("problem", [ValueError("ours"), RuntimeError("ours"), OSError(errno.EACCES, "no")])
def test_our_own_mistakes_keep_their_traceback(problem):
    @exit_on_user_error
    def main():
        raise problem

    with pytest.raises(type(problem)) as info:
        main()
    assert info.value is problem


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_is_no_mistake(lines):
    """As ``| head`` does: met while printing or, where little is printed, only at the end."""
    program = f"from switchdit.errors import exit_on_user_error as e; e(lambda: print('line\\n' * {lines}))()"
    reading, writing = os.pipe()
    os.close(reading)
    for unbuffered in ("", "1"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=environment(PYTHONUNBUFFERED=unbuffered),
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (141, "")
    os.close(writing)


def test_a_broken_pipe_of_another_kind_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)

    @exit_on_user_error
    def main():
        raise BrokenPipeError(errno.EPIPE, "of a socket")

    with pytest.raises(BrokenPipeError, match="of a socket"):
        main()


ENDING = """
import threading, torch
from switchdit.engine.checkpoint_writer import CheckpointWriter, tensor_file
from switchdit.errors import UserError, exit_on_user_error, run_and_end

@exit_on_user_error
def main():
    started, writer = threading.Event(), CheckpointWriter(0, 1, lambda: None)
    state = {str(i): torch.zeros(1 << 20) for i in range(100)}
    def write(file):
        started.set()
        return tensor_file(state)(file)
    writer.start(FOLDER, {"x.pt": write}, lambda files: None)
    started.wait()
    raise UserError("log_every is -1")

run_and_end(main)
"""


def test_a_mistake_while_a_thread_writes_a_checkpoint_keeps_its_code(tmp_path):
    """Python's own way out would end in SIGABRT, and the launchers would take it for a fault and start again."""
    program = ENDING.replace("FOLDER", f"__import__('pathlib').Path({str(tmp_path)!r})")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "error: log_every is -1")


@pytest.mark.parametrize(("what", "code"), [("sys.exit()", 0), ("sys.exit(75)", 75), ("sys.exit('no')", 1), ("1/0", 1)])
def test_the_code_is_that_of_python(what, code):
    program = f"import sys; from switchdit.errors import run_and_end; run_and_end(lambda: {what})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("ZeroDivisionError" in done.stderr) == (what == "1/0")


def test_hints():
    assert nearest("num_expert", ["num_experts", "top_k"]) == "; did you mean 'num_experts'?"
    assert nearest("zzz", ["b", "a"]) == "; valid are: a, b"
