"""What schedulers send before they take a machine away: noted at once, acted on between two steps."""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received: list[int] = []


def note_stop_signals() -> None:
    """From now on `STOP_SIGNALS` do not end this process; they are kept for `stop_requested`."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: _received.append(number))


def stop_requested() -> bool:
    return bool(_received)
