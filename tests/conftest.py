"""Settings shared by all tests: the CPU, unless a GPU run asks for cuda; a cache of their own."""

import os
import signal
import sys
import tempfile

import pytest
from hypothesis import settings

# No deadline: a machine that is busy may stop for a moment. And no chance: what fails here fails everywhere.
settings.register_profile("the same everywhere", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, derandomize=False)  # `make test-slow`
settings.load_profile("the same everywhere")

# Of two workers none should be left with minutes of work when the other has nothing more to do.
LONGEST = (
    "demo",
    "train",
    "fault_campaign",
    "sample",
    "gradient_parity",
    "nodes",
    "faults",
    "resharding",
    "expert_mix_cuda",
)

CACHE = tempfile.TemporaryDirectory(prefix="switchdit-tests-")  # removed when Python ends

# programs that are started hear these signals, also where the tests run in the background of a script or under nohup
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # several processes share the cores
os.environ["SWITCHDIT_CACHE"] = CACHE.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others as they come."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="module", autouse=True)
def _each_file_leaves_no_process_group():
    """What tests leave behind would tell the files after them of another world than a user's."""
    yield
    distributed = sys.modules.get("torch.distributed")
    assert not (distributed and distributed.is_initialized()), "a test of this file left torch.distributed initialised"
