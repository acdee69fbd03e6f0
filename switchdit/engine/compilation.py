"""``torch.compile``: block by block in training, where only what changes shape breaks; the whole model in sampling."""

from __future__ import annotations

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from switchdit.errors import UserError

# the others choose samples or tokens by the data, and would be compiled again and again
SYSTEMS = ("DiT", "DTR", "Switch-DiT")


def check_compiler(setting: str, system: str, device: torch.device) -> None:
    """Raise `UserError` where ``setting`` asks for what this system or machine does not have."""
    if system not in SYSTEMS:
        raise UserError(f"{setting} is true, but {system} is not compiled; it must be one of {', '.join(SYSTEMS)}")
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.zeros(4, device=device))
    except (TorchDynamoException, ImportError, OSError) as problem:
        told = " ".join(str(problem).split("\n\n")[0].split())
        raise UserError(f"{setting} is true, but torch.compile does not work here: {told}") from None


def compile_blocks(model: nn.Module) -> None:
    """Compile each block, in place. With experts on other ranks a block has a break where they are waited for."""
    for block in model.blocks:
        block.compile(fullgraph=getattr(model, "ep_size", 1) == 1)


def compile_model(model: nn.Module) -> None:
    """Compile the whole, in place; on a GPU it is replayed as a CUDA graph, one for each batch size."""
    model.compile(fullgraph=True, dynamic=False, mode="reduce-overhead")
