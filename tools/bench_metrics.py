"""How long the metrics themselves take, when no network does: synthetic features of Inception's sizes.

    python tools/bench_metrics.py [--reference 50000] [--samples 50000] [--distances float16]

Two evaluations through the functions of `tools/eval_fid.py`: the first computes all, the second finds the reference in
the cache. Printed: the seconds of each, and the most memory that the process held.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import from the repository root

import numpy as np
import torch

from switchdit.errors import UserError, exit_on_user_error
from tools import eval_fid
from tools.feature_cache import features_of, radii_of
from tools.feature_network import Features
from tools.inception import CLASSES, POOLED, SPATIAL
from tools.processes import Processes

# N = images, F = features

BATCH = 500


@dataclass
class NumberedImages:
    """An `ImageSet` of single pixels that hold nothing but their number."""

    option: str
    count: int
    shape: tuple[int, int] = (1, 1)
    labels: np.ndarray | None = None
    statistics: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return Path(self.option.removeprefix("--"))

    def batches(self, size: int, start: int, stop: int) -> Iterator[np.ndarray]:
        for first in range(start, stop, size):
            numbers = np.arange(first, min(first + size, stop), dtype=np.uint32)
            yield numbers.view(np.uint8).reshape(-1, 1, 1, 4)[..., :3]

    def sha256(self) -> str:
        return f"{self.option} {self.count}"

    def check_unchanged(self) -> None:
        pass


class RandomFeatures:
    """A `FeatureNetwork`: features of an image are random, not negative, and of unequal scale, as Inception's are."""

    image_size, num_classes = None, CLASSES
    description = {"kind": "random", "file": "nowhere", "sha256": "random"}  # noqa: RUF012
    statistics_sizes: dict[str, int] = {}  # noqa: RUF012

    def __init__(self):
        self.seed = 0  # of the set
        self.scale = np.linspace(0.2, 1.5, POOLED + SPATIAL, dtype=np.float32)

    def __call__(self, images: np.ndarray) -> Features:
        stream = np.random.default_rng((self.seed, *images[0].ravel()))
        rows = np.abs(stream.standard_normal((len(images), POOLED + SPATIAL), np.float32)) * self.scale
        logits = stream.standard_normal((len(images), CLASSES), np.float32)
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return Features(rows[:, :POOLED], rows[:, POOLED:], probabilities)


def evaluate(args: argparse.Namespace, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics, and the seconds that each part took."""
    network, processes, seconds, start = RandomFeatures(), Processes(), {}, time.perf_counter()

    def lap(name: str) -> None:
        seconds[name] = time.perf_counter() - start - sum(seconds.values())

    reference, samples = NumberedImages("--ref", args.reference), NumberedImages("--samples", args.samples)
    of_reference = features_of(reference, network, BATCH, folder, processes)
    lap("statistics of the reference")
    network.seed = 1
    of_samples = features_of(samples, network, BATCH, None, processes)
    lap("statistics of the samples")
    radii = {}
    for name, images, features, kept in (
        ("reference", reference, of_reference, folder),
        ("sample", samples, of_samples, None),
    ):
        radii[f"{name}_radii"] = radii_of(features, images, network, eval_fid.NEIGHBOURS, args.distances, kept)
        lap(f"neighbours within the {name}")
    results = eval_fid.score(reference, samples, of_reference, of_samples, radii, args)
    lap("all else")
    return results, seconds


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=int, default=50_000, help="images (default 50,000)")
    parser.add_argument("--samples", type=int, default=50_000, help="images (default 50,000)")
    parser.add_argument("--distances", default="float16", choices=("float16", "float32", "float64"))
    args = parser.parse_args(argv)
    args.features = None  # the keys of ADM
    if min(args.reference, args.samples) <= eval_fid.NEIGHBOURS:
        raise UserError(
            f"--reference {args.reference} and --samples {args.samples} must be above {eval_fid.NEIGHBOURS}"
        )
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: evaluate(args, Path(folder)) for name in ("first", "again, the reference cached")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{args.samples} samples, {args.reference} reference images, {torch.get_num_threads()} threads")
    for name, (_, seconds) in runs.items():
        print(f"{name}: {sum(seconds.values()):.1f} s")
        print("\n".join(f"  {part:<32} {value:7.1f}" for part, value in seconds.items()))
    print(f"most memory held: {peak:.2f} GB")
    print(
        json.dumps({"results": runs["first"][0], "seconds": {name: run[1] for name, run in runs.items()}, "GB": peak})
    )
    first, again = (results for results, _ in runs.values())
    if first != again:
        raise UserError(f"the cached reference changed the numbers: {first}, then {again}")


if __name__ == "__main__":
    main()
