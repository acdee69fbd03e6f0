"""Loss weightings against the published code's numbers, and learned weights against autograd and torch's Adam."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchdit.diffusion.gaussian import GaussianDiffusion, make_betas
from switchdit.diffusion.losses import noise_losses
from switchdit.diffusion.weightings import (
    NUM_CLUSTERS,
    UncertaintyWeighting,
    cluster_bounds,
    cluster_of,
    loss_weights,
)
from switchdit.errors import UserError

FOLDER = Path(__file__).parent / "golden"
GOLDEN = dict(np.load(FOLDER / "gaussian_diffusion.npz")) | dict(np.load(FOLDER / "loss_weightings.npz"))
schedules = pytest.mark.parametrize("schedule", ["linear", "cosine"])
ALONE = lambda sums: None  # noqa: E731  the only process


def golden(key: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[key])


def process(schedule: str) -> GaussianDiffusion:
    return GaussianDiffusion(make_betas(schedule, 1000))


def losses_of(schedule: str) -> dict[str, torch.Tensor]:
    t, x0, noise = golden("loss/t"), golden("loss/x_start"), golden("loss/noise")
    x_t = golden(f"loss/{schedule}/constant/x_t")
    return noise_losses(process(schedule), golden(f"loss/{schedule}/model_output"), x0, x_t, t, noise)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=0)


@schedules
def test_published_weights(schedule):
    t = torch.arange(1000)
    min_snr, p2 = (loss_weights(name, process(schedule), t) for name in ("min_snr", "p2"))
    assert min_snr.dtype == p2.dtype == torch.float32
    close(min_snr, golden(f"{schedule}/min_snr_5_weight"), 1e-6)
    close(p2, golden(f"{schedule}/p2_gamma1_k1_weight"), 1e-6)


@schedules
def test_published_min_snr_losses(schedule):
    """The squared error alone is weighted."""
    losses, t = losses_of(schedule), golden("loss/t")
    mse = losses["mse"] * loss_weights("min_snr", process(schedule), t)
    close(mse, golden(f"loss/{schedule}/min_snr_5/mse"))
    close(mse + losses["vlb"], golden(f"loss/{schedule}/min_snr_5/loss"))


@schedules
@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("k", [0.1, 1.0])
def test_weights_by_their_formulas(schedule, gamma, k):
    diffusion, t = process(schedule), torch.tensor([999, 0, 3, 500])
    snr = torch.from_numpy(diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod))[t]
    close(loss_weights("min_snr", diffusion, t, min_snr_gamma=gamma).double(), snr.clamp(max=gamma) / snr, 1e-6)
    p2 = loss_weights("p2", diffusion, t, p2_gamma=gamma, p2_k=k)
    close(p2.double(), 1 / (k + snr) ** gamma, 1e-6)
    assert torch.equal(loss_weights("constant", diffusion, t), torch.ones(4))


def test_weights_of_a_process_that_ends_in_pure_noise():
    diffusion = GaussianDiffusion(np.array([0.1, 1 - 1e-16]))  # the last signal-to-noise ratio is 1e-16
    for name in ("min_snr", "p2"):
        assert loss_weights(name, diffusion, torch.tensor([1])).tolist() == [1.0]


def test_an_unknown_weighting():
    with pytest.raises(UserError, match="'minsnr' is unknown; did you mean 'min_snr'"):
        loss_weights("minsnr", process("linear"), torch.tensor([1]))


@given(num_timesteps=st.integers(NUM_CLUSTERS, 5000))
def test_clusters_are_equal_ranges_without_gaps(num_timesteps):
    bounds = [cluster_bounds(c, num_timesteps) for c in range(NUM_CLUSTERS)]
    expected = torch.cat([torch.full((high - low,), c) for c, (low, high) in enumerate(bounds)])
    assert torch.equal(cluster_of(torch.arange(num_timesteps), num_timesteps), expected)
    sizes = [high - low for low, high in bounds]
    assert max(sizes) - min(sizes) <= 1


def test_published_clusters():
    assert [cluster_bounds(c, 1000) for c in range(NUM_CLUSTERS)] == [tuple(b) for b in GOLDEN["uw/clusters"].tolist()]


@schedules
def test_published_uncertainty_weighting(schedule):
    """There, sample i counted for cluster i, whatever its timestep."""
    weighting, t = UncertaintyWeighting(), golden("uw/clusters")[:, 0]
    weighting.log_variances.copy_(golden("uw/loss_scale"))
    losses = losses_of(schedule)
    per_sample = (losses["mse"] + losses["vlb"]).requires_grad_()
    loss = weighting.loss(per_sample, t)
    close(loss, golden(f"loss/{schedule}/uw/loss"))
    close(weighting.gradient(), golden(f"loss/{schedule}/uw/grad_loss_scale"))
    loss.backward()
    close(per_sample.grad, golden("uw/get_loss_weight") / 8)


def draw(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, timesteps), and not all clusters among them if n is small."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator) * 3, torch.randint(1000, (n,), generator=generator)


def test_steps_are_those_of_autograd_and_torchs_adam():
    weighting = UncertaintyWeighting(lr=0.025)
    s = torch.zeros(NUM_CLUSTERS, requires_grad=True)
    adam = torch.optim.AdamW([s], lr=0.025, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for seed in range(30):
        losses, t = draw(12, seed)
        adam.zero_grad()
        own = s[t * 8 // 1000]
        expected = (0.5 * torch.exp(-own) * losses).mean() + 0.5 * s.sum()
        expected.backward()
        close(weighting.loss(losses, t), expected.detach())
        adam.step()
        weighting.step(ALONE)
    assert s.abs().min() > 0.1
    close(weighting.log_variances, s.detach())


def step_together(ranks: list[UncertaintyWeighting]) -> None:
    """As processes do whose reduction adds up what each of them holds."""
    held = []
    for rank in ranks:
        copy.deepcopy(rank).step(lambda sums: held.append(sums.clone()))
    for rank in ranks:
        rank.step(lambda sums: sums.copy_(torch.stack(held).sum(0)))


@settings(deadline=None, max_examples=25)
@given(world_size=st.integers(1, 4), accumulation=st.integers(1, 3), micro_batch=st.integers(1, 5))
def test_steps_do_not_depend_on_how_the_batch_is_cut(world_size, accumulation, micro_batch):
    whole = UncertaintyWeighting()
    ranks = [UncertaintyWeighting() for _ in range(world_size)]
    for seed in range(3):
        losses, t = draw(world_size * accumulation * micro_batch, seed)
        mean = whole.loss(losses, t)
        whole.step(ALONE)
        parts = []
        for i, (part, part_t) in enumerate(zip(losses.split(micro_batch), t.split(micro_batch), strict=True)):
            parts.append(ranks[i % world_size].loss(part, part_t))
        close(torch.stack(parts).mean(), mean)
        step_together(ranks)
    for rank in ranks:
        assert torch.equal(rank.log_variances, ranks[0].log_variances)
        close(rank.log_variances, whole.log_variances)


def test_it_learns_the_size_of_each_clusters_loss():
    """Stationary where exp(s_c) is the cluster's share of the loss: an eighth of its mean."""
    weighting, sizes = UncertaintyWeighting(), torch.tensor([8.0, 4.0, 2.0, 1.0, 0.8, 0.4, 0.2, 0.1])
    t = torch.arange(0, 1000, 25)
    for _ in range(800):
        weighting.loss(sizes[cluster_of(t, 1000)], t)
        weighting.step(ALONE)
    close(weighting.log_variances.exp(), sizes / 8, 1e-3)


def test_its_state_goes_through_json_and_goes_on_exactly():
    through = UncertaintyWeighting()
    for seed in range(4):
        if seed == 2:
            resumed = UncertaintyWeighting()
            resumed.loss(*draw(3))  # not to be counted
            resumed.restore(json.loads(json.dumps(through.state())))
        for weighting in [through] if seed < 2 else [through, resumed]:
            weighting.loss(*draw(10, seed))
            weighting.step(ALONE)
    assert resumed.state() == through.state()
    assert through.state()["steps"] == 4


def test_a_state_of_another_run_is_refused():
    with pytest.raises(UserError, match="no adam_mean, adam_square, log_variances, steps of uncertainty weighting"):
        UncertaintyWeighting().restore({})
    with pytest.raises(UserError, match="log_variances has 7 timestep clusters; there must be 8"):
        UncertaintyWeighting().restore(UncertaintyWeighting().state() | {"log_variances": [0.0] * 7})
