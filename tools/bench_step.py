"""A whole training step of a Switch-DiT beside plain DiT of the same size, and beside itself with the plainest mixture.

    python tools/bench_step.py [--model Switch-DiT-S/2] [--batch_size 8] [--dtype float32] [--compile]
                               [--activation_checkpointing 0] [--repeats 10] [--warm_up 3] [--threads 2]
                               [field=value ...]

A step: losses (the diffusion prior's matching too), backward pass, optimizer, average of the weights; neither the
reading of latents nor what the program watches and logs. The three systems have DeepSpeed engines of their own in one
process, made as training makes its one, and take their steps in turn on the same random batches. ``field=value`` are
fields of the model, e.g. num_experts=4 top_k=3.

Prints median times, images per second, the median over the rounds of Switch-DiT's time divided by the others', and the
share of the device's matrix rate (MFU); then the same as JSON. DS_ACCELERATOR=cpu measures the CPU of a machine with a
GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from switchdit.config import Config
from switchdit.data.training_batches import Batch
from switchdit.deepspeed_config import resolve_deepspeed_config
from switchdit.engine.compilation import check_compiler
from switchdit.engine.ema import Ema
from switchdit.engine.engine import build_engine, init_processes, leave, on_gpu
from switchdit.engine.faults import Updates, poisoned
from switchdit.engine.objective import Objective
from switchdit.errors import UserError, exit_on_user_error
from switchdit.models import model_fields
from switchdit.models.costs import macs
from tools import timing
from tools.baselines import DIT, SWITCH, WITH_PLAIN, add_model_options, build_system, system_configs
from tools.command_line import check_one_process
from tools.model_table import text_table

ROOT = Path(__file__).resolve().parents[1]
DS_CONFIGS = {"float32": ROOT / "ds_configs/zero2_fp32.json", "bfloat16": ROOT / "ds_configs/zero2_bf16.json"}
BARS = {DIT: 1.15, WITH_PLAIN: 0.90}  # how much of their time Switch-DiT-S/2 may take
MFU = (
    "MFU: merged FLOPs (a product per sample and block for the k experts), forward and twice that backward, nothing\n"
    "for what is computed again, over the measured rate; with (a) the same are counted, for they would do"
)
NUM_BATCHES = 4
COLUMNS = {
    "system": "system",
    "step": "step, ms",
    "images": "images/s",
    "mfu": "MFU",
    "ratio": "Switch-DiT / this",
    "bar": "bar",
}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument(
        "--activation_checkpointing", type=int, default=0, help="recompute every n-th block (default: 0, none)"
    )
    timing.add_common_options(parser, batch_size=8, repeats=10)
    args = parser.parse_intermixed_args(argv)
    timing.check_common_options(args)
    return args


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    check_one_process("bench_step.py")
    every = args.activation_checkpointing
    configs = system_configs(args, global_batch=args.batch_size, activation_checkpointing=every)
    depth = model_fields(args.model, **configs[SWITCH].model_overrides)["depth"]
    if every > depth:
        raise UserError(f"--activation_checkpointing is {every}; the model has {depth} blocks")

    device = init_processes().device
    if args.compile:
        check_compiler("--compile", "Switch-DiT", device)
    about = timing.surroundings(args, device)
    about |= {name: getattr(args, name) for name in ("model", "fields", "compile", "activation_checkpointing")}
    rate = timing.matmul_rate(device, timing.DTYPES[args.dtype])
    steps, resident = {}, {}
    for system, config in configs.items():
        before = torch.cuda.memory_allocated() if on_gpu() else 0
        steps[system] = training_step(system, config, device, args)
        steps[system]()  # what the first step allocates stays as well
        resident[system] = torch.cuda.memory_allocated() - before if on_gpu() else None
    timed = timing.in_turn(steps, device, args.warm_up, args.repeats)

    published = timing.has_bars(args, device) and (args.model, args.fields, every) == ("Switch-DiT-S/2", [], 0)
    rows = []
    for system, config in configs.items():
        seconds, ratio = timed[system].median, timed[SWITCH].over(timed[system])
        flops = 3 * 2 * sum(macs(config.model_name, **config.model_overrides).values()) * args.batch_size
        rows.append(
            {
                "system": system,
                "milliseconds": 1e3 * seconds,
                "images_per_second": args.batch_size / seconds,
                "mfu": flops / seconds / rate,
                "ratio": ratio,
                "peak_bytes": timed[system].peak_bytes + resident[system] if on_gpu() else None,
                "bar": timing.judged(ratio, BARS.get(system) if published else None),
            }
        )
    print(f"a training step of {' '.join([args.model, *args.fields])}{', compiled' * args.compile}")
    print(timing.shown_surroundings(about))
    print(f"measured: {rate / 1e9:,.0f} GFLOP/s of a large {args.dtype} product")
    print(MFU + "\n")
    print(text_table(COLUMNS | ({"peak": "peak MB"} if on_gpu() else {}), [shown(row) for row in rows]) + "\n")
    print(json.dumps({**about, "matmul_flops_per_second": rate, "results": rows}))


def training_step(system: str, config: Config, device: torch.device, args: argparse.Namespace) -> Callable[[], None]:
    """An engine of its own; each call is its next step."""
    model = build_system(system, config, args.compile)
    model.activation_checkpointing = config.train.activation_checkpointing
    objective = Objective(config, model, device)
    engine = build_engine(model, resolve_deepspeed_config(DS_CONFIGS[args.dtype], config, 1, on_gpu()))
    ema, updates = Ema(engine, config.train.ema_decay), Updates(engine)
    engine.train()
    batches = itertools.cycle([random_batch(model, args.batch_size, seed) for seed in range(NUM_BATCHES)])
    steps = itertools.count()

    def take() -> None:
        objective.start_step(next(steps))
        losses = objective(engine, next(batches).to(device))
        heard = updates.hear()  # of the step before
        if heard and heard[1]:
            ema.update()
        engine.backward(poisoned(losses.total))
        updates.step(engine.global_steps + 1)

    return take


def random_batch(model: torch.nn.Module, n: int, seed: int) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    shape = (n, model.in_channels, model.input_size, model.input_size)
    return Batch(
        x0=torch.randn(shape, generator=rng),
        noise=torch.randn(shape, generator=rng),
        t=torch.randint(model.num_timesteps, (n,), generator=rng),
        y=torch.randint(model.num_classes, (n,), generator=rng),
        drop_label=torch.rand(n, generator=rng) < model.class_dropout_prob,
        index=torch.arange(n),
    )


def shown(row: dict[str, Any]) -> dict[str, str]:
    return {
        "system": row["system"],
        "step": f"{row['milliseconds']:.1f}",
        "images": timing.short(row["images_per_second"]),
        "mfu": f"{row['mfu']:.1%}",
        "ratio": f"{row['ratio']:.3f}",
        "bar": timing.shown_bar(row["bar"]),
        "peak": timing.megabytes(row["peak_bytes"]),
    }


if __name__ == "__main__":
    main()
    leave()
