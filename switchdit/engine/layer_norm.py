"""LayerNorms by apex's kernel, where a run asks for it; ``train.compile`` fuses PyTorch's with what follows."""

from __future__ import annotations

import torch
from torch import nn

from switchdit.errors import UserError


def check_layer_norm(setting: str, compiled: bool, device: torch.device) -> None:
    """Raise `UserError` where apex's kernel is asked for and cannot be had, or could do nothing.

    Args:
        setting: ``train.layer_norm``; compiled: ``train.compile``.
    """
    if setting != "apex":
        return
    if compiled:
        raise UserError(
            "train.layer_norm is 'apex', but with train.compile it must be torch: blocks are compiled whole"
        )
    if device.type != "cuda":
        raise UserError(f"train.layer_norm is 'apex', whose kernel needs a CUDA device, not {device.type}: set torch")
    apex_layer_norm(8, 1e-6)


def apex_layer_norm(width: int | tuple[int, ...], eps: float) -> nn.Module:
    """NVIDIA's FusedLayerNorm without parameters: (..., width) -> (..., width).

    Raises:
        UserError: if it is not installed, or was installed without its CUDA extensions.
    """
    try:
        from apex.normalization import FusedLayerNorm

        return FusedLayerNorm(width, eps=eps, elementwise_affine=False)
    except (ImportError, AttributeError) as problem:
        raise UserError(
            f"train.layer_norm is 'apex', but there is no apex.normalization.FusedLayerNorm ({problem}): install "
            "NVIDIA's apex from its source with its CUDA extensions, or set torch"
        ) from None


def use_apex_layer_norm(model: nn.Module) -> None:
    """Put apex's in place of every LayerNorm that has no parameters, as all of this family are; names stay."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm) and not child.elementwise_affine:
                setattr(module, name, apex_layer_norm(child.normalized_shape, child.eps))
