"""Metrics on features: against OpenAI's evaluator (golden/ADM.md) and against independent formulas in float64."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tools.distances
from tools.adm_metrics import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbour_radii,
    precision_recall,
)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def reference():
    return dict(np.load(GOLDEN / "adm_reference.npz"))


@pytest.fixture(scope="module")
def sample():
    return dict(np.load(GOLDEN / "adm_sample.npz"))


def statistics_of(features):
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics.mean(), statistics.covariance()


def test_fid_equals_the_evaluators(reference, sample):
    fid = frechet_distance(*statistics_of(reference["features"]), *statistics_of(sample["features"]))
    # The evaluator's means are float32; 5.6e-8 is what that makes.
    assert fid == pytest.approx(float(sample["fid"]), rel=1e-7)


def test_precision_and_recall_equal_the_evaluators(reference, sample):
    assert precision_recall(reference["features"], sample["features"]) == tuple(sample["precision_recall"])


@pytest.fixture(params=[10_000, 700])
def block_size(request, monkeypatch):
    """One block, as the goldens have, and several, whose mirrored halves come from the same products."""
    monkeypatch.setattr(tools.distances, "BLOCK", request.param)
    monkeypatch.setattr(tools.distances, "STRIP", request.param // 7)


@pytest.mark.usefixtures("block_size")
def test_float16_radii_are_the_evaluators_within_two_steps(reference, sample):
    for golden in (reference, sample):
        radii = neighbour_radii(torch.from_numpy(golden["features"])).numpy()
        # Sums within a dot product are ordered otherwise there: three in four are equal, none is 2 steps (2**-9) off.
        assert (radii == golden["radii"]).mean() > 0.7
        np.testing.assert_allclose(radii, golden["radii"], rtol=2**-9)


@pytest.mark.usefixtures("block_size")
def test_overflow_of_float16_falls_back_to_float32(reference):
    radii = neighbour_radii(torch.from_numpy(reference["features"] * 60)).numpy()
    np.testing.assert_allclose(radii, reference["radii_times_60"], rtol=1e-6)


@pytest.mark.usefixtures("block_size")
def test_float64_radii_equal_the_golden_ones(reference, sample):
    for golden in (reference, sample):
        radii = neighbour_radii(torch.from_numpy(golden["features"]), distances="float64").numpy()
        np.testing.assert_allclose(radii, golden["radii_float64"], rtol=1e-12)


@pytest.mark.parametrize("count", [10_000, 12_000])
def test_inception_score_equals_the_evaluators_to_the_last_bit(count):
    first, second = np.load(GOLDEN / "adm_score_1.npz"), np.load(GOLDEN / "adm_score_2.npz")
    logits = np.concatenate([first["features"], second["features"]])[:count] @ first["weights"]
    golden = float(first[f"score_{count}"])
    assert inception_score(torch.from_numpy(logits).softmax(1).numpy()) == pytest.approx(golden, rel=2e-7)
    exact = inception_score(torch.from_numpy(logits).double().softmax(1).numpy())
    assert exact == pytest.approx(golden, rel=1.1e-6)  # the evaluator's own float32 error


def test_inception_score_known_values():
    certain = np.eye(8)[np.arange(64) % 8]
    assert inception_score(certain) == pytest.approx(8)  # 0 log 0 = 0; the evaluator gives nan
    assert inception_score(np.full((64, 8), 1 / 8)) == pytest.approx(1)
    # splits in file order: two of one class each, and a short one that weighs as much
    ordered = np.concatenate([np.tile(np.eye(2)[0], (10, 1)), np.eye(2)])
    assert inception_score(ordered, split_size=10) == pytest.approx((1 + 2) / 2)
    with pytest.raises(ValueError, match="needs images"):
        inception_score(np.zeros((0, 4)))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    parts=st.lists(st.lists(st.integers(0, 700), max_size=4), min_size=1, max_size=4),
    offset=st.sampled_from([0.0, 1e4]),
)
def test_statistics_do_not_depend_on_batches_or_merging(seed, parts, offset):
    rng = np.random.default_rng(seed)
    merged, rows = FeatureStatistics(3), [rng.normal(offset, 1, (2, 3))]
    merged.update(rows[0])
    for part in parts:
        other = FeatureStatistics(3)
        for size in part:
            rows.append(rng.normal(offset, 1, (size, 3)))
            other.update(rows[-1])
        if other.count > 1:  # also by way of its moments
            other = FeatureStatistics.of(other.count, other.mean(), other.covariance())
        merged.merge(other)
    rows = np.concatenate(rows)
    assert merged.count == len(rows)
    np.testing.assert_allclose(merged.mean(), rows.mean(axis=0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(merged.covariance(), np.cov(rows.T), rtol=1e-9, atol=1e-9)


def test_statistics_refuse_what_they_cannot_take():
    statistics = FeatureStatistics(3)
    with pytest.raises(ValueError, match="no features"):
        statistics.mean()
    with pytest.raises(ValueError, match="shape"):
        statistics.update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="not finite"):
        statistics.update(np.array([[1.0, np.nan, 0.0]]))
    statistics.update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="at least 2 rows"):
        statistics.covariance()
    with pytest.raises(ValueError, match="merge"):
        statistics.merge(FeatureStatistics(4))


def test_frechet_distance_equals_sqrtm_on_full_rank():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(24, 24))
    first, second = rng.normal(size=(200, 24)) @ mix, rng.normal(0.3, 2, (300, 24))
    mu1, sigma1, mu2, sigma2 = *statistics_of(first), *statistics_of(second)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * np.trace(root.real)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_is_exact_with_fewer_images_than_features():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(40, 120)) * np.linspace(0.1, 3, 120), rng.normal(0.1, 1, (60, 120))
    centred1, centred2 = first - first.mean(0), second - second.mean(0)
    # tr (S1 S2)^(1/2) is the nuclear norm of the product of the centred data
    nuclear = np.linalg.svd(centred1 @ centred2.T, compute_uv=False).sum() / np.sqrt(39 * 59)
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + (centred1**2).sum() / 39 + (centred2**2).sum() / 59
    got = frechet_distance(*statistics_of(first), *statistics_of(second))
    assert got == pytest.approx(expected - 2 * nuclear, rel=1e-12)


def test_frechet_distance_of_equal_and_of_degenerate_distributions():
    mu, sigma = statistics_of(np.random.default_rng(2).normal(size=(50, 10)))
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(mu, sigma, mu + 2, 0 * sigma) == pytest.approx(40 + np.trace(sigma))


def test_frechet_distance_warns_of_an_imaginary_part():
    sigma = np.diag([1.0, 1.0, -0.01])
    with pytest.warns(UserWarning, match="negative eigenvalue -0.01"):
        assert np.isfinite(frechet_distance(np.zeros(3), sigma, np.zeros(3), np.eye(3)))


def test_frechet_distance_adds_epsilon_when_a_decomposition_fails(monkeypatch):
    real, calls = np.linalg.eigh, []

    def failing_at_first(matrix):
        calls.append(matrix)
        if len(calls) == 1:
            raise np.linalg.LinAlgError("Eigenvalues did not converge")
        return real(matrix)

    monkeypatch.setattr(np.linalg, "eigh", failing_at_first)
    with pytest.warns(UserWarning, match="adding 1e-06"):
        assert frechet_distance(np.zeros(3), np.eye(3), np.ones(3), np.eye(3)) == pytest.approx(3, abs=1e-5)


def test_frechet_distance_refuses_shapes_and_infinities():
    with pytest.raises(ValueError, match="different shapes"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.zeros(2), np.eye(2), np.array([0, np.inf]), np.eye(2))


@pytest.mark.parametrize("distances", ["float16", "float32", "float64"])
def test_known_radii_are_used_and_change_nothing(reference, sample, distances):
    sets = [golden["features"][:200] for golden in (reference, sample)]
    radii = [neighbour_radii(features, distances=distances).numpy() for features in sets]
    computed = precision_recall(*sets, distances=distances)
    assert precision_recall(*sets, 3, distances, *radii) == computed
    assert precision_recall(*sets, 3, distances, None, 0 * radii[1])[1] < computed[1]
    with pytest.raises(ValueError, match=r"\(200,\) radii for 199 images"):
        precision_recall(sets[0][:199], sets[1], 3, distances, radii[0])


def test_radii_that_float16_does_not_have_are_compared_in_float32():
    # Reference 0 and sample 0 are 3 apart; float16 would round the radius of 8.999 up to 9.
    reference, sample = -torch.arange(4.0)[:, None], 3 + torch.arange(4.0)[:, None]
    assert precision_recall(reference, sample, 3, "float16", torch.tensor([9.0, 1, 1, 1]), torch.zeros(4)) == (0.25, 0)
    assert precision_recall(reference, sample, 3, "float16", torch.tensor([8.999, 1, 1, 1]), torch.zeros(4)) == (0, 0)


def brute_force(reference, sample, k):
    def squared(a, b):
        return ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1)

    def radii(a):
        return np.sort(squared(a, a), axis=1)[:, k]

    between = squared(reference, sample)
    precision = (between <= radii(reference)[:, None]).any(axis=0).mean()
    return precision, (between <= radii(sample)[None]).any(axis=1).mean()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [(10_000, 1_000), (90, 40)])
def test_float64_precision_and_recall_equal_brute_force(monkeypatch, k, block):
    monkeypatch.setattr(tools.distances, "BLOCK", block[0])
    monkeypatch.setattr(tools.distances, "STRIP", block[1])
    rng = np.random.default_rng(3)
    reference, sample = rng.normal(size=(230, 6)).astype(np.float32), rng.normal(0.6, 0.8, (170, 6)).astype(np.float32)
    assert precision_recall(reference, sample, k, "float64") == pytest.approx(brute_force(reference, sample, k))


@pytest.mark.parametrize("distances", ["float16", "float32", "float64"])
def test_blocks_do_not_change_precision_and_recall(monkeypatch, reference, sample, distances):
    sets = reference["features"][:300], sample["features"][:250]
    whole = precision_recall(*sets, distances=distances)
    monkeypatch.setattr(tools.distances, "BLOCK", 140)
    monkeypatch.setattr(tools.distances, "STRIP", 60)
    assert precision_recall(*sets, distances=distances) == pytest.approx(whole, abs=0.004)


def test_precision_and_recall_refuse_too_few_rows_and_unknown_distances():
    with pytest.raises(ValueError, match="need at least 4 images, got 3"):
        precision_recall(np.zeros((3, 2), np.float32), np.zeros((9, 2), np.float32))
    with pytest.raises(ValueError, match="'float8'; valid are: float16, float32, float64"):
        precision_recall(np.zeros((9, 2), np.float32), np.zeros((9, 2), np.float32), distances="float8")


def test_kernel_distance_equals_its_definition():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(30, 7)).astype(np.float32), rng.normal(0.4, 1.2, (25, 7)).astype(np.float32)

    def kernel(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / 7 + 1) ** 3

    def mean(a, b, same):
        return np.mean([kernel(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)])

    # subsets as large as the sets: each is a permutation of all
    y = y[:25]
    expected = mean(x[:25], x[:25], True) + mean(y, y, True) - 2 * mean(x[:25], y, False)
    assert kernel_distance(x[:25], y, subsets=3, subset_size=25) == pytest.approx(expected, rel=1e-10)
    # an average over subsets is unbiased
    whole = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert kernel_distance(x, y, subsets=4000, subset_size=8) == pytest.approx(whole, rel=0.05)


def test_kernel_distance_of_one_distribution_is_zero_on_average_and_repeats():
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(2, 500, 16)).astype(np.float32)
    shifted = kernel_distance(x, y + 0.5, subset_size=200)
    assert abs(kernel_distance(x, y, subset_size=200)) < 0.05 * shifted
    assert kernel_distance(x, y + 0.5, subset_size=200) == shifted
    assert kernel_distance(x, y + 0.5, subset_size=200, seed=1) != shifted
    for subsets, size in ((0, 10), (1, 1), (1, 501)):
        with pytest.raises(ValueError, match=f"{subsets} subsets of {size} images; there are 500"):
            kernel_distance(x, y, subsets, size)
