"""Where this process is just now: in which line of the project, in a collective or not; for another thread."""

from __future__ import annotations

import dis
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
    # wait() of an asynchronous collective is C++: its caller is the last frame that Python knows. No file is read: what
    # it lies on may be what hangs.
    waits = frame is not None and _calls(frame) == "wait"
    while frame:
        code = frame.f_code
        if code.co_filename.startswith(COLLECTIVES):
            waits = True
        elif code.co_filename == program or code.co_filename.startswith(f"{PACKAGE}{os.sep}"):
            file = os.path.relpath(code.co_filename, PACKAGE.parent)
            return waits, f"{file}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return waits, ""


def _calls(frame: FrameType) -> str | None:
    """The method whose call a frame is in, by its bytecode."""
    method = None
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset > frame.f_lasti:
            break
        if instruction.opname in ("LOAD_METHOD", "LOAD_ATTR"):
            method = instruction.argval
    return method
