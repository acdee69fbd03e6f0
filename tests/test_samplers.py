"""Samplers against published trajectories, an exactly solvable diffusion, and the promises of guidance and noise."""

import math
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchdit.diffusion.gaussian import GaussianDiffusion, make_betas
from switchdit.diffusion.rectified_flow import RectifiedFlow
from switchdit.diffusion.samplers import (
    PerImageNoise,
    ddim_sample,
    ddim_steps,
    ddpm_sample,
    ddpm_steps,
    euler_sample,
    euler_steps,
    guided,
    image_seed,
)
from switchdit.errors import UserError
from switchdit.progress import progress

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "gaussian_diffusion.npz"))
schedules = pytest.mark.parametrize("schedule", ["linear", "cosine"])
clips = pytest.mark.parametrize("clip", [False, True])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def process(schedule: str, num_timesteps: int = 1000) -> GaussianDiffusion:
    return GaussianDiffusion(make_betas(schedule, num_timesteps))


def golden(key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[f"sample/{key}"]).to(dtype)


def golden_noise(iteration: int, dtype: torch.dtype) -> torch.Tensor:
    return golden("noises_in_loop_order")[iteration].to(dtype)


def golden_denoise(schedule: str):
    """The stand-in for a model that the published trajectories were made with; t are original timesteps."""
    base, y = process(schedule), golden("y")

    def denoise(x, t):
        s, a, time, label = (
            values.to(x.dtype).view(-1, 1, 1, 1)
            for values in (
                torch.from_numpy(base.sqrt_one_minus_alphas_cumprod)[t],
                torch.from_numpy(base.sqrt_alphas_cumprod)[t],
                torch.as_tensor(t / 1000),
                y,
            )
        )
        eps = s * x + a * (0.5 * torch.sin(2 * x) + 0.1 * torch.cos(6 * time) + 0.01 * label)
        return torch.cat([eps, 0.8 * torch.sin(3 * x + time)], 1)

    return denoise


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest error, relative to the largest value."""
    assert ((actual - expected).abs().max() / expected.abs().max()).item() <= tolerance


def sensitivity(schedule: str, spec: str) -> float:
    """How much of float32's rounding reaches x: sqrt(1 / abar) of the first step, 2e4 if it is cosine's t = 999."""
    return 1000.0 if schedule == "cosine" and not spec.startswith("ddim") else 1.0


@schedules
@clips
@dtypes
def test_published_ddpm_trajectories(schedule, clip, dtype):
    """float32 was equal to the last bit on the machine (x86) that made them; else it is their rounding, amplified."""
    diffusion = process(schedule).respaced("10")
    noise = partial(golden_noise, dtype=dtype)
    steps = list(ddpm_steps(golden_denoise(schedule), diffusion, golden("xT", dtype), noise, clip))
    published = f"{schedule}/ddpm10/clip{int(clip)}"
    amplified = sensitivity(schedule, "10")
    assert_near(torch.stack([s.x for s in steps]), golden(f"{published}/trajectory", dtype), 5e-7 * amplified)
    # x0 of the first step is 1 / sqrt(abar) of x, 157 for the linear schedule
    tolerance = 1e-4 if schedule == "linear" else 1e-2
    assert_near(torch.stack([s.x0 for s in steps]), golden(f"{published}/pred_xstart", dtype), tolerance)


@schedules
@clips
@dtypes
@pytest.mark.parametrize("spec", ["10", "ddim10"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_published_ddim_trajectories(schedule, clip, dtype, spec, eta):
    diffusion = process(schedule).respaced(spec)
    noise = partial(golden_noise, dtype=dtype)
    steps = ddim_steps(golden_denoise(schedule), diffusion, golden("xT", dtype), noise, clip, eta=eta)
    published = golden(f"{schedule}/ddim_steps_{spec}_eta{eta}/clip{int(clip)}/trajectory", dtype)
    # measured: 0.9e-6 (linear) and 1.6e-6 (cosine); ours takes some coefficients in float64, theirs are float32
    tolerance = 3e-6 if dtype == torch.float32 else 3e-6 * sensitivity(schedule, spec)
    assert_near(torch.stack([s.x for s in steps]), published, tolerance)


@schedules
@dtypes
def test_published_reverse_step(schedule, dtype):
    x, t = golden("xT", dtype), torch.tensor([0, 600])
    step = process(schedule).reverse_step(golden_denoise(schedule)(x, t), x, t)
    published = f"{schedule}/p_mean_variance_t0_t600"
    assert_near(step.mean, golden(f"{published}/mean", dtype), 2e-7)
    assert_near(step.log_variance, golden(f"{published}/log_variance", dtype), 2e-7)
    assert_near(step.log_variance.exp(), golden(f"{published}/variance", dtype), 1e-6)
    assert_near(step.x0, golden(f"{schedule}/p_sample_t0_t600/pred_xstart", dtype), 1e-6)
    noise = golden_noise(0, dtype) * (t > 0).view(-1, 1, 1, 1)
    sample = step.mean + torch.exp(0.5 * step.log_variance) * noise
    assert_near(sample, golden(f"{schedule}/p_sample_t0_t600/sample", dtype), 2e-7)


MEANS, DEVIATIONS, WEIGHTS = (-1.0, 0.8), (0.25, 0.4), (0.3, 0.7)


def mixture_denoise(diffusion: GaussianDiffusion, variance_channel: float):
    """The best possible noise prediction for pixels drawn from a mixture of two Gaussians: E[noise | x_t]."""

    def denoise(x, t):
        abar = torch.from_numpy(diffusion.alphas_cumprod)[t].view(-1, 1, 1, 1)
        log_shares, x0_means = [], []
        for mean, deviation, weight in zip(MEANS, DEVIATIONS, WEIGHTS, strict=True):
            variance = abar * deviation**2 + 1 - abar  # of x_t in this component
            residual = x - abar.sqrt() * mean
            log_shares.append(math.log(weight) - 0.5 * variance.log() - 0.5 * residual**2 / variance)
            x0_means.append(mean + abar.sqrt() * deviation**2 / variance * residual)
        shares = torch.softmax(torch.stack(log_shares), 0)
        x0 = (shares * torch.stack(x0_means)).sum(0)
        eps = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        return torch.cat([eps, torch.full_like(eps, variance_channel)], 1).float()

    return denoise


@pytest.fixture
def one_thread():
    """For many small operations: threads that wait for each other on a busy machine make them 20 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@schedules
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.usefixtures("one_thread")
def test_an_ideal_network_recovers_its_data(schedule, sampler):
    """Mean, variance and the share of the lower mode, of 30,000 one-pixel images sampled in 500 steps.

    Within four standard errors of such a sample (0.021, 2.2 % and 0.011); the variance gets 1 % more for the steps
    being finite. Measured: 0.014, 1.4 % and 0.005 at most.
    """
    count, diffusion = 30_000, process(schedule).respaced(500)
    denoise = mixture_denoise(process(schedule), variance_channel=-1.0)
    generator = torch.Generator().manual_seed(0)
    noise = lambda iteration: torch.randn(count, 1, 1, 1, generator=generator)  # noqa: E731
    if sampler == "ddpm":
        x = ddpm_sample(denoise, diffusion, noise(-1), noise)
    else:
        x = ddim_sample(denoise, diffusion, noise(-1))

    x = x.double().flatten()
    mean = sum(w * m for w, m in zip(WEIGHTS, MEANS, strict=True))
    central = [(w, m - mean, d) for w, m, d in zip(WEIGHTS, MEANS, DEVIATIONS, strict=True)]
    variance = sum(w * (m**2 + d**2) for w, m, d in central)
    fourth = sum(w * (m**4 + 6 * m**2 * d**2 + 3 * d**4) for w, m, d in central)
    share = sum(w * NormalDist(m, d).cdf(-0.3) for w, m, d in zip(WEIGHTS, MEANS, DEVIATIONS, strict=True))

    four = 4 / math.sqrt(count)
    assert x.mean().item() == pytest.approx(mean, abs=four * math.sqrt(variance))
    assert x.var().item() == pytest.approx(variance, abs=four * math.sqrt(fourth - variance**2) + 0.01 * variance)
    assert (x < -0.3).double().mean().item() == pytest.approx(share, abs=four * math.sqrt(share * (1 - share)))


def stub_denoise(x, t):
    return torch.cat([torch.tanh(x) + torch.as_tensor(t).view(-1, 1, 1, 1) / 1000, -torch.ones_like(x)], 1)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_euler_steps_along_straight_lines_arrive_at_once():
    """The velocity of a single image is (x - image) / t: any number of steps ends in it, each foreseeing it."""
    flow, image, x_T = RectifiedFlow(), draw(2, 2, 3, 3, seed=5).double(), draw(2, 2, 3, 3, dtype=torch.float64)
    asked = []

    def velocity(x, t):
        assert not torch.is_grad_enabled()
        asked.append(t)
        return torch.cat([(x - image) / (t / 1000), torch.full_like(x, torch.nan)], 1)  # what follows C is not used

    steps = list(euler_steps(velocity, flow, x_T, 7))
    assert asked == [step.timestep for step in steps] == [1000 * i / 7 for i in range(7, 0, -1)]
    for i, step in enumerate(steps, start=1):
        torch.testing.assert_close(step.x, flow.interpolate(image, torch.full((2,), 1 - i / 7).double(), x_T))
        torch.testing.assert_close(step.x0, image)
    assert torch.equal(euler_sample(velocity, flow, x_T, 7), steps[-1].x)
    with pytest.raises(UserError, match="num_steps is 0"):
        euler_sample(velocity, flow, x_T, 0)


@pytest.mark.usefixtures("one_thread")
def test_an_ideal_velocity_recovers_its_data():
    """dx/dt = E[noise - x0 | x_t] for pixels of one Gaussian, in 200 steps.

    The exact flow is linear in x, so Euler's mean and deviation have closed forms, which float32 must reproduce; they
    come within 1 % of the data's.
    """
    mean, deviation, num_steps = -0.7, 0.4, 200
    x_T = draw(20_000, 1, 1, 1)

    def slope(t):
        """Of the velocity: slope * (x - (1 - t) mean) - mean."""
        return (t - (1 - t) * deviation**2) / ((1 - t) ** 2 * deviation**2 + t**2)

    x = euler_sample(
        lambda x, t: slope(t) * (x - (1 - t) * mean) - mean,
        RectifiedFlow(time_scale=1.0),
        x_T,
        num_steps,
    )
    scale = math.prod(1 - slope(i / num_steps) / num_steps for i in range(1, num_steps + 1))
    torch.testing.assert_close(x, mean + scale * x_T, rtol=1e-5, atol=1e-5)
    assert scale == pytest.approx(deviation, rel=0.01)


def test_euler_sampling_is_in_float32_around_a_bfloat16_model():
    narrow = lambda x, t: stub_denoise(x, t).bfloat16()  # noqa: E731
    x = euler_sample(narrow, RectifiedFlow(), draw(2, 1, 2, 2), 5)
    assert x.dtype == torch.float32
    assert torch.equal(x, euler_sample(lambda x, t: narrow(x, t).float(), RectifiedFlow(), draw(2, 1, 2, 2), 5))


def test_ddim_with_eta_one_is_ddpm_with_the_posterior_variance():
    """Song et al. 2021, Sec. 4.1; the step before the last is the last that adds noise."""
    diffusion = process("linear").respaced(20)
    noise = lambda i: draw(3, 2, 2, 2, seed=i, dtype=torch.float64)  # noqa: E731
    x_T = draw(3, 2, 2, 2, seed=99, dtype=torch.float64)
    for a, b in zip(
        ddpm_steps(stub_denoise, diffusion, x_T, noise),
        ddim_steps(stub_denoise, diffusion, x_T, noise, eta=1.0),
        strict=True,
    ):
        torch.testing.assert_close(a.x, b.x, rtol=1e-10, atol=1e-10)


def test_what_a_sampler_asks_for():
    """Original timesteps, known to the host, the noisiest first; noise for each step but the last."""
    diffusion = process("cosine").respaced("ddim5")
    asked, drawn, shown = [], [], []

    def denoise(x, t):
        assert isinstance(t, int)
        assert not torch.is_grad_enabled()
        asked.append(t)
        return stub_denoise(x, t)

    def noise(iteration):
        drawn.append(iteration)
        return torch.zeros(2, 1, 2, 2)

    def show(steps):
        shown.extend(steps)
        return progress(steps, desc="sampling")

    x_T = draw(2, 1, 2, 2)
    x = ddpm_sample(denoise, diffusion, x_T, noise, progress=show)
    assert asked == [800, 600, 400, 200, 0]
    assert drawn == [0, 1, 2, 3]
    assert shown == [4, 3, 2, 1, 0]
    steps = list(ddpm_steps(denoise, diffusion, x_T, noise))
    assert [step.timestep for step in steps] == [800, 600, 400, 200, 0]
    assert torch.equal(steps[-1].x, x)

    drawn.clear()
    assert ddim_sample(denoise, diffusion, x_T, noise).shape == x_T.shape
    assert drawn == []
    ddim_sample(denoise, diffusion, x_T, noise, eta=0.3)
    assert drawn == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"eta 0\.3 needs noise"):
        ddim_sample(denoise, diffusion, x_T, eta=0.3)


@pytest.mark.parametrize("sample", [ddpm_sample, ddim_sample])
def test_a_bfloat16_model_is_sampled_in_float32(sample):
    diffusion, noise = process("linear").respaced(5), lambda i: draw(2, 1, 2, 2, seed=i)
    narrow = lambda x, t: stub_denoise(x, t).bfloat16()  # noqa: E731
    x = sample(narrow, diffusion, draw(2, 1, 2, 2), noise)
    assert x.dtype == torch.float32
    assert torch.equal(x, sample(lambda x, t: narrow(x, t).float(), diffusion, draw(2, 1, 2, 2), noise))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sampling_never_waits_for_the_device():
    diffusion, noise = process("cosine").respaced(10), PerImageNoise(0, range(2), (1, 2, 2), "cuda")
    y = torch.zeros(2, dtype=torch.int64, device="cuda")
    denoise = guided(lambda x, t, y: stub_denoise(x, t), y, 1, 2.0, interval=(100, 800))

    def sample_all():
        ddpm_sample(denoise, diffusion, noise(), noise)
        ddim_sample(denoise, diffusion, noise(), noise, eta=0.5)
        euler_sample(denoise, RectifiedFlow(), noise(), 10)

    sample_all()  # the tables are copied here
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample_all()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class RecordingModel:
    """A model with two channels of x, whose output depends on x, t and y; remembers what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append((x, t, y))
        n = (-1, 1, 1, 1)
        return torch.cat([torch.sin(x * (1 + y.view(n))) + t.view(n) / 1000, torch.cos(x) * y.view(n)], 1)


@pytest.mark.parametrize("guided_channels", [None, 1, 2])
def test_guidance_formula(guided_channels):
    model, x, t, y = RecordingModel(), draw(3, 2, 4, 4), torch.tensor([5, 5, 900]), torch.tensor([0, 4, 2])
    out = guided(model, y, null_label=9, cfg_scale=2.5, guided_channels=guided_channels)(x, t)

    (call,) = model.calls
    assert torch.equal(call[0], torch.cat([x, x]))
    assert call[1].tolist() == [5, 5, 900, 5, 5, 900]
    assert call[2].tolist() == [0, 4, 2, 9, 9, 9]
    expected = RecordingModel()(x, t, y)
    unconditional = RecordingModel()(x, t, torch.full_like(y, 9))
    for channel in range(guided_channels or 2):
        conditional = expected[:, channel].clone()
        expected[:, channel] = unconditional[:, channel] + 2.5 * (conditional - unconditional[:, channel])
    assert torch.equal(out, expected)


def test_guidance_at_scale_one_is_the_plain_model():
    model, x, t, y = RecordingModel(), draw(3, 2, 4, 4), torch.tensor([5, 5, 900]), torch.tensor([0, 4, 2])
    out = guided(model, y, null_label=9, cfg_scale=1.0)(x, t)
    assert [len(call[0]) for call in model.calls] == [3]
    assert torch.equal(out, RecordingModel()(x, t, y))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_guidance_interval_by_rows(dtype):
    model, x, y = RecordingModel(), draw(4, 2, 4, 4), torch.tensor([0, 4, 2, 1])
    t = torch.tensor([99, 100, 800, 801]).to(dtype)
    inside = guided(model, y, null_label=9, cfg_scale=3.0)(x, t)
    plain = model(x, t, y)
    out = guided(model, y, null_label=9, cfg_scale=3.0, interval=(100, 800))(x, t)
    assert torch.equal(out, torch.stack([plain[0], inside[1], inside[2], plain[3]]))


@pytest.mark.parametrize("t", [0, 99, 100, 800, 801, 99.99, 100.0, 800.0, 800.01])
def test_guidance_interval_of_a_shared_timestep(t):
    """Outside, the conditional prediction alone is computed; both ends are inside."""
    model, x, y = RecordingModel(), draw(3, 2, 4, 4), torch.tensor([0, 4, 2])
    out = guided(model, y, null_label=9, cfg_scale=3.0, interval=(100, 800))(x, t)
    [(_, told, labels)] = model.calls
    inside = 100 <= t <= 800
    assert len(labels) == (6 if inside else 3)
    assert told.dtype == (torch.int64 if isinstance(t, int) else torch.float32)
    assert told.tolist() == pytest.approx([t])  # once, for all rows
    everywhere = guided(RecordingModel(), y, null_label=9, cfg_scale=3.0)(x, t)
    assert torch.equal(out, everywhere if inside else RecordingModel()(x, told, y))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler"])
def test_a_guidance_interval_saves_its_rows_in_sampling(sampler):
    model, y, x_T = RecordingModel(), torch.tensor([0, 4, 2]), draw(3, 1, 4, 4)
    denoise = guided(model, y, null_label=9, cfg_scale=3.0, interval=(400, 600))
    if sampler == "euler":
        euler_sample(denoise, RectifiedFlow(), x_T, 5)
    else:
        sample = {"ddpm": ddpm_sample, "ddim": ddim_sample}[sampler]
        sample(denoise, process("cosine").respaced("ddim5"), x_T, lambda i: torch.zeros_like(x_T))
    times = [1000, 800, 600, 400, 200] if sampler == "euler" else [800, 600, 400, 200, 0]
    called = [(t[0].item(), len(x)) for x, t, _ in model.calls]
    assert called == [(t, 6 if 400 <= t <= 600 else 3) for t in times]


def test_guidance_without_learned_variance_and_in_bfloat16():
    y = torch.tensor([1, 2])
    model = lambda x, t, y: (x * y.view(-1, 1, 1, 1)).bfloat16()  # noqa: E731
    out = guided(model, y, null_label=0, cfg_scale=4.0)(torch.ones(2, 4, 2, 2), torch.zeros(2, dtype=torch.int64))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.ones(2, 4, 2, 2) * torch.tensor([4.0, 8.0]).view(2, 1, 1, 1))


def test_impossible_guidance():
    y, t = torch.tensor([1, 2]), torch.tensor([3, 3])
    with pytest.raises(UserError, match="guided_channels is 0"):
        guided(RecordingModel(), y, 9, 1.5, guided_channels=0)
    with pytest.raises(UserError, match="guided_channels is 3, but x has 2"):
        guided(RecordingModel(), y, 9, 1.5, guided_channels=3)(draw(2, 2, 4, 4), t)
    with pytest.raises(ValueError, match="x has 4 rows"):
        guided(RecordingModel(), y, 9, 1.5)(draw(4, 2, 4, 4), t)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9), st.data())
def test_noise_does_not_depend_on_the_batch(seed, indices, data):
    cut = data.draw(st.integers(0, len(indices)))
    whole, *parts = (PerImageNoise(seed, part, (4, 3, 5)) for part in (indices, indices[:cut], indices[cut:]))
    for iteration in range(3):
        assert torch.equal(whole(iteration), torch.cat([part() for part in parts]))


def test_images_do_not_depend_on_the_batch():
    diffusion = process("cosine").respaced(6)

    def images(*indices):
        noise = PerImageNoise(3, indices, (2, 4, 4))
        return ddpm_sample(stub_denoise, diffusion, noise(), noise)

    assert torch.equal(images(0, 1, 2, 3, 4), torch.cat([images(0, 1, 2), images(3), images(4)]))


def test_noise_is_standard_normal_and_differs_between_images():
    noise = PerImageNoise(0, range(500), (4, 8, 8))
    draws = torch.stack([noise() for _ in range(4)]).transpose(0, 1).flatten(1).double()  # (500, 1024)
    assert draws.mean().abs() < 4 / math.sqrt(draws.numel())
    assert (draws.var() - 1).abs() < 4 * math.sqrt(2 / draws.numel())
    correlations = torch.corrcoef(draws) - torch.eye(500)
    assert correlations.abs().max() < 6 / math.sqrt(1024)  # of 124,750 pairs: 5.5 standard deviations is 0.5 % likely
    other = PerImageNoise(1, range(500), (4, 8, 8))
    assert (other() - PerImageNoise(0, range(500), (4, 8, 8))()).abs().amax((1, 2, 3)).min() > 0


@given(*[st.integers(0, 2**32 - 1)] * 4)
def test_image_seeds_differ(seed, index, other_seed, other_index):
    same = (seed, index) == (other_seed, other_index)
    assert (image_seed(seed, index) == image_seed(other_seed, other_index)) == same
    assert image_seed(seed, index) >> 32 == seed
    if index != other_index:  # PyTorch's CPU generator reads the low word only
        assert image_seed(seed, index) % 2**32 != image_seed(seed, other_index) % 2**32


@given(*[st.integers(0, 2**16 - 1)] * 4)
def test_image_seeds_differ_in_the_low_word_for_small_numbers(seed, index, other_seed, other_index):
    same = (seed, index) == (other_seed, other_index)
    low, other_low = image_seed(seed, index) % 2**32, image_seed(other_seed, other_index) % 2**32
    assert (low == other_low) == same


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1), (2**32, 0), (0, 2**32)])
def test_impossible_image_seeds(seed, index):
    with pytest.raises(UserError, match="must be from 0"):
        image_seed(seed, index)
