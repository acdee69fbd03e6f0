"""TimestepMoE: DeepSpeed's MoE with its gate, dispatch and experts replaced by timestep-routed ones.

    N = samples of this rank, L = tokens, D = width, M = experts, k = top-k,
    R = expert-parallel ranks (ep_size), J = M / R experts that live on one rank

The classes are subclasses of DeepSpeed's, so that its engine finds them: it marks expert parameters, builds the
expert-parallel groups, reduces expert gradients over the expert-data-parallel group and writes expert checkpoints
per rank, all unmodified. What differs from the stock layer: the gate sees the timestep embedding, not the tokens;
whole samples travel, with uneven all-to-all splits; nothing has a capacity, nothing is dropped or padded, and the
raw top-k probabilities weigh the outputs.

This file and engine/ are the only places that import deepspeed.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from deepspeed import comm as dist
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from deepspeed.utils import groups
from deepspeed.utils import logger as deepspeed_logger

from switchdit.errors import UserError
from switchdit.kernels.expert_mix import linear_mixture
from switchdit.moe.experts import LinearExpert, stacked
from switchdit.moe.timestep_gate import gate_probs, top_k_gates, top_k_map


class _AllToAllRows(torch.autograd.Function):
    """Uneven all-to-all of dimension 0; its gradient travels the same way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, group, send: list[int], receive: list[int]) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _AllToAllRows.apply(grad, ctx.group, ctx.receive, ctx.send), None, None, None


class TimestepGate(TopKGate):
    """DeepSpeed's gate, fed with timestep embeddings."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int):
        super().__init__(hidden_size, num_experts, top_k, drop_tokens=False, use_rts=False)
        self.wg = nn.Linear(hidden_size, num_experts, bias=True)

    def _set_ep_group(self, ep_group) -> None:
        self.ep_group = ep_group  # the stock gate refuses a second call, but an engine may be made anew

    def forward(self, e_t: Tensor) -> tuple[Tensor, Tensor]:  # (N, D) -> probs (N, M), gates (N, M)
        probs = gate_probs(e_t, self.wg.weight, self.wg.bias)
        return probs, top_k_gates(probs, self.k)

    @torch.no_grad()
    def expert_map(self, e_t: Tensor) -> Tensor:  # (T, D) -> (T, M) of 0 and 1
        return top_k_map(gate_probs(e_t, self.wg.weight, self.wg.bias), self.k)


class SampleExperts(Experts):
    """DeepSpeed's container of this rank's experts, applied as one merged matrix per sample."""

    def forward(self, z: Tensor, gates: Tensor) -> Tensor:  # (n, L, D), (n, J) -> (n, L, D)
        # Every local expert takes part, also with no samples at all: each parameter then gets a gradient (zero), so
        # that ZeRO-2's hooks fire in the same order with the same buckets on every rank.
        weight, bias = stacked(self.deepspeed_experts)
        return linear_mixture(z, weight, bias, gates)


class SampleMOELayer(MOELayer):
    """Sends each sample once to every rank that holds an expert it chose, and adds what comes back."""

    def forward(self, z: Tensor, e_t: Tensor) -> tuple[Tensor, Tensor]:
        """(N, L, D), (N, D) -> mixture (N, L, D), probs (N, M)."""
        probs, gates = self.gate(e_t)
        if self.ep_size == 1:
            return self.experts(z, gates), probs
        return self._dispatch(z, gates), probs

    @torch.compiler.disable  # splits depend on data
    def _dispatch(self, z: Tensor, gates: Tensor) -> Tensor:
        gates = gates.unflatten(1, (self.ep_size, self.num_local_experts))  # (N, R, J)
        # pairs (rank, sample) in order of rank: what this rank sends
        to_rank, sample = (gates.detach() != 0).any(-1).T.nonzero(as_tuple=True)
        send = torch.bincount(to_rank, minlength=self.ep_size)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=self.ep_group)
        send, receive = send.tolist(), receive.tolist()

        there = _AllToAllRows.apply(z[sample], self.ep_group, send, receive)
        their_gates = _AllToAllRows.apply(gates[sample, to_rank], self.ep_group, send, receive)
        mixed = self.experts(there, their_gates)
        back = _AllToAllRows.apply(mixed, self.ep_group, receive, send)
        return torch.zeros_like(z).index_add(0, sample, back)


def check_mixture(num_experts: int, top_k: int, ep_size: int) -> None:
    """Raise `UserError` unless the numbers fit each other."""
    if not 1 <= top_k <= num_experts:
        raise UserError(f"top_k ({top_k}) must lie between 1 and num_experts ({num_experts})")
    if ep_size < 1 or num_experts % ep_size:
        raise UserError(f"num_experts ({num_experts}) must be divisible by ep_size ({ep_size})")


class TimestepMoE(MoE):
    """Mixture of linear experts chosen by the timestep (Switch-DiT, Sec. 4.1).

    Args:
        hidden_size: D, width of tokens and of the timestep embedding.
        num_experts: M.
        top_k: k, experts per sample.
        ep_size: expert-parallel ranks; must divide M. Above 1, torch.distributed must be initialised first.

    Raises:
        UserError: if the numbers do not fit each other.
    """

    def __init__(self, hidden_size: int, num_experts: int = 3, top_k: int = 2, ep_size: int = 1):
        check_mixture(num_experts, top_k, ep_size)
        if ep_size > 1 and not dist.is_initialized():
            raise UserError(f"ep_size ({ep_size}) needs {ep_size} processes or a multiple; this is a single one")
        if ep_size > 1 and dist.get_world_size() % ep_size:
            raise UserError(
                f"the number of processes ({dist.get_world_size()}) must be divisible by ep_size ({ep_size})"
            )
        with _silent_deepspeed():
            super().__init__(
                hidden_size, LinearExpert(hidden_size), num_experts, ep_size, top_k, drop_tokens=False, use_rts=False
            )
        experts = self.deepspeed_moe.experts
        experts.__class__ = SampleExperts  # same parameters; DeepSpeed has marked them already
        self.deepspeed_moe = SampleMOELayer(
            TimestepGate(hidden_size, num_experts, top_k),
            experts,
            self.expert_group_name,
            self.ep_size,
            self.num_local_experts,
        )
        self.ep_rank = dist.get_rank() % ep_size if ep_size > 1 else 0

    @property
    def gate(self) -> TimestepGate:
        return self.deepspeed_moe.gate

    @property
    def local_experts(self) -> range:
        """Global ids of the experts that live on this rank."""
        return range(self.ep_rank * self.num_local_experts, (self.ep_rank + 1) * self.num_local_experts)

    def _create_process_groups(self, use_data_before_expert_parallel_: bool = False) -> None:
        if use_data_before_expert_parallel_:
            raise UserError("use_data_before_expert_parallelism is not supported: it moves experts to other ranks")
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep_size)
        super()._create_process_groups(False)
        rank = groups._get_expert_parallel_rank(self.expert_group_name)
        if self.ep_size > 1 and rank != self.ep_rank:
            raise RuntimeError(f"built as expert-parallel rank {self.ep_rank}, but DeepSpeed's group says {rank}")

    def forward(self, z: Tensor, e_t: Tensor) -> tuple[Tensor, Tensor]:
        """(N, L, D) tokens, (N, D) timestep embeddings -> mixture (N, L, D), gate probabilities (N, M) float32."""
        return self.deepspeed_moe(z, e_t)


@contextlib.contextmanager
def _silent_deepspeed() -> Iterator[None]:
    """DeepSpeed logs a line for every layer that is built."""
    level = deepspeed_logger.level
    deepspeed_logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        deepspeed_logger.setLevel(level)
