"""Random numbers that depend on what they are for, never on what was drawn before.

Data order, flips, timesteps, noise, label dropout and tie-breaks of a run all come from here. A run is therefore
resumed from one integer, the step, and does not depend on how many processes share the work.
"""

from __future__ import annotations

import zlib

import numpy as np


def random_stream(seed: int, purpose: str, index: int) -> np.random.Generator:
    """A generator for the ``index``-th use of ``purpose`` in a run with ``seed`` (both at least 0)."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), index])
    return np.random.Generator(np.random.Philox(sequence))
