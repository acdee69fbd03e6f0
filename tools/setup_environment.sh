#!/usr/bin/env bash
# Make .venv with the pinned packages of requirements.lock, once; called by the Makefile.
#
#   PYTHON   interpreter to use, CPython 3.10 to 3.12 (default: the first suitable of python3, python3.12, .11, .10)
#
# On a machine without an NVIDIA GPU the CPU build of torch saves a download of some gigabytes: let pip see an index
# that has it, e.g. PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $*" >&2; exit 2; }
suitable='import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'

stamp=.venv/.installed
wanted=$(cat requirements.lock pyproject.toml | sha256sum | cut -d' ' -f1)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

if [ -n "${PYTHON:-}" ]; then
    "$PYTHON" -c "$suitable" 2>/dev/null || fail "PYTHON=$PYTHON ($("$PYTHON" --version 2>&1 | head -n 1)) cannot be used; CPython 3.10, 3.11 or 3.12 with the venv module is needed"
    python=$PYTHON
else
    python=
    for candidate in python3 python3.12 python3.11 python3.10; do
        if "$candidate" -c "$suitable" >/dev/null 2>&1; then python=$candidate; break; fi
    done
    [ -n "$python" ] || fail "no CPython 3.10, 3.11 or 3.12 with the venv module found (python3 is $(python3 --version 2>&1 | head -n 1)); install one, or name it: make PYTHON=/path/to/python3.12 ..."
fi

echo "setting up .venv with $("$python" --version) and the packages of requirements.lock (once; a minute or more)"
[ -x .venv/bin/python ] && .venv/bin/python -c "$suitable" 2>/dev/null || "$python" -m venv --clear .venv
log=.venv/setup.log
if ! { DS_BUILD_OPS=0 .venv/bin/python -m pip install --disable-pip-version-check -r requirements.lock &&
       .venv/bin/python -m pip install --disable-pip-version-check --no-deps -e .; } >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    fail "the packages could not be installed (whole log: $log); is a package index reachable, and is there disk space?"
fi
echo "$wanted" >"$stamp"
