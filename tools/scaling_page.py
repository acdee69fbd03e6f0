"""The page docs/scaling.md, of what tools/scaling_table.py works out."""

from __future__ import annotations

import textwrap

from tools.memory_table import filled, paragraphs
from tools.model_table import markdown_table
from tools.scaling_table import (
    BUCKET,
    BYTES_COLUMNS,
    MFU,
    PEAK,
    TIME_COLUMNS,
    collective_seconds,
    exchange_seconds,
    scaling_rows,
    shown,
)

MICRO_BATCH = 32


def page() -> str:
    """docs/scaling.md."""
    parts = [
        "# Weak scaling, reckoned",
        "Made by `python tools/scaling_table.py --markdown`. **Reckoned, not measured**: nothing on this page was run. "
        "Latents of 4 x 32 x 32, ZeRO-2 in bf16 (ds_configs/zero2_bf16.json), a micro_batch of "
        f"{MICRO_BATCH} on every GPU, no gradient accumulation. Any other model, batch and cluster size: `python "
        "tools/scaling_table.py --model NAME [--world 16] [--micro_batch 8] [num_experts=16]`.",
        "## Assumptions",
        f"- A100s: {PEAK / 1e12:.0f} TFLOP/s in bf16, of which {MFU:.0%} are reached (an assumed MFU). A sample costs "
        'six operations per multiply-add of its forward pass (docs/models.md, "here"): two, and twice that in the '
        "backward pass. The optimizer's step, data loading and checkpoints are left out.",
        "- Nodes of 8 with NVLink of 600 GB/s a GPU, that is 300 GB/s each way. Between nodes 200 Gb/s InfiniBand, 25 "
        "GB/s each way: either one such link for every GPU, 200 GB/s a node, or a single one for the whole node, the "
        'columns "one link a node". Every hop takes 5 microseconds.',
        '- Overlap is given as two bounds, "a - b": a with no communication overlapped, step = compute + '
        "communication; b with all of it overlapped, step = the larger of the two. The engine overlaps the sums of "
        "gradients with the backward pass, but not the gathering of parameters after the step.",
        "- Efficiency is compute / step: that of one GPU, which has nothing to send, is 100 %.",
        "- Routing is uniform: all sets of k experts are equally likely.",
        "## What travels",
        "G, E: bytes in bf16 of the dense parameters, and of the experts of one process. P: processes. R = ep_size: "
        "experts are the same on P / R processes, which lie R apart; samples or weights travel between R neighbours. "
        "Of each step a process sends:",
        "| what | bytes |\n| --- | --- |\n"
        "| gradients | 2 (P - 1) / P G |\n"
        "| experts' gradients | 2 (P/R - 1) / (P/R) E |\n"
        "| parameters, after the optimizer's step | (P - 1) / P G |\n"
        "| experts' parameters | (P/R - 1) / (P/R) E |\n"
        "| dispatch | of every block, `switchdit.moe.dispatch.bytes_per_layer` of what `moe.dispatch=auto` chooses |",
        "DeepSpeed 0.19 sums the gradients of ZeRO-2 by an all-reduce of buckets of which each process keeps its part "
        "(`use_multi_rank_bucket_allreduce`, by default on): hence the 2. A reduce-scatter, as in ZeRO's paper, "
        "would send half of it (`--gradients reduce_scatter`; the last table). With gradient accumulation gradients "
        "and dispatch are multiplied by its steps, parameters are not. A sum of gradients is made of one collective "
        f"for every {BUCKET:,} numbers.",
        "Time of a reduce-scatter or an all-gather of S bytes, all groups at once, the quicker of two ways:",
        paragraphs(_formula(collective_seconds)),
        "Time of a dispatch:",
        paragraphs(_formula(exchange_seconds)),
        "An exchange of samples is four messages to each other process of the R (there and back, and both gradients), "
        "one of weights two.",
        *section("Switch-DiT-XL/2, M = 3, k = 2", [8, 64, 512], [1]),
        *section("Switch-DiT-XL/2, M = 3, k = 2, an expert on each of 3 GPUs", [24, 72, 504], [3]),
        "Three processes do not divide 8, 64 or 512. Some groups of three lie in two nodes; the time is that of the "
        "node with most to send.",
        *section("Switch-DiT-XL/2 with M = 16, k = 2", [8, 64, 512], [1, 2, 4, 8, 16], num_experts=16, top_k=2),
        *section(
            "Switch-DiT-XL/2, M = 3, k = 2, with a reduce-scatter", [8, 64, 512], [1], {"gradients": "reduce_scatter"}
        ),
    ]
    return "\n\n".join(part if part.startswith(("|", "#", "```")) else filled(part) for part in parts)


def section(
    title: str, worlds: list[int], ep_sizes: list[int], assumptions: dict | None = None, **overrides
) -> list[str]:
    """A heading and two tables: megabytes that a GPU sends in a step, and times."""
    rows = scaling_rows("Switch-DiT-XL/2", worlds, ep_sizes, MICRO_BATCH, assumptions, **overrides)
    rows = [shown(row) for row in rows]
    return [
        f"## {title}",
        "Sent by a GPU in a step, MB:",
        markdown_table(BYTES_COLUMNS, rows),
        "Times and efficiencies, reckoned:",
        markdown_table(TIME_COLUMNS, rows),
    ]


def _formula(function) -> str:
    return textwrap.dedent(function.__doc__.partition("\n\n")[2])
