"""What models cost: against published numbers, and against what the models do when they run."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from switchdit import build_model
from switchdit.errors import UserError
from switchdit.kernels.expert_mix import expert_mix_reference
from switchdit.models import SYSTEMS
from switchdit.models.costs import gating_all_timesteps, macs, normalised_numbers, parameters
from tests.launching import ROOT
from tools import model_table

TINY = {"input_size": 8, "depth": 2, "hidden_size": 64, "num_heads": 4, "num_classes": 5}
N = 3


def total(name: str, execution: str = "here", **overrides) -> int:
    return sum(macs(name, execution, **overrides).values())


def counted(name: str, **overrides) -> int:
    """MACs per image that PyTorch counts while the model runs."""
    torch.manual_seed(0)
    model = build_model(name, **{**TINY, **overrides}).eval()
    x = torch.randn(N, 4, 8, 8)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, torch.tensor([3, 500, 999]), torch.tensor([0, 1, 4]))
    per_image, rest = divmod(counter.get_total_flops(), 2 * N)
    assert rest == 0
    return per_image


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("DiT-S/2", {}),
        ("DiT-S/4", {"learn_sigma": False, "mlp_ratio": 3.3}),
        ("DTR-S/2", {}),
        ("Switch-DiT-S/2", {}),
        ("Switch-DiT-S/2", {"num_experts": 5, "top_k": 3}),
        ("Switch-DiT-S/2", {"gate": "noisy", "integration": "replace"}),
        ("Diff-MoE-S/2", {"num_experts": 4}),
        ("Diff-MoE-S/2_v2", {"top_k": 3}),
        ("Multi-Expert-DiT-S/2", {}),
    ],
)
def test_macs_are_those_of_the_running_model(name, overrides):
    assert total(name, **TINY, **overrides) == counted(name, **overrides)


def test_dense_experts_are_those_of_the_mixture_without_merging(monkeypatch):
    monkeypatch.setattr("switchdit.moe.layer.expert_mix", expert_mix_reference)
    assert total("Switch-DiT-S/2", "dense", **TINY, num_experts=4) == counted("Switch-DiT-S/2", num_experts=4)


def test_with_all_experts_chosen_diff_moe_is_dense_but_for_its_conditioning():
    dense, chosen = (macs("Diff-MoE-S/2", way, **TINY, num_experts=4, top_k=4) for way in ("dense", "here"))
    different = {component for component in dense if dense[component] != chosen[component]}
    assert different == {"conditioning"}
    per_image = 2 * 64 * (64 + 3 * 64)  # blocks, rank, widths: one expert of every block, once
    assert chosen["conditioning"] == 5 * per_image  # four experts and the shared one
    assert dense["conditioning"] == 5 * 16 * per_image  # for each of 16 tokens


# (paper's or authors' model, dense backbone, as published, merged), GMACs as they are printed
@pytest.mark.parametrize(
    ("size", "dit", "published", "merged"),
    [
        ("S", "6.056", "6.962", "6.509"),
        ("B", "23.005", "26.629", "24.817"),
        ("L", "80.698", "93.583", "87.140"),
        ("XL", "118.621", "137.647", "128.1"),
    ],
)
def test_published_counts(size, dit, published, merged):
    here = macs(f"Switch-DiT-{size}/2")
    values = {
        dit: total(f"DiT-{size}/2"),
        published: total(f"Switch-DiT-{size}/2", "published"),
        merged: sum(here.values()) - here["expert merging"],
    }
    for printed, value in values.items():
        assert f"{value / 1e9:.{len(printed.split('.')[1])}f}" == printed
    assert total(f"DTR-{size}/2") == total(f"Multi-Expert-DiT-{size}/2") == total(f"DiT-{size}/2")


@pytest.mark.parametrize(("size", "paper"), [("S", "6.06"), ("B", "23.01"), ("L", "80.71"), ("XL", "118.64")])
def test_norms_explain_the_figures_of_the_dit_paper(size, paper):
    assert f"{(total(f'DiT-{size}/2') + normalised_numbers(f'DiT-{size}/2')) / 1e9:.2f}" == paper


def test_gating_all_timesteps():
    every_call = total("Switch-DiT-S/2", "published") + gating_all_timesteps("Switch-DiT-S/2")
    assert f"{every_call / 1e9:.3f}" == "7.221"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("DiT-S/2", 32_963_360),
        ("DiT-B/2", 130_512_416),
        ("DiT-L/2", 458_102_816),
        ("DTR-S/2", 32_963_360),
        ("Switch-DiT-S/2", (38_299_460, 36_525_380)),
        ("Switch-DiT-B/2", (151_801_412, 144_714_308)),
        ("Switch-DiT-L/2", (533_747_816, 508_557_416)),
        ("Diff-MoE-S/2", 211_643_168),
        ("Diff-MoE-B/2", 820_532_768),
        ("Diff-MoE-L/2", 2_889_553_952),
        ("Diff-MoE-XL/2", 4_254_513_440),
        ("Diff-MoE-S/2_v2", 106_556_192),
        ("Diff-MoE-B/2_v2", 401_561_120),
        ("Diff-MoE-L/2_v2", 1_400_706_080),
        ("Multi-Expert-DiT-S/2", (4 * 32_963_360, 32_963_360)),
    ],
)
def test_parameters(name, count):
    counts = parameters(name)
    assert (counts if isinstance(count, tuple) else counts[0]) == count


def test_parameters_of_the_largest():
    assert [f"{p / 1e6:.3f}" for p in parameters("Switch-DiT-XL/2")] == ["786.800", "749.609"]
    assert f"{parameters('DiT-XL/2')[0] / 1e6:.3f}" == "675.130"


def test_active_parameters_of_diff_moe_are_those_of_a_model_with_k_experts_and_the_gates_of_all():
    total_of_two = parameters("Diff-MoE-S/2", num_experts=2)[0]
    assert parameters("Diff-MoE-S/2")[1] == total_of_two + 12 * (8 - 2) * 384


def test_unknown_execution_and_field_are_told():
    with pytest.raises(UserError, match=r"execution 'fused' is unknown; valid are: dense, published, here"):
        macs("DiT-S/2", "fused")
    with pytest.raises(UserError, match="did you mean 'depth'"):
        macs("DiT-S/2", dept=3)


@pytest.fixture
def table(monkeypatch, capsys):
    """What the tool prints with such arguments."""

    def printed(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["model_table.py", *arguments])
        model_table.main()
        return capsys.readouterr().out

    return printed


def test_the_page_of_the_documentation_is_what_the_tool_prints(table):
    page = table("--markdown")
    assert page == (ROOT / "docs/models.md").read_text()
    assert "| Switch-DiT-S/2 | 38.299 | 36.525 |  | 7.415 | 6.962 | 6.514 | 0.005 | 6.74 |" in page
    assert "then executes 7.221 GMACs" in " ".join(page.split())
    assert "S 6.06, B 23.01, L 80.71, XL 118.64 with them" in " ".join(page.split())


def test_json_has_every_system_and_the_design_space(table):
    tables = json.loads(table("--json", "--patch", "8"))
    rows = {row["name"]: row for row in tables["models"]}
    assert {name.rsplit("-", 1)[0] for name in rows} == set(SYSTEMS)
    assert all(name.endswith("/8") for name in rows)
    row = rows["Switch-DiT-L/8"]
    assert row["here"] == sum(row["components"]["here"].values()) < row["published"] < row["dense"]
    assert [f"{row['active'] / 1e6:.0f}" for row in tables["ffhq_base"]] == ["137", "144", "144", "144", "151"]
    assert [row["paper"] for row in tables["ffhq_base"]] == ["137", "144", "144", "144", "151"]


def test_text_is_aligned_and_has_the_notes_that_its_rows_name(table):
    lines = table("--patch", "4").splitlines()
    rows = [line for line in lines if line.startswith(tuple(SYSTEMS)) and "/4 " in line]
    assert len(rows) == 4 * len(SYSTEMS)
    assert len({len(line) for line in rows}) == 1
    notes = {line.split(".")[0] for line in lines if line[:2] in {f"{i}." for i in range(1, 9)}}
    assert notes == {"1", "2", "3", "4", "5", "7", "8"}  # 6 is about a figure of patch size 2
