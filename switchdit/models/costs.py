"""What a model costs, worked out from its fields: multiply-adds of a forward pass, and parameters.

    L = tokens, D = width, h = heads, B = blocks, I = inner width of an MLP or expert, P = numbers of a patch,
    M or E = experts, k = top-k, T = timesteps

One MAC is a multiplication with its addition; the "GFLOPs" of the DiT family's papers count these. Counted is what is
a matrix product or a convolution: one image, evaluation mode, one forward pass, without guidance's second one. Biases,
norms, activations, the softmax and rotations are not.
"""

from __future__ import annotations

import torch

from switchdit.errors import UserError
from switchdit.models import build_model, model_fields, parameter_counts, system_of
from switchdit.models.diff_moe import RANK

# every expert for every token; the chosen experts as the authors' code applies them; what this package executes
EXECUTIONS = ("dense", "published", "here")
FREQUENCIES = 256  # of the timestep embedding


def macs(name: str, execution: str = "here", **overrides) -> dict[str, int]:
    """MACs per image by component, keys in the order of the forward pass; their sum is the model's.

    A DTR costs what its DiT does (its mask is a product of numbers, not of matrices), a Multi-Expert-DiT too (one
    denoiser works, the others are idle). The experts of a Switch-DiT:

    =============  =============================================================================
    ``dense``      M products (L, D) x (D, D) a block
    ``published``  k of them
    ``here``       one, by a matrix that is formed for each image: (1, M) x (M, D^2 + D), "expert merging";
                   that product goes over all M experts, of which M - k have gate zero
    =============  =============================================================================

    Args:
        name, overrides: as in `build_model`. ``execution``: one of `EXECUTIONS`; it matters to mixtures alone.

    Raises:
        UserError: an unknown execution, or see `model_fields`.
    """
    if execution not in EXECUTIONS:
        raise UserError(f"execution '{execution}' is unknown; valid are: {', '.join(EXECUTIONS)}")
    f = model_fields(name, **overrides)
    width, depth = f["hidden_size"], f["depth"]
    tokens, patch = _tokens(f), f["patch_size"] ** 2 * f["in_channels"]
    inner = int(f["mlp_ratio"] * width)

    block = {"attention projections": 4 * tokens * width**2, "attention products": 2 * tokens**2 * width}
    block["adaLN"] = 6 * width**2
    if system_of(name) == "Diff-MoE":
        block |= _token_mixture(f, tokens, inner, execution)
    else:
        if system_of(name) == "Switch-DiT":
            block |= _timestep_mixture(f, tokens, execution)
        block["mlp"] = 2 * tokens * width * inner
    return {
        "patch embedding": tokens * patch * width,
        "timestep embedding": FREQUENCIES * width + width**2,
        **{component: depth * count for component, count in block.items()},
        "final layer": 2 * width**2 + tokens * width * patch * (2 if f["learn_sigma"] else 1),
    }


def gating_all_timesteps(name: str, **overrides) -> int:
    """MACs of the authors' Switch-DiT in every call, whatever its batch: it embeds and gates all T timesteps."""
    f = model_fields(name, **overrides)
    embedding = FREQUENCIES * f["hidden_size"] + f["hidden_size"] ** 2
    return f["num_timesteps"] * (embedding + f["depth"] * f["hidden_size"] * f["num_experts"])


def normalised_numbers(name: str, **overrides) -> int:
    """How many numbers pass through the LayerNorms of a DiT per image: two in a block and one at the end."""
    f = model_fields(name, **overrides)
    return (2 * f["depth"] + 1) * _tokens(f) * f["hidden_size"]


def parameters(name: str, **overrides) -> tuple[int, int]:
    """In total, and active: without the experts that an image (Diff-MoE: a token) does not choose.

    Read off the model itself, built without memory for its weights. Fixed positions count, as in published figures.
    """
    with torch.device("meta"):
        return parameter_counts(build_model(name, **overrides))


def _tokens(f: dict) -> int:
    return (f["input_size"] // f["patch_size"]) ** 2


def _timestep_mixture(f: dict, tokens: int, execution: str) -> dict[str, int]:
    width, num_experts = f["hidden_size"], f["num_experts"]
    products = {"dense": num_experts, "published": f["top_k"], "here": 1}[execution]
    counts = {"gate": width * num_experts, "experts": products * tokens * width**2}
    if execution == "here":
        counts["expert merging"] = num_experts * (width**2 + width)
    return counts


def _token_mixture(f: dict, tokens: int, inner: int, execution: str) -> dict[str, int]:
    """Diff-MoE's. The authors condition each expert's tokens one by one, though all of an image have the same c; here
    all E experts are conditioned once an image."""
    width, num_experts = f["hidden_size"], f["num_experts"]
    applied = num_experts if execution == "dense" else f["top_k"]
    conditioning = RANK * (width + 3 * width)
    conditioned = num_experts + 1 if execution == "here" else (applied + 1) * tokens
    return {
        "depthwise convolution": 25 * tokens * width,
        "gate": tokens * width * num_experts,
        "recalibration": RANK * (width + inner),
        "conditioning": conditioned * conditioning,
        "experts": applied * 3 * tokens * width * inner,
        "shared expert": 3 * tokens * width * f["num_shared_experts"] * width,
    }
