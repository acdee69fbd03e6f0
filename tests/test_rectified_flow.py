"""Rectified flow against definitions, and against the published losses and trajectories."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchdit import build_model
from switchdit.diffusion.gaussian import GaussianDiffusion, make_betas
from switchdit.diffusion.losses import noise_losses
from switchdit.diffusion.rectified_flow import RectifiedFlow
from switchdit.diffusion.samplers import euler_steps, guided
from switchdit.errors import UserError

FOLDER = Path(__file__).parent / "golden"
GOLDEN = dict(np.load(FOLDER / "rectified_flow.npz"))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dtypes
def test_lines_lead_from_data_to_noise(dtype):
    flow, x0, noise = RectifiedFlow(), draw(3, 4, 2, 2, dtype=dtype), draw(3, 4, 2, 2, seed=1, dtype=dtype)
    x_t = flow.interpolate(x0, torch.tensor([0.0, 1.0, 0.25]), noise)  # float32 times, as batches have them
    assert x_t.dtype == dtype
    assert torch.equal(x_t[:2], torch.stack([x0[0], noise[1]]))
    torch.testing.assert_close(x_t[2], 0.75 * x0[2] + 0.25 * noise[2])


@dtypes
@pytest.mark.parametrize("channels", [4, 8])
def test_the_loss_is_that_of_the_velocity(dtype, channels):
    """Zero for noise - x0, whatever the channels that follow; its gradient reaches the velocity alone."""
    x0, noise, t = draw(3, 4, 2, 2, dtype=dtype), draw(3, 4, 2, 2, seed=1, dtype=dtype), torch.tensor([0.1, 0.5, 0.9])
    flow = RectifiedFlow()
    x_t = flow.interpolate(x0, t, noise)
    error = draw(3, 4, 2, 2, seed=2, dtype=dtype)
    output = torch.cat([noise - x0 + error, torch.ones(3, channels - 4, 2, 2, dtype=dtype)], 1).requires_grad_()
    losses = flow.losses(output, x0, x_t, t, noise)
    torch.testing.assert_close(losses["mse"], error.square().mean((1, 2, 3)))
    assert torch.equal(losses["vlb"], torch.zeros(3, dtype=dtype))
    losses["mse"].sum().backward()
    torch.testing.assert_close(output.grad[:, :4], 2 * error / 16)
    assert not output.grad[:, 4:].any()


def test_a_bfloat16_output_is_computed_in_float32():
    flow, x0, noise, t = RectifiedFlow(), draw(2, 4, 2, 2), draw(2, 4, 2, 2, seed=1), torch.tensor([0.3, 0.6])
    narrow = draw(2, 8, 2, 2, seed=2).bfloat16()
    mse = flow.losses(narrow, x0, flow.interpolate(x0, t, noise), t, noise)["mse"]
    assert mse.dtype == torch.float32
    assert torch.equal(mse, flow.losses(narrow.float(), x0, flow.interpolate(x0, t, noise), t, noise)["mse"])
    bf16 = flow.interpolate(x0.bfloat16(), t, noise.bfloat16())
    assert torch.equal(bf16, flow.interpolate(x0.bfloat16().float(), t, noise.bfloat16().float()))


def test_an_output_with_other_channels_is_refused():
    x, t = draw(1, 4, 2, 2), torch.tensor([0.5])
    with pytest.raises(ValueError, match="6 channels for 4"):
        RectifiedFlow().losses(draw(1, 6, 2, 2), x, x, t, x)


@given(st.floats(0, 1), st.floats(0.5, 2000))
def test_what_a_model_is_told(t, time_scale):
    flow = RectifiedFlow(time_scale=time_scale)
    assert flow.model_time(t) == t * time_scale
    assert flow.model_time(torch.tensor([t])).item() == pytest.approx(t * time_scale, rel=1e-6, abs=1e-30)
    assert RectifiedFlow().model_time(t) == 1000 * t


@pytest.mark.parametrize("time_scale", [0.0, -1.0, float("nan")])
def test_an_impossible_time_scale(time_scale):
    with pytest.raises(UserError, match=r"time_scale is .*; it must be above 0"):
        RectifiedFlow(time_scale=time_scale)


def test_a_diffusion_is_called_by_the_same_names():
    """What training calls: `interpolate` and `model_time`; and losses of the same names and arguments."""
    diffusion, flow = GaussianDiffusion(make_betas("cosine", 1000)), RectifiedFlow()
    x0, noise, t = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1), torch.tensor([0, 500, 999])
    x_t = diffusion.interpolate(x0, t, noise)
    assert torch.equal(x_t, diffusion.q_sample(x0, t, noise))
    assert torch.equal(diffusion.model_time(t), t)
    assert diffusion.respaced("ddim10").model_time(torch.tensor([0, 3, 9])).tolist() == [0, 300, 900]
    output = draw(3, 8, 2, 2, seed=2)
    theirs, ours = noise_losses(diffusion, output, x0, x_t, t, noise), flow.losses(output, x0, x_t, t / 1000, noise)
    assert theirs.keys() == ours.keys()
    assert [v.shape for v in theirs.values()] == [v.shape for v in ours.values()]
    assert diffusion.num_timesteps == flow.num_timesteps


OURS = {  # what the authors' names become
    r"moe\.gate\.": "moe.deepspeed_moe.gate.wg.",
    r"moe\.experts\.": "moe.deepspeed_moe.experts.deepspeed_experts.",
    r"moe\.se\.": "recalibration.",
    r"moe\.shared_experts\.": "shared_expert.",
}


@pytest.fixture(scope="module")
def published_model() -> torch.nn.Module:
    model = build_model(
        "Diff-MoE-S/2",
        input_size=8,
        num_classes=5,
        depth=2,
        hidden_size=32,
        num_heads=2,
        mlp_ratio=2.0,
        num_experts=4,
        top_k=2,
        num_shared_experts=1,
    )
    weights = {}
    with np.load(FOLDER / "diff_moe.npz") as golden:
        for name in (n for n in golden.files if n.startswith("sd/")):
            ours = name.removeprefix("sd/")
            for theirs, replacement in OURS.items():
                ours = re.sub(theirs, replacement, ours)
            weights[ours] = torch.from_numpy(golden[name])
    model.load_state_dict(weights)
    return model.eval()


def golden(key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[key]).to(dtype)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, relative to the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@dtypes
@pytest.mark.parametrize("drawn", ["ln", "uniform"])
def test_published_losses(published_model, dtype, drawn):
    """Measured: 1.2e-7 in float32; in float64 2.7e-7, the rounding of the published float32."""
    flow, x0, noise = RectifiedFlow(time_scale=1.0), golden("in/x", dtype), golden(f"{drawn}/z1", dtype)
    t = golden(f"{drawn}/t")
    x_t = flow.interpolate(x0, t, noise)
    with torch.no_grad():
        output = published_model.to(dtype)(x_t, flow.model_time(t), golden("in/y"))
    mse = flow.losses(output, x0, x_t, t, noise)["mse"]
    assert error(mse, golden(f"{drawn}/per_sample", dtype)) < 1e-6
    assert mse.mean().item() == pytest.approx(float(GOLDEN[f"{drawn}/loss"]), rel=1e-6)


@dtypes
@pytest.mark.parametrize("guidance", ["nocfg", "cfg"])
def test_published_trajectories(published_model, dtype, guidance):
    """The authors have a second sampler, that shows what each step foresees of x0 along the same way.

    Measured: 2e-7 for x, 7e-7 for x0, in either type.
    """
    scale = float(GOLDEN["sample/cfg"]) if guidance == "cfg" else 1.0
    null_label = int(GOLDEN["sample/null"][0])
    velocity = guided(published_model.to(dtype), golden("sample/cond"), null_label, scale)
    start = golden("sample/z", dtype)
    steps = list(euler_steps(velocity, RectifiedFlow(time_scale=1.0), start, 8))
    x = torch.stack([start, *(step.x for step in steps)])
    assert error(x, golden(f"sample/steps8_{guidance}", dtype)) < 2e-6
    if guidance == "cfg":
        foreseen = torch.stack([start, *(step.x0 for step in steps)])
        assert error(foreseen, golden("sample/steps8_xps_cfg", dtype)) < 2e-6
