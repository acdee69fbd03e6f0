"""Train a tiny model for many steps with the real launcher, and watch the memory and the open files of its processes.

    python tests/soak.py [--steps 20000] [--processes 2] [--folder DIR] [section.key=value ...]

Every few seconds the resident memory and the number of open files of each training process are read. They must stay
what they were after the first steps, which hold the first checkpoint and the first picture: memory within 1 %, open
files the same. The steps after these are cut into ten parts, of which the table shows the medians. Ends with code 1 if
memory or files grow, or if the training fails.
With --folder the run stays there, with the launcher's output in output.txt and all readings in readings.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import from the repository root

import psutil

from switchdit.errors import UserError, exit_on_user_error
from switchdit.files import write_json
from tests.launching import ROOT, environment, launch_command
from tests.tiny_run import steps_done, write_config, write_latents
from tools.command_line import interrupt_on_sigterm

TOLERANCE = 0.01  # of the memory
PARTS = 10
MODEL = {"depth": 1, "hidden_size": 16, "num_heads": 2, "num_experts": 4, "top_k": 2}


@dataclass(frozen=True)
class Reading:
    """Of one process at a time: steps done, resident memory in bytes, open files."""

    step: int
    memory: int
    files: int


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000, help="to train (default 20000)")
    parser.add_argument("--processes", type=int, default=2, help="to train with (default 2)")
    parser.add_argument("--warm_up", type=int, default=1_000, help="steps before memory must be flat (default 1000)")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between readings (default 2)")
    parser.add_argument("--checkpoint_every", type=int, default=500, help="steps (default 500)")
    parser.add_argument("--ep_size", type=int, default=2, help="expert-parallel processes (default 2)")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs/zero2_bf16.json")
    parser.add_argument("--folder", type=Path, help="where the run and its output stay; a temporary one if not given")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the training's config")
    args = parser.parse_intermixed_args()
    if not 0 < args.warm_up < args.steps:
        raise UserError(f"--warm_up {args.warm_up} must lie between 0 and --steps ({args.steps})")
    if args.every <= 0:
        raise UserError(f"--every {args.every} must be above 0 seconds")
    interrupt_on_sigterm()  # the training must not outlive this program
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = args.folder or Path(temporary)
        readings, code, seconds = soak(args, folder)
        for line in report(readings, args.warm_up):
            print(line)
        print(f"{args.steps} steps took {seconds:.0f} s with {args.processes} processes")
        problems = verdict(readings, args.warm_up)
        if code:
            problems.append(f"the training ended with code {code}:\n{(folder / 'output.txt').read_text()[-3000:]}")
        print("\n".join(f"FAILED: {problem}" for problem in problems) or "PASSED: memory and open files are flat")
        sys.exit(1 if problems else 0)


def soak(args: argparse.Namespace, folder: Path) -> tuple[dict[int, list[Reading]], int, float]:
    """Train; readings of each rank, the launcher's exit code, and the seconds it took."""
    folder.mkdir(parents=True, exist_ok=True)
    run_dir = folder / "run"
    config = write_config(
        folder / "config.yaml",
        write_latents(folder / "latents"),
        run_dir,
        model={**MODEL, "ep_size": args.ep_size},
        train={"steps": args.steps, "global_batch": 4 * args.processes},
        monitor={
            "log_every": 100,
            "routing_every": 250,
            "checkpoint_every": args.checkpoint_every,
            "keep_last": 2,
        },
    )
    training = ["--config", config, "--deepspeed_config", args.ds_config, *args.overrides]
    command = launch_command(args.processes, ROOT / "switchdit/train.py", *training)
    readings: dict[int, list[Reading]] = {}
    started = time.monotonic()
    with open(folder / "output.txt", "w") as output:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env=environment(OMP_WAIT_POLICY="PASSIVE"), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while launcher.poll() is None:
                step = steps_done(run_dir / "log.jsonl")
                for rank, process in workers(launcher.pid).items():
                    try:
                        reading = Reading(step, process.memory_info().rss, process.num_fds())
                    except psutil.Error:  # it has just ended
                        continue
                    readings.setdefault(rank, []).append(reading)
                time.sleep(args.every)
        finally:
            launcher.terminate()
            write_json(folder / "readings.json", {rank: list(map(asdict, read)) for rank, read in readings.items()})
    return readings, launcher.wait(), time.monotonic() - started


def workers(launcher: int) -> dict[int, psutil.Process]:
    """The training processes by their local rank."""
    found = {}
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            for argument in process.cmdline():
                if argument.startswith("--local_rank="):
                    found[int(argument.split("=")[1])] = process
        except psutil.Error:  # it has just ended
            continue
    return dict(sorted(found.items()))


def parts(readings: list[Reading], warm_up: int) -> list[list[Reading]]:
    """Those after the first ``warm_up`` steps, cut into up to ten parts of the same length."""
    later = [reading for reading in readings if reading.step >= warm_up]
    count = min(PARTS, len(later))
    return [later[i * len(later) // count : (i + 1) * len(later) // count] for i in range(count)]


def report(readings: dict[int, list[Reading]], warm_up: int) -> list[str]:
    """A line for each part, with the medians of each rank."""
    head = "steps".rjust(13)
    cut = {rank: parts(of_rank, warm_up) for rank, of_rank in readings.items()}
    for rank in cut:
        head += f"  {f'rank {rank}: MB':>11}  {'files':>5}"
    lines = [head]
    for row in zip(*cut.values(), strict=False):
        line = f"{row[0][0].step}-{row[0][-1].step}".rjust(13)
        for part in row:
            memory, files = (statistics.median(getattr(r, key) for r in part) for key in ("memory", "files"))
            line += f"  {memory / 1e6:>11.2f}  {files:>5.0f}"
        lines.append(line)
    return lines


def verdict(readings: dict[int, list[Reading]], warm_up: int) -> list[str]:
    """What is not flat: the medians of every part are compared with the first's."""
    problems = []
    for rank, of_rank in readings.items():
        cut = parts(of_rank, warm_up)
        if len(cut) < PARTS:
            problems.append(f"rank {rank}: {len(cut)} readings after step {warm_up}; {PARTS} are needed: lower --every")
            continue
        memory = [statistics.median(r.memory for r in part) for part in cut]
        files = [min(r.files for r in part) for part in cut]  # a checkpoint that is being written has some more
        worst = max(abs(m / memory[0] - 1) for m in memory)
        if worst > TOLERANCE:
            problems.append(f"rank {rank}: memory changed by {worst:.1%} after step {warm_up}")
        if max(files) > files[0]:
            problems.append(f"rank {rank}: open files grew from {files[0]:.0f} to {max(files):.0f}")
    return problems or ([] if readings else ["no training process was seen"])


if __name__ == "__main__":
    main()
