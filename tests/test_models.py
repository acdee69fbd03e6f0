"""The models against numbers computed with the authors' own code, and against the published sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from switchdit import build_model, load_reference_checkpoint
from switchdit.engine.reference_names import to_our_names
from switchdit.errors import UserError
from switchdit.models import MODEL_NAMES, model_fields, parameter_counts
from switchdit.models.dit import sincos_positions, timestep_frequencies
from switchdit.models.switch_dit import INTEGRATIONS
from switchdit.moe.diffusion_prior import diffusion_prior_loss, match_columns, matching_cost, prior_mask

GOLDEN = Path(__file__).parent / "golden"
CASES = ["M3k2", "M4k3", "M4k2", "M3k1"]
TOLERANCE = 1e-5


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def tensors(arrays: dict, prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)}


def golden_model(g: dict, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    num_experts, top_k, depth, hidden_size, num_heads = (int(n) for n in g["meta/M_k_depth_hidden_heads"])
    model = build_model(
        "Switch-DiT-S/2",
        input_size=8,
        num_classes=5,
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_experts=num_experts,
        top_k=top_k,
    )
    load_reference_checkpoint(model, tensors(g, "sd/"))
    return model.to(dtype)


def close(ours: torch.Tensor, theirs: np.ndarray, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=CASES)
def case(request) -> dict[str, np.ndarray]:
    return golden(f"switch_dit_{request.param}")


def test_forward_in_evaluation(case):
    x, t, y = tensors(case, "in/").values()
    model = golden_model(case).eval()
    with torch.no_grad():
        out, routing = model(x, t, y, return_routing=True)
        assert torch.equal(out, model(x, t, y))
    close(out, case["eval/out"])
    close(routing.probs, case["route/probs"])
    assert np.array_equal(routing.task_expert_map.numpy(), case["route/full_map"])


def test_forward_loss_and_gradients_in_training(case):
    x, t, y = tensors(case, "in/").values()
    model = golden_model(case).train()
    model.class_dropout_prob = 0.0
    out, routing = model(x, t, y, return_routing=True)
    close(out, case["train/out"])

    depth, num_experts, top_k = len(model.blocks), model.num_experts, model.top_k
    prior = prior_mask(depth, num_experts, top_k)
    assignment = torch.from_numpy(case["match/assign"])
    aux = diffusion_prior_loss(routing.probs, t, prior, assignment, depth)
    close(aux, case["train/aux"])
    loss = out.square().mean() + aux
    close(loss, case["train/loss"])

    loss.backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    reference = to_our_names("Switch-DiT", tensors(case, "grad/"))
    assert ours.keys() == reference.keys()
    for name, grad in ours.items():
        close(grad, reference[name].numpy())


def test_double_precision_agrees_with_double_precision(case):
    x, t, y = tensors(case, "in/").values()
    model = golden_model(case, torch.float64).eval()
    with torch.no_grad():
        out, routing = model(x.double(), t, y, return_routing=True)
    # the sinusoidal embedding of t is float32 on both sides
    close(out, case["eval/out64"], 1e-10)
    close(routing.probs, case["route/probs64"], 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_in_double_precision(name):
    g, expected = golden(f"switch_dit_{name}"), golden("switch_dit_float64")
    x, t, y = tensors(g, "in/").values()
    model = golden_model(g, torch.float64).train()
    model.class_dropout_prob = 0.0
    out, routing = model(x.double(), t, y, return_routing=True)
    prior = prior_mask(len(model.blocks), model.num_experts, model.top_k)
    aux = diffusion_prior_loss(routing.probs, t, prior, torch.from_numpy(g["match/assign"]), len(model.blocks))
    close(aux, expected[f"{name}/aux64"], 1e-10)
    loss = out.square().mean() + aux
    close(loss, expected[f"{name}/loss64"], 1e-10)
    loss.backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for parameter, grad in to_our_names("Switch-DiT", tensors(expected, f"{name}/grad64/")).items():
        close(ours[parameter], grad.numpy(), 1e-10)


def test_mask_of_each_block(case):
    model = golden_model(case, torch.float64)
    e_t = model.t_embedder(torch.from_numpy(case["in/t"]))
    for i, block in enumerate(model.blocks):
        mixture, _ = block.moe(torch.from_numpy(case[f"block{i}/router_in64"]), e_t)
        close(1 + mixture, case[f"block{i}/mask64"], 1e-10)


def test_matching_of_the_golden_map_is_optimal(case):
    num_experts, top_k, depth, *_ = (int(n) for n in case["meta/M_k_depth_hidden_heads"])
    prior = prior_mask(depth, num_experts, top_k)
    task_expert_map = torch.from_numpy(case["route/full_map"]).float()
    cost = matching_cost(task_expert_map, prior)
    assert np.array_equal(cost.numpy(), case["match/cost"])
    assignment = match_columns(task_expert_map, prior, seed=1, step=2)
    assert cost[torch.arange(len(cost)), assignment].sum() == case["match/optimal_total_cost"]


def test_guidance_as_in_the_reference(case):
    from switchdit.diffusion.samplers import guided

    model = golden_model(case).eval()
    x = torch.from_numpy(case["cfg/x_half"])
    n = len(x)
    y, t = torch.from_numpy(case["cfg/y"])[:n], torch.from_numpy(case["cfg/t"])[:n]
    with torch.no_grad():
        out = guided(model, y, model.null_label, float(case["cfg/scale"]), guided_channels=None)(x, t)
    close(out, case["cfg/out"][:n])


def test_published_sizes():
    assert parameter_counts(build_model("Switch-DiT-S/2")) == (38_299_460, 36_525_380)
    assert parameter_counts(build_model("DiT-S/2")) == (32_963_360, 32_963_360)


@pytest.mark.parametrize(
    ("name", "total", "activated"),
    [
        ("DiT-B/2", 130_512_416, 130_512_416),
        ("DiT-L/2", 458_102_816, 458_102_816),
        ("Switch-DiT-B/2", 151_801_412, 144_714_308),
        ("Switch-DiT-L/2", 533_747_816, 508_557_416),
    ],
)
def test_published_sizes_without_memory(name, total, activated):
    with torch.device("meta"):
        assert parameter_counts(build_model(name)) == (total, activated)


def test_masks_start_at_one_so_that_the_model_starts_as_a_dit():
    fields = {"input_size": 8, "depth": 2, "hidden_size": 32, "num_heads": 2, "num_classes": 3}
    switch, dit = build_model("Switch-DiT-S/2", **fields), build_model("DiT-S/2", **fields)
    for p in switch.parameters():  # not zero, or the outputs would agree for another reason
        if p.requires_grad and p.abs().sum() == 0 and p.shape != (32, 32):
            torch.nn.init.normal_(p, std=0.1)
    for block in switch.blocks:
        for expert in block.moe.deepspeed_moe.experts.deepspeed_experts:
            torch.nn.init.zeros_(expert.weight)
            torch.nn.init.zeros_(expert.bias)
    missing = dit.load_state_dict({k: v for k, v in switch.state_dict().items() if ".moe." not in k})
    assert not missing.missing_keys
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        out = dit.eval()(x, t, y)
        assert out.abs().mean() > 0.01
        torch.testing.assert_close(switch.eval()(x, t, y), out)


def test_embeddings():
    g = golden("embeddings")
    close(timestep_frequencies(torch.from_numpy(g["timestep/t"]), 256), g["timestep/emb256_f32"], 1e-6)
    close(timestep_frequencies(torch.from_numpy(g["timestep/t"]), 7), g["timestep/emb7_f32"], 1e-6)
    np.testing.assert_allclose(sincos_positions(32, 4), g["pos/D32_grid4"], atol=1e-12)
    np.testing.assert_allclose(sincos_positions(64, 16), g["pos/D64_grid16"], atol=1e-12)
    model = build_model("DiT-S/2", input_size=8, depth=1, hidden_size=32, num_heads=2)
    assert np.array_equal(model.unpatchify(torch.from_numpy(g["unpatchify/in"])).numpy(), g["unpatchify/out"])


def test_label_dropout():
    model = build_model("DiT-S/2", input_size=8, depth=1, hidden_size=32, num_heads=2, num_classes=3).train()
    torch.nn.init.normal_(model.blocks[0].adaLN_modulation[1].weight)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    torch.nn.init.normal_(model.final_layer.adaLN_modulation[1].weight)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5, 5]), torch.tensor([0, 1])
    with torch.no_grad():
        dropped = model(x, t, y, drop_label=torch.tensor([True, False]))
        null = model.eval()(x, t, torch.tensor([model.null_label, 1]))
        assert torch.equal(dropped, null)
        assert not torch.equal(null, model(x, t, y))
        model.train()
        model.class_dropout_prob = 1.0
        assert torch.equal(model(x, t, y), model(x, t, torch.full((2,), model.null_label)))
        model.class_dropout_prob = 0.0
        assert torch.equal(model(x, t, y), model.eval()(x, t, y))
    assert model.y_embedder.embedding_table.weight.shape[0] == 4


def test_one_class_needs_no_null_label():
    model = build_model("DiT-S/2", input_size=8, depth=1, hidden_size=32, num_heads=2, num_classes=1)
    assert model.null_label is None
    assert model.class_dropout_prob == 0


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_every_name_builds(patch_size):
    for name in (n for n in MODEL_NAMES if n.endswith(f"/{patch_size}")):
        model = build_model(name, depth=1, hidden_size=32, num_heads=2)
        out = model(torch.zeros(2, 4, 32, 32), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long))
        assert out.shape == (2, 8, 32, 32)


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("Switch-DiT-S/3", {}, "'Switch-DiT-S/3' is unknown; did you mean 'Switch-DiT-S/"),
        ("Switch-DIT-S/2", {}, "did you mean 'Switch-DiT-S/2'"),
        ("Switch-DiT-S/2", {"num_expert": 4}, "did you mean 'num_experts'"),
        ("Switch-DiT-S/2", {"num_experts": "4"}, "must be of type int, not '4'"),
        ("Switch-DiT-S/2", {"learn_sigma": 1}, "must be of type bool"),
        ("Switch-DiT-S/2", {"depth": True}, "must be of type int"),
        ("Switch-DiT-S/2", {"depth": 0}, "'depth' must be at least 1"),
        ("Switch-DiT-S/2", {"top_k": 4}, "top_k (4) must lie between 1 and num_experts (3)"),
        ("Switch-DiT-S/2", {"ep_size": 2}, "num_experts (3) must be divisible by ep_size (2)"),
        ("Switch-DiT-S/2", {"num_experts": 4, "ep_size": 2}, "needs 2 processes"),
        ("DiT-S/2", {"num_experts": 4}, "'num_experts' is unknown for DiT-S/2"),
        ("DiT-S/4", {"input_size": 30}, "input_size (30) must be divisible by patch_size (4)"),
        ("DiT-S/2", {"num_heads": 5}, "hidden_size (384) must be divisible by num_heads (5)"),
        ("DiT-S/2", {"class_dropout_prob": 1.5}, "between 0 and 1"),
    ],
)
def test_bad_fields_are_named(name, overrides, says):
    assert issubclass(UserError, ValueError)
    with pytest.raises(UserError) as info:
        build_model(name, **overrides)
    assert says in str(info.value)
    assert "\n" not in str(info.value)


@settings(deadline=None, max_examples=20)
@given(
    patch_size=st.sampled_from([2, 4, 8]),
    grid=st.integers(1, 4),
    channels=st.integers(1, 5),
    heads=st.integers(1, 3),
    head_width=st.sampled_from([4, 8]),
    learn_sigma=st.booleans(),
    num_experts=st.integers(1, 5),
    data=st.data(),
)
def test_shapes(patch_size, grid, channels, heads, head_width, learn_sigma, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    n = data.draw(st.integers(1, 3))
    size = grid * patch_size
    model = build_model(
        f"Switch-DiT-S/{patch_size}",
        input_size=size,
        in_channels=channels,
        hidden_size=heads * head_width,
        num_heads=heads,
        depth=2,
        num_classes=2,
        learn_sigma=learn_sigma,
        num_experts=num_experts,
        top_k=top_k,
        num_timesteps=20,
    )
    t = torch.randint(0, 20, (n,))
    out, routing = model(torch.randn(n, channels, size, size), t, torch.zeros_like(t), return_routing=True)
    assert out.shape == (n, channels * (1 + learn_sigma), size, size)
    assert routing.probs.shape == (n, 2 * num_experts)
    torch.testing.assert_close(routing.probs.sum(1), torch.full((n,), 2.0))
    assert torch.equal(routing.task_expert_map.sum(1), torch.full((20,), 2.0 * top_k))


@pytest.mark.parametrize(
    ("name", "fields"),
    [(name, {}) for name in ("DiT", "DTR", "Diff-MoE", "Multi-Expert-DiT")]
    + [("Switch-DiT", {"integration": integration}) for integration in INTEGRATIONS],
)
@pytest.mark.parametrize("told", [421, 999])
def test_a_timestep_that_all_share_may_be_told_once(name, fields, told):
    torch.manual_seed(0)
    model = build_model(f"{name}-S/2", input_size=8, depth=2, hidden_size=48, num_heads=3, num_classes=4, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.double().eval()
    x, y = torch.randn(5, 4, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4])
    for_each = model(x, torch.full((5,), told), y)
    torch.testing.assert_close(model(x, torch.tensor([told]), y), for_each, rtol=1e-10, atol=1e-10)


def test_experts_are_merged_once_for_a_timestep_that_all_share():
    model = build_model("Switch-DiT-S/2", input_size=8, depth=2, hidden_size=48, num_heads=3, num_classes=4).eval()
    plain = build_model("DiT-S/2", input_size=8, depth=2, hidden_size=48, num_heads=3, num_classes=4).eval()
    x, y, t = torch.randn(8, 4, 8, 8), torch.zeros(8, dtype=torch.long), torch.tensor([3])
    flops = []
    for m in (model, plain):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            m(x, t, y)
        flops.append(counter.get_total_flops())
    product, merging, gate = 8 * 16 * 48**2, 3 * (48**2 + 48), 48 * 3
    assert flops[0] - flops[1] == 2 * 2 * (product + merging + gate)


@pytest.mark.parametrize("integration", INTEGRATIONS)
def test_autocast(integration):
    """Weights in float32, products in bfloat16, gradients in float32 again."""
    torch.manual_seed(0)
    fields = {"input_size": 8, "depth": 2, "hidden_size": 48, "num_heads": 3, "num_classes": 4}
    model = build_model("Switch-DiT-S/2", **fields, class_dropout_prob=0.0, integration=integration)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x, t, y = torch.randn(5, 4, 8, 8), torch.arange(5) * 200, torch.arange(5) % 4
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(x, t, y)
        out.float().square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        results.append([out.detach().float(), torch.cat([g.flatten() for g in gradients.values()])])
    for exact, half in zip(*results, strict=True):
        assert 0 < (half - exact).norm() < 0.05 * exact.norm()


def test_bf16_routes_like_float32_of_the_same_weights():
    torch.manual_seed(0)
    model = build_model("Switch-DiT-S/2", input_size=8, depth=4, hidden_size=64, num_heads=2, num_experts=4)
    half = build_model("Switch-DiT-S/2", input_size=8, depth=4, hidden_size=64, num_heads=2, num_experts=4)
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    rounded = {k: v.float() for k, v in half.state_dict().items()}
    model.load_state_dict(rounded)
    assert torch.equal(half.task_expert_map(), model.task_expert_map())
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([0, 1, 2])
    out, routing = half.eval()(x, t, y, return_routing=True)
    assert out.dtype == torch.bfloat16
    assert routing.probs.dtype == torch.float32
    assert torch.equal(routing.probs, model.eval()(x, t, y, return_routing=True)[1].probs)


def test_wrong_state_dict_is_listed_by_name_and_leaves_the_model_alone():
    g = golden("switch_dit_M3k2")
    weights = tensors(g, "sd/")
    model = golden_model(g)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights["surprise"] = torch.zeros(1)
    del weights["x_embedder.proj.bias"]
    weights["routers.1.experts.b"] = torch.zeros(3, 31)
    with pytest.raises(UserError) as info:
        load_reference_checkpoint(model, weights)
    message = str(info.value)
    assert "missing: x_embedder.proj.bias" in message
    assert "extra: surprise" in message
    assert "routers.1.experts.b (3, 31) instead of (3, 32)" in message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_reference_files(tmp_path):
    from safetensors.torch import save_file

    g = golden("switch_dit_M3k2")
    weights = {k: v.contiguous() for k, v in tensors(g, "sd/").items()}
    expected = golden_model(g).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    torch.save({"ema": weights, "model": {}, "args": None}, tmp_path / "w.pt")
    torch.save(weights, tmp_path / "raw.pt")
    for file in ("w.safetensors", "w.pt", "raw.pt"):
        model = build_model(
            "Switch-DiT-S/2", input_size=8, num_classes=5, depth=3, hidden_size=32, num_heads=2, num_experts=3, top_k=2
        )
        load_reference_checkpoint(model, tmp_path / file)
        assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="does not exist"):
        load_reference_checkpoint(model, tmp_path / "absent.pt")


def test_model_fields_are_a_complete_table():
    fields = model_fields("Switch-DiT-XL/2", num_classes=10)
    assert (fields["depth"], fields["hidden_size"], fields["num_heads"], fields["num_classes"]) == (28, 1152, 16, 10)
