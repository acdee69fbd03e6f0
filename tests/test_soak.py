"""What the soak calls flat. The soak itself is a program: python tests/soak.py."""

import pytest

from tests.soak import Reading, parts, report, verdict
from tests.tiny_run import steps_done


def readings(count: int = 60, memory=lambda step: 500_000_000, files=lambda step: 30) -> dict[int, list[Reading]]:
    steps = range(0, 100 * count, 100)
    return {rank: [Reading(step, memory(step), files(step)) for step in steps] for rank in range(2)}


def test_flat_is_flat():
    assert verdict(readings(), warm_up=1000) == []
    head, first, *others = report(readings(), warm_up=1000)
    assert head.split() == ["steps", "rank", "0:", "MB", "files", "rank", "1:", "MB", "files"]
    assert first.split() == ["1000-1400", "500.00", "30", "500.00", "30"]
    assert len(others) == 9


def test_what_happens_while_warming_up_does_not_count():
    assert verdict(readings(memory=lambda step: 500_000_000 + 10**8 * (step > 900)), warm_up=1000) == []


def test_a_moment_of_saving_is_no_leak():
    peak = readings(memory=lambda step: 500_000_000 + 10**8 * (step == 3000), files=lambda step: 30 + (step == 3000))
    assert verdict(peak, warm_up=1000) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"memory": lambda step: 500_000_000 + 2_000 * step}, "memory changed by 1.8%"),
        ({"memory": lambda step: 500_000_000 - 10_000_000 * (step > 4000)}, "memory changed by 2.0%"),
        ({"files": lambda step: 30 + step // 2000}, "open files grew from 30 to 32"),
        ({"count": 15}, "5 readings after step 1000; 10 are needed"),
    ],
)
def test_what_grows_is_told_of_each_process(change, says):
    told = verdict(readings(**change), warm_up=1000)
    assert [line.partition(":")[0] for line in told] == ["rank 0", "rank 1"]
    assert all(says in line for line in told)


def test_nothing_seen_is_no_success():
    assert verdict({}, warm_up=1000) == ["no training process was seen"]


def test_parts_tile_what_is_after_the_first_steps():
    [later, *_] = readings(count=37).values()
    assert [reading for part in parts(later, 1000) for reading in part] == later[10:]


def test_steps_are_those_of_the_last_whole_line(tmp_path):
    log = tmp_path / "log.jsonl"
    assert steps_done(log) == 0
    log.write_text('{"step": 100}\n{"step": 200}\n{"ste')
    assert steps_done(log) == 200
