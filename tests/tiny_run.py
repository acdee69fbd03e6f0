"""A data set of latents, a config and runs small enough for tests; latents written by the real writer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from switchdit.data.latent_shards import Plan, write_manifest, write_shard

NUM_IMAGES, NUM_CLASSES, SHAPE = 50, 3, (4, 8, 8)
VAE = {"name": "test/autoencoder", "sha256": "0" * 64}


def write_latents(folder: Path, num_images: int = NUM_IMAGES, image_size: int = 32) -> Path:
    """Latents with structure to learn: each class has a pattern of its own."""
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(0, NUM_CLASSES, num_images))
    patterns = 2 * rng.standard_normal((NUM_CLASSES, *SHAPE))
    mean = patterns[labels] + 0.1 * rng.standard_normal((num_images, *SHAPE))
    both = np.stack([mean, mean[..., ::-1]], axis=1)  # original, flipped
    moments = np.stack([both, np.full_like(both, 0.05)], axis=2).astype(np.float16)
    plan = Plan(
        images="test",
        num_files=num_images,
        image_size=image_size,
        latent_shape=SHAPE,
        shard_size=20,
        encoder_dtype="float32",
        vae_sha256=VAE["sha256"],
        scale_factor=0.5,
        transform="test",
    )
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, num_images, plan.shard_size)
    sidecars = [write_shard(folder, i, moments[s : s + plan.shard_size], plan, "test") for i, s in enumerate(starts)]
    names = [f"{i}.png" for i in range(num_images)]
    write_manifest(folder, plan, sidecars, labels, names, [str(c) for c in range(NUM_CLASSES)], VAE)
    return folder


def write_config(path: Path, latents: Path, run_dir: Path, **sections: dict) -> Path:
    config = {
        "run_dir": str(run_dir),
        "model": {
            "name": "Switch-DiT-S/2",
            "input_size": 8,
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "num_classes": NUM_CLASSES,
            "num_experts": 4,
            "top_k": 3,
            "ep_size": 2,
        },
        "data": {"latents": str(latents), "image_size": 32, "vae": VAE["name"]},
        "train": {"steps": 12, "global_batch": 16, "lr": 1.0e-3, "ema_decay": 0.9, "max_grad_norm": 1.0},
        "monitor": {"log_every": 3, "checkpoint_every": 5, "sample_every": 0, "routing_every": 6},
    }
    for name, values in sections.items():
        config.setdefault(name, {}).update(values)
    path.write_text(yaml.safe_dump(config))
    return path


def read_log(run_dir: Path) -> dict[int, dict[str, float]]:
    """Everything logged, by step, without the speed."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return {line.pop("step"): {k: v for k, v in line.items() if k != "train/images_per_second"} for line in lines}


def steps_done(log: Path) -> int:
    """Of the last whole line of a run's log, 0 without one."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    whole = [line for line in lines[-2:] if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0
