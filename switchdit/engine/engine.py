"""Processes, and the one call of `deepspeed.initialize`: models are written for one device, parallelism starts here."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import pydantic
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops import __compatible_ops__
from deepspeed.ops.op_builder.builder import MissingCUDAException
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from switchdit.engine.checkpoint_writer import SnapshotEngine
from switchdit.engine.clipping import clip_alike
from switchdit.engine.optimizers import (
    apex_adam,
    base_optimizer,
    choose_fused,
    keep_implementation,
    skip_on_device,
    skips_on_device,
)
from switchdit.errors import FaultError, UserError
from switchdit.ranks import RANK_VARIABLES, rank_variables

T = TypeVar("T")
MEETING = timedelta(minutes=30)  # in which all processes must have been started
PATIENCE = timedelta(days=2)
# how messages of DeepSpeed and PyTorch begin that say why an operator cannot be compiled or loaded
OF_COMPILING = ("Error building extension", "Unable to JIT load", "Unable to load", "DeepSpeed JIT builder")


@dataclass(frozen=True)
class Processes:
    """This process among all of them. ``local_rank`` counts within the node and chooses the device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def init_processes() -> Processes:
    """Join the process group that the launcher describes in the environment (`RANK_VARIABLES`); alone without one.

    NCCL on CUDA, gloo on the CPU. DeepSpeed's own messages are kept to warnings.

    Raises:
        UserError: if several processes were started by MPI or srun without MASTER_ADDR, where they could meet.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of calls in DeepSpeed
    if not os.environ.get("WORLD_SIZE"):
        theirs = rank_variables()
        if theirs and int(os.environ[theirs[1]]) > 1:
            os.environ.update({ours: os.environ[name] for ours, name in zip(RANK_VARIABLES[0], theirs, strict=True)})
            if not os.environ.get("MASTER_ADDR"):
                raise UserError(
                    f"MASTER_ADDR is not set, but {theirs[1]} is {os.environ[theirs[1]]}: it must name the machine of "
                    "rank 0; launchers/mpi.sh and launchers/slurm.sh set it"
                )
        else:  # alone, beside whatever else runs on this machine
            os.environ["MASTER_PORT"] = str(_free_port())
    for variable, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ[variable] = os.environ.get(variable) or alone  # an empty one is none
    os.environ.setdefault("MASTER_PORT", "29500")
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # its shared-memory collectives are compiled on first use; gloo needs no compiler
        __compatible_ops__["deepspeed_shm_comm"] = False
        backend = "gloo"
    else:
        backend = accelerator.communication_backend_name()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(accelerator.device_name(local_rank))
    accelerator.set_device(local_rank)
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=MEETING)
    return Processes(dist.get_rank(), dist.get_world_size(), local_rank, device)


def wait_long() -> None:
    """Have collectives of all groups there are wait for days, where one process may have much more to do than others.

    PyTorch gives up after 10 minutes with NCCL and 30 with gloo: too soon for others than the one that draws a picture
    or writes a checkpoint. Dead and hung processes are the watchdog's, or the launcher's, to find.
    """
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        torch.distributed.distributed_c10d._set_pg_timeout(PATIENCE, group)


def reduce_together(engine: deepspeed.DeepSpeedEngine) -> None:
    """Have ZeRO reduce experts' gradients with all others where the same processes do both (``ep_size`` 1).

    DeepSpeed has a group of its own for experts: each bucket would be sorted into two, by a copy, for two collectives.
    """
    if of_experts := getattr(engine.optimizer, "expert_dp_process_group", None):
        of_all = engine.optimizer.dp_process_group
        same = dist.get_all_ranks_from_group(of_all)
        engine.optimizer.expert_dp_process_group = {
            name: of_all if dist.get_all_ranks_from_group(group) == same else group
            for name, group in of_experts.items()
        }


def agree(validate: Callable[[], T]) -> T:
    """Run ``validate`` on every process; if any of them finds a mistake, all raise it; collective.

    Paths differ between machines: what one process misses, the others must not wait for.
    """
    result, mistake = None, None
    try:
        result = validate()
    except (UserError, FaultError) as problem:
        mistake = problem
    raise_together(mistake)
    return result


def told_by_all(message: str | None) -> list[str]:
    """What processes have to say, those with None left out: the same list on all of them; collective."""
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, message)
    return [text if rank == 0 else f"(process {rank}) {text}" for rank, text in enumerate(everyone) if text]


def raise_together(problem: UserError | FaultError | None) -> None:
    """Raise on all processes what any of them has; collective."""
    everyone: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, problem and (isinstance(problem, FaultError), str(problem)))
    for rank, told in enumerate(everyone):
        if told:
            is_fault, text = told
            raise (FaultError if is_fault else UserError)(text if rank == 0 else f"(process {rank}) {text}")


def check_same(**values: Any) -> None:
    """Raise `UserError`, on all processes, unless all of them have the same; collective."""
    digests = {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest() for name, value in values.items()
    }
    everyone: list[dict[str, bytes]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, digests)
    for rank, theirs in enumerate(everyone):
        if differing := [name for name in digests if theirs[name] != everyone[0][name]]:
            raise UserError(
                f"process {rank} has another {' and another '.join(differing)} than process 0; all machines must have "
                "the same files"
            )


def from_first(value: T) -> T:
    """What the first process has; collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_gpu() -> bool:
    return get_accelerator().device_name() != "cpu"


def build_engine(
    model: nn.Module, deepspeed_config: dict[str, Any], backend: str = "auto"
) -> deepspeed.DeepSpeedEngine:
    """Wrap ``model``: device, precision, expert-parallel groups, optimizer, ZeRO partitions.

    Args:
        model: from `build_model`, built after `init_processes`.
        deepspeed_config: from `resolve_deepspeed_config`; it is not changed.
        backend: ``optimizer.backend`` of the run.

    Raises:
        UserError: if DeepSpeed refuses the configuration, or the backend is not there.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    deepspeed_config = copy.deepcopy(deepspeed_config)
    section = deepspeed_config.get("optimizer", {})
    optimizer = apex_adam(section) if backend == "apex" else None
    choose_fused(section)
    # DeepSpeed's own throughput would wait for the device twice in every micro-batch
    deepspeed_config.setdefault("timers", {"throughput": {"enabled": False}})
    if "bf16" in deepspeed_config:  # in float32 ZeRO's optimizer looks by itself
        deepspeed_config["bf16"].setdefault("check_grad_overflow", True)
    try:
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=trainable, optimizer=optimizer, config=deepspeed_config
        )
    except (DeepSpeedConfigError, pydantic.ValidationError) as problem:
        raise UserError(f"DeepSpeed refuses its configuration: {' '.join(str(problem).split())}") from None
    except (AssertionError, TypeError, ValueError, ZeroDivisionError) as problem:  # of settings that it never checks
        told = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise UserError(f"DeepSpeed cannot use its configuration: {told}") from problem
    except (RuntimeError, MissingCUDAException) as problem:  # of what it compiles on first use
        lines = str(problem).splitlines() or [type(problem).__name__]
        if isinstance(problem, RuntimeError) and not lines[0].startswith(OF_COMPILING):
            raise
        reason = next((line for line in lines if "not found" in line or "error:" in line), lines[0])
        raise UserError(
            f"DeepSpeed cannot compile its optimizer: {reason}; optimizer.backend torch needs no compiler"
        ) from None
    reduce_together(engine)
    clip_alike(engine)
    keep_implementation(base_optimizer(engine))
    if skips_on_device(engine):
        skip_on_device(engine)
    engine.checkpoint_engine = SnapshotEngine()
    engine._copy_recovery_script = lambda *_: None  # its zero_to_fp32.py cannot read expert checkpoints
    return engine


def set_optimizer(engine: deepspeed.DeepSpeedEngine, **settings: Any) -> None:
    """Set lr, betas, eps or weight_decay, as far as the optimizer has them, for the next step."""
    for group in engine.optimizer.param_groups:
        group.update({key: value for key, value in settings.items() if key in group})


def grad_norm(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """Norm of the last step's gradient before clipping; None if it is not computed or not finite. The host waits."""
    norm = engine.get_global_grad_norm()
    norm = math.inf if norm is None else float(norm)
    return norm if math.isfinite(norm) else None


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def add_over_processes(tensor: torch.Tensor) -> None:
    """Sum ``tensor`` over all processes, in place; collective."""
    dist.all_reduce(tensor)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def leave(code: int = 0) -> None:
    """End a distributed program at once, after all processes have come here.

    gloo's threads now and then abort a process that has finished its work ("terminate called without an active
    exception"); leaving without interpreter shutdown never does.
    """
    barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
