"""Bytes of a training process, term by term, as the engine allocates them (DeepSpeed 0.19).

    P = numbers of a group's parameters, d = processes that share its optimizer state (its data-parallel size),
    w = bytes of a parameter: 2 in bf16, 4 in float32; N = samples of a micro-batch, L = tokens, D = width, h = heads,
    r = mlp_ratio, M = experts, k = top-k

Parameters form groups: the dense ones with d = world size, and this process's experts, with d = world size / ep_size;
the latter in several where they exceed 178,956,971 parameters. Under ZeRO-1 and 2 a group is one flat tensor, padded to
a multiple of 2 d, and each process owns p = padded / d of it.

=============  ========================================  =====================================================
kind           stage 0                                   stages 1 and 2
=============  ========================================  =====================================================
parameters     w P                                       w padded P, in full on every process
masters        none: the parameters are float32          4 p
moments        8 P                                       8 p
ema            4 P                                       4 p
gradients      4 P                                       stage 1: w P. Stage 2: 4 p where they are accumulated in
                                                         another type than the parameters'; else w times all
                                                         parameters, in full, of which p holds a piece
buckets        none                                      w x reduce_bucket_size, twice with overlap_comm, from the
                                                         first gradient to the last; and a copy of what is being
                                                         reduced, w x the smaller of reduce_bucket_size and P
step           the larger of two flat copies of          for the largest group: w p, flat gradients, unless they are
               gradients, cut at 500,000,000 numbers     flat already; and 4 p, their float32 copy, where w is 2
=============  ========================================  =====================================================

With offload_optimizer masters, moments and EMA are in host memory, with 4 p for gradients and w p for the new
parameters on their way back; and a staging buffer of w x the largest parameter on either side.

With gradient accumulation, ZeRO-2 keeps gradients in the parameters' type twice, sums and those of a micro-batch; with
offload_optimizer the sums are in host memory.

The step's copies exist when buckets and activations are gone: what is needed at once is the larger of the two sums.
Not counted: the CUDA context, NCCL's buffers, workspaces of matrix products, fragmentation, and the data loader.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from switchdit.errors import UserError
from switchdit.models import build_model, model_fields, system_of

MAX_EXPERT_GROUP = 178_956_971  # parameters; DeepSpeed's split_params_into_different_moe_groups_for_optimizer
MAX_FLAT_GRADIENTS = 500_000_000  # numbers that stage 0 reduces at once
KINDS = ("parameters", "masters", "moments", "ema", "gradients", "buckets", "reducing", "staging")
PASSING = ("gradients", "buckets", "reducing")  # by the end of the step
HOST_KINDS = ("masters", "moments", "ema")


@dataclass(frozen=True)
class Settings:
    """What a DeepSpeed config says about memory.

    Attributes:
        stage: of ZeRO. itemsize: bytes of a parameter. accumulation: bytes of an accumulated gradient.
        bucket: numbers in a bucket; num_buckets: how many there are at a time.
        offload: optimizer state in host memory.
    """

    stage: int
    itemsize: int
    accumulation: int
    bucket: int
    num_buckets: int
    offload: bool


def settings_of(values: dict) -> Settings:
    """`Settings` of a DeepSpeed config as a dictionary."""
    zero = values.get("zero_optimization", {})
    itemsize = 2 if values.get("bf16", {}).get("enabled", False) else 4
    accumulates_in_float32 = values.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    return Settings(
        stage=zero.get("stage", 0),
        itemsize=itemsize,
        accumulation=4 if accumulates_in_float32 else itemsize,
        bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        num_buckets=2 if zero.get("overlap_comm", False) else 1,
        offload=zero.get("offload_optimizer", {}).get("device", "none") == "cpu",
    )


def read_settings(path: Path) -> Settings:
    """`Settings` of a file.

    Raises:
        UserError: unreadable, or no such config.
    """
    try:
        return settings_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, TypeError) as problem:
        raise UserError(f"DeepSpeed config '{path}' cannot be read: {problem}") from None


@dataclass(frozen=True)
class Sizes:
    """Numbers of each parameter, in the model's order: dense, of one process's experts, and not trained."""

    dense: tuple[int, ...]
    experts: tuple[int, ...]
    frozen: int

    @property
    def count(self) -> int:
        """Parameters of one process, fixed ones included."""
        return sum(self.dense) + sum(self.experts) + self.frozen

    def groups(self) -> list[tuple[Sequence[int], bool]]:
        """Parameter groups of the optimizer, and whether each is of experts."""
        groups, current = [], []
        for numel in self.experts:
            if current and sum(current) + numel > MAX_EXPERT_GROUP:
                groups.append((current, True))
                current = []
            current.append(numel)
        groups += [(current, True)] if current else []
        return [(self.dense, False), *groups]


@cache
def _parameters(name: str, overrides: tuple) -> tuple[tuple[str, int, bool], ...]:
    with torch.device("meta"):
        model = build_model(name, **dict(overrides))
    return tuple((key, p.numel(), p.requires_grad) for key, p in model.named_parameters())


def sizes_of(name: str, ep_size: int = 1, **overrides) -> Sizes:
    """Sizes of a model whose experts are spread over ``ep_size`` processes.

    Raises:
        UserError: see `model_fields`.
    """
    fields = model_fields(name, **overrides, **({"ep_size": ep_size} if ep_size > 1 else {}))
    num_local = fields.get("num_experts", 0) // ep_size
    dense, experts, frozen = [], [], 0
    for key, numel, trained in _parameters(name, tuple(sorted(overrides.items()))):
        _, is_expert, rest = key.partition(".deepspeed_experts.")
        if not trained:
            frozen += numel
        elif not is_expert:
            dense.append(numel)
        elif int(rest.split(".")[0]) < num_local:
            experts.append(numel)
    return Sizes(tuple(dense), tuple(experts), frozen)


def partition_size(numels: Sequence[int], processes: int) -> int:
    """p: numbers of a group that each of ``processes`` owns."""
    return -(-sum(numels) // (2 * processes)) * 2


def touched(numels: Sequence[int], processes: int) -> np.ndarray:
    """(processes,) numbers of all parameters, in full, of which each process owns a piece; and of its padding."""
    own, ends = partition_size(numels, processes), np.cumsum(numels)
    starts = ends - numels
    low = own * np.arange(processes)
    first = np.searchsorted(ends, low, side="right")
    after = np.searchsorted(starts, low + own, side="left")
    whole = [int(sum(numels[i:j])) for i, j in zip(first, after, strict=True)]
    return whole + (low + own - np.maximum(low, ends[-1])).clip(min=0)


def state_memory(
    sizes: Sizes, settings: Settings, world: int, ep_size: int = 1, accumulating: bool = False
) -> dict[str, int]:
    """Bytes on the device of the process that needs most, by kind (see above); beside `KINDS`:

    ``step``: the copies that the optimizer's step makes; ``gradients_in_step``: what is left of gradients by then;
    ``host``: everything in host memory. ``accumulating``: over several micro-batches a step.
    """
    w, stage = settings.itemsize, settings.stage
    groups = [(numels, world // ep_size if is_expert else world) for numels, is_expert in sizes.groups()]
    count = sum(sizes.dense) + sum(sizes.experts)
    if stage == 0:
        flat = max(min(sum(numels), MAX_FLAT_GRADIENTS) for numels in (sizes.dense, sizes.experts))
        out = {"parameters": w * (count + sizes.frozen), "moments": 8 * count, "ema": 4 * count}
        out |= {"gradients": w * count, "gradients_in_step": w * count, "step": w * flat}
        return {kind: out.get(kind, 0) for kind in (*KINDS, "gradients_in_step", "step", "host")}

    own = [partition_size(numels, d) for numels, d in groups]
    padded = sum(p * d for p, (_, d) in zip(own, groups, strict=True))
    is_flat = settings.accumulation != w
    # neighbours hold different experts: the process of a rank is number rank * d / world of its group
    ranks = np.arange(world)
    whole = w * int(sum(touched(numels, d)[ranks * d // world] for numels, d in groups).max())
    sums = whole if accumulating and not is_flat else 0  # of the micro-batches before
    on_device = 0 if settings.offload else whole  # with offload, what is reduced goes to the host
    held = settings.accumulation * sum(own) if is_flat else on_device
    out = {
        "parameters": w * (padded + sizes.frozen),
        "masters": 4 * sum(own),
        "moments": 8 * sum(own),
        "ema": 4 * sum(own),
        "gradients": w * count if stage == 1 else held + (0 if settings.offload else sums),
        "buckets": w * settings.bucket * settings.num_buckets,
        "reducing": w * min(settings.bucket, count),
        "staging": 0,
        "gradients_in_step": held,
        "step": max((0 if is_flat else w * p) + (4 * p if w == 2 and not is_flat else 0) for p in own),
        "host": 0,
    }
    if settings.offload:
        staging = w * max(max(numels) for numels, _ in groups)
        out["host"] = sum(out[kind] for kind in HOST_KINDS) + (4 + w) * sum(own) + sums + staging
        out |= dict.fromkeys(HOST_KINDS, 0) | {"staging": staging, "step": 0}
    return out


def activation_memory(name: str, itemsize: int, micro_batch: int, checkpointing: int = 0, **overrides) -> int:
    """Bytes that a forward pass keeps for the backward pass; an estimate.

    A block keeps of each sample, in units of L D numbers (LayerNorm's input and output, the inputs of every product
    and of every nonlinearity, q, k, v and attention's output, once each):

    ==========  =================  ================================================================================
    DiT         12 + 2 r           and 8 D of the modulation
    Switch-DiT  14 + 2 r           and M (D^2 + D) for all samples, the stacked experts; D^2 of each sample, merged
                                   ones, where ``integration`` is not the default, and of samples that travel
    Diff-MoE    19 + 4 s           s shared experts; and k (6 r + 10) of the chosen ones
    ==========  =================  ================================================================================

    and in float32 h L sums of attention's softmax and 4 L statistics of norms; a Diff-MoE in bf16 also the gates' input
    and, of the 10 k, the k outputs that gates are multiplied with. Before and after the blocks: 3 L D.
    ``checkpointing`` n: every n-th block keeps its input alone, L D, and one of them all the above while it is
    recomputed. Attention is taken to be the fused kernel that keeps no L x L weights. With ep_size > 1 what travels
    between processes comes to this.
    """
    f = model_fields(name, **overrides)
    width, depth = f["hidden_size"], f["depth"]
    tokens = (f["input_size"] // f["patch_size"]) ** 2
    inner = int(f["mlp_ratio"] * width)
    units = 12 * width + 2 * inner
    per_sample, per_block = 8 * width, 0
    in_float32 = 4 * (f["num_heads"] + 4) * tokens
    if system_of(name) == "Switch-DiT":
        units += 2 * width
        per_block = f["num_experts"] * (width**2 + width)
        per_sample += width**2 * (f["integration"] != "multiply_skip_one")
    elif system_of(name) == "Diff-MoE":
        units = (19 + 4 * f["num_shared_experts"]) * width + f["top_k"] * (6 * inner + 10 * width)
        if itemsize < 4:
            in_float32 += tokens * width * (4 + f["top_k"] * (4 - itemsize))
    block = micro_batch * (itemsize * (tokens * units + per_sample) + in_float32) + itemsize * per_block
    one_input = micro_batch * itemsize * tokens * width
    recomputed = depth // checkpointing if checkpointing else 0
    return (depth - recomputed) * block + recomputed * one_input + bool(recomputed) * block + 3 * one_input


def total(state: dict[str, int], activations: int = 0) -> int:
    """Bytes on the device at the worst moment: the end of the backward pass, or the optimizer's step."""
    lasting = sum(state[kind] for kind in KINDS if kind not in PASSING)
    in_backward = sum(state[kind] for kind in PASSING) + activations
    return lasting + max(in_backward, state["gradients_in_step"] + state["step"])
