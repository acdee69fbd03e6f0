"""How far gradients, norms, losses and parameters of any way to train are from a plain loop in one process: a table.

python tests/gradient_parity.py                   all combinations in all topologies, one launch each
python tests/gradient_parity.py --topology 4 2    on 4 processes with ep_size 2 alone; may be given several times
python tests/gradient_parity.py --sample          every pair of settings at least once

Ends with code 1 where a row is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launching import WORKERS, launched

TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # processes, ep_size
SETTINGS = {
    "system": ("Switch-DiT", "Diff-MoE", "Multi-Expert-DiT"),
    "routing": ("mixed", "idle", "same"),
    "dispatch": ("samples", "weights"),
    "stage": (0, 1, 2),
    "accumulation": (1, 2),
    "clip": (0.0, 0.15),
    "dtype": ("float32", "bf16"),
    "activation_checkpointing": (0, 1, 2),  # 2: blocks that are recomputed and blocks that are not, in turn
}
TOLERANCE = 1e-5  # float32, relative to the largest entry of a tensor
KINDS = ("loss", "norm", "grad", "param")

Combination = dict[str, str | int | float]


def combinations(ep_size: int) -> list[Combination]:
    """All that can be: bf16 needs ZeRO's master weights, and only timestep experts elsewhere can travel.

    To Multi-Expert-DiT ep_size means nothing: its denoisers are on every rank, and idle where no sample needs them.
    """
    every = [dict(zip(SETTINGS, values, strict=True)) for values in itertools.product(*SETTINGS.values())]
    return [
        how
        for how in every
        if not (how["dtype"] == "bf16" and how["stage"] == 0)
        and not (how["dispatch"] == "weights" and (ep_size == 1 or how["system"] != "Switch-DiT"))
    ]


def pairs(how: Combination) -> set:
    return set(itertools.combinations(how.items(), 2))


def covering(candidates: list[Combination]) -> list[Combination]:
    """A few of them in which every pair of settings that any of them has appears: greedily, the most new ones first."""
    missing = set().union(*map(pairs, candidates))
    chosen = []
    while missing:
        chosen.append(max(candidates, key=lambda how: len(missing & pairs(how))))
        missing -= pairs(chosen[-1])
    return chosen


def alone(how: Combination) -> Combination:
    """The same in a single process, where nothing travels."""
    return {**how, "dispatch": "samples"}


def measure(num_processes: int, ep_size: int, wanted: list[Combination]) -> list[dict[str, float]]:
    """The errors of each combination by name, from one launch."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "combinations.json", Path(folder) / "errors.json"
        given.write_text(json.dumps(wanted))
        launched(num_processes, WORKERS / "gradient_parity.py", ep_size, given, found, timeout=7200)
        return json.loads(found.read_text())


def limits(how: Combination, single: dict[str, float]) -> dict[str, float]:
    """The error that each result may have; ``single``: those of `alone`.

    What bfloat16 loses against float64 is lost in one process already. Several may lose twice that, since they round
    sums of other parts. A single number may be right by luck: it may also be one rounding off, 2^-9.
    """
    if how["dtype"] == "float32":
        return dict.fromkeys(single, TOLERANCE)
    return {name: 2 * error + (2**-9 if name.startswith(("loss/", "norm/")) else 0) for name, error in single.items()}


@dataclass
class Row:
    """A combination in a topology: the result of each kind (`KINDS`) that is nearest to its limit, or furthest over."""

    topology: tuple[int, int]
    how: Combination
    worst: dict[str, tuple[float, float, str]]  # error, limit, name

    @property
    def is_right(self) -> bool:
        return all(error <= limit for error, limit, _ in self.worst.values())

    def __str__(self) -> str:
        errors = [
            f"{self.worst[kind][0]:.1e} of {self.worst[kind][1]:.0e}" if kind in self.worst else "" for kind in KINDS
        ]
        columns = [*map(str, self.topology), *map(str, self.how.values()), *errors]
        wrong = [name for error, limit, name in self.worst.values() if not error <= limit]
        return line(columns) + (f"  WRONG: {', '.join(wrong)}" if wrong else "")


WIDTHS = (9, 7, 16, 7, 8, 5, 12, 4, 7, 24, 18, 18, 18, 18)
HEAD = ("processes", "ep_size", *SETTINGS, *KINDS)


def line(columns: Iterable[str]) -> str:
    return "  ".join(f"{text:<{width}}" for text, width in zip(columns, WIDTHS, strict=True)).rstrip()


class Table:
    """Rows on demand. What a single process loses in bfloat16 is measured once for each combination."""

    def __init__(self):
        self.single: dict[tuple, dict[str, float]] = {}

    def rows(self, topology: tuple[int, int], wanted: list[Combination]) -> list[Row]:
        self._measure_single([alone(how) for how in wanted if topology == (1, 1) or how["dtype"] == "bf16"])
        found = [self.single[key(how)] for how in wanted] if topology == (1, 1) else measure(*topology, wanted)
        return [self._row(topology, how, errors) for how, errors in zip(wanted, found, strict=True)]

    def _measure_single(self, wanted: list[Combination]) -> None:
        new = list({key(how): how for how in wanted if key(how) not in self.single}.values())
        if new:
            self.single |= {key(how): errors for how, errors in zip(new, measure(1, 1, new), strict=True)}

    def _row(self, topology: tuple[int, int], how: Combination, errors: dict[str, float]) -> Row:
        may = limits(how, self.single.get(key(alone(how)), errors))
        assert may.keys() == errors.keys()
        nearest = {}
        for name, error in errors.items():
            kind = name.split("/")[0]
            if kind not in nearest or not error / may[name] <= nearest[kind][0] / nearest[kind][1]:
                nearest[kind] = (error, may[name], name)
        return Row(topology, how, nearest)


def key(how: Combination) -> tuple:
    return tuple(how.values())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", action="store_true", help="every pair of settings at least once")
    parser.add_argument("--topology", nargs=2, type=int, action="append", metavar=("PROCESSES", "EP_SIZE"))
    args = parser.parse_args()
    args.topology = [tuple(topology) for topology in args.topology or TOPOLOGIES]
    for topology in args.topology:
        if topology not in TOPOLOGIES:
            parser.error(f"--topology {topology[0]} {topology[1]} is none of {TOPOLOGIES}")
    return args


def main() -> int:
    args = arguments()
    table, wrong, total, start = Table(), 0, 0, time.monotonic()
    print(line(HEAD), flush=True)
    for topology in args.topology:
        wanted = combinations(topology[1])
        rows = table.rows(topology, covering(wanted) if args.sample else wanted)
        print("\n".join(map(str, rows)), flush=True)
        wrong, total = wrong + sum(not row.is_right for row in rows), total + len(rows)
    print(f"{total} rows, {wrong} wrong; {time.monotonic() - start:.0f} s")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
