"""Whose a run's folder is: that of whoever started last. ``owner.json`` in it names the process and its machine.

A run whose machine was cut off may go on for a while beside the one that was started in its place, and two may be
started by mistake. The older one must not write into the folder any more: it ends, and says why.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from pathlib import Path

from switchdit.engine.engine import agree, from_first
from switchdit.errors import UserError
from switchdit.files import write_json

FILE = "owner.json"
PATIENCE = 150.0  # seconds until a network's file system must have shown what another machine wrote; NFS takes up to 60


class Ownership:
    """Take the folder over; collective.

    Attributes:
        token: the same on all processes, and on no other start of the run.

    Raises:
        UserError: on all processes, if some of them see another folder under this path.
    """

    def __init__(self, run_dir: Path, is_first: bool):
        self.path, self.token = run_dir / FILE, from_first(secrets.token_hex(4))
        first_host = from_first(socket.gethostname())
        if is_first:
            write_json(self.path, {"host": first_host, "pid": os.getpid(), "token": self.token})
        from_first(None)  # it is written
        agree(lambda: self._wait_for_it(first_host))

    def _wait_for_it(self, first_host: str) -> None:
        until = time.monotonic() + PATIENCE
        while self._owner().get("token") != self.token:
            if time.monotonic() > until:
                raise UserError(
                    f"'{self.path.parent}' on {socket.gethostname()} is not the folder that process 0 on {first_host} "
                    "writes to; run_dir must be one that all machines share"
                )
            time.sleep(0.1)

    def check(self) -> None:
        """Raise `UserError` if the folder has been taken over since; reads one small file."""
        owner = self._owner()
        if owner.get("token") != self.token:
            raise UserError(
                f"'{self.path.parent}' has been taken over by a later start of the run, on {owner.get('host')} "
                f"(pid {owner.get('pid')}); this one ends"
            )

    def _owner(self) -> dict:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there yet, or no longer
            return {}
