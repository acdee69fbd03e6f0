"""All images of a set through a feature network, on one process or on several that take a part of it each.

What several processes find is what one would: batches are cut at the same images, and joined in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from switchdit.errors import UserError
from switchdit.progress import progress
from tools.adm_metrics import FeatureStatistics
from tools.feature_network import FeatureNetwork
from tools.image_sets import ImageSet
from tools.processes import Processes

# N = images, F = features, G = spatial features, K = classes

FIRST_ROWS = 1 << 16  # room made at first; more only for images that really come


@dataclass(frozen=True)
class Moments:
    """count, mean (F,) and covariance (F, F; zero for fewer than two rows) of features, float64."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray


@dataclass
class SetFeatures:
    """What is kept of N images.

    pooled: (N, F) float32. probabilities: (N, K) float32, or None for a network without classes.
    pooled_moments, spatial_moments: of the pooled and of the spatial features; None where there are none.
    """

    pooled: np.ndarray
    probabilities: np.ndarray | None
    pooled_moments: Moments
    spatial_moments: Moments | None


def extract(network: FeatureNetwork, images: ImageSet, batch_size: int, processes: Processes) -> SetFeatures | None:
    """Features of the whole set on rank 0, None on the others.

    Raises:
        UserError: features that are not finite, or a damaged image.
    """
    start, stop = processes.share(images.count, batch_size)
    part = _extract_part(network, images, batch_size, start, stop)
    if processes.rank == 0:
        _add_other_parts(part, images.count, batch_size, processes.world_size)
        return part
    if part is not None:
        _send(part)
    return None


def _extract_part(
    network: FeatureNetwork, images: ImageSet, batch_size: int, start: int, stop: int
) -> SetFeatures | None:
    """Of images ``start`` to ``stop``; None where there are none."""
    kept, seen = None, start
    of_all = "" if stop - start == images.count else f" (of {images.count})"
    with progress(desc=f"features of {images.path.name}{of_all}", total=stop - start, unit="image") as bar:
        for batch in _one_ahead(images.batches(batch_size, start, stop)) if start < stop else ():
            features = network(batch)
            arrays = (features.pooled, features.probabilities, features.pooled, features.spatial)
            if not all(array is None or np.isfinite(array).all() for array in arrays[1:]):
                raise UserError(
                    f"the network {network.description['file']} makes features that are not finite of "
                    f"images {seen} to {seen + len(batch) - 1} of {images.option} {images.path}"
                )
            if kept is None:  # the first batch shows how many features there are
                pooled, probabilities, _, spatial = (array is not None and array.shape[1] for array in arrays)
                kept = (
                    Rows(stop - start, pooled),
                    Rows(stop - start, probabilities) if probabilities else None,
                    FeatureStatistics(pooled),
                    FeatureStatistics(spatial) if spatial else None,
                )
            for holder, array in zip(kept, arrays, strict=True):
                if holder is not None:
                    holder.update(array)
            seen += len(batch)
            bar.update(len(batch))
    if kept is None:
        return None
    rows, classes, pooled_statistics, spatial_statistics = kept
    return SetFeatures(
        rows.array,
        classes.array if classes else None,
        _moments(pooled_statistics),
        _moments(spatial_statistics) if spatial_statistics else None,
    )


def _one_ahead(batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same batches, each read while the one before passes through the network."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reader.submit(next, batches, None)
            yield batch


class Rows:
    """A float32 array that grows in place, so that a file which claims more images than it holds gets no memory."""

    def __init__(self, expected: int, columns: int):
        self.expected, self.count = expected, 0
        self.array = np.empty((min(expected, FIRST_ROWS), columns), np.float32)

    def update(self, new: np.ndarray) -> None:
        end = self.count + len(new)
        if end > len(self.array):
            _resize(self.array, min(self.expected, 2 * end))
        self.array[self.count : end] = new
        self.count = end


def _resize(array: np.ndarray, rows: int) -> None:
    array.resize((rows, array.shape[1]), refcheck=False)  # nobody else holds it yet


def _moments(statistics: FeatureStatistics) -> Moments:
    dimension, count = statistics.dimension, statistics.count
    covariance = statistics.covariance() if count > 1 else np.zeros((dimension, dimension))
    return Moments(count, statistics.mean(), covariance)


def merged(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of both."""
    statistics = FeatureStatistics.of(a.count, a.mean, a.covariance)
    statistics.merge(FeatureStatistics.of(b.count, b.mean, b.covariance))
    return _moments(statistics)


def on_device(array: np.ndarray) -> torch.Tensor:
    """The same numbers as a tensor, on this process's GPU if it has one."""
    return torch.from_numpy(array).to("cuda" if torch.cuda.is_available() else "cpu")


# -------------------------------------------------------------------------------------- several processes


def _add_other_parts(part: SetFeatures, count: int, batch_size: int, world_size: int) -> None:
    """Append to rank 0's part what the other ranks send."""
    for array in (part.pooled, part.probabilities):
        if array is not None and len(array) < count:
            _resize(array, count)
    for rank in range(1, world_size):
        start, stop = Processes(rank, world_size).share(count, batch_size)
        if start == stop:
            continue
        other = _receive(rank, stop - start)
        for ours, theirs in ((part.pooled, other.pooled), (part.probabilities, other.probabilities)):
            if ours is not None:
                ours[start:stop] = theirs
        part.pooled_moments = merged(part.pooled_moments, other.pooled_moments)
        if part.spatial_moments is not None:
            part.spatial_moments = merged(part.spatial_moments, other.spatial_moments)


def _send(part: SetFeatures) -> None:
    spatial = part.spatial_moments
    sizes = [
        part.pooled.shape[1],
        0 if part.probabilities is None else part.probabilities.shape[1],
        0 if spatial is None else len(spatial.mean),
    ]
    dist.send(torch.tensor(sizes), 0)
    for array in (part.pooled, part.probabilities):
        if array is not None:
            dist.send(torch.from_numpy(array), 0)
    for moments in (part.pooled_moments, spatial):
        if moments is not None:
            dist.send(torch.from_numpy(np.vstack([moments.mean, moments.covariance])), 0)


def _receive(rank: int, count: int) -> SetFeatures:
    sizes = torch.empty(3, dtype=torch.int64)
    dist.recv(sizes, rank)
    features, classes, spatial = sizes.tolist()

    def array(shape: Sequence[int], dtype: torch.dtype) -> np.ndarray:
        tensor = torch.empty(shape, dtype=dtype)
        dist.recv(tensor, rank)
        return tensor.numpy()

    pooled = array((count, features), torch.float32)
    probabilities = array((count, classes), torch.float32) if classes else None
    tables = [array((size + 1, size), torch.float64) for size in (features, spatial) if size]
    moments = [Moments(count, table[0], table[1:]) for table in tables]
    return SetFeatures(pooled, probabilities, moments[0], moments[1] if spatial else None)
