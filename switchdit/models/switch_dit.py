"""Switch-DiT (Park et al. 2024, arXiv 2403.09176): every DiT block begins with experts chosen by the timestep.

N = samples, L = tokens, D = width, B = blocks, M = experts, k = top-k, T = timesteps
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from switchdit.models.dit import DiT, DiTBlock
from switchdit.moe.layer import Route, TimestepMoE, plan_routes
from switchdit.moe.load_balance import load_balance_loss
from switchdit.moe.timestep_gate import top_k_map

GATES = ("plain", "noisy")
# how the mixture E(z) = sum_j g_j E_j(z) meets a block, in the order of the paper's ablation (Table 1)
INTEGRATIONS = ("replace", "multiply", "multiply_skip", "multiply_skip_one")


@dataclass
class Routing:
    """How a batch was routed.

    Attributes:
        probs: (N, B*M) float32 gate probabilities, the softmax of each block side by side; differentiable.
        task_expert_map: (T, B*M) of 0 and 1: what each timestep would choose with the gates as they are when this is
            first read (it gates all T timesteps, which the forward pass has no need of).
    """

    probs: Tensor
    model: SwitchDiT

    @cached_property
    def task_expert_map(self) -> Tensor:
        return self.model.task_expert_map()

    @property
    def load_balance(self) -> Tensor:
        """(B,) `load_balance_loss` of each block over the samples of the batch."""
        per_block = self.probs.unflatten(1, (-1, self.model.num_experts)).unbind(1)
        return torch.stack([load_balance_loss(p, top_k_map(p.detach(), self.model.top_k)) for p in per_block])


class SwitchDiTBlock(DiTBlock):
    """``r = z * m``, the DiT block on r, and the rest of z around it: ``block(r) + z * (1 - m)`` (Eq. 5, 6).

    That is ``integration="multiply_skip_one"``, with ``m = 1 + E(z)`` of experts that start at zero. The others leave
    out, from the last: the one (``m = E(z)``, and experts start as other linear layers do), the skip (``block(r)``
    alone), and the product (``r = E(z)``).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        num_experts: int,
        top_k: int,
        ep_size: int,
        gate: str = "plain",
        integration: str = "multiply_skip_one",
    ):
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.integration = integration
        self.moe = TimestepMoE(hidden_size, num_experts, top_k, ep_size, noisy=gate == "noisy")

    def forward(self, z: Tensor, c: Tensor, e_t: Tensor, route: Route | None = None) -> Tensor:
        """(N, L, D), (N, D), (N, D) -> (N, L, D)."""
        finish = self.moe.begin(z, e_t, route, multiply=self.integration == "multiply_skip_one")
        modulation = self.adaLN_modulation(c)  # has no need of the mixture, which may be on its way
        routed = finish()
        if self.integration in ("multiply", "multiply_skip"):
            routed = z * routed
        return self.modulated(routed, modulation, around=z if "skip" in self.integration else None)


class SwitchDiT(DiT):
    """DiT with a `TimestepMoE` in every block. Build it with `switchdit.build_model`."""

    def __init__(self, *, num_experts: int, top_k: int, ep_size: int, gate: str, integration: str, **dit_fields):
        self.num_experts, self.top_k, self.ep_size = num_experts, top_k, ep_size
        self.gate, self.integration = gate, integration
        super().__init__(**dit_fields)

    def make_block(self) -> SwitchDiTBlock:
        mixture = (self.num_experts, self.top_k, self.ep_size, self.gate, self.integration)
        return SwitchDiTBlock(self.hidden_size, self.num_heads, self.mlp_ratio, *mixture)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        for moe in (block.moe for block in self.blocks):
            if moe.gate.wg_noise is not None:
                nn.init.zeros_(moe.gate.wg_noise.weight)
            if self.integration != "multiply_skip_one":
                moe.initialize_experts(lambda expert: nn.init.xavier_uniform_(expert.weight))

    @property
    def num_gates(self) -> int:
        """B*M."""
        return len(self.blocks) * self.num_experts

    @torch.no_grad()
    def task_expert_map(self) -> Tensor:
        """Which experts each of the T timesteps chooses: (T, B*M) float32 of 0 and 1, k ones per block."""
        e_t = self.t_embedder(torch.arange(self.num_timesteps, device=self.pos_embed.device))
        return torch.cat([block.moe.gate.expert_map(e_t) for block in self.blocks], dim=1).float()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        drop_label: Tensor | None = None,
        return_routing: bool = False,
        gate_noise: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Routing]:
        """As `DiT.forward`; with ``return_routing`` also the `Routing` of the batch, one row of it for a shared t.

        ``gate_noise``: (N, B*M) standard normal for noisy gates in training mode, instead of a random draw.
        """
        z, c, e_t = self.embed(x, t, y, drop_label)
        if self.ep_size > 1:
            e_t = e_t.expand(len(z), -1)  # samples travel one by one
        routes = plan_routes([block.moe for block in self.blocks], e_t, gate_noise)
        for block, route in zip(self.block_calls(), routes, strict=True):
            z = block(z, c, e_t, route)  # (N, L, D)
        out = self.unpatchify(self.final_layer(z, c))
        return (out, Routing(torch.cat([r.probs for r in routes], dim=1), self)) if return_routing else out
