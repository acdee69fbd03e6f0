"""The arithmetic of ADM's metrics, on features: Fréchet distance, Inception Score, precision and recall.

The protocol is that of OpenAI's guided-diffusion, `evaluations/evaluator.py`; where this file is more exact than the
evaluator, the docstring says so. Nothing here knows of files, images or networks.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from tools.distances import DISTANCES, strips

# N = images, F = features of an image, K = classes, R = reference images, S = sampled images

PENDING_ROWS = 1_024  # rows gathered before they are folded into a covariance
IMAGINARY_TOLERANCE = 1e-3  # ADM's, on the square root of the product of covariances


class FeatureStatistics:
    """Count, mean and covariance of feature vectors in one pass, in float64; two of them can be merged.

    Sums of squares are taken about the mean of each group of rows and joined by Chan, Golub and LeVeque's update
    (1979), so that features far from zero lose no digits.
    """

    def __init__(self, dimension: int):
        self.dimension = dimension
        self._count = 0
        self._mean = np.zeros(dimension)
        self._scatter = np.zeros((dimension, dimension))
        self._pending: list[np.ndarray] = []
        self._pending_rows = 0

    @classmethod
    def of(cls, count: int, mean: np.ndarray, covariance: np.ndarray) -> FeatureStatistics:
        """Of ``count`` rows that were seen elsewhere; mean (F,), covariance (F, F) as `covariance` gives it."""
        statistics = cls(len(mean))
        statistics._join(count, mean, covariance * (count - 1))
        return statistics

    @property
    def count(self) -> int:
        """Rows seen."""
        return self._count + self._pending_rows

    def update(self, features: np.ndarray) -> None:
        """Take in rows (N, F) of any float type; ValueError for another shape or a value that is not finite."""
        if features.ndim != 2 or features.shape[1] != self.dimension:
            raise ValueError(f"features have shape {features.shape}; expected (N, {self.dimension})")
        if not np.isfinite(features).all():
            raise ValueError("features hold values that are not finite")
        if len(features) == 0:
            return
        self._pending.append(np.array(features))
        self._pending_rows += len(features)
        if self._pending_rows >= PENDING_ROWS:
            self._fold()

    def merge(self, other: FeatureStatistics) -> None:
        """Take in all that ``other`` has seen, as if its rows had been passed to `update` here."""
        if other.dimension != self.dimension:
            raise ValueError(f"cannot merge statistics of {other.dimension} features into those of {self.dimension}")
        self._fold()
        other._fold()
        self._join(other._count, other._mean, other._scatter)

    def mean(self) -> np.ndarray:
        """(F,) float64. Raises ValueError when nothing was seen."""
        self._fold()
        if self._count == 0:
            raise ValueError("no features to take the mean of")
        return self._mean.copy()

    def covariance(self) -> np.ndarray:
        """(F, F) float64, divided by N - 1 as `np.cov` does. Raises ValueError for fewer than two rows."""
        self._fold()
        if self._count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self._count}")
        return self._scatter / (self._count - 1)

    def _fold(self) -> None:
        if not self._pending:
            return
        rows = np.concatenate(self._pending).astype(np.float64)
        self._pending, self._pending_rows = [], 0
        mean = rows.mean(axis=0)
        rows -= mean
        self._join(len(rows), mean, rows.T @ rows)

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if count == 0:
            return
        total = self._count + count
        delta = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(delta, delta * (self._count * count / total))
        self._mean += delta * (count / total)
        self._count = total


def frechet_distance(
    mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray, eps: float = 1e-6
) -> float:
    """Squared Fréchet distance of two normal distributions, float64 (Heusel et al. 2017, arXiv 1706.08500, Eq. 6).

    |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2)), where the last trace is the sum of the
    singular values of A^T B for any A A^T = sigma1, B B^T = sigma2. The factors come from symmetric
    eigendecompositions, so covariances of fewer images than features (singular ones) are exact too, where the
    evaluator's `scipy.linalg.sqrtm` of the product is right to about 2e-6 or fails altogether.

    Two of the evaluator's checks are kept as warnings: a decomposition that fails is repeated with ``eps`` added to
    both diagonals, and a covariance so far from positive semi-definite that the root has an imaginary part above
    1e-3 (and above what rounding explains) is reported, where the evaluator raises ValueError.

    Args:
        mu1, mu2: (F,). sigma1, sigma2: (F, F), symmetric.

    Raises:
        ValueError: the shapes do not fit, or a value is not finite.
    """
    mu1, mu2 = np.asarray(mu1, np.float64), np.asarray(mu2, np.float64)
    sigma1, sigma2 = np.asarray(sigma1, np.float64), np.asarray(sigma2, np.float64)
    square = (mu1.size, mu1.size)
    if mu1.ndim != 1 or mu2.shape != mu1.shape or sigma1.shape != square or sigma2.shape != square:
        shapes = ", ".join(str(a.shape) for a in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"means and covariances of different shapes: {shapes}")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("means or covariances hold values that are not finite")
    try:
        root_trace = _trace_of_root(sigma1, sigma2)
    except np.linalg.LinAlgError:
        warnings.warn(f"the square root of the covariances failed; adding {eps} to their diagonals", stacklevel=2)
        offset = eps * np.eye(mu1.size)
        root_trace = _trace_of_root(sigma1 + offset, sigma2 + offset)
    difference = mu1 - mu2
    squared = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace
    return max(float(squared), 0.0)  # equal distributions round to a little below


def _trace_of_root(sigma1: np.ndarray, sigma2: np.ndarray) -> float:
    product = _factor(sigma1).T @ _factor(sigma2)
    return float(np.linalg.svd(product, compute_uv=False).sum()) if product.size else 0.0


def _factor(sigma: np.ndarray) -> np.ndarray:
    """A (F, rank) with A A^T = sigma (F, F); eigenvalues within rounding of zero, and negative ones, are left out."""
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    rounding = len(sigma) * np.finfo(np.float64).eps * np.abs(values).max()
    imaginary = np.sqrt(max(-values[0], 0.0))
    if imaginary > IMAGINARY_TOLERANCE and -values[0] > 100 * rounding:
        warnings.warn(
            f"a covariance has the negative eigenvalue {values[0]:.3g}; its root's imaginary part {imaginary:.3g} "
            "is left out",
            stacklevel=4,
        )
    keep = values > rounding
    return vectors[:, keep] * np.sqrt(values[keep])


def inception_score(probabilities: np.ndarray, split_size: int = 5_000) -> float:
    """exp of the mean KL divergence of class probabilities from their mean (Salimans et al. 2016, arXiv 1606.03498).

    As in the evaluator: splits of ``split_size`` in file order, not shuffled; a short last split weighs as much as
    the others; the mean over splits is returned. The arithmetic is that of the type of ``probabilities``: float32
    gives the evaluator's number to the last bit, about 1e-6 from float64's. Unlike there, 0 log 0 is 0, not nan.

    Args:
        probabilities: (N, K) float32 or float64, rows that sum to one.

    Raises:
        ValueError: no rows, or ``split_size`` below one.
    """
    if len(probabilities) == 0 or split_size < 1:
        raise ValueError(f"an Inception Score needs images and a split size; got {len(probabilities)}, {split_size}")
    scores = []
    for start in range(0, len(probabilities), split_size):
        part = probabilities[start : start + split_size]
        divergence = part * (_log(part) - _log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    return float(np.mean(scores))


def _log(p: np.ndarray) -> np.ndarray:
    """Natural logarithm, 0 where p is 0: for factors of p."""
    return np.log(np.where(p > 0, p, p.dtype.type(1)))


def precision_recall(
    reference: np.ndarray | Tensor,
    sample: np.ndarray | Tensor,
    k: int = 3,
    distances: str = "float16",
    reference_radii: np.ndarray | Tensor | None = None,
    sample_radii: np.ndarray | Tensor | None = None,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    Precision is the share of samples within the ball of some reference image, recall the share of reference images
    within the ball of some sample; a ball reaches to the k-th nearest neighbour in its own set.

    ``distances="float16"`` does as the evaluator: features, norms and dot products are rounded to float16, whose
    steps make ties and hence slightly higher values than the truth, which "float32" or "float64" give. A block of
    10,000 x 10,000 in which a float16 overflows is computed anew in float32, as there. Memory beside the features
    stays below 1 GB for 50,000 x 50,000.

    Args:
        reference: (R, F) float32. sample: (S, F) float32; tensors on a GPU are worked on there.
        reference_radii, sample_radii: (R,) and (S,) of `neighbour_radii` with the same k and distances, if they are
            known already.

    Raises:
        ValueError: fewer than k + 1 rows, radii of another number of rows, or an unknown ``distances``.
    """
    _check_distances(distances)
    reference, sample = torch.as_tensor(reference), torch.as_tensor(sample)
    radii = []
    for features, known in ((reference, reference_radii), (sample, sample_radii)):
        of_set = neighbour_radii(features, k, distances) if known is None else torch.as_tensor(known)
        if of_set.shape != (len(features),):
            raise ValueError(f"{tuple(of_set.shape)} radii for {len(features)} images")
        radii.append(of_set.to(features.device))
    sample_covered, reference_covered = _covered(reference, sample, *radii, distances)
    return sample_covered.double().mean().item(), reference_covered.double().mean().item()


def neighbour_radii(features: np.ndarray | Tensor, k: int = 3, distances: str = "float16") -> Tensor:
    """Squared distance (N,) of each row of (N, F) to its k-th nearest neighbour, float32 (float64 for "float64").

    As in the evaluator it is entry k of the row's sorted distances with the point itself among them; in float16 the
    distance to itself need not be 0. Raises ValueError for fewer than k + 1 rows or an unknown ``distances``.
    """
    _check_distances(distances)
    features = torch.as_tensor(features)
    if len(features) < k + 1:
        raise ValueError(f"the {k} nearest neighbours need at least {k + 1} images, got {len(features)}")
    wide = torch.float64 if distances == "float64" else torch.float32
    nearest = torch.full((len(features), k + 1), torch.inf, dtype=wide, device=features.device)
    for rows, _, squared in strips(features, features, distances, symmetric=True):
        candidates = squared.topk(min(k + 1, squared.shape[1]), largest=False).values.to(wide)
        nearest[rows] = torch.cat([nearest[rows], candidates], dim=1).topk(k + 1, largest=False).values
    return nearest.amax(dim=1).clamp_min_(0)


def kernel_distance(
    reference: np.ndarray, sample: np.ndarray, subsets: int = 100, subset_size: int = 1_000, seed: int = 0
) -> float:
    """Kernel distance, called KID with Inception's features (Bińkowski et al. 2018, arXiv 1801.01401, Sec. 4.2).

    The unbiased estimate of the squared maximum mean discrepancy with the kernel (x.y / F + 1)^3, in float64, averaged
    over random subsets drawn without replacement from both sets. It may fall below 0. Not one of ADM's metrics.

    Args:
        reference: (R, F). sample: (S, F). subset_size: images of each set in a subset, at least 2, at most R and S.

    Raises:
        ValueError: no subset, or a subset size out of range.
    """
    smaller = min(len(reference), len(sample))
    if subsets < 1 or not 2 <= subset_size <= smaller:
        raise ValueError(f"{subsets} subsets of {subset_size} images; there are {smaller}")
    stream = np.random.default_rng(seed)
    total = 0.0
    for _ in range(subsets):
        x, y = (features[stream.choice(len(features), subset_size, replace=False)] for features in (reference, sample))
        x, y = x.astype(np.float64), y.astype(np.float64)
        pairs = subset_size * (subset_size - 1)
        within = sum(kernel.sum() - kernel.trace() for kernel in (_cubic_kernel(x, x), _cubic_kernel(y, y)))
        total += within / pairs - 2 * _cubic_kernel(x, y).mean()
    return float(total / subsets)


def _cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, M), of all pairs of rows of (N, F) and (M, F)."""
    products = x @ y.T / x.shape[1] + 1
    return products * products * products


def _check_distances(distances: str) -> None:
    if distances not in DISTANCES:
        raise ValueError(f"distances is '{distances}'; valid are: {', '.join(DISTANCES)}")


def _covered(
    reference: Tensor, sample: Tensor, reference_radii: Tensor, sample_radii: Tensor, distances: str
) -> tuple[Tensor, Tensor]:
    """(S,) bool: samples in a reference ball; (R,) bool: reference images in a sample's ball."""
    sample_covered = torch.zeros(len(sample), dtype=torch.bool, device=sample.device)
    reference_covered = torch.zeros(len(reference), dtype=torch.bool, device=sample.device)
    # Radii of blocks that overflowed float16 need not be numbers that it has.
    exact = all(torch.equal(r.to(DISTANCES[distances]).to(r.dtype), r) for r in (reference_radii, sample_radii))
    for rows, columns, squared in strips(reference, sample, distances):
        squared = squared if exact else squared.to(reference_radii.dtype)
        radii = reference_radii[rows, None].to(squared.dtype)
        # A difference has the sign of the comparison, and its minimum is several times as fast.
        sample_covered[columns] |= (squared - radii).amin(dim=0) <= 0
        reference_covered[rows] |= (squared - sample_radii[None, columns].to(squared.dtype)).amin(dim=1) <= 0
    return sample_covered, reference_covered
