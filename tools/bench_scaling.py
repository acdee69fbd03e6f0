"""Weak scaling on this machine's CPU, measured: the same micro_batch on 1, 2 and more processes.

    python tools/bench_scaling.py [--processes 1 2 4] [--micro_batch 8] [--steps 20] [--ep_size 1]
                                  [--ds_config ds_configs/zero2_fp32.json]

Starts the launcher for each number of processes, one thread each, and trains a small Switch-DiT with the engine, the
objective, the batches and the average of real training, on random latents. Prints the median time of a step after
warming up, images per second, and both relative to the first number of processes; then the same as JSON. More processes
than cores share them: at best they are as fast together as the cores are.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from switchdit.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"name": "Switch-DiT-S/2", "input_size": 16, "depth": 4, "hidden_size": 192, "num_heads": 6, "num_experts": 4}
WARM_UP = 5  # steps
COLUMNS = {
    "processes": "processes",
    "step": "step, ms",
    "images": "images/s",
    "ratio": "images/s, relative",
    "efficiency": "per process",
}


class RandomLatents:
    """Latents as a data set gives them, of no file."""

    latent_shape, scale_factor = (4, MODEL["input_size"], MODEL["input_size"]), 0.18215

    def __init__(self, num_images: int = 256):
        self.labels = np.arange(num_images) % 1000

    def moments(self, indices: np.ndarray, flipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = np.random.default_rng(0).standard_normal((len(indices), *self.latent_shape), dtype=np.float32)
        return mean, np.full_like(mean, 0.1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="how many (default: 1 2 4)")
    parser.add_argument("--micro_batch", type=int, default=8, help="images per process and step (default: 8)")
    parser.add_argument("--steps", type=int, default=20, help=f"to time, after {WARM_UP} to warm up (default: 20)")
    parser.add_argument("--ep_size", type=int, default=1, help="expert-parallel processes (default: 1)")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs/zero2_fp32.json")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)  # of the processes that are timed
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min([*args.processes, args.micro_batch, args.steps, args.ep_size]) < 1:
        raise UserError("--processes, --micro_batch, --steps and --ep_size must be at least 1")
    if not args.ds_config.is_file():
        raise UserError(f"--ds_config {args.ds_config} does not exist")
    for number in args.processes:
        if number % args.ep_size:
            raise UserError(f"--processes {number} must be divisible by --ep_size {args.ep_size}")
    return args


@exit_on_user_error
def main() -> None:
    args = arguments()
    if args.write:
        time_steps(args)
        return
    from tools.model_table import text_table

    load = os.getloadavg()[0]
    results = [launch(args, number) for number in args.processes]
    first = results[0]
    for result in results:
        result["images"] = result["processes"] * args.micro_batch / result["step"]
        result["ratio"] = result["images"] / first["images"]
        result["efficiency"] = result["ratio"] * first["processes"] / result["processes"]
    print(
        f"{args.ds_config.stem}, micro_batch {args.micro_batch}, ep_size {args.ep_size}, {args.steps} steps; "
        f"{os.cpu_count()} cores, load {load:.1f} before\n"
    )
    print(text_table(COLUMNS, [shown(result) for result in results]) + "\n")
    print(json.dumps({"cores": os.cpu_count(), "load": load, "micro_batch": args.micro_batch, "results": results}))


def launch(args: argparse.Namespace, number: int) -> dict[str, float]:
    """Time ``number`` processes: their median step in seconds."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        command = [Path(sys.executable).parent / "deepspeed", "--num_accelerators", number, "--master_port", port]
        command += [Path(__file__), "--write", out, "--micro_batch", args.micro_batch, "--steps", args.steps]
        command += ["--ep_size", args.ep_size, "--ds_config", args.ds_config.resolve(), "--processes", number]
        settings = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(map(str, command), env={**os.environ, **settings}, capture_output=True, text=True)
        if done.returncode or not out.exists():
            raise UserError(f"{number} processes ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
        return {"processes": number, "step": json.loads(out.read_text())}


def shown(result: dict[str, float]) -> dict[str, str]:
    return {
        "processes": str(result["processes"]),
        "step": f"{1e3 * result['step']:.0f}",
        "images": f"{result['images']:.1f}",
        "ratio": f"{result['ratio']:.2f}",
        "efficiency": f"{result['efficiency']:.0%}",
    }


def time_steps(args: argparse.Namespace) -> None:
    """As one of the launcher's processes: train, and write the median seconds of a step."""
    import torch

    from switchdit.config import config_from_dict
    from switchdit.data.training_batches import TrainingBatches
    from switchdit.deepspeed_config import resolve_deepspeed_config
    from switchdit.engine.ema import Ema
    from switchdit.engine.engine import add_over_processes, build_engine, init_processes, leave, on_gpu
    from switchdit.engine.objective import Objective
    from switchdit.files import write_json
    from switchdit.models import build_model

    processes = init_processes()
    num_steps = WARM_UP + args.steps
    config = config_from_dict(
        {
            "run_dir": ".",
            "model": {**MODEL, "ep_size": args.ep_size},
            "data": {"latents": ".", "image_size": 8 * MODEL["input_size"], "vae": "."},
            "train": {"steps": num_steps, "global_batch": args.micro_batch * processes.world_size},
        }
    )
    deepspeed_config = resolve_deepspeed_config(args.ds_config, config, processes.world_size, on_gpu())
    torch.manual_seed(0)
    model = build_model(config.model_name, **config.model_overrides)
    objective = Objective(config, model, processes.device)
    engine = build_engine(model, deepspeed_config)
    ema = Ema(engine, config.train.ema_decay)
    batches = TrainingBatches(
        RandomLatents(),
        seed=0,
        rank=processes.rank,
        world_size=processes.world_size,
        micro_batch=args.micro_batch,
        accumulation=1,
        num_timesteps=model.num_timesteps,
        label_dropout=model.class_dropout_prob,
        horizontal_flip=False,
    )
    engine.train()
    seconds = []
    for step, batch in enumerate(batches.iterate(0, num_steps)):
        started = time.perf_counter()
        objective.start_step(step)
        losses = objective(engine, batch.to(processes.device))
        engine.backward(losses.total)
        engine.step()
        objective.finish_step(add_over_processes)
        ema.update()
        losses.total.item()
        seconds.append(time.perf_counter() - started)
    if processes.is_first:
        write_json(args.write, statistics.median(seconds[WARM_UP:]))
    leave()


if __name__ == "__main__":
    main()
