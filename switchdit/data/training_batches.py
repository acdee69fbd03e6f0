"""What each step of a run trains on, as a function of (seed, step, rank) alone.

A run walks through an endless sequence of positions: epoch after epoch, each a new permutation of the images. Step s
owns positions ``s * global_batch`` and up, cut into micro-batches and ranks. Everything random about a position (flip,
timestep, label dropout, the latent's draw from its posterior, the noise) comes from a generator of its own, so that a
resumed run needs no replay and the same run on more processes sees the same samples.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from switchdit.diffusion.weightings import NUM_CLUSTERS, cluster_bounds
from switchdit.errors import UserError, nearest
from switchdit.random_streams import random_stream


class Moments(Protocol):
    """What is needed of a `LatentDataset`."""

    labels: np.ndarray
    latent_shape: tuple[int, int, int]
    scale_factor: float

    def moments(self, indices: np.ndarray, flipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass
class Batch:
    """n samples.

    Attributes:
        x0: (n, C, H, W) float32 latents, scaled.
        noise: (n, C, H, W) float32 standard normal.
        t: (n,) int64 timesteps, or float32 times above 0 and below 1; y: (n,) int64 labels; drop_label: (n,) bool.
        index: (n,) int64 positions in the data set.
        gate_noise: (n, number of gates) float32 standard normal, where asked for.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    y: Tensor
    drop_label: Tensor
    index: Tensor
    gate_noise: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        tensors = {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}
        return Batch(**{name: x.pin_memory().to(device, non_blocking=True) for name, x in tensors.items()})


class EpochOrder:
    """Image at each position of the endless sequence: one permutation of all images after the other."""

    def __init__(self, num_images: int, seed: int):
        self.num_images, self.seed = num_images, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        out = np.empty(len(positions), dtype=np.int64)
        epochs, within = np.divmod(positions, self.num_images)
        for epoch in np.unique(epochs):
            if epoch != self._epoch:
                stream = random_stream(self.seed, "epoch order", int(epoch))
                self._epoch, self._permutation = epoch, stream.permutation(self.num_images)
            here = epochs == epoch
            out[here] = self._permutation[within[here]]
        return out


def _uniform_timestep(stream: np.random.Generator, position: int, num_timesteps: int) -> int:
    return stream.integers(num_timesteps)


def _timestep_of_cluster(stream: np.random.Generator, position: int, num_timesteps: int) -> int:
    """Clusters in turn, so that any batch has its share of each; uniform within (Switch-DiT's, for all batch sizes)."""
    return stream.integers(*cluster_bounds(position % NUM_CLUSTERS, num_timesteps))


def _uniform_time(stream: np.random.Generator, position: int, num_timesteps: int) -> float:
    return (stream.integers(2**23) + 0.5) / 2**23  # exact in float32, and neither 0 nor 1


def _logit_normal_time(stream: np.random.Generator, position: int, num_timesteps: int) -> float:
    return logit_normal(stream.standard_normal())


def logit_normal(z: float) -> float:
    """The time of a standard normal ``z``: sigmoid(z) (Esser et al. 2024, arXiv 2403.03206, Sec. 3.1)."""
    return 1 / (1 + math.exp(-z))


TIME_DISTRIBUTIONS = {
    "uniform": (_uniform_timestep, np.int64),
    "clusters": (_timestep_of_cluster, np.int64),
    "flow_uniform": (_uniform_time, np.float32),
    "flow_logit_normal": (_logit_normal_time, np.float32),
}


def make_batch(
    dataset: Moments,
    order: EpochOrder,
    positions: np.ndarray,
    *,
    num_timesteps: int,
    label_dropout: float,
    horizontal_flip: bool,
    time_distribution: str = "uniform",
    gate_noise: int = 0,
) -> Batch:
    """The samples at ``positions``.

    Args:
        time_distribution: ``"uniform"`` over 0 .. num_timesteps - 1; ``"clusters"``: position p of the run gets a
            timestep of cluster p mod 8; ``"flow_uniform"`` or ``"flow_logit_normal"``: times between 0 and 1.
        gate_noise: how many gates get noise; with 0 the batch has none. The other draws do not depend on it.

    Raises:
        UserError: unknown distribution, or fewer timesteps than clusters.
    """
    if time_distribution not in TIME_DISTRIBUTIONS:
        hint = nearest(time_distribution, TIME_DISTRIBUTIONS)
        raise UserError(f"time distribution '{time_distribution}' is unknown{hint}")
    if time_distribution == "clusters" and num_timesteps < NUM_CLUSTERS:
        raise UserError(f"num_timesteps is {num_timesteps}; timestep clusters need at least {NUM_CLUSTERS}")
    draw_time, time_type = TIME_DISTRIBUTIONS[time_distribution]
    n, shape = len(positions), dataset.latent_shape
    index = order[positions]
    flipped, drop_label = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    t = np.empty(n, dtype=time_type)
    gates = np.empty((n, gate_noise), dtype=np.float32)
    draw, noise = np.empty((n, *shape), dtype=np.float32), np.empty((n, *shape), dtype=np.float32)
    for i, position in enumerate(positions):
        stream = random_stream(order.seed, "sample", int(position))
        flip, drop = stream.random(2)
        flipped[i], drop_label[i] = horizontal_flip and flip < 0.5, drop < label_dropout
        t[i] = draw_time(stream, int(position), num_timesteps)
        stream.standard_normal(out=draw[i], dtype=np.float32)
        stream.standard_normal(out=noise[i], dtype=np.float32)
        stream.standard_normal(out=gates[i], dtype=np.float32)
    mean, std = dataset.moments(index, flipped)
    x0 = (mean + std * draw) * np.float32(dataset.scale_factor)
    arrays = (x0, noise, t, dataset.labels[index].astype(np.int64), drop_label, index)
    tensors = (torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)
    return Batch(*tensors, gate_noise=torch.from_numpy(gates) if gate_noise else None)


class TrainingBatches:
    """All micro-batches of one rank, made ahead of their use on a thread.

    Args:
        seed, rank, world_size, micro_batch, accumulation: of the run; the last three multiply to the global batch.
        sample_options: those of `make_batch`.
    """

    READ_AHEAD = 4

    def __init__(
        self,
        dataset: Moments,
        *,
        seed: int,
        rank: int,
        world_size: int,
        micro_batch: int,
        accumulation: int,
        **sample_options,
    ):
        self.dataset, self.order = dataset, EpochOrder(len(dataset.labels), seed)
        self.rank, self.world_size = rank, world_size
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.sample_options = sample_options

    def positions(self, step: int, micro_step: int) -> np.ndarray:
        """(micro_batch,) positions; over all ranks and micro-steps they tile the step's global batch."""
        slice_of_step = (step * self.accumulation + micro_step) * self.world_size + self.rank
        return np.arange(slice_of_step * self.micro_batch, (slice_of_step + 1) * self.micro_batch)

    def images_of_step(self, step: int) -> np.ndarray:
        """(global batch,) positions in the data set of all that ``step`` sees, on all ranks."""
        global_batch = self.accumulation * self.world_size * self.micro_batch
        return self.order[np.arange(step * global_batch, (step + 1) * global_batch)]

    def batch(self, step: int, micro_step: int) -> Batch:
        return make_batch(self.dataset, self.order, self.positions(step, micro_step), **self.sample_options)

    def iterate(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Micro-batches of steps ``first_step`` to ``last_step - 1``; an error in the thread is raised here."""
        ready: queue.Queue = queue.Queue(self.READ_AHEAD)
        stop = threading.Event()

        def put(item) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                for step in range(first_step, last_step):
                    for micro_step in range(self.accumulation):
                        if stop.is_set():
                            return
                        put(self.batch(step, micro_step))
                put(None)
            except Exception as problem:  # handed to the consumer, which raises it
                put(problem)

        thread = threading.Thread(target=produce, name="training-batches", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()
