"""Schedules, respacing and the two Gaussians of each step, against published tables and Bayes' rule."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchdit.diffusion.gaussian import GaussianDiffusion, make_betas, space_timesteps
from switchdit.errors import UserError

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "gaussian_diffusion.npz"))
TABLES = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)
schedules = pytest.mark.parametrize("schedule", ["linear", "cosine"])


def process(schedule: str, num_timesteps: int = 1000) -> GaussianDiffusion:
    return GaussianDiffusion(make_betas(schedule, num_timesteps))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@schedules
def test_tables_are_the_published_ones(schedule):
    diffusion = process(schedule)
    np.testing.assert_allclose(diffusion.betas, GOLDEN[f"{schedule}/betas"], rtol=1e-15)
    # the authors derive theirs from a respacing to all 1000 timesteps, which changes the thirteenth digit
    respaced = diffusion.respaced(1000)
    np.testing.assert_allclose(respaced.betas, GOLDEN[f"{schedule}/betas_after_SpacedDiffusion_1000"], rtol=1e-14)
    for table in TABLES:
        np.testing.assert_allclose(getattr(respaced, table), GOLDEN[f"{schedule}/{table}"], rtol=1e-13, err_msg=table)
        np.testing.assert_allclose(getattr(diffusion, table), GOLDEN[f"{schedule}/{table}"], rtol=1e-12, err_msg=table)


@schedules
@pytest.mark.parametrize("spec", ["10", "250"])
def test_respaced_betas_are_the_published_ones(schedule, spec):
    golden = GOLDEN[f"{schedule}/respaced_{spec}_betas"]
    np.testing.assert_allclose(process(schedule).respaced(spec).betas, golden, rtol=1e-13)


@pytest.mark.parametrize("case", sorted(name.split("/")[1] for name in GOLDEN if name.startswith("respace/")))
def test_published_spacings(case):
    num_timesteps, spec = case.split("_")
    assert space_timesteps(int(num_timesteps), spec).tolist() == GOLDEN[f"respace/{case}"].tolist()


@given(st.integers(1, 2000), st.data())
def test_even_spacing(num_timesteps, data):
    count = data.draw(st.integers(1, num_timesteps))
    kept = space_timesteps(num_timesteps, count)
    assert kept.tolist() == space_timesteps(num_timesteps, str(count)).tolist()
    assert len(kept) == count
    assert (np.diff(kept) > 0).all()
    assert kept[0] == 0
    assert kept[-1] == (num_timesteps - 1 if count > 1 else 0)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(0, 100))
def test_sections_keep_their_numbers(counts, extra):
    num_timesteps = max(counts) * len(counts) + extra
    kept = space_timesteps(num_timesteps, ",".join(map(str, counts)))
    assert (np.diff(kept) > 0).all()
    for section, count in zip(np.array_split(np.arange(num_timesteps), len(counts)), counts, strict=True):
        inside = kept[(kept >= section[0]) & (kept <= section[-1])]
        assert len(inside) == count
        assert inside[0] == section[0]
        assert inside[-1] == (section[-1] if count > 1 else section[0])


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 400))
def test_ddim_spacing(num_timesteps, count):
    strides = [s for s in range(1, num_timesteps + 1) if len(range(0, num_timesteps, s)) == count]
    if strides:
        kept = space_timesteps(num_timesteps, f"ddim{count}")
        assert kept.tolist() == list(range(0, num_timesteps, strides[0]))
    else:
        with pytest.raises(UserError, match=f"ddim{count}"):
            space_timesteps(num_timesteps, f"ddim{count}")


@pytest.mark.parametrize("spec", ["", "ten", "10,,20", "-5", 0, "ddim", "ddim0", "ddim-4", "2.5", 1001, "900,3", "²"])
def test_impossible_spacings(spec):
    with pytest.raises(UserError) as error:
        space_timesteps(1000, spec)
    assert f"'{spec}'" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "steps", "message"),
    [("cosin", 1000, "cosine"), ("linear", 20, "21"), ("linear", 0, "at least 1"), ("cosine", -1, "at least 1")],
)
def test_impossible_schedules(schedule, steps, message):
    with pytest.raises(UserError, match=message):
        make_betas(schedule, steps)


@settings(deadline=None)
@given(st.sampled_from(["linear", "cosine"]), st.integers(21, 1200), st.data())
def test_respaced_process_has_the_same_noise_levels(schedule, num_timesteps, data):
    base = process(schedule, num_timesteps)
    once = base.respaced(data.draw(st.integers(1, num_timesteps)))
    twice = once.respaced(data.draw(st.integers(1, once.num_timesteps)))
    for diffusion in (once, twice):
        kept = base.alphas_cumprod[diffusion.timestep_map]
        # betas hold 1 - abar_t / abar_{t-1} to 1e-16
        np.testing.assert_allclose(diffusion.alphas_cumprod, kept, rtol=1e-12, atol=1e-15)


def test_a_process_of_one_step_is_finite():
    diffusion = process("linear").respaced(1)
    assert diffusion.timestep_map.tolist() == [0]
    for name, table in vars(diffusion).items():
        if isinstance(table, np.ndarray):
            assert np.isfinite(table).all(), name


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.0, 0.1], [0.1, 1.1], [float("nan")]])
def test_impossible_betas(betas):
    with pytest.raises(ValueError, match="betas"):
        GaussianDiffusion(np.array(betas))


def test_timestep_map_of_another_length():
    with pytest.raises(ValueError, match="timestep_map"):
        GaussianDiffusion(make_betas("cosine", 10), np.arange(9))


@settings(deadline=None)
@given(st.sampled_from(["linear", "cosine"]), st.lists(st.integers(0, 999), min_size=1, max_size=8))
def test_predict_x0_inverts_q_sample(schedule, timesteps):
    diffusion, t = process(schedule), torch.tensor(timesteps)
    x0, noise = draw(len(t), 2, 3, 3, seed=1), draw(len(t), 2, 3, 3, seed=2)
    x_t = diffusion.q_sample(x0, t, noise)
    # abar is 2e-9 at the cosine schedule's end: x0 is 5e-5 of x_t there
    torch.testing.assert_close(diffusion.predict_x0(x_t, t, noise), x0, rtol=0, atol=1e-10)


@schedules
def test_q_sample_is_the_product_of_its_steps(schedule):
    """Composing Normal(sqrt(1 - beta) x, beta) from step to step gives the mean and variance of q_sample."""
    diffusion = process(schedule)
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(diffusion.betas):
        mean, variance = mean * np.sqrt(1 - beta), variance * (1 - beta) + beta
        at = torch.tensor([t])
        one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        assert diffusion.q_sample(one, at, zero).item() == pytest.approx(mean, rel=1e-10)
        assert diffusion.q_sample(zero, at, one).item() ** 2 == pytest.approx(variance, rel=1e-10)


@schedules
def test_posterior_obeys_bayes(schedule):
    """log q(x_{t-1} | x_t, x0) = log q(x_t | x_{t-1}) + log q(x_{t-1} | x0) - log q(x_t | x0), in float64."""
    diffusion = process(schedule)
    t = torch.arange(1, 1000)
    x0, noise, z = (draw(len(t), 1, 2, 2, seed=seed) for seed in (3, 4, 5))
    x_t = diffusion.q_sample(x0, t, noise)
    mean, log_variance = diffusion.q_posterior(x0, x_t, t)
    before = mean + torch.exp(log_variance / 2) * z

    def log_normal(x, mean, variance):
        return -0.5 * ((x - mean) ** 2 / variance + torch.log(2 * torch.pi * variance))

    def column(table):
        return torch.from_numpy(table)[1:].view(-1, 1, 1, 1)

    beta, abar, abar_prev = map(column, (diffusion.betas, diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev))
    bayes = (
        log_normal(x_t, torch.sqrt(1 - beta) * before, beta)
        + log_normal(before, torch.sqrt(abar_prev) * x0, 1 - abar_prev)
        - log_normal(x_t, torch.sqrt(abar) * x0, 1 - abar)
    )
    torch.testing.assert_close(log_normal(before, mean, torch.exp(log_variance)), bayes, rtol=0, atol=1e-9)


@schedules
def test_learned_range(schedule):
    diffusion, t = process(schedule), torch.tensor([0, 1, 500, 999])
    low = torch.from_numpy(diffusion.posterior_log_variance_clipped)[t].view(-1, 1, 1, 1)
    high = torch.from_numpy(np.log(diffusion.betas))[t].view(-1, 1, 1, 1)
    v = torch.tensor([-1.0, 0.0, 1.0, 3.0], dtype=torch.float64).expand(4, 1, 1, 4)
    expected = torch.cat([low, (low + high) / 2, high, 2 * high - low], 3)
    torch.testing.assert_close(diffusion.learned_range_log_variance(v, t), expected)


def test_reverse_step_with_the_true_noise_is_the_posterior():
    diffusion, t = process("cosine"), torch.tensor([0, 10, 700, 999])
    x0, noise = draw(4, 2, 3, 3, seed=6), draw(4, 2, 3, 3, seed=7)
    x_t = diffusion.q_sample(x0, t, noise)
    step = diffusion.reverse_step(torch.cat([noise, -torch.ones_like(noise)], 1), x_t, t)
    mean, log_variance = diffusion.q_posterior(x0, x_t, t)
    torch.testing.assert_close(step.x0, x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(step.mean, mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(step.log_variance, log_variance.expand_as(mean), rtol=0, atol=1e-12)


def test_reverse_step_without_learned_variance_takes_beta():
    diffusion, t = process("linear"), torch.tensor([3, 900])
    x_t, eps = draw(2, 2, 3, 3, seed=8), draw(2, 2, 3, 3, seed=9)
    step = diffusion.reverse_step(eps, x_t, t)
    expected = torch.from_numpy(np.log(diffusion.betas))[t].view(-1, 1, 1, 1).expand_as(x_t)
    torch.testing.assert_close(step.log_variance, expected)
    learned = diffusion.reverse_step(torch.cat([eps, torch.ones_like(eps)], 1), x_t, t)
    torch.testing.assert_close(step.mean, learned.mean)


def test_clipping():
    diffusion, t = process("linear"), torch.tensor([500])
    x_t = 5 * draw(1, 1, 4, 4, seed=10)
    step = diffusion.reverse_step(torch.zeros_like(x_t), x_t, t, clip_denoised=True)
    free = diffusion.reverse_step(torch.zeros_like(x_t), x_t, t)
    assert free.x0.abs().max() > 1
    torch.testing.assert_close(step.x0, free.x0.clamp(-1, 1))
    torch.testing.assert_close(step.mean, diffusion.q_posterior(step.x0, x_t, t)[0])


def test_wrong_number_of_channels():
    with pytest.raises(ValueError, match="3 channels for 2"):
        process("linear").reverse_step(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, 2), torch.tensor([1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_inputs_are_computed_in_float32(dtype):
    diffusion, t = process("linear"), torch.tensor([5, 600])
    x0, noise = draw(2, 1, 2, 2, seed=11).to(dtype), draw(2, 1, 2, 2, seed=12).to(dtype)
    x_t = diffusion.q_sample(x0, t, noise)
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t, diffusion.q_sample(x0.float(), t, noise.float()), rtol=0, atol=0)


def test_tables_are_copied_to_a_device_once(monkeypatch):
    diffusion, t, x = process("linear"), torch.tensor([5, 600]), torch.ones(2, 1, 2, 2)
    output = torch.ones(2, 2, 2, 2)
    with torch.inference_mode():
        first = diffusion.reverse_step(output, x, t)
    monkeypatch.setattr(torch, "tensor", None)
    again = diffusion.reverse_step(output, x, t)
    assert torch.equal(first.mean, again.mean)
    assert not any(table.is_inference() for table in diffusion._on_device.values())
