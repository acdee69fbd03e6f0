"""Run switchdit/train.py in this one process with each command line of a JSON list; print what each ended in.

A process for each would cost seconds of imports.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from switchdit.train import main

results = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["train.py", *arguments]
    printed, code = io.StringIO(), 0
    with contextlib.redirect_stderr(printed):
        try:
            main()
        except SystemExit as end:
            code = end.code
    results.append({"code": code, "stderr": printed.getvalue()})
print("RESULTS" + json.dumps(results), flush=True)
