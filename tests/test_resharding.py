"""Checkpoints go on anywhere: other numbers of processes, other ep_size, other ZeRO stages; and into one file."""

import json
from pathlib import Path

import pytest
import torch
from launching import ROOT
from many_runs import Run, run_all_well
from safetensors.torch import load_file
from tiny_run import read_log, write_config, write_latents

from switchdit import build_model, load_reference_checkpoint
from switchdit.engine.checkpoint import read_ema
from switchdit.engine.global_state import global_name
from switchdit.engine.resharding import MASTER, read_saved_run
from tools.consolidate_checkpoint import consolidated, main

pytestmark = pytest.mark.world_size(8)

SAVED_AT, ENDS_AT = 4, 8
TRAIN = {"global_batch": 24, "lr": 1.0e-4, "ema_decay": 0.9, "max_grad_norm": 1.0, "steps": ENDS_AT}
MONITOR = {"log_every": 1, "checkpoint_every": SAVED_AT, "routing_every": 0}
DIFF_MOE = {"name": "Diff-MoE-S/2", "top_k": 1}
NO_BALANCE = {"lambda_lb": 0.0}  # the load balancing loss is of a micro-batch, so that it depends on their number

#            of the run that saves                     of the runs that go on
SOURCES = {  # system, processes, ep_size, DeepSpeed  (processes, ep_size, DeepSpeed)
    "zero2": (
        {}, 4, 2, "zero2_fp32",
        [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 4), (8, 1), (8, 2), (8, 4), (1, 1, "zero0_fp32")],
    ),
    "zero0": ({}, 4, 2, "zero0_fp32", [(1, 1), (2, 2, "zero2_fp32"), (4, 4)]),
    "bf16": ({}, 4, 2, "zero2_bf16", [(1, 1), (3, 1), (4, 4)]),
    "momentum": ({}, 4, 2, "momentum", [(1, 1), (2, 2)]),
    "diff_moe": (DIFF_MOE, 4, 2, "zero2_fp32", [(1, 1), (2, 2)]),
}  # fmt: skip
CELLS = [
    (source, (*there, deepspeed)[:3])
    for source, (_, _, _, deepspeed, elsewhere) in SOURCES.items()
    for there in elsewhere
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with every run: it saves after 4 steps and goes on to 8, or it goes on from there elsewhere."""
    folder = tmp_path_factory.mktemp("resharding")
    latents = write_latents(folder / "latents")
    momentum = json.loads((ROOT / "ds_configs/zero2_fp32.json").read_text())
    momentum["optimizer"] = {"type": "SGD", "params": {"lr": "auto", "momentum": 0.9, "weight_decay": "auto"}}
    momentum["zero_allow_untested_optimizer"] = True
    (folder / "momentum.json").write_text(json.dumps(momentum))

    def run(name: str, model: dict, processes: int, ep_size: int, deepspeed: str, *more: str) -> Run:
        sections = {
            "model": {**model, "ep_size": ep_size},
            "train": {**TRAIN, "lr": 0.05} if deepspeed == "momentum" else TRAIN,
            "monitor": MONITOR,
            "loss": NO_BALANCE if model else {},
        }
        config = write_config(folder / f"{name}.yaml", latents, folder / name, **sections)
        path = folder / "momentum.json" if deepspeed == "momentum" else f"ds_configs/{deepspeed}.json"
        return Run(processes, config, path, more)

    todo = {}
    for source, (model, processes, ep_size, deepspeed, _) in SOURCES.items():
        todo[source] = run(source, model, processes, ep_size, deepspeed)
    for source, there in CELLS:
        checkpoint = folder / source / f"checkpoints/step_{SAVED_AT:07d}"
        todo[named(source, there)] = run(named(source, there), SOURCES[source][0], *there, "--resume", str(checkpoint))
    run_all_well(folder, todo)
    return folder


def named(source: str, there: tuple) -> str:
    return "_".join(map(str, (source, *there)))


@pytest.mark.parametrize(("source", "there"), CELLS, ids=[named(*cell) for cell in CELLS])
def test_a_run_goes_on_elsewhere(runs, source, there):
    expected, log = read_log(runs / source), read_log(runs / named(source, there))
    assert list(log) == list(range(SAVED_AT + 1, ENDS_AT + 1))
    of_another_precision = there[2][-4:] != SOURCES[source][3][-4:] and "momentum" not in there
    for step in log:
        error = abs(log[step]["loss/total"] / expected[step]["loss/total"] - 1)
        assert error < (1e-4 if of_another_precision else 1e-6), (step, error)


@pytest.mark.parametrize("there", [cell for source, cell in CELLS if source == "momentum"])
def test_weights_and_their_average_go_on_elsewhere(runs, there):
    """With SGD, whose steps are proportional to gradients: Adam's blow up the rounding of gradients near zero."""
    name = f"checkpoints/step_{ENDS_AT:07d}"
    for which in ("ema", "model"):
        ours, theirs = (consolidated(runs / run / name, which)[2] for run in (named("momentum", there), "momentum"))
        assert ours.keys() == theirs.keys()
        for weight in theirs:
            scale = theirs[weight].abs().max().clamp(min=1e-3)
            assert (ours[weight] - theirs[weight]).abs().max() < 1e-5 * scale, (which, weight)


@pytest.mark.parametrize("source", ["zero2", "zero0", "bf16", "diff_moe"])
def test_one_file_holds_all_experts(runs, tmp_path, capsys, source):
    out = tmp_path / "x.safetensors"
    checkpoint = runs / source / f"checkpoints/step_{ENDS_AT:07d}"
    about = json.loads((checkpoint / "state.json").read_text())["model"]
    for which in ("ema", "model"):
        main(["--checkpoint", str(runs / source), "--which", which, "--out", str(out)])
        assert f"wrote {out}: {which} weights of {checkpoint}, " in capsys.readouterr().out
        weights = load_file(out)
        model = build_model(**about)
        assert weights.keys() == model.state_dict().keys()
        load_reference_checkpoint(model, out)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        if which == "ema":
            averaged = read_ema(checkpoint)
            assert all(torch.equal(value, averaged[name]) for name, value in weights.items())
        else:  # what the average follows, nine tenths a step
            assert all((value - averaged[name]).abs().max() < 0.1 for name, value in weights.items())
            assert any(not torch.equal(value, averaged[name]) for name, value in weights.items())


def test_a_damaged_checkpoint_is_not_consolidated(runs, tmp_path, capsys):
    checkpoint = tmp_path / "step_0000008"
    checkpoint.mkdir()
    for path in (runs / "zero2/checkpoints/step_0000008").iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    with open(checkpoint / "zero_pp_rank_2_mp_rank_00_optim_states.pt", "r+b") as file:
        file.seek(5000)
        file.write(b"x")
    with pytest.raises(SystemExit) as ended:
        main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "x.safetensors")])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "is damaged: zero_pp_rank_2_mp_rank_00_optim_states.pt is not what was written" in told
    assert not (tmp_path / "x.safetensors").exists()


def test_every_expert_is_found_under_its_global_id(runs):
    """The optimizer's own pieces, put together, are all parameters once, with as many values as the model has."""
    checkpoint = runs / "zero2/checkpoints/step_0000008"
    state = json.loads((checkpoint / "state.json").read_text())
    saved = read_saved_run(checkpoint, state)
    shapes = {name: p.numel() for name, p in build_model(**state["model"]).named_parameters() if p.requires_grad}
    assert {name: saved.whole(name, MASTER).numel() for name in saved.pieces} == shapes
    assert all(saved.kinds(name) == [MASTER, "exp_avg", "exp_avg_sq"] for name in saved.pieces)
    assert set(saved.optimizer_step.values()) == {float(ENDS_AT)}


def test_global_names():
    experts = "blocks.3.moe.deepspeed_moe.experts.deepspeed_experts"
    assert global_name(f"{experts}.1.weight", 6) == f"{experts}.7.weight"
    assert global_name("blocks.3.attn.qkv.bias", 6) == "blocks.3.attn.qkv.bias"
