"""A guided sampling step of a Switch-DiT beside plain DiT of its size, and beside itself with the plainest mixture.

    python tools/bench_sampling.py [--model Switch-DiT-S/2] [--batch_size 8] [--dtype float32] [--compile]
                                   [--num_steps 250] [--cfg_scale 1.5] [--repeats 20] [--warm_up 3] [--threads 2]
                                   [field=value ...]

A step is one of DDPM sampling as tools and monitors do it: the model on both halves of the guidance, ``batch_size``
images each, and the update of x. The three systems take their steps in turn. ``field=value`` are fields of the model,
e.g. num_experts=4 top_k=3.

Prints median times, the median over the rounds of Switch-DiT's time divided by the others', and images per second,
which are not measured but follow from the step and ``--num_steps``, without the autoencoder; then the same as JSON.
DS_ACCELERATOR=cpu measures the CPU of a machine with a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

from switchdit.diffusion.gaussian import GaussianDiffusion, make_betas
from switchdit.diffusion.samplers import PerImageNoise, SamplerStep, ddpm_steps, guided
from switchdit.engine.compilation import check_compiler
from switchdit.errors import UserError, exit_on_user_error
from switchdit.models import model_fields
from tools import timing
from tools.baselines import DIT, SWITCH, add_model_options, build_system, system_configs
from tools.model_table import text_table

BARS = {DIT: 1.10}  # how much of its time Switch-DiT-S/2 may take
COLUMNS = {
    "system": "system",
    "step": "step, ms",
    "ratio": "Switch-DiT / this",
    "bar": "bar",
    "images": "images/s, extrapolated",
}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--num_steps", type=int, default=250, help="of an image (default: 250)")
    parser.add_argument("--cfg_scale", type=float, default=1.5, help="of the guidance, not 1 (default: 1.5)")
    timing.add_common_options(parser, batch_size=8, repeats=20)
    args = parser.parse_intermixed_args(argv)
    timing.check_common_options(args)
    if args.num_steps < 1:
        raise UserError(f"--num_steps is {args.num_steps}; it must be at least 1")
    if args.cfg_scale == 1:
        raise UserError("--cfg_scale is 1.0, which is no guidance; it must be another number")
    return args


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    configs = system_configs(args)
    fields = model_fields(args.model, **configs[SWITCH].model_overrides)
    if args.num_steps > fields["num_timesteps"]:
        raise UserError(f"--num_steps is {args.num_steps}; the model has {fields['num_timesteps']} timesteps")
    if fields["class_dropout_prob"] == 0:
        raise UserError("model field 'class_dropout_prob' must be above 0 for guidance, which needs the null label")
    device = timing.measured_device()
    if args.compile:
        check_compiler("--compile", "Switch-DiT", device)
    about = timing.surroundings(args, device)
    about |= {name: getattr(args, name) for name in ("model", "fields", "compile", "num_steps", "cfg_scale")}
    steps = {}
    for system, config in configs.items():
        model = build_system(system, config, args.compile).to(device, timing.DTYPES[args.dtype])
        steps[system] = partial(next, endless_steps(model.eval().requires_grad_(False), args, device))
    timed = timing.in_turn(steps, device, args.warm_up, args.repeats)

    published = timing.has_bars(args, device) and (args.model, args.fields) == ("Switch-DiT-S/2", [])
    rows = []
    for system in configs:
        ratio = timed[SWITCH].over(timed[system])
        rows.append(
            {
                "system": system,
                "milliseconds": 1e3 * timed[system].median,
                "ratio": ratio,
                "bar": timing.judged(ratio, BARS.get(system) if published else None),
                "images_per_second": args.batch_size / timed[system].median / args.num_steps,
                "peak_bytes": timed[system].peak_bytes,
            }
        )
    print(f"a guided sampling step of {' '.join([args.model, *args.fields])}{', compiled' * args.compile}")
    print(timing.shown_surroundings(about))
    print(f"images/s: from the step, for {args.num_steps} steps an image, without decoding\n")
    columns = COLUMNS | ({"peak": "MB beyond the weights"} if device.type == "cuda" else {})
    print(text_table(columns, [shown(row) for row in rows]) + "\n")
    print(json.dumps({**about, "results": rows}))


def endless_steps(model: nn.Module, args: argparse.Namespace, device: torch.device) -> Iterator[SamplerStep]:
    """Sampling, step by step, and from the start again."""
    process = GaussianDiffusion(make_betas("cosine", model.num_timesteps)).respaced(args.num_steps)
    shape = (model.in_channels, model.input_size, model.input_size)
    noise = PerImageNoise(0, range(args.batch_size), shape, device)
    y = torch.arange(args.batch_size, device=device) % model.num_classes
    denoise = guided(model, y, model.null_label, args.cfg_scale)
    while True:
        yield from ddpm_steps(denoise, process, noise(), noise)


def shown(row: dict[str, Any]) -> dict[str, str]:
    return {
        "system": row["system"],
        "step": f"{row['milliseconds']:.1f}",
        "ratio": f"{row['ratio']:.3f}",
        "bar": timing.shown_bar(row["bar"]),
        "images": timing.short(row["images_per_second"]),
        "peak": timing.megabytes(row["peak_bytes"]),
    }


if __name__ == "__main__":
    main()
