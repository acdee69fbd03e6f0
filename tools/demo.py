"""The main job, small, on this machine: digits -> autoencoder -> latents -> training -> samples -> scores.

make demo        (or: python tools/demo.py [--run-dir runs/demo] [--data-dir data/digits] [--steps N] [--num-samples N])

Every step is the command that it prints. What does not depend on training (images, autoencoder, latents, digit
classifier, reference images) is kept in the data folder; a second demo goes straight to training.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

from switchdit.errors import UserError, exit_on_user_error

CONFIG, DEEPSPEED_CONFIG = "switchdit/configs/digits.yaml", "ds_configs/zero2_fp32.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="results; what a demo left is replaced")
    parser.add_argument("--data-dir", type=Path, default=Path("data/digits"), help="what a second demo can use again")
    parser.add_argument("--steps", type=int, help="training steps (default: the config's)")
    parser.add_argument("--autoencoder-steps", type=int, help="training steps of the autoencoder")
    parser.add_argument("--num-samples", type=int, default=600)
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    args = arguments()
    os.chdir(ROOT)  # paths are the repository's, wherever this is started
    start = time.perf_counter()
    run, data = args.run_dir, args.data_dir
    clear(run)
    images, autoencoder, latents = data / "images", data / "autoencoder", data / "latents"
    classifier, reference = data / "digit_features.safetensors", data / "reference.npz"
    size = ["--image-size", 32]

    stage("1/6  images: the 1,797 handwritten digits inside scikit-learn, as an image folder")
    python("tools/digits.py", "--out", images)

    stage("2/6  autoencoder: a small AutoencoderKL, trained on them")
    steps = ["--steps", args.autoencoder_steps] if args.autoencoder_steps else []
    python("tools/train_autoencoder.py", "--data", images, "--out", autoencoder, *size, *steps)

    stage("3/6  latents: what `make extract-latents` does for ImageNet")
    python("tools/extract_latents.py", "--data", images, "--out", latents, "--vae", autoencoder, *size)

    stage("4/6  training: Switch-DiT, 4 experts, 3 active, spread over 2 processes by DeepSpeed")
    overrides = [f"run_dir={run}", f"data.latents={latents}", f"data.vae={autoencoder}"]
    if args.steps:
        overrides += [f"train.steps={args.steps}", f"train.decay_steps={args.steps // 2}"]
    defaults = data == Path("data/digits") and run == Path("runs/demo")
    training = ["switchdit/train.py", "--config", CONFIG, "--deepspeed_config", DEEPSPEED_CONFIG]
    launch(2, *training, *(overrides[3:] if defaults else overrides))

    stage("5/6  sampling: classifier-free guidance, averaged weights")
    launch(
        2, "switchdit/sample.py", "--checkpoint", run, "--out", run / "samples.npz", "--num-samples", args.num_samples
    )

    stage("6/6  scores: a digit classifier in the place of Inception, whose weights a demo cannot assume")
    python("tools/train_feature_network.py", "--data", images, "--out", classifier, *size)
    python("tools/pack_images.py", "--data", images, "--out", reference, *size)
    features = ["--features", classifier, "--features-name", "digit features"]
    compared = ["--ref", reference, "--samples", run / "samples.npz", *features, "--out", run / "metrics.json"]
    compared += ["--cache", data / "features"]
    python("tools/eval_fid.py", *compared)

    metrics = json.loads((run / "metrics.json").read_text())
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(
        f"""
The demo took {minutes} min {seconds} s.
  pictures      {run / "samples.png"} (one row per digit), {run / "samples.npz"}
  metrics       {run / "metrics.json"}: {metrics["label_accuracy"]:.1%} recognised as their label,
                Fréchet distance (digit features) {metrics["frechet_distance"]:.2f}
  checkpoints   {run / "checkpoints"}
  TensorBoard   {run / "tensorboard"} (make tensorboard LOGDIR={run})
"""
    )


def clear(run: Path) -> None:
    """Remove a former demo's results, and nothing that is not one."""
    if run.exists() and not run.is_dir():
        raise UserError(f"--run-dir '{run}' is a file")
    if run.exists() and any(run.iterdir()):
        if not (run / "demo").exists():
            raise UserError(f"'{run}' holds something that is not a demo's; choose another --run-dir")
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    (run / "demo").write_text("made by tools/demo.py, which replaces this folder\n")


def stage(title: str) -> None:
    print(f"\n== {title}", flush=True)


def python(*command: object) -> None:
    call([sys.executable, *map(str, command)], shown=["python", *map(str, command)])


def launch(num_processes: int, *command: object) -> None:
    """Through launchers/single_node.sh, which prints the deepspeed command."""
    environment = {"NPROC": str(num_processes), "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
    if "MASTER_PORT" not in os.environ and not is_free(29500):
        environment["MASTER_PORT"] = str(free_port())
    call(["launchers/single_node.sh", *map(str, command)], environment=environment)


def call(command: list[str], shown: list[str] | None = None, environment: dict[str, str] | None = None) -> None:
    if shown:
        print(f"+ {shlex.join(shown)}", flush=True)
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **(environment or {})}, check=False)
    if done.returncode:
        raise UserError(f"this step of the demo ended with exit code {done.returncode}: {shlex.join(shown or command)}")


def is_free(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) != 0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    main()
