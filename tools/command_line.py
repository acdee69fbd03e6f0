"""What tools that a launcher may start share at the command line: mistakes told once, signals told truly."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from switchdit.errors import UserError
from switchdit.ranks import launched_rank


def told_by_rank_0(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, which says nothing in the other processes of a launcher; it takes the launcher's --local_rank."""
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    if launched_rank():
        parser.error = lambda _: sys.exit(2)
        parser.print_help = lambda *_: None
    return parser


def check_one_process(program: str) -> None:
    """Raise `UserError` when a launcher started several processes of a program that does not share its work."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{program} runs in one process; start it without a launcher")


@contextlib.contextmanager
def told_when_stopped(out: Path | None) -> Iterator[None]:
    """Interrupts leave the block with a line in place of a traceback, and the exit code of a shell.

    A launcher ends its processes with SIGTERM, also where the mistake of another is the reason, which that one tells.
    out: the folder that keeps finished shards, if there is one.
    """
    from switchdit.data.latent_shards import CONTINUE

    try:
        yield
    except KeyboardInterrupt as stop:
        terminated = stop.args == (signal.SIGTERM,)
        if launched_rank() == 0:
            line = "stopped by a signal" if terminated else "interrupted"
            line += f"; finished shards are kept in {out}" if out else ""
            line += f": {CONTINUE}" if out and not terminated else ""
            print(f"\n{line}", file=sys.stderr, flush=True)
        sys.exit(128 + (signal.SIGTERM if terminated else signal.SIGINT))


def interrupt_on_sigterm() -> None:
    """From now on SIGTERM ends the program as Ctrl-C does, so that it clears up."""

    def stop(number, _):
        raise KeyboardInterrupt(signal.Signals(number))

    signal.signal(signal.SIGTERM, stop)
