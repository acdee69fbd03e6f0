"""Train several systems alike and compare them: same images, data order, noise and steps; only the routing differs.

    python tools/compare_systems.py --data DIR --out DIR [--config switchdit/configs/cifar10_narrow.yaml]
           [--systems DiT,DTR,Switch-DiT] [--seeds 0,1] [--num-samples 1000] [--parallel 2] [section.key=value ...]

DIR holds train/ and test/, each with a sub-folder of images per class (CIFAR-10 in that form is on many mirrors). For
every system and seed: a run of switchdit/train.py, and of each of its checkpoints samples, whose Fréchet distance to
the test images is measured in the features of a small classifier that is trained here on the training images. That is
no FID, and no number of it compares with one.

What is there already is kept: started again after an interruption, it goes on. Writes OUT/comparison.json,
comparison.md, comparison.png, and the routing maps of each run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

from switchdit.config import Config, load_config
from switchdit.errors import UserError, exit_on_user_error
from switchdit.files import atomic_write, make_folder, write_json
from tools.demo import free_port

FEATURES_NAME = "classifier features"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--config", type=Path, default=ROOT / "switchdit/configs/cifar10_narrow.yaml")
    parser.add_argument("--deepspeed_config", type=Path, default=ROOT / "ds_configs/zero2_fp32.json")
    parser.add_argument("--systems", type=comma_separated, default="DiT,DTR,Switch-DiT")
    parser.add_argument("--seeds", type=comma_separated, default="0,1")
    parser.add_argument("--num-samples", type=int, default=1000, help="of each checkpoint")
    parser.add_argument("--classifier-steps", type=int, default=1500)
    parser.add_argument("--nproc", type=int, default=1, help="processes of each run")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the YAML's")
    return parser.parse_intermixed_args()


def comma_separated(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@exit_on_user_error
def main() -> None:
    from switchdit.models import model_fields

    args = arguments()
    for name in ("num_samples", "classifier_steps", "nproc", "parallel"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    for name in ("systems", "seeds"):
        if not getattr(args, name):
            raise UserError(f"--{name} is empty; give names separated by commas")
    for part in ("train", "test"):
        if not (args.data / part).is_dir():
            raise UserError(f"--data '{args.data}' must hold folders train and test; '{args.data / part}' is missing")
    for name in ("data", "out", "config", "deepspeed_config"):
        setattr(args, name, getattr(args, name).resolve())
    config = load_config(args.config, args.overrides)
    model_fields(config.model_name, **config.model_overrides)
    trials = [(system, seed) for system in args.systems for seed in args.seeds]
    for system, seed in trials:
        run_config(args, system, seed)  # a wrong name is told before hours of work
    os.chdir(ROOT)
    make_folder(args.out)
    keep_settings(args.out / "settings.json", settings(args, config))

    prepare(args, config)
    with ThreadPoolExecutor(args.parallel) as pool:
        rows = [row for rows in pool.map(lambda trial: try_system(args, *trial), trials) for row in rows]
    write_json(args.out / "comparison.json", {"about": about(args, config), "rows": rows})
    report(args.out, rows)


def settings(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """What all numbers of a folder must have been made with; systems and seeds may be added."""
    of_all_runs = {**asdict(config), "run_dir": None, "model": config.model_overrides}
    del of_all_runs["train"]["seed"], of_all_runs["data"]["latents"]
    numbers = {name: getattr(args, name) for name in ("num_samples", "classifier_steps")}
    files = {"data": str(args.data), "deepspeed_config": args.deepspeed_config.name}
    return {**numbers, **files, "config": of_all_runs}


def keep_settings(path: Path, wanted: dict[str, Any]) -> None:
    """Write ``wanted``, or raise `UserError` if the folder's numbers were made with something else."""
    if not path.exists():
        return write_json(path, wanted)
    found = json.loads(path.read_text())
    if different := [name for name in wanted if found.get(name) != wanted[name]]:
        name = different[0]
        ours, theirs = wanted[name], found.get(name)
        if name == "config":
            section = next(s for s in ours if ours[s] != theirs.get(s))
            name, ours, theirs = section, ours[section], theirs.get(section)
        raise UserError(f"'{path.parent}' holds a comparison with {name} {theirs}, not {ours}; choose another --out")


def run_config(args: argparse.Namespace, system: str, seed: str) -> tuple[list[str], Config]:
    """The overrides of one run, and the config that they give."""
    from switchdit.models import model_fields

    base = load_config(args.config, args.overrides)
    size = base.model_name.rsplit("-", 1)[1]
    overrides = [
        *args.overrides,
        f"model.name={system}-{size}",
        f"run_dir={args.out / f'{system}_seed{seed}'}",
        f"data.latents={args.out / 'latents'}",
        f"train.seed={seed}",
    ]
    config = load_config(args.config, overrides)
    model_fields(config.model_name, **config.model_overrides)
    return overrides, config


def prepare(args: argparse.Namespace, config: Config) -> None:
    """Latents, reference images and the classifier; each tool leaves alone what is up to date."""
    size = ["--image-size", config.data.image_size]
    out, log = args.out, args.out / "prepare.log"
    latents = ["--data", args.data / "train", "--out", out / "latents", "--vae", config.data.vae, *size]
    run(["tools/extract_latents.py", *latents, "--batch-size", 256], log)
    if not (out / "reference.npz").exists():
        run(["tools/pack_images.py", "--data", args.data / "test", "--out", out / "reference.npz", *size], log)
    classifier = ["--data", args.data / "train", "--out", out / "classifier.safetensors", *size]
    print(run(["tools/train_feature_network.py", *classifier, "--steps", args.classifier_steps], log), flush=True)


def try_system(args: argparse.Namespace, system: str, seed: str) -> list[dict[str, Any]]:
    """Train one system and score each checkpoint: a row of numbers per checkpoint."""
    overrides, config = run_config(args, system, seed)
    folder = Path(config.run_dir)
    make_folder(folder)
    log, start = folder / "console.log", time.perf_counter()
    training = ["--config", args.config, "--deepspeed_config", args.deepspeed_config, "--resume", "auto", *overrides]
    run(["switchdit/train.py", *training], log, args.nproc)
    print(f"{system} seed {seed}: {config.train.steps} steps in {time.perf_counter() - start:.0f} s", flush=True)

    losses = {row["step"]: row for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines())}
    rows = []
    for checkpoint in sorted((folder / "checkpoints").glob("step_*")):
        step = int(checkpoint.name.removeprefix("step_"))
        scores = score(args, checkpoint, folder, log)
        row = {"system": system, "seed": config.train.seed, "step": step, **scores}
        rows.append({**row, "mse": losses[step]["loss/mse"]} if step in losses else row)
        print(
            f"{system} seed {seed} step {step}: Fréchet distance {scores['frechet_distance']:.3f}, "
            f"{scores['label_accuracy']:.1%} recognised",
            flush=True,
        )
    if system in ("DTR", "Switch-DiT"):
        run(["tools/plot_routing.py", folder, "--out", folder / "routing"], log)
    return rows


def score(args: argparse.Namespace, checkpoint: Path, folder: Path, log: Path) -> dict[str, float]:
    """Sample a checkpoint and measure the samples; read back if that was done before."""
    metrics = folder / f"metrics_{checkpoint.name}.json"
    if not metrics.exists():
        samples = folder / f"samples_{checkpoint.name}.npz"
        options = ["--checkpoint", checkpoint, "--out", samples, "--num-samples", args.num_samples]
        run(["switchdit/sample.py", *options, "--batch-size", 100], log, args.nproc)
        features = ["--features", args.out / "classifier.safetensors", "--features-name", FEATURES_NAME]
        compared = ["--ref", args.out / "reference.npz", "--samples", samples, *features, "--out", metrics]
        compared += ["--cache", args.out / "features"]
        run(["tools/eval_fid.py", *compared], log)
    values = json.loads(metrics.read_text())
    return {name: values[name] for name in ("frechet_distance", "label_accuracy", "precision", "recall")}


def run(command: list[object], log: Path, num_processes: int | None = None) -> str:
    """Run a program of this repository, through the launcher if it is distributed; what it prints goes to ``log``."""
    words = [sys.executable, *map(str, command)]
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    if num_processes:
        words = ["launchers/single_node.sh", *map(str, command)]
        environment |= {"NPROC": str(num_processes), "MASTER_PORT": str(free_port())}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    with open(log, "a") as file:
        file.write(f"+ {' '.join(words)}\n{done.stdout}{done.stderr}\n")
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise UserError(f"{command[0]} ended with exit code {done.returncode}: {last} (all of it is in {log})")
    return done.stdout.strip()


def about(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return {
        "command": " ".join(sys.argv),
        "device": device,
        "feature_space": FEATURES_NAME,
        **settings(args, config),
    }


def means(rows: list[dict[str, Any]], name: str) -> dict[str, dict[int, tuple[float, float, float]]]:
    """By system and step: mean, lowest and highest over the seeds."""
    out: dict[str, dict[int, tuple[float, float, float]]] = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        for step in sorted({row["step"] for row in rows}):
            values = [row[name] for row in rows if (row["system"], row["step"]) == (system, step)]
            if values:
                out.setdefault(system, {})[step] = (statistics.fmean(values), min(values), max(values))
    return out


def report(out: Path, rows: list[dict[str, Any]]) -> None:
    """comparison.md and comparison.png."""
    from tools.drawing import line_chart

    by_system = means(rows, "frechet_distance")
    steps = sorted({row["step"] for row in rows})
    lines = ["| system | " + " | ".join(f"step {step}" for step in steps) + " |", "|---" * (len(steps) + 1) + "|"]
    for system, values in by_system.items():
        cells = ("{:.2f} ({:.2f} to {:.2f})".format(*values[s]) if s in values else "" for s in steps)
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    table = f"Fréchet distance ({FEATURES_NAME}), mean over seeds (lowest to highest):\n\n" + "\n".join(lines) + "\n"
    with atomic_write(out / "comparison.md", "w") as file:
        file.write(table)
    picture = line_chart(by_system, f"Frechet distance ({FEATURES_NAME})", "training step", "mean and range over seeds")
    with atomic_write(out / "comparison.png") as file:
        picture.save(file, format="PNG")
    print(f"\n{table}\nwrote {out / 'comparison.json'}, comparison.md and comparison.png")


if __name__ == "__main__":
    main()
