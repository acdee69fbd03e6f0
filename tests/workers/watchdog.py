"""Steps of a collective under a watchdog, and what may become of them: watchdog.py FAULT RANK HANG_TIMEOUT PEER_TIMEOUT

The fault befalls that one rank in its step 9, or all ranks where RANK is "all".
"""

import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from deepspeed import comm as dist

from switchdit.engine.engine import init_processes, leave
from switchdit.engine.watchdog import Watchdog
from switchdit.errors import UserError, exit_on_user_error

STEPS, FAULTY_STEP = 20, 9  # signs of life come every 4 steps


def sleep() -> None:
    time.sleep(1000)


def loop() -> None:
    while True:
        pass


def everyone_receives() -> None:
    dist.recv(torch.ones(1), src=(dist.get_rank() + 1) % dist.get_world_size())


def mistake() -> None:
    raise UserError("latents/shard_7.npy is damaged")


def bug() -> None:
    raise ValueError("of ours")


def pause() -> None:
    """Stopped, and continued from outside long before the timeout."""
    stopped = os.getpid()
    if os.fork() == 0:
        while Path(f"/proc/{stopped}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)
        time.sleep(0.7)
        os.kill(stopped, signal.SIGCONT)
        os._exit(0)
    os.kill(stopped, signal.SIGSTOP)


FAULTS = {
    "none": lambda: None,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda: os._exit(0),
    "sleep": sleep,
    "loop": loop,
    "receive": everyone_receives,
    "mistake": mistake,
    "bug": bug,
    "pause": pause,
    "slow": lambda: None,
}


@exit_on_user_error
def main(fault: str, rank: str, hang_timeout: float, peer_timeout: float, fault_file: str = os.devnull) -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # as train.py, to which it is a request
    processes = init_processes()
    watchdog = Watchdog(processes, hang_timeout, peer_timeout)
    for step in range(STEPS):
        watchdog.reached("forward", step)
        if step == FAULTY_STEP and rank in ("all", str(processes.rank)):
            Path(fault_file).write_text(str(time.monotonic()))
            FAULTS[fault]()
        if fault == "slow" and step < 4 and processes.rank == step % processes.world_size:
            time.sleep(0.5 * hang_timeout)  # the others wait, and together they wait longer than hang_timeout
        if processes.rank == 2:
            dist.all_reduce(torch.ones(1000), async_op=True).wait()
        else:
            dist.all_reduce(torch.ones(1000))
        time.sleep(0.1)
    watchdog.stop()
    time.sleep(peer_timeout * processes.rank if fault == "none" else 0)  # ranks end at different moments
    leave()


def start_rank(environment: dict[str, str], output: str, *arguments: str) -> None:
    """As a process of its own that has all imports already: `main` with stdout and stderr in the file ``output``."""
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.modules["__main__"].__file__ = __file__
    main(*arguments[:2], *map(float, arguments[2:4]), *arguments[4:])


if __name__ == "__main__":
    start = [value for value in sys.argv[1:] if not value.startswith("--local_rank")]
    main(start[0], start[1], float(start[2]), float(start[3]))
