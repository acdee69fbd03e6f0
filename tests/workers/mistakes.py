"""Run switchdit/{train,sample}.py in this one process with each command line of a JSON list; print how each ended.

A process for each would cost seconds of imports.
"""

import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

name, command_lines = sys.argv[1], json.loads(sys.argv[2])
main, results = importlib.import_module(f"switchdit.{name}").main, []
for arguments in command_lines:
    sys.argv = [f"{name}.py", *arguments]
    printed, code = io.StringIO(), 0
    with contextlib.redirect_stderr(printed):
        try:
            main()
        except SystemExit as end:
            code = end.code
    results.append({"code": code, "stderr": printed.getvalue()})
print("RESULTS" + json.dumps(results), flush=True)
os._exit(0)  # threads of a process group that a mistake left are not Python's to end
