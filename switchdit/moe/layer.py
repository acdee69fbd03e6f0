"""TimestepMoE: DeepSpeed's MoE with its gate, dispatch and experts replaced by timestep-routed ones.

    N = samples of this rank, L = tokens, D = width, M = experts, k = top-k,
    R = expert-parallel ranks (ep_size), J = M / R experts that live on one rank, B = blocks of the model

The classes are subclasses of DeepSpeed's, so that its engine finds them: it marks expert parameters, builds the
expert-parallel groups, reduces expert gradients over the expert-data-parallel group and writes expert checkpoints
per rank, all unmodified. What differs from the stock layer: the gate sees the timestep embedding, not the tokens;
whole samples travel, with uneven all-to-all splits; nothing has a capacity, nothing is dropped or padded, and the
raw top-k probabilities weigh the outputs.

With several expert-parallel ranks either samples travel to the experts or the experts' weights to the samples (see
dispatch.py); the numbers are the same to rounding: mixtures of ranks are rounded, then added, where merged experts are
rounded once.

This file, token_layer.py, engine/ and the kernel's builder are the only places that import deepspeed.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from deepspeed import comm as dist
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from deepspeed.utils import groups
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from switchdit.errors import UserError
from switchdit.kernels.expert_mix import expert_mix, linear_mixture
from switchdit.moe.exchanges import Pending, begin_rows, exchange_rows
from switchdit.moe.experts import LinearExpert, stacked
from switchdit.moe.routes import ExpertsOnTheirWay, Route, exchange_routes
from switchdit.moe.timestep_gate import gate_probs, top_k_gates, top_k_map


class TimestepGate(TopKGate):
    """DeepSpeed's gate, fed with timestep embeddings; with ``noisy``, logits are noisy in training mode."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, noisy: bool = False):
        super().__init__(hidden_size, num_experts, top_k, drop_tokens=False, use_rts=False)
        self.wg = nn.Linear(hidden_size, num_experts, bias=True)
        self.wg_noise = nn.Linear(hidden_size, num_experts, bias=False) if noisy else None

    def _set_ep_group(self, ep_group) -> None:
        self.ep_group = ep_group  # the stock gate refuses a second call, but an engine may be made anew

    def forward(self, e_t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(N, D) -> probs (N, M), gates (N, M). ``noise``: (N, M) standard normal; drawn here if not given."""
        if self.wg_noise is None or not self.training:
            probs = gate_probs(e_t, self.wg.weight, self.wg.bias)
        else:
            if noise is None:
                noise = torch.randn(len(e_t), self.wg.out_features, device=e_t.device)
            probs = gate_probs(e_t, self.wg.weight, self.wg.bias, self.wg_noise.weight, noise)
        return probs, top_k_gates(probs, self.k)

    @torch.no_grad()
    def expert_map(self, e_t: Tensor) -> Tensor:  # (T, D) -> (T, M) of 0 and 1
        return top_k_map(gate_probs(e_t, self.wg.weight, self.wg.bias), self.k)


class SampleExperts(Experts):
    """DeepSpeed's container of this rank's experts, applied as one merged matrix per sample."""

    def forward(self, z: Tensor, gates: Tensor, multiply: bool = False) -> Tensor:  # (n, L, D), (n, J) -> (n, L, D)
        # Every local expert takes part, also with no samples at all: each parameter then gets a gradient (zero), so
        # that ZeRO-2's hooks fire in the same order with the same buckets on every rank.
        return _apply(z, *stacked(self.deepspeed_experts), gates, multiply)


def _apply(z: Tensor, weight: Tensor, bias: Tensor, gates: Tensor, multiply: bool) -> Tensor:
    return expert_mix(z, weight, bias, gates)[0] if multiply else linear_mixture(z, weight, bias, gates)


class SampleMOELayer(MOELayer):
    """Brings samples and experts together: here, or on the ranks of the experts, or with the experts of all ranks."""

    def forward(self, z: Tensor, route: Route, multiply: bool = False) -> Pending:
        """Send what has to travel; what is returned waits for it, and gives the mixture (N, L, D), or with ``multiply``
        the product of z with 1 + mixture."""
        if route.experts:
            return self._gather(z, route, multiply)
        if route.sample is not None:
            return self._dispatch(z, route, multiply)
        return lambda: self.experts(z, route.gates, multiply)

    @torch.compiler.disable  # splits depend on data
    def _dispatch(self, z: Tensor, route: Route, multiply: bool) -> Pending:
        """Send each sample once to every rank that holds an expert it chose."""
        there = begin_rows(z[route.sample], self.ep_group, route.send, route.receive)
        return partial(self._mix_there, there, z, route, multiply)

    @torch.compiler.disable
    def _mix_there(self, there: Pending, z: Tensor, route: Route, multiply: bool) -> Tensor:
        back = exchange_rows(self.experts(there(), route.gates), self.ep_group, route.receive, route.send)
        mixture = torch.zeros_like(z).index_add(0, route.sample, back)
        return torch.addcmul(z, z, mixture) if multiply else mixture

    @torch.compiler.disable
    def _gather(self, z: Tensor, route: Route, multiply: bool) -> Pending:
        """Get the experts of all ranks. The next layer's set out while this block is computed: two layers' are here at
        a time, but for what autograd keeps for the backward pass."""
        own, *following = route.experts
        own.begin()
        for experts in following:
            experts.begin_ahead()
        return partial(self._mix_here, z, route, multiply)

    @torch.compiler.disable
    def _mix_here(self, z: Tensor, route: Route, multiply: bool) -> Tensor:
        return _apply(z, *route.experts[0].take(), route.gates, multiply)


def check_mixture(num_experts: int, top_k: int, ep_size: int) -> None:
    """Raise `UserError` unless the numbers fit each other."""
    if not 1 <= top_k <= num_experts:
        raise UserError(f"top_k ({top_k}) must lie between 1 and num_experts ({num_experts})")
    if ep_size < 1 or num_experts % ep_size:
        raise UserError(f"num_experts ({num_experts}) must be divisible by ep_size ({ep_size})")


class RoutedMoE(MoE):
    """DeepSpeed's MoE with another gate, another dispatch and other experts: what the layers of this package share.

    Args:
        gate: its weight ``wg.weight`` (M, D) and its ``k`` tell the sizes.
        expert: what every expert of this rank starts as a copy of.
        ep_size: expert-parallel ranks; must divide M. Above 1, torch.distributed must be initialised first.
        layer_class, experts_class: the dispatch, and what applies the experts of this rank.

    Raises:
        UserError: if the numbers do not fit each other.
    """

    def __init__(
        self,
        gate: TopKGate,
        expert: nn.Module,
        ep_size: int,
        layer_class: type[MOELayer],
        experts_class: type[Experts],
    ):
        num_experts, hidden_size = gate.wg.weight.shape
        check_mixture(num_experts, gate.k, ep_size)
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size % ep_size:
            raise UserError(f"ep_size ({ep_size}) needs {ep_size} processes or a multiple of that, not {world_size}")
        with _silent_deepspeed():
            super().__init__(hidden_size, expert, num_experts, ep_size, gate.k, drop_tokens=False, use_rts=False)
        experts = self.deepspeed_moe.experts
        experts.__class__ = experts_class  # same parameters; DeepSpeed has marked them already
        layer = layer_class(gate, experts, self.expert_group_name, self.ep_size, self.num_local_experts)
        self.deepspeed_moe = layer
        self.ep_rank = dist.get_rank() % ep_size if ep_size > 1 else 0

    @property
    def gate(self) -> TopKGate:
        return self.deepspeed_moe.gate

    @property
    def local_experts(self) -> range:
        """Global ids of the experts that live on this rank."""
        return range(self.ep_rank * self.num_local_experts, (self.ep_rank + 1) * self.num_local_experts)

    @torch.no_grad()
    def initialize_experts(self, initialize: Callable[[nn.Module], object]) -> None:
        """Draw the weights of all M experts in order, and keep those of this rank: the same for every ``ep_size``."""
        local = self.deepspeed_moe.experts.deepspeed_experts
        elsewhere = copy.deepcopy(local[0])
        for j in range(self.num_experts):
            initialize(local[j - self.local_experts.start] if j in self.local_experts else elsewhere)

    def _create_process_groups(self, use_data_before_expert_parallel_: bool = False) -> None:
        if use_data_before_expert_parallel_:
            raise UserError("use_data_before_expert_parallelism is not supported: it moves experts to other ranks")
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep_size)
        super()._create_process_groups(False)
        rank = groups._get_expert_parallel_rank(self.expert_group_name)
        if self.ep_size > 1 and rank != self.ep_rank:
            raise RuntimeError(f"built as expert-parallel rank {self.ep_rank}, but DeepSpeed's group says {rank}")


class TimestepMoE(RoutedMoE):
    """Mixture of linear experts chosen by the timestep (Switch-DiT, Sec. 4.1).

    Args:
        hidden_size: D, width of tokens and of the timestep embedding.
        num_experts: M.
        top_k: k, experts per sample.
        ep_size: expert-parallel ranks; must divide M. Above 1, torch.distributed must be initialised first.
        noisy: noisy top-k gating.

    Raises:
        UserError: if the numbers do not fit each other.
    """

    def __init__(self, hidden_size: int, num_experts: int = 3, top_k: int = 2, ep_size: int = 1, noisy: bool = False):
        gate = TimestepGate(hidden_size, num_experts, top_k, noisy)
        super().__init__(gate, LinearExpert(hidden_size), ep_size, SampleMOELayer, SampleExperts)
        self.dispatch = "samples"

    def forward(self, z: Tensor, e_t: Tensor, route: Route | None = None) -> tuple[Tensor, Tensor]:
        """Mixture of the experts that the timestep chooses.

        Args:
            z: (N, L, D) tokens; e_t: (N, D) timestep embeddings, or with ``ep_size`` 1 one that all share, (1, D): the
                experts are then merged once.
            route: this layer's part of `plan_routes`, where that was called for all layers of a model at once.

        Returns:
            mixture (N, L, D) and gate probabilities (N, M) or (1, M) float32.
        """
        if route is None:
            [route] = plan_routes([self], e_t)
        return self.begin(z, e_t, route)(), route.probs

    def begin(self, z: Tensor, e_t: Tensor, route: Route | None = None, multiply: bool = False) -> Pending:
        """As `forward`, in two parts: what is done before the returned function is called for the mixture (N, L, D)
        runs beside the exchange between expert-parallel ranks. With ``multiply`` it gives ``z * (1 + mixture)``."""
        if route is None:
            [route] = plan_routes([self], e_t)
        return self.deepspeed_moe(z, route, multiply)


def plan_routes(layers: Sequence[TimestepMoE], e_t: Tensor, gate_noise: Tensor | None = None) -> list[Route]:
    """Gate all layers, and tell the ranks what they will get from each other: (N, D) -> a `Route` per layer.

    ``gate_noise``: (N, B*M) standard normal for noisy gates, the layers' side by side.

    Routes depend on timesteps alone, so two exchanges at the start of a forward pass serve all layers: how many samples
    go where, and their gates. This is also the only place where the host waits for the device. Where the experts
    travel, nothing needs to be told and the host never waits; the first layer's set out here.
    """
    noises = [None] * len(layers) if gate_noise is None else gate_noise.chunk(len(layers), dim=1)
    gated = [layer.gate(e_t, noise) for layer, noise in zip(layers, noises, strict=True)]
    if layers[0].ep_size == 1:
        return [Route(probs, gates) for probs, gates in gated]
    if layers[0].dispatch == "samples":
        return exchange_routes(gated, layers[0].deepspeed_moe.ep_group)
    coming = [
        ExpertsOnTheirWay(layer.deepspeed_moe.experts.deepspeed_experts, layer.deepspeed_moe.ep_group)
        for layer in layers
    ]
    coming[0].begin()
    return [Route(probs, gates, experts=coming[b : b + 2]) for b, (probs, gates) in enumerate(gated)]


@contextlib.contextmanager
def _silent_deepspeed() -> Iterator[None]:
    """DeepSpeed logs a line for every layer that is built."""
    level = deepspeed_logger.level
    deepspeed_logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        deepspeed_logger.setLevel(level)
