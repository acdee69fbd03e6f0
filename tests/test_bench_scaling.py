"""The weak scaling benchmark: what it refuses, and that it measures."""

import json

import pytest
from launching import environment

from tools import bench_scaling


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--processes", "2", "3", "--ep_size", "2"], "--processes 3 must be divisible by --ep_size 2"),
        (["--steps", "0"], "--processes, --micro_batch, --steps and --ep_size must be at least 1"),
        (["--ds_config", "absent.json"], "--ds_config absent.json does not exist"),
    ],
)
def test_mistakes_are_told_in_one_line(monkeypatch, capsys, arguments, says):
    monkeypatch.setattr("sys.argv", ["bench_scaling.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        bench_scaling.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {says}\n"


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_what_it_prints(monkeypatch, capsys):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["bench_scaling.py", "--processes", "1", "2", "--ep_size", "1", "--steps", "3"])
    bench_scaling.main()
    *_, one, two, _, line = capsys.readouterr().out.splitlines()
    results = json.loads(line)["results"]
    assert [row["processes"] for row in results] == [1, 2]
    assert results[0]["ratio"] == results[0]["efficiency"] == 1
    assert results[1]["images"] == pytest.approx(2 * 8 / results[1]["step"])
    assert results[1]["efficiency"] == pytest.approx(results[0]["step"] / results[1]["step"])
    assert one.split()[0] == "1"
    assert two.split()[0] == "2"
