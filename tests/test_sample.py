"""Sampling programs: the set of images is a function of (checkpoint, seed, options), not of how the work is cut."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from launching import ROOT, environment, launched, told_of_mistakes
from many_runs import Sampling, run_all_well
from PIL import Image

from switchdit.engine import checkpoint_folder
from switchdit.errors import UserError
from switchdit.sample import load_run

NUM_IMAGES, SIZE = 33, 8  # on a CPU made two at a time


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """Three classes of coloured noise, 8x8 pixels, as their own latents."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label, colour in enumerate(([220, 60, 60], [60, 220, 60], [60, 60, 220])):
        (folder / f"class{label}").mkdir()
        for i in range(12):
            pixels = np.clip(np.array(colour) + rng.normal(0, 20, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}/{i}.png")
    out = tmp_path_factory.mktemp("latents")
    command = ["tools/extract_latents.py", "--data", folder, "--out", out, "--vae", "pixels", "--image-size", SIZE]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment(), check=True, capture_output=True)
    return out


def trained(folder: Path, latents: Path, **sections: dict) -> Path:
    """A run of a tiny model over the images, long enough to leave what it started from."""
    config = {
        "run_dir": str(folder / "run"),
        "model": {
            "input_size": SIZE,
            "in_channels": 3,
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "num_classes": 3,
        },
        "data": {"latents": str(latents), "image_size": SIZE, "vae": "pixels"},
        "train": {"steps": 200, "global_batch": 16, "lr": 5.0e-3, "max_grad_norm": 1.0, "ema_decay": 0.9},
        "diffusion": {"schedule": "linear"},
        "monitor": {"checkpoint_every": 200},
        "sample": {"num_steps": 20, "cfg_scale": 2.0},
    }
    for name, values in sections.items():
        config[name] = {**config[name], **values}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    launched(1, "switchdit/train.py", "--config", path, "--deepspeed_config", "ds_configs/zero2_fp32.json")
    return folder / "run"


def options(run: Path, name: str, *more: object) -> list[str]:
    source = more if "--weights" in more else ["--checkpoint", run, *more]
    return [str(word) for word in [*source, "--out", run / f"{name}.npz", "--num-samples", NUM_IMAGES]]


def read(run: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(run / f"{name}.npz") as file:
        return dict(file)


def samples(run: Path, name: str, num_processes: int, *more: object, **variables: str) -> dict[str, np.ndarray]:
    launched(num_processes, "switchdit/sample.py", *options(run, name, *more), **variables)
    return read(run, name)


def many_samples(run: Path, sets: dict[str, list]) -> dict[str, np.ndarray]:
    """Images only."""
    run_all_well(run, {name: Sampling(options(run, name, *more)) for name, more in sets.items()})
    return {name: read(run, name)["arr_0"] for name in sets}


@pytest.fixture(scope="module")
def gaussian_run(tmp_path_factory, latents) -> Path:
    return trained(tmp_path_factory.mktemp("gaussian"), latents, model={"name": "Switch-DiT-S/2"})


@pytest.fixture(scope="module")
def one(gaussian_run) -> dict[str, np.ndarray]:
    return samples(gaussian_run, "one", 1, "--batch-size", 5, OMP_NUM_THREADS="2")


@pytest.fixture(scope="module")
def others(gaussian_run) -> dict[str, np.ndarray]:
    """Sets that differ from ``one`` in an option."""
    from tools.convert_checkpoint import to_authors

    published = gaussian_run / "authors.pt"
    to_authors(gaussian_run, published)
    sets = {
        "another seed": ["--seed", 1],
        "guided everywhere": ["sample.guidance_interval=[0,1000]"],
        "guided early": ["sample.guidance_interval=[500,1000]"],
        "unguided": ["sample.cfg_scale=1.0"],
        "ddim": ["sample.sampler=ddim"],
        "ddim in bfloat16": ["sample.dtype=bfloat16", "sample.sampler=ddim"],
        "published": ["--weights", published, "--config", gaussian_run / "config.yaml"],
    }
    return many_samples(gaussian_run, sets)


@pytest.mark.world_size(3)
def test_the_set_of_images_depends_on_nothing_but_the_seed(gaussian_run, one, others):
    """Not on the number of processes, of threads, or (which a CPU takes for another) the batch size."""
    three = samples(gaussian_run, "three", 3, "--batch-size", 4)
    assert (gaussian_run / "one.npz").read_bytes() == (gaussian_run / "three.npz").read_bytes()
    assert one["arr_0"].shape == (NUM_IMAGES, SIZE, SIZE, 3)
    assert one["arr_1"].tolist() == [i % 3 for i in range(NUM_IMAGES)]
    assert len({image.tobytes() for image in three["arr_0"]}) == NUM_IMAGES
    main_colour = three["arr_0"].mean((1, 2)).argmax(1)
    assert (main_colour == three["arr_1"]).mean() > 0.9  # chance: 0.33; so short a training misses one of 33
    assert not np.array_equal(others["another seed"], three["arr_0"])


def test_guidance_in_an_interval(one, others):
    everywhere, early = others["guided everywhere"], others["guided early"]
    assert np.array_equal(everywhere, one["arr_0"])
    assert not np.array_equal(early, everywhere) and not np.array_equal(early, others["unguided"])


def test_sampling_in_bfloat16(one, others):
    difference = np.abs(others["ddim in bfloat16"].astype(int) - others["ddim"])
    assert 0 < difference.mean() < 8  # of 255 levels
    assert not np.array_equal(others["ddim"], one["arr_0"])


def test_published_weights(gaussian_run, one, others):
    """What the authors' names hold gives the same images as the run that they were made of."""
    assert np.array_equal(others["published"], one["arr_0"])
    assert (gaussian_run / "published.npz").read_bytes() == (gaussian_run / "one.npz").read_bytes()


def test_the_autoencoder_must_be_that_of_the_latents_where_it_is_known(gaussian_run, monkeypatch):
    state = checkpoint_folder.read_state(checkpoint_folder.find_checkpoint(gaussian_run))
    args = Namespace(checkpoint=gaussian_run, vae=None, overrides=[])
    monkeypatch.setattr(checkpoint_folder, "read_state", lambda _: {**state, "vae_sha256": "unknown"})
    assert load_run(args, torch.device("cpu"))[2].identity["name"] == "pixels"
    monkeypatch.setattr(checkpoint_folder, "read_state", lambda _: {**state, "vae_sha256": "0" * 64})
    with pytest.raises(UserError, match="'pixels' is not the one whose latents the run was trained on"):
        load_run(args, torch.device("cpu"))


MISTAKES = [
    (
        ["--checkpoint", "{run}", "diffusion.schedule=cosine"],
        "override 'diffusion.schedule=cosine' would change what the",
    ),
    (
        ["--checkpoint", "{run}", "sample.sampler=euler"],
        "sample.sampler is 'euler'; it must be ddpm or ddim (gaussian)",
    ),
    (["--checkpoint", "{run}", "sample.guidance_interval=[1,2000]"], "but the model has 1000 timesteps"),
    (["--checkpoint", "{run}", "--config", "x.yaml"], "--config is for --weights"),
    (["--checkpoint", "{run}", "--which", "model"], "--which is for --weights"),
    (["--weights", "nowhere.pt"], "--weights needs a --config"),
    (["--weights", "nowhere.pt", "--config", "{run}/config.yaml"], "checkpoint 'nowhere.pt' does not exist"),
    (
        ["--weights", "nowhere.pt", "--config", "{run}/config.yaml", "model.input_size=16"],
        "make latents of (3, 16, 16), the autoencoder of (3, 8, 8) for data.image_size 8",
    ),
]


def test_mistakes(gaussian_run, tmp_path):
    out = ["--out", str(tmp_path / "out/x.npz")]
    lines = [[*out, *(a.replace("{run}", str(gaussian_run)) for a in arguments)] for arguments, _ in MISTAKES]
    for told, (_, says) in zip(told_of_mistakes("sample", lines), MISTAKES, strict=True):
        assert says in told
    assert not (tmp_path / "out").exists()


@pytest.mark.world_size(3)
@pytest.mark.slow
def test_diff_moe_by_rectified_flow(tmp_path, latents):
    """Another system, process and sampler through the same doors, with the experts of three processes."""
    run = trained(
        tmp_path,
        latents,
        model={"name": "Diff-MoE-S/2", "num_experts": 3, "top_k": 2, "num_shared_experts": 1, "mlp_ratio": 2.0},
        diffusion={"process": "rectified_flow", "schedule": "cosine"},
        sample={"sampler": "euler", "num_steps": 10},
    )
    found = many_samples(run, {"one": ["--batch-size", 5], "interval": ["sample.guidance_interval=[0,500]"]})
    one = found["one"]
    assert (one.mean((1, 2)).argmax(1) == np.arange(NUM_IMAGES) % 3).all()
    assert np.array_equal(one, samples(run, "three", 3, "--batch-size", 4)["arr_0"])
    assert not np.array_equal(found["interval"], one)
