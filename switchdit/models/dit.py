"""DiT (Peebles & Xie 2023, arXiv 2212.09748): embedders, adaLN-Zero block and backbone, for one device.

    N = samples, C = latent channels, H = W = latent size, p = patch size, L = (H / p)^2 tokens,
    D = width, h = heads, K = classes, T = timesteps

Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def timestep_frequencies(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of t at ``dim // 2`` geometric frequencies: (N,) -> (N, dim) float32 (odd: ends in 0)."""
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * frequency
    embedding = torch.cat([angle.cos(), angle.sin()], dim=-1)
    return F.pad(embedding, (0, dim - 2 * half))


def sincos_positions(dim: int, grid_size: int) -> np.ndarray:
    """Fixed 2-D positions: (grid_size^2, dim) float64. The first half encodes the column, the second the row."""
    frequency = 10000.0 ** (-np.arange(dim // 4, dtype=np.float64) / (dim // 4))
    angle = np.arange(grid_size, dtype=np.float64)[:, None] * frequency
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # (grid, dim / 2)
    row, column = np.divmod(np.arange(grid_size**2), grid_size)
    return np.concatenate([axis[column], axis[row]], axis=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(N, L, D), (N, D), (N, D) -> (N, L, D)"""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """Frequencies of t through a two-layer MLP.

    In float32 whatever the model's type: sinusoids of a t near 1000 mean nothing in bfloat16, and the gates of
    Switch-DiT are functions of this alone.
    """

    def __init__(self, hidden_size: int, frequency_size: int = 256):
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:  # (N,) -> (N, D) float32
        first, _, last = self.mlp
        dtype = torch.promote_types(first.weight.dtype, torch.float32)
        with torch.autocast(device_type=t.device.type, enabled=False):
            x = timestep_frequencies(t, self.frequency_size).to(dtype)
            x = F.silu(F.linear(x, first.weight.to(dtype), first.bias.to(dtype)))
            return F.linear(x, last.weight.to(dtype), last.bias.to(dtype))


class LabelEmbedder(nn.Module):
    """A vector per class and, for guidance without a classifier, one more for "no class"."""

    def __init__(self, num_classes: int, hidden_size: int, has_null: bool):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + has_null, hidden_size)

    def forward(self, y: Tensor) -> Tensor:  # (N,) -> (N, D)
        return self.embedding_table(y)


class PatchEmbedder(nn.Module):
    """Non-overlapping patches, projected linearly."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, L, D)
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # (N, L, D) -> (N, L, D)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (N, L, 3, h, D / h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Attention and MLP, both conditioned by adaLN-Zero: shift, scale and gate regressed from c."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (N, L, D), (N, D) -> (N, L, D)
        return self.modulated(x, self.adaLN_modulation(c))

    def modulated(self, x: Tensor, modulation: Tensor, around: Tensor | None = None) -> Tensor:
        """Attention and MLP: (N, L, D), (N, 6 D) -> (N, L, D).

        What they make of x is added to x or to ``around``; with ``around=z`` that is
        ``modulated(x, modulation) + (z - x)``, without the difference.
        """
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        attended = gate_attn.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        x = x + attended
        added_to = x if around is None else around + attended
        return added_to + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (N, L, D), (N, D) -> (N, L, p^2 * C_out)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The backbone. Build it with `switchdit.build_model`, which checks the numbers.

    Attributes:
        class_dropout_prob: share of labels replaced by the null label in training mode; may be changed at any time.
        null_label: the label that stands for "no class", or None when the model was built without label dropout.
        activation_checkpointing: recompute every n-th block in the backward pass; 0, as built: none. It saves memory
            and changes no number; may be changed at any time.
    """

    def __init__(
        self,
        *,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        num_classes: int,
        class_dropout_prob: float,
        learn_sigma: bool,
        num_timesteps: int,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.input_size, self.patch_size = input_size, patch_size
        self.hidden_size, self.num_heads, self.mlp_ratio = hidden_size, num_heads, mlp_ratio
        self.num_classes, self.num_timesteps = num_classes, num_timesteps
        self.class_dropout_prob = class_dropout_prob
        self.null_label = num_classes if class_dropout_prob > 0 else None
        self.activation_checkpointing = 0

        grid_size = input_size // patch_size
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, has_null=class_dropout_prob > 0)
        positions = torch.from_numpy(sincos_positions(hidden_size, grid_size)).float().unsqueeze(0)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # (1, L, D)
        self.blocks = nn.ModuleList([self.make_block() for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def make_block(self) -> nn.Module:
        return DiTBlock(self.hidden_size, self.num_heads, self.mlp_ratio)

    def initialize_weights(self) -> None:
        """Xavier for linear layers, N(0, 0.02) for embedders, zero for modulations and output (DiT, Sec. 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for layer in [*(b.adaLN_modulation[1] for b in self.blocks), self.final_layer.adaLN_modulation[1]]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def embed(self, x: Tensor, t: Tensor, y: Tensor, drop_label: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens z (N, L, D), conditioning c (N, D), timestep embedding e_t (N, D) float32."""
        if self.training and self.class_dropout_prob > 0:
            if drop_label is None:
                drop_label = torch.rand(len(y), device=y.device) < self.class_dropout_prob
            y = torch.where(drop_label, self.null_label, y)
        dtype = self.x_embedder.proj.weight.dtype
        z = self.x_embedder(x.to(dtype)) + self.pos_embed.to(dtype)
        e_t = self.t_embedder(t)
        return z, e_t.to(dtype) + self.y_embedder(y), e_t

    def block_calls(self) -> list[Callable]:
        """The blocks in order; in training mode every `activation_checkpointing`-th keeps nothing but its inputs, and
        is computed again in the backward pass."""
        every = self.activation_checkpointing if self.training else 0
        # nothing random happens in a block: there is no state of a generator to save
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        return [partial(again, b) if every and i % every == 0 else b for i, b in enumerate(self.blocks, start=1)]

    def unpatchify(self, x: Tensor) -> Tensor:  # (N, L, p^2 * C_out) -> (N, C_out, H, W)
        p, grid = self.patch_size, self.input_size // self.patch_size
        x = x.unflatten(1, (grid, grid)).unflatten(-1, (p, p, self.out_channels))  # (N, g, g, p, p, C_out)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, self.input_size, self.input_size)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop_label: Tensor | None = None) -> Tensor:
        """Noise (and variance) prediction, of the same type in training and in evaluation.

        Args:
            x: (N, C, H, W) noisy latents.
            t: (N,) timesteps, 0 to T - 1 of the full schedule; (1,) where all images have the same, as in sampling:
                what depends on t alone is then done once.
            y: (N,) labels; `null_label` for "no class".
            drop_label: (N,) bool, labels to drop in training mode instead of a random choice.

        Returns:
            (N, 2C, H, W): noise, then the variance's interpolation; (N, C, H, W) without learned sigma.
        """
        z, c, _ = self.embed(x, t, y, drop_label)
        for block in self.block_calls():
            z = block(z, c)  # (N, L, D)
        return self.unpatchify(self.final_layer(z, c))
