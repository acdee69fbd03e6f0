"""Training runs that start in a tenth of a second: one process imports all they need, and forks their ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fault_points
from fault_points import Fault
from launching import ROOT, WORKERS, environment, free_port, launch_command

WORLD_SIZE = 2
PATIENCE = 30.0  # seconds in which the other ranks must end by themselves once one has failed
LIMIT = 180.0  # seconds for a whole run
DS_CONFIG = "ds_configs/zero2_fp32.json"


@dataclass
class Ended:
    """How a run ended.

    Attributes:
        codes: exit codes, negative for signals: of each rank, or of the launcher alone.
        output: what they printed.
        late: ranks that had to be killed, since they did not end by themselves in time.
    """

    codes: list[int]
    output: str
    late: list[int]

    @property
    def resumed_from(self) -> int | None:
        """The step at which it took up training; None where it did not come so far."""
        found = re.search(r"; steps (\d+) to \d+", self.output)
        return int(found[1]) if found else None

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


def prepare() -> None:
    """Import whatever a run imports, so that its ranks inherit it; no thread is started."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  DeepSpeed imports it late, and nothing is slower
    import torch

    import switchdit.data.autoencoder
    import switchdit.data.training_batches
    import switchdit.engine.generate
    import switchdit.engine.monitors
    import switchdit.engine.objective
    import switchdit.engine.run_directory
    import switchdit.engine.watchdog
    import switchdit.models
    import switchdit.sample
    import switchdit.train  # noqa: F401

    torch.set_num_threads(1)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: their locks would stay locked in what is forked"


def arguments(config: Path, resume: bool) -> list[str]:
    return ["--config", str(config), "--deepspeed_config", DS_CONFIG, *(["--resume", "auto"] if resume else [])]


def run_forked(config: Path, run_dir: Path, folder: Path, fault: Fault | None, resume: bool) -> Ended:
    """Train to the end, or to what the fault makes of it. ``folder`` gets the ranks' output, pids and events."""
    port = free_port()
    outputs = [folder / f"output.{rank}" for rank in range(WORLD_SIZE)]
    pids = [
        fork_rank(
            rank, WORLD_SIZE, port, arguments(config, resume), outputs[rank],
            before=lambda: fault_points.plant(folder, run_dir, fault),
        )
        for rank in range(WORLD_SIZE)
    ]  # fmt: skip
    codes, late = _wait(pids)
    return Ended(codes, "\n".join(output.read_text(errors="replace") for output in outputs), late)


def fork_rank(
    rank: int,
    world_size: int,
    port: int,
    argv: list[str],
    output: Path,
    program: str = "train",
    before: Callable[[], object] = lambda: None,
) -> int:
    """What a launcher and Python do for a process of switchdit/``program``.py, in one just forked: its process id.

    ``before`` runs there first; ``output`` gets what it prints.
    """
    if pid := os.fork():
        return pid
    code = 1
    try:
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(ROOT)
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = [f"switchdit/{program}.py", *argv]
        before()
        sys.modules[f"switchdit.{program}"].main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int]) -> tuple[list[int], list[int]]:
    """Exit codes of all children, and which of them had to be killed."""
    codes: dict[int, int] = {}
    late: list[int] = []
    deadline = time.monotonic() + LIMIT
    while len(codes) < len(pids):
        for rank, pid in enumerate(pids):
            done, status = os.waitpid(pid, os.WNOHANG) if rank not in codes else (0, 0)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)
                deadline = min(deadline, time.monotonic() + PATIENCE)
        if not late and time.monotonic() > deadline:
            late = [rank for rank in range(len(pids)) if rank not in codes]
            for rank in late:
                os.kill(pids[rank], signal.SIGKILL)
        time.sleep(0.005)
    return [codes[rank] for rank in range(len(pids))], late


def run_launched(config: Path, run_dir: Path, folder: Path, fault: Fault | None, resume: bool) -> Ended:
    """As `run_forked`, with the deepspeed launcher."""
    variables = {"FAULT_FOLDER": str(folder), "FAULT_RUN_DIR": str(run_dir)}
    if fault:
        variables["FAULT"] = fault.to_json()
    command = launch_command(WORLD_SIZE, WORKERS / "faulty_train.py", *arguments(config, resume))
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    return Ended([done.returncode], done.stdout, [])
