"""The mixture layer alone, ``1 + mixture`` and the product with z included, beside what it is compared with.

    python tools/bench_expert_mix.py [--hidden_size 384 768 1024 1152] [--num_experts 3 4 --top_k 2 3] [--tokens 256]
                                     [--batch_size 8] [--dtype float32] [--repeats 20] [--warm_up 3] [--threads 2]

The n-th number of experts goes with the n-th k. Prints the median milliseconds of each candidate and, as the median
over the rounds, its time divided by that of (a), the plainest implementation (tools/baselines.py); then the same as
JSON. FLOPs are counted merged, 2 N L D^2 forward and three times as many with the backward pass: the share of the
device's measured rate is that of ours. On a GPU times are the device's, without the host's part in queueing them, and
the most memory that a call takes is shown; DS_ACCELERATOR=cpu measures such a machine's CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from switchdit.errors import UserError, exit_on_user_error
from switchdit.kernels.expert_mix import expert_mix, fused_kernel
from switchdit.moe.timestep_gate import top_k_gates
from tools import timing
from tools.baselines import StockExpertMix, grouped_expert_mix, plain_expert_mix
from tools.model_table import text_table

# N = samples, L = tokens of a sample, D = width, M = experts, k = top-k

CANDIDATES = {"plain": "(a)", "stock": "(b)", "grouped": "(c)", "ours": "ours"}
LEGEND = (
    "(a) gather, a product for each expert in float32, index_add; (b) DeepSpeed's MoE layer, dropping nothing;\n"
    "(c) torch._grouped_mm; all with 1 + mixture and the product with z"
)
FORWARD, BOTH, SAME_TIMESTEP = "forward", "forward + backward", "forward, same timestep"
# (pass, D, M, k) -> how much of the time of (a) ours may take, with 256 tokens
BARS = {
    (BOTH, 384, 3, 2): 0.46,
    (BOTH, 384, 4, 3): 0.38,
    (BOTH, 1152, 3, 2): 0.60,
    (SAME_TIMESTEP, 384, 3, 2): 0.42,
}
SIZES = {"hidden_size": "D", "num_experts": "M", "top_k": "k", "pass": "pass"}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [384, 768, 1024, 1152]
    parser.add_argument("--hidden_size", type=int, nargs="+", default=sizes, help="D (default: 384 768 1024 1152)")
    parser.add_argument("--num_experts", type=int, nargs="+", default=[3, 4], help="M (default: 3 4)")
    parser.add_argument("--top_k", type=int, nargs="+", default=[2, 3], help="k, of each M (default: 2 3)")
    parser.add_argument("--tokens", type=int, default=256, help="of a sample (default: 256)")
    timing.add_common_options(parser, batch_size=8, repeats=20)
    args = parser.parse_args(argv)
    timing.check_common_options(args)
    if len(args.num_experts) != len(args.top_k):
        raise UserError(f"--num_experts {args.num_experts} and --top_k {args.top_k} must be equally many numbers")
    for num_experts, top_k in zip(args.num_experts, args.top_k, strict=True):
        if not 1 <= top_k <= num_experts:
            raise UserError(f"--top_k {top_k} must lie between 1 and its --num_experts, {num_experts}")
    if min(args.hidden_size) < max(args.num_experts) or args.tokens < 1:
        raise UserError(
            f"--tokens {args.tokens} must be at least 1, and --hidden_size {min(args.hidden_size)} at least the number "
            f"of experts, {max(args.num_experts)}"
        )
    return args


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    device = timing.measured_device()
    about = timing.surroundings(args, device) | {"ours": path_of_ours(args, device)}
    roof = timing.roof_of(device, timing.DTYPES[args.dtype])
    rows, missing = [], {}
    for width in args.hidden_size:
        for num_experts, top_k in zip(args.num_experts, args.top_k, strict=True):
            for kind in (FORWARD, BOTH, SAME_TIMESTEP):
                rows.append(measure(args, device, roof, (kind, width, num_experts, top_k), missing))
    print(timing.shown_surroundings(about) + f", {args.tokens} tokens")
    print(timing.shown_roof(roof, args.dtype))
    print(f"{LEGEND}; ours: {about['ours']}\n")
    columns, cells = table(rows, device.type == "cuda")
    print(text_table(columns, cells) + "\n")
    for name, why in missing.items():
        print(f"{CANDIDATES[name]} is not available here: {why}\n")
    print(json.dumps({**about, "tokens": args.tokens, "roof": roof, "missing": missing, "results": rows}))


def path_of_ours(args: argparse.Namespace, device: torch.device) -> str:
    """Which implementation of the operator these sizes and this type take."""
    dtype, width, num_experts = timing.DTYPES[args.dtype], args.hidden_size[0], args.num_experts[0]
    z = torch.empty(1, args.tokens, width, dtype=dtype, device=device)
    weight = torch.empty(num_experts, width, width, dtype=dtype, device=device)
    fused = fused_kernel(z, weight, torch.empty(1, num_experts, device=device))
    return "merged, then one product" if fused is None else "the fused kernel"


def measure(
    args: argparse.Namespace,
    device: torch.device,
    roof: dict[str, float],
    case: tuple[str, int, int, int],
    missing: dict[str, str],
) -> dict[str, Any]:
    """All candidates on one (pass, D, M, k); what cannot run here is left out, and ``missing`` told why."""
    kind, width, *_ = case
    torch.manual_seed(0)
    calls = candidates(args, device, *case)
    try:
        calls["grouped"]()
    except (RuntimeError, AttributeError) as problem:  # PyTorch's words for: not for this device, type or version
        missing["grouped"] = str(problem).splitlines()[0]
        del calls["grouped"]
    timed = timing.in_turn(calls, device, args.warm_up, args.repeats, hide_launches=True)
    flops = 2 * args.batch_size * args.tokens * width**2 * (3 if kind == BOTH else 1)
    ratios = {name: t.over(timed["plain"]) for name, t in timed.items()}
    limit = BARS.get(case) if timing.has_bars(args, device) and args.tokens == 256 else None
    return {
        **dict(zip(("pass", "hidden_size", "num_experts", "top_k"), case, strict=True)),
        "milliseconds": {name: 1e3 * t.median for name, t in timed.items()},
        "ratio": ratios,
        "matmul_share": flops / timed["ours"].median / roof["matmul_flops_per_second"],
        "peak_bytes": {name: t.peak_bytes for name, t in timed.items()},
        "bar": timing.judged(ratios["ours"], limit),
    }


def candidates(
    args: argparse.Namespace, device: torch.device, kind: str, width: int, num_experts: int, top_k: int
) -> dict[str, Callable[[], object]]:
    """One call of each, on the same numbers."""
    dtype = timing.DTYPES[args.dtype]
    z = torch.randn(args.batch_size, args.tokens, width, device=device)
    weight = torch.randn(num_experts, width, width, device=device) / width**0.5
    bias = torch.randn(num_experts, width, device=device)
    probs = torch.randn(1 if kind == SAME_TIMESTEP else args.batch_size, num_experts, device=device).softmax(-1)
    z[:, :, :num_experts] = probs.log().unsqueeze(1)  # for the gate of (b)
    gates = top_k_gates(probs, top_k)
    cast = [x.to(dtype) for x in (z, weight, bias)]
    stock = StockExpertMix(*cast[1:], top_k)
    with_inputs = {  # (a) has float32 experts, as autocast leaves them
        "plain": (plain_expert_mix, [cast[0], weight, bias, gates]),
        "stock": (stock, cast[:1]),
        "grouped": (partial(grouped_expert_mix, top_k=top_k), [*cast, gates]),
        "ours": (expert_mix, [*cast, gates]),
    }
    if kind != BOTH:
        return {name: partial(_forward, function, inputs) for name, (function, inputs) in with_inputs.items()}
    upstream = [torch.randn_like(cast[0]) for _ in range(2)]
    calls = {}
    for name, (function, inputs) in with_inputs.items():
        leaves = [x.detach().requires_grad_() for x in inputs]
        parameters = list(stock.parameters()) if name == "stock" else []
        calls[name] = partial(_forward_and_backward, function, leaves, parameters, upstream)
    return calls


@torch.no_grad()
def _forward(function: Callable, inputs: list[Tensor]) -> None:
    function(*inputs)


def _forward_and_backward(
    function: Callable, inputs: list[Tensor], parameters: list[Tensor], upstream: list[Tensor]
) -> None:
    torch.autograd.grad(function(*inputs), [*inputs, *parameters], upstream)


def table(rows: list[dict[str, Any]], on_gpu: bool) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Columns and rows for `text_table`; memory on a GPU alone."""
    columns = {**SIZES, **{f"{name} ms": f"{title} ms" for name, title in CANDIDATES.items()}}
    columns |= {f"{name} ratio": f"{title}/(a)" for name, title in CANDIDATES.items() if name != "plain"}
    columns |= {"share": "ours of the rate", "bar": "bar"}
    if on_gpu:
        columns |= {f"{name} MB": f"{title} MB" for name, title in CANDIDATES.items()}
    return columns, [_shown(row) for row in rows]


def _shown(row: dict[str, Any]) -> dict[str, str]:
    out = {key: row[key] for key in SIZES} | {
        "share": f"{row['matmul_share']:.0%}",
        "bar": timing.shown_bar(row["bar"]),
    }
    for name in CANDIDATES:
        here = name in row["ratio"]
        out[f"{name} ms"] = timing.short(row["milliseconds"][name]) if here else "-"
        out[f"{name} ratio"] = f"{row['ratio'][name]:.2f}" if here else "-"
        out[f"{name} MB"] = timing.megabytes(row["peak_bytes"].get(name))
    return out


if __name__ == "__main__":
    main()
