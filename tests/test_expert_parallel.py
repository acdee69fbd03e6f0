"""Experts on other processes change nothing: losses, gradients, clipping, parameters and their average."""

import numpy as np
import pytest
from launching import WORKERS, launched

TOPOLOGIES = [(2, 1), (2, 2), (4, 2)]
TOLERANCE = 1e-5  # float32, relative to the largest entry of a tensor


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each (processes, ep_size) came to, trained on demand."""
    folder, done = tmp_path_factory.mktemp("expert_parallel"), {}

    def of(num_processes: int, ep_size: int) -> dict[str, np.ndarray]:
        if (num_processes, ep_size) not in done:
            path = folder / f"{num_processes}_{ep_size}.npz"
            launched(num_processes, WORKERS / "expert_parallel.py", ep_size, path)
            done[num_processes, ep_size] = dict(np.load(path))
        return done[num_processes, ep_size]

    return of


def slow(ep_size: int) -> list[pytest.MarkDecorator]:
    """Data parallelism alone is also what test_train.py tries, with more or fewer processes."""
    return [pytest.mark.slow] if ep_size == 1 else []


@pytest.mark.parametrize(
    ("num_processes", "ep_size"),
    [pytest.param(n, e, marks=[pytest.mark.world_size(n), *slow(e)]) for n, e in TOPOLOGIES],
)
def test_same_as_one_process(results, num_processes, ep_size):
    one, many = results(1, 1), results(num_processes, ep_size)
    assert one.keys() == many.keys()
    worst = {}
    for name, expected in one.items():
        kind = "/".join(name.split("/")[:2])
        error = np.abs(many[name] - expected).max() / max(np.abs(expected).max(), 1e-6)
        worst[kind] = max(worst.get(kind, 0.0), float(error))
    assert all(error < TOLERANCE for error in worst.values()), worst


def test_the_cases_are_what_they_claim(results):
    one = results(1, 1)
    for block in range(3):
        stem = f"grad/blocks.{block}.moe.deepspeed_moe.experts.deepspeed_experts"
        idle = {j: np.abs(one[f"idle/{stem}.{j}.weight"]).max() for j in range(4)}
        same = {j: np.abs(one[f"same/{stem}.{j}.weight"]).max() for j in range(4)}
        mixed = {j: np.abs(one[f"adam/{stem}.{j}.weight"]).max() for j in range(4)}
        assert idle[2] == 0
        assert min(idle[0], idle[1], idle[3]) > 0
        assert same[0] == same[2] == 0 < min(same[1], same[3])
        assert min(mixed.values()) > 0
    assert (one["clip/norms"] > 0.05).all(), "clipping must bite"
    assert one["adam/losses"][-1] != one["adam/losses"][0]
