"""Mistakes of a user end in one line on stderr and exit code 2; mistakes of ours end in a traceback."""

from __future__ import annotations

import difflib
import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable

EXIT_USER_ERROR = 2
LOST_PEER = ("Connection closed by peer", "Connection reset by peer")  # what gloo reports


class UserError(ValueError):
    """Something the user can put right. The message is one line: the thing, its value, what would be valid."""


def nearest(name: str, valid: Iterable[str], described: str | None = None) -> str:
    """A hint for a misspelt name: ``"; did you mean 'top_k'?"``, or what is valid (all, or ``described``)."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; valid are: {described or ', '.join(valid)}"


def exit_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Decorator for a program's ``main``: `UserError` and a full disk become ``error: ...`` and exit code 2.

    Ctrl-C ends with "interrupted" and code 130.
    All processes of a launcher meet the same `UserError`: only rank 0 prints it. A full disk is told by the rank that
    met it; the others, which lose the connection to it, say so in a line and end with code 1.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        rank = int(os.environ.get("RANK", "0"))
        try:
            return main(*args, **kwargs)
        except UserError as mistake:
            end(str(mistake) if rank == 0 else None)
        except KeyboardInterrupt:
            if rank == 0:
                print("interrupted", file=sys.stderr, flush=True)
            sys.exit(128 + signal.SIGINT)
        except OSError as problem:
            if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = problem.filename or "the output"
            end(f"no space left on the disk that holds {where}; nothing half-written was kept")
        except RuntimeError as problem:
            if not any(sign in str(problem) for sign in LOST_PEER):
                raise
            end(f"rank {rank} stops because another process has ended", code=1)

    return wrapped


def end(message: str | None, code: int = EXIT_USER_ERROR) -> None:
    """Leave the program with ``error: <message>`` on stderr, or without a word."""
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
