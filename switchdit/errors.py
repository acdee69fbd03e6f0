"""Mistakes of a user end in one line on stderr and exit code 2; mistakes of ours end in a traceback."""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable

from switchdit.ranks import launched_rank

EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: stopped by the scheduler, all is saved; the same command resumes
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
# what gloo, NCCL and torch's store report of it
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "Failed to recv")
LOST_PEER_ERRORS = ("DistBackendError", "DistNetworkError")

PASSWORD = re.compile(r"(?<=://)[^/\s@]+@")

# A switchdit.engine.watchdog.Watchdog puts itself here while it runs: it tells all ranks why one of them ends.
running_watchdog = None


class UserError(ValueError):
    """Something the user can put right. The message is one line: the thing, its value, what would be valid."""


class FaultError(Exception):
    """A machine's fault that all processes know of: one line and exit code 1, for a new start from a checkpoint."""


def nearest(name: str, valid: Iterable[str], described: str | None = None) -> str:
    """A hint for a misspelt name: ``"; did you mean 'top_k'?"``, or what is valid (all, or ``described``)."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; valid are: {described or ', '.join(valid)}"


def exit_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Decorator for a program's ``main``: `UserError` and a full disk become ``error: ...`` and exit code 2.

    Ctrl-C ends with "interrupted" and code 130.
    All processes of a launcher meet the same `UserError`: only rank 0 prints it. A full disk is told by the rank that
    met it; the others, which lose the connection to it, say so in a line and end with code 1. Where a watchdog runs,
    what a single rank meets is told once, by rank 0, and names that rank; a lost connection is told by the watchdog.
    Where nobody reads the output any more, as after ``| head``, it ends as other programs do, with code 141.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        rank = launched_rank()
        try:
            main(*args, **kwargs)
            sys.stdout.flush()
        except UserError as mistake:
            _farewell(str(mistake), EXIT_USER_ERROR)
            end(str(mistake) if rank == 0 else None)
        except FaultError as fault:
            _farewell(str(fault), 1)
            end(str(fault) if rank == 0 else None, code=1)
        except KeyboardInterrupt:
            _farewell("interrupted", 128 + signal.SIGINT)
            if rank == 0:
                print("interrupted", file=sys.stderr, flush=True)
            sys.exit(128 + signal.SIGINT)
        except OSError as problem:
            if isinstance(problem, BrokenPipeError) and _output_is_closed():
                _farewell("nobody reads the output any more (broken pipe)", EXIT_BROKEN_PIPE)
                sys.exit(EXIT_BROKEN_PIPE)
            if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
                _end_of_ours(problem)
                raise
            where = problem.filename or "the output"
            message = f"no space left on the disk that holds {where}; nothing half-written was kept"
            told_by_rank_0 = _farewell(message, EXIT_USER_ERROR) and rank != 0
            end(None if told_by_rank_0 else message)
        except Exception as problem:
            told = isinstance(problem, RuntimeError) and any(sign in str(problem) for sign in LOST_PEER)
            if not (told or type(problem).__name__ in LOST_PEER_ERRORS):
                _end_of_ours(problem)
                raise
            if running_watchdog:
                running_watchdog.wait_for_verdict()
            end(f"rank {rank} stops because another process has ended", code=1)

    return wrapped


def _output_is_closed() -> bool:
    """Whether it is standard output whose reader has gone; it leads nowhere then, so that Python can end in peace."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def run_and_end(main: Callable[[], None]) -> None:
    """Run ``main``, and end the process with its exit code where it stands.

    Python's own way out aborts the process (SIGABRT) where a thread is inside torch, such as one that writes a
    checkpoint.
    """
    code = 0
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def _farewell(reason: str, code: int) -> bool:
    """Whether a watchdog runs, which then tells the others."""
    if running_watchdog is None:
        return False
    running_watchdog.farewell(reason, code)
    return True


def _end_of_ours(problem: Exception) -> None:
    """With a watchdog: the traceback, then the others learn of it, and this process ends; else nothing."""
    if running_watchdog:
        traceback.print_exception(problem)
        _farewell(" ".join(f"{type(problem).__name__}: {problem}".split())[:200], 1)
        sys.exit(1)


def end(message: str | None, code: int = EXIT_USER_ERROR) -> None:
    """Leave the program with ``error: <message>`` on stderr, or without a word."""
    if message:
        print(f"error: {without_passwords(message)}", file=sys.stderr, flush=True)
    sys.exit(code)


def without_passwords(text: str) -> str:
    """``text`` with what stands before the @ of addresses left out: ``https://***@host/...``."""
    return PASSWORD.sub("***@", text)
