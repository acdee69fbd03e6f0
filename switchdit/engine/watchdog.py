"""A rank that dies or hangs is named, and all others end: no GPU waits for ever in a collective that cannot complete.

A thread of every rank tells rank 0 about once a second that its process lives, which mark of the training loop its main
thread has reached, and whether it waits in a collective. Rank 0 judges. At a fault it prints one line and tells the
others, and every process ends from this thread, whatever its main thread is stuck in. Where rank 0 itself is lost, the
others see it by themselves: the processes of its node print the line, and one of every other node.

    a process ends        all others end within 2 s (its connection closes), 4 s where it gave a reason
    a process is silent   for peer_timeout: stopped, its machine lost or cut off, its interpreter stuck
    no rank progresses    for hang_timeout: an endless loop, a dead file system, collectives that do not match

A mark that ANY rank reaches is progress of the run: one may write a checkpoint or draw a picture while the others wait.
Processor time is none: an endless loop uses it, and so does a collective that polls. So hang_timeout must be longer
than the longest work between two marks; before the first mark, while models are built and checkpoints loaded, it does
not run. Time in which the judge itself was stopped counts against nobody.

Plain sockets, not torch's TCPStore: its client blocks for ever, past its timeout, once the server's process is stopped.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import Any

from deepspeed import comm as dist

from switchdit import errors
from switchdit.engine.engine import Processes, agree
from switchdit.engine.verdicts import EXIT_FAULT, GRACE, Rank, Verdict, judge
from switchdit.engine.whereabouts import whereabouts
from switchdit.errors import UserError

CONNECT = 60.0  # seconds to reach rank 0
PATIENCE = 2.0  # seconds for what may block on the way out: a last line into a full pipe
LINGER = 0.5  # seconds in which rank 0, after a verdict, waits for the others to end before it
SOON = 0.05  # seconds between looks once somebody has ended
LIMIT = 1 << 16  # bytes of a line, and of lines that wait for a stopped receiver


class Watchdog:
    """Watches all ranks; collective. Timeouts in seconds; 0 switches that check off, two zeros all of it.

    Raises:
        UserError: where a rank cannot connect to rank 0.
    """

    def __init__(self, processes: Processes, hang_timeout: float, peer_timeout: float):
        self.processes, self.hang_timeout, self.peer_timeout = processes, hang_timeout, peer_timeout
        self._mark = (-1, 0, "")  # step, marks within it, phase
        self._thread = None
        timeouts = [timeout for timeout in (hang_timeout, peer_timeout) if timeout]
        if not timeouts:
            return
        often_enough = max(1.0, processes.world_size / 128)  # bounds what rank 0 has to read
        self.interval = min(often_enough, *(timeout / 10 for timeout in timeouts))
        self._clock = _AwakeClock(2 * self.interval)
        self._ending = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._me = Rank(processes.rank, socket.gethostname(), os.getpid())
        self._ranks = {processes.rank: self._me}  # of rank 0: all; of another: itself and rank 0
        self._peers: list[_Lines] = []  # of rank 0: to all others; of another: to rank 0
        self._someone_ended, self._moved, self._positions = False, 0.0, []
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        (self._join_as_first if processes.is_first else self._join)(os.environ.get("MASTER_ADDR", "127.0.0.1"))
        errors.running_watchdog = self

    def reached(self, phase: str, step: int) -> None:
        """The main thread enters ``phase`` ("batch", "forward", ...) of ``step``. Takes less than a microsecond."""
        last_step, marks, _ = self._mark
        self._mark = (step, marks + 1 if step == last_step else 1, phase)

    def stop(self) -> None:
        """Say goodbye and watch no longer; after rank 0's goodbye nobody is watched. Waits for no other process."""
        self.farewell(None, 0)

    def farewell(self, reason: str | None, code: int) -> None:
        """Tell the others why this process is about to end: they end too, with the same ``code``.

        They wait `GRACE` seconds first: what all meet alike, each ends with by itself. A rank with a reason waits until
        rank 0 has told it: many a launcher stops all processes of a node as soon as one of them ends.
        """
        if self._thread is None:
            return
        self._ending.set()
        self._wake.send(b"x")
        self._thread.join(PATIENCE)
        self._thread = None
        errors.running_watchdog = None
        self._selector.unregister(self._woken)
        self._send_all({"left": reason, "code": code, **self._position()})
        if reason is not None and not self.processes.is_first:
            self._linger(2 * GRACE)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        for end in (self._selector, self._wake, self._woken):
            end.close()

    def wait_for_verdict(self) -> None:
        """A collective has failed: leave the watchdog the time to name the rank and to end this process."""
        if self._thread is not None:
            self._thread.join(self.peer_timeout + GRACE + PATIENCE)

    # All connect to rank 0.

    def _join_as_first(self, address: str) -> None:
        loopback = address == "localhost" or address.startswith("127.")  # one machine: nothing is open to the network
        if loopback or not socket.has_dualstack_ipv6():
            self._listener = socket.create_server(("127.0.0.1" if loopback else "", 0), backlog=1024)
        else:
            self._listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._token = secrets.token_hex(16).encode()
        self._thread.start()
        port = self._listener.getsockname()[1]
        dist.broadcast_object_list([(port, self._token, self._me.host, self._me.pid)], src=0)
        agree(lambda: None)

    def _join(self, address: str) -> None:
        told = [None]
        dist.broadcast_object_list(told, src=0)
        port, token, host, pid = told[0]

        def connect() -> socket.socket:
            try:
                return socket.create_connection((address, port), timeout=CONNECT)
            except OSError as problem:
                raise UserError(
                    f"rank {self._me.number} on {self._me.host} cannot reach rank 0 at {address}, port {port}, to be "
                    f"watched: {problem}; faults.hang_timeout=0 faults.peer_timeout=0 do without"
                ) from None

        peer = _Lines(agree(connect))
        peer.rank = self._ranks[0] = Rank(0, host, pid)
        hello = {"number": self._me.number, "host": self._me.host, "pid": self._me.pid}
        peer.send(token + b"\n" + _encoded(hello))
        self._peers.append(peer)
        self._selector.register(peer.sock, selectors.EVENT_READ, peer)
        self._thread.start()

    # The thread.

    def _watch(self) -> None:
        beat_at = 0.0
        while not self._ending.is_set():
            ready = self._selector.select(SOON if self._someone_ended else max(0.0, beat_at - time.monotonic()))
            now = self._clock()
            for key, _ in ready:
                if key.data:
                    self._hear(key.data, now)
                elif self._ending.is_set():
                    return
                else:
                    self._accept()
            due = time.monotonic() >= beat_at
            if due:
                beat_at = time.monotonic() + self.interval
                self._beat(now)
            if due or self._someone_ended:
                self._look(now)

    def _beat(self, now: float) -> None:
        """Signs of life: rank 0's to all, another's to rank 0."""
        waits, where = whereabouts()
        message = {**self._position(), "waits": waits, "where": where}
        vars(self._me).update(message, heard=now)
        self._send_all(message)

    def _look(self, now: float) -> None:
        """Judge: on rank 0 all ranks, elsewhere rank 0 alone."""
        positions = [rank.position for rank in self._ranks.values()]
        if positions != self._positions:
            self._moved, self._positions = now, positions
        if self.processes.is_first:
            verdict = judge(list(self._ranks.values()), now, self._moved, self.peer_timeout, self.hang_timeout)
        else:
            verdict = judge([self._ranks[0]], now, self._moved, self.peer_timeout, 0.0)
        if verdict:
            self._execute(verdict)

    def _send_all(self, message: dict[str, Any]) -> None:
        line = _encoded(message)
        for peer in self._peers:
            peer.send(line)

    def _position(self) -> dict[str, Any]:
        return dict(zip(("step", "marks", "phase"), self._mark, strict=True))

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it has gone again
            peer = _Lines(self._listener.accept()[0], secret=self._token)
            self._selector.register(peer.sock, selectors.EVENT_READ, peer)

    def _hear(self, peer: _Lines, now: float) -> None:
        try:
            lines = peer.receive()
        except ConnectionError:
            self._drop(peer)
            if peer.rank and peer.rank.ended is None:
                peer.rank.ended, self._someone_ended = now, True
            return
        except OSError:  # its machine is out of reach: silence will tell
            self._drop(peer)
            return
        for line in lines:
            if peer.secret is None:
                self._take(peer, json.loads(line), now)
            elif hmac.compare_digest(line, peer.secret):
                peer.secret = None
            else:
                self._drop(peer)
                return

    def _take(self, peer: _Lines, message: dict[str, Any], now: float) -> None:
        if "verdict" in message:
            _end(None, message["verdict"])
        elif "left" not in message:
            if peer.rank is None:
                peer.rank = Rank(message["number"], "", 0)
                self._ranks[peer.rank.number] = peer.rank
                self._peers.append(peer)
                if len(self._ranks) == self.processes.world_size:
                    self._selector.unregister(self._listener)
                    self._listener.close()
            vars(peer.rank).update(message, heard=now)
        elif message["left"] is not None:
            message["reason"] = message.pop("left")
            vars(peer.rank).update(message, ended=now)
            self._someone_ended = True
        elif self.processes.is_first:
            del self._ranks[peer.rank.number]
            self._drop(peer)
        else:  # without rank 0 nobody watches
            self._ending.set()

    def _drop(self, peer: _Lines) -> None:
        self._selector.unregister(peer.sock)
        peer.sock.close()
        if peer in self._peers:
            self._peers.remove(peer)

    def _linger(self, seconds: float) -> None:
        """Until the others have ended."""
        until = time.monotonic() + seconds
        while self._peers and time.monotonic() < until:
            for key, _ in self._selector.select(seconds / 10):
                if key.data:
                    self._hear(key.data, 0.0)

    def _execute(self, verdict: Verdict) -> None:
        if self.processes.is_first:
            _say(verdict.line)
            self._send_all({"verdict": verdict.code})
            self._linger(LINGER)
            _end(None, verdict.code)
            return
        told_by_rank_0 = verdict.code != EXIT_FAULT  # before it ended
        speaks_for_node = self._me.host == self._ranks[0].host or self.processes.local_rank == 0
        _end(verdict.line if speaks_for_node and not told_by_rank_0 else None, verdict.code)


class _Lines:
    """Lines over a socket, without ever blocking. The first line received has to be ``secret``, if there is one."""

    def __init__(self, sock: socket.socket, secret: bytes | None = None):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.secret = sock, secret
        self.rank: Rank | None = None
        self.incoming = self.outgoing = b""

    def send(self, line: bytes) -> None:
        if len(self.outgoing) < LIMIT:
            self.outgoing += line
        with contextlib.suppress(OSError):  # its receiver is stopped, or has ended: silence or `receive` will tell
            self.outgoing = self.outgoing[self.sock.send(self.outgoing) :]

    def receive(self) -> list[bytes]:
        """Raises: ConnectionError: it has been closed."""
        chunk = self.sock.recv(LIMIT)
        self.incoming += chunk
        *lines, self.incoming = self.incoming.split(b"\n")
        if not chunk or len(self.incoming) > LIMIT:
            raise ConnectionResetError
        return lines


def _encoded(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


class _AwakeClock:
    """Seconds; of a pause between two calls no more than ``longest`` counts: then this process was stopped itself."""

    def __init__(self, longest: float):
        self.longest, self.last, self.awake = longest, time.monotonic(), 0.0

    def __call__(self) -> float:
        now = time.monotonic()
        self.awake += min(now - self.last, self.longest)
        self.last = now
        return self.awake


def _say(line: str | None) -> None:
    """Print ``line`` as an error and flush; given up after a while, for the pipe may be full and nobody reading it."""

    def write() -> None:
        if line:
            print(f"error: {line}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(PATIENCE)


def _end(line: str | None, code: int) -> None:
    _say(line)
    os._exit(code)
