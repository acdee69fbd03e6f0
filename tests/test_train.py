"""The training program as users start it: it learns, it resumes to the last bit, it refuses what cannot work."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fault_points import Fault
from launching import WORKERS, launch, launched, told_of_mistakes
from many_runs import Run, run_all_well
from safetensors.torch import load_file
from same_run import difference
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import read_log, write_config, write_latents

TRAIN = "switchdit/train.py"
FP32 = "ds_configs/zero2_fp32.json"

pytestmark = pytest.mark.world_size(2)


def train(num_processes: int, config: Path, *arguments, ds_config: str = FP32, **kwargs):
    return launched(num_processes, TRAIN, "--config", config, "--deepspeed_config", ds_config, *arguments, **kwargs)


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    return write_latents(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, latents) -> Path:
    """A run of 12 steps, logged every 3, checkpoints after 5, 10 and 12; an epoch is 3.125 steps."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = write_config(folder / "c.yaml", latents, folder / "run")
    done = train(2, config)
    assert "2 processes on cpu, ep_size 2" in done.stdout
    return folder / "run"


def test_run_directory_and_tensorboard(uninterrupted):
    names = {p.name for p in uninterrupted.iterdir()}
    assert names == {
        "config.yaml",
        "deepspeed_config.json",
        "version.json",
        "log.jsonl",
        "owner.json",
        "checkpoints",
        "tensorboard",
    }
    checkpoints = {p.name for p in (uninterrupted / "checkpoints").iterdir()}
    assert checkpoints == {"latest", "step_0000005", "step_0000010", "step_0000012"}
    assert (uninterrupted / "checkpoints/latest").read_text().strip() == "step_0000012"
    version = json.loads((uninterrupted / "version.json").read_text())
    assert version["torch"] == torch.__version__
    assert set(version) >= {"switchdit", "git_revision", "deepspeed", "python", "command"}
    assert yaml.safe_load((uninterrupted / "config.yaml").read_text())["train"]["steps"] == 12

    events = EventAccumulator(str(uninterrupted / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {f"loss/{name}" for name in ("total", "mse", "vlb", "prior")} <= scalars
    assert {"train/lr", "train/grad_norm", "train/images_per_second"} <= scalars
    assert any(name.startswith("loss_by_timestep/") for name in scalars)
    assert [e.step for e in events.Scalars("loss/total")] == [3, 6, 9, 12]
    assert events.Tags()["images"] == ["routing/task_expert_map"]
    log = read_log(uninterrupted)
    for event in events.Scalars("loss/mse"):
        assert event.value == pytest.approx(log[event.step]["loss/mse"], rel=1e-6)


def test_killed_in_the_middle_and_resumed_is_the_uninterrupted_run(tmp_path, latents, uninterrupted):
    config = write_config(tmp_path / "c.yaml", latents, tmp_path / "run")
    fault = Fault("optimizer step", rank=0, count=2 * 7, to_all=True)  # experts' and the others' parameters: step 7
    variables = {"FAULT_FOLDER": str(tmp_path), "FAULT_RUN_DIR": str(tmp_path / "run"), "FAULT": fault.to_json()}
    arguments = ["--config", config, "--deepspeed_config", FP32, "--resume", "auto"]
    assert launch(2, WORKERS / "faulty_train.py", *arguments, **variables).returncode
    interrupted = read_log(tmp_path / "run")
    assert 6 in interrupted and 12 not in interrupted
    checkpoints = tmp_path / "run/checkpoints"
    whole = [int(p.name[5:]) for p in checkpoints.glob("step_*")]  # none, if the first was still being written
    assert set(whole) <= {5, 10}
    (checkpoints / ".partial_step_0000011").mkdir()
    (checkpoints / ".partial_step_0000011/state.json").write_text("{")  # a save that was cut off

    done = train(2, config, "--resume", "auto")
    assert f"steps {max(whole, default=0)} to 12" in done.stdout
    assert difference(tmp_path / "run", uninterrupted, "step_0000012") is None
    assert not list(checkpoints.glob(".partial*"))


def test_the_number_of_processes_and_accumulation_change_nothing_but_rounding(tmp_path, latents, uninterrupted):
    expected, runs = read_log(uninterrupted), {}
    for name, processes, override in (
        ("one", 1, "model.ep_size=1"),
        ("accumulated", 2, "train.gradient_accumulation_steps=4"),
    ):
        config = write_config(tmp_path / f"{name}.yaml", latents, tmp_path / name)
        runs[name] = Run(processes, config, more=(override, "train.steps=6"))
    run_all_well(tmp_path, runs)
    for name in runs:
        log = read_log(tmp_path / name)
        for step in (3, 6):
            for term in ("loss/total", "loss/mse", "loss/vlb", "loss/prior", "train/grad_norm"):
                assert log[step][term] == pytest.approx(expected[step][term], rel=1e-4), (name, step, term)


def test_noise_of_gates_and_learned_weights_are_part_of_the_run(tmp_path, latents):
    """What some settings alone have: noise of gates, clusters of timesteps, log-variances beside the model."""
    sections = {
        "model": {"gate": "noisy"},
        "loss": {"weighting": "uncertainty", "uncertainty_lr": 0.1},
        "train": {"steps": 6},
        "monitor": {"checkpoint_every": 3, "log_every": 3},
    }
    runs = {}
    for name, processes, more in (
        ("whole", 2, ("train.gradient_accumulation_steps=2",)),
        ("one", 1, ("model.ep_size=1",)),
        ("resumed", 2, ("train.gradient_accumulation_steps=2", "--resume", str(tmp_path / "copy"))),
    ):
        config = write_config(tmp_path / f"{name}.yaml", latents, tmp_path / name, **sections)
        runs[name] = Run(processes, config, more=more)
    run_all_well(tmp_path, {name: runs[name] for name in ("whole", "one")})
    logs = {name: read_log(tmp_path / name) for name in ("whole", "one")}
    for step in (3, 6):
        for term in ("loss/total", "loss/mse", "loss/prior", "train/grad_norm"):
            assert logs["one"][step][term] == pytest.approx(logs["whole"][step][term], rel=1e-4), (step, term)
    newest = "step_0000006"
    states = [tmp_path / name / "checkpoints" / newest / "state.json" for name in logs]
    learned = [json.loads(path.read_text())["objective"] for path in states]
    assert np.abs(learned[0]["log_variances"]).min() > 0.01
    np.testing.assert_allclose(learned[0]["log_variances"], learned[1]["log_variances"], rtol=1e-4)

    shutil.copytree(tmp_path / "whole/checkpoints/step_0000003", tmp_path / "copy")
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole/log.jsonl", tmp_path / "resumed/log.jsonl")
    run_all_well(tmp_path, {"resumed": runs["resumed"]})
    assert difference(tmp_path / "resumed", tmp_path / "whole", newest) is None


def learn(folder: Path, latents: Path, *precisions: str) -> Path:
    """Runs of 150 steps, one for each precision."""
    runs = {}
    for precision in precisions:
        config = write_config(
            folder / f"{precision}.yaml",
            latents,
            folder / precision,
            train={"steps": 150, "global_batch": 32, "lr": 5.0e-3},
            monitor={"log_every": 30, "checkpoint_every": 0, "routing_every": 0},
        )
        runs[precision] = Run(2, config, f"ds_configs/{precision}.json")
    run_all_well(folder, runs)
    return folder


@pytest.mark.parametrize("precision", ["zero2_bf16", pytest.param("zero1_bf16", marks=pytest.mark.slow)])
def test_it_learns_in_bfloat16_as_in_float32(tmp_path, latents, precision):
    errors = []
    learn(tmp_path, latents, "zero2_fp32", precision)
    for name in ("zero2_fp32", precision):
        log = read_log(tmp_path / name)
        assert log[150]["loss/mse"] < 0.6 * log[30]["loss/mse"], log
        assert log[150]["loss/prior"] < log[30]["loss/prior"]
        errors.append(log[150]["loss/mse"])
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def fails(config: Path, *command_lines: list[str]) -> list[str]:
    """The one line that a single process prints before exit code 2, for each list of arguments."""
    base = ["--config", str(config), "--deepspeed_config", FP32]
    return told_of_mistakes("train", [[*base, *arguments] for arguments in command_lines])


MISTAKES = [
    (["train.step=3"], "config key 'train.step' is unknown; did you mean 'train.steps'?"),
    (["model.num_expert=4"], "model field 'num_expert' is unknown for Switch-DiT-S/2; did you mean 'num_experts'?"),
    (["model.num_experts=3"], "num_experts (3) must be divisible by ep_size (2)"),
    (["model.top_k=5"], "top_k (5) must lie between 1 and num_experts (4)"),
    ([], "number of processes (1) must be divisible by ep_size (2)"),
    (["model.ep_size=1", "train.gradient_accumulation_steps=3"], "train.global_batch (16) must be divisible by"),
    (["model.ep_size=1", "model.num_classes=4"], "have 3 classes, but model.num_classes is 4"),
    (["model.ep_size=1", "data.image_size=64"], "were made at 32 pixels, but data.image_size is 64"),
    (["model.ep_size=1", "model.input_size=16"], "have shape (4, 8, 8), but the model expects (4, 16, 16)"),
    (["model.ep_size=1", "data.vae=other/vae"], "were made by autoencoder 'test/autoencoder', but data.vae is"),
    (["model.ep_size=1", "train.activation_checkpointing=3"], "activation_checkpointing is 3; the model has 2 blocks"),
    (["model.ep_size=1", "moe.dispatch=weight"], "moe.dispatch is 'weight'; it must be auto or samples or weights"),
    (["model.ep_size=1", "model.name=5"], "model.name is 5; it must be a name"),
    (["model.ep_size=1", "model.mlp_ratio=-1"], "mlp_ratio (-1.0) must be a number above 0"),
    (["model.ep_size=1", "data.latents=nowhere"], "nowhere"),
    (
        ["model.ep_size=1", "loss.auxiliary=none", "loss.lambda_dp=2"],
        "is 2.0, but it is of diffusion_prior",
    ),
    (
        ["model.ep_size=1", "diffusion.time_scale=1"],
        "is 1.0, but it is of rectified_flow, which is not in use",
    ),
    (["model.ep_size=1", "loss.weighting=uncertainty", "model.num_timesteps=5"], "needs 8 timesteps, the model has 5"),
    (["model.ep_size=1", "diffusion.schedule=linear", "model.num_timesteps=9"], "linear schedule needs at least 21"),
    (["model.ep_size=1", "model.name=DTR-S/2"], "model field 'ep_size' is unknown for DTR-S/2"),
    (["model.ep_size=1", "--resume", "nowhere"], "'nowhere' holds no complete checkpoint"),
]


def test_mistakes_end_in_one_line_and_leave_nothing(tmp_path, latents):
    config = write_config(tmp_path / "c.yaml", latents, tmp_path / "run")
    lines = fails(config, *(arguments for arguments, _ in MISTAKES))
    for line, (arguments, says) in zip(lines, MISTAKES, strict=True):
        assert says in line, arguments
    assert not (tmp_path / "run").exists()


def test_runs_are_not_mixed_up(tmp_path, latents, uninterrupted):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    config = write_config(tmp_path / "c.yaml", latents, run)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    one, resume = "model.ep_size=1", ["--resume", "auto"]
    again, model, seed, older, short, weighting = fails(
        config,
        [one],
        [one, *resume, "model.depth=3"],
        [one, *resume, "train.seed=1"],
        [one, "--resume", str(run / "checkpoints/step_0000005")],
        [one, *resume, "train.steps=3"],
        [one, *resume, "loss.weighting=p2"],
    )
    assert "already holds checkpoints up to step_0000012; continue with --resume auto" in again
    assert "of another model: it has {'depth': 2}, this run {'depth': 3}" in model
    assert "of another run: it has {'seed': 0}, this run {'seed': 1}" in seed
    assert "holds checkpoints up to step_0000012; to continue from" in older
    assert "train.steps is 3, but checkpoint" in short
    assert "of another loss: it has {'weighting': 'constant'}, this run {'weighting': 'p2'}" in weighting
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_averaged_weights_say_what_they_are(uninterrupted):
    from switchdit import build_model, load_reference_checkpoint
    from switchdit.errors import UserError

    checkpoint = uninterrupted / "checkpoints/step_0000012"
    about = json.loads((checkpoint / "state.json").read_text())["model"]
    load_reference_checkpoint(build_model(**about), checkpoint / "ema.safetensors")
    with pytest.raises(UserError, match="is of another model: system Switch-DiT instead of DiT"):
        load_reference_checkpoint(build_model("DiT-S/2"), checkpoint / "ema.safetensors")


def test_ema_is_the_average_of_the_weights(uninterrupted):
    """Of a run whose average starts at the first weights, it lies between the weights of the run."""
    early, late = (load_file(uninterrupted / f"checkpoints/step_{step:07d}/ema.safetensors") for step in (5, 12))
    assert early.keys() == late.keys()
    experts = [name for name in late if "deepspeed_experts.3" in name]
    assert len(experts) == 4  # weight and bias in two blocks, under global ids
    assert all(late[name].abs().max() > 0 for name in experts)
    assert all(np.isfinite(value.numpy()).all() and value.dtype == torch.float32 for value in late.values())
