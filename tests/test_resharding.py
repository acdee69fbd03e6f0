"""Checkpoints go on anywhere: other numbers of processes, other ep_size, other ZeRO stages; and into one file."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import ROOT, WORKERS, environment
from safetensors.torch import load_file
from tiny_run import read_log, write_config, write_latents

from switchdit import build_model, load_reference_checkpoint
from switchdit.engine.checkpoint_folder import read_ema
from switchdit.engine.checkpoint_writer import load_tensors
from switchdit.engine.global_state import global_name
from switchdit.engine.resharding import MASTER, SavedRun, check_optimizer, read_saved_run
from switchdit.errors import UserError
from tools.consolidate_checkpoint import consolidated, main

pytestmark = pytest.mark.world_size(8)

SAVED_AT, ENDS_AT = 3, 5
TRAIN = {"global_batch": 24, "lr": 1.0e-4, "ema_decay": 0.9, "max_grad_norm": 1.0, "steps": ENDS_AT}
MONITOR = {"log_every": 1, "checkpoint_every": SAVED_AT, "routing_every": 0}
DIFF_MOE = {"name": "Diff-MoE-S/2", "top_k": 1}
NO_BALANCE = {"lambda_lb": 0.0}  # the load balancing loss is of a micro-batch, so that it depends on their number
SPLIT = 2500  # values in a group of experts, so that there are two groups

ADAM = {"optimizer": {"params": {"torch_adam": False}}}
DEEPSPEED = {  # name -> shipped config, what is changed in it
    "zero0": ("zero0_fp32", {}),
    "zero2": ("zero2_fp32", {}),
    "bf16": ("zero2_bf16", {}),
    "momentum": ("zero2_fp32", {"optimizer": {"type": "SGD"}, "zero_allow_untested_optimizer": True}),
    "split": ("zero2_fp32", {}),
    "fused": ("zero2_fp32", ADAM),
    "fused0": ("zero0_fp32", ADAM),
    "offload": ("zero2_fp32", {**ADAM, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
}
#            of the run that saves      of the runs that go on
SOURCES = {  # DeepSpeed: system, processes, ep_size  (processes, ep_size, DeepSpeed)
    "zero2": (
        {}, 4, 2,
        [(1, 1, "zero2"), (4, 4, "zero2"), (8, 2, "zero2"), (2, 2, "zero0"), (4, 2, "split"), (2, 1, "fused")],
    ),
    "zero0": ({}, 2, 2, [(1, 1, "zero0"), (4, 4, "zero2")]),
    "bf16": ({}, 4, 2, [(4, 4, "bf16")]),  # another micro-batch would round its gradients otherwise
    "momentum": ({}, 2, 2, [(1, 1, "momentum")]),
    "diff_moe": (DIFF_MOE, 2, 2, [(1, 1, "zero2")]),
    "split": ({}, 4, 2, [(2, 1, "zero2")]),
    "fused": ({}, 3, 1, [(1, 1, "offload"), (1, 1, "zero2")]),  # partitions with padding
    "fused0": ({}, 2, 2, [(1, 1, "fused0")]),
    "alone": ({}, 1, 1, []),
}  # fmt: skip
CELLS = [(source, there) for source, (*_, elsewhere) in SOURCES.items() for there in elsewhere]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with every run: it saves after 3 steps and goes on to 5, or it goes on from there elsewhere."""
    folder = tmp_path_factory.mktemp("resharding")
    latents = write_latents(folder / "latents")
    for name in DEEPSPEED:
        (folder / f"{name}.json").write_text(json.dumps(deepspeed_config(name)))

    def run(name: str, model: dict, processes: int, ep_size: int, deepspeed: str, *more: str) -> dict:
        sections = {
            "model": {**model, "ep_size": ep_size},
            "train": {**TRAIN, "lr": 0.05} if deepspeed == "momentum" else TRAIN,
            "monitor": MONITOR,
            "loss": NO_BALANCE if model else {},
        }
        config = write_config(folder / f"{name}.yaml", latents, folder / name, **sections)
        return {
            "world_size": processes,
            "argv": ["--config", str(config), "--deepspeed_config", str(folder / f"{deepspeed}.json"), *more],
            "output": str(folder / f"{name}.txt"),
            "group_size": SPLIT if deepspeed == "split" else None,
        }

    todo = {}
    for source, (model, processes, ep_size, _) in SOURCES.items():
        todo[source] = run(
            source, model, processes, ep_size, {"diff_moe": "zero2", "alone": "zero0"}.get(source, source)
        )
    for source, there in CELLS:
        resumed = ("--resume", str(checkpoint(folder, source, SAVED_AT)))
        todo[named(source, there)] = run(named(source, there), SOURCES[source][0], *there, *resumed)
    (folder / "runs.json").write_text(json.dumps(list(todo.values())))
    done = subprocess.run(
        [sys.executable, str(WORKERS / "resharding.py"), str(folder / "runs.json")],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, codes in zip(todo, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert not any(codes), (name, codes, (folder / f"{name}.txt").read_text()[-3000:])
    return folder


def deepspeed_config(name: str) -> dict:
    shipped, change = DEEPSPEED[name]
    config = json.loads((ROOT / f"ds_configs/{shipped}.json").read_text())
    if name == "momentum":
        config["optimizer"]["params"] = {"lr": "auto", "momentum": 0.9, "weight_decay": "auto"}
    for section, values in change.items():
        config[section] = {**config.get(section, {}), **values} if isinstance(values, dict) else values
    if "params" in change.get("optimizer", {}):
        config["optimizer"]["params"] = {"lr": "auto", "weight_decay": "auto", **change["optimizer"]["params"]}
    return config


def named(source: str, there: tuple) -> str:
    return "_".join(map(str, (source, *there)))


def checkpoint(runs: Path, name: str, step: int) -> Path:
    return runs / name / f"checkpoints/step_{step:07d}"


def saved_run(path: Path) -> SavedRun:
    return read_saved_run(path, json.loads((path / "state.json").read_text()))


@pytest.mark.parametrize(("source", "there"), CELLS, ids=[named(*cell) for cell in CELLS])
def test_a_run_goes_on_elsewhere(runs, source, there):
    """Everything that was saved is there to the last bit, and training goes on with it."""
    path = checkpoint(runs, source, SAVED_AT)
    again = runs / f"{named(source, there)}.txt.again" / path.name
    before, after = saved_run(path), saved_run(again)
    assert before.pieces.keys() == after.pieces.keys()
    for name in before.pieces:
        kinds = before.kinds(name)
        assert kinds == after.kinds(name)
        assert all(torch.equal(before.whole(name, kind), after.whole(name, kind)) for kind in kinds), name
    assert before.scalars == after.scalars
    assert {tuple(scalars.values()) for scalars in after.scalars.values()} == {() if source == "momentum" else (3.0,)}
    assert before.counters == after.counters
    assert before.other.keys() == after.other.keys()
    assert all(torch.equal(before.other[name], after.other[name]) for name in before.other)
    averaged, loaded = read_ema(path), read_ema(again)
    assert averaged.keys() == loaded.keys()
    assert all(torch.equal(averaged[name], loaded[name]) for name in averaged)

    expected, log = read_log(runs / source), read_log(runs / named(source, there))
    assert list(log) == list(range(SAVED_AT + 1, ENDS_AT + 1))
    for step in log:
        error = abs(log[step]["loss/total"] / expected[step]["loss/total"] - 1)
        assert error < 1e-6, (step, error)


@pytest.mark.parametrize("source", ["zero2", "zero0", "split", "fused", "fused0"])
def test_moments_are_those_of_one_process(runs, source):
    """Under their names there, as PyTorch reads them: what is written and read in the wrong place would agree."""
    path = checkpoint(runs, "alone", SAVED_AT)
    groups = json.loads((path / "state.json").read_text())["optimizer_names"]
    names = [name for group in groups for name in group]
    states = load_tensors(path / "expp_rank_0_mp_rank_00_optim_states.pt")["optimizer"]["state"]
    saved = saved_run(checkpoint(runs, source, SAVED_AT))
    assert set(names) == saved.pieces.keys()
    for i, name in enumerate(names):
        for kind in ("exp_avg", "exp_avg_sq"):
            expected = states[i][kind].flatten()  # zero for an expert that no sample has seen
            error = (saved.whole(name, kind) - expected).norm()
            assert error <= 1e-4 * expected.norm(), (name, kind)


def test_what_decides_whether_deepspeed_itself_can_load(runs):
    about = {path.name.split(".")[0]: json.loads(path.read_text()) for path in runs.glob("*.engine.json")}
    assert about["zero2"]["layout"] != about["split"]["layout"] == about["zero2_4_2_split"]["layout"]
    assert about["zero0_4_4_zero2"] == about["zero2_4_4_zero2"]
    assert about["zero0"]["layout"] is None
    assert about["fused_1_1_zero2"]["layout"] == about["fused_1_1_offload"]["layout"]
    optimizers = {name: tuple(about[name]["optimizer"].values()) for name in about}
    assert optimizers["zero2"] == optimizers["zero0"] == ("AdamW", "torch.optim.adamw.AdamW")
    assert optimizers["fused"] == optimizers["fused0"] == ("AdamW", "deepspeed.ops.adam.fused_adam.FusedAdam")
    assert optimizers["fused_1_1_offload"] == ("AdamW", "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam")
    assert optimizers["momentum"] == ("SGD with momentum", "torch.optim.sgd.SGD")


@pytest.mark.parametrize(
    ("optimizer", "family"),
    [
        (partial(torch.optim.Adam), "Adam"),
        (partial(torch.optim.AdamW, amsgrad=True), "AdamW with amsgrad"),
        (partial(torch.optim.SGD), "SGD"),
        (partial(torch.optim.RMSprop, centered=True, momentum=0.9), "RMSprop with centered momentum"),
    ],
)
def test_another_family_of_optimizers_is_refused(optimizer, family):
    engine = SimpleNamespace(
        optimizer=optimizer([torch.nn.Parameter(torch.zeros(1))], lr=0.1), zero_optimization_stage=lambda: 0
    )
    check_optimizer(Path("step_3"), {"optimizer": {"family": family}}, engine)
    check_optimizer(Path("step_3"), {}, engine)
    with pytest.raises(UserError) as refused:
        check_optimizer(Path("step_3"), {"optimizer": {"family": "AdamW"}}, engine)
    said = f"checkpoint 'step_3' was trained with AdamW, this run's optimizer is {family}: set 'optimizer' in the "
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    ("source", "file", "says"),
    [
        ("zero2", "zero_pp_rank_2_mp_rank_00_optim_states.pt", "it has no file {}"),
        ("zero2", "mp_rank_00_model_states.pt", "it has no file {}"),
        ("zero0", "expp_rank_1_mp_rank_00_optim_states.pt", "it has no file {}"),
        ("zero0", "layer_1_expert_3_mp_rank_00_model_states.pt", None),
    ],
)
def test_a_checkpoint_without_one_of_its_files_is_refused(runs, tmp_path, source, file, says, listed):
    whole = checkpoint(runs, source, SAVED_AT)
    state = json.loads((whole / "state.json").read_text())
    for path in whole.iterdir():
        if path.name != file:
            (tmp_path / path.name).symlink_to(path)
    if not listed:
        del state["files"]
        says = says or "no file in it has blocks.1.moe.deepspeed_moe.experts.deepspeed_experts.3.weight"
    says = says or "it has no file {}"
    with pytest.raises(UserError) as refused:
        read_saved_run(tmp_path, state)
    assert str(refused.value) == f"checkpoint '{tmp_path}' is not whole: {says.format(file)}"
    assert "\n" not in str(refused.value)


def test_what_was_not_written_with_a_checkpoint_is_not_read(runs, tmp_path):
    whole = checkpoint(runs, "zero0", SAVED_AT)
    for path in whole.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "layer_9_expert_9_mp_rank_00_model_states.pt").write_bytes(b"nothing of ours")
    state = json.loads((whole / "state.json").read_text())
    assert read_saved_run(tmp_path, state).pieces.keys() == saved_run(whole).pieces.keys()
    del state["files"]
    with pytest.raises(UserError, match=r"layer_9_expert_9_mp_rank_00_model_states\.pt cannot be read: "):
        read_saved_run(tmp_path, state)


@pytest.mark.parametrize("there", [cell for source, cell in CELLS if source == "momentum"])
def test_weights_and_their_average_go_on_elsewhere(runs, there):
    """With SGD, whose steps are proportional to gradients: Adam's blow up the rounding of gradients near zero."""
    for which in ("ema", "model"):
        ours, theirs = (
            consolidated(checkpoint(runs, run, ENDS_AT), which)[2] for run in (named("momentum", there), "momentum")
        )
        assert ours.keys() == theirs.keys()
        for weight in theirs:
            scale = theirs[weight].abs().max().clamp(min=1e-3)
            assert (ours[weight] - theirs[weight]).abs().max() < 1e-5 * scale, (which, weight)


@pytest.mark.parametrize("source", ["zero2", "zero0", "bf16", "diff_moe"])
def test_one_file_holds_all_experts(runs, tmp_path, capsys, source):
    out = tmp_path / "x.safetensors"
    path = checkpoint(runs, source, ENDS_AT)
    about = json.loads((path / "state.json").read_text())["model"]
    for which in ("ema", "model"):
        main(["--checkpoint", str(runs / source), "--which", which, "--out", str(out)])
        assert f"wrote {out}: {which} weights of {path}, " in capsys.readouterr().out
        weights = load_file(out)
        model = build_model(**about)
        assert weights.keys() == model.state_dict().keys()
        load_reference_checkpoint(model, out)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        if which == "ema":
            averaged = read_ema(path)
            assert all(torch.equal(value, averaged[name]) for name, value in weights.items())
        else:  # what the average follows, nine tenths a step
            assert all((value - averaged[name]).abs().max() < 0.1 for name, value in weights.items())
            assert any(not torch.equal(value, averaged[name]) for name, value in weights.items())


def test_a_damaged_checkpoint_is_not_consolidated(runs, tmp_path, capsys):
    damaged = tmp_path / checkpoint(runs, "zero2", ENDS_AT).name
    damaged.mkdir()
    for path in checkpoint(runs, "zero2", ENDS_AT).iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    with open(damaged / "zero_pp_rank_2_mp_rank_00_optim_states.pt", "r+b") as file:
        file.seek(5000)
        file.write(b"x")
    with pytest.raises(SystemExit) as ended:
        main(["--checkpoint", str(damaged), "--out", str(tmp_path / "x.safetensors")])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "is damaged: zero_pp_rank_2_mp_rank_00_optim_states.pt is not what was written" in told
    assert not (tmp_path / "x.safetensors").exists()


def test_every_expert_is_found_under_its_global_id(runs):
    """The optimizer's own pieces, put together, are all parameters once, with as many values as the model has."""
    path = checkpoint(runs, "zero2", ENDS_AT)
    state = json.loads((path / "state.json").read_text())
    saved = read_saved_run(path, state)
    shapes = {name: p.numel() for name, p in build_model(**state["model"]).named_parameters() if p.requires_grad}
    assert {name: saved.whole(name, MASTER).numel() for name in saved.pieces} == shapes
    assert all(saved.kinds(name) == [MASTER, "exp_avg", "exp_avg_sq"] for name in saved.pieces)
    assert all(scalars == {"step": float(ENDS_AT)} for scalars in saved.scalars.values())


def test_global_names():
    experts = "blocks.3.moe.deepspeed_moe.experts.deepspeed_experts"
    assert global_name(f"{experts}.1.weight", 6) == f"{experts}.7.weight"
    assert global_name("blocks.3.attn.qkv.bias", 6) == "blocks.3.attn.qkv.bias"
