"""What should travel between expert-parallel ranks: samples to the experts, or the experts' weights to the samples.

    N = samples of a rank and micro-batch, L = tokens, D = width, M = experts, k = top-k,
    R = expert-parallel ranks (ep_size), J = M / R experts that live on one rank

Counted are the bytes that one rank sends, in one layer, for the forward and the backward pass of a micro-batch. A
sample goes to every remote rank that holds one of its k experts, its mixture comes back, and so do both gradients: four
times L D numbers for each. Weights and biases of a rank's J experts go to the R - 1 others, their gradients come back:
twice J (D^2 + D) numbers for each. Left out are the gates and the counts that travel with samples, some bytes for each.
Activation checkpointing adds half to either.
"""

from __future__ import annotations

from math import comb

from torch import nn

from switchdit.errors import UserError


def expected_remote_ranks(num_experts: int, top_k: int, ep_size: int) -> float:
    """How many ranks but its own a sample visits on average, if all sets of k experts are equally likely."""
    elsewhere = num_experts - num_experts // ep_size  # experts that do not live on a given rank
    return (ep_size - 1) * (1 - comb(elsewhere, top_k) / comb(num_experts, top_k))


def bytes_per_layer(
    dispatch: str,
    *,
    samples: int,
    tokens: int,
    width: int,
    num_experts: int,
    top_k: int,
    ep_size: int,
    itemsize: int,
) -> float:
    """Bytes that one rank sends per layer, micro-batch, forward and backward pass.

    Args:
        dispatch: ``"samples"`` (the mean over uniform routing) or ``"weights"`` (exact).
        samples, tokens, width, num_experts, top_k, ep_size: N, L, D, M, k, R.
        itemsize: bytes of a number: 4 in float32, 2 in bfloat16.
    """
    if dispatch == "samples":
        return 4 * samples * expected_remote_ranks(num_experts, top_k, ep_size) * tokens * width * itemsize
    return 2.0 * (ep_size - 1) * (num_experts // ep_size) * (width**2 + width) * itemsize


def choose_dispatch(dispatch: str, **sizes: int) -> str:
    """``"auto"`` as what sends fewer bytes, at a tie weights, for which the host need not wait; others as they are.

    ``sizes``: as for `bytes_per_layer`.
    """
    if dispatch != "auto":
        return dispatch
    return min(("weights", "samples"), key=lambda way: bytes_per_layer(way, **sizes))


def check_dispatch(dispatch: str, system: str) -> None:
    """Raise `UserError` unless ``moe.dispatch`` can be chosen for ``system``, or is left to be ``"auto"``."""
    if dispatch != "auto" and system != "Switch-DiT":
        raise UserError(
            f"moe.dispatch is '{dispatch}'; it is of Switch-DiT's experts, so that for {system} it must be 'auto'"
        )


def set_dispatch(model: nn.Module, dispatch: str, *, samples: int, itemsize: int) -> str | None:
    """Choose what travels in the `TimestepMoE` of ``model``; other mixtures have no such choice.

    Args:
        dispatch: ``"samples"``, ``"weights"``, or ``"auto"`` for what sends fewer bytes.
        samples: of a process and micro-batch; itemsize: bytes of a number in transit.

    Returns:
        A line that says what was chosen and what it costs; None where nothing travels.
    """
    mixtures = [module for module in model.modules() if hasattr(module, "dispatch")]
    if not mixtures or mixtures[0].ep_size == 1:
        return None
    sizes = {
        "samples": samples,
        "tokens": model.pos_embed.shape[1],
        "width": model.hidden_size,
        "num_experts": mixtures[0].num_experts,
        "top_k": mixtures[0].gate.k,
        "ep_size": mixtures[0].ep_size,
        "itemsize": itemsize,
    }
    chosen = choose_dispatch(dispatch, **sizes)
    other = {"samples": "weights", "weights": "samples"}[chosen]
    for moe in mixtures:
        moe.dispatch = chosen
    megabytes = {way: f"{bytes_per_layer(way, **sizes) / 1e6:.3g} MB" for way in (chosen, other)}
    return (
        f"expert parallelism: {chosen} travel, {megabytes[chosen]} per layer, process and micro-batch; "
        f"{other} would be {megabytes[other]}"
    )
