"""Data order and draws: functions of (seed, position), independent of who asks and when."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from switchdit.data.training_batches import EpochOrder, TrainingBatches, logit_normal
from switchdit.errors import UserError

GOLDEN = Path(__file__).parent / "golden"


class Toy:
    """Latents that say which image they are of, and whether it is flipped."""

    latent_shape, scale_factor = (1, 2, 2), 0.5

    def __init__(self, num_images: int):
        self.labels = np.arange(num_images) % 3

    def moments(self, indices, flipped):
        mean = np.zeros((len(indices), *self.latent_shape), dtype=np.float32)
        mean[:, 0, 0, 0], mean[:, 0, 0, 1] = indices, flipped
        return mean, np.zeros_like(mean)


def make(num_images=10, rank=0, world_size=1, micro_batch=4, accumulation=1, seed=0, **options) -> TrainingBatches:
    options = {"num_timesteps": 1000, "label_dropout": 0.1, "horizontal_flip": True, **options}
    return TrainingBatches(
        Toy(num_images),
        seed=seed,
        rank=rank,
        world_size=world_size,
        micro_batch=micro_batch,
        accumulation=accumulation,
        **options,
    )


@given(num_images=st.integers(1, 30), seed=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(num_images, seed):
    order = EpochOrder(num_images, seed)
    epochs = order[np.arange(3 * num_images)].reshape(3, num_images)
    assert (np.sort(epochs, axis=1) == np.arange(num_images)).all()
    if num_images > 10:
        assert (epochs[0] != epochs[1]).any()


@settings(deadline=None, max_examples=25)
@given(
    step=st.integers(0, 50),
    world_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    micro_batch=st.integers(1, 3),
    num_images=st.integers(1, 40),
)
def test_processes_and_micro_steps_tile_the_global_batch(step, world_size, accumulation, micro_batch, num_images):
    total = world_size * accumulation * micro_batch
    [whole] = make(num_images, micro_batch=total).iterate(step, step + 1)
    parts = []
    for micro_step in range(accumulation):
        for rank in range(world_size):
            batches = make(num_images, rank, world_size, micro_batch, accumulation)
            parts.append(batches.batch(step, micro_step))
    for field in ("x0", "noise", "t", "y", "drop_label", "index"):
        assert torch.equal(torch.cat([getattr(p, field) for p in parts]), getattr(whole, field)), field


def test_starting_in_the_middle_repeats_nothing_and_skips_nothing():
    through = list(make(accumulation=2).iterate(0, 8))
    resumed = list(make(accumulation=2).iterate(5, 8))
    assert len(through) == 16
    for a, b in zip(through[10:], resumed, strict=True):
        assert torch.equal(a.noise, b.noise)
        assert torch.equal(a.index, b.index)
    assert not torch.equal(through[0].noise, through[1].noise)
    assert not torch.equal(make(seed=1).batch(0, 0).noise, through[0].noise)


def test_what_is_drawn():
    batch = make(num_images=7, micro_batch=4000).batch(0, 0)
    assert torch.equal(batch.x0[:, 0, 0, 0], 0.5 * batch.index.float())
    assert torch.equal(batch.y, batch.index % 3)
    flipped = batch.x0[:, 0, 0, 1] > 0
    assert flipped.float().mean() == pytest.approx(0.5, abs=0.04)
    assert batch.drop_label.float().mean() == pytest.approx(0.1, abs=0.02)
    assert stats.kstest(batch.t.numpy() / 1000, "uniform").pvalue > 1e-3
    assert stats.kstest(batch.noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert batch.t.min() >= 0 and batch.t.max() <= 999
    together = np.stack([flipped, batch.drop_label, batch.t > 499, batch.noise[:, 0, 0, 0] > 0]).astype(float)
    assert np.abs(np.corrcoef(together) - np.eye(4)).max() < 0.06
    assert not make(micro_batch=100, horizontal_flip=False).batch(0, 0).x0[:, 0, 0, 1].any()


def draws(**options):
    return make(micro_batch=4003, seed=3, **options).batch(2, 0)


@pytest.mark.parametrize(
    ("distribution", "gate_noise"),
    [("clusters", 0), ("flow_uniform", 0), ("flow_logit_normal", 0), ("uniform", 6), ("clusters", 5)],
)
def test_options_leave_the_other_draws_alone(distribution, gate_noise):
    """Gate noise comes last; times of another distribution move those that follow them, and nothing else."""
    plain, batch = draws(), draws(time_distribution=distribution, gate_noise=gate_noise)
    for field in ("y", "drop_label", "index", *(("t", "x0", "noise") if distribution == "uniform" else ())):
        assert torch.equal(getattr(batch, field), getattr(plain, field)), field
    if not gate_noise:
        assert batch.gate_noise is None
        return
    assert batch.gate_noise.shape == (4003, gate_noise)
    assert batch.gate_noise.dtype == torch.float32
    assert stats.kstest(batch.gate_noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert torch.corrcoef(batch.gate_noise.T).fill_diagonal_(0).abs().max() < 0.06
    assert batch.to(torch.device("cpu")).gate_noise is batch.gate_noise


@pytest.mark.parametrize("gate_noise", [0, 2])
def test_a_batch_moves_with_what_it_has(monkeypatch, gate_noise):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a GPU
    batch = make(gate_noise=gate_noise).batch(0, 0)
    moved = batch.to(torch.device("meta"))
    assert all(x.is_meta for x in (moved.x0, moved.noise, moved.t, moved.y, moved.drop_label, moved.index))
    assert moved.x0.shape == batch.x0.shape
    assert moved.gate_noise is None if gate_noise == 0 else moved.gate_noise.is_meta


@settings(deadline=None, max_examples=25)
@given(num_timesteps=st.integers(8, 1100), micro_batch=st.integers(1, 20), step=st.integers(0, 9))
def test_timesteps_by_cluster(num_timesteps, micro_batch, step):
    """Position p of the run has a timestep of cluster p mod 8, for every batch size; none is dropped."""
    batches = make(micro_batch=micro_batch, num_timesteps=num_timesteps, time_distribution="clusters")
    batch = batches.batch(step, 0)
    assert batch.t.shape == (micro_batch,)
    assert batch.t.dtype == torch.int64
    assert batch.t.min() >= 0
    assert batch.t.max() < num_timesteps
    assert (batch.t * 8 // num_timesteps).tolist() == (batches.positions(step, 0) % 8).tolist()


def test_timesteps_by_cluster_are_uniform_within_it():
    t = draws(time_distribution="clusters").t.numpy()
    for cluster in range(8):
        mine = t[t * 8 // 1000 == cluster]
        assert stats.kstest((mine % 125 + 0.5) / 125, "uniform").pvalue > 1e-3
        assert (mine.min() - 125 * cluster, mine.max() - 125 * cluster) <= (3, 124)


@pytest.mark.parametrize(
    ("distribution", "cdf"),
    [("flow_uniform", "uniform"), ("flow_logit_normal", lambda t: stats.norm.cdf(np.log(t / (1 - t))))],
)
def test_times_of_a_flow(distribution, cdf):
    t = draws(time_distribution=distribution).t
    assert t.dtype == torch.float32
    assert 0 < t.min() < t.max() < 1
    assert stats.kstest(t.double().numpy(), cdf).pvalue > 1e-3
    assert len(t.unique()) > 3990


def test_published_logit_normal_times():
    with np.load(GOLDEN / "rectified_flow.npz") as golden:
        ours = [logit_normal(z) for z in golden["ln/drawn"].astype(np.float64)]
        np.testing.assert_allclose(ours, golden["ln/t"], rtol=2e-7)
        assert (golden["uniform/drawn"] == golden["uniform/t"]).all()  # uniform times are used as drawn


def test_impossible_times():
    with pytest.raises(UserError, match="'cluster' is unknown; did you mean 'clusters'"):
        make(time_distribution="cluster").batch(0, 0)
    with pytest.raises(UserError, match="num_timesteps is 7; timestep clusters need at least 8"):
        make(time_distribution="clusters", num_timesteps=7).batch(0, 0)


def test_posterior_is_sampled():
    class Spread(Toy):
        def moments(self, indices, flipped):
            mean, std = super().moments(indices, flipped)
            return np.full_like(mean, 3.0), np.full_like(std, 2.0)

    batches = make(micro_batch=2000)
    batches.dataset = Spread(10)
    x0 = batches.batch(0, 0).x0
    assert x0.mean().item() == pytest.approx(0.5 * 3, abs=0.05)
    assert x0.std().item() == pytest.approx(0.5 * 2, abs=0.05)


def test_an_error_in_the_thread_reaches_the_loop():
    batches = make()
    batches.dataset.moments = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(batches.iterate(0, 1))
