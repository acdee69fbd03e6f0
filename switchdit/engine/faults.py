"""What can go wrong inside a step, and how all processes come to know it at the same step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from torch import Tensor, nn

from switchdit.engine.global_state import EXPERTS
from switchdit.engine.optimizers import base_optimizer, skips_on_device
from switchdit.errors import FaultError

SPIKE_MEMORY = 100  # steps over which the recent mean of the loss forgets, and which it needs before it judges


class Notices:
    """What one process knows and all must act on, told beside training and heard one step later.

    The flags travel over gloo from host to host, so that no process waits for its device.
    """

    def __init__(self):
        self.group = torch.distributed.new_group(backend="gloo")
        self._on_its_way: tuple[Any, np.ndarray] | None = None

    def exchange(self, *flags: bool) -> list[bool]:
        """Tell ``flags``, and hear for each whether any process had set it at the call before; collective."""
        heard = self.hear()
        told = np.array(flags, dtype=np.int32)
        tensor = torch.from_numpy(told)
        work = torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX, group=self.group, async_op=True)
        self._on_its_way = (work, told)
        return heard or [False] * len(flags)

    def hear(self) -> list[bool]:
        """What was told by the last `exchange`, also at the end of a run; nothing before the first."""
        if self._on_its_way is None:
            return []
        (work, told), self._on_its_way = self._on_its_way, None
        work.wait()
        return told.astype(bool).tolist()


def poisoned(loss: Tensor) -> Tensor:
    """``loss``; if it is not finite, one whose gradient is NaN everywhere, for all processes to see in their sum."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


class Updates:
    """The optimizer's steps; with a gradient that is not finite, on whatever process, nothing changes anywhere.

    Where the optimizer skips such a step on the device (`skips_on_device`), the host hears of it later, without a wait:
    what it asks for while the next step is queued was on its way since the last. For other optimizers it reads in every
    step whether the gradient is finite, and waits for that.
    """

    def __init__(self, engine: DeepSpeedEngine):
        self.engine = engine
        self._flag = _HostFlag(engine.device) if skips_on_device(engine) else None
        self._unheard: tuple[int, bool | None] | None = None

    def step(self, number: int) -> None:
        """After each micro-batch of the ``number``-th step; its last one takes the optimizer's."""
        at_boundary, skipped = self.engine.is_gradient_accumulation_boundary(), None
        if self._flag:
            self.engine.step()
        else:
            skipped = not _step_if_finite(self.engine, at_boundary)
        if at_boundary:
            assert self._unheard is None, "the average would miss a step"
            self._unheard = (number, skipped)
            if self._flag:
                self._flag.send(base_optimizer(self.engine).found_inf)

    def hear(self) -> tuple[int, bool] | None:
        """The number of the last step, and whether it changed weights; None if that has been heard.

        Waits for the device if it has not come so far.
        """
        if self._unheard is None:
            return None
        (number, skipped), self._unheard = self._unheard, None
        if skipped is None:
            skipped = self._flag.read()
            self.engine.skipped_steps += skipped
        return number, not skipped


class _HostFlag:
    """A number of the device that the host reads when it has come, while the device goes on."""

    def __init__(self, device: torch.device):
        on_cuda = device.type == "cuda"
        self._memory = torch.zeros((), pin_memory=on_cuda)
        self._seen = self._memory.numpy()
        self._event = torch.cuda.Event() if on_cuda else None

    def send(self, flag: Tensor) -> None:
        self._memory.copy_(flag, non_blocking=True)
        if self._event:
            self._event.record()

    def read(self) -> bool:
        if self._event:
            self._event.synchronize()
        return bool(self._seen)


def _step_if_finite(engine: DeepSpeedEngine, at_boundary: bool) -> bool:
    """``engine.step()``, with a wait. Returns whether weights changed, at the last micro-batch of a step."""
    stage_0 = engine.zero_optimization_stage() == 0  # the ZeRO optimizer looks for itself
    if at_boundary and stage_0 and not _gradients_are_finite(engine.module):
        for parameter in engine.module.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        engine.optimizer.step = lambda *_: None  # the engine counts its step, and the optimizer takes none
        engine.step()
        del engine.optimizer.step
        engine._global_grad_norm = math.inf  # not that of the zeros
        engine.skipped_steps += 1
        return False
    engine.step()
    if stage_0 or not at_boundary or not engine.optimizer.overflow:
        return True
    for held in (engine.optimizer.averaged_gradients, engine.optimizer.all_grad_tensors):
        held.update(dict.fromkeys(held))  # with offload_optimizer DeepSpeed would add the next step's to them
    return False


def _gradients_are_finite(model: nn.Module) -> bool:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    finite = torch.stack([g.isfinite().all() for g in gradients]).all().int()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)  # experts' differ between processes
    return bool(finite.item())


@torch.no_grad()
def compare_parameters(model: nn.Module, step: int) -> None:
    """Raise `FaultError`, on all processes, if processes that must hold the same parameters do not; collective.

    Sums of all bits, read once: any flip of a single bit shows. Dense parameters are the same on all processes, experts
    on those of the same expert-parallel rank. Under ZeRO 1 and 2 the weights are distributed anew after each step, so
    that what is found is younger than a step; what flips in the only copy of a float32 weight is everybody's then, and
    no comparison shows it.
    """
    names = [name for name, _ in model.named_parameters()]
    sums = torch.stack([_bits(p).sum(dtype=torch.int64) for p in model.parameters()])
    is_expert = torch.tensor([EXPERTS in name for name in names], device=sums.device)
    digest = torch.stack([sums[~is_expert].sum(), sums[is_expert].sum()])
    ranks, ep_size = range(dist.get_world_size()), getattr(model, "ep_size", 1)
    digests = _of_all(digest)
    peers_of = ([list(ranks)], [[r for r in ranks if r % ep_size == e] for e in range(ep_size)])
    for kind, groups in enumerate(peers_of):
        for peers in groups:
            values = [digests[r, kind].item() for r in peers]
            if len(set(values)) > 1:
                _tell_odd_one_out(peers, values, names, _of_all(sums), is_expert.cpu() == bool(kind), step)


def _bits(parameter: Tensor) -> Tensor:
    return parameter.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.itemsize])


def _of_all(mine: Tensor) -> Tensor:
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).cpu()


def _tell_odd_one_out(
    peers: list[int], values: list[int], names: list[str], sums: Tensor, of_kind: Tensor, step: int
) -> None:
    usual = max(set(values), key=values.count)
    odd = [r for r, value in zip(peers, values, strict=True) if value != usual]
    undecided = values.count(usual) * 2 <= len(values)
    sound = peers[values.index(usual)]
    differing = [names[i] for i in (of_kind & (sums[odd[0]] != sums[sound])).nonzero().flatten().tolist()]
    who = f"ranks {_listed(peers)} do not agree" if undecided else f"rank{'s' * (len(odd) > 1)} {_listed(odd)} differ"
    raise FaultError(
        f"{who}{'s' * (not undecided and len(odd) == 1)} in the parameters at step {step} ({differing[0]}"
        f"{f' and {len(differing) - 1} more' if len(differing) > 1 else ''}), which must be the same: a fault of "
        "memory or device there; go on from a checkpoint before it, without that machine"
    )


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


class SpikeDetector:
    """Steps whose loss lies far above what it was lately.

    Args:
        sigma: how many standard deviations above the mean; 0 never tells any.
    """

    def __init__(self, sigma: float):
        self.sigma, self.count, self.mean, self.variance = sigma, 0, 0.0, 0.0

    def __call__(self, loss: float) -> bool:
        """Whether ``loss``, of the next step, is a spike. A spike counts as much as the largest loss that is none."""
        limit = self.mean + self.sigma * math.sqrt(self.variance)
        spike = bool(self.sigma) and self.count >= SPIKE_MEMORY and loss > limit
        weight = 1 / min(self.count + 1, SPIKE_MEMORY)
        difference = (limit if spike else loss) - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)
        self.count += 1
        return spike

    def state(self) -> list[float]:
        return [self.count, self.mean, self.variance]

    def restore(self, state: list[float]) -> None:
        self.count, self.mean, self.variance = state
