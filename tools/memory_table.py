"""Bytes that a training process needs, for every model, number of processes, ep_size and DeepSpeed config.

python tools/memory_table.py [--markdown]                  every model, in short (docs/memory.md: --markdown)
                                                           one, term by term:
python tools/memory_table.py --model Switch-DiT-XL/2 [--world 8 64] [--ep_size 1] [--ds_config FILE] [--micro_batch 32]
                             [--gradient_accumulation_steps 2] [--activation_checkpointing 1] [num_experts=16 ...]
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from switchdit.errors import UserError, exit_on_user_error, nearest

CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
WORLDS = (1, 8, 64, 512)
GIB = 2**30
MODEL_COLUMNS = {"name": "model", "ep_size": "ep_size", "count": "parameters, M", "local": "of a process, M"}
KIND_COLUMNS = {
    "ds_config": "ds_config",
    "world": "processes",
    "ep_size": "ep_size",
    "parameters": "parameters",
    "masters": "masters",
    "moments": "moments",
    "ema": "EMA",
    "gradients": "gradients",
    "buckets": "buckets",
    "state": "state",
    "activations": "activations, about",
    "peak": "peak, about",
    "host": "host memory",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="name, e.g. Switch-DiT-XL/2; every model if not given")
    parser.add_argument("--world", type=int, nargs="+", default=list(WORLDS), help="processes (default: 1 8 64 512)")
    parser.add_argument("--ep_size", type=int, nargs="+", help="default: every one that fits")
    parser.add_argument("--ds_config", type=Path, nargs="+", help="default: every one in ds_configs/")
    parser.add_argument("--micro_batch", type=int, default=32, help="samples per process and pass (default: 32)")
    parser.add_argument("--activation_checkpointing", type=int, default=0, help="as train.activation_checkpointing")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches a step (default: 1)")
    parser.add_argument("--markdown", action="store_true", help="the page docs/memory.md")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="fields of the model, e.g. num_experts=16")
    args = parser.parse_intermixed_args()
    if min(*args.world, *(args.ep_size or [1]), args.micro_batch, args.gradient_accumulation_steps) < 1:
        raise UserError("--world, --ep_size, --micro_batch and --gradient_accumulation_steps must be at least 1")
    if args.activation_checkpointing < 0:
        raise UserError(f"--activation_checkpointing {args.activation_checkpointing} must be at least 0")
    if args.overrides and not args.model:
        raise UserError(f"'{args.overrides[0]}' is a field of a model: give --model")
    if args.markdown and args.model:
        raise UserError("--markdown makes the page of all models: it goes without --model")
    return args


@exit_on_user_error
def main() -> None:
    from tools.model_table import text_table

    args = arguments()
    if args.markdown:
        print(page())
    elif args.model:
        rows = [shown(row) for row in kind_rows(args)]
        print(f"{args.model} {' '.join(args.overrides)}".strip() + f", micro_batch {args.micro_batch}, GiB\n")
        print(text_table(KIND_COLUMNS, rows))
    else:
        print(f"zero2_bf16, GiB; activations of a micro_batch of {args.micro_batch}\n")
        columns, rows = model_rows(args.world, args.micro_batch)
        print(text_table(columns, rows))


def fields_of(name: str, overrides: list[str]) -> dict[str, Any]:
    """``field=value`` arguments as fields of a model, checked; ``ep_size`` is an option of its own."""
    from switchdit.models import model_fields

    known, fields = model_fields(name), {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}' must have the form field=value")
        if key == "ep_size":
            raise UserError(f"'{override}' must be given as --ep_size {text}")
        if key not in known:
            raise UserError(f"model field '{key}' is unknown for {name}{nearest(key, known)}")
        try:
            fields[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"'{override}': the value is not valid YAML") from None
    model_fields(name, **fields)
    return fields


def ep_sizes_of(name: str, **overrides) -> list[int]:
    """Every number of processes over which the model's experts divide."""
    from switchdit.models import model_fields

    num_experts = model_fields(name, **overrides).get("num_experts", 1)
    return [n for n in range(1, num_experts + 1) if num_experts % n == 0]


def kind_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Bytes by kind of one model, a row for every config, number of processes and ep_size that go together."""
    from tools.memory_terms import activation_memory, read_settings, sizes_of, state_memory, total

    fields = fields_of(args.model, args.overrides)
    ep_sizes = args.ep_size or ep_sizes_of(args.model, **fields)
    rows = []
    for path in args.ds_config or sorted(CONFIGS.glob("*.json")):
        settings = read_settings(path)
        for world in args.world:
            for ep_size in ep_sizes:
                if world % ep_size:
                    continue
                sizes, accumulating = sizes_of(args.model, ep_size, **fields), args.gradient_accumulation_steps > 1
                state = state_memory(sizes, settings, world, ep_size, accumulating)
                activations = activation_memory(
                    args.model, settings.itemsize, args.micro_batch, args.activation_checkpointing, **fields
                )
                row = {"ds_config": path.stem, "world": world, "ep_size": ep_size, "activations": activations}
                rows.append({**row, **state, "state": total(state), "peak": total(state, activations)})
    if not rows:
        raise UserError(f"--world {args.world} has no number that is divisible by --ep_size {ep_sizes}")
    return rows


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Bytes as GiB."""
    exact = ("ds_config", "world", "ep_size")
    row = {**row, "buckets": row["buckets"] + row["reducing"]}
    return {key: str(row[key]) if key in exact else gib(row[key]) for key in KIND_COLUMNS}


def gib(count: int) -> str:
    return f"{count / GIB:.2f}" if count else ""


def model_rows(worlds: list[int], micro_batch: int) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Columns, and a row for every model of patch size 2 with experts together or as far apart as can be."""
    from switchdit.models import MODEL_NAMES
    from tools.memory_terms import activation_memory, read_settings, sizes_of, state_memory, total

    settings = read_settings(CONFIGS / "zero2_bf16.json")
    columns = MODEL_COLUMNS | {f"world {n}": f"state on {n}" for n in worlds}
    columns |= {"plain": "activations, about", "checkpointed": "checkpointed, about"}
    rows = []
    for name in MODEL_NAMES:
        if name.split("/")[1].removesuffix("_v2") != "2":
            continue
        ep_sizes = [n for n in ep_sizes_of(name) if any(world % n == 0 for world in worlds)]
        for ep_size in dict.fromkeys((ep_sizes[0], ep_sizes[-1])):
            sizes, whole = sizes_of(name, ep_size), sizes_of(name)
            row = {"name": name, "ep_size": str(ep_size)}
            row |= {"count": f"{whole.count / 1e6:.1f}", "local": f"{sizes.count / 1e6:.1f}"}
            for world in worlds:
                fits = world % ep_size == 0
                row[f"world {world}"] = gib(total(state_memory(sizes, settings, world, ep_size))) if fits else ""
            row["plain"] = gib(activation_memory(name, settings.itemsize, micro_batch))
            row["checkpointed"] = gib(activation_memory(name, settings.itemsize, micro_batch, 1))
            rows.append(row)
    return columns, rows


def page() -> str:
    """docs/memory.md."""
    from tools import memory_terms
    from tools.model_table import markdown_table

    def by_kind(model: str, *overrides: str, ep_size: list[int] | None = None, **options) -> str:
        values = {"world": list(WORLDS), "ds_config": None, "micro_batch": 32, "gradient_accumulation_steps": 1}
        values |= {"activation_checkpointing": 0, **options}
        rows = kind_rows(argparse.Namespace(model=model, overrides=overrides, ep_size=ep_size, **values))
        return markdown_table(KIND_COLUMNS, [shown(row) for row in rows])

    bf16 = [CONFIGS / "zero2_bf16.json"]
    parts = [
        "# Memory of a training process",
        "Made by `python tools/memory_table.py --markdown`. All figures are GiB (2^30 bytes) of the process that needs "
        "most. The state is worked out from the sizes of the parameters; tests compare it with what the engine "
        "allocates. It is what is needed at once without activations: at the end of the backward pass, or in the "
        "optimizer's step if its copies need more. Activations are an estimate, of latents of 4 x 32 x 32 and a "
        "micro_batch of 32. Any other model, batch and config: `python "
        "tools/memory_table.py --model NAME [--world 16] [--ds_config FILE] [--micro_batch 8] [num_experts=16]`.",
        "## Every model with zero2_bf16",
        "State on 1, 8, 64 and 512 processes, where ep_size divides them; activations without and with "
        "`train.activation_checkpointing=1`.",
        markdown_table(*model_rows(list(WORLDS), 32)),
        "## Switch-DiT-XL/2, by DeepSpeed config",
        by_kind("Switch-DiT-XL/2", ep_size=[1]),
        "## Switch-DiT-XL/2 with 16 experts, zero2_bf16",
        by_kind("Switch-DiT-XL/2", "num_experts=16", ds_config=bf16),
        "## Diff-MoE-XL/2, zero2_bf16 with activation checkpointing",
        by_kind("Diff-MoE-XL/2", ds_config=bf16, activation_checkpointing=1),
        "## What is counted",
        paragraphs(memory_terms.__doc__.partition("\n\n")[2]),
        "## Activations",
        paragraphs(textwrap.dedent(memory_terms.activation_memory.__doc__.partition("\n\n")[2])),
    ]
    return "\n\n".join(part if part.startswith(("|", "#", "```")) else filled(part) for part in parts)


def paragraphs(text: str) -> str:
    """A docstring's body, its layout kept."""
    return "```\n" + text.strip("\n").rstrip() + "\n```"


def filled(text: str) -> str:
    """Lines of at most 120 characters; those of an item of a list indented."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    main()
