"""Diff-MoE (Cheng et al., ICML 2025): tokens choose experts, each with its own conditioning on timestep and label.

    N = samples, L = g^2 tokens on a g x g grid, D = width, h = heads, I = inner width of an expert, B = blocks,
    E = experts, k = top-k

Where the authors' code says something else: it initialises the experts' modulations to zero and then overwrites them
(here they stay zero, as adaLN-Zero means); and it gives routed experts no gradients in evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchdit.models.dit import Attention, DiT, modulate
from switchdit.moe.load_balance import load_balance_loss
from switchdit.moe.token_layer import TokenMoE

RANK = 64  # of the bottlenecks through which c and the mean token speak to the experts


@dataclass
class TokenRouting:
    """How the tokens of a batch were routed.

    Attributes:
        load_balance: (B,) `load_balance_loss` of each block over all tokens of the batch, unweighted; differentiable.
        token_share: (B, E) share of the tokens that chose each expert; rows sum to k. No gradient.
    """

    load_balance: Tensor
    token_share: Tensor


def rotary_table(head_size: int, grid_size: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2-D rotary positions, (g^2, head_size / 2) float32 each.

    Entries 2m and 2m + 1 turn with frequency ``10000^(-4m / head_size)``, by the column and by the row.
    """
    frequency = 1 / 10000.0 ** (torch.arange(0, head_size, 4, dtype=torch.float32, device=device) / head_size)
    index = torch.arange(grid_size**2, device=device)
    position = torch.stack([index % grid_size, index // grid_size], dim=1)  # (g^2, 2)
    angle = (position[:, None, :] * frequency[:, None]).flatten(1)
    turn = torch.polar(torch.ones_like(angle), angle)  # on a CPU, cos and sin differ from the authors' in the last bit
    return turn.real, turn.imag


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels, in float32 or better: (..., L, d), (L, d / 2) twice -> (..., L, d)."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


class RotaryAttention(Attention):
    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:  # (N, L, D), `rotary_table` -> (N, L, D)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (N, L, 3, h, D / h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(rotate(q, *rotation), rotate(k, *rotation), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class ConditionedMlp(nn.Module):
    """SwiGLU with adaLN-Zero and residual of its own: ``x + gate * mlp((1 + scale) * norm(x) + shift)``.

    Shift, scale and gate come from c through a bottleneck.
    """

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(
            nn.Linear(hidden_size, RANK, bias=False), nn.ReLU(), nn.Linear(RANK, 3 * hidden_size)
        )

    def initialize_weights(self) -> None:
        """Xavier, and zero where the modulation comes out: the expert starts as the identity."""
        for layer in (self.gate_proj, self.up_proj, self.down_proj, self.adaLN_modulation[0]):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.adaLN_modulation[2].weight)
        nn.init.zeros_(self.adaLN_modulation[2].bias)

    def forward(
        self, x: Tensor, c: Tensor, channel_weight: Tensor | None = None, sample: Tensor | None = None
    ) -> Tensor:
        """Samples (N, L, D), or tokens (n, D) of which ``sample`` (n,) says whose they are.

        Args:
            c: (S, D) conditioning of the samples.
            channel_weight: (S, I) factors of the hidden channels.
        """
        modulation = _of_tokens(self.adaLN_modulation(c), sample)
        shift, scale, gate = modulation.chunk(3, dim=-1)
        normed = self.norm(x) * (1 + scale) + shift
        hidden = F.silu(self.gate_proj(normed)) * self.up_proj(normed)
        if channel_weight is not None:
            hidden = hidden * _of_tokens(channel_weight, sample)
        return x + gate * self.down_proj(hidden)


def _of_tokens(of_samples: Tensor, sample: Tensor | None) -> Tensor:
    """(S, C) as it meets (n, D) tokens, or (S, L, D) of whole samples."""
    return of_samples.unsqueeze(1) if sample is None else of_samples[sample]


class DiffMoEBlock(nn.Module):
    """Attention, then a depthwise convolution whose output the mixture works on."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        num_experts: int,
        top_k: int,
        ep_size: int,
        num_shared_experts: int,
    ):
        super().__init__()
        inner_size = int(mlp_ratio * hidden_size)
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = RotaryAttention(hidden_size, num_heads)
        self.dwconv = nn.Conv2d(hidden_size, hidden_size, kernel_size=5, padding=2, groups=hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.recalibration = nn.Sequential(
            nn.Linear(hidden_size, RANK, bias=False), nn.ReLU(), nn.Linear(RANK, inner_size, bias=False), nn.Sigmoid()
        )
        expert = ConditionedMlp(hidden_size, inner_size)
        self.moe = TokenMoE(hidden_size, num_experts, top_k, ep_size, expert)
        self.shared_expert = ConditionedMlp(hidden_size, num_shared_experts * hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(N, L, D), (N, D), `rotary_table` -> x (N, L, D), gate probabilities and choice (N L, E)."""
        shift_attn, scale_attn, gate_attn, shift_moe, scale_moe, gate_moe = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_attn.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_attn, scale_attn), rotation)

        grid_size = math.isqrt(x.shape[1])
        local = self.dwconv(x.transpose(1, 2).unflatten(2, (grid_size, grid_size))).flatten(2).transpose(1, 2)
        z = modulate(self.norm2(local), shift_moe, scale_moe)
        mixture, probs, chosen = self.moe(z, c, self.recalibration(z.mean(1)))
        return x + gate_moe.unsqueeze(1) * (mixture + self.shared_expert(z, c)), probs, chosen


class DiffMoE(DiT):
    """DiT with a `TokenMoE` in every block, rotary positions and local convolutions. See `switchdit.build_model`."""

    def __init__(self, *, num_experts: int, top_k: int, ep_size: int, num_shared_experts: int, **dit_fields):
        self.num_experts, self.top_k, self.ep_size = num_experts, top_k, ep_size
        self.num_shared_experts = num_shared_experts
        super().__init__(**dit_fields)

    def make_block(self) -> DiffMoEBlock:
        mixture = (self.num_experts, self.top_k, self.ep_size, self.num_shared_experts)
        return DiffMoEBlock(self.hidden_size, self.num_heads, self.mlp_ratio, *mixture)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As `DiT`; gates and convolutions keep PyTorch's uniform draw, and there are no absolute positions."""
        # Mixtures stand aside, so that how many experts live on this rank does not change what else is drawn.
        mixtures = [block.moe for block in self.blocks]
        for block in self.blocks:
            block.moe = None
        super().initialize_weights()
        self.pos_embed.zero_()
        for block, moe in zip(self.blocks, mixtures, strict=True):
            block.moe = moe
            moe.initialize_experts(ConditionedMlp.initialize_weights)
            block.shared_expert.initialize_weights()

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, drop_label: Tensor | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, TokenRouting]:
        """As `DiT.forward`; t may be fractional. With ``return_routing`` also the `TokenRouting` of the batch."""
        z, c, _ = self.embed(x, t, y, drop_label)
        rotation = rotary_table(self.hidden_size // self.num_heads, self.input_size // self.patch_size, z.device)
        routes = []
        for block in self.block_calls():
            z, *route = block(z, c, rotation)  # (N, L, D)
            routes.append(route)
        out = self.unpatchify(self.final_layer(z, c))
        if not return_routing:
            return out
        load_balance = torch.stack([load_balance_loss(probs, chosen) for probs, chosen in routes])
        return out, TokenRouting(load_balance, torch.stack([chosen.mean(0) for _, chosen in routes]))
