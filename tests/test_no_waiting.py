"""The host queues a step's work and never waits for it, but where it tells something; on the CPU reads are counted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, WORKERS, environment, free_port
from test_faults import GLOBAL_BATCH, STEPS, bad_steps, weights, write_poisoned_latents
from tiny_run import write_config, write_latents

from switchdit.engine.resharding import read_saved_run

LOG_EVERY, CHECKPOINT_EVERY = 5, 8
RARE = [step for step in range(1, STEPS + 1) if step % LOG_EVERY == 0 or step % CHECKPOINT_EVERY == 0 or step == STEPS]

#          DeepSpeed config, ZeRO stage   train
COUNTED = {
    "zero0": ("zero0_fp32", 0, {"max_grad_norm": 1.0}),
    "zero0 unclipped": ("zero0_fp32", 0, {"max_grad_norm": 0.0}),
    "zero1": ("zero2_fp32", 1, {"max_grad_norm": 0.0}),
    "zero2": ("zero2_fp32", 2, {"max_grad_norm": 1.0, "gradient_accumulation_steps": 2}),
    "zero1 bf16": ("zero1_bf16", 1, {"max_grad_norm": 1.0}),
    "zero2 bf16": ("zero2_bf16", 2, {"max_grad_norm": 0.0}),
}
AT_ONCE = ("zero0", "zero2", "zero1 bf16")  # also run so that every step is asked for its outcome before the next


def described(folder: Path, latents: Path, name: str, of: str, planted: bool = False, **monitor: int) -> dict:
    shipped, stage, train = COUNTED[of]
    deepspeed = json.loads((ROOT / f"ds_configs/{shipped}.json").read_text())
    deepspeed["zero_optimization"]["stage"] = stage
    (folder / f"{name}.json").write_text(json.dumps(deepspeed))
    sections = {
        "model": {"ep_size": 1},
        "train": {"steps": STEPS, "global_batch": GLOBAL_BATCH, **train},
        "monitor": {"log_every": LOG_EVERY, "checkpoint_every": CHECKPOINT_EVERY, "routing_every": 0, **monitor},
    }
    config = write_config(folder / f"{name}.yaml", latents, folder / name, **sections)
    argv = ["--config", str(config), "--deepspeed_config", str(folder / f"{name}.json")]
    return {"argv": argv, "output": str(folder / f"{name}.txt"), "rare": RARE, "planted": planted}


def watched(folder: Path, runs: list[dict], **variables: str) -> subprocess.CompletedProcess:
    (folder / "runs.json").write_text(json.dumps(runs))
    return subprocess.run(
        [sys.executable, str(WORKERS / "no_waiting.py"), str(folder / "runs.json")],
        cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    latents = write_poisoned_latents(folder / "latents")
    todo = {name: described(folder, latents, name, name) for name in COUNTED}
    todo["planted"] = described(folder, latents, "planted", "zero2", planted=True)
    for name in AT_ONCE:
        todo[f"{name} at once"] = described(folder, latents, f"{name} at once", name, log_every=1, checkpoint_every=1)
    done = watched(folder, list(todo.values()))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, code in zip(todo, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert code == 0, (name, (folder / f"{name}.txt").read_text()[-3000:])
    return folder


def reads(runs: Path, name: str) -> list[list]:
    """[phase, step, what, calls] of all reads by the thread that queues the steps, without those of CPUs alone."""
    return [read for read in json.loads((runs / f"{name}.txt.reads").read_text()) if not compares_gates(read)]


def compares_gates(read: list) -> bool:
    """`switchdit::expert_mix`, on a CPU alone, looks whether all samples have the same gates."""
    _, _, what, calls = read
    return what == "aten.equal.default" and "_forward" in calls[-4:]


@pytest.mark.parametrize("name", COUNTED)
def test_a_step_reads_nothing_from_the_device(runs, name):
    found = reads(runs, name)
    idle = [(phase, step, what, calls[-4:]) for phase, step, what, calls in found if step not in RARE]
    assert not idle, idle[:5]
    assert {step for _, step, _, _ in found} == set(RARE), "where something is told, reads are seen"


def test_a_read_inside_of_the_mixture_is_seen(runs):
    every = json.loads((runs / "zero2.txt.reads").read_text())
    assert {step for _, step, *_ in filter(compares_gates, every)} == set(range(1, STEPS + 1))


def test_a_read_would_be_seen(runs):
    planted = [what for _, step, what, _ in reads(runs, "planted") if step not in RARE]
    micro_batches = COUNTED["zero2"][2]["gradient_accumulation_steps"]
    assert planted == ["aten._local_scalar_dense.default"] * micro_batches * (STEPS - len(RARE))


@pytest.mark.parametrize("name", COUNTED)
def test_a_skipped_step_is_told_though_nobody_waited(runs, name):
    told = [json.loads(line) for line in (runs / name / "faults.jsonl").read_text().splitlines()]
    assert [(fault["step"], fault["told_at"], fault["what"]) for fault in told] == [
        (step, step, "skipped") for step in bad_steps()
    ]
    assert not set(bad_steps()) & set(RARE), "it is heard of late"
    assert "a step that is not finite is skipped on the device" in (runs / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", AT_ONCE)
def test_what_is_heard_late_comes_to_the_same(runs, name):
    """Weights, moments, their count, the average and the list of faults, of a run that asks after every step."""
    late, at_once = (runs / run / f"checkpoints/step_{STEPS:07d}" for run in (name, f"{name} at once"))
    ours, theirs = weights(late), weights(at_once)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    states = [json.loads((checkpoint / "state.json").read_text()) for checkpoint in (late, at_once)]
    assert states[0]["skipped_in_a_row"] == states[1]["skipped_in_a_row"] == 0
    for checkpoint, state in zip((late, at_once), states, strict=True):
        saved = read_saved_run(checkpoint, state)
        assert saved.counters["skipped_steps"] == len(bad_steps())
        assert {count["step"] for count in saved.scalars.values()} == {STEPS - len(bad_steps())}
    faults = [(run.parents[1] / "faults.jsonl").read_text() for run in (late, at_once)]
    assert faults[0] == faults[1] != ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", COUNTED)
def test_a_step_on_a_gpu_waits_for_nothing(tmp_path, name):
    run = described(tmp_path, write_latents(tmp_path / "latents"), "run", name)
    done = watched(tmp_path, [run], DS_ACCELERATOR="cuda", MASTER_PORT=str(free_port()))
    assert done.returncode == 0, done.stderr[-6000:]
    assert f"trained {STEPS} steps" in done.stdout
