"""Experts on other processes change nothing with Adam, its average and noisy gates; what travels, and when.

All other ways to train: test_gradient_parity.py
"""

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


def slow(topology: tuple[int, int]) -> list[pytest.MarkDecorator]:
    """Other topologies are what test_gradient_parity.py tries every time."""
    return [] if topology == (2, 2) else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("num_processes", "ep_size"),
    [pytest.param(n, e, marks=[pytest.mark.world_size(n), *slow((n, e))]) for n, e in TOPOLOGIES],
)
def test_same_as_one_process(results, num_processes, ep_size):
    one, many = results(1, 1), results(num_processes, ep_size)
    assert one.keys() == {name for name in many if not name.startswith(("sent/", "order/"))}
    assert one["plain/losses"][-1] != one["plain/losses"][0]
    worst = {}
    for name, expected in one.items():
        kind = "/".join(name.split("/")[:2])
        error = np.abs(many[name] - expected).max() / max(np.abs(expected).max(), 1e-6)
        worst[kind] = max(worst.get(kind, 0.0), float(error))
    assert all(error < TOLERANCE for error in worst.values()), worst


@pytest.mark.world_size(2)
@pytest.mark.parametrize("dispatch", ["samples", "weights"])
def test_the_cost_model_says_what_is_sent(results, dispatch):
    predicted, counted = results(2, 2)[f"sent/{dispatch}"]
    assert counted == pytest.approx(predicted, rel=1e-12)


@pytest.mark.world_size(2)
def test_exchanges_run_beside_other_work(results):
    """Samples set out before their block's modulation; experts before the block that precedes theirs."""
    assert str(results(2, 2)["order/samples"]) == 3 * ">m>a"
    assert str(results(2, 2)["order/weights"]) == ">" + ">ma" + ">ma" + "ma"
