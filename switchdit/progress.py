"""One look for every progress bar, quiet in log files and on all ranks but the first."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress(
    iterable: Iterable | None = None, *, desc: str, total: int | None = None, unit: str = "it", initial: int = 0
) -> tqdm:
    """A tqdm bar on stderr: redrawn in a terminal, one line about every ten seconds in a log; rank 0 only."""
    terminal = sys.stderr.isatty()
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        unit=unit,
        initial=initial,
        file=sys.stderr,
        disable=int(os.environ.get("RANK", "0")) != 0,
        mininterval=0.2 if terminal else 10.0,
        maxinterval=10.0,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
    )
