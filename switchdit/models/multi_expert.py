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
        trains = self.training and torch.is_grad_enabled()
        num_denoisers = len(self.denoisers)
        t = t.expand(len(x))
        owner = (t * num_denoisers // self.num_timesteps).long().clamp(0, num_denoisers - 1)
        if drop_label is None and self.training and self.class_dropout_prob > 0:
            drop_label = torch.rand(len(y), device=y.device) < self.class_dropout_prob
        parts, order = [], []
        for i, denoiser in enumerate(self.denoisers):
            mine = (owner == i).nonzero().squeeze(1)
            if not len(mine) and not trains:
                continue
            # ZeRO fills its buckets in the order in which gradients come, and ranks exchange them in that order: where
            # a rank has no samples for a denoiser, a real backward pass through it must run all the same. Attention
            # kernels refuse empty batches, so that it gets the first sample, of whose output nothing is kept.
            seen = mine if len(mine) else mine.new_zeros(1)
            denoiser.class_dropout_prob = self.class_dropout_prob
            denoiser.activation_checkpointing = self.activation_checkpointing
            out = denoiser(x[seen], t[seen], y[seen], None if drop_label is None else drop_label[seen])
            parts.append(out[: len(mine)])
            order.append(mine)
        return torch.cat(parts)[torch.cat(order).argsort()]
