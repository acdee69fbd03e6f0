"""Diff-MoE against numbers computed with the authors' own code, and against the published sizes."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from switchdit import build_model
from switchdit.diffusion.samplers import guided
from switchdit.errors import UserError
from switchdit.models import parameter_counts
from switchdit.models.diff_moe import rotary_table, rotate

GOLDEN = Path(__file__).parent / "golden"
AUX_WEIGHT = 0.01
# largest error relative to the largest entry; the sinusoid of t and the rotary table are float32 on both sides
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
SMALL = {"input_size": 8, "depth": 2, "hidden_size": 32, "num_heads": 2, "num_classes": 3}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    arrays = {}
    for name in ("diff_moe", "diff_moe_gradients"):
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            arrays |= dict(file)
    return arrays


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request) -> torch.dtype:
    return request.param


def our_name(name: str) -> str:
    name = name.replace(".moe.gate.weight", ".moe.deepspeed_moe.gate.wg.weight")
    name = name.replace(".moe.experts.", ".moe.deepspeed_moe.experts.deepspeed_experts.")
    return re.sub(r"\.moe\.se\.", ".recalibration.", name).replace(".moe.shared_experts.", ".shared_expert.")


def tensors(arrays: dict, prefix: str) -> dict[str, torch.Tensor]:
    return {our_name(k.removeprefix(prefix)): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)}


def golden_model(golden: dict, dtype: torch.dtype) -> nn.Module:
    fields = {**SMALL, "num_classes": 5, "mlp_ratio": 2, "num_experts": 4, "top_k": 2, "num_shared_experts": 1}
    model = build_model("Diff-MoE-S/2", **fields)
    model.load_state_dict(tensors(golden, "sd/"))
    model.class_dropout_prob = 0.0
    return model.to(dtype)


def inputs(golden: dict, dtype: torch.dtype, time: str = "int") -> tuple[torch.Tensor, ...]:
    x, t, y = (torch.from_numpy(golden[f"in/{name}"]) for name in ("x", f"t_{time}", "y"))
    return x.to(dtype), t, y


def close(ours: torch.Tensor, theirs: np.ndarray | torch.Tensor) -> None:
    """``theirs`` may be of a higher precision than ours."""
    theirs = torch.as_tensor(theirs)
    error = (ours.detach().double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error < TOLERANCE[ours.dtype], f"relative error {error:.1e}"


def randomized(model: nn.Module) -> nn.Module:
    """Nothing at zero, so that everything has a say."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def of(golden: dict, key: str, dtype: torch.dtype) -> np.ndarray:
    return golden[f"{key}64" if dtype == torch.float64 else key]


@pytest.mark.parametrize("time", ["int", "rf"])
def test_forward_in_evaluation(golden, dtype, time):
    model = golden_model(golden, dtype).eval()
    out = model(*inputs(golden, dtype, time))
    close(out, of(golden, f"eval/out_t_{time}", dtype))


def test_forward_losses_and_gradients_in_training(golden, dtype):
    model = golden_model(golden, dtype).train()
    out, routing = model(*inputs(golden, dtype), return_routing=True)
    close(out, of(golden, "train/out", dtype))
    aux = AUX_WEIGHT * routing.load_balance
    close(aux, of(golden, "train/aux_per_block", dtype))
    loss = out.square().mean()
    close(loss, of(golden, "train/loss_without_aux", dtype))

    (loss + aux.sum()).backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    theirs = tensors(golden, "grad64/")
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        close(gradient, theirs[name])


def test_tokens_choose_the_experts_of_the_reference(golden):
    model = golden_model(golden, torch.float64).eval()
    seen = {}
    for i, block in enumerate(model.blocks):
        block.moe.register_forward_hook(lambda module, args, out, i=i: seen.update({i: out}))
    _, routing = model(*inputs(golden, torch.float64), return_routing=True)
    for i in range(2):
        _, probs, chosen = seen[i]
        experts = torch.from_numpy(golden[f"block{i}/topk_idx_sorted"])
        assert torch.equal(chosen.nonzero()[:, 1].view(-1, 2), experts.sort(1).values)
        close(probs.gather(1, experts), golden[f"block{i}/topk_weight_sorted64"])
        close(routing.token_share[i], experts.flatten().bincount(minlength=4).double() / len(experts))


def test_guidance_on_three_channels_as_in_the_reference(golden, dtype):
    model = golden_model(golden, dtype).eval()
    x, *_ = inputs(golden, dtype)
    t, y = torch.from_numpy(golden["cfg/t"])[:2], torch.from_numpy(golden["cfg/y"])[:2]
    with torch.no_grad():
        out = guided(model, y, model.null_label, float(golden["cfg/scale"]), guided_channels=3)(x[:2], t)
    close(out, of(golden, "cfg/out", dtype)[:2])


@pytest.mark.parametrize(
    ("size", "total"),
    [
        ("S/2", 211_643_168),
        ("B/2", 820_532_768),
        ("L/2", 2_889_553_952),
        ("XL/2", 4_254_513_440),
        ("S/2_v2", 106_556_192),
        ("B/2_v2", 401_561_120),
        ("L/2_v2", 1_400_706_080),
    ],
)
def test_published_sizes(size, total):
    with torch.device("meta"):
        model = build_model(f"Diff-MoE-{size}")
    width, inner = model.hidden_size, int(model.mlp_ratio * model.hidden_size)
    expert = 3 * width * inner + 64 * width + 3 * width * (64 + 1)
    assert parameter_counts(model) == (total, total - 6 * len(model.blocks) * expert)


def test_positions_turn_pairs_by_column_and_row():
    head_size, grid = 8, 3
    cos, sin = rotary_table(head_size, grid)
    x = torch.randn(2, grid**2, head_size, dtype=torch.float64)
    turned = rotate(x, cos, sin)
    for token in range(grid**2):
        row, column = divmod(token, grid)
        for pair in range(head_size // 2):
            angle = (row if pair % 2 else column) * 10000.0 ** (-4 * (pair // 2) / head_size)
            turn = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            at = slice(2 * pair, 2 * pair + 2)
            torch.testing.assert_close(turned[:, token, at], x[:, token, at] @ turn.T, rtol=0, atol=1e-6)
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_attention_sees_differences_of_positions_alone():
    q, k = torch.randn(2, 1, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_table(8, 4)
    scores = rotate(q[:, :1].expand_as(q), cos, sin) @ rotate(k[:, :1].expand_as(k), cos, sin).transpose(-1, -2)
    by_difference = scores.view(4, 4, 4, 4)  # row, column of q; row, column of k
    torch.testing.assert_close(by_difference[1:, 1:, 1:, 1:], by_difference[:-1, :-1, :-1, :-1], rtol=0, atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch():
    model = randomized(build_model("Diff-MoE-S/2", **SMALL)).double().eval()
    x, t, y = torch.randn(5, 4, 8, 8).double(), torch.tensor([0, 10, 500, 700, 999]), torch.tensor([0, 1, 2, 3, 0])
    with torch.no_grad():
        whole = model(x, t, y)
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(whole, alone, rtol=1e-10, atol=1e-10)


def test_evaluation_trains_routed_experts_too():
    model = randomized(build_model("Diff-MoE-S/2", **SMALL))
    model.class_dropout_prob = 0.0
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 3])
    gradients = {}
    for mode in (True, False):
        out, routing = model.train(mode)(x, t, y, return_routing=True)
        model.zero_grad()
        (out.square().mean() + routing.load_balance.sum()).backward()
        gradients[mode] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(gradients[False][name], value) for name, value in gradients[True].items())
    for i, block in enumerate(model.blocks):
        for j, expert in enumerate(block.moe.deepspeed_moe.experts.deepspeed_experts):
            for p in expert.parameters():
                assert (p.grad.norm() > 0) == (routing.token_share[i, j] > 0)
    assert (routing.token_share > 0).sum() > 8


def test_experts_start_apart_and_as_the_identity():
    model = build_model("Diff-MoE-S/2", **SMALL)
    assert not model.pos_embed.requires_grad
    assert model.pos_embed.shape == (1, 16, 32)
    assert model.pos_embed.abs().max() == 0
    for block in model.blocks:
        experts = block.moe.deepspeed_moe.experts.deepspeed_experts
        assert not torch.equal(experts[0].gate_proj.weight, experts[1].gate_proj.weight)
        x, c = torch.randn(6, 32), torch.randn(2, 32)
        sample = torch.tensor([0, 0, 1, 1, 1, 0])
        assert torch.equal(experts[3](x, c, torch.rand(2, 128), sample=sample), x)
        assert torch.equal(block.shared_expert(x.view(2, 3, 32), c), x.view(2, 3, 32))
        bound = np.sqrt(6 / (32 + 128))  # Xavier
        assert 0.9 * bound < experts[7].up_proj.weight.abs().max() <= bound


def test_label_dropout():
    model = randomized(build_model("Diff-MoE-S/2", **SMALL)).train()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5, 5]), torch.tensor([0, 1])
    with torch.no_grad():
        dropped = model(x, t, y, drop_label=torch.tensor([True, False]))
        null = model.eval()(x, t, torch.tensor([model.null_label, 1]))
        assert torch.equal(dropped, null)
        assert not torch.equal(null, model(x, t, y))
        model.train()
        model.class_dropout_prob = 1.0
        assert torch.equal(model(x, t, y), model(x, t, torch.full((2,), model.null_label)))


def test_half_precision():
    torch.manual_seed(0)
    # all experts for every token: close calls between them, which rounding decides, are no matter of this test
    model = randomized(build_model("Diff-MoE-S/2", **SMALL, top_k=8)).eval()
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        exact = model(x, t, y)
        with torch.autocast("cpu", torch.bfloat16):
            mixed, of_mixed = model(x, t, y, return_routing=True)
        half, of_half = model.bfloat16()(x, t, y, return_routing=True)
    assert half.dtype == torch.bfloat16
    for out, routing in ((mixed, of_mixed), (half, of_half)):
        assert routing.load_balance.dtype == torch.float32
        assert (out - exact).norm() < 0.03 * exact.norm()


@settings(deadline=None, max_examples=15)
@given(
    patch_size=st.sampled_from([2, 4, 8]),
    grid=st.integers(1, 3),
    channels=st.integers(1, 4),
    heads=st.integers(1, 3),
    mlp_ratio=st.sampled_from([1, 5 / 3, 2.5]),
    learn_sigma=st.booleans(),
    shared=st.integers(1, 2),
    num_experts=st.integers(1, 5),
    data=st.data(),
)
def test_shapes(patch_size, grid, channels, heads, mlp_ratio, learn_sigma, shared, num_experts, data):
    top_k, n = data.draw(st.integers(1, num_experts)), data.draw(st.integers(1, 3))
    size = grid * patch_size
    model = build_model(
        f"Diff-MoE-S/{patch_size}",
        input_size=size,
        in_channels=channels,
        hidden_size=4 * heads,
        num_heads=heads,
        depth=2,
        mlp_ratio=mlp_ratio,
        num_classes=2,
        learn_sigma=learn_sigma,
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=shared,
    )
    x, y = torch.randn(n, channels, size, size), torch.zeros(n, dtype=torch.long)
    out, routing = model(x, torch.rand(n), y, return_routing=True)
    assert out.shape == (n, channels * (1 + learn_sigma), size, size)
    assert routing.load_balance.shape == (2,)
    assert routing.token_share.shape == (2, num_experts)
    torch.testing.assert_close(routing.token_share.sum(1), torch.full((2,), float(top_k)))


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("Diff-MoE-XL/2_v2", {}, "'Diff-MoE-XL/2_v2' is unknown; did you mean 'Diff-MoE-"),
        ("Diff-MoE-S/2", {"num_heads": 64}, "hidden_size (384) must be divisible by 4 num_heads (256)"),
        ("Diff-MoE-S/2", {"num_shared_experts": 0}, "'num_shared_experts' must be at least 1, not 0"),
        ("Diff-MoE-S/2", {"top_k": 9}, "top_k (9) must lie between 1 and num_experts (8)"),
        ("Diff-MoE-S/2", {"ep_size": 3}, "num_experts (8) must be divisible by ep_size (3)"),
        ("Diff-MoE-S/2", {"ep_size": 2}, "needs 2 processes"),
        ("Diff-MoE-S/2", {"mlp_ratio": 0.0}, "mlp_ratio (0.0) must be a number above 0"),
        ("Switch-DiT-S/2", {"num_shared_experts": 1}, "'num_shared_experts' is unknown for Switch-DiT-S/2"),
    ],
)
def test_bad_fields_are_named(name, overrides, says):
    with pytest.raises(UserError) as info:
        build_model(name, **overrides)
    assert says in str(info.value)
    assert "\n" not in str(info.value)
