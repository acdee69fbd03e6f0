"""Bytes of a training process: what the table says against what the engine allocates, and by hand."""

import gc
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launching import ROOT, WORKERS, launched

from switchdit import build_model
from switchdit.errors import UserError
from switchdit.models.switch_dit import INTEGRATIONS
from tools import memory_table
from tools.memory_terms import (
    HOST_KINDS,
    KINDS,
    PASSING,
    Settings,
    Sizes,
    activation_memory,
    partition_size,
    read_settings,
    settings_of,
    sizes_of,
    state_memory,
    total,
    touched,
)

FIELDS = {"input_size": 4, "depth": 2, "hidden_size": 128, "num_heads": 4, "num_classes": 10}
EXPERTS = {"num_experts": 4}
BUCKET = 200_000  # numbers: more than the largest parameter, so that every gradient passes through a bucket
TOLERANCE = 0.05

CONFIGS = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2, "overlap_comm": True},
    "zero2 offload": {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
}
BF16 = {"bf16": {"enabled": True}}
FLOAT32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
TWO_PASSES = {"gradient_accumulation_steps": 2}

#    model, config, more of it, ep_size is the number of processes
QUICK = [
    ("Switch-DiT-S/2", "zero0", {}, False),
    ("Switch-DiT-S/2", "zero1", BF16, True),
    ("Switch-DiT-S/2", "zero2", TWO_PASSES, True),
    ("Switch-DiT-S/2", "zero2", BF16 | FLOAT32_GRADIENTS, False),
    ("Diff-MoE-S/2", "zero2 offload", BF16 | FLOAT32_GRADIENTS, True),
]
ALL = [
    (model, config, more, spread)
    for model in ("Switch-DiT-S/2", "Diff-MoE-S/2")
    for config in CONFIGS
    for more in ({}, BF16, BF16 | FLOAT32_GRADIENTS, TWO_PASSES, BF16 | FLOAT32_GRADIENTS | TWO_PASSES)
    for spread in (False, True)
    if (config != "zero0" or "bf16" not in more) and (config != "zero1" or "data_types" not in more)
]


def deepspeed_config(config: str, more: dict) -> dict:
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True}}
    zero = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, **CONFIGS[config]}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": optimizer,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        **more,
    }


def check(num_processes: int, cases: list, folder) -> None:
    """Measure all cases in one launch, and compare."""
    given = []
    for model, config, more, spread in cases:
        fields = {**FIELDS, **EXPERTS, "ep_size": num_processes if spread else 1}
        given.append({"model": model, "fields": fields, "deepspeed": deepspeed_config(config, more)})
    (folder / "cases.json").write_text(json.dumps(given))
    launched(num_processes, WORKERS / "memory.py", folder / "cases.json", folder / "out.json", timeout=900)
    for case, measured in zip(given, json.loads((folder / "out.json").read_text()), strict=True):
        settings, ep_size = settings_of(case["deepspeed"]), case["fields"]["ep_size"]
        sizes = sizes_of(case["model"], ep_size, **FIELDS, **EXPERTS)
        topology = (num_processes, ep_size, "gradient_accumulation_steps" in case["deepspeed"])
        table = state_memory(sizes, settings, *topology)
        on_device = {**table}
        if settings.offload:  # the same sums, elsewhere
            like = state_memory(sizes, replace(settings, offload=False), *topology)
            on_device |= {kind: like[kind] for kind in HOST_KINDS}
        for kind in ("parameters", *HOST_KINDS, "gradients", "gradients_in_step", "buckets"):
            assert measured.get(kind, 0) == pytest.approx(on_device[kind], rel=TOLERANCE), (case, kind)
        reduced_at_once = table["step" if settings.stage == 0 else "reducing"]
        assert 0.5 * reduced_at_once < measured["reducing"] <= reduced_at_once, case
        # every gradient in one all-reduce, in the parameters' type: what tools/scaling_table.py counts
        assert measured["reduced"] == settings.itemsize * (sum(sizes.dense) + sum(sizes.experts)), case
        lasting = sum(table[kind] for kind in KINDS if kind not in PASSING)
        expected = lasting + table["gradients_in_step"] + table["host"]
        assert measured["all_in_step"] == pytest.approx(expected, rel=TOLERANCE), case


@pytest.mark.world_size(2)
def test_the_engine_allocates_what_the_table_says(tmp_path):
    check(2, QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [pytest.param(n, marks=pytest.mark.world_size(n)) for n in (2, 4)])
def test_every_combination(tmp_path, num_processes):
    check(num_processes, ALL, tmp_path)


def test_sums_of_micro_batches_are_kept_beside_new_gradients():
    sizes, in_their_type = Sizes((5, 3), (), 0), Settings(2, 4, 4, 1, 1, False)
    once, twice = (state_memory(sizes, in_their_type, 4, 1, accumulating) for accumulating in (False, True))
    assert twice["gradients"] == 2 * once["gradients"]
    assert twice["gradients_in_step"] == once["gradients_in_step"]
    in_float32 = Settings(2, 2, 4, 1, 1, False)
    assert state_memory(sizes, in_float32, 4, 1, True) == state_memory(sizes, in_float32, 4)


def test_a_model_of_ten_numbers_by_hand():
    """Dense 5 + 3 on four processes: padded to 8, 2 each. Experts 2, shared by two: padded to 4, 2 each."""
    sizes = Sizes((5, 3), (2,), 1)
    state = state_memory(sizes, Settings(2, 2, 4, bucket=100, num_buckets=2, offload=False), world=4, ep_size=2)
    assert {kind: state[kind] for kind in ("parameters", "masters", "moments", "ema", "gradients", "buckets")} == {
        "parameters": 2 * (8 + 4 + 1),
        "masters": 4 * 4,
        "moments": 8 * 4,
        "ema": 4 * 4,
        "gradients": 4 * 4,
        "buckets": 2 * 2 * 100,
    }
    assert state["reducing"] == 2 * 10
    assert total(state, 7) == 26 + 16 + 32 + 16 + 16 + 400 + 20 + 7


def test_gradients_in_the_parameters_type_are_kept_whole():
    assert partition_size((5, 3), 4) == 2
    assert list(touched((5, 3), 4)) == [5, 5, 8, 3]  # numbers 4 and 5 are of both
    assert list(touched((5,), 4)) == [5, 5, 5 + 1, 2]  # 8 with padding, of which the last process has all but one
    state = state_memory(Sizes((5, 3), (), 0), Settings(2, 4, 4, 1, 1, False), world=4)
    assert state["gradients"] == 4 * 8
    assert state["step"] == 4 * 2  # flattened


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 9))
def test_whole_parameters_of_every_part(numels, processes):
    own = partition_size(numels, processes)
    owner = np.repeat(np.arange(processes), own)
    of = np.concatenate([np.repeat(np.arange(len(numels)), numels), np.full(own * processes - sum(numels), -1)])
    expected = [
        sum(numels[i] for i in set(of[owner == rank]) if i >= 0) + int((of[owner == rank] < 0).sum())
        for rank in range(processes)
    ]
    assert list(touched(numels, processes)) == expected
    assert 0 <= own * processes - sum(numels) < 2 * processes


def saved_bytes(name: str, dtype: torch.dtype, samples: int, **fields) -> int:
    """Bytes of what autograd keeps in one forward pass, parameters apart."""
    torch.manual_seed(0)
    model = build_model(name, **fields).to(dtype).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # storages by address, held so that none is used again

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    side = fields["input_size"]
    inputs = (torch.randn(samples, 4, side, side), torch.arange(samples), torch.zeros(samples, dtype=torch.long))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(*inputs)
    assert out.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", ["DiT-S/2", "DTR-S/2", "Switch-DiT-S/2", "Diff-MoE-S/2", "Diff-MoE-S/2_v2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(name, dtype):
    fields = {"input_size": 32, "hidden_size": 64, "num_heads": 4, "num_classes": 5, "depth": 3}
    estimate = activation_memory(name, dtype.itemsize, 3, **fields)
    assert estimate == pytest.approx(saved_bytes(name, dtype, 3, **fields), rel=TOLERANCE)


@pytest.mark.parametrize("integration", INTEGRATIONS)
def test_merged_matrices_are_kept_where_the_mixture_is_not_multiplied_at_once(integration):
    """Wide enough for them to count: a fifteenth of the whole."""
    fields = {"input_size": 16, "hidden_size": 128, "num_heads": 4, "num_classes": 5, "depth": 3}
    estimate = activation_memory("Switch-DiT-S/2", 4, 6, integration=integration, **fields)
    kept = saved_bytes("Switch-DiT-S/2", torch.float32, 6, integration=integration, **fields)
    assert estimate == pytest.approx(kept, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["DiT-S/2", "Switch-DiT-S/2", "Diff-MoE-S/2"])
def test_every_second_block_is_kept(name):
    """What lives on after a forward pass; the table adds the one block that is being recomputed."""
    fields = {"input_size": 32, "hidden_size": 64, "num_heads": 4, "num_classes": 5}

    def living() -> dict[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    model = build_model(name, **fields, depth=6).train()
    model.activation_checkpointing = 2
    before = living()
    out = model(torch.randn(3, 4, 32, 32), torch.arange(3), torch.zeros(3, dtype=torch.long))
    measured = sum(size for at, size in living().items() if at not in before)
    assert out.requires_grad
    recomputed = activation_memory(name, 4, 3, depth=1, **fields) - 4 * 3 * 3 * 256 * 64
    table = activation_memory(name, 4, 3, 2, depth=6, **fields)
    assert measured == pytest.approx(table - recomputed, rel=TOLERANCE)


def test_checkpointed_blocks_keep_their_input():
    def of(n):
        return activation_memory("DiT-B/2", 2, 4, n)

    one_input = 4 * 2 * 256 * 768
    block = (of(0) - 3 * one_input) // 12
    assert of(1) == 12 * one_input + block + 3 * one_input
    assert of(5) == 10 * block + 2 * one_input + block + 3 * one_input  # the fifth and the tenth
    assert of(13) == of(0)


def test_spread_experts_are_counted_once():
    together, apart = sizes_of("Switch-DiT-S/2", 1, num_experts=4), sizes_of("Switch-DiT-S/2", 4, num_experts=4)
    assert sum(together.experts) == 4 * sum(apart.experts) == 12 * 4 * (384**2 + 384)
    assert together.dense == apart.dense
    assert together.frozen == 256 * 384


@pytest.fixture
def tool(monkeypatch, capsys):
    """What the tool prints with such arguments."""

    def printed(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["memory_table.py", *arguments])
        memory_table.main()
        return capsys.readouterr().out

    return printed


def test_the_page_of_the_documentation_is_what_the_tool_prints(tool):
    assert tool("--markdown") == (ROOT / "docs/memory.md").read_text()


def test_a_row_of_the_text(tool):
    arguments = [
        "--ds_config",
        str(ROOT / "ds_configs/zero2_bf16.json"),
        "--world",
        "8",
        "--activation_checkpointing=1",
    ]
    head, _, columns, _, row = tool("--model", "Switch-DiT-XL/2", *arguments, "num_experts=16").splitlines()[:5]
    assert head == "Switch-DiT-XL/2 num_experts=16, micro_batch 32, GiB"
    assert columns.split()[:4] == ["ds_config", "processes", "ep_size", "parameters"]
    name, world, ep_size, parameters, masters, moments, *_ = row.split()
    assert (name, world, ep_size) == ("zero2_bf16", "8", "1")
    dense_and_experts = 675_130_000 + 28 * (16 * (1152**2 + 1152) + 16 * 1153)
    assert float(parameters) == pytest.approx(2 * dense_and_experts / 2**30, abs=0.01)
    assert float(moments) == pytest.approx(8 * dense_and_experts / 8 / 2**30, abs=0.01)
    assert float(masters) == pytest.approx(float(moments) / 2, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--world", "0"], "--world, --ep_size, --micro_batch and --gradient_accumulation_steps must be at least 1"),
        (["--model", "DiT-S/2", "--ep_size", "0"], "--world, --ep_size, --micro_batch and"),
        (["--model", "DiT-S/2", "name=x"], "model field 'name' is unknown for DiT-S/2"),
        (["--model", "DiT-S/2", "ep_size=2"], "'ep_size=2' must be given as --ep_size 2"),
        (["num_experts=4"], "'num_experts=4' is a field of a model: give --model"),
        (["--model", "DiT-XL/2", "--markdown"], "--markdown makes the page of all models"),
        (["--model", "DiT-XXL/2"], "model 'DiT-XXL/2' is unknown; did you mean 'DiT-XL/2'?"),
        (["--model", "Switch-DiT-S/2", "num_expert=4"], "did you mean 'num_experts'?"),
        (["--model", "Switch-DiT-S/2", "num_experts"], "'num_experts' must have the form field=value"),
        (["--model", "Switch-DiT-S/2", "--ep_size", "2"], "num_experts (3) must be divisible by ep_size (2)"),
        (["--model", "DiT-S/2", "--ep_size", "2"], "model field 'ep_size' is unknown for DiT-S/2"),
        (["--model", "Switch-DiT-S/2", "--ep_size", "3"], "has no number that is divisible by --ep_size [3]"),
        (["--model", "DiT-S/2", "--ds_config", "absent.json"], "DeepSpeed config 'absent.json' cannot be read"),
    ],
)
def test_mistakes_are_told_in_one_line(tool, capsys, arguments, says):
    with pytest.raises(SystemExit) as stop:
        tool(*arguments)
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert says in told


def test_a_config_that_is_none(tmp_path):
    (tmp_path / "ds.json").write_text("[]")
    with pytest.raises(UserError, match=r"ds.json' cannot be read"):
        read_settings(tmp_path / "ds.json")
