"""DTR (Park et al. 2024, arXiv 2310.07138): every block of a DiT works on the channels that its timestep owns.

N = samples, L = tokens, D = width, T = timesteps
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from switchdit.models.dit import DiT, DiTBlock
from switchdit.random_streams import random_stream

CHANNEL_MASKS = ("dtr", "random")


def channel_mask(hidden_size: int, num_timesteps: int, alpha: float, beta: float, kind: str = "dtr") -> Tensor:
    """The channels of each timestep: (T, D) float32 of 0 and 1, ``int(beta * D)`` ones in every row.

    Args:
        alpha: how late the window starts to move; beta: share of channels that a timestep owns.
        kind: ``"dtr"``: a window that slides from the first channel to the last as ``(t / (T - 1))^alpha`` (Eq. 5),
            so that neighbouring timesteps share most of theirs. ``"random"``: as many channels, drawn for every
            timestep for itself (the paper's R-TR).
    """
    width = int(hidden_size * beta)
    if kind == "random":
        stream = random_stream(0, "channel mask", hidden_size)
        mask = np.zeros((num_timesteps, hidden_size), dtype=np.float32)
        owned = stream.random((num_timesteps, hidden_size)).argsort(axis=1)[:, :width]
        np.put_along_axis(mask, owned, 1, axis=1)
        return torch.from_numpy(mask)
    # float64 and half-to-even: what the published table was computed in
    start = np.rint(np.linspace(0, 1, num_timesteps) ** alpha * (hidden_size - width)).astype(np.int64)[:, None]
    channel = np.arange(hidden_size)
    return torch.from_numpy(((channel >= start) & (channel < start + width)).astype(np.float32))


class DTRBlock(DiTBlock):
    """The DiT block on the owned channels, the others around it: ``block(z * m) + z * (1 - m)``."""

    def forward(self, z: Tensor, c: Tensor, mask: Tensor) -> Tensor:  # (N, L, D), (N, D), (N, 1, D) -> (N, L, D)
        return self.modulated(z * mask, self.adaLN_modulation(c), around=z)


class DTR(DiT):
    """DiT with a fixed channel mask per timestep and no parameters more. Build it with `switchdit.build_model`."""

    def __init__(self, *, alpha: float, beta: float, channel_mask: str, **dit_fields):
        self.alpha, self.beta, self.mask_kind = alpha, beta, channel_mask
        super().__init__(**dit_fields)
        self.register_buffer("mask", self.task_channel_map(), persistent=False)  # (T, D)

    def make_block(self) -> DTRBlock:
        return DTRBlock(self.hidden_size, self.num_heads, self.mlp_ratio)

    def task_channel_map(self) -> Tensor:
        """Which channels each of the T timesteps owns: (T, D) float32 of 0 and 1, the same in every block."""
        return channel_mask(self.hidden_size, self.num_timesteps, self.alpha, self.beta, self.mask_kind)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop_label: Tensor | None = None) -> Tensor:
        """As `DiT.forward`. A fractional t takes the mask of the timestep below."""
        z, c, _ = self.embed(x, t, y, drop_label)
        mask = self.mask[t.long().clamp(max=self.num_timesteps - 1)].to(z.dtype).unsqueeze(1)
        for block in self.block_calls():
            z = block(z, c, mask)  # (N, L, D)
        return self.unpatchify(self.final_layer(z, c))
