"""One rank dies, stops or hangs: all others end in time, and one line names it. A healthy run ends without a word."""

import errno
import json
import multiprocessing
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launching import ROOT, WORKERS, free_port, launch
from workers.watchdog import start_rank

from switchdit import errors
from switchdit.engine import watchdog as watchdog_module
from switchdit.engine.engine import Processes
from switchdit.engine.verdicts import GRACE, SETTLE, Rank, judge
from switchdit.engine.watchdog import Watchdog
from switchdit.errors import FaultError, UserError, exit_on_user_error

HANG, PEER = 5.0, 4.0  # seconds of timeout
FULL = "no space left on the disk that holds /d/f; nothing half-written was kept"
SPARE = 3.0  # seconds that a busy machine may need beyond what is promised
ONE_THREAD = threading.Lock()  # starts a process or asks for its end: start() asks all, and only one is answered

WHO = r"error: rank {} \(host \S+, pid {}\) "
ENDED = WHO + r"ended without a word; last seen in step \d, forward"
SILENT = WHO + r"has given no sign of life for 4 s; last seen in step \d, forward"
PLACE = r"step 9, forward, at tests/workers/watchdog\.py:\d+ {}"
HANGS = WHO + r"has made no progress for 5 s: " + PLACE + "; the others wait for it"

# What befalls which rank of how many; the codes of all ranks; who tells it; what; the seconds until all have ended.
# A stopped rank ends only when the test kills it.
FAULTS = {
    "killed": (("kill", "1", 3), [1, -9, 1], [0], ENDED.format(1, "{pid}"), 2),
    "first killed": (("kill", "0", 3), [-9, 1, 1], [1, 2], ENDED.format(0, "{pid}"), 2),
    "left early": (("exit", "1", 2), [1, 0], [0], ENDED.format(1, "{pid}"), 2),
    "stopped": (("stop", "1", 3), [1, -9, 1], [0], SILENT.format(1, "{pid}"), PEER + 2),
    "first stopped": (("stop", "0", 2), [-9, 1], [1], SILENT.format(0, "{pid}"), PEER + 2),
    "sleeps": (("sleep", "1", 3), [1, 1, 1], [0], HANGS.format(1, "{pid}", "sleep"), HANG + 2),
    "first sleeps": (("sleep", "0", 2), [1, 1], [0], HANGS.format(0, "{pid}", "sleep"), HANG + 2),
    "loops": (("loop", "1", 2), [1, 1], [0], HANGS.format(1, "{pid}", "loop"), HANG + 2),
    "mismatch": (
        ("receive", "all", 3),
        [1, 1, 1],
        [0],
        r"error: no progress for 5 s of any rank, all wait for each other: ranks 0-2 in step 9, forward, "
        r"at tests/workers/watchdog\.py:\d+ everyone_receives",
        HANG + 2,
    ),
    "mistake": (("mistake", "1", 3), [2, 2, 2], [0], r"error: \(process 1\) latents/shard_7.npy is damaged", 4),
    "mistake of all": (("mistake", "all", 3), [2, 2, 2], [0], r"error: latents/shard_7.npy is damaged", 2),
    "bug": (("bug", "1", 2), [1, 1], [0], WHO.format(1, "{pid}") + "ended in step 9, forward: ValueError: of ours", 4),
}
HEALTHY = {
    "ends at different moments": ("none", "all", 3),
    "one works, the others wait": ("slow", "all", 2),
    "stopped for a moment": ("pause", "1", 2),
    "first stopped for a moment": ("pause", "0", 2),
}


@dataclass
class Ended:
    """Of each rank: exit code, process id, lines printed. seconds: from the fault until the last survivor's end."""

    codes: list[int]
    pids: list[int]
    lines: list[list[str]]
    seconds: float


def run(folder: Path, fault: str, rank: str, num_processes: int) -> Ended:
    folder.mkdir()
    shared = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    context = multiprocessing.get_context("forkserver")
    outputs = [folder / f"{r}.txt" for r in range(num_processes)]
    fault_file = folder / "fault"
    processes = []
    for r, output in enumerate(outputs):
        variables = {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}
        arguments = (variables, str(output), fault, rank, str(HANG), str(PEER), str(fault_file))
        processes.append(context.Process(target=start_rank, args=arguments))
        with ONE_THREAD:
            processes[-1].start()
    for r, process in enumerate(processes):
        if not (fault == "stop" and rank == str(r)):
            connection.wait([process.sentinel], 60)
    ended = time.monotonic()
    with ONE_THREAD:
        for process in processes:
            process.kill()
            process.join()
    return Ended(
        [process.exitcode for process in processes],
        [process.pid for process in processes],
        [output.read_text().splitlines() for output in outputs],
        ended - float(fault_file.read_text()) if fault_file.exists() else 0.0,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Ended]:
    """All of them, four at a time, for they mostly wait; without a launcher, which would end the ranks by itself."""
    folder = tmp_path_factory.mktemp("watchdog")
    everything = {**HEALTHY, **{name: run[0] for name, run in FAULTS.items()}}  # the longest first
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{WORKERS.parent}")
        multiprocessing.get_context("forkserver").set_forkserver_preload(["workers.watchdog"])
        futures = {name: pool.submit(run, folder / name, *what) for name, what in everything.items()}
        return {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_all_others_end_in_time(runs, name):
    (_, rank, _), codes, tellers, line, seconds = FAULTS[name]
    ended = runs[name]
    assert ended.codes == codes
    assert ended.seconds < seconds + SPARE
    expected = line.replace("{pid}", str(ended.pids[int(rank)])) if rank != "all" else line
    for r, lines in enumerate(ended.lines):
        if name == "bug" and str(r) == rank:
            assert lines[0].startswith("Traceback") and lines[-1] == "ValueError: of ours"
        elif r in tellers:
            assert len(lines) == 1 and re.fullmatch(expected, lines[0]), lines
        else:
            assert not lines


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_ends_without_a_word(runs, name):
    assert set(runs[name].codes) == {0}
    assert not any(runs[name].lines)


@pytest.mark.world_size(2)
def test_under_the_launcher():
    """It ends all processes of a node by itself soon after the first: the line comes before."""
    done = launch(2, WORKERS / "watchdog.py", "kill", 1, HANG, PEER)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and re.fullmatch(ENDED.format(1, r"\d+"), told[0]), done.stderr


# The judge.

ranks_alive = st.lists(
    st.builds(Rank, st.integers(0, 600), st.just("a"), st.just(1), step=st.integers(-1, 3), waits=st.booleans()),
    min_size=1,
    max_size=8,
    unique_by=lambda rank: rank.number,
)


@given(ranks_alive, st.data())
def test_whoever_is_silent_is_named_and_nobody_else(ranks, data):
    now = 100.0
    silent = data.draw(st.sets(st.sampled_from([rank.number for rank in ranks]), max_size=4))
    for rank in ranks:
        rank.heard = 30.0 if rank.number in silent else 95.0
    verdict = judge(ranks, now, now, 60.0, 600.0)
    named = {int(n) for n in re.findall(r"rank (\d+) \(", verdict.line)} if verdict else set()
    assert named == silent


@given(ranks_alive)
def test_a_standstill_names_ranks_that_do_not_wait(ranks):
    assert judge([Rank(0, "a", 1), Rank(1, "a", 2)], 601.0, 0.0, 0.0, 600.0) is None  # still before the first mark
    ranks = [Rank(601, "a", 1, step=0, marks=9), *ranks]
    verdict = judge(ranks, 601.0, 0.0, 0.0, 600.0)
    free = [rank.number for rank in ranks if not rank.waits]
    named = {int(n) for n in re.findall(r"rank (\d+) \(", verdict.line)}
    assert verdict.code == 1 and "no progress for 600 s" in verdict.line
    assert named <= set(free)
    assert named or len(free) in (0, len(ranks))
    assert judge(ranks, 599.0, 0.0, 0.0, 600.0) is None
    assert judge(ranks, 601.0, 0.0, 0.0, 0.0) is None


def test_on_a_gpu_nobody_seems_to_wait_and_whoever_is_behind_is_named():
    ranks = [Rank(r, "a", r, step=812, marks=2, phase="forward") for r in range(4)]
    ranks[2] = Rank(2, "b", 7, step=812, marks=1, phase="batch", where="switchdit/data/latent_dataset.py:123 moments")
    assert judge(ranks, 700.0, 0.0, 0.0, 600.0).line == (
        "rank 2 (host b, pid 7) has made no progress for 600 s: step 812, batch, at "
        "switchdit/data/latent_dataset.py:123 moments; the others wait for it"
    )
    together = [Rank(r, "a", r, step=812, marks=2, phase="forward") for r in (0, 1, 2, 5)]
    assert judge(together, 700.0, 0.0, 0.0, 600.0).line == (
        "no progress for 600 s of any rank, none waits in a collective: ranks 0-2, 5 in step 812, forward"
    )


def test_a_lost_machine_is_one_line():
    ranks = [Rank(r, "a", r, step=3, phase="step", heard=60.0) for r in range(8)]
    ranks += [Rank(r, "b", r, step=3, phase="step", heard=0.1 * r - 0.1) for r in range(8, 16)]
    line = judge(ranks, 61.0, 61.0, 60.0, 600.0).line
    assert line == (
        "rank 8 (host b, pid 8), rank 9 (host b, pid 9), rank 10 (host b, pid 10), rank 11 (host b, pid 11) and 4 more "
        "have given no sign of life for 60 s; last seen in step 3, step"
    )


def test_a_killed_rank_comes_before_those_that_stumble_over_it():
    ranks = [Rank(0, "a", 1), Rank(1, "a", 2, ended=10.0), Rank(2, "a", 3, ended=9.9, reason="RuntimeError: x")]
    assert judge(ranks, 10.0 + SETTLE / 2, 10.0, 60.0, 600.0) is None
    assert judge(ranks, 10.1 + SETTLE, 10.0, 60.0, 600.0).line.startswith("rank 1 (host a, pid 2) ended without a word")
    assert judge(ranks[::2], 9.9 + GRACE / 2, 10.0, 60.0, 600.0) is None
    assert "ended in the start, before the first step: RuntimeError: x" in judge(ranks[::2], 13.0, 13.0, 0, 0).line


# Rank 0 among strangers, in this process.


@pytest.fixture
def first(monkeypatch):
    """Rank 0 of two; the test plays the second. Yields the watchdog, its port, its token and the ends it orders."""
    told, ends = [], []

    def end(line, code):
        ends.append(code)
        errors.running_watchdog._ending.set()

    monkeypatch.setattr(watchdog_module.dist, "broadcast_object_list", lambda objects, src: told.extend(objects))
    monkeypatch.setattr(watchdog_module, "agree", lambda validate: validate())
    monkeypatch.setattr(watchdog_module, "_end", end)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    watchdog = Watchdog(Processes(0, 2, 0, torch.device("cpu")), 0.0, 1.0)
    yield watchdog, told[0][0], told[0][1], ends
    watchdog.stop()
    assert errors.running_watchdog is None


def connect(port: int, *lines: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=5)
    sock.sendall(b"".join(line + b"\n" for line in lines))
    return sock


def is_sent_away(port: int, *lines: bytes) -> bool:
    try:
        with connect(port, *lines) as stranger:
            return stranger.recv(1) == b""
    except ConnectionError:
        return True


HELLO = json.dumps({"number": 1, "host": "b", "pid": 4711}).encode()


def test_strangers_are_sent_away_and_a_goodbye_is_no_death(first):
    watchdog, port, token, ends = first
    assert is_sent_away(port, b"GET / HTTP/1.1")
    assert is_sent_away(port, b"0" * 32, HELLO)
    assert is_sent_away(port, b"[" * 1_000_000)  # neither a token nor the end of a line
    with connect(port, token, HELLO) as rank:
        assert json.loads(rank.makefile("rb").readline())["step"] == -1  # a sign of life of rank 0
        assert is_sent_away(port, token, HELLO)  # all are there
        rank.sendall(b'{"left": null, "code": 0}\n')
    time.sleep(1.5)
    assert not ends
    assert watchdog._thread.is_alive()


def test_a_peer_that_vanishes_or_is_silent_ends_the_run(first, capsys):
    watchdog, port, token, ends = first
    with connect(port, token, HELLO):
        watchdog._thread.join(PEER + SPARE)
    assert ends == [1]
    assert capsys.readouterr().err == (
        "error: rank 1 (host b, pid 4711) has given no sign of life for 1 s; last seen in the start, before the first "
        "step\n"
    )


def test_who_cannot_connect_says_so(monkeypatch):
    port = free_port()
    monkeypatch.setattr(
        watchdog_module.dist, "broadcast_object_list", lambda told, src: told.__setitem__(0, (port, b"t", "a", 1))
    )
    monkeypatch.setattr(watchdog_module, "agree", lambda validate: validate())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match=f"rank 3 on .* cannot reach rank 0 at 127.0.0.1, port {port}, .*refused"):
        Watchdog(Processes(3, 4, 3, torch.device("cpu")), 600.0, 60.0)
    assert errors.running_watchdog is None


def test_switched_off_it_does_nothing():
    watchdog = Watchdog(Processes(0, 8, 0, torch.device("cpu")), 0.0, 0.0)
    watchdog.reached("forward", 0)
    watchdog.wait_for_verdict()
    watchdog.stop()
    assert errors.running_watchdog is None


# How a program ends while a watchdog runs.


class Listener:
    """In place of a watchdog: what it is told."""

    def __init__(self):
        self.told = []

    def farewell(self, reason, code):
        self.told.append((reason, code))

    def wait_for_verdict(self):
        self.told.append("waits")


@pytest.mark.parametrize(
    ("problem", "rank", "told", "code", "printed"),
    [
        (UserError("x is 3"), 0, ("x is 3", 2), 2, r"error: x is 3\n"),
        (UserError("x is 3"), 1, ("x is 3", 2), 2, r""),
        (FaultError("ranks differ"), 1, ("ranks differ", 1), 1, r""),
        (KeyboardInterrupt(), 1, ("interrupted", 130), 130, r""),
        (OSError(errno.ENOSPC, "full", "/d/f"), 0, (FULL, 2), 2, rf"error: {FULL}\n"),
        (OSError(errno.ENOSPC, "full", "/d/f"), 1, (FULL, 2), 2, r""),
        (ValueError("a\nb"), 1, ("ValueError: a b", 1), 1, r"Traceback(.|\n)*ValueError: a\nb\n"),
        (RuntimeError("[x] Connection closed by peer"), 1, "waits", 1, r"error: rank 1 stops because another .*\n"),
    ],
)
def test_a_watchdog_is_told_why_a_program_ends(monkeypatch, capsys, problem, rank, told, code, printed):
    @exit_on_user_error
    def main():
        raise problem

    listener = Listener()
    monkeypatch.setattr(errors, "running_watchdog", listener)
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as info:
        main()
    assert (info.value.code, listener.told) == (code, [told])
    assert re.fullmatch(printed, capsys.readouterr().err)
