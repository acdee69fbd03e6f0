"""Tiny training runs, each killed or damaged at a random point and resumed: nothing may be lost but steps.

    python tests/fault_campaign.py [--runs 100] [--seed 0] [--only 17 ...]

Two processes train 12 steps of a Switch-DiT whose experts are spread over both, and save every third step. A run passes
when, resumed with ``--resume auto``, it ends with the parameters, optimizer and log of the run that nothing happened
to, to the last bit; or, where the data is gone, when it says so in a line and ends with code 2. Every tenth run starts
with the deepspeed launcher, the others are forked from this process, which has imported all they need.

Exit code 1 if any run fails; what it left is kept then.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]


def campaign(numbers: list[int], seed: int, folder: Path) -> dict[str, Counter]:
    """Run and print; returns the verdicts' counts by kind."""
    # only now, when the environment says that no library may start threads: they would be missing in what is forked
    from fault_kinds import KINDS, kind_of
    from fault_points import POINTS
    from fault_trials import Failed, Skipped, Trial, make_reference
    from forked_run import prepare

    start = time.monotonic()
    prepare()
    reference = make_reference(folder)
    counts = {p: [c[p] for c in reference.counts] for p in POINTS}
    print(f"points per rank of a whole run: {', '.join(f'{p} {n}' for p, n in counts.items())}")
    print(
        f"{'run':>4} {'seconds':>7}  {'fault':22} {'started by':10} {'from step':9} {'verdict':19} where; what happened"
    )
    verdicts: dict[str, Counter] = defaultdict(Counter)
    for number in numbers:
        began, kind = time.monotonic(), kind_of(number, seed)
        trial = Trial(number, seed, folder / f"run_{number:03d}", reference)
        try:
            verdict, why = KINDS[kind](trial), ""
        except Skipped as problem:
            verdict, why = "skipped", str(problem)
        except Failed as problem:
            verdict, why = "FAILED", str(problem)
        verdicts[kind][verdict] += 1
        how = "launcher" if trial.launched else "fork"
        told = "; ".join(filter(None, (trial.where, trial.happened, why))).replace(str(trial.folder), "...")
        row = f"{number:4} {time.monotonic() - began:7.1f}  {kind:22} {how:10} {trial.resumed:9} {verdict:19} {told}"
        print(" ".join(row.split("\n")), flush=True)
        if verdict != "FAILED":
            shutil.rmtree(trial.folder)
    print_summary(verdicts, time.monotonic() - start)
    return verdicts


def print_summary(verdicts: dict[str, Counter], seconds: float) -> None:
    print("\nby kind:")
    for kind, counts in sorted(verdicts.items()):
        print(f"  {kind:24}" + ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())))
    total = sum(verdicts.values(), Counter())
    print(f"{total.total()} runs in {seconds:.0f} s: " + ", ".join(f"{n} {v}" for v, n in sorted(total.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: 0)")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the runs to do, of those the seed describes")
    args = parser.parse_args()
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    folder = Path(tempfile.mkdtemp(prefix="switchdit-faults-"))
    verdicts = campaign(args.only or list(range(1, args.runs + 1)), args.seed, folder)
    if any(counts["FAILED"] for counts in verdicts.values()):
        sys.exit(f"what the failed runs left is in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
