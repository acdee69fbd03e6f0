"""Bytes on the wire and weak scaling of large runs, worked out on paper: reckoned, not measured.

python tools/scaling_table.py [--markdown]            Switch-DiT-XL/2 on A100s (docs/scaling.md: --markdown)
python tools/scaling_table.py --model Switch-DiT-B/2 [--world 8 64] [--ep_size 1 8] [--micro_batch 16] [--mfu 0.3]
                              [--gradients reduce_scatter] [num_experts=16 ...]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from switchdit.errors import UserError, exit_on_user_error

PEAK = 312e12  # operations per second of an A100 in bf16
MFU = 0.4
ITEMSIZE = 2  # bytes: parameters and gradients travel in bf16
BUCKET = 50_000_000  # numbers; reduce_bucket_size of ds_configs/zero2_bf16.json
PASSES = {"all_reduce": 2, "reduce_scatter": 1}  # how often gradients go round

BYTES_COLUMNS = {
    "ep_size": "ep_size",
    "world": "GPUs",
    "gradients": "gradients",
    "expert_gradients": "experts' gradients",
    "parameters": "parameters",
    "expert_parameters": "experts' parameters",
    "way": "dispatch of",
    "dispatch": "dispatch",
    "sent": "all, MB",
}
TIME_COLUMNS = {
    "ep_size": "ep_size",
    "world": "GPUs",
    "compute": "compute, ms",
    "per_gpu": "communication, ms",
    "per_gpu_step": "step, ms",
    "per_gpu_efficiency": "efficiency",
    "per_node": "communication, ms, one link a node",
    "per_node_step": "step, ms, one link a node",
    "per_node_efficiency": "efficiency, one link a node",
}


@dataclass(frozen=True)
class Cluster:
    """Bytes per second in one direction, seconds per hop.

    Attributes:
        node: GPUs of a node. nvlink: of a GPU to the others of its node. network: of a node to the others.
        latency: of any hop.
    """

    node: int = 8
    nvlink: float = 300e9
    network: float = 8 * 25e9
    latency: float = 5e-6


CLUSTERS = {"per_gpu": Cluster(), "per_node": Cluster(network=25e9)}


def collective_seconds(size: float, members: list[list[int]], cluster: Cluster, calls: int = 1) -> float:
    """Time in which every group of processes reduce-scatters or all-gathers ``size`` bytes: the quicker of two ways.

    With d processes of a group, g of them in a node, n = d / g nodes, c groups that use a node's network at once,
    b bandwidth within and B out of a node, and a seconds per hop:

        ring           (d - 1) / d S / min(b, B / c)                                 + (d - 1) a
        hierarchical   (g - 1) / g S / b + (n - 1) / n S / (B / c)                   + (g - 1 + n - 1) a

    A ring within a node has b alone; between nodes, all links of a node serve the ring, and in the hierarchical way
    each of the g processes sends its 1 / g of S. An all-reduce is twice this. Groups are all alike.
    """
    d = len(members[0])
    if d == 1 or not size:
        return 0.0
    nodes = [Counter(rank // cluster.node for rank in group) for group in members]
    g, n = max(nodes[0].values()), len(nodes[0])
    if n == 1:
        return (d - 1) / d * size / cluster.nvlink + calls * (d - 1) * cluster.latency
    sharing = max(Counter(node for of_group in nodes for node in of_group).values())
    out = cluster.network / sharing
    within = min(cluster.nvlink, out) if g > 1 else out
    ring = (d - 1) / d * size / within + calls * (d - 1) * cluster.latency
    hierarchical = (g - 1) / g * size / cluster.nvlink + (n - 1) / n * size / out
    return min(ring, hierarchical + calls * (g + n - 2) * cluster.latency)


def exchange_seconds(size: float, groups: list[list[int]], cluster: Cluster, messages: int) -> float:
    """Time of all-to-all exchanges within groups in which each process sends ``size`` bytes, the same to each other.

    What stays in the node at b, then what leaves it, all processes of a node sharing B; a for each message to another.
    """
    d = len(groups[0])
    if d == 1:
        return 0.0
    inside, outside = 0.0, Counter()
    for group in groups:
        nodes = Counter(rank // cluster.node for rank in group)
        for node, here in nodes.items():
            inside = max(inside, (here - 1) / (d - 1) * size)
            outside[node] += here * (d - here) / (d - 1) * size
    return inside / cluster.nvlink + max(outside.values()) / cluster.network + messages * (d - 1) * cluster.latency


def expert_groups(world: int, ep_size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Ranks between which samples travel: neighbours; and ranks that hold the same experts: ``ep_size`` apart."""
    together = [list(range(at, at + ep_size)) for at in range(0, world, ep_size)]
    return together, [list(range(rank, world, ep_size)) for rank in range(ep_size)]


def reckon(
    name: str,
    world: int,
    ep_size: int,
    micro_batch: int,
    mfu: float = MFU,
    gradients: str = "all_reduce",
    **overrides: Any,
) -> dict[str, Any]:
    """Bytes that a process sends in a step, seconds, and efficiencies; no gradient accumulation.

    Efficiencies and steps are pairs: with nothing overlapped, and with all communication behind the computation.
    """
    from switchdit.models import model_fields, system_of
    from switchdit.models.costs import macs
    from switchdit.moe.dispatch import bytes_per_layer, choose_dispatch
    from tools.memory_terms import sizes_of

    fields = model_fields(name, **overrides)
    sizes = sizes_of(name, ep_size, **overrides)
    dense, experts = (ITEMSIZE * sum(numels) for numels in (sizes.dense, sizes.experts))
    together, apart = expert_groups(world, ep_size)
    everyone = [list(range(world))]
    passes = PASSES[gradients]

    layers, way, per_layer = fields["depth"], "", 0.0
    if ep_size > 1 and system_of(name) == "Switch-DiT":
        shape = {
            "samples": micro_batch,
            "tokens": (fields["input_size"] // fields["patch_size"]) ** 2,
            "width": fields["hidden_size"],
            "num_experts": fields["num_experts"],
            "top_k": fields["top_k"],
            "ep_size": ep_size,
            "itemsize": ITEMSIZE,
        }
        way = choose_dispatch("auto", **shape)
        per_layer = bytes_per_layer(way, **shape)
    elif ep_size > 1:
        raise UserError(f"{name}: ep_size above 1 is reckoned for Switch-DiT alone")
    messages = {"samples": 4, "weights": 2, "": 0}[way]

    of_dense, of_experts = (world - 1) / world, (world // ep_size - 1) / (world // ep_size)
    row = {
        "ep_size": ep_size,
        "world": world,
        "gradients": passes * of_dense * dense,
        "expert_gradients": passes * of_experts * experts,
        "parameters": of_dense * dense,
        "expert_parameters": of_experts * experts,
        "way": way,
        "dispatch": layers * per_layer,
        "compute": micro_batch * 6 * sum(macs(name, "here", **overrides).values()) / (mfu * PEAK),
    }
    row["sent"] = sum(row[key] for key in BYTES_COLUMNS if key not in ("ep_size", "world", "way", "sent"))
    for key, cluster in CLUSTERS.items():
        seconds = layers * exchange_seconds(per_layer, together, cluster, messages)
        for size, groups in ((dense, everyone), (experts, apart)):
            calls = math.ceil(size / ITEMSIZE / BUCKET)
            seconds += passes * collective_seconds(size, groups, cluster, calls)  # gradients, bucket by bucket
            seconds += collective_seconds(size, groups, cluster)  # parameters
        steps = (row["compute"] + seconds, max(row["compute"], seconds))
        row |= {key: seconds, f"{key}_step": steps, f"{key}_efficiency": tuple(row["compute"] / s for s in steps)}
    return row


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Switch-DiT-XL/2", help="name (default: Switch-DiT-XL/2)")
    parser.add_argument("--world", type=int, nargs="+", default=[8, 64, 512], help="GPUs (default: 8 64 512)")
    parser.add_argument(
        "--ep_size", type=int, nargs="+", help="default: every one that fits a Switch-DiT, 1 for others"
    )
    parser.add_argument("--micro_batch", type=int, default=32, help="samples per GPU and step (default: 32)")
    parser.add_argument("--mfu", type=float, default=MFU, help=f"share of the peak that is reached (default: {MFU})")
    parser.add_argument("--gradients", choices=PASSES, default="all_reduce", help="how they are summed")
    parser.add_argument("--markdown", action="store_true", help="the page docs/scaling.md")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="fields of the model, e.g. num_experts=16")
    args = parser.parse_intermixed_args()
    if min(*args.world, *(args.ep_size or [1]), args.micro_batch) < 1 or not 0 < args.mfu <= 1:
        raise UserError("--world, --ep_size and --micro_batch must be at least 1, --mfu above 0 and at most 1")
    return args


@exit_on_user_error
def main() -> None:
    from tools.memory_table import fields_of
    from tools.model_table import text_table
    from tools.scaling_page import page

    args = arguments()
    if args.markdown:
        print(page())
        return
    fields = fields_of(args.model, args.overrides)
    assumptions = {"mfu": args.mfu, "gradients": args.gradients}
    rows = scaling_rows(args.model, args.world, args.ep_size, args.micro_batch, assumptions, **fields)
    print(f"Reckoned, not measured: {args.model}, micro_batch {args.micro_batch}, MFU {args.mfu}\n")
    print("Sent by a GPU in a step, MB\n\n" + text_table(BYTES_COLUMNS, [shown(row) for row in rows]) + "\n")
    print("Communication: nothing overlapped - all of it\n\n" + text_table(TIME_COLUMNS, [shown(row) for row in rows]))


def scaling_rows(
    name: str,
    worlds: list[int],
    ep_sizes: list[int] | None,
    micro_batch: int,
    assumptions: dict[str, Any] | None = None,
    **overrides: Any,
) -> list[dict[str, Any]]:
    """A row of `reckon` for every number of GPUs and ep_size that go together."""
    from switchdit.models import system_of
    from tools.memory_table import ep_sizes_of

    ep_sizes = ep_sizes or (ep_sizes_of(name, **overrides) if system_of(name) == "Switch-DiT" else [1])
    pairs = [(world, ep_size) for ep_size in ep_sizes for world in worlds if world % ep_size == 0]
    if not pairs:
        raise UserError(f"--world {worlds} has no number that is divisible by --ep_size {ep_sizes}")
    return [reckon(name, *pair, micro_batch, **assumptions or {}, **overrides) for pair in pairs]


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Megabytes, milliseconds and percent; pairs with a dash."""
    out = {key: str(row[key]) for key in ("ep_size", "world", "way")}
    for key in BYTES_COLUMNS:
        if key not in out:
            out[key] = f"{row[key] / 1e6:.0f}" if row[key] else ""
    out["compute"] = f"{1e3 * row['compute']:.0f}"
    for key in CLUSTERS:
        out[key] = f"{1e3 * row[key]:.1f}"
        out[f"{key}_step"] = " - ".join(f"{1e3 * s:.0f}" for s in row[f"{key}_step"])
        out[f"{key}_efficiency"] = " - ".join(f"{e:.1%}" for e in row[f"{key}_efficiency"])
    return out


if __name__ == "__main__":
    main()
