"""Where this process is just now: in which line of the project, in a collective or not; for another thread."""

from __future__ import annotations

import linecache
import os
import sys
import threading
from pathlib import Path
from types import FrameType

import torch
from deepspeed import comm

PACKAGE = Path(__file__).resolve().parents[1]
COLLECTIVES = tuple(f"{Path(module.__file__).parent}{os.sep}" for module in (torch.distributed, comm))


def whereabouts() -> tuple[bool, str]:
    """Whether this process is inside a collective, and where its main thread is in the project's code."""
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    _, where = _innermost(frames[threading.main_thread().ident])
    return any(_innermost(frame)[0] for frame in frames.values()), where  # backward on a GPU has threads of its own


def _innermost(frame: FrameType | None) -> tuple[bool, str]:
    """Of one thread: whether the project's innermost frame has called a collective, and "file:line function"."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    # wait() of an asynchronous collective is C++: its caller is the last frame that Python knows
    # a frame that is just being set up has no line
    line = frame and frame.f_lineno and linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    waits = ".wait(" in (line or "")
    while frame:
        code = frame.f_code
        if code.co_filename.startswith(COLLECTIVES):
            waits = True
        elif code.co_filename == program or code.co_filename.startswith(f"{PACKAGE}{os.sep}"):
            file = os.path.relpath(code.co_filename, PACKAGE.parent)
            return waits, f"{file}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return waits, ""
