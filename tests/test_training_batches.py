"""Data order and draws: functions of (seed, position), independent of who asks and when."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from switchdit.data.training_batches import EpochOrder, TrainingBatches


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
