"""Steps that go wrong: what is not finite is skipped by all alike, parameters that drift apart and spikes are told."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT
from many_runs import Run, run_all
from safetensors.torch import load_file
from tiny_run import NUM_IMAGES, read_log, write_config, write_latents

from switchdit.data.latent_shards import read_manifest
from switchdit.data.training_batches import EpochOrder
from switchdit.engine import faults
from switchdit.engine.faults import SpikeDetector, compare_parameters, poisoned
from switchdit.engine.resharding import read_saved_run
from switchdit.errors import FaultError

BAD_IMAGE = 7
GLOBAL_BATCH, STEPS = 8, 12


def test_poisoned_losses_have_poisoned_gradients():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    poisoned((x**2).sum()).backward()
    assert torch.equal(x.grad, torch.tensor([4.0, 6.0]))
    for bad in (math.inf, -math.inf, math.nan):
        x.grad = None
        poisoned((x**2).sum() + bad).backward()
        assert x.grad.isnan().all()


def test_spikes_are_told_and_trends_are_not():
    rng = np.random.default_rng(0)
    losses = 1 / np.sqrt(1 + np.arange(3000) / 300) + 0.02 * rng.standard_normal(3000)
    losses[[50, 1500, 1501, 2500]] += 0.5
    detector = SpikeDetector(6.0)
    assert [i for i, loss in enumerate(losses) if detector(loss)] == [1500, 1501, 2500]  # 50 is too early to judge
    off = SpikeDetector(0.0)
    assert not any(off(loss) for loss in losses)


def test_a_spike_detector_goes_on_where_it_was():
    rng = np.random.default_rng(1)
    losses = 1 + 0.1 * rng.standard_normal(400)
    losses[300] = 3.0
    whole, first, second = SpikeDetector(5.0), SpikeDetector(5.0), SpikeDetector(5.0)
    told = [whole(loss) for loss in losses]
    before = [first(loss) for loss in losses[:200]]
    second.restore(json.loads(json.dumps(first.state())))
    assert before + [second(loss) for loss in losses[200:]] == told
    assert told[300]


@pytest.fixture
def compared(monkeypatch):
    """`compare_parameters` among models in this process, as if each were a rank."""

    def compare(models: list[torch.nn.Module]) -> None:
        def digests(model: torch.nn.Module) -> list[torch.Tensor]:
            seen: list[torch.Tensor] = []

            def alone(mine: torch.Tensor) -> torch.Tensor:
                seen.append(mine)
                return torch.stack([mine] * len(models))

            monkeypatch.setattr(faults, "_of_all", alone)
            compare_parameters(model, 40)
            everything = torch.stack([faults._bits(p).sum(dtype=torch.int64) for p in model.parameters()])
            return [seen[0], everything]

        monkeypatch.setattr(faults.dist, "get_world_size", lambda: len(models))
        answers = [torch.stack(of_kind) for of_kind in zip(*map(digests, models), strict=True)]
        monkeypatch.setattr(faults, "_of_all", lambda mine: answers[0] if mine.numel() == 2 else answers[1])
        compare_parameters(models[0], 40)

    return compare


def make_models(count: int, dtype: torch.dtype) -> list[torch.nn.Module]:
    models = []
    for _ in range(count):
        torch.manual_seed(0)
        models.append(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)).to(dtype))
    return models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_flipped_bit_names_its_rank(compared, dtype):
    models = make_models(4, dtype)
    compared(models)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for bit in (0, dtype.itemsize * 8 - 2):
        models[2][1].weight.data.view(integer)[1, 2] ^= 1 << bit
        with pytest.raises(FaultError, match=r"^rank 2 differs in the parameters at step 40 \(1\.weight\)"):
            compared(models)
        models[2][1].weight.data.view(integer)[1, 2] ^= 1 << bit
    compared(models)


def test_two_ranks_cannot_tell_who_is_wrong(compared):
    models = make_models(2, torch.float32)
    models[1][0].bias.data[0] += 1
    with pytest.raises(FaultError, match=r"^ranks 0, 1 do not agree in the parameters at step 40 \(0\.bias\)"):
        compared(models)


@pytest.fixture(scope="module")
def poisoned_latents(tmp_path_factory) -> Path:
    return write_poisoned_latents(tmp_path_factory.mktemp("poisoned") / "latents")


def write_poisoned_latents(folder: Path) -> Path:
    """One image whose latents are infinite, as a bad cast leaves them."""
    write_latents(folder)
    shard = read_manifest(folder)["shards"][BAD_IMAGE // 20]
    moments = np.load(folder / shard["file"], mmap_mode="r+")
    moments[BAD_IMAGE % 20, :, 0] = np.inf
    moments.flush()
    return folder


PRECISIONS = ("zero2_fp32", "zero1_fp32", "zero0_fp32", "zero2_bf16", "zero1_bf16", "zero2_bf16_offload")


@pytest.fixture(scope="module")
def poisoned_runs(tmp_path_factory, poisoned_latents):
    folder = tmp_path_factory.mktemp("runs")
    zero1 = json.loads((ROOT / "ds_configs/zero2_fp32.json").read_text())
    zero1["zero_optimization"]["stage"] = 1
    (folder / "zero1_fp32.json").write_text(json.dumps(zero1))

    def run(name: str, every: int = 1, **sections) -> Run:
        deepspeed = folder / f"{name}.json" if name == "zero1_fp32" else f"ds_configs/{name.split('-')[0]}.json"
        monitor = {"log_every": every, "checkpoint_every": every, "routing_every": 0}
        config = write_config(folder / f"{name}.yaml", poisoned_latents, folder / name, monitor=monitor, **sections)
        return Run(2, config, deepspeed, (f"train.global_batch={GLOBAL_BATCH}", f"train.steps={STEPS}"))

    runs = {name: run(name) for name in PRECISIONS}
    runs["zero2_fp32-accumulated"] = run("zero2_fp32-accumulated", train={"gradient_accumulation_steps": 2})
    runs["zero2_fp32-late"] = run("zero2_fp32-late", every=STEPS)
    runs["zero2_fp32-limited"] = run("zero2_fp32-limited", faults={"max_skipped_steps": 1})
    return folder, run_all(folder, runs)


def bad_steps() -> list[int]:
    """Steps whose batch has the bad image in it."""
    order = EpochOrder(NUM_IMAGES, 0)
    batches = (order[np.arange(s * GLOBAL_BATCH, (s + 1) * GLOBAL_BATCH)] for s in range(STEPS))
    return [step + 1 for step, batch in enumerate(batches) if BAD_IMAGE in batch]


@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", [*PRECISIONS, "zero2_fp32-accumulated"])
def test_a_batch_that_is_not_finite_changes_nothing(poisoned_runs, name):
    folder, ended = poisoned_runs
    codes, output = ended[name]
    assert codes == [0, 0], output[-3000:]
    bad = bad_steps()
    assert 1 <= len(bad) <= 2
    told = [json.loads(line) for line in (folder / name / "faults.jsonl").read_text().splitlines()]
    assert [(fault["step"], fault["what"]) for fault in told] == [(step, "skipped") for step in bad]
    assert all(BAD_IMAGE in fault["samples"] and len(fault["samples"]) == GLOBAL_BATCH for fault in told)

    log = read_log(folder / name)
    assert list(log) == list(range(1, STEPS + 1))
    assert all(math.isfinite(value) for values in log.values() for value in values.values())
    checkpoints = folder / name / "checkpoints"
    for step in range(2, STEPS + 1):
        before, after = (weights(checkpoints / f"step_{s:07d}") for s in (step - 1, step))
        same = all(torch.equal(before[weight], after[weight]) for weight in before)
        assert same == (step in bad), f"step {step}"


@pytest.mark.world_size(2)
def test_hearing_of_a_skipped_step_late_comes_to_the_same(poisoned_runs):
    """A run that writes nothing before its end, so that the host hears of each step while it queues the next."""
    folder, ended = poisoned_runs
    assert ended["zero2_fp32-late"].codes == [0, 0]
    at_once, late = (folder / name for name in ("zero2_fp32", "zero2_fp32-late"))
    a, b = (weights(run / f"checkpoints/step_{STEPS:07d}") for run in (at_once, late))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert (at_once / "faults.jsonl").read_text() == (late / "faults.jsonl").read_text() != ""


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything a step changes: float32 weights, the optimizer's moments, the average."""
    saved = read_saved_run(checkpoint, json.loads((checkpoint / "state.json").read_text()))
    tensors = {(name, kind): saved.whole(name, kind) for name in saved.pieces for kind in saved.kinds(name)}
    return tensors | load_file(checkpoint / "ema.safetensors")


@pytest.mark.world_size(2)
def test_too_many_bad_batches_end_the_run(poisoned_runs):
    folder, ended = poisoned_runs
    codes, output = ended["zero2_fp32-limited"]
    assert codes == [2, 2]
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    first = bad_steps()[0]
    assert f"1 steps in a row had a loss or gradient that is not finite, the last was {first}" in line
    assert str(folder / "zero2_fp32-limited/faults.jsonl") in line
    assert (folder / "zero2_fp32-limited/faults.jsonl").read_text().count("\n") == 1
