"""One look for every progress bar and line beside it: redrawn in a terminal, plain lines in a log; rank 0 only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

from switchdit.ranks import launched_rank


class _Lines:
    """stderr for a log file: what a terminal would redraw becomes a line of its own."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            self.file.write(text + "\n")

    def flush(self) -> None:
        self.file.flush()


def progress(
    iterable: Iterable | None = None, *, desc: str, total: int | None = None, unit: str = "it", initial: int = 0
) -> tqdm:
    """A tqdm bar on stderr: redrawn in a terminal, a line about every ten seconds in a log."""
    terminal = sys.stderr.isatty()
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        unit=unit,
        initial=initial,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        disable=not _is_first(),
        mininterval=0.2 if terminal else 10.0,
        maxinterval=10.0,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
    )


class _Lasting:
    """A stream whose end, such as a terminal that was closed, does not end the program: the rest is dropped."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def outlive_terminal() -> None:
    """From now on standard output and error may vanish without ending the program."""
    sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)


def say(line: str) -> None:
    """Print a line to stdout without tearing a bar that is being drawn."""
    if not _is_first():
        return
    if sys.stderr.isatty():
        tqdm.write(line)
    else:
        print(line, flush=True)


def _is_first() -> bool:
    return launched_rank() == 0
