"""Token experts on other processes change nothing with Adam, in checkpoints, and for uneven batches in evaluation.

All other ways to train: test_gradient_parity.py
"""

import numpy as np
import pytest
from launching import WORKERS, launched

TOPOLOGIES = [(2, 1), (2, 2), (4, 2)]
pytestmark = pytest.mark.slow  # test_gradient_parity.py and test_resharding.py try these experts every time
TOLERANCE = 1e-5  # float32, relative to the largest entry of a tensor


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each (processes, ep_size) came to, trained on demand."""
    folder, done = tmp_path_factory.mktemp("token_parallel"), {}

    def of(num_processes: int, ep_size: int) -> dict[str, np.ndarray]:
        if (num_processes, ep_size) not in done:
            path = folder / f"{num_processes}_{ep_size}.npz"
            launched(num_processes, WORKERS / "token_parallel.py", ep_size, path)
            done[num_processes, ep_size] = dict(np.load(path))
        return done[num_processes, ep_size]

    return of


def worst_errors(ours: dict, expected: dict, cases: tuple[str, ...]) -> dict[str, float]:
    """Largest relative error of ``cases`` by kind of result, e.g. adam/grad."""
    assert ours.keys() == expected.keys()
    worst = {}
    for name, value in expected.items():
        case, kind, *_ = name.split("/")
        if case not in cases:
            continue
        kind = f"{case}/{kind}"
        error = np.abs(ours[name] - value).max() / max(np.abs(value).max(), 1e-6)
        worst[kind] = max(worst.get(kind, 0.0), float(error))
    return worst


@pytest.mark.parametrize(
    ("num_processes", "ep_size"),
    [pytest.param(n, e, marks=pytest.mark.world_size(n)) for n, e in TOPOLOGIES],
)
def test_same_as_one_process(results, num_processes, ep_size):
    one, many = results(1, 1), results(num_processes, ep_size)
    worst = worst_errors(many, one, ("adam", "uneven"))
    assert all(error < TOLERANCE for error in worst.values()), worst
    assert many["saved/differs"] == 0
    for name in (n for n in one if n.startswith("initial/")):
        assert np.array_equal(one[name], many[name]), name


@pytest.mark.world_size(2)
def test_load_balance_loss_of_the_same_micro_batches(results):
    """Its gradient, too, is the same wherever experts live."""
    worst = worst_errors(results(2, 2), results(2, 1), ("balance",))
    assert all(error < TOLERANCE for error in worst.values()), worst


def test_the_load_balance_loss_reaches_the_gates(results):
    one = results(1, 1)
    for block in range(2):
        gates = f"grad/blocks.{block}.moe.deepspeed_moe.gate.wg.weight"
        assert np.abs(one[f"balance/{gates}"] - one[f"adam/{gates}"]).max() > 1e-6
    assert one["adam/losses"][-1] != one["adam/losses"][0]
