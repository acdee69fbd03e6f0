"""Train presets for 20 steps on a tiny problem, save, load, go on: presets.py OUT_FOLDER CONFIG.yaml ..."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch

from switchdit.config import Config, config_to_dict, load_config
from switchdit.data.training_batches import TrainingBatches
from switchdit.deepspeed_config import resolve_deepspeed_config
from switchdit.engine.checkpoint import Checkpoints, load_checkpoint
from switchdit.engine.checkpoint_folder import find_checkpoint, read_ema
from switchdit.engine.ema import Ema
from switchdit.engine.engine import add_over_processes, build_engine, init_processes, leave, set_optimizer
from switchdit.engine.generate import build_averaged_model
from switchdit.engine.objective import Objective, time_distribution
from switchdit.models import build_model, model_fields

STEPS, BATCH = 20, 16
TINY = ["model.input_size=8", "model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.ep_size=1"]
TRAIN = [f"train.global_batch={BATCH}", "train.lr=3e-3", "train.ema_decay=0.0", "train.max_grad_norm=1.0"]


class Patterns:
    """Latents of a pattern per class, in memory."""

    latent_shape, scale_factor = (4, 8, 8), 1.0

    def __init__(self, num_classes: int):
        self.labels = np.arange(BATCH) % num_classes
        self.patterns = np.random.default_rng(0).standard_normal((num_classes, *self.latent_shape), dtype=np.float32)

    def moments(self, indices: np.ndarray, flipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = self.patterns[self.labels[indices]]
        return mean, np.full_like(mean, 0.05)


class Run:
    """A model in training, built from nothing."""

    def __init__(self, config: Config):
        torch.manual_seed(config.train.seed)
        self.config = config
        self.fields = model_fields(config.model_name, **config.model_overrides)
        model = build_model(config.model_name, **config.model_overrides)
        self.objective = Objective(config, model, torch.device("cpu"))
        self.engine = build_engine(model, resolve_deepspeed_config("ds_configs/zero2_fp32.json", config, 1, False))
        self.ema = Ema(self.engine, config.train.ema_decay)
        self.batches = TrainingBatches(
            Patterns(self.fields["num_classes"]),
            seed=config.train.seed,
            rank=0,
            world_size=1,
            micro_batch=BATCH,
            accumulation=1,
            num_timesteps=model.num_timesteps,
            label_dropout=model.class_dropout_prob,
            horizontal_flip=False,
            time_distribution=time_distribution(config),
            gate_noise=model.num_gates if self.fields.get("gate") == "noisy" else 0,
        )
        self.engine.train()

    def step(self, step: int) -> dict[str, float]:
        """A step on the one batch there is: what must fall is the loss of what has been seen."""
        set_optimizer(self.engine, lr=self.config.train.lr)
        self.objective.start_step(step)
        losses = self.objective(self.engine, self.batches.batch(0, 0))
        self.engine.backward(losses.total)
        self.engine.step()
        self.objective.finish_step(add_over_processes)
        self.ema.update()
        return {name: value.item() for name, value in losses.terms.items()}

    def about(self) -> dict:
        return {"model": {"name": self.config.model_name, **self.fields}, "diffusion": asdict(self.config.diffusion)}


def try_preset(path: Path, out: Path) -> dict:
    overrides = [o for o in TINY if "ep_size" not in o or "ep_size" in load_config(path).model]
    config = load_config(path, [*overrides, *TRAIN, f"run_dir={out}"])
    run = Run(config)
    losses = [run.step(step) for step in range(STEPS)]
    extra = {"monitor": [], "objective": run.objective.state(), "config": config_to_dict(config)}
    checkpoints = Checkpoints(out, run.engine, run.ema)
    checkpoints.save(STEPS, run.about(), extra)
    checkpoints.finish()
    checkpoint = find_checkpoint(out)

    sampled = build_averaged_model(run.about()["model"], read_ema(checkpoint), torch.device("cpu"))
    batch = run.batches.batch(0, 0)
    x, time = batch.x0, run.objective.process.model_time(batch.t)
    with torch.no_grad():
        averaged_differs_by = (sampled(x, time, batch.y) - run.engine.module.eval()(x, time, batch.y)).abs().max()
    run.engine.train()
    uninterrupted = run.step(STEPS)

    resumed = Run(config)
    _, state = load_checkpoint(checkpoint, resumed.engine, resumed.ema, resumed.about())
    resumed.objective.restore(state["objective"])
    return {
        "losses": losses,
        "averaged_differs_by": averaged_differs_by.item(),
        "uninterrupted": uninterrupted,
        "resumed": resumed.step(STEPS),
    }


def main() -> None:
    torch.set_num_threads(1)
    init_processes()
    folder, *paths = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    out = Path(folder)
    results = {path: try_preset(Path(path), out / Path(path).stem) for path in paths}
    (out / "results.json").write_text(json.dumps(results))
    leave()


main()
