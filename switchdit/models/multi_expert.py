"""The multi-expert baseline: whole denoisers side by side, each for its own range of timesteps.

This is what Switch-DiT is compared with in the paper (Table 1), and how eDiff-I (arXiv 2211.01324) isolates noise
levels: nothing is shared, so that E denoisers have E times the parameters, of which a timestep uses one E-th.

    N = samples, C = latent channels, T = timesteps, E = denoisers
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from switchdit.models.dit import DiT


class MultiExpertDiT(nn.Module):
    """E DiT; number i denoises timesteps ``i T / E`` to ``(i + 1) T / E - 1``. Trained and sampled as one model."""

    def __init__(self, *, num_denoisers: int, **dit_fields):
        super().__init__()
        self.denoisers = nn.ModuleList(DiT(**dit_fields) for _ in range(num_denoisers))
        first = self.denoisers[0]
        self.in_channels, self.out_channels, self.input_size = first.in_channels, first.out_channels, first.input_size
        self.num_classes, self.null_label, self.num_timesteps = first.num_classes, first.null_label, first.num_timesteps
        self.class_dropout_prob = first.class_dropout_prob
        self.activation_checkpointing = first.activation_checkpointing

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop_label: Tensor | None = None) -> Tensor:
        """As `DiT.forward`. In training, a denoiser without samples has gradients of zero rather than none."""
        num_denoisers = len(self.denoisers)
        owner = (t * num_denoisers // self.num_timesteps).long().clamp(0, num_denoisers - 1)
        if drop_label is None and self.training and self.class_dropout_prob > 0:
            drop_label = torch.rand(len(y), device=y.device) < self.class_dropout_prob
        parts, order, idle = [], [], 0.0
        for i, denoiser in enumerate(self.denoisers):
            mine = (owner == i).nonzero().squeeze(1)
            if len(mine):
                denoiser.class_dropout_prob = self.class_dropout_prob
                denoiser.activation_checkpointing = self.activation_checkpointing
                parts.append(denoiser(x[mine], t[mine], y[mine], None if drop_label is None else drop_label[mine]))
                order.append(mine)
            elif self.training:  # attention kernels refuse empty batches; ZeRO's hooks need every gradient
                idle = idle + 0.0 * sum(p.sum() for p in denoiser.parameters() if p.requires_grad)
        return torch.cat(parts)[torch.cat(order).argsort()] + idle
