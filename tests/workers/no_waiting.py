"""Training runs of one process each, in which the host's reads of tensors are noted: no_waiting.py RUNS.json

RUNS.json: [{"argv": ["--config", ...], "output": "file", "rare": [4, 8], "planted": false}, ...]. A run's reads are
then in "file.reads", what it prints in "file"; the last line has the exit codes. ``rare``: steps at which the host may
wait. ``planted``: one more read in every micro-batch. On a GPU, where only one run can be given, a wait at another step
is an error.
"""

import json
import os
import sys
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))

import torch
from forked_run import fork_rank, prepare
from launching import free_port
from torch.utils._python_dispatch import TorchDispatchMode

from switchdit.kernels import expert_mix

WARM_UP = 2  # steps of a GPU run in which tables are copied and memory is pinned
READS = {  # what hands numbers to the host, or sizes that depend on them
    torch.ops.aten._local_scalar_dense,  # item(), bool(), int(), float(), an index
    torch.ops.aten.equal,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
    torch.ops.aten.bincount,
    torch.ops.aten.repeat_interleave,
}
IMPLEMENTATIONS = {
    torch.ops.switchdit.expert_mix.default: expert_mix._forward._init_fn,
    torch.ops.switchdit.expert_mix_backward.default: expert_mix._backward._init_fn,
}
METHODS = ("tolist", "numpy", "cpu", "__array__")  # on the CPU no operation is behind them


class Reads(TorchDispatchMode):
    """Notes [phase, step, what, where] of every read of a tensor by the main thread, while steps are taken."""

    def __init__(self):
        super().__init__()
        self.noted, self.phase = [], None

    def note(self, what: str) -> None:
        if self.phase and threading.current_thread() is threading.main_thread():
            calls = [frame.name for frame in traceback.extract_stack() if frame.filename != __file__]
            self.noted.append([*self.phase, what, calls])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        if by_mask and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.note("index by a mask")
        elif func.overloadpacket in READS:
            self.note(str(func))
        elif func.overloadpacket is torch.ops.aten._to_copy and (kwargs or {}).get("device", args[0].device) != (
            args[0].device
        ):
            self.note("copy to another device")
        if func in IMPLEMENTATIONS:  # what is in them would go unseen
            with self:
                return IMPLEMENTATIONS[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def watch(run: dict) -> None:
    """Note the reads of a run that starts next in this process."""
    from switchdit.engine import engine, faults
    from switchdit.engine.watchdog import Watchdog

    reads, on_gpu = Reads(), os.environ["DS_ACCELERATOR"] == "cuda"
    leave, reached, poisoned = engine.leave, Watchdog.reached, faults.poisoned

    def noting(name: str):
        method = getattr(torch.Tensor, name)

        def noted(self, *args, **kwargs):
            reads.note(name)
            return method(self, *args, **kwargs)

        return noted

    def reach(self, phase: str, step: int) -> None:
        reads.phase = (phase, step)
        if on_gpu:
            rare = step <= WARM_UP or step in run["rare"]
            torch.cuda.set_sync_debug_mode("default" if rare else "error")
        reached(self, phase, step)

    def write_and_leave(code: int = 0) -> None:
        Path(f"{run['output']}.reads").write_text(json.dumps(reads.noted))
        leave(code)

    def poisoned_and_read(loss: torch.Tensor) -> torch.Tensor:
        loss.item()
        return poisoned(loss)

    Watchdog.reached, engine.leave = reach, write_and_leave
    if run["planted"]:
        faults.poisoned = poisoned_and_read
    if not on_gpu:  # where an error tells
        for name in METHODS:
            setattr(torch.Tensor, name, noting(name))
        reads.__enter__()


def main() -> None:
    runs = json.loads(Path(sys.argv[1]).read_text())
    if os.environ["DS_ACCELERATOR"] == "cuda":  # a process with CUDA cannot be forked
        import switchdit.train

        [run] = runs
        watch(run)
        sys.argv = ["switchdit/train.py", *run["argv"]]
        switchdit.train.main()
    prepare()
    codes = []
    for run in runs:
        pid = fork_rank(0, 1, free_port(), run["argv"], Path(run["output"]), before=lambda run=run: watch(run))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    print(json.dumps(codes))


main()
