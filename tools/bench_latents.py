"""Measure how fast a data set of latents is read, in one process.

    python tools/bench_latents.py --latents DIR [--batch-size 256] [--seconds 5]

Prints the time to open it, the memory that takes beside the page cache, and samples a second in random order: of the
moments alone, and of whole training batches with their random numbers. The first pass warms the page cache.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import from the repository root

# OpenMP's threads otherwise spin while they wait, which costs a factor of ten where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from switchdit.data.latent_dataset import LatentDataset
from switchdit.data.training_batches import EpochOrder, make_batch
from switchdit.errors import UserError, exit_on_user_error

PASSES = 3


def anonymous_megabytes() -> float:
    """Memory of this process that belongs to no file (Linux)."""
    return int(re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) / 1024


def samples_per_second(read: Callable[[np.ndarray], object], batch_size: int, seconds: float) -> tuple[float, float]:
    """``read`` of consecutive positions: samples a second by the clock, and by the processor's time."""
    position, started, processor = 0, time.perf_counter(), time.process_time()
    while not position or time.perf_counter() < started + seconds:  # one batch at least, however busy the machine is
        read(np.arange(position, position + batch_size))
        position += batch_size
    return position / (time.perf_counter() - started), position / (time.process_time() - processor)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=Path, required=True, help="folder of tools/extract_latents.py")
    parser.add_argument("--batch-size", type=int, default=256, help="samples read at once (default 256)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each of three passes (default 5)")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or not args.seconds > 0:
        raise UserError(f"--batch-size {args.batch_size} and --seconds {args.seconds} must be above 0")

    before, started = anonymous_megabytes(), time.perf_counter()
    data = LatentDataset(args.latents)
    opened = time.perf_counter() - started
    order = EpochOrder(len(data), seed=0)
    order[np.arange(1)]  # makes the first epoch's permutation
    memory = anonymous_megabytes() - before
    print(
        f"{args.latents}: {len(data)} images in {len(data.manifest['shards'])} shards opened in {opened:.3f} s; "
        f"{memory:.0f} MB with labels and the order of an epoch"
    )
    flip = np.arange(args.batch_size) % 2 == 1 if data.has_flip else np.zeros(args.batch_size, bool)
    options = {"num_timesteps": 1000, "label_dropout": 0.1, "horizontal_flip": data.has_flip}
    readers = {
        "moments": lambda positions: data.moments(order[positions], flip),
        "training batches": lambda positions: make_batch(data, order, positions, **options),
    }
    for name, read in readers.items():
        for number in range(1, PASSES + 1):
            wall, processor = samples_per_second(read, args.batch_size, args.seconds)
            print(f"{name}, pass {number}: {wall:.0f} samples/s, {processor:.0f} per second of processor time")


if __name__ == "__main__":
    main()
